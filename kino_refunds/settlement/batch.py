"""Settle a batch although one event of it may be bad: find that one, keep it, settle its neighbours (P8)."""

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
    """What one try of a part of a batch came to."""

    rulings: list[Ruling]
    """Of the deliveries that were given; none for an event that became a dead letter `apply_error`."""
    settled: int
    """Events ruled on, those included that were pending for the same jobs."""
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
    """Settle all parts of a batch (`settle_parts`); return the rulings, in no order."""
    return [ruling for part in settle_parts(engine, deliveries, rules, busy=busy) for ruling in part.rulings]


def settle_parts(
    engine: sa.Engine,
    deliveries: Sequence[Delivery],
    rules: Rules,
    *,
    busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
) -> Iterator[Part]:
    """Settle `deliveries`, in one transaction if nothing is wrong; yield what each part came to.

    When the batch fails for a reason that lies in an event, it is halved until that event is alone; it becomes a dead
    letter `apply_error` and has no ruling. A job's events stay together until the job is alone. Jobs in `busy` are put
    off unread. The caller may stop between two parts: what is settled stays settled, and the same events again are told
    `duplicate` (P2).

    Pending events of the same jobs are decided together with these, by the order of the events' times: a completion
    must not overtake a failure that only waits for a lot. Those events have no ruling in the answer.

    Raises what `classify` calls KEEP: nothing is wrong with the events, keep them and come again. An event that could
    not even be recorded, because its row is held, is raised so after its neighbours are settled.
    """
    given = {id(delivery) for delivery in deliveries}
    not_even_kept: Exception | None = None  # an event that we could not record: its neighbours first, then raise
    parts = [(list(deliveries), False)] if deliveries else []  # and whether the pending events of its jobs are in it
    while parts:
        (part, joined), rulings, failed = parts.pop(), list[Ruling](), 0
        try:
            with engine.connect() as connection:
                rulings = settle(connection, part, rules, busy=busy, alone=joined)
        except OthersPending as others:
            with engine.connect() as connection:
                parts.append((part + read_pending(connection, others.identities), True))
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
                    rulings = _settle_alone(engine, part[0], rules=rules, fault=fault, error=error)
                    failed = 1 - len(rulings)
                except Exception as also:
                    if classify(also) is Fault.KEEP:
                        raise
                    not_even_kept = also
                if fault is not Fault.BISECT:
                    # Or a later event of this job would overtake the one that was put off.
                    busy = busy._replace(jobs=busy.jobs | {part[0].event.job_id})
        yield Part(
            rulings=[ruling for ruling in rulings if id(ruling.delivery) in given],
            settled=len(rulings),
            failed=failed,
            parts_left=len(parts),
        )
    if not_even_kept is not None:
        raise not_even_kept


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


def _settle_alone(engine: sa.Engine, delivery: Delivery, rules: Rules, fault: Fault, error: Exception) -> list[Ruling]:
    """Give up on one event for now, or for good; the record of that is written before anything is dropped."""
    match fault:
        case Fault.LOCK | Fault.SPLIT:
            with engine.connect() as connection:
                return settle(connection, [delivery], rules, busy=Busy(jobs=frozenset({delivery.event.job_id})))
        case Fault.BISECT:
            pending = {delivery.identity: delivery.fingerprint}
            _keep_letter(engine, failed_letter(delivery, error), rules.build, pending=pending)
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
    pending: Mapping[Identity, str] = MappingProxyType({}),
) -> None:
    """Write one letter in the place of its pending row; else beside that row; else with its bytes alone.

    What makes an event fail may stand in its ids or in its pending row as well, and would keep the letter away too.
    """
    tries = [(pending, letter), *([({}, letter)] if pending else []), ({}, bare_letter(letter))]
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
