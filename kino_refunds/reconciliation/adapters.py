"""The job source that the settings choose: read-only SQL queries, an HTTP endpoint, or none (design, section 7)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.errors import BadSettings
from kino_refunds.reconciliation.http_source import HttpFinishedSource, HttpSource
from kino_refunds.reconciliation.sql_source import (
    COMPLETE_QUERY,
    FINISHED_QUERY,
    QUERY,
    SqlFinishedSource,
    SqlSource,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import SecretStr

    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings

NOT_CHOSEN = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open forever"
NONE_CHOSEN = "KINO_JOB_SOURCE=none: a job whose event is lost counts as timed out and is refunded, completed or not"
HOW_TO_CHOOSE = (
    "set it to sql or http where a table or an endpoint knows how jobs ended, to none only where nothing does"
    ' (deploy/README.md, "Job sources")'
)
URL, FINISHED_URL = "KINO_JOB_SOURCE_URL", "KINO_JOB_SOURCE_FINISHED_URL"


@contextmanager
def source_of(settings: Settings) -> Iterator[JobSource | None]:
    """Open the configured source; None if the setting says that there is none. Raises BadSettings.

    The source is a FinishedSource if the settings also say how it lists finished jobs.
    """
    match settings.job_source:
        case None:
            raise BadSettings(f"{NOT_CHOSEN}; {HOW_TO_CHOOSE}")
        case "none":
            yield None
        case "sql":
            with _sql_source(settings) as source:
                yield source
        case "http":
            with _http_source(settings) as source:
                yield source


@contextmanager
def _sql_source(settings: Settings) -> Iterator[JobSource]:
    url, query = settings.require_job_source_database_url(), settings.job_source_query or ""
    finished, complete = settings.job_source_finished_query, settings.job_source_complete_query
    _require_parameters(query, QUERY, "job_ids")
    if finished is not None:
        _require_parameters(finished, FINISHED_QUERY, "since", "until")
    if complete is not None:
        _require_parameters(complete, COMPLETE_QUERY)
        if finished is None:
            raise BadSettings(f"{COMPLETE_QUERY} speaks of the list of finished jobs: set {FINISHED_QUERY} too")
    limit_ms = max(1, int(settings.job_source_timeout_s * 1000))  # 0 means no limit in Postgres
    limits = SessionLimits(statement_timeout_ms=limit_ms, transaction_timeout_ms=limit_ms)
    engine = create_engine(url, limits=limits, application_name="kino-job-source", holds_ledger=False)
    try:
        if finished is None:
            yield SqlSource(engine, query)
        else:
            yield SqlFinishedSource(engine, query, finished=finished, complete=complete)
    finally:
        engine.dispose()


def _require_parameters(query: str, setting: str, *names: str) -> None:
    """Raise BadSettings unless these are the parameters of the query, all of them and no other."""
    parameters = set(sa.text(query).compile().params)
    for name in names:
        if name not in parameters:
            raise BadSettings(f"KINO_JOB_SOURCE=sql needs {setting} with the parameter :{name}")
    if others := sorted(parameters - set(names)):
        given = " and ".join(f":{name}" for name in names)
        only = f"only {given} {'is' if len(names) == 1 else 'are'} given" if names else "none is given"
        raise BadSettings(
            f"{setting} has the parameter :{others[0]}, and {only}; write a colon that begins no parameter as \\:"
        )


@contextmanager
def _http_source(settings: Settings) -> Iterator[JobSource]:
    url = _require_private(settings.job_source_url, URL)
    token = settings.job_source_token.get_secret_value() if settings.job_source_token else ""
    if not (token.isascii() and token.isprintable()):
        raise BadSettings("KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry")
    listed = settings.job_source_finished_url
    finished = None if listed is None else _require_private(listed, FINISHED_URL)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(timeout=settings.job_source_timeout_s, headers=headers, trust_env=False) as client:
        if finished is None:
            yield HttpSource(client, url)
        else:
            yield HttpFinishedSource(client, url, finished_url=finished)


def _require_private(secret: SecretStr | None, setting: str) -> str:
    """Return the endpoint's URL if its answers cannot be read or changed on the network; raises BadSettings."""
    if secret is None:
        raise BadSettings(f"KINO_JOB_SOURCE=http needs {setting}; for example https://HOST/jobs")
    url = secret.get_secret_value()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):  # their texts may quote a password
        raise BadSettings(f"{setting} cannot be read as a URL; for example https://HOST/jobs") from None
    local = host in {"localhost", "127.0.0.1", "::1"}
    if not host or (parts.scheme != "https" and not (parts.scheme == "http" and local)):
        raise BadSettings(f"{setting} must be https:// (http:// on loopback only): its answers move money")
    return url
