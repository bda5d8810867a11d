"""The quick faults, one test each; `make faults` runs them all, and the planted bugs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SCENARIOS, Arena, arena
from tests.faults.on_workers import BAD_BUILD
from tests.faults.planted import PLANTED, Planted
from tests.faults.run import DEFAULT_SEED
from tests.project import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def place() -> Iterator[Arena]:
    """Servers of these tests alone: other tests must not be there when they are emptied or filled up."""
    with arena() as running:
        yield running


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.quick])
def test_fault(place: Arena, name: str) -> None:
    """Whatever breaks, no job is lost, none is paid twice, and every message is accounted for."""
    result = place.run(SCENARIOS[name], DEFAULT_SEED)

    assert result.passed, result.why()


def test_planted_bugs_name_scenarios_that_exist() -> None:
    """A planted bug that no scenario looks for would pass unnoticed."""
    named = {scenario for planted in PLANTED for scenario in planted.scenarios}

    assert named - SCENARIOS.keys() == set()


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_planted_bugs_have_somebody_who_looks(planted: Planted) -> None:
    """Each names a scenario, or tests of files that are there."""
    files = [test.partition("::")[0] for test in planted.tests]

    assert planted.scenarios or files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_bad_build_of_a_scenario_fits_the_code() -> None:
    """What a scenario changes in a copy of the project is found as well when the code has left its place."""
    assert (ROOT / BAD_BUILD.file).read_text(encoding="utf-8").count(BAD_BUILD.old) == 1


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_planted_bugs_fit_the_code(planted: Planted) -> None:
    """A planted bug whose place the code has left is found with the change, and not by the next long run."""
    assert (ROOT / planted.edit.file).read_text(encoding="utf-8").count(planted.edit.old) == 1
