"""`migrate`: the database's schema."""

from __future__ import annotations

from typing import Annotated

import typer

from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import print_json, say


def migrate(
    *,
    lot_grace_days: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=365,
            help="Returned credits can be spent for at least this many days (a new ledger: 7).",
            show_default="as it is",
        ),
    ] = None,
    beside_older_builds: Annotated[
        bool,
        typer.Option(
            "--beside-older-builds",
            help="Let builds older than 0006 write the ledger's tables, for an upgrade or a rollback without a pause;"
            " migrate again without this option when those builds have stopped.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database to the schema of this build.

    Connects to KINO_MIGRATION_DATABASE_URL, as kino_owner. The roles must exist: a superuser runs
    kino_refunds/db/roles.sql in that database first. The schema of a newer build is not changed.

    Example: kino-refunds migrate --lot-grace-days 14
    """
    from kino_refunds.desk.schema import migrate_schema
    from kino_refunds.settings import load_settings

    found = migrate_schema(
        load_settings().require_migration_database_url(),
        lot_grace_days=lot_grace_days,
        beside_older_builds=beside_older_builds,
    )
    after = found.after
    if as_json:
        print_json(found)
    elif found.newer:
        say(
            f"the schema is at {after}, of a newer build than this one: nothing was changed, and no function either",
            whole=True,
        )
    elif found.before == after:
        say(f"the schema is at {after}, nothing to do")
    else:
        say(f"the schema was at {found.before or 'nothing'} and is at {after} now")
    if not found.newer and not as_json:
        say(
            "the ledger's tables stay open to older builds: migrate again without --beside-older-builds when those"
            " builds have stopped"
            if beside_older_builds
            else "the ledger's tables are written by its functions only",
            whole=True,
        )
