"""Builds that fail, and what intake was seen to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis
from structlog.testing import CapturingLogger

from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import Servers, servers
from kino_refunds.events.connection import redis_client
from kino_refunds.settlement import batch
from kino_refunds.settlement.batch import Part, settle_parts
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.settle import settle
from tests.conftest import Database
from tests.integration.intake.batches import BRISK
from tests.scenario import Scene
from workers import bootstep as bootstep_module
from workers import intake as intake_module


@pytest.fixture
def bad_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every settle raise in a build named `bad`, for events whose job matches; "" mends it."""

    def break_for(jobs: str) -> None:
        def failing(connection: Any, deliveries: Sequence[Any], terms: Any, **more: Any) -> list[Ruling]:
            if jobs and terms.build == "bad" and any(re.match(jobs, d.event.job_id) for d in deliveries):
                raise ZeroDivisionError("a mistake of this build")
            return settle(connection, deliveries, terms, **more)

        monkeypatch.setattr(batch, "settle", failing)

    return break_for


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


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Servers]:
    """Servers that these tests may kill and fill."""
    with servers() as running:
        migrate(running.database_url(role="kino_owner"))
        yield running


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
