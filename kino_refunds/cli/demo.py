"""`demo`: the main job with everything that can go wrong, live, and the promises checked afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kino_refunds.cli.dev import exports
from kino_refunds.cli.exit_codes import explained_by_server
from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import console, errors, print_facts, print_json, print_table, print_whole, shown
from kino_refunds.cli.signals import interrupted_by_signals, stopping
from kino_refunds.demo.figures import Snapshot, StoryReport
from kino_refunds.demo.run import Demo
from kino_refunds.demo.stage import Stage
from kino_refunds.demo.traffic import Traffic
from kino_refunds.dev.embedded import servers
from kino_refunds.errors import DependencyAway

KEPT_IN = Path(".kino-demo")
"""Where --keep leaves the settings and two events to try, in the working folder."""
LOOK_EVERY_S = 0.5
LAST_LOOK_S = 2.0
"""A server that was killed breaks its connections a little before its guard knows."""
FINDINGS_SHOWN = 5
_WORDS = {"held": ("held", "green"), "late": ("late", "yellow"), "broken": ("BROKEN", "bold red")}
_MARKS = {"broken": ("BROKEN", "bold red"), "healed": ("HEALED", "bold green"), "": ("      ", "")}


def demo(
    jobs: Annotated[int, typer.Option(min=100, max=1_000_000, help="How many jobs.")] = 5_000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same jobs.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run jobs, break things, check the promises.

    Scratch servers, real workers (one is killed) and beat, whatever KINO_* URLs are set. Exit code 1
    means that a promise was broken.

    Example: kino-refunds demo --keep
    """
    started = time.monotonic()
    with ExitStack() as stack:
        if keep:
            stack.enter_context(_kept_folder())
        stack.enter_context(interrupted_by_signals())
        view = stack.enter_context(_view())
        view.say(0.0, "", "starting Postgres and Valkey, on loopback")
        stage = stack.enter_context(Stage(stack.enter_context(servers())))
        try:
            told = Demo(stage, view, jobs=jobs, seed=seed, started=started).run()
        except Exception as error:
            if isinstance(error, DependencyAway) or explained_by_server(error) is not None:
                stage.require_alive(for_s=LAST_LOOK_S)  # where a server of ours has ended, that is what happened
            raise
        view.close()
        if as_json:
            print_json({**asdict(told), "kept": told.kept})
        else:
            show(told)
        if keep:
            _keep(stage, errors if as_json else console)
    return 0 if told.kept else 1


class _Lines:
    """Plain lines, for logs and pipes: only what happened."""

    def say(self, at_s: float, what: str, text: str) -> None:
        """Print one line on standard error."""
        errors.print(_line(at_s, what, text), soft_wrap=True)

    def show(self, now: Snapshot) -> None:
        """Show nothing: figures that change belong on a screen."""

    def close(self) -> None:
        """Nothing to put away."""


class _Screen:
    """A live picture at the bottom of the terminal; what happened scrolls by above it."""

    def __init__(self) -> None:
        self._live = Live(console=errors, transient=True, auto_refresh=False)
        self._live.start()

    def say(self, at_s: float, what: str, text: str) -> None:
        """Print one line above the picture."""
        self._live.console.print(_line(at_s, what, text))

    def show(self, now: Snapshot) -> None:
        """Draw the picture anew."""
        self._live.update(picture(now), refresh=True)

    def close(self) -> None:
        """Take the picture away."""
        self._live.stop()


@contextmanager
def _view() -> Iterator[_Lines | _Screen]:
    view = _Screen() if errors.is_terminal else _Lines()
    try:
        yield view
    finally:
        view.close()


