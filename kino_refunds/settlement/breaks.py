"""Breaks: two sources disagree. The first settlement stands; the break lives until they agree or a person has looked.

open -> investigating -> repaired -> closed      by the next run of its check
                      -> accepted, false_alarm   by a person; opens again only when the two sides change
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.events.schema import JobCompleted
from kino_refunds.settlement.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kino_refunds.settlement.decide import Ruling


class BreakKind(StrEnum):
    """What disagrees, beside the kinds of the integrity queries. The words are stored, so a word here never changes."""

    COMPLETED_AFTER_REFUND = "completed_after_refund"
    FAILED_AFTER_CAPTURE = "failed_after_capture"
    RUNNING_PAST_CAP = "running_past_cap"
    OPEN_PAST_DEADLINE = "open_past_deadline"
    MISSING_EVENT = "missing_event"
    FAILED_BUT_CAPTURED = "failed_but_captured"
    COMPLETED_BUT_REFUNDED = "completed_but_refunded"
    NOT_COVERED_BUT_REFUNDED = "not_covered_but_refunded"
    ACCOUNT_DIFFERS = "account_differs"
    CREDITS_DIFFER = "credits_differ"
    UNCHARGED_JOB = "uncharged_job"
    ORPHAN_CHARGE = "orphan_charge"
    LATE = "late"
    DECISION_DIFFERS = "decision_differs"
    ACCOUNT_STATUS_DIFFERS = "account_status_differs"
    WRONGFUL_TERMINATION = "wrongful_termination"
    CORRECTION_DIFFERS = "correction_differs"
    UNTOLD_REFUND = "untold_refund"
    HISTORY_CHANGED = "history_changed"


class BreakStatus(StrEnum):
    """Where a break stands. The words are stored, so a word here never changes."""

    OPEN = "open"
    INVESTIGATING = "investigating"
    REPAIRED = "repaired"
    CLOSED = "closed"
    ACCEPTED = "accepted"
    FALSE_ALARM = "false_alarm"


LIVE = (BreakStatus.OPEN, BreakStatus.INVESTIGATING, BreakStatus.REPAIRED)
"""The states in which a break says that something is wrong; there is one live row for each kind and subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One disagreement. Kind and subject identify it while it lives; `credits` are those at stake, whole.

    `subject` is None for a job, which `job_id` names; else `lot:7`, `account:a`, `charge:12` and the like. `sides` are
    both sides in words that stay the same as long as the sides do. `happened_at` is when they came apart, if known.
    """

    kind: str
    job_id: str | None = None
    subject: str | None = None
    charge_id: int | None = None
    credits: int
    detail: str
    sides: str
    happened_at: datetime | None = None
    ending: str | None = None
    """How the job ended by the side that is not the ledger, in the word that a settlement stores: a repair needs it."""

    @property
    def key(self) -> tuple[str, str]:
        """Kind and subject: at most one row with them is live."""
        return self.kind, self.subject or f"job:{self.job_id}"

    @property
    def has_its_job(self) -> bool:
        """Whether the subject is a job or its charge: only then is the job stored.

        Builds of before 0007 keep one open break for each kind and job: two lots of one job would be one break to them.
        """
        return self.subject is None or self.subject.startswith("charge:")

    @property
    def digest(self) -> str:
        """The digest of both sides, as it is stored."""
        return hashlib.sha256(self.sides.encode()).hexdigest()


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
        sides=f"{stands} / {event.ending}",
        happened_at=event.time,
        ending=event.ending,
    )


# A person may have accepted this very difference: then nothing opens. A row of before 0007 has no digest, and stands.
_ACCEPTED = sa.text("""
    SELECT n.kind, n.subject
    FROM unnest(CAST(:kinds AS text[]), CAST(:subjects AS text[]), CAST(:digests AS text[]))
         AS n (kind, subject, digest)
    WHERE EXISTS (
        SELECT FROM kino.break a
        WHERE a.kind = n.kind AND coalesce(a.subject, 'job:' || a.job_id) = n.subject AND a.sides IN (n.digest, '')
          AND a.status IN ('accepted', 'false_alarm'))
