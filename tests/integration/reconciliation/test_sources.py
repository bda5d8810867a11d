"""The two job sources that need no code, against a real table and a real endpoint, honest and lying."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.errors import (
    BadSettings,
    ForeignAnswer,
    KinoError,
    SourceBroken,
    SourceTimeout,
    SourceUnavailable,
    SourceUnreachable,
)
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.adapters import ANSWER_BYTES_MAX, HttpSource, SqlSource, read_answers, source_of
from kino_refunds.reconciliation.contract import JobSourceContract
from kino_refunds.reconciliation.sources import Answer, JobSource, JobState
from kino_refunds.settings import Settings
from tests.conftest import Database

UNKNOWN, COMPLETED, FAILED = Answer(JobState.UNKNOWN), Answer(JobState.COMPLETED), Answer(JobState.FAILED)
ENDED_AT = datetime(2026, 11, 1, 12, 30, 15, 123456, tzinfo=UTC)
JOBS: list[dict[str, Any]] = [
    {"job_id": "completed", "state": "completed"},
    {"job_id": "completed at", "state": "completed", "finished_at": "2026-11-01T12:30:15.123456Z"},
    {"job_id": "failed", "state": "failed"},
    {"job_id": "failed by the user", "state": "failed", "origin": "user"},
    {"job_id": "failed at", "state": "failed", "finished_at": "2026-11-01T05:30:15.123456-07:00"},
    {"job_id": "timed out", "state": "timed_out"},
    {"job_id": "timed out with a result", "state": "timed_out", "result_produced": True},
    {"job_id": "timed out without", "state": "timed_out", "result_produced": False},
    {"job_id": "rejected", "state": "rejected"},
    {"job_id": "rejected late", "state": "rejected", "stage": "after_generation"},
    {"job_id": "running", "state": "running"},
    {"job_id": "named unknown", "state": "unknown"},
    {"job_id": "it's 100% :odd", "state": "completed"},
    {"job_id": "twenty characters it", "state": "completed"},
    {"job_id": "l" * 128, "state": "completed"},
    {"job_id": "Case", "state": "completed"},
]
KNOWN = {
    "completed": COMPLETED,
    "completed at": Answer(JobState.COMPLETED, finished_at=ENDED_AT),
    "failed": FAILED,
    "failed by the user": Answer(JobState.FAILED, origin=ErrorOrigin.USER),
    "failed at": Answer(JobState.FAILED, finished_at=ENDED_AT),
    "timed out": Answer(JobState.TIMED_OUT),
    "timed out with a result": Answer(JobState.TIMED_OUT, result_produced=True),
    "timed out without": Answer(JobState.TIMED_OUT, result_produced=False),
    "rejected": Answer(JobState.REJECTED, stage=SafetyStage.DURING_GENERATION),
    "rejected late": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
    "running": Answer(JobState.RUNNING),
    "named unknown": UNKNOWN,
    "it's 100% :odd": COMPLETED,
    "twenty characters it": COMPLETED,
    "l" * 128: COMPLETED,
    "Case": COMPLETED,
}
COLUMNS = "job_id, state, origin, stage, result_produced, finished_at"
QUERY = f"SELECT {COLUMNS} FROM public.job WHERE job_id = ANY(CAST(:job_ids AS text[]))"
TEN_KB = "x" * 10_000


# --- SQL


@pytest.fixture
def jobs(database: Database) -> Iterator[sa.Engine]:
    """The pipeline's own table, and a session that could write it."""
    engine = create_engine(database.url("postgres"), limits=SessionLimits(statement_timeout_ms=500))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE TABLE public.job (job_id text, state text, origin text, stage text, result_produced boolean,"
                " finished_at timestamptz)"
            )
        )
        connection.execute(
            sa.text("INSERT INTO public.job SELECT * FROM jsonb_populate_recordset(NULL::public.job, :jobs)"),
            {"jobs": json.dumps(JOBS)},
        )
    yield engine
    engine.dispose()


