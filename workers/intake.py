"""Intake: claim a batch, settle it, drop it; for as long as the worker lives (design, section 3).

    gate open?  ->  claim  ->  parse  ->  settle (COMMIT)  ->  drop

A message leaves Redis only after its outcome is in Postgres. Whatever happens in between, the batch is
still in this worker's in-flight lists: the next claim returns it, or, if the worker is dead, another one
recovers it.

A message may hold up to 100 events. Whatever is counted here is counted in events: the size of a transaction, the
tripwire's errors, a probe, and after a crash what is in work alone. The message is dropped when each has its row.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from hashlib import sha256
from typing import TYPE_CHECKING

import redis
import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import DependencyAway, ForeignKey
from kino_refunds.events.queues import POISON_CRASHES, Claim, Queues
from kino_refunds.intake.gate import TRIPWIRE, Gate, pause_intake, read_gate, resume_intake
from kino_refunds.settlement.batch import Part, keep_letters, settle_batch
from kino_refunds.settlement.dead_letters import APPLY_ERROR, DeadLetter, poison_letter, unread_letter
from kino_refunds.settlement.deliveries import Delivery, read_message
from kino_refunds.settlement.outcomes import Disposition, Outcome, disposition
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kino_refunds.settings import Settings
    from kino_refunds.settlement.settle import Decision, Terms

log = get_logger(__name__)

BACK_OFF_FIRST_S = 0.2
BACK_OFF_MAX_S = 10.0
"""Below the alive TTL by far: a worker that waits for Postgres must not be taken for dead."""
PROBE_EVERY_S = 30.0
"""While the tripwire holds intake, one event is tried this often: a fixed build opens it by itself."""
TRIPWIRE_WINDOW = 1_000
TRIPWIRE_ERRORS_MAX = 50
"""More than this many of the last thousand events failing in our own code is a bad build, not bad events."""


class _Stopping(Exception):
    """We were told to stop in the middle of a long search; what is settled stays settled (P2)."""


class _TakenOver(Exception):
    """The message is not in flight under our token any more: we seemed dead, and another worker settles it."""


class _Tripped(Exception):
    """Too many events fail in our own code; the rest must not become dead letters too."""


class Intake:
    """One worker's intake; `run` until told to stop, `run_once` for one batch."""

    def __init__(
        self,
        engine: sa.Engine,
        queues: Queues,
        terms: Terms,
        settings: Settings,
        *,
        name: str = "",
        probe_every_s: float = PROBE_EVERY_S,
    ) -> None:
        self._engine = engine
        self._queues = queues
        self._terms = terms
        self._settings = settings
        self._name = name
        self._probe_every_s = probe_every_s
        self._next_probe = 0.0
        self._probed: dict[bytes, int] = {}
        """While the gate is closed: of a message that holds several events, how many were tried."""
        self._unfinished: str | None = None
        self._skipped: tuple[str, ...] = ()
        self._failures: deque[bool] = deque(maxlen=TRIPWIRE_WINDOW)
        self.stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        """Since the start: `batches`, `messages`, and one for each outcome."""

    def run_once(self) -> int:
        """Settle one batch and return how many messages it had; 0 when nothing waits or intake is paused.

        Raises what is transient, with the batch still in flight: calling again takes it up where it was.
        """
        with self._engine.connect() as connection:
            # In no transaction: with the ROLLBACK of one, psycopg would forget every statement that it has prepared.
            gate = read_gate(connection.execution_options(isolation_level="AUTOCOMMIT"))
        if gate.paused and not self._may_probe(gate):
            self._give_back()
            return 0
        started = time.monotonic()
        if gate.paused:
            self._give_back()  # or the probe would be the batch in flight, whatever the limit
        else:
            self._probed.clear()
        limit = 1 if gate.paused else self._settings.intake_batch
        claim = self._queues.claim(limit, self._settings.intake_batch_bytes)
        if claim.skipped != self._skipped:
            self._skipped = claim.skipped
            log.error("queue keys that are not lists, and are not read", keys=claim.skipped)
        if not claim.messages:
            return 0
        self._unfinished = claim.token
        deliveries, dead = read_claim(claim)
        tried = self._next_to_try(claim, deliveries) if gate.paused else deliveries
        try:
            # Before their letters: a build that can read nothing must not turn all that waits into dead letters.
            self._watch(Part(0, sum(letter.reason == APPLY_ERROR for letter in dead), 0))
            decisions, poison = self._settle(claim, tried)
        except _Tripped:
            self._trip()
            return len(claim.messages)
        except _TakenOver:
            log.warning("batch handed on; another worker took this one for dead", messages=len(claim.messages))
            self._unfinished = None
            return len(claim.messages)
        failed = len(tried) - len(decisions) - len(poison)
        if gate.paused:
            self._conclude_probe(decisions, failed=failed)
            if self._goes_on(claim, deliveries):
                # The event that was tried has its row, and is a duplicate when the message comes again.
                self._give_back()
                return len(claim.messages)
        if dead:
            # After the neighbours: they settle even while no dead letter can be written.
            keep_letters(self._engine, dead, build=self._terms.build)
        dropped = self._queues.drop(claim.token)
        self._unfinished = None
        self._say(claim, failed, dead + poison, decisions, dropped=dropped, took_s=time.monotonic() - started)
        return len(claim.messages)

    def run(self, *, chores: Callable[[], None] = lambda: None) -> None:
        """Settle batches until `stopping` is set, then release what is undecided and leave."""
        wait_s = 0.0
        while not self.stopping.wait(wait_s):
            try:
                chores()
                wait_s = 0.0 if self.run_once() else self._settings.intake_poll_s
            except _Stopping:
                break
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept and this thread lives
                wait_s = min(BACK_OFF_MAX_S, max(BACK_OFF_FIRST_S, wait_s * 2))
                self._report(error, wait_s)
        self._leave()

    def _settle(self, claim: Claim, deliveries: list[Delivery]) -> tuple[list[Decision], list[DeadLetter]]:
        """Settle the events of a claim in batches; returns the decisions, and the letters of events that end workers.

        A claim is bounded in messages and bytes, and 500 messages of 100 events are 50,000: no transaction is larger
        than `intake_batch` events, for its locks are held until it ends. Between two of them we say that we live.
        """
        if claim.recovered and any(delivery.element_index is not None for delivery in deliveries):
            return self._settle_alone(claim, deliveries)
        decisions: list[Decision] = []
        for number, batch in enumerate(sub_batches(deliveries, self._settings.intake_batch)):
            if number:
                self._between()
            decisions += settle_batch(self._engine, batch, self._terms, watch=self._watch)
        return decisions, []

    def _settle_alone(self, claim: Claim, deliveries: list[Delivery]) -> tuple[list[Decision], list[DeadLetter]]:
        """Settle the events of a message that a worker died with, one a transaction.

        Redis is told before each which one it is. So if this worker ends too, that event is counted and not its
        neighbours; at the third time it is a dead letter, written at once, and they settle.
        """
        decisions: list[Decision] = []
        poison: list[DeadLetter] = []
        busy = set[str]()  # or a later event of such a job would overtake the one that waits
        for delivery in sorted(deliveries, key=lambda delivery: delivery.event.time):
            if self.stopping.is_set():
                raise _Stopping
            index = delivery.element_index
            crashes = self._begin(claim, index)
            if crashes >= POISON_CRASHES:
                poison.append(poison_letter(delivery.raw, delivery.queue, crashes, element_index=index))
                keep_letters(self._engine, poison[-1:], build=self._terms.build)
                continue
            settled = settle_batch(self._engine, [delivery], self._terms, busy_jobs=busy, watch=self._watch)
            busy.update(each.delivery.event.job_id for each in settled if each.outcome is Outcome.BUSY)
            decisions += settled
        self._begin(claim, None)
        return decisions, poison

    def _begin(self, claim: Claim, index: int | None) -> int:
        crashes = self._queues.begin(claim.token, index)
        if crashes is None:
            raise _TakenOver
        return crashes

    def _between(self) -> None:
        if self.stopping.is_set():
            raise _Stopping
        self._queues.refresh()

    def _watch(self, part: Part) -> None:
        """Between the parts of a batch: say that we live, count our own failures, hear that we should stop."""
        self._failures.extend([False] * part.settled + [True] * part.failed)
        if part.failed and sum(self._failures) > TRIPWIRE_ERRORS_MAX:
            raise _Tripped
        if part.parts_left:
            self._between()

    def _may_probe(self, gate: Gate) -> bool:
        if not gate.probed or time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + self._probe_every_s
        return True

    def _next_to_try(self, claim: Claim, deliveries: list[Delivery]) -> list[Delivery]:
        """Choose what a probe settles: one event, of a message that holds several the first that it has not tried.

        A bad event at its head would otherwise keep the gate closed: the message stays until all of it is decided.
        """
        at = self._probed.get(_digest(claim), 0)
        return deliveries[at : at + 1]

    def _goes_on(self, claim: Claim, deliveries: list[Delivery]) -> bool:
        """Note that one more event of this message was tried; returns whether others are left."""
        at = self._probed.pop(_digest(claim), 0) + 1
        if at >= len(deliveries):
            return False
        self._probed[_digest(claim)] = at
        return True

    def _trip(self) -> None:
        """Close the gate, then give the batch back: in the other order another worker would take it first."""
        reason = f"{sum(self._failures)} of the last {len(self._failures)} events failed in build {self._terms.build}"
        with self._engine.begin() as connection:
            paused = pause_intake(connection, reason=f"{reason} (worker {self._name})", actor=TRIPWIRE)
        self._failures.clear()
        self._next_probe = time.monotonic() + self._probe_every_s
        released = self._give_back()
        log.error("tripwire: intake is paused", reason=reason, first=paused, released=released)

    def _conclude_probe(self, decisions: list[Decision], *, failed: int) -> None:
        """Open the gate if the event that was tried could be decided by this build.

        A message that does not parse, a duplicate and an event that waits prove nothing: try the next at once.
        """
        if failed:
            return
        outcomes = {decision.outcome for decision in decisions}
        if not any(each is not Outcome.DUPLICATE and disposition(each) is Disposition.FINAL for each in outcomes):
            self._next_probe = 0.0
            return
        with self._engine.begin() as connection:
            resumed = resume_intake(connection, reason=f"an event settled in build {self._terms.build}", actor=TRIPWIRE)
        self._failures.clear()
        log.warning("tripwire: intake goes on", resumed=resumed)

    def _say(
        self,
        claim: Claim,
        failed: int,
        dead: list[DeadLetter],
        decisions: list[Decision],
        *,
        dropped: bool,
        took_s: float,
    ) -> None:
        outcomes = Counter(decision.outcome.value for decision in decisions)
        self.counts.update(outcomes)
        self.counts.update(batches=1, messages=len(claim.messages), not_parsed=len(dead), apply_error=failed)
        log.info(
            "batch",
            messages=len(claim.messages),
            events=len(decisions) + len(dead) + failed,
            again=claim.again,
            recovered=claim.recovered,
            not_parsed=dict(Counter(letter.reason for letter in dead)),
            apply_errors=failed,
            outcomes=dict(outcomes),
            dropped=dropped,
            took_ms=round(took_s * 1000),
        )

    def _report(self, error: Exception, wait_s: float) -> None:
        transient = isinstance(error, (redis.RedisError, DependencyAway)) or classify(error) is not Fault.BISECT
        if transient:
            log.warning("batch kept", error=one_line(error), retry_in_s=wait_s)
        else:
            log.error("batch kept; this needs somebody", error=one_line(error), retry_in_s=wait_s, exc_info=error)
        try:
            self._queues.refresh()
        except (redis.RedisError, ForeignKey) as also:
            log.warning("alive key not refreshed", error=one_line(also))

    def _give_back(self) -> int:
        released = self._queues.release(self._unfinished) if self._unfinished else 0
        self._unfinished = None
        return released

    def _leave(self) -> None:
        try:
            released = self._give_back()
            self._queues.leave()
        except (redis.RedisError, ForeignKey) as error:
            # Nothing is lost: the batch stays in flight until the alive key is gone and it is recovered.
            log.warning("left without a word", error=one_line(error))
        else:
            log.info("intake stopped", released=released)


