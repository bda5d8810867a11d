"""The spine: events in, outcomes out, one Postgres transaction (promises P1 to P5, P10).

Nothing else settles a charge. Live events, retries, replays and what reconciliation finds all come
through `settle`, so reading this file is reading the system:

    read what was said before, and the charges  ->  decide (pure)  ->  kino.settle_charges(), and what was said

Credits move in that one function (kino_refunds/ledger/endings.sql). Writes go in one order everywhere, each sorted by
its key: settlements, lots, transfers, inbox, pending, breaks, dead letters. Two sessions therefore meet at the first
key that they share, one waits, and the lock time-out (below Postgres' deadlock time-out) ends the wait. What has waited
is locked before all of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import ChargeAlreadySettled, SettledElsewhere
from kino_refunds.events.schema import JobCompleted
from kino_refunds.ledger.accounts import JudgedStatus, StatusHistory, read_status_histories
from kino_refunds.ledger.endings import charges_with_held_lots, settle_charges
from kino_refunds.ledger.values import Settlement
from kino_refunds.policy.automatic import Verdict, judge
from kino_refunds.policy.document import clamped
from kino_refunds.settlement.breaks import Break, raise_breaks
from kino_refunds.settlement.dead_letters import event_letter, record_dead_letters
from kino_refunds.settlement.inbox import Record, insert_inbox, read_record
from kino_refunds.settlement.outcomes import (
    BREAKS,
    SETTLING,
    ChargeState,
    Disposition,
    Outcome,
    disposition,
    outcome_of,
    state_after,
)
from kino_refunds.settlement.retries import exhausted, lock_waiting, park, postpone, unpark

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from kino_refunds.policy.document import Policy
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.inbox import Identity

ROUNDS_MAX = 5
"""Each round lost means that somebody else decided one of our events; five in a row is a broken clock or a loop."""

ALWAYS_ACTIVE = StatusHistory()


class ChargeFacts(NamedTuple):
    """What is known of a job's charge before we decide."""

    charge_id: int
    account_id: str
    credits: int
    opened_at: datetime
    state: ChargeState
    history: StatusHistory
    """The account's: whether it forfeits refunds (clause 6) is asked of the event's time."""


class OthersWait(Exception):
    """Other events of these jobs wait for another try, and must be decided together with the new ones."""

    def __init__(self, identities: Collection[Identity]) -> None:
        super().__init__(f"{len(identities)} other events of these jobs wait")
        self.identities = identities


class Decision(NamedTuple):
    """What one delivery came to; `first` is what the event was told before, if this is a duplicate."""

    delivery: Delivery
    outcome: Outcome
    first: Outcome | None = None
    charge: ChargeFacts | None = None
    verdict: Verdict | None = None
    policy_version: str | None = None
    account_status: JudgedStatus | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a settlement goes by beside the events: the policy, and settings of the house."""

    policy: Policy
    build: str


def settle(
    connection: sa.Connection,
    deliveries: Sequence[Delivery],
    terms: Terms,
    *,
    busy_jobs: Collection[str] = (),
    alone: bool = True,
) -> list[Decision]:
    """Settle a batch in a transaction of its own; returns one decision a delivery, in their order.

    All or nothing. `busy_jobs` are put off without being looked at. Unless `alone`, raises OthersWait where other
    events of these jobs wait for another try; nothing was written then. If a lot is held by
    another session for longer than the lock time-out, we ask once which, put those jobs off and settle
    the rest. Raises SettledElsewhere if other sessions keep deciding our events, and whatever Postgres
    raises; `kino_refunds.db.faults.classify` says what that means for the batch.
    """
    held: set[int] | None = None
    for _ in range(ROUNDS_MAX):
        try:
            with connection.begin():
                return _settle_once(connection, deliveries, terms, busy_jobs, held or set(), alone=alone)
        except SettledElsewhere:
            continue
        except sa.exc.OperationalError as error:
            if held is not None or classify(error) is not Fault.LOCK:
                raise
            held = _held_charges(connection, deliveries)
            if not held:
                raise  # it is another row that is held: only parting the batch tells whose
    message = f"other sessions decided events of this batch {ROUNDS_MAX} times in a row"
    raise SettledElsewhere(message)


def _held_charges(connection: sa.Connection, deliveries: Sequence[Delivery]) -> set[int]:
    with connection.begin():
        charges = read_charges(connection, {delivery.event.job_id for delivery in deliveries})
        return charges_with_held_lots(
            connection, {charge.charge_id for charge in charges.values() if charge.state is ChargeState.OPEN}
        )


def _settle_once(
    connection: sa.Connection,
    deliveries: Sequence[Delivery],
    terms: Terms,
    busy_jobs: Collection[str],
    held_charges: Collection[int],
    *,
    alone: bool,
) -> list[Decision]:
    lock_waiting(connection, deliveries)
    record = read_record(connection, [delivery.event for delivery in deliveries])
    if record.beside and not alone:
        raise OthersWait(record.beside)
    charges = read_charges(connection, {delivery.event.job_id for delivery in deliveries})
    decisions = decide(deliveries, record, charges, terms.policy, busy_jobs=busy_jobs, held_charges=held_charges)
    _write(connection, decisions, record, terms)
    return decisions


_READ_CHARGES = sa.text("""
    SELECT c.job_id, c.charge_id, c.account_id, c.credits, c.opened_at, s.kind, k.charge_id,
           a.status_reason IS NOT NULL AS has_history
    FROM unnest(CAST(:job_ids AS text[])) AS j (job_id)
    JOIN kino.charge c ON c.job_id = j.job_id
    JOIN kino.account a ON a.account_id = c.account_id
    LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
    LEFT JOIN kino.correction k ON k.charge_id = c.charge_id
