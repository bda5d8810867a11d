"""A source that fails: its error is no answer, and costs no other job its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from redis import Redis

from kino_refunds.errors import BadSettings, SourceUnreachable
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.clock import HOUR
from tests.integration.reconciliation.sweeps import (
    COMPLETED,
    SPACING,
    UNKNOWN,
    Careless,
    Source,
    asks,
    charged,
    report,
    statuses,
    sweep,
)
from tests.scenario import NOW, Scene

pytestmark = pytest.mark.usefixtures("stopped_clock")


@pytest.mark.parametrize("error", [TimeoutError("hung"), AssertionError()])
def test_job_on_which_the_source_fails_does_not_cost_the_others(scene: Scene, redis: Redis, error: Exception) -> None:
    """A batch that errors is halved until the job that errors is alone; the others settle in this pass."""
    job_ids = [f"job-{number}" for number in range(8)]
    charged(scene, *job_ids)
    source = Source(dict.fromkeys(job_ids, COMPLETED), fails_for="job-5", error=error)

    came_to = sweep(scene, redis, source)

    assert statuses(scene) == {**dict.fromkeys(job_ids, "captured"), "job-5": "open"}
    assert (came_to["source_errors"], came_to["answers"]) == (1, {"completed": 7})
    assert source.asked == [
        job_ids,
        job_ids[:4],
        job_ids[4:],
        ["job-4", "job-5"],
        ["job-4"],
        ["job-5"],
        ["job-6", "job-7"],
    ]


def test_error_is_not_an_answer(scene: Scene, redis: Redis) -> None:
    """However often the source fails, it counts as no ask: the job stays open, and the count where it was."""
    charged(scene, "job-1")
    sweep(scene, redis, Source({"job-1": UNKNOWN}))

    for number in range(1, 6):
        sweep(scene, redis, Source({}, fails_for="job-1"), now=NOW + number * SPACING)

    assert asks(scene) == {"job-1": (1, "unknown")}
    assert statuses(scene) == {"job-1": "open"}


def test_a_job_that_is_missing_was_not_answered(scene: Scene, redis: Redis) -> None:
    """Silence about a job is no `unknown`: no ask counts, it is reported, and its neighbour settles."""
    charged(scene, "job-1", "job-2")

    came_to = sweep(scene, redis, Source({"job-2": COMPLETED}))

    assert came_to == report(
        overdue=2,
        asked=2,
        source_errors=1,
        source_problem="the job source left out jobs that it was asked for: it must say `unknown` of those that it"
        " does not know",
        answers={"completed": 1},
        outcomes={"captured": 1},
    )
    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open", "job-2": "captured"}


FOREIGN: dict[str, Any] = {
    "padded": "job-1    ",
    "indented": " job-1",
    "folded": "JOB-1",
    "another's": "job-9",
    "not yet overdue": "not overdue",
    "empty": "",
    "huge": "x" * 10_000,
    "control characters": "job-1\x1b[2J",
    "None": None,
    "NaN": float("nan"),
    "a number": 1,
    "bytes": b"job-1",
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("others", [{}, {"job-2": COMPLETED}, {"job-1": UNKNOWN, "job-2": UNKNOWN}])
def test_an_answer_for_another_job_is_no_verdict_on_any(
    scene: Scene, redis: Redis, foreign: Any, others: dict[str, Answer]
) -> None:
    """However often a source answers for a job that it was not asked for, no job of that ask is counted or settled."""
    charged(scene, "job-1", "job-2")
    charged(scene, "not overdue", due=NOW + HOUR)
    source = Careless({foreign: COMPLETED, **others})

    sweeps = [sweep(scene, redis, source, now=NOW + number * SPACING) for number in range(4)]

    assert [(each["source_broken"], each["source_errors"], each["answers"]) for each in sweeps] == [(2, 0, {})] * 4
    problem = sweeps[-1]["source_problem"]
    assert "not asked for" in problem
    assert problem.isprintable()
    assert len(problem) < 250
    assert source.asked == [["job-1", "job-2"]] * 4
    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open", "job-2": "open", "not overdue": "open"}


def test_a_padded_id_is_named_beside_the_one_that_was_sent(scene: Scene, redis: Redis) -> None:
    """The report says which id came back and which was sent, for that is what a person must compare."""
    charged(scene, "job-1")

    came_to = sweep(scene, redis, Careless({"job-1    ": COMPLETED}))

    assert came_to["source_problem"] == (
        "the job source answered for job 'job-1    ', which it was not asked for, but job 'job-1' was:"
        " ids must come back exactly as they were sent"
    )


def test_halving_makes_no_verdict_of_an_answer_for_another_job(scene: Scene, redis: Redis) -> None:
    """A batch that fails is halved; a half that answers for another job, down to one alone, is still no answer."""
    job_ids = [f"job-{number}" for number in range(8)]
    charged(scene, *job_ids)

    class Twin(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            twin = {"JOB-3": UNKNOWN} if "job-3" in job_ids else {}
            return {**super().ask(job_ids), **twin}

    source = Twin(dict.fromkeys(job_ids, UNKNOWN), fails_for="job-5")
    sweeps = [sweep(scene, redis, source, now=NOW + number * SPACING) for number in range(3)]

    assert [(each["source_broken"], each["source_errors"]) for each in sweeps] == [(4, 1)] * 3
    assert statuses(scene) == {
        **dict.fromkeys(job_ids[:4], "open"),
        "job-4": "refunded",
        "job-5": "open",
        **dict.fromkeys(job_ids[6:], "refunded"),
    }


def test_any_error_of_a_source_can_be_kept_and_shown(scene: Scene, redis: Redis) -> None:
    """What a source raises is kept on one short printable line, which jsonb can hold whatever it was."""
    charged(scene, "job-1")
    error = ValueError("<html>\n\x00\x1b[2J\ud800" + "x" * 10_000)

    came_to = sweep(scene, redis, Source({}, fails_for="job-1", error=error))

    problem = came_to["source_problem"]
    assert problem.startswith(r"ValueError: <html>\n\x00\x1b[2J\ud800xxx")
    assert len(problem) < 400
    assert scene.rows("SELECT CAST(:result AS jsonb)", result=json.dumps(came_to)) == [(came_to,)]


def test_a_mended_source_is_believed_at_once(scene: Scene, redis: Redis) -> None:
    """What a broken source said leaves nothing behind: the next sweep captures what had completed."""
    charged(scene, "job-1")
    sweep(scene, redis, Careless({"job-1 ": COMPLETED}))

    came_to = sweep(scene, redis, Source({"job-1": COMPLETED}))

    assert came_to == report(asked=1, answers={"completed": 1}, outcomes={"captured": 1})


def test_garbage_about_a_job_does_not_cost_the_others(scene: Scene, redis: Redis) -> None:
    """What is no Answer is an error like any other: its job is left for later, the others settle."""
    garbage: list[Any] = ["completed", None, {"state": "completed"}, JobState.COMPLETED]
    answers = {f"garbage-{number}": each for number, each in enumerate(garbage)}
    charged(scene, "job-1", *answers)

    came_to = sweep(scene, redis, Source({"job-1": COMPLETED, **answers}))

    assert statuses(scene) == {**dict.fromkeys(answers, "open"), "job-1": "captured"}
    assert (came_to["source_broken"], came_to["source_errors"], came_to["answers"]) == (4, 0, {"completed": 1})
    assert came_to["source_problem"] == "the job source returned JobState for a job, not Answer"


def test_source_that_answers_with_no_mapping_settles_nothing(scene: Scene, redis: Redis) -> None:
    """A source that returns nothing at all fails for every job, and the sweep goes on to its end."""
    charged(scene, "job-1", "job-2")

    came_to = sweep(scene, redis, Careless(None))

    assert came_to == report(
        overdue=2,
        asked=2,
        source_broken=2,
        source_problem="the job source returned NoneType, not a mapping of job id to Answer",
        answers={},
    )


@pytest.mark.parametrize(
    ("error", "asked", "problem"),
    [
        (SourceUnreachable("nobody listens"), 100, "nobody listens"),
        (TimeoutError("hung"), 100 + 50 + 25 + 12 + 6 + 3 + 1 + 2 + 1 + 1 + 3, "TimeoutError: hung"),
    ],
)
def test_a_source_that_is_away_is_given_up_until_the_next_sweep(
    scene: Scene, redis: Redis, error: Exception, asked: int, problem: str
) -> None:
    """A source that nobody reaches, or that hangs on every ask, does not hold a sweep for 199 asks a batch."""
    job_ids = [f"job-{number:04d}" for number in range(501)]
    charged(scene, *job_ids)

    class Away(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            self.asked.append(list(job_ids))
            raise self.error

    came_to = sweep(scene, redis, Away({}, error=error))
    mended = sweep(scene, redis, Source(dict.fromkeys(job_ids, COMPLETED)))

    assert came_to == report(overdue=501, asked=asked, source_errors=501, source_problem=problem, answers={})
    assert mended["outcomes"] == {"captured": 501}


def test_a_setting_that_the_source_finds_wrong_ends_the_sweep(scene: Scene, redis: Redis) -> None:
    """A query that runs for no job is a wrong setting: no job is asked about, and the sweep says which it is."""
    charged(scene, "job-1")

    with pytest.raises(BadSettings, match="no query"):
        sweep(scene, redis, Source({}, fails_for="job-1", error=BadSettings("that is no query")))

    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open"}
