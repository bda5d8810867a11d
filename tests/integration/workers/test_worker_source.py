"""What workers say of a job source that is missing, cannot be asked, or is broken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import Redis

from kino_refunds.ledger import ChargeRequest, open_charges
from tests.conftest import Database
from tests.pipeline import ledger, open_jobs, push
from tests.processes import Start, endings, log_of, settled, sweeps_of, text_of, wait_for
from tests.scenario import Scene

WARNED_OF = "overdue jobs are not asked about"
UNSET = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found"


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({}, "error", UNSET),
        ({"KINO_JOB_SOURCE": "none"}, "warning", "KINO_JOB_SOURCE=none: a job whose event is lost counts as timed out"),
        ({"KINO_JOB_SOURCE": "sql"}, "error", "KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_URL"),
        ({"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "https://127.0.0.1:1/jobs"}, None, None),
    ],
    ids=["unset", "none", "incomplete", "chosen"],
)
def test_a_process_says_at_its_start_that_lost_jobs_are_not_found(
    scene: Scene, redis: Redis, start: Start, settings: dict[str, str], level: str | None, says: str | None
) -> None:
    """Worker and beat each log one line about a job source that is missing or none, and settle events all the same."""
    open_jobs(scene, "job-1")
    push(redis, *endings(["job-1"]))
    worker, beat = start(**settings), start("beat", **settings)
    wait_for(lambda: ledger(scene) == settled(["job-1"]), worker, beat)
    wait_for(lambda: sweeps_of(scene) > 0, worker, beat)

    for process in (worker, beat):
        lines = [
            line for line in log_of(process) if line["event"] == WARNED_OF and line["level"] in {"error", "warning"}
        ]
        assert [line["level"] for line in lines] == ([] if level is None else [level])
        assert says is None or says in lines[0]["error" if level == "error" else "warning"]
        assert "Traceback" not in text_of(process)


READER = "postgresql://kino_read@127.0.0.1:1/kino"


@pytest.mark.parametrize(
    ("query", "url", "problem", "broken"),
    [
        (
            "SELECT CAST(x AS char(20)) AS job_id, 'completed' AS state FROM unnest(CAST(:job_ids AS text[])) x",
            None,
            "which it was not asked for, but job 'lost' was: ids must come back exactly as they were sent",
            1,
        ),
        ("this is no query :job_ids", None, "KINO_JOB_SOURCE_QUERY cannot run: syntax error", None),
        ("SELECT :job_ids", READER, "the job source's database cannot be reached: ", 0),
        ("SELECT :job_ids", "mysql://u:hunter2@h/d", "KINO_JOB_SOURCE_URL is not Postgres by psycopg but mysql", None),
    ],
    ids=["padded", "no query", "away", "another kind"],
)
def test_a_sweep_keeps_what_is_wrong_with_the_source(
    scene: Scene,
    database: Database,
    start: Start,
    query: str,
    url: str | None,
    problem: str,
    broken: int | None,
) -> None:
    """A source that cannot be asked, or is broken, ends no worker: its slot's row and one line of the log say why."""
    scene.grant("acct-1", 100)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("lost", "acct-1", 3, datetime.now(UTC) - timedelta(hours=1))])
    settings = {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": url or database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": query,
        "KINO_OVERDUE_EVERY_S": "1",
    }
    worker, beat = start(**settings), start("beat", **settings)

    wait_for(lambda: len(overdue_results(scene)) >= 2, worker, beat)

    for result in overdue_results(scene):
        assert problem in result["source_problem"]
        assert result.get("source_broken") == broken
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]
    assert "Traceback" not in text_of(worker)
    assert "hunter2" not in text_of(worker) + text_of(beat)
    assert any(problem in str(line.get("error")) for line in log_of(worker))


def overdue_results(scene: Scene) -> list[dict[str, Any]]:
    query = "SELECT result FROM kino.schedule_slot WHERE name = 'kino.sweep_overdue' AND finished_at IS NOT NULL"
    return [row.result for row in scene.rows(query)]
