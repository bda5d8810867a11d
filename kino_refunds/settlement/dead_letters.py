"""Dead letters: a message that cannot be understood or applied is kept whole, and counted when it comes again (P7)."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from secrets import token_bytes
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.events.envelope import describe, message_key
from kino_refunds.settlement.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kino_refunds.errors import MalformedMessage
    from kino_refunds.events.envelope import Element
    from kino_refunds.settlement.decide import Ruling
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.record import Record

DETAIL_LENGTH_MAX = 2_000
EXCEPTION_LENGTH_MAX = 20_000


class LetterReason(StrEnum):
    """Why a message or an event is kept for a person. The words are stored, so a word here never changes.

    The first ten are the reasons of a message that cannot be understood (`MalformedReason`), the next four are
    outcomes.
    """

    TOO_LARGE = "too_large"
    BAD_ENCODING = "bad_encoding"
    BAD_JSON = "bad_json"
    BAD_ENVELOPE = "bad_envelope"
    WRONG_CONTENT_TYPE = "wrong_content_type"
    COMPRESSED = "compressed"
    BAD_BASE64 = "bad_base64"
    UNKNOWN_VERSION = "unknown_version"
    UNKNOWN_TYPE = "unknown_type"
    INVALID_EVENT = "invalid_event"
    CONFLICTING_DUPLICATE = "conflicting_duplicate"
    ACCOUNT_MISMATCH = "account_mismatch"
    CHARGE_NOT_FOUND = "charge_not_found"
    BUSY = "busy"
    APPLY_ERROR = "apply_error"
    """Our own code, or the database, failed on this event."""
    POISON_CRASH = "poison_crash"
    """Workers ended while this message or event was all that they worked on."""


class LetterStatus(StrEnum):
    """Where a dead letter stands. The words are stored, so a word here never changes."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message, or one element of it, that a person must look at; the same message again has the same `key`.

    `raw` is the whole message as it was on the wire, or for an event that had waited its known fields as JSON.
    """

    key: bytes
    raw: bytes
    queue: str
    reason: LetterReason
    detail: str
    exception: str | None = None
    source: str | None = None
    event_id: str | None = None
    job_id: str | None = None
    attempts: int = 0
    cause: str = ""
    """What letters of one reason differ by: the paths of wrong fields, a task's name, the origin of an exception."""
    element_index: int | None = None
    """The place of the event in a message that holds several; None: the whole message."""
    other_job_ids: tuple[str, ...] = ()
    """Further jobs that the message names. While the letter is open, no timeout is presumed for them or `job_id`."""
    may_hold_others: bool = False
    """Whether the message may hold the end of a job that it does not name here: then it withholds other presumed
    timeouts as well (`reconciliation/guard.py`)."""

    @property
    def group_fingerprint(self) -> str:
        """The key of the letter's group: a digest of reason and cause, 16 hex digits.

        Without the queue, because one mistake of a publisher can arrive by several queues.
        """
        return sha256(f"{self.reason}\0{self.cause}".encode()).hexdigest()[:16]


def malformed_letter(raw: bytes, queue: str, error: MalformedMessage, *, element: Element | None = None) -> DeadLetter:
    """Return the letter of a message, or of an element, that does not parse; with the ids that can be found in it."""
    # The ids are searched in the broken bytes: a letter that names its job keeps the overdue sweep from refunding that
    # job as timed out while its completion may lie in this letter.
    about = describe(raw if element is None else element.content)
    index = None if element is None else element.index
    return DeadLetter(
        key=message_key(raw, index),
        raw=raw,
        queue=queue,
        reason=LetterReason(error.code),
        detail=error.text,
        source=about.source,
        event_id=about.event_id,
        job_id=about.job_id,
        cause=error.cause,
        element_index=index,
        other_job_ids=about.other_job_ids,
        may_hold_others=about.may_hold_others,
    )


def poison_letter(raw: bytes, queue: str, crashes: int, *, element_index: int | None = None) -> DeadLetter:
    """Return the letter of a message or element that ended `crashes` workers while they worked on it alone.

    Nothing is read from it, not even its ids: reading it may be what ends a worker.
    """
    what = "this message was" if element_index is None else f"element {element_index} of this message was"
    return DeadLetter(
        key=message_key(raw, element_index),
        raw=raw,
        queue=queue,
        reason=LetterReason.POISON_CRASH,
        detail=f"{crashes} workers ended while {what} all that they worked on",
        attempts=crashes,
        element_index=element_index,
        # Its jobs are not known, so it may hold any job's completion. Where no job source is configured, presumed
        # timeouts are withheld for an hour: otherwise a completed job could be refunded.
        may_hold_others=True,
    )


