"""`schedule`: the sweeps that beat starts, and whether they run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kino_refunds.cli.options import AsJson, ledger_connection
from kino_refunds.cli.output import print_items


def schedule(as_json: AsJson = False) -> int:
    """Show the scheduled sweeps: last run, next run, missed runs.

    `missed` counts the runs of the last hour that did not happen. Exit code 1: a sweep does not run now; it is 0
    again when all of them run.

    Example: kino-refunds schedule
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.schedule import entries, read_schedule
    from kino_refunds.settings import load_settings

    with ledger_connection() as connection:
        now = read_clock(connection)
        runs = read_schedule(connection, entries(load_settings()))
    rows = [asdict(run) for run in runs]
    if not as_json:
        rows = [
            {
                "what": run.what,
                "every_s": run.every_s,
                "last": run.last and f"{run.last:{'%H:%M:%S' if run.last.date() == now.date() else '%m-%d %H:%M'}}",
                "next": f"{run.next:%H:%M:%S}",
                "missed": run.missed,
                "state": "late" if run.late else "does not end" if run.stuck else "runs" if run.last else "not yet",
                "found": _found(run.result or {}),
            }
            for run in runs
        ]
    print_items(rows, next_cursor=None, as_json=as_json, empty="nothing is scheduled")
    return 1 if any(run.late or run.stuck for run in runs) else 0


def _found(result: dict[str, Any]) -> str:
    """Return what a run did, without the zeros: `overdue 2, outcomes (refunded 2)`."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'({_found(value)})' if isinstance(value, dict) else value}"
        for name, value in result.items()
        if value
    )
