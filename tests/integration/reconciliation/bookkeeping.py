"""A quarter in the books of one account: what happens in October, November and December 2040, and the months again."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from kino_refunds.db.engine import create_engine
from kino_refunds.ledger import AccountStatus, LotClass, hold_purchase, unvoid_purchase
from kino_refunds.reconciliation.reports import LiabilityReport, MonthReport, report_liability, report_month
from tests.clock import clock_at, expire_lots
from tests.conftest import Database
from tests.ledger_acts import DISPUTE, PAYOUT, void
from tests.scenario import Scene, make_event


def day(text: str) -> datetime:
    """An instant in 2040, such as `10-31` or `11-02 08:00`."""
    return datetime.fromisoformat(f"2040-{text}").replace(tzinfo=UTC)


def october(scene: Scene) -> None:
    """Four lots; one job is captured, one refunded, and one still runs when the month ends."""
    with clock_at(scene.worker, day("10-02")):
        scene.grant("acme", 60, reference="gift", lot_class=LotClass.PROMOTIONAL, expires_at=day("11-15"))
        scene.grant("acme", 100, reference="bought", purchase_id="p-1", expires_at=day("12-31"))
        scene.grant("acme", 30, reference="for good", lot_class=LotClass.LIFETIME)
        for job_id, credits in (("a", 20), ("c", 8), ("b", 45)):
            scene.open(job_id, "acme", credits)
    with clock_at(scene.worker, day("10-03")):
        scene.grant("acme", 9, reference="short", lot_class=LotClass.COURTESY, expires_at=day("10-09"))
        scene.settle(
            make_event("completed", "a", at=day("10-03")), make_event("timeout", "c", at=day("10-03")), now=None
        )
    with scene.worker.begin() as connection:
        expire_lots(connection, now=day("10-20"))


def november(scene: Scene, database: Database) -> None:
    """The running job is refunded, the capture corrected, a gift expires, and a purchase is voided and comes back."""
    (charge,) = scene.rows("SELECT charge_id FROM kino.charge WHERE job_id = 'a'")
    with clock_at(scene.worker, day("11-10")):
        scene.settle(make_event("failed platform", "b", at=day("11-10")), now=None)
        scene.correct(charge)
    with scene.worker.begin() as connection:
        expire_lots(connection, now=day("11-18"))
    owner = create_engine(database.url("kino_owner"), pooled=False)
    with clock_at(scene.worker, day("11-20")), owner.begin() as connection:
        void(connection, "p-1")
    with clock_at(scene.worker, day("11-25")), owner.begin() as connection:
        unvoid_purchase(connection, "p-1", **PAYOUT)


def december(scene: Scene, database: Database) -> None:
    """A purchase is frozen, jobs run, the account is suspended, and everything that can expire does."""
    with clock_at(scene.worker, day("12-01")):
        scene.open("d", "acme", 5)
        scene.settle(make_event("completed", "d", at=day("12-01")), now=None)
        scene.set_status("acme", AccountStatus.SUSPENDED, "late payment")
    owner = create_engine(database.url("kino_owner"), pooled=False)
    with clock_at(scene.worker, day("12-10")), owner.begin() as connection:
        hold_purchase(connection, "p-1", **DISPUTE)
    with scene.worker.begin() as connection:
        expire_lots(connection, now=day("12-31"))


def the_month(database: Database, month: int, *, now: datetime, role: str = "kino_read") -> MonthReport:
    """Ask for a month of 2040 at an instant, as a login that may only read."""
    with database.connect(role) as connection, clock_at(connection, now):
        return report_month(connection, 2040, month)


def the_liability(
    database: Database, at: datetime | None, *, now: datetime, role: str = "kino_read"
) -> LiabilityReport:
    with database.connect(role) as connection, clock_at(connection, now):
        return report_liability(connection, at=at)


def counted_again(scene: Scene, month: int) -> dict[str, dict[str, int]]:
    """Count a month again, transfer by transfer, in the words of a report, without its zeros."""
    since, until = day(f"{month:02}-01"), (day(f"{month:02}-28") + timedelta(days=4)).replace(day=1)
    words = {"grant": "granted", "hold": "held", "capture": "captured", "refund": "refunded", "reversal": "reversed",
             "expire": "expired", "void": "voided", "unvoid": "unvoided"}  # fmt: skip
    figures: dict[str, Counter[str]] = {}
    for row in scene.rows(
        "SELECT l.class, t.* FROM kino.transfer t JOIN kino.credit_lot l USING (lot_id) ORDER BY transfer_id"
    ):
        of = figures.setdefault(row[0], Counter())
        for book, credits in ((row.to_book, row.credits), (row.from_book, -row.credits)):
            for when, end in (("opening", since), ("closing", until)):
                if book in {"wallet", "held"} and row.created_at < end:
                    of[f"{when}_{book}"] += credits
                    of[when] += credits
        if since <= row.created_at < until:
            of[words[row.kind]] += row.credits
    return {name: {figure: n for figure, n in of.items() if n} for name, of in figures.items() if any(of.values())}


def without_zeros(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The classes of a report as `counted_again` writes them."""
    return {
        name: some for name, line in report["classes"].items() if (some := {each: n for each, n in line.items() if n})
    }
