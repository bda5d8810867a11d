"""`breaks`: events that disagree with the ledger."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from kino_refunds.cli.options import AsJson, By, Yes, confirm, ledger_connection, said
from kino_refunds.cli.output import escaped, print_facts, print_items, print_json, say

Number = Annotated[int, typer.Argument(help="The break's number.", metavar="NUMBER")]


def list_breaks(
    status: Annotated[
        Literal["live", "open", "investigating", "repaired", "closed", "accepted", "false_alarm", "all"],
        typer.Option(help="Only breaks in this state; `live` is open, investigating or repaired."),
    ] = "live",
    kind: Annotated[str | None, typer.Option(help="Only breaks of this kind.")] = None,
    after: Annotated[int, typer.Option(help="Start after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> int:
    """List breaks, oldest first; exit code 1 if any is live.

    Example: kino-refunds breaks list
    """
    from kino_refunds.desk import breaks as desk
    from kino_refunds.settlement.breaks import LIVE, BreakStatus

    statuses = None if status == "all" else LIVE if status == "live" else (BreakStatus(status),)
    with ledger_connection() as connection:
        found = desk.list_breaks(connection, statuses=statuses, kind=kind, after=after, limit=limit)
    print_items(
        [asdict(each) for each in found],
        next_cursor=found[-1].number if len(found) == limit else None,
        as_json=as_json,
        empty="no breaks" if status == "all" else f"no {status} breaks",
    )
    return 1 if any(each.status in LIVE for each in found) else 0


def show(number: Number, as_json: AsJson = False) -> None:
    """Show a break: what the event says, and what the ledger says.

    Example: kino-refunds breaks show 3
    """
    from kino_refunds.desk.breaks import read_break

    with ledger_connection() as connection:
        found = read_break(connection, number)
    if as_json:
        print_json(found)
    else:
        print_facts((name.replace("_", " "), value) for name, value in asdict(found).items())
        if found.job_id is not None:
            say(f"next: kino-refunds why {escaped(found.job_id)}", style="dim")


def accept(
    number: Number,
    by: By,
    note: Annotated[str, typer.Option(help="Why the ledger is right as it is.", callback=said)],
    yes: Yes = False,
) -> None:
    """Close a break as it stands; the ledger is not changed.

    Example: kino-refunds breaks accept 3 --note "agreed with support"
    """
    from kino_refunds.desk.breaks import accept_break

    confirm(f"Accept break {number} as it stands?", yes=yes)
    with ledger_connection() as connection:
        accept_break(connection, number, note=note, actor=by)
    say(f"break {number} is accepted")
