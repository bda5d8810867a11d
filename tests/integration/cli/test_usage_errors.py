"""What cannot be meant: one clear line, exit 2, and nothing is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kino_refunds.errors import MalformedMessage
from kino_refunds.settlement.dead_letters import malformed_letter
from tests.command_line import AWAY_PORT, HOSTILE, Run, harmless
from tests.conftest import Database
from tests.integration.cli.commands import commands
from tests.scenario import Scene


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["refund"], "No such command 'refund'"),
        (["--versoin"], "No such option: --versoin"),
        (["why"], "Missing argument 'JOB'"),
        (["grant", "acme", "5"], "Missing option '--reference'"),
        (["grant", "acme", "-5", "--reference", "r"], "No such option: -5"),
        (["grant", "acme", "1.5", "--reference", "r"], "Invalid value for 'CREDITS': Input should be a valid integer"),
        (["grant", "acme", "0", "--reference", "r"], "credits must be a whole number from 1 to "),
        (["grant", "--reference", "r", "acme", "--", "-5"], "credits must be a whole number from 1 to "),
        (["grant", "acme", "9" * 30, "--reference", "r"], "credits must be a whole number from 1 to "),
        (["grant", "acme", "5", "--reference", "r", "--class", "gift"], "Invalid value for '--class'"),
        (["grant", "acme", "5", "--reference", "r", "--priority", "3000000000"], "Invalid value for '--priority'"),
        (["grant", "acme", "5", "--reference", "r", "--expires-at", "soon"], "'soon' is not a time; for example 2026-"),
        (
            ["grant", "acme", "5", "--reference", "r", "--expires-at", "0001-01-01T00:00:00+10:00"],
            "'0001-01-01T00:00:00+10:00' is not a time; for example 2026-",
        ),
        (["grant", "", "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", "a" * 129, "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", HOSTILE, "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", "acme", "5", "--reference", "a\nb"], "reference must be 1 to 128 printable characters"),
        (["balance", "acme", "--at", "2026-13-01"], "'2026-13-01' is not a time; for example 2026-"),
        (
            ["grant", "acme", "5", "--reference", "r", "--expires-at", "2031-03-28"],
            "'2031-03-28' is a day, not an instant; in UTC it ends at 2031-03-29T00:00:00Z: type that",
        ),
        (["balance", "acme", "--at", "20260131"], "in UTC it ends at 2026-02-01T00:00:00Z: type that"),
        (
            ["balance", "acme", "--at", "2026-01-31 12:00"],
            "has no offset; type 2026-01-31T12:00:00Z for UTC, or for example 2026-01-31T12:00:00+01:00",
        ),
        (["balance", "acme", "--at", "9999-12-31"], "'9999-12-31' has no offset; type 9999-12-31T00:00:00Z for UTC"),
        (["balance", "acme", "--at", ""], "'' is not a time; for example 2026-"),
        (["relay", "rewind", "--to", "2026-01-31", "--yes"], "in UTC it begins at 2026-01-31T00:00:00Z: type that"),
        (["charges", "open", "j", "acme", "-5"], "No such option: -5"),
        (["charges", "open", "--", "j", "acme", "-5"], "credits must be a whole number from 0 to "),
        (["charges", "open", "", "acme", "5"], "job_id must be 1 to 128 printable characters"),
        (["dev", "--data-dir", ""], "Invalid value for '--data-dir': it is empty; name a folder"),
        (["statement", "acme", "--limit", "0"], "Invalid value for '--limit'"),
        (["statement", "acme", "--limit", "10001"], "Invalid value for '--limit'"),
        (["statement", "acme", "--after", "x"], "Invalid value for '--after'"),
        (["publish", "no such file"], "'no such file': No such file or directory"),
        (["publish", "/"], "'/': Is a directory"),
        (["demo", "--jobs", "0"], "Invalid value for '--jobs'"),
        ([HOSTILE], "No such command "),
    ],
)
def test_wrong_usage_is_one_line_that_leads_to_the_help(bare: Run, arguments: list[str], says: str) -> None:
    """Exit code 2, one line that names what is wrong and where to read on, no traceback, nothing connected to."""
    result = bare(*arguments, KINO_DATABASE_URL=f"postgresql://kino_worker@127.0.0.1:{AWAY_PORT}/kino")

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert says in result.err
    assert result.err.endswith("--help\n")
    assert result.err.count("\n") == 1
    assert result.err[:-1].isprintable()


@pytest.mark.parametrize("command", ["balance", "statement", "why"])
def test_argument_that_is_not_utf_8_is_refused(run: Run, command: str) -> None:
    """Bytes that no id can have are a wrong argument, not a crash."""
    result = run(command, "acme\udcff")

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: 'acme\\udcff' is not text: write it in UTF-8")


GIVEN = {"number": "1", "numbers": "1", "credits": "5", "file": "-", "edited": "/dev/null", "to": "2026-01-31T12:00Z"}
"""What a parameter is given while another one of its command is odd; the others get a plain word."""
ODD = [
    "", " ", "0", "-1", "9" * 40, str(2**63), HOSTILE, "/", "x" * 200_000, "9999-12-31T23:59:59-12:00", "a\0b",
    "\udcff",
]  # fmt: skip
STARTS_SERVERS = {"demo", "dev", "trace run"}


@pytest.mark.parametrize("command", sorted(commands().keys() - STARTS_SERVERS))
def test_an_odd_value_for_any_parameter_is_an_answer_or_one_clear_line(
    run: Run, scene: Scene, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Whatever is typed for whichever argument: an exit code that means something, and no more than a screen of it."""
    monkeypatch.chdir(tmp_path)  # an odd name of a file makes a file
    scene.charged("job-1")
    scene.keep(malformed_letter(b"{", "generation.job-failed", MalformedMessage("bad_json", "cut off")))
    parameters = [each for each in commands()[command].params if each.name != "help"]
    product = database.url("kino_product")

    wrong = []
    for parameter in parameters:
        for odd in [] if getattr(parameter, "is_flag", False) else ODD:
            arguments = typed(command, parameters, str(parameter.name), odd)
            said = run(*arguments, KINO_PRODUCT_DATABASE_URL=product)
            one_line = said.err.startswith("error: ") and said.err.count("\n") == 1
            answered = said.code in {0, 1} and (said.code == 0 or said.out != "")
            if not (harmless(said) and len(said.err) < 2_500 and (answered or (said.code in {1, 2} and one_line))):
                wrong.append((parameter.name, odd[:40], said.code, said.out[:200], said.err[:200]))
    assert wrong == []


