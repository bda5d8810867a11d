"""`retries`: events that wait for another try."""

from __future__ import annotations

import json
from typing import Annotated

import sqlalchemy as sa
import typer

from kino_refunds.cli.options import AsJson, By, ledger_connection, ledger_engine, warn_if_paused
from kino_refunds.cli.output import console, print_error, print_facts, print_items, print_json, print_table
from kino_refunds.settings import load_settings
from kino_refunds.settlement.pending import HISTORY_LENGTH_MAX
from kino_refunds.settlement.retries import sweep_retries
from kino_refunds.settlement.rules import rules_of

_LIST = sa.text("""
    SELECT p.event_id, p.source, p.job_id, p.outcome, p.attempts, p.first_seen_at, p.next_attempt_at,
           coalesce(c.credits, 0) AS credits
    FROM kino.pending_event p LEFT JOIN kino.charge c USING (job_id)
    WHERE CAST(:after_event AS text) IS NULL OR (p.event_id, p.source) > (:after_event, :after_source)
    ORDER BY p.event_id, p.source LIMIT :limit
""")
_SHOW = sa.text("""
    SELECT event_id, source, job_id, outcome, attempts, queue, first_seen_at, next_attempt_at, leased_until,
           fingerprint, CAST(event AS text) AS event, history
    FROM kino.pending_event WHERE event_id = :event_id ORDER BY source
""")


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    retries = typer.Typer(
        help="Events that wait for another try.\n\nExample: kino-refunds retries list", no_args_is_help=True
    )
    retries.command("list")(list_waiting)
    retries.command("show")(show)
    retries.command("run-now")(run_now)
    app.add_typer(retries, name="retries")


def list_waiting(
    after: Annotated[str | None, typer.Option(help="Go on behind this event: the page's `next`, as it is.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List waiting events, by event id.

    Example: kino-refunds retries list --json
    """
    event_id, source = (None, None) if after is None else _read_cursor(after)
    wanted = {"after_event": event_id, "after_source": source, "limit": limit}
    with ledger_connection() as connection:
        rows = [dict(row) for row in connection.execute(_LIST, wanted).mappings()]
    print_items(
        rows,
        next_cursor=json.dumps([rows[-1]["event_id"], rows[-1]["source"]]) if len(rows) == limit else None,
        as_json=as_json,
        empty="no event waits for another try",
    )


def _read_cursor(text: str) -> tuple[str, str]:
    """Read an event's id and source; both may hold any character that a separator could be."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        read = None
    match read:
        case [str(event_id), str(source)] if (event_id + source).isprintable():
            return event_id, source
        case _:
            raise typer.BadParameter(f"{text!a} is no cursor; give the `next` of the page before, as it is")


def show(
    event_id: Annotated[str, typer.Argument(help="The event's id.", metavar="EVENT")], as_json: AsJson = False
) -> int:
    """Show a waiting event and what its attempts came to.

    Example: kino-refunds retries show job-42-end
    """
    with ledger_connection() as connection:
        rows = [dict(row) for row in connection.execute(_SHOW, {"event_id": event_id}).mappings()]
    if not rows:
        print_error(f"no event {event_id!r} waits; `kino-refunds why JOB` says what became of a job's events")
        return 1
    if as_json:
        print_json({"items": rows, "next": None})
        return 0
    for row in rows:
        history = row.pop("history")
        print_facts((name.replace("_", " "), value) for name, value in row.items())
        if history:
            console.print("\nattempts", style="bold")
            names = list(dict.fromkeys(key for entry in history for key in entry))
            print_table([{key: entry.get(key) for key in names} for entry in history])
    return 0


ROUND = 500
_COUNT = sa.text("""
    SELECT count(*) FROM kino.pending_event WHERE CAST(:event_id AS text) IS NULL OR event_id = :event_id
""")
# A row that is locked is being tried at this moment. The entry says who had the event tried; a history that is full
# loses its second entry, as a sweep's does.
_HASTEN = sa.text("""
    UPDATE kino.pending_event p SET
        next_attempt_at = least(p.next_attempt_at, kino.clock()),
        history = CASE WHEN jsonb_array_length(p.history) < :history_length_max THEN p.history ELSE p.history - 1 END
                  || jsonb_build_array(jsonb_build_object('at', kino.clock(), 'actor', CAST(:actor AS text)))
    FROM (SELECT source, event_id FROM kino.pending_event
          WHERE CAST(:event_id AS text) IS NULL OR event_id = :event_id
          ORDER BY source, event_id FOR UPDATE SKIP LOCKED) AS free
    WHERE p.source = free.source AND p.event_id = free.event_id
""")


def run_now(
    by: By,
    event_id: Annotated[str | None, typer.Argument(help="Only this event.", metavar="EVENT")] = None,
    as_json: AsJson = False,
) -> int:
    """Try waiting events again now, all of them or one.

    Who did it is kept in the history of each event for as long as it waits.

    Example: kino-refunds retries run-now
    """
    settings = load_settings()
    rules = rules_of(settings)
    tried, outcomes = 0, dict[str, int]()
    with ledger_engine(settings) as engine:
        with engine.begin() as connection:
            warn_if_paused(connection)
            connection.execute(_HASTEN, {"event_id": event_id, "history_length_max": HISTORY_LENGTH_MAX, "actor": by})
            waiting = connection.execute(_COUNT, {"event_id": event_id}).scalar_one()
        # As many rounds as they need and no more: what is put off again may be due within the same second.
        for _ in range(-(-waiting // ROUND)):
            swept = sweep_retries(
                engine,
                rules,
                lease=settings.retry_lease,
                limit=ROUND,
                event_id=event_id,
            )
            tried += swept.tried
            for outcome, count in swept.outcomes.items():
                outcomes[outcome] = outcomes.get(outcome, 0) + count
    if event_id is not None and not tried:
        print_error(f"no event {event_id!r} waits, or a sweep has it in hand; see `kino-refunds retries list`")
        return 1
    if as_json:
        print_json({"tried": tried, "outcomes": outcomes})
    else:
        print_facts([("tried", tried), *outcomes.items()])
    return 0
