"""`status`: one screen for on-call."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import redis
import sqlalchemy as sa
import typer
from rich.live import Live
from rich.table import Table

from kino_refunds.cli.options import AsJson, ledger_engine
from kino_refunds.cli.output import console, print_json, shown
from kino_refunds.events.client import redis_client
from kino_refunds.events.queues import depths
from kino_refunds.schedule import entries, read_schedule
from kino_refunds.settings import Settings, load_settings
from kino_refunds.settlement.gate import read_gate

WATCH_EVERY_S = 2.0

# Everything here is counted over what is open or of the last hour, so that a large ledger answers as fast.
_NOW = sa.text("""
    SELECT
        (SELECT count(*) FROM kino.intake_worker
         WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - interval '30 seconds') AS workers_alive,
        (SELECT count(*) FROM kino.pending_event) AS waiting_for_retry,
        (SELECT min(first_seen_at) FROM kino.pending_event) AS waiting_since,
        (SELECT count(*) FROM kino.break WHERE status = 'open') AS breaks_open,
        (SELECT count(*) FROM kino.charge c
         WHERE c.opened_at >= (SELECT v.opened_at FROM kino.verified_through v)
           AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)) AS charges_open,
        (SELECT count(*) FROM kino.charge c
         WHERE c.opened_at >= (SELECT v.opened_at FROM kino.verified_through v)
           AND c.deadline_at + make_interval(secs => :grace_s) < clock_timestamp()
           AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)) AS charges_overdue
""")
_LETTERS = sa.text("""
    SELECT reason, count(*) AS letters FROM kino.dead_letter WHERE status = 'open' GROUP BY reason ORDER BY 2 DESC
""")


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("status")(status)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show on one screen how things stand.

    Example: kino-refunds status --watch
    """
    settings = load_settings()
    with ledger_engine(settings) as engine, redis_client(settings.require_redis_url()) as client:
        if as_json:
            print_json(read_status(engine, client, settings))
            return
        if not watch:
            console.print(_screen(read_status(engine, client, settings)))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_screen(read_status(engine, client, settings)), refresh=True)
                time.sleep(WATCH_EVERY_S)


def read_status(engine: sa.Engine, client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """Read everything that on-call looks at first; raises what Postgres and Redis raise."""
    now = datetime.now(UTC)
    with engine.connect() as connection:
        gate = read_gate(connection)
        counts = connection.execute(_NOW, {"grace_s": settings.overdue_grace_s}).mappings().one()
        letters = {row.reason: row.letters for row in connection.execute(_LETTERS)}
        missed = {run.what: run.missed for run in read_schedule(connection, entries(settings), now=now)}
    return {
        "at": now,
        "intake": "paused" if gate.paused else "open",
        "intake_reason": gate.reason if gate.paused else None,
        **counts,
        "queues": depths(client),
        "dead_letters_open": letters,
        "missed_runs": {what: count for what, count in missed.items() if count},
    }


def _screen(found: dict[str, Any]) -> Table:
    bad = {
        "intake": found["intake"] == "paused",
        "workers_alive": not found["workers_alive"],
        "breaks_open": bool(found["breaks_open"]),
        "charges_overdue": bool(found["charges_overdue"]),
        "dead_letters_open": bool(found["dead_letters_open"]),
        "missed_runs": bool(found["missed_runs"]),
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in found.items():
        text = ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), shown(text or None if isinstance(value, dict) else text))
        if bad.get(name):
            table.rows[-1].style = "bold red"
    return table
