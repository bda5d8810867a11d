"""Clauses 1, 2 and 6 as pure rules: an event and a policy document in, the coverage and its clause out."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, assert_never

from kino_refunds.events.schema import Event, JobCompleted, JobFailed, JobSafetyRejected, JobTimedOut

if TYPE_CHECKING:
    from kino_refunds.policy.document import PolicyDocument


class Clause(StrEnum):
    """The clauses that a settlement can cite. The words are stored, so a word here never changes."""

    CREDITS = "1"
    FAILURE = "2.failure"
    TIMEOUT = "2.timeout"
    SAFETY = "2.safety"
    TERMINATED = "6.terminated"


class Reason(StrEnum):
    """Why a charge was captured or refunded, in the words of the ledger; stored, so a word here never changes."""

    COMPLETED = "completed"
    NOT_COVERED = "not_covered"
    GENERATION_FAILURE = "generation_failure"
    TIMEOUT = "timeout"
    CONTENT_POLICY_REJECTION = "content_policy_rejection"


class Coverage(NamedTuple):
    """What the policy says of one job's ending; an ending that is not refunded is captured."""

    refund: bool
    reason: Reason
    clause: Clause


def coverage_of(event: Event, document: PolicyDocument, *, terminated_for_violation: bool) -> Coverage:
    """Return the coverage of `event` by a document: clause 1 captures, clause 2 refunds, clause 6 excludes.

    Clause 6 is read last, so that an ending which is not covered anyway cites the clause that it did not meet.
    """
    covered = _covered(event, document)
    if covered.refund and terminated_for_violation and document.exclusions.terminated_for_violation:
        return Coverage(refund=False, reason=Reason.NOT_COVERED, clause=Clause.TERMINATED)
    return covered


def _covered(event: Event, document: PolicyDocument) -> Coverage:
    rules = document.automatic
    match event:
        case JobCompleted():
            return Coverage(refund=False, reason=Reason.COMPLETED, clause=Clause.CREDITS)
        case JobFailed():
            refund, reason, clause = (
                event.data.error.origin in rules.failure_origins,
                Reason.GENERATION_FAILURE,
                Clause.FAILURE,
            )
        case JobTimedOut():
            refund, reason, clause = (
                rules.timeout_with_result or not event.data.result_produced,
                Reason.TIMEOUT,
                Clause.TIMEOUT,
            )
        case JobSafetyRejected():
            refund, reason, clause = (
                event.data.stage in rules.safety_stages,
                Reason.CONTENT_POLICY_REJECTION,
                Clause.SAFETY,
            )
        case _:
            assert_never(event)
    return Coverage(refund=refund, reason=reason if refund else Reason.NOT_COVERED, clause=clause)
