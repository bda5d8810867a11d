"""Intake: claim a batch, settle it, drop it; for as long as the worker lives (design, section 3).

    gate open?  ->  claim  ->  parse  ->  settle (COMMIT)  ->  drop

A message leaves Redis only after its outcome is in Postgres. Whatever happens in between, the batch is
still in this worker's in-flight lists: the next claim returns it, or, if the worker is dead, another one
recovers it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import redis
import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import DependencyAway, ForeignKey, MalformedMessage
from kino_refunds.events.queues import POISON_CRASHES, Claim, Queues
from kino_refunds.log import get_logger
from kino_refunds.settlement.batch import Part, settle_batch
from kino_refunds.settlement.dead_letters import (
    DeadLetter,
    malformed_letter,
    poison_letter,
    record_dead_letters,
)
from kino_refunds.settlement.deliveries import Delivery, read_delivery
from kino_refunds.settlement.gate import TRIPWIRE, Gate, pause_intake, read_gate, resume_intake
from kino_refunds.settlement.outcomes import Disposition, Outcome, disposition

if TYPE_CHECKING:
    from collections.abc import Callable

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
        limit = 1 if gate.paused else self._settings.intake_batch
        claim = self._queues.claim(limit, self._settings.intake_batch_bytes)
        if claim.skipped != self._skipped:
            self._skipped = claim.skipped
            log.error("queue keys that are not lists, and are not read", keys=claim.skipped)
        if not claim.messages:
            return 0
        self._unfinished = claim.token
        deliveries, dead = read_claim(claim)
        try:
            decisions = settle_batch(self._engine, deliveries, self._terms, watch=self._watch)
        except _Tripped:
            self._trip()
            return len(claim.messages)
        if dead:
            # After the neighbours: they settle even while no dead letter can be written.
            with self._engine.begin() as connection:
                record_dead_letters(connection, dead, build=self._terms.build)
        dropped = self._queues.drop(claim.token)
        self._unfinished = None
        if gate.paused:
            self._conclude_probe(decisions, failed=len(deliveries) - len(decisions))
        self._say(claim, deliveries, dead, decisions, dropped=dropped, took_s=time.monotonic() - started)
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

    def _watch(self, part: Part) -> None:
        """Between the parts of a batch: say that we live, count our own failures, hear that we should stop."""
        self._failures.extend([False] * part.settled + [True] * part.failed)
        if part.failed and sum(self._failures) > TRIPWIRE_ERRORS_MAX:
            raise _Tripped
        if part.parts_left:
            if self.stopping.is_set():
                raise _Stopping
            self._queues.refresh()

    def _may_probe(self, gate: Gate) -> bool:
        if not gate.probed or time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + self._probe_every_s
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
        deliveries: list[Delivery],
        dead: list[DeadLetter],
        decisions: list[Decision],
        *,
        dropped: bool,
        took_s: float,
    ) -> None:
        outcomes = Counter(decision.outcome.value for decision in decisions)
        failed = len(deliveries) - len(decisions)
        self.counts.update(outcomes)
        self.counts.update(batches=1, messages=len(claim.messages), not_parsed=len(dead), apply_error=failed)
        log.info(
            "batch",
            messages=len(claim.messages),
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
    deliveries, dead = [], []
    for message in claim.messages:
        try:
            deliveries.append(read_delivery(message.raw, message.queue.value))
        except MalformedMessage as error:
            dead.append(malformed_letter(message.raw, message.queue.value, error))
    return deliveries, dead


def one_line(error: BaseException) -> str:
    """The first line of what an exception says: sqlalchemy's second line holds the parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
