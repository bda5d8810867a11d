"""What commands print: tables for people, JSON for programs, errors in one line on standard error."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def _reader_left() -> NoReturn:
    """The reader (`head`) has what it wanted: no error; python would complain about it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Instead of rich's exit with 1, which here means a finding."""
        _reader_left()


console = _Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def plain(value: Any) -> Any:
    """Turn rows and dataclasses into what JSON can say; times become RFC 3339."""
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    return value


def print_json(value: Any) -> None:
    """Print one JSON document on one line; in ASCII, so that nothing in it acts on a terminal."""
    try:
        sys.stdout.write(json.dumps(plain(value)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # typer would make this an exit with 1
        _reader_left()


def print_items(items: Sequence[Mapping[str, Any]], *, next_cursor: Any, as_json: bool, empty: str) -> None:
    """Print a listing; `empty` is what a person reads when there is nothing."""
    if as_json:
        print_json({"items": items, "next": next_cursor})
        return
    if not items:
        console.print(empty)
        return
    print_table(items)
    if next_cursor is not None:
        console.print(f"more: --after {next_cursor}", style="dim")


def print_table(items: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Print rows under the keys of the first; numbers to the right."""
    table = Table(
        title=None if title is None else shown(title),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for name, value in items[0].items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A broken number or time is harder to read than a broken word.
        whole = number or any(isinstance(item[name], datetime) for item in items)
        table.add_column(name.replace("_", " "), justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for item in items:
        table.add_row(*(shown(value) for value in item.values()))
    console.print(table)


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, shown(value))
    console.print(table)


def shown(value: Any) -> Text:
    """Show a value to a person; never as markup, whatever is in it, and without control characters."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, datetime):
        return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ"))
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)))


def print_error(text: str) -> None:
    """Print an error as one line on standard error."""
    errors.print(Text.assemble(("error: ", "bold red"), shown(text)), soft_wrap=True)
