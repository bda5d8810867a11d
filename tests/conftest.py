"""Real servers for every test: started once per pytest process, a database and a Redis db for each test."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

import pytest
import sqlalchemy as sa
from psycopg import sql
from redis import Redis

from kino_refunds.cli import main as cli
from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import Servers, servers
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.settings import PREFIX
from tests.command_line import Result, Run
from tests.failing import BadBuild
from tests.node import install_packages
from tests.scenario import Scene

TEMPLATE = "kino_template"
INSUFFICIENT_PRIVILEGE = "42501"

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

    @contextmanager
    def connect(self, role: str) -> Iterator[sa.Connection]:
        """Open a session of a role; what it leaves open is undone."""
        engine = create_engine(self.url(role), pooled=False)
        with engine.connect() as connection:
            yield connection

    def execute(self, role: str, *statements: str) -> None:
        """Run statements as a role, in one transaction."""
        with self.connect(role) as connection, connection.begin():
            for statement in statements:
                connection.exec_driver_sql(statement)

    def refusal(self, role: str, *statements: str) -> str | None:
        """Run statements as a role; return the SQLSTATE by which one of them is refused, None if none is."""
        try:
            self.execute(role, *statements)
        except sa.exc.DBAPIError as error:
            return getattr(error.orig, "sqlstate", None)
        return None


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
def connection(request: pytest.FixtureRequest, database: Database) -> Iterator[sa.Connection]:
    """Give the test one connection as its module's CONNECTS_AS, else as kino_worker; what it leaves open is undone."""
    with database.connect(getattr(request.module, "CONNECTS_AS", "kino_worker")) as connection:
        yield connection


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    """Give the test the three parties to its database; the worker has the time-outs of production."""
    with Scene.of(database) as scene:
        yield scene


@pytest.fixture
def product(database: Database) -> Iterator[sa.Connection]:
    """Give the test a connection as kino_product, which grants and charges."""
    with database.connect("kino_product") as connection:
        yield connection


@pytest.fixture
def sound_books(database: Database) -> Iterator[None]:
    """Whatever the test did, the books it leaves are sound."""
    yield
    with database.connect("kino_read") as connection:
        # Scenes settle at NOW, when the tests began, and open charges by the clock that runs.
        assert violations(connection, without=("times",)) == []


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


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give tests a folder outside of the repository for programs in Node; skips where Node or npm's registry is not."""
    folder = tmp_path_factory.mktemp("node")
    install_packages(folder)
    return folder


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, with no KINO_* variable but those that are given."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["kino-refunds"])

    def run(*arguments: str, stdin: bytes = b"", **environment: str | None) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in environment.items():
                if value is not None:
                    patch.setenv(name, value)
            capsys.readouterr()
            try:
                code = cli._run(list(arguments))
            except SystemExit as ended:
                code = int(ended.code or 0)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


@pytest.fixture
def run(bare: Run, database: Database, redis_url: str) -> Run:
    """Run a command against this test's own database and Redis; None leaves a variable out."""
    urls: dict[str, str | None] = {
        "KINO_DATABASE_URL": database.url("kino_worker"),
        "KINO_PRODUCT_DATABASE_URL": database.url("kino_product"),
        "KINO_MIGRATION_DATABASE_URL": database.url("kino_owner"),
        "KINO_REDIS_URL": redis_url,
        "KINO_JOB_SOURCE": "none",
    }
    return lambda *arguments, stdin=b"", **environment: bare(*arguments, stdin=stdin, **(urls | environment))


@pytest.fixture
def bad_build(monkeypatch: pytest.MonkeyPatch) -> BadBuild:
    """Give the test a build that makes a mistake with the jobs that the test names."""
    return BadBuild(monkeypatch)


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Servers]:
    """Servers of this file alone: its tests may kill them and fill them up."""
    with servers() as running:
        migrate(running.database_url(role="kino_owner"))
        yield running
