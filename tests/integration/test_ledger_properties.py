"""The ledger against a model of it: whatever happens to an account, in whatever order, credits are conserved."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.demo.promises import violations
from kino_refunds.errors import InsufficientCredits
from kino_refunds.ledger import (
    Balance,
    Charge,
    ChargeRequest,
    Ending,
    Grant,
    LotClass,
    balance,
    freeze_purchase,
    grant_lots,
    open_charges,
    statement,
    void_purchase,
)
from tests.clock import end_charges, expire_lots, unfreeze_purchase
from tests.conftest import Database

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
GRACE = 7 * DAY
NEVER = datetime.max.replace(tzinfo=UTC)
CLASSES = ["promotional", "courtesy", "subscription", "purchased", "lifetime"]

_examples = count()


@dataclass
class ModelLot:
    """A lot as the promises describe it, without a database."""

    lot_id: int
    lot_class: str
    granted: int
    remaining: int
    priority: int
    expires_at: datetime | None
    purchase_id: str | None
    successor_of: int | None = None
    state: str = "active"

    def burns_at(self) -> tuple[int, datetime, int, int]:
        """Lots are made one after the other, so their ids stand for their age."""
        return (self.priority, self.expires_at or NEVER, CLASSES.index(self.lot_class), self.lot_id)


@dataclass
class Model:
    """One account: its lots, what its open charges hold, and where all other credits went."""

    lots: dict[int, ModelLot] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    consumed: int = 0
    expired: int = 0
    voided: int = 0

    def draw(self, credits: int) -> list[tuple[int, int]]:
        lines = []
        for lot in sorted(self.lots.values(), key=ModelLot.burns_at):
            taken = min(lot.remaining, credits) if lot.state == "active" else 0
            if taken:
                lot.remaining -= taken
                credits -= taken
                lines.append((lot.lot_id, taken))
        return lines

    def spendable(self) -> int:
        return sum(lot.remaining for lot in self.lots.values() if lot.state == "active")

    def held(self) -> int:
        return sum(charge.credits for charge in self.charges.values())

    def of_purchase(self, purchase_id: str, *states: str) -> list[ModelLot]:
        return [lot for lot in self.lots.values() if lot.purchase_id == purchase_id and lot.state in states]

    def refund(self, charges: list[Charge], now: datetime) -> dict[int, int]:
        """Return credits by their lots' fates; what needs a successor, by lot, is left to the caller."""
        onward: dict[int, int] = {}
        for lot_id, credits in (line for charge in charges for line in charge.lines):
            lot = self.lots[lot_id]
            soon = lot.expires_at is not None and lot.expires_at <= now + GRACE
            if lot.state == "voided":
                self.voided += credits
            elif lot.state == "frozen" or (lot.state == "active" and not soon):
                lot.remaining += credits
            else:
                onward[lot_id] = onward.get(lot_id, 0) + credits
        return onward


