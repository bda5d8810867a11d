"""The list of finished jobs: what sources must give, and what is made of those that do not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from itertools import chain, count, repeat
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from kino_refunds.errors import (
    BadSettings,
    KinoError,
    SourceBroken,
    SourceTimeout,
    SourceUnavailable,
    SourceUnreachable,
)
from kino_refunds.reconciliation import sql_source
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.contract import FinishedJobsContract
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.http_source import HttpFinishedSource
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.sql_source import SqlFinishedSource
from kino_refunds.settings import Settings
from tests.conftest import Database
from tests.integration.reconciliation.finished_jobs import (
    ASK,
    FINISHED,
    LISTED,
    OTHERS,
    SINCE,
    TICK,
    UNTIL,
    Liar,
    Lister,
    ended,
    fill,
    paged,
    row_of,
)
from tests.integration.reconciliation.job_sources import QUERY, Endpoint, Reply, body, settings

WINDOW = (SINCE, UNTIL)
EVERYTHING = [*LISTED, *OTHERS]


@pytest.fixture
def table(jobs: sa.Engine) -> sa.Engine:
    """The pipeline's table of jobs, which has ended ones."""
    fill(jobs, EVERYTHING)
    return jobs


@pytest.fixture
def http_list(endpoint: Endpoint) -> Iterator[HttpFinishedSource]:
    endpoint.reply = paged(EVERYTHING)
    with httpx.Client(timeout=0.5, trust_env=False) as client:
        yield HttpFinishedSource(client, endpoint.url, finished_url=f"{endpoint.url}/finished")


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
    def source(self, table: sa.Engine) -> FinishedSource:
        return SqlFinishedSource(table, ASK, finished=FINISHED, complete="SELECT now()")


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


# --- SQL ----------------------------------------------------------------------------------------------------------


def read(source: FinishedSource) -> list[FinishedJob] | type[Exception]:
    try:
        return list(checked(source.finished(*WINDOW), since=SINCE, until=UNTIL))
    except KinoError as error:
        return type(error)


AT = "timestamptz '2026-11-01 12:30+00'"
NAMES = "v (job_id, state, finished_at)"
ROWS: dict[str, type[Exception]] = {
    f"(VALUES ('a', 'gone fishing', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'running', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'unknown', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', NULL, {AT})) {NAMES}": SourceBroken,
    f"(VALUES (NULL, 'completed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('', 'completed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', NULL::timestamptz)) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamp '2026-11-01 12:30')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', '2026-11-01')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', 'infinity'::timestamptz)) {NAMES}": SourceUnavailable,
    f"(VALUES ('a', 'completed', {AT}), ('a', 'failed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamptz '2026-11-01 11:59+00')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamptz '2026-11-01 13:00+00')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'failed', {AT}, 'the intern')) v (job_id, state, finished_at, origin)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7.5)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, '7')) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, -7)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, true)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7)) v (job_id, state, finished_at, account_id)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7)) v (job_id, state, finished_at, credit)": BadSettings,
    f"(VALUES (1, 'completed', {AT})) {NAMES}": BadSettings,
    f"(VALUES ('a', {AT})) v (job_id, finished_at)": BadSettings,
    "(VALUES ('a', 'completed')) v (job_id, state)": BadSettings,
    "(SELECT WHERE false) v": BadSettings,
    "public.elsewhere": BadSettings,
}


@pytest.mark.parametrize(("rows", "error"), ROWS.items(), ids=ROWS)
def test_what_is_no_row_of_the_list_is_an_error(table: sa.Engine, rows: str, error: type[Exception]) -> None:
    """A row of a wrong type, time or window breaks the list, and a wrong column is the setting's."""
    listing = f"SELECT * FROM {rows} WHERE CAST(:since AS timestamptz) < :until"

    assert read(SqlFinishedSource(table, ASK, finished=listing)) is error