""")


def read_charges(connection: sa.Connection, job_ids: Collection[str]) -> dict[str, ChargeFacts]:
    """Read the charges of these jobs, by job."""
    rows = connection.execute(_READ_CHARGES, {"job_ids": sorted(job_ids)}).all()
    # Hardly any account ever changes its status, and each change says why.
    changed = {row[2] for row in rows if row[7]}
    histories = read_status_histories(connection, changed) if changed else {}
    charges = {}
    for job_id, charge_id, account_id, credits, opened_at, kind, corrected, _ in rows:
        if kind is None:
            state = ChargeState.OPEN
        elif kind == "refunded" or corrected is not None:
            state = ChargeState.REFUNDED
        else:
            state = ChargeState.CAPTURED
        history = histories.get(account_id, ALWAYS_ACTIVE)
        charges[job_id] = ChargeFacts(charge_id, account_id, credits, opened_at, state, history)
    return charges


def decide(
    deliveries: Sequence[Delivery],
    record: Record,
    charges: Mapping[str, ChargeFacts],
    policy: Policy,
    *,
    busy_jobs: Collection[str] = (),
    held_charges: Collection[int] = (),
) -> list[Decision]:
    """Decide every delivery of a batch, from values alone; returns one decision each, in their order.

    Identity comes first, in the order of delivery: of two messages under one id the first is the event.
    Then each job's events are decided in the order of their own times, the first one settling its charge.
    """
    decisions: dict[int, Decision] = {}
    copies: dict[int, int] = {}
    firsts: dict[Identity, int] = {}
    for index, delivery in enumerate(deliveries):
        said = record.first(delivery.identity)
        if said is not None and said.fingerprint != delivery.fingerprint:
            decisions[index] = Decision(delivery, Outcome.CONFLICTING_DUPLICATE)
        elif said is not None and said.outcome is not None:
            decisions[index] = Decision(delivery, Outcome.DUPLICATE, said.outcome)
        elif (first := firsts.setdefault(delivery.identity, index)) == index:
            pass  # the first of its identity, decided below; so is one that waits for another try
        elif deliveries[first].fingerprint == delivery.fingerprint:
            copies[index] = first
        else:
            decisions[index] = Decision(delivery, Outcome.CONFLICTING_DUPLICATE)

    states = {job_id: charge.state for job_id, charge in charges.items()}
    busy = set(busy_jobs)
    for index in sorted(firsts.values(), key=lambda index: (deliveries[index].event.time, index)):
        decision = _decide_one(deliveries[index], charges, states, policy, record.read_at, busy, held_charges)
        decisions[index] = decision
        if decision.outcome is Outcome.BUSY:
            busy.add(decision.delivery.event.job_id)  # or a later event of this job would overtake it
        elif decision.outcome in SETTLING:
            states[decision.delivery.event.job_id] = state_after(decision.outcome)

    for index, first in copies.items():
        outcome = decisions[first].outcome
        if disposition(outcome) is Disposition.FINAL:
            decisions[index] = Decision(deliveries[index], Outcome.DUPLICATE, outcome)
        else:
            decisions[index] = decisions[first]._replace(delivery=deliveries[index])
    return [decisions[index] for index in range(len(deliveries))]


def _decide_one(
    delivery: Delivery,
    charges: Mapping[str, ChargeFacts],
    states: Mapping[str, ChargeState],
    policy: Policy,
    now: datetime,
    busy_jobs: Collection[str],
    held_charges: Collection[int],
) -> Decision:
    event = delivery.event
    if event.job_id in busy_jobs:
        return Decision(delivery, Outcome.BUSY)
    charge = charges.get(event.job_id)
    if charge is None:
        return Decision(delivery, Outcome.CHARGE_NOT_FOUND)
    if event.account_id is not None and event.account_id != charge.account_id:
        return Decision(delivery, Outcome.ACCOUNT_MISMATCH, charge=charge)
    judged_at = clamped(event.time, opened_at=charge.opened_at, now=now)
    document = policy.at(judged_at)
    # By the event's time, never by when we came to it: nobody forfeits because we were late.
    account_status = charge.history.at(judged_at)
    violation = account_status is JudgedStatus.TERMINATED_FOR_VIOLATION
    verdict = judge(event, document, terminated_for_violation=violation)
    outcome = outcome_of(verdict, states[event.job_id])
    if outcome is Outcome.REFUNDED and charge.charge_id in held_charges:
        return Decision(delivery, Outcome.BUSY, charge=charge)
    return Decision(delivery, outcome, None, charge, verdict, document.version, account_status)


def _write(connection: sa.Connection, decisions: Sequence[Decision], record: Record, terms: Terms) -> None:
    settling = [d for d in decisions if d.outcome in SETTLING]
    final, retrying, dead = (
        [d for d in decisions if _fate(d, record.read_at) is fate]
        for fate in (Disposition.FINAL, Disposition.RETRY, Disposition.DEAD_LETTER)
    )
    try:
        settle_charges(connection, [_settlement(decision) for decision in settling])
    except ChargeAlreadySettled as error:  # another session was first since we read (P1)
        raise SettledElsewhere(str(error)) from error
    insert_inbox(
        connection,
        [(d.delivery, d.outcome) for d in final if d.outcome is not Outcome.DUPLICATE],
    )

    retry = {d.delivery.identity: (d.delivery, d.outcome) for d in retrying}
    park(connection, [waiting for identity, waiting in retry.items() if identity not in record.pending])
    postpone(connection, [waiting for waiting in retry.values() if waiting[0].pending_since is not None])
    unpark(
        connection,
        {
            d.delivery.identity: d.delivery.fingerprint
            for d in (*final, *dead)
            # The row is that of one content: a conflict under the same id must not stand in for it.
            if record.waits(d.delivery.identity, d.delivery.fingerprint)
        },
    )

    raise_breaks(connection, [_break(d) for d in decisions if d.outcome in BREAKS])
    record_dead_letters(
        connection,
        [event_letter(d.delivery, d.outcome.value, _why_dead(d, record)) for d in dead],
        build=terms.build,
    )


def _fate(decision: Decision, now: datetime) -> Disposition:
    """The outcome's disposition, except that trying again ends some day."""
    fate = disposition(decision.outcome)
    if fate is Disposition.RETRY and exhausted(decision.delivery, now):
        return Disposition.DEAD_LETTER
    return fate


