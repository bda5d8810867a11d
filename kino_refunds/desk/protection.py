"""The open charges that an open dead letter protects from a presumed timeout (P9; design, section 7).

The letter's message may be the completion of one of these jobs. Once the letter is discarded, the next overdue sweep
may presume that the job timed out, and refund it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.desk.replays import discard_letter, require_letter
from kino_refunds.errors import LetterProtects
from kino_refunds.reconciliation.guard import NAMELESS_COUNTS_FOR

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

ALL = "all"
"""Means every charge that a letter without a job protects: these cannot be named one by one."""
SAMPLE_MAX = 10


@dataclass(frozen=True, slots=True)
class ProtectedCharge:
    """An open charge that a letter protects; `credits` are whole."""

    job_id: str
    account_id: str
    credits: int
    opened_at: datetime
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class Protection:
    """The open charges that one letter protects: how many, their credits, and the first of them by deadline."""

    charges: int
    credits: int
    named: Sequence[ProtectedCharge]
    """Those whose jobs the letter names."""
    others: int
    """How many more it protects, because it may be the end of a job that it does not name."""
    sample: Sequence[ProtectedCharge]

    @property
    def names_its_jobs(self) -> bool:
        """Whether the letter names every job that it protects."""
        return not self.others

    @property
    def names(self) -> list[str]:
        """The words that must be given to discard the letter although these charges are open."""
        return [*(charge.job_id for charge in self.named), *([ALL] if self.others else [])]


def read_protection(connection: sa.Connection, dead_letter_id: int, *, source_configured: bool) -> Protection:
    """Return the open charges that a letter protects while it is open, by the rules of `guard.read_guard`.

    A letter protects each job that it names. If it may hold the end of another job and no job source is configured, it
    also protects, for an hour, every charge that was opened before the letter was last seen. Raises
    DeadLetterNotFound.
    """
    require_letter(connection, dead_letter_id)
    wanted = {"dead_letter_id": dead_letter_id, "counts_for": NAMELESS_COUNTS_FOR, "sample_max": SAMPLE_MAX}
    named = [ProtectedCharge(*row) for row in connection.execute(_NAMED, wanted)]
    rows = [] if source_configured else connection.execute(_OTHERS, wanted).all()
    others = rows[0].all_charges if rows else 0
    return Protection(
        charges=len(named) + others,
        credits=sum(charge.credits for charge in named) + (int(rows[0].all_credits) if rows else 0),
        named=named,
        others=others,
        sample=[*named, *(ProtectedCharge(*row[:5]) for row in rows)][:SAMPLE_MAX],
    )


_NAMED = sa.text("""
    SELECT c.job_id, c.account_id, c.credits, c.opened_at, c.deadline_at
    FROM kino.dead_letter d
    JOIN kino.charge c ON c.job_id = ANY(d.other_job_ids || d.job_id)
    JOIN kino.open_charge o USING (charge_id)
    WHERE d.dead_letter_id = :dead_letter_id ORDER BY o.deadline_at, c.job_id
""")
_OTHERS = sa.text("""
    SELECT c.job_id, c.account_id, c.credits, c.opened_at, c.deadline_at,
           count(*) OVER () AS all_charges, sum(c.credits) OVER () AS all_credits
    FROM kino.dead_letter d
    JOIN kino.charge c ON c.opened_at < d.last_seen_at
    JOIN kino.open_charge o USING (charge_id)
    WHERE d.dead_letter_id = :dead_letter_id AND d.may_hold_others
      AND d.last_seen_at > kino.clock() - CAST(:counts_for AS interval)
      AND c.job_id <> ALL(array_remove(d.other_job_ids || d.job_id, NULL))
    ORDER BY o.deadline_at, o.charge_id LIMIT :sample_max
""")


def discard_although_open(
    connection: sa.Connection,
    dead_letter_id: int,
    *,
    although_open: Collection[str],
    source_configured: bool,
    note: str,
    actor: str,
) -> Protection:
    """Close an open letter whose protected charges are all named in `although_open`; return what it protected.

    Raises LetterProtects that names the missing charges, DeadLetterNotFound, and DeadLetterClosed if the letter is not
    open; the caller must roll back then. The letter is closed first, which locks it: the charges are read in the
    transaction that ends their protection. Read before, a charge could be added in between, and would lose its
    protection although no person was shown it.
    """
    discard_letter(connection, dead_letter_id, note=note, actor=actor)
    found = read_protection(connection, dead_letter_id, source_configured=source_configured)
    if not set(found.names) <= set(although_open):
        raise LetterProtects(refusal(dead_letter_id, found))
    return found


def refusal(dead_letter_id: int, found: Protection) -> str:
    """Return one line that says what a letter protects and which options discard it."""
    options = " ".join(f"--although-open {shlex.quote(name)}" for name in found.names)
    reasons = []
    if found.named:
        which = ", ".join(f"job {each.job_id} ({each.credits:,} credits)" for each in found.named)
        reasons.append(f"keeps {which} from a presumed timeout, which would refund it")
    if found.others:
        credits = found.credits - sum(each.credits for each in found.named)
        charges = f"{found.others:,} open charge{'' if found.others == 1 else 's'} of {credits:,} credits"
        who = "may also be the end of a job that it does not name" if found.named else "names no job"
        reasons.append(
            f"{who}, so for an hour it keeps {charges} from a presumed timeout: it may be the end of each of these jobs"
        )
    why = ", and ".join(reasons)
    return f"dead letter {dead_letter_id} {why}; replay it, or add {options}"
