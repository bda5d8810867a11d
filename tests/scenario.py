"""A job in a few words: builders for charges and events, and the ledger read back as plain values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.events.schema import (
    ErrorOrigin,
    Event,
    JobCompleted,
    JobFailed,
    JobSafetyRejected,
    JobTimedOut,
    SafetyStage,
)
from kino_refunds.ledger import (
    VIOLATION,
    AccountStatus,
    Balance,
    Charge,
    ChargeRequest,
    Grant,
    Lot,
    LotClass,
    Reversal,
    balance,
    grant_lots,
    open_charges,
    reverse_charges,
    set_account_status,
)
from kino_refunds.policy.document import Policy, published_policy
from kino_refunds.settlement.dead_letters import DeadLetter
from kino_refunds.settlement.decide import Busy, Ruling
from kino_refunds.settlement.deliveries import Delivery, delivery_of
from kino_refunds.settlement.retries import sweep_retries
from kino_refunds.settlement.rules import Rules
from tests.clock import clock_at, record_dead_letters, settle_at, settle_batch_at

if TYPE_CHECKING:
    from tests.conftest import Database

# The database's own clock opens the charges, so the tests' instants stand beside it.
NOW = datetime.now(UTC).replace(microsecond=0)
EVENT_AT = NOW - timedelta(minutes=1)
SOURCE = "/pipeline/eu-1"
LEASE = timedelta(minutes=1)
"""How long a retry sweep of a test may have events in hand."""
PATIENT = SessionLimits(
    lock_timeout_ms=60_000,
    statement_timeout_ms=60_000,
    idle_in_transaction_timeout_ms=60_000,
    transaction_timeout_ms=60_000,
)
"""For races: a session waits for as long as the test lets another one hold a lock."""

Data = dict[str, Any]
KINDS: dict[str, tuple[type[JobCompleted | JobFailed | JobTimedOut | JobSafetyRejected], Data]] = {
    "completed": (JobCompleted, {}),
    **{f"failed {origin}": (JobFailed, {"error": {"code": "E", "origin": origin}}) for origin in ErrorOrigin},
    "timeout": (JobTimedOut, {}),
    "timeout with result": (JobTimedOut, {"result_produced": True}),
    **{
        f"safety {stage.removesuffix('_generation')}": (JobSafetyRejected, {"category": "gore", "stage": stage})
        for stage in SafetyStage
    },
}
"""Every row of the design's table, section 5."""

REFUNDABLE = (
    "failed platform",
    "failed provider",
    "failed unknown",
    "timeout",
    "safety before",
    "safety during",
)
NOT_COVERED = ("failed user", "timeout with result", "safety after")


def make_event(
    kind: str,
    job_id: str = "job-1",
    *,
    event_id: str | None = None,
    at: datetime = EVENT_AT,
    source: str = SOURCE,
    account_id: str | None = None,
) -> Event:
    """Build an event of one of `KINDS`; its id says what it is unless one is given."""
    model, data = KINDS[kind]
    owner: Data = {} if account_id is None else {"account_id": account_id}
    # The constructor is one for all kinds; what it builds is one of them.
    built: Event = model.of(id=event_id or f"{job_id} {kind}", source=source, time=at, job_id=job_id, **data, **owner)
    return built


def make_rules(*, policy: Policy | None = None) -> Rules:
    return Rules(policy=policy or published_policy(), build="test")


def deliveries_of(events: Iterable[Event | Delivery]) -> list[Delivery]:
    return [each if isinstance(each, Delivery) else delivery_of(each) for each in events]


def words(rulings: Iterable[Ruling]) -> list[str]:
    """Just the outcomes, as they are written."""
    return [ruling.outcome.value for ruling in rulings]


class Settled(NamedTuple):
    kind: str
    reason: str
    clause: str
    event_id: str


class Moved(NamedTuple):
    """A transfer of a charge after its hold."""

    kind: str
    lot_id: int
    to_lot_id: int | None
    credits: int
    reason: str


