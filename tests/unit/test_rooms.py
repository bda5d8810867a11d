"""Imports go one way: a room knows those below it, never those above (kino_refunds/README.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNDER_EVERYTHING = {"errors", "log"}
RULES = {
    "db": {"db", *UNDER_EVERYTHING},
    "events": {"events", *UNDER_EVERYTHING},
    "policy": {"policy", "events", *UNDER_EVERYTHING},
    # What an id may be: a job has the same one in an event and in its charge.
    "ledger": {"ledger", "events", "db", *UNDER_EVERYTHING},
    "settlement": {"settlement", "ledger", "policy", "events", "db", *UNDER_EVERYTHING},
    "reconciliation": {
        "reconciliation",
        "settlement",
        "ledger",
        "policy",
        "events",
        "db",
        "settings",
        *UNDER_EVERYTHING,
    },
    "desk": {
        "desk",
        "reconciliation",
        "settlement",
        "ledger",
        "policy",
        "events",
        "db",
        "schedule",
        "settings",
        *UNDER_EVERYTHING,
    },
}


def imported(file: Path) -> set[str]:
    """The rooms, and files beside them, that a file of the package imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from kino_refunds import x` names x, `from kino_refunds.x import …` too.
            names += [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names += [each.name for each in node.names]
    return {name.split(".")[1] for name in names if name.startswith("kino_refunds.")} | {
        "workers" for name in names if name.split(".")[0] == "workers"
    }


@pytest.mark.parametrize("room", RULES)
def test_rooms_import_downwards_only(room: str) -> None:
    """A room that imports another one than it may is named, with the file."""
    files = sorted((ROOT / "kino_refunds" / room).rglob("*.py"))
    assert files

    found = {f"{file.name} imports {name}" for file in files for name in imported(file) - RULES[room]}

    assert found == set()
