"""Upgrade a database to the schema that this build expects."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from kino_refunds.db.clock import restore_clock
from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.db.functions import install_functions
from kino_refunds.errors import LedgerInconsistent

# The key of an advisory lock: any number that no other program uses in this database. These are the bytes of "kino".
MIGRATION_LOCK = 0x6B696E6F

DAY_MS = 86_400_000
TABLE_LOCK_TIMEOUT_MS = 30_000
LIMITS = SessionLimits(
    lock_timeout_ms=DAY_MS,
    statement_timeout_ms=DAY_MS,
    idle_in_transaction_timeout_ms=DAY_MS,
    transaction_timeout_ms=DAY_MS,
)
"""A migration of a large ledger takes long: no default of the role may end it, or its wait for another migration."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def migrations() -> ScriptDirectory:
    """Return the migrations of this build."""
    return ScriptDirectory.from_config(_config())


def head_revision() -> str:
    """Return the name of the newest revision that this build knows."""
    head = migrations().get_current_head()
    assert head is not None, "the package ships at least one migration"
    return head


def functions_of_head() -> str:
    """Return the digest of the ledger's functions at this build's newest revision."""
    script = migrations().get_revision(head_revision())
    assert script is not None, "the package ships its newest migration"
    digest: str = script.module.LEDGER_FUNCTIONS
    return digest


def is_known_revision(revision: str) -> bool:
    """Tell whether this build has that migration; a revision of a newer build is unknown."""
    return any(script.revision == revision for script in migrations().walk_revisions())


def current_revision(connection: sa.Connection) -> str | None:
    """Return the revision of the database; None before the first migration.

    Raises LedgerInconsistent if kino.alembic_version names more than one.
    """
    heads = MigrationContext.configure(connection, opts={"version_table_schema": "kino"}).get_current_heads()
    if len(heads) > 1:
        raise LedgerInconsistent(f"kino.alembic_version names {' and '.join(sorted(heads))}: only one can be right")
    return heads[0] if heads else None


def migrate(
    url: str, *, lot_grace_days: int | None = None, beside_older_builds: bool = False
) -> tuple[str | None, str]:
    """Upgrade the database at `url` (connect as kino_owner) in one transaction; return the revisions before and after.

    Installs the ledger's functions and revokes the right to write its tables (`beside_older_builds` leaves them open to
    builds from before 0006). Writes the lot grace if one is given (0 to 365 days). Restores a `kino.clock()` that a
    test has replaced. Two migrations at once are safe: the second waits and finds nothing to do. A schema of a newer
    build is left unchanged, its functions included, so that programs of that build keep working.

    Raises sqlalchemy's OperationalError if the server is away, ProgrammingError if the roles of `db/roles.sql` are
    missing, IntegrityError if the grace is out of bounds, and WrongEncoding if the database is not encoded in UTF8. In
    each case nothing has changed.
    """
    engine = create_engine(url, limits=LIMITS, application_name="kino-migrate", pooled=False)
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        # From here on the migration waits 30 s at most for a table that a session holds. Every later session queues
        # behind our wait: the whole ledger would stand still because of one forgotten transaction.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {TABLE_LOCK_TIMEOUT_MS}")
        connection.execute(sa.text("CREATE SCHEMA IF NOT EXISTS kino"))
        before = current_revision(connection)
        if before is not None and not is_known_revision(before):
            return before, before
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        restore_clock(connection)
        install_functions(connection, functions_of_head(), beside_older_builds=beside_older_builds)
        if lot_grace_days is not None:
            connection.execute(
                sa.text("UPDATE kino.ledger_setting SET lot_grace_days = :days WHERE lot_grace_days <> :days"),
                {"days": lot_grace_days},
            )
        return before, head_revision()
