"""Bringing a database to this build's schema, for a person: each failure says in one line what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from alembic.util import CommandError

from kino_refunds.db.faults import Fault, classify
from kino_refunds.db.migrate import is_known_revision, migrate
from kino_refunds.errors import BadSettings, DependencyAway
from kino_refunds.settings import redacted

_ROLES_MISSING: Final = frozenset({"42501", "42704"})
"""No right to create the schema; no such role to grant to."""


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """The schema's revision before (None: there was no ledger) and after; `newer`: it belongs to a newer build."""

    before: str | None
    after: str
    newer: bool


def migrate_schema(url: str, *, lot_grace_days: int | None = None, beside_older_builds: bool = False) -> SchemaChange:
    """Migrate the database at `url` as `db.migrate` does; nothing has changed where this raises.

    Raises BadSettings where this build cannot read the database's migrations, and DependencyAway where the server is
    away, a role or a right is missing, or a transaction holds a table of the ledger for too long.
    """
    try:
        before, after = migrate(url, lot_grace_days=lot_grace_days, beside_older_builds=beside_older_builds)
    except CommandError as error:
        raise BadSettings(f"{redacted(url)}: {error}; is this build older than that database's schema?") from error
    except sa.exc.OperationalError as error:
        if classify(error) is Fault.LOCK:
            raise DependencyAway(
                f"{redacted(url)}: a transaction holds a table of the ledger for longer than the migration waits;"
                " nothing was changed: end it (`kino-refunds doctor` names who holds the horizon), and migrate again"
            ) from error
        text = str(error.orig).partition("\n")[0]
        raise DependencyAway(
            f"Postgres (KINO_MIGRATION_DATABASE_URL): {text}; check that it runs and can be reached"
        ) from error
    except sa.exc.ProgrammingError as error:
        advice = "is kino.alembic_version there what a migration left?"
        if getattr(error.orig, "sqlstate", None) in _ROLES_MISSING:
            advice = "run kino_refunds/db/roles.sql there as a superuser first, and connect as kino_owner"
        raise DependencyAway(
            f"{redacted(url)}: {str(error.orig).partition(chr(10))[0]}; {advice}; nothing was changed"
        ) from error
    return SchemaChange(before, after, newer=not is_known_revision(after))
