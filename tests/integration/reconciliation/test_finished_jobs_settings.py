"""The settings of the list of finished jobs: what is refused, and what is read."""

from __future__ import annotations

from typing import Any

import pytest

from kino_refunds.errors import BadSettings
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.finished import FinishedSource
from kino_refunds.settings import Settings
from tests.conftest import Database
from tests.integration.reconciliation.finished_jobs import ASK, EVERYTHING, FINISHED, LISTED, WINDOW, paged
from tests.integration.reconciliation.job_sources import QUERY, Endpoint, settings

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


@pytest.mark.usefixtures("ended_jobs")
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
