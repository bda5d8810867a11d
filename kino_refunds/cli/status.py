"""`status`: one screen for on-call."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kino_refunds.cli.exit_codes import FINDING
from kino_refunds.cli.options import AsJson, ledger_engine
from kino_refunds.cli.output import print_json

if TYPE_CHECKING:
    import redis

    from kino_refunds.db.engine import Engine
    from kino_refunds.settings import Settings


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show on one screen what is open, queued and late.

    The first line says fine or not fine. Exit code 1: not fine; each line that says why ends with the one command to
    type.

    Example: kino-refunds status --watch
    """
    if watch and as_json:
        raise typer.BadParameter("--watch draws a screen; for a program, run --json repeatedly")
    from kino_refunds.events.connection import redis_client
    from kino_refunds.settings import load_settings

    settings = load_settings()
    with ledger_engine(settings) as engine, redis_client(settings.require_redis_url()) as client:
        if watch:
            from kino_refunds.cli.status_screen import watch_screen

            watch_screen(lambda: read_status(engine, client, settings))
        found = read_status(engine, client, settings)
    if as_json:
        print_json(found)
    else:
        from kino_refunds.cli.status_screen import show_screen

        show_screen(found)
    return 0 if found["fine"] else FINDING


def read_status(engine: Engine, client: redis.Redis, settings: Settings) -> dict[str, Any]:
    """Return what the screen shows, as its JSON form says it; raises what Postgres and Redis raise."""
    from kino_refunds.desk import status as desk

    return asdict(desk.read_status(engine, client, settings))
