"""`breaks`: where somebody disagrees with the ledger."""

from __future__ import annotations

from typing import Annotated, Literal

import sqlalchemy as sa
import typer
from rich.text import Text

from kino_refunds.cli.options import AsJson, By, Yes, confirm, ledger_connection, said
from kino_refunds.cli.output import console, print_error, print_facts, print_items, print_json, shown
from kino_refunds.settlement.breaks import accept_break

Number = Annotated[int, typer.Argument(help="The break's number.", metavar="NUMBER")]

_LIST = sa.text("""
    SELECT break_id AS number, kind, job_id, credits, seen, first_seen_at, last_seen_at, status
    FROM kino.break WHERE (:status = 'all' OR status = :status) AND break_id > :after
    ORDER BY break_id LIMIT :limit
""")


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    breaks = typer.Typer(
        help="Where somebody disagrees with the ledger.\n\nExample: kino-refunds breaks list", no_args_is_help=True
    )
    breaks.command("list")(list_breaks)
    breaks.command("show")(show)
    breaks.command("accept")(accept)
    app.add_typer(breaks, name="breaks")


def list_breaks(
    status: Annotated[
        Literal["open", "repaired", "accepted", "all"], typer.Option(help="Only breaks in this state.")
    ] = "open",
    after: Annotated[int, typer.Option(help="Go on behind this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> int:
    """List breaks, oldest first; exit code 1 if any is open.

    Example: kino-refunds breaks list
    """
    with ledger_connection() as connection:
        found = connection.execute(_LIST, {"status": status, "after": after, "limit": limit})
        rows = [dict(row) for row in found.mappings()]
    print_items(
        rows,
        next_cursor=rows[-1]["number"] if len(rows) == limit else None,
        as_json=as_json,
        empty="no breaks" if status == "all" else f"no {status} breaks",
    )
    return 1 if any(row["status"] == "open" for row in rows) else 0


def show(number: Number, as_json: AsJson = False) -> int:
    """Show a break: who says what.

    Example: kino-refunds breaks show 3
    """
    with ledger_connection() as connection:
        row = (
            connection.execute(sa.text("SELECT * FROM kino.break WHERE break_id = :number"), {"number": number})
            .mappings()
            .one_or_none()
        )
    if row is None:
        print_error(f"there is no break {number}; see `kino-refunds breaks list --status all`")
        return 1
    if as_json:
        print_json(dict(row))
    else:
        print_facts((name.replace("_", " "), value) for name, value in row.items())
        console.print(Text.assemble("next: kino-refunds why ", shown(row["job_id"]), style="dim"))
    return 0


def accept(
    number: Number,
    by: By,
    note: Annotated[str, typer.Option(help="Why it is fine as it is.", callback=said)],
    yes: Yes = False,
) -> None:
    """Close a break as it stands; the ledger is not changed.

    Example: kino-refunds breaks accept 3 --note "agreed with support"
    """
    confirm(f"Accept break {number} as it stands?", yes=yes)
    with ledger_connection() as connection:
        accept_break(connection, number, note=note, actor=by)
    console.print(f"break {number} is accepted")
