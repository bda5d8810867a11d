"""`relay rewind`: send refunds to the product again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kino_refunds.cli import log
from kino_refunds.cli.options import (
    AsJson,
    ByInTheLog,
    Edge,
    Yes,
    confirm,
    ledger_connection,
    read_time,
    require_past,
    require_terminal,
    written,
)
from kino_refunds.cli.output import print_json, say

if TYPE_CHECKING:
    from kino_refunds.outbox.relay import Rewind


def rewind(
    to: Annotated[str, typer.Option(help="Send again what was settled at or after this instant (RFC 3339).")],
    by: ByInTheLog,  # noqa: ARG001 - reading it puts it into the command's line in the log
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how many would be sent again; write nothing.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send refunds to the product again, after Redis lost data.

    Every refund and correction settled at or after an instant is sent again under its id: a consumer that deduplicates
    takes each once. The person and the number are in the log if KINO_LOG_FORMAT is json; no table has a row for them.

    Example: kino-refunds relay rewind --to 2026-01-31T12:00:00Z --dry-run
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.outbox.relay import rewind_relay

    instant = read_time(to, Edge.START)

    def run(*, dry: bool) -> Rewind:
        with ledger_connection() as connection:
            require_past("--to", instant, now=read_clock(connection))
            return rewind_relay(connection, instant, dry_run=dry)

    if not dry_run and not yes:
        require_terminal()
        confirm(f"{_sentence(run(dry=True), dry_run=True, to=written(instant))}. Do it?", yes=yes)
    found = run(dry=dry_run)
    log.note(told_again=found.told_again, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "to": instant, **asdict(found)})
    else:
        say(_sentence(found, dry_run=dry_run, to=written(instant)))


def _sentence(found: Rewind, *, dry_run: bool, to: str) -> str:
    if found.oldest_at is None:
        return f"no refund since {to} has been sent yet; nothing to send again"
    verb = "would be" if dry_run else "are"
    count = f"{found.told_again:,} refund{'' if found.told_again == 1 else 's'}"
    return f"{count} since {to} {verb} sent again, the oldest settled at {written(found.oldest_at)}"
