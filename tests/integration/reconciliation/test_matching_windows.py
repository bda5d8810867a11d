"""The windows of the check `matching`: where each run begins and ends."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from kino_refunds.errors import SourceUnreachable
from kino_refunds.reconciliation import matching
from kino_refunds.reconciliation.comparison import Window
from kino_refunds.reconciliation.finished import FinishedSource
from kino_refunds.reconciliation.matching_window import NO_LIST, NO_SOURCE, READ_AGAIN, window
from kino_refunds.settlement.breaks import BreakKind
from tests.clock import DAY, HOUR, MINUTE, SECOND, sample_at
from tests.integration.reconciliation.finished_jobs import Lister
from tests.integration.reconciliation.matching_scene import AT, LATER, again, done, lister, run_of, scope_of, settled
from tests.integration.reconciliation.sweeps import Source
from tests.scenario import NOW, Scene, make_event

pytestmark = pytest.mark.usefixtures("opened_before")

DELAY = timedelta(minutes=15)


def window_of(
    scene: Scene,
    source: Any,
    *,
    now: datetime = LATER,
    last: Window | None = None,
    last_until: datetime | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    delay: timedelta = DELAY,
) -> Window | str:
    """The window as the runner asks for it: `last` is that of the last complete run."""
    reach = last.until if last else last_until
    asked = Window(since=since or reach, until=until or now, from_xid=last.to_xid if last else 0, to_xid=0)
    with scene.worker.connect() as connection:
        scope = replace(scope_of(scene.worker, source, now=now), window=asked, matching_delay=delay)
        found, why = window(connection, scope, wanted_since=since, wanted_until=until)
    return found if why is None else why


def span(found: Window | str) -> tuple[datetime | None, datetime]:
    assert isinstance(found, Window), found
    return found.since, found.until


def test_a_window_ends_where_the_promise_does(scene: Scene) -> None:
    """With a promise a run begins where the last one ended, and ends with it, a grace before now at the latest."""
    scene.charged("job")
    source = lister(promise=NOW)

    assert span(window_of(scene, source)) == (NOW - HOUR - DAY, NOW)
    assert span(window_of(scene, source, last_until=NOW - MINUTE)) == (NOW - MINUTE, NOW)
    assert span(window_of(scene, source, until=LATER)) == (NOW - HOUR - DAY, NOW)
    assert span(window_of(scene, source, since=AT, until=NOW - SECOND)) == (AT, NOW - SECOND)
    assert span(window_of(scene, lister(promise=LATER + SECOND))) == (NOW - HOUR - DAY, LATER - 5 * MINUTE)


def test_without_a_promise_a_run_keeps_its_distance(scene: Scene) -> None:
    """The last quarter of an hour is left out, and the day before the last run's end is read again."""
    scene.charged("job")
    source = lister(promise=None)

    assert span(window_of(scene, source)) == (NOW - HOUR - DAY, LATER - DELAY)
    assert span(window_of(scene, source, last_until=NOW)) == (NOW - READ_AGAIN, LATER - DELAY)
    assert span(window_of(scene, source, delay=6 * MINUTE)) == (NOW - HOUR - DAY, LATER - 6 * MINUTE)
    assert span(window_of(scene, source, delay=MINUTE)) == (NOW - HOUR - DAY, LATER - 5 * MINUTE)
    assert span(window_of(scene, source, until=LATER + DAY)) == (NOW - HOUR - DAY, LATER - DELAY)


class Promises(Lister):
    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def complete_through(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


NOTHING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no source": (None, {}, NO_SOURCE),
    "no list": (Source({}), {}, NO_LIST),
    "a promise in the future": (lister(promise=LATER + MINUTE), {}, "which is in the future"),
    "a promise of words": (Promises("soon"), {}, "the source failed: "),
    "a promise without an offset": (Promises(NOW.replace(tzinfo=None)), {}, "the source failed: "),
    "away": (Promises(SourceUnreachable("no route")), {}, "the source is away: no route"),
    "a window in the future": (
        lister(promise=NOW),
        {"since": LATER + DAY, "until": LATER + HOUR + DAY},
        "is not that far",
    ),
    "a window that is reversed": (lister(promise=NOW), {"since": AT, "until": AT - MINUTE}, "is not that far"),
    "a promise behind the last run": (lister(promise=AT), {"last_until": NOW}, "and it says that its list is complete"),
    "too soon": (lister(promise=None), {"since": LATER - MINUTE}, "and its list is taken as complete until"),
}


@pytest.mark.parametrize(("source", "asked", "why"), NOTHING.values(), ids=NOTHING)
def test_a_window_that_cannot_be_is_said_in_words(scene: Scene, source: Any, asked: dict[str, Any], why: str) -> None:
    """Where there is nothing to compare a person reads why, and no run begins."""
    scene.charged("job")

    found = window_of(scene, source, **asked)

    assert isinstance(found, str)
    assert why in found


