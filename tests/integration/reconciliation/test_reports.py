"""Reports: the figures of a month and of an instant tie, never change, and can be read by who may only read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
import sqlalchemy as sa

from kino_refunds.errors import InstantNotFinal, LedgerInconsistent
from kino_refunds.ledger import Grant, LotClass, grant_lots
from kino_refunds.reconciliation.reports import Expiring, LiabilityLine, report_liability, report_month
from tests.clock import TICK, clock_at, sample_at
from tests.conftest import Database
from tests.integration.reconciliation.bookkeeping import (
    counted_again,
    day,
    december,
    november,
    october,
    the_liability,
    the_month,
    without_zeros,
)
from tests.scenario import Scene

YEAR_END = datetime(2041, 1, 2, tzinfo=UTC)
INTO_ANOTHER_CLASS = """
    UPDATE kino.transfer SET to_lot_id = (SELECT lot_id FROM kino.credit_lot WHERE class = 'lifetime')
    WHERE kind = 'refund'
"""
NOTHING = LiabilityLine(spendable=0, frozen=0, expired=0, held=0)


@pytest.fixture
def quarter(scene: Scene, database: Database) -> Scene:
    """Three months have passed."""
    october(scene)
    november(scene, database)
    december(scene, database)
    return scene


class TestMonth:
    def test_a_month_says_what_happened_to_each_class(self, quarter: Scene, database: Database) -> None:
        """The figures of November, one by one, as they were planned; and every other class has a line of zeros."""
        november = the_month(database, 11, now=YEAR_END).as_dict()

        assert (november["month"], november["since"], november["until"]) == (
            "2040-11",
            "2040-11-01T00:00:00+00:00",
            "2040-12-01T00:00:00+00:00",
        )
        assert list(november["classes"]) == ["promotional", "courtesy", "subscription", "purchased", "lifetime"]
        assert without_zeros(november) == counted_again(quarter, 11)
        assert without_zeros(november) == {
            "promotional": {
                "opening": 40, "opening_wallet": 8, "opening_held": 32,
                "refunded": 32, "reversed": 20, "expired": 60,
            },
            "purchased": {
                "opening": 100, "opening_wallet": 87, "opening_held": 13,
                "refunded": 13, "voided": 100, "unvoided": 100, "closing": 100, "closing_wallet": 100,
            },
            "lifetime": {"opening": 30, "opening_wallet": 30, "closing": 30, "closing_wallet": 30},
        }  # fmt: skip

    @pytest.mark.parametrize("month", [9, 10, 11, 12])
    def test_each_month_is_what_its_transfers_say(self, quarter: Scene, database: Database, month: int) -> None:
        """Counted once more, transfer by transfer, every figure of every class is the same; the total is their sum."""
        report = the_month(database, month, now=YEAR_END).as_dict()

        assert without_zeros(report) == counted_again(quarter, month)
        assert report["total"] == {
            figure: sum(line[figure] for line in report["classes"].values()) for figure in report["total"]
        }

    def test_a_month_opens_as_the_one_before_it_closed(self, quarter: Scene, database: Database) -> None:
        """No credit falls between two months."""
        reports = [the_month(database, month, now=YEAR_END) for month in (9, 10, 11, 12)]

        for before, after in pairwise(reports):
            for lot_class in LotClass:
                closed, opened = before.classes[lot_class], after.classes[lot_class]
                assert (closed.closing_wallet, closed.closing_held) == (opened.opening_wallet, opened.opening_held)
        assert quarter.balance("acme").held == reports[-1].total.closing_held == 0

    def test_a_month_that_is_asked_for_later_has_the_same_figures(self, scene: Scene, database: Database) -> None:
        """What happens in later months, also to lots and jobs of this one, changes nothing in it."""
        october(scene)
        with clock_at(scene.worker, day("10-31 23:00")), scene.product.connect() as slow:
            slow.exec_driver_sql("SELECT kino.this_transaction()")
            with clock_at(scene.worker, day("11-01 00:01")):
                grant_lots(slow, [Grant("slow", "acme", 7, LotClass.SUBSCRIPTION)])
            slow.commit()
        first = the_month(database, 10, now=day("11-01 00:02")).as_dict()
        liability = the_liability(database, day("10-15"), now=day("11-01 00:02")).as_dict()
        november(scene, database)
        december(scene, database)
        later = the_month(database, 10, now=YEAR_END).as_dict()

        assert later == first
        assert the_liability(database, day("10-15"), now=YEAR_END).as_dict() == liability
        assert first["classes"]["subscription"]["granted"] == 0
        assert the_month(database, 11, now=YEAR_END).classes[LotClass.SUBSCRIPTION].granted == 7

    def test_a_month_is_refused_while_a_transaction_may_post_into_it(self, scene: Scene, database: Database) -> None:
        """A transaction of October that commits in November belongs to October, so until then there is no report."""
        october(scene)
        with scene.product.connect() as slow:
            with clock_at(scene.worker, day("10-31 23:59:59")):
                grant_lots(slow, [Grant("slow", "acme", 7, LotClass.SUBSCRIPTION)])
            sample_at(scene.worker, day("11-01 00:01"))
            with pytest.raises(InstantNotFinal):
                the_month(database, 10, now=day("11-02"))
            slow.commit()

        assert the_month(database, 10, now=day("11-02")).classes[LotClass.SUBSCRIPTION].granted == 7

    def test_a_month_that_has_not_ended_is_refused(self, scene: Scene, database: Database) -> None:
        """The text names the latest instant that is final; at the very end the month is there."""
        october(scene)
        with pytest.raises(InstantNotFinal) as refused:
            the_month(database, 10, now=day("11-01") - TICK)

        assert str(refused.value) == (
            "month 2040-10 ends at 2040-11-01 00:00:00Z, and what was after 2040-10-31 23:59:59.999999Z may still"
            " change; ask for an earlier one, or again when it has ended"
        )
        assert the_month(database, 10, now=day("11-01")).classes[LotClass.LIFETIME].closing == 30

    def test_the_first_instant_belongs_to_the_month_and_the_last_tick_too(
        self, scene: Scene, database: Database
    ) -> None:
        """A month is from its first instant to before the next month's, in UTC."""
        for n, at in enumerate((day("10-01") - TICK, day("10-01"), day("11-01") - TICK, day("11-01"))):
            with clock_at(scene.worker, at):
                scene.grant("acme", 10**n, reference=f"{n}")

        line = the_month(database, 10, now=YEAR_END).classes[LotClass.PURCHASED]

        assert (line.opening, line.granted, line.closing) == (1, 110, 111)

    @pytest.mark.parametrize(("year", "month"), [(2040, 0), (2040, 13), (0, 1), (9999, 1)])
    def test_a_month_that_does_not_exist_is_refused(self, connection: sa.Connection, year: int, month: int) -> None:
        """A wrong month is no month of zeros."""
        with pytest.raises(ValueError, match="is not a month"):
            report_month(connection, year, month)

    def test_a_large_ledger_does_not_overflow(self, scene: Scene, database: Database) -> None:
        """More than a bigint of credits is still a sum."""
        with clock_at(scene.worker, day("10-02")), scene.product.begin() as connection:
            grants = [Grant(f"{n}", "acme", 2**53 - 1, LotClass.PURCHASED) for n in range(1_000)]
            grant_lots(connection, grants)
            grant_lots(connection, [Grant(f"more {n}", "acme", 2**53 - 1, LotClass.PURCHASED) for n in range(100)])

        assert the_month(database, 10, now=YEAR_END).total.closing == 1_100 * (2**53 - 1)
        assert the_liability(database, day("10-31"), now=YEAR_END).total.spendable == 1_100 * (2**53 - 1)


