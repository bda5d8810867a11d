"""`reconcile` and `breaks repair` as people type them: what they print, their exit codes, and a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from kino_refunds.reconciliation.checks import CHECKS
from tests.command_line import SCRIPT, Run, harmless, outside
from tests.conftest import Database
from tests.scenario import NOW, Scene, make_event, until

PIPELINE = """
    CREATE SCHEMA pipeline;
    CREATE TABLE pipeline.job (job_id text COLLATE "C", state text, origin text, finished_at timestamptz);
    GRANT USAGE ON SCHEMA pipeline TO kino_read;
    GRANT SELECT ON pipeline.job TO kino_read;
"""


@pytest.fixture
def source(database: Database, scene: Scene) -> Any:
    """The settings of a source that is complete, and of a person on call."""
    scene.as_superuser(PIPELINE)
    return {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": "SELECT * FROM pipeline.job WHERE job_id = ANY(:job_ids)",
        "KINO_JOB_SOURCE_FINISHED_QUERY": "SELECT * FROM pipeline.job WHERE finished_at >= :since"
        " AND finished_at < :until ORDER BY finished_at, job_id",
        "KINO_JOB_SOURCE_COMPLETE_QUERY": "SELECT clock_timestamp()",
        "KINO_CHECK_GRACE_S": "0",
        "KINO_ONCALL_DATABASE_URL": database.url("kino_oncall"),
    }


def ended(scene: Scene, job_id: str, state: str, origin: str | None = None) -> None:
    """Let the pipeline know how a job ended."""
    said = "NULL" if origin is None else f"'{origin}'"
    scene.as_superuser(
        f"INSERT INTO pipeline.job VALUES ('{job_id}', '{state}', {said}, clock_timestamp() - interval '1 second')"
    )


def test_a_lie_is_found_repaired_and_proven(cli: Run, scene: Scene, source: Any) -> None:
    """The commands of the runbook, one after the other, with the exit codes that a script goes by."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)
    ended(scene, "job-1", "failed", "provider")

    ran = cli("reconcile", "run", "--json", **source)
    listed = cli("reconcile", "list", **source)
    plan = cli("breaks", "repair", "1", "--dry-run", **source)
    refused = cli("reconcile", "prove", **source)
    repaired = cli("breaks", "repair", "1", "--note", "incident", "--yes", **source)
    again = cli("reconcile", "run", "--json", **source)
    proven = cli("reconcile", "prove", "--json", **source)

    assert [each.code for each in (ran, listed, plan, refused, repaired, again, proven)] == [1, 1, 0, 1, 0, 0, 0]
    assert {item["check"]: item["broken"] for item in ran.json["items"]}["matching"] == 1
    assert "90 -> 100" in plan.out
    assert "10 credits back into the lot" in plan.out
    assert "FAILS" in refused.out
    assert "kino-refunds breaks list" in refused.out
    assert (proven.json["holds"], proven.json["figures"]["breaks"]["closed"]) == (True, 1)
    assert scene.balance("acct of job-1").available == 100


def test_a_dry_run_shows_the_differences_and_writes_nothing(cli: Run, scene: Scene, source: Any) -> None:
    """A person looks first; there is neither a run nor a break afterwards."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)
    ended(scene, "job-1", "failed", "provider")
    assert cli("reconcile", "run", "settled", **source).code == 0

    looked = cli("reconcile", "run", "matching", "--dry-run", **source)

    assert looked.code == 1
    assert "failed_but_captured job:job-1: " in looked.out.replace("\n", " ")
    assert scene.rows("SELECT count(*) FROM kino.check_run WHERE \"check\" = 'matching'")[0][0] == 0
    assert scene.breaks() == []


def test_a_source_that_is_away_is_no_agreement(cli: Run, scene: Scene, source: Any) -> None:
    """`run` says that it could not compare, and `prove` ends with 3: nothing is claimed."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)
    ended(scene, "job-1", "completed")
    assert cli("reconcile", "run", **source).code == 0
    away = source | {"KINO_JOB_SOURCE_URL": "postgresql://kino_read@127.0.0.1:9/pipeline"}

    ran = cli("reconcile", "run", "matching", **away)
    proven = cli("reconcile", "prove", **away)

    assert ran.code == 3
    assert "not comparable: the source is away" in " ".join(ran.out.split())
    assert proven.code == 3
    assert "the job source's database cannot be reached" in proven.err


def test_without_a_source_everything_else_is_checked(cli: Run, scene: Scene) -> None:
    """`matching` says why it compares nothing, and the others run."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)

    ran = cli("reconcile", "run", "--json")

    states = {item["check"]: item["state"] for item in ran.json["items"]}
    assert ran.code == 1
    assert [name for name, state in states.items() if state != "complete"] == ["matching", "relay"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "settld"), "there is no check 'settld'; there are settled, matching,"),
        (("show", "settld"), "there is no check 'settld'"),
        (("show", "7"), "there is no run 7; see `kino-refunds reconcile list`"),
        (("run", "--since", "2026-01-01"), "is a day, not an instant"),
        (("run", "--since", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"), "before it begins"),
        (("run", "--until", "2090-01-01T00:00:00Z"), "is later than what can be compared now: the latest is"),
        (("prove", "--seal", "no-such-file"), "No such file"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(cli: Run, arguments: tuple[str, ...], says: str) -> None:
    """No traceback, and what there is instead."""
    said = cli("reconcile", *arguments)

    assert said.code in {1, 2}
    assert says in said.err
    assert said.err.count("\n") == 1
    assert harmless(said)


def test_a_worker_may_not_reverse_and_is_told_who_may(cli: Run, scene: Scene) -> None:
    """Without a login of kino_oncall the command names the setting; the break is as it was."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1", event_id="a"), now=None)
    scene.settle(make_event("failed provider", "job-1", event_id="b"), now=None)

    said = cli("breaks", "repair", "1", "--yes")

    assert said.code == 3
    assert "a reversal needs KINO_ONCALL_DATABASE_URL, a login of kino_oncall" in said.err
    assert [each.status for each in scene.breaks()] == ["open"]


