"""Real servers for every test: started once per pytest process, a database and a Redis db for each test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, cycle

import pytest
import sqlalchemy as sa
from psycopg import sql
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.embedded import Servers, servers

TEMPLATE = "kino_template"

_database_numbers = count(1)
# Db 0 stays empty: what talks to it in a test forgot to ask for a db of its own.
_redis_dbs = cycle(range(1, 512))


@dataclass(frozen=True)
class Database:
    """A migrated database that one test has for itself."""

    name: str
    servers: Servers = field(repr=False)

    def url(self, role: str = "kino_worker") -> str:
        """Return its SQLAlchemy URL for a role; `postgres` is the superuser."""
        return self.servers.database_url(role=role, database=self.name)


@pytest.fixture(scope="session")
def embedded() -> Iterator[Servers]:
    """Postgres and Valkey of this pytest process."""
    with servers() as running:
        yield running


@pytest.fixture(scope="session")
def postgres_template(embedded: Servers) -> str:
    """Name the migrated database that every test's own is copied from."""
    embedded.create_database(TEMPLATE)
    migrate(embedded.database_url(role="kino_owner", database=TEMPLATE))
    return TEMPLATE


@pytest.fixture
def database(embedded: Servers, postgres_template: str) -> Iterator[Database]:
    """Give the test a migrated database of its own."""
    name = f"t_{next(_database_numbers)}"
    with embedded.postgres.connect() as superuser:
        superuser.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER kino_owner").format(
                sql.Identifier(name), sql.Identifier(postgres_template)
            )
        )
    yield Database(name, embedded)
    # A new connection: a fault test may have killed the server in between.
    with embedded.postgres.connect() as superuser:
        superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def engine(database: Database) -> Iterator[sa.Engine]:
    """Give the test an engine for kino_worker, with the limits that a worker has."""
    engine = create_engine(database.url())
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Give the test one connection as kino_worker; what it does not commit is rolled back."""
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def redis_url(embedded: Servers) -> Iterator[str]:
    """Give the test an empty Redis db of its own."""
    url = embedded.redis_url(next(_redis_dbs))
    with Redis.from_url(url) as client:
        client.flushdb()
    yield url
    with Redis.from_url(url) as client:
        client.flushdb()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """Give the test a client of its Redis db."""
    with Redis.from_url(redis_url) as client:
        yield client