def typed(command: str, parameters: list[Any], name: str, odd: str) -> list[str]:
    """A command line on which one parameter is odd and the others that it needs are given."""
    arguments, behind = command.split(), ["--"]
    for each in parameters:
        value = odd if each.name == name else GIVEN.get(str(each.name), "x")
        if each.name == "yes":
            arguments.append("--yes")
        elif each.name == name or each.required:
            if each.param_type_name == "option":
                arguments.append(f"{each.opts[0]}={value}")
            else:
                behind.append(value)
    return arguments + behind


def test_a_file_whose_name_breaks_a_line_is_shown_on_one(run: Run, scene: Scene, tmp_path: Path) -> None:
    """A file's name is text as any other: in an error it neither ends the line nor acts on the terminal."""
    scene.charged()
    scene.keep(malformed_letter(b"{", "generation.job-failed", MalformedMessage("bad_json", "cut off")))
    edited = tmp_path / f"{HOSTILE.replace('/', '')}\n"
    edited.write_bytes(b"no event")

    said = run("dead-letters", "replay", "1", "--edited", str(edited))

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err[:-1].isprintable()
    assert "bad_json" in said.err


READ_ONLY = {
    "accounts show", "accounts statement", "breaks list", "breaks show", "charges list", "dead-letters list",
    "dead-letters show", "doctor", "intake status", "reconcile check-source", "reconcile checks",
    "reconcile list", "reconcile prove", "reconcile show", "report liability", "report month", "retries list",
    "retries show", "schedule", "status", "why",
}  # fmt: skip
NOBODY_ACTS = STARTS_SERVERS | {"migrate"}
"""Scratch servers; and the schema, whose owner's login is known."""


def test_every_command_that_changes_something_asks_who_does_it() -> None:
    """Whoever looks next finds a name: no command that writes comes without --by."""
    without = {words for words, command in commands().items() if "by" not in {each.name for each in command.params}}

    assert without == READ_ONLY | NOBODY_ACTS
