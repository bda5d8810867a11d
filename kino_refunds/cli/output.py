"""What commands print: JSON for programs, tables for people, errors in one line on standard error.

What a person reads is drawn by `tables.py`, which loads rich; it is imported when something is drawn.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import sys
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ERROR_LENGTH_MAX = 2_000
"""The error stands at the beginning and the advice at the end; cut to this length, both fit on a screen."""


def reader_left() -> NoReturn:
    """Exit with 0: the reader of the pipe (`head`) has ended, and that is no error."""
    # Python would complain about the broken pipe once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def print_json(value: Any) -> None:
    """Print one JSON document on one line; in ASCII, so that nothing in it acts on a terminal."""
    try:
        sys.stdout.write(json.dumps(value, default=_jsonable) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # typer would make this an exit with 1
        reader_left()


def _jsonable(value: Any) -> Any:
    """Return a value of ours as JSON types; instants become RFC 3339."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (set, frozenset)):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_csv(items: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as CSV under the keys of the first one; an empty cell is None."""
    try:
        writer = csv.DictWriter(sys.stdout, list(items[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(items)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


def print_items(items: Sequence[Mapping[str, Any]], *, next_cursor: Any, as_json: bool, empty: str) -> None:
    """Print a listing; `empty` is what a person reads when there is nothing."""
    if as_json:
        print_json({"items": items, "next": next_cursor})
        return
    if not items:
        say(empty)
        return
    print_table(items)
    if next_cursor is not None:
        say(escaped(f"more: --after {shlex.quote(str(next_cursor))}"), style="dim")


def print_table(items: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Print rows under the keys of the first one; see `tables.py`."""
    from kino_refunds.cli import tables

    tables.print_table(items, title=title)


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one a line."""
    from kino_refunds.cli import tables

    tables.print_facts(facts)


def say(text: str, *, style: str = "", whole: bool = False) -> None:
    """Print a line on standard output; one that is `whole` is not wrapped on a terminal either."""
    from kino_refunds.cli import tables

    tables.console.print(text, style=style, **({"soft_wrap": True} if whole else {}))


def tell(text: str, *, style: str = "") -> None:
    """Print a line on standard error, beside the answer: a program that reads the answer must not meet it."""
    from kino_refunds.cli import tables

    tables.errors.print(text, style=style, soft_wrap=True)


def print_error(text: str) -> None:
    """Print an error as one line on standard error; of a very long one, its beginning and its end."""
    from rich.text import Text

    from kino_refunds.cli import tables

    if len(text) > ERROR_LENGTH_MAX:
        text = f"{text[: ERROR_LENGTH_MAX // 2]} … {text[-ERROR_LENGTH_MAX // 2 :]}"
    tables.errors.print(Text.assemble(("error: ", "bold red"), tables.shown(text)), soft_wrap=True)


def escaped(text: str) -> str:
    """Return a text as one line in which no character acts on a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