@dataclass(frozen=True)
class Story:
    """All that the database says of one job; events by their ids."""

    settlement: Settled | None = None
    moved: list[Moved] = field(default_factory=list)
    inbox: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    dead_letters: dict[str, str] = field(default_factory=dict)


class Waits(NamedTuple):
    """A pending event: its job, why it waits, and how often it was tried again."""

    job_id: str
    outcome: str
    attempts: int


class Dead(NamedTuple):
    event_id: str
    job_id: str
    reason: str
    seen: int
    status: str


class Broken(NamedTuple):
    kind: str
    job_id: str
    credits: int
    seen: int
    status: str


@dataclass(frozen=True)
class Scene:
    """A database with its parties: the worker, the product that charges, a person on call, and a superuser."""

    worker: sa.Engine
    product: sa.Engine
    oncall: sa.Engine
    superuser: sa.Engine

    @classmethod
    @contextmanager
    def of(cls, database: Database, *, limits: SessionLimits | None = None) -> Iterator[Scene]:
        """Open a scene; `limits` are those of the worker's sessions."""
        engines = [
            create_engine(database.url("kino_worker"), limits=limits),
            create_engine(database.url("kino_product")),
            create_engine(database.url("kino_oncall")),
            create_engine(database.url("postgres"), limits=PATIENT),
        ]
        try:
            yield cls(*engines)
        finally:
            for engine in engines:
                engine.dispose()

    # Arrange.

    def grant(self, account_id: str = "acct-1", credits: int = 100, **terms: Any) -> Lot:
        """Give an account a purchased lot of its own."""
        grant = Grant(
            **{
                "reference": f"lot of {account_id}",
                "account_id": account_id,
                "credits": credits,
                "lot_class": LotClass.PURCHASED,
                **terms,
            }
        )
        with self.product.begin() as connection:
            return grant_lots(connection, [grant])[0]

    def open(self, job_id: str, account_id: str, credits: int = 10) -> Charge:
        """Charge an account that has credits."""
        request = ChargeRequest(job_id, account_id, credits, NOW + timedelta(hours=1))
        with self.product.begin() as connection:
            return open_charges(connection, [request])[0]

    def charged(self, job_id: str = "job-1", *, credits: int = 10, **terms: Any) -> Charge:
        """Charge a job to a new account (`acct of <job>`) whose only lot holds 100 credits."""
        self.grant(f"acct of {job_id}", 100, **terms)
        return self.open(job_id, f"acct of {job_id}", credits)

    def set_status(self, account_id: str, status: AccountStatus, reason: str = VIOLATION) -> None:
        with self.oncall.begin() as connection:
            set_account_status(connection, account_id, status, reason=reason, actor="test")

    def correct(self, charge: Charge) -> None:
        """Refund a captured charge later, by reversal, as repairing a break will do."""
        reversal = Reversal(charge.charge_id, "generation_failure", "2.failure", "2025-12-14", "ticket-1", "test")
        with self.oncall.begin() as connection:
            reverse_charges(connection, [reversal])

    def keep(self, *letters: DeadLetter, at: datetime = NOW) -> None:
        """Write dead letters as a worker does, at an instant."""
        with self.worker.begin() as connection:
            record_dead_letters(connection, letters, now=at, build="test")

    def as_superuser(self, *statements: str) -> None:
        """Change what no role that runs may change: to plant a fault."""
        with self.superuser.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    # Act.

    def settle(
        self,
        *events: Event | Delivery,
        now: datetime | None = NOW,
        rules: Rules | None = None,
        busy: Busy = Busy(),  # noqa: B008 - a value that cannot change
    ) -> list[str]:
        """Settle these events in one transaction, at `now` (None: as it is); returns their outcomes, in order."""
        with self.worker.connect() as connection:
            return words(settle_at(connection, deliveries_of(events), rules or make_rules(), now, busy=busy))

    def settle_batch(
        self,
        *events: Event | Delivery,
        now: datetime = NOW,
        rules: Rules | None = None,
    ) -> dict[str, str]:
        """Settle these events as intake does; returns outcomes by event id."""
        rulings = settle_batch_at(self.worker, deliveries_of(events), rules or make_rules(), now)
        return {ruling.delivery.event.id: ruling.outcome.value for ruling in rulings}

    def sweep(self, *, now: datetime | None = NOW, rules: Rules | None = None, limit: int = 500) -> dict[str, int]:
        """Try due events again as the worker's sweep does; returns how many came to each outcome."""
        with clock_at(self.worker, now):
            swept = sweep_retries(self.worker, rules or make_rules(), lease=LEASE, limit=limit)
        return dict(swept.outcomes)

    # Assert.

    def rows(self, query: str, **parameters: Any) -> list[Any]:
        """Read as the superuser: the lock time-outs of the worker must not colour what is seen."""
        with self.superuser.begin() as connection:
            return list(connection.execute(sa.text(query), parameters))

    def balance(self, account_id: str) -> Balance:
        with self.superuser.begin() as connection:
            return balance(connection, account_id)

    def story(self, job_id: str = "job-1") -> Story:
        """Read all that the database says of one job."""
        settlements = self.rows(
            "SELECT s.kind, s.reason, s.clause, s.event_id FROM kino.settlement s"
            " JOIN kino.charge c USING (charge_id) WHERE c.job_id = :job_id",
            job_id=job_id,
        )
        moved = self.rows(
            "SELECT t.kind, t.lot_id, t.to_lot_id, t.credits, t.reason FROM kino.transfer t"
            " JOIN kino.charge c USING (charge_id) WHERE c.job_id = :job_id AND t.kind <> 'hold'"
            " ORDER BY t.transfer_id",
            job_id=job_id,
        )
        assert len(settlements) <= 1, "a charge is settled once"
        return Story(
            settlement=Settled(*settlements[0]) if settlements else None,
            moved=[Moved(*row) for row in moved],
            inbox=self._by_event("SELECT event_id, outcome FROM kino.inbox_event", job_id),
            pending=self._by_event("SELECT event_id, outcome FROM kino.pending_event", job_id),
            breaks=[b.kind for b in self.breaks() if b.job_id == job_id],
            dead_letters=self._by_event("SELECT event_id, reason FROM kino.dead_letter", job_id),
        )

    def _by_event(self, query: str, job_id: str) -> dict[str, str]:
        rows = self.rows(f"{query} WHERE job_id = :job_id ORDER BY event_id", job_id=job_id)
        return dict(map(tuple, rows))

    def inbox(self) -> dict[str, str]:
        """Every decided event: id -> outcome."""
        rows = self.rows("SELECT event_id, outcome FROM kino.inbox_event ORDER BY event_id, source")
        return dict(map(tuple, rows))

    def pending(self) -> dict[str, Waits]:
        """Every event that waits for another try, by id."""
        rows = self.rows("SELECT event_id, job_id, outcome, attempts FROM kino.pending_event ORDER BY event_id")
        return {row[0]: Waits(*row[1:]) for row in rows}

    def dead_letters(self) -> list[Dead]:
        rows = self.rows(
            "SELECT event_id, job_id, reason, seen, status FROM kino.dead_letter ORDER BY event_id, job_id, reason"
        )
        return [Dead(*row) for row in rows]

    def breaks(self) -> list[Broken]:
        rows = self.rows("SELECT kind, job_id, credits, seen, status FROM kino.break ORDER BY job_id, kind, break_id")
        return [Broken(*row) for row in rows]

    def everything(self) -> dict[str, list[Any]]:
        """Every row of every table, to say that nothing has changed."""
        tables = self.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'kino' ORDER BY tablename")
        return {table: self.rows(f"SELECT t::text FROM kino.{table} t ORDER BY 1") for (table,) in tables}

    def waiting_for_locks(self) -> int:
        """Count the sessions of this database that wait for another session's lock at this instant."""
        return int(
            self.rows(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )[0][0]
        )


def until(condition: Callable[[], object], *, deadline_s: float = 30.0) -> None:
    """Look until it is so; fail when it does not come to be."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)
