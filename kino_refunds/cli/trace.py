"""`trace run`: the main job on real input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import print_error, print_facts, print_json, print_table, say
from kino_refunds.cli.signals import interrupted_by_signals

if TYPE_CHECKING:
    from kino_refunds.demo.trace import Workload
    from kino_refunds.demo.trace_run import TraceReport

DISAGREEMENTS_SHOWN = 10
Report = Callable[[str, int, int], None]


def run(
    file: Annotated[Path, typer.Argument(help="A CSV like gentd26-first60.csv.", metavar="FILE", dir_okay=False)],
    as_json: AsJson = False,
) -> int:
    """Run a trace through a real worker and compare.

    Uses scratch servers; KINO_* URLs are not used. Every job and every wallet is compared with the trace. Exit code 1:
    the ledger disagrees with the trace.

    A row is a job: gmt_create (YYYY-MM-DD HH:MM:SS), predict_status (SUCCEED, FAILED, PENDING or PROCESSING; the last
    two get no event), exec_time_seconds, groupId (the account) and num_images_per_prompt
    (the credits; empty: 1).

    Example: kino-refunds trace run gentd26-first60.csv --json
    """
    from kino_refunds.demo.trace import read_trace
    from kino_refunds.settings import Settings

    grace = Settings.model_construct().overdue_grace
    return _run(read_trace(file, now=datetime.now(UTC), grace=grace), as_json=as_json)


def _run(workload: Workload, *, as_json: bool) -> int:
    from kino_refunds.demo import trace_run as runs

    with interrupted_by_signals(), _progress() as report:
        report("starting Postgres, Valkey and a worker", 0, 0)
        with runs.scratch() as running:
            replayed = runs.run_trace(workload, running, progress=report)
    if as_json:
        print_json(replayed.figures)
    else:
        _show(workload, replayed)
    for text in replayed.disagreements[:DISAGREEMENTS_SHOWN]:
        print_error(text)
    if len(replayed.disagreements) > DISAGREEMENTS_SHOWN:
        print_error(f"and {len(replayed.disagreements) - DISAGREEMENTS_SHOWN:,} more")
    return 1 if replayed.disagreements else 0


def _show(workload: Workload, replayed: TraceReport) -> None:
    print_table(replayed.reasons, title=f"{workload.name}: how {replayed.figures.jobs:,} jobs ended")
    say("")
    print_facts((name.replace("_", " "), value) for name, value in asdict(replayed.figures).items())
    if not replayed.disagreements:
        say("\nevery job and every wallet is as the workload says", style="bold green")


@contextmanager
def _progress() -> Iterator[Report]:
    """Show the progress: a live bar on a terminal, otherwise one plain line for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kino_refunds.cli.tables import errors

    if not errors.is_terminal:
        said: set[str] = set()

        def name(stage: str, _done: int, _total: int) -> None:
            if stage not in said:
                said.add(stage)
                errors.print(stage)

        yield name
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total or None)

        yield show
