"""`dead-letters`: messages that no worker could settle."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kino_refunds.cli.exit_codes import FINDING
from kino_refunds.cli.options import AsJson, By, Yes, confirm, ledger_connection, ledger_engine, said, warn_if_paused
from kino_refunds.cli.output import escaped, print_error, print_facts, print_items, print_json, print_table, say, tell
from kino_refunds.errors import DeadLetterClosed, LetterProtects, MalformedMessage

if TYPE_CHECKING:
    from kino_refunds.desk.protection import Protection
    from kino_refunds.desk.replays import Replay

Number = Annotated[int, typer.Argument(help="The letter's number.", metavar="NUMBER")]

_ONLY_IN_JSON = frozenset({"detail", "queue", "group", "element_index"})
_IN_A_TABLE = {"credits_at_stake": "at_stake"}


def list_letters(
    status: Annotated[
        Literal["open", "replayed", "discarded", "all"], typer.Option(help="Only letters in this state.")
    ] = "open",
    reason: Annotated[str | None, typer.Option(help="Only this reason.")] = None,
    job: Annotated[str | None, typer.Option(help="Only this job.")] = None,
    group: Annotated[str | None, typer.Option(help="Only letters of this group (same reason, same cause).")] = None,
    after: Annotated[int, typer.Option(help="Start after this number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first, with the credits at stake.

    Example: kino-refunds dead-letters list --reason account_mismatch
    """
    from kino_refunds.desk import letters as desk
    from kino_refunds.settlement.dead_letters import LetterStatus

    with ledger_connection() as connection:
        found = desk.list_letters(
            connection,
            status=None if status == "all" else LetterStatus(status),
            reason=reason,
            job_id=job,
            group=group,
            after=after,
            limit=limit,
        )
    rows = [asdict(each) for each in found]
    if not as_json:
        rows = [
            {_IN_A_TABLE.get(name, name): value for name, value in row.items() if name not in _ONLY_IN_JSON}
            for row in rows
        ]
    print_items(
        rows,
        next_cursor=found[-1].number if len(found) == limit else None,
        as_json=as_json,
        empty="no dead letters" if status == "all" else f"no {status} dead letters",
    )


