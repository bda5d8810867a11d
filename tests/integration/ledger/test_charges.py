"""Charges: what a job takes, from which lots, and where it goes when the job ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import (
    AccountNotActive,
    ChargeAlreadySettled,
    ChargeConflict,
    InsufficientCredits,
    KinoError,
    LedgerInconsistent,
)
from kino_refunds.ledger import (
    VIOLATION,
    AccountStatus,
    Balance,
    Charge,
    ChargeRequest,
    Grant,
    LotClass,
    balance,
    grant_lots,
    open_charge,
    open_charges,
    set_account_status,
)
from tests.clock import expire_lots, set_lot_grace
from tests.conftest import Database
from tests.ledger_acts import DAY, GRACE, LATER, NOW, SOLD, charge, end_and_commit, freeze, give, lot_states, thaw, void

TICK = timedelta(microseconds=1)

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


@pytest.fixture
def superuser(database: Database) -> Iterator[sa.Connection]:
    """A connection as nobody who runs: it arranges what only time or an accident would."""
    engine = create_engine(database.url("postgres"))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def successors(connection: sa.Connection) -> list[dict[str, Any]]:
    """Every successor lot, whole but for the times the clock chose."""
    rows = connection.exec_driver_sql(
        "SELECT lot_id, account_id, class, granted, remaining, priority, expires_at, root_expires_at, purchase_id,"
        " successor_of, state FROM kino.credit_lot WHERE successor_of IS NOT NULL ORDER BY lot_id"
    )
    return [dict(row) for row in rows.mappings()]


def transfers(connection: sa.Connection, *kinds: str) -> list[tuple[Any, ...]]:
    """Every transfer of these kinds: kind, charge, lot, lot it went to, credits."""
    rows = connection.execute(
        sa.text(
            "SELECT kind, charge_id, lot_id, to_lot_id, credits FROM kino.transfer"
            " WHERE kind = ANY(:kinds) ORDER BY transfer_id"
        ),
        {"kinds": list(kinds)},
    )
    return [tuple(row) for row in rows]


@contextmanager
def tampered(superuser: sa.Connection, opened: Charge, lines: list[tuple[int, int]]) -> Iterator[None]:
    """Let a charge's lines be others while the block runs, as no function of the ledger writes them."""
    _rewrite(superuser, opened.charge_id, lines)
    try:
        yield
    finally:
        _rewrite(superuser, opened.charge_id, opened.lines)


def _rewrite(superuser: sa.Connection, charge_id: int, lines: list[tuple[int, int]]) -> None:
    superuser.exec_driver_sql("SET session_replication_role = replica")
    superuser.execute(sa.text("DELETE FROM kino.charge_line WHERE charge_id = :charge_id"), {"charge_id": charge_id})
    for seq, (lot_id, credits) in enumerate(lines, start=1):
        superuser.execute(
            sa.text("INSERT INTO kino.charge_line VALUES (:charge_id, :seq, :lot_id, :credits)"),
            {"charge_id": charge_id, "seq": seq, "lot_id": lot_id, "credits": credits},
        )
    superuser.commit()


def written(connection: sa.Connection) -> dict[str, int]:
    """Count the rows of everything that opening a charge writes."""
    tables = ("charge", "charge_line", "transfer")
    return {table: connection.exec_driver_sql(f"SELECT count(*) FROM kino.{table}").scalar_one() for table in tables}


