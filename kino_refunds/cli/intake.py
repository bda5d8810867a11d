"""`intake`: whether events are taken, the workers, and what is queued."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kino_refunds.cli.options import AsJson, By, Yes, confirm, ledger_connection, said
from kino_refunds.cli.output import print_facts, print_json, print_table, say


def status(as_json: AsJson = False) -> int:
    """Show the gate, the workers and the queues.

    Exit code 1: no worker takes events, because intake is paused or no worker is alive.

    Example: kino-refunds intake status --json
    """
    from kino_refunds.events.connection import redis_client
    from kino_refunds.events.queues import depths
    from kino_refunds.intake.gate import read_gate
    from kino_refunds.intake.workforce import read_workers
    from kino_refunds.settings import load_settings

    settings = load_settings()
    # Redis is read outside the transaction: if it hung, Postgres would end the idle session, and the error would name
    # Postgres.
    with ledger_connection() as connection:
        gate = read_gate(connection)
        workers = [asdict(worker) for worker in read_workers(connection)]
    with redis_client(settings.require_redis_url()) as client:
        waiting = depths(client)
    alive = sum(worker["alive"] for worker in workers)
    if as_json:
        print_json({**asdict(gate), "workers": workers, "waiting": waiting})
    else:
        print_facts(
            [
                ("intake", "paused" if gate.paused else "open"),
                ("since", gate.changed_at),
                ("by", gate.actor),
                ("reason", gate.reason),
                ("workers alive", alive),
                *waiting.items(),
            ]
        )
        if workers:
            say("")
            shown = ("host", "pid", "build", "alive", "seen_at", "messages")
            print_table([{"worker": row["worker_id"][:8], **{name: row[name] for name in shown}} for row in workers])
    return 1 if gate.paused or not alive else 0


def pause(
    by: By,
    reason: Annotated[str, typer.Option(help="Why; the next person reads it.", callback=said)],
    yes: Yes = False,
) -> None:
    """Stop taking events, in every worker, until `resume`.

    No event is lost: events stay queued, and retries and the overdue sweep stop too.

    Example: kino-refunds intake pause --reason "ledger maintenance until 14:00"
    """
    from kino_refunds.intake.gate import pause_intake

    confirm("Stop taking events in every worker?", yes=yes)
    with ledger_connection() as connection:
        paused = pause_intake(connection, reason=reason, actor=by)
    say("intake is paused" if paused else "intake was already paused; see `kino-refunds intake status`")


def resume(by: By, reason: Annotated[str, typer.Option(help="Why.", callback=said)] = "resumed by hand") -> None:
    """Take events again.

    Example: kino-refunds intake resume
    """
    from kino_refunds.intake.gate import resume_intake

    with ledger_connection() as connection:
        resumed = resume_intake(connection, reason=reason, actor=by)
    say("intake takes events" if resumed else "intake was already open")
