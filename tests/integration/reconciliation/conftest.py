"""The ledger's clock stands still."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.reconciliation.http_source import HttpSource
from tests.clock import clock_at
from tests.conftest import Database
from tests.integration.reconciliation.job_sources import JOBS, Endpoint, honest
from tests.scenario import NOW, Scene


@pytest.fixture
def stopped_clock(scene: Scene) -> Iterator[None]:
    """It is NOW, unless a test says otherwise: charges are opened before they are swept."""
    with clock_at(scene.worker, NOW):
        yield


@pytest.fixture
def jobs(database: Database) -> Iterator[sa.Engine]:
    """The pipeline's own table, and a session that could write it."""
    engine = create_engine(database.url("postgres"), limits=SessionLimits(statement_timeout_ms=500))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE TABLE public.job (job_id text, state text, origin text, stage text, result_produced boolean,"
                " finished_at timestamptz)"
            )
        )
        connection.execute(
            sa.text("INSERT INTO public.job SELECT * FROM jsonb_populate_recordset(NULL::public.job, :jobs)"),
            {"jobs": json.dumps(JOBS)},
        )
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with Endpoint().serving() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.reply = honest
    server.requests.clear()
    return server


@pytest.fixture
def http_source(endpoint: Endpoint) -> Iterator[HttpSource]:
    with httpx.Client(timeout=0.5, trust_env=False) as client:
        yield HttpSource(client, endpoint.url)
