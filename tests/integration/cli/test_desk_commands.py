"""Every command of the desk: its help, its confirmation, what it refuses, and a server that is away."""

from __future__ import annotations

import re

import pytest

from kino_refunds.cli.main import _run
from tests.command_line import ESCAPES, Run
from tests.scenario import Scene

COMMANDS = [
    "intake",
    "intake status",
    "intake pause",
    "intake resume",
    "retries",
    "retries list",
    "retries show",
    "retries run-now",
    "dead-letters",
    "dead-letters list",
    "dead-letters show",
    "dead-letters replay",
    "dead-letters discard",
    "dead-letters note",
    "breaks",
    "breaks list",
    "breaks show",
    "breaks accept",
    "charges",
    "charges list",
    "charges open",
    "relay",
    "relay rewind",
    "schedule",
    "charges ask",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's help says what it does and shows how it is typed; each group lists its commands."""
    code = _run([*command.split(), "--help"])
    said = capsys.readouterr().out

    group = any(other.startswith(f"{command} ") for other in COMMANDS)
    assert code == 0
    assert ("Commands" if group else f"Example: kino-refunds {command}") in " ".join(said.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["intake", "pause", "--reason", "r"],
        ["dead-letters", "discard", "1", "--note", "n"],
        ["dead-letters", "discard", "1", "--note", "n", "--although-open", "job-1"],
        ["breaks", "accept", "1", "--note", "n"],
        ["relay", "rewind", "--to", "2026-01-31T12:00:00Z"],
    ],
    ids=" ".join,
)
def test_what_others_feel_needs_yes_without_a_terminal(lonely_cli: Run, arguments: list[str]) -> None:
    """Where nobody can be asked, a command that others feel asks no server for anything, says --yes, and exits 2."""
    said = lonely_cli(*arguments)

    assert said.code == 2
    assert "--yes" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["intake", "pause", "--yes"],
        ["intake", "stop"],
        ["dead-letters", "show", "one"],
        ["dead-letters", "show", ESCAPES],
        ["dead-letters", "replay"],
        ["dead-letters", "replay", "1", "2", "--edited", __file__],
        ["dead-letters", "list", "--limit", "0"],
        ["dead-letters", "list", "--status", "opne"],
        ["dead-letters", "discard", "1", "--yes"],
        ["breaks", "list", "--status", "opne"],
        ["breaks", "accept", "1", "--yes"],
        ["breaks", "accept", "1", "--note", " ", "--yes"],
        ["dead-letters", "discard", "1", "--note", "", "--yes"],
        ["dead-letters", "note", "1", " "],
        ["intake", "pause", "--reason", "", "--yes"],
        ["intake", "resume", "--by", ""],
        ["retries", "show"],
    ],
    ids=lambda arguments: ascii(" ".join(arguments[:4]))[:60],
)
def test_what_cannot_be_meant_is_a_usage_error(lonely_cli: Run, arguments: list[str]) -> None:
    """A command that lacks something, or names what there is not, exits 2 and says so on standard error."""
    said = lonely_cli(*arguments)

    assert said.code == 2
    assert said.out == ""
    assert said.err != ""


NOT_THERE = (
    "dead-letters show 7",
    "dead-letters replay 7",
    "dead-letters replay 7 --dry-run",
    "dead-letters discard 7 --note n --yes",
    "dead-letters note 7 text",
    f"dead-letters show {'9' * 40}",
    "breaks show 7",
    "breaks accept 7 --note n --yes",
    "retries show no-such-event",
)


def test_what_is_not_there_is_one_line_and_exit_1(cli: Run, scene: Scene) -> None:
    """A number or id that nobody has is said in one line on standard error; nothing is written."""
    before = scene.everything()

    said = {command: cli(*command.split()) for command in NOT_THERE}

    assert {command: (each.code, each.out) for command, each in said.items()} == dict.fromkeys(NOT_THERE, (1, ""))
    assert [each.err for each in said.values() if not re.fullmatch(r"error: [^\n]+\n", each.err)] == []
    assert scene.everything() == before


def test_an_event_that_does_not_wait_cannot_be_run(cli: Run) -> None:
    """Whoever mistypes an event's id is told so, and does not believe that it was tried."""
    said = cli("retries", "run-now", "no-such-event")

    assert said.code == 1
    assert re.fullmatch(r"error: [^\n]*no-such-event[^\n]*\n", said.err)


AWAY = ["intake status", "intake resume", "retries list", "retries run-now", "dead-letters list", "breaks list"]


@pytest.mark.parametrize("command", [*AWAY, "dead-letters replay 1", "schedule"])
def test_without_postgres_a_command_exits_3(lonely_cli: Run, command: str) -> None:
    """A database that is away is exit 3 and one line that names the setting, without a traceback."""
    said = lonely_cli(*command.split())

    assert said.code == 3
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]*KINO_DATABASE_URL[^\n]*\n", said.err)


def test_without_redis_a_command_exits_3(cli: Run) -> None:
    """A Redis that is away is exit 3 and one line that names the setting."""
    said = cli("intake", "status", KINO_REDIS_URL="redis://127.0.0.1:9/0")

    assert said.code == 3
    assert re.fullmatch(r"error: [^\n]*KINO_REDIS_URL[^\n]*\n", said.err)


def test_a_redis_url_that_cannot_be_one_exits_2(cli: Run) -> None:
    """A setting that cannot be what it says is exit 2 and one line that names it."""
    urls = ("http://127.0.0.1/0", "redis://127.0.0.1:port/0", "127.0.0.1")

    said = [cli("intake", "status", KINO_REDIS_URL=url) for url in urls]

    assert [each.code for each in said] == [2, 2, 2]
    assert all(re.fullmatch(r"error: [^\n]*KINO_REDIS_URL[^\n]*\n", each.err) for each in said)