def test_a_break_is_assigned_noted_and_called_a_false_alarm(cli: Run, scene: Scene) -> None:
    """Each act is written down with who did it."""
    scene.charged("job-1")
    scene.settle(make_event("failed provider", "job-1", event_id="a"), now=None)
    scene.settle(make_event("completed", "job-1", event_id="b"), now=None)

    said = [
        cli("breaks", "assign", "1", "dana", "--by", "bob"),
        cli("breaks", "note", "1", "--note", "asked the pipeline"),
        cli("breaks", "false-alarm", "1", "--note", "a test job", "--yes"),
    ]
    shown = cli("breaks", "show", "1", "--json").json

    assert [each.code for each in said] == [0, 0, 0]
    assert (shown["status"], shown["assignee"]) == ("false_alarm", "dana")
    assert [(note["actor"], note["text"]) for note in shown["notes"]] == [
        ("bob", "assigned to dana"),
        ("anna", "asked the pipeline"),
        ("anna", "a test job"),
    ]


@pytest.mark.parametrize("arguments", [(), ("1", "--terminated-job", "job-1")])
def test_a_repair_is_of_one_thing(cli: Run, arguments: tuple[str, ...]) -> None:
    """Neither nothing nor two."""
    said = cli("breaks", "repair", *arguments)

    assert said.code == 2
    assert "give the number of a break, or --terminated-job JOB with --reference CASE" in said.err


def test_the_registry_is_printed(cli: Run) -> None:
    """Every check with its two sides, for people and for programs."""
    shown, listed = cli("reconcile", "checks"), cli("reconcile", "checks", "--json")

    assert [item["check"] for item in listed.json["items"]] == [check.name for check in CHECKS]
    assert all(check.ours in " ".join(shown.out.split()) for check in CHECKS)


def test_a_source_is_tried_before_anything_rests_on_it(cli: Run, scene: Scene, source: Any) -> None:
    """Sound is 0; a list that contradicts the answers is 1, and away is 3."""
    scene.charged("job-1")
    ended(scene, "job-1", "completed")

    sound = cli("reconcile", "check-source", "--json", **source)
    lies = cli(
        "reconcile",
        "check-source",
        **source | {"KINO_JOB_SOURCE_QUERY": source["KINO_JOB_SOURCE_QUERY"] + " AND false"},
    )
    away = cli("reconcile", "check-source", **source | {"KINO_JOB_SOURCE_URL": "postgresql://x@127.0.0.1:9/p"})

    assert (sound.code, sound.json["listed"]) == (0, 1)
    assert [lies.code, away.code] == [1, 3]
    assert "the source breaks its contract" in lies.out


def test_a_run_that_is_killed_goes_on(database: Database, scene: Scene, redis_url: str, tmp_path: Path) -> None:
    """SIGKILL in the middle of a page: the row stays, and the next command ends the same run."""
    jobs = [f"job-{number}" for number in range(20)]
    for job_id in jobs:
        scene.charged(job_id)
    scene.settle(*[make_event("timeout", job_id) for job_id in jobs], now=None)
    environment = outside() | {
        "KINO_DATABASE_URL": database.url(),
        "KINO_REDIS_URL": redis_url,
        "KINO_LOCK_TIMEOUT_MS": "60000",
    }
    command = [str(SCRIPT), "reconcile", "run", "decisions", "--by", "dana"]
    log = (tmp_path / "killed.log").open("wb")

    # A change makes the page write a break, for which it has to wait here.
    scene.as_superuser("SET session_replication_role = replica", "UPDATE kino.settlement SET ending = 'failed.user'")
    with scene.superuser.connect() as holder, log:
        holder.begin()
        holder.exec_driver_sql("LOCK TABLE kino.break IN EXCLUSIVE MODE")
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        until(lambda: scene.waiting_for_locks() > 0)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    [row] = scene.rows("SELECT run_id, state, compared FROM kino.check_run")
    assert tuple(row)[1:] == ("running", 0)

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 1, ended.stderr
    assert scene.rows("SELECT run_id, state, compared, broken FROM kino.check_run") == [
        (row.run_id, "complete", 20, 20)
    ]
    assert len(scene.breaks()) == 20


def test_breaks_that_no_run_could_look_at_are_counted_after_a_week(cli: Run, scene: Scene, source: Any) -> None:
    """The row stays, and the list of checks says so: the other side has been missing for a week."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"), now=None)
    ended(scene, "job-1", "failed", "provider")
    cli("reconcile", "run", "matching", **source)
    scene.as_superuser(f"UPDATE kino.break SET last_seen_at = '{(NOW - timedelta(days=8)).isoformat()}'")

    listed = cli("reconcile", "list", "--json")

    unseen = {item["check"]: item["unseen_7_days"] for item in listed.json["items"]}
    assert unseen["matching"] == 1