def event_letter(
    delivery: Delivery, reason: LetterReason, detail: str, *, exception: str | None = None, cause: str = ""
) -> DeadLetter:
    """Return the letter of an event that was understood and cannot be applied."""
    event = delivery.event
    # The fingerprint is part of the key: of two contents under one id both are kept, and neither hides the other.
    key = sha256(f"{event.source}\0{event.id}\0{delivery.fingerprint}".encode()).digest()
    return DeadLetter(
        key=key,
        raw=delivery.raw,
        queue=delivery.queue,
        reason=reason,
        detail=detail,
        exception=exception,
        source=event.source,
        event_id=event.id,
        job_id=event.job_id,
        attempts=delivery.attempts,
        cause=cause,
        element_index=delivery.element_index,
    )


def ruled_letter(ruling: Ruling, record: Record) -> DeadLetter:
    """Return the letter of an event whose ruling is that no retry of ours changes anything."""
    event = ruling.delivery.event
    if ruling.outcome is Outcome.CONFLICTING_DUPLICATE:
        known = record.first(ruling.delivery.identity)
        before = known.outcome.value if known is not None and known.outcome is not None else "not decided yet"
        why = f"event {event.id} of {event.source} came before with other content ({before}); this one is not applied"
    elif ruling.outcome is Outcome.ACCOUNT_MISMATCH:
        assert ruling.charge is not None, "an account is compared with the charge's"
        account_id = ruling.charge.account_id
        why = f"the event names account {event.account_id}, the charge of job {event.job_id} is of {account_id}"
    else:
        why = f"{ruling.outcome.value}: retried for 24 hours without another outcome"
    return event_letter(ruling.delivery, LetterReason(ruling.outcome.value), why)


def failed_letter(delivery: Delivery, error: Exception) -> DeadLetter:
    """Return the letter of an event that our own code, or the database, failed on, with the exception."""
    trace = "".join(traceback.format_exception(error))
    return event_letter(delivery, LetterReason.APPLY_ERROR, _said(error), exception=trace, cause=_origin(error))


def unread_letter(raw: bytes, queue: str, error: Exception) -> DeadLetter:
    """Return the letter of a message that our own parser failed on: only its bytes are known."""
    trace = "".join(traceback.format_exception(error))
    return DeadLetter(
        key=sha256(raw).digest(),
        raw=raw,
        queue=queue,
        reason=LetterReason.APPLY_ERROR,
        detail=_said(error),
        exception=trace,
        cause=_origin(error),
        may_hold_others=True,
    )


def _origin(error: Exception) -> str:
    """Return an exception's type and the function of ours that it came from, never its text or a line number.

    Letters are grouped by this, and texts and line numbers differ from event to event and from build to build. An error
    of the driver or of Postgres is named by its own type, which SQLAlchemy's wrapper would hide.
    """
    raised = getattr(error, "orig", None) or error
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if str(frame.f_globals.get("__name__")).startswith("kino_refunds.")]
    where = [f" in {each.f_globals.get('__name__')}.{each.f_code.co_name}" for each in (ours or frames)[-1:]]
    return "".join((type(raised).__name__, *where))


