"""`doctor`: is everything here as it must be, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from rich.table import Table
from rich.text import Text

from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import print_json, print_whole, shown
from kino_refunds.doctor.findings import Finding, guarded
from kino_refunds.doctor.on_postgres import check_postgres
from kino_refunds.doctor.on_redis import check_redis
from kino_refunds.doctor.on_settings import SETTINGS, check_settings, unreadable
from kino_refunds.errors import BadSettings
from kino_refunds.settings import load_settings

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red", "away": "bold red"}


def doctor(as_json: AsJson = False) -> int:
    """Check settings, Postgres, Redis, clocks, workers and beat.

    Exit code 0: all is well, or only warnings. 1: something must be mended. 2: a setting is
    missing or wrong. 3: a dependency is away.

    Example: kino-refunds doctor --json
    """
    findings = list(examine())
    if as_json:
        print_json({"items": [asdict(each) for each in findings], "next": None})
    else:
        _show(findings)
    return _exit_code(findings)


def examine() -> Iterator[Finding]:
    """Run every check; one that cannot be made is a finding too."""
    try:
        settings = load_settings()
    except BadSettings as error:
        yield unreadable(error)
        return
    yield from check_settings(settings)
    for check, require_url, look in (
        ("postgres", settings.require_database_url, check_postgres),
        ("redis", settings.require_redis_url, check_redis),
    ):
        try:
            url = require_url()
        except BadSettings as error:
            yield unreadable(error)
        else:
            yield from guarded(check, partial(look, url, settings))


def _exit_code(findings: list[Finding]) -> int:
    """Say the first thing to do: settings come before the servers they lead to, and those before what is in them."""
    if any(each.check == SETTINGS and each.level == "fail" for each in findings):
        return 2
    levels = {each.level for each in findings}
    return 3 if "away" in levels else 1 if "fail" in levels else 0


def _show(findings: list[Finding]) -> None:
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
