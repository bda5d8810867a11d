"""The job source: whoever knows how jobs ended when their events did not come (design, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from kino_refunds.events.schema import ErrorOrigin, SafetyStage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class JobState(StrEnum):
    """What a source can say of a job."""

    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    RUNNING = "running"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a source says of one job; `origin` belongs to failed, `stage` to rejected.

    The defaults leave the doubt with the customer (clause 2): an unknown origin refunds, and a rejection
    whose stage nobody knows happened during the generation.
    """

    state: JobState
    origin: ErrorOrigin = ErrorOrigin.UNKNOWN
    stage: SafetyStage = SafetyStage.DURING_GENERATION


class JobSource(Protocol):
    """Whom the overdue sweep asks."""

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Answer for these jobs; `UNKNOWN` for one that the source has never heard of.

        A job that is missing from the answers counts as not answered, not as unknown. Raise whatever fits
        when the question fails: an error is not an answer, the sweep asks in smaller batches and then later.
        """
        ...
