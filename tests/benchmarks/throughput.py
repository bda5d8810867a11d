"""How many events a second are settled, and how soon; beside what one would write with stock parts.

    make bench

Everything is the real thing: charges opened by the ledger, events queued in Valkey, worker processes on
the command line that they have in production, Postgres with fsync. Timed is everything from the first message
taken to the last one let go, and after each contestant its rows are read: they must be the same for all.

Contestants, over backlogs of their own, all of which refund:

    ours                `celery -A workers.app worker`, one process, two, or with batches of one event
    celery, dramatiq    one task per event, settled by our `settle` in a transaction of its own
    kombu               a stock consumer that settles up to 500 messages by our `settle_batch`
    postgres alone      SQL that writes the same rows from a staged table: nothing can be faster here

Beside them, in this process: charges opened per second, and a ledger that grows from empty (in_process.py).

"ours is" says how often a contestant's figure goes into that of one worker of ours. Figures of one run compare
with each other, as far as "once more" is near 1.00x; those of two machines or hours do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa

from kino_refunds.demo.trace_run import scratch
from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.dev.processes import CeleryProcess, settings_for, start_worker
from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import depths
from kino_refunds.events.schema import Event, queue_of, to_json
from kino_refunds.intake.gate import pause_intake, resume_intake
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.settings import Settings
from kino_refunds.settlement.retries import sweep_retries
from kino_refunds.settlement.rules import rules_of
from tests.benchmarks import postgres_alone
from tests.benchmarks.backlog import Maker, chunks, engine_of, grant, mixture, open_jobs, refund
from tests.benchmarks.celery_rival import CELERY
from tests.benchmarks.dramatiq_rival import DRAMATIQ
from tests.benchmarks.history import settled_before
from tests.benchmarks.in_process import growing, opening, told
from tests.benchmarks.kombu_rival import KOMBU
from tests.benchmarks.latency import Latency, latency, publish_paced
from tests.benchmarks.rivals import Left, Rival, running
from tests.benchmarks.rows import differences

LOOK_EVERY_S = 0.01
DEADLINE_S = 600.0
RIVAL_DB = 1
REFERENCE = "ours_1_worker"
"""What the others are compared with."""
ACTOR = "bench"
PACES = (10, 100, 500)
"""Events a second, for the latency."""
WARM_UP = "(warm-up, not compared)"


@dataclass(frozen=True)
class Run:
    """One contestant over one backlog."""

    name: str
    events: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.events / self.seconds


@dataclass
class Bench:
    """What has been run so far."""

    servers: Servers
    client: redis.Redis
    runs: dict[str, Run] = field(default_factory=dict)
    rss_mib_max: float = 0.0

    def ours(self, key: str, name: str, count: int, make: Maker = refund, *, hot: bool = False) -> None:
        """Queue a backlog behind the closed gate, open it, and time the workers that are running."""
        events = made(open_jobs(self.servers, key, count, hot=hot), make)
        with engine_of(self.servers) as engine:
            with engine.begin() as connection:
                pause_intake(connection, reason="the backlog is being queued", actor=ACTOR)
            for chunk in chunks(events):
                with self.client.pipeline(transaction=False) as pipeline:
                    for event in chunk:
                        pipeline.lpush(queue_of(event).value, to_json(event))
                    pipeline.execute()
            with engine.begin() as connection:
                resume_intake(connection, reason="the backlog is queued", actor=ACTOR)
        self.conclude(key, name, events, time_backlog(lambda: left(self.client), count))

    def rival(self, key: str, rival: Rival, count: int) -> None:
        """Queue a backlog for a rival, start it, and time it."""
        url = self.servers.redis_url(RIVAL_DB)
        events = made(open_jobs(self.servers, key, count), refund)
        with redis_client(url) as client:
            client.flushdb()
            rival.publish(url, events)
            settings = settings_for(self.servers, KINO_REDIS_URL=url, KINO_LOG_LEVEL="warning")
            with running(rival.command, settings, self.servers.data_dir / f"{key}.log"):
                seconds = time_backlog(lambda: rival.left(client), count)
        self.conclude(key, rival.name, events, seconds)

    def postgres_alone(self, count: int) -> None:
        """Let Postgres write the same rows by itself."""
        key = "postgres_alone"
        events = made(open_jobs(self.servers, key, count), refund)
        self.conclude(key, postgres_alone.NAME, events, postgres_alone.settle_staged(self.servers, events))

    def latency(self, per_second: int, seconds: float) -> Latency:
        """Publish at an even pace to the worker that is running."""
        jobs = open_jobs(self.servers, f"pace-{per_second}", max(1, round(per_second * seconds)))
        events, kept = publish_paced(self.client, jobs, per_second)
        found = latency(self.servers, jobs, kept)
        self.require_rows(f"latency at {per_second}/s", events)
        print(
            f"publish to commit at {found.per_second:5.0f}/s    "
            f"p50 {found.p50_ms:4.0f} ms    p99 {found.p99_ms:4.0f} ms    max {found.max_ms:4.0f} ms"
        )
        return found

    def conclude(self, key: str, name: str, events: Sequence[Event], seconds: float) -> None:
        """Look at what was written, then say how fast."""
        seconds += self._settle_busy()
        self.require_rows(name, events)
        run = self.runs[key] = Run(name, len(events), seconds)
        compared = f"{self.ours_is(key):>7.2f}x" if REFERENCE in self.runs else ""
        print(f"{name:<34} {run.events:>8,} {run.seconds:>8.2f} {run.per_second:>10,.0f} {compared}".rstrip())

    def _settle_busy(self) -> float:
        """Do what beat would: try jobs again that waited for a lot too long; returns the seconds it took."""
        settings = Settings.model_construct()
        rules = rules_of(settings)
        started, tried = time.monotonic(), 0
        with engine_of(self.servers) as engine:
            while waiting(engine):
                if time.monotonic() - started > DEADLINE_S:
                    raise SystemExit(f"{waiting(engine)} events still wait for a retry after {DEADLINE_S:.0f} s")
                tried += sweep_retries(engine, rules, lease=settings.retry_lease).tried
                time.sleep(LOOK_EVERY_S)
        if tried:
            print(f"  {tried:,} jobs were busy, and settled by the retry sweep")
        return time.monotonic() - started if tried else 0.0

    def require_rows(self, name: str, events: Sequence[Event]) -> None:
        """End the bench if a contestant did not write what it had to: its time says nothing then."""
        with engine_of(self.servers) as engine, engine.connect() as connection:
            if wrong := list(differences(connection, events)):
                raise SystemExit("\n".join([f"{name} wrote other rows than it had to:", *wrong]))

    def ours_is(self, key: str) -> float:
        """How often this contestant's figure goes into that of one worker of ours."""
        return self.runs[REFERENCE].per_second / self.runs[key].per_second

    @contextmanager
    def worker(self, name: str, **settings: str) -> Iterator[None]:
        """Run a worker that is ready; it is stopped in order with the block."""
        log_file = self.servers.data_dir / f"{name}.log"
        worker = start_worker(settings_for(self.servers, KINO_LOG_LEVEL="warning", **settings), log_file)
        try:
            self._wait_for(worker)
            yield
            worker.require_alive()
            self.rss_mib_max = max(self.rss_mib_max, peak_rss_mib(worker.pid))
        finally:
            worker.stop()

    def _wait_for(self, worker: CeleryProcess) -> None:
        deadline = time.monotonic() + DEADLINE_S
        with engine_of(self.servers) as engine, engine.connect() as connection:
            while time.monotonic() < deadline:
                worker.require_alive()
                beats = connection.execute(
                    sa.text("SELECT count(*) FROM kino.intake_worker WHERE pid = :pid"), {"pid": worker.pid}
                ).scalar_one()
                connection.rollback()
                if beats:
                    return
                time.sleep(LOOK_EVERY_S)
        raise SystemExit("the worker's intake did not start")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000, help="events in each large backlog")
    parser.add_argument("--single", type=int, default=1_000, help="events where each has its own transaction")
    parser.add_argument(
        "--before", type=int, default=1_000_000, help="settled charges before the last run; 0: no such run"
    )
    parser.add_argument("--pace-s", type=float, default=10.0, help="seconds that each pace is kept, for the latency")
    options = parser.parse_args(arguments)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, all on this machine")
    print(f"{'contestant':<34} {'events':>8} {'seconds':>8} {'per second':>10} {'ours is':>8}")
    with scratch() as servers, redis_client(servers.redis_url()) as client:
        bench = Bench(servers, client)
        grant(servers)
        found = measure(bench, options)
        with servers.postgres.connect(DATABASE) as superuser:
            if wrong := violations(superuser):
                raise SystemExit("\n".join(["the books are not in order:", *wrong[:20]]))
    print("every contestant wrote the same rows, and the books are in order")
    print(json.dumps(found))


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns what the last line says."""
    large, hot = options.events, max(1, options.events // 3)
    with bench.worker("first"):
        bench.ours("warm_up", WARM_UP, hot)
        bench.ours(REFERENCE, "ours, 1 worker", large)
        bench.ours("mixed", "ours, 1 worker, mixed events", large, mixture)
        bench.ours("hot_1_worker", "ours, 1 worker, one hot account", hot, hot=True)
        paces = {str(pace): bench.latency(pace, options.pace_s) for pace in PACES}
        with bench.worker("second"):
            bench.ours("ours_2_workers", "ours, 2 workers", large)
            bench.ours("hot_2_workers", "ours, 2 workers, one hot account", hot, hot=True)
    with bench.worker("single", KINO_INTAKE_BATCH="1"):
        bench.ours("ours_batch_1", "ours, 1 worker, batches of 1", options.single)
    bench.rival("celery", CELERY, options.single)
    bench.rival("dramatiq", DRAMATIQ, options.single)
    bench.rival("kombu", KOMBU, max(1, large // 5))
    bench.postgres_alone(large)
    in_process = told(opening(bench.servers, one=options.single, many=large), growing(bench.servers, large))
    with bench.worker("again"):
        # How far this lies from 1.00x is how far the machine's hour moved the figures above.
        bench.ours("ours_again", "ours, 1 worker, once more", large)
    if options.before:
        settled_before(bench.servers, options.before, lambda said: print(f"  {said}"))
        with bench.worker("after"):
            bench.ours("warm_up_after", WARM_UP, hot)
            bench.ours("ours_after", f"ours, 1 worker, {options.before:,} before", large)
    return summary(bench, paces, options.before) | {"in_process": in_process}


def summary(bench: Bench, paces: dict[str, Latency], before: int) -> dict[str, Any]:
    """Say in one object what the table says; a run that was left out is null."""

    def per_second(key: str) -> int | None:
        return round(bench.runs[key].per_second) if key in bench.runs else None

    def contestant(key: str) -> dict[str, Any]:
        return {"per_second": per_second(key), "ours_is": round(bench.ours_is(key), 2)}

    contestants = (
        REFERENCE,
        "ours_again",
        "ours_2_workers",
        "ours_batch_1",
        "celery",
        "dramatiq",
        "kombu",
        "postgres_alone",
    )
    return {
        "refunds_per_second": per_second(REFERENCE),
        "ratio_to_batch_1": round(bench.ours_is("ours_batch_1"), 1),
        "mixed_events_per_second": per_second("mixed"),
        "worker_rss_mib_max": round(bench.rss_mib_max, 1),
        "contestants": {key: contestant(key) for key in contestants},
        "latency_ms": {pace: found.as_json() for pace, found in paces.items()},
        "hot_account": {
            "one_worker_per_second": per_second("hot_1_worker"),
            "two_workers_per_second": per_second("hot_2_workers"),
        },
        "settled_before": {
            "charges": before,
            "refunds_per_second": per_second("ours_after"),
            "ratio_to_none": round(bench.ours_is("ours_again") / bench.ours_is("ours_after"), 2) if before else None,
        },
    }


def waiting(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT count(*) FROM kino.pending_event")).scalar_one())


def made(jobs: Sequence[str], make: Maker) -> list[Event]:
    return [make(job_id, number) for number, job_id in enumerate(jobs)]


def left(client: redis.Redis) -> Left:
    """What is left for our workers."""
    found = depths(client)
    unfinished = sum(found.values())
    return Left(unfinished - found["in-flight"], unfinished)


def time_backlog(look: Callable[[], Left], count: int) -> float:
    """Seconds from the first message taken (at most one look earlier) until nothing is left.

    Two looks must agree on that: kombu's consumers have a message nowhere for an instant, after they took it.
    """
    deadline = time.monotonic() + DEADLINE_S
    started = ended = None
    while time.monotonic() < deadline:
        looked = time.monotonic()
        queued, unfinished = look()
        if started is None and queued < count:
            started = looked - LOOK_EVERY_S
        if unfinished:
            ended = None
        elif ended is None:
            ended = looked
        elif started is not None:
            return ended - started
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"the backlog was not settled within {DEADLINE_S:.0f} s")


def peak_rss_mib(pid: int) -> float:
    with Path(f"/proc/{pid}/status").open(encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
