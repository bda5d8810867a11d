"""Help as people read it: an example for every command, whole sentences, the width of a terminal."""

from __future__ import annotations

import shlex

import pytest

from tests.command_line import Run
from tests.integration.cli.commands import commands


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command_has_an_example_and_fits_a_terminal(bare: Run, command: str) -> None:
    """A person finds an example to copy, on one line, and no line is wider than 80 columns."""
    shown = bare(*command.split(), "--help")

    examples = [line for line in shown.out.splitlines() if line.startswith("  Example: ")]
    assert (shown.code, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert [shlex.split(line)[1 : 2 + len(command.split())] for line in examples] == [
        ["kino-refunds", *command.split()]
    ]
    assert shown.out.partition(examples[0])[2].startswith("\n\n")


def test_list_of_commands_says_each_in_a_whole_line(bare: Run) -> None:
    """What a command does is not cut off in the list of all of them."""
    shown = bare("--help")

    listed = {line.split()[0] for line in shown.out.partition("LOOK:\n")[2].splitlines() if line.startswith("  ")}
    assert listed == {command.split()[0] for command in commands()}
    assert "..." not in shown.out.replace("[ARGS]...", "")
    assert bare("-h") == shown


@pytest.mark.parametrize("group", ["", *sorted({words.split()[0] for words in commands() if " " in words})])
def test_help_of_every_group_has_an_example_and_says_each_command_whole(bare: Run, group: str) -> None:
    """Also before the verb is known there is something to copy: a command that exists."""
    shown = bare(*group.split(), "--help")

    (example,) = [line for line in shown.out.splitlines() if line.startswith("  Example: kino-refunds ")]
    words = shlex.split(example)[2:]
    assert (shown.code, shown.err) == (0, "")
    assert " ".join(words[: 2 if group else 1]) in commands()
    assert words[: len(group.split())] == group.split()
    assert "..." not in shown.out.replace("[ARGS]...", "")
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [(), ("charges",)])
def test_command_without_its_verb_shows_help(bare: Run, arguments: tuple[str, ...]) -> None:
    """Who types only the name is shown what there is; a script that does is told that it used it wrongly."""
    shown = bare(*arguments)

    assert (shown.code, shown.out) == (2, "")
    assert shown.err == bare(*arguments, "--help").out
