"""What is open, pending or in disagreement, and whether that is fine; for `status` and the doctor."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.events.queues import depths
from kino_refunds.intake.gate import Gate, read_gate
from kino_refunds.intake.workforce import read_workforce
from kino_refunds.reconciliation.settled import OVERDUE_MAX
from kino_refunds.reconciliation.verified import HORIZON_AGE_WARN, Verification, read_verified
from kino_refunds.schedule import Run, entries, read_schedule

if TYPE_CHECKING:
    import redis

    from kino_refunds.db.engine import Connection, Engine
    from kino_refunds.settings import Settings


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 charge`, `2,000 charges`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Charges:
    """Some open charges: how many, their whole credits, and the job among them that is due longest."""

    charges: int
    credits: int
    oldest_job: str | None


@dataclass(frozen=True, slots=True)
class Letters:
    """Open dead letters by reason, and the credits of open charges that they name (each charge once)."""

    by_reason: Mapping[str, int]
    credits_at_stake: int
    oldest: int | None
    """The number of the oldest."""

    @property
    def count(self) -> int:
        """How many letters are open."""
        return sum(self.by_reason.values())


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is not fine, and the one command to type."""

    what: str
    command: str


@dataclass(frozen=True, slots=True)
class Standing:
    """The figures that on-call reads first, read in one transaction; `at` is the ledger's clock."""

    at: datetime
    gate: Gate
    workers_alive: int
    waiting_for_retry: int
    waiting_since: datetime | None
    open: Charges
    overdue: Charges
    """Past deadline and grace; in the first 5 minutes of that the sweep asks the job source."""
    overdue_late: Charges
    """Those for which these 5 minutes are over."""
    letters: Letters
    breaks_open: int
    oldest_break: int | None
    runs: Sequence[Run]
    verified: Verification

    def troubles(self) -> Iterator[Trouble]:
        """Give each thing that is not fine, the most urgent first."""
        if self.gate.paused:
            yield Trouble(f"intake is paused by {self.gate.actor}: {self.gate.reason}", "kino-refunds intake status")
        if not self.workers_alive:
            yield Trouble("no worker is alive", "kino-refunds intake status")
        if self.overdue_late.charges:
            late = self.overdue_late
            text = f"overdue and not settled: {counted(late.charges, 'charge')}, {counted(late.credits, 'credit')}"
            one = f"kino-refunds why {shlex.quote(late.oldest_job or '')}"
            yield Trouble(text, one if late.charges == 1 else "kino-refunds charges ask --dry-run")
        if self.letters.count:
            stake = counted(self.letters.credits_at_stake, "credit")
            one = f"kino-refunds dead-letters show {self.letters.oldest}"
            yield Trouble(
                f"{counted(self.letters.count, 'dead letter')} open, {stake} at stake",
                one if self.letters.count == 1 else "kino-refunds dead-letters list",
            )
        if self.breaks_open:
            one = f"kino-refunds breaks show {self.oldest_break}"
            text = f"{counted(self.breaks_open, 'break')} open"
            yield Trouble(text, one if self.breaks_open == 1 else "kino-refunds breaks list")
        for run in self.runs:
            if run.late or run.stuck:
                state = "does not run" if run.late else "starts and does not end"
                yield Trouble(f"{run.what}: {state}", "kino-refunds schedule")
        age = self.verified.horizon_age
        if age is not None and age > HORIZON_AGE_WARN:
            text = f"a transaction has been open for {age.total_seconds() / 60:,.0f} min; statements and relay wait"
            yield Trouble(text, "kino-refunds doctor")


