"""`why`: everything that is known of one job's credits (P10)."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
import typer

from kino_refunds.cli.options import AsJson, ledger_connection
from kino_refunds.cli.output import console, print_error, print_facts, print_json, print_table, shown

Job = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]

_CHARGE = sa.text("""
    SELECT c.charge_id, c.job_id, c.account_id, c.credits, c.deadline_at, c.opened_at, cs.status, cs.refunded
    FROM kino.charge c JOIN kino.charge_status cs USING (job_id) WHERE c.job_id = :job_id
""")
_PARTS = {
    "lots": sa.text("""
        SELECT l.seq, l.lot_id, l.credits, t.class, t.state, t.expires_at, t.reference
        FROM kino.charge_line l JOIN kino.credit_lot t USING (lot_id) WHERE l.charge_id = :charge_id ORDER BY l.seq
    """),
    "settlement": sa.text("""
        SELECT kind, reason, clause, policy_version, ending, account_status, event_source, event_id, event_time,
               settled_at
        FROM kino.settlement WHERE charge_id = :charge_id
    """),
    "correction": sa.text("""
        SELECT reason, clause, policy_version, actor, reference, corrected_at
        FROM kino.correction WHERE charge_id = :charge_id
    """),
    "transfers": sa.text("""
        SELECT transfer_id, kind, from_book, to_book, lot_id, to_lot_id, credits, reason, actor, created_at
        FROM kino.transfer WHERE charge_id = :charge_id ORDER BY transfer_id
    """),
    "asks": sa.text("""
        SELECT asks, last_answer, first_asked_at, last_asked_at FROM kino.overdue_ask WHERE charge_id = :charge_id
    """),
    "events": sa.text("""
        SELECT source, event_id, outcome, event_at, received_at FROM kino.inbox_event
        WHERE job_id = :job_id ORDER BY received_at
    """),
    "waiting": sa.text("""
        SELECT source, event_id, outcome, attempts, first_seen_at, next_attempt_at FROM kino.pending_event
        WHERE job_id = :job_id ORDER BY first_seen_at
    """),
    "dead_letters": sa.text("""
        SELECT dead_letter_id, reason, detail, seen, status, first_seen_at, last_seen_at FROM kino.dead_letter
        WHERE job_id = :job_id OR other_job_ids @> ARRAY[CAST(:job_id AS text)] ORDER BY dead_letter_id
    """),
    "breaks": sa.text("""
        SELECT break_id, kind, credits, status, detail, first_seen_at, last_seen_at FROM kino.break
        WHERE job_id = :job_id ORDER BY break_id
    """),
}


_ONLY_IN_JSON = {
    "lots": frozenset({"seq", "expires_at"}),
    "transfers": frozenset({"from_book", "to_book", "actor", "reason"}),
    "events": frozenset({"event_at"}),
    "waiting": frozenset({"source", "first_seen_at"}),
    "dead_letters": frozenset({"first_seen_at", "last_seen_at"}),
    "breaks": frozenset({"first_seen_at", "last_seen_at"}),
}
"""What a person can do without in a table of 80 columns."""


def register(app: typer.Typer) -> None:
    """Add this room's commands."""
    app.command("why")(why)


def why(job: Job, as_json: AsJson = False) -> int:
    """Explain what became of a job's credits.

    Charge, lots, event, clause, policy version and transfers, and what about the job is still open.

    Example: kino-refunds why job-42
    """
    with ledger_connection() as connection:
        charge = connection.execute(_CHARGE, {"job_id": job}).mappings().one_or_none()
        keys = {"job_id": job, "charge_id": charge and charge["charge_id"]}
        parts = {name: [dict(row) for row in connection.execute(sql, keys).mappings()] for name, sql in _PARTS.items()}
    if charge is None and not any(parts.values()):
        print_error(f"nothing is known of job {job!r}: no charge, no event, no dead letter")
        return 1
    found: dict[str, Any] = {"charge": charge and dict(charge), **parts}
    if as_json:
        print_json(found)
        return 0
    console.print(shown(_sentence(job, found)), style="bold")
    for name, rows in parts.items():
        if len(rows) == 1 and name in {"settlement", "correction", "asks"}:
            console.print(f"\n{name}", style="bold")
            print_facts((key.replace("_", " "), value) for key, value in rows[0].items())
        elif rows:
            console.print(f"\n{name.replace('_', ' ')}", style="bold")
            hidden = _ONLY_IN_JSON.get(name, frozenset())
            print_table([{key: value for key, value in row.items() if key not in hidden} for row in rows])
    return 0


def _sentence(job: str, found: dict[str, Any]) -> str:
    charge = found["charge"]
    if charge is None:
        return f"Job {job} has no charge; events about it wait or are dead letters."
    took = f"Job {job} took {charge['credits']:,} credits of account {charge['account_id']}"
    if not found["settlement"]:
        return f"{took}; it is open, with its deadline at {charge['deadline_at']:%Y-%m-%d %H:%M:%S}Z."
    settled = found["settlement"][0]
    verb = "came back" if settled["kind"] == "refunded" else "were captured"
    corrected = "; a correction returned them later" if found["correction"] else ""
    return (
        f"{took}; they {verb}: {settled['reason'].replace('_', ' ')}, clause {settled['clause']} of policy"
        f" {settled['policy_version']}, by event {settled['event_id']}{corrected}."
    )
