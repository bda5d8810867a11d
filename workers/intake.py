"""Intake: claim a batch, settle it, drop it, until the worker stops (design, section 3).

    gate open?  ->  claim  ->  parse  ->  settle (COMMIT)  ->  drop

A message leaves Redis only after its outcome is in Postgres. Whatever happens in between, the batch is still in this
worker's in-flight lists: the next claim returns it or, if the worker is dead, another worker recovers it.

A message may hold up to 100 events. All counts here are counts of events: the size of a transaction, the tripwire's
errors, a probe, and after a crash the one event in work. A message is dropped when each of its events has its row.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import sha256
from typing import TYPE_CHECKING, assert_never

import redis
import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import DependencyAway, WrongKeyType
from kino_refunds.events.queues import POISON_CRASHES, Claim, Queues
from kino_refunds.intake.gate import TRIPWIRE, Gate, pause_intake, read_gate, resume_intake
from kino_refunds.intake.poll import Poll
from kino_refunds.intake.tripwire import PROBE_EVERY_S, Probe, Tripwire
from kino_refunds.settlement.batch import keep_letters, settle_parts
from kino_refunds.settlement.dead_letters import DeadLetter, LetterReason, poison_letter
from kino_refunds.settlement.decide import Busy
from kino_refunds.settlement.outcomes import Disposition, Outcome
from kino_refunds.telemetry.log import get_logger, one_line
from workers.claims import read_claim, sub_batches

if TYPE_CHECKING:
    from collections.abc import Callable

    from kino_refunds.settings import Settings
    from kino_refunds.settlement.decide import Ruling
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.rules import Rules

log = get_logger(__name__)

BACK_OFF_FIRST_S = 0.2
BACK_OFF_MAX_S = 10.0
"""Far below the alive TTL: a worker that waits for Postgres must not be taken for dead."""


class Word(Enum):
    """What the loop does after a part of a batch."""

    CONTINUE = auto()
    STOP = auto()
    """The worker was told to stop: settled events stay settled (P2), and the batch is released."""
    TRIP = auto()
    """Too many events fail in our own code: the gate closes before the others become dead letters too."""
    RELEASE = auto()
    """A probe left events of its message untried: the message goes back to its queue, to be claimed again."""
    HANDED_ON = auto()
    """The batch is not in flight under this token any more: this worker seemed dead, and another one settles it."""


@dataclass(slots=True)
class Work:
    """The results for a claim so far."""

    events: int
    """How many events are to be settled."""
    rulings: list[Ruling] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    """The letters of events that end workers; they are written already."""

    @property
    def failed(self) -> int:
        """How many events became dead letters `apply_error`; valid once the work is done."""
        return self.events - len(self.rulings) - len(self.letters)

    @property
    def proof(self) -> Probe:
        """What this work proves about the build, if it was a probe."""
        if self.failed:
            return Probe.FAILED
        final = any(
            ruling.disposition is Disposition.FINAL and ruling.outcome is not Outcome.DUPLICATE
            for ruling in self.rulings
        )
        return Probe.WORKS if final else Probe.NOTHING


class Intake:
    """The intake of one worker: `run` works until it is told to stop, `run_once` settles one batch."""

    def __init__(
        self,
        engine: sa.Engine,
        queues: Queues,
        rules: Rules,
        settings: Settings,
        *,
        name: str = "",
        probe_every_s: float = PROBE_EVERY_S,
    ) -> None:
        self._engine = engine
        self._queues = queues
        self._rules = rules
        self._settings = settings
        self._name = name
        self._tripwire = Tripwire(probe_every_s=probe_every_s)
        self._poll = Poll(settings.intake_poll_s)
        self._unfinished: str | None = None
        self._skipped: tuple[str, ...] = ()
        self.stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        """Counts since the start: `batches`, `messages`, and one for each outcome."""

    def run(self, *, chores: Callable[[], None] = lambda: None) -> None:
        """Settle batches until `stopping` is set; then release the batch that is undecided, and leave."""
        poll, wait_s = self._poll, 0.0
        gate = None
        while not self.stopping.wait(wait_s):
            try:
                chores()
                if gate is None or poll.gate_is_old:
                    gate = self._read_gate()
                wait_s = poll.wait_s(self._take(gate))
            except Exception as error:  # noqa: BLE001 - after any error the batch is kept, and this thread goes on
                poll.forget_gate()
                wait_s = min(BACK_OFF_MAX_S, max(BACK_OFF_FIRST_S, wait_s * 2))
                self._report(error, wait_s)
        self._leave()

    def run_once(self) -> int:
        """Read the gate, settle one batch, return how many messages it had; 0 if none is queued or may be taken.

        Raises transient errors with the batch still in flight: the next call goes on with the same batch.
        """
        return self._take(self._read_gate())

    def _read_gate(self) -> Gate:
        with self._engine.connect() as connection:
            # Without a transaction: at its ROLLBACK psycopg would forget every statement that it has prepared.
            gate = read_gate(connection.execution_options(isolation_level="AUTOCOMMIT"))
        self._poll.gate_was_read()
        return gate

    def _take(self, gate: Gate) -> int:
        if gate.paused and not self._tripwire.may_probe(gate):
            self._release()
            return 0
        started = time.monotonic()
        claim = self._claim(probe=gate.paused)
        if not claim.messages:
            return 0
        deliveries, unreadable = read_claim(claim)
        work = Work(events=len(deliveries))
        # Parser failures are counted first: a build that can parse nothing must not make letters of all queued
        # messages.
        failed = sum(letter.reason is LetterReason.APPLY_ERROR for letter in unreadable)
        word = self._after(settled=0, failed=failed, parts_left=0)
        if word is Word.CONTINUE and gate.paused:
            word = self._probe(claim, deliveries, work)
        elif word is Word.CONTINUE:
            word = self._settle(claim, deliveries, work)
        match word:
            case Word.CONTINUE:
                # After the other events: those are settled even while no dead letter can be written (P8).
                if unreadable:
                    keep_letters(self._engine, unreadable, build=self._rules.build)
                # Only now: before the COMMIT of every outcome and letter, a drop would lose them in a crash (P6).
                dropped = self._queues.drop(claim.token)
                self._unfinished = None
                self._log_batch(claim, work, unreadable, dropped=dropped, took_s=time.monotonic() - started)
            case Word.TRIP:
                self._trip()
            case Word.RELEASE:
                self._release()
            case Word.HANDED_ON:
                log.warning(
                    "batch handed on: this worker seemed dead, and another one settles the batch",
                    messages=len(claim.messages),
                )
                self._unfinished = None
            case Word.STOP:
                pass  # `run` ends and releases the batch
            case _:
                assert_never(word)
        return len(claim.messages)

    def _claim(self, *, probe: bool) -> Claim:
        """Claim a batch; for a probe, release a batch that is in flight and claim one message."""
        if probe:
            self._release()
        else:
            self._tripwire.forget_probes()
        claim = self._queues.claim(1 if probe else self._settings.intake_batch, self._settings.intake_batch_bytes)
        if claim.skipped != self._skipped:
            self._skipped = claim.skipped
            log.error("queue keys of the wrong type are not read: delete or rename them", keys=claim.skipped)
        if claim.messages:
            self._unfinished = claim.token
        return claim

    def _settle(self, claim: Claim, deliveries: list[Delivery], work: Work) -> Word:
        """Settle the events of a claim, in transactions of at most `intake_batch` events; return what to do next.

        A claim is limited in messages and bytes, but 500 messages of 100 events are 50,000 events, and a transaction
        holds its locks until it ends. Between two transactions the alive key is refreshed.
        """
        if claim.recovered and any(delivery.element_index is not None for delivery in deliveries):
            return self._settle_alone(claim, deliveries, work)
        for number, batch in enumerate(sub_batches(deliveries, self._settings.intake_batch)):
            if number and self._between() is Word.STOP:
                return Word.STOP
            word = self._settle_parts(batch, work)
            if word is not Word.CONTINUE:
                return word
        return Word.CONTINUE

    def _settle_parts(self, batch: list[Delivery], work: Work, *, busy: Busy = Busy()) -> Word:  # noqa: B008 - a value
        for part in settle_parts(self._engine, batch, self._rules, busy=busy):
            work.rulings += part.rulings
            word = self._after(settled=part.settled, failed=part.failed, parts_left=part.parts_left)
            if word is not Word.CONTINUE:
                return word
        return Word.CONTINUE

    def _settle_alone(self, claim: Claim, deliveries: list[Delivery], work: Work) -> Word:
        """Settle the events of a message that a worker died with, each in a transaction of its own.

        Before each event, Redis notes which one is in work. So if this worker ends too, the crash is counted for that
        event and not for the others. After the third crash it becomes a dead letter at once, and the others are
        settled.
        """
        busy = Busy()
        for delivery in sorted(deliveries, key=lambda delivery: delivery.event.time):
            if self.stopping.is_set():
                return Word.STOP
            index = delivery.element_index
            crashes = self._queues.begin(claim.token, index)
            if crashes is None:
                return Word.HANDED_ON
            if crashes >= POISON_CRASHES:
                letter = poison_letter(delivery.raw, delivery.queue, crashes, element_index=index)
                keep_letters(self._engine, [letter], build=self._rules.build)
                work.letters.append(letter)
                continue
            before = len(work.rulings)
            word = self._settle_parts([delivery], work, busy=busy)
            if word is not Word.CONTINUE:
                return word
            put_off = {each.delivery.event.job_id for each in work.rulings[before:] if each.outcome is Outcome.BUSY}
            # Otherwise a later event of such a job would overtake the one that was put off.
            busy = busy._replace(jobs=busy.jobs | put_off)
        return Word.CONTINUE if self._queues.begin(claim.token, None) is not None else Word.HANDED_ON

    def _after(self, *, settled: int, failed: int, parts_left: int) -> Word:
        """Count the events of a part; return CONTINUE if the next part may follow."""
        if self._tripwire.count(settled=settled, failed=failed):
            return Word.TRIP
        return self._between() if parts_left else Word.CONTINUE

    def _between(self) -> Word:
        """Return STOP if this worker was told to stop; else refresh the alive key and return CONTINUE."""
        if self.stopping.is_set():
            return Word.STOP
        self._queues.refresh()
        return Word.CONTINUE

    def _probe(self, claim: Claim, deliveries: list[Delivery], work: Work) -> Word:
        """Try one event while the tripwire keeps the gate closed; open the gate if this build can decide the event."""
        message = sha256(claim.messages[0].raw).digest()
        place = self._tripwire.place(message)
        tried = deliveries[place : place + 1]
        work.events = len(tried)
        word = self._settle(claim, tried, work)
        if word is not Word.CONTINUE:
            return word
        self._tripwire.conclude(work.proof)
        if work.proof is Probe.WORKS:
            reason = f"an event settled in build {self._rules.build}"
            with self._engine.begin() as connection:
                resumed = resume_intake(connection, reason=reason, actor=TRIPWIRE)
            self._poll.forget_gate()
            log.warning("tripwire: intake is resumed", resumed=resumed)
        # The event that was tried has its row. When its message is claimed again for the next event, it is a duplicate.
        return Word.RELEASE if self._tripwire.goes_on(message, len(deliveries)) else Word.CONTINUE

    def _trip(self) -> None:
        """Close the gate, then release the batch: in the other order another worker would claim it first."""
        reason = f"{self._tripwire.reason} in build {self._rules.build}"
        with self._engine.begin() as connection:
            paused = pause_intake(connection, reason=f"{reason} (worker {self._name})", actor=TRIPWIRE)
        self._tripwire.trip()
        self._poll.forget_gate()
        released = self._release()
        log.error("tripwire: intake is paused", reason=reason, first=paused, released=released)

    def _log_batch(
        self, claim: Claim, work: Work, unreadable: list[DeadLetter], *, dropped: bool, took_s: float
    ) -> None:
        letters = unreadable + work.letters
        outcomes = Counter(ruling.outcome.value for ruling in work.rulings)
        self.counts.update(outcomes)
        self.counts.update(batches=1, messages=len(claim.messages), not_parsed=len(letters), apply_error=work.failed)
        log.info(
            "batch",
            messages=len(claim.messages),
            events=len(work.rulings) + len(letters) + work.failed,
            again=claim.again,
            recovered=claim.recovered,
            not_parsed=dict(Counter(letter.reason for letter in letters)),
            apply_errors=work.failed,
            outcomes=dict(outcomes),
            dropped=dropped,
            took_ms=round(took_s * 1000),
        )

    def _report(self, error: Exception, wait_s: float) -> None:
        transient = isinstance(error, (redis.RedisError, DependencyAway)) or classify(error) is not Fault.BISECT
        if transient:
            log.warning("batch kept", error=one_line(error), retry_in_s=wait_s)
        else:
            log.error("batch kept: unexpected error", error=one_line(error), retry_in_s=wait_s, exc_info=error)
        try:
            self._queues.refresh()
        except (redis.RedisError, WrongKeyType) as also:
            log.warning("could not refresh the alive key", error=one_line(also))

    def _release(self) -> int:
        released = self._queues.release(self._unfinished) if self._unfinished else 0
        self._unfinished = None
        return released

    def _leave(self) -> None:
        try:
            released = self._release()
            self._queues.leave()
        except (redis.RedisError, WrongKeyType) as error:
            # Nothing is lost: the batch stays in flight, and is recovered when the alive key has expired.
            log.warning("could not release the batch at shutdown", error=one_line(error))
        else:
            log.info("intake stopped", released=released)
