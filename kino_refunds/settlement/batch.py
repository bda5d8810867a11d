"""Settle a batch although one event of it may be bad: find that one, keep it, settle its neighbours (P8)."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, assert_never

from kino_refunds.db.faults import Fault, classify
from kino_refunds.settlement.dead_letters import DeadLetter, bare_letter, failed_letter, record_dead_letters
from kino_refunds.settlement.outcomes import Outcome
from kino_refunds.settlement.retries import read_waiting, unpark
from kino_refunds.settlement.settle import Decision, OthersWait, Terms, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import sqlalchemy as sa

    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.inbox import Identity


class Part(NamedTuple):
    """What one try of a part came to: events decided, events that became `apply_error`, parts still to do."""

    settled: int
    failed: int
    parts_left: int


def settle_batch(
    engine: sa.Engine,
    deliveries: Sequence[Delivery],
    terms: Terms,
    *,
    busy_jobs: Collection[str] = (),
    watch: Callable[[Part], None] = lambda _: None,
) -> list[Decision]:
    """Settle `deliveries`, in one transaction if nothing is wrong; returns the decisions, in no order.

    When the batch fails for a reason that lies in an event, it is halved until that event is alone; it
    becomes a dead letter `apply_error` and has no decision. A job's events stay together until the job is
    alone. `busy_jobs` are put off without being looked at. `watch` is told of each part: it may keep a long search
    from being taken for a dead worker, and may raise to end it.

    What waits for another try of the same jobs is decided together with them, by the order of the events' times: a
    completion must not overtake a failure that only waits for a lot. Those events have no decision in the answer.

    Raises what `classify` calls KEEP: nothing is wrong with the events, keep them and come again. So is an
    event that could not even be recorded (somebody holds its row), after its neighbours are settled. Parts
    that were settled by then are told `duplicate` the next time (P2).
    """
    given = {id(delivery) for delivery in deliveries}
    decisions: list[Decision] = []
    not_even_kept: Exception | None = None  # an event that we could not record: its neighbours first, then raise
    parts = [(list(deliveries), False)] if deliveries else []  # and whether what waits for its jobs is in it
    put_off = set(busy_jobs)  # or a later event of such a job would overtake the one that was put off
    while parts:
        (part, joined), settled, failed = parts.pop(), [], 0
        try:
            with engine.connect() as connection:
                settled = settle(connection, part, terms, busy_jobs=put_off, alone=joined)
        except OthersWait as others:
            with engine.connect() as connection:
                parts.append((part + read_waiting(connection, others.identities), True))
            continue
        except Exception as error:
            fault = classify(error)
            if fault is Fault.KEEP:
                raise
            smaller = _halves(part)
            if smaller:
                parts += [(half, joined) for half in reversed(smaller)]
            else:
                try:
                    settled = _settle_alone(engine, part[0], terms, fault, error)
                    failed = 1 - len(settled)
                except Exception as also:
                    if classify(also) is Fault.KEEP:
                        raise
                    not_even_kept = also
                if fault is not Fault.BISECT:
                    put_off.add(part[0].event.job_id)
        decisions += (decision for decision in settled if id(decision.delivery) in given)
        watch(Part(len(settled), failed, len(parts)))
    if not_even_kept is not None:
        raise not_even_kept
    return decisions


def _halves(part: Sequence[Delivery]) -> list[list[Delivery]]:
    """Split by job; a job that is alone by event, oldest first; a single event not at all."""
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


def _settle_alone(
    engine: sa.Engine, delivery: Delivery, terms: Terms, fault: Fault, error: Exception
) -> list[Decision]:
    """Give up on one event for now, or for good; the record of that is written before anything is dropped."""
    match fault:
        case Fault.LOCK | Fault.SPLIT:
            with engine.connect() as connection:
                return settle(connection, [delivery], terms, busy_jobs={delivery.event.job_id})
        case Fault.BISECT:
            waiting = {delivery.identity: delivery.fingerprint}
            _keep_letter(engine, failed_letter(delivery, error), terms.build, waiting=waiting)
            return []
        case Fault.KEEP:
            raise error
        case _:
            assert_never(fault)


def keep_letters(engine: sa.Engine, letters: Sequence[DeadLetter], *, build: str) -> None:
    """Write dead letters, in one transaction if nothing is wrong; one that cannot be written hinders no other.

    Raises what `classify` calls KEEP at once, and what keeps even a bare letter away after the others are written.
    """
    try:
        with engine.begin() as connection:
            record_dead_letters(connection, letters, build=build)
    except Exception as error:
        if classify(error) is Fault.KEEP:
            raise
    else:
        return
    not_even_kept: Exception | None = None
    for letter in letters:
        try:
            _keep_letter(engine, letter, build)
        except Exception as error:
            if classify(error) is Fault.KEEP:
                raise
            not_even_kept = error
    if not_even_kept is not None:
        raise not_even_kept


def _keep_letter(
    engine: sa.Engine,
    letter: DeadLetter,
    build: str,
    *,
    waiting: Mapping[Identity, str] = MappingProxyType({}),
) -> None:
    """Write one letter in the place of its pending row; else beside that row; else with its bytes alone.

    What makes an event fail may stand in its ids or in its pending row as well, and would keep the letter away too.
    """
    tries = [(waiting, letter), *([({}, letter)] if waiting else []), ({}, bare_letter(letter))]
    for number, (done, kept) in enumerate(tries, start=1):
        try:
            with engine.begin() as connection:
                unpark(connection, done)
                record_dead_letters(connection, [kept], build=build)
        except Exception as error:
            if classify(error) is Fault.KEEP or number == len(tries):
                raise
        else:
            return


def outcomes_of(decisions: Sequence[Decision]) -> list[Outcome]:
    """Just the words."""
    return [decision.outcome for decision in decisions]
