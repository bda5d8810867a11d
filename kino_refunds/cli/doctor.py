"""`doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from kino_refunds.cli.exit_codes import AWAY, FINDING, USAGE
from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import print_json

if TYPE_CHECKING:
    from kino_refunds.doctor.findings import Finding

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red", "away": "bold red"}


def doctor(as_json: AsJson = False) -> int:
    """Check settings, Postgres, Redis, clocks, workers and beat.

    Exit code 0: all is well, or only warnings. 1: something must be fixed. 2: a setting is missing or wrong.
    3: a dependency is away.

    Example: kino-refunds doctor --json
    """
    from kino_refunds.doctor.checkup import examine

    findings = list(examine())
    if as_json:
        print_json({"items": [asdict(each) for each in findings], "next": None})
    else:
        _show(findings)
    return _exit_code(findings)


def _exit_code(findings: list[Finding]) -> int:
    """Return the code of the first thing to fix: settings lead to the servers, and the servers to what is in them."""
    from kino_refunds.doctor.on_settings import SETTINGS

    if any(each.check == SETTINGS and each.level == "fail" for each in findings):
        return USAGE
    levels = {each.level for each in findings}
    return AWAY if "away" in levels else FINDING if "fail" in levels else 0


def _show(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kino_refunds.cli.tables import print_whole, shown

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(Text(each.level, style=_STYLE[each.level]), each.check, shown(each.found))
        if each.advice is not None:
            advice = shown(each.advice)
            advice.stylize("bold")
            table.add_row("", "", advice)
    print_whole(table)