def _said(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the letter must be written even if its exception has no readable text
        return type(error).__name__


def bare_letter(letter: DeadLetter) -> DeadLetter:
    """Return the letter reduced to what every database takes: its bytes, and the reason in ASCII.

    It no longer names its jobs, so it may hold any job's end: where no job source is configured, it withholds presumed
    timeouts for an hour.
    """
    detail = letter.detail.encode("ascii", "backslashreplace").decode()
    return replace(
        letter,
        detail=detail,
        exception=None,
        source=None,
        event_id=None,
        job_id=None,
        other_job_ids=(),
        may_hold_others=True,
    )


def storable(text: str, length_max: int) -> str:
    """Return `text` with the characters escaped that a text column or a terminal cannot take, cut to `length_max`."""
    # Surrogates and NUL are refused by Postgres; other control characters would act on the reader's screen.
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= length_max else safe[: length_max - 1] + "…"


# The same message again finds its row by the key. (1) A inserts the letter, (2) B's insert waits, (3) A commits, (4) B
# raises the count. Without the key every redelivery would be a new letter, and people could not see the different ones.
#
# A discarded letter that comes again is counted and stays discarded: a person has decided about this message. A
# replayed letter that comes again has failed again: it opens, or its event would be forgotten. A poison letter names no
# job, because it is not read: then the jobs stay that an earlier reading found, and stay protected.
_RECORD = sa.text("""
    INSERT INTO kino.dead_letter AS d
        (message_key, raw, queue, reason, detail, group_fingerprint, exception, source, event_id, job_id, attempts,
         element_index, other_job_ids, may_hold_others, seen, first_seen_at, last_seen_at, build, history)
    VALUES (:key, :raw, :queue, :reason, :detail, :group_fingerprint, :exception, :source, :event_id, :job_id,
            :attempts, :element_index, CAST(:other_job_ids AS text[]), :may_hold_others, :seen,
            kino.clock(), kino.clock(), :build,
            jsonb_build_array(jsonb_build_object('at', kino.clock(), 'reason', CAST(:reason AS text),
                                                 'detail', CAST(:detail AS text))))
    ON CONFLICT (message_key) DO UPDATE SET
        seen = d.seen + excluded.seen,
        last_seen_at = excluded.last_seen_at,
        reason = excluded.reason,
        detail = excluded.detail,
        group_fingerprint = excluded.group_fingerprint,
        source = coalesce(d.source, excluded.source),
        event_id = coalesce(d.event_id, excluded.event_id),
        job_id = coalesce(d.job_id, excluded.job_id),
        other_job_ids = CASE WHEN excluded.reason = 'poison_crash' THEN d.other_job_ids
                             ELSE excluded.other_job_ids END,
        may_hold_others = excluded.may_hold_others,
        exception = excluded.exception,
        attempts = greatest(d.attempts, excluded.attempts),
        build = excluded.build,
        status = CASE d.status WHEN 'replayed' THEN 'open' ELSE d.status END,
        history = CASE WHEN d.status = 'replayed' OR d.reason <> excluded.reason
                       THEN d.history || excluded.history ELSE d.history END
""")


# SKIP LOCKED waits for no row: the rows that exist and are not returned by the inner SELECT are held by other sessions.
_HELD = sa.text("""
    SELECT message_key FROM kino.dead_letter WHERE message_key = ANY(CAST(:keys AS bytea[]))
    EXCEPT
    SELECT message_key FROM (SELECT message_key FROM kino.dead_letter WHERE message_key = ANY(CAST(:keys AS bytea[]))
                             FOR NO KEY UPDATE SKIP LOCKED) AS free
""")


def record_dead_letters(connection: sa.Connection, letters: Iterable[DeadLetter], *, build: str) -> None:
    """Write dead letters in the caller's transaction; for a message that has a row already, raise the row's count.

    If another session (a person at the desk) holds a letter's row for longer than the lock timeout, the message is kept
    in a second row: a person must not stop a worker.
    """
    seen: dict[bytes, int] = {}
    latest: dict[bytes, DeadLetter] = {}
    for letter in letters:
        seen[letter.key] = seen.get(letter.key, 0) + 1
        latest[letter.key] = letter
    if not latest:
        return
    # Sorted by the key, and last in the write order, as everywhere: two sessions cannot wait for each other in a
    # circle.
    rows = [_row(latest[key], seen[key], build) for key in sorted(latest)]
    # In a savepoint, because a lock timeout would otherwise lose the whole transaction, and with it the settlements of
    # the events beside this letter.
    try:
        with connection.begin_nested():
            connection.execute(_RECORD, rows)
    except sa.exc.OperationalError as error:
        if classify(error) is not Fault.LOCK:
            raise
        held = set(connection.execute(_HELD, {"keys": sorted(latest)}).scalars())
        for row in rows:
            # A random key, so that the bytes are kept at once. The count of the first row stays too low, which costs a
            # person a second look; to lose the message would cost a customer the refund in it.
            if row["key"] in held:
                row["key"] = sha256(row["key"] + token_bytes(16)).digest()
        connection.execute(_RECORD, rows)


def _row(letter: DeadLetter, seen: int, build: str) -> dict[str, Any]:
    return {
        "key": letter.key,
        "raw": letter.raw,
        "queue": letter.queue,
        "reason": letter.reason,
        "detail": storable(letter.detail, DETAIL_LENGTH_MAX),
        "group_fingerprint": letter.group_fingerprint,
        "exception": letter.exception and storable(letter.exception, EXCEPTION_LENGTH_MAX),
        "source": letter.source,
        "event_id": letter.event_id,
        "job_id": letter.job_id,
        "attempts": letter.attempts,
        "element_index": letter.element_index,
        "other_job_ids": list(letter.other_job_ids),
        "may_hold_others": letter.may_hold_others,
        "seen": seen,
        "build": build,
    }
