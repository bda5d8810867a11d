"""What a letter protects: no command ends it without the name of the job."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis

from kino_refunds.desk.protection import discard_although_open, read_protection
from kino_refunds.errors import LetterProtects
from kino_refunds.events.schema import to_json
from kino_refunds.reconciliation.guard import OverdueCharge, read_guard
from kino_refunds.settlement.dead_letters import DeadLetter
from tests.command_line import SCRIPT, Run
from tests.conftest import Database
from tests.integration.cli.letters import (
    OLD,
    came,
    letter,
    letter_statuses,
    make_overdue,
    opened_long_ago,
    unreadable_completion,
)
from tests.scenario import PATIENT, Scene, make_event, until


def test_a_letter_of_an_open_job_is_discarded_by_the_job_s_name_only(cli: Run, scene: Scene) -> None:
    """A completed event with a bad time keeps its job from a refund; --yes alone does not end that."""
    scene.charged()
    make_overdue(scene)
    scene.keep(unreadable_completion(job_id="job-1"))
    discard = ("dead-letters", "discard", "1", "--note", "n", "--yes")

    refused = [cli(*discard), cli(*discard, "--although-open", "job-2"), cli(*discard, "--although-open", "all")]
    swept = cli("overdue", "run", "--json").json
    still = letter_statuses(scene)
    named = cli(*discard, "--although-open", "job-1", "--by", "bob")

    assert [(each.code, each.out, each.err.count("\n")) for each in refused] == [(2, "", 1)] * 3
    assert all("job job-1 (10 credits)" in each.err for each in refused)
    assert all("add --although-open job-1\n" in each.err for each in refused)
    assert (swept["refunded"], swept["withheld"]) == (0, {"named_by_waiting_event": 1})
    assert still == [("open", None)]
    assert (named.code, named.err) == (0, "")
    assert "no longer protected: open charges 1, credits 10" in named.out
    assert letter_statuses(scene) == [("discarded", "bob")]


def test_a_correction_of_one_job_leaves_the_letter_s_other_jobs_protected(
    cli: Run, scene: Scene, tmp_path: Path
) -> None:
    """Two completions on two lines are one letter: who corrects the first must not end what protects the second."""
    for job_id in ("job-1", "job-2"):
        scene.charged(job_id)
    make_overdue(scene)
    scene.keep(replace(unreadable_completion(job_id="job-1"), other_job_ids=("job-2", "job-3")))
    corrected = tmp_path / "corrected.json"
    corrected.write_bytes(to_json(make_event("completed", "job-1")))
    replay = ("dead-letters", "replay", "1", "--edited", str(corrected), "--json")

    tried = cli(*replay, "--dry-run")
    replayed = cli(*replay, "--by", "bob")
    swept = cli("overdue", "run", "--json").json
    refused = cli("dead-letters", "discard", "1", "--note", "n", "--yes")
    scene.settle(make_event("completed", "job-2"))
    done = cli("dead-letters", "discard", "1", "--note", "both are captured", "--yes")

    for each in (tried, replayed):
        assert (each.code, each.json["items"][0]["outcome"]) == (1, "captured")
        assert (each.json["items"][0]["closed"], each.json["items"][0]["protects"]) == (False, ["job-2"])
        assert "dead letter 1 stays open: it also names job-2, whose charges are open" in each.err
    assert (swept["refunded"], swept["withheld"]) == (0, {"named_by_waiting_event": 1})
    assert (refused.code, done.code, letter_statuses(scene)[0][0]) == (2, 0, "discarded")


def test_a_letter_that_names_no_job_says_that_it_protects_them_all(cli: Run, scene: Scene) -> None:
    """Where nobody can be asked, an unreadable completion may be any charge's: it is discarded by the word all."""
    for number in range(12):
        scene.charged(f"job-{number}")
    scene.keep(unreadable_completion())
    came(scene)
    discard = ("dead-letters", "discard", "1", "--note", "n", "--yes")

    refused = [cli(*discard), cli(*discard, "--although-open", "job-1")]
    done = cli(*discard, "--although-open", "all")

    assert [(each.code, each.out, each.err.count("\n")) for each in refused] == [(2, "", 1)] * 2
    assert all("names no job" in each.err and "12 open charges of 120 credits" in each.err for each in refused)
    assert all("add --although-open all\n" in each.err for each in refused)
    assert done.code == 0
    assert "no longer protected: open charges 12, credits 120" in done.out


