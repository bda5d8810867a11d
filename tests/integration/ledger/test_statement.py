"""Balances and statements: what an account has, had, and every movement that led there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import TransferNotFound
from kino_refunds.ledger import (
    Balance,
    ChargeRequest,
    StatementLine,
    balance,
    grant_lots,
    later_lines_exist,
    open_charge,
    open_charges,
    statement,
)
from kino_refunds.ledger.values import CREDITS_MAX
from tests.clock import DAY, clock_at, expire_lots
from tests.conftest import Database
from tests.ledger_acts import NOW, SOLD, charge, end_and_commit, freeze, give, thaw, void

pytestmark = pytest.mark.usefixtures("sound_books")


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


@pytest.fixture
def product_engine(database: Database) -> Iterator[sa.Engine]:
    """An engine for kino_product."""
    engine = create_engine(database.url("kino_product"))
    yield engine
    engine.dispose()


def clock(connection: sa.Connection) -> datetime:
    """The database's clock, which stamps transfers."""
    at: datetime = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
    connection.rollback()
    return at


def undated(lines: list[StatementLine]) -> list[StatementLine]:
    """Statement lines with the one field that the clock chose set to NOW."""
    return [replace(line, at=NOW) for line in lines]


def ids(lines: list[StatementLine]) -> list[int]:
    return [line.transfer_id for line in lines]


