"""The command tree: help in blocks, old names that still work and are not shown, and hints that can be typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from kino_refunds.cli.main import app
from kino_refunds.cli.tree import ALIASES, BLOCKS, VISIBLE, Group, command_words

ROOT = Path(__file__).parents[2]
HINT = re.compile(r"kino-refunds ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?")


def help_of(*words: str) -> str:
    """What `--help` shows on a terminal of 80 columns."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("kino-refunds", [], resilient_parsing=True, terminal_width=80)
    for word in words:
        command = command.get_command(context, word)
        context = command.make_context(word, [], parent=context, resilient_parsing=True, terminal_width=80)
    text: str = command.get_help(context)
    return text


def places(tree: Mapping[str, str | Group]) -> dict[str, str]:
    """Every command by its words: where its function stands."""
    return {
        f"{name} {verb}".strip(): place
        for name, entry in tree.items()
        for verb, place in (entry.commands.items() if isinstance(entry, Group) else [("", entry)])
    }


def test_help_shows_the_blocks_with_a_line_for_each_command() -> None:
    """Every visible command stands in its block, in the order of the design, whole on one line."""
    sections = re.split(r"^([A-Z]+):$", help_of(), flags=re.MULTILINE)[1:]
    shown = dict(zip(sections[::2], sections[1::2], strict=True))

    assert list(shown) == ["LOOK", "LETTERS", "INTAKE", "LEDGER", "PROVE", "RUN"]
    for block, text in shown.items():
        lines = text.strip("\n").splitlines()
        assert [line.split()[0] for line in lines] == list(BLOCKS[block])
        assert all(re.fullmatch(r"  \S+ +[A-Z].*[^.]\.", line) and len(line) <= 80 for line in lines)
    assert len({line.index(line.split()[1]) for text in shown.values() for line in text.strip("\n").splitlines()}) == 1


@pytest.mark.parametrize(("words", "place"), (places(VISIBLE) | places(ALIASES)).items())
def test_each_name_leads_to_a_function(words: str, place: str) -> None:
    """A name whose module or function is gone would only fail when somebody types it."""
    module, _, function = place.partition(":")

    assert callable(getattr(import_module(f"kino_refunds.cli.{module}"), function)), words


def test_an_old_name_does_what_its_new_name_does() -> None:
    """For one release a script that uses the old name goes on working."""
    new = {place: words for words, place in places(VISIBLE).items()}

    assert {words: new[place] for words, place in places(ALIASES).items()} == {
        "grant": "accounts grant",
        "balance": "accounts show",
        "statement": "accounts statement",
        "overdue run": "charges ask",
        "replay-trace": "trace run",
    }


@pytest.mark.parametrize("alias", ALIASES)
def test_an_old_name_is_not_shown(alias: str) -> None:
    """Neither the help nor completion nor the advice after a typing error leads to a name that will go."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("kino-refunds", [], resilient_parsing=True)

    offered = {item.value for item in command.shell_complete(context, "")}
    with pytest.raises(typer.TyperException) as refused:
        command.resolve_command(command.make_context("kino-refunds", ["-"], resilient_parsing=False), [f"{alias}x"])

    assert offered >= VISIBLE.keys()
    assert alias not in offered
    assert not re.search(rf"^  {alias} ", help_of(), re.MULTILINE)
    assert f"'{alias}'" not in str(refused.value)


def hints() -> Iterator[tuple[str, str]]:
    """Each command that a text of the program names, with its place."""
    for file in sorted([*ROOT.glob("kino_refunds/**/*.py"), *ROOT.glob("workers/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for found in HINT.finditer(" ".join(node.value.split())):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", found[0]


def test_each_command_that_a_text_names_can_be_typed() -> None:
    """Help, errors, findings and log lines name commands that exist, by the names that stay."""
    found = list(hints())

    wrong = []
    for place, hint in found:
        name, verb = HINT.fullmatch(hint).groups()  # type: ignore[union-attr]
        entry = VISIBLE.get(name)
        if entry is None or (isinstance(entry, Group) and verb not in entry.commands):
            wrong.append(f"{place}: {hint}")
    assert len(found) > 50
    assert wrong == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], []),
        (["why", "list"], ["why"]),
        (["breaks", "show", "3"], ["breaks", "show"]),
        (["breaks", "secret"], ["breaks"]),
        (["overdue", "run"], ["overdue", "run"]),
        (["secret"], []),
    ],
)
def test_words_of_a_command_hold_nothing_else(arguments: list[str], words: list[str]) -> None:
    """A command's line in the log names the command, and no id or text that was typed behind it."""
    assert command_words(arguments) == words
