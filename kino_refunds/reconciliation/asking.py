"""Ask a job source about many jobs: in batches, each job's failure its own (design, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kino_refunds.errors import (
    BadSettings,
    ForeignAnswer,
    KinoError,
    SourceBroken,
    SourceUnavailable,
    SourceUnreachable,
)
from kino_refunds.reconciliation.sources import answers_of
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.reconciliation.sources import Answer, JobSource

log = get_logger(__name__)

ASK_BATCH = 100
"""Jobs in one ask: small enough for a query string or an IN list of any source."""
TIMEOUTS_MAX = 10
"""Asks in a row that may end in a timeout: more than the 8 of a batch that is halved down to its one slow job. Without
this limit a source that hangs would hold a sweep for 199 timeouts a batch, half an hour, and one of the worker's two
threads with it. The price: four slow jobs at the head of a batch delay the jobs behind them, which is reported."""
LEFT_OUT = "the job source left out jobs that it was asked for: it must say `unknown` of those that it does not know"
PROBLEM_MAX = 300
"""Characters of a source's error that are kept: some errors are a whole page."""


@dataclass(slots=True)
class Asked:
    """How the asking went, over one call or several."""

    asked: int = 0
    errors: int = 0
    """Jobs for which the source failed."""
    broken: int = 0
    """Jobs that have no answer because the source broke its contract."""
    problem: str | None = None
    """What was wrong with the source. A broken contract is named before a failure, because time does not fix it."""
    away: bool = False
    """Whether the source is asked no more."""


def ask_about(source: JobSource, job_ids: Sequence[str], so_far: Asked) -> dict[str, Answer]:
    """Ask about these jobs and return the answers by job id; a job that the source left out, or failed on, is missing.

    Asks in batches. A batch that fails is halved until the failing jobs are alone; they have no answer. A batch with an
    answer for another job is not halved: that answer may belong to any of its jobs, so none of them has an answer until
    the source is fixed. `so_far` is counted up; a source that is away in it is not asked.

    Raises BadSettings if the source's own setting keeps it from answering at all.
    """
    found: dict[str, Answer] = {}
    parts = [job_ids[start : start + ASK_BATCH] for start in range(0, len(job_ids), ASK_BATCH)]
    timeouts = 0
    while parts and not so_far.away:
        part = parts.pop()
        so_far.asked += len(part)
        try:
            answers = answers_of(source.ask(part), part)
            timeouts = 0
            found |= answers
            if left_out := [job_id for job_id in part if job_id not in answers]:
                # Reported, because a source that never says `unknown` would keep these jobs open forever, unnoticed.
                _note_problem(SourceUnavailable(LEFT_OUT), left_out, so_far)
        except BadSettings:
            raise
        except Exception as error:  # noqa: BLE001 - a source is foreign code; any error of it is no answer
            timeouts = timeouts + 1 if isinstance(error, TimeoutError) else 0
            so_far.away = isinstance(error, SourceUnreachable) or timeouts > TIMEOUTS_MAX
            if len(part) > 1 and not so_far.away and not isinstance(error, ForeignAnswer):
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                _note_problem(error, part, so_far)
    so_far.errors += sum(map(len, parts))
    return found


def problem_of(error: Exception) -> str:
    """Return a source's error as one short line that can be logged and stored."""
    said = str(error) if isinstance(error, KinoError) else f"{type(error).__name__}: {error}"
    # The text is stored as jsonb, which takes no NUL and no lone surrogate: no error text may fail the row.
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in said[:PROBLEM_MAX])


def _note_problem(error: Exception, part: Sequence[str], so_far: Asked) -> None:
    """Count the jobs that have no answer; log and keep the reason once, not for each of 600 jobs."""
    broken, text = isinstance(error, SourceBroken), problem_of(error)
    if text != so_far.problem:
        log.warning("the job source failed", jobs=len(part), first_job_id=part[0], broken=broken, error=text)
    if broken or not so_far.broken:
        so_far.problem = text
    if broken:
        so_far.broken += len(part)
    else:
        so_far.errors += len(part)