class TestSqlSource(JobSourceContract):
    """The SQL adapter keeps the contract that the sweep relies on."""

    @pytest.fixture
    def source(self, jobs: sa.Engine) -> JobSource:
        return SqlSource(jobs, QUERY)

    @pytest.fixture
    def known(self) -> dict[str, Answer]:
        return KNOWN


WRITES = {
    "update": "UPDATE public.job SET state = 'completed' WHERE job_id = ANY(:job_ids) RETURNING job_id, state",
    "delete in a CTE": "WITH gone AS (DELETE FROM public.job RETURNING *)"
    " SELECT job_id, state FROM gone WHERE job_id = ANY(:job_ids)",
    "row locks": "SELECT job_id, state FROM public.job WHERE job_id = ANY(:job_ids) FOR UPDATE",
    "sequence": "SELECT j AS job_id, nextval('kino.charge_charge_id_seq')::text AS state"
    " FROM unnest(CAST(:job_ids AS text[])) j",
    "switching it off": "SELECT j AS job_id, set_config('transaction_read_only', 'off', false) AS state"
    " FROM unnest(CAST(:job_ids AS text[])) j",
    "two statements": "COMMIT; UPDATE public.job SET state = 'completed' WHERE job_id = ANY(:job_ids)",
}


def asked(source: SqlSource, *job_ids: str) -> dict[str, Answer] | type[Exception]:
    try:
        return dict(source.ask(job_ids))
    except KinoError as error:
        return type(error)


def test_a_query_that_writes_fails(jobs: sa.Engine) -> None:
    """The source is read and never written, whatever the query says and whoever is connected."""
    answers = {name: asked(SqlSource(jobs, query), "failed") for name, query in WRITES.items()}

    assert {name for name, answer in answers.items() if isinstance(answer, dict)} == set()
    with jobs.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM public.job")).scalar() == len(JOBS)
        assert connection.execute(sa.text("SELECT state FROM public.job WHERE job_id = 'failed'")).scalar() == "failed"


def test_a_query_that_hangs_ends(jobs: sa.Engine) -> None:
    """A query that takes too long is no answer, and the connection serves the next ask."""
    hanging = SqlSource(jobs, "SELECT j AS job_id, pg_sleep(60)::text AS state FROM unnest(CAST(:job_ids AS text[])) j")

    with pytest.raises(SourceTimeout, match="statement timeout"):
        hanging.ask(["completed"])

    assert SqlSource(jobs, QUERY).ask(["completed"]) == {"completed": COMPLETED}


BROKEN, FOREIGN = SourceBroken, ForeignAnswer
ROWS: dict[str, type[Exception]] = {
    "(VALUES ('a', 'gone fishing')) v (job_id, state)": BROKEN,
    "(VALUES ('a', NULL)) v (job_id, state)": BROKEN,
    "(VALUES ('a', 1)) v (job_id, state)": BROKEN,
    "(VALUES ('a', 'failed', 'the intern')) v (job_id, state, origin)": BROKEN,
    "(VALUES ('a', 'rejected', 'sometime')) v (job_id, state, stage)": BROKEN,
    "(VALUES ('a', 'completed'), ('a', 'failed')) v (job_id, state)": BROKEN,
    "(VALUES ('a', 'failed', 'user'), ('a', 'failed', 'platform')) v (job_id, state, origin)": BROKEN,
    "(VALUES ('a', 'timed_out', 1)) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', 'false')) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', 't')) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', true), ('a', 'timed_out', false)) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'completed', timestamp '2026-11-01 12:00')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', date '2026-11-01')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', '2026-11-01 12:00')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 1793534400)) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 'NaN'::float8)) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 'infinity'::timestamptz)) v (job_id, state, finished_at)": SourceUnavailable,
    "(VALUES ('a', 'completed'), ('a ', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('a'::char(20), 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('A', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('a', 'completed'), ('c', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('c', NULL)) v (job_id, state)": FOREIGN,
    "(VALUES (NULL, NULL)) v (job_id, state)": FOREIGN,
    "(VALUES (NULL, 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES (1, 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('NaN'::float8, 'completed')) v (job_id, state)": FOREIGN,
    "public.job": FOREIGN,
    "(SELECT 'a' AS job_id, 'completed' AS state, generate_series(1, 1000000000)) v": FOREIGN,
    "(VALUES ('a')) v (job_id)": BadSettings,
    "(VALUES ('completed')) v (state)": BadSettings,
    "(VALUES ('a', 'completed')) v (\"JOB_ID\", state)": BadSettings,
    "(SELECT WHERE false) v": BadSettings,
    "public.elsewhere": BadSettings,
}


