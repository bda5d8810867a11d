"""Heartbeats: each worker's row in `intake_worker`. People on call read them; nothing is decided by them."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

log = get_logger(__name__)

HEARTBEAT_EVERY_S: Final = 10.0
FORGOTTEN_AFTER: Final = timedelta(days=7)
SHOWN_FOR: Final = timedelta(days=1)
SHOWN_MAX: Final = 20
CLOCK_SKEW_MAX: Final = timedelta(seconds=5)
"""The same as in the doctor: NTP keeps hosts within milliseconds."""

# Three heartbeats: one may be late behind a slow batch.
IS_ALIVE: Final = "(stopped_at IS NULL AND seen_at > kino.clock() - interval '30 seconds')"
"""The SQL condition, over `kino.intake_worker`, for a worker that is alive: it has not stopped, and wrote a heartbeat
in the last 30 s."""

_BEAT = sa.text("""
    INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at, counts)
    VALUES (:worker_id, :host, :pid, :build, kino.clock(), kino.clock(), CAST(:counts AS jsonb))
    ON CONFLICT (worker_id) DO UPDATE SET seen_at = kino.clock(), counts = excluded.counts
""")
_STOP = sa.text("""
    UPDATE kino.intake_worker SET stopped_at = kino.clock(), seen_at = kino.clock(), counts = CAST(:counts AS jsonb)
    WHERE worker_id = :worker_id
""")
_FORGET = sa.text("DELETE FROM kino.intake_worker WHERE seen_at < kino.clock() - :after")


class Heartbeat:
    """One worker's row in `intake_worker`; `counts` is read at each heartbeat."""

    def __init__(self, engine: sa.Engine, worker_id: str, build: str, counts: Mapping[str, int]) -> None:
        self._engine = engine
        self._counts = counts
        self._warned_of_skew = False
        self._row = {"worker_id": worker_id, "host": socket.gethostname(), "pid": os.getpid(), "build": build}

    def beat(self) -> None:
        """Write that this worker is alive and its counts so far, delete the rows of old workers, and compare clocks."""
        self._write(_BEAT)
        with self._engine.begin() as connection:
            connection.execute(_FORGET, {"after": FORGOTTEN_AFTER})
        self._compare_clocks()

    def stop(self) -> None:
        """Write that this worker has stopped."""
        self._write(_STOP)

    def _write(self, statement: sa.TextClause) -> None:
        with self._engine.begin() as connection:
            connection.execute(statement, {**self._row, "counts": json.dumps(self._counts)})

    def _compare_clocks(self) -> None:
        """Log once when this host's clock differs from Postgres', and once when they agree again."""
        with self._engine.connect() as connection:
            skew = datetime.now(UTC) - read_clock(connection)  # compared for a log line; nothing is decided by it
        off = abs(skew) > CLOCK_SKEW_MAX
        if off and not self._warned_of_skew:
            log.warning(
                "this host's clock differs from Postgres': set both by NTP;"
                " sweeps of this host withhold presumed timeouts and expiry",
                ahead_s=round(skew.total_seconds(), 1),
            )
        elif self._warned_of_skew and not off:
            log.info("this host's clock agrees with Postgres' again")
        self._warned_of_skew = off


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
