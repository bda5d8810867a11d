"""Imports go one way: a room knows the rooms below it (the contracts in pyproject.toml)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT

LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Read the contracts and the two packages that stand in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(LINT, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in ("kino_refunds", "workers"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept() -> None:
    """No room imports one that it must not."""
    found = lint(ROOT)

    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kino_refunds/settlement/inbox.py", "import kino_refunds.reconciliation.guard"),
        ("kino_refunds/policy/automatic.py", "import sqlalchemy"),
        ("workers/tasks.py", "import kino_refunds.dev.processes"),
        ("kino_refunds/demo/promises.py", "import kino_refunds.ledger"),
    ],
)
def test_an_import_that_goes_up_is_named(copy: Path, module: str, line: str) -> None:
    """One import against a contract fails the check, which names both modules."""
    with (copy / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")

    found = lint(copy)

    assert found.returncode == 1
    assert module.removesuffix(".py").replace("/", ".") in found.stdout


def test_a_new_room_must_have_its_place(copy: Path) -> None:
    """A folder that no contract names fails the check."""
    (copy / "kino_refunds" / "annexe").mkdir()
    (copy / "kino_refunds" / "annexe" / "__init__.py").touch()

    found = lint(copy)

    assert found.returncode == 1
    assert "annexe" in found.stdout