@pytest.mark.parametrize(("rows", "error"), ROWS.items(), ids=ROWS)
def test_what_is_no_row_of_the_contract_is_no_answer(jobs: sa.Engine, rows: str, error: type[Exception]) -> None:
    """A row that cannot be read is its job's error, one of another job everybody's, other columns the setting's."""
    source = SqlSource(jobs, f"SELECT * FROM {rows} WHERE CAST(:job_ids AS text[]) IS NOT NULL")

    assert asked(source, "a", "b") is error


def test_the_same_answer_twice_is_one_answer(jobs: sa.Engine) -> None:
    """A join that doubles rows does no harm as long as they agree."""
    source = SqlSource(jobs, f"{QUERY} UNION ALL {QUERY}")

    assert source.ask(["failed"]) == {"failed": FAILED}


def test_ids_of_any_length_and_kind_are_asked_for(jobs: sa.Engine) -> None:
    """A 10 kB id is an id; one with NUL, which no database can hold, is an error and not an answer."""
    source = SqlSource(jobs, QUERY)

    assert source.ask([TEN_KB, "\x1b[31m", "failed"]) == {TEN_KB: UNKNOWN, "\x1b[31m": UNKNOWN, "failed": FAILED}
    with pytest.raises(SourceUnavailable, match="0x00"):
        source.ask(["a\x00b"])


