"""The screen of `status`: drawn once, or again and again until Ctrl-C."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kino_refunds.cli.exit_codes import explained_by_server
from kino_refunds.cli.tables import console, print_whole, shown

if TYPE_CHECKING:
    from collections.abc import Callable

WATCH_EVERY_S = 2.0
HANGS_AFTER_S = 3.0
"""A look takes milliseconds; one that takes longer than this must not leave an old picture on the screen."""


def show_screen(found: dict[str, Any]) -> None:
    """Draw the screen once."""
    print_whole(_screen(found))


def watch_screen(read: Callable[[], dict[str, Any]]) -> NoReturn:
    """Draw the screen again and again; a server that is away does not end this: on-call waits for it to come back.

    The servers are read in a thread of their own: if one hangs, the last picture must not stay as if it were true, and
    Ctrl-C must work.
    """
    seen: SimpleQueue[Group | Text | Exception] = SimpleQueue()

    def look() -> None:
        try:
            seen.put(_screen(read(), lines_max=console.height - 1))
        except Exception as error:  # noqa: BLE001 - a bug is raised again in the main thread
            known = explained_by_server(error)
            seen.put(error if known is None else _bad(known[1]))

    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            Thread(target=look, name="status", daemon=True).start()
            answer = _patiently(seen, lambda text: _draw(_bad(text), live))
            if isinstance(answer, Exception):
                raise answer
            _draw(answer, live)
            time.sleep(WATCH_EVERY_S)


def _patiently(seen: SimpleQueue[Any], tell: Callable[[str], None]) -> Any:
    """Return the next look; while there is none, show after each HANGS_AFTER_S that a server hangs."""
    since = time.monotonic()
    while True:
        try:
            return seen.get(timeout=HANGS_AFTER_S)
        except Empty:
            tell(f"no answer for {time.monotonic() - since:.0f} s: Postgres or Redis hangs")


def _bad(text: str) -> Text:
    return Text.assemble(shown(datetime.now(UTC)), "  ", shown(text), style="bold red")


def _draw(seen: Group | Text, live: Live | None) -> None:
    if live is not None:
        live.update(seen, refresh=True)
    elif isinstance(seen, Group):
        print_whole(seen)
    else:
        console.print(seen, soft_wrap=True)


_NAMES = {"intake_reason": "reason", "intake_paused_by": "paused by"}
_ONLY_WHERE_SO = frozenset({"intake_reason", "intake_paused_by"})
_AT_THE_TOP = frozenset({"fine", "at", "troubles"})


def _screen(found: dict[str, Any], *, lines_max: int | None = None) -> Group:
    """Draw the troubles first, each with its command, then one line a figure; cut to `lines_max` from below."""
    troubles = found["troubles"]
    count = f"not fine: {len(troubles)} thing{'' if len(troubles) == 1 else 's'}"
    first = ("fine", "bold green") if found["fine"] else (count, "bold red")
    head = [Text.assemble(first, "  ", (shown(found["at"]).plain, "dim"))]
    head += [
        Text.assemble((f"  {shown(trouble['what'])}: ", "bold red"), (trouble["command"], "bold"))
        for trouble in troubles
    ]
    rows = []
    for name, value in found.items():
        if name in _AT_THE_TOP or (name in _ONLY_WHERE_SO and value is None):
            continue
        if isinstance(value, dict):
            text = Text(", ").join(Text.assemble(key, " ", shown(each)) for key, each in value.items())
        else:
            text = shown(value)
        rows.append((_NAMES.get(name, name.replace("_", " ")), text if value != {} else shown(None)))
    while lines_max is not None and rows and len(console.render_lines(Group(*head, _table(rows)))) > lines_max:
        rows.pop()
    return Group(*head, _table(rows))


def _table(rows: list[tuple[str, Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text)
    return table
