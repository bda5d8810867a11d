"""`why`: everything that is known of one job's credits (P10)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kino_refunds.cli.options import AsJson, ledger_connection
from kino_refunds.cli.output import escaped, print_error, print_facts, print_json, print_table, say

if TYPE_CHECKING:
    from kino_refunds.desk.explain import Explanation

Job = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]
_NAMES = {"lot_class": "class"}
_ONLY_IN_JSON = {
    "lots": frozenset({"seq", "expires_at"}),
    "transfers": frozenset({"from_book", "to_book", "actor", "reason"}),
    "events": frozenset({"event_at"}),
    "waiting": frozenset({"source", "first_seen_at"}),
    "dead_letters": frozenset({"first_seen_at", "last_seen_at"}),
    "breaks": frozenset({"first_seen_at", "last_seen_at"}),
}
"""Columns that the table leaves out so that it fits 80 columns."""


def why(job: Job, as_json: AsJson = False) -> int:
    """Explain where a job's credits are, and why.

    Shows charge, lots, event, clause, policy version and transfers, and what is still open about the job.

    Example: kino-refunds why job-42
    """
    from kino_refunds.desk.explain import explain_job

    with ledger_connection() as connection:
        found = explain_job(connection, job)
    if found.is_empty:
        print_error(f"nothing is known of job {job!r}: no charge, no event, no dead letter")
        return 1
    parts: dict[str, Any] = asdict(found)
    # A field cannot be called `class` in Python.
    parts["lots"] = [{_NAMES.get(name, name): value for name, value in lot.items()} for lot in parts["lots"]]
    if as_json:
        print_json(parts)
        return 0
    say(escaped(_sentence(job, found)), style="bold")
    for name, rows in parts.items():
        if name == "charge":
            continue
        if len(rows) == 1 and name in {"settlement", "correction", "asks"}:
            say(f"\n{name}", style="bold")
            print_facts((key.replace("_", " "), value) for key, value in rows[0].items())
        elif rows:
            say(f"\n{name.replace('_', ' ')}", style="bold")
            hidden = _ONLY_IN_JSON.get(name, frozenset())
            print_table([{key: value for key, value in row.items() if key not in hidden} for row in rows])
    return 0


def _sentence(job: str, found: Explanation) -> str:
    charge = found.charge
    if charge is None:
        return f"Job {job} has no charge; its events are pending or dead letters."
    took = f"Job {job} took {charge.credits:,} credits of account {charge.account_id}"
    if not found.settlement:
        return f"{took}; it is open, with its deadline at {charge.deadline_at:%Y-%m-%d %H:%M:%S}Z."
    settled = found.settlement[0]
    verb = "were returned" if settled.kind == "refunded" else "were captured"
    corrected = "; a correction returned them later" if found.correction else ""
    return (
        f"{took}; they {verb}: {settled.reason.replace('_', ' ')}, clause {settled.clause} of policy"
        f" {settled.policy_version}, by event {settled.event_id}{corrected}."
    )
