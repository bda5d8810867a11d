"""Commands ask and print: no statement stands in the command line (the import contract is in pyproject.toml)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SQL = re.compile(
    r"\bSELECT\b.+\b(FROM|kino\.)|\bINSERT\s+INTO\b|\bUPDATE\s+\S+\s+SET\b|\bDELETE\s+FROM\b|\bTRUNCATE\b|\bALTER\s+TABLE\b"
    r"|\bSET\s+LOCAL\b|\bkino\.\w+\s*\(",
    re.DOTALL,
)
SENDS = {"execute", "exec_driver_sql", "scalar", "scalars"}


def statements(tree: ast.AST) -> Iterator[int]:
    """Lines with a string that is SQL, or a call that sends one; docstrings are prose."""
    prose = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose and SQL.search(text):
                yield node.lineno
            case ast.Call(func=ast.Attribute(attr=name)) if name in SENDS:
                yield node.lineno


def test_no_string_of_the_command_line_is_sql() -> None:
    """A command asks a function of a room below, which returns values."""
    files = sorted(ROOT.glob("kino_refunds/cli/**/*.py"))

    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in statements(ast.parse(file.read_text(encoding="utf-8")))
    ]

    assert files
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'found = text("SELECT 1 FROM kino.account")',
        'found = """\n  UPDATE kino.break\n  SET status = 1"""',
        "found = f'INSERT INTO {table} VALUES (1)'",
        'found = "SELECT kino.horizon()"',
        "found = connection.execute(statement)",
        'found = connection.exec_driver_sql("x")',
    ],
)
def test_a_statement_would_be_found(line: str) -> None:
    """The search finds what it is there to find."""
    assert list(statements(ast.parse(line)))
