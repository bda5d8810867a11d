"""Everything that is known of one job's credits (P10), read in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from kino_refunds.db.engine import Connection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChargeFact:
    """What the job took, and whether it is open, captured or refunded."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    deadline_at: datetime
    opened_at: datetime
    status: str
    refunded: int


@dataclass(frozen=True, slots=True)
class LotFact:
    """One lot that the charge was drawn from, as it is now."""

    seq: int
    lot_id: int
    credits: int
    lot_class: str
    state: str
    expires_at: datetime | None
    reference: str


@dataclass(frozen=True, slots=True)
class SettlementFact:
    """How the charge was settled: by which event, and under which clause of which policy."""

    kind: str
    reason: str
    clause: str
    policy_version: str
    ending: str | None
    account_status: str | None
    event_source: str
    event_id: str
    event_time: datetime
    settled_at: datetime


@dataclass(frozen=True, slots=True)
class CorrectionFact:
    """The reversal that refunded a captured charge."""

    reason: str
    clause: str
    policy_version: str
    actor: str
    reference: str | None
    corrected_at: datetime


@dataclass(frozen=True, slots=True)
class TransferFact:
    """One movement of the charge's credits."""

    transfer_id: int
    kind: str
    from_book: str
    to_book: str
    lot_id: int
    to_lot_id: int | None
    credits: int
    reason: str | None
    actor: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AsksFact:
    """How often the job source was asked about the job, and what it said last."""

    asks: int
    last_answer: str
    first_asked_at: datetime
    last_asked_at: datetime


@dataclass(frozen=True, slots=True)
class EventFact:
    """One event about the job that has its final outcome."""

    source: str
    event_id: str
    outcome: str
    event_at: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True)
class PendingFact:
    """One event about the job that waits for another try."""

    source: str
    event_id: str
    outcome: str
    attempts: int
    first_seen_at: datetime
    next_attempt_at: datetime


@dataclass(frozen=True, slots=True)
class LetterFact:
    """One dead letter that names the job."""

    dead_letter_id: int
    reason: str
    detail: str
    seen: int
    status: str
    first_seen_at: datetime
    last_seen_at: datetime


@dataclass(frozen=True, slots=True)
class BreakFact:
    """One break about the job."""

    break_id: int
    kind: str
    credits: int
    status: str
    detail: str
    first_seen_at: datetime
    last_seen_at: datetime


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one job; a job settles and is corrected once, so those two hold one row at most."""

    charge: ChargeFact | None
    lots: Sequence[LotFact]
    settlement: Sequence[SettlementFact]
    correction: Sequence[CorrectionFact]
    transfers: Sequence[TransferFact]
    asks: Sequence[AsksFact]
    events: Sequence[EventFact]
    waiting: Sequence[PendingFact]
    dead_letters: Sequence[LetterFact]
    breaks: Sequence[BreakFact]

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is known of the job."""
        return self.charge is None and not (self.events or self.waiting or self.dead_letters or self.breaks)


_CHARGE = sa.text("""
    SELECT c.charge_id, c.job_id, c.account_id, c.credits, c.deadline_at, c.opened_at, cs.status, cs.refunded
    FROM kino.charge c JOIN kino.charge_status cs USING (job_id) WHERE c.job_id = :job_id
""")
_LOTS = sa.text("""
    SELECT l.seq, l.lot_id, l.credits, t.class, t.state, t.expires_at, t.reference
    FROM kino.charge_line l JOIN kino.credit_lot t USING (lot_id) WHERE l.charge_id = :charge_id ORDER BY l.seq
""")
_SETTLEMENT = sa.text("""
    SELECT kind, reason, clause, policy_version, ending, account_status, event_source, event_id, event_time, settled_at
    FROM kino.settlement WHERE charge_id = :charge_id
""")
_CORRECTION = sa.text("""
    SELECT reason, clause, policy_version, actor, reference, corrected_at
    FROM kino.correction WHERE charge_id = :charge_id
""")
_TRANSFERS = sa.text("""
    SELECT transfer_id, kind, from_book, to_book, lot_id, to_lot_id, credits, reason, actor, created_at
    FROM kino.transfer WHERE charge_id = :charge_id ORDER BY transfer_id
""")
_ASKS = sa.text("""
    SELECT asks, last_answer, first_asked_at, last_asked_at FROM kino.overdue_ask WHERE charge_id = :charge_id
""")
_EVENTS = sa.text("""
    SELECT source, event_id, outcome, event_at, received_at FROM kino.inbox_event
    WHERE job_id = :job_id ORDER BY received_at
""")
_PENDING = sa.text("""
    SELECT source, event_id, outcome, attempts, first_seen_at, next_attempt_at FROM kino.pending_event
    WHERE job_id = :job_id ORDER BY first_seen_at
""")
_LETTERS = sa.text("""
    SELECT dead_letter_id, reason, detail, seen, status, first_seen_at, last_seen_at FROM kino.dead_letter
    WHERE job_id = :job_id OR other_job_ids @> ARRAY[CAST(:job_id AS text)] ORDER BY dead_letter_id
""")
_BREAKS = sa.text("""
    SELECT break_id, kind, credits, status, detail, first_seen_at, last_seen_at FROM kino.break
    WHERE job_id = :job_id ORDER BY break_id
""")


def explain_job(connection: Connection, job_id: str) -> Explanation:
    """Return everything that is known of a job's credits; the answer is empty where nothing is."""
    charges = _read(connection, _CHARGE, ChargeFact, {"job_id": job_id})
    charge = charges[0] if charges else None
    keys = {"job_id": job_id, "charge_id": charge and charge.charge_id}
    return Explanation(
        charge=charge,
        lots=_read(connection, _LOTS, LotFact, keys),
        settlement=_read(connection, _SETTLEMENT, SettlementFact, keys),
        correction=_read(connection, _CORRECTION, CorrectionFact, keys),
        transfers=_read(connection, _TRANSFERS, TransferFact, keys),
        asks=_read(connection, _ASKS, AsksFact, keys),
        events=_read(connection, _EVENTS, EventFact, keys),
        waiting=_read(connection, _PENDING, PendingFact, keys),
        dead_letters=_read(connection, _LETTERS, LetterFact, keys),
        breaks=_read(connection, _BREAKS, BreakFact, keys),
    )


def _read(
    connection: Connection, statement: sa.TextClause, make: Callable[..., T], keys: Mapping[str, object]
) -> list[T]:
    """Return the rows of a statement as values; its columns stand in the order of the value's fields."""
    return [make(*row) for row in connection.execute(statement, keys)]