WRITES = {
    "update": "UPDATE public.ended SET state = 'completed' WHERE :since < :until RETURNING job_id, state, finished_at",
    "delete in a CTE": "WITH gone AS (DELETE FROM public.ended RETURNING *) SELECT job_id, state, finished_at FROM gone"
    " WHERE finished_at >= :since AND finished_at < :until",
    "row locks": f"{FINISHED} FOR UPDATE",
    "sequence": "SELECT 'a' AS job_id, nextval('kino.charge_charge_id_seq')::text AS state, CAST(:since AS timestamptz)"
    " AS finished_at WHERE CAST(:since AS timestamptz) < :until",
    "two statements": f"{FINISHED}) AS finished; COMMIT; DELETE FROM public.ended; SELECT * FROM ({FINISHED}",
}


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
def test_a_list_that_writes_fails(table: sa.Engine, writes: str) -> None:
    """The pipeline's table is read and never written, whatever the query says and whoever is connected."""
    listed = read(SqlFinishedSource(table, ASK, finished=writes))

    assert isinstance(listed, type)
    with table.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM public.ended")).scalar() == len(EVERYTHING) + 1


def test_a_list_that_hangs_ends(table: sa.Engine) -> None:
    """A query that takes too long is no list, and the next one is read."""
    hanging = SqlFinishedSource(
        table,
        ASK,
        finished=f"{FINISHED} AND pg_sleep(60)::text = ''",
        complete="SELECT now() WHERE pg_sleep(60)::text = ''",
    )

    assert read(hanging) is SourceTimeout
    with pytest.raises(SourceTimeout):
        hanging.complete_through()
    assert read(SqlFinishedSource(table, ASK, finished=FINISHED)) == LISTED


def test_a_query_may_hold_braces_comments_and_percent_signs(table: sa.Engine) -> None:
    """The query is the deployment's: what stands in it is left as it is."""
    odd = f"{FINISHED} AND job_id NOT LIKE '%{{x}}%' -- a comment at its end"

    assert read(SqlFinishedSource(table, ASK, finished=odd)) == LISTED


PROMISES: dict[str, Any] = {
    "SELECT CAST(NULL AS timestamptz)": None,
    "SELECT timestamptz '2026-11-01 12:30+01'": datetime(2026, 11, 1, 11, 30, tzinfo=UTC),
    "SELECT max(finished_at) FROM public.ended WHERE false": None,
    "SELECT timestamp '2026-11-01 12:30'": SourceBroken,
    "SELECT date '2026-11-01'": SourceBroken,
    "SELECT 'soon'": SourceBroken,
    "SELECT 1793534400": SourceBroken,
    "SELECT now() WHERE false": SourceBroken,
    "SELECT now(), now()": SourceBroken,
    "VALUES (now()), (now())": SourceBroken,
    "SELECT soon": BadSettings,
    "DELETE FROM public.ended RETURNING now()": BadSettings,
}


@pytest.mark.parametrize(("query", "means"), PROMISES.items(), ids=PROMISES)
def test_the_promise_is_one_instant_or_none(table: sa.Engine, query: str, means: Any) -> None:
    """The third query gives one instant with an offset; NULL promises nothing, and all else is an error."""
    source = SqlFinishedSource(table, ASK, finished=FINISHED, complete=query)

    if isinstance(means, type):
        with pytest.raises(means):
            source.complete_through()
    else:
        assert source.complete_through() == means


def test_no_transaction_stays_open_while_the_list_is_compared(table: sa.Engine, database: Database) -> None:
    """What is slow is our side: meanwhile nothing holds back the vacuum of the pipeline's database."""
    reader = SqlFinishedSource(table, ASK, finished=FINISHED).finished(*WINDOW)
    next(reader)

    with database.connect("postgres") as superuser:
        open_ones = superuser.execute(
            sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL"
                " AND pid <> pg_backend_pid()"
            )
        ).scalar()

    assert open_ones == 0
    assert [job.job_id for job in reader] == [job.job_id for job in LISTED[1:]]


# --- HTTP ---------------------------------------------------------------------------------------------------------

A_ROW = row_of(ended("a", at=SINCE + TICK))


