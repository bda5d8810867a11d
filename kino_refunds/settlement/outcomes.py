"""Outcomes are words: what an event did, and what becomes of it (design, section 5; a contract)."""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, assert_never

from kino_refunds.policy.automatic import Clause, Reason

if TYPE_CHECKING:
    from kino_refunds.policy.automatic import Coverage


class Outcome(StrEnum):
    """Everything that can be said of one event."""

    CAPTURED = "captured"
    CAPTURED_NOT_COVERED = "captured_not_covered"
    CAPTURED_TERMINATED = "captured_terminated"
    REFUNDED = "refunded"
    ALREADY_CAPTURED = "already_captured"
    ALREADY_REFUNDED = "already_refunded"
    COMPLETED_AFTER_REFUND = "completed_after_refund"
    FAILED_AFTER_CAPTURE = "failed_after_capture"
    DUPLICATE = "duplicate"
    CONFLICTING_DUPLICATE = "conflicting_duplicate"
    ACCOUNT_MISMATCH = "account_mismatch"
    CHARGE_NOT_FOUND = "charge_not_found"
    BUSY = "busy"


class Disposition(Enum):
    """What becomes of an event with an outcome."""

    FINAL = auto()
    """Decided: an inbox row says so, and the same event again is told so."""
    RETRY = auto()
    """A later try can end otherwise: a pending row."""
    DEAD_LETTER = auto()
    """No try of ours ends otherwise: kept whole for a person."""


def disposition(outcome: Outcome) -> Disposition:
    """Say what becomes of an event; an outcome that is not decided here does not type-check."""
    match outcome:
        case (
            Outcome.CAPTURED
            | Outcome.CAPTURED_NOT_COVERED
            | Outcome.CAPTURED_TERMINATED
            | Outcome.REFUNDED
            | Outcome.ALREADY_CAPTURED
            | Outcome.ALREADY_REFUNDED
            | Outcome.COMPLETED_AFTER_REFUND
            | Outcome.FAILED_AFTER_CAPTURE
            | Outcome.DUPLICATE
        ):
            return Disposition.FINAL
        case Outcome.CHARGE_NOT_FOUND | Outcome.BUSY:
            return Disposition.RETRY
        case Outcome.CONFLICTING_DUPLICATE | Outcome.ACCOUNT_MISMATCH:
            return Disposition.DEAD_LETTER
        case _:
            assert_never(outcome)


SETTLING = frozenset({Outcome.CAPTURED, Outcome.CAPTURED_NOT_COVERED, Outcome.CAPTURED_TERMINATED, Outcome.REFUNDED})
"""The outcomes that settle the charge."""

BREAKS = frozenset({Outcome.COMPLETED_AFTER_REFUND, Outcome.FAILED_AFTER_CAPTURE})
"""The outcomes that contradict a settlement: the first decision stands, and a person hears of it."""


class ChargeState(Enum):
    """Where a charge stands; a capture that was corrected counts as refunded."""

    OPEN = auto()
    CAPTURED = auto()
    REFUNDED = auto()


def outcome_of(coverage: Coverage, state: ChargeState) -> Outcome:
    """Read the table of section 5: what the policy gives, against where the charge stands."""
    match state:
        case ChargeState.OPEN:
            if coverage.refund:
                return Outcome.REFUNDED
            if coverage.clause is Clause.TERMINATED:
                return Outcome.CAPTURED_TERMINATED
            return Outcome.CAPTURED if coverage.reason is Reason.COMPLETED else Outcome.CAPTURED_NOT_COVERED
        case ChargeState.CAPTURED:
            return Outcome.FAILED_AFTER_CAPTURE if coverage.refund else Outcome.ALREADY_CAPTURED
        case ChargeState.REFUNDED:
            completed = coverage.reason is Reason.COMPLETED
            return Outcome.COMPLETED_AFTER_REFUND if completed else Outcome.ALREADY_REFUNDED
        case _:
            assert_never(state)


def state_after(outcome: Outcome) -> ChargeState:
    """Where a charge stands once `outcome`, one of `SETTLING`, has settled it."""
    return ChargeState.REFUNDED if outcome is Outcome.REFUNDED else ChargeState.CAPTURED
