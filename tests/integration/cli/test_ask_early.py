"""`charges ask` before the deadline: after a flush what the source knows settles at once, and nothing is presumed."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis

from kino_refunds.reconciliation.overdue import ALL_OPEN, Which
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.clock import HOUR, MINUTE, SECOND, clock_at
from tests.command_line import Run
from tests.conftest import Database
from tests.integration.reconciliation.sweeps import (
    COMPLETED,
    DUE,
    GRACE,
    RUNNING,
    SPACING,
    UNKNOWN,
    Source,
    asks,
    charged,
    report,
    statuses,
    sweep,
)
from tests.scenario import NOW, Scene, make_event

LATER = NOW + HOUR
FAILED = Answer(JobState.FAILED, finished_at=NOW - MINUTE)


@pytest.fixture(autouse=True)
def stopped_clock(scene: Scene) -> Any:
    with clock_at(scene.worker, NOW - 2 * MINUTE):
        yield


def test_what_the_source_knows_settles_before_the_deadline(scene: Scene, redis: Redis) -> None:
    """Endings settle as the sweep settles them; a job that runs or is not known stays open, and is not noted."""
    charged(scene, "done", "failed", "running", "unknown", due=LATER)
    source = Source({"done": COMPLETED, "failed": FAILED, "running": RUNNING, "unknown": UNKNOWN})

    told = sweep(scene, redis, source, which=ALL_OPEN)

    assert told == report(
        overdue=0,
        early=4,
        asked=4,
        answers={"completed": 1, "failed": 1, "running": 1, "unknown": 1},
        outcomes={"captured": 1, "refunded": 1},
        refunded=1,
        refunded_credits=10,
    )
    assert statuses(scene) == {"done": "captured", "failed": "refunded", "running": "open", "unknown": "open"}
    assert asks(scene) == {}
    assert scene.breaks() == []


def test_an_early_ask_settles_by_the_event_of_the_sweep(scene: Scene, redis: Redis) -> None:
    """The event has the id that the sweep would have given it, so that two sweeps make the same event."""
    (charge,) = charged(scene, "done", due=LATER)

    sweep(scene, redis, Source({"done": COMPLETED}), which=ALL_OPEN)

    assert scene.inbox() == {f"overdue:{charge.charge_id}:completed": "captured"}


def test_early_asks_never_become_a_presumed_timeout(scene: Scene, redis: Redis) -> None:
    """However often a person asks early, three asks behind the deadline are needed, with their distance."""
    charged(scene, "job", due=NOW + SECOND)
    source = Source({"job": UNKNOWN})

    for _ in range(5):
        sweep(scene, redis, source, which=ALL_OPEN)
    assert (asks(scene), statuses(scene)) == ({}, {"job": "open"})

    at = NOW + MINUTE
    for number in range(3):
        for _ in range(3):
            sweep(scene, redis, source, now=at + number * SPACING, which=Which.job("job"))
        assert asks(scene)["job"] == (number + 1, "unknown")
    assert statuses(scene) == {"job": "refunded"}


def test_without_a_source_nothing_is_presumed_early(scene: Scene, redis: Redis) -> None:
    """Where no source is configured, every job is unknown: that refunds what is overdue, and nothing else."""
    charged(scene, "overdue", due=DUE)
    charged(scene, "young", due=LATER)

    told = sweep(scene, redis, None, which=ALL_OPEN)

    assert (told["overdue"], told["early"], told["answers"]) == (1, 1, {"unknown": 2})
    assert statuses(scene) == {"overdue": "refunded", "young": "open"}


def test_one_job_or_those_opened_since_are_asked_about(scene: Scene, redis: Redis) -> None:
    """`--job` and `--since` choose by job and by when the charge was opened."""
    charged(scene, "old", due=LATER)
    with clock_at(scene.worker, NOW - MINUTE):
        charged(scene, "new", "newer", due=LATER)
    source = Source({"old": COMPLETED, "new": COMPLETED, "newer": RUNNING})

    dry = sweep(scene, redis, source, which=Which.since(NOW - MINUTE), dry_run=True)
    sweep(scene, redis, source, which=Which.job("old"))
    nobody = sweep(scene, redis, source, which=Which.job("no such job"))

    assert dry["outcomes"] == {"would settle: kino.generation.job-completed.v1": 1}
    assert [sorted(asked) for asked in source.asked] == [["new", "newer"], ["old"]]
    assert statuses(scene) == {"new": "open", "newer": "open", "old": "captured"}
    assert (nobody["overdue"], nobody["early"]) == (0, 0)


def test_an_early_answer_that_contradicts_the_event_behind_it_is_a_break(scene: Scene, redis: Redis) -> None:
    """The first decision stands: an event that arrives after all is compared with it, like every second one."""
    charged(scene, "job", due=LATER)

    sweep(scene, redis, Source({"job": COMPLETED}), which=ALL_OPEN)
    came = scene.settle(make_event("failed provider", "job"))

    assert came == ["failed_after_capture"]
    assert [each.kind for each in scene.breaks()] == ["failed_after_capture"]


def test_many_open_charges_are_asked_about_in_pages(scene: Scene, redis: Redis) -> None:
    """Behind the page size the sweep goes on, early ones too."""
    jobs = [f"job-{number:04}" for number in range(501)]
    charged(scene, *jobs, due=LATER)

    told = sweep(scene, redis, Source(dict.fromkeys(jobs, COMPLETED)), which=ALL_OPEN)

    assert (told["early"], told["outcomes"]) == (501, {"captured": 501})


SQL = (
    "SELECT asked.id AS job_id, CASE WHEN asked.id LIKE 'done%' THEN 'completed' ELSE 'running' END AS state"
    " FROM unnest(CAST(:job_ids AS text[])) AS asked (id)"
)


@pytest.fixture
def source(database: Database) -> dict[str, Any]:
    return {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": SQL,
    }


@pytest.mark.parametrize(
    ("options", "captured"),
    [
        ((), ()),
        (("--all-open",), ("done 1", "done 2")),
        (("--job", "done 1"), ("done 1",)),
        (("--since", (NOW - 90 * SECOND).isoformat()), ("done 2",)),
        (("--all-open", "--dry-run"), ()),
    ],
    ids=["overdue", "all open", "one job", "since", "dry run"],
)
def test_the_command_chooses_which_charges(
    run: Run, scene: Scene, source: dict[str, Any], options: tuple[str, ...], captured: tuple[str, ...]
) -> None:
    """Without an option only overdue jobs are asked about, with one also those before their deadline."""
    charged(scene, "done 1", "runs", due=LATER + GRACE)
    with clock_at(scene.worker, NOW - MINUTE):
        charged(scene, "done 2", due=LATER + GRACE)

    with clock_at(scene.worker, NOW):
        told = run("charges", "ask", *options, **source)

    assert (told.code, told.err) == (0, "")
    assert [job_id for job_id, status in statuses(scene).items() if status == "captured"] == list(captured)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--all-open", "--job", "a"), "exclude each other"),
        (("--job", "a", "--since", "2026-11-01T12:00:00Z"), "exclude each other"),
        (("--since", "2026-11-01"), "is a day, not an instant"),
        (("--since", "2026-11-01T12:00:00"), "has no offset"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_wrong_usage(run: Run, options: tuple[str, ...], says: str) -> None:
    """Two choices, or a time that may mean two, are refused before the source is asked."""
    told = run("charges", "ask", *options)

    assert (told.code, told.out) == (2, "")
    assert says in " ".join(told.err.replace("│", " ").split())
