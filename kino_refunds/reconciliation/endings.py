"""The event that should have come: made from a charge and a source's answer (design, section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from kino_refunds.events.schema import JobCompleted, JobFailed, JobSafetyRejected, JobTimedOut
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.deliveries import RECONCILER

if TYPE_CHECKING:
    from kino_refunds.events.schema import Event
    from kino_refunds.reconciliation.guard import OverdueCharge


def event_of(charge: OverdueCharge, answer: Answer) -> Event:
    """Return the event that should have come, made from charge and answer alone: two sweeps make the same event.

    The id contains everything that the content depends on. So a source that answers differently the second time, even
    if it only knows `finished_at` by then, makes another event. The first one settles the charge (P1), and the second
    finds it settled. Under one id the second would be a conflicting duplicate, a dead letter that means nothing.

    A `finished_at` before the charge was opened, or in the future, is kept unchanged. It moves no money, because the
    policy version and the account's status are read at a time within [opened_at, now], as for every event. If it were
    refused, a clock that is a second fast would keep a job open.

    Raises ValueError for an answer that is not the end of a job, and pydantic's ValidationError if an id of the charge
    is not an id.
    """
    at = charge.due_at if answer.finished_at is None else answer.finished_at
    common: dict[str, Any] = {
        "source": RECONCILER,
        "time": at,
        "job_id": charge.job_id,
        "account_id": charge.account_id,
    }
    event_id = f"overdue:{charge.charge_id}:{answer.state}"
    finished = "" if answer.finished_at is None else f"@{at.isoformat(timespec='microseconds').replace('+00:00', 'Z')}"
    match answer.state:
        case JobState.COMPLETED:
            return JobCompleted.of(id=f"{event_id}{finished}", **common)
        case JobState.FAILED:
            error = {"code": "reported_by_job_source", "origin": answer.origin}
            return JobFailed.of(id=f"{event_id}.{answer.origin}{finished}", error=error, **common)
        case JobState.TIMED_OUT:
            # Without a result the event is the same as a presumed timeout, and as that of builds without this field.
            result = ".result_produced" if answer.result_produced else ""
            return JobTimedOut.of(id=f"{event_id}{result}{finished}", result_produced=answer.result_produced, **common)
        case JobState.REJECTED:
            return JobSafetyRejected.of(
                id=f"{event_id}.{answer.stage}{finished}",
                stage=answer.stage,
                category="reported_by_job_source",
                **common,
            )
        case JobState.RUNNING | JobState.UNKNOWN:
            raise ValueError(f"{answer.state} is not the end of a job")
        case _:
            assert_never(answer.state)
