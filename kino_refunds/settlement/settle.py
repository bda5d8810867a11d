"""The spine: events in, rulings out, one Postgres transaction (promises P1 to P5, P10).

Nothing else settles a charge. Live events, retries, replays and the events that reconciliation writes all go through
`settle`, so reading this file is reading the system:

    read the record and the charges  ->  decide (pure)  ->  kino.settle_charges(), and write the record

Credits move in that one function (kino_refunds/ledger/endings.sql). The order of writes is the same everywhere, each
table sorted by its key: settlements, lots, transfers, inbox, pending, breaks, dead letters. Two sessions therefore meet
at the first key that they share, one waits, and the lock timeout (below Postgres' deadlock timeout) ends the wait. The
pending rows of the batch's own events are locked before all of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import ChargeAlreadySettled, SettledElsewhere
from kino_refunds.ledger.endings import settle_charges
from kino_refunds.ledger.values import Settlement, SettlementKind
from kino_refunds.settlement.breaks import break_of, raise_breaks
from kino_refunds.settlement.charges import read_charges, read_held_charges
from kino_refunds.settlement.dead_letters import record_dead_letters, ruled_letter
from kino_refunds.settlement.decide import Busy, Ruling, decide
from kino_refunds.settlement.inbox import insert_inbox, read_record
from kino_refunds.settlement.outcomes import BREAKS, SETTLING, Disposition, Outcome
from kino_refunds.settlement.pending import lock_pending, park, postpone, unpark

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.record import Identity, Record
    from kino_refunds.settlement.rules import Rules

ROUNDS_MAX = 5
"""Each lost round means that another session decided one of our events; five in a row are a broken clock or a loop."""


class OthersPending(Exception):
    """Other events of these jobs are pending, and must be decided together with the new ones; nothing was written."""

    def __init__(self, identities: Collection[Identity]) -> None:
        super().__init__(f"{len(identities)} other events of these jobs are pending")
        self.identities = identities


def settle(
    connection: sa.Connection,
    deliveries: Sequence[Delivery],
    rules: Rules,
    *,
    busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
    alone: bool = True,
) -> list[Ruling]:
    """Settle a batch in a transaction of its own, all or nothing; return one ruling for each delivery, in their order.

    Jobs in `busy` are put off without a look at their events. If another session holds a lot for longer than the lock
    timeout, this asks once which charges need such a lot, puts their refunds off and settles the rest.

    Raises OthersPending, unless `alone`, if other events of these jobs are pending; SettledElsewhere if other sessions
    decide events of this batch ROUNDS_MAX times in a row; and what Postgres raises (`kino_refunds.db.faults.classify`
    says what that means for the batch). Nothing was written then, unless only the answer to the COMMIT was lost.
    """
    asked = False
    for _ in range(ROUNDS_MAX):
        try:
            with connection.begin():
                return _settle_once(connection, deliveries, rules, busy, alone=alone)
        except SettledElsewhere:
            # Rolled back, with every credit that it moved; read again, the charge is settled or the event decided.
            continue
        except sa.exc.OperationalError as error:
            if asked or classify(error) is not Fault.LOCK:
                raise
            with connection.begin():
                held = read_held_charges(connection, {delivery.event.job_id for delivery in deliveries})
            if not held:
                raise  # no lot but another row is held: only splitting the batch finds which job it concerns
            # One customer's slow transaction must not hold up the refunds of all others in the batch (P8).
            asked, busy = True, busy._replace(charges=held)
    message = f"other sessions decided events of this batch {ROUNDS_MAX} times in a row; the batch is split"
    raise SettledElsewhere(message)


def _settle_once(
    connection: sa.Connection, deliveries: Sequence[Delivery], rules: Rules, busy: Busy, *, alone: bool
) -> list[Ruling]:
    # Before anything else: a session that retries an event holds its pending row until the outcome is committed.
    lock_pending(connection, deliveries)
    record = read_record(connection, [delivery.event for delivery in deliveries])
    # A failure may be pending because a lot was held: a completion settled without it would let the customer pay.
    if record.beside and not alone:
        raise OthersPending(record.beside)
    charges = read_charges(connection, {delivery.event.job_id for delivery in deliveries})
    rulings = decide(deliveries, record, charges, rules.policy, busy=busy)
    _write(connection, rulings, record, rules.build)
    return rulings


def _write(connection: sa.Connection, rulings: Sequence[Ruling], record: Record, build: str) -> None:
    final, retry, dead = (
        [ruling for ruling in rulings if ruling.disposition is fate]
        for fate in (Disposition.FINAL, Disposition.RETRY, Disposition.DEAD_LETTER)
    )
    # Two batches with one job meet here, and the later one reads again: otherwise both would return its credits (P1).
    try:
        settle_charges(connection, [_settlement(ruling) for ruling in final if ruling.outcome in SETTLING])
    except ChargeAlreadySettled as error:
        raise SettledElsewhere(str(error)) from error
    # In the transaction of the transfers: an outcome without them would make the event a duplicate and lose its refund.
    insert_inbox(connection, [ruling for ruling in final if ruling.outcome is not Outcome.DUPLICATE])
    # By identity: copies of an event in one batch share one pending row, which is all that is left after the drop.
    again = {ruling.delivery.identity: ruling for ruling in retry}
    park(connection, [ruling for identity, ruling in again.items() if identity not in record.pending])
    postpone(connection, [ruling for ruling in again.values() if ruling.delivery.pending_since is not None])
    # A pending row belongs to one content: a conflict under the same id must not delete it, and with it a refund.
    done = [ruling.delivery for ruling in (*final, *dead)]
    unpark(
        connection,
        {each.identity: each.fingerprint for each in done if record.is_pending(each.identity, each.fingerprint)},
    )

    raise_breaks(connection, [break_of(ruling) for ruling in rulings if ruling.outcome in BREAKS])
    # Last of all: a person may hold a letter's row, and no row that moves credits may wait behind it.
    record_dead_letters(connection, [ruled_letter(ruling, record) for ruling in dead], build=build)


def _settlement(ruling: Ruling) -> Settlement:
    charge, coverage, event = ruling.charge, ruling.coverage, ruling.delivery.event
    assert charge is not None, "an outcome that settles has a charge"
    assert coverage is not None, "an outcome that settles has the policy's coverage"
    assert ruling.policy_version is not None, "an outcome that settles names the policy version"
    assert ruling.account_status is not None, "an outcome that settles names the account's status"
    # No amount and no lot: settle_charges reads both from the charge's lines, so no refund exceeds what was taken (P4).
    return Settlement(
        charge_id=charge.charge_id,
        kind=SettlementKind.REFUNDED if coverage.refund else SettlementKind.CAPTURED,
        reason=coverage.reason.value,
        clause=coverage.clause.value,
        policy_version=ruling.policy_version,
        ending=event.ending,
        account_status=ruling.account_status.value,
        event_source=event.source,
        event_id=event.id,
        event_time=event.time,
    )
