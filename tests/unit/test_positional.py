"""Calls of our own functions and classes name their arguments: at most four go by position."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.project import ROOT

PACKAGES = ("kino_refunds", "workers")
POSITIONAL_MAX = 4
"""Behind the fourth nobody sees any more which of two numbers is the credits. A `*row` counts as one argument."""


def modules() -> dict[str, ast.Module]:
    """Every module of the two packages, by its file."""
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def defined(tree: ast.AST) -> set[str]:
    """The names of all functions, methods and classes in a module."""
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def imported_from_elsewhere(tree: ast.AST) -> set[str]:
    """The names that a module imports from other packages: a class of a library may be called as one of ours."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in PACKAGES)
        for alias in node.names
    }


def calls(tree: ast.Module, ours: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Each call in a module, of a name that is ours, with that name."""
    foreign = imported_from_elsewhere(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in ours - foreign:
                yield name, node
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if owner in foreign:
                continue  # a function of a library's module
            case ast.Call(func=ast.Attribute(attr=name)) if name in ours:
                yield name, node


def offenders(trees: dict[str, ast.Module]) -> list[tuple[str, str, int]]:
    """Calls of ours with more positional arguments than are allowed: file, what is called, how many."""
    ours = {name for tree in trees.values() for name in defined(tree)}
    return sorted(
        (file, name, len(call.args))
        for file, tree in trees.items()
        for name, call in calls(tree, ours)
        if len(call.args) > POSITIONAL_MAX
    )


PLANTED = {
    "a function": ("def settle(a, b, c, d, e): ...\nsettle(1, 2, 3, 4, 5)", ["settle"]),
    "a class": ("class Grant: ...\nGrant(1, 2, 3, 4, 5)", ["Grant"]),
    "a method": ("class Queues:\n    def push(self): ...\nq.push(1, 2, 3, 4, 5)", ["push"]),
    "a function of a module of ours": ("from kino_refunds import ledger\ndef f(): ...\nledger.f(1, 2, 3, 4, 5)", ["f"]),
    "inside another call": ("def f(): ...\nprint(f(1, 2, 3, 4, 5))", ["f"]),
    "four": ("def f(): ...\nf(1, 2, 3, 4, e=5)", []),
    "a row": ("def f(): ...\nf(1, *row)", []),
    "another's function": ("import json\nfrom os import f\ndef dumps(): ...\njson.dumps(1, 2, 3, 4, 5)", []),
    "a name of ours that is imported from elsewhere": ("from os import walk\ndef walk(): ...\nwalk(1, 2, 3, 4, 5)", []),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_call_by_position_is_found(planted: str) -> None:
    """The search finds calls of our names in every form, and no call of a library's."""
    source, expected = PLANTED[planted]

    assert [name for _, name, _ in offenders({"planted.py": ast.parse(source)})] == expected


def test_no_call_of_ours_has_more_than_four_arguments_by_position() -> None:
    """Two ids or two numbers that change places by mistake move somebody else's credits: they go by name."""
    assert offenders(modules()) == []