def page(*rows: Any, **more: Any) -> Reply:
    return body(json.dumps({"jobs": rows, **more}).encode())


HTTP_LIES: dict[str, tuple[Reply, type[Exception]]] = {
    "an error": (body(b'{"jobs": []}', 500), SourceUnavailable),
    "not found": (body(b"", 404), SourceUnreachable),
    "a redirect": (body(b"", 307, Location="/elsewhere"), SourceUnreachable),
    "nothing": (body(b""), SourceBroken),
    "no json": (body(b"<html>"), SourceBroken),
    "an array": (body(b"[]"), SourceBroken),
    "no jobs": (body(b"{}"), SourceBroken),
    "jobs of words": (page("a"), SourceBroken),
    "a cursor of another kind": (page(A_ROW, next=7), SourceBroken),
    "an empty cursor": (page(A_ROW, next=""), SourceBroken),
    "a huge cursor": (page(A_ROW, next="x" * 10_001), SourceBroken),
    "the same page for ever": (page(A_ROW, next="more"), SourceBroken),
    "empty pages for ever": (
        lambda handler, asked: page(next=f"{int(asked['cursor'] or 0) + 1}")(handler, asked),
        SourceBroken,
    ),
    "a promise of another kind": (page(complete_through=1793534400), SourceBroken),
    "a promise without an offset": (page(complete_through="2026-11-01T12:00:00"), SourceBroken),
    "a running job": (page(A_ROW | {"state": "running"}), SourceBroken),
    "no time": (page(A_ROW | {"finished_at": None}), SourceBroken),
    "a time without an offset": (page(A_ROW | {"finished_at": "2026-11-01T12:00:00"}), SourceBroken),
    "credits of another kind": (page(A_ROW | {"credits": "7"}), SourceBroken),
    "half a credit": (page(A_ROW | {"credits": 7.5}), SourceBroken),
    "an account of another kind": (page(A_ROW | {"account_id": 7}), SourceBroken),
    "an id of another kind": (page(A_ROW | {"job_id": 7}), SourceBroken),
    "no id": (page({"state": "completed", "finished_at": "2026-11-01T12:00:00Z"}), SourceBroken),
    "out of order": (page(A_ROW | {"job_id": "b"}, A_ROW), SourceBroken),
    "a row twice": (page(A_ROW, A_ROW), SourceBroken),
    "another window": (page(A_ROW | {"finished_at": UNTIL.isoformat()}), SourceBroken),
}


@pytest.mark.parametrize(("lie", "error"), HTTP_LIES.values(), ids=HTTP_LIES)
def test_what_is_no_page_is_an_error(
    endpoint: Endpoint, http_list: HttpFinishedSource, lie: Reply, error: type[Exception]
) -> None:
    """Anything but pages of finished jobs that end is no list, and the next list is read."""
    endpoint.reply = lie

    assert read(http_list) is error
    endpoint.reply = paged(EVERYTHING)
    assert read(http_list) == LISTED


