"""Heartbeats: each worker's row in `intake_worker`. People on call read them; nothing is decided by them."""

from __future__ import annotations

import json
import os
import socket
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
CLOCK_SKEW_MAX: Final = timedelta(seconds=5)
"""The same as in the doctor: NTP keeps hosts within milliseconds."""

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
