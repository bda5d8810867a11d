"""Rows of a job source: what a query's columns or an endpoint's objects must be, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from kino_refunds.errors import SourceBroken
from kino_refunds.events.schema import ErrorOrigin, SafetyStage, Time
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.sources import Answer, JobState, require_asked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


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


class _FinishedRow(_Row):
    account_id: str | None = None
    # Strict: 7.5 or '7' is no number of credits, and compared as one it would be a break for every job.
    credits: Annotated[StrictInt, Field(ge=0)] | None = None


FINISHED_COLUMNS = frozenset(_FinishedRow.model_fields)


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
            raise _broken(error) from error
        if answers.setdefault(row["job_id"], answer) != answer:
            raise SourceBroken(f"the job source gives two answers for job {row['job_id']!a:.60}")
    return answers


def read_finished(row: Mapping[str, Any]) -> FinishedJob:
    """Return the finished job in a row; raises SourceBroken for a row that breaks the contract."""
    try:
        read = _FinishedRow.model_validate(dict(row))
    except ValidationError as error:
        raise _broken(error) from error
    return FinishedJob(read.job_id, read.answer(), read.account_id, read.credits)


def _broken(error: ValidationError) -> SourceBroken:
    first = error.errors()[0]
    return SourceBroken(f"the job source's {first['loc'][0]}: {first['msg']}")
