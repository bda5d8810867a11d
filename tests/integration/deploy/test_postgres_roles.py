"""roles.sql, postgres-roles.sql and postgres-init.sh, loaded into a real server and overstepped."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import LOOPBACK, EmbeddedPostgres
from kino_refunds.settings import Settings
from tests.integration.deploy.files import DEPLOY, password
from tests.project import ROOT


@dataclass(frozen=True)
class GuardedPostgres:
    """A Postgres that asks for passwords, its roles made by the script of deploy/."""

    server: EmbeddedPostgres

    def init(self, **passwords: str) -> None:
        orders = self.server._orders(self.server.port)
        sql = Path(tempfile.mkdtemp(prefix="kino-sql-"))
        for path in (ROOT / "kino_refunds/db/roles.sql", DEPLOY / "postgres-roles.sql"):
            shutil.copy(path, sql)
        try:
            subprocess.run(
                [DEPLOY / "postgres-init.sh"],
                env={
                    "PATH": f"{Path(orders.command[0]).parent}:{os.defpath}",
                    "PGHOST": LOOPBACK,
                    "PGPORT": str(self.server.port),
                    "ROLES_SQL_FOLDER": str(sql),
                    **{f"POSTGRES_{name.upper()}_PASSWORD": value for name, value in passwords.items()},
                },
                check=True,
                capture_output=True,
                text=True,
            )
        finally:
            shutil.rmtree(sql)

    def url(self, role: str, given: str | None = None) -> str:
        return f"postgresql://{role}:{given or password(role)}@{LOOPBACK}:{self.server.port}/kino"

    def connect(self, role: str, given: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(role, given), autocommit=True)


ROLES = ("kino_owner", "kino_worker", "kino_product", "kino_read")


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="kino-deploy-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder / "postgres", scratch=True).start()
    try:
        with server.connect() as superuser:
            superuser.execute("CREATE DATABASE kino")
            superuser.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger-password'")
        (server.data / "pg_hba.conf").write_text(
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n", encoding="utf-8"
        )
        server.restart()
        guarded = GuardedPostgres(server)
        guarded.init(**{role.removeprefix("kino_"): password(role) for role in ROLES})
        migrate(guarded.url("kino_owner"))
        yield guarded
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("role", ROLES)
def test_role_comes_in_by_its_own_password(guarded: GuardedPostgres, role: str) -> None:
    """A role connects with its password and with no other."""
    with guarded.connect(role) as connection:
        row = connection.execute("SELECT current_user::text").fetchone()

    assert row == (role,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        guarded.connect(role, "wrong")


def test_stranger_stays_outside(guarded: GuardedPostgres) -> None:
    """A role of the same server that is none of ours may not connect to the ledger's database."""
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        guarded.connect("stranger", "stranger-password")


def test_init_script_may_run_again(guarded: GuardedPostgres) -> None:
    """Run again it changes the password that is given, also one full of quotes, and keeps the others."""
    odd = "it's \"$(odd)\" \\ :'x'"
    guarded.init(read=odd)

    for role, given in (("kino_read", odd), ("kino_worker", password("kino_worker"))):
        with psycopg.connect(
            host=LOOPBACK, port=guarded.server.port, user=role, password=given, dbname="kino"
        ) as connection:
            assert connection.info.user == role
    guarded.init(read=password("kino_read"))


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("kino_owner", {"lock_timeout": "10s"}),
        (
            "kino_worker",
            {"statement_timeout": "5min", "idle_in_transaction_session_timeout": "1min", "synchronous_commit": "on"},
        ),
        (
            "kino_product",
            {
                "statement_timeout": "5min",
                "idle_in_transaction_session_timeout": "5min",
                "transaction_timeout": "30min",
                "synchronous_commit": "on",
            },
        ),
        ("kino_read", {"statement_timeout": "5min", "idle_in_transaction_session_timeout": "5min"}),
    ],
)
def test_role_has_its_limits_from_the_first_statement(
    guarded: GuardedPostgres, role: str, expected: dict[str, str]
) -> None:
    """A session of a role is limited by the server, whatever the program that opened it."""
    with guarded.connect(role) as connection:
        found = {name: connection.execute(f"SHOW {name}".encode()).fetchone() for name in expected}

    assert found == {name: (value,) for name, value in expected.items()}


def test_worker_limits_itself_further(guarded: GuardedPostgres) -> None:
    """The engine's own limits hold over those of the role, by a password URL as deployed."""
    settings = Settings()
    engine = create_engine(guarded.url("kino_worker"), limits=settings.session_limits)

    with engine.connect() as connection:
        names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
        found = [connection.execute(sa.text(f"SHOW {name}")).scalar_one() for name in names]

    engine.dispose()
    assert found == ["500ms", "15s", "5s", "30s"]


OUT_OF_BOUNDS = [
    "SET ROLE kino_owner",
    "SET SESSION AUTHORIZATION kino_owner",
    "GRANT kino_owner TO CURRENT_USER",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "CREATE SCHEMA mine",
    "CREATE TABLE kino.mine (n int)",
    "CREATE TABLE public.mine (n int)",
    "CREATE TEMPORARY TABLE mine (n int)",
    "CREATE FUNCTION kino.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION kino.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "ALTER TABLE kino.transfer DISABLE TRIGGER ALL",
    "ALTER TABLE kino.transfer OWNER TO CURRENT_USER",
    "DROP TRIGGER append_only ON kino.transfer",
    "DROP TABLE kino.transfer",
    "DROP SCHEMA kino CASCADE",
    "TRUNCATE kino.transfer",
    "BEGIN; LOCK TABLE kino.charge IN ACCESS EXCLUSIVE MODE",
    "SET session_replication_role = replica",
    "ALTER SYSTEM SET fsync = off",
    "ALTER DATABASE kino SET synchronous_commit = off",
    "COPY kino.charge TO PROGRAM 'cat'",
    "COPY kino.charge TO '/tmp/charges'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT pg_reload_conf()",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kino_owner'",
    "SELECT passwd FROM pg_shadow",
]


@pytest.mark.parametrize("statement", OUT_OF_BOUNDS)
@pytest.mark.parametrize("role", ["kino_worker", "kino_product", "kino_read"])
def test_role_cannot_leave_its_bounds(guarded: GuardedPostgres, role: str, statement: str) -> None:
    """No role that runs becomes the owner, makes or drops anything, or reaches the server behind the ledger."""
    with (
        guarded.connect("kino_owner"),
        guarded.connect(role) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


@pytest.mark.parametrize("role", ["kino_worker", "kino_product", "kino_read"])
def test_only_the_owner_migrates(guarded: GuardedPostgres, role: str) -> None:
    """`migrate` with another role's URL is refused before it changes anything."""
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        migrate(guarded.url(role))


def test_owner_is_no_superuser(guarded: GuardedPostgres) -> None:
    """The owner's password opens the ledger's schema, and neither the server nor other roles."""
    with guarded.connect("kino_owner") as connection:
        for statement in (
            "CREATE ROLE mine",
            "CREATE DATABASE mine",
            "ALTER SYSTEM SET fsync = off",
            "SET ROLE postgres",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
