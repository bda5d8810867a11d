"""The ledger against a model of it: whatever happens to an account, in whatever order, credits are conserved."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from kino_refunds.errors import InsufficientCredits
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
    hold_purchase,
    open_charges,
    release_purchase,
    reverse_charges,
    settle_charges,
    statement,
    unvoid_purchase,
    void_purchase,
)
from kino_refunds.reconciliation.integrity import violations
from tests.clock import DAY, SECOND, clock_at
from tests.conftest import Database
from tests.ledger_acts import WITHOUT, balance_at, settlement

NOW = datetime.now(UTC)
GRACE = 7 * DAY
NEVER = datetime.max.replace(tzinfo=UTC)
CLASSES = ["promotional", "courtesy", "subscription", "purchased", "lifetime"]
CAUSES = st.sampled_from([(CauseKind.DISPUTE, "dp-1"), (CauseKind.DISPUTE, "dp-2"), (CauseKind.PAYOUT, "po-1")])
Cause = tuple[CauseKind, str]

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
    root_expires_at: datetime | None = None
    state: str = "active"

    def burns_at(self) -> tuple[int, datetime, int, int]:
        """Lots are made one after the other, so their ids stand for their age."""
        return (self.priority, self.expires_at or NEVER, CLASSES.index(self.lot_class), self.lot_id)

    def living(self, now: datetime) -> bool:
        return self.expires_at is None or self.expires_at > now


@dataclass
class Fate:
    """Why a lot is what it is: open causes, what it was before the first of them, what each void took."""

    holds: set[Cause] = field(default_factory=set)
    voids: list[Cause] = field(default_factory=list)
    taken: tuple[str, datetime] = ("active", NOW)
    voided: dict[Cause, int] = field(default_factory=dict)


@dataclass
class Model:
    """One account: its lots, what its open charges hold, and where all other credits went."""

    lots: dict[int, ModelLot] = field(default_factory=dict)
    fates: dict[int, Fate] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    captured: dict[str, Charge] = field(default_factory=dict)
    expired: int = 0

    def add(self, lot: ModelLot) -> None:
        self.lots[lot.lot_id], self.fates[lot.lot_id] = lot, Fate()

    def draw(self, credits: int, now: datetime) -> list[tuple[int, int]]:
        lines = []
        for lot in sorted(self.lots.values(), key=ModelLot.burns_at):
            taken = min(lot.remaining, credits) if lot.state == "active" and lot.living(now) else 0
            if taken:
                lot.remaining -= taken
                credits -= taken
                lines.append((lot.lot_id, taken))
        return lines

    def spendable(self, now: datetime) -> int:
        return sum(lot.remaining for lot in self.lots.values() if lot.state == "active" and lot.living(now))

    def in_the_wallet(self, now: datetime) -> int:
        """What a past balance shows: a freeze is not seen in it."""
        return sum(lot.remaining for lot in self.lots.values() if lot.living(now))

    def held(self) -> int:
        return sum(charge.credits for charge in self.charges.values())

    def voided(self) -> int:
        return sum(credits for fate in self.fates.values() for credits in fate.voided.values())

    def of_purchase(self, purchase_id: str) -> list[ModelLot]:
        return [lot for lot in self.lots.values() if lot.purchase_id == purchase_id]

    def expire_due(self, lots: list[ModelLot], now: datetime) -> None:
        for lot in lots:
            if lot.state == "active" and not lot.living(now):
                self.expired += lot.remaining
                lot.remaining, lot.state = 0, "expired"

    def place(self, lot: ModelLot, now: datetime) -> None:
        """Give a lot the state that its causes leave it."""
        fate = self.fates[lot.lot_id]
        before = lot.state
        if fate.voids or fate.holds:
            lot.state = "voided" if fate.voids else "frozen"
            if before in {"active", "expired"}:
                fate.taken = (before, now)
        elif before in {"frozen", "voided"}:
            was, since = fate.taken
            if was == "expired" and lot.remaining == 0:
                lot.state = "expired"
                return
            lot.state = "active"
            if lot.expires_at is not None:
                lot.expires_at = max(lot.expires_at, now + GRACE, now + (lot.expires_at - since))

    def void_rest(self, lot: ModelLot, cause: Cause) -> int:
        voided = self.fates[lot.lot_id].voided
        voided[cause] = voided.get(cause, 0) + lot.remaining
        taken, lot.remaining = lot.remaining, 0
        return taken

    def give_back(self, charge: Charge, now: datetime, *, reversal: bool) -> dict[int, tuple[int, datetime]]:
        """Return credits by their lots' fates; what needs a successor, with its expiry, is left to the caller."""
        onward: dict[int, tuple[int, datetime]] = {}
        for lot_id, credits in charge.lines:
            lot, fate = self.lots[lot_id], self.fates[lot_id]
            lives = lot.expires_at is None or lot.expires_at > now + (GRACE if lot.successor_of is None else DAY)
            end = None if lot.root_expires_at is None else lot.root_expires_at + 30 * DAY
            if lot.state == "voided":
                fate.voided[fate.voids[-1]] = fate.voided.get(fate.voids[-1], 0) + credits
            elif lot.state == "frozen" or (lot.state == "active" and lives):
                lot.remaining += credits
            elif end is None or reversal or charge.opened_at < end:
                until = now + GRACE if end is None else max(min(now + GRACE, end), now + DAY)
                onward[lot_id] = (onward.get(lot_id, (0, until))[0] + credits, until)
            elif lot.state == "active" and lot.living(now):
                lot.remaining += credits
            else:
                self.expired += credits
        return onward


