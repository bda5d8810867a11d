"""A command's result, for tests that run commands in their own process; the fixtures are in conftest.py."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kino_refunds.events.schema import to_json
from kino_refunds.settings import PREFIX


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "one document on one line"
        return json.loads(self.out)


class Run(Protocol):
    def __call__(self, *arguments: str, stdin: bytes = b"", **environment: str | None) -> Result: ...


SCRIPT = Path(sys.executable).with_name("kino-refunds")
AWAY_PORT = 1
"""Nobody listens on tcpmux here, and a connection to it is refused at once."""
HOSTILE = "\x1b[2J\x9b31m[red]\u202egnp.exe[/red]\x07"
"""Clears the screen, colours by C1, reverses what follows, rings; and rich's markup, if anybody reads it as such."""
HARMLESS = "[red]"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\x00\r\x7f"
MARKUP = "[bold red]x[/] [link=http://evil]y[/link] :warning: [/nonsense]"


def error(text: str, code: int = 2) -> Result:
    """One line on standard error, and nothing on standard output."""
    return Result(code, "", f"error: {text}\n")


def outside() -> dict[str, str]:
    """This environment without any ledger that it may name."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def lines(*events: object) -> bytes:
    """Events as `publish` reads them, one JSON document a line; bytes as they are."""
    return b"".join(each if isinstance(each, bytes) else to_json(each) + b"\n" for each in events)  # type: ignore[arg-type]


def harmless(said: Result) -> bool:
    """Nothing that was printed acts on a terminal."""
    return all(c.isprintable() or c == "\n" for c in said.out + said.err)


def squeezed(text: str) -> str:
    """A text without its white space: a table breaks lines where it must."""
    return re.sub(r"\s+", "", text)
