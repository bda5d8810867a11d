"""The quick faults, one test each; `make faults` runs them all, and the planted bugs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SCENARIOS, Arena, arena
from tests.faults.run import DEFAULT_SEED

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