# Everything is counted over open rows only, so that a large ledger answers as fast as a small one.
_COUNTS = sa.text("""
    WITH overdue AS (
        SELECT o.charge_id, o.credits, o.deadline_at + make_interval(secs => :grace_s) AS due_at
        FROM kino.open_charge o
        WHERE o.deadline_at < (SELECT kino.clock()) - make_interval(secs => :grace_s)
    )
    SELECT kino.clock() AS at,
        (SELECT count(*) FROM kino.pending_event) AS waiting_for_retry,
        (SELECT min(first_seen_at) FROM kino.pending_event) AS waiting_since,
        (SELECT count(*) FROM kino.break WHERE status IN ('open', 'investigating', 'repaired') AND NOT canary)
            AS breaks_open,
        (SELECT min(break_id) FROM kino.break
            WHERE status IN ('open', 'investigating', 'repaired') AND NOT canary) AS oldest_break,
        (SELECT c.job_id FROM overdue JOIN kino.charge c USING (charge_id) ORDER BY due_at, charge_id LIMIT 1)
            AS oldest_job,
        o.charges, o.credits, d.overdue, d.overdue_credits, d.late, d.late_credits
    FROM (SELECT count(*) AS charges, coalesce(sum(credits), 0) AS credits FROM kino.open_charge) o,
         (SELECT count(*) AS overdue, coalesce(sum(credits), 0) AS overdue_credits,
                 count(*) FILTER (WHERE due_at < kino.clock() - :overdue_max) AS late,
                 coalesce(sum(credits) FILTER (WHERE due_at < kino.clock() - :overdue_max), 0) AS late_credits
          FROM overdue) d
""")
_LETTERS = sa.text("""
    SELECT reason, count(*) AS letters, min(dead_letter_id) AS oldest FROM kino.dead_letter
    WHERE status = 'open' GROUP BY reason ORDER BY 2 DESC, 1
""")
_AT_STAKE = sa.text("""
    SELECT coalesce(sum(o.credits), 0) FROM kino.open_charge o JOIN kino.charge c USING (charge_id)
    WHERE c.job_id IN (SELECT d.job_id FROM kino.dead_letter d WHERE d.status = 'open' AND d.job_id IS NOT NULL)
""")


def read_standing(connection: Connection, settings: Settings) -> Standing:
    """Read how things stand; raises what Postgres raises."""
    wanted = {"grace_s": settings.overdue_grace_s, "overdue_max": OVERDUE_MAX}
    counts = connection.execute(_COUNTS, wanted).one()
    letters = connection.execute(_LETTERS).all()
    return Standing(
        at=counts.at,
        gate=read_gate(connection),
        workers_alive=read_workforce(connection).alive,
        waiting_for_retry=counts.waiting_for_retry,
        waiting_since=counts.waiting_since,
        open=Charges(counts.charges, int(counts.credits), None),
        overdue=Charges(counts.overdue, int(counts.overdue_credits), counts.oldest_job),
        overdue_late=Charges(counts.late, int(counts.late_credits), counts.oldest_job if counts.late else None),
        letters=Letters(
            {row.reason: row.letters for row in letters},
            int(connection.execute(_AT_STAKE).scalar_one()),
            min((row.oldest for row in letters), default=None),
        ),
        breaks_open=counts.breaks_open,
        oldest_break=counts.oldest_break,
        runs=read_schedule(connection, entries(settings)),
        verified=read_verified(connection),
    )


@dataclass(frozen=True, slots=True)
class Status:
    """The screen of `status`: how things stand, and what waits in Redis; its fields are the keys of the JSON form."""

    fine: bool
    at: datetime
    troubles: Sequence[Trouble]
    intake: str
    intake_reason: str | None
    intake_paused_by: str | None
    workers_alive: int
    waiting_for_retry: int
    waiting_since: datetime | None
    breaks_open: int
    charges_open: int
    credits_held: int
    charges_overdue: int
    credits_overdue: int
    queues: Mapping[str, int]
    dead_letters_open: Mapping[str, int]
    credits_at_stake: int
    verified_through: datetime | None
    missed_runs: Mapping[str, int]
    late_runs: Mapping[str, datetime | None]


def read_status(engine: Engine, client: redis.Redis, settings: Settings) -> Status:
    """Read everything that on-call looks at first; raises what Postgres and Redis raise."""
    with engine.connect() as connection:
        standing = read_standing(connection, settings)
    troubles = list(standing.troubles())
    gate = standing.gate
    return Status(
        fine=not troubles,
        at=standing.at,
        troubles=troubles,
        intake="paused" if gate.paused else "open",
        intake_reason=gate.reason if gate.paused else None,
        intake_paused_by=gate.actor if gate.paused else None,
        workers_alive=standing.workers_alive,
        waiting_for_retry=standing.waiting_for_retry,
        waiting_since=standing.waiting_since,
        breaks_open=standing.breaks_open,
        charges_open=standing.open.charges,
        credits_held=standing.open.credits,
        charges_overdue=standing.overdue.charges,
        credits_overdue=standing.overdue.credits,
        queues=depths(client),
        dead_letters_open=standing.letters.by_reason,
        credits_at_stake=standing.letters.credits_at_stake,
        verified_through=standing.verified.through,
        missed_runs={run.what: run.missed for run in standing.runs if run.missed},
        late_runs={run.what: run.last for run in standing.runs if run.late or run.stuck},
    )
