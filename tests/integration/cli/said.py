"""What a command of the desk printed, and whether that acts on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\x00\r\x7f"
MARKUP = "[bold red]x[/] [link=http://evil]y[/link] :warning: [/nonsense]"
TEN_KB = "x" * 10_000


class Said(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its one JSON document, on one line."""
        (line,) = self.out.splitlines()
        return json.loads(line)


Cli = Callable[..., Said]


def harmless(said: Said) -> bool:
    """Nothing that was printed acts on a terminal."""
    return all(c.isprintable() or c == "\n" for c in said.out + said.err)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
