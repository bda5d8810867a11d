"""Settle a batch although one event of it may be bad: find that one, keep it, settle its neighbours (P8)."""

from __future__ import annotations

import traceback
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, assert_never

from kino_refunds.db.faults import Fault, classify
from kino_refunds.settlement.dead_letters import APPLY_ERROR, event_letter, record_dead_letters
from kino_refunds.settlement.outcomes import Outcome
from kino_refunds.settlement.retries import unpark
from kino_refunds.settlement.settle import Decision, Terms, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import sqlalchemy as sa

    from kino_refunds.settlement.deliveries import Delivery


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
    watch: Callable[[Part], None] = lambda _: None,
) -> list[Decision]:
    """Settle `deliveries`, in one transaction if nothing is wrong; returns the decisions, in no order.

    When the batch fails for a reason that lies in an event, it is halved until that event is alone; it
    becomes a dead letter `apply_error` and has no decision. A job's events stay together until the job is
    alone. `watch` is told of each part: it may keep a long search from being taken for a dead worker, and may
    raise to end it.

    Raises what `classify` calls KEEP: nothing is wrong with the events, keep them and come again. So is an
    event that could not even be recorded (somebody holds its row), after its neighbours are settled. Parts
    that were settled by then are told `duplicate` the next time (P2).
    """
    decisions: list[Decision] = []
    not_even_kept: Exception | None = None  # an event that we could not record: its neighbours first, then raise
    parts = [list(deliveries)] if deliveries else []
    put_off: set[str] = set()  # or a later event of such a job would overtake the one that was put off
    while parts:
        part, settled, failed = parts.pop(), [], 0
        try:
            with engine.connect() as connection:
                settled = settle(connection, part, terms, busy_jobs=put_off)
        except Exception as error:
            fault = classify(error)
            if fault is Fault.KEEP:
                raise
            smaller = _halves(part)
            if smaller:
                parts += reversed(smaller)
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
        decisions += settled
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
            trace = "".join(traceback.format_exception(error))
            letter = event_letter(delivery, APPLY_ERROR, f"{type(error).__name__}: {error}", exception=trace)
            with engine.begin() as connection:
                unpark(connection, {delivery.identity: delivery.fingerprint})
                record_dead_letters(connection, [letter], build=terms.build)
            return []
        case Fault.KEEP:
            raise error
        case _:
            assert_never(fault)


def outcomes_of(decisions: Sequence[Decision]) -> list[Outcome]:
    """Just the words."""
    return [decision.outcome for decision in decisions]