class TestOpening:
    def test_a_charge_moves_credits_from_wallet_to_held(self, product: sa.Connection) -> None:
        """The customer sees the credits gone at once, and each line says which lot they came from."""
        give(product, SOLD)

        opened = open_charge(product, job_id="job", account_id="ada", credits=30, deadline_at=LATER)

        assert opened == Charge(1, "job", "ada", 30, LATER, opened.opened_at, [(1, 30)])
        assert balance(product, "ada") == Balance(70, 30)
        assert transfers(product, "hold") == [("hold", 1, 1, None, 30)]
        product.commit()

    def test_a_charge_is_part_of_its_callers_transaction(self, product: sa.Connection) -> None:
        """When the caller rolls back, no charge was opened and the lots are whole."""
        give(product, SOLD)

        open_charge(product, job_id="job", account_id="ada", credits=30, deadline_at=LATER)
        product.rollback()

        assert balance(product, "ada") == Balance(100, 0)
        assert written(product) == {"charge": 0, "charge_line": 0, "transfer": 1}

    def test_charges_come_back_in_the_order_of_their_requests(self, product: sa.Connection) -> None:
        """The caller finds each job's charge at its request's place, and earlier requests draw first."""
        give(product, replace(SOLD, credits=10), replace(SOLD, reference="order-2", credits=10, priority=90))
        requests = [ChargeRequest(job_id, "ada", 5, LATER) for job_id in ("c", "a", "b")]

        opened = open_charges(product, requests)
        product.commit()

        assert [(c.job_id, c.lines) for c in opened] == [("c", [(1, 5)]), ("a", [(1, 5)]), ("b", [(2, 5)])]

    def test_a_batch_charges_several_accounts(self, product: sa.Connection) -> None:
        """Each account pays from its own lots, whatever the others have."""
        give(product, SOLD, replace(SOLD, reference="order-2", account_id="bob", credits=7))
        requests = [ChargeRequest("b", "bob", 7, LATER), ChargeRequest("a", "ada", 9, LATER)]

        opened = open_charges(product, requests)
        product.commit()

        assert [c.lines for c in opened] == [[(2, 7)], [(1, 9)]]
        assert [balance(product, account_id) for account_id in ("ada", "bob")] == [Balance(91, 9), Balance(0, 7)]

    def test_no_requests_are_no_charges(self, product: sa.Connection) -> None:
        """An empty list is opened, and comes to nothing."""
        assert open_charges(product, []) == []

    def test_a_free_job_has_a_charge_without_lines(self, product: sa.Connection) -> None:
        """A job that costs nothing is known to the ledger and draws from nothing, even from an empty account."""
        give(product, replace(SOLD, credits=1))
        charge(product, "all", 1)

        opened = charge(product, "free", 0)

        assert (opened.credits, opened.lines) == (0, [])
        assert balance(product, "ada") == Balance(0, 1)

    def test_a_deadline_may_lie_in_the_past(self, product: sa.Connection) -> None:
        """A job whose deadline has gone by is charged like any other; its end is asked for at once."""
        give(product, SOLD)
        long_ago = NOW - 400 * DAY

        opened = open_charge(product, job_id="job", account_id="ada", credits=1, deadline_at=long_ago)
        product.commit()

        assert opened.deadline_at == long_ago

    def test_everything_can_be_spent(self, product: sa.Connection) -> None:
        """The last credit of the last lot is as good as the first."""
        give(product, SOLD, replace(SOLD, reference="order-2", credits=1, priority=90))

        opened = charge(product, credits=101)

        assert opened.lines == [(1, 100), (2, 1)]
        assert balance(product, "ada") == Balance(0, 101)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"credits": -1},
            {"credits": 2**63},
            {"credits": 1.5},
            {"credits": True},
            {"job_id": ""},
            {"job_id": "x" * 129},
            {"job_id": "a\tb"},
            {"account_id": ""},
            {"deadline_at": datetime(2035, 1, 1)},  # noqa: DTZ001 - what is refused here
        ],
    )
    def test_what_cannot_be_charged_is_refused_before_the_database(self, wrong: dict[str, Any]) -> None:
        """A request with a field that cannot be is a ValueError where it is made."""
        terms: dict[str, Any] = {"job_id": "job", "account_id": "ada", "credits": 1, "deadline_at": NOW}

        with pytest.raises(ValueError):
            ChargeRequest(**(terms | wrong))


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


