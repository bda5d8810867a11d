"""The job source: the system that knows how a job ended when its event did not come (design, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from kino_refunds.errors import ForeignAnswer, SourceBroken
from kino_refunds.events.schema import ErrorOrigin, SafetyStage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHOWN_MAX = 60
"""Characters of a foreign id in an error, which is logged and stored in the sweep's row."""


class JobState(StrEnum):
    """The states of a job that a source can answer."""

    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    RUNNING = "running"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """A source's answer for one job; raises SourceBroken for a value of another type.

    `origin` belongs to failed, `stage` to rejected, `result_produced` to timed_out, `finished_at` to these and to
    completed; with other states they mean nothing. By the defaults the customer gets the benefit of the doubt (clause
    2): an unknown origin refunds, a rejection whose stage is not known happened during the generation, and a timeout
    that says nothing of a result produced none. `finished_at` is the time of the event that the sweep writes; without
    it that is the charge's deadline plus grace.
    """

    state: JobState
    origin: ErrorOrigin = ErrorOrigin.UNKNOWN
    stage: SafetyStage = SafetyStage.DURING_GENERATION
    result_produced: bool = False
    finished_at: datetime | None = None

    def __post_init__(self) -> None:
        # A source is foreign code, and its answer moves money: 'false' is a true value, and NaN is not None.
        for name, kind in (
            ("state", JobState),
            ("origin", ErrorOrigin),
            ("stage", SafetyStage),
            ("result_produced", bool),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise SourceBroken(f"the job source's {name} is a {type(value).__name__}, not a {kind.__name__}")
        if self.finished_at is not None:
            object.__setattr__(self, "finished_at", _instant(self.finished_at))


def _instant(value: object) -> datetime:
    """Return the instant as a plain datetime in UTC, because it becomes part of an event's id and content."""
    try:
        if isinstance(value, datetime) and value.utcoffset() is not None:
            # Written and read again, because it may be of a subclass: pandas' NaT is a datetime, and its Timestamp has
            # nanoseconds.
            return datetime.fromisoformat(value.astimezone(UTC).isoformat())
    except Exception as error:  # a time zone is foreign code too
        raise SourceBroken(f"the job source's finished_at is not an instant: {type(error).__name__}") from error
    raise SourceBroken("the job source's finished_at is not a date and time with an offset")


class JobSource(Protocol):
    """A job source, as the overdue sweep asks it."""

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return the answers for these jobs and for no other; UNKNOWN for a job that the source does not know.

        The keys are the ids exactly as they were sent. An id that differs by white space or case is another job's, and
        then none of these jobs has an answer. A job that is missing was not answered, which is not the same as unknown.
        Raise any error if the question fails: an error is not an answer, and the sweep asks in smaller batches, and
        then later. SourceUnreachable ends the asking until the next sweep.
        """
        ...


def require_asked(answered: Iterable[object], asked: Sequence[str]) -> None:
    """Raise ForeignAnswer if a row is for a job that was not asked for.

    The row may belong to any job that was asked for, under an id that a column padded or folded. So none of those jobs
    has an answer. Least of all may they be taken for unknown, which refunds after three asks.
    """
    wanted = frozenset(asked)
    for job_id in answered:
        if isinstance(job_id, str) and job_id in wanted:
            continue
        text = f"the job source answered for {_shown(job_id)}, which it was not asked for"
        if isinstance(job_id, str):
            folded = {each.strip().casefold(): each for each in asked}
            nearest = folded.get(job_id.strip().casefold())
            text += f", but {_shown(nearest)} was: ids must come back exactly as they were sent" if nearest else ""
        raise ForeignAnswer(text)


def answers_of(said: object, asked: Sequence[str]) -> dict[str, Answer]:
    """Return what a source returned, after checking it; a job that is missing in it was not answered.

    Raises ForeignAnswer if it is not a mapping or answers for another job, SourceBroken for a value that is not an
    Answer.
    """
    if not isinstance(said, Mapping):
        raise ForeignAnswer(f"the job source returned {type(said).__name__}, not a mapping of job id to Answer")
    answers = dict(said)
    require_asked(answers, asked)
    for answer in answers.values():
        if not isinstance(answer, Answer):
            raise SourceBroken(f"the job source returned {type(answer).__name__} for a job, not Answer")
    return answers


def _shown(job_id: object) -> str:
    if not isinstance(job_id, str):
        return f"a job id of type {type(job_id).__name__}"
    shown = ascii(job_id)
    return f"job {shown}" if len(shown) <= SHOWN_MAX else f"job {shown[:SHOWN_MAX]}…"