def show(
    number: Number,
    save: Annotated[Path | None, typer.Option(help="Write the exact bytes of the message to this new file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a dead letter whole: reason, history, notes and the message.

    Bytes that would act on a terminal are shown escaped. `body` shows a message of kombu decoded, and of a message
    with several events the one that this letter is about.

    Example: kino-refunds dead-letters show 7 --save message.bin
    """
    from kino_refunds.desk.letters import read_letter

    with ledger_connection() as connection:
        letter = asdict(read_letter(connection, number))
    raw = letter.pop("raw")
    if save is not None:
        with save.open("xb") as file:  # never over a file that exists
            file.write(raw)
    if as_json:
        print_json(letter)
        return
    lists = {name: letter.pop(name) for name in ("history", "notes")}
    exception = letter.pop("exception")
    print_facts((name.replace("_", " "), value) for name, value in letter.items())
    for name, entries in lists.items():
        if entries:
            say(f"\n{name}", style="bold")
            names = list(dict.fromkeys(key for entry in entries for key in entry))
            print_table([{key: entry.get(key) for key in names} for entry in entries])
    if exception:
        say("\nexception", style="bold")
        say(exception)


def replay(
    numbers: Annotated[list[int], typer.Argument(help="The letters' numbers.", metavar="NUMBER")],
    by: By,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the outcome; write nothing.")] = False,
    edited: Annotated[
        Path | None, typer.Option(help="A file with the corrected message of one letter; it settles as <id>+edit.N.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Put dead letters back through settlement.

    The event keeps its identity: if it was settled before, it is a duplicate, and no credits move twice. A letter
    whose event names another account than the charge is closed once another event has settled the job. A letter of
    a whole message with several events settles each of them.

    A correction must be of the letter's own event. There can be one: a second is refused. A letter that names
    further jobs with open charges stays open after it: publish what it says about these jobs, then discard it.

    Exit code 1: a letter is still open.

    Example: kino-refunds dead-letters replay 7 8 --dry-run
    """
    if edited is not None and len(numbers) != 1:
        raise typer.BadParameter("--edited corrects one letter: name one number")
    from kino_refunds.desk.replays import replay_letter, require_letter
    from kino_refunds.intake.gate import read_gate
    from kino_refunds.settings import load_settings
    from kino_refunds.settlement.rules import rules_of

    settings = load_settings()
    rules = rules_of(settings)
    corrected = edited.read_bytes() if edited is not None else None
    replays: list[Replay] = []
    with ledger_engine(settings) as engine:
        with engine.connect() as connection:
            for number in numbers:
                require_letter(connection, number)
            if not dry_run:
                warn_if_paused(read_gate(connection))
        try:
            for number in dict.fromkeys(numbers):
                try:
                    replays += [replay_letter(engine, number, rules, actor=by, edited=corrected, dry_run=dry_run)]
                except DeadLetterClosed as error:  # another session has this letter; the others are replayed
                    print_error(str(error))
        except MalformedMessage as error:  # only a correction can be one here
            raise typer.BadParameter(f"{edited}: {error.code}: {error.text}; nothing was settled") from error
        finally:
            # Letters that were settled before an error stay settled, so they are shown.
            if replays:
                _show_replays(replays, as_json=as_json)
    if dry_run and not as_json:
        say("dry run: nothing was written", style="dim")
    return 0 if all(each.closed for each in replays) and len(replays) == len(set(numbers)) else 1


def _show_replays(replays: list[Replay], *, as_json: bool) -> None:
    rows = [
        {
            "number": each.dead_letter_id,
            "event_id": each.event_id,
            "job_id": each.job_id,
            "outcome": each.outcome,
            "closed": each.closed,
            # In the table it is a line of its own.
            **({"protects": list(each.protects)} if as_json else {}),
        }
        for each in replays
    ]
    print_items(rows, next_cursor=None, as_json=as_json, empty="")
    for each in replays:
        if each.protects:
            jobs = ", ".join(each.protects)
            print_error(
                f"dead letter {each.dead_letter_id} stays open: it also names {jobs}, whose charges are open. "
                f"Publish what it says about them, then discard it"
            )


def discard(
    number: Number,
    by: By,
    note: Annotated[str, typer.Option(help="Why the letter needs no replay.", callback=said)],
    although_open: Annotated[
        list[str] | None,
        typer.Option(
            help="A job whose open charge the letter protects; repeat it for each, or `all` if it names no job.",
            metavar="JOB",
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Close a dead letter without replaying it; it is kept.

    A letter may be the completion of a job, so while it is open its jobs are not refunded as timed out. The command
    shows the open charges that the letter protects. They must be named: --yes is not enough.

    Example: kino-refunds dead-letters discard 7 --note "a test message"
    """
    from kino_refunds.desk.protection import discard_although_open, read_protection
    from kino_refunds.settings import load_settings

    confirm(f"Discard dead letter {number}?", yes=yes)
    settings = load_settings()
    source_configured = settings.job_source not in {None, "none"}

    def close(although_open: Collection[str]) -> Protection:
        with ledger_connection(settings) as connection:
            return discard_although_open(
                connection,
                number,
                although_open=although_open,
                source_configured=source_configured,
                note=note,
                actor=by,
            )

    named = list(although_open or ())
    try:
        protected = close(named)
    except LetterProtects:
        if not sys.stdin.isatty():
            raise
        with ledger_connection(settings) as connection:
            found = read_protection(connection, number, source_configured=source_configured)
        protected = close([*named, *_ask_for_names(number, found, named)])
    say(f"dead letter {number} is discarded; it is kept")
    if protected.charges:
        say(f"no longer protected: open charges {protected.charges:,}, credits {protected.credits:,}")


def _ask_for_names(number: int, found: Protection, named: Collection[str]) -> list[str]:
    """Show the open charges that a letter protects and have each job typed; anything else ends the command."""
    from kino_refunds.desk.protection import ALL

    protects = "of its jobs" if found.names_its_jobs else "it may be the end of any of these"
    tell(f"dead letter {number} protects open charges {found.charges:,}, credits {found.credits:,}: {protects}")
    for each in found.sample:
        deadline = f"{each.deadline_at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
        line = f"  {each.job_id}: {each.credits:,} credits of account {each.account_id}, deadline {deadline}"
        tell(escaped(line))
    if found.charges > len(found.sample):
        tell(f"  and {found.charges - len(found.sample):,} more")
    asked = [name for name in found.names if name not in named]
    for name in asked:
        what = f"the word {ALL}" if name == ALL else "the job's id"
        if typer.prompt(f"They may be refunded as timed out. To discard the letter, type {what}", err=True) != name:
            tell("nothing was done")
            raise typer.Exit(FINDING)
    return asked


def note(
    number: Number,
    by: By,
    text: Annotated[str, typer.Argument(help="What the next person should know.", metavar="TEXT", callback=said)],
) -> None:
    """Write a note on a dead letter.

    Example: kino-refunds dead-letters note 7 "the pipeline team is on it"
    """
    from kino_refunds.desk.replays import note_letter

    with ledger_connection() as connection:
        note_letter(connection, number, text, actor=by)
    say(f"noted on dead letter {number}")
