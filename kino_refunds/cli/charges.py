"""`charges`: what jobs have taken, which of it is open, and opening one by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from kino_refunds.cli.options import (
    AlthoughPast,
    AsJson,
    By,
    Edge,
    ledger_connection,
    product_connection,
    read_time,
    require_future,
)
from kino_refunds.cli.output import print_facts, print_items, print_json

DEADLINE_MIN = 15
"""Minutes: several times what a video takes, and short enough that a job tried here is found overdue the same hour."""
DEADLINE_MIN_MAX = 365 * 24 * 60
_LATER = datetime(9998, 1, 1, tzinfo=UTC)
"""Holds the place of the deadline until the ledger's clock has been read."""

_ONLY_IN_JSON = frozenset({"opened_at"})


def list_charges(
    *,
    only_open: Annotated[bool, typer.Option("--open", help="Only charges that nothing has settled.")] = False,
    account: Annotated[str | None, typer.Option(help="Only this account's.")] = None,
    after: Annotated[int, typer.Option(help="Start after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List charges, oldest first, with credits and age.

    A charge is overdue if it is open and its deadline and grace (KINO_OVERDUE_GRACE_S) have passed.

    Example: kino-refunds charges list --open
    """
    from kino_refunds.desk import charges as desk
    from kino_refunds.settings import load_settings

    settings = load_settings()
    with ledger_connection(settings) as connection:
        found = desk.list_charges(
            connection,
            only_open=only_open,
            account_id=account,
            after=after,
            limit=limit,
            grace=settings.overdue_grace,
        )
    cursor = found[-1].number if len(found) == limit else None
    rows = [asdict(each) for each in found]
    if not as_json:
        rows = [_for_people(row) for row in rows]
    empty = f"no {'more ' if after else ''}{'open ' if only_open else ''}charges"
    print_items(rows, next_cursor=cursor, as_json=as_json, empty=empty)


def _for_people(row: dict[str, object]) -> dict[str, object]:
    shown = {name: value for name, value in row.items() if name not in _ONLY_IN_JSON}
    shown["age"] = str(timedelta(seconds=int(str(shown.pop("age_s")))))
    shown["overdue"] = shown.pop("overdue")
    return shown


def open_charge(
    job: Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")],
    account: Annotated[str, typer.Argument(help="The account's id.", metavar="ACCOUNT")],
    credits: Annotated[int, typer.Argument(help="Whole credits, zero allowed.", metavar="CREDITS")],
    *,
    by: By,
    deadline: Annotated[
        str, typer.Option(help="When the job must have ended: minutes from now, or an instant (RFC 3339).")
    ] = str(DEADLINE_MIN),
    although_past: AlthoughPast = False,
    as_json: AsJson = False,
) -> None:
    """Take credits for a job, as the product does.

    The same charge again changes nothing. Connects to KINO_PRODUCT_DATABASE_URL if that is set: a worker's login has
    no right to open charges. The job settles as every job does: by its event, or as overdue after its deadline.

    Example: kino-refunds charges open job-42 acme 8 --deadline 15
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.ledger import ChargeRequest, open_charges

    wait = _minutes(deadline)
    instant = read_time(deadline, Edge.END) if wait is None else None
    try:
        wanted = ChargeRequest(job, account, credits, instant or _LATER)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with product_connection() as connection:
        if instant is not None:
            require_future("--deadline", instant, now=read_clock(connection), although_past=although_past)
        elif wait is not None:
            wanted = replace(wanted, deadline_at=read_clock(connection) + wait)
        charge = open_charges(connection, [wanted], actor=by)[0]
    if as_json:
        print_json(charge)
    else:
        facts = asdict(charge)
        lines = ", ".join(f"{taken:,} from lot {lot_id}" for lot_id, taken in facts.pop("lines"))
        print_facts([*facts.items(), ("lines", lines or None)])


def _minutes(text: str) -> timedelta | None:
    """Return a number of minutes, or None if the text is not a number. Raises a usage error for more than a year."""
    if not (text.isascii() and text.isdigit()):
        return None
    minutes = int(text[:20])
    if minutes > DEADLINE_MIN_MAX:
        raise typer.BadParameter(f"--deadline is at most {DEADLINE_MIN_MAX:,} minutes, not {text}")
    return timedelta(minutes=minutes)
