"""Sessions that want the same lots and charges at once; each race is brought about, none is hoped for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import AccountNotActive, ChargeConflict, GrantConflict, InsufficientCredits
from kino_refunds.ledger import (
    AccountStatus,
    Balance,
    Charge,
    ChargeRequest,
    Grant,
    Lot,
    balance,
    grant_lots,
    open_charges,
    set_account_status,
)
from kino_refunds.reconciliation.integrity import violations
from tests.clock import DAY, clock_at, expire_lots
from tests.conftest import Database
from tests.ledger_acts import (
    LATER,
    NOW,
    SOLD,
    WITHOUT,
    backend,
    charge,
    end,
    end_and_commit,
    freeze,
    give,
    lot_states,
    void,
    waits,
)
from tests.scenario import PATIENT


class Sessions:
    """Sessions of one database, each a connection of its own, and threads in which they wait."""

    def __init__(self, database: Database, stack: ExitStack) -> None:
        self._database = database
        self._stack = stack
        self._threads = stack.enter_context(ThreadPoolExecutor(4))
        self._pids: dict[int, int] = {}
        self.observer = self.open("postgres")
        # The functions that the product calls wait 2 s for a lock: a test says when its locks are given up.
        for function in ("grant_lots", "open_charges"):
            self.observer.exec_driver_sql(f"ALTER FUNCTION kino.{function}(jsonb) SET lock_timeout = '60s'")
        self.observer.commit()

    def open(self, role: str) -> sa.Connection:
        """Open a session as a role."""
        engine = create_engine(self._database.url(role), limits=PATIENT, pooled=False)
        connection = self._stack.enter_context(engine.connect())
        self._pids[id(connection)] = backend(connection)
        connection.rollback()
        return connection

    def start(self, connection: sa.Connection, act: Callable[[sa.Connection], Any]) -> Future[Any]:
        """Let a session act in a thread, and return once it waits for a lock that another session holds."""
        pid = self._pids[id(connection)]
        future = self._threads.submit(act, connection)
        end = time.monotonic() + 30
        while not waits(self.observer, pid):
            if future.done():
                future.result()
                pytest.fail("the session was expected to wait for a lock, and has gone through")
            assert time.monotonic() < end, "the session does not wait for a lock"
            time.sleep(0.002)
        return future

    def give(self, *grants: Grant) -> None:
        """Grant lots in a session of their own."""
        give(self.open("kino_product"), *grants)

    def charge(self, job_id: str, credits: int, account_id: str = "ada") -> Charge:
        """Open a charge in a session of its own."""
        return charge(self.open("kino_product"), job_id, credits, account_id)

    def free_lots(self) -> list[int]:
        """List the lots that no session holds."""
        rows = self.observer.exec_driver_sql(
            "SELECT lot_id FROM kino.credit_lot ORDER BY lot_id FOR NO KEY UPDATE SKIP LOCKED"
        )
        lot_ids = [row.lot_id for row in rows]
        self.observer.rollback()
        return lot_ids

    def lots(self) -> list[tuple[int, str, int]]:
        """Every lot: id, state, remaining."""
        found = lot_states(self.observer)
        self.observer.rollback()
        return found


@pytest.fixture
def sessions(database: Database) -> Iterator[Sessions]:
    """Sessions for a race; the books that it leaves are sound."""
    with ExitStack() as stack:
        running = Sessions(database, stack)
        yield running
        assert violations(running.observer, without=WITHOUT) == []


def opening(*requests: ChargeRequest) -> Callable[[sa.Connection], list[Charge]]:
    """Open charges and commit."""

    def act(connection: sa.Connection) -> list[Charge]:
        opened = open_charges(connection, requests)
        connection.commit()
        return opened

    return act


def refunding(*charges: Charge, now: datetime = NOW) -> Callable[[sa.Connection], None]:
    """Refund and commit."""

    def act(connection: sa.Connection) -> None:
        end_and_commit(connection, *charges, now=now)

    return act


JOB = ChargeRequest("job", "ada", 60, NOW)


class TestOneJobTwice:
    def test_the_second_waits_and_finds_the_first(self, sessions: Sessions) -> None:
        """Two requests that open one job at once charge it once, and both get the charge."""
        sessions.give(SOLD)
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        opened = open_charges(first, [JOB])
        waiting = sessions.start(second, opening(JOB))
        first.commit()

        assert waiting.result(30) == opened
        assert sessions.lots() == [(1, "active", 40)]

    def test_the_second_opens_if_the_first_rolls_back(self, sessions: Sessions) -> None:
        """A job whose first request is rolled back is charged by the second."""
        sessions.give(SOLD)
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        open_charges(first, [JOB])
        waiting = sessions.start(second, opening(JOB))
        first.rollback()

        assert waiting.result(30)[0].lines == [(1, 60)]
        assert sessions.lots() == [(1, "active", 40)]

    def test_the_second_on_other_terms_is_a_conflict(self, sessions: Sessions) -> None:
        """Of two requests that contradict each other the one that committed stands."""
        sessions.give(SOLD)
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        open_charges(first, [JOB])
        waiting = sessions.start(second, opening(replace(JOB, credits=61)))
        first.commit()

        with pytest.raises(ChargeConflict):
            waiting.result(30)
        second.rollback()
        assert sessions.lots() == [(1, "active", 40)]

    def test_batches_that_share_jobs_in_opposite_orders_do_not_deadlock(self, sessions: Sessions) -> None:
        """Charges are inserted in the order of their jobs: the second batch waits at the first shared one."""
        sessions.give(SOLD)
        gate, first, second = (sessions.open("kino_product") for _ in range(3))
        a, b = (ChargeRequest(job_id, "ada", 5, NOW) for job_id in ("a", "b"))

        open_charges(gate, [a])
        waiting = [sessions.start(first, opening(a, b)), sessions.start(second, opening(b, a))]
        gate.rollback()

        one, other = (future.result(30) for future in waiting)
        assert one == other[::-1]
        assert sessions.lots() == [(1, "active", 90)]


class TestSharedLots:
    def test_what_is_left_is_spent_once(self, sessions: Sessions) -> None:
        """Two jobs that together cost more than the lot has: the second waits, and cannot be paid."""
        sessions.give(SOLD)
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        open_charges(first, [JOB])
        waiting = sessions.start(second, opening(replace(JOB, job_id="other")))
        first.commit()

        with pytest.raises(InsufficientCredits):
            waiting.result(30)
        second.rollback()
        assert sessions.lots() == [(1, "active", 40)]

    def test_two_jobs_draw_one_after_the_other(self, sessions: Sessions) -> None:
        """Two jobs that both can be paid are, the second from what the first left."""
        sessions.give(SOLD, replace(SOLD, reference="order-2", priority=90))
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        open_charges(first, [JOB])
        waiting = sessions.start(second, opening(replace(JOB, job_id="other")))
        first.commit()

        assert waiting.result(30)[0].lines == [(1, 40), (2, 20)]
        assert sessions.lots() == [(1, "active", 0), (2, "active", 80)]

    def test_openings_lock_shared_lots_in_one_order(self, sessions: Sessions) -> None:
        """Sessions that draw from the same lots in opposite orders wait at the first and hold none behind it."""
        sessions.give(SOLD, replace(SOLD, reference="order-2", account_id="bob", priority=1))
        gate = sessions.open("postgres")
        first, second = (sessions.open("kino_product") for _ in range(2))
        ada, bob = ChargeRequest("a", "ada", 5, NOW), ChargeRequest("b", "bob", 5, NOW)

        gate.exec_driver_sql("SELECT FROM kino.credit_lot WHERE lot_id = 1 FOR NO KEY UPDATE")
        waiting = [
            sessions.start(first, opening(ada, bob)),
            sessions.start(second, opening(replace(bob, job_id="c"), replace(ada, job_id="d"))),
        ]
        free = sessions.free_lots()
        gate.rollback()

        assert [len(future.result(30)) for future in waiting] == [2, 2]
        assert free == [2]
        assert sessions.lots() == [(1, "active", 90), (2, "active", 90)]

    def test_refunds_lock_shared_lots_in_one_order(self, sessions: Sessions) -> None:
        """Batches that return to the same lots in opposite orders wait at the first and hold none behind it."""
        sessions.give(replace(SOLD, credits=10, priority=2), replace(SOLD, reference="b", credits=10, priority=1))
        charges = [sessions.charge(job_id, 5) for job_id in ("a", "b", "c", "d")]
        gate = sessions.open("postgres")
        first, second = (sessions.open("kino_worker") for _ in range(2))
        from_second, from_first = charges[:2], charges[2:]

        gate.exec_driver_sql("SELECT FROM kino.credit_lot WHERE lot_id = 1 FOR NO KEY UPDATE")
        waiting = [
            sessions.start(first, refunding(from_first[0], from_second[0])),
            sessions.start(second, refunding(from_second[1], from_first[1])),
        ]
        free = sessions.free_lots()
        gate.rollback()
        for future in waiting:
            future.result(30)

        assert [c.lines for c in charges] == [[(2, 5)], [(2, 5)], [(1, 5)], [(1, 5)]]
        assert free == [2]
        assert sessions.lots() == [(1, "active", 10), (2, "active", 10)]

    def test_locks_do_not_follow_the_rows_on_disk(self, sessions: Sessions) -> None:
        """The order of locks is the order of ids, even after the lower lot's row has moved behind the higher's."""
        sessions.give(replace(SOLD, credits=10), replace(SOLD, reference="b", credits=10, priority=90))
        opened = sessions.charge("job", 20)
        superuser = sessions.open("postgres")
        superuser.exec_driver_sql(
            "CREATE TABLE kino.moved AS SELECT * FROM kino.credit_lot; TRUNCATE kino.credit_lot;"
            "INSERT INTO kino.credit_lot OVERRIDING SYSTEM VALUE SELECT * FROM kino.moved ORDER BY lot_id DESC;"
            "DROP TABLE kino.moved"
        )
        superuser.commit()
        gate, worker = sessions.open("postgres"), sessions.open("kino_worker")

        gate.exec_driver_sql("SELECT FROM kino.credit_lot WHERE lot_id = 1 FOR NO KEY UPDATE")
        waiting = sessions.start(worker, refunding(opened))
        free = sessions.free_lots()
        gate.rollback()
        waiting.result(30)

        assert free == [2]
        assert sessions.lots() == [(1, "active", 10), (2, "active", 10)]

    def test_a_job_waits_for_a_refund_and_spends_it(self, sessions: Sessions) -> None:
        """A job that comes while its account is being refunded draws from what came back."""
        sessions.give(SOLD)
        opened = sessions.charge("first", 60)
        worker, product = sessions.open("kino_worker"), sessions.open("kino_product")

        end(worker, opened)
        waiting = sessions.start(product, opening(ChargeRequest("second", "ada", 100, NOW)))
        worker.commit()

        assert waiting.result(30)[0].lines == [(1, 100)]
        assert balance(sessions.observer, "ada") == Balance(0, 100)


class TestLotsThatChangeMeanwhile:
    def test_a_refund_that_waits_for_the_expiry_opens_a_successor(self, sessions: Sessions) -> None:
        """A refund that meets the sweep at its lot sees the lot expired, and fills no lot that was emptied."""
        sessions.give(SOLD)
        opened = sessions.charge("job", 60)
        sweep, worker = sessions.open("kino_worker"), sessions.open("kino_worker")

        expire_lots(sweep, now=LATER)
        waiting = sessions.start(worker, refunding(opened))
        sweep.commit()
        waiting.result(30)

        assert sessions.lots() == [(1, "expired", 0), (2, "active", 60)]

    def test_the_expiry_that_meets_a_refund_takes_what_it_brought(self, sessions: Sessions) -> None:
        """A sweep passes over a lot that is being refunded; the next one takes the refunded credits as well."""
        sessions.give(SOLD)
        opened = sessions.charge("job", 60)
        sweep, worker = sessions.open("kino_worker"), sessions.open("kino_worker")

        end(worker, opened)
        passed_over = expire_lots(sweep, now=LATER)
        sweep.commit()
        worker.commit()
        swept = expire_lots(sweep, now=LATER)
        sweep.commit()

        assert (passed_over, swept) == (0, 1)
        assert sessions.lots() == [(1, "expired", 0)]
        with clock_at(sessions.observer, LATER + DAY):
            assert balance(sessions.observer, "ada", at=LATER + DAY) == Balance(0, 0)

    def test_two_sweeps_at_once_expire_a_lot_once(self, sessions: Sessions) -> None:
        """A second sweep takes the lots that the first does not hold."""
        sessions.give(SOLD, replace(SOLD, reference="b"))
        first, second = sessions.open("kino_worker"), sessions.open("kino_worker")

        counts = [expire_lots(first, now=LATER, limit=1), expire_lots(second, now=LATER)]
        first.commit()
        second.commit()

        assert counts == [1, 1]
        assert sessions.lots() == [(1, "expired", 0), (2, "expired", 0)]

    @pytest.mark.parametrize(
        "change",
        [
            lambda connection: expire_lots(connection, now=LATER),
            lambda connection: freeze(connection, "p-1"),
            lambda connection: void(connection, "p-1"),
        ],
        ids=["expire", "freeze", "void"],
    )
    def test_a_job_does_not_draw_from_a_lot_that_is_being_closed(
        self, sessions: Sessions, change: Callable[[sa.Connection], object]
    ) -> None:
        """A job that waits for an expiry, a freeze or a void finds that lot closed and draws from the next."""
        sessions.give(SOLD, replace(SOLD, reference="b", priority=90, expires_at=None, purchase_id=None))
        closing, product = sessions.open("kino_owner"), sessions.open("kino_product")

        change(closing)
        waiting = sessions.start(product, opening(JOB))
        closing.commit()

        assert waiting.result(30)[0].lines == [(2, 60)]

    def test_a_lot_that_expires_while_a_job_waits_for_it_is_not_drawn(self, sessions: Sessions) -> None:
        """The clock is read when the lot is had, not when it was asked for, even if its holder changed nothing."""
        now: datetime = sessions.observer.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        sessions.observer.rollback()
        expires_at = now + timedelta(seconds=1)
        sessions.give(
            replace(SOLD, expires_at=expires_at),
            replace(SOLD, reference="b", priority=90, expires_at=None),
        )
        gate, product = sessions.open("postgres"), sessions.open("kino_product")

        gate.exec_driver_sql("SELECT FROM kino.credit_lot FOR NO KEY UPDATE")
        waiting = sessions.start(product, opening(JOB))
        past = sa.text("SELECT clock_timestamp() > :expires_at")
        while not sessions.observer.execute(past, {"expires_at": expires_at}).scalar_one():
            time.sleep(0.01)
        sessions.observer.rollback()
        gate.rollback()

        assert waiting.result(30)[0].lines == [(2, 60)]

    def test_void_takes_what_a_job_left(self, sessions: Sessions) -> None:
        """A void that waits for a job takes what is left after it, and no more."""
        sessions.give(SOLD)
        product, voiding = sessions.open("kino_product"), sessions.open("kino_owner")

        def act(connection: sa.Connection) -> int:
            taken = void(connection, "p-1")
            connection.commit()
            return taken

        open_charges(product, [JOB])
        waiting = sessions.start(voiding, act)
        product.commit()

        assert waiting.result(30) == 40
        assert sessions.lots() == [(1, "voided", 0)]

    def test_an_account_changes_its_status_once_at_a_time(self, sessions: Sessions) -> None:
        """Each change of status starts from what the one before it left, so the history has no gap."""
        sessions.give(SOLD)
        first, second = sessions.open("kino_oncall"), sessions.open("kino_oncall")

        def terminate(connection: sa.Connection) -> AccountStatus:
            before = set_account_status(connection, "ada", AccountStatus.TERMINATED, reason="r", actor="x")
            connection.commit()
            return before

        set_account_status(first, "ada", AccountStatus.SUSPENDED, reason="r", actor="x")
        waiting = sessions.start(second, terminate)
        first.commit()

        assert waiting.result(30) is AccountStatus.SUSPENDED
        with pytest.raises(AccountNotActive):
            sessions.charge("job", 1)


class TestOneReferenceTwice:
    @staticmethod
    def granting(*grants: Grant) -> Callable[[sa.Connection], list[Lot]]:
        def act(connection: sa.Connection) -> list[Lot]:
            lots = grant_lots(connection, grants)
            connection.commit()
            return lots

        return act

    def test_the_second_waits_and_finds_the_first(self, sessions: Sessions) -> None:
        """Two grants of one reference at once give the credits once, and both get the lot."""
        sessions.give(replace(SOLD, reference="order-0", credits=1))
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        lots = grant_lots(first, [SOLD])
        waiting = sessions.start(second, self.granting(SOLD))
        first.commit()

        assert waiting.result(30) == lots
        assert balance(sessions.observer, "ada") == Balance(101, 0)

    def test_the_first_grant_of_an_account_twice(self, sessions: Sessions) -> None:
        """Two grants that both would make the account make one account and one lot."""
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        lots = grant_lots(first, [SOLD])
        waiting = sessions.start(second, self.granting(SOLD))
        first.commit()

        assert waiting.result(30) == lots
        assert balance(sessions.observer, "ada") == Balance(100, 0)

    def test_the_second_gives_if_the_first_rolls_back(self, sessions: Sessions) -> None:
        """A grant whose first attempt is rolled back is given by the second."""
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        grant_lots(first, [SOLD])
        waiting = sessions.start(second, self.granting(SOLD))
        first.rollback()

        assert [lot.remaining for lot in waiting.result(30)] == [100]
        assert balance(sessions.observer, "ada") == Balance(100, 0)

    def test_the_second_on_other_terms_is_a_conflict(self, sessions: Sessions) -> None:
        """Of two grants that contradict each other the one that committed stands."""
        first, second = sessions.open("kino_product"), sessions.open("kino_product")

        grant_lots(first, [SOLD])
        waiting = sessions.start(second, self.granting(replace(SOLD, credits=99)))
        first.commit()

        with pytest.raises(GrantConflict):
            waiting.result(30)
        second.rollback()
        assert balance(sessions.observer, "ada") == Balance(100, 0)
