"""The schedule: the sweeps that run automatically, and a row for each run, so that two beats make one run (section 7).

A period of time is a slot. The process that inserts the slot's row runs the sweep. Beat may run twice or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.intake.workforce import read_workforce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.settings import Settings

KEPT_FOR = timedelta(days=1)
LOOK_BACK = timedelta(hours=1)
LATE_SLOTS = 3
LATE_MIN = timedelta(seconds=30)
"""A sweep that runs every two seconds is not late after six: a restart of beat takes longer."""
SAMPLE_EVERY = timedelta(minutes=1)
"""The precision of "verified through": enough for people, at half a million rows a year."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Entry:
    """A sweep that runs automatically; `name` is its Celery task, `what` says in words what it does."""

    name: str
    every: timedelta
    what: str

    def slot(self, now: datetime) -> datetime:
        """Return the start of the slot that contains `now`: the same on every machine."""
        return EPOCH + (now - EPOCH) // self.every * self.every


@dataclass(frozen=True, slots=True)
class Run:
    """The state of an entry; `missed` counts the slots of the last hour without a run.

    `late`: it should have run by now and did not; a sweep that runs again is no longer late. `stuck`: its runs start
    and do not end.
    """

    name: str
    every_s: float
    last: datetime | None
    finished: datetime | None
    ended: datetime | None
    """The newest slot whose run ended."""
    result: Any
    next: datetime
    missed: int
    late: bool
    stuck: bool
    what: str


def entries(settings: Settings) -> list[Entry]:
    """Return the sweeps that run with these settings; one that is switched off is left out."""
    scheduled = [
        Entry("kino.sweep_retries", timedelta(seconds=settings.retry_every_s), "retry pending events"),
        Entry("kino.expire_lots", timedelta(seconds=settings.expiry_every_s), "expire lots"),
        Entry("kino.sample_clock", SAMPLE_EVERY, "note which time belongs to which transaction"),
    ]
    if settings.job_source is not None:
        every = timedelta(seconds=settings.overdue_every_s)
        scheduled.append(Entry("kino.sweep_overdue", every, "ask about jobs without an event"))
    every = timedelta(seconds=settings.check_every_s)
    scheduled.append(Entry("kino.run_checks", every, "run the checks of reconciliation"))
    if settings.relay_queue is not None:
        every = timedelta(seconds=settings.relay_every_s)
        scheduled.append(Entry("kino.relay_refunds", every, "tell the product of refunds"))
    return scheduled


def claim_slot(connection: sa.Connection, entry: Entry, *, claimed_by: str) -> datetime | None:
    """Claim the current slot in the caller's transaction; return its start, or None if another process has it.

    Also deletes the rows of slots from a day ago. A row whose claim lies in the future was written by a clock that has
    been set back since. It is no run: the slot is claimed over it, or no sweep would run until the clock has come that
    far again. (The clock is read where the rows conflict, after any wait, so a claim of this very moment is before it.)
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
    """Store that a person starts a run now, in the caller's transaction; return the key of the row for `finish_slot`.

    No slot is claimed: the next scheduled run takes place all the same. These rows are kept, because people run few.
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
    """Store that a run has ended, and its result."""
    connection.execute(
        sa.text(
            "UPDATE kino.schedule_slot SET finished_at = kino.clock(), result = CAST(:result AS jsonb)"
            " WHERE name = :name AND slot_at = :slot_at"
        ),
        {"name": entry.name, "slot_at": slot_at, "result": json.dumps(result)},
    )


# A slot in the future was claimed by a clock that has been set back since: it is no run.
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
    """Return for each entry when it ran last, when it runs next, and whether it is late or stuck."""
    now = read_clock(connection)
    workers_since = read_workforce(connection).since
    wanted = {
        "names": [entry.name for entry in scheduled],
        "sinces": [entry.slot(now - LOOK_BACK) for entry in scheduled],
        "currents": [entry.slot(now) for entry in scheduled],
        "now": now,
    }
    found = {name: Slots(*slots) for name, *slots in connection.execute(_RUNS, wanted)}
    return [_run(entry, found[entry.name], workers_since, now) for entry in scheduled]


class Slots(NamedTuple):
    """What the slots of one sweep say, up to now; None where none has run."""

    last: datetime | None = None
    """The newest slot in which a run started."""
    finished: datetime | None = None
    """When that run ended."""
    result: Any = None
    first: datetime | None = None
    """The first slot that is looked at."""
    slots: int = 0
    """Slots before the current one in which a run started."""
    ended: datetime | None = None
    """The newest slot whose run came to its end."""


def _run(entry: Entry, row: Slots, workers_since: datetime | None, now: datetime) -> Run:
    late_after = max(LATE_SLOTS * entry.every, LATE_MIN)
    # A sweep that never ran is late only if a worker has been alive to run it.
    expected_since = row.last or workers_since
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
        stuck=row.last is not None and row.last - (row.ended or workers_since or row.last) > late_after,
        what=entry.what,
    )