""")
# A break that a person repaired and that is still there some minutes later was not repaired. Not at once: the event
# that repairs may still be on its way.
_RAISE = sa.text("""
    INSERT INTO kino.break AS b (kind, subject, job_id, charge_id, credits, detail, sides, seen, happened_at,
                                 ending, run_id)
    SELECT kind, subject, job_id, charge_id, credits, detail, sides, seen, happened_at, ending, :run_id
    FROM unnest(CAST(:kinds AS text[]), CAST(:own_subjects AS text[]), CAST(:job_ids AS text[]),
                CAST(:charge_ids AS bigint[]), CAST(:credits AS bigint[]), CAST(:details AS text[]),
                CAST(:digests AS text[]), CAST(:seen AS bigint[]), CAST(:happened AS timestamptz[]),
                CAST(:endings AS text[]))
         AS n (kind, subject, job_id, charge_id, credits, detail, sides, seen, happened_at, ending)
    ON CONFLICT (kind, coalesce(subject, 'job:' || job_id)) WHERE status IN ('open', 'investigating', 'repaired')
    DO UPDATE SET
        seen = b.seen + excluded.seen, last_seen_at = excluded.last_seen_at,
        run_id = coalesce(excluded.run_id, b.run_id),
        detail = CASE WHEN b.sides IN ('', excluded.sides) THEN b.detail ELSE excluded.detail END,
        credits = CASE WHEN b.sides IN ('', excluded.sides) THEN b.credits ELSE excluded.credits END,
        sides = excluded.sides, ending = coalesce(excluded.ending, b.ending),
        status = CASE WHEN b.status = 'repaired' AND b.status_at < kino.clock() - interval '5 minutes'
                      THEN 'open' ELSE b.status END
""")


def raise_breaks(connection: sa.Connection, found: Iterable[Break], *, run_id: int | None = None) -> int:
    """Write breaks in the caller's transaction; return how many of them a person had accepted, which are left out.

    For a break that lives already, its count and time change, and its text if the two sides did. One that was repaired
    over 5 minutes ago and is found again is open again. `run_id` is the run of the check that found them.
    """
    # No credits move here: the first settlement stands until a person has looked. A break that was lost would leave the
    # customer with a wrong charge that no report shows.
    first: dict[tuple[str, str], Break] = {}
    seen: dict[tuple[str, str], int] = {}
    for each in found:
        first.setdefault(each.key, each)
        seen[each.key] = seen.get(each.key, 0) + 1
    if not first:
        return 0
    accepted = {
        (row.kind, row.subject)
        for row in connection.execute(
            _ACCEPTED,
            {
                "kinds": [kind for kind, _ in first],
                "subjects": [subject for _, subject in first],
                "digests": [each.digest for each in first.values()],
            },
        )
    }
    # Sorted by the key, as every writer does: two sessions wait for each other in one direction only, never in a
    # circle. One row a key, because ON CONFLICT DO UPDATE refuses to touch a row twice in one statement.
    keys = sorted(first.keys() - accepted)
    rows = [first[key] for key in keys]
    if rows:
        connection.execute(
            _RAISE,
            {
                "kinds": [each.kind for each in rows],
                "own_subjects": [each.subject for each in rows],
                "job_ids": [each.job_id if each.has_its_job else None for each in rows],
                "charge_ids": [each.charge_id for each in rows],
                "credits": [each.credits for each in rows],
                "details": [each.detail for each in rows],
                "digests": [each.digest for each in rows],
                "seen": [seen[key] for key in keys],
                "happened": [each.happened_at for each in rows],
                "endings": [each.ending for each in rows],
                "run_id": run_id,
            },
        )
    return len(accepted)
