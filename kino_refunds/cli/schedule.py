"""`schedule`: what runs by itself, and whether it does."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import typer

from kino_refunds.cli.options import AsJson, ledger_connection
from kino_refunds.cli.output import print_items
from kino_refunds.schedule import entries, read_schedule
from kino_refunds.settings import load_settings


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("schedule")(schedule)


def schedule(as_json: AsJson = False) -> int:
    """Show what runs by itself: last, next, missed.

    `missed` counts the runs of the last hour that did not happen. Exit code 1 means that one did not.

    Example: kino-refunds schedule
    """
    with ledger_connection() as connection:
        runs = read_schedule(connection, entries(load_settings()), now=datetime.now(UTC))
    rows = [asdict(run) for run in runs]
    if not as_json:
        rows = [
            {
                "what": run.what,
                "every_s": run.every_s,
                "last": run.last and f"{run.last:%H:%M:%S}",
                "next": f"{run.next:%H:%M:%S}",
                "missed": run.missed,
                "found": ", ".join(f"{name} {value}" for name, value in (run.result or {}).items() if value),
            }
            for run in runs
        ]
    print_items(rows, next_cursor=None, as_json=as_json, empty="nothing is scheduled")
    return 1 if any(run.missed for run in runs) else 0
