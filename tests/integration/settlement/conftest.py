"""Sessions that wait for each other as long as a test wants them to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kino_refunds.settlement import settle as settle_module
from tests.conftest import Database
from tests.integration.settlement.races import Gate
from tests.scenario import PATIENT, Scene


@pytest.fixture
def patient(database: Database) -> Iterator[Scene]:
    """A worker that waits for a lock for as long as the test wants it to."""
    with Scene.of(database, limits=PATIENT) as scene:
        yield scene


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield pool


@pytest.fixture
def gate_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    """Stop the first session right after one of settle's own steps, by the step's name."""
    gates = []

    def install(step: str) -> Gate:
        gate = Gate()
        gates.append(gate)
        original: Callable[..., Any] = getattr(settle_module, step)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            gate.stop_the_first()
            return result

        monkeypatch.setattr(settle_module, step, stepped)
        return gate

    yield install
    for gate in gates:
        gate.opened.set()