class Account(RuleBasedStateMachine):
    """One account of its own for each example, in a database that all examples share."""

    product: sa.Connection
    keeper: sa.Connection
    """As kino_owner, which may call every function."""

    @initialize()
    def begin(self) -> None:
        self.account_id = f"account-{next(_examples)}"
        self.model = Model()
        self.names = count()
        self.now = NOW
        self.told: dict[datetime, Balance] = {}
        self.clock = ExitStack()
        self.tick()

    def tick(self, by: timedelta = SECOND) -> None:
        """No two steps share an instant, so that a past balance is that of a step."""
        self.now += by
        self.clock.close()
        self.clock.enter_context(clock_at(self.keeper, self.now))

    def name(self, kind: str) -> str:
        return f"{self.account_id}-{kind}-{next(self.names)}"

    def purchase(self, number: int) -> str:
        return f"{self.account_id}-purchase-{number}"

    @rule(
        credits=st.integers(1, 20),
        lot_class=st.sampled_from(CLASSES),
        priority=st.integers(1, 2),
        days=st.sampled_from([None, 1, 3, 8, 30]),
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

        self.model.add(ModelLot(lots[0].lot_id, lot_class, credits, credits, priority, expires_at, purchase_id))

    @precondition(lambda self: self.model.lots)
    @rule(credits=st.lists(st.integers(0, 15), min_size=1, max_size=3))
    def open(self, credits: list[int]) -> None:
        requests = [ChargeRequest(self.name("job"), self.account_id, wanted, NOW) for wanted in credits]

        if sum(credits) > self.model.spendable(self.now):
            try:
                open_charges(self.product, requests)
            except InsufficientCredits:
                self.product.commit()  # and nothing of the batch is in it: the invariants see to that
                return
            raise AssertionError("a batch was opened that the account cannot pay")
        opened = open_charges(self.product, requests)
        assert open_charges(self.product, requests) == opened
        self.product.commit()

        assert [charge.lines for charge in opened] == [self.model.draw(wanted, self.now) for wanted in credits]
        self.model.charges |= {charge.job_id: charge for charge in opened}

    def end(self, jobs: set[str], kind: str) -> list[Charge]:
        charges = [self.model.charges.pop(job_id) for job_id in sorted(jobs)]
        settle_charges(self.keeper, [settlement(charge, kind, at=self.now) for charge in charges])
        self.keeper.commit()
        return charges

    def take_back(self, charges: list[Charge], *, reversal: bool) -> None:
        """Let the model give back what these charges took, and learn which successors the ledger has opened for it."""
        onward: dict[int, tuple[int, datetime]] = {}
        for charge in charges:
            for lot_id, (credits, until) in self.model.give_back(charge, self.now, reversal=reversal).items():
                onward[lot_id] = (onward.get(lot_id, (0, until))[0] + credits, until)
        for row in self.rows():
            if row.lot_id in self.model.lots:
                continue
            old = self.model.lots[row.successor_of]
            credits, until = onward.pop(row.successor_of)
            root = old.expires_at if old.successor_of is None else old.root_expires_at
            self.model.add(
                ModelLot(
                    row.lot_id,
                    old.lot_class,
                    credits,
                    credits,
                    old.priority,
                    until,
                    old.purchase_id,
                    old.lot_id,
                    root,
                )
            )
        assert onward == {}

    @precondition(lambda self: self.model.charges)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        jobs = data.draw(st.sets(st.sampled_from(sorted(self.model.charges)), min_size=1))

        self.take_back(self.end(jobs, "refunded"), reversal=False)

    @precondition(lambda self: self.model.charges)
    @rule(data=st.data())
    def capture(self, data: st.DataObject) -> None:
        jobs = data.draw(st.sets(st.sampled_from(sorted(self.model.charges)), min_size=1))

        self.model.captured |= {charge.job_id: charge for charge in self.end(jobs, "captured")}

    @precondition(lambda self: self.model.captured)
    @rule(data=st.data())
    def reverse(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.model.captured)))
        charge = self.model.captured.pop(job_id)
        reversal = Reversal(charge.charge_id, "timeout", "2.timeout", "v", "ticket-1", "ops")

        for _ in range(2):
            reverse_charges(self.keeper, [reversal])
        self.keeper.commit()

        self.take_back([charge], reversal=True)

    @rule(hours=st.sampled_from([6, 24, 72, 200]))
    def let_time_pass(self, hours: int) -> None:
        self.tick(timedelta(hours=hours))

    @rule()
    def expire(self) -> None:
        while expire_lots(self.keeper, limit=3):
            pass
        self.keeper.commit()

        self.model.expire_due(list(self.model.lots.values()), self.now)

    @rule(purchase=st.integers(1, 2), cause=CAUSES)
    def hold(self, purchase: int, cause: Cause) -> None:
        purchase_id = self.purchase(purchase)

        held = hold_purchase(self.keeper, purchase_id, cause_kind=cause[0], cause_id=cause[1], actor="ops")
        self.keeper.commit()

        lots = self.model.of_purchase(purchase_id)
        self.model.expire_due(lots, self.now)
        assert held == sorted(lot.lot_id for lot in lots if lot.state in {"active", "expired"})
        for lot in lots:
            self.model.fates[lot.lot_id].holds.add(cause)
            self.model.place(lot, self.now)

    @rule(purchase=st.integers(1, 2), cause=CAUSES)
    def release(self, purchase: int, cause: Cause) -> None:
        purchase_id = self.purchase(purchase)

        released = release_purchase(self.keeper, purchase_id, cause_kind=cause[0], cause_id=cause[1], actor="ops")
        self.keeper.commit()

        lots = self.model.of_purchase(purchase_id)
        frozen = [lot for lot in lots if lot.state == "frozen"]
        for lot in lots:
            self.model.fates[lot.lot_id].holds.discard(cause)
            self.model.place(lot, self.now)
        assert released == sorted(lot.lot_id for lot in frozen if lot.state != "frozen")

    @rule(purchase=st.integers(1, 2), cause=CAUSES)
    def void(self, purchase: int, cause: Cause) -> None:
        purchase_id = self.purchase(purchase)

        taken = void_purchase(self.keeper, purchase_id, cause_kind=cause[0], cause_id=cause[1], actor="ops")
        self.keeper.commit()

        lots = self.model.of_purchase(purchase_id)
        self.model.expire_due(lots, self.now)
        assert taken == sum(self.model.void_rest(lot, cause) for lot in lots)
        for lot in lots:
            if cause not in self.model.fates[lot.lot_id].voids:
                self.model.fates[lot.lot_id].voids.append(cause)
            self.model.place(lot, self.now)

    @rule(purchase=st.integers(1, 2), cause=CAUSES)
    def unvoid(self, purchase: int, cause: Cause) -> None:
        purchase_id = self.purchase(purchase)

        returned = unvoid_purchase(self.keeper, purchase_id, cause_kind=cause[0], cause_id=cause[1], actor="ops")
        self.keeper.commit()

        back = 0
        for lot in self.model.of_purchase(purchase_id):
            fate = self.model.fates[lot.lot_id]
            if cause in fate.voids:
                fate.voids.remove(cause)
                back += fate.voided.get(cause, 0)
                lot.remaining += fate.voided.pop(cause, 0)
            self.model.place(lot, self.now)
            if lot.state == "voided" and lot.remaining:
                back -= self.model.void_rest(lot, fate.voids[-1])
        assert returned == back

    def rows(self) -> list[sa.Row[Any]]:
        rows = self.keeper.execute(
            sa.text(
                "SELECT lot_id, class AS lot_class, granted, remaining, priority, expires_at, purchase_id,"
                " successor_of, root_expires_at, state"
                " FROM kino.credit_lot WHERE account_id = :account_id ORDER BY lot_id"
            ),
            {"account_id": self.account_id},
        ).all()
        self.keeper.rollback()
        return list(rows)

    @invariant()
    def lots_are_what_the_promises_say(self) -> None:
        found = [dict(row._mapping) for row in self.rows()]

        assert found == [asdict(lot) for lot in self.model.lots.values()]

    @invariant()
    def balances_are_the_sum_of_the_transfers(self) -> None:
        model = self.model
        entries = self.keeper.execute(
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
            "consumed": sum(charge.credits for charge in model.captured.values()),
            "expired": model.expired,
            "voided": model.voided(),
        }

        assert {book: books.get(book, 0) for book in expected} == expected
        assert sum(books.values()) == 0
        assert balance(self.keeper, self.account_id) == Balance(model.spendable(self.now), model.held())
        lines = statement(self.keeper, self.account_id, limit=10_000)
        self.keeper.rollback()
        assert sum(line.credits for line in lines) == wallet

    @invariant()
    def what_is_past_is_told(self) -> None:
        """Keep what the balance of this instant is, for the end; the next step has an instant of its own."""
        self.told[self.now] = Balance(self.model.in_the_wallet(self.now), self.model.held())
        self.tick()

    def teardown(self) -> None:
        self.product.rollback()
        self.keeper.rollback()
        found = {at: balance_at(self.keeper, self.account_id, at) for at in self.told}
        self.clock.close()
        assert found == self.told
        assert violations(self.keeper, without=WITHOUT) == []
        self.keeper.rollback()


def test_an_account_is_what_the_promises_say_after_every_step(database: Database) -> None:
    """Credits are conserved, refunds return what was taken, causes undo themselves, and no past balance changes."""
    # An example that is being shrunk may think for longer than a worker may sit in a transaction.
    limits = SessionLimits(idle_in_transaction_timeout_ms=60_000, transaction_timeout_ms=60_000)
    engines = [create_engine(database.url(role), limits=limits) for role in ("kino_product", "kino_owner")]
    with engines[0].connect() as product, engines[1].connect() as keeper:

        class AccountHere(Account):
            pass

        AccountHere.product, AccountHere.keeper = product, keeper
        run_state_machine_as_test(
            AccountHere,
            settings=settings(
                max_examples=30,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=[
                    HealthCheck.too_slow,  # every step commits to a real disk
                ],
            ),
        )
    for engine in engines:
        engine.dispose()
