"""`reconcile`: run the checks, read what they found, and prove that ledger, pipeline and policy agree."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kino_refunds.cli.exit_codes import AWAY, FINDING
from kino_refunds.cli.options import AsJson, By, Edge, ledger_connection, read_time, reading_engine, written
from kino_refunds.cli.output import escaped, print_facts, print_items, print_json, say, tell

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from kino_refunds.reconciliation.proof import Proof, SourceSaid
    from kino_refunds.reconciliation.run_rows import Coverage, Run
    from kino_refunds.reconciliation.seals import Verified
    from kino_refunds.settings import Settings

PROGRESS_FROM = 10_000
"""What is compared in a second or two needs no second line."""
AWAY_BEGINS = "the source is away"
"""How `matching` says it (`reason_of`)."""
WAIT_S = 60.0
"""Seconds that a person's run waits for a scheduled run of the same check."""
Since = Annotated[str | None, typer.Option(help="Compare from this instant on (RFC 3339).", metavar="TIME")]
Until = Annotated[str | None, typer.Option(help="Compare up to this instant (RFC 3339).", metavar="TIME")]


def list_checks(as_json: AsJson = False) -> int:
    """List the checks and how each stands.

    How it ran last, how far it has compared everything, and what is broken.

    Exit code 1 if a break is live or a check's last run is not complete.

    Example: kino-refunds reconcile list
    """
    from kino_refunds.reconciliation.standing import count_live, read_checks

    with ledger_connection() as connection:
        found, live = read_checks(connection), count_live(connection)
    items: list[dict[str, Any]] = []
    for each in found:
        run, coverage = each.last, each.coverage
        items.append(
            {
                "check": each.check.name,
                "last run": run and run.run_id,
                "state": run.state if run else "never ran",
                "compared": run and run.compared,
                "matched": run and run.matched,
                "broken": run and run.broken,
                "not comparable": run and run.uncomparable,
                "verified since": _since(coverage),
                "verified through": coverage and coverage.until,
                "live breaks": each.live,
                "credits": each.credits,
                "unseen for 7 days": each.unseen,
                "time to detect": _detect(each.detect, as_json=as_json),
            }
        )
    if not as_json:
        items = [{name: value for name, value in item.items() if name not in _ONLY_IN_JSON} for item in items]
        for each in found:
            if each.unseen:
                tell(
                    f"{each.check.name}: {each.unseen:,} of its breaks could not be looked at again for 7 days",
                    style="yellow",
                )
    else:
        items = [{_KEYS.get(name, name.replace(" ", "_")): value for name, value in item.items()} for item in items]
    print_items(items, next_cursor=None, as_json=as_json, empty="there are no checks")
    sick = any(each.last is None or not (each.last.is_complete or _is_off(each.last)) for each in found)
    return FINDING if live or sick else 0


_ONLY_IN_JSON = {"last run", "matched", "verified since", "unseen for 7 days", "time to detect"}
"""`reconcile show` has the first three of each run; the table must fit a terminal."""
_KEYS = {"time to detect": "time_to_detect_s", "unseen for 7 days": "unseen_7_days"}


def _detect(after: timedelta | None, *, as_json: bool) -> object:
    if after is None:
        return None
    return after.total_seconds() if as_json else str(after).partition(".")[0]


def _since(coverage: Coverage | None) -> object:
    if coverage is None:
        return None
    return coverage.since or "the beginning"


def checks(as_json: AsJson = False) -> None:
    """Print what each check compares and finds.

    And who repairs and closes that.

    Example: kino-refunds reconcile checks
    """
    from kino_refunds.reconciliation.checks import CHECKS

    rows = [
        {
            "check": check.name,
            "promise": check.promise,
            "ours": check.ours,
            "theirs": check.theirs,
            "finds": [*map(str, check.finds)],
            "closes": [*map(str, check.closes)],
            "grace": check.grace,
            "repair": check.repair,
        }
        for check in CHECKS
    ]
    if as_json:
        print_items(rows, next_cursor=None, as_json=True, empty="")
        return
    for row in rows:
        print_facts((name, ", ".join(value) if isinstance(value, list) else value) for name, value in row.items())
        say("")