# --- HTTP

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def honest(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    known = {each["job_id"]: each for each in JOBS}
    jobs = [known.get(job_id, {"job_id": job_id, "state": "unknown"}) for job_id in asked["job_ids"]]
    nulls = dict.fromkeys(("origin", "stage", "result_produced", "finished_at"))
    answer = {"jobs": [nulls | {"more": {"is": "ignored"}} | job for job in jobs], "took_ms": 3}
    send(handler, json.dumps(answer).encode())


class Endpoint:
    """A real HTTP server whose reply the test chooses; remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = honest
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        self.ended = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, self.headers["Authorization"], asked))
                try:
                    endpoint.reply(self, asked)
                except OSError:
                    self.close_connection = True  # the client hung up

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jobs"

    @contextmanager
    def serving(self) -> Iterator[Self]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            self.server.shutdown()
            thread.join()
            self.server.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with Endpoint().serving() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.reply = honest
    server.requests.clear()
    return server


@pytest.fixture
def http_source(endpoint: Endpoint) -> Iterator[HttpSource]:
    with httpx.Client(timeout=0.5, trust_env=False) as client:
        yield HttpSource(client, endpoint.url)


class TestHttpSource(JobSourceContract):
    """The HTTP adapter keeps the contract that the sweep relies on."""

    @pytest.fixture
    def source(self, http_source: HttpSource) -> JobSource:
        return http_source

    @pytest.fixture
    def known(self) -> dict[str, Answer]:
        return KNOWN


def body(content: bytes, status: int = 200, **headers: str) -> Reply:
    return lambda handler, _: send(handler, content, status, **headers)


def rows(*rows: dict[str, Any]) -> Reply:
    return body(json.dumps({"jobs": rows}).encode())


def cut_off(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    send(handler, b'{"jobs": []', Content_Length="1000")


def huge(handler: BaseHTTPRequestHandler, _asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(ANSWER_BYTES_MAX // 2**16 + 2):
        handler.wfile.write(b" " * 2**16)


A_ROW: dict[str, Any] = {"job_id": "a", "state": "completed"}
NO_ANSWER, NOWHERE = SourceUnavailable, SourceUnreachable
LIES: dict[str, tuple[Reply, type[Exception]]] = {
    "an error": (body(b'{"jobs": []}', 500), NO_ANSWER),
    "another good status": (body(b'{"jobs": [{"job_id": "a", "state": "completed"}]}', 203), NO_ANSWER),
    "no content": (body(b"", 204), NO_ANSWER),
    "not found": (body(b"not here", 404), NOWHERE),
    "a wrong token": (body(b"who are you?", 401), NOWHERE),
    "a redirect": (body(b"", 307, Location="/elsewhere"), NOWHERE),
    "a redirect to nowhere": (body(b"", 302), NOWHERE),
    "nothing": (body(b""), BROKEN),
    "no json": (body(b"<html>a login page</html>"), BROKEN),
    "no utf-8": (body(b'{"jobs": [{"job_id": "\xff", "state": "completed"}]}'), BROKEN),
    "json cut off": (cut_off, NO_ANSWER),
    "an array": (body(b"[]"), BROKEN),
    "null": (body(b"null"), BROKEN),
    "no jobs": (body(b"{}"), BROKEN),
    "jobs of another kind": (body(b'{"jobs": {"a": "completed"}}'), BROKEN),
    "a job of another kind": (body(b'{"jobs": ["a"]}'), BROKEN),
    "deep": (body(b'{"jobs": ' + b"[" * 100_000), BROKEN),
    "huge": (huge, NO_ANSWER),
    "a lying encoding": (body(b"not gzip", Content_Encoding="gzip"), NO_ANSWER),
    "an unknown word": (rows(A_ROW | {"state": "gone fishing"}), BROKEN),
    "a state of another kind": (rows(A_ROW | {"state": ["completed"]}), BROKEN),
    "an unknown origin": (rows(A_ROW | {"state": "failed", "origin": "the intern"}), BROKEN),
    "no state": (rows({"job_id": "a"}), BROKEN),
    "null as state": (rows(A_ROW | {"state": None}), BROKEN),
    "a result of another kind": (rows(A_ROW | {"state": "timed_out", "result_produced": "false"}), BROKEN),
    "a result that is a number": (rows(A_ROW | {"state": "timed_out", "result_produced": 0}), BROKEN),
    "a time without offset": (rows(A_ROW | {"finished_at": "2026-11-01T12:00:00"}), BROKEN),
    "a time that is a number": (rows(A_ROW | {"finished_at": 1793534400}), BROKEN),
    "no such day": (rows(A_ROW | {"finished_at": "2026-02-30T12:00:00Z"}), BROKEN),
    "an endless time": (rows(A_ROW | {"finished_at": float("inf")}), BROKEN),
    "NaN as time": (rows(A_ROW | {"finished_at": float("nan")}), BROKEN),
    "two answers": (rows(A_ROW, A_ROW | {"state": "failed"}), BROKEN),
    "two times": (rows(A_ROW, A_ROW | {"finished_at": "2026-11-01T12:00:00Z"}), BROKEN),
    "no id": (rows({"state": "completed"}), FOREIGN),
    "null as id": (rows(A_ROW | {"job_id": None}), FOREIGN),
    "NaN as id": (rows(A_ROW | {"job_id": float("nan")}), FOREIGN),
    "an id of another kind": (rows(A_ROW | {"job_id": 1}), FOREIGN),
    "an id that cannot be a key": (rows(A_ROW | {"job_id": ["a"]}), FOREIGN),
    "a padded id": (rows(A_ROW | {"job_id": "a  "}), FOREIGN),
    "a folded id": (rows(A_ROW | {"job_id": "A"}), FOREIGN),
    "another's row beside ours": (rows(A_ROW, A_ROW | {"job_id": "c"}), FOREIGN),
    "another's unreadable row": (rows(A_ROW, {"job_id": "c"}), FOREIGN),
}


@pytest.mark.parametrize(("lie", "error"), LIES.values(), ids=LIES)
def test_what_is_not_an_answer_is_an_error(
    endpoint: Endpoint, http_source: HttpSource, lie: Reply, error: type[Exception]
) -> None:
    """Anything but a readable 200 for the jobs that were asked settles nothing, and the next ask is answered."""
    endpoint.reply = lie

    with pytest.raises(KinoError) as caught:
        http_source.ask(["a", "b"])

    assert type(caught.value) is error
    endpoint.reply = honest
    assert http_source.ask(["failed"]) == {"failed": FAILED}


def test_a_redirect_is_not_followed(endpoint: Endpoint, http_source: HttpSource) -> None:
    """The token goes to the configured place and to no other."""
    endpoint.reply = body(b"", 307, Location="/elsewhere")

    with pytest.raises(SourceUnavailable, match="status 307"):
        http_source.ask(["a"])

    assert [path for path, _, _ in endpoint.requests] == ["/jobs"]


def test_a_job_that_is_missing_was_not_answered(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Silence about a job is not `unknown`."""
    endpoint.reply = rows({"job_id": "a", "state": "failed"})

    assert http_source.ask(["a", "b"]) == {"a": FAILED}


def test_an_endpoint_that_hangs_is_no_answer(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Who accepts the question and says nothing has not answered."""

    def hang(_: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        endpoint.ended.wait(30)

    endpoint.reply = hang

    with pytest.raises(SourceTimeout, match="did not answer in time"):
        http_source.ask(["a"])


def test_an_endpoint_that_drips_is_no_answer(endpoint: Endpoint, http_source: HttpSource) -> None:
    """The time-out is for the answer, not for each byte of it: a drip must not hold up the sweep for hours."""

    def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        answer = b'{"jobs": [{"job_id": "a", "state": "failed"}]}'
        handler.send_response(200)
        handler.end_headers()
        for start in range(0, len(answer), 4):
            handler.wfile.write(answer[start : start + 4])
            endpoint.ended.wait(0.1)

    endpoint.reply = drip

    with pytest.raises(SourceTimeout):
        http_source.ask(["a"])


def test_nobody_there_is_no_answer() -> None:
    """A closed port is an error like any other."""
    with httpx.Client(timeout=0.5, trust_env=False) as client, pytest.raises(SourceUnreachable, match="refused"):
        HttpSource(client, "http://127.0.0.1:9/jobs").ask(["a"])


def test_ids_travel_as_they_are(endpoint: Endpoint, http_source: HttpSource) -> None:
    """NUL, escapes and 10 kB are only text in a JSON body."""
    odd = ["a\x00b", "\x1b[31m", TEN_KB, '"}]}', "\U0001f3ac"]

    answers = http_source.ask(odd)

    assert answers == dict.fromkeys(odd, UNKNOWN)
    assert endpoint.requests == [("/jobs", None, {"job_ids": odd})]


def test_what_is_said_of_an_error_is_short() -> None:
    """An error names the field and not the answer's content: that may be anything, and is logged."""
    with pytest.raises(SourceBroken) as caught:
        read_answers([{"job_id": "a", "state": "\x1b[31m" + TEN_KB}], ["a"])

    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


# --- the contract itself


class Knows:
    """A source in Python that knows KNOWN, and then says what the test makes of it."""

    def __init__(self, lie: Lie) -> None:
        self._lie = lie

    def ask(self, job_ids: Sequence[str]) -> Any:
        return self._lie(job_ids, {job_id: KNOWN.get(job_id, UNKNOWN) for job_id in job_ids})


Lie = Callable[[Sequence[str], dict[str, Answer]], Any]


def told(**changes: Any) -> Lie:
    """A source that says the same of each answer, whatever it knows."""
    return lambda _, true: {job_id: replace(answer, **changes) for job_id, answer in true.items()}


def never_twice(job_ids: Sequence[str], true: dict[str, Answer]) -> dict[str, Answer]:
    return true if len(job_ids) == len(true) else {}


CLOCK = iter(range(10**6))
CARELESS: dict[str, tuple[Lie, str]] = {
    "honest": (lambda _, true: true, ""),
    "pads": (lambda _, true: {job_id.ljust(20): a for job_id, a in true.items()}, "no_other_job_is_answered_for"),
    "cuts": (lambda _, true: {job_id[:20]: a for job_id, a in true.items()}, "no_other_job_is_answered_for"),
    "strips": (
        lambda _, true: {job_id: KNOWN.get(job_id.strip(), UNKNOWN) for job_id in true},
        "a_like_id_is_not_the_job",
    ),
    "folds": (
        lambda _, true: {
            job_id: {k.lower(): a for k, a in KNOWN.items()}.get(job_id.lower(), UNKNOWN) for job_id in true
        },
        "a_like_id_is_not_the_job",
    ),
    "gives the whole table": (lambda _, true: KNOWN | true, "no_other_job_is_answered_for"),
    "answers by place": (
        lambda ids, _: dict(zip(ids, [KNOWN.get(each, UNKNOWN) for each in sorted(ids)], strict=True)),
        "the_order_does_not_matter",
    ),
    "is confused by an id twice": (never_twice, "a_job_asked_twice_is_answered_once"),
    "leaves out what it does not know": (
        lambda _, true: {job_id: a for job_id, a in true.items() if job_id in KNOWN},
        "an_unheard_of_job_is_unknown",
    ),
    "takes forty at most": (lambda _, true: dict([*true.items()][:40]), "a_whole_batch_is_answered"),
    "has no result": (told(result_produced=False), "known_jobs_are_answered_as_they_are"),
    "has no time": (told(finished_at=None), "known_jobs_are_answered_as_they_are"),
    "has no origin": (told(origin=ErrorOrigin.UNKNOWN), "known_jobs_are_answered_as_they_are"),
    "has no stage": (told(stage=SafetyStage.DURING_GENERATION), "known_jobs_are_answered_as_they_are"),
    "says the time of the ask": (
        lambda _, true: {j: replace(a, finished_at=ENDED_AT + timedelta(next(CLOCK))) for j, a in true.items()},
        "asking_again_gives_the_same",
    ),
    "gives rows": (lambda _, true: [*true.items()], "every_value_is_an_answer"),
    "gives words": (lambda _, true: {job_id: a.state for job_id, a in true.items()}, "every_value_is_an_answer"),
    "knows jobs in a crowd only": (
        lambda ids, true: true if len(ids) > 1 else dict.fromkeys(true, UNKNOWN),
        "each_job_is_answered_alone_as_among_others",
    ),
    "reads wildcards": (
        lambda _, true: true | {"%": COMPLETED} if "%" in true else true,
        "hostile_ids_are_only_ids",
    ),
    "cuts what is unknown": (
        lambda _, true: {job_id[:100]: a for job_id, a in true.items()} if "l" * 128 not in true else true,
        "an_unheard_of_job_is_unknown_whatever_its_length",
    ),
    "errs for all where one is unknown": (
        lambda _, true: true if true.keys() <= KNOWN.keys() else dict.fromkeys(true, UNKNOWN),
        "one_unheard_of_job_spoils_no_other_answer",
    ),
}


def broken_promises(source: Knows) -> set[str]:
    """The tests of the contract that this source fails."""
    broken = set()
    for name, test in vars(JobSourceContract).items():
        if name.startswith("test_"):
            given: dict[str, Any] = {"source": source, "known": KNOWN}
            wanted = {each: given[each] for each in inspect.signature(test).parameters if each in given}
            try:
                test(JobSourceContract(), **wanted)
            except Exception:  # noqa: BLE001 - whatever a careless source makes of its test, it is not passed
                broken.add(name.removeprefix("test_"))
    return broken


@pytest.mark.parametrize(("lie", "promise"), CARELESS.values(), ids=CARELESS)
def test_the_contract_finds_a_careless_source(lie: Lie, promise: str) -> None:
    """Each careless source fails the test that speaks of its carelessness; an honest one fails none."""
    broken = broken_promises(Knows(lie))

    assert promise in broken if promise else broken == set()


def test_every_promise_of_the_contract_is_broken_by_somebody() -> None:
    """No test of the contract is hollow: for each there is a careless source that fails it."""
    promises = {name.removeprefix("test_") for name in vars(JobSourceContract) if name.startswith("test_")}

    assert promises == {promise for _, promise in CARELESS.values() if promise}


# --- settings


def settings(**chosen: Any) -> Settings:
    secret = {"job_source_url", "job_source_token"}
    values: dict[str, Any] = {name: SecretStr(value) if name in secret else value for name, value in chosen.items()}
    return Settings.model_construct(None, **values)


SQL_URL = "postgresql://kino_read@127.0.0.1/kino"
WRONG: dict[str, tuple[Settings, str]] = {
    "unset": (settings(), "KINO_JOB_SOURCE is not set"),
    "sql without url": (settings(job_source="sql", job_source_query=QUERY), "needs KINO_JOB_SOURCE_URL"),
    "sql without query": (settings(job_source="sql", job_source_url=SQL_URL), "needs KINO_JOB_SOURCE_QUERY"),
    "sql with a query that asks for nobody": (
        settings(job_source="sql", job_source_url=SQL_URL, job_source_query="SELECT 1"),
        "with the parameter :job_ids",
    ),
    "sql with a parameter that nobody gives": (
        settings(job_source="sql", job_source_url=SQL_URL, job_source_query=f"{QUERY} AND state <> :state"),
        "has the parameter :state, and only :job_ids is given",
    ),
    **{
        f"sql at {url}": (settings(job_source="sql", job_source_url=url, job_source_query=QUERY), says)
        for url, says in {
            "mysql://h/d": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but mysql; for example postgresql://",
            "sqlite:///d": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but sqlite",
            "https://jobs.example/ask": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but https",
            "redis://h:6379/0": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but redis",
            "postgresql://u:hunter2@h:port/d": "KINO_JOB_SOURCE_URL cannot be read",
            "postgresql://u:hun@ter2@h/d": "KINO_JOB_SOURCE_URL cannot be read",
            "jobs": "KINO_JOB_SOURCE_URL cannot be read",
            "postgresql://h/d?no_such_option=1": "has options that Postgres does not know: no_such_option",
        }.items()
    },
    "http with a token that is none": (
        settings(job_source="http", job_source_url="https://h/ask", job_source_token="hunter2ö"),
        "KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry",
    ),
    "http with a token of two lines": (
        settings(job_source="http", job_source_url="https://h/ask", job_source_token="hunter2\nX-Admin: 1"),
        "KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry",
    ),
    **{
        f"http at {url!a}": (settings(job_source="http", job_source_url=url), "KINO_JOB_SOURCE_URL cannot be read")
        for url in ("http://[::1/ask", "https://u:hunter2@h:port/ask", "https://h:99999/ask", "https://h/\x01")
    },
    "http without url": (settings(job_source="http"), "needs KINO_JOB_SOURCE_URL"),
    **{
        f"http at {url}": (settings(job_source="http", job_source_url=url), "must be https://")
        for url in (
            "http://jobs.example/ask",
            "http://10.0.0.1/ask",
            "http://localhost.example/ask",
            "http://localhost@jobs.example/ask",
            "http://127.0.0.1:80@jobs.example/ask",
            "http://127.0.0.1.example/ask",
            "ftp://localhost/ask",
            "localhost/ask",
            "//localhost/ask",
            "https://",
            "https:///ask",
            "postgresql://h/d",
            "",
        )
    },
}


@pytest.mark.parametrize(("wrong", "says"), WRONG.values(), ids=WRONG)
def test_a_source_that_cannot_be_is_a_clear_error(wrong: Settings, says: str) -> None:
    """What is missing, cannot be read or would send answers in the clear is named on one line, before anybody is asked.

    A password is not in it.
    """
    with pytest.raises(BadSettings, match=re.escape(says)) as caught, source_of(wrong):
        pass

    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_an_error_of_the_source(database: Database) -> None:
    """A port that nobody listens on, a role and a database that do not exist answer for no job, in one line."""
    here = database.url("postgres")
    for url in (
        "postgresql://postgres:hunter2@127.0.0.1:1/kino",
        database.url("nobody_of_this_name"),
        here.rpartition("/")[0] + "/no_such_database",
    ):
        with source_of(settings(job_source="sql", job_source_url=url, job_source_query=QUERY)) as source:
            assert source is not None
            with pytest.raises(SourceUnreachable, match="the job source's database cannot be reached") as caught:
                source.ask(["a"])
        assert str(caught.value).isprintable()
        assert "hunter2" not in str(caught.value)


def test_a_database_that_goes_away_in_the_middle_is_away(jobs: sa.Engine) -> None:
    """A session that ends under the query is no job's doing, and the next ask has another."""
    dying = SqlSource(jobs, "SELECT '' AS job_id, pg_terminate_backend(pg_backend_pid())::text AS state, :job_ids AS j")

    with pytest.raises(SourceUnreachable, match="went away"):
        dying.ask(["completed"])

    assert SqlSource(jobs, QUERY).ask(["completed"]) == {"completed": COMPLETED}


def test_a_time_out_of_less_than_a_millisecond_is_a_limit(database: Database) -> None:
    """The shortest time-out that can be set is the shortest limit that Postgres has, and not none."""
    tiny = settings(
        job_source="sql",
        job_source_url=database.url("postgres"),
        job_source_query="SELECT j AS job_id, pg_sleep(60)::text AS state FROM unnest(CAST(:job_ids AS text[])) j",
        job_source_timeout_s=0.0001,
    )

    with source_of(tiny) as source:
        assert source is not None
        with pytest.raises(SourceUnavailable):
            source.ask(["a"])


class Nowhere(tzinfo):
    """A time zone that fails, as foreign ones may."""

    def __repr__(self) -> str:
        return "Nowhere()"  # without an address: the test is called the same in every process

    def fail(self, _: datetime | None) -> Any:
        raise NotImplementedError

    utcoffset = dst = tzname = fail


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "completed"},
        {"state": None},
        {"state": float("nan")},
        {"origin": "user"},
        {"origin": None},
        {"stage": "after_generation"},
        {"result_produced": 1},
        {"result_produced": "false"},
        {"result_produced": None},
        {"result_produced": float("nan")},
        {"finished_at": datetime(2026, 11, 1)},  # noqa: DTZ001 - what is refused
        {"finished_at": date(2026, 11, 1)},
        {"finished_at": "2026-11-01T12:00:00Z"},
        {"finished_at": 1793534400},
        {"finished_at": float("nan")},
        {"finished_at": datetime(2026, 11, 1, tzinfo=Nowhere())},
        {"finished_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))},
    ],
    ids=str,
)
def test_an_answer_of_wrong_types_cannot_be_built(wrong: dict[str, Any]) -> None:
    """A source in Python learns where it builds an answer that a value is not of its type, not from a settlement."""
    with pytest.raises(SourceBroken):
        Answer(**{"state": JobState.TIMED_OUT, **wrong})


