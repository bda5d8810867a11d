"""Finished jobs: the job source's own list of how jobs ended, which matching compares with the ledger (design, part B).

A source can give this list or not. Without it the source is still asked about single jobs, and matching says that it
can compare nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kino_refunds.errors import SourceBroken
from kino_refunds.reconciliation.sources import Answer, JobSource, JobState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SHOWN_MAX = 60
"""Characters of a job's id in an error, which is logged and stored in the run's row."""
ENDS = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.TIMED_OUT, JobState.REJECTED})

Place = tuple[datetime, str]
"""(finished_at, job_id): the order of the list, and where in it a reader goes on."""


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that has ended, as the source lists it; raises SourceBroken for a value of another type.

    `answer` is what the source also says when it is asked about the job: an end, with `finished_at`. `account_id` and
    `credits` (whole) are None where the source does not know them; they are compared where it does.
    """

    job_id: str
    answer: Answer
    account_id: str | None = None
    credits: int | None = None

    def __post_init__(self) -> None:
        # A source is foreign code. True is an int in Python, and would be one credit.
        for name, kind in (("job_id", str), ("answer", Answer)):
            if not isinstance(value := getattr(self, name), kind):
                raise SourceBroken(f"a finished job's {name} is a {type(value).__name__}, not a {kind.__name__}")
        if not self.job_id:
            raise SourceBroken("a finished job's job_id is empty")
        if self.answer.state not in ENDS:
            raise SourceBroken(f"job {_shown(self.job_id)} is listed as finished, with the state {self.answer.state}")
        if self.answer.finished_at is None:
            raise SourceBroken(f"job {_shown(self.job_id)} is listed as finished, without finished_at")
        if self.account_id is not None and not isinstance(self.account_id, str):
            raise SourceBroken(f"a finished job's account_id is a {type(self.account_id).__name__}, not a text")
        if self.credits is not None and (type(self.credits) is not int or self.credits < 0):
            raise SourceBroken(f"a finished job's credits are {str(self.credits)!a:.60}, not a whole number from 0 on")

    @property
    def finished_at(self) -> datetime:
        """When the job ended, in UTC."""
        assert self.answer.finished_at is not None, "checked when it was built"
        return self.answer.finished_at

    @property
    def place(self) -> Place:
        """Where the job stands in the list."""
        return self.finished_at, self.job_id


@runtime_checkable
class FinishedSource(JobSource, Protocol):
    """A job source that can also list the jobs that finished."""

    def finished(self, since: datetime, until: datetime) -> Iterator[FinishedJob]:
        """Yield every job that finished from `since` to before `until`, by finished_at and then by job id.

        Job ids are ordered by their characters' code points, as `COLLATE "C"` does. Each job is listed once. Memory
        must stay flat: there may be a million. Raise any error if the list cannot be read to its end; a list that ends
        early is taken for the whole.
        """
        ...

    def complete_through(self) -> datetime | None:
        """Return the source's promise: every job that finished before this instant is in the list now, and stays so.

        None: the source promises nothing. Then matching keeps its distance from now, and reads a day again.
        """
        ...


def checked(
    jobs: Iterable[object], *, since: datetime, until: datetime, after: Place | None = None
) -> Iterator[FinishedJob]:
    """Yield a source's jobs from behind `after`, each checked; raises SourceBroken for a list that breaks the contract.

    The places must rise from job to job, so a list cannot repeat a row, go round in a circle or leave its window.
    """
    last: Place | None = None
    for job in jobs:
        if not isinstance(job, FinishedJob):
            raise SourceBroken(f"the job source lists a {type(job).__name__} as a finished job")
        if not since <= job.finished_at < until:
            raise SourceBroken(
                f"job {_shown(job.job_id)} is listed with {job.finished_at.isoformat()},"
                f" outside of the window from {since.isoformat()} to before {until.isoformat()}"
            )
        if last == job.place:
            raise SourceBroken(f"job {_shown(job.job_id)} is listed twice")
        if last is not None and job.place < last:
            raise SourceBroken(
                f"job {_shown(job.job_id)} is listed behind {_shown(last[1])}: the order must be by finished_at,"
                " then by the characters of job_id"
            )
        last = job.place
        if after is None or job.place > after:
            yield job


def _shown(job_id: str) -> str:
    shown = ascii(job_id)
    return shown if len(shown) <= SHOWN_MAX else f"{shown[:SHOWN_MAX]}…"
