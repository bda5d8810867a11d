"""Every command of the program, by its words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from kino_refunds.cli import main as cli


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its words."""

    def walk(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, (*words, name))
            else:
                yield " ".join((*words, name)), command

    return dict(walk(typer.main.get_command(cli.app), ()))
