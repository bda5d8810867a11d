"""From which lots a charge is taken, and in which order."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from kino_refunds.errors import InsufficientCredits
from kino_refunds.ledger import Grant, LotClass
from tests.clock import DAY, TICK, expire_lots
from tests.ledger_acts import NOW, SOLD, charge, end_and_commit, freeze, give, lot_states, thaw, void

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


# Each pair differs in one criterion, and every criterion behind it says the opposite: the lot that is
# granted second burns first, unless the case says so itself.
FREE = LotClass.PROMOTIONAL
BURN_ORDER = {
    "priority": (
        replace(SOLD, priority=2, expires_at=NOW + DAY, lot_class=FREE),
        replace(SOLD, priority=1, expires_at=None, lot_class=LotClass.LIFETIME),
    ),
    "priority may be negative": (replace(SOLD, priority=0), replace(SOLD, priority=-1)),
    "expiry": (
        replace(SOLD, expires_at=NOW + 2 * DAY + TICK, lot_class=FREE),
        replace(SOLD, expires_at=NOW + 2 * DAY, lot_class=LotClass.LIFETIME),
    ),
    "no expiry comes last": (
        replace(SOLD, expires_at=None, lot_class=FREE),
        replace(SOLD, expires_at=NOW + 4000 * DAY, lot_class=LotClass.LIFETIME),
    ),
    "purchased before lifetime": (
        replace(SOLD, lot_class=LotClass.LIFETIME),
        replace(SOLD, lot_class=LotClass.PURCHASED),
    ),
    "subscription before purchased": (
        replace(SOLD, lot_class=LotClass.PURCHASED),
        replace(SOLD, lot_class=LotClass.SUBSCRIPTION),
    ),
    "courtesy before subscription": (
        replace(SOLD, lot_class=LotClass.SUBSCRIPTION),
        replace(SOLD, lot_class=LotClass.COURTESY),
    ),
    "promotional before courtesy": (
        replace(SOLD, lot_class=LotClass.COURTESY),
        replace(SOLD, lot_class=LotClass.PROMOTIONAL),
    ),
    "class where neither expires": (
        replace(SOLD, expires_at=None, lot_class=LotClass.LIFETIME),
        replace(SOLD, expires_at=None, lot_class=LotClass.PURCHASED),
    ),
}


class TestBurnOrder:
    @pytest.mark.parametrize(("first", "second"), BURN_ORDER.values(), ids=BURN_ORDER)
    def test_lots_burn_by_priority_expiry_and_class(self, product: sa.Connection, first: Grant, second: Grant) -> None:
        """Of two lots the one burns first that comes first by priority, then expiry, then class."""
        give(product, replace(first, credits=10), replace(second, reference="order-2", credits=10))

        opened = charge(product, credits=11)

        assert opened.lines == [(2, 10), (1, 1)]

    @pytest.mark.parametrize(("seconds", "order"), [((2, 1, 3), [2, 1, 3]), ((5, 5, 5), [1, 2, 3])])
    def test_lots_that_are_alike_burn_by_age_and_then_by_id(
        self, product: sa.Connection, superuser: sa.Connection, seconds: tuple[int, ...], order: list[int]
    ) -> None:
        """Among lots on the same terms the older burns first, and of the same instant the lower id."""
        give(product, *(replace(SOLD, reference=str(n), credits=10) for n in range(3)))
        for lot_id, second in enumerate(seconds, start=1):
            superuser.execute(
                sa.text("UPDATE kino.credit_lot SET granted_at = :at WHERE lot_id = :lot_id"),
                {"at": NOW - DAY + timedelta(seconds=second), "lot_id": lot_id},
            )
        superuser.commit()

        opened = charge(product, credits=30)

        assert [lot_id for lot_id, _ in opened.lines] == order

    def test_a_charge_takes_a_lot_whole_before_the_next(self, product: sa.Connection) -> None:
        """A charge over several lots empties each before it touches another, and its lines keep that order."""
        give(
            product,
            replace(SOLD, reference="c", credits=5, priority=3),
            replace(SOLD, reference="a", credits=3, priority=1),
            replace(SOLD, reference="b", credits=4, priority=2),
        )
        charge(product, "first", 1)

        opened = charge(product, "second", 8)

        assert opened.lines == [(2, 2), (3, 4), (1, 2)]
        assert lot_states(product) == [(1, "active", 3), (2, "active", 0), (3, "active", 0)]

    def test_lines_are_numbered_in_burn_order(self, product: sa.Connection) -> None:
        """What is stored says in which order the lots burned, so that a refund can be explained."""
        give(product, replace(SOLD, credits=5, priority=2), replace(SOLD, reference="b", credits=5, priority=1))
        charge(product, credits=7)

        rows = product.exec_driver_sql("SELECT charge_id, seq, lot_id, credits FROM kino.charge_line ORDER BY seq")

        assert [tuple(row) for row in rows] == [(1, 1, 2, 5), (1, 2, 1, 2)]

    def test_expired_frozen_and_voided_lots_are_never_drawn(
        self, product: sa.Connection, connection: sa.Connection, superuser: sa.Connection
    ) -> None:
        """Only living credits are spent: not expired ones, even before their sweep, nor frozen or voided ones."""
        give(
            product,
            replace(SOLD, reference="unswept", priority=1, expires_at=NOW - TICK, purchase_id=None),
            replace(SOLD, reference="frozen", priority=2, purchase_id="p-frozen"),
            replace(SOLD, reference="voided", priority=3, purchase_id="p-voided"),
            replace(SOLD, reference="good", priority=4, credits=10),
            replace(SOLD, reference="swept", priority=5, expires_at=NOW + DAY, purchase_id=None),
        )
        freeze(connection, "p-frozen")
        void(connection, "p-voided")
        # Held, so that the sweep passes it over.
        superuser.exec_driver_sql("SELECT FROM kino.credit_lot WHERE lot_id = 1 FOR NO KEY UPDATE")
        expire_lots(connection, now=NOW + DAY)
        connection.commit()
        superuser.rollback()

        opened = charge(product, credits=10)

        assert opened.lines == [(4, 10)]
        assert lot_states(product) == [
            (1, "active", 100),
            (2, "frozen", 100),
            (3, "voided", 0),
            (4, "active", 0),
            (5, "expired", 0),
        ]
        with pytest.raises(InsufficientCredits):
            charge(product, "more", 1)

    def test_thawed_and_successor_lots_burn_like_others(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Credits that came back are spent like those that never left, in the order of their own terms."""
        give(
            product,
            replace(SOLD, reference="a", credits=5, priority=2, expires_at=NOW + DAY, purchase_id=None),
            replace(SOLD, reference="b", credits=5, priority=1),
        )
        taken = charge(product, "first", 10)
        end_and_commit(connection, taken)
        freeze(connection, "p-1")
        thaw(connection, "p-1", now=NOW)
        connection.commit()

        opened = charge(product, "second", 10)

        assert taken.lines == [(2, 5), (1, 5)]
        assert opened.lines == [(2, 5), (3, 5)]
