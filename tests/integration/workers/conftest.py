"""Real workers and beats that end with the test, and servers that may be killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.dev.processes import CeleryProcess
from kino_refunds.events.connection import redis_client
from tests.conftest import Database
from tests.processes import Start, settings_of, starter


@pytest.fixture
def processes() -> Iterator[list[CeleryProcess]]:
    started: list[CeleryProcess] = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture
def start(processes: list[CeleryProcess], database: Database, redis_url: str, tmp_path: Path) -> Start:
    return starter(processes, settings_of(database, redis_url), tmp_path)


@pytest.fixture
def own(own_servers: Servers) -> Iterator[Database]:
    """The database of servers that may be killed; they run again after the test."""
    with redis_client(own_servers.redis_url()) as client:
        client.flushdb()
    yield Database(DATABASE, own_servers)
    own_servers.redis.restart()
    own_servers.postgres.restart()
