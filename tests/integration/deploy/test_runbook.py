"""The runbook and the guide to job sources: what they say is compared with the program, and run."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from kino_refunds.db.engine import create_engine
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.guard import WithheldReason
from kino_refunds.reconciliation.rows import FINISHED_COLUMNS, read_answers, read_finished
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import Settings
from kino_refunds.settlement.breaks import BreakKind
from kino_refunds.settlement.dead_letters import LetterReason
from tests.conftest import Database
from tests.documents import DEPLOYMENT, example, spans
from tests.integration.deploy.files import RUNBOOK


def test_runbook_knows_every_reason() -> None:
    """Each reason of a letter, kind of break and reason to withhold a presumed timeout has a line in the runbook."""
    rows = set(re.findall(r"`([a-z0-9_]+)`", "\n".join(line for line in RUNBOOK.splitlines() if line.startswith("|"))))

    assert set(LetterReason) | set(BreakKind) | set(WithheldReason) <= rows


@pytest.mark.parametrize("block", re.findall(r"^ *```sql\n(.*?)```", RUNBOOK, re.DOTALL | re.MULTILINE))
def test_every_query_of_the_runbook_runs(database: Database, block: str) -> None:
    """Each SQL block in the runbook runs as the role that its first line names."""
    role = re.match(r"\s*-- as (\w+)", block)
    assert role is not None
    engine = create_engine(database.url(role[1]))

    with engine.connect() as connection:
        connection.execute(sa.text(block)).all()

    engine.dispose()


def test_guides_query_answers_as_it_says(database: Database) -> None:
    """The example of a query runs against such a table through the real source, and tells all that an event can say."""
    ended = datetime(2026, 11, 1, 12, tzinfo=UTC)
    owner = create_engine(database.url("postgres"))
    with owner.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA pipeline"))
        connection.execute(
            sa.text(
                "CREATE TABLE pipeline.generation_job (job_id char(20), status text, error_party text,"
                " blocked_at text, output_key text, ended_at timestamptz)"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO pipeline.generation_job VALUES"
                " ('done', 'SUCCEEDED', NULL, NULL, 'video', :ended),"
                " ('theirs', 'ERROR', 'vendor', NULL, NULL, :ended),"
                " ('odd', 'ERROR', 'gremlins', NULL, NULL, NULL), ('late', 'EXPIRED', NULL, NULL, 'video', :ended),"
                " ('dead', 'EXPIRED', NULL, NULL, NULL, NULL), ('bad', 'BLOCKED', NULL, 'output', NULL, NULL),"
                " ('new', 'RETRYING', NULL, NULL, NULL, NULL)"
            ),
            {"ended": ended},
        )
    settings = Settings(
        job_source="sql",
        job_source_url=SecretStr(database.url("postgres")),
        job_source_query=example(DEPLOYMENT, "query"),
        job_source_finished_query=example(DEPLOYMENT, "finished"),
        job_source_complete_query="SELECT now() - interval '5 minutes'",
    )

    with source_of(settings) as source:
        assert source is not None
        answers = dict(source.ask(["done", "theirs", "odd", "late", "dead", "bad", "new", "nobody"]))
        assert isinstance(source, FinishedSource)
        listed = {job.job_id: job.answer for job in source.finished(ended, ended + timedelta(seconds=1))}
        promised = source.complete_through()

    owner.dispose()
    produced = {"done", "late"}
    assert answers == {
        name: replace(answer, result_produced=name in produced)
        for name, answer in {
            "done": Answer(JobState.COMPLETED, finished_at=ended),
            "theirs": Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER, finished_at=ended),
            "odd": Answer(JobState.FAILED),
            "late": Answer(JobState.TIMED_OUT, finished_at=ended),
            "dead": Answer(JobState.TIMED_OUT),
            "bad": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
            "new": Answer(JobState.RUNNING),
            "nobody": Answer(JobState.UNKNOWN),
        }.items()
    }
    assert listed == {name: answer for name, answer in answers.items() if answer.finished_at is not None}
    assert promised is not None


def test_guides_answer_is_read_as_it_says() -> None:
    """The example of an answer has every state and every field, and is read whole."""
    rows = json.loads(example(DEPLOYMENT, "answer"))["jobs"]

    answers = read_answers(rows, [row["job_id"] for row in rows])

    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert answers == {
        "job-1": Answer(JobState.COMPLETED, finished_at=noon),
        "job-2": Answer(
            JobState.FAILED, origin=ErrorOrigin.PROVIDER, finished_at=noon + timedelta(seconds=1.5) - timedelta(hours=1)
        ),
        "job-3": Answer(JobState.TIMED_OUT, result_produced=True),
        "job-4": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
        "job-5": Answer(JobState.RUNNING),
        "job-6": Answer(JobState.UNKNOWN),
    }
    assert {answer.state for answer in answers.values()} == set(JobState)
    assert {name for row in rows for name in row} == {"job_id"} | {field.name for field in fields(Answer)}


def test_guides_page_is_read_as_it_says() -> None:
    """The example of a page of finished jobs is read whole, and is in order."""
    page = json.loads(example(DEPLOYMENT, "page"))
    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)

    jobs = [read_finished(row) for row in page["jobs"]]

    assert list(checked(jobs, since=noon, until=noon + timedelta(hours=1))) == [
        FinishedJob("job-1", Answer(JobState.COMPLETED, finished_at=noon), "a-1", 8),
        FinishedJob("job-2", Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER, finished_at=noon)),
    ]
    assert {name for row in page["jobs"] for name in row} <= FINISHED_COLUMNS
    assert set(page) == {"jobs", "next", "complete_through"}


def test_guide_names_every_word_of_the_contract() -> None:
    """The guide has each setting of the job source, each state, origin, stage and field, in code."""
    in_code = set(spans(DEPLOYMENT))

    settings = {"KINO_JOB_SOURCE", "KINO_JOB_SOURCE_URL", "KINO_JOB_SOURCE_TIMEOUT_S", "none", "sql", "http"}
    assert settings | {*JobState, *ErrorOrigin, *SafetyStage} <= in_code
    assert all(any(field.name in code for code in in_code) for field in fields(Answer))
