"""`accounts`: what an account has and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

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
    require_past,
)
from kino_refunds.cli.output import print_error, print_facts, print_items, print_json, say, tell

if TYPE_CHECKING:
    from kino_refunds.db.engine import Connection

Account = Annotated[str, typer.Argument(help="The account's id.", metavar="ACCOUNT")]


def grant(
    account: Account,
    credits: Annotated[int, typer.Argument(help="Whole credits, above zero.", metavar="CREDITS")],
    *,
    reference: Annotated[
        str,
        typer.Option(help="What this grant is for, such as an order; the same reference again changes nothing."),
    ],
    by: By,
    lot_class: Annotated[
        Literal["promotional", "courtesy", "subscription", "purchased", "lifetime"],
        typer.Option("--class", help="Where the credits come from."),
    ] = "purchased",
    expires_at: Annotated[str | None, typer.Option(help="When the credits expire (RFC 3339). Default: never.")] = None,
    although_past: AlthoughPast = False,
    priority: Annotated[
        int, typer.Option(min=-(2**31), max=2**31 - 1, help="Lots with a lower number burn first.")
    ] = 100,
    purchase: Annotated[str | None, typer.Option(help="The purchase that paid for the credits.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give an account credits, once for each reference.

    The first grant creates the account. Connects to KINO_PRODUCT_DATABASE_URL if that is set.

    Example: kino-refunds accounts grant acme 500 --reference order-1234
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.desk.accounts import was_granted
    from kino_refunds.ledger import Grant, LotClass, grant_lots

    expiry = None if expires_at is None else read_time(expires_at, Edge.END)
    try:
        wanted = Grant(
            reference=reference,
            account_id=account,
            credits=credits,
            lot_class=LotClass(lot_class),
            expires_at=expiry,
            priority=priority,
            purchase_id=purchase,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with product_connection() as connection:
        # The same grant may be repeated at any time, so also after it has expired.
        if expiry is not None and not was_granted(connection, reference):
            require_future("--expires-at", expiry, now=read_clock(connection), although_past=although_past)
        lot = grant_lots(connection, [wanted], actor=by)[0]
    if as_json:
        print_json(lot)
    else:
        print_facts(asdict(lot).items())


def show(
    account: Account,
    at: Annotated[str | None, typer.Option(help="At an instant (RFC 3339) instead of now.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show what an account can spend and what is held.

    Example: kino-refunds accounts show acme --at 2026-01-31T12:00:00Z
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.ledger import balance

    instant = None if at is None else read_time(at, Edge.END)
    with ledger_connection() as connection:
        if instant is not None:
            require_past("--at", instant, now=read_clock(connection))
        if not _exists(connection, account):
            return 1
        found = balance(connection, account, at=instant)
    told = {"account_id": account, **({} if instant is None else {"at": instant}), **asdict(found)}
    if as_json:
        print_json(told)
    else:
        print_facts((name.removesuffix("_id"), value) for name, value in told.items())
    return 0


def statement(
    account: Account,
    after: Annotated[int | None, typer.Option(help="Start after this transfer id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Lines at most.")] = 100,
    as_json: AsJson = False,
) -> int:
    """List an account's transfers, oldest first.

    Credits are signed by their effect on the wallet. Lines behind a transaction that is still open are not listed
    yet; a line on standard error says so.

    Example: kino-refunds accounts statement acme --limit 20
    """
    from kino_refunds import ledger

    with ledger_connection() as connection:
        if not _exists(connection, account):
            return 1
        more_later = ledger.later_lines_exist(connection, account)
        lines = ledger.statement(connection, account, after=after, limit=limit)
    print_items(
        [asdict(line) for line in lines],
        next_cursor=lines[-1].transfer_id if len(lines) == limit else None,
        as_json=as_json,
        empty="no transfers" if after is None else "no more transfers",
    )
    if not as_json and lines:
        say(f"sum of these lines: {sum(line.credits for line in lines):,}", style="dim")
    if more_later:
        # On standard error: the JSON keeps its shape, and the person who runs the command sees it in both forms.
        tell("later lines exist: a transaction before them is still open; ask again soon")
    return 0


def _exists(connection: Connection, account: str) -> bool:
    from kino_refunds.desk.accounts import account_exists

    if account_exists(connection, account):
        return True
    print_error(f"there is no account {account!r}; its first grant creates it (kino-refunds accounts grant)")
    return False
