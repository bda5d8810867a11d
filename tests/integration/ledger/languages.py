"""The programs of a product in Node and of a person in psql."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kino_refunds import ledger

PAGE = Path(ledger.__file__).with_name("README.md")
PROGRAMS = Path(__file__).with_name("other_languages")
DEADLINE_S = 15.0
"""A program that has not ended by then waits for a lock without an end; where it does not wait it takes a second."""
NPM_DEADLINE_S = 60.0
NPM_INSTALL = "npm install --no-package-lock --no-audit --no-fund --ignore-scripts --prefer-offline --fetch-retries=0"
NPM_AWAY = ("EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT")
"""What npm says where it has no network, by its own codes."""


def example(name: str) -> str:
    """The block of the ledger's page behind a marker."""
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None, f"{PAGE} has no example {name}"
    return found[1]


class Node(Protocol):
    def __call__(self, act: str, given: Any = None, /) -> Any: ...


class Said(NamedTuple):
    rows: list[list[str]]
    errors: str


class Psql(Protocol):
    def __call__(self, script: str, **variables: str) -> Said: ...
