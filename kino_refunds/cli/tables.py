"""How commands print for people: tables that fit the terminal, and lines that stay whole in a pipe; by rich."""

from __future__ import annotations

import io
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kino_refunds.cli.output import escaped, reader_left

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


WIDTH_IN_A_PIPE = 100_000
WIDTH_MIN = 40
"""A narrower terminal is treated as this wide: in one column a table would show nothing at all."""
_GAP = Text("  ")
NOTHING = "-"


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Wrap for a terminal only: in a pipe a line stays whole, for grep."""
        super().print(*objects, **{"soft_wrap": not self.is_terminal, **options})

    def on_broken_pipe(self) -> None:
        """Exit with 0 instead of rich's 1, which here means a finding."""
        reader_left()


# Nothing is markup: ids and texts come from publishers.
console = _Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_table(items: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Print rows under the keys of the first; numbers to the right.

    If the terminal is too narrow, the longest texts stand below their row, whole: ids are copied, and nobody can read a
    column three characters wide.
    """
    cells = [{name: _cell(name, value) for name, value in item.items()} for item in items]
    widths = {name: max(len(name), *(row[name].cell_len for row in cells)) for name in items[0]}
    numbers = {name for name in widths if any(_is_number(item[name]) for item in items)}
    texts = {name for name in widths if any(isinstance(item[name], str) for item in items)}
    below = _too_wide(widths, texts, _room())

    def line(row: Mapping[str, Text]) -> Text:
        for name in row:
            row[name].align("right" if name in numbers else "left", widths[name])
        return _GAP.join(row.values())

    head = line({name: Text(name.replace("_", " ")) for name in widths if name not in below})
    head.stylize("bold")
    parts: list[RenderableType] = [head] if title is None else [shown(title), head]
    for row in cells:
        parts.append(line({name: cell for name, cell in row.items() if name not in below}))
        parts += _packed(
            Text.assemble((f"{name.replace('_', ' ')} ", "dim"), row[name])
            for name in widths
            if name in below and row[name].plain not in {"", NOTHING}
        )
    print_whole(Group(*parts))


def _too_wide(widths: Mapping[str, int], texts: set[str], room: int) -> set[str]:
    """Return the columns that must leave the table so that the others fit: the widest first, the row's name last."""

    def fits(without: set[str]) -> bool:
        kept = [width for name, width in widths.items() if name not in without]
        return sum(kept) + len(_GAP) * (len(kept) - 1) <= room

    first, *others = widths
    gone = set[str]()
    for name in [*sorted(others, key=widths.__getitem__, reverse=True), first]:
        if name in texts and not fits(gone):
            gone.add(name)
    for name in sorted(gone, key=widths.__getitem__):
        if fits(gone - {name}):
            gone.remove(name)
    return gone


def _packed(pieces: Iterable[Text]) -> Iterator[Padding]:
    """Put as many pieces on a line as fit; only a piece that is longer than a line is folded."""
    room = _room() - 2 * len(_GAP)
    line = Text()
    for piece in pieces:
        if line and line.cell_len + len(_GAP) + piece.cell_len > room:
            yield Padding(line, (0, 0, 0, 2 * len(_GAP)), expand=False)
            line = Text()
        line = _GAP.join([line, piece]) if line else piece
    if line:
        yield Padding(line, (0, 0, 0, 2 * len(_GAP)), expand=False)


def print_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Print names and values, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, _cell(name, value))
    print_whole(table)


def print_whole(table: RenderableType) -> None:
    """Print a table; in a pipe each row is one line, whole, without the blanks that fill its last column."""
    if console.is_terminal and console.width >= WIDTH_MIN:
        console.print(table)
        return
    page = io.StringIO()
    Console(file=page, highlight=False, width=_room()).print(table)
    console.print(Text("\n".join(line.rstrip() for line in page.getvalue().splitlines())))


def _room() -> int:
    return max(WIDTH_MIN, console.width) if console.is_terminal or "COLUMNS" in os.environ else WIDTH_IN_A_PIPE


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(name: str, value: Any) -> Text:
    # A number that names something is typed again as it stands here: without thousands separators.
    return shown(str(value) if name.endswith(("id", "number")) and _is_number(value) else value)


def shown(value: Any) -> Text:
    """Return a value as text for a person: never as markup, and without control characters."""
    if value is None:
        return Text(NOTHING, style="dim")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, datetime):
        return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ"))
    if isinstance(value, int):
        return Text(f"{value:,}")
    return Text(escaped(str(value)))
