"""The step that runs intake in a Celery worker: one thread, its connections, and its chores between the batches."""

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
"""After a FLUSHALL a running kombu SimpleQueue drops its messages until its binding is restored."""
REFRESHES_IN_TTL = 4
"""How often an idle or paused worker refreshes its alive key within its TTL; otherwise its batches do that."""
RECOVER_EVERY_S = 1.0
"""P9 allows a dead worker's batch 5 s beyond the alive TTL, and it is then settled one message at a time."""
BAD_SETTINGS = 2
"""The exit code for wrong settings, the same as `kino-refunds` has."""
STOP_WITHIN_S = 10.0
"""Container platforms send SIGKILL some 30 s after SIGTERM, and Celery needs a part of them for itself."""


@contextmanager
def one_line_for_bad_settings() -> Iterator[None]:
    """End the process with one line on standard error, and no traceback, if a setting is missing or wrong."""
    try:
        yield
    except BadSettings as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(BAD_SETTINGS) from error


class IntakeStep(bootsteps.StartStopStep):
    """Starts intake with a Celery worker, in a thread of its own.

    It is a step of the worker and not of its consumer, because the consumer's steps are restarted whenever the broker's
    connection breaks, and an exception in one of them can end the worker.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._intake: Intake | None = None
        self._thread: threading.Thread | None = None

    def start(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Open connections and start the thread; nothing here waits for Postgres or Redis.

        Raises SystemExit, with one line on standard error, if a setting is missing or wrong.
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

        # Objects that are loaded by now stay as long as the worker. Without the freeze the collector would visit all of
        # them again and again while a batch is parsed and decided, which cost a tenth of the batch's time.
        gc.collect()
        gc.freeze()
        # A daemon thread: if it does not stop in time, the process ends all the same, and the batch is recovered.
        self._intake = intake
        self._thread = threading.Thread(target=run, name="kino-intake", daemon=True)
        self._thread.start()
        log.info("intake started", worker_id=worker_id, build=settings.build)

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Let the present batch end, or release it, within STOP_WITHIN_S."""
        if self._intake is not None and self._thread is not None:
            self._intake.stopping.set()
            self._thread.join(STOP_WITHIN_S)
            if self._thread.is_alive():
                log.warning("intake did not stop in time: another worker will recover its batch")

    terminate = stop


class Chores:
    """Runs a worker's periodic chores between batches; a chore that fails is logged and stops nothing else.

    For example, while Postgres is away no heartbeat can be written, but dead workers are still recovered.
    """

    def __init__(self, every: dict[str, tuple[float, Callable[[], None]]]) -> None:
        self._every = every
        self._due = dict.fromkeys(every, 0.0)

    def __call__(self) -> None:
        """Run the chores that are due; at first all are due."""
        for name, (seconds, call) in self._every.items():
            if time.monotonic() < self._due[name]:
                continue
            self._due[name] = time.monotonic() + seconds
            try:
                call()
            except Exception as error:  # noqa: BLE001 - no error of a chore may stop the batches
                log.warning("chore failed: it runs again when it is due", chore=name, error=one_line(error))


class Binding:
    """Restores kombu's bindings of the queues, and logs what it finds."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._skipped: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Restore the bindings that are missing."""
        bound = self._queues.bind()
        if bound.restored:
            log.warning(
                "kombu bindings were missing and are restored; publish again what a SimpleQueue sent meanwhile",
                queues=bound.restored,
            )
        if bound.skipped != self._skipped:
            self._skipped = bound.skipped
            log.error("keys of kombu bindings have the wrong type; see `kino-refunds doctor`", keys=bound.skipped)


def _recover(queues: Queues) -> None:
    recovered = queues.recover()
    if recovered.skipped:
        log.error(
            "keys of a dead worker have the wrong type: rename them, until then its messages are not recovered",
            keys=recovered.skipped,
        )
    if recovered.workers:
        log.warning("recovered the messages of dead workers", workers=recovered.workers, messages=recovered.messages)
