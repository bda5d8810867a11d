"""Runs of the check `matching`, page by page and from one run to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import SourceUnreachable
from kino_refunds.reconciliation import matching
from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.matching_window import NO_LIST
from kino_refunds.reconciliation.run_rows import Run, RunState
from kino_refunds.reconciliation.runs import run_check
from tests.clock import MINUTE, SECOND, clock_at, sample_at
from tests.integration.reconciliation.checking import bench, live
from tests.integration.reconciliation.finished_jobs import Liar
from tests.integration.reconciliation.matching_scene import LATER, Fails, done, lister, match, run_of, scope_of, settled
from tests.integration.reconciliation.sweeps import Source
from tests.scenario import NOW, Scene, make_event

pytestmark = pytest.mark.usefixtures("opened_before")


# --- pages --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_killed(scene: Scene, reader: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each page's cursor on, the rest is found: no job is left out and none is counted twice."""
    monkeypatch.setattr(matching, "PAGE", 2)
    monkeypatch.setattr(matching, "_SETTLED", sa.text(str(matching._SETTLED).replace("LIMIT 1000", "LIMIT 2")))
    settled(scene, *"abcde")
    settled(scene, *"vwxyz")
    scope = scope_of(reader, lister(*(done(job_id, "failed") for job_id in "abcde")))

    whole = run_of(scope)

    assert whole.kinds == {
        **{job_id: {"failed_but_captured"} for job_id in "abcde"},
        **{job_id: {"orphan_charge"} for job_id in "vwxyz"},
    }
    assert len(whole.cursors) == 8
    for killed_after in range(1, 8):
        before = run_of(scope, pages=killed_after)
        rest = run_of(scope, before.cursors[-1])
        assert before.breaks + rest.breaks == whole.breaks, killed_after
        assert (before.compared + rest.compared, rest.comparable) == (whole.compared, True)


def test_the_list_is_streamed(reader: sa.Engine) -> None:
    """A page is compared before the next job is read: a million jobs take no more memory than a thousand."""
    read = Counter[str]()

    def streaming(_: Iterator[FinishedJob]) -> Iterator[FinishedJob]:
        for number in range(5_000):
            read["jobs"] += 1
            yield done(f"job-{number:05}", "failed")

    at_each_page = []
    for _ in matching.pages(scope_of(reader, Liar([], streaming)), {}):
        at_each_page.append(read["jobs"])  # noqa: PERF401 - the counter is read at each page

    assert at_each_page == [1_000, 2_000, 3_000, 4_000, 5_000]


def test_a_check_only_reads(scene: Scene, reader: sa.Engine) -> None:
    """A run leaves every row as it was."""
    settled(scene, "a", "b")
    before = scene.everything()

    match(reader, lister(done("a", "failed"), done("c")))

    assert scene.everything() == before


# --- as a run -----------------------------------------------------------------------------------------------------


def run_whole(scene: Scene, source: Any) -> Run:
    with clock_at(scene.worker, LATER):
        return run_check(check_named("matching"), bench(scene, source=source))


def test_runs_find_repair_and_close(scene: Scene) -> None:
    """A run raises breaks, the next one closes those that agree by now, and goes on where the last one ended."""
    scene.charged("open")
    settled(scene, "fine", "orphan")
    with clock_at(scene.worker, NOW):
        sample_at(scene.worker, NOW)
    source = lister(done("open", "failed"), done("fine"), promise=NOW + SECOND)

    first = run_whole(scene, source)
    raised = live(scene)
    scene.settle(make_event("failed provider", "open"))
    source.promise = NOW + MINUTE
    second = run_whole(scene, source)

    assert (first.state, first.compared, first.broken) == (RunState.COMPLETE, 3, 2)
    assert raised == [("missing_event", "open", 10), ("orphan_charge", "orphan", 10)]
    assert (second.state, second.window.since, second.window.until) == (
        RunState.COMPLETE,
        NOW + SECOND,
        NOW + MINUTE,
    )
    assert live(scene) == [("orphan_charge", "orphan", 10)]


def test_a_run_without_the_source_verifies_nothing(scene: Scene) -> None:
    """After a run that could not compare, the next one compares the same window."""
    settled(scene, "a")
    sample_at(scene.worker, NOW)
    jobs = (done("a", "failed"),)

    away = run_whole(scene, Fails(SourceUnreachable("no route"), what="finished", jobs=jobs))
    nothing = run_whole(scene, Source({}))
    back = run_whole(scene, lister(*jobs))

    assert (away.state, nothing.state) == (RunState.NOT_COMPARABLE, RunState.NOT_COMPARABLE)
    assert dict(nothing.not_comparable) == {NO_LIST: 1}
    assert (back.state, back.window.since, back.broken) == (RunState.COMPLETE, away.window.since, 1)