def _line(at_s: float, what: str, text: str) -> Text:
    mark, style = _MARKS[what]
    return Text.assemble((f"{_clock(at_s)}  ", "dim"), (f"{mark}  ", style), text)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def picture(now: Snapshot) -> Group:
    """Draw how things stand, in at most 80 columns."""
    settled = sum(now.settled.values())
    bar = Padding(ProgressBar(total=now.jobs, completed=settled, width=78), 0)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    latency = "-" if now.p50_ms is None or now.p99_ms is None else f"p50 {now.p50_ms:,.0f} ms, p99 {now.p99_ms:,.0f} ms"
    rows = {
        "settled": f"{settled:,} of {now.jobs:,} jobs, {now.submitted:,} submitted; {now.per_second:,.0f} a second",
        "ended": _counts(now.settled),
        "latency": f"event to commit: {latency}",
        "queues": _counts({name.removeprefix("generation."): count for name, count in now.queues.items()}),
        "beside": f"{now.pending:,} wait for a retry, {now.dead_letters:,} dead letters, {now.breaks:,} breaks",
    }
    for name, text in rows.items():
        facts.add_row(name, shown(text))
    return Group(Text(f"\n{_clock(now.at_s)}  {now.stage}", style="bold"), bar, facts)


def _counts(counts: dict[str, int]) -> str:
    return " · ".join(f"{name} {count:,}" for name, count in counts.items()) or "-"


def show(told: StoryReport) -> None:
    """Print how the story ended."""
    console.print(f"\n{told.jobs:,} jobs, {told.messages:,} messages: what their events came to", style="bold")
    print_table(told.outcomes)
    console.print("\ncredits refunded", style="bold")
    print_table(told.reasons)
    console.print("\ndead letters", style="bold")
    print_table(told.dead_letters)
    console.print()
    print_facts(
        [
            ("duplicates absorbed", told.duplicates_absorbed),
            ("retries", told.retried),
            ("overdue, found without an event", told.overdue_found),
            ("breaks for a person", told.breaks),
            ("latency, event to commit", _latency(told.latency)),
            ("  the killed worker's batch", _latency(told.latency_of_killed)),
            ("seconds", told.seconds),
        ]
    )
    console.print("\nthe promises, checked by a program that shares no code with the product", style="bold")
    table = Table(box=None, pad_edge=False, show_header=False)
    for each in told.promises:
        looked = ", ".join(f"{count:,} {what}" for what, count in each["looked_at"].items())
        table.add_row(Text(*_WORDS[each["word"]]), each["promise"], Text.assemble(each["says"], (f" {looked}", "dim")))
        for text in each["findings"][:FINDINGS_SHOWN]:
            table.add_row("", "", Text(text, style="red"))
    print_whole(table)


def _latency(found: dict[str, Any]) -> str:
    if not found["jobs"]:
        return "-"
    return f"p50 {found['p50_ms']:,} ms, p99 {found['p99_ms']:,} ms, {found['jobs']:,} jobs"


@contextmanager
def _kept_folder() -> Iterator[None]:
    """Make the folder before anything else, and take it away at the end; one that is there is somebody's."""
    try:
        KEPT_IN.mkdir()
    except FileExistsError as error:
        text = f"{KEPT_IN} is there already: another demo runs in this folder, or one was killed; then remove it"
        raise typer.BadParameter(text) from error
    except OSError as error:
        raise typer.BadParameter(f"{KEPT_IN} cannot be made here: {error.strerror}") from error
    try:
        yield
    finally:
        shutil.rmtree(KEPT_IN, ignore_errors=True)


def _keep(stage: Stage, tell: Console) -> None:
    """Leave servers, one worker and beat running; say how to reach them and what to try."""
    files = {"env": exports(stage.settings), **Traffic(stage).open_one_more()}
    for name, text in files.items():
        (KEPT_IN / name).write_text(text, encoding="utf-8")
    with stopping() as stop:
        tell.print(_TRY_NEXT, soft_wrap=True)
        while not stop.wait(LOOK_EVERY_S):
            stage.require_alive()
    tell.print("stopping")


_TRY_NEXT = f"""
Everything stays up until Ctrl-C. In another terminal, from this folder:

  . {KEPT_IN}/env
  kino-refunds status --watch
  kino-refunds publish {KEPT_IN}/misdirected.jsonl
  kino-refunds why walk-1
  kino-refunds dead-letters list --job walk-1

The five-minute walk in kino_refunds/demo/README.md goes on from there.
"""
