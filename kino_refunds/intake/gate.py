"""The gate of intake: one row in Postgres that says whether events are taken, by whom closed, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from datetime import datetime

TRIPWIRE = "tripwire"
"""The actor that closes the gate by itself; only what it closed is probed and opened again by itself."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether intake takes events; `reason` and `actor` belong to the last change."""

    paused: bool
    reason: str | None
    actor: str | None
    changed_at: datetime

    @property
    def probed(self) -> bool:
        """Closed by the tripwire: one event now and then finds out whether it can be opened."""
        return self.paused and self.actor == TRIPWIRE


def read_gate(connection: sa.Connection) -> Gate:
    """Read the gate as it stands."""
    row = connection.execute(sa.text("SELECT paused, reason, actor, changed_at FROM kino.intake_state")).one()
    return Gate(row.paused, row.reason, row.actor, row.changed_at)


def pause_intake(connection: sa.Connection, *, reason: str, actor: str) -> bool:
    """Close the gate for every worker; False if it was closed already, which then stays as it is.

    A person's pause takes the place of the tripwire's: it ends only when a person ends it.
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
    """Open the gate for every worker; False if it was open, or was closed by a person and `actor` is none."""
    return bool(
        connection.execute(
            sa.text(
                "UPDATE kino.intake_state SET paused = false, reason = :reason, actor = :actor,"
                " changed_at = kino.clock() WHERE paused AND (:actor <> :tripwire OR actor = :tripwire)"
            ),
            {"reason": reason, "actor": actor, "tripwire": TRIPWIRE},
        ).rowcount
    )
