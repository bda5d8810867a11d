"""The world of a scenario: its database, real workers in it, and the means to break things."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import psycopg
import redis
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.dev.embedded import Servers
from kino_refunds.dev.processes import CeleryProcess, settings_for, start_beat, start_worker
from kino_refunds.errors import ServerFailed
from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import Queues, depths
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.policy.document import published_policy
from kino_refunds.reconciliation.overdue import OverdueReport, OverdueRules, sweep_overdue
from kino_refunds.settings import Settings
from kino_refunds.settlement.retries import sweep_retries
from kino_refunds.settlement.rules import Rules
from tests.clock import run_ahead
from tests.faults.workload import Job, Message, Workload
from workers.intake import Intake

if TYPE_CHECKING:
    from kino_refunds.reconciliation.sources import JobSource

DEADLINE_S = 90.0
"""For things that take seconds: a machine that is busy with something else must not fail a scenario."""
LOOK_EVERY_S = 0.02
SWEEP_EVERY_S = 0.5
LOG_LINES_SHOWN = 8

LIMITS_MS = {
    "lock_timeout_ms": 700,
    "statement_timeout_ms": 900,
    "idle_in_transaction_timeout_ms": 300,
    "transaction_timeout_ms": 1000,
    "tcp_user_timeout_ms": 100,
}
"""As in production, the alive TTL is 5 s more than their sum: 8 s instead of more than a minute."""

NO_WAITING_MS = {
    "lock_timeout_ms": 20,
    "statement_timeout_ms": 20_000,
    "idle_in_transaction_timeout_ms": 60_000,
    "transaction_timeout_ms": 60_000,
    "tcp_user_timeout_ms": 10_000,
}
"""For sessions of this very process: it meets its own locks, and stops inside its own transactions."""


class Stuck(Exception):
    """Something that had to happen did not, within a deadline that no slow machine explains."""


def require(fact: object, what: str) -> None:
    """Raise Stuck unless the fault happened as it was meant; the oracle judges everything else."""
    if not fact:
        raise Stuck(f"not as it was meant: {what}")


class World:
    """One scenario's database, Redis db, workload and processes; leaving it repairs what was broken."""

    def __init__(self, running: Servers, database: str, seed: int, faults: Counter[str]) -> None:
        self.servers = running
        self.database = database
        self.faults = faults
        self.workload = Workload(seed)
        self.chance = self.workload.chance
        self.redis = redis_client(running.redis_url())
        self.beating = False
        self._stack = ExitStack()
        self._processes: list[CeleryProcess] = []
        self._numbers = count(1)
        self._swept_at = 0.0
        self._later_s = 0.0

    def __enter__(self) -> Self:
        self._stack.callback(self.redis.close)
        self.engine = self.new_engine()
        self.product = create_engine(self.servers.database_url(role="kino_product", database=self.database))
        self._stack.callback(self.product.dispose)
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.servers.postgres, self.servers.redis):
            with suppress(ServerFailed):  # it runs already, unless the scenario broke off after a kill
                server.start()
        self.redis.config_set("maxmemory", 0)
        for process in reversed(self._processes):
            self.signal(process, signal.SIGCONT)
            process.stop()
        self._stack.close()

    # --- what is there from the start ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Give every account of the workload its lots."""
        now = self.workload.now
        with self.product.begin() as connection:
            grant_lots(
                connection,
                [
                    Grant(
                        g.reference,
                        g.account_id,
                        g.credits,
                        LotClass(g.lot_class),
                        None if g.lives is None else now + g.lives,
                    )
                    for g in self.workload.grants
                ],
            )

    def open(self, messages: Sequence[Message] | None = None, jobs: Sequence[Job] | None = None) -> None:
        """Open the charges of these messages' jobs, or of these jobs, as the product does."""
        ids = {message.job_id: None for message in messages or ()}
        wanted = [*(jobs or ()), *(self.workload.jobs[job_id] for job_id in ids)]
        for start in range(0, len(wanted), 200):
            with self.product.begin() as connection:
                open_charges(
                    connection,
                    [
                        ChargeRequest(job.job_id, job.account_id, job.credits, job.deadline_at)
                        for job in wanted[start : start + 200]
                    ],
                )

    def publish(self, messages: Sequence[Message]) -> None:
        """Put messages on their queues; again, unchanged, as long as Redis does not confirm (P2)."""
        for start in range(0, len(messages), 100):
            part = messages[start : start + 100]
            deadline = time.monotonic() + DEADLINE_S
            while not self._push(part):
                if time.monotonic() > deadline:
                    raise Stuck("Redis took no messages")
                time.sleep(LOOK_EVERY_S)

    def _push(self, part: Sequence[Message]) -> bool:
        try:
            with self.redis.pipeline(transaction=False) as pipeline:
                for message in part:
                    pipeline.lpush(message.queue, message.raw)
                pipeline.execute()
        except redis.RedisError:
            return False
        now = datetime.now(UTC)
        for message in part:
            self.workload.published_at.setdefault(message.job_id, now)
            self.workload.published.add(message.raw)
        return True

    def stream(self, number: int, *, size: int = 20) -> Iterator[int]:
        """Open and publish `number` jobs, some at a time; yields the step after each, for faults in between."""
        messages = self.workload.some(number)
        for step, start in enumerate(range(0, number, size)):
            part = messages[start : start + size]
            self.open(part)
            self.publish(part)
            yield step

    # --- looking ---------------------------------------------------------------------------------------------

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask as superuser, by a connection of its own: the one before may have been killed."""
        with self.servers.postgres.connect(self.database) as superuser:
            cursor = superuser.execute(query.encode(), values or None)
            return list(cursor) if cursor.description else []

    def settled(self) -> int:
        """How many charges are settled."""
        return int(self.sql("SELECT count(*) FROM kino.settlement")[0][0])

    def waiting(self) -> int:
        """How many messages are anywhere in Redis."""
        return sum(depths(self.redis).values())

    def in_flight(self) -> int:
        """How many messages some worker has claimed and not dropped."""
        return depths(self.redis)["in-flight"]

    def until(self, condition: Callable[[], object], what: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Wait for a condition; what cannot be asked at this moment is not true yet."""
        deadline = time.monotonic() + deadline_s
        while True:
            with suppress(redis.RedisError, psycopg.Error, sa.exc.SQLAlchemyError):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise Stuck(f"waited {deadline_s:.0f} s for: {what}")
            for process in self._processes:
                process.require_alive()
            time.sleep(LOOK_EVERY_S)

    def until_settling(self) -> None:
        """Wait until a worker's transaction waits for the lock that this test holds: its batch is in flight."""
        self.until(
            lambda: self.sql(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'kino-intake'"
                " AND wait_event_type = 'Lock'"
            ),
            "a worker in the middle of settling",
        )

    def settle_down(self, *, pending: int = 0) -> None:
        """Wait until nothing waits in Redis, and in Postgres nothing but `pending` events; retries are swept."""

        def quiet() -> bool:
            self._sweep_now_and_then()
            return (
                self.waiting() == 0
                and self.sql("SELECT count(*) FROM kino.pending_event")[0][0] == pending
                and self.waiting() == 0
            )

        self.until(quiet, f"quiet queues ({self._standing()})")

    def _standing(self) -> str:
        with suppress(Exception):
            return str(depths(self.redis))
        return "Redis is away"

    def _sweep_now_and_then(self) -> None:
        if not self.beating and time.monotonic() - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self.sweep_retries()

    def sweep_retries(self) -> None:
        """Try everything that waits, as beat would some minutes from now."""
        with suppress(sa.exc.SQLAlchemyError):
            with self.engine.begin() as connection:
                connection.exec_driver_sql(
                    "UPDATE kino.pending_event SET next_attempt_at = kino.clock(), leased_until = NULL"
                )
            sweep_retries(self.engine, self.rules, lease=timedelta(minutes=1))

    def sweep_overdue(self, source: JobSource | None, *, asks: int = 1, later_s: float = 0.0) -> OverdueReport:
        """Ask `source` about every overdue job, once; the ledger's clock has gone on by `later_s` since the start."""
        if later_s > self._later_s:  # time goes on and never back
            self._later_s = later_s
            run_ahead(self.engine, timedelta(seconds=later_s))
        return sweep_overdue(
            self.engine,
            self.redis,
            source,
            self.rules,
            overdue=OverdueRules(
                grace=timedelta(0), asks=asks, ask_window=timedelta(0), running_max=timedelta(hours=24)
            ),
        )

    @property
    def rules(self) -> Rules:
        """What is settled by in this process."""
        return Rules(published_policy(), "faults")

    def last_words(self) -> str:
        """The last lines of every worker's log."""
        said = []
        for process in self._processes:
            if process.log_file is not None and process.log_file.exists():
                lines = process.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
                said += [f"  {process.log_file.name}: {line[:300]}" for line in lines[-LOG_LINES_SHOWN:]]
        return "\n".join(said)

    # --- processes -------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """The settings of a process of this world."""
        limits = {f"KINO_{name.upper()}": str(value) for name, value in LIMITS_MS.items()}
        return settings_for(self.servers) | {
            "KINO_DATABASE_URL": self.servers.database_url(database=self.database),
            "KINO_MIGRATION_DATABASE_URL": self.servers.database_url(role="kino_owner", database=self.database),
            "KINO_LOG_FORMAT": "json",
            **limits,
            **more,
        }

    def start_worker(self, **more: str) -> CeleryProcess:
        """Start a real worker; it is not waited for."""
        log_file = self.servers.data_dir / f"{self.database}-worker-{next(self._numbers)}.log"
        process = start_worker(self.environment(**more), log_file)
        self._processes.append(process)
        return process

    def start_beat(self, **more: str) -> CeleryProcess:
        """Start a real beat; from now on retries are its business."""
        folder = self.servers.data_dir
        process = start_beat(
            self.environment(**more), folder / f"{self.database}-schedule", folder / f"{self.database}-beat.log"
        )
        self._processes.append(process)
        self.beating = True
        return process

    def until_ready(self, workers: int = 1) -> None:
        """Wait until so many workers' intakes have begun."""
        self.until(lambda: self.sql("SELECT count(*) FROM kino.intake_worker")[0][0] >= workers, f"{workers} workers")

    def kill(self, process: CeleryProcess) -> None:
        """End a process with SIGKILL."""
        self.faults["worker killed"] += 1
        self._processes.remove(process)
        process.kill()

    def stop(self, process: CeleryProcess) -> int:
        """End a process with SIGTERM and return its exit code."""
        self.faults["worker told to stop"] += 1
        self._processes.remove(process)
        return process.stop()

    def signal(self, process: CeleryProcess, number: int) -> None:
        """Send a signal to a process, if it still lives."""
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    def caught_with_a_batch(self, process: CeleryProcess) -> bool:
        """Stop a worker wherever it is; if that is with a batch in flight, leave it stopped and say so."""
        ((worker_id,),) = self.sql("SELECT CAST(worker_id AS text) FROM kino.intake_worker WHERE pid = %s", process.pid)
        for _ in range(200):
            self.signal(process, signal.SIGSTOP)
            if self.redis.keys(f"kino:inflight:{worker_id}:*"):
                return True
            self.signal(process, signal.SIGCONT)
            if not self.waiting():
                return False
        return False

    # --- intake without a process ----------------------------------------------------------------------------

    def new_engine(self, port: int | None = None) -> sa.Engine:
        """Make a worker's engine that does not wait long for this process' own locks."""
        url = sa.make_url(self.servers.database_url(database=self.database))
        engine = create_engine(
            (url if port is None else url.set(port=port)).render_as_string(),
            limits=self.settings(**NO_WAITING_MS).session_limits,
            application_name="kino-here",
        )
        self._stack.callback(engine.dispose)
        return engine

    def settings(self, **fields: Any) -> Settings:
        """Make settings for this process; the environment is not looked at."""
        return Settings.model_construct(**fields)

    def queues(self, *, alive_ttl_s: float = 30.0, client: redis.Redis | None = None) -> Queues:
        """Take the place of one worker at the queues."""
        worker_id = str(UUID(int=self.chance.getrandbits(128)))
        return Queues(client or self.redis, worker_id, alive_ttl_s=alive_ttl_s)

    def intake(
        self,
        *,
        queues: Queues | None = None,
        engine: sa.Engine | None = None,
        rules: Rules | None = None,
        probe_every_s: float = 0.0,
        **fields: Any,
    ) -> Intake:
        """Take the place of one worker altogether."""
        return Intake(
            engine or self.engine,
            queues or self.queues(),
            rules or self.rules,
            self.settings(**fields),
            name="here",
            probe_every_s=probe_every_s,
        )

    def consume(self, intake: Intake, rounds_max: int = 10_000) -> None:
        """Settle batch after batch until nothing waits in Redis."""
        for _ in range(rounds_max):
            if not intake.run_once() and not self.waiting():
                return
        raise Stuck(f"messages are left after {rounds_max} batches")

    def drain(self, intake: Intake) -> None:
        """Settle batch after batch, then what waits for a retry, until nothing waits."""
        self.consume(intake)
        self.settle_down()

    # --- breaking things -------------------------------------------------------------------------------------

    @contextmanager
    def locked_lots(self) -> Iterator[None]:
        """Hold every lot, so that a worker that refunds waits in the middle of its transaction."""
        with self.servers.postgres.connect(self.database) as superuser:
            superuser.execute(b"BEGIN")
            superuser.execute(b"SELECT 1 FROM kino.credit_lot FOR UPDATE")
            yield
            superuser.execute(b"ROLLBACK")

    def terminate_sessions(self, application: str = "kino-%") -> int:
        """End sessions of the workers in Postgres; returns how many."""
        ended = self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE %s AND pid <> pg_backend_pid()",
            application,
        )
        self.faults["session terminated"] += len(ended)
        return len(ended)

    @contextmanager
    def stopped_postgres(self) -> Iterator[None]:
        """Stop the server and everything that it started, as a machine that hangs."""
        parent = self.servers.postgres.pid
        os.kill(parent, signal.SIGSTOP)
        pids = [parent, *_children(parent)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self.faults["Postgres stopped"] += 1
        try:
            yield
        finally:
            for pid in reversed(pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextmanager
    def watched(self, see: Callable[[sa.Connection, int], None]) -> Iterator[sa.Engine]:
        """Give an engine of its own whose statements are numbered: `see` hears of each after it was executed."""
        engine, numbers = self.new_engine(), count(1)

        def after(connection: sa.Connection, *_: object) -> None:
            see(connection, next(numbers))

        sa.event.listen(engine, "after_cursor_execute", after)
        yield engine
        engine.dispose()

    def end_session(self, connection: sa.Connection) -> None:
        """End one session from outside, and wait until it is gone."""
        raw: Any = connection.connection.dbapi_connection
        self.sql("SELECT pg_terminate_backend(%s, 5000)", raw.info.backend_pid)
        self.faults["session terminated"] += 1

    @contextmanager
    def stopped_valkey(self) -> Iterator[None]:
        """Stop Valkey."""
        pid = self.servers.redis.pid
        os.kill(pid, signal.SIGSTOP)
        self.faults["Valkey stopped"] += 1
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def port_in(self, url: str, port: int) -> str:
        """Return the URL with another port: a proxy's."""
        if url.startswith("redis"):
            return url.replace(f":{self.servers.redis.port}/", f":{port}/")
        return sa.make_url(url).set(port=port).render_as_string()


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # Behind the name, which may hold anything: state, then the parent.
            if int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found
