"""Dead letters: what cannot be understood or applied is kept whole, and counted when it comes again (P7)."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from secrets import token_bytes
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.events.envelope import describe, message_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kino_refunds.errors import MalformedMessage
    from kino_refunds.settlement.deliveries import Delivery

DETAIL_LENGTH_MAX = 2_000
EXCEPTION_LENGTH_MAX = 20_000

APPLY_ERROR = "apply_error"
POISON_CRASH = "poison_crash"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message that a person has to look at; `key` finds the row of the same message again."""

    key: bytes
    raw: bytes
    queue: str
    reason: str
    detail: str
    exception: str | None = None
    source: str | None = None
    event_id: str | None = None
    job_id: str | None = None
    attempts: int = 0

    @property
    def group_fingerprint(self) -> str:
        """What the desk groups by: the reason, and where an exception came from, not what it said."""
        last_line = (self.exception or "").strip().rpartition("\n")[2]
        origin = last_line.partition(":")[0] if self.exception else self.queue
        return sha256(f"{self.reason}\0{origin}".encode()).hexdigest()[:16]


def malformed_letter(raw: bytes, queue: str, error: MalformedMessage) -> DeadLetter:
    """A message that does not parse, under the ids that can be read from it."""
    source, event_id, job_id = describe(raw)
    return DeadLetter(
        message_key(raw), raw, queue, error.code, error.text, source=source, event_id=event_id, job_id=job_id
    )


def poison_letter(raw: bytes, queue: str, crashes: int) -> DeadLetter:
    """A message that ended workers while it was alone with them; not even its ids are read from it."""
    detail = f"{crashes} workers ended while this message was all that they had in flight"
    return DeadLetter(sha256(raw).digest(), raw, queue, POISON_CRASH, detail, attempts=crashes)


def event_letter(delivery: Delivery, reason: str, detail: str, *, exception: str | None = None) -> DeadLetter:
    """An event that was understood and cannot be applied."""
    event = delivery.event
    key = sha256(f"{event.source}\0{event.id}\0{delivery.fingerprint}".encode()).digest()
    return DeadLetter(
        key,
        delivery.raw,
        delivery.queue,
        reason,
        detail,
        exception,
        event.source,
        event.id,
        event.job_id,
        delivery.attempts,
    )


def storable(text: str, length_max: int) -> str:
    """Escape what a text column or a terminal cannot take, and cut to `length_max` characters."""
    # Surrogates and NUL are refused by Postgres; other control characters would act on the reader's screen.
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= length_max else safe[: length_max - 1] + "…"


# A discarded letter that comes again is counted and stays discarded: a person has judged this message.
# One that was replayed and is back has failed again: it opens.
_RECORD = sa.text("""
    INSERT INTO kino.dead_letter AS d
        (message_key, raw, queue, reason, detail, group_fingerprint, exception, source, event_id, job_id, attempts,
         seen, first_seen_at, last_seen_at, build, history)
    VALUES (:key, :raw, :queue, :reason, :detail, :group_fingerprint, :exception, :source, :event_id, :job_id,
            :attempts, :seen, kino.clock(), kino.clock(), :build,
            jsonb_build_array(jsonb_build_object('at', kino.clock(), 'reason', CAST(:reason AS text),
                                                 'detail', CAST(:detail AS text))))
    ON CONFLICT (message_key) DO UPDATE SET
        seen = d.seen + excluded.seen,
        last_seen_at = excluded.last_seen_at,
        reason = excluded.reason,
        detail = excluded.detail,
        group_fingerprint = excluded.group_fingerprint,
        exception = excluded.exception,
        attempts = greatest(d.attempts, excluded.attempts),
        build = excluded.build,
        status = CASE d.status WHEN 'replayed' THEN 'open' ELSE d.status END,
        history = CASE WHEN d.status = 'replayed' OR d.reason <> excluded.reason
                       THEN d.history || excluded.history ELSE d.history END
""")


_HELD = sa.text("""
    SELECT message_key FROM kino.dead_letter WHERE message_key = ANY(CAST(:keys AS bytea[]))
    EXCEPT
    SELECT message_key FROM (SELECT message_key FROM kino.dead_letter WHERE message_key = ANY(CAST(:keys AS bytea[]))
                             FOR NO KEY UPDATE SKIP LOCKED) AS free
""")


def record_dead_letters(connection: sa.Connection, letters: Iterable[DeadLetter], *, build: str) -> None:
    """Write dead letters in the caller's transaction; the same message again raises its row's count.

    A row that somebody holds for longer than the lock time-out (a person at the desk) holds up nobody: the
    message is kept in a row of its own instead.
    """
    seen: dict[bytes, int] = {}
    latest: dict[bytes, DeadLetter] = {}
    for letter in letters:
        seen[letter.key] = seen.get(letter.key, 0) + 1
        latest[letter.key] = letter
    if not latest:
        return
    rows = [_row(latest[key], seen[key], build) for key in sorted(latest)]
    try:
        with connection.begin_nested():
            connection.execute(_RECORD, rows)
    except sa.exc.OperationalError as error:
        if classify(error) is not Fault.LOCK:
            raise
        held = set(connection.execute(_HELD, {"keys": sorted(latest)}).scalars())
        for row in rows:
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
        "seen": seen,
        "build": build,
    }