class TestAllOrNothing:
    def test_one_that_cannot_be_paid_opens_none(self, product: sa.Connection) -> None:
        """If one job of a batch cannot be paid, no job of it is opened, and the error names the job."""
        give(product, SOLD, replace(SOLD, reference="order-2", account_id="bob", credits=5))
        before = written(product)
        requests = [ChargeRequest("a", "ada", 10, NOW), ChargeRequest("b", "bob", 6, NOW)]

        with pytest.raises(InsufficientCredits, match="'b'"):
            open_charges(product, requests)

        product.commit()
        assert written(product) == before
        assert lot_states(product) == [(1, "active", 100), (2, "active", 5)]

    def test_jobs_of_a_batch_pay_from_what_the_others_left(self, product: sa.Connection) -> None:
        """Jobs that could each be paid alone, but not together, are not opened at all."""
        give(product, SOLD)

        with pytest.raises(InsufficientCredits):
            open_charges(product, [ChargeRequest(job_id, "ada", 51, NOW) for job_id in ("a", "b")])

        product.commit()
        assert balance(product, "ada") == Balance(100, 0)

    def test_an_error_that_is_caught_leaves_nothing_and_the_transaction_goes_on(self, product: sa.Connection) -> None:
        """What the caller wrote before and after a refused charge is committed, and nothing of the charge is."""
        give(product, SOLD)
        with product.begin():
            grant_lots(product, [replace(SOLD, reference="before", credits=1)])
            with pytest.raises(InsufficientCredits):
                open_charges(product, [ChargeRequest("a", "ada", 1, NOW), ChargeRequest("b", "ada", 500, NOW)])
            grant_lots(product, [replace(SOLD, reference="after", credits=2)])
            opened = open_charge(product, job_id="c", account_id="ada", credits=103, deadline_at=NOW)

        assert opened.lines == [(1, 100), (2, 1), (3, 2)]
        assert written(product) == {"charge": 1, "charge_line": 3, "transfer": 6}

    def test_an_error_of_the_database_leaves_the_transaction_usable(
        self, product: sa.Connection, superuser: sa.Connection
    ) -> None:
        """An error that Postgres raises inside is undone as well, and the caller may go on and commit."""
        give(product, SOLD)
        superuser.exec_driver_sql("ALTER TABLE kino.charge_line ADD CONSTRAINT no_sevens CHECK (credits <> 7)")
        superuser.commit()

        with product.begin():
            with pytest.raises(LedgerInconsistent, match="no_sevens"):
                open_charge(product, job_id="a", account_id="ada", credits=7, deadline_at=NOW)
            open_charge(product, job_id="b", account_id="ada", credits=8, deadline_at=NOW)

        assert lot_states(product) == [(1, "active", 92)]
        assert written(product) == {"charge": 1, "charge_line": 1, "transfer": 2}

    def test_a_refused_charge_holds_no_lot(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A caller that goes on after a refusal keeps nobody waiting for the lots it did not get."""
        give(product, SOLD)
        with pytest.raises(InsufficientCredits):
            open_charge(product, job_id="a", account_id="ada", credits=101, deadline_at=NOW)

        free = connection.exec_driver_sql("SELECT lot_id FROM kino.credit_lot FOR NO KEY UPDATE SKIP LOCKED").all()

        assert [tuple(row) for row in free] == [(1,)]


class TestIdempotency:
    def test_the_same_charge_again_is_the_one_it_opened(self, product: sa.Connection) -> None:
        """A request that is sent again returns its charge, lines in order, and takes nothing."""
        give(product, replace(SOLD, credits=5, priority=2), replace(SOLD, reference="b", credits=5, priority=1))
        first = charge(product, credits=7)
        before = written(product)

        again = charge(product, credits=7)

        assert again == first
        assert again.lines == [(2, 5), (1, 2)]
        assert written(product) == before

    def test_again_before_the_commit_is_the_same_too(self, product: sa.Connection) -> None:
        """Idempotency does not wait for the commit: the transaction that opened a charge finds it."""
        give(product, SOLD)
        terms: dict[str, Any] = {"job_id": "job", "account_id": "ada", "credits": 7, "deadline_at": NOW}

        opened = [open_charge(product, **terms) for _ in range(2)]
        product.commit()

        assert opened[0] == opened[1]
        assert balance(product, "ada") == Balance(93, 7)

    def test_twice_in_one_call_is_one_charge(self, product: sa.Connection) -> None:
        """A batch that names a job twice charges it once and returns the charge at both places."""
        give(product, SOLD)
        request = ChargeRequest("job", "ada", 7, NOW)

        opened = open_charges(product, [request, ChargeRequest("other", "ada", 1, NOW), request])
        product.commit()

        assert [c.job_id for c in opened] == ["job", "other", "job"]
        assert opened[0] == opened[2]
        assert balance(product, "ada") == Balance(92, 8)

    def test_another_deadline_is_no_other_charge(self, product: sa.Connection) -> None:
        """Account and credits make the charge; the deadline it was opened with stays."""
        give(product, SOLD)
        first = charge(product)

        again = open_charge(product, job_id="job", account_id="ada", credits=10, deadline_at=LATER)

        assert again == first

    def test_known_and_new_jobs_mix(self, product: sa.Connection) -> None:
        """Of a batch that was half opened before, the other half is opened."""
        give(product, SOLD)
        first = charge(product, "b", 5)

        opened = open_charges(product, [ChargeRequest(job_id, "ada", 5, NOW) for job_id in ("c", "b", "a")])
        product.commit()

        assert [c.job_id for c in opened] == ["c", "b", "a"]
        assert opened[1] == first
        assert balance(product, "ada") == Balance(85, 15)

    def test_a_free_job_again_is_the_same(self, product: sa.Connection) -> None:
        """A charge without lines is found again like any other."""
        give(product, SOLD)

        assert charge(product, "free", 0) == charge(product, "free", 0)

    def test_an_open_charge_is_returned_whatever_the_account_became(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A repeated request asks what happened: a suspension or an empty wallet since then does not change it."""
        give(product, SOLD)
        first = charge(product, credits=100)
        set_account_status(connection, "ada", AccountStatus.SUSPENDED, reason="chargeback", actor="ops")
        connection.commit()

        again = charge(product, credits=100)

        assert again == first

    @pytest.mark.parametrize(("account_id", "credits"), [("ada", 9), ("ada", 11), ("ada", 0), ("bob", 10)])
    def test_a_job_on_other_terms_is_a_conflict(self, product: sa.Connection, account_id: str, credits: int) -> None:
        """A job is charged on the terms it was first charged on, or not at all."""
        give(product, SOLD, replace(SOLD, reference="order-2", account_id="bob"))
        first = charge(product)

        with pytest.raises(ChargeConflict):
            charge(product, "job", credits, account_id)

        product.rollback()
        assert charge(product) == first
        assert balance(product, "bob") == Balance(100, 0)

    def test_a_batch_that_contradicts_itself_is_a_conflict(self, product: sa.Connection) -> None:
        """A batch that names a job on two terms opens nothing."""
        give(product, SOLD)
        requests = [ChargeRequest("job", "ada", credits, NOW) for credits in (1, 2)]

        with pytest.raises(ChargeConflict):
            open_charges(product, requests)

        product.commit()
        assert balance(product, "ada") == Balance(100, 0)

    @pytest.mark.parametrize("kind", ["captured", "refunded"])
    def test_a_settled_job_is_not_opened_again(
        self, product: sa.Connection, connection: sa.Connection, kind: str
    ) -> None:
        """A job that has ended cannot be charged, so a caller that comes late learns that it has."""
        give(product, SOLD)
        end_and_commit(connection, charge(product), kind=kind)
        before = written(product)

        with pytest.raises(ChargeAlreadySettled, match=kind):
            charge(product)

        product.commit()
        assert written(product) == before


SUSPENDED = ChargeRequest("new-1", "bob", 1, NOW)
UNKNOWN = ChargeRequest("new-2", "eve", 1, NOW)
TOO_MUCH = ChargeRequest("new-3", "ada", 1000, NOW)
SETTLED = ChargeRequest("settled", "ada", 10, NOW)
SETTLED_OTHER = ChargeRequest("settled", "ada", 11, NOW)
OTHER = ChargeRequest("open", "ada", 11, NOW)


class TestErrors:
    @pytest.mark.parametrize(
        ("requests", "expected"),
        [
            ([TOO_MUCH], InsufficientCredits),
            ([SUSPENDED], AccountNotActive),
            ([UNKNOWN], AccountNotActive),
            ([replace(SUSPENDED, credits=0)], AccountNotActive),
            ([replace(UNKNOWN, credits=0)], AccountNotActive),
            ([replace(SUSPENDED, credits=1000)], AccountNotActive),
            ([TOO_MUCH, SUSPENDED], AccountNotActive),
            ([TOO_MUCH, UNKNOWN], AccountNotActive),
            ([SETTLED], ChargeAlreadySettled),
            ([TOO_MUCH, UNKNOWN, SETTLED], ChargeAlreadySettled),
            ([OTHER], ChargeConflict),
            ([SETTLED_OTHER], ChargeConflict),
            ([TOO_MUCH, SUSPENDED, SETTLED, OTHER], ChargeConflict),
            ([SETTLED, OTHER], ChargeConflict),
            ([UNKNOWN, SETTLED_OTHER], ChargeConflict),
        ],
    )
    @pytest.mark.parametrize("backwards", [False, True])
    def test_errors_have_a_precedence(
        self,
        product: sa.Connection,
        connection: sa.Connection,
        requests: list[ChargeRequest],
        expected: type[KinoError],
        backwards: bool,
    ) -> None:
        """Of several errors the same one is raised, whatever the order of the batch, and nothing is left."""
        give(product, SOLD, replace(SOLD, reference="order-2", account_id="bob"))
        charge(product, "open", 10)
        end_and_commit(connection, charge(product, "settled", 10))
        set_account_status(connection, "bob", AccountStatus.SUSPENDED, reason="chargeback", actor="ops")
        connection.commit()
        before = written(product)

        with pytest.raises(KinoError) as raised:
            open_charges(product, requests[::-1] if backwards else requests)

        product.commit()
        assert type(raised.value) is expected
        assert written(product) == before

    @pytest.mark.parametrize("status", AccountStatus)
    def test_only_an_active_account_is_charged(
        self, product: sa.Connection, connection: sa.Connection, status: AccountStatus
    ) -> None:
        """A suspended or terminated account opens no charge, and one that is active again does."""
        give(product, SOLD)
        set_account_status(connection, "ada", status, reason=VIOLATION, actor="ops")
        connection.commit()

        if status is not AccountStatus.ACTIVE:
            with pytest.raises(AccountNotActive, match=status.value):
                charge(product)
            product.rollback()
        set_account_status(connection, "ada", AccountStatus.ACTIVE, reason="appeal", actor="ops")
        connection.commit()

        assert charge(product).credits == 10


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