class Account(RuleBasedStateMachine):
    """One account of its own for each example, in a database that all examples share."""

    product: sa.Connection
    worker: sa.Connection

    @initialize()
    def begin(self) -> None:
        self.account_id = f"account-{next(_examples)}"
        self.model = Model()
        self.names = count()
        self.now = NOW

    def name(self, kind: str) -> str:
        return f"{self.account_id}-{kind}-{next(self.names)}"

    def purchase(self, number: int) -> str:
        return f"{self.account_id}-purchase-{number}"

    @rule(
        credits=st.integers(1, 20),
        lot_class=st.sampled_from(CLASSES),
        priority=st.integers(1, 2),
        days=st.sampled_from([None, None, 3, 8, 30]),
        purchase=st.sampled_from([None, 1, 2]),
    )
    def grant(self, credits: int, lot_class: str, priority: int, days: int | None, purchase: int | None) -> None:
        expires_at = None if days is None else self.now + days * DAY
        purchase_id = None if purchase is None else self.purchase(purchase)
        grant = Grant(
            self.name("lot"), self.account_id, credits, LotClass(lot_class), expires_at, priority, purchase_id
        )

        lots = grant_lots(self.product, [grant, grant])
        assert grant_lots(self.product, [grant]) == lots[:1]
        self.product.commit()

        lot_id = lots[0].lot_id
        self.model.lots[lot_id] = ModelLot(lot_id, lot_class, credits, credits, priority, expires_at, purchase_id)

    @precondition(lambda self: self.model.lots)
    @rule(credits=st.lists(st.integers(0, 15), min_size=1, max_size=3))
    def open(self, credits: list[int]) -> None:
        requests = [ChargeRequest(self.name("job"), self.account_id, wanted, NOW) for wanted in credits]

        if sum(credits) > self.model.spendable():
            try:
                open_charges(self.product, requests)
            except InsufficientCredits:
                self.product.commit()  # and nothing of the batch is in it: the invariants see to that
                return
            raise AssertionError("a batch was opened that the account cannot pay")
        opened = open_charges(self.product, requests)
        assert open_charges(self.product, requests) == opened
        self.product.commit()

        assert [charge.lines for charge in opened] == [self.model.draw(wanted) for wanted in credits]
        self.model.charges |= {charge.job_id: charge for charge in opened}

    def end(self, jobs: set[str], *, refunded: bool) -> list[Charge]:
        charges = [self.model.charges.pop(job_id) for job_id in sorted(jobs)]
        kind, reason, clause = ("refunded", "timeout", "2.timeout") if refunded else ("captured", "completed", "1")
        for charge in charges:
            self.worker.execute(
                sa.text(
                    "INSERT INTO kino.settlement"
                    " (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)"
                    " VALUES (:charge_id, :kind, :reason, :clause, 'v', 's', :job_id, :now)"
                ),
                {
                    "charge_id": charge.charge_id,
                    "kind": kind,
                    "reason": reason,
                    "clause": clause,
                    "job_id": charge.job_id,
                    "now": self.now,
                },
            )
        endings = [Ending(c.charge_id, c.account_id, c.credits, c.lines, refunded, reason, self.now) for c in charges]
        end_charges(self.worker, endings, now=self.now, lot_grace=GRACE, actor="test")
        self.worker.commit()
        return charges

    @precondition(lambda self: self.model.charges)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        jobs = data.draw(st.sets(st.sampled_from(sorted(self.model.charges)), min_size=1))
        before = set(self.model.lots)

        charges = self.end(jobs, refunded=True)

        onward = self.model.refund(charges, self.now)
        for row in self.rows():
            if row.lot_id in before:
                continue
            old = self.model.lots[row.successor_of]
            credits = onward.pop(row.successor_of)
            self.model.lots[row.lot_id] = ModelLot(
                row.lot_id,
                old.lot_class,
                credits,
                credits,
                old.priority,
                self.now + GRACE,
                old.purchase_id,
                old.lot_id,
            )
        assert onward == {}

    @precondition(lambda self: self.model.charges)
    @rule(data=st.data())
    def capture(self, data: st.DataObject) -> None:
        jobs = data.draw(st.sets(st.sampled_from(sorted(self.model.charges)), min_size=1))

        charges = self.end(jobs, refunded=False)

        self.model.consumed += sum(charge.credits for charge in charges)

    @rule(days=st.integers(1, 9))
    def let_time_pass(self, days: int) -> None:
        """Time that the sweep and the settlement see; `open_charges` looks at the real clock, which stands."""
        self.now += days * DAY

    @rule()
    def expire(self) -> None:
        while expire_lots(self.worker, now=self.now, limit=3):
            pass
        self.worker.commit()

        for lot in self.model.lots.values():
            if lot.state == "active" and lot.expires_at is not None and lot.expires_at <= self.now:
                self.model.expired += lot.remaining
                lot.remaining, lot.state = 0, "expired"

    @rule(purchase=st.integers(1, 2))
    def freeze(self, purchase: int) -> None:
        purchase_id = self.purchase(purchase)

        frozen = freeze_purchase(self.worker, purchase_id)
        self.worker.commit()

        lots = self.model.of_purchase(purchase_id, "active", "expired")
        assert sorted(frozen) == sorted(lot.lot_id for lot in lots)
        for lot in lots:
            lot.state = "frozen"

    @rule(purchase=st.integers(1, 2))
    def unfreeze(self, purchase: int) -> None:
        purchase_id = self.purchase(purchase)

        thawed = unfreeze_purchase(self.worker, purchase_id, now=self.now, lot_grace=GRACE)
        self.worker.commit()

        lots = self.model.of_purchase(purchase_id, "frozen")
        assert sorted(thawed) == sorted(lot.lot_id for lot in lots)
        for lot in lots:
            lot.state = "active"
            if lot.expires_at is not None:
                lot.expires_at = max(lot.expires_at, self.now + GRACE)

    @rule(purchase=st.integers(1, 2))
    def void(self, purchase: int) -> None:
        purchase_id = self.purchase(purchase)

        taken = void_purchase(self.worker, purchase_id, reason="payout", actor="ops")
        self.worker.commit()

        lots = self.model.of_purchase(purchase_id, "active", "frozen", "expired")
        assert taken == sum(lot.remaining for lot in lots)
        self.model.voided += taken
        for lot in lots:
            lot.remaining, lot.state = 0, "voided"

    def rows(self) -> list[sa.Row[Any]]:
        rows = self.worker.execute(
            sa.text(
                "SELECT lot_id, class AS lot_class, granted, remaining, priority, expires_at, purchase_id,"
                " successor_of, state"
                " FROM kino.credit_lot WHERE account_id = :account_id ORDER BY lot_id"
            ),
            {"account_id": self.account_id},
        ).all()
        self.worker.rollback()
        return list(rows)

    @invariant()
    def lots_are_what_the_promises_say(self) -> None:
        found = [ModelLot(**row._mapping) for row in self.rows()]

        assert found == list(self.model.lots.values())

    @invariant()
    def balances_are_the_sum_of_the_transfers(self) -> None:
        model = self.model
        entries = self.worker.execute(
            sa.text("""
                SELECT book, CAST(sum(credits) AS bigint)
                FROM (SELECT to_book AS book, credits FROM kino.transfer WHERE account_id = :account_id
                      UNION ALL
                      SELECT from_book, -credits FROM kino.transfer WHERE account_id = :account_id) entries
                GROUP BY book
            """),
            {"account_id": self.account_id},
        )
        books: dict[str, int] = {row[0]: row[1] for row in entries}
        wallet = sum(lot.remaining for lot in model.lots.values())
        given = sum(lot.granted for lot in model.lots.values() if lot.successor_of is None)
        expected = {
            "issued": -given,
            "wallet": wallet,
            "held": model.held(),
            "consumed": model.consumed,
            "expired": model.expired,
            "voided": model.voided,
        }

        assert {book: books.get(book, 0) for book in expected} == expected
        assert sum(books.values()) == 0
        assert balance(self.worker, self.account_id) == Balance(model.spendable(), model.held())
        lines = statement(self.worker, self.account_id, limit=10_000)
        self.worker.rollback()
        assert sum(line.credits for line in lines) == wallet

    def teardown(self) -> None:
        self.product.rollback()
        self.worker.rollback()
        assert violations(self.worker) == []
        self.worker.rollback()


def test_an_account_is_what_the_promises_say_after_every_step(database: Database) -> None:
    """Lots conserve credits, balances equal the sum of transfers, books sum to zero, refunds return what was taken."""
    # An example that is being shrunk may think for longer than a worker may sit in a transaction.
    limits = SessionLimits(idle_in_transaction_timeout_ms=60_000, transaction_timeout_ms=60_000)
    engines = [create_engine(database.url(role), limits=limits) for role in ("kino_product", "kino_worker")]
    with engines[0].connect() as product, engines[1].connect() as worker:

        class AccountHere(Account):
            pass

        AccountHere.product, AccountHere.worker = product, worker
        run_state_machine_as_test(
            AccountHere,
            settings=settings(
                max_examples=30,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=[
                    HealthCheck.too_slow,  # every step commits to a real disk
                ],
            ),
        )
    for engine in engines:
        engine.dispose()