def test_an_endpoint_that_hangs_is_no_list(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """An endpoint that accepts the question and says nothing has listed nothing."""

    def hang(_: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        endpoint.ended.wait(30)

    endpoint.reply = hang

    assert read(http_list) is SourceTimeout


def test_pages_are_asked_for_with_window_and_cursor(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """The window is in UTC to the microsecond, and the cursor is the endpoint's own."""
    endpoint.reply = paged(EVERYTHING, each=4, promise="2026-11-01T13:30:00+01:00")

    listed, promise = list(http_list.finished(*WINDOW)), http_list.complete_through()

    window = {"since": "2026-11-01T12:00:00.000000Z", "until": "2026-11-01T13:00:00.000000Z"}
    epoch = dict.fromkeys(("since", "until"), "1970-01-01T00:00:00.000000Z")
    assert (listed, promise) == (LISTED, datetime(2026, 11, 1, 12, 30, tzinfo=UTC))
    assert [(path, asked) for path, _, asked in endpoint.requests] == [
        ("/jobs/finished", {**window, "cursor": None}),
        ("/jobs/finished", {**window, "cursor": "4"}),
        ("/jobs/finished", {**epoch, "cursor": None}),
    ]


def test_a_list_for_an_empty_window_breaks_the_promise(endpoint: Endpoint, http_list: HttpFinishedSource) -> None:
    """An endpoint that ignores the window is found by the first question."""
    endpoint.reply = page(A_ROW, complete_through="2026-11-01T12:00:00Z")

    with pytest.raises(SourceBroken, match="empty window"):
        http_list.complete_through()


# --- settings -----------------------------------------------------------------------------------------------------

SQL: dict[str, Any] = {
    "job_source": "sql",
    "job_source_url": "postgresql://kino_read@127.0.0.1/kino",
    "job_source_query": QUERY,
}
HTTP: dict[str, Any] = {"job_source": "http", "job_source_url": "https://h/ask"}
WRONG: dict[str, tuple[Settings, str]] = {
    "a list without a window": (
        settings(**SQL, job_source_finished_query="SELECT 1"),
        "needs KINO_JOB_SOURCE_FINISHED_QUERY with the parameter :since",
    ),
    "a list without an end": (
        settings(**SQL, job_source_finished_query="SELECT :since"),
        "needs KINO_JOB_SOURCE_FINISHED_QUERY with the parameter :until",
    ),
    "a list of asked jobs": (
        settings(**SQL, job_source_finished_query=f"{FINISHED} AND job_id = ANY(:job_ids)"),
        "KINO_JOB_SOURCE_FINISHED_QUERY has the parameter :job_ids, and only :since and :until are given",
    ),
    "a promise with a parameter": (
        settings(**SQL, job_source_finished_query=FINISHED, job_source_complete_query="SELECT :until"),
        "KINO_JOB_SOURCE_COMPLETE_QUERY has the parameter :until, and none is given",
    ),
    "a promise without a list": (
        settings(**SQL, job_source_complete_query="SELECT now()"),
        "set KINO_JOB_SOURCE_FINISHED_QUERY too",
    ),
    "a list in the clear": (
        settings(**HTTP, job_source_finished_url="http://jobs.example/finished"),
        "KINO_JOB_SOURCE_FINISHED_URL must be https://",
    ),
    "a list at no URL": (
        settings(**HTTP, job_source_finished_url="https://u:hunter2@h:port/"),
        "KINO_JOB_SOURCE_FINISHED_URL cannot be read",
    ),
}


@pytest.mark.parametrize(("wrong", "says"), WRONG.values(), ids=WRONG)
def test_a_list_that_cannot_be_is_a_clear_error(wrong: Settings, says: str) -> None:
    """A list that cannot be read is named on one line, before any source is asked; a password is not in it."""
    with pytest.raises(BadSettings) as caught, source_of(wrong):
        pass

    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("table")
def test_the_configured_lists_are_read(database: Database, endpoint: Endpoint) -> None:
    """What the settings name is listed, over http with the token; without the settings there is no list."""
    endpoint.reply = paged(EVERYTHING)
    sql = SQL | {"job_source_url": database.url("postgres"), "job_source_query": ASK, "job_source_timeout_s": 5.0}
    http = HTTP | {"job_source_url": endpoint.url, "job_source_token": "t0ken", "job_source_timeout_s": 5.0}

    lists, without = [], []
    for each, listing in (
        (sql, {"job_source_finished_query": FINISHED, "job_source_complete_query": "SELECT now()"}),
        (http, {"job_source_finished_url": f"{endpoint.url}/list"}),
    ):
        with source_of(settings(**each, **listing)) as source:
            assert isinstance(source, FinishedSource)
            lists.append(list(source.finished(*WINDOW)))
        with source_of(settings(**each)) as source:
            without.append(isinstance(source, FinishedSource))

    assert lists == [LISTED, LISTED]
    assert without == [False, False]
    assert {(path, token) for path, token, _ in endpoint.requests} == {("/jobs/list", "Bearer t0ken")}
