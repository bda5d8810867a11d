"""The events of the generation pipeline: four facts, each the end of one job (CloudEvents 1.0).

Fields are declared in alphabetical order, so that pydantic writes the sorted-key JSON that fingerprints are made of; a
test checks that order. Reading is strict (a number is not a string). Unknown fields are ignored, so the pipeline may
add fields to its events.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

ID_LENGTH_MAX: Final = 128
EDITED_ID_LENGTH_MAX: Final = 140
"""The length of a corrected copy's event id, `<id>+edit.N`: an event with the longest id can be corrected too."""
FINGERPRINT_VERSION: Final = "v1"  # stored with every event: another way to compute it needs another prefix

COMPLETED: Final = "kino.generation.job-completed.v1"
FAILED: Final = "kino.generation.job-failed.v1"
TIMED_OUT: Final = "kino.generation.timeout.v1"
SAFETY_REJECTED: Final = "kino.generation.safety-rejection.v1"


class Queue(StrEnum):
    """The Redis lists that carry events. The queue is only transport: the event's `type` says what the event is."""

    JOB_COMPLETED = "generation.job-completed"
    JOB_FAILED = "generation.job-failed"
    TIMEOUT = "generation.timeout"
    SAFETY_REJECTION = "generation.safety-rejection"


QUEUES: Final[dict[str, Queue]] = {
    COMPLETED: Queue.JOB_COMPLETED,
    FAILED: Queue.JOB_FAILED,
    TIMED_OUT: Queue.TIMEOUT,
    SAFETY_REJECTED: Queue.SAFETY_REJECTION,
}


class ErrorOrigin(StrEnum):
    """Whose failure it was, as the pipeline saw it; the policy says which of them are refunded (clause 2)."""

    PLATFORM = "platform"
    PROVIDER = "provider"
    USER = "user"
    UNKNOWN = "unknown"


class SafetyStage(StrEnum):
    """When the content policy stopped the job; the policy says at which stages it is refunded (clause 2)."""

    BEFORE_GENERATION = "before_generation"
    DURING_GENERATION = "during_generation"
    AFTER_GENERATION = "after_generation"


_STORED: Final = ContextVar("kino_stored_ids", default=False)


@contextmanager
def stored_ids() -> Iterator[None]:
    """Read ids inside this block by the rule for ids that this system stored or wrote.

    New ids have no white space at their ends: `order-1 ` beside `order-1` would be two orders. Charges, pending events
    and dead letters have ids from before that rule, and must still be settled. The id of a corrected copy is ours, and
    longer. A message from a queue is never read inside this block.
    """
    token = _STORED.set(True)
    try:
        yield
    finally:
        _STORED.reset(token)


def _id(value: str) -> str:
    """Return an id, or refuse it: Postgres cannot store NUL or surrogates, and other characters garble a terminal.

    White space at either end is refused as well, because such an id looks like another one. Of all white space only the
    plain space is printable. This check runs for every id of every event, so the rule for stored ids is read only if an
    id breaks the rule for new ones.
    """
    if value.isprintable() and (value.strip() == value or _STORED.get()):
        return value
    if value.isprintable():
        raise PydanticCustomError("white_space", "Input should not begin or end with white space")
    raise PydanticCustomError("not_printable", "Input should hold printable characters only")


def _event_id(value: str) -> str:
    if len(value) > ID_LENGTH_MAX and not _STORED.get():
        raise PydanticCustomError("string_too_long", f"String should have at most {ID_LENGTH_MAX} characters")
    return _id(value)


# RFC 3339, written out: fromisoformat alone would accept dates without a time, and 24:00 on Python 3.14 only.
# A leap second is valid in RFC 3339, and is refused below with an error of its own.
_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
_SECONDS: Final = slice(17, 19)


def _utc(value: object, _pydantic_would: object) -> datetime:
    """Return an instant in UTC; digits beyond the microsecond are cut off, as Postgres cuts them.

    Refuses a time without an offset, a leap second, a day that the calendar does not have, and an instant outside the
    years 1 to 9999 in UTC.
    """
    try:
        if isinstance(value, str) and _RFC_3339.fullmatch(value):
            instant = datetime.fromisoformat(value.upper())
            return instant if instant.tzinfo is UTC else instant.astimezone(UTC)
        if isinstance(value, datetime) and value.utcoffset() is not None:  # built in Python, not read
            return value.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        if isinstance(value, str) and value[_SECONDS] == "60":
            raise PydanticCustomError(
                "leap_second", "Input should not lie in a leap second, which cannot be stored: say second 59"
            ) from error
        raise PydanticCustomError(
            "no_such_instant", "Input should be a day of the calendar, in the years 1 to 9999 in UTC"
        ) from error
    raise PydanticCustomError("rfc_3339", "Input should be a date and time with an offset, RFC 3339")


Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=ID_LENGTH_MAX), AfterValidator(_id)]
EventId: TypeAlias = Annotated[str, Field(min_length=1, max_length=EDITED_ID_LENGTH_MAX), AfterValidator(_event_id)]
Time: TypeAlias = Annotated[datetime, WrapValidator(_utc)]


