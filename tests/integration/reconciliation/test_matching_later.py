"""What the check `matching` finds in a later run: corrections, quiet hours, and a list that leaves a job out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from kino_refunds.events.schema import ErrorOrigin
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.run_rows import RunState
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.integration.reconciliation.checking import Pipeline, check, live, numbers
from tests.scenario import EVENT_AT, Scene, make_event


def ended(job_id: str, state: JobState, at: datetime = EVENT_AT) -> FinishedJob:
    return FinishedJob(job_id, Answer(state, origin=ErrorOrigin.PROVIDER, finished_at=at))


def test_a_correction_is_matched_like_a_settlement(scene: Scene) -> None:
    """The job completed and was matched; a correction that rests on a lie is found by the next run, and not by none."""
    charge = scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)
    source = Pipeline(ended("job-1", JobState.COMPLETED))
    assert numbers(check(scene, "matching", source=source)) == (1, 1, 0, 0)

    scene.correct(charge)
    check(scene, "matching", source=source)

    assert live(scene) == [("completed_but_refunded", "job-1", 10)]


def test_a_quiet_hour_with_late_settlements_is_compared(scene: Scene) -> None:
    """Nothing ended since the last run, and what ended before it is settled now: the source knows the job."""
    scene.charged("job-1")
    scene.charged("job-2")
    scene.settle(make_event("timeout", "job-2"), now=None)
    source = Pipeline(ended("job-1", JobState.TIMED_OUT), ended("job-2", JobState.TIMED_OUT))
    first = check(scene, "matching", source=source)
    scene.settle(make_event("timeout", "job-1"), now=None)

    second = check(scene, "matching", source=source)

    assert (first.broken, second.state, second.broken) == (1, RunState.COMPLETE, 0)
    assert live(scene) == []


def test_an_answer_that_the_list_leaves_out_is_compared(scene: Scene) -> None:
    """The source, asked about a settled job, says an ending of this very hour that it does not list."""
    for job_id in ("listed", "left out"):
        scene.charged(job_id)
        scene.settle(make_event("completed", job_id), now=None)
    source = Pipeline(ended("listed", JobState.COMPLETED), ended("left out", JobState.FAILED))
    source.jobs = [job for job in source.jobs if job.job_id == "listed"]
    source.ask = lambda job_ids: {  # type: ignore[method-assign]
        job_id: ended(job_id, JobState.COMPLETED if job_id == "listed" else JobState.FAILED).answer
        for job_id in job_ids
    }

    check(scene, "matching", source=source)

    assert live(scene) == [("failed_but_captured", "left out", 10)]


def test_a_failed_job_that_nobody_charged_agrees_with_the_ledger(scene: Scene) -> None:
    """Nothing was taken and nothing is owed: a proof does not fail over another system's failures."""
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1"), now=None)
    source = Pipeline(ended("job-1", JobState.TIMED_OUT), ended("other", JobState.FAILED))

    assert numbers(check(scene, "matching", source=source)) == (2, 2, 0, 0)


def test_a_run_of_another_build_is_not_gone_on_with(scene: Scene) -> None:
    """Its first pages were judged by other code, or another policy; it is given up, and its row says so."""
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1"), now=None)
    check(scene, "decisions")
    scene.as_superuser("UPDATE kino.check_run SET state = 'running', finished_at = NULL, build = 'before'")

    ran = check(scene, "decisions")

    assert [row.state for row in scene.rows("SELECT state FROM kino.check_run ORDER BY run_id")] == [
        "stopped",
        "complete",
    ]
    assert (ran.compared, ran.window.since) == (1, None)
    assert ran.started_at <= datetime.now(UTC) + timedelta(minutes=1)
