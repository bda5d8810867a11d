"""The schedule: what runs by itself, and a row for each run, so that two beats make one run (section 7).

A period of time is a slot. Whoever inserts the slot's row runs; beat may run twice or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.settings import Settings

KEPT_FOR = timedelta(days=1)
LOOK_BACK = timedelta(hours=1)
LATE_SLOTS = 3
LATE_MIN = timedelta(seconds=30)
"""A sweep every two seconds is not dead after six: a restart of beat takes longer."""
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
    """How an entry stands; `missed` counts slots of the last hour in which nothing ran."""

    name: str
    every_s: float
    last: datetime | None
    finished: datetime | None
    result: Any
    next: datetime
    missed: int
    what: str

    @property
    def late_after(self) -> timedelta:
        """How long after a run the lack of another one means that nothing runs."""
        return max(LATE_SLOTS * timedelta(seconds=self.every_s), LATE_MIN)

    def is_late(self, now: datetime) -> bool:
        """Tell whether it ran and does not any more."""
        return self.last is not None and now - self.last > self.late_after


def entries(settings: Settings) -> list[Entry]:
    """List what runs with these settings; what is switched off is not in it."""
    scheduled = [
        Entry("kino.sweep_retries", timedelta(seconds=settings.retry_every_s), "try waiting events again"),
        Entry("kino.expire_lots", timedelta(seconds=settings.expiry_every_s), "expire lots"),
    ]
    if settings.job_source is not None:
        every = timedelta(seconds=settings.overdue_every_s)
        scheduled.append(Entry("kino.sweep_overdue", every, "ask about jobs without an event"))
    if settings.relay_queue is not None:
        every = timedelta(seconds=settings.relay_every_s)
        scheduled.append(Entry("kino.relay_refunds", every, "tell the product of refunds"))
    return scheduled


def claim_slot(connection: sa.Connection, entry: Entry, *, now: datetime, claimed_by: str) -> datetime | None:
    """Claim the current slot in the caller's transaction; None if somebody has it. Forgets slots of a day ago."""
    slot_at = entry.slot(now)
    claimed = connection.execute(
        sa.text(
            "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by) VALUES (:name, :slot_at, :claimed_by)"
            " ON CONFLICT (name, slot_at) DO NOTHING RETURNING slot_at"
        ),
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
            "UPDATE kino.schedule_slot SET finished_at = clock_timestamp(), result = CAST(:result AS jsonb)"
            " WHERE name = :name AND slot_at = :slot_at"
        ),
        {"name": entry.name, "slot_at": slot_at, "result": json.dumps(result)},
    )


def read_schedule(connection: sa.Connection, scheduled: Sequence[Entry], *, now: datetime) -> list[Run]:
    """Say of each entry when it ran last, when it will next, and how often it should have and did not."""
    runs = []
    for entry in scheduled:
        last = connection.execute(
            sa.text(
                "SELECT slot_at, finished_at, result FROM kino.schedule_slot WHERE name = :name"
                " ORDER BY slot_at DESC LIMIT 1"
            ),
            {"name": entry.name},
        ).one_or_none()
        seen = connection.execute(
            sa.text(
                "SELECT CASE WHEN min(slot_at) < :since THEN :since ELSE min(slot_at) END AS first,"
                "       count(*) FILTER (WHERE slot_at >= :since) AS slots"
                " FROM kino.schedule_slot WHERE name = :name AND slot_at < :current"
            ),
            {"name": entry.name, "since": entry.slot(now - LOOK_BACK), "current": entry.slot(now)},
        ).one()
        due = (entry.slot(now) - seen.first) // entry.every if seen.first is not None else 0
        runs.append(
            Run(
                entry.name,
                entry.every.total_seconds(),
                last.slot_at if last else None,
                last.finished_at if last else None,
                last.result if last else None,
                entry.slot(now) + entry.every,
                max(0, due - seen.slots),
                entry.what,
            )
        )
    return runs
