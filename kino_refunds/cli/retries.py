"""`retries`: events that wait for another try."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kino_refunds.cli.options import AsJson, By, ledger_connection, ledger_engine, warn_if_paused
from kino_refunds.cli.output import print_error, print_facts, print_items, print_json, print_table, say


def list_pending(
    after: Annotated[
        str | None, typer.Option(help="Start after this event: the `next` of the page before, unchanged.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List pending events, by event id.

    Example: kino-refunds retries list --json
    """
    cursor = None if after is None else _read_cursor(after)
    from kino_refunds.desk import retries as desk

    with ledger_connection() as connection:
        found = desk.list_pending(connection, after=cursor, limit=limit)
    print_items(
        [asdict(each) for each in found],
        next_cursor=json.dumps([found[-1].event_id, found[-1].source]) if len(found) == limit else None,
        as_json=as_json,
        empty="no event is pending",
    )


def _read_cursor(text: str) -> tuple[str, str]:
    """Return the event's id and source of a cursor, which is JSON because both may hold any separator."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        read = None
    match read:
        case [str(event_id), str(source)] if (event_id + source).isprintable():
            return event_id, source
        case _:
            raise typer.BadParameter(f"{text!a} is no cursor; give the `next` of the page before, unchanged")


def show(
    event_id: Annotated[str, typer.Argument(help="The event's id.", metavar="EVENT")], as_json: AsJson = False
) -> int:
    """Show a pending event and the outcomes of its attempts.

    Example: kino-refunds retries show job-42-end
    """
    from kino_refunds.desk import retries as desk

    with ledger_connection() as connection:
        rows = [asdict(each) for each in desk.read_pending_events(connection, event_id)]
    if not rows:
        print_error(f"no event {event_id!r} is pending; see `kino-refunds why JOB` for the events of a job")
        return 1
    if as_json:
        print_json({"items": rows, "next": None})
        return 0
    for row in rows:
        history = row.pop("history")
        print_facts((name.replace("_", " "), value) for name, value in row.items())
        if history:
            say("\nattempts", style="bold")
            names = list(dict.fromkeys(key for entry in history for key in entry))
            print_table([{key: entry.get(key) for key in names} for entry in history])
    return 0


def run_now(
    by: By,
    event_id: Annotated[str | None, typer.Argument(help="Only this event.", metavar="EVENT")] = None,
    as_json: AsJson = False,
) -> int:
    """Try pending events again now, all of them or one.

    The person is kept in the history of each event for as long as it is pending.

    Example: kino-refunds retries run-now
    """
    from kino_refunds.desk.retries import try_now
    from kino_refunds.intake.gate import read_gate
    from kino_refunds.settings import load_settings
    from kino_refunds.settlement.rules import rules_of

    settings = load_settings()
    with ledger_engine(settings) as engine:
        with engine.connect() as connection:
            warn_if_paused(read_gate(connection))
        found = try_now(engine, rules_of(settings), event_id=event_id, lease=settings.retry_lease, actor=by)
    if event_id is not None and not found.tried:
        print_error(
            f"no event {event_id!r} is pending, or a sweep settles it at this moment; see `kino-refunds retries list`"
        )
        return 1
    if as_json:
        print_json(found)
    else:
        print_facts([("tried", found.tried), *found.outcomes.items()])
    return 0
