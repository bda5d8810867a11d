"""What freezing and voiding a purchase do to its lots, also beside a refund."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa

from kino_refunds.errors import InsufficientCredits
from kino_refunds.ledger import Balance, ChargeRequest, balance, grant_lots, open_charges
from tests.clock import DAY, expire_lots
from tests.integration.ledger.lots import lot_transfers, purchase_of_every_kind
from tests.ledger_acts import NOW, SOLD, backend, charge, end, expiries, freeze, lot_states, thaw, void, waits
from tests.scenario import until

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


class TestFreezing:
    def test_freezing_covers_every_lot_of_the_purchase(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Active, expired and successor lots of the purchase are frozen, and no lot of another."""
        purchase_of_every_kind(product, connection)

        frozen = freeze(connection, "p-1")
        connection.commit()

        assert sorted(frozen) == [2, 3, 4]
        assert lot_states(connection) == [(1, "active", 100), (2, "frozen", 100), (3, "frozen", 0), (4, "frozen", 6)]
        assert balance(connection, "ada") == Balance(100, 4)

    def test_freezing_again_finds_nothing(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A purchase that is frozen stays as it is when it is frozen again, and one that nobody knows is no error."""
        purchase_of_every_kind(product, connection)
        freeze(connection, "p-1")
        before = lot_states(connection)

        again = [freeze(connection, purchase_id) for purchase_id in ("p-1", "p-9")]
        connection.commit()

        assert again == [[], []]
        assert lot_states(connection) == before

    def test_frozen_credits_are_not_drawn(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Nobody spends what is frozen, and nothing has left the wallet for it."""
        grant_lots(product, [SOLD])
        product.commit()

        freeze(connection, "p-1")
        connection.commit()

        with pytest.raises(InsufficientCredits):
            charge(product, "job", 1)
        assert lot_transfers(product, "expire", "void") == []

    def test_a_refund_into_a_frozen_lot_stays_frozen(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Credits of frozen lots come home to them, expired ones too, and cannot be spent before the thaw."""
        purchase_of_every_kind(product, connection)
        late = open_charges(product, [ChargeRequest("late", "ada", 4, NOW)])
        product.commit()
        freeze(connection, "p-1")

        end(connection, *late, now=NOW + 40 * DAY)
        connection.commit()

        assert lot_states(connection) == [(1, "active", 100), (2, "frozen", 100), (3, "frozen", 0), (4, "frozen", 10)]
        assert balance(connection, "ada") == Balance(100, 0)

    def test_unfreezing_grants_the_lot_grace(self, product: sa.Connection, connection: sa.Connection) -> None:
        """After a hold a lot has the time that was left, at least the grace; what was expired and empty stays so."""
        grant_lots(
            product,
            [
                replace(SOLD, reference="a", expires_at=NOW + DAY),
                replace(SOLD, reference="b", expires_at=NOW + 20 * DAY),
                replace(SOLD, reference="c", expires_at=NOW + 60 * DAY),
                replace(SOLD, reference="d", expires_at=None),
            ],
        )
        product.commit()
        expire_lots(connection, now=NOW + DAY)
        freeze(connection, "p-1", now=NOW + 15 * DAY)

        thawed = thaw(connection, "p-1", now=NOW + 30 * DAY)
        connection.commit()

        assert sorted(thawed) == [1, 2, 3, 4]
        assert lot_states(connection) == [(1, "expired", 0), (2, "active", 100), (3, "active", 100), (4, "active", 100)]
        assert expiries(connection) == [NOW + DAY, NOW + 37 * DAY, NOW + 75 * DAY, None]

    def test_unfreezing_twice_extends_once(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A thaw that comes again finds nothing frozen and moves no expiry."""
        grant_lots(product, [SOLD])
        product.commit()
        freeze(connection, "p-1", now=NOW + 25 * DAY)

        thaws = [thaw(connection, "p-1", now=NOW + days * DAY) for days in (30, 40)]
        connection.commit()

        assert thaws == [[1], []]
        assert expiries(connection) == [NOW + 37 * DAY]


class TestVoiding:
    def test_voiding_takes_what_every_lot_has_left(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Active, expired, successor and frozen lots are emptied, the purchase's own and no other."""
        purchase_of_every_kind(product, connection)
        freeze(connection, "p-1")

        taken = void(connection, "p-1")
        connection.commit()

        assert taken == 106
        assert lot_states(connection) == [(1, "active", 100), (2, "voided", 0), (3, "voided", 0), (4, "voided", 0)]
        assert lot_transfers(connection, "void") == [
            ("void", 2, 100, "ops"),
            ("void", 4, 6, "ops"),
        ]

    def test_voiding_is_for_good(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Neither a second void, nor a freeze, nor a thaw, nor expiry finds a voided lot."""
        grant_lots(product, [SOLD])
        product.commit()
        void(connection, "p-1")

        found = [
            void(connection, "p-1"),
            freeze(connection, "p-1"),
            thaw(connection, "p-1", now=NOW),
            expire_lots(connection, now=NOW + 31 * DAY),
        ]
        connection.commit()

        assert found == [0, [], [], 0]
        assert lot_states(connection) == [(1, "voided", 0)]

    def test_held_credits_of_a_voided_lot_follow_it(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A job that is refunded after the void gives its credits to the void, and opens no successor."""
        purchase_of_every_kind(product, connection)
        late = open_charges(product, [ChargeRequest("late", "ada", 4, NOW)])
        product.commit()
        void(connection, "p-1")

        end(connection, *late, now=NOW + 40 * DAY)
        connection.commit()

        assert lot_states(connection)[1:] == [(2, "voided", 0), (3, "voided", 0), (4, "voided", 0)]
        assert lot_transfers(connection, "void")[-1] == ("void", 4, 4, "settlement")


Act = Callable[[sa.Connection], object]


class TestRaces:
    @pytest.mark.parametrize(
        ("act", "states_after"),
        [
            (
                lambda connection: freeze(connection, "p-1"),
                [(1, "frozen", 0), (2, "frozen", 40)],
            ),
            (
                lambda connection: void(connection, "p-1"),
                [(1, "voided", 0), (2, "voided", 0)],
            ),
        ],
        ids=["freeze", "void"],
    )
    def test_a_successor_that_opens_meanwhile_is_covered(
        self,
        product: sa.Connection,
        connection: sa.Connection,
        patient: sa.Engine,
        act: Act,
        states_after: list[tuple[int, str, int]],
    ) -> None:
        """A freeze or void that waits for a refund also takes the successor lot which that refund opens."""
        grant_lots(product, [SOLD])
        product.commit()
        opened = charge(product, "job", 40)
        expire_lots(connection, now=NOW + 31 * DAY)
        connection.commit()
        with patient.connect() as refunding, patient.connect() as acting, ThreadPoolExecutor(1) as thread:
            end(refunding, opened, now=NOW + 31 * DAY)
            pid = backend(acting)

            acted = thread.submit(act, acting)
            until(lambda: waits(connection, pid))
            refunding.commit()
            acted.result(30)
            acting.commit()

        assert lot_states(connection) == states_after

    @pytest.mark.parametrize(
        ("act", "states_after"),
        [
            (lambda connection: freeze(connection, "p-1"), [(1, "frozen", 40)]),
            (
                lambda connection: void(connection, "p-1"),
                [(1, "voided", 0)],
            ),
        ],
        ids=["freeze", "void"],
    )
    def test_a_refund_that_waits_opens_no_successor(
        self,
        product: sa.Connection,
        connection: sa.Connection,
        patient: sa.Engine,
        act: Act,
        states_after: list[tuple[int, str, int]],
    ) -> None:
        """A refund that waits for a freeze or void finds the lot as it became, not as it was."""
        grant_lots(product, [SOLD])
        product.commit()
        opened = charge(product, "job", 40)
        expire_lots(connection, now=NOW + 31 * DAY)
        connection.commit()
        with patient.connect() as refunding, patient.connect() as acting, ThreadPoolExecutor(1) as thread:
            act(acting)
            pid = backend(refunding)

            refunded = thread.submit(end, refunding, opened, now=NOW + 31 * DAY)
            until(lambda: waits(connection, pid))
            acting.commit()
            refunded.result(30)
            refunding.commit()

        assert lot_states(connection) == states_after
