"""`charges ask`: ask the job source about jobs whose event did not arrive."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kino_refunds.cli.exit_codes import AWAY, FINDING
from kino_refunds.cli.options import AsJson, By, Edge, ledger_engine, read_time
from kino_refunds.cli.output import print_facts, print_json, tell

if TYPE_CHECKING:
    from kino_refunds.reconciliation.overdue import OverdueReport, Which


def ask(
    by: By,
    all_open: Annotated[
        bool, typer.Option("--all-open", help="Ask about every open charge, before its deadline too.")
    ] = (False),
    job: Annotated[str | None, typer.Option("--job", metavar="JOB", help="Ask about this job alone.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Ask about every charge opened since, before its deadline too."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask and decide, but write nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Ask the job source about overdue jobs once, and settle the answers.

    A job that the source does not know is presumed timed out (clause 2.timeout), but never while intake is paused or
    an older message is queued.

    With --all-open, --job or --since jobs are asked about before their deadline too, for example after Redis lost its
    messages. How a job ended is settled at once; a job that runs or that the source does not know stays as it is.

    The person and the result are kept in kino.schedule_slot, under the name `by hand: overdue run`.

    Exit code 1: the job source gave no answer for some jobs, or one that breaks its contract; `source problem` says
    which. 3: Redis or the job source is away.

    Example: kino-refunds charges ask --dry-run --json
    """
    which = _which(all_open=all_open, job=job, since=since)

    from kino_refunds.desk.asks import ask_now
    from kino_refunds.events.connection import redis_client
    from kino_refunds.reconciliation.adapters import source_of
    from kino_refunds.reconciliation.overdue import overdue_rules_of
    from kino_refunds.settings import load_settings
    from kino_refunds.settlement.rules import rules_of

    settings = load_settings()
    with (
        source_of(settings) as source,
        ledger_engine(settings) as engine,
        redis_client(settings.require_redis_url()) as client,
    ):
        report = ask_now(
            engine,
            client,
            source,
            rules_of(settings),
            overdue=overdue_rules_of(settings),
            actor=by,
            which=which,
            dry_run=dry_run,
            progress=_show_progress,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        print_facts((name.replace("_", " "), _shown(value)) for name, value in report.as_dict().items())
    if report.source_broken:
        # Before 3: a person fixes a source that breaks its contract; waiting does not.
        return FINDING
    if report.withheld["redis_away"] or report.source_away or (report.source_errors and not report.answers):
        return AWAY
    return FINDING if report.source_errors else 0


def _which(*, all_open: bool, job: str | None, since: str | None) -> Which:
    """Return the charges that the options choose; raises a usage error for two of them."""
    from kino_refunds.reconciliation.overdue import ALL_OPEN, OVERDUE, Which

    if all_open + (job is not None) + (since is not None) > 1:
        raise typer.BadParameter("--all-open, --job and --since exclude each other: give one of them")
    if job is not None:
        return Which.job(job)
    if since is not None:
        return Which.since(read_time(since, Edge.START))
    return ALL_OPEN if all_open else OVERDUE


def _show_progress(report: OverdueReport) -> None:
    if sys.stderr.isatty():
        tell(
            f"{report.overdue + report.early:,} asked about so far, {sum(report.outcomes.values()):,} settled",
            style="dim",
        )


def _shown(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) or None
    return value
