"""`report`: what happened to customers' credits in a month, and what they can still spend."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kino_refunds.cli.options import AsJson, Edge, read_time, reading_connection, require_past, written
from kino_refunds.cli.output import print_csv, print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Mapping

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")]


def month(
    month: Annotated[str, typer.Argument(help="The month, in UTC, such as 2026-01.", metavar="MONTH")],
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Show what happened to credits in a month, by lot class.

    Opening and closing are what customers had, in wallets or held by jobs that had not ended. A month that is not over
    is refused. The same month has the same figures whenever you ask; see the page on reconciliation.

    Example: kino-refunds report month 2026-01 --csv
    """
    from kino_refunds.reconciliation.reports import report_month

    _require_one_form(as_csv=as_csv, as_json=as_json)
    found = re.fullmatch(r"(\d{4})-(\d{2})", month)
    if found is None:
        raise typer.BadParameter(f"{month!r} is not a month; for example 2026-01")
    with reading_connection() as connection:
        try:
            report = report_month(connection, int(found[1]), int(found[2]))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    lines = {lot_class.value: line.as_dict() for lot_class, line in report.classes.items()}
    total = report.total.as_dict()
    if as_json:
        print_json(report.as_dict())
    elif as_csv:
        print_csv([{"class": name, **line} for name, line in (*lines.items(), ("total", total))])
    else:
        say(f"credits from {written(report.since)} to before {written(report.until)}")
        _print_turned(lines, total)
        say("checked: opening + granted - captured + reversed - expired - voided + unvoided = closing", style="dim")


def liability(
    at: Annotated[
        str | None, typer.Option(help="At an instant (RFC 3339). Default: the latest that can be given.")
    ] = None,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
) -> None:
    """Show the credits that customers can still spend.

    By lot class and by the month in which the credits expire; what is frozen, expired or held by running jobs is shown
    apart. The same instant has the same figures whenever you ask.

    Example: kino-refunds report liability --at 2026-02-01T00:00:00Z
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.reconciliation.reports import report_liability

    _require_one_form(as_csv=as_csv, as_json=as_json)
    instant = None if at is None else read_time(at, Edge.END)
    with reading_connection() as connection:
        if instant is not None:
            require_past("--at", instant, now=read_clock(connection))
        report = report_liability(connection, at=instant)
    told = report.as_dict()
    if as_json:
        print_json(told)
        return
    expiring = [
        {"class": each["class"], "expires": each["expires"], "credits": each["credits"]} for each in told["expiring"]
    ]
    if as_csv:
        apart = [
            {"class": name, "what": what, "expires": None, "credits": line[what]}
            for name, line in told["classes"].items()
            for what in ("frozen", "expired", "held")
        ]
        spendable = [{"class": each["class"], "what": "spendable", **each} for each in expiring]
        print_csv([{"at": told["at"], **each} for each in (*spendable, *apart)])
        return
    say(f"credits at {written(report.at)}")
    _print_turned(told["classes"], told["total"])
    if expiring:
        say("")
        print_table(expiring, title="spendable credits by the month in which they expire (UTC)")


def _require_one_form(*, as_csv: bool, as_json: bool) -> None:
    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json are two forms of one answer: choose one")


def _print_turned(lines: Mapping[str, Mapping[str, int]], total: Mapping[str, int]) -> None:
    """Print a row a figure and a column a class; classes without any credits are left out."""
    shown: Mapping[str, Mapping[str, Any]] = {name: line for name, line in lines.items() if any(line.values())}
    print_table(
        [
            {
                "": figure.replace("_", " "),
                **{name: line[figure] for name, line in shown.items()},
                "total": total[figure],
            }
            for figure in total
        ]
    )
