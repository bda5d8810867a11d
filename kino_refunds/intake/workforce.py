"""Which workers are alive, by their heartbeats. `heartbeat.py` writes them, and a log; a command needs neither."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

if TYPE_CHECKING:
    from datetime import datetime

SHOWN_FOR: Final = timedelta(days=1)
SHOWN_MAX: Final = 20

# Three heartbeats: one may be late behind a slow batch.
IS_ALIVE: Final = "(stopped_at IS NULL AND seen_at > kino.clock() - interval '30 seconds')"
"""The SQL condition, over `kino.intake_worker`, for a worker that is alive: it has not stopped, and wrote a heartbeat
in the last 30 s."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker at its last heartbeat; `messages` is how many it has taken since it started."""

    worker_id: str
    host: str
    pid: int
    build: str
    started_at: datetime
    seen_at: datetime
    alive: bool
    messages: int


@dataclass(frozen=True, slots=True)
class Workforce:
    """All workers together: how many are alive, when the first of those started (`since`), and their builds."""

    alive: int
    since: datetime | None
    builds: str | None
    seen_at: datetime | None
    """The time of the newest heartbeat, also of a worker that has stopped."""


_WORKERS = sa.text(f"""
    SELECT CAST(worker_id AS text), host, pid, build, started_at, seen_at, {IS_ALIVE} AS alive,
           CAST(coalesce(counts ->> 'messages', '0') AS bigint)
    FROM kino.intake_worker WHERE seen_at > kino.clock() - :shown_for
    ORDER BY alive DESC, seen_at DESC LIMIT :shown_max
""")  # noqa: S608 - the condition is a constant
_WORKFORCE = sa.text(f"""
    SELECT count(*) FILTER (WHERE {IS_ALIVE}), min(started_at) FILTER (WHERE {IS_ALIVE}),
           string_agg(DISTINCT build, ', ' ORDER BY build) FILTER (WHERE {IS_ALIVE}), max(seen_at)
    FROM kino.intake_worker
""")  # noqa: S608 - the condition is a constant


def read_workers(connection: sa.Connection) -> list[Worker]:
    """Return the workers that were seen within a day, those alive first; at most 20."""
    rows = connection.execute(_WORKERS, {"shown_for": SHOWN_FOR, "shown_max": SHOWN_MAX})
    return [Worker(*row) for row in rows]


def read_workforce(connection: sa.Connection) -> Workforce:
    """Return how many workers are alive, and what all heartbeats together say; raises what Postgres raises."""
    return Workforce(*connection.execute(_WORKFORCE).one())
