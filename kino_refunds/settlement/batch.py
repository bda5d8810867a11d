"""Settle a batch that may hold a bad event: find that event, keep it as a dead letter, settle the others (P8)."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, assert_never

from kino_refunds.db.faults import Fault, classify
from kino_refunds.settlement.dead_letters import DeadLetter, bare_letter, failed_letter, record_dead_letters
from kino_refunds.settlement.decide import Busy, Ruling
from kino_refunds.settlement.pending import read_pending, unpark
from kino_refunds.settlement.settle import OthersPending, settle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import sqlalchemy as sa

    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.record import Identity
    from kino_refunds.settlement.rules import Rules


class Part(NamedTuple):
    """The result of one attempt to settle a part of a batch."""

    rulings: list[Ruling]
    """Of the caller's deliveries; there is none for an event that became a dead letter `apply_error`."""
    settled: int
    """Events ruled on, including events that were pending for the same jobs."""
    failed: int
    """Events that became `apply_error`: 0 or 1."""
    parts_left: int


def settle_batch(
    engine: sa.Engine,
    deliveries: Sequence[Delivery],
    rules: Rules,
    *,
    busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
) -> list[Ruling]:
    """Settle all parts of a batch and return the rulings, in no order; raises what `settle_parts` raises."""
    return [ruling for part in settle_parts(engine, deliveries, rules, busy=busy) for ruling in part.rulings]


def settle_parts(
    engine: sa.Engine,
    deliveries: Sequence[Delivery],
    rules: Rules,
    *,
    busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
) -> Iterator[Part]:
    """Settle `deliveries`, in one transaction if nothing is wrong; yield the result of each part.

    If the batch fails because of an event, it is halved until that event is alone. The event becomes a dead letter
    `apply_error` and has no ruling. A job's events stay together until the job is alone. Jobs in `busy` are put off
    without a look at their events. The caller may stop between two parts: settled events stay settled, and are
    duplicates when they are delivered again (P2).

    Pending events of the same jobs are decided together with these, in the order of the events' times: a completion
    must not overtake a failure that is pending only because a lot was held. Those events have no ruling in the answer.

    Raises the errors that `classify` calls KEEP: nothing is wrong with the events, so keep them and settle them again.
    If neither an event nor its dead letter could be written, raises that error after the other events are settled.
    """
    given = {id(delivery) for delivery in deliveries}
    unrecorded: Exception | None = None
    parts = [(list(deliveries), False)] if deliveries else []  # with whether the pending events of its jobs joined it
    while parts:
        (part, joined), rulings, failed = parts.pop(), list[Ruling](), 0
        try:
            with engine.connect() as connection:
                rulings = settle(connection, part, rules, busy=busy, alone=joined)
        except OthersPending as others:
            # Nothing was written. The pending events join before the part is split, so that each can fail by itself:
            # a bad one among them must not make letters of the events that were just claimed.
            with engine.connect() as connection:
                parts.append((part + read_pending(connection, others.identities), True))
            continue
        except Exception as error:
            fault = classify(error)
            # The messages stay in flight and are claimed again. Parts that were committed before are duplicates then,
            # so no credits move twice (P2).
            if fault is Fault.KEEP:
                raise
            # The failed transaction is rolled back, so its credits have not moved and each half may be settled afresh.
            # Reversed, because the last one is taken first: a job's oldest event must be settled before its later ones.
            smaller = _halves(part)
            if smaller:
                parts += [(half, joined) for half in reversed(smaller)]
            else:
                # Also without a row for this event, the others settle first: one held row must not block them (P8).
                try:
                    rulings = _settle_alone(engine, part[0], rules=rules, fault=fault, error=error)
                    failed = 1 - len(rulings)
                except Exception as also:
                    if classify(also) is Fault.KEEP:
                        raise
                    unrecorded = also
                if fault is not Fault.BISECT:
                    # Otherwise a later event of this job would overtake the event that was put off: a completion would
                    # capture a charge whose failure is due a refund.
                    busy = busy._replace(jobs=busy.jobs | {part[0].event.job_id})
        yield Part(
            rulings=[ruling for ruling in rulings if id(ruling.delivery) in given],
            settled=len(rulings),
            failed=failed,
            parts_left=len(parts),
        )
    # The error keeps the batch in Redis: this event may be recorded nowhere else, and would be lost with the drop (P6).
    if unrecorded is not None:
        raise unrecorded


