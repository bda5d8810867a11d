"""The planted bugs fit the code: `make faults` would find out after minutes only."""

from __future__ import annotations

import pytest

from tests.faults.harness import SCENARIOS
from tests.faults.on_workers import BAD_BUILD
from tests.faults.planted import PLANTED, Planted
from tests.faults.run import MODULES
from tests.project import ROOT


def test_the_scenarios_are_those_of_the_modules() -> None:
    """A module that is not imported registers no scenario, and its planted bugs would have nobody who looks."""
    assert {scenario.play.__module__ for scenario in SCENARIOS.values()} == {module.__name__ for module in MODULES}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_bug_has_its_place(planted: Planted) -> None:
    """The text that it replaces stands in its file once."""
    text = (ROOT / planted.edit.file).read_text(encoding="utf-8")

    assert text.count(planted.edit.old) == 1, (planted.edit.file, planted.edit.old)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_bug_has_somebody_who_looks(planted: Planted) -> None:
    """Each names scenarios or tests, and they exist: one that nobody looks for would pass unnoticed."""
    missing = [test for test in planted.tests if not stands(test)]

    assert planted.scenarios or planted.tests
    assert (set(planted.scenarios) - SCENARIOS.keys(), missing) == (set(), [])


def stands(test: str) -> bool:
    """Whether a test that pytest is told to run is there: a file, or a class or function in it."""
    file, *names = test.split("::")
    path = ROOT / file
    return path.is_file() and all(name in path.read_text(encoding="utf-8") for name in names)


def test_the_bad_build_of_a_scenario_fits_the_code() -> None:
    """What a scenario changes in a copy of the project is found as well when the code has left its place."""
    assert (ROOT / BAD_BUILD.file).read_text(encoding="utf-8").count(BAD_BUILD.old) == 1
