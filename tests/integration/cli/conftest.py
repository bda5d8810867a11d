"""The commands of the desk as Anna runs them, with and without servers."""

from __future__ import annotations

import pytest

from tests.command_line import Run


@pytest.fixture
def lonely_cli(bare: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as Anna, where both servers are away."""
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setenv("KINO_DATABASE_URL", "postgresql://kino_worker@127.0.0.1:9/kino")
    monkeypatch.setenv("KINO_REDIS_URL", "redis://127.0.0.1:9/0")
    return bare


@pytest.fixture
def cli(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as Anna, against the test's servers."""
    monkeypatch.setenv("LOGNAME", "anna")
    return run
