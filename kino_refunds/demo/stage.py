"""The demo's stage: scratch servers, two workers and beat, and the functions that catch and kill a worker."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.processes import CeleryProcess, settings_for, start_beat, start_worker
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.connection import redis_client
from kino_refunds.events.envelope import parse
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import depths, in_flight
from kino_refunds.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kino_refunds.dev.embedded import Servers

CATCHES_MAX = 400
LOOK_EVERY_S = 0.1
COMMIT_WITHIN_S = 0.1
"""A COMMIT that was sent before its worker was stopped has begun after this time; its length depends on the disk."""
LIMITS_MS = {"lock": 500, "statement": 1500, "idle_in_transaction": 500, "transaction": 1500, "tcp_user": 500}
OVERDUE_GRACE_S = 2.0
SOURCE_QUERY = "SELECT job_id, state, origin, stage, result_produced FROM pipeline.job WHERE job_id = ANY(:job_ids)"
FINISHED_QUERY = """
    SELECT job_id, state, origin, stage, result_produced, finished_at, account_id, credits FROM pipeline.job
    WHERE finished_at >= :since AND finished_at < :until ORDER BY finished_at, job_id
"""
SETTINGS = {
    # Another worker recovers a batch after the alive TTL: 9.5 s with these settings, 65 s with the defaults.
    **{f"KINO_{name.upper()}_TIMEOUT_MS": str(value) for name, value in LIMITS_MS.items()},
    "KINO_JOB_SOURCE": "sql",
    "KINO_JOB_SOURCE_QUERY": SOURCE_QUERY,
    "KINO_JOB_SOURCE_FINISHED_QUERY": FINISHED_QUERY,
    "KINO_JOB_SOURCE_COMPLETE_QUERY": "SELECT clock_timestamp()",
    "KINO_CHECK_GRACE_S": "0",
    "KINO_OVERDUE_EVERY_S": "1",
    "KINO_OVERDUE_GRACE_S": str(OVERDUE_GRACE_S),
    "KINO_OVERDUE_ASK_WINDOW_S": "4",
    "KINO_RETRY_EVERY_S": "1",
}
"""The settings of the demo that differ from the defaults: steps that would take minutes take seconds."""

_PIPELINE = (
    b"CREATE SCHEMA pipeline",
    b"""
        CREATE TABLE pipeline.job (
            job_id text COLLATE "C" PRIMARY KEY, state text, origin text, stage text, result_produced boolean,
            account_id text, credits bigint, finished_at timestamptz NOT NULL DEFAULT clock_timestamp())
    """,
    b"GRANT USAGE ON SCHEMA pipeline TO kino_read",
    b"GRANT SELECT ON pipeline.job TO kino_read",
)
"""The pipeline's own table of its jobs' ends: the job source that the overdue sweep and `matching` ask."""


_UNKNOWN = """
    SELECT count(*) FROM unnest(CAST(:events AS text[])) AS held (event_id)
    WHERE NOT EXISTS (SELECT FROM kino.inbox_event i WHERE i.event_id = held.event_id)
      AND NOT EXISTS (SELECT FROM kino.pending_event p WHERE p.event_id = held.event_id)
      AND NOT EXISTS (SELECT FROM kino.dead_letter d WHERE d.event_id = held.event_id)
"""

_COMMITTING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name = 'kino-intake' AND state = 'active' AND query = 'COMMIT'
"""


def events_in(raws: Iterable[bytes]) -> list[str]:
    """Return the ids of the events in these messages; a message that does not parse has none."""
    found = []
    for raw in raws:
        with suppress(MalformedMessage):
            found.append(parse(raw).id)
    return found


def alive_ttl_s() -> float:
    """Return the alive TTL of this stage in seconds: so long after its death a worker counts as dead."""
    limits: dict[str, Any] = {f"{name}_timeout_ms": value for name, value in LIMITS_MS.items()}
    return Settings.model_construct(**limits).alive_ttl_s


