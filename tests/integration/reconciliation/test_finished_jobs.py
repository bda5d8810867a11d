"""The list of finished jobs: what sources must give, and what is made of those that do not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain, count, repeat
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import SourceBroken
from kino_refunds.reconciliation import sql_source
from kino_refunds.reconciliation.contract import FinishedJobsContract
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.http_source import HttpFinishedSource
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.sql_source import SqlFinishedSource
from tests.integration.reconciliation.finished_jobs import (
    ASK,
    EVERYTHING,
    FINISHED,
    LISTED,
    OTHERS,
    SINCE,
    TICK,
    UNTIL,
    WINDOW,
    Liar,
    Lister,
    ended,
)


class Contract(FinishedJobsContract):
    @pytest.fixture
    def window(self) -> tuple[datetime, datetime]:
        return WINDOW

    @pytest.fixture
    def listed(self) -> list[FinishedJob]:
        return LISTED


class TestSqlList(Contract):
    """The SQL adapter keeps the contract that matching relies on."""

    @pytest.fixture
    def source(self, ended_jobs: sa.Engine) -> FinishedSource:
        return SqlFinishedSource(ended_jobs, ASK, finished=FINISHED, complete="SELECT now()")


class TestSqlListInManyPages(TestSqlList):
    """The same where the list takes many queries, and a page ends among jobs of one instant."""

    @pytest.fixture(autouse=True)
    def small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sql_source, "FINISHED_PAGE", 2)
        monkeypatch.setattr(sql_source, "_IN_ORDER", sql_source._IN_ORDER.replace("5000", "2"))


class TestHttpList(Contract):
    """The HTTP adapter keeps the contract that matching relies on."""

    @pytest.fixture
    def source(self, http_list: HttpFinishedSource) -> FinishedSource:
        return http_list


# --- careless sources ---------------------------------------------------------------------------------------------


class Careless(Lister):
    """A source that makes of window and list what the test says."""

    def __init__(self, lie: Lie) -> None:
        super().__init__(EVERYTHING)
        self.lie = lie

    def finished(self, since: datetime, until: datetime) -> Any:
        return self.lie(self, since, until)

    def inside(self, since: datetime, until: datetime) -> list[FinishedJob]:
        return list(super().finished(since, until))


Lie = Callable[[Careless, datetime, datetime], Any]


class Promises(Careless):
    def complete_through(self) -> datetime:
        return datetime.now(UTC) + timedelta(hours=1)


class Contradicts(Careless):
    def ask(self, job_ids: Any) -> Any:
        return {job_id: replace(answer, finished_at=None) for job_id, answer in super().ask(job_ids).items()}


CALLS = count()


def changing(source: Careless, since: datetime, until: datetime) -> list[FinishedJob]:
    jobs = source.inside(since, until)
    return jobs[1:] if next(CALLS) % 2 else jobs


CARELESS: dict[str, tuple[Careless, str]] = {
    "honest": (Careless(lambda s, a, b: iter(s.inside(a, b))), ""),
    "leaves one out": (Careless(lambda s, a, b: s.inside(a, b)[1:]), "every_job_is_listed_as_it_ended"),
    "in the order of an alphabet": (
        Careless(lambda s, a, b: sorted(s.inside(a, b), key=lambda j: (j.finished_at, j.job_id.lower()))),
        "the_list_is_in_order",
    ),
    "newest first": (Careless(lambda s, a, b: reversed(s.inside(a, b))), "the_list_is_in_order"),
    "twice": (Careless(lambda s, a, b: [j for j in s.inside(a, b) for _ in "12"]), "no_job_is_listed_twice"),
    "until is inside": (
        Careless(lambda s, a, b: s.inside(a, b + TICK)),
        "a_window_begins_at_since_and_ends_before_until",
    ),
    "since is outside": (Careless(lambda s, a, b: s.inside(a + TICK, b)), "two_windows_are_as_one"),
    "all of it": (Careless(lambda s, _a, _b: s.jobs), "an_empty_window_is_empty"),
    "ids alone": (Careless(lambda s, a, b: [j.job_id for j in s.inside(a, b)]), "every_value_is_a_finished_job"),
    "changes": (Careless(changing), "listing_again_gives_the_same"),
    "contradicts itself": (Contradicts(lambda s, a, b: s.inside(a, b)), "ask_says_the_same"),
    "promises the future": (Promises(lambda s, a, b: s.inside(a, b)), "the_promise_is_not_in_the_future"),
}


def broken_promises(source: FinishedSource) -> set[str]:
    broken = set()
    for name, test in vars(FinishedJobsContract).items():
        if name.startswith("test_"):
            given: dict[str, Any] = {"source": source, "window": WINDOW, "listed": LISTED}
            wanted = {each: given[each] for each in inspect.signature(test).parameters if each in given}
            try:
                test(FinishedJobsContract(), **wanted)
            except Exception:  # noqa: BLE001 - whatever a careless source makes of its test, it is not passed
                broken.add(name.removeprefix("test_"))
    return broken


@pytest.mark.parametrize(("source", "promise"), CARELESS.values(), ids=CARELESS)
def test_the_contract_finds_a_careless_list(source: Careless, promise: str) -> None:
    """Each careless list fails the test that speaks of its carelessness; an honest one fails none."""
    broken = broken_promises(source)

    assert promise in broken if promise else broken == set()


def test_every_promise_of_the_contract_is_broken_by_somebody() -> None:
    """No test of the contract is hollow: for each there is a careless list that fails it."""
    promises = {name.removeprefix("test_") for name in vars(FinishedJobsContract) if name.startswith("test_")}

    assert promises == {promise for _, promise in CARELESS.values() if promise}


# --- what is checked of every list --------------------------------------------------------------------------------

LIES: dict[str, tuple[Callable[[Iterator[FinishedJob]], Any], str]] = {
    "out of order": (lambda jobs: reversed(list(jobs)), "the order must be by finished_at"),
    "out of order within an instant": (
        lambda jobs: sorted(jobs, key=lambda job: (job.finished_at, job.job_id.lower())),
        "is listed behind",
    ),
    "a row again": (lambda jobs: (j for job in jobs for j in repeat(job, 2)), "is listed twice"),
    "round in a circle": (lambda jobs: chain.from_iterable(repeat(list(jobs))), "the order must be by finished_at"),
    "of another window": (lambda jobs: [*jobs, OTHERS[1]], "outside of the window"),
    "of an earlier window": (lambda jobs: [OTHERS[0], *jobs], "outside of the window"),
    "of words": (lambda jobs: (job.job_id for job in jobs), "lists a str as a finished job"),
    "of nothing": (lambda _: [None], "lists a NoneType as a finished job"),
    "for ever": (
        lambda _: (ended(f"{number:09}", at=SINCE + number * timedelta(minutes=20)) for number in count()),
        "outside of the window",
    ),
}


@pytest.mark.parametrize(("lie", "says"), LIES.values(), ids=LIES)
def test_a_list_that_breaks_the_contract_is_broken(lie: Callable[[Iterator[FinishedJob]], Any], says: str) -> None:
    """No list can repeat a row, go round in a circle, leave its window or hold what is no job."""
    source = Liar(LISTED, lie)

    with pytest.raises(SourceBroken, match=says):
        list(checked(source.finished(*WINDOW), since=SINCE, until=UNTIL))


def test_a_reader_goes_on_behind_the_last_job() -> None:
    """From a place on the rest is read, also within one instant."""
    for number, job in enumerate(LISTED, start=1):
        rest = checked(Lister(LISTED).finished(job.finished_at, UNTIL), since=SINCE, until=UNTIL, after=job.place)

        assert list(rest) == LISTED[number:]


@pytest.mark.parametrize(
    "wrong",
    [
        {"job_id": None},
        {"job_id": 7},
        {"job_id": ""},
        {"answer": "completed"},
        {"answer": Answer(JobState.RUNNING, finished_at=SINCE)},
        {"answer": Answer(JobState.UNKNOWN)},
        {"answer": Answer(JobState.COMPLETED)},
        {"account_id": 7},
        {"credits": "7"},
        {"credits": 7.0},
        {"credits": True},
        {"credits": -1},
    ],
    ids=str,
)
def test_a_finished_job_of_wrong_types_cannot_be_built(wrong: dict[str, Any]) -> None:
    """A source in Python learns where it builds a job that a value is not of its type."""
    with pytest.raises(SourceBroken):
        FinishedJob(**{"job_id": "a", "answer": Answer(JobState.COMPLETED, finished_at=SINCE), **wrong})
