"""A refund against what happens to its lot at the same time: expiry and voiding."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from tests.clock import SECOND, expire_lots, set_lot_grace
from tests.integration.settlement.races import Gate, race
from tests.ledger_acts import void
from tests.scenario import NOW, Moved, Scene, make_event, until

# A refund against what happens to its lot. The grace is nought here, so that the lot's state alone decides.


EXPIRES_AT = NOW + timedelta(hours=2)
JUST_BEFORE = EXPIRES_AT - SECOND


def test_a_refund_that_waits_for_the_expiry_of_its_lot(patient: Scene, threads: ThreadPoolExecutor) -> None:
    """Expiry first: the refund sees the expired lot and opens a successor, so no credit falls into a dead lot."""
    set_lot_grace(patient.superuser, 0)
    charge = patient.charged(expires_at=EXPIRES_AT)
    lot_id = charge.lines[0][0]

    with patient.worker.connect() as expiry:
        expired = expire_lots(expiry, now=EXPIRES_AT)
        settling = threads.submit(patient.settle, make_event("timeout"), now=JUST_BEFORE)
        until(lambda: patient.waiting_for_locks() == 1 or settling.done())
        expiry.commit()
    said = settling.result(60)

    lots = patient.rows("SELECT lot_id, state, granted, remaining, successor_of FROM kino.credit_lot ORDER BY lot_id")
    successor_id = lots[1][0]
    assert (expired, said) == (1, ["refunded"])
    assert lots == [(lot_id, "expired", 100, 0, None), (successor_id, "active", 10, 10, lot_id)]
    assert patient.story().moved == [Moved("refund", lot_id, successor_id, 10, "timeout")]


def test_an_expiry_passes_over_the_lot_of_a_refund(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Refund first: expiry does not wait for the lot, and its next run takes the returned credits too."""
    set_lot_grace(patient.superuser, 0)
    charge = patient.charged(expires_at=EXPIRES_AT)
    gate = gate_after("settle_charges")

    settling = threads.submit(patient.settle, make_event("timeout"), now=JUST_BEFORE)
    assert gate.reached.wait(30)
    with patient.worker.begin() as connection:
        passed_over = expire_lots(connection, now=EXPIRES_AT)
    gate.opened.set()
    said = settling.result(60)
    with patient.worker.begin() as connection:
        expired = expire_lots(connection, now=EXPIRES_AT)

    assert (passed_over, said, expired) == (0, ["refunded"], 1)
    assert patient.rows("SELECT lot_id, state, remaining FROM kino.credit_lot") == [(charge.lines[0][0], "expired", 0)]
    assert patient.rows("SELECT credits FROM kino.transfer WHERE kind = 'expire'") == [(100,)]


def test_a_refund_that_waits_for_the_voiding_of_its_lot(patient: Scene, threads: ThreadPoolExecutor) -> None:
    """Voiding first: the refunded credits are voided in the same transaction and cannot be spent."""
    charge = patient.charged(purchase_id="order-1")
    lot_id = charge.lines[0][0]

    with patient.superuser.connect() as voiding:
        voided = void(voiding, "order-1")
        settling = threads.submit(patient.settle, make_event("timeout"))
        until(lambda: patient.waiting_for_locks() == 1 or settling.done())
        voiding.commit()
    said = settling.result(60)

    assert (voided, said) == (90, ["refunded"])
    assert patient.story().moved == [
        Moved("refund", lot_id, None, 10, "timeout"),
        Moved("void", lot_id, None, 10, "payout"),
    ]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0)]


def test_a_voiding_that_waits_for_a_refund(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Refund first: the voiding waits and takes back what was returned as well."""
    patient.charged(purchase_id="order-1")

    def act() -> int:
        with patient.superuser.begin() as connection:
            return void(connection, "order-1")

    said = race(patient, threads, gate_after("settle_charges"), lambda: patient.settle(make_event("timeout")), act)

    assert said == [["refunded"], 100]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0)]


def test_a_voiding_finds_the_successor_that_a_refund_opens(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """A successor that is born while the voiding waits for its parent is voided too."""
    patient.charged(purchase_id="order-1", expires_at=NOW + timedelta(days=1))

    def act() -> int:
        with patient.superuser.begin() as connection:
            return void(connection, "order-1")

    said = race(patient, threads, gate_after("settle_charges"), lambda: patient.settle(make_event("timeout")), act)

    assert said == [["refunded"], 100]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0), ("voided", 0)]