class TestBalance:
    def test_nobody_knows_an_account_that_has_nothing(self, connection: sa.Connection) -> None:
        """An account that was never granted anything has zero, now and at any time."""
        assert balance(connection, "eve") == Balance(0, 0)
        assert balance(connection, "eve", at=NOW) == Balance(0, 0)

    def test_the_balance_of_every_instant_can_be_told_later(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """What the balance was after each step is what `at` says of that instant when all is over."""
        steps = [(clock(product), Balance(0, 0))]

        def step() -> None:
            steps.append((clock(product), balance(product, "ada")))
            product.rollback()

        give(product, SOLD, replace(SOLD, reference="soon", credits=50, expires_at=NOW + DAY, purchase_id="p-2"))
        step()
        first, second, third = (charge(product, job_id, 40) for job_id in ("a", "b", "c"))
        step()
        end_and_commit(connection, first, kind="captured", now=None)
        step()
        end_and_commit(connection, second, kind="refunded", now=None)
        step()
        void(connection, "p-1")
        connection.commit()
        step()
        end_and_commit(connection, third, kind="refunded", now=None)
        step()

        assert [now for _, now in steps] == [
            Balance(0, 0),
            Balance(150, 0),
            Balance(30, 120),
            Balance(30, 80),
            Balance(70, 40),
            Balance(10, 40),
            Balance(10, 0),
        ]
        assert [balance(product, "ada", at=at) for at, _ in steps] == [now for _, now in steps]

    def test_a_lot_counts_until_it_expires_swept_or_not(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """The instant of its expiry belongs to the time after, and when the sweep comes makes no difference."""
        give(product, SOLD, replace(SOLD, reference="b", credits=7, expires_at=None))
        instants = [NOW + 30 * DAY - timedelta(microseconds=1), NOW + 30 * DAY]

        with clock_at(product, NOW + 31 * DAY):
            before = [balance(product, "ada", at=at) for at in instants]
            product.rollback()
            expire_lots(connection, now=NOW + 30 * DAY)
            connection.commit()
            after = balance(product, "ada", at=NOW + 30 * DAY)

        assert before == [Balance(107, 0), Balance(7, 0)]
        assert after == Balance(7, 0)

    def test_an_expired_lot_is_not_available_before_its_sweep(self, product: sa.Connection) -> None:
        """What cannot be spent is not shown as if it could."""
        give(product, replace(SOLD, expires_at=NOW - DAY))

        assert balance(product, "ada") == Balance(0, 0)

    def test_a_freeze_is_seen_now_and_not_in_the_past(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Frozen credits are not available; history goes by transfers, and a freeze is none."""
        give(product, SOLD)
        freeze(connection, "p-1")
        connection.commit()

        found = (balance(product, "ada"), balance(product, "ada", at=clock(product)))

        assert found == (Balance(0, 0), Balance(100, 0))

    def test_thawing_a_lot_does_not_change_the_past(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A lot that had expired at an instant had expired at it, and no hold brings its credits back."""
        give(product, replace(SOLD, expires_at=NOW - DAY))
        at = clock(product)
        before = balance(product, "ada", at=at)
        product.rollback()
        freeze(connection, "p-1")
        thaw(connection, "p-1", now=clock(product))
        connection.commit()

        after = balance(product, "ada", at=at)

        assert (before, after) == (Balance(0, 0), Balance(0, 0))
        assert balance(product, "ada") == Balance(0, 0)
        assert balance(product, "ada", at=clock(product)) == Balance(0, 0)

    def test_an_instant_has_an_offset(self, connection: sa.Connection) -> None:
        """A time without an offset is nobody's instant, so no balance is told for it."""
        with pytest.raises(ValueError):
            balance(connection, "ada", at=datetime(2026, 1, 1))  # noqa: DTZ001 - what is refused here

    def test_uncommitted_work_is_seen_by_its_own_transaction_only(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A product sees what it has just charged, and nobody else does before it commits."""
        give(product, SOLD)

        open_charge(product, job_id="job", account_id="ada", credits=30, deadline_at=NOW)

        assert balance(product, "ada") == Balance(70, 30)
        assert balance(connection, "ada") == Balance(100, 0)
        product.rollback()

    def test_more_than_postgres_counts_is_shown_as_the_most_it_counts(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """1,025 of the largest lots, and a charge for each, are over what a bigint holds: no balance fails for it."""
        most = 2**63 - 1
        lots = [replace(SOLD, reference=f"lot {n}", account_id="rich", credits=CREDITS_MAX) for n in range(2 * 1_025)]
        grant_lots(product, lots)
        give(product, SOLD)
        jobs = [ChargeRequest(f"job {n}", "rich", CREDITS_MAX, NOW) for n in range(1_025)]
        open_charges(product, jobs)
        product.commit()

        now, then = balance(connection, "rich"), balance(connection, "rich", at=clock(product))
        everybody = connection.execute(sa.text("SELECT * FROM kino.account_balance ORDER BY account_id")).all()
        lines = statement(connection, "rich", limit=10_000)

        assert (now, then) == (Balance(most, most), Balance(most, most))
        assert everybody == [("ada", 100, 0), ("rich", most, most)]
        assert sum(line.credits for line in lines) == 1_025 * CREDITS_MAX


class TestStatement:
    def test_a_statement_tells_every_movement(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Each transfer is a line with its effect on the wallet, and the effects add up to what is left."""
        give(product, replace(SOLD, expires_at=NOW + DAY))
        captured, refunded = charge(product, "a", 30), charge(product, "b", 20)
        end_and_commit(connection, captured, kind="captured", now=None)
        end_and_commit(connection, refunded, kind="refunded", now=None)
        expire_lots(connection, now=NOW + DAY)
        with clock_at(connection, NOW + 2 * DAY):
            void(connection, "p-1")
        connection.commit()

        lines = statement(connection, "ada")

        assert undated(lines) == [
            StatementLine(1, NOW, "grant", 100, 1, None, "purchased"),
            StatementLine(2, NOW, "hold", -30, 1, "a", None),
            StatementLine(3, NOW, "hold", -20, 1, "b", None),
            StatementLine(4, NOW, "capture", 0, 1, "a", "completed"),
            StatementLine(5, NOW, "refund", 20, 2, "b", "timeout"),
            StatementLine(6, NOW, "expire", -50, 1, None, "expired"),
            StatementLine(7, NOW, "void", -20, 2, None, "payout"),
        ]
        assert [line.at for line in lines] == sorted(line.at for line in lines)

    def test_an_account_sees_its_own_movements_only(self, product: sa.Connection) -> None:
        """One customer's statement holds nothing of another's."""
        give(product, SOLD, replace(SOLD, reference="b", account_id="bob"), replace(SOLD, reference="c"))

        found = [ids(statement(product, account_id)) for account_id in ("ada", "bob", "eve")]

        assert found == [[1, 3], [2], []]

    @pytest.mark.parametrize("after", [3, 99, -1])
    def test_a_place_that_is_not_in_the_statement_is_refused(self, product: sa.Connection, after: int) -> None:
        """To begin anew behind a cursor that is wrong, or somebody else's, would count lines twice."""
        give(product, SOLD, replace(SOLD, reference="c"), replace(SOLD, reference="b", account_id="bob"))

        with pytest.raises(TransferNotFound, match=f"account 'ada' has no transfer {after} to go on behind"):
            statement(product, "ada", after=after)

    @pytest.mark.parametrize("limit", [1, 2, 3, 100])
    def test_pages_together_are_the_statement(self, product: sa.Connection, limit: int) -> None:
        """Reading on from the last line of each page finds every line once, in order."""
        give(product, *(replace(SOLD, reference=str(n)) for n in range(6)))
        whole = statement(product, "ada")

        pages = [statement(product, "ada", limit=limit)]
        while pages[-1]:
            pages.append(statement(product, "ada", after=pages[-1][-1].transfer_id, limit=limit))

        assert [line for page in pages for line in page] == whole
        assert ids(whole) == [1, 2, 3, 4, 5, 6]
        assert max(len(page) for page in pages) == min(limit, 6)

    def test_an_open_transaction_holds_back_what_comes_after_it(
        self, product: sa.Connection, product_engine: sa.Engine, connection: sa.Connection
    ) -> None:
        """A transfer is shown when no transaction may still commit an earlier one, and then all are."""
        give(product, SOLD)
        with product_engine.connect() as slow:
            grant_lots(slow, [replace(SOLD, reference="slow")])
            give(product, replace(SOLD, reference="quick"))
            held_back = statement(connection, "ada")
            connection.rollback()
            slow.commit()

        assert ids(held_back) == [1]
        assert ids(statement(connection, "ada")) == [1, 2, 3]

    def test_a_reader_is_told_that_later_lines_exist(
        self, product: sa.Connection, product_engine: sa.Engine, connection: sa.Connection
    ) -> None:
        """What an open transaction holds back can be asked for, by account, and is gone with that transaction."""
        give(product, SOLD)
        told = [later_lines_exist(connection, "ada")]
        with product_engine.connect() as slow:
            slow.exec_driver_sql("SELECT pg_current_xact_id()")
            told.append(later_lines_exist(connection, "ada"))
            give(product, replace(SOLD, reference="quick"))
            told += [later_lines_exist(connection, account_id) for account_id in ("ada", "bob")]
        told.append(later_lines_exist(connection, "ada"))

        assert told == [False, False, True, False, False]

    @pytest.mark.parametrize("early_commits_first", [False, True])
    def test_a_reader_that_pages_misses_nothing(
        self,
        product: sa.Connection,
        product_engine: sa.Engine,
        connection: sa.Connection,
        early_commits_first: bool,
    ) -> None:
        """Whatever order transactions begin, write and commit in, reading on finds each transfer once.

        (1) `early` gets its transaction id, (2) `late` gets a higher one and posts first, so that the lower
        transfer id belongs to the higher transaction id, (3) `early` posts, (4) they commit in either order.
        """
        read: list[StatementLine] = []

        def read_on() -> None:
            read.extend(statement(connection, "ada", after=read[-1].transfer_id if read else None))
            connection.rollback()

        give(product, SOLD)
        read_on()
        with product_engine.connect() as early, product_engine.connect() as late:
            early.exec_driver_sql("SELECT pg_current_xact_id()")
            grant_lots(late, [replace(SOLD, reference="late")])
            grant_lots(early, [replace(SOLD, reference="early")])
            for session in (early, late) if early_commits_first else (late, early):
                session.commit()
                read_on()
            read_on()

        assert sorted(ids(read)) == [1, 2, 3]

    def test_a_transaction_that_rolled_back_holds_back_nothing(
        self, product: sa.Connection, product_engine: sa.Engine, connection: sa.Connection
    ) -> None:
        """Ids that were never committed leave a gap that no reader waits for."""
        with product_engine.connect() as abandoned:
            grant_lots(abandoned, [SOLD])
            abandoned.rollback()
        give(product, replace(SOLD, reference="order-2"))

        assert ids(statement(connection, "ada")) == [2]
