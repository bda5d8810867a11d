"""The commands of the desk, run in this process, with and without servers."""

from __future__ import annotations

import io

import pytest

from kino_refunds.cli.main import _run
from tests.conftest import Database
from tests.integration.cli.said import Cli, Said


@pytest.fixture
def lonely_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, without a terminal, where both servers are away."""
    monkeypatch.setenv("KINO_DATABASE_URL", "postgresql://kino_worker@127.0.0.1:9/kino")
    monkeypatch.setenv("KINO_REDIS_URL", "redis://127.0.0.1:9/0")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = _run(arguments)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli(lonely_cli: Cli, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command against the test's servers."""
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    return lonely_cli
