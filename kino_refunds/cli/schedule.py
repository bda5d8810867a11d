"""`schedule`: what runs by itself, and whether it does."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

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

    `missed` counts the runs of the last hour that did not happen. Exit code 1 means that one did not,
    or that nothing has run for long.

    Example: kino-refunds schedule
    """
    now = datetime.now(UTC)
    with ledger_connection() as connection:
        runs = read_schedule(connection, entries(load_settings()), now=now)
    rows = [asdict(run) for run in runs]
    if not as_json:
        rows = [
            {
                "what": run.what,
                "every_s": run.every_s,
                "last": run.last and f"{run.last:{'%H:%M:%S' if run.last.date() == now.date() else '%m-%d %H:%M'}}",
                "next": f"{run.next:%H:%M:%S}",
                "missed": run.missed,
                "found": _found(run.result or {}),
            }
            for run in runs
        ]
    print_items(rows, next_cursor=None, as_json=as_json, empty="nothing is scheduled")
    return 1 if any(run.missed or run.is_late(now) for run in runs) else 0


def _found(result: dict[str, Any]) -> str:
    """Say what a run did, without what it did not: `overdue 2, outcomes (refunded 2)`."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'({_found(value)})' if isinstance(value, dict) else value}"
        for name, value in result.items()
        if value
    )