def test_none_says_that_nobody_knows() -> None:
    """Running without a source is said in so many words."""
    with source_of(settings(job_source="none")) as source:
        assert source is None


@pytest.mark.usefixtures("jobs")
def test_the_configured_sources_answer(database: Database, endpoint: Endpoint) -> None:
    """What the settings name is asked, with the token, over http only on loopback."""
    over_http = settings(
        job_source="http", job_source_url=endpoint.url, job_source_token="t0ken", job_source_timeout_s=5.0
    )
    over_sql = settings(
        job_source="sql", job_source_url=database.url("postgres"), job_source_query=QUERY, job_source_timeout_s=5.0
    )

    answers = []
    for each in (over_http, over_sql):
        with source_of(each) as source:
            assert source is not None
            answers.append(dict(source.ask(["failed", "nobody"])))

    assert answers == [{"failed": FAILED, "nobody": UNKNOWN}] * 2
    assert endpoint.requests == [("/jobs", "Bearer t0ken", {"job_ids": ["failed", "nobody"]})]


@pytest.mark.parametrize("url", ["https://jobs.example/ask", "http://localhost:1/ask", "http://[::1]:1/ask"])
def test_where_answers_cannot_be_changed_on_the_way_is_fine(url: str) -> None:
    """Https everywhere, http on this machine only."""
    with source_of(settings(job_source="http", job_source_url=url)) as source:
        assert isinstance(source, HttpSource)