class TestWhatDoesNotTie:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("UPDATE kino.transfer SET kind = 'void' WHERE kind = 'hold'", "class promotional"),
            ("UPDATE kino.transfer SET to_book = 'voided' WHERE kind = 'grant' AND reason = 'purchased'", "purchased"),
            ("UPDATE kino.transfer SET kind = 'gift' WHERE kind = 'grant' AND reason = 'lifetime'", "class lifetime"),
            (INTO_ANOTHER_CLASS, "class promotional"),
            ("DELETE FROM kino.credit_lot WHERE class = 'lifetime'", "a lot that does not exist"),
            ("DELETE FROM kino.transfer WHERE kind = 'grant'", "class promotional cannot be: book wallet is -52"),
        ],
    )  # fmt: skip
    def test_a_month_that_does_not_tie_is_not_shown(
        self, scene: Scene, database: Database, change: str, named: str
    ) -> None:
        """The identity is checked before a figure is returned, and the error names the class."""
        october(scene)
        scene.as_superuser(
            "ALTER TABLE kino.transfer DROP CONSTRAINT transfer_check", "SET session_replication_role = replica", change
        )

        with pytest.raises(LedgerInconsistent, match=named):
            the_month(database, 10, now=YEAR_END)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ("DELETE FROM kino.credit_lot WHERE class = 'lifetime'", "a lot that does not exist"),
            ("DELETE FROM kino.transfer WHERE kind = 'grant' AND reason = 'promotional'", "class promotional had -"),
            ("DELETE FROM kino.transfer WHERE kind = 'hold'", "class promotional cannot be: book held is -"),
            (INTO_ANOTHER_CLASS, "class promotional do not tie"),
        ],
    )  # fmt: skip
    def test_a_liability_that_does_not_tie_is_not_shown(
        self, scene: Scene, database: Database, change: str, named: str
    ) -> None:
        """The lots' credits are the wallets', class by class, or there is no report."""
        october(scene)
        scene.as_superuser("SET session_replication_role = replica", change)

        with pytest.raises(LedgerInconsistent, match=named):
            the_liability(database, day("10-31"), now=YEAR_END)


