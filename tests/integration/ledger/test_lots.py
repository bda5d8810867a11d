"""Lots: giving credits, and what expiry does to them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from kino_refunds.errors import GrantConflict
from kino_refunds.ledger import Balance, Grant, Lot, LotClass, LotState, balance, grant_lots
from kino_refunds.ledger.values import CREDITS_MAX
from tests.clock import DAY, expire_lots
from tests.integration.ledger.lots import lot_transfers
from tests.ledger_acts import NOW, SOLD, charge, expiries, freeze, lot_states, thaw

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


FAR = datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
"""The last instant that every language can read in every time zone."""

PADDED = ["order-1 ", " order-1", "order-1\xa0", "order-1\u2003", "\u3000order-1", "order-1\u200b", "order-1\t", " "]
"""Ids that nobody can tell from another one by looking."""


class TestGrants:
    def test_a_grant_gives_credits_and_makes_its_account(self, product: sa.Connection) -> None:
        """The first grant creates the account, and its credits can be spent at once."""
        lots = grant_lots(product, [SOLD])

        assert lots == [
            Lot(1, "order-1", "ada", LotClass.PURCHASED, 100, 100, 50, NOW + 30 * DAY, LotState.ACTIVE),
        ]
        assert balance(product, "ada") == Balance(100, 0)
        assert lot_transfers(product, "grant") == [("grant", 1, 100, "grant")]
        product.commit()

    def test_nothing_is_granted_before_the_caller_commits(self, product: sa.Connection) -> None:
        """A grant is part of its caller's transaction and goes back with it."""
        grant_lots(product, [SOLD])
        product.rollback()

        assert lot_states(product) == []
        assert balance(product, "ada") == Balance(0, 0)

    def test_lots_come_back_in_the_order_of_their_grants(self, product: sa.Connection) -> None:
        """The caller finds each grant's lot at its grant's place, whatever the references sort to."""
        grants = [replace(SOLD, reference=reference) for reference in ("c", "a", "b")]

        lots = grant_lots(product, grants)

        assert [lot.reference for lot in lots] == ["c", "a", "b"]

    def test_no_grants_are_no_lots(self, product: sa.Connection) -> None:
        """An empty list is granted, and comes to nothing."""
        assert grant_lots(product, []) == []

    def test_a_grant_again_returns_the_lot_as_it_stands(self, product: sa.Connection) -> None:
        """A grant that is sent again gives nothing, and shows what has become of its lot."""
        [first] = grant_lots(product, [SOLD])
        charge(product, "job", 30)

        again = grant_lots(product, [SOLD])

        assert again == [replace(first, remaining=70)]
        assert lot_transfers(product, "grant") == [("grant", 1, 100, "grant")]

    def test_a_grant_twice_in_one_call_is_one_lot(self, product: sa.Connection) -> None:
        """A list that names a grant twice gives it once."""
        lots = grant_lots(product, [SOLD, SOLD])

        assert lots[0] == lots[1]
        assert lot_states(product) == [(1, "active", 100)]
        product.commit()

    def test_known_and_new_grants_mix(self, product: sa.Connection) -> None:
        """Of a list that was half given before, the other half is given."""
        [first] = grant_lots(product, [SOLD])
        second = replace(SOLD, reference="order-2", credits=5)

        lots = grant_lots(product, [second, SOLD])

        assert [(lot.reference, lot.granted) for lot in lots] == [("order-2", 5), ("order-1", 100)]
        assert lots[1] == first
        assert balance(product, "ada") == Balance(105, 0)
        product.commit()

    @pytest.mark.parametrize(
        "expires_at",
        [
            (NOW + 30 * DAY).astimezone(timezone(timedelta(hours=-7))),
            (NOW + 30 * DAY).astimezone(ZoneInfo("Asia/Tokyo")),
        ],
    )
    def test_the_same_instant_in_another_zone_is_the_same_term(
        self, product: sa.Connection, expires_at: datetime
    ) -> None:
        """An expiry is an instant; how its offset is written does not matter."""
        first = grant_lots(product, [SOLD])

        again = grant_lots(product, [replace(SOLD, expires_at=expires_at)])

        assert again == first

    @pytest.mark.parametrize("fold", [0, 1])
    def test_an_hour_that_comes_twice_is_an_instant_too(self, product: sa.Connection, fold: int) -> None:
        """A grant that expires in the hour the clocks go back is the same grant when it is sent again."""
        ambiguous = datetime(2035, 10, 28, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin"))
        grant = replace(SOLD, expires_at=ambiguous)
        first = grant_lots(product, [grant])

        again = grant_lots(product, [grant])

        assert again == first
        assert again[0].expires_at == ambiguous.astimezone(UTC)

    @pytest.mark.parametrize(
        "other",
        [
            replace(SOLD, account_id="bob"),
            replace(SOLD, credits=99),
            replace(SOLD, lot_class=LotClass.PROMOTIONAL),
            replace(SOLD, expires_at=NOW + 31 * DAY),
            replace(SOLD, expires_at=None),
            replace(SOLD, priority=51),
            replace(SOLD, purchase_id="p-2"),
            replace(SOLD, purchase_id=None),
        ],
    )
    def test_a_reference_with_other_terms_is_a_conflict(self, product: sa.Connection, other: Grant) -> None:
        """What a reference was granted on is never changed by granting it again, whether now or in one call."""
        first = grant_lots(product, [SOLD])
        product.commit()

        with pytest.raises(GrantConflict):
            grant_lots(product, [other])
        product.rollback()
        with pytest.raises(GrantConflict):
            grant_lots(product, [SOLD, other])

        product.rollback()
        assert grant_lots(product, [SOLD]) == first
        assert balance(product, "bob") == Balance(0, 0)

    def test_a_conflict_that_the_caller_catches_leaves_nothing(self, product: sa.Connection) -> None:
        """Grants are given all or none, so a caller that catches the conflict may go on and commit."""
        grant_lots(product, [SOLD])
        product.commit()

        with pytest.raises(GrantConflict):
            grant_lots(product, [replace(SOLD, reference="new", account_id="bob"), replace(SOLD, credits=1)])
        product.commit()

        assert lot_states(product) == [(1, "active", 100)]
        assert product.exec_driver_sql("SELECT account_id FROM kino.account").scalars().all() == ["ada"]

    def test_an_extended_lot_is_still_the_grant_it_was(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Unfreezing moves an expiry, and the grant that is sent again is compared with the one it had."""
        grant_lots(product, [SOLD])
        product.commit()
        freeze(connection, "p-1", now=NOW)
        thaw(connection, "p-1", now=NOW + 29 * DAY)
        connection.commit()

        [again] = grant_lots(product, [SOLD])

        assert again.expires_at == NOW + 59 * DAY

    @pytest.mark.parametrize(
        "wrong",
        [
            {"credits": 0},
            {"credits": -1},
            {"credits": CREDITS_MAX + 1},
            {"credits": 1.0},
            {"credits": True},
            {"reference": ""},
            {"reference": "x" * 129},
            {"reference": "line\nbreak"},
            {"reference": "nul\0"},
            {"account_id": ""},
            {"account_id": "\ud800"},
            {"purchase_id": ""},
            *({name: text} for name in ("reference", "account_id", "purchase_id") for text in PADDED),
            {"lot_class": "gift"},
            {"expires_at": datetime(2035, 1, 1)},  # noqa: DTZ001 - what is refused here
            {"priority": 2**31},
            {"priority": -(2**31) - 1},
            {"priority": 1.5},
        ],
    )
    def test_what_cannot_be_granted_is_refused_before_the_database(self, wrong: dict[str, Any]) -> None:
        """A grant with a field that cannot be is a ValueError where it is made."""
        terms: dict[str, Any] = {
            "reference": "order-1",
            "account_id": "ada",
            "credits": 100,
            "lot_class": LotClass.PURCHASED,
        }

        with pytest.raises(ValueError):
            Grant(**(terms | wrong))

    def test_a_lot_at_the_bounds_can_be_granted_and_spent(self, product: sa.Connection) -> None:
        """The longest ids, the lowest priority and a far expiry are held exactly."""
        grant = Grant("r" * 128, "a" * 128, 1, LotClass.LIFETIME, FAR, -(2**31), "p" * 128)
        grant_lots(product, [grant])

        opened = charge(product, "j" * 128, 1, "a" * 128)

        assert opened.lines == [(1, 1)]
        assert expiries(product) == [FAR]

    def test_an_instant_beyond_the_calendar_is_refused(self) -> None:
        """An expiry that cannot be read back, because in UTC it lies in the year 10000, is never stored."""
        for beyond in (datetime(9999, 1, 1, tzinfo=UTC), datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))):
            with pytest.raises(ValueError):
                replace(SOLD, expires_at=beyond)

    def test_the_largest_grants_together_still_have_a_balance(self, product: sa.Connection) -> None:
        """However much an account was given, its balance can be asked for."""
        grant_lots(product, [replace(SOLD, reference=str(n), credits=CREDITS_MAX) for n in range(2)])
        product.commit()

        found = balance(product, "ada")

        assert found == Balance(2 * CREDITS_MAX, 0)


class TestExpiry:
    def test_an_expired_lot_is_emptied_once(self, product: sa.Connection, connection: sa.Connection) -> None:
        """What is left of an expired lot leaves the wallet by one transfer, and the next run finds nothing."""
        grant_lots(product, [SOLD])
        product.commit()
        charge(product, "job", 30)

        counts = [expire_lots(connection, now=NOW + 31 * DAY) for _ in range(2)]
        connection.commit()

        assert counts == [1, 0]
        assert lot_states(connection) == [(1, "expired", 0)]
        assert lot_transfers(connection, "expire") == [("expire", 1, 70, "expiry")]
        assert balance(connection, "ada") == Balance(0, 30)

    def test_a_lot_expires_at_its_instant_and_not_before(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """The expiry itself belongs to the time after: a microsecond earlier the lot stands."""
        grant_lots(product, [SOLD])
        product.commit()
        instant = NOW + 30 * DAY

        counts = [expire_lots(connection, now=now) for now in (instant - timedelta(microseconds=1), instant)]
        connection.commit()

        assert counts == [0, 1]

    def test_lots_without_a_time_and_frozen_lots_do_not_expire(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Expiry takes active lots whose time has come, and no others."""
        lasting = replace(SOLD, reference="lasting", expires_at=None, purchase_id=None)
        later = replace(SOLD, reference="later", expires_at=NOW + 99 * DAY, purchase_id=None)
        grant_lots(product, [SOLD, lasting, later])
        product.commit()
        freeze(connection, "p-1")
        before = lot_states(connection)

        count = expire_lots(connection, now=NOW + 31 * DAY)
        connection.commit()

        assert count == 0
        assert lot_states(connection) == before

    def test_an_empty_lot_expires_without_a_transfer(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A lot that was used up changes its state, and no transfer of zero credits is posted."""
        grant_lots(product, [SOLD])
        product.commit()
        charge(product, "job", 100)

        count = expire_lots(connection, now=NOW + 31 * DAY)
        connection.commit()

        assert count == 1
        assert lot_states(connection) == [(1, "expired", 0)]
        assert lot_transfers(connection, "expire") == []

    def test_a_sweep_takes_no_more_than_its_limit(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Sweeps of a limited size together expire each lot once."""
        grant_lots(product, [replace(SOLD, reference=str(n)) for n in range(5)])
        product.commit()

        counts = [expire_lots(connection, now=NOW + 31 * DAY, limit=2) for _ in range(4)]
        connection.commit()

        assert counts == [2, 2, 1, 0]
        assert lot_states(connection) == [(lot_id, "expired", 0) for lot_id in range(1, 6)]

    def test_a_held_lot_is_passed_over(
        self, product: sa.Connection, connection: sa.Connection, patient: sa.Engine
    ) -> None:
        """A lot that a session holds waits for the next sweep and keeps no other lot from expiring."""
        grant_lots(product, [SOLD, replace(SOLD, reference="order-2")])
        product.commit()
        with patient.connect() as holding:
            holding.exec_driver_sql("SELECT FROM kino.credit_lot WHERE lot_id = 1 FOR NO KEY UPDATE")
            first = expire_lots(connection, now=NOW + 31 * DAY)
        second = expire_lots(connection, now=NOW + 31 * DAY)
        connection.commit()

        assert (first, second) == (1, 1)
        assert lot_transfers(connection, "expire") == [
            ("expire", 2, 100, "expiry"),
            ("expire", 1, 100, "expiry"),
        ]
