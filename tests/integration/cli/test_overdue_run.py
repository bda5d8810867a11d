"""`overdue run`: what the dry run announces is settled, and a source that fails is named."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from kino_refunds.ledger import ChargeRequest, open_charges
from tests.command_line import Run
from tests.conftest import Database
from tests.integration.cli.letters import make_overdue
from tests.scenario import NOW, Scene


def test_overdue_run_needs_to_be_told_that_nobody_knows(run: Run) -> None:
    """Without a source every overdue job is refunded in one pass: that is chosen, never fallen into."""
    result = run("overdue", "run", KINO_JOB_SOURCE=None)

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(
        "error: KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open forever; set it"
    )


def test_overdue_run_settles_what_the_dry_run_announced(run: Run, scene: Scene) -> None:
    """A dry run says what would be, the run does it, and a second run finds nothing left."""
    scene.grant("acme")
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acme", 8, NOW - timedelta(minutes=10))])

    dry = run("overdue", "run", "--dry-run", "--json")
    held = scene.balance("acme").held
    wet = run("overdue", "run", "--json")
    again = run("overdue", "run")

    nothing: dict[str, Any] = {
        "asked": 0,
        "early": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "withheld": {},
    }
    assert dry.json == nothing | {
        "dry_run": True,
        "overdue": 1,
        "answers": {"unknown": 1},
        "outcomes": {"would settle: kino.generation.timeout.v1": 1},
        "refunded": 0,
        "refunded_credits": 0,
        "verified_through": None,
    }
    assert held == 8
    assert wet.json == nothing | {
        "dry_run": False,
        "overdue": 1,
        "answers": {"unknown": 1},
        "outcomes": {"refunded": 1},
        "refunded": 1,
        "refunded_credits": 8,
        "verified_through": None,
    }
    assert ["overdue", "0"] in [line.split() for line in again.out.splitlines()]
    assert scene.balance("acme").held == 0


def lost(scene: Scene, *job_ids: str) -> None:
    scene.grant("acme", 1_000)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest(job_id, "acme", 1, NOW - timedelta(minutes=10)) for job_id in job_ids])


ROW = "SELECT {job_id} AS job_id, {state} AS state FROM unnest(CAST(:job_ids AS text[])) AS asked (id)"
BY_QUERY = {
    "sound": ("asked.id", "'running'", 0, None),
    "padded": ("CAST(asked.id AS char(20))", "'completed'", 1, "which it was not asked for, but job 'job-1' was"),
    "an unknown word": (
        "asked.id",
        "'gone fishing'",
        1,
        "the job source's state: Input should be 'completed', 'failed'",
    ),
    "one job's error": (
        "asked.id",
        "CASE asked.id WHEN 'job-2' THEN 'running' ELSE (1 / (length(asked.id) - 5))::text END",
        *(1, "the job source's query failed: division by zero"),
    ),
    "every job's error": (
        "asked.id",
        "(1 / (length(asked.id) - 5))::text",
        *(3, "the job source's query failed: division by zero"),
    ),
}


@pytest.mark.parametrize(("job_id", "state", "code", "problem"), BY_QUERY.values(), ids=BY_QUERY)
def test_overdue_run_says_what_is_wrong_with_the_source(
    run: Run, scene: Scene, database: Database, job_id: str, state: str, code: int, problem: str | None
) -> None:
    """What the source broke is exit 1, a source that answers nothing 3; a person reads why, and no traceback."""
    lost(scene, "job-1", "job-2")
    source: dict[str, Any] = {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": ROW.format(job_id=job_id, state=state),
    }

    with capture_logs() as logged:
        told = run("overdue", "run", "--dry-run", "--json", **source)
    shown = run("overdue", "run", **source)

    assert (told.code, shown.code) == (code, code)
    said = told.json["source_problem"]
    assert said is None if problem is None else problem in said
    assert problem is None or problem in " ".join(shown.out.split())
    assert "Traceback" not in told.err + shown.err + shown.out
    assert [line["error"] for line in logged] == ([] if problem is None else [said])
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("this is no query :job_ids", 'cannot run: syntax error at or near "this"'),
        ("SELECT job_id, state FROM nowhere WHERE job_id = ANY(:job_ids)", 'cannot run: relation "nowhere" does not'),
        ("SELECT x AS id FROM unnest(CAST(:job_ids AS text[])) x", "gives no column job_id and no state"),
        ("UPDATE kino.charge SET credits = 0 WHERE job_id = ANY(:job_ids) RETURNING job_id, ''", "cannot run: syntax"),
        ("SELECT job_id, '' AS state FROM kino.charge WHERE job_id = ANY(:job_ids) FOR UPDATE", "cannot run: "),
        ("SELECT job_id, state FROM kino.charge", "needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids"),
        ("SELECT :a, :job_ids", "has the parameter :a, and only :job_ids is given"),
    ],
)
def test_overdue_run_with_a_query_that_answers_for_no_job_is_wrong_usage(
    run: Run, scene: Scene, database: Database, query: str, says: str
) -> None:
    """A query that cannot run is a wrong setting: exit 2 and one line that names it, and nothing is settled."""
    lost(scene, "job-1")

    result = run(
        *("overdue", "run"),
        KINO_JOB_SOURCE="sql",
        KINO_JOB_SOURCE_URL=database.url("kino_read"),
        KINO_JOB_SOURCE_QUERY=query,
    )

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: KINO_JOB_SOURCE")
    assert says in result.err
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]


@pytest.mark.parametrize(
    "source",
    [
        {"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "http://127.0.0.1:1/jobs"},
        {
            "KINO_JOB_SOURCE": "sql",
            "KINO_JOB_SOURCE_URL": "postgresql://reader:hunter2@127.0.0.1:1/jobs",
            "KINO_JOB_SOURCE_QUERY": "SELECT :job_ids",
        },
    ],
    ids=lambda source: source["KINO_JOB_SOURCE"],
)
def test_overdue_run_with_a_source_that_nobody_reaches_is_exit_3(
    run: Run, scene: Scene, source: dict[str, Any]
) -> None:
    """A source that is away costs one connection and one line, however many jobs are overdue, and no verdict."""
    lost(scene, *(f"job-{number}" for number in range(150)))

    with capture_logs() as logged:
        result = run("overdue", "run", "--json", **source)

    assert (result.code, result.err, len(logged)) == (3, "", 1)
    assert (result.json["asked"], result.json["source_errors"], result.json["answers"]) == (50, 150, {})
    assert "refused" in result.json["source_problem"]
    assert "hunter2" not in result.out + result.err


def test_overdue_run_asks_and_settles(cli: Run, scene: Scene) -> None:
    """One pass: a dry run writes nothing and says what would be, the real one refunds."""
    scene.charged()
    make_overdue(scene)
    before = scene.everything()

    dry = cli("overdue", "run", "--dry-run", "--json")
    after_dry = scene.everything()
    real = cli("overdue", "run", "--by", "bob", "--json")
    table = cli("overdue", "run")
    kept = scene.rows("SELECT name, claimed_by, finished_at, result FROM kino.schedule_slot ORDER BY slot_at")

    assert after_dry == before
    assert (dry.code, real.code, table.code) == (0, 0, 0)
    assert [(name, who, finished is not None) for name, who, finished, _ in kept] == [
        ("by hand: overdue run", "bob", True),
        ("by hand: overdue run", "anna", True),
    ]
    assert kept[0].result == real.json
    assert {k: v for k, v in real.json.items() if k != "verified_through"} == {
        "dry_run": False,
        "overdue": 1,
        "asked": 0,
        "early": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "answers": {"unknown": 1},
        "outcomes": {"refunded": 1},
        "refunded": 1,
        "refunded_credits": 10,
        "withheld": {},
    }


def test_overdue_run_without_a_source_says_how_to_choose(cli: Run) -> None:
    """Nobody is refunded by a sweep that was not set up: exit 2 and the setting's name."""
    said = cli("overdue", "run", "--json", KINO_JOB_SOURCE=None)

    assert said.code == 2
    assert re.fullmatch(r"error: KINO_JOB_SOURCE is not set[^\n]+\n", said.err)
