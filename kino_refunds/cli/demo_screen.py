"""What the demo shows: a live picture on a terminal or plain lines elsewhere, and its figures at the end."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kino_refunds.cli.tables import console, errors, print_facts, print_table, print_whole, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kino_refunds.demo.figures import Snapshot, StoryReport

FINDINGS_SHOWN = 5
_WORDS = {
    "held": ("held", "green"),
    "late": ("late", "yellow"),
    "broken": ("BROKEN", "bold red"),
    "holds": ("holds", "green"),
    "fails": ("FAILS", "bold red"),
}
_MARKS = {"broken": ("BROKEN", "bold red"), "healed": ("HEALED", "bold green"), "": ("      ", "")}


class _Lines:
    """Plain lines, for logs and pipes: only what happened."""

    def say(self, at_s: float, what: str, text: str) -> None:
        """Print one line on standard error."""
        errors.print(_line(at_s, what, text), soft_wrap=True)

    def show(self, now: Snapshot) -> None:
        """Show nothing: figures that change belong on a screen."""

    def close(self) -> None:
        """Do nothing: there is no picture."""


class _Screen:
    """A live picture at the bottom of the terminal; events scroll by above it."""

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
        """Remove the picture."""
        self._live.stop()


@contextmanager
def opened_view() -> Iterator[_Lines | _Screen]:
    """Give the view that the demo writes to: a live picture on a terminal, plain lines elsewhere."""
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
    console.print("\nwhat can be proven of it (kino-refunds reconcile prove)", style="bold")
    proof = Table(box=None, pad_edge=False, show_header=False)
    for each in told.proof["sentences"]:
        proof.add_row(Text(*_WORDS["holds" if each["holds"] else "fails"]), Text(each["text"]))
    print_whole(proof)
    if not told.proof["holds"]:
        console.print("The contradictions are live breaks: a person decides each of them.")


def _latency(found: dict[str, Any]) -> str:
    if not found["jobs"]:
        return "-"
    return f"p50 {found['p50_ms']:,} ms, p99 {found['p99_ms']:,} ms, {found['jobs']:,} jobs"