class TestLiability:
    @pytest.mark.usefixtures("quarter")
    def test_what_can_be_spent_stands_by_class_and_month_of_expiry(self, database: Database) -> None:
        """Credits that expire, that never do, that a running job holds, and that were swept too late, each apart."""
        before = the_liability(database, day("10-31"), now=YEAR_END)
        expired = the_liability(database, day("11-15"), now=YEAR_END)

        assert before.at == day("10-31")
        assert before.expiring == (
            Expiring(lot_class=LotClass.PROMOTIONAL, expires="2040-11", credits=8),
            Expiring(lot_class=LotClass.PURCHASED, expires="2040-12", credits=87),
            Expiring(lot_class=LotClass.LIFETIME, expires="never", credits=30),
        )
        assert dict(before.classes) == {
            LotClass.PROMOTIONAL: LiabilityLine(spendable=8, frozen=0, expired=0, held=32),
            LotClass.COURTESY: NOTHING,
            LotClass.SUBSCRIPTION: NOTHING,
            LotClass.PURCHASED: LiabilityLine(spendable=87, frozen=0, expired=0, held=13),
            LotClass.LIFETIME: LiabilityLine(spendable=30, frozen=0, expired=0, held=0),
        }
        assert before.total == LiabilityLine(spendable=125, frozen=0, expired=0, held=45)
        assert expired.classes[LotClass.PROMOTIONAL] == LiabilityLine(spendable=52, frozen=0, expired=8, held=0)

    @pytest.mark.usefixtures("quarter")
    def test_frozen_credits_stand_apart_then_and_later(self, database: Database) -> None:
        """A lot counts by the state that it had then, whatever it has now."""
        held = the_liability(database, day("12-20"), now=YEAR_END).classes[LotClass.PURCHASED]
        before = the_liability(database, day("12-05"), now=YEAR_END).classes[LotClass.PURCHASED]
        voided = the_liability(database, day("11-22"), now=YEAR_END).classes[LotClass.PURCHASED]

        assert (held.frozen, held.spendable) == (95, 0)
        assert (before.frozen, before.spendable) == (0, 95)
        assert voided == NOTHING

    @pytest.mark.usefixtures("quarter")
    def test_every_instant_of_a_quarter_ties_with_its_month(self, database: Database) -> None:
        """At the end of a month the liability is what the month closed with."""
        for month, end in ((10, day("11-01")), (11, day("12-01")), (12, datetime(2041, 1, 1, tzinfo=UTC))):
            closed = the_month(database, month, now=YEAR_END)
            owed = the_liability(database, end - TICK, now=YEAR_END)
            for lot_class, line in owed.classes.items():
                of_month = closed.classes[lot_class]
                assert (line.spendable + line.frozen + line.expired, line.held) == (
                    of_month.closing_wallet,
                    of_month.closing_held,
                )

    def test_the_newest_instant_is_given_where_none_is_asked_for(self, scene: Scene, database: Database) -> None:
        """It is the present, or where a transaction is open the newest sample below it."""
        october(scene)
        now = the_liability(database, None, now=day("10-31"))
        sample_at(scene.worker, day("10-31 01:00"))
        with scene.product.connect() as slow:
            slow.exec_driver_sql("SELECT kino.this_transaction()")
            sampled = the_liability(database, None, now=day("10-31 02:00"))
            with pytest.raises(InstantNotFinal, match="ask for that instant or an earlier one"):
                the_liability(database, day("10-31 01:30"), now=day("10-31 02:00"))

        assert (now.at, now.total.spendable) == (day("10-31"), 125)
        assert sampled.at == day("10-31 01:00")

    def test_without_any_final_instant_there_is_no_report(self, scene: Scene, database: Database) -> None:
        """A ledger without a sample whose sessions never rest has no instant to answer for."""
        with scene.product.connect() as slow:
            slow.exec_driver_sql("SELECT kino.this_transaction()")
            with pytest.raises(InstantNotFinal, match="no instant is final yet"):
                the_liability(database, None, now=day("10-31"))

    def test_an_instant_needs_an_offset(self, connection: sa.Connection) -> None:
        """A local time is not guessed."""
        with pytest.raises(ValueError, match="must carry an offset"):
            report_liability(connection, at=datetime(2040, 1, 1))  # noqa: DTZ001 - the mistake

    def test_an_expiry_belongs_to_its_month_in_utc(self, scene: Scene, database: Database) -> None:
        """An instant in another zone's next month is in this one here."""
        end = datetime(2041, 1, 1, tzinfo=UTC)
        with clock_at(scene.worker, day("10-02")):
            scene.grant("acme", 1, reference="before", expires_at=end - timedelta(microseconds=1))
            scene.grant("acme", 2, reference="at", expires_at=end)
            scene.grant("acme", 4, reference="far", expires_at=datetime(9998, 12, 31, tzinfo=UTC))

        report = the_liability(database, day("10-03"), now=YEAR_END)

        assert [(each.expires, each.credits) for each in report.expiring] == [
            ("2040-12", 1),
            ("2041-01", 2),
            ("9998-12", 4),
        ]


@pytest.mark.parametrize("role", ["kino_read", "kino_oncall", "kino_worker"])
def test_who_may_read_the_ledger_may_have_its_reports(scene: Scene, database: Database, role: str) -> None:
    """A report needs no right but to read."""
    october(scene)

    assert the_month(database, 10, now=YEAR_END, role=role).total.closing == 170
    assert the_liability(database, day("10-31"), now=YEAR_END, role=role).total.held == 45