def test_a_promise_that_stands_still_is_an_empty_run(scene: Scene, reader: sa.Engine) -> None:
    """Where the source knows no more than at the last run, nothing is compared, and nothing is wrong."""
    settled(scene, "job")
    source = lister(promise=NOW)

    found = window_of(scene, source, last_until=NOW)
    assert isinstance(found, Window)

    assert run_of(replace(scope_of(reader, source), window=found)).numbers == (0, 0, {})


def test_an_empty_ledger_has_no_window(scene: Scene) -> None:
    """Before the first charge there is nothing to compare."""
    assert window_of(scene, lister(promise=NOW)) == "the ledger has no charge yet"


def test_a_window_without_an_offset_is_refused(scene: Scene) -> None:
    """An instant that may mean two is not guessed."""
    with pytest.raises(ValueError, match="has no offset"):
        window_of(scene, lister(promise=NOW), since=NOW.replace(tzinfo=None))


def test_a_night_that_sets_the_clock_back_is_one_hour_longer(scene: Scene, reader: sa.Engine) -> None:
    """Two wall clocks with the same reading are two instants: the window is in UTC, and each job is listed once."""
    berlin = ZoneInfo("Europe/Berlin")
    first = datetime(2026, 10, 25, 2, 30, tzinfo=berlin, fold=0)
    second = datetime(2026, 10, 25, 2, 30, tzinfo=berlin, fold=1)
    source = Lister([done("summer", at=first), done("winter", at=second)], promise=NOW)

    found = window_of(scene, source, since=first, until=second)
    assert isinstance(found, Window)
    scope = replace(scope_of(reader, source), window=found)

    assert (found.since, found.until) == (
        datetime(2026, 10, 25, 0, 30, tzinfo=UTC),
        datetime(2026, 10, 25, 1, 30, tzinfo=UTC),
    )
    assert run_of(scope).kinds == {"summer": {"uncharged_job"}}


def test_windows_in_a_row_leave_no_settlement_out(scene: Scene, reader: sa.Engine) -> None:
    """The next run's first transaction is this run's last: each settlement is asked about by one run."""
    source = lister(promise=None)
    scene.charged("first")
    sample_at(scene.worker, NOW - 50 * MINUTE)
    asked, last, seen = list[list[str]](), None, list[Window]()
    for number in range(1, 5):
        at = NOW - 50 * MINUTE + number * 10 * MINUTE
        scene.charged(f"job-{number}")
        scene.settle(make_event("completed", f"job-{number}", at=at), now=at)
        sample_at(scene.worker, at + SECOND)
        source.promise = at + 2 * SECOND
        source.jobs = [done(f"job-{n}", at=NOW - 50 * MINUTE + n * 10 * MINUTE) for n in range(1, number + 1)]
        found = window_of(scene, source, now=at + 6 * MINUTE, last=last)
        assert isinstance(found, Window)
        source.asked.clear()
        result = run_of(replace(scope_of(reader, source), window=found))
        assert (result.comparable, result.kinds) == (True, {})
        asked += source.asked
        seen.append(found)
        last = found

    assert asked == [[f"job-{number}"] for number in range(1, 5)]
    assert [before.to_xid for before in seen[:-1]] == [after.from_xid for after in seen[1:]]


def test_a_run_begins_at_the_number_where_the_last_one_ended(scene: Scene) -> None:
    """A sample that the horizon had not passed at the last run counts now: what settled before it is not skipped."""
    scene.charged("job")
    sample_at(scene.worker, NOW - 10 * MINUTE)
    last = Window(since=None, until=NOW - 5 * MINUTE, from_xid=0, to_xid=7)

    found = window_of(scene, lister(promise=NOW), last=last)

    assert isinstance(found, Window)
    assert found.from_xid == 7
    assert found.to_xid > 7


def test_a_run_while_everything_is_being_settled(scene: Scene, reader: sa.Engine) -> None:
    """What settles between two pages is judged as it stands at its page, and nothing is raised that was never so."""
    jobs = [f"job-{number:04}" for number in range(1_500)]
    scene.grant("acct-1", 100_000)
    for job_id in jobs:
        scene.open(job_id, "acct-1")
    scope = scope_of(reader, lister(*(done(job_id) for job_id in jobs)))

    run = matching.pages(scope, {})
    first = next(run)
    scene.settle_batch(*(make_event("completed", job_id) for job_id in jobs))
    second = next(run)
    rest = list(run)

    assert ({each.kind for each in first.breaks}, first.broken) == ({BreakKind.MISSING_EVENT}, 1_000)
    assert (second.compared, second.broken, [page.breaks for page in rest]) == (500, 0, [])
    source = scope.source
    assert isinstance(source, FinishedSource)
    assert set(again(reader, source, list(first.breaks)).values()) == {None}
