"""`status`: one screen for on-call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Annotated, Any

import redis
import sqlalchemy as sa
import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kino_refunds.cli.exit_codes import explained
from kino_refunds.cli.options import AsJson, ledger_engine
from kino_refunds.cli.output import console, print_json, print_whole, shown
from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import depths
from kino_refunds.schedule import entries, read_schedule
from kino_refunds.settings import Settings, load_settings
from kino_refunds.settlement.gate import read_gate

WATCH_EVERY_S = 2.0
HANGS_AFTER_S = 3.0
"""Everything is read in milliseconds; what takes longer must not look as if it were now."""

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
    if watch and as_json:
        raise typer.BadParameter("--watch is for a person's eyes; for a program, run --json again and again")
    settings = load_settings()
    with ledger_engine(settings) as engine, redis_client(settings.require_redis_url()) as client:
        if as_json:
            print_json(read_status(engine, client, settings))
        elif watch:
            _watch(lambda: _screen(read_status(engine, client, settings), lines_max=console.height - 1))
        else:
            print_whole(_screen(read_status(engine, client, settings)))


def read_status(engine: sa.Engine, client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """Read everything that on-call looks at first; raises what Postgres and Redis raise."""
    now = datetime.now(UTC)
    with engine.connect() as connection:
        gate = read_gate(connection)
        counts = connection.execute(_NOW, {"grace_s": settings.overdue_grace_s}).mappings().one()
        letters = {row.reason: row.letters for row in connection.execute(_LETTERS)}
        runs = read_schedule(connection, entries(settings), now=now)
    return {
        "at": now,
        "intake": "paused" if gate.paused else "open",
        "intake_reason": gate.reason if gate.paused else None,
        "intake_paused_by": gate.actor if gate.paused else None,
        **counts,
        "queues": depths(client),
        "dead_letters_open": letters,
        "missed_runs": {run.what: run.missed for run in runs if run.missed},
        "late_runs": {run.what: run.last for run in runs if run.is_late(now)},
    }


def _watch(screen: Callable[[], Table]) -> None:
    """Look again and again; a server that is away is what on-call wants to see coming back, so it ends nothing.

    Looked at in a thread of its own: a server that hangs must not leave the last picture standing as if it were
    true, nor hold up Ctrl-C.
    """
    seen: SimpleQueue[Table | Text | Exception] = SimpleQueue()

    def look() -> None:
        try:
            seen.put(screen())
        except (sa.exc.SQLAlchemyError, redis.RedisError) as error:
            seen.put(_bad(explained(error)[1]))
        except Exception as error:  # noqa: BLE001 - raised again where somebody waits for it
            seen.put(error)

    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            Thread(target=look, name="status", daemon=True).start()
            answer = _patiently(seen, lambda text: _draw(_bad(text), live))
            if isinstance(answer, Exception):
                raise answer
            _draw(answer, live)
            time.sleep(WATCH_EVERY_S)


def _patiently(seen: SimpleQueue[Any], tell: Callable[[str], None]) -> Any:
    """Wait for what comes, and say now and then that nothing has."""
    since = time.monotonic()
    while True:
        try:
            return seen.get(timeout=HANGS_AFTER_S)
        except Empty:
            tell(f"no answer for {time.monotonic() - since:.0f} s: Postgres or Redis hangs")


def _bad(text: str) -> Text:
    return Text.assemble(shown(datetime.now(UTC)), "  ", shown(text), style="bold red")


def _draw(seen: Table | Text, live: Live | None) -> None:
    if live is not None:
        live.update(seen, refresh=True)
    elif isinstance(seen, Table):
        print_whole(seen)
    else:
        console.print(seen, soft_wrap=True)


_NAMES = {"intake_reason": "reason", "intake_paused_by": "paused by"}
_ONLY_WHERE_SO = frozenset({"intake_reason", "intake_paused_by"})
_BAD_ABOVE_ZERO = frozenset({"breaks_open", "charges_overdue", "dead_letters_open", "missed_runs", "late_runs"})


def _screen(found: dict[str, Any], *, lines_max: int | None = None) -> Table:
    """Draw one line a thing, in a fixed order; where there is no room for all, what is bad comes first."""
    rows = []
    for name, value in found.items():
        if name in _ONLY_WHERE_SO and value is None:
            continue
        if isinstance(value, dict):
            text = Text(", ").join(Text.assemble(key, " ", shown(each)) for key, each in value.items())
        else:
            text = shown(value)
        bad = value == "paused" or (name == "workers_alive" and not value) or (name in _BAD_ABOVE_ZERO and bool(value))
        label = _NAMES.get(name, name.replace("_", " "))
        rows.append((label, text if value != {} else shown(None), bad))
    table = _table(rows)
    if lines_max is not None and len(console.render_lines(table)) > lines_max:
        return _table(sorted(rows, key=lambda row: not row[2]))
    return table


def _table(rows: list[tuple[str, Text, bool]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text, bad in rows:
        table.add_row(label, text, style="bold red" if bad else None)
    return table