class Stage:
    """The servers and processes of the demo, which no other program uses; all are stopped at the end of the block."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.workers: dict[int, CeleryProcess] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        migrate(self.servers.database_url(role="kino_owner"))
        with self.servers.postgres.connect("kino") as superuser:
            for statement in _PIPELINE:
                superuser.execute(statement)
        with self._stack as stack:
            self.product = self._engine("kino_product")
            self.operator = self._engine("kino_worker")
            self.oncall = self._engine("kino_oncall")
            self.redis = stack.enter_context(redis_client(self.servers.redis_url()))
            self.publisher = stack.enter_context(EventPublisher(self.servers.redis_url()))
            self.workers = {number: self._start_worker(number) for number in (1, 2)}
            folder = self.servers.data_dir
            self._beat = start_beat(self.settings, folder / "beat-schedule", folder / "beat.log")
            stack.callback(self._beat.stop)
            # Nothing failed: from here on everything is stopped at the end of the block.
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def settings(self) -> dict[str, str]:
        """The KINO_* variables of the processes, also for a shell that uses the same ledger."""
        return settings_for(self.servers, **SETTINGS, KINO_JOB_SOURCE_URL=self.servers.database_url(role="kino_read"))

    def require_alive(self, *, for_s: float = 0.0) -> None:
        """Raise ServerFailed if a server or a process has ended unexpectedly, or does so within `for_s`."""
        deadline = time.monotonic() + for_s
        while True:
            self._require_alive_now()
            if time.monotonic() >= deadline:
                return
            time.sleep(LOOK_EVERY_S)

    def _require_alive_now(self) -> None:
        self.servers.postgres.require_alive()
        self.servers.redis.require_alive()
        for process in (*self.workers.values(), self._beat):
            process.require_alive()

    def ready(self) -> bool:
        """Return whether the intake of every worker has started."""
        return bool(self.one("SELECT count(*) FROM kino.intake_worker") == len(self.workers))

    def one(self, query: str, **values: Any) -> Any:
        """Return the one value that a query gives."""
        with self.operator.connect() as connection:
            return connection.execute(sa.text(query), values).scalar_one()

    def queued(self) -> int:
        """Return how many messages are in Redis: queued, in flight or recovered."""
        return sum(depths(self.redis).values())

    def catch(self) -> tuple[int, list[bytes]] | None:
        """Stop one worker after the other for an instant; leave the first stopped that has an undecided batch.

        Returns its number and its messages; None if no worker was caught before all messages were settled.
        """
        worker_ids = self.one("SELECT jsonb_object_agg(pid, worker_id) FROM kino.intake_worker")
        for _ in range(CATCHES_MAX):
            for number, worker in self.workers.items():
                os.kill(worker.pid, signal.SIGSTOP)
                held = in_flight(self.redis, worker_ids[str(worker.pid)])
                if held and self._is_undecided(held):
                    return number, held
                os.kill(worker.pid, signal.SIGCONT)
            if not self.queued():
                return None
        return None

    def _is_undecided(self, held: list[bytes]) -> bool:
        """Return whether the batch of a stopped worker is not committed: then one of its events is recorded nowhere."""
        time.sleep(COMMIT_WITHIN_S)
        for _ in range(CATCHES_MAX):
            if not self.one(_COMMITTING):  # the other worker's COMMIT is seen too: one instant without any is enough
                break
            time.sleep(LOOK_EVERY_S / 10)
        return bool(self.one(_UNKNOWN, events=events_in(held)))

    def kill(self, number: int) -> None:
        """End a worker by SIGKILL."""
        self.workers.pop(number).kill()

    def duplicates(self) -> int:
        """Return the sum of the duplicates in the workers' logs: a duplicate leaves no row in the ledger."""
        found = 0
        for log_file in self.servers.data_dir.glob("worker-*.log"):
            for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, AttributeError):  # some lines of a worker's log come from libraries
                    found += json.loads(line).get("outcomes", {}).get("duplicate", 0)
        return found

    def _engine(self, role: str) -> sa.Engine:
        engine = create_engine(self.servers.database_url(role=role), application_name=f"kino-demo-{role}")
        self._stack.callback(engine.dispose)
        return engine

    def _start_worker(self, number: int) -> CeleryProcess:
        settings = self.settings | {"KINO_LOG_FORMAT": "json"}
        worker = start_worker(settings, self.servers.data_dir / f"worker-{number}.log")
        self._stack.callback(worker.stop)
        return worker
