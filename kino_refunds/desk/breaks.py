"""Breaks as on-call reads them, and what a person does about one without moving credits (repair: see `repairs`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.errors import BreakNotFound
from kino_refunds.settlement.breaks import LIVE, BreakStatus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from kino_refunds.db.engine import Connection


@dataclass(frozen=True, slots=True)
class BreakLine:
    """One break of a listing; `subject` is None for a break about a job, else `lot:7`, `account:a` and the like."""

    number: int
    kind: str
    job_id: str | None
    subject: str | None
    credits: int
    seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    status: str
    assignee: str | None


@dataclass(frozen=True, slots=True)
class BreakRecord:
    """One break with all its columns: the disagreement, and what people did about it."""

    break_id: int
    kind: str
    job_id: str | None
    subject: str | None
    charge_id: int | None
    credits: int
    detail: str
    ending: str | None
    """How the job ended by the other side, if the break is about an ending."""
    seen: int
    happened_at: datetime | None
    first_seen_at: datetime
    last_seen_at: datetime
    time_to_detect_s: float | None
    """Seconds from when the two sides came apart to when it was first seen, if the first is known."""
    status: str
    assignee: str | None
    status_actor: str | None
    status_note: str | None
    status_at: datetime | None
    closed_at: datetime | None
    notes: list[dict[str, Any]]
    """What people wrote and did, oldest first: `at`, `actor`, `text`."""
    canary: bool
    run_id: int | None


_LIST = sa.text("""
    SELECT break_id, kind, job_id, subject, credits, seen, first_seen_at, last_seen_at, status, assignee
    FROM kino.break
    WHERE (CAST(:statuses AS text[]) IS NULL OR status = ANY (CAST(:statuses AS text[])))
      AND (CAST(:kind AS text) IS NULL OR kind = :kind) AND break_id > :after
    ORDER BY break_id LIMIT :limit
""")
_SHOW = sa.text("""
    SELECT break_id, kind, job_id, subject, charge_id, credits, detail, ending, seen, happened_at, first_seen_at,
           last_seen_at, CAST(extract(epoch FROM first_seen_at - happened_at) AS float8), status, assignee,
           status_actor, status_note, status_at, closed_at, notes, canary, run_id
    FROM kino.break WHERE break_id = :number
""")


def list_breaks(
    connection: Connection, *, statuses: Sequence[BreakStatus] | None, kind: str | None, after: int, limit: int
) -> list[BreakLine]:
    """Return the breaks in these states, or in any for None, with a number above `after`; the oldest first."""
    wanted = {"statuses": statuses and [*statuses], "kind": kind, "after": after, "limit": limit}
    return [BreakLine(*row) for row in connection.execute(_LIST, wanted)]


def read_break(connection: Connection, number: int) -> BreakRecord:
    """Return the break with this number; raises BreakNotFound."""
    row = connection.execute(_SHOW, {"number": number}).one_or_none()
    if row is None:
        raise BreakNotFound(f"there is no break {number}; see `kino-refunds breaks list --status all`")
    return BreakRecord(*row)


# Each act changes a break that is live, and writes who did what and why beside what was written before.
_ACT = sa.text("""
    UPDATE kino.break SET
        status = coalesce(:status, status), assignee = coalesce(:assignee, assignee),
        status_actor = CASE WHEN CAST(:status AS text) IS NULL THEN status_actor ELSE :actor END,
        status_note = CASE WHEN CAST(:status AS text) IS NULL THEN status_note ELSE :note END,
        status_at = CASE WHEN CAST(:status AS text) IS NULL THEN status_at ELSE kino.clock() END,
        closed_at = CASE WHEN CAST(:status AS text) IN ('accepted', 'false_alarm') THEN kino.clock() ELSE closed_at END,
        notes = notes || jsonb_build_array(jsonb_build_object('at', kino.clock(), 'actor', CAST(:actor AS text),
                                                              'text', CAST(:text AS text)))
    WHERE break_id = :break_id AND status = ANY (CAST(:live AS text[]))
""")


def assign_break(connection: Connection, number: int, *, to: str, actor: str) -> None:
    """Give a live break to a person: it is investigated. Raises BreakNotFound."""
    _act(connection, number, status=BreakStatus.INVESTIGATING, assignee=to, actor=actor, text=f"assigned to {to}")


def note_break(connection: Connection, number: int, *, note: str, actor: str) -> None:
    """Add a person's note to a live break. Raises BreakNotFound."""
    _act(connection, number, status=None, actor=actor, text=note)


def accept_break(connection: Connection, number: int, *, note: str, actor: str) -> None:
    """Close a live break as it stands: the ledger is right, and `note` says why.

    It opens again only when one of its two sides changes. Moves no credits. Raises BreakNotFound.
    """
    _act(connection, number, status=BreakStatus.ACCEPTED, actor=actor, text=note)


def mark_false_alarm(connection: Connection, number: int, *, note: str, actor: str) -> None:
    """Close a live break that is none: what was compared with the ledger is wrong, and `note` says why.

    It opens again only when one of its two sides changes. Moves no credits. Raises BreakNotFound.
    """
    _act(connection, number, status=BreakStatus.FALSE_ALARM, actor=actor, text=note)


def _act(
    connection: Connection,
    number: int,
    *,
    status: BreakStatus | None,
    actor: str,
    text: str,
    assignee: str | None = None,
) -> None:
    changed = connection.execute(
        _ACT,
        {
            "break_id": number,
            "status": status,
            "assignee": assignee,
            "actor": actor,
            "note": text,
            "text": text,
            "live": [*LIVE],
        },
    ).rowcount
    if not changed:
        raise BreakNotFound(f"there is no live break {number}; see `kino-refunds breaks list`")
