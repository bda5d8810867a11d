"""Outcomes are words: what an event did, and what becomes of it (design, section 5; a contract).

The words are stored and compared by other programs, so a word never changes its meaning.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING, assert_never

from kino_refunds.policy.automatic import Clause, Reason

if TYPE_CHECKING:
    from kino_refunds.policy.automatic import Coverage


class Outcome(StrEnum):
    """The possible outcomes of one event."""

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
    """Decided: an inbox row keeps the outcome, and the same event again is a duplicate of it."""
    RETRY = auto()
    """A retry can end otherwise: a pending row."""
    DEAD_LETTER = auto()
    """No retry can end otherwise: the event is kept whole for a person."""


def disposition(outcome: Outcome) -> Disposition:
    """Return what becomes of an event; an outcome that is missing here does not type-check."""
    # Exhaustive on purpose. A new outcome that fell to a default would be final, and its customer never refunded, or be
    # retried for a day although no retry can help.
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
        # Two messages, or a message and a charge, contradict each other. Applied, it could pay the wrong customer, or
        # change an outcome that a customer has seen.
        case Outcome.CONFLICTING_DUPLICATE | Outcome.ACCOUNT_MISMATCH:
            return Disposition.DEAD_LETTER
        case _:
            assert_never(outcome)


SETTLING = frozenset({Outcome.CAPTURED, Outcome.CAPTURED_NOT_COVERED, Outcome.CAPTURED_TERMINATED, Outcome.REFUNDED})
"""The outcomes that settle the charge: each moves the charge's credits, once (P1)."""

BREAKS = frozenset({Outcome.COMPLETED_AFTER_REFUND, Outcome.FAILED_AFTER_CAPTURE})
"""The outcomes that contradict a settlement: the first settlement stands, and a break tells a person."""


class ChargeState(Enum):
    """The state of a charge; a capture that was corrected counts as refunded."""

    OPEN = auto()
    CAPTURED = auto()
    REFUNDED = auto()


def outcome_of(coverage: Coverage, state: ChargeState) -> Outcome:
    """Return the outcome for what the policy covers and the state of the charge, by the table of section 5."""
    match state:
        case ChargeState.OPEN:
            if coverage.refund:
                return Outcome.REFUNDED
            if coverage.clause is Clause.TERMINATED:
                return Outcome.CAPTURED_TERMINATED
            return Outcome.CAPTURED if coverage.reason is Reason.COMPLETED else Outcome.CAPTURED_NOT_COVERED
        # The refund is not paid here: the capture may have been right. A person decides, by the break.
        case ChargeState.CAPTURED:
            return Outcome.FAILED_AFTER_CAPTURE if coverage.refund else Outcome.ALREADY_CAPTURED
        # A refund is never taken back: the customer may have spent the credits. Only a completion is worth a break; an
        # ending that the policy does not cover, after a refund, is none (design, section 5).
        case ChargeState.REFUNDED:
            completed = coverage.reason is Reason.COMPLETED
            return Outcome.COMPLETED_AFTER_REFUND if completed else Outcome.ALREADY_REFUNDED
        case _:
            assert_never(state)


def state_after(outcome: Outcome) -> ChargeState:
    """Return the state of a charge that `outcome`, one of `SETTLING`, has settled."""
    return ChargeState.REFUNDED if outcome is Outcome.REFUNDED else ChargeState.CAPTURED
