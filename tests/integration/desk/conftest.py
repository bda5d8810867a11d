"""A mistake of the build that can be switched on and off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kino_refunds.settlement import batch
from kino_refunds.settlement.settle import settle as settle_events


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every settle raise while it is on."""

    def failing(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a mistake of this build")

    def switch(state: str) -> None:
        monkeypatch.setattr(batch, "settle", failing if state == "on" else settle_events)

    return switch