def _halves(part: Sequence[Delivery]) -> list[list[Delivery]]:
    """Return two halves of the part's jobs; of one job its events, oldest first; of one event nothing."""
    jobs: dict[str, list[Delivery]] = defaultdict(list)
    for delivery in part:
        jobs[delivery.event.job_id].append(delivery)
    if len(jobs) > 1:
        middle = len(jobs) // 2
        groups = list(jobs.values())
        return [[d for group in half for d in group] for half in (groups[:middle], groups[middle:])]
    if len(part) > 1:
        return [[delivery] for delivery in sorted(part, key=lambda delivery: delivery.event.time)]
    return []


def _settle_alone(engine: sa.Engine, delivery: Delivery, rules: Rules, fault: Fault, error: Exception) -> list[Ruling]:
    """Give up on one event, for now (a pending row) or finally (a dead letter); return the ruling of one put off.

    The row is written before the message is dropped from Redis, so the event is recorded at every instant (P6).
    """
    match fault:
        case Fault.LOCK | Fault.SPLIT:
            # As `busy` it gets a pending row: the refund is late, and the retry sweep pays it once the lot is free.
            with engine.connect() as connection:
                return settle(connection, [delivery], rules, busy=Busy(jobs=frozenset({delivery.event.job_id})))
        case Fault.BISECT:
            # The letter replaces the pending row. With both, the retry sweep would try the event again for a day, and
            # it would fail each time.
            pending = {delivery.identity: delivery.fingerprint}
            _keep_letter(engine, failed_letter(delivery, error), rules.build, pending=pending)
            return []
        case Fault.KEEP:
            raise error
        case _:
            assert_never(fault)


def keep_letters(engine: sa.Engine, letters: Sequence[DeadLetter], *, build: str) -> None:
    """Write dead letters, in one transaction if nothing is wrong; a letter that cannot be written blocks no other.

    Raises the errors that `classify` calls KEEP at once. If even the bare letter of a message cannot be written, raises
    that error after the other letters are written.
    """
    try:
        with engine.begin() as connection:
            record_dead_letters(connection, letters, build=build)
    except Exception as error:
        if classify(error) is Fault.KEEP:
            raise
    else:
        return
    # One letter at a time. The caller drops the messages only if nothing is raised, so a letter that cannot be written
    # keeps its message in Redis (P7).
    unrecorded: Exception | None = None
    for letter in letters:
        try:
            _keep_letter(engine, letter, build)
        except Exception as error:
            if classify(error) is Fault.KEEP:
                raise
            unrecorded = error
    if unrecorded is not None:
        raise unrecorded


def _keep_letter(
    engine: sa.Engine,
    letter: DeadLetter,
    build: str,
    *,
    pending: Mapping[Identity, str] = MappingProxyType({}),
) -> None:
    """Write one letter in the place of its pending row; failing that beside the row; failing that with its bytes alone.

    The value that makes an event fail may be one of its ids, or be in its pending row: then the letter fails by it too.
    """
    tries = [(pending, letter), *([({}, letter)] if pending else []), ({}, bare_letter(letter))]
    for number, (done, kept) in enumerate(tries, start=1):
        try:
            with engine.begin() as connection:
                # In one transaction: the event has its pending row or its letter at every instant (P6).
                unpark(connection, done)
                record_dead_letters(connection, [kept], build=build)
        except Exception as error:
            if classify(error) is Fault.KEEP or number == len(tries):
                raise
        else:
            return
