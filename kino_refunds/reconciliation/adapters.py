"""Job sources that need no code of the product: a read-only SQL query, or an HTTP endpoint (design, section 7)."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import psycopg
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, StrictBool, ValidationError

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
from kino_refunds.events.schema import ErrorOrigin, SafetyStage, Time
from kino_refunds.reconciliation.sources import Answer, JobState, require_asked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings

ANSWER_BYTES_MAX = 4 * 2**20
"""A batch of answers has some 10 kB; a body that is far larger is not an answer."""
ROWS_EACH_MAX = 100
"""Rows that a query may give for each job: a join may double them, but a missing condition gives the whole table."""
QUERY_REFUSED = ("42", "25006", "0A000")
"""SQLSTATEs of a query that Postgres can run for no job: no query at all, wrong names or rights, or one that writes."""
TIMED_OUT = {"57014", "25P04"}
"""SQLSTATEs of the timeout of a statement, and of the whole transaction, after which Postgres ends the session."""


NOT_CHOSEN = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open forever"
NONE_CHOSEN = "KINO_JOB_SOURCE=none: a job whose event is lost counts as timed out and is refunded, completed or not"
HOW_TO_CHOOSE = (
    "set it to sql or http where a table or an endpoint knows how jobs ended, to none only where nothing does"
    ' (deploy/README.md, "Job sources")'
)


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    job_id: str
    state: JobState
    origin: ErrorOrigin | None = None
    stage: SafetyStage | None = None
    # Strict: a driver may give 't', 1 or 'false', all of which are true in Python, and this value decides a refund.
    result_produced: StrictBool | None = None
    finished_at: Time | None = None

    def answer(self) -> Answer:
        return Answer(
            state=self.state,
            origin=self.origin or ErrorOrigin.UNKNOWN,
            stage=self.stage or SafetyStage.DURING_GENERATION,
            result_produced=self.result_produced or False,
            finished_at=self.finished_at,
        )


def read_answers(rows: Iterable[Mapping[str, Any]], asked: Sequence[str]) -> dict[str, Answer]:
    """Return the answers in these rows, by job id.

    Raises ForeignAnswer for a row of another job or of no job; SourceBroken for a row that breaks the contract, or for
    a job with two different answers.
    """
    found = [dict(row) for row in rows]
    require_asked((row.get("job_id") for row in found), asked)
    answers: dict[str, Answer] = {}
    for row in found:
        try:
            answer = _Row.model_validate(row).answer()
        except ValidationError as error:
            first = error.errors()[0]
            raise SourceBroken(f"the job source's {first['loc'][0]}: {first['msg']}") from error
        if answers.setdefault(row["job_id"], answer) != answer:
            raise SourceBroken(f"the job source gives two answers for job {row['job_id']!a:.60}")
    return answers


class SqlSource:
    """A job source that runs a configured query with the parameter `:job_ids`, an array of text.

    The query gives `job_id`, `state` (completed, failed, timed_out, rejected, running or unknown) and, if known,
    `origin`, `stage`, `result_produced` (boolean) and `finished_at` (timestamptz). A job without a row is unknown. The
    query runs in a read-only transaction.
    """

    def __init__(self, engine: sa.Engine, query: str) -> None:
        self._engine = engine
        self._query = sa.text(f"DECLARE answer NO SCROLL CURSOR FOR {query}")

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return the answers of one query, by job id.

        Raises BadSettings for a query that can run for no job, SourceUnavailable (SourceUnreachable if there was no
        connection, SourceTimeout), ForeignAnswer and SourceBroken for rows that are not answers.
        """
        connection = self._connect()
        with connection, connection.begin():
            try:
                connection.execute(sa.text("SET TRANSACTION READ ONLY"))
                rows = self._read(connection, job_ids)
            except sa.exc.DBAPIError as error:
                raise _explained(error) from error
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN)) | read_answers(rows, job_ids)

    def _connect(self) -> sa.Connection:
        try:
            return self._engine.connect()
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            raise SourceUnreachable(f"the job source's database cannot be reached: {_first_line(error)}") from error

    def _read(self, connection: sa.Connection, job_ids: Sequence[str]) -> list[dict[str, Any]]:
        rows_max = ROWS_EACH_MAX * len(job_ids)
        # By a cursor: without one, psycopg would read an endless result into memory before the first row is seen.
        connection.execute(self._query, {"job_ids": list(job_ids)})
        result = connection.execute(sa.text(f"FETCH FORWARD {rows_max + 1} FROM answer"))
        # Checked even if there are no rows: such a query would answer `unknown` for every job, which refunds them.
        missing = sorted({"job_id", "state"} - set(result.keys()))
        if missing:
            raise BadSettings(f"KINO_JOB_SOURCE_QUERY gives no column {' and no '.join(missing)}")
        rows = result.mappings().all()
        if len(rows) > rows_max:
            raise ForeignAnswer(f"the job source gives over {rows_max:,} rows for {len(job_ids):,} jobs")
        return [dict(row) for row in rows]