class _Fact(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class JobError(_Fact):
    """Why a job failed; `message` is for people, may name users, and is kept only in dead letters."""

    code: Id
    message: str | None = Field(default=None, repr=False)
    origin: ErrorOrigin


class CompletedData(_Fact):
    """The data of a completed job."""

    account_id: Id | None = None
    job_id: Id


class FailedData(_Fact):
    """The data of a failed job: the error says whose failure it was."""

    account_id: Id | None = None
    error: JobError
    job_id: Id


class TimedOutData(_Fact):
    """The data of a job that timed out: `result_produced` says whether its video exists all the same."""

    account_id: Id | None = None
    job_id: Id
    result_produced: bool = False


class SafetyRejectedData(_Fact):
    """The data of a rejected job: when it was stopped, and under which category."""

    account_id: Id | None = None
    category: Id
    job_id: Id
    stage: SafetyStage


JobData: TypeAlias = CompletedData | FailedData | TimedOutData | SafetyRejectedData


class _JobEvent(_Fact):
    """The CloudEvents attributes of an event, by their own names."""

    data: JobData
    id: EventId
    source: Id
    specversion: Literal["1.0"]
    subject: str  # equal to data.job_id, which is checked as an id
    time: Time
    type: str

    @model_validator(mode="after")
    def _subject_is_the_job(self) -> Self:
        if self.subject != self.data.job_id:
            raise PydanticCustomError("subject", "subject should equal data.job_id")
        return self

    @classmethod
    def of(cls, *, id: str, source: str, time: datetime, job_id: str, **data: Any) -> Self:  # noqa: A002 - CloudEvents' name
        """Return a validated event; `data` are its data fields beyond the job id. Raises pydantic's ValidationError."""
        return cls.model_validate(
            {
                "specversion": "1.0",
                "type": get_args(cls.model_fields["type"].annotation)[0],
                "id": id,
                "source": source,
                "time": time,
                "subject": job_id,
                "data": {"job_id": job_id, **data},
            }
        )

    @property
    def job_id(self) -> str:
        """The job that ended."""
        return self.data.job_id

    @property
    def account_id(self) -> str | None:
        """The account that the pipeline names, if any; it must be the charge's."""
        return self.data.account_id

    @property
    def identity(self) -> tuple[str, str]:
        """(source, id): two messages with the same identity are the same event, or a conflict."""
        return self.source, self.id


class JobCompleted(_JobEvent):
    """The job completed and its video exists: the charge is captured."""

    data: CompletedData
    type: Literal["kino.generation.job-completed.v1"]

    @property
    def ending(self) -> str:
        """How the job ended, in short."""
        return "completed"


class JobFailed(_JobEvent):
    """The job failed: there is no video."""

    data: FailedData
    type: Literal["kino.generation.job-failed.v1"]

    @property
    def ending(self) -> str:
        """How the job ended, in short: `failed.` and the origin."""
        return f"failed.{self.data.error.origin}"


class JobTimedOut(_JobEvent):
    """The job ran out of time."""

    data: TimedOutData
    type: Literal["kino.generation.timeout.v1"]

    @property
    def ending(self) -> str:
        """How the job ended, in short: `timeout.` and whether its video exists."""
        return "timeout.result" if self.data.result_produced else "timeout.no_result"


class JobSafetyRejected(_JobEvent):
    """The content policy stopped the job."""

    data: SafetyRejectedData
    type: Literal["kino.generation.safety-rejection.v1"]

    @property
    def ending(self) -> str:
        """How the job ended, in short: `rejected.` and the stage."""
        return f"rejected.{self.data.stage}"


Event: TypeAlias = Annotated[JobCompleted | JobFailed | JobTimedOut | JobSafetyRejected, Field(discriminator="type")]


def queue_of(event: Event) -> Queue:
    """Return the queue that this event is published to."""
    return QUEUES[event.type]


# The text that a person wrote about an error may name users: it is neither stored nor compared.
_MESSAGE: Final[dict[str, Any]] = {"data": {"error": {"message"}}}


def to_json(event: Event) -> bytes:
    """Return the known fields as compact JSON with sorted keys, time in UTC, without `message` and without nulls.

    The result is a valid message: read again, it has the same fingerprint.
    """
    exclude = _MESSAGE if event.type == FAILED else None  # to name fields that are left out costs 0.3 us
    return event.__pydantic_serializer__.to_json(event, exclude=exclude, exclude_none=True)


def fingerprint(event: Event) -> str:
    """Return 67 characters that identify the content of an event, in whatever form it was on the wire.

    Stored fingerprints are compared with new ones: if the way to compute them changes, the prefix must change.
    Otherwise every redelivered event would look like a conflict.
    """
    return f"{FINGERPRINT_VERSION}:{sha256(to_json(event)).hexdigest()}"
