"""Lots: giving credits, and what expiry, freezing and voiding do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import GrantConflict, InsufficientCredits
from kino_refunds.ledger import (
    Balance,
    ChargeRequest,
    Grant,
    Lot,
    LotClass,
    LotState,
    balance,
    grant_lots,
    open_charges,
)
from kino_refunds.ledger.values import CREDITS_MAX
from tests.clock import expire_lots
from tests.conftest import Database
from tests.ledger_acts import DAY, NOW, SOLD, backend, charge, end, freeze, lot_states, thaw, void, waits
from tests.scenario import PATIENT, until

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


FAR = datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
"""The last instant that every language can read in every time zone."""

PADDED = ["order-1 ", " order-1", "order-1\xa0", "order-1\u2003", "\u3000order-1", "order-1\u200b", "order-1\t", " "]
"""Ids that nobody can tell from another one by looking."""


@pytest.fixture
def patient(database: Database) -> Iterator[sa.Engine]:
    """An engine for kino_owner that waits long for locks: a test says when they are given up."""
    engine = create_engine(database.url("kino_owner"), limits=PATIENT)
    yield engine
    engine.dispose()


def expiries(connection: sa.Connection) -> list[datetime | None]:
    return list(connection.exec_driver_sql("SELECT expires_at FROM kino.credit_lot ORDER BY lot_id").scalars())


def transfers(connection: sa.Connection, *kinds: str) -> list[tuple[Any, ...]]:
    """Every transfer of these kinds: kind, lot, credits, actor."""
    rows = connection.execute(
        sa.text("SELECT kind, lot_id, credits, actor FROM kino.transfer WHERE kind = ANY(:kinds) ORDER BY transfer_id"),
        {"kinds": list(kinds)},
    )
    return [tuple(row) for row in rows]


class TestGrants:
    def test_a_grant_gives_credits_and_makes_its_account(self, product: sa.Connection) -> None:
        """The first grant creates the account, and its credits can be spent at once."""
        lots = grant_lots(product, [SOLD])

        assert lots == [
            Lot(1, "order-1", "ada", LotClass.PURCHASED, 100, 100, 50, NOW + 30 * DAY, LotState.ACTIVE),
        ]
        assert balance(product, "ada") == Balance(100, 0)
        assert transfers(product, "grant") == [("grant", 1, 100, "grant")]
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
        assert transfers(product, "grant") == [("grant", 1, 100, "grant")]

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
        assert transfers(connection, "expire") == [("expire", 1, 70, "expiry")]
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
        assert transfers(connection, "expire") == []

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
        assert transfers(connection, "expire") == [("expire", 2, 100, "expiry"), ("expire", 1, 100, "expiry")]


def purchase_of_every_kind(product: sa.Connection, connection: sa.Connection) -> None:
    """Purchase p-1: lot 2 active, lot 3 expired, and its successor, lot 4, drawn from; lot 1 is another's.

    Six credits of lot 4 remain, of ten; job `late` holds the other four.
    """
    grant_lots(
        product,
        [
            replace(SOLD, reference="a", purchase_id="p-2", priority=90),
            replace(SOLD, reference="b", priority=80),
            replace(SOLD, reference="c", credits=10, priority=1, expires_at=NOW + 8 * DAY),
        ],
    )
    product.commit()
    early = charge(product, "early", 10)
    expire_lots(connection, now=NOW + 8 * DAY)
    end(connection, early, now=NOW + 8 * DAY)
    connection.commit()
    late = charge(product, "late", 4)
    assert late.lines == [(4, 4)]


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
        assert transfers(product, "expire", "void") == []

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
        assert transfers(connection, "void") == [("void", 2, 100, "ops"), ("void", 4, 6, "ops")]

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
        assert transfers(connection, "void")[-1] == ("void", 4, 4, "settlement")


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