def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="The checks; all of them if none is named.", metavar="[CHECK]...")
    ] = None,
    *,
    by: By,
    since: Since = None,
    until: Until = None,
    full: Annotated[bool, typer.Option("--full", help="Compare everything, and not only what is new.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare and print, but write neither a run nor a break.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Run checks now.

    A run that was interrupted goes on where it stood.

    Without a window a check compares what is new since its last complete run. Each run is a row
    (`kino-refunds reconcile show NUMBER`), and each difference a break (`kino-refunds breaks list`).

    Exit code 1: something differs, or could not be compared. 3: Postgres or the job source is away.

    Example: kino-refunds reconcile run matching --dry-run
    """
    from kino_refunds.reconciliation.checks import CHECKS, check_named
    from kino_refunds.reconciliation.runs import bench_for, run_check
    from kino_refunds.reconciliation.windows import Wanted
    from kino_refunds.settings import load_settings

    settings = load_settings()
    wanted = Wanted(
        since=None if since is None else read_time(since, Edge.START),
        until=None if until is None else read_time(until, Edge.END),
        full=full,
    )
    chosen = [check_named(name) for name in names] if names else CHECKS
    ended: list[Run] = []
    for check in chosen:
        with bench_for(check, settings, actor=by) as bench:
            ended.append(run_check(check, bench, wanted, dry_run=dry_run, wait_s=WAIT_S, progress=_progress()))
    if as_json:
        print_items([_as_dict(each) for each in ended], next_cursor=None, as_json=True, empty="")
    else:
        print_items([_for_people(each) for each in ended], next_cursor=None, as_json=False, empty="no check was named")
        _explain(ended, dry_run=dry_run)
    if any(_is_away(each) for each in ended):
        return AWAY
    return FINDING if any(each.broken or not each.is_complete for each in ended if not _is_off(each)) else 0


def _progress() -> Callable[[Run], None]:
    """Return what prints, on a terminal, how far a run is: at its first page, and each time the count has doubled."""
    shown = 0

    def show(run: Run) -> None:
        nonlocal shown
        if sys.stderr.isatty() and run.compared >= 2 * shown:
            shown = max(run.compared, PROGRESS_FROM)
            tell(f"{run.check}: {run.compared:,} compared, {run.broken:,} differ", style="dim")

    return show


def _explain(ended: list[Run], *, dry_run: bool) -> None:
    for each in ended:
        for why, count in each.not_comparable.items():
            say(escaped(f"{each.check}: {count:,} not comparable: {why}"))
        for found in each.found:
            say(escaped(f"{found.kind} {found.key[1]}: {found.detail}"))
    if not dry_run and any(each.broken for each in ended):
        say("next: kino-refunds breaks list", style="dim")


def _is_away(run: Run) -> bool:
    return not run.is_complete and any(why.startswith(AWAY_BEGINS) for why in run.not_comparable)


def _is_off(run: Run) -> bool:
    """Tell whether a check had nothing to do because the relay is switched off, which is no finding."""
    from kino_refunds.reconciliation.told import NO_CURSOR, OFF

    return bool(run.not_comparable) and run.not_comparable.keys() <= {OFF, NO_CURSOR}


def _as_dict(run: Run) -> dict[str, Any]:
    found = asdict(run)
    window = found.pop("window")
    del found["cursor"]
    if run.run_id:
        del found["found"]
    else:
        del found["run_id"]
    return found | {"since": window["since"], "until": window["until"]}


def _for_people(run: Run) -> dict[str, Any]:
    return {
        "check": run.check,
        "run": run.run_id or "(dry run)",
        "state": run.state,
        "compared": run.compared,
        "matched": run.matched,
        "broken": run.broken,
        "not comparable": run.uncomparable,
        "until": run.window.until,
    }


def show(
    which: Annotated[str, typer.Argument(help="The number of a run, or the name of a check.", metavar="RUN|CHECK")],
    before: Annotated[int | None, typer.Option(help="Of a check: only runs with a number below this.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Of a check: rows at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show one run, or the runs of a check.

    With the four numbers of each, the newest first.

    Example: kino-refunds reconcile show decisions
    """
    from kino_refunds.reconciliation.checks import check_named
    from kino_refunds.reconciliation.run_rows import read_run, read_runs

    with ledger_connection() as connection:
        if not which.isascii() or not which.isdigit():
            runs = read_runs(connection, check=check_named(which).name, before=before, limit=limit)
            cursor = runs[-1].run_id if len(runs) == limit else None
            rows = [_as_dict(each) if as_json else _for_people(each) for each in runs]
            print_items(rows, next_cursor=cursor, as_json=as_json, empty=f"the check {which} never ran")
            return
        found = read_run(connection, int(which[:18]))
    if found is None:
        raise typer.BadParameter(f"there is no run {which}; see `kino-refunds reconcile list`")
    if as_json:
        print_json(_as_dict(found))
        return
    facts = _as_dict(found)
    reasons = facts.pop("not_comparable")
    print_facts((name.replace("_", " "), value) for name, value in facts.items() if name != "detail")
    print_facts((f"not comparable: {why}", count) for why, count in reasons.items())
    print_facts((name.replace("_", " "), value) for name, value in facts["detail"].items())


def prove(
    since: Annotated[
        str | None,
        typer.Option(help="Since this instant; without it, since the first complete run.", metavar="TIME"),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Until this instant; without it, as far as can be proven.", metavar="TIME")
    ] = None,
    seal: Annotated[
        str | None,
        typer.Option(help="A seal that is kept elsewhere, NUMBER:DIGEST, or a file with such texts.", metavar="COPY"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print what can be proven, and whether it holds.

    Reads only; a login of kino_read is enough.

    Exit code 0: every sentence holds. 1: one does not, and the command that shows more stands behind it. 3: Postgres
    or the job source is away.

    Example: kino-refunds reconcile prove --since 2026-11-01T00:00:00Z --json
    """
    from kino_refunds.reconciliation.proof import prove as prove_it
    from kino_refunds.reconciliation.seals import compare_with_copy
    from kino_refunds.settings import load_settings

    settings = load_settings()
    source = _ask_source(settings)
    with reading_engine() as engine:
        copy = None if seal is None else compare_with_copy(engine, seal, progress=_show_seals)
        with engine.begin() as connection:
            proof = prove_it(
                connection,
                settings,
                since=None if since is None else read_time(since, Edge.START),
                until=None if until is None else read_time(until, Edge.END),
                source=source,
                copy=copy,
            )
    if as_json:
        print_json(asdict(proof) | {"holds": proof.holds})
    else:
        _print_proof(proof)
    return 0 if proof.holds else FINDING


def check_source(
    since: Annotated[
        str | None, typer.Option(help="List jobs from this instant on; without it, of the last day.", metavar="TIME")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, max=1_000_000, help="Listed jobs that are read at most.")] = 10_000,
    as_json: AsJson = False,
) -> int:
    """Try the job source before anything rests on it.

    Asks it as the sweeps and `matching` do: types, order, duplicates, clock, speed, whether it can be written, and
    whether its list and its answers agree. Writes nothing.

    Exit code 1: it breaks its contract, and each finding says how. 3: it is away.

    Example: kino-refunds reconcile check-source --sample 100000
    """
    from kino_refunds.db.clock import read_clock
    from kino_refunds.errors import BadSettings
    from kino_refunds.reconciliation.adapters import source_of
    from kino_refunds.reconciliation.source_check import check_source as try_source
    from kino_refunds.settings import load_settings

    settings = load_settings()
    with ledger_connection(settings) as connection:
        now = read_clock(connection)
    with source_of(settings) as source:
        if source is None:
            raise BadSettings("KINO_JOB_SOURCE=none: there is no source to try")
        report = try_source(
            source, now=now, since=None if since is None else read_time(since, Edge.START), sample=sample
        )
    if as_json:
        print_json(asdict(report))
    else:
        facts = {name: value for name, value in asdict(report).items() if name != "findings"}
        print_facts((name.replace("_", " "), _rounded(value)) for name, value in facts.items())
        for each in report.findings:
            say(escaped(f"{each.level}: {each.what}: {each.text}"))
        say("the source keeps its contract" if report.is_sound else "the source breaks its contract", style="bold")
    if report.is_sound:
        return 0
    return AWAY if report.is_away else FINDING


def _rounded(value: object) -> object:
    return f"{value:,.3f}" if isinstance(value, float) else value


def _show_seals(found: Verified) -> None:
    if sys.stderr.isatty():
        tell(f"{found.compared:,} seals computed again", style="dim")


def _ask_source(settings: Settings) -> SourceSaid | None:
    """Return what the source says of itself, None if none is configured; raises SourceUnavailable if it is away."""
    if settings.job_source in {None, "none"}:
        return None
    from kino_refunds.reconciliation.adapters import source_of
    from kino_refunds.reconciliation.finished import FinishedSource
    from kino_refunds.reconciliation.proof import SourceSaid

    with source_of(settings) as source:
        complete_through = source.complete_through() if isinstance(source, FinishedSource) else None
    return SourceSaid(settings.job_source_name, complete_through)


def _print_proof(proof: Proof) -> None:
    begin = "the beginning" if proof.since is None else written(proof.since)
    say(f"Between {begin} and {written(proof.until)}:")
    for sentence in proof.sentences:
        mark, style = ("holds", "green") if sentence.holds else ("FAILS", "bold red")
        say(f"  {mark}  {escaped(sentence.text)}", style=style if not sentence.holds else "")
        if not sentence.holds and sentence.command is not None:
            say(f"         next: {sentence.command}", style="dim")
    say("all of it holds" if proof.holds else "not all of it holds", style="bold")
