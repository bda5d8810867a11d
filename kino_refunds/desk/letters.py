"""Dead letters as on-call reads them; `replays.py` puts them back, `protection.py` says what they protect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.errors import DeadLetterNotFound
from kino_refunds.events.envelope import opened, split
from kino_refunds.settlement.dead_letters import storable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from kino_refunds.db.engine import Connection
    from kino_refunds.settlement.dead_letters import LetterStatus

RAW_SHOWN_MAX = 4_000
"""Characters of a message that are shown; `--save` writes all of its bytes."""


@dataclass(frozen=True, slots=True)
class LetterLine:
    """One dead letter of a listing; `credits_at_stake` are of its job's charge, if that is open."""

    number: int
    reason: str
    job_id: str | None
    event_id: str | None
    queue: str
    element_index: int | None
    credits_at_stake: int
    seen: int
    last_seen_at: datetime
    status: str
    group: str
    detail: str


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter with all its columns; `message` and `body` are the bytes `raw` made readable."""

    dead_letter_id: int
    message_key: str
    queue: str
    reason: str
    detail: str
    group_fingerprint: str
    exception: str | None
    source: str | None
    event_id: str | None
    job_id: str | None
    attempts: int
    history: Sequence[Mapping[str, Any]]
    seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    build: str
    status: str
    status_actor: str | None
    status_at: datetime | None
    notes: Sequence[Mapping[str, Any]]
    element_index: int | None
    other_job_ids: Sequence[str]
    may_hold_others: bool
    message_bytes: int
    message: str
    body: str | None
    raw: bytes


# What is at stake is joined and not stored: a job that was settled by another event has nothing at stake.
_LIST = sa.text("""
    SELECT d.dead_letter_id, d.reason, d.job_id, d.event_id, d.queue, d.element_index,
           CASE WHEN c.charge_id IS NULL OR s.charge_id IS NOT NULL THEN 0 ELSE c.credits END AS credits_at_stake,
           d.seen, d.last_seen_at, d.status, d.group_fingerprint, d.detail
    FROM kino.dead_letter d
    LEFT JOIN kino.charge c ON c.job_id = d.job_id
    LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
    WHERE (CAST(:status AS text) IS NULL OR d.status = :status)
      AND (CAST(:reason AS text) IS NULL OR d.reason = :reason)
      AND (CAST(:job_id AS text) IS NULL OR d.job_id = :job_id OR d.other_job_ids @> ARRAY[CAST(:job_id AS text)])
      AND (CAST(:group AS text) IS NULL OR d.group_fingerprint = :group)
      AND d.dead_letter_id > :after
    ORDER BY d.dead_letter_id LIMIT :limit
""")
_SHOW = sa.text("""
    SELECT dead_letter_id, encode(message_key, 'hex') AS message_key, queue, reason, detail, group_fingerprint,
           exception, source, event_id, job_id, attempts, history, seen, first_seen_at, last_seen_at, build,
           status, status_actor, status_at, notes, element_index, other_job_ids, may_hold_others, raw
    FROM kino.dead_letter WHERE dead_letter_id = :number
""")


def list_letters(
    connection: Connection,
    *,
    status: LetterStatus | None,
    reason: str | None = None,
    job_id: str | None = None,
    group: str | None = None,
    after: int = 0,
    limit: int,
) -> list[LetterLine]:
    """Return the letters in a state, or in any for None, with a number above `after`; the oldest first.

    `job_id` also finds the letters that name this job beside their own.
    """
    wanted = {"status": status, "reason": reason, "job_id": job_id, "group": group, "after": after, "limit": limit}
    return [LetterLine(*row) for row in connection.execute(_LIST, wanted)]


def read_letter(connection: Connection, number: int) -> Letter:
    """Return the letter with this number, its message made readable; raises DeadLetterNotFound."""
    row = connection.execute(_SHOW, {"number": number}).mappings().one_or_none()
    if row is None:
        raise DeadLetterNotFound(f"there is no dead letter {number}; see `kino-refunds dead-letters list --status all`")
    columns = dict(row)
    raw = bytes(columns.pop("raw"))
    body = _body(raw, columns["element_index"])
    return Letter(**columns, message_bytes=len(raw), message=_readable(raw), body=body, raw=raw)


def _readable(content: bytes) -> str:
    return storable(content.decode("utf-8", "backslashreplace"), RAW_SHOWN_MAX)


def _body(raw: bytes, element_index: int | None) -> str | None:
    """Return what a message says where its own bytes do not show it: in kombu's base64, or as one event of several."""
    if element_index is not None:
        return next((_readable(each.content) for each in split(raw) or () if each.index == element_index), None)
    body = opened(raw)
    return None if body is None else _readable(body)