def _explained(error: sa.exc.DBAPIError) -> KinoError:
    """Return the error for an error of the source's database; SourceUnavailable if one job may be the cause."""
    code, text = getattr(error.orig, "sqlstate", None) or "", _first_line(error)
    if code in TIMED_OUT:
        return SourceTimeout(f"the job source's query did not end in time: {text}")
    if code.startswith(QUERY_REFUSED):
        return BadSettings(f"KINO_JOB_SOURCE_QUERY cannot run: {text}")
    if error.connection_invalidated:
        return SourceUnreachable(f"the job source's database went away: {text}")
    return SourceUnavailable(f"the job source's query failed: {text}")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


class HttpSource:
    """A job source that asks an endpoint: POST `{"job_ids": [...]}` gives `{"jobs": [{"job_id", "state", ...}]}`.

    If known, a job also has `origin`, `stage`, `result_produced` (true or false) and `finished_at` (RFC 3339 with
    offset). A job that the endpoint does not know must be in the answer as `unknown`: a job that is missing was not
    answered. Redirects are not followed, because the token would be sent to the other address.
    """

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return the answers of one request, by job id.

        Raises SourceUnavailable for anything but a readable 200 (SourceUnreachable if there was no connection or no
        right to ask, SourceTimeout), ForeignAnswer and SourceBroken for rows that are not answers.
        """
        body = bytearray()
        read = self._client.timeout.read
        deadline = None if read is None else time.monotonic() + read
        try:
            with self._client.stream("POST", self._url, json={"job_ids": list(job_ids)}) as response:
                if response.status_code != httpx.codes.OK:
                    # Without the right to ask, or at a wrong address, a smaller request would fail as well.
                    refused = response.is_redirect or response.status_code in {401, 403, 404, 405}
                    kind = SourceUnreachable if refused else SourceUnavailable
                    raise kind(f"the job source answered with status {response.status_code}")
                for piece in response.iter_bytes():
                    body += piece
                    if deadline is not None and time.monotonic() > deadline:
                        raise SourceTimeout("the job source did not end its answer in time")
                    if len(body) > ANSWER_BYTES_MAX:
                        raise SourceUnavailable(f"the job source's answer is over {ANSWER_BYTES_MAX:,} bytes")
            rows = _Answers.model_validate_json(bytes(body)).jobs
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise SourceUnreachable(f"the job source cannot be reached: {type(error).__name__}: {error}") from error
        except httpx.TimeoutException as error:
            raise SourceTimeout(f"the job source did not answer in time: {type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise SourceUnavailable(f"the job source did not answer: {type(error).__name__}") from error
        except ValidationError as error:
            raise SourceBroken("the job source's answer is not a JSON object with `jobs`, a list of objects") from error
        return read_answers(rows, job_ids)


class _Answers(BaseModel):
    jobs: list[dict[str, Any]]


@contextmanager
def source_of(settings: Settings) -> Iterator[JobSource | None]:
    """Open the configured source; None if the setting says that there is none. Raises BadSettings."""
    match settings.job_source:
        case None:
            raise BadSettings(f"{NOT_CHOSEN}; {HOW_TO_CHOOSE}")
        case "none":
            yield None
        case "sql":
            url, query = settings.require_job_source_database_url(), settings.job_source_query or ""
            parameters = set(sa.text(query).compile().params)
            if "job_ids" not in parameters:
                raise BadSettings("KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids")
            if others := sorted(parameters - {"job_ids"}):
                raise BadSettings(
                    f"KINO_JOB_SOURCE_QUERY has the parameter :{others[0]}, and only :job_ids is given;"
                    " write a colon that begins no parameter as \\:"
                )
            limit_ms = max(1, int(settings.job_source_timeout_s * 1000))  # 0 means no limit in Postgres
            limits = SessionLimits(statement_timeout_ms=limit_ms, transaction_timeout_ms=limit_ms)
            engine = create_engine(url, limits=limits, application_name="kino-job-source", holds_ledger=False)
            try:
                yield SqlSource(engine, query)
            finally:
                engine.dispose()
        case "http":
            url = _require_private(settings)
            token = settings.job_source_token.get_secret_value() if settings.job_source_token else ""
            if not (token.isascii() and token.isprintable()):
                raise BadSettings("KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry")
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            with httpx.Client(timeout=settings.job_source_timeout_s, headers=headers, trust_env=False) as client:
                yield HttpSource(client, url)


def _require_private(settings: Settings) -> str:
    """Return the endpoint's URL if its answers cannot be read or changed on the network; raises BadSettings."""
    if settings.job_source_url is None:
        raise BadSettings("KINO_JOB_SOURCE=http needs KINO_JOB_SOURCE_URL; for example https://HOST/jobs")
    url = settings.job_source_url.get_secret_value()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):  # their texts may quote a password
        raise BadSettings("KINO_JOB_SOURCE_URL cannot be read as a URL; for example https://HOST/jobs") from None
    local = host in {"localhost", "127.0.0.1", "::1"}
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and local)):
        raise BadSettings("KINO_JOB_SOURCE_URL must be https:// (http:// on loopback only): its answers move money")
    return url
