"""Intake's place in a Celery worker: one thread, its connections, and its chores beside the batches."""

from __future__ import annotations

import gc
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import bootsteps

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import BadSettings
from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import Queues
from kino_refunds.intake.heartbeat import HEARTBEAT_EVERY_S, Heartbeat
from kino_refunds.settings import load_settings
from kino_refunds.settlement.rules import rules_of
from kino_refunds.telemetry.log import get_logger, one_line
from workers.intake import Intake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = get_logger(__name__)

BIND_EVERY_S = 0.5
"""After a FLUSHALL a live kombu SimpleQueue drops what it is given until its binding is back."""
REFRESHES_IN_TTL = 4
"""An idle or paused worker says so often within its alive TTL that it lives: batches, which do too, do not come."""
RECOVER_EVERY_S = 1.0
"""P9 gives a dead worker's batch 5 s beyond its alive key, and it then goes one message at a time."""
BAD_SETTINGS = 2
"""The exit code, as `kino-refunds` has it."""
STOP_WITHIN_S = 10.0
"""Container platforms send SIGKILL some 30 s after SIGTERM; Celery has its own part of them to do."""


@contextmanager
def one_line_for_bad_settings() -> Iterator[None]:
    """End the process with one line on standard error, and no traceback, where a setting is missing or wrong."""
    try:
        yield
    except BadSettings as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(BAD_SETTINGS) from error


class IntakeStep(bootsteps.StartStopStep):
    """Starts intake with a Celery worker, in one thread of its own.

    A step of the worker and not of its consumer: the consumer's steps are restarted whenever the broker's
    connection breaks, and an exception in one of them can end the worker.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._intake: Intake | None = None
        self._thread: threading.Thread | None = None

    def start(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Open connections and start the thread; nothing here waits for Postgres or Redis.

        Raises SystemExit, with one line on standard error, where a setting is missing or wrong.
        """
        with one_line_for_bad_settings():
            settings = load_settings()
            redis_url = settings.require_redis_url()
            database_url = settings.require_database_url()
        worker_id = str(uuid4())
        engine = create_engine(database_url, limits=settings.session_limits, application_name="kino-intake")
        queues = Queues(redis_client(redis_url), worker_id, alive_ttl_s=settings.alive_ttl_s)
        intake = Intake(engine, queues, rules_of(settings), settings, name=worker_id)
        heartbeat = Heartbeat(engine, worker_id, settings.build, intake.counts)
        chores = Chores(
            {
                "bind": (BIND_EVERY_S, Binding(queues)),
                "refresh": (settings.alive_ttl_s / REFRESHES_IN_TTL, queues.refresh),
                "recover": (RECOVER_EVERY_S, lambda: _recover(queues)),
                "heartbeat": (HEARTBEAT_EVERY_S, heartbeat.beat),
            }
        )

        def run() -> None:
            intake.run(chores=chores)
            Chores({"last heartbeat": (0.0, heartbeat.stop)})()
            engine.dispose()

        # What is loaded by now lives as long as the worker. Unfrozen, the collector goes through all of it again and
        # again while a batch is parsed and decided, which cost a tenth of the batch's time.
        gc.collect()
        gc.freeze()
        # A daemon: if it does not stop in time the process ends all the same, and the batch is recovered.
        self._intake = intake
        self._thread = threading.Thread(target=run, name="kino-intake", daemon=True)
        self._thread.start()
        log.info("intake started", worker_id=worker_id, build=settings.build)

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Let the batch in hand end, release it if it cannot, within STOP_WITHIN_S."""
        if self._intake is not None and self._thread is not None:
            self._intake.stopping.set()
            self._thread.join(STOP_WITHIN_S)
            if self._thread.is_alive():
                log.warning("intake did not stop in time; its batch will be recovered")

    terminate = stop


class Chores:
    """What a worker does now and then between batches; one that fails is said, and stops nothing.

    A Postgres that is away, for one, takes no heartbeat, and dead workers are looked for all the same.
    """

    def __init__(self, every: dict[str, tuple[float, Callable[[], None]]]) -> None:
        self._every = every
        self._due = dict.fromkeys(every, 0.0)

    def __call__(self) -> None:
        """Do what is due; everything is due at first."""
        for name, (seconds, call) in self._every.items():
            if time.monotonic() < self._due[name]:
                continue
            self._due[name] = time.monotonic() + seconds
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, the batches go on
                log.warning("chore failed", chore=name, error=one_line(error))


class Binding:
    """Looks after kombu's bindings of the queues, and says once what it met."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._skipped: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Put back the bindings that are missing."""
        bound = self._queues.bind()
        if bound.restored:
            log.warning(
                "kombu bindings were missing and are back; publish again what a SimpleQueue sent meanwhile",
                queues=bound.restored,
            )
        if bound.skipped != self._skipped:
            self._skipped = bound.skipped
            log.error("keys of kombu bindings hold something foreign; see `kino-refunds doctor`", keys=bound.skipped)


def _recover(queues: Queues) -> None:
    recovered = queues.recover()
    if recovered.skipped:
        log.error("keys of a dead worker hold something foreign", keys=recovered.skipped)
    if recovered.workers:
        log.warning("recovered what dead workers had in flight", workers=recovered.workers, messages=recovered.messages)
