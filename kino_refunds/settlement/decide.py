"""Rule on a batch, from values alone: no database, no clock (design, section 5).

In this order: identity (of two messages under one id the first is the event), the job's other events by their own
times, the account, the policy, where the charge stands.
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
    """What is known of a job's charge before its events are ruled on."""

    charge_id: int
    account_id: str
    credits: int
    opened_at: datetime
    state: ChargeState
    history: StatusHistory
    """The account's: whether it forfeits refunds (clause 6) is asked of the event's time."""


class Busy(NamedTuple):
    """What other sessions hold at this instant: it waits for another try, and nothing else does."""

    jobs: frozenset[str] = frozenset()
    """Jobs that are put off whatever their events say."""
    charges: frozenset[int] = frozenset()
    """Charges that drew from a held lot: they can be captured, and not refunded."""


class Ruling(NamedTuple):
    """What one delivery came to, and what becomes of it."""

    delivery: Delivery
    outcome: Outcome
    disposition: Disposition
    """The outcome's, except that trying again ends some day."""
    first: Outcome | None = None
    """What the event was told before, if this is a duplicate."""
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
    """Return one ruling for each delivery, in their order."""
    rulings, firsts, copies = _identify(deliveries, record)
    states = {job_id: charge.state for job_id, charge in charges.items()}
    busy_jobs = set(busy.jobs)
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
            busy_jobs.add(job_id)  # or a later event of this job would overtake it
        elif ruling.outcome in SETTLING:
            states[job_id] = state_after(ruling.outcome)

    for index, first in copies.items():
        ruling = rulings[first]
        if disposition(ruling.outcome) is Disposition.FINAL:
            rulings[index] = _ruling(deliveries[index], Outcome.DUPLICATE, record.read_at, first=ruling.outcome)
        else:
            fate = _fate(ruling.outcome, deliveries[index], record.read_at)
            rulings[index] = ruling._replace(delivery=deliveries[index], disposition=fate)
    return [rulings[index] for index in range(len(deliveries))]


def _identify(deliveries: Sequence[Delivery], record: Record) -> tuple[dict[int, Ruling], list[int], dict[int, int]]:
    """Compare identities; return rulings by index, whose event is ruled on next, and which copies follow which of them.

    An event that is pending is ruled on again.
    """
    rulings: dict[int, Ruling] = {}
    copies: dict[int, int] = {}
    firsts: dict[Identity, int] = {}
    for index, delivery in enumerate(deliveries):
        known = record.first(delivery.identity)
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
    if charge is None or state is None:
        return _ruling(delivery, Outcome.CHARGE_NOT_FOUND, now)
    if event.account_id is not None and event.account_id != charge.account_id:
        return _ruling(delivery, Outcome.ACCOUNT_MISMATCH, now, charge=charge)
    judged_at = clamped(event.time, opened_at=charge.opened_at, now=now)
    document = policy.at(judged_at)
    # By the event's time, never by when we came to it: nobody forfeits because we were late.
    account_status = charge.history.at(judged_at)
    violation = account_status is PastStatus.TERMINATED_FOR_VIOLATION
    coverage = coverage_of(event, document, terminated_for_violation=violation)
    outcome = outcome_of(coverage, state)
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
    """Rule on an event without the policy."""
    return Ruling(delivery, outcome, _fate(outcome, delivery, now), first=first, charge=charge)


def _fate(outcome: Outcome, delivery: Delivery, now: datetime) -> Disposition:
    """Return the outcome's disposition; an event that was tried for a day without another result is not tried again."""
    fate = disposition(outcome)
    return Disposition.DEAD_LETTER if fate is Disposition.RETRY and delivery.exhausted(now) else fate