def read_claim(claim: Claim) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a batch; what cannot be understood becomes a dead letter and stops nobody (P7, P8).

    A message that was alone in flight when a worker died, for the third time, is not even parsed.
    """
    if claim.crashes >= POISON_CRASHES:
        (message,) = claim.messages
        return [], [poison_letter(message.raw, message.queue.value, claim.crashes)]
    deliveries, dead = list[Delivery](), list[DeadLetter]()
    for message in claim.messages:
        events, letters = _read(message.raw, message.queue.value)
        deliveries += events
        dead += letters
    return deliveries, dead


def _read(raw: bytes, queue: str) -> tuple[list[Delivery], list[DeadLetter]]:
    """Read one message; whatever our own reading fails on is this message's affair and no other's."""
    try:
        return read_message(raw, queue)
    except Exception as error:
        if classify(error) is Fault.KEEP:
            raise
        return [], [unread_letter(raw, queue, error)]


def sub_batches(deliveries: Sequence[Delivery], size: int) -> Iterator[list[Delivery]]:
    """Split into batches of at most `size`, in their order; a job's events stay together, whatever their number.

    In two transactions the later ending of a job could be settled first, and then it would stand.
    """
    if len(deliveries) <= size:
        yield list(deliveries)
        return
    jobs: dict[str, list[Delivery]] = {}
    for delivery in deliveries:
        jobs.setdefault(delivery.event.job_id, []).append(delivery)
    batch: list[Delivery] = []
    for events in jobs.values():
        if batch and len(batch) + len(events) > size:
            yield batch
            batch = []
        batch += events
    yield batch


def _digest(claim: Claim) -> bytes:
    """Name the one message of a probe."""
    return sha256(claim.messages[0].raw).digest()


def one_line(error: BaseException) -> str:
    """The first line of what an exception says: sqlalchemy's second line holds the parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
