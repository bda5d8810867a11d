"""Builds that fail, and what intake was seen to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis
from structlog.testing import CapturingLogger

from kino_refunds.dev.embedded import Servers
from kino_refunds.events.connection import redis_client
from kino_refunds.settlement.batch import Part, settle_parts
from tests.conftest import Database
from tests.integration.intake.batches import BRISK
from tests.scenario import Scene
from workers import bootstep as bootstep_module
from workers import intake as intake_module


@pytest.fixture
def brisk_scene(database: Database) -> Iterator[Scene]:
    """A scene whose worker waits for nobody and nothing for long."""
    with Scene.of(database, limits=BRISK) as scene:
        yield scene


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    """What intake logs, instead of logging it."""
    logger = CapturingLogger()
    monkeypatch.setattr(intake_module, "log", logger)
    monkeypatch.setattr(bootstep_module, "log", logger)
    return logger


@pytest.fixture
def own_redis(own_servers: Servers) -> Iterator[Redis]:
    with redis_client(own_servers.redis_url()) as client:
        client.flushdb()
        yield client


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The jobs of each batch that intake settles, in order."""
    seen: list[list[str]] = []

    def seen_batch(engine: sa.Engine, deliveries: Sequence[Any], *args: Any, **kwargs: Any) -> Iterator[Part]:
        seen.append([delivery.event.job_id for delivery in deliveries])
        return settle_parts(engine, deliveries, *args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", seen_batch)
    return seen
