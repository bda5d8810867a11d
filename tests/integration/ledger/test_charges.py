"""Charges: what a job takes, all or nothing, once, and which error comes first."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

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
    balance,
    grant_lots,
    open_charge,
    open_charges,
    set_account_status,
)
from tests.clock import DAY
from tests.integration.ledger.charging import written
from tests.ledger_acts import LATER, NOW, SOLD, charge, end_and_commit, give, lot_states, transfers

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


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
