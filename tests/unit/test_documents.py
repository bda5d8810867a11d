"""What the documents name is there: links, paths, modules, settings, commands, figures."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from kino_refunds.cli.main import app
from kino_refunds.settings import PREFIX, Settings
from tests import documents
from tests.documents import PAGES, ROOT
from tests.faults.harness import SCENARIOS
from tests.faults.planted import PLANTED
from tests.faults.run import MODULES

LINES_MAX = 150
"""Of the README: a newcomer reads one page."""
BASES = (ROOT, ROOT / "kino_refunds", ROOT / "tests")
"""Where a path in a document may begin, beside the document's own folder."""
SUFFIXES = "py|sql|lua|md|sh|yaml|toml|acl|conf|example"
A_FILE = "README.md"
"""Stands for the files of a reader: the program wants them to be there."""

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_one_page() -> None:
    """The README stays short; what is longer has a page of its own."""
    assert len(documents.text_of(documents.README).splitlines()) <= LINES_MAX


@page_by_page
def test_links_lead_somewhere(page: Path) -> None:
    """Each link leads to a file that exists and, behind #, to one of its headings."""
    dead = []
    for link in documents.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in documents.anchors(target)):
            dead.append(link)

    assert dead == []


def is_there(page: Path, name: str) -> bool:
    return any(next(base.glob(name), None) is not None for base in (page.parent, *BASES) if base.is_dir())


@page_by_page
def test_paths_exist(page: Path) -> None:
    """Each path in code, with a folder or a suffix of ours, is one of a file; each test_… is a test file."""
    path = re.compile(rf"(?:\w[\w.*-]*/)+(?:[\w@*-][\w.@*-]*)?|[\w*-][\w.*-]*\.(?:{SUFFIXES})")
    named = [span.removeprefix("../") for span in documents.spans(page)]
    names = [name for name in named if path.fullmatch(name) and not name.startswith("application/")]
    tests = [f"integration/**/{name}.py" for name in named if re.fullmatch(r"test_\w+", name)]

    assert [name for name in (*names, *tests) if not is_there(page, name)] == []


@page_by_page
def test_modules_exist(page: Path) -> None:
    """Each dotted name of this project can be imported."""
    for name in documents.spans(page):
        if re.fullmatch(r"kino_refunds(\.\w+)+", name):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@page_by_page
def test_settings_exist(page: Path) -> None:
    """Each KINO_* name is a setting that the program reads."""
    named = set(re.findall(r"\bKINO_[A-Z_]+[A-Z](?![A-Z_*])", documents.text_of(page)))

    assert named <= {PREFIX + name.upper() for name in Settings.model_fields}


# --- commands -------------------------------------------------------------------------------------------------


@cache
def program() -> tuple[Any, Any]:
    """The program as its parser sees it. Typer brings a click of its own, which mypy tells apart from ours."""
    command: Any = typer.main.get_command(app)
    return command, command.make_context("kino-refunds", [], resilient_parsing=True)


def commands(page: Path) -> set[str]:
    """Every `kino-refunds …` in code spans and in blocks, and behind the pipes of these."""
    lines = [line.strip().removeprefix("$ ") for block in documents.blocks(page) for line in block.splitlines()]
    # `| xargs COMMAND` gives the last argument.
    parts = [part.strip() for each in (*lines, *documents.spans(page)) for part in each.split("|")]
    parts = [part.removeprefix("xargs -r ") + (" 1" if part.startswith("xargs") else "") for part in parts]
    return {part for part in parts if part.startswith("kino-refunds ") and "…" not in part}


def found(words: list[str]) -> tuple[Any, Any, list[str]]:
    """Go down the command tree; returns the command, its group's context and the words that are left."""
    command, context = program()
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        assert not command.hidden, f"{name} is an old name"
        if hasattr(command, "get_command"):
            context = command.make_context(name, [], parent=context, resilient_parsing=True)
    return command, context, words


@pytest.mark.parametrize("line", sorted(set().union(*map(commands, PAGES))))
def test_commands_exist(line: str) -> None:
    """Each command is parsed by the program itself, with its flags and arguments."""
    words = [
        {"NUMBER": "1", "FILE": A_FILE}.get(word, A_FILE if re.search(r"\.jsonl?$", word) else word)
        for word in shlex.split(line, comments=True)[1:]
    ]

    command, context, rest = found(words)

    if hasattr(command, "get_command"):
        assert any(rest[0] in option.opts for option in command.params), f"there is no option {rest[0]}"
    elif "--help" not in rest:
        with command.make_context(command.name, rest, parent=context):
            pass


@page_by_page
def test_commands_in_short_exist(page: Path) -> None:
    """A command that is named without the program's name, such as `charges ask`, is one."""
    command, context = program()
    groups = [name for name in command.commands if hasattr(command.get_command(context, name), "get_command")]

    for span in documents.spans(page):
        first, *words = span.split()
        if first in groups and words:
            found([first, words[0]])


def test_runbook_has_commands_to_check() -> None:
    """The list of commands has those that on-call starts with."""
    in_runbook = commands(documents.RUNBOOK)

    assert {"kino-refunds intake status", "kino-refunds schedule", "kino-refunds why JOB"} <= in_runbook
    assert len(in_runbook) > 20


# --- figures --------------------------------------------------------------------------------------------------


def test_faults_page_counts_what_there_is() -> None:
    """The page of the faults names their files, how many scenarios and planted bugs there are, and every cause."""
    page = documents.text_of(documents.FAULTS)
    causes = re.findall(r"^\| ([^|]+) \| [\d.]+ s \|$", page, re.MULTILINE)

    assert {f"{module.__name__.rpartition('.')[2]}.py" for module in MODULES} <= set(documents.spans(documents.FAULTS))
    assert f"runs {len(SCENARIOS)} scenarios" in page
    assert f"plants {len(PLANTED)} bugs" in page
    assert sorted(causes) == sorted({scenario.cause for scenario in SCENARIOS.values()})
