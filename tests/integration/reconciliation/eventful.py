"""A ledger in which every kind of act has happened once, in the order of their times, and that is in order."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.ledger import (
    AccountStatus,
    CauseKind,
    Charge,
    ChargeRequest,
    LotClass,
    expire_lots,
    hold_purchase,
    open_charges,
    release_purchase,
    unvoid_purchase,
    void_purchase,
)
from kino_refunds.reconciliation.verified import sample_clock
from tests.clock import DAY, HOUR, MINUTE, clock_at
from tests.conftest import Database
from tests.scenario import NOW, Scene, make_event

LINE = 4
"""After so many lots the line of successors ends, 30 days after the first expired."""

BEGINNING = NOW - 100 * DAY
DISPUTE: dict[str, Any] = {"cause_kind": CauseKind.DISPUTE, "cause_id": "dp-1", "actor": "ops"}
PAYOUT: dict[str, Any] = {"cause_kind": CauseKind.PAYOUT, "cause_id": "po-1", "actor": "ops"}


class Eventful:
    """Acts at a number of days after the beginning, done in the order of their times."""

    def __init__(self, database: Database, scene: Scene) -> None:
        self.scene = scene
        self._owner = create_engine(database.url("kino_owner"), pooled=False)
        self._charges: dict[str, Charge] = {}
        self._acts: list[tuple[float, Callable[[datetime], object]]] = []

    def run(self) -> None:
        """Act for a hundred days."""
        self._grants()
        self._successors()
        self._causes()
        self._endings()
        self._statuses()
        for days, act in sorted(self._acts, key=itemgetter(0)):
            now = BEGINNING + timedelta(days=days)
            with clock_at(self.scene.worker, now):
                act(now)

    # What can happen at an instant.

    def _at(self, days: float, act: Callable[[datetime], object]) -> None:
        self._acts.append((days, act))

    def _grant(self, account_id: str, lot_class: LotClass, credits: int, **terms: Any) -> None:
        lives = terms.pop("lives", None)

        def act(now: datetime) -> None:
            expires_at = None if lives is None else now + lives * DAY
            named = {"reference": f"{lot_class} of {account_id}", "expires_at": expires_at}
            self.scene.grant(account_id, credits, lot_class=lot_class, **named | terms)

        self._at(1, act)

    def _open(self, days: float, job_id: str, account_id: str, credits: int = 10) -> None:
        def act(now: datetime) -> None:
            with self.scene.product.begin() as connection:
                request = ChargeRequest(job_id, account_id, credits, now + HOUR)
                (self._charges[job_id],) = open_charges(connection, [request])

        self._at(days, act)

    def _end(self, days: float, job_id: str, *kinds: str) -> None:
        """Settle an event a kind, one after the other; each happened a minute before."""

        def act(now: datetime) -> None:
            for kind in kinds:
                self.scene.settle(make_event(kind, job_id, at=now - MINUTE), now=now)

        self._at(days, act)

    def _expire(self, days: float) -> None:
        def act(_: datetime) -> None:
            with self.scene.worker.begin() as connection:
                expire_lots(connection)

        self._at(days, act)

    def _purchase(self, days: float, change: Callable[..., object], order_id: str, **cause: Any) -> None:
        def act(_: datetime) -> None:
            with self._owner.begin() as connection:
                change(connection, order_id, **cause)

        self._at(days, act)

    def _status(self, days: float, account_id: str, status: AccountStatus, **reason: str) -> None:
        self._at(days, lambda _: self.scene.set_status(account_id, status, **reason))

    def _sample(self, days: float) -> None:
        def act(_: datetime) -> None:
            with self.scene.worker.begin() as connection:
                sample_clock(connection)

        self._at(days, act)

    # What happened.

    def _grants(self) -> None:
        self._sample(0)
        for nth, lot_class in enumerate(LotClass):
            self._grant("ada", lot_class, 20 + nth, priority=10 * nth + 10)
        self._grant("zoe", LotClass.PROMOTIONAL, 30, lives=3)
        self._expire(5)
        self._grant("pia", LotClass.PROMOTIONAL, 30, lives=10)
        self._grant("bob", LotClass.PURCHASED, 100, lives=90, purchase_id="p-2", reference="pack of bob")
        self._grant("bob", LotClass.PURCHASED, 50, reference="another pack of bob")
        self._grant("cyd", LotClass.PURCHASED, 100, purchase_id="p-3")
        self._grant("dan", LotClass.PURCHASED, 100, purchase_id="p-4")
        self._grant("fay", LotClass.SUBSCRIPTION, 100, purchase_id="p-5")
        self._grant("eve", LotClass.LIFETIME, 100)
        self._grant("sam", LotClass.COURTESY, 100)
        self._sample(99)
        self._at(100, self._relay)

    def _relay(self, _: datetime) -> None:
        with self.scene.worker.begin() as connection:
            connection.execute(sa.text("INSERT INTO kino.relay_cursor (xid, charge_id) VALUES (kino.horizon(), 0)"))

    def _successors(self) -> None:
        """A line of successors until its end: what fails after that goes back into its lot and expires there."""
        self._open(9, "pia 1", "pia", 10)
        self._expire(11.5)
        for nth, (failed, opened) in enumerate(((12, 18), (25, 31), (38, 40.4), (40.5, 41.1)), start=1):
            self._end(failed, f"pia {nth}", "failed platform")
            self._open(opened, f"pia {nth + 1}", "pia", 7 if nth == LINE else 10)
        self._expire(41.6)
        self._end(42, "pia 5", "timeout")

    def _causes(self) -> None:
        for name in ("bob", "cyd", "dan"):
            self._open(20, f"{name} 1", name)
        self._purchase(21, hold_purchase, "p-2", **DISPUTE)
        self._end(22, "bob 1", "failed provider")
        self._purchase(23, release_purchase, "p-2", **DISPUTE)
        self._purchase(21, void_purchase, "p-3", **PAYOUT)
        self._end(22, "cyd 1", "safety before")
        self._purchase(21, void_purchase, "p-4", **DISPUTE)
        self._end(22, "dan 1", "timeout")
        self._purchase(24, unvoid_purchase, "p-4", **DISPUTE)
        self._purchase(25, hold_purchase, "p-5", **PAYOUT)

    def _endings(self) -> None:
        """A job for each way to end, one that nothing ended, and one that cost nothing."""
        for job_id, kinds in {
            "captured": ("completed",),
            "spanning": ("completed",),
            "not covered": ("failed user",),
            "late result": ("timeout with result",),
            "rejected": ("safety during",),
            "refunded": ("failed platform", "timeout"),
            "contradicted": ("completed", "failed platform"),
            "again": ("timeout", "completed"),
            "twice": ("completed", "failed user"),
            "wrongly": ("completed", "timeout"),
        }.items():
            self._open(50, job_id, "ada", 25 if job_id == "spanning" else 2)
            self._end(51, job_id, *kinds)
        self._open(50, "free", "ada", 0)
        self._end(51, "free", "completed")
        self._at(52, lambda _: self.scene.correct(self._charges["wrongly"]))
        self._end(53, "wrongly", "safety before")
        self._open(99, "open", "ada", 30)
        self._open(99, "free and open", "ada", 0)

    def _statuses(self) -> None:
        self._open(60, "eve 1", "eve")
        self._status(61, "eve", AccountStatus.TERMINATED)
        self._end(62, "eve 1", "failed platform")
        self._open(60, "sam 1", "sam")
        self._status(61, "sam", AccountStatus.SUSPENDED, reason="asked for")
        self._end(62, "sam 1", "failed platform")
        self._status(63, "sam", AccountStatus.ACTIVE, reason="came back")
