"""Intake: claim a batch, settle it, drop it; for as long as the worker lives (design, section 3).

    claim -> parse -> settle (COMMIT) -> drop

A message leaves Redis only after its outcome is in Postgres. Whatever happens in between, the batch is
still in this worker's in-flight lists, and the next claim returns it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import redis
import sqlalchemy as sa
from celery import bootsteps

from kino_refunds.db.engine import create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import DependencyAway, ForeignKey, MalformedMessage
from kino_refunds.events.client import redis_client
from kino_refunds.events.publisher import declare_queues
from kino_refunds.events.queues import Claim, Queues
from kino_refunds.log import get_logger
from kino_refunds.policy.document import published_policy
from kino_refunds.settings import Settings, load_settings
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.dead_letters import DeadLetter, malformed_letter, record_dead_letters
from kino_refunds.settlement.deliveries import Delivery, read_delivery
from kino_refunds.settlement.settle import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

log = get_logger(__name__)

BACK_OFF_FIRST_S = 0.2
BACK_OFF_MAX_S = 10.0
"""Below the alive TTL by far: a worker that waits for Postgres must not be taken for dead."""
DECLARE_EVERY_S = 30.0
"""After a FLUSHALL a live kombu SimpleQueue drops what it is given until its binding is back."""
STOP_WITHIN_S = 10.0
"""Container platforms send SIGKILL some 30 s after SIGTERM; Celery has its own part of them to do."""


class Intake:
    """One worker's intake; `run` until told to stop, `run_once` for one batch."""

    def __init__(self, engine: sa.Engine, queues: Queues, terms: Terms, settings: Settings) -> None:
        self._engine = engine
        self._queues = queues
        self._terms = terms
        self._settings = settings
        self._unfinished: str | None = None
        self._skipped: tuple[str, ...] = ()
        self.stopping = threading.Event()

    def run_once(self) -> int:
        """Settle one batch and return how many messages it had; 0 when nothing waits.

        Raises what is transient, with the batch still in flight: calling again takes it up where it was.
        """
        started = time.monotonic()
        claim = self._queues.claim(self._settings.intake_batch, self._settings.intake_batch_bytes)
        if claim.skipped != self._skipped:
            self._skipped = claim.skipped
            log.error("queue keys that are not lists, and are not read", keys=claim.skipped)
        if not claim.messages:
            return 0
        self._unfinished = claim.token
        now = datetime.now(UTC)
        deliveries, malformed = read_claim(claim)
        decisions = settle_batch(self._engine, deliveries, self._terms, now, between=self._between)
        if malformed:
            # After the neighbours: they settle even while no dead letter can be written.
            with self._engine.begin() as connection:
                record_dead_letters(connection, malformed, now=now, build=self._terms.build)
        dropped = self._queues.drop(claim.token)
        self._unfinished = None
        log.info(
            "batch",
            messages=len(claim.messages),
            again=claim.again,
            malformed=len(malformed),
            apply_errors=len(deliveries) - len(decisions),
            outcomes=dict(Counter(decision.outcome.value for decision in decisions)),
            dropped=dropped,
            took_ms=round((time.monotonic() - started) * 1000),
        )
        return len(claim.messages)

    def _between(self) -> None:
        if self.stopping.is_set():
            raise _Stopping
        self._queues.refresh()

    def run(self, *, every_so_often: Callable[[], None] = lambda: None) -> None:
        """Settle batches until `stopping` is set, then release what is undecided and leave."""
        wait_s = 0.0
        while not self.stopping.wait(wait_s):
            try:
                every_so_often()
                wait_s = 0.0 if self.run_once() else self._settings.intake_poll_s
            except _Stopping:
                break
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept and this thread lives
                wait_s = min(BACK_OFF_MAX_S, max(BACK_OFF_FIRST_S, wait_s * 2))
                self._report(error, wait_s)
        self._leave()

    def _report(self, error: Exception, wait_s: float) -> None:
        transient = isinstance(error, redis.RedisError) or classify(error) is Fault.KEEP
        if transient and not isinstance(error, ForeignKey):
            log.warning("batch kept", error=_one_line(error), retry_in_s=wait_s)
        else:
            log.error("batch kept; this needs somebody", error=_one_line(error), retry_in_s=wait_s, exc_info=error)
        try:
            self._queues.refresh()
        except (redis.RedisError, ForeignKey) as also:
            log.warning("alive key not refreshed", error=_one_line(also))

    def _leave(self) -> None:
        try:
            released = self._queues.release(self._unfinished) if self._unfinished else 0
            self._queues.leave()
        except (redis.RedisError, ForeignKey) as error:
            # Nothing is lost: the batch stays in flight until the alive key is gone and it is recovered.
            log.warning("left without a word", error=_one_line(error))
        else:
            log.info("intake stopped", released=released)


def read_claim(claim: Claim) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a batch; what cannot be understood becomes a dead letter and stops nobody (P7, P8)."""
    deliveries, malformed = [], []
    for message in claim.messages:
        try:
            deliveries.append(read_delivery(message.raw, message.queue.value))
        except MalformedMessage as error:
            malformed.append(malformed_letter(message.raw, message.queue.value, error))
    return deliveries, malformed


def _one_line(error: BaseException) -> str:
    """The first line of what an exception says: sqlalchemy's second line holds the parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def terms_of(settings: Settings) -> Terms:
    """What this worker settles by."""
    return Terms(policy=published_policy(), lot_grace=settings.lot_grace, build=settings.build)


class _Stopping(Exception):
    """We were told to stop in the middle of a long search; what is settled stays settled (P2)."""


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
        """Open connections and start the thread; nothing here waits for Postgres or Redis."""
        settings = load_settings()
        redis_url = settings.require_redis_url()
        worker_id = str(uuid4())
        engine = create_engine(
            settings.require_database_url(), limits=settings.session_limits, application_name="kino-intake"
        )
        queues = Queues(redis_client(redis_url), worker_id, alive_ttl_s=settings.alive_ttl_s)
        self._intake = Intake(engine, queues, terms_of(settings), settings)
        # A daemon: if it does not stop in time the process ends all the same, and the batch is recovered.
        self._thread = threading.Thread(
            target=self._intake.run,
            kwargs={"every_so_often": _Every(DECLARE_EVERY_S, lambda: _declare(redis_url))},
            name="kino-intake",
            daemon=True,
        )
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


def _declare(redis_url: str) -> None:
    try:
        declare_queues(redis_url)
    except DependencyAway as error:
        # A full Redis refuses this and can still be drained: it must not keep us from claiming.
        log.warning("queues not declared", error=_one_line(error))


class _Every:
    """Calls something at most every so many seconds, at first at once."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._seconds = seconds
        self._call = call
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            self._call()
            self._next = time.monotonic() + self._seconds
