"""The two job sources that need no code, against a real table and a real endpoint, honest and lying."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.errors import BadSettings, SourceUnavailable
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.adapters import ANSWER_BYTES_MAX, HttpSource, SqlSource, read_answers, source_of
from kino_refunds.reconciliation.contract import JobSourceContract
from kino_refunds.reconciliation.sources import Answer, JobSource, JobState
from kino_refunds.settings import Settings
from tests.conftest import Database

UNKNOWN, COMPLETED, FAILED = Answer(JobState.UNKNOWN), Answer(JobState.COMPLETED), Answer(JobState.FAILED)
JOBS: dict[str, tuple[str, str | None, str | None]] = {
    "completed": ("completed", None, None),
    "failed": ("failed", None, None),
    "failed by the user": ("failed", "user", None),
    "timed out": ("timed_out", None, None),
    "rejected": ("rejected", None, None),
    "rejected late": ("rejected", None, "after_generation"),
    "running": ("running", None, None),
    "named unknown": ("unknown", None, None),
    "it's 100% :odd": ("completed", None, None),
}
KNOWN = {
    "completed": COMPLETED,
    "failed": FAILED,
    "failed by the user": Answer(JobState.FAILED, origin=ErrorOrigin.USER),
    "timed out": Answer(JobState.TIMED_OUT),
    "rejected": Answer(JobState.REJECTED, stage=SafetyStage.DURING_GENERATION),
    "rejected late": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
    "running": Answer(JobState.RUNNING),
    "named unknown": UNKNOWN,
    "it's 100% :odd": COMPLETED,
}
QUERY = "SELECT job_id, state, origin, stage FROM public.job WHERE job_id = ANY(CAST(:job_ids AS text[]))"
TEN_KB = "x" * 10_000


# --- SQL


@pytest.fixture
def jobs(database: Database) -> Iterator[sa.Engine]:
    """The pipeline's own table, and a session that could write it."""
    engine = create_engine(database.url("postgres"), limits=SessionLimits(statement_timeout_ms=500))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE public.job (job_id text, state text, origin text, stage text)"))
        for job_id, (state, origin, stage) in JOBS.items():
            connection.execute(
                sa.text("INSERT INTO public.job VALUES (:job_id, :state, :origin, :stage)"),
                {"job_id": job_id, "state": state, "origin": origin, "stage": stage},
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
    except (SourceUnavailable, sa.exc.DBAPIError) as error:
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

    with pytest.raises(sa.exc.OperationalError, match="statement timeout"):
        hanging.ask(["completed"])

    assert SqlSource(jobs, QUERY).ask(["completed"]) == {"completed": COMPLETED}


UNREADABLE = (
    "(VALUES ('a', 'gone fishing')) v (job_id, state)",
    "(VALUES ('a', NULL)) v (job_id, state)",
    "(VALUES ('a', 'failed', 'the intern')) v (job_id, state, origin)",
    "(VALUES ('a', 'rejected', 'sometime')) v (job_id, state, stage)",
    "(VALUES (NULL, 'completed')) v (job_id, state)",
    "(VALUES (1, 'completed')) v (job_id, state)",
    "(VALUES ('a')) v (job_id)",
    "(VALUES ('completed')) v (state)",
    "(VALUES ('a', 'completed'), ('a', 'failed')) v (job_id, state)",
    "(VALUES ('a', 'failed', 'user'), ('a', 'failed', 'platform')) v (job_id, state, origin)",
)


def test_an_unreadable_row_is_an_error_and_not_an_answer(jobs: sa.Engine) -> None:
    """Words that the contract does not have, missing columns and two answers for one job settle nothing."""
    answers = {
        rows: asked(SqlSource(jobs, f"SELECT * FROM {rows} WHERE CAST(:job_ids AS text[]) IS NOT NULL"), "a", "b")
        for rows in UNREADABLE
    }

    assert answers == dict.fromkeys(UNREADABLE, SourceUnavailable)


def test_rows_of_other_jobs_are_ignored(jobs: sa.Engine) -> None:
    """A query that gives the whole table answers only for those who were asked for."""
    source = SqlSource(jobs, "SELECT * FROM public.job WHERE CAST(:job_ids AS text[]) IS NOT NULL")

    assert source.ask(["failed", "nobody"]) == {"failed": FAILED, "nobody": UNKNOWN}


def test_the_same_answer_twice_is_one_answer(jobs: sa.Engine) -> None:
    """A join that doubles rows does no harm as long as they agree."""
    source = SqlSource(jobs, f"{QUERY} UNION ALL {QUERY}")

    assert source.ask(["failed"]) == {"failed": FAILED}


def test_ids_of_any_length_and_kind_are_asked_for(jobs: sa.Engine) -> None:
    """A 10 kB id is an id; one with NUL, which no database can hold, is an error and not an answer."""
    source = SqlSource(jobs, QUERY)

    assert source.ask([TEN_KB, "\x1b[31m", "failed"]) == {TEN_KB: UNKNOWN, "\x1b[31m": UNKNOWN, "failed": FAILED}
    with pytest.raises(sa.exc.DBAPIError):
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
    jobs = []
    for job_id in asked["job_ids"]:
        state, origin, stage = JOBS.get(job_id, ("unknown", None, None))
        jobs.append({"job_id": job_id, "state": state, "origin": origin, "stage": stage, "more": {"is": "ignored"}})
    send(handler, json.dumps({"jobs": jobs, "took_ms": 3}).encode())


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


LIES: dict[str, Reply] = {
    "an error": body(b'{"jobs": []}', 500),
    "another good status": body(b'{"jobs": [{"job_id": "a", "state": "completed"}]}', 203),
    "no content": body(b"", 204),
    "not found": body(b"not here", 404),
    "a redirect": body(b"", 307, Location="/elsewhere"),
    "nothing": body(b""),
    "no json": body(b"<html>a login page</html>"),
    "no utf-8": body(b'{"jobs": [{"job_id": "\xff", "state": "completed"}]}'),
    "json cut off": cut_off,
    "an array": body(b"[]"),
    "null": body(b"null"),
    "no jobs": body(b"{}"),
    "jobs of another kind": body(b'{"jobs": {"a": "completed"}}'),
    "a job of another kind": body(b'{"jobs": ["a"]}'),
    "deep": body(b'{"jobs": ' + b"[" * 100_000),
    "huge": huge,
    "a lying encoding": body(b"not gzip", Content_Encoding="gzip"),
    "an unknown word": rows({"job_id": "a", "state": "gone fishing"}),
    "a state of another kind": rows({"job_id": "a", "state": ["completed"]}),
    "an unknown origin": rows({"job_id": "a", "state": "failed", "origin": "the intern"}),
    "no state": rows({"job_id": "a"}),
    "no id": rows({"state": "completed"}),
    "an id of another kind": rows({"job_id": 1, "state": "completed"}),
    "two answers": rows({"job_id": "a", "state": "completed"}, {"job_id": "a", "state": "failed"}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_is_not_an_answer_is_an_error(endpoint: Endpoint, http_source: HttpSource, lie: Reply) -> None:
    """Anything but a readable 200 settles nothing, and the next ask is answered."""
    endpoint.reply = lie

    with pytest.raises(SourceUnavailable):
        http_source.ask(["a", "b"])

    endpoint.reply = honest
    assert http_source.ask(["failed"]) == {"failed": FAILED}


def test_a_redirect_is_not_followed(endpoint: Endpoint, http_source: HttpSource) -> None:
    """The token goes to the configured place and to no other."""
    endpoint.reply = body(b"", 307, Location="/elsewhere")

    with pytest.raises(SourceUnavailable, match="status 307"):
        http_source.ask(["a"])

    assert [path for path, _, _ in endpoint.requests] == ["/jobs"]


def test_a_job_that_is_missing_was_not_answered(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Silence about a job is not `unknown`, and answers about others are ignored."""
    endpoint.reply = rows({"job_id": "a", "state": "failed"}, {"job_id": "not asked for", "state": "failed"})

    assert http_source.ask(["a", "b"]) == {"a": FAILED}


def test_an_endpoint_that_hangs_is_no_answer(endpoint: Endpoint, http_source: HttpSource) -> None:
    """Who accepts the question and says nothing has not answered."""

    def hang(_: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        endpoint.ended.wait(30)

    endpoint.reply = hang

    with pytest.raises(SourceUnavailable, match="did not answer"):
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

    with pytest.raises(SourceUnavailable):
        http_source.ask(["a"])


def test_nobody_there_is_no_answer() -> None:
    """A closed port is an error like any other."""
    with httpx.Client(timeout=0.5, trust_env=False) as client, pytest.raises(SourceUnavailable):
        HttpSource(client, "http://127.0.0.1:9/jobs").ask(["a"])


def test_ids_travel_as_they_are(endpoint: Endpoint, http_source: HttpSource) -> None:
    """NUL, escapes and 10 kB are only text in a JSON body."""
    odd = ["a\x00b", "\x1b[31m", TEN_KB, '"}]}', "\U0001f3ac"]

    answers = http_source.ask(odd)

    assert answers == dict.fromkeys(odd, UNKNOWN)
    assert endpoint.requests == [("/jobs", None, {"job_ids": odd})]


def test_what_is_said_of_an_error_is_short() -> None:
    """An error names the field and not the answer's content: that may be anything, and is logged."""
    with pytest.raises(SourceUnavailable) as caught:
        read_answers([{"job_id": "a", "state": "\x1b[31m" + TEN_KB}], ["a"])

    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


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
            "",
        )
    },
}
NO_ADDRESS = settings(job_source="http", job_source_url="http://[::1/ask"), "KINO_JOB_SOURCE_URL"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(pytest.param(*case, id=name) for name, case in WRONG.items()),
        pytest.param(*NO_ADDRESS, id="http at no address"),
    ],
)
def test_a_source_that_cannot_be_is_a_clear_error(wrong: Settings, says: str) -> None:
    """What is missing or would send answers in the clear is named, before anybody is asked."""
    with pytest.raises(BadSettings, match=says), source_of(wrong):
        pass


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
