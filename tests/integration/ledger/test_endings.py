"""Where a charge's credits go when the job ends: back to their lots, or consumed."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import LedgerInconsistent
from kino_refunds.ledger import AccountStatus, Balance, LotClass, balance, set_account_status
from tests.clock import DAY, TICK, expire_lots, set_lot_grace
from tests.integration.ledger.charging import successors, tampered
from tests.ledger_acts import GRACE, LATER, NOW, SOLD, charge, end_and_commit, freeze, give, lot_states, transfers, void

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


def successor(lot_id: int, successor_of: int, granted: int, **other: Any) -> dict[str, Any]:
    """What a successor of a lot like SOLD must be."""
    fields = {
        "lot_id": lot_id,
        "account_id": "ada",
        "class": "purchased",
        "granted": granted,
        "remaining": granted,
        "priority": 50,
        "expires_at": NOW + GRACE,
        "root_expires_at": NOW + DAY,
        "purchase_id": "p-1",
        "successor_of": successor_of,
        "state": "active",
    }
    return fields | other


class TestRefund:
    @pytest.mark.parametrize("expires_at", [None, LATER, NOW + GRACE + TICK])
    def test_a_lot_that_lives_longer_than_the_grace_takes_its_credits_back(
        self, product: sa.Connection, connection: sa.Connection, expires_at: datetime | None
    ) -> None:
        """Credits go back to the lot they came from while the customer still has the grace to spend them."""
        give(product, replace(SOLD, expires_at=expires_at))

        end_and_commit(connection, charge(product, credits=30))

        assert lot_states(connection) == [(1, "active", 100)]
        assert transfers(connection, "refund", "void") == [("refund", 1, 1, None, 30)]
        assert balance(connection, "ada") == Balance(100, 0)

    @pytest.mark.parametrize("left", [GRACE, GRACE - TICK, DAY])
    def test_a_lot_that_expires_within_the_grace_has_a_successor(
        self, product: sa.Connection, connection: sa.Connection, left: timedelta
    ) -> None:
        """Credits whose lot expires too soon to be spent come back in a lot that lives for the grace."""
        give(product, replace(SOLD, expires_at=NOW + left))

        end_and_commit(connection, charge(product, credits=30))

        assert lot_states(connection) == [(1, "active", 70), (2, "active", 30)]
        assert successors(connection) == [successor(2, 1, 30, root_expires_at=NOW + left)]
        assert transfers(connection, "grant", "refund") == [("grant", None, 1, None, 100), ("refund", 1, 1, 2, 30)]
        assert balance(connection, "ada") == Balance(100, 0)

    @pytest.mark.parametrize("swept", [False, True])
    def test_an_expired_lot_has_a_successor(
        self, product: sa.Connection, connection: sa.Connection, swept: bool
    ) -> None:
        """Credits whose lot expired while the job ran do not evaporate, whether the sweep has come by or not."""
        give(product, SOLD)
        opened = charge(product, credits=30)
        now = LATER + DAY
        if swept:
            expire_lots(connection, now=now)
            connection.commit()

        end_and_commit(connection, opened, now=now)

        assert lot_states(connection) == [(1, "expired", 0) if swept else (1, "active", 70), (2, "active", 30)]
        assert successors(connection) == [successor(2, 1, 30, expires_at=now + GRACE, root_expires_at=LATER)]

    def test_a_lot_that_was_swept_is_expired_whatever_the_time(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A worker whose clock is behind the sweep's does not fill a lot that was emptied for good."""
        give(product, SOLD)
        opened = charge(product, credits=30)
        expire_lots(connection, now=LATER)
        connection.commit()

        end_and_commit(connection, opened, now=NOW)

        assert lot_states(connection) == [(1, "expired", 0), (2, "active", 30)]

    @pytest.mark.parametrize(
        "terms",
        [
            {"lot_class": LotClass.PROMOTIONAL, "purchase_id": None, "priority": -3},
            {"lot_class": LotClass.COURTESY, "purchase_id": None},
            {"lot_class": LotClass.SUBSCRIPTION},
            {"lot_class": LotClass.LIFETIME, "priority": 7},
        ],
    )
    def test_a_successor_is_like_the_lot_it_succeeds(
        self, product: sa.Connection, connection: sa.Connection, terms: dict[str, Any]
    ) -> None:
        """Promotional credits come back promotional, a purchase's as that purchase's, in their place of the order."""
        grant = replace(SOLD, expires_at=NOW + DAY, **terms)
        give(product, grant)

        end_and_commit(connection, charge(product, credits=30))

        assert successors(connection) == [
            successor(
                2,
                1,
                30,
                **{"class": grant.lot_class.value},
                purchase_id=grant.purchase_id,
                priority=grant.priority,
            )
        ]

    def test_charges_of_one_lot_share_a_successor(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A batch opens one successor a lot, however many of its charges took from it."""
        give(product, replace(SOLD, expires_at=NOW + DAY))
        charges = [charge(product, job_id, credits) for job_id, credits in (("a", 1), ("b", 2), ("c", 4))]

        end_and_commit(connection, *charges)

        assert successors(connection) == [successor(2, 1, 7)]
        assert transfers(connection, "refund") == [
            ("refund", 1, 1, 2, 1),
            ("refund", 2, 1, 2, 2),
            ("refund", 3, 1, 2, 4),
        ]

    def test_later_batches_open_successors_of_their_own(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A successor is never added to by a later transaction: what it was granted is what came back into it."""
        give(product, replace(SOLD, expires_at=NOW + DAY))
        charges = [charge(product, job_id, 2) for job_id in ("a", "b")]

        for opened in charges:
            end_and_commit(connection, opened)

        assert successors(connection) == [successor(2, 1, 2), successor(3, 1, 2)]

    def test_a_successor_has_successors(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A job that fails again after the grace does not lose what the first failure brought back."""
        give(product, replace(SOLD, credits=10, expires_at=NOW + DAY))
        end_and_commit(connection, charge(product, "first", 10))
        opened = charge(product, "second", 4)
        later = NOW + GRACE - DAY

        end_and_commit(connection, opened, now=later)

        assert opened.lines == [(2, 4)]
        assert successors(connection) == [
            successor(2, 1, 10, remaining=6),
            successor(3, 2, 4, expires_at=later + GRACE),
        ]
        assert transfers(connection, "refund") == [("refund", 1, 1, 2, 10), ("refund", 2, 2, 3, 4)]

    def test_a_successor_that_lives_long_enough_takes_its_credits_back(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A successor takes its credits back for as long as it lives another day: no lot more a refund."""
        give(product, replace(SOLD, credits=10, expires_at=NOW + DAY))
        end_and_commit(connection, charge(product, "first", 10))

        end_and_commit(connection, charge(product, "second", 4), now=NOW + GRACE - DAY - TICK)

        assert lot_states(connection) == [(1, "active", 0), (2, "active", 10)]

    def test_without_grace_only_expired_lots_have_successors(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A house that grants no grace returns credits to every lot whose time has not come."""
        give(product, replace(SOLD, expires_at=NOW + DAY))

        set_lot_grace(connection, 0)
        end_and_commit(connection, charge(product))

        assert lot_states(connection) == [(1, "active", 100)]

    @pytest.mark.parametrize("now", [NOW, LATER + DAY])
    @pytest.mark.parametrize("swept", [False, True])
    def test_a_frozen_lot_takes_its_credits_back_and_stays_frozen(
        self, product: sa.Connection, connection: sa.Connection, now: datetime, swept: bool
    ) -> None:
        """Frozen goes before expired: credits under dispute come home and wait for its end."""
        give(product, SOLD)
        opened = charge(product, credits=30)
        if swept:
            expire_lots(connection, now=LATER)
        freeze(connection, "p-1")
        connection.commit()

        end_and_commit(connection, opened, now=now)

        assert lot_states(connection) == [(1, "frozen", 30 if swept else 100)]
        assert transfers(connection, "refund") == [("refund", 1, 1, None, 30)]
        assert balance(connection, "ada") == Balance(0, 0)

    @pytest.mark.parametrize("now", [NOW, LATER + DAY])
    @pytest.mark.parametrize("before", [[], ["expire"], ["freeze"], ["expire", "freeze"]])
    def test_a_voided_lot_voids_what_comes_back(
        self, product: sa.Connection, connection: sa.Connection, now: datetime, before: list[str]
    ) -> None:
        """Voided goes before frozen and expired: what was paid out is refunded on the books and then taken back."""
        give(product, SOLD)
        opened = charge(product, credits=30)
        if "expire" in before:
            expire_lots(connection, now=LATER)
        if "freeze" in before:
            freeze(connection, "p-1")
        void(connection, "p-1")
        connection.commit()

        end_and_commit(connection, opened, now=now)

        assert lot_states(connection) == [(1, "voided", 0)]
        assert transfers(connection, "refund", "void")[-2:] == [("refund", 1, 1, None, 30), ("void", 1, 1, None, 30)]
        assert balance(connection, "ada") == Balance(0, 0)

    def test_every_line_finds_its_own_way(self, product: sa.Connection, connection: sa.Connection) -> None:
        """One charge over lots of every fate is refunded whole, each line by the fate of its lot."""
        give(
            product,
            replace(SOLD, reference="good", credits=1, priority=1, purchase_id="p-good"),
            replace(SOLD, reference="soon", credits=2, priority=2, purchase_id="p-soon", expires_at=NOW + DAY),
            replace(SOLD, reference="frozen", credits=4, priority=3, purchase_id="p-frozen"),
            replace(SOLD, reference="voided", credits=8, priority=4, purchase_id="p-voided"),
            replace(SOLD, reference="untouched", credits=16, priority=5),
        )
        opened = charge(product, credits=15)
        freeze(connection, "p-frozen")
        void(connection, "p-voided")
        connection.commit()

        end_and_commit(connection, opened)

        assert lot_states(connection) == [
            (1, "active", 1),
            (2, "active", 0),
            (3, "frozen", 4),
            (4, "voided", 0),
            (5, "active", 16),
            (6, "active", 2),
        ]
        assert transfers(connection, "refund", "void") == [
            ("refund", 1, 1, None, 1),
            ("refund", 1, 2, 6, 2),
            ("refund", 1, 3, None, 4),
            ("refund", 1, 4, None, 8),
            ("void", 1, 4, None, 8),
        ]

    def test_a_suspended_account_is_refunded(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A suspension freezes what can be opened, not what comes back."""
        give(product, SOLD)
        opened = charge(product, credits=30)
        set_account_status(connection, "ada", AccountStatus.SUSPENDED, reason="chargeback", actor="ops")

        end_and_commit(connection, opened)

        assert lot_states(connection) == [(1, "active", 100)]

    def test_a_refund_can_be_spent_again(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Credits that came back pay for the next job, and the books stay true through both."""
        give(product, SOLD)
        end_and_commit(connection, charge(product, "first", 100))

        end_and_commit(connection, charge(product, "second", 100))

        assert lot_states(connection) == [(1, "active", 100)]

    def test_a_free_job_ends_without_transfers(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Nothing moves for a job that took nothing, however it ends."""
        give(product, SOLD)
        charges = [charge(product, job_id, 0) for job_id in ("a", "b")]

        end_and_commit(connection, charges[0])
        end_and_commit(connection, charges[1], kind="captured")

        assert transfers(connection, "hold", "refund", "capture") == []

    def test_a_transfer_says_why_who_and_when(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Every movement of a settlement can be explained from its own row."""
        give(product, SOLD)

        end_and_commit(connection, charge(product, credits=30))

        row = connection.exec_driver_sql(
            "SELECT kind, from_book, to_book, account_id, reason, actor, event_at FROM kino.transfer"
            " WHERE kind = 'refund'"
        ).one()
        assert tuple(row) == ("refund", "held", "wallet", "ada", "timeout", "settlement", NOW - DAY)


class TestCapture:
    def test_a_captured_charge_is_consumed_line_by_line(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A job that made its video keeps what it took: held goes to consumed and no lot changes."""
        give(product, replace(SOLD, credits=20), replace(SOLD, reference="b", priority=90))
        opened = charge(product, credits=30)
        before = lot_states(connection)

        end_and_commit(connection, opened, kind="captured")

        assert lot_states(connection) == before
        assert transfers(connection, "capture", "refund") == [("capture", 1, 1, None, 20), ("capture", 1, 2, None, 10)]
        assert balance(connection, "ada") == Balance(90, 0)

    def test_a_capture_waits_for_no_lot(
        self, product: sa.Connection, connection: sa.Connection, superuser: sa.Connection
    ) -> None:
        """A capture changes no lot, so a session that holds one does not delay it."""
        give(product, SOLD)
        opened = charge(product)
        superuser.exec_driver_sql("SELECT FROM kino.credit_lot FOR NO KEY UPDATE")

        end_and_commit(connection, opened, kind="captured")

        assert transfers(connection, "capture") == [("capture", 1, 1, None, 10)]

    @pytest.mark.parametrize("fate", ["expired", "frozen", "voided"])
    def test_the_lots_fate_does_not_touch_a_capture(
        self, product: sa.Connection, connection: sa.Connection, fate: str
    ) -> None:
        """What was used was used, whatever became of the rest of its lot."""
        give(product, SOLD)
        opened = charge(product)
        if fate == "expired":
            expire_lots(connection, now=LATER)
        elif fate == "frozen":
            freeze(connection, "p-1")
        else:
            void(connection, "p-1")
        connection.commit()
        before = lot_states(connection)

        end_and_commit(connection, opened, kind="captured", now=LATER + DAY)

        assert lot_states(connection) == before
        assert transfers(connection, "capture", "refund") == [("capture", 1, 1, None, 10)]


class TestInconsistent:
    @pytest.mark.parametrize("kind", ["refunded", "captured"])
    @pytest.mark.parametrize("lines", [[], [(1, 9)], [(1, 11)], [(1, 10), (2, 1)]])
    def test_lines_that_do_not_sum_to_the_charge_move_nothing(
        self,
        product: sa.Connection,
        connection: sa.Connection,
        superuser: sa.Connection,
        kind: str,
        lines: list[tuple[int, int]],
    ) -> None:
        """A charge whose lines say otherwise is left for a person to look at."""
        give(product, SOLD, replace(SOLD, reference="b"))
        opened = charge(product)

        with tampered(superuser, opened, lines), pytest.raises(LedgerInconsistent):
            end_and_commit(connection, opened, kind=kind)

        connection.rollback()
        assert lot_states(connection) == [(1, "active", 90), (2, "active", 100)]

    @pytest.mark.parametrize("lot_id", [2, 99])
    def test_a_lot_that_is_not_the_accounts_takes_nothing(
        self, product: sa.Connection, connection: sa.Connection, superuser: sa.Connection, lot_id: int
    ) -> None:
        """Credits never come back to somebody else's lot, nor to one that does not exist."""
        give(product, SOLD, replace(SOLD, reference="b", account_id="bob"))
        opened = charge(product)

        with tampered(superuser, opened, [(lot_id, 10)]), pytest.raises(LedgerInconsistent):
            end_and_commit(connection, opened)

        connection.rollback()
        assert lot_states(connection) == [(1, "active", 90), (2, "active", 100)]
