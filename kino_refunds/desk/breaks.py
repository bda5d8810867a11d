"""Breaks as on-call reads them; `settlement/breaks.py` writes them and closes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BreakNotFound

if TYPE_CHECKING:
    from datetime import datetime

    from kino_refunds.db.engine import Connection
    from kino_refunds.settlement.breaks import BreakStatus


@dataclass(frozen=True, slots=True)
class BreakLine:
    """One break of a listing."""

    number: int
    kind: str
    job_id: str
    credits: int
    seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    status: str


@dataclass(frozen=True, slots=True)
class BreakRecord:
    """One break with all its columns: the disagreement, and how a person closed it."""

    break_id: int
    kind: str
    job_id: str
    charge_id: int | None
    credits: int
    detail: str
    seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    status: str
    status_actor: str | None
    status_note: str | None
    status_at: datetime | None


_LIST = sa.text("""
    SELECT break_id, kind, job_id, credits, seen, first_seen_at, last_seen_at, status
    FROM kino.break WHERE (CAST(:status AS text) IS NULL OR status = :status) AND break_id > :after
    ORDER BY break_id LIMIT :limit
""")
_SHOW = sa.text("""
    SELECT break_id, kind, job_id, charge_id, credits, detail, seen, first_seen_at, last_seen_at,
           status, status_actor, status_note, status_at
    FROM kino.break WHERE break_id = :number
""")


def list_breaks(connection: Connection, *, status: BreakStatus | None, after: int, limit: int) -> list[BreakLine]:
    """Return the breaks in a state, or in any for None, with a number above `after`; the oldest first."""
    rows = connection.execute(_LIST, {"status": status, "after": after, "limit": limit})
    return [BreakLine(*row) for row in rows]


def read_break(connection: Connection, number: int) -> BreakRecord:
    """Return the break with this number; raises BreakNotFound."""
    row = connection.execute(_SHOW, {"number": number}).one_or_none()
    if row is None:
        raise BreakNotFound(f"there is no break {number}; see `kino-refunds breaks list --status all`")
    return BreakRecord(*row)
