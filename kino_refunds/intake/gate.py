"""The gate of intake: one row in Postgres that says whether workers take events, and who closed it and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from datetime import datetime

TRIPWIRE = "tripwire"
"""The actor of a gate that a worker closed automatically. Only such a gate is probed, and opened automatically."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The state of the gate: `paused` means closed; `reason`, `actor` and `changed_at` are those of the last change."""

    paused: bool
    reason: str | None
    actor: str | None
    changed_at: datetime

    @property
    def probed(self) -> bool:
        """Whether the tripwire closed the gate: then a worker tries one event from time to time, and may open it."""
        return self.paused and self.actor == TRIPWIRE


def read_gate(connection: sa.Connection) -> Gate:
    """Return the present state of the gate; raises what Postgres raises."""
    row = connection.execute(sa.text("SELECT paused, reason, actor, changed_at FROM kino.intake_state")).one()
    return Gate(row.paused, row.reason, row.actor, row.changed_at)


def pause_intake(connection: sa.Connection, *, reason: str, actor: str) -> bool:
    """Close the gate for every worker; return False if it was closed already, which changes nothing.

    A person's pause replaces the tripwire's: then only a person opens the gate again.
    """
    return bool(
        connection.execute(
            sa.text(
                "UPDATE kino.intake_state SET paused = true, reason = :reason, actor = :actor,"
                " changed_at = kino.clock() WHERE NOT paused OR (actor = :tripwire AND :actor <> :tripwire)"
            ),
            {"reason": reason, "actor": actor, "tripwire": TRIPWIRE},
        ).rowcount
    )


def resume_intake(connection: sa.Connection, *, reason: str, actor: str) -> bool:
    """Open the gate for every worker; return False if it was open, or if a person closed it and `actor` is TRIPWIRE."""
    return bool(
        connection.execute(
            sa.text(
                "UPDATE kino.intake_state SET paused = false, reason = :reason, actor = :actor,"
                " changed_at = kino.clock() WHERE paused AND (:actor <> :tripwire OR actor = :tripwire)"
            ),
            {"reason": reason, "actor": actor, "tripwire": TRIPWIRE},
        ).rowcount
    )
