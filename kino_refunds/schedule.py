"""The schedule: what runs by itself, and a row for each run, so that two beats make one run (section 7).

A period of time is a slot. Whoever inserts the slot's row runs; beat may run twice or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.intake.heartbeat import read_workforce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.settings import Settings

KEPT_FOR = timedelta(days=1)
LOOK_BACK = timedelta(hours=1)
LATE_SLOTS = 3
LATE_MIN = timedelta(seconds=30)
"""A sweep every two seconds is not dead after six: a restart of beat takes longer."""
SAMPLE_EVERY = timedelta(minutes=1)
"""How exact "verified through" is: fine enough for people, half a million rows a year."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that runs by itself; `name` is its Celery task."""

    name: str
    every: timedelta
    what: str

    def slot(self, now: datetime) -> datetime:
        """Return the start of the slot that `now` lies in: the same on every machine."""
        return EPOCH + (now - EPOCH) // self.every * self.every


@dataclass(frozen=True, slots=True)
class Run:
    """How an entry stands; `missed` counts slots of the last hour in which nothing ran.

    `late`: it should have run by now and did not. What ran late and runs again is not late any more. `stuck`: its runs
    start and do not end.
    """

    name: str
    every_s: float
    last: datetime | None
    finished: datetime | None
    ended: datetime | None
    """The newest slot whose run came to its end."""
    result: Any
    next: datetime
    missed: int
    late: bool
    stuck: bool
    what: str


def entries(settings: Settings) -> list[Entry]:
    """List what runs with these settings; what is switched off is not in it."""
    scheduled = [
        Entry("kino.sweep_retries", timedelta(seconds=settings.retry_every_s), "try waiting events again"),
        Entry("kino.expire_lots", timedelta(seconds=settings.expiry_every_s), "expire lots"),
        Entry("kino.sample_clock", SAMPLE_EVERY, "note which time belongs to which transaction"),
    ]
    if settings.job_source is not None:
        every = timedelta(seconds=settings.overdue_every_s)
        scheduled.append(Entry("kino.sweep_overdue", every, "ask about jobs without an event"))
    if settings.relay_queue is not None:
        every = timedelta(seconds=settings.relay_every_s)
        scheduled.append(Entry("kino.relay_refunds", every, "tell the product of refunds"))
    return scheduled


def claim_slot(connection: sa.Connection, entry: Entry, *, claimed_by: str) -> datetime | None:
    """Claim the current slot in the caller's transaction; None if somebody has it. Forgets slots of a day ago.

    A row that was claimed later than it is now was written by a clock that has been set back since. It is no run: the
    slot is claimed over it, or nothing would run until that clock's time has come. (The clock is read where the rows
    conflict, after any wait: a claim of this very moment lies behind it.)
    """
    now = read_clock(connection)
    slot_at = entry.slot(now)
    claimed = connection.execute(
        sa.text("""
            INSERT INTO kino.schedule_slot AS s (name, slot_at, claimed_by) VALUES (:name, :slot_at, :claimed_by)
            ON CONFLICT (name, slot_at) DO UPDATE SET
                claimed_by = excluded.claimed_by, claimed_at = excluded.claimed_at, finished_at = NULL, result = NULL
            WHERE s.claimed_at > kino.clock()
            RETURNING slot_at
        """),
        {"name": entry.name, "slot_at": slot_at, "claimed_by": claimed_by},
    ).scalar_one_or_none()
    if claimed is None:
        return None
    connection.execute(
        sa.text("DELETE FROM kino.schedule_slot WHERE name = :name AND slot_at < :before"),
        {"name": entry.name, "before": now - KEPT_FOR},
    )
    return slot_at


def begin_by_hand(connection: sa.Connection, entry: Entry, *, actor: str) -> datetime:
    """Keep that a person starts a run now, in the caller's transaction; return what `finish_slot` finds the row by.

    No slot is claimed: beat's next run takes place all the same. These rows are kept; a person's runs are few.
    """
    begun: datetime = connection.execute(
        sa.text(
            "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by) VALUES (:name, kino.clock(), :claimed_by)"
            " RETURNING slot_at"
        ),
        {"name": entry.name, "claimed_by": actor},
    ).scalar_one()
    return begun


def finish_slot(connection: sa.Connection, entry: Entry, slot_at: datetime, result: dict[str, Any]) -> None:
    """Say that a run has ended, and with what."""
    connection.execute(
        sa.text(
            "UPDATE kino.schedule_slot SET finished_at = kino.clock(), result = CAST(:result AS jsonb)"
            " WHERE name = :name AND slot_at = :slot_at"
        ),
        {"name": entry.name, "slot_at": slot_at, "result": json.dumps(result)},
    )


# A slot later than the clock was claimed by a clock that has been set back since: it is no run.
_RUNS = sa.text("""
    SELECT r.name, last.slot_at AS last, last.finished_at AS finished, last.result, seen.first, seen.slots, seen.ended
    FROM unnest(CAST(:names AS text[]), CAST(:sinces AS timestamptz[]), CAST(:currents AS timestamptz[]))
         AS r (name, since, current)
    LEFT JOIN LATERAL (
        SELECT s.slot_at, s.finished_at, s.result FROM kino.schedule_slot s
        WHERE s.name = r.name AND s.slot_at <= :now AND s.claimed_at <= :now ORDER BY s.slot_at DESC LIMIT 1
    ) last ON true
    CROSS JOIN LATERAL (
        -- Null where nothing ever ran: then nothing was missed either.
        SELECT CASE WHEN min(s.slot_at) < r.since THEN r.since ELSE min(s.slot_at) END AS first,
               count(*) FILTER (WHERE s.slot_at >= r.since AND s.slot_at < r.current) AS slots,
               max(s.slot_at) FILTER (WHERE s.finished_at IS NOT NULL) AS ended
        FROM kino.schedule_slot s WHERE s.name = r.name AND s.slot_at <= :now AND s.claimed_at <= :now
    ) seen
""")


def read_schedule(connection: sa.Connection, scheduled: Sequence[Entry]) -> list[Run]:
    """Say of each entry when it ran last, when it will next, and whether it runs as it should."""
    now = read_clock(connection)
    workers_since = read_workforce(connection).since
    wanted = {
        "names": [entry.name for entry in scheduled],
        "sinces": [entry.slot(now - LOOK_BACK) for entry in scheduled],
        "currents": [entry.slot(now) for entry in scheduled],
        "now": now,
    }
    found = {row.name: row for row in connection.execute(_RUNS, wanted)}
    return [_run(entry, found[entry.name], workers_since, now) for entry in scheduled]


def _run(entry: Entry, row: Any, workers_since: datetime | None, now: datetime) -> Run:
    late_after = max(LATE_SLOTS * entry.every, LATE_MIN)
    # What never ran is late only where a worker has been there to run it.
    expected_since = row.last or workers_since
    started_since = row.ended or workers_since or row.last
    due = max(0, (entry.slot(now) - row.first) // entry.every) if row.first is not None else 0
    return Run(
        name=entry.name,
        every_s=entry.every.total_seconds(),
        last=row.last,
        finished=row.finished,
        ended=row.ended,
        result=row.result,
        next=entry.slot(now) + entry.every,
        missed=max(0, due - row.slots),
        late=expected_since is not None and now - expected_since > late_after,
        stuck=row.last is not None and row.last - started_since > late_after,
        what=entry.what,
    )
