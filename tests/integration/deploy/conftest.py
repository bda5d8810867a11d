"""The servers as deploy/ would have them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.integration.deploy.deployed_valkey import DeployedValkey, ask


@pytest.fixture(scope="module")
def valkey() -> Iterator[DeployedValkey]:
    with tempfile.TemporaryDirectory(prefix="kino-deploy-") as folder:
        server = DeployedValkey(Path(folder) / "valkey", scratch=True).start()
        yield server
        server.stop()


@pytest.fixture
def admin(valkey: DeployedValkey) -> Iterator[Redis]:
    """Everything is empty before a test, and nobody was refused."""
    with valkey.client("admin") as client:
        client.flushall()
        ask(client, "ACL LOG", "RESET")
        yield client
