"""Rule on a batch, from values alone: no database, no clock (design, section 5).

The order of the questions is fixed: identity (of two messages under one id the first is the event), then the job's
other events by their times, the account, the policy, and the state of the charge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kino_refunds.ledger.accounts import PastStatus
from kino_refunds.policy.automatic import coverage_of
from kino_refunds.policy.document import clamped
from kino_refunds.settlement.outcomes import (
    SETTLING,
    ChargeState,
    Disposition,
    Outcome,
    disposition,
    outcome_of,
    state_after,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from kino_refunds.ledger.accounts import StatusHistory
    from kino_refunds.policy.automatic import Coverage
    from kino_refunds.policy.document import Policy
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.record import Identity, Record


class ChargeFacts(NamedTuple):
    """The facts of a job's charge, read before its events are ruled on; `credits` are whole."""

    charge_id: int
    account_id: str
    credits: int
    opened_at: datetime
    state: ChargeState
    history: StatusHistory
    """The status history of the account: whether it forfeits a refund (clause 6) is read at the event's time."""


class Busy(NamedTuple):
    """What other sessions hold at this instant: the events of these jobs and charges are put off, and no others."""

    jobs: frozenset[str] = frozenset()
    """Jobs whose events are all put off, whatever they say."""
    charges: frozenset[int] = frozenset()
    """Charges that drew from a held lot: they can be captured, which changes no lot, but not refunded."""


class Ruling(NamedTuple):
    """What was decided for one delivery, and what becomes of it."""

    delivery: Delivery
    outcome: Outcome
    disposition: Disposition
    """The disposition of the outcome, except that retries end after a day: then it is DEAD_LETTER."""
    first: Outcome | None = None
    """The first outcome of the event, if this is a duplicate."""
    charge: ChargeFacts | None = None
    coverage: Coverage | None = None
    policy_version: str | None = None
    account_status: PastStatus | None = None


def decide(
    deliveries: Sequence[Delivery],
    record: Record,
    charges: Mapping[str, ChargeFacts],
    policy: Policy,
    *,
    busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
) -> list[Ruling]:
    """Return one ruling for each delivery, in their order.

    `record` and `charges` were read in the transaction that writes the rulings.
    """
    rulings, firsts, copies = _identify(deliveries, record)
    states = {job_id: charge.state for job_id, charge in charges.items()}
    busy_jobs = set(busy.jobs)
    # By the events' own times, then by their place: the order of arrival must not decide whether a customer pays. In
    # one batch, a failure that was queued behind a later completion still refunds.
    for index in sorted(firsts, key=lambda index: (deliveries[index].event.time, index)):
        delivery = deliveries[index]
        job_id = delivery.event.job_id
        if job_id in busy_jobs:
            ruling = _ruling(delivery, Outcome.BUSY, record.read_at)
        else:
            ruling = _rule(
                delivery, charges.get(job_id), state=states.get(job_id), policy=policy, now=record.read_at, busy=busy
            )
        rulings[index] = ruling
        if ruling.outcome is Outcome.BUSY:
            # Otherwise a later event of this job would overtake the one that is put off, and settle the charge first.
            busy_jobs.add(job_id)
        elif ruling.outcome in SETTLING:
            # The next event of this job in the batch meets a settled charge: it must not be refunded twice (P3).
            states[job_id] = state_after(ruling.outcome)

    # A copy of an event in the same batch follows its event. Ruled on by itself it would get an inbox row of its own,
    # which the key refuses, and the whole batch would be rolled back again and again.
    for index, first in copies.items():
        ruling = rulings[first]
        if disposition(ruling.outcome) is Disposition.FINAL:
            rulings[index] = _ruling(deliveries[index], Outcome.DUPLICATE, record.read_at, first=ruling.outcome)
        else:
            fate = _fate(ruling.outcome, deliveries[index], record.read_at)
            rulings[index] = ruling._replace(delivery=deliveries[index], disposition=fate)
    return [rulings[index] for index in range(len(deliveries))]


def _identify(deliveries: Sequence[Delivery], record: Record) -> tuple[dict[int, Ruling], list[int], dict[int, int]]:
    """Return the rulings that identity alone decides, the indexes to rule on, and for each copy the index of its event.

    Rulings are by index. An event that is pending is ruled on again.
    """
    rulings: dict[int, Ruling] = {}
    copies: dict[int, int] = {}
    firsts: dict[Identity, int] = {}
    for index, delivery in enumerate(deliveries):
        known = record.first(delivery.identity)
        # Other content under a known id is never applied: one id names one fact, and the first content counts. Applied,
        # it would undo what the customer has seen; taken for a duplicate, a failure that is due a refund would be lost.
        if known is not None and known.fingerprint != delivery.fingerprint:
            rulings[index] = _ruling(delivery, Outcome.CONFLICTING_DUPLICATE, record.read_at)
        elif known is not None and known.outcome is not None:
            rulings[index] = _ruling(delivery, Outcome.DUPLICATE, record.read_at, first=known.outcome)
        elif (first := firsts.setdefault(delivery.identity, index)) == index:
            pass
        elif deliveries[first].fingerprint == delivery.fingerprint:
            copies[index] = first
        else:
            rulings[index] = _ruling(delivery, Outcome.CONFLICTING_DUPLICATE, record.read_at)
    return rulings, list(firsts.values()), copies


def _rule(
    delivery: Delivery,
    charge: ChargeFacts | None,
    state: ChargeState | None,
    policy: Policy,
    now: datetime,
    busy: Busy,
) -> Ruling:
    event = delivery.event
    # The event may have overtaken its charge. It is retried for a day: without a charge there is nothing to refund yet.
    if charge is None or state is None:
        return _ruling(delivery, Outcome.CHARGE_NOT_FOUND, now)
    # A mix-up in the pipeline: the ending may be another job's. Applied, it would refund or capture the wrong charge.
    if event.account_id is not None and event.account_id != charge.account_id:
        return _ruling(delivery, Outcome.ACCOUNT_MISMATCH, now, charge=charge)
    as_of = clamped(event.time, opened_at=charge.opened_at, now=now)
    document = policy.at(as_of)
    # The status at the event's time, not at ours: no customer forfeits a refund because we settled late.
    account_status = charge.history.at(as_of)
    violation = account_status is PastStatus.TERMINATED_FOR_VIOLATION
    coverage = coverage_of(event, document, terminated_for_violation=violation)
    outcome = outcome_of(coverage, state)
    # Only a refund changes lots. Put off, it is late by a few seconds; settled now, it would wait for the held lot and
    # end the whole batch by the lock timeout.
    if outcome is Outcome.REFUNDED and charge.charge_id in busy.charges:
        return _ruling(delivery, Outcome.BUSY, now, charge=charge)
    return Ruling(
        delivery=delivery,
        outcome=outcome,
        disposition=disposition(outcome),
        charge=charge,
        coverage=coverage,
        policy_version=document.version,
        account_status=account_status,
    )


def _ruling(
    delivery: Delivery,
    outcome: Outcome,
    now: datetime,
    *,
    first: Outcome | None = None,
    charge: ChargeFacts | None = None,
) -> Ruling:
    """Return a ruling that needs no policy."""
    return Ruling(delivery, outcome, _fate(outcome, delivery, now), first=first, charge=charge)


def _fate(outcome: Outcome, delivery: Delivery, now: datetime) -> Disposition:
    """Return the outcome's disposition, or DEAD_LETTER where an event was retried for a day without another outcome."""
    fate = disposition(outcome)
    return Disposition.DEAD_LETTER if fate is Disposition.RETRY and delivery.exhausted(now) else fate
