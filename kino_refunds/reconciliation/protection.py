"""What an open dead letter protects: the charges that are not presumed timed out because of it (P9; section 7).

Its message may be the completion of one of these jobs. Once the letter is discarded, the next overdue sweep may say
that the job timed out, and refund it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import LetterProtects
from kino_refunds.events.schema import Queue
from kino_refunds.reconciliation.guard import NAMELESS_COUNTS_FOR
from kino_refunds.settlement.replays import discard_letter, require_letter

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

ALL = "all"
"""Stands for every charge that a letter without a job protects: those cannot be named one by one."""
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

    names_its_jobs: bool
    """If not, the message may be the end of any charge that was open when it came."""
    charges: int
    credits: int
    sample: Sequence[ProtectedCharge]

    @property
    def names(self) -> list[str]:
        """What a person has to say who discards the letter although these charges are open."""
        if not self.charges:
            return []
        return [charge.job_id for charge in self.sample] if self.names_its_jobs else [ALL]


def read_protection(connection: sa.Connection, dead_letter_id: int, *, source_configured: bool) -> Protection:
    """Read which open charges an open letter protects, as `guard.read_guard` withholds their verdicts.

    A letter that names its job protects that job. One that names none protects, for an hour and where no job source
    is configured, every charge that was opened before it came. Raises DeadLetterNotFound.
    """
    letter = require_letter(connection, dead_letter_id)
    if letter.job_id is not None:
        rows = connection.execute(_NAMED, {"job_ids": [letter.job_id]}).all()
        return Protection(
            names_its_jobs=True,
            charges=len(rows),
            credits=sum(row.credits for row in rows),
            sample=[ProtectedCharge(*row) for row in rows],
        )
    wanted = {
        "dead_letter_id": dead_letter_id,
        "queue": Queue.JOB_COMPLETED.value,
        "counts_for": NAMELESS_COUNTS_FOR,
        "sample_max": SAMPLE_MAX,
    }
    rows = [] if source_configured else connection.execute(_NAMELESS, wanted).all()
    return Protection(
        names_its_jobs=False,
        charges=rows[0].all_charges if rows else 0,
        credits=int(rows[0].all_credits) if rows else 0,
        sample=[ProtectedCharge(*row[:5]) for row in rows],
    )


_NAMED = sa.text("""
    SELECT c.job_id, c.account_id, c.credits, c.opened_at, c.deadline_at
    FROM kino.charge c JOIN kino.open_charge o USING (charge_id)
    WHERE c.job_id = ANY(CAST(:job_ids AS text[])) ORDER BY c.job_id
""")
_NAMELESS = sa.text("""
    SELECT c.job_id, c.account_id, c.credits, c.opened_at, c.deadline_at,
           count(*) OVER () AS all_charges, sum(c.credits) OVER () AS all_credits
    FROM kino.dead_letter d
    JOIN kino.charge c ON c.opened_at < d.last_seen_at
    JOIN kino.open_charge o USING (charge_id)
    WHERE d.dead_letter_id = :dead_letter_id AND d.queue = :queue
      AND d.last_seen_at > kino.clock() - CAST(:counts_for AS interval)
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

    Raises LetterProtects that names the charges that were not, DeadLetterNotFound, and DeadLetterClosed if the letter
    is not open; the caller must roll back then. The letter is closed first: that locks it, so what it protects is read
    in the transaction that ends the protection, and nothing is closed in between that nobody was shown.
    """
    discard_letter(connection, dead_letter_id, note=note, actor=actor)
    found = read_protection(connection, dead_letter_id, source_configured=source_configured)
    if not set(found.names) <= set(although_open):
        raise LetterProtects(refusal(dead_letter_id, found))
    return found


def refusal(dead_letter_id: int, found: Protection) -> str:
    """Say in one line what a letter protects and how it is discarded all the same."""
    options = " ".join(f"--although-open {shlex.quote(name)}" for name in found.names)
    if found.names_its_jobs:
        which = ", ".join(f"job {each.job_id} ({each.credits:,} credits)" for each in found.sample)
        why = f"keeps {which} from a presumed timeout, which would refund it"
    else:
        charges = f"{found.charges:,} open charge{'' if found.charges == 1 else 's'} of {found.credits:,} credits"
        why = f"names no job, so for an hour it keeps {charges} from a presumed timeout: it may be the end of any"
    return f"dead letter {dead_letter_id} {why}; replay it, or add {options}"
