"""Breaks: two sources disagree about one job. The first settlement stands, and a person looks at the break."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BreakNotFound
from kino_refunds.events.schema import JobCompleted
from kino_refunds.settlement.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kino_refunds.settlement.decide import Ruling


class BreakKind(StrEnum):
    """What disagrees. The words are stored, so a word here never changes."""

    COMPLETED_AFTER_REFUND = "completed_after_refund"
    FAILED_AFTER_CAPTURE = "failed_after_capture"
    RUNNING_PAST_CAP = "running_past_cap"


class BreakStatus(StrEnum):
    """Where a break stands. The words are stored, so a word here never changes."""

    OPEN = "open"
    REPAIRED = "repaired"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Break:
    """One disagreement; `kind` and `job_id` identify it while it is open; `credits` are those of the charge."""

    kind: BreakKind
    job_id: str
    charge_id: int | None
    credits: int
    detail: str


def break_of(ruling: Ruling) -> Break:
    """Return the break for a ruling that contradicts how its charge was settled (an outcome of `BREAKS`)."""
    charge, event = ruling.charge, ruling.delivery.event
    assert charge is not None, "an ending contradicts a charge"
    said = "completed" if isinstance(event, JobCompleted) else f"ended as {event.type}"
    stands = "refunded" if ruling.outcome is Outcome.COMPLETED_AFTER_REFUND else "captured"
    detail = f"event {event.id} of {event.source} says the job {said}; the charge stays {stands}, as settled before"
    return Break(
        kind=BreakKind(ruling.outcome.value),
        job_id=event.job_id,
        charge_id=charge.charge_id,
        credits=charge.credits,
        detail=detail,
    )


# One open break for each kind and job. Two sessions that raise the same one meet at its key: (1) A inserts, (2) B
# waits, (3) A commits, (4) B counts it as seen again. Without the key a redelivered event would fill the list that
# people read. A break that a person has closed is no longer in the key: the same disagreement then opens a new one.
_RAISE = sa.text("""
    INSERT INTO kino.break AS b (kind, job_id, charge_id, credits, detail, seen, first_seen_at, last_seen_at)
    SELECT kind, job_id, charge_id, credits, detail, seen, kino.clock(), kino.clock()
    FROM unnest(CAST(:kinds AS text[]), CAST(:job_ids AS text[]), CAST(:charge_ids AS bigint[]),
                CAST(:credits AS bigint[]), CAST(:details AS text[]), CAST(:seen AS bigint[]))
         AS n (kind, job_id, charge_id, credits, detail, seen)
    ON CONFLICT (kind, job_id) WHERE status = 'open' DO UPDATE SET
        seen = b.seen + excluded.seen, last_seen_at = excluded.last_seen_at
""")


def raise_breaks(connection: sa.Connection, found: Iterable[Break]) -> None:
    """Write breaks in the caller's transaction; for a break that is open already only its count and time change."""
    # No credits move here: the first settlement stands until a person has looked. A break that was lost would leave the
    # customer with a wrong charge that no report shows.
    first: dict[tuple[BreakKind, str], Break] = {}
    seen: dict[tuple[BreakKind, str], int] = {}
    for each in found:
        key = (each.kind, each.job_id)
        first.setdefault(key, each)
        seen[key] = seen.get(key, 0) + 1
    if not first:
        return
    # Sorted by the key, as every writer does: two sessions wait for each other in one direction only, never in a
    # circle. One row a key, because ON CONFLICT DO UPDATE refuses to touch a row twice in one statement.
    keys = sorted(first)
    connection.execute(
        _RAISE,
        {
            "kinds": [kind for kind, _ in keys],
            "job_ids": [job_id for _, job_id in keys],
            "charge_ids": [first[key].charge_id for key in keys],
            "credits": [first[key].credits for key in keys],
            "details": [first[key].detail for key in keys],
            "seen": [seen[key] for key in keys],
        },
    )


def accept_break(connection: sa.Connection, break_id: int, *, note: str, actor: str) -> None:
    """Close an open break without a repair: a person has looked at it, and says so in `note`.

    Moves no credits. Raises BreakNotFound if no open break has this number.
    """
    changed = connection.execute(
        sa.text("""
            UPDATE kino.break SET status = 'accepted', status_actor = :actor, status_note = :note,
                   status_at = kino.clock()
            WHERE break_id = :break_id AND status = 'open'
        """),
        {"break_id": break_id, "note": note, "actor": actor},
    ).rowcount
    if not changed:
        raise BreakNotFound(f"there is no open break {break_id}; see `kino-refunds breaks list`")