def _settlement(decision: Decision) -> Settlement:
    charge, verdict, event = _charge(decision), _verdict(decision), decision.delivery.event
    assert decision.policy_version is not None, "an outcome that settles was decided by a policy"
    assert decision.account_status is not None, "an outcome that settles was decided by the account's status"
    return Settlement(
        charge.charge_id,
        "refunded" if verdict.refund else "captured",
        verdict.reason.value,
        verdict.clause.value,
        decision.policy_version,
        event.ending,
        decision.account_status.value,
        event.source,
        event.id,
        event.time,
    )


def _break(decision: Decision) -> Break:
    charge, event = _charge(decision), decision.delivery.event
    said = "completed" if isinstance(event, JobCompleted) else f"ended as {event.type}"
    stands = "refunded" if decision.outcome is Outcome.COMPLETED_AFTER_REFUND else "captured"
    detail = f"event {event.id} of {event.source} says the job {said}; its charge was {stands} before, and stays so"
    return Break(decision.outcome.value, event.job_id, charge.charge_id, charge.credits, detail)


def _why_dead(decision: Decision, record: Record) -> str:
    event = decision.delivery.event
    if decision.outcome is Outcome.CONFLICTING_DUPLICATE:
        said = record.first(decision.delivery.identity)
        before = said.outcome.value if said is not None and said.outcome is not None else "not decided yet"
        return f"event {event.id} of {event.source} came before with other content ({before}); this one is not applied"
    if decision.outcome is Outcome.ACCOUNT_MISMATCH:
        return (
            f"the event names account {event.account_id}, the charge of job {event.job_id} is of"
            f" {_charge(decision).account_id}"
        )
    return f"{decision.outcome.value}: tried for a day without another result"


def _charge(decision: Decision) -> ChargeFacts:
    assert decision.charge is not None, "an outcome that needs a charge was decided with one"
    return decision.charge


def _verdict(decision: Decision) -> Verdict:
    assert decision.verdict is not None, "an outcome that settles was decided by a verdict"
    return decision.verdict
