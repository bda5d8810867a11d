"""Job sources that need no code: a read-only SQL query, or an HTTP endpoint (design, section 7)."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, ValidationError

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.errors import BadSettings, SourceUnavailable
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.sources import Answer, JobState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings

ANSWER_BYTES_MAX = 4 * 2**20
"""A batch of answers is some 10 kB; what is far larger is not an answer."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    job_id: str
    state: JobState
    origin: ErrorOrigin | None = None
    stage: SafetyStage | None = None


def read_answers(rows: Iterable[Mapping[str, Any]], asked: Sequence[str]) -> dict[str, Answer]:
    """Turn rows into answers for the jobs that were asked for; others are ignored.

    Raises SourceUnavailable if a row is not what the contract says, or a job has two different answers: an
    answer that cannot be read is an error, and the sweep finds out which job it belongs to.
    """
    wanted = set(asked)
    answers: dict[str, Answer] = {}
    for row in rows:
        try:
            read = _Row.model_validate(dict(row))
        except ValidationError as error:
            first = error.errors()[0]
            raise SourceUnavailable(f"the job source's {first['loc']}: {first['msg']}") from error
        if read.job_id not in wanted:
            continue
        answer = Answer(read.state, read.origin or ErrorOrigin.UNKNOWN, read.stage or SafetyStage.DURING_GENERATION)
        if answers.setdefault(read.job_id, answer) != answer:
            raise SourceUnavailable(f"the job source gives two answers for job {read.job_id}")
    return answers


class SqlSource:
    """Asks a database by a configured query with the parameter `:job_ids`, an array of text.

    The query gives `job_id`, `state` (completed, failed, timed_out, rejected, running or unknown) and, where
    known, `origin` and `stage`; a job without a row is unknown. It runs in a read-only transaction.
    """

    def __init__(self, engine: sa.Engine, query: str) -> None:
        self._engine = engine
        self._query = sa.text(query)

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Answer by one query; raises what the database raises, and SourceUnavailable for an unreadable row."""
        with self._engine.connect() as connection, connection.begin():
            connection.execute(sa.text("SET TRANSACTION READ ONLY"))
            rows = connection.execute(self._query, {"job_ids": list(job_ids)}).mappings().all()
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN)) | read_answers(map(dict, rows), job_ids)


class HttpSource:
    """Asks an endpoint: POST `{"job_ids": [...]}` gives `{"jobs": [{"job_id", "state", "origin"?, "stage"?}]}`.

    A job that the endpoint does not know must be in the answer as `unknown`: one that is missing was not
    answered. Redirects are not followed, for the token would go along.
    """

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Answer by one request; raises SourceUnavailable for anything but a readable 200."""
        body = bytearray()
        read = self._client.timeout.read
        deadline = None if read is None else time.monotonic() + read
        try:
            with self._client.stream("POST", self._url, json={"job_ids": list(job_ids)}) as response:
                if response.status_code != httpx.codes.OK:
                    raise SourceUnavailable(f"the job source answered with status {response.status_code}")
                for piece in response.iter_bytes():
                    body += piece
                    if deadline is not None and time.monotonic() > deadline:
                        raise SourceUnavailable("the job source did not end its answer in time")
                    if len(body) > ANSWER_BYTES_MAX:
                        raise SourceUnavailable(f"the job source's answer is over {ANSWER_BYTES_MAX:,} bytes")
            rows = _Answers.model_validate_json(bytes(body)).jobs
        except httpx.HTTPError as error:
            raise SourceUnavailable(f"the job source did not answer: {type(error).__name__}") from error
        except ValidationError as error:
            raise SourceUnavailable("the job source's answer is not of its shape") from error
        return read_answers(rows, job_ids)


class _Answers(BaseModel):
    jobs: list[dict[str, Any]]


@contextmanager
def source_of(settings: Settings) -> Iterator[JobSource | None]:
    """Open the configured source; None where the setting says that there is none. Raises BadSettings."""
    match settings.job_source:
        case None:
            raise BadSettings(
                "KINO_JOB_SOURCE is not set: sql or http ask somebody; none says that nobody knows of jobs,"
                " and settles overdue ones in one pass"
            )
        case "none":
            yield None
        case "sql":
            _needed(settings, "sql")
            url, query = settings.require_job_source_database_url(), settings.job_source_query
            if not query or ":job_ids" not in query:
                raise BadSettings("KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids")
            limit_ms = int(settings.job_source_timeout_s * 1000)
            limits = SessionLimits(statement_timeout_ms=limit_ms, transaction_timeout_ms=limit_ms)
            engine = create_engine(url, limits=limits, application_name="kino-job-source", holds_ledger=False)
            try:
                yield SqlSource(engine, query)
            finally:
                engine.dispose()
        case "http":
            url = _needed(settings, "http")
            _require_private(url)
            token = settings.job_source_token
            headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
            with httpx.Client(timeout=settings.job_source_timeout_s, headers=headers, trust_env=False) as client:
                yield HttpSource(client, url)


def _needed(settings: Settings, kind: str) -> str:
    if settings.job_source_url is None:
        raise BadSettings(f"KINO_JOB_SOURCE={kind} needs KINO_JOB_SOURCE_URL")
    return settings.job_source_url.get_secret_value()


def _require_private(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise BadSettings(f"KINO_JOB_SOURCE_URL cannot be read: {error}") from error
    local = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise BadSettings("KINO_JOB_SOURCE_URL must be https:// (http:// on loopback only): its answers move money")
