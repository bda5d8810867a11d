"""The tables of checks and of integrity queries in the documents are made from the code."""

from __future__ import annotations

import pytest

from kino_refunds.reconciliation import matching
from kino_refunds.reconciliation.checks import CHECKS, check_named
from kino_refunds.reconciliation.integrity import describe
from kino_refunds.settlement.breaks import BreakKind
from tests.project import ROOT

PAGE = ROOT / "kino_refunds" / "reconciliation" / "README.md"


def checks_table() -> str:
    """Every check as the page shows it."""
    rows = ["| check | promise | compares | with | finds | what a person does |", "|---|---|---|---|---|---|"]
    for check in CHECKS:
        finds = (
            "one kind for each query" if check.name == "integrity" else ", ".join(f"`{kind}`" for kind in check.finds)
        )
        rows.append(f"| `{check.name}` | {check.promise} | {check.ours} | {check.theirs} | {finds} | {check.repair} |")
    return "\n".join(rows)


def integrity_table() -> str:
    """Every integrity query as the page shows it."""
    rows = ["| kind | promise | what cannot be | what to do |", "|---|---|---|---|"]
    rows += [f"| `{each.name}` | {each.promise} | {each.cannot_be} | {each.advice} |" for each in describe()]
    return "\n".join(rows)


@pytest.mark.parametrize("table", [checks_table, integrity_table], ids=["checks", "integrity"])
def test_the_page_shows_what_the_code_says(table: object) -> None:
    """A check that is added, or whose repair changes, is in the page."""
    assert callable(table)
    assert table() in PAGE.read_text(encoding="utf-8")


def test_every_kind_of_break_has_one_check_that_finds_it() -> None:
    """And every kind but those of events is closed by a check's next run; the others end when a person accepts them."""
    found = [kind for check in CHECKS for kind in check.finds]
    closed = {kind for check in CHECKS for kind in check.closes}
    by_events = {BreakKind.COMPLETED_AFTER_REFUND, BreakKind.FAILED_AFTER_CAPTURE}
    by_people = {BreakKind.WRONGFUL_TERMINATION}
    by_sweeps = {BreakKind.RUNNING_PAST_CAP}

    assert len(found) == len(set(found))
    assert set(BreakKind) - set(found) == by_events | by_people | by_sweeps
    assert set(BreakKind) - closed == {BreakKind.COMPLETED_AFTER_REFUND}


def test_the_registry_names_the_kinds_of_matching() -> None:
    """It does not load the module for them."""
    assert set(check_named("matching").finds) == set(matching.KINDS)


def test_a_kind_is_a_word_of_one_table_only() -> None:
    """An integrity query does not take the name of another kind."""
    assert not {each.name for each in describe()} & set(BreakKind)