@pytest.mark.parametrize(
    ("letter_of", "ago", "source", "settled"),
    [
        ({"job_id": "job-1"}, OLD, "none", True),
        ({"job_id": "job-2"}, timedelta(0), "none", False),
        ({}, OLD, "none", False),
        ({}, timedelta(0), "sql", False),
        ({}, timedelta(0), "none", True),
    ],
    ids=["settled", "without a charge", "over an hour", "a source is asked", "nothing is open"],
)
def test_a_letter_that_protects_nothing_is_discarded_as_before(
    cli: Run, scene: Scene, letter_of: dict[str, str], ago: timedelta, source: str,
    *, settled: bool,
) -> None:  # fmt: skip
    """Nobody is asked for names where discarding the letter leads to no refund."""
    scene.charged()
    opened_long_ago(scene)
    if settled:
        scene.settle(make_event("completed"))
    scene.keep(unreadable_completion(**letter_of))
    came(scene, ago=ago)

    said = cli("dead-letters", "discard", "1", "--note", "n", "--yes", KINO_JOB_SOURCE=source)

    assert (said.code, said.out, said.err) == (0, "dead letter 1 is discarded; it is kept\n", "")


LETTERS: dict[str, Callable[[], DeadLetter]] = {
    "names a job": lambda: unreadable_completion(job_id="before"),
    "names a job, of another queue": lambda: letter(b"nonsense", job_id="before"),
    "names a job that there is not": lambda: unreadable_completion(job_id="none"),
    "names none": unreadable_completion,
    "names none, of another queue": lambda: letter(b"nonsense"),
}


@pytest.mark.parametrize("source_configured", [False, True])
@pytest.mark.parametrize("ago", [timedelta(0), OLD])
@pytest.mark.parametrize("kind", LETTERS)
def test_what_a_letter_protects_is_what_the_sweep_withholds(
    scene: Scene, redis: Redis, kind: str, ago: timedelta, *, source_configured: bool
) -> None:
    """Two readers of one rule: the charges that a person is shown are those whose verdicts the guard withholds."""
    for job_id in ("before", "also before"):
        scene.charged(job_id)
    opened_long_ago(scene)
    scene.keep(LETTERS[kind]())
    came(scene, ago=ago)
    scene.charged("after")
    now = datetime.now(UTC)
    opened = scene.rows("SELECT charge_id, job_id, account_id, credits, opened_at FROM kino.charge")
    charges = [OverdueCharge(c.charge_id, c.job_id, c.account_id, c.credits, c.opened_at, now, 3) for c in opened]

    guard = read_guard(scene.worker, redis, charges, now=now, source_configured=source_configured)
    with scene.worker.connect() as connection:
        found = read_protection(connection, 1, source_configured=source_configured)

    withheld = {charge.job_id for charge in charges if guard.reason(charge) is not None}
    assert {charge.job_id for charge in found.sample} == withheld
    assert (found.charges, found.credits) == (len(withheld), 10 * len(withheld))


def test_what_a_letter_protects_is_read_when_nobody_else_can_change_it(database: Database) -> None:
    """(1) its message comes again, (2) we discard and wait, (3) it is committed, (4) we see what it protects now."""
    with Scene.of(database, limits=PATIENT) as scene:
        scene.charged()
        opened_long_ago(scene)
        scene.keep(unreadable_completion())
        came(scene, ago=OLD)

        def discard() -> None:
            with scene.worker.begin() as ours:
                discard_although_open(ours, 1, although_open=(), source_configured=False, note="n", actor="bob")

        with ThreadPoolExecutor(1) as pool, scene.superuser.begin() as again:
            again.exec_driver_sql("UPDATE kino.dead_letter SET last_seen_at = kino.clock(), seen = seen + 1")
            discarding = pool.submit(discard)
            until(lambda: scene.waiting_for_locks() == 1)
            again.commit()
            refused = discarding.exception(60)

        assert isinstance(refused, LetterProtects)
        assert letter_statuses(scene) == [("open", None)]


@pytest.mark.parametrize(("typed", "code"), [(b"job-1\n", 0), (b"all\n", 1), (b"yes\n", 1), (b"\x04", 130)])
def test_a_person_types_the_name_of_the_job(database: Database, scene: Scene, typed: bytes, code: int) -> None:
    """At a terminal the charges are shown with their credits, and only the job's own id discards the letter."""
    scene.charged()
    scene.keep(unreadable_completion(job_id="job-1"))
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [SCRIPT, "dead-letters", "discard", "1", "--note", "n", "--by", "bob", "--yes"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={n: v for n, v in os.environ.items() if not n.startswith("KINO_")} | {"KINO_DATABASE_URL": database.url()},
    )
    os.close(theirs)
    os.write(ours, typed)

    out, err = program.communicate(timeout=60)

    os.close(ours)
    assert program.returncode == code
    assert b"dead letter 1 protects open charges 1, credits 10: of its jobs\n" in err
    assert b"  job-1: 10 credits of account acct of job-1, deadline " in err
    assert letter_statuses(scene) == ([("discarded", "bob")] if code == 0 else [("open", None)])
    assert (b"no longer protected" in out) == (code == 0)
