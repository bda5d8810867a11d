"""`breaks`: what disagrees with the ledger, and what a person does about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kino_refunds.cli.options import AsJson, By, Yes, confirm, ledger_connection, repair_shop, said
from kino_refunds.cli.output import escaped, print_facts, print_items, print_json, say

if TYPE_CHECKING:
    from kino_refunds.reconciliation.repairs import Plan

Number = Annotated[int, typer.Argument(help="The break's number.", metavar="NUMBER")]


def list_breaks(
    status: Annotated[
        Literal["live", "open", "investigating", "repaired", "closed", "accepted", "false_alarm", "all"],
        typer.Option(help="Only breaks in this state; `live` is open, investigating or repaired."),
    ] = "live",
    kind: Annotated[str | None, typer.Option(help="Only breaks of this kind.")] = None,
    after: Annotated[int, typer.Option(help="Start after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> int:
    """List breaks, oldest first; exit code 1 if any is live.

    Example: kino-refunds breaks list
    """
    from kino_refunds.desk import breaks as desk
    from kino_refunds.settlement.breaks import LIVE, BreakStatus

    statuses = None if status == "all" else LIVE if status == "live" else (BreakStatus(status),)
    with ledger_connection() as connection:
        found = desk.list_breaks(connection, statuses=statuses, kind=kind, after=after, limit=limit)
    print_items(
        [asdict(each) for each in found],
        next_cursor=found[-1].number if len(found) == limit else None,
        as_json=as_json,
        empty="no breaks" if status == "all" else f"no {status} breaks",
    )
    return 1 if any(each.status in LIVE for each in found) else 0


def show(number: Number, as_json: AsJson = False) -> None:
    """Show a break: what the event says, and what the ledger says.

    Example: kino-refunds breaks show 3
    """
    from kino_refunds.desk.breaks import read_break

    with ledger_connection() as connection:
        found = read_break(connection, number)
    if as_json:
        print_json(found)
    else:
        print_facts((name.replace("_", " "), value) for name, value in asdict(found).items())
        if found.job_id is not None:
            say(f"next: kino-refunds why {escaped(found.job_id)}", style="dim")


Note = Annotated[str, typer.Option(help="Why; the next person reads it.", callback=said)]


def accept(
    number: Number,
    by: By,
    note: Annotated[str, typer.Option(help="Why the ledger is right as it is.", callback=said)],
    yes: Yes = False,
) -> None:
    """Close a break as it stands; the ledger is not changed.

    It opens again only when one of its two sides changes.

    Example: kino-refunds breaks accept 3 --note "agreed with support"
    """
    from kino_refunds.desk.breaks import accept_break

    confirm(f"Accept break {number} as it stands?", yes=yes)
    with ledger_connection() as connection:
        accept_break(connection, number, note=note, actor=by)
    say(f"break {number} is accepted")


def false_alarm(
    number: Number,
    by: By,
    note: Annotated[str, typer.Option(help="Why nothing is wrong.", callback=said)],
    yes: Yes = False,
) -> None:
    """Close a break that is none.

    What the ledger was compared with is wrong.

    It opens again only when one of its two sides changes.

    Example: kino-refunds breaks false-alarm 3 --note "a test job"
    """
    from kino_refunds.desk.breaks import mark_false_alarm

    confirm(f"Mark break {number} as a false alarm?", yes=yes)
    with ledger_connection() as connection:
        mark_false_alarm(connection, number, note=note, actor=by)
    say(f"break {number} is marked as a false alarm")


def note(number: Number, by: By, note: Note) -> None:
    """Add a note to a break that lives.

    Example: kino-refunds breaks note 3 --note "asked the pipeline team"
    """
    from kino_refunds.desk.breaks import note_break

    with ledger_connection() as connection:
        note_break(connection, number, note=note, actor=by)
    say(f"the note stands with break {number}")


def assign(
    number: Number,
    to: Annotated[str, typer.Argument(help="Who looks at it.", metavar="PERSON", callback=said)],
    by: By,
) -> None:
    """Give a break to a person.

    It counts as investigated from then on.

    Example: kino-refunds breaks assign 3 dana
    """
    from kino_refunds.desk.breaks import assign_break

    with ledger_connection() as connection:
        assign_break(connection, number, to=to, actor=by)
    say(f"break {number} is investigated by {escaped(to)}")


def repair(
    number: Annotated[int | None, typer.Argument(help="The break's number.", metavar="[NUMBER]")] = None,
    *,
    by: By,
    terminated_job: Annotated[
        str | None,
        typer.Option(
            help="In the place of a number: a job that was not refunded because its account was terminated, wrongly"
            " as it turned out.",
            metavar="JOB",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The case in which this was decided; needed for a wrongful termination.")
    ] = None,
    ending: Annotated[
        str | None,
        typer.Option(help="How the job ended, where the break does not say it, such as failed.provider."),
    ] = None,
    note: Annotated[str, typer.Option(help="Why; kept with the break.", callback=said)] = "repaired",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Repair a break.

    Settles the event that never came, or refunds a capture that was wrong.

    A capture is refunded by a reversal: the charge stays captured, a correction names the break, and the credits go
    back by the rules of a refund. Repeated, it moves nothing twice. The next run of the break's check closes it. A
    reversal connects to KINO_ONCALL_DATABASE_URL, if that is set, else to KINO_DATABASE_URL: a login of kino_oncall.

    Example: kino-refunds breaks repair 3 --dry-run
    """
    from kino_refunds.reconciliation.repairs import plan_repair, report_termination
    from kino_refunds.reconciliation.repairs import repair as repair_break

    if (number is None) == (terminated_job is None):
        raise typer.BadParameter("give the number of a break, or --terminated-job JOB with --reference CASE")
    if terminated_job is not None and (reference is None or dry_run):
        raise typer.BadParameter("--terminated-job needs --reference CASE, and has no --dry-run: it opens a break")
    with repair_shop() as shop:
        if number is None:
            assert terminated_job is not None, "one of them is given"
            number = report_termination(shop, terminated_job, detail=f"decided in {reference}: {note}")
        plan = plan_repair(shop, number, ending=ending)
        if not dry_run:
            if not as_json:
                _print_plan(plan)
            confirm(f"Repair break {number}?", yes=yes)
            plan = repair_break(shop, number, actor=by, note=note, reference=reference, ending=ending, confirmed=plan)
    if as_json:
        print_json(plan)
    elif dry_run:
        _print_plan(plan)
        say("nothing was changed", style="bold")
    else:
        say(f"break {number} is repaired; the next run of its check closes it (kino-refunds reconcile run)")


def _print_plan(plan: Plan) -> None:
    print_facts(
        [
            ("break", f"{plan.break_id} {plan.kind}"),
            ("job", plan.job_id),
            ("account", plan.account_id),
            ("by", "an event" if plan.means == "event" else "a reversal"),
            ("outcome", f"{plan.outcome} ({plan.reason}, clause {plan.clause})"),
            *((f"lot {line.lot_id}", f"{line.credits:,} credits {line.fate}") for line in plan.lines),
            ("available", f"{plan.available:,} -> {plan.available_after:,}"),
            ("held", f"{plan.held:,} -> {plan.held_after:,}"),
        ]
    )
