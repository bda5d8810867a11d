"""Runs of checks: rows with four numbers, that survive a kill, cover time without gaps, and close what agrees again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import BadWindow, CheckBusy
from kino_refunds.reconciliation import comparison, decisions, runs
from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.comparison import Page, Scope
from kino_refunds.reconciliation.run_rows import (
    Run,
    RunState,
    read_coverage,
    read_last_runs,
    read_run,
    read_runs,
)
from kino_refunds.reconciliation.verified import sample_clock
from tests.conftest import Database
from tests.integration.reconciliation.checking import bench, check, live, numbers, statuses
from tests.scenario import NOW, Scene, make_event


class Killed(BaseException):
    """The process ends here."""


def settle_jobs(scene: Scene, first: int, count: int, kind: str = "timeout") -> None:
    for number in range(first, first + count):
        scene.charged(f"job-{number}")
    scene.settle(*[make_event(kind, f"job-{number}") for number in range(first, first + count)])


def corrupt_all(scene: Scene) -> None:
    scene.as_superuser("SET session_replication_role = replica", "UPDATE kino.settlement SET ending = 'failed.user'")


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of three, so that few jobs make several."""
    monkeypatch.setattr(comparison, "PAGE", 3)


@pytest.mark.usefixtures("small_pages")
def test_a_run_that_was_killed_goes_on_where_it_stood(scene: Scene) -> None:
    """Killed after its second page, the run is one row; the next process adds the rest, and counts nothing twice."""
    settle_jobs(scene, 0, 10)
    corrupt_all(scene)
    pages = decisions.pages

    def killed(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
        for number, page in enumerate(pages(scope, cursor)):
            if number == 2:
                raise Killed
            yield page

    with pytest.raises(Killed):
        runs_of_check_with(killed)(scene)
    [half] = scene.rows("SELECT run_id, state, compared, broken FROM kino.check_run")
    whole = check(scene, "decisions")

    assert tuple(half)[1:] == ("running", 6, 6)
    assert (whole.run_id, whole.state, numbers(whole)) == (half.run_id, RunState.COMPLETE, (10, 0, 10, 0))
    assert len(live(scene)) == 10


def runs_of_check_with(pages: Callable[[Scope, Mapping[str, Any]], Generator[Page]]) -> Callable[[Scene], Run]:
    """Run the check `decisions` with other pages."""
    planted = replace(check_named("decisions"), pages=pages)
    return lambda scene: runs.run_check(planted, bench(scene))


@pytest.mark.usefixtures("small_pages")
def test_a_budget_leaves_the_rest_to_the_next_run(scene: Scene) -> None:
    """A scheduled run must give its thread back; the row stays `running` and the next slot goes on."""
    settle_jobs(scene, 0, 7)

    first = check(scene, "decisions", budget_s=0.0)
    second = check(scene, "decisions", budget_s=0.0)
    third = check(scene, "decisions")

    assert [each.state for each in (first, second, third)] == ["running", "running", "complete"]
    assert [each.compared for each in (first, second, third)] == [3, 6, 7]
    assert {each.run_id for each in (first, second, third)} == {first.run_id}


def test_two_runs_at_once_are_one(scene: Scene) -> None:
    """The second is told so, and nothing is compared twice."""
    settle_jobs(scene, 0, 3)
    inside, leave = threading.Event(), threading.Event()
    pages = decisions.pages

    def slow(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
        inside.set()
        assert leave.wait(30)
        yield from pages(scope, cursor)

    thread = threading.Thread(target=lambda: runs_of_check_with(slow)(scene))
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(CheckBusy, match="another process runs the check decisions"):
            check(scene, "decisions")
        # Another check does not wait for it.
        assert check(scene, "account_status").compared == 3
    finally:
        leave.set()
        thread.join()

    assert scene.rows("SELECT compared, state FROM kino.check_run WHERE \"check\" = 'decisions'")[0] == (3, "complete")


def test_a_page_that_another_process_stored_is_not_stored_again(scene: Scene) -> None:
    """If the lock's session was lost, the row itself refuses the second writer: by the cursor that it last stood at."""
    settle_jobs(scene, 0, 3)
    pages = decisions.pages

    def overtaken(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
        for page in pages(scope, cursor):
            scene.as_superuser("UPDATE kino.check_run SET cursor = '{\"charge_id\": 99}'")
            yield page

    with pytest.raises(CheckBusy, match="another process went on"):
        runs_of_check_with(overtaken)(scene)


def test_a_dry_run_writes_nothing(scene: Scene) -> None:
    """Neither the run nor a break, not even a sample; and it says what would be a break."""
    settle_jobs(scene, 0, 2)
    corrupt_all(scene)
    with scene.worker.begin() as connection:
        sample_clock(connection)
    before = scene.everything()

    found = check(scene, "decisions", dry_run=True)

    assert scene.everything() == before
    assert (found.broken, [each.job_id for each in found.found]) == (2, ["job-0", "job-1"])


def test_a_break_is_closed_by_the_next_run_once_the_sides_agree(scene: Scene) -> None:
    """Also one that a person investigates, and only by the key: the window of the next run is empty."""
    settle_jobs(scene, 0, 1)
    corrupt_all(scene)
    check(scene, "decisions")
    scene.as_superuser(
        "UPDATE kino.break SET status = 'investigating'",
        "SET session_replication_role = replica",
        "UPDATE kino.settlement SET ending = 'timeout.no_result'",
    )

    after = check(scene, "decisions")

    assert after.compared == 0
    assert statuses(scene) == [("decision_differs", "closed")]
    [note] = scene.rows("SELECT notes -> 0 ->> 'text' AS text, closed_at IS NOT NULL AS closed FROM kino.break")
    assert tuple(note) == (f"run {after.run_id}: the two sides agree", True)


def test_a_repair_that_did_not_hold_opens_the_break_again(scene: Scene) -> None:
    """Some minutes after it was called repaired and still differs, it is open; at once it may still be on its way."""
    settle_jobs(scene, 0, 1)
    corrupt_all(scene)
    check(scene, "decisions")
    scene.as_superuser("UPDATE kino.break SET status = 'repaired', status_at = kino.clock()")

    check(scene, "decisions")
    assert statuses(scene) == [("decision_differs", "repaired")]

    scene.as_superuser("UPDATE kino.break SET status_at = kino.clock() - interval '6 minutes'")
    check(scene, "decisions")
    assert statuses(scene) == [("decision_differs", "open")]


@pytest.mark.parametrize("status", ["accepted", "false_alarm"])
def test_what_a_person_decided_opens_again_only_when_a_side_changes(scene: Scene, status: str) -> None:
    """The same difference is counted and is no new break; another one is."""
    settle_jobs(scene, 0, 1)
    corrupt_all(scene)
    check(scene, "decisions")
    scene.as_superuser(f"UPDATE kino.break SET status = '{status}'")

    same = check(scene, "decisions", full=True)
    assert (same.broken, same.accepted, statuses(scene)) == (1, 1, [("decision_differs", status)])

    scene.as_superuser("SET session_replication_role = replica", "UPDATE kino.settlement SET ending = 'completed'")
    check(scene, "decisions", full=True)
    assert statuses(scene) == [("decision_differs", status), ("decision_differs", "open")]


def test_runs_cover_time_without_a_gap(scene: Scene) -> None:
    """A later window that was asked for by hand leaves a gap: what is verified ends before it, and is filled up."""
    settle_jobs(scene, 0, 1)
    first = check(scene, "decisions")
    settle_jobs(scene, 1, 1)
    with scene.worker.begin() as connection:
        sample_clock(connection)
    [sample] = scene.rows("SELECT max(sampled_at) AS at FROM kino.xid_clock")
    settle_jobs(scene, 2, 1)
    apart = check(scene, "decisions", since=sample.at)

    filled = check(scene, "decisions")

    with scene.worker.connect() as connection:
        coverage = read_coverage(connection, "decisions")
    assert (first.compared, apart.compared, filled.compared) == (1, 1, 2)
    assert filled.window.from_xid == first.window.to_xid
    assert coverage is not None
    assert (coverage.since, coverage.until) == (None, filled.window.until)


def test_what_is_in_an_open_transaction_is_compared_later(scene: Scene) -> None:
    """A run ends below the oldest open transaction, so a row that is committed late is in the next window."""
    settle_jobs(scene, 0, 1)
    first = check(scene, "decisions")
    with scene.superuser.connect() as slow:
        slow.begin()
        slow.exec_driver_sql("SELECT pg_current_xact_id()")
        settle_jobs(scene, 1, 1)
        meanwhile = check(scene, "decisions")
    after = check(scene, "decisions")

    assert [each.compared for each in (first, meanwhile, after)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("since", "until", "says"),
    [
        (timedelta(hours=1), None, "--since .* is later than what can be compared now"),
        (None, timedelta(hours=1), "--until .* is later than what can be compared now"),
        (-timedelta(hours=1), -timedelta(hours=2), "before it begins"),
        (-timedelta(hours=1), -timedelta(hours=1), "before it begins"),
    ],
)
def test_a_window_that_cannot_be_is_refused(
    scene: Scene, since: timedelta | None, until: timedelta | None, says: str
) -> None:
    """In the future, reversed or empty; the error names the latest that can be compared."""
    check(scene, "decisions")

    with pytest.raises(BadWindow, match=says):
        check(scene, "decisions", since=NOW + since if since else None, until=NOW + until if until else None)

    assert len(scene.rows("SELECT FROM kino.check_run")) == 1


def test_a_run_of_another_window_gives_an_interrupted_one_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row says so; it verifies nothing."""
    monkeypatch.setattr(comparison, "PAGE", 1)
    settle_jobs(scene, 0, 2)
    half = check(scene, "decisions", budget_s=0.0)

    whole = check(scene, "decisions", full=True)

    with scene.worker.connect() as connection:
        stopped = read_run(connection, half.run_id)
        newest = read_runs(connection, check="decisions", before=None, limit=10)
        last = read_last_runs(connection, ["decisions"], only_complete=True)
    assert stopped is not None
    assert stopped.state is RunState.STOPPED
    assert [each.run_id for each in newest] == [whole.run_id, half.run_id]
    assert last["decisions"].run_id == whole.run_id


def test_a_worker_may_run_checks_and_a_reader_may_read_them(scene: Scene, database: Database) -> None:
    """No check needs more than the worker's rights, and nobody else writes its rows."""
    check(scene, "decisions")

    for role in ("kino_read", "kino_oncall"):
        with database.connect(role) as connection:
            assert len(read_runs(connection, check=None, before=None, limit=10)) == 1
        assert database.refusal(role, "UPDATE kino.check_run SET matched = 1, compared = 1") == "42501"


def test_a_lost_server_ends_the_run_and_the_next_goes_on(scene: Scene) -> None:
    """The error is what Postgres raised; nothing is half stored."""
    settle_jobs(scene, 0, 3)
    pages = decisions.pages

    def cut_off(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
        yield from pages(scope, cursor)
        with scope.engine.connect() as connection:
            connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(sa.exc.OperationalError):
        runs_of_check_with(cut_off)(scene)
    scene.worker.dispose()

    assert numbers(check(scene, "decisions")) == (3, 3, 0, 0)
