"""The programs of a product in Node and of a person in psql."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

PROGRAMS = Path(__file__).with_name("other_languages")


class Node(Protocol):
    def __call__(self, act: str, given: Any = None, /) -> Any: ...


class Said(NamedTuple):
    rows: list[list[str]]
    errors: str


class Psql(Protocol):
    def __call__(self, script: str, **variables: str) -> Said: ...
