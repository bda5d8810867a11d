"""How long credits live: lines of successors, holds and voids with their causes, and what was at an instant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import ChargeConflict, ChargeNotCaptured, InstantNotFinal, TooManyLots
from kino_refunds.ledger import (
    Balance,
    CauseKind,
    Charge,
    ChargeRequest,
    Grant,
    LotClass,
    Reversal,
    balance,
    expire_lots,
    grant_lots,
    open_charge,
    open_charges,
    reverse_charges,
    unvoid_purchase,
)
from kino_refunds.reconciliation.verified import sample_clock
from tests.clock import DAY, HOUR, TICK, clock_at, set_lot_grace
from tests.conftest import Database
from tests.ledger_acts import (
    DISPUTE,
    GRACE,
    NOW,
    PAYOUT,
    SOLD,
    balance_at,
    charge,
    end_and_commit,
    expiries,
    freeze,
    give,
    lot_states,
    thaw,
    void,
)

pytestmark = pytest.mark.usefixtures("sound_books")

PROMOTION = Grant("welcome", "ada", 10, LotClass.PROMOTIONAL, NOW + DAY)


CONNECTS_AS = "kino_owner"
"""It may call every function of the ledger: also those that only functions call."""


def failing(product: sa.Connection, connection: sa.Connection, job_id: str, at: datetime, took: timedelta) -> Charge:
    """Charge all that the account has for a job that is submitted at `at` and fails after `took`."""
    with clock_at(product, at):
        opened = charge(product, job_id, 10)
    end_and_commit(connection, opened, now=at + took)
    return opened


class TestSuccessors:
    def test_a_promotion_does_not_live_for_ever(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Whoever has a job fail each time before the credits expire keeps them for 30 days and a day, in few lots."""
        give(product, PROMOTION)
        at, jobs = NOW, 0
        while at < NOW + 90 * DAY:
            with clock_at(product, at):
                available = balance(product, "ada").available
                product.rollback()
                if not available:
                    break
            failing(product, connection, f"job-{jobs}", at, HOUR)
            at, jobs = at + 6 * HOUR, jobs + 1

        last = max(expires_at for expires_at in expiries(connection) if expires_at is not None)
        assert last <= NOW + 31 * DAY + 2 * DAY
        assert len(lot_states(connection)) <= 10
        assert jobs > 100

    def test_a_line_of_successors_ends_30_days_after_its_root(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A successor of a successor lives no longer than the grace, and than 30 days from where the line began."""
        give(product, PROMOTION)
        failing(product, connection, "first", NOW, HOUR)  # lot 2, until NOW + 7 d + 1 h
        end = NOW + DAY + 30 * DAY
        failing(product, connection, "second", NOW + 6 * DAY + 12 * HOUR, HOUR)  # lot 3
        failing(product, connection, "third", NOW + 13 * DAY, HOUR)  # lot 4
        failing(product, connection, "fourth", NOW + 19 * DAY + 12 * HOUR, HOUR)  # lot 5
        failing(product, connection, "fifth", NOW + 26 * DAY, HOUR)

        assert expiries(connection) == [
            NOW + DAY,
            NOW + HOUR + GRACE,
            NOW + 6 * DAY + 13 * HOUR + GRACE,
            NOW + 13 * DAY + HOUR + GRACE,
            NOW + 19 * DAY + 13 * HOUR + GRACE,
            end,
        ]

    def test_a_job_that_was_submitted_in_time_leaves_a_day(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """However late a job fails, credits of a line that lived when it was submitted can be spent for 24 hours."""
        give(product, PROMOTION)
        failing(product, connection, "first", NOW, HOUR)
        with clock_at(product, NOW + 2 * DAY):
            opened = charge(product, "slow", 10)

        end_and_commit(connection, opened, now=NOW + 40 * DAY)

        assert expiries(connection)[-1] == NOW + 41 * DAY

    def test_a_job_that_was_submitted_after_the_line_s_end_brings_no_new_lot(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Its credits go back into their lot and live as long as it does; where it has expired they expire there."""
        give(product, PROMOTION)
        failing(product, connection, "first", NOW, HOUR)
        with clock_at(product, NOW + 2 * DAY):
            slow = charge(product, "slow", 10)
        end_and_commit(connection, slow, now=NOW + 40 * DAY)  # lot 3, until NOW + 41 d
        with clock_at(product, NOW + 40 * DAY + HOUR):
            in_time, late = charge(product, "in time", 4), charge(product, "late", 6)

        end_and_commit(connection, in_time, now=NOW + 40 * DAY + 2 * HOUR)
        end_and_commit(connection, late, now=NOW + 42 * DAY)

        assert [line for opened in (in_time, late) for line in opened.lines] == [(3, 4), (3, 6)]
        assert lot_states(connection) == [(1, "active", 0), (2, "active", 0), (3, "active", 4)]
        rows = connection.exec_driver_sql(
            "SELECT kind, lot_id, to_lot_id, credits FROM kino.transfer WHERE charge_id IS NOT NULL"
            " ORDER BY transfer_id DESC LIMIT 3"
        )
        assert [tuple(row) for row in rows] == [
            ("expire", 3, None, 6),
            ("refund", 3, None, 6),
            ("refund", 3, None, 4),
        ]

    @pytest.mark.parametrize(("left", "lots"), [(DAY, 3), (DAY + TICK, 2)])
    def test_a_successor_with_more_than_a_day_takes_its_credits_back(
        self, product: sa.Connection, connection: sa.Connection, left: timedelta, lots: int
    ) -> None:
        """One lot more a refund would be a chain of thousands: until a day before its end a successor takes them."""
        give(product, PROMOTION)
        failing(product, connection, "first", NOW, timedelta(0))
        with clock_at(product, NOW + DAY):
            opened = charge(product, "second", 10)

        end_and_commit(connection, opened, now=NOW + GRACE - left)

        assert len(lot_states(connection)) == lots

    def test_a_reversal_brings_credits_back_however_old_their_line_is(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A capture that was wrong is our mistake: its credits can be spent for a day, also after the line's end."""
        give(product, PROMOTION)
        failing(product, connection, "first", NOW, HOUR)
        with clock_at(product, NOW + 2 * DAY):
            opened = charge(product, "second", 10)
        end_and_commit(connection, opened, kind="captured", now=NOW + 2 * DAY)

        with clock_at(connection, NOW + 90 * DAY):
            reverse_charges(connection, [reversal(opened)])
        connection.commit()

        assert lot_states(connection)[-1] == (3, "active", 10)
        assert expiries(connection)[-1] == NOW + 91 * DAY

    def test_a_lot_grace_of_the_ledger_is_what_a_refund_goes_by(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """The grace stands in the ledger, for every caller the same."""
        set_lot_grace(connection, 14)
        give(product, PROMOTION)

        end_and_commit(connection, charge(product, "job", 10))

        assert expiries(connection) == [NOW + DAY, NOW + 14 * DAY]


def reversal(opened: Charge, reference: str = "ticket-1") -> Reversal:
    return Reversal(opened.charge_id, "generation_failure", "2.failure", "2025-12-14", reference, "ada@kino")


class TestReversals:
    def test_a_captured_charge_is_given_back_once(self, product: sa.Connection, connection: sa.Connection) -> None:
        """The same reference again changes nothing, another one is a conflict, and the charge stays captured."""
        give(product, SOLD)
        opened = charge(product, "job", 30)
        end_and_commit(connection, opened, kind="captured")

        reverse_charges(connection, [reversal(opened)])
        reverse_charges(connection, [reversal(opened)])
        connection.commit()
        with pytest.raises(ChargeConflict, match=r"of job 'job' was corrected before.* look at 'ticket-1'"):
            reverse_charges(connection, [reversal(opened, "ticket-2")])
        connection.rollback()

        assert lot_states(connection) == [(1, "active", 100)]
        row = connection.exec_driver_sql("SELECT status, refunded, reason FROM kino.charge_status").one()
        assert tuple(row) == ("refunded", 30, "generation_failure")
        kinds = connection.exec_driver_sql("SELECT kind FROM kino.transfer ORDER BY transfer_id").scalars().all()
        assert kinds == ["grant", "hold", "capture", "reversal"]

    @pytest.mark.parametrize("state", ["open", "refunded"])
    def test_what_is_not_captured_is_not_reversed(
        self, product: sa.Connection, connection: sa.Connection, state: str
    ) -> None:
        """An open charge waits for its job, and a refunded one has its credits: neither gets any by a reversal."""
        give(product, SOLD)
        opened = charge(product, "job", 30)
        if state == "refunded":
            end_and_commit(connection, opened)

        with pytest.raises(ChargeNotCaptured, match=f"of job 'job' is not captured but {state}"):
            reverse_charges(connection, [reversal(opened)])

        connection.rollback()

    def test_a_reversal_into_a_voided_lot_is_voided_for_its_cause(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """What was paid out is not given back as credits as well; it comes back with the payout's failure."""
        give(product, SOLD)
        opened = charge(product, "job", 30)
        end_and_commit(connection, opened, kind="captured")
        void(connection)
        reverse_charges(connection, [reversal(opened)])
        connection.commit()
        before = balance(connection, "ada")

        back = unvoid_purchase(connection, "p-1", **PAYOUT)
        connection.commit()

        assert (before, back) == (Balance(0, 0), 100)
        assert lot_states(connection) == [(1, "active", 100)]


class TestCauses:
    def test_two_holds_end_one_after_the_other(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A lot is frozen until its last hold has ended, and the same cause holds it once."""
        request = {"cause_kind": CauseKind.REQUEST, "cause_id": "rq-1", "actor": "ops"}
        give(product, SOLD)

        told = [
            freeze(connection, now=NOW),
            freeze(connection, now=NOW),
            freeze(connection, now=NOW + DAY, **request),
            thaw(connection, now=NOW + 2 * DAY),
            thaw(connection, now=NOW + 3 * DAY),
            thaw(connection, now=NOW + 4 * DAY, **request),
        ]
        connection.commit()

        assert told == [[1], [], [], [], [], [1]]
        assert expiries(connection) == [NOW + 34 * DAY]

    def test_the_end_of_a_dispute_does_not_bring_back_what_had_expired(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Credits that were due when the dispute came expire then, although no sweep had passed."""
        give(product, SOLD)

        held = freeze(connection, now=NOW + 31 * DAY)
        released = thaw(connection, now=NOW + 40 * DAY)
        connection.commit()

        assert (held, released) == ([1], [1])
        assert lot_states(connection) == [(1, "expired", 0)]

    def test_what_came_back_during_a_hold_can_be_spent_after_it(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A lot that had expired and took a refund while it was held lives for the grace."""
        give(product, SOLD)
        opened = charge(product, "job", 30)
        freeze(connection, now=NOW + 31 * DAY)
        connection.commit()
        end_and_commit(connection, opened, now=NOW + 32 * DAY)

        thaw(connection, now=NOW + 40 * DAY)
        connection.commit()

        assert lot_states(connection) == [(1, "active", 30)]
        assert expiries(connection) == [NOW + 47 * DAY]

    def test_a_payout_that_fails_brings_exactly_its_credits_back_frozen(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Credits come back under the hold that was there before, those of a job that failed meanwhile too."""
        give(product, SOLD)
        opened = charge(product, "job", 30)
        freeze(connection, now=NOW)
        void(connection)
        connection.commit()
        end_and_commit(connection, opened)

        back = unvoid_purchase(connection, "p-1", **PAYOUT)
        again = unvoid_purchase(connection, "p-1", **PAYOUT)
        connection.commit()

        assert (back, again) == (100, 0)
        assert lot_states(connection) == [(1, "frozen", 100)]

    def test_what_another_cause_has_voided_stays_away(self, product: sa.Connection, connection: sa.Connection) -> None:
        """A lost dispute keeps the credits that a failed payout would have brought back, until it is undone."""
        give(product, SOLD)
        void(connection)
        void(connection, **DISPUTE)

        undone = [unvoid_purchase(connection, "p-1", **cause) for cause in (PAYOUT, DISPUTE)]
        connection.commit()

        assert undone == [0, 100]
        assert lot_states(connection) == [(1, "active", 100)]
        rows = connection.exec_driver_sql(
            "SELECT kind, cause_kind, credits FROM kino.transfer WHERE cause_kind IS NOT NULL ORDER BY transfer_id"
        )
        assert [tuple(row) for row in rows] == [
            ("void", "payout", 100),
            ("unvoid", "payout", 100),
            ("void", "dispute", 100),
            ("unvoid", "dispute", 100),
        ]

    def test_a_void_that_is_undone_leaves_no_lot_shorter(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """The time that a lot had left when it was voided is what it has after the undo."""
        give(product, SOLD)
        with clock_at(connection, NOW):
            void(connection)
        with clock_at(connection, NOW + 100 * DAY):
            unvoid_purchase(connection, "p-1", **PAYOUT)
        connection.commit()

        assert expiries(connection) == [NOW + 130 * DAY]


class TestThePast:
    def test_an_instant_between_two_holds_is_told_as_it_was(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """Each hold moves the expiry; a balance between them goes by the expiry of then, whenever it is asked for."""
        give(product, replace(SOLD, expires_at=NOW + 2 * DAY))
        freeze(connection, now=NOW + DAY)
        thaw(connection, now=NOW + 5 * DAY)
        freeze(connection, now=NOW + 6 * DAY)
        connection.commit()
        instants = [NOW + days * DAY for days in (1, 3, 5, 6, 7)]
        with clock_at(connection, NOW + 8 * DAY):
            before = [balance_at(connection, "ada", at).available for at in instants]
        thaw(connection, now=NOW + 40 * DAY)
        connection.commit()

        with clock_at(connection, NOW + 41 * DAY):
            after = [balance_at(connection, "ada", at).available for at in instants]

        assert before == after == [100, 0, 100, 100, 100]

    def test_an_instant_that_may_still_change_is_refused_with_the_latest_that_will_not(
        self, product: sa.Connection, connection: sa.Connection, scene_owner: sa.Connection
    ) -> None:
        """While a transaction is open, what it will write may be older than the question; a sample below it may not."""
        give(product, SOLD)
        sample_clock(connection)
        connection.commit()
        (sampled_at,) = connection.exec_driver_sql("SELECT sampled_at FROM kino.xid_clock").one()
        connection.rollback()
        scene_owner.exec_driver_sql("SELECT kino.this_transaction()")

        with pytest.raises(InstantNotFinal) as refused:
            balance(connection, "ada", at=sampled_at + TICK)
        connection.rollback()
        found = balance(connection, "ada", at=sampled_at)

        assert f"{sampled_at:%H:%M:%S.%f}" in str(refused.value)
        assert found == Balance(100, 0)
        scene_owner.rollback()

    def test_the_future_is_not_told(self, connection: sa.Connection) -> None:
        """Nobody knows what an account will have."""
        with pytest.raises(InstantNotFinal):
            balance(connection, "ada", at=NOW + DAY)

    def test_every_change_of_a_lot_has_its_row(self, product: sa.Connection, connection: sa.Connection) -> None:
        """Whoever changes a lot's state or expiry, by a function or by hand, leaves what it was and when."""
        give(product, SOLD)
        connection.exec_driver_sql("UPDATE kino.credit_lot SET expires_at = expires_at + interval '1 day'")
        connection.exec_driver_sql("UPDATE kino.credit_lot SET remaining = remaining, expires_at = expires_at")
        connection.commit()

        rows = connection.exec_driver_sql(
            "SELECT from_state, to_state, from_expires_at, to_expires_at, xid IS NOT NULL FROM kino.lot_change"
        )
        assert [tuple(row) for row in rows] == [("active", "active", NOW + 30 * DAY, NOW + 31 * DAY, True)]


@pytest.fixture
def scene_owner(database: Database) -> Iterator[sa.Connection]:
    """A second session, for what is not committed."""
    engine = create_engine(database.url("kino_owner"), pooled=False)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


class TestBounds:
    def test_a_charge_from_too_many_lots_is_refused_in_words(
        self, product: sa.Connection, connection: sa.Connection
    ) -> None:
        """A charge takes from 32,767 lots; one more is an error that says so, and leaves nothing."""
        most = 32_767
        grant_lots(product, [Grant(f"lot-{n}", "ada", 1, LotClass.COURTESY) for n in range(most + 1)])
        product.commit()

        with pytest.raises(TooManyLots, match="32767 lots"):
            open_charge(product, job_id="one too many", account_id="ada", credits=most + 1, deadline_at=NOW)
        opened = open_charge(product, job_id="all", account_id="ada", credits=most, deadline_at=NOW)
        product.commit()
        end_and_commit(connection, opened)

        assert len(opened.lines) == most
        assert balance(connection, "ada") == Balance(most + 1, 0)

    def test_a_session_far_east_reads_the_last_expiry(self, database: Database) -> None:
        """In Tokyo the end of 9998 is in 9999, and every function still gives it."""
        last = datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=NOW.tzinfo)
        engine = create_engine(database.url("kino_product"), pooled=False)
        with engine.connect() as product:
            product.exec_driver_sql("SET TimeZone = 'Asia/Tokyo'")
            product.exec_driver_sql("SET DateStyle = 'German'")
            [lot] = grant_lots(product, [replace(SOLD, expires_at=last)])
            opened = open_charges(product, [ChargeRequest("job", "ada", 5, last)])
            again = open_charges(product, [ChargeRequest("job", "ada", 5, last)])
            product.commit()
        engine.dispose()

        assert (lot.expires_at, opened[0].deadline_at, again) == (last, last, opened)

    def test_expiry_takes_a_limit_that_can_be(self, connection: sa.Connection) -> None:
        """A sweep of nothing, or of more than a transaction should hold, is a mistake."""
        for limit in (0, 10_001):
            with pytest.raises(sa.exc.DBAPIError):
                expire_lots(connection, limit=limit)
            connection.rollback()
