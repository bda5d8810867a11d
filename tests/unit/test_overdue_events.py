"""The event that an answer of the job source becomes: its kind, its time, and an id that says all that it says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from kino_refunds.events.schema import ID_LENGTH_MAX, ErrorOrigin, Queue, SafetyStage, queue_of, to_json
from kino_refunds.reconciliation.endings import event_of
from kino_refunds.reconciliation.guard import OverdueCharge
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.deliveries import RECONCILER
from tests.clock import HOUR, TICK
from tests.pipeline import ENDS

DUE = datetime(2026, 11, 2, 10, 0, tzinfo=UTC)
FINISHED = datetime(2026, 11, 2, 9, 54, 59, 999_999, tzinfo=UTC)
CHARGE = OverdueCharge(
    charge_id=7, job_id="job-1", account_id="acct-1", credits=10, opened_at=DUE - HOUR, due_at=DUE, asks=0
)

COMPLETED = Answer(JobState.COMPLETED)


def failed(origin: str) -> dict[str, Any]:
    return {"error": {"code": "reported_by_job_source", "origin": origin}}


def rejected(stage: str) -> dict[str, Any]:
    return {"stage": stage, "category": "reported_by_job_source"}


EVENTS: dict[str, tuple[Answer, Queue, dict[str, Any]]] = {
    "overdue:7:completed": (COMPLETED, Queue.JOB_COMPLETED, {}),
    "overdue:7:failed.unknown": (Answer(JobState.FAILED), Queue.JOB_FAILED, failed("unknown")),
    "overdue:7:failed.user": (Answer(JobState.FAILED, origin=ErrorOrigin.USER), Queue.JOB_FAILED, failed("user")),
    "overdue:7:timed_out": (Answer(JobState.TIMED_OUT), Queue.TIMEOUT, {"result_produced": False}),
    "overdue:7:timed_out.result_produced": (
        Answer(JobState.TIMED_OUT, result_produced=True),
        Queue.TIMEOUT,
        {"result_produced": True},
    ),
    "overdue:7:rejected.during_generation": (
        Answer(JobState.REJECTED),
        Queue.SAFETY_REJECTION,
        rejected("during_generation"),
    ),
    "overdue:7:rejected.after_generation": (
        Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
        Queue.SAFETY_REJECTION,
        rejected("after_generation"),
    ),
}


@pytest.mark.parametrize("event_id", EVENTS)
def test_an_answer_becomes_the_event_that_should_have_come(event_id: str) -> None:
    """Its kind and detail are the answer's, its ids the charge's; its time is the due time unless one is known."""
    answer, queue, data = EVENTS[event_id]

    event = event_of(CHARGE, answer)

    document = event.model_dump(mode="json", exclude_none=True)
    assert (event.id, queue_of(event), event.source, event.time) == (event_id, queue, RECONCILER, DUE)
    assert (event.job_id, event.account_id) == ("job-1", "acct-1")
    assert {name: value for name, value in document["data"].items() if name not in {"job_id", "account_id"}} == data


@pytest.mark.parametrize("answer", ENDS, ids=str)
def test_a_known_time_is_the_events_and_stands_in_its_id(answer: Answer) -> None:
    """A sweep that heard the time and one that did not write two events, of which one settles: no conflict."""
    untimed, timed = event_of(CHARGE, answer), event_of(CHARGE, replace(answer, finished_at=FINISHED))

    assert timed.time == FINISHED
    assert timed.id == f"{untimed.id}@2026-11-02T09:54:59.999999Z"


def test_all_that_an_event_says_stands_in_its_id() -> None:
    """Two answers give two ids or the same event: never one id with two contents, which would be a conflict."""
    times = [None, DUE, FINISHED, FINISHED + TICK, datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)]
    answers = [replace(answer, finished_at=at) for answer in ENDS for at in times]

    events = [event_of(CHARGE, answer) for answer in answers]

    assert len({event.id for event in events}) == len({to_json(event) for event in events}) == len(answers)
    assert [event_of(CHARGE, replace(answer)) for answer in answers] == events
    assert max(len(event.id.replace(":7:", f":{2**63 - 1}:")) for event in events) <= ID_LENGTH_MAX


def test_one_instant_in_two_time_zones_is_one_event() -> None:
    """A source whose sessions differ in their time zone says the same thing."""
    elsewhere = FINISHED.astimezone(timezone(timedelta(hours=-7, minutes=-30)))

    here, there = (event_of(CHARGE, replace(COMPLETED, finished_at=at)) for at in (FINISHED, elsewhere))

    assert (here.id, to_json(here)) == (there.id, to_json(there))


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.UNKNOWN])
def test_what_is_no_end_becomes_no_event(state: JobState) -> None:
    """A job that runs, or that nobody knows, has not ended: to write an event of it would move its credits."""
    with pytest.raises(ValueError, match=f"{state} is not the end of a job"):
        event_of(CHARGE, Answer(state))
