"""Whatever is wrong with Postgres or its URL: one clear line, an exit code that means it, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import structlog
from psycopg import sql

from kino_refunds.db.engine import create_engine
from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.dev.processes import environment_of
from tests.command_line import Result, Run
from tests.conftest import Database
from tests.scenario import Scene
from workers import tasks

ACCOUNT = "acct-1"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("status",),
    ("why", "job-1"),
    ("balance", ACCOUNT),
    ("balance", ACCOUNT, "--at", "2026-01-01T00:00:00Z"),
    ("statement", ACCOUNT),
    ("grant", ACCOUNT, "1", "--reference", "r"),
    ("intake", "status"),
    ("intake", "resume"),
    ("retries", "list"),
    ("retries", "run-now"),
    ("dead-letters", "list"),
    ("dead-letters", "show", "1"),
    ("breaks", "list"),
    ("schedule",),
    ("overdue", "run"),
    ("migrate",),
)
ANSWERED, FINDING, USAGE, AWAY = 0, 1, 2, 3
OPTIONS = sorted(option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults())


def is_one_clear_line(result: Result) -> bool:
    """Tell whether a command that failed said one line, on standard error and nowhere else."""
    return result.out == "" and result.err.startswith("error: ") and result.err.count("\n") == 1


def unclear(run: Run, url: str, *codes: int, **environment: str) -> dict[str, Result]:
    """Run commands of each way to connect against a URL; return those that end otherwise than they should."""
    wrong = {}
    for command in (("balance", ACCOUNT), ("why", "job-1"), ("migrate",), ("doctor",)):
        urls = {"KINO_DATABASE_URL": url, "KINO_MIGRATION_DATABASE_URL": url}
        result = run(*command, stdin=b"", **urls, **environment)
        clear = command == ("doctor",) or is_one_clear_line(result)
        if not clear or result.code not in codes:
            wrong[command[0]] = result
    return wrong


# --- the URL


def test_no_option_of_libpq_ends_in_a_traceback(run: Run) -> None:
    """Each option of the driver with a value that it cannot have is said in one line."""
    urls = {option: f"postgresql://kino_worker@127.0.0.1:1/kino?{option}=nonsense" for option in OPTIONS}

    wrong = {option: unclear(run, url, USAGE if option == "port" else AWAY) for option, url in urls.items()}

    assert {option: found for option, found in wrong.items() if found} == {}


URLS = {
    "port 0": ("postgresql://kino_worker@127.0.0.1:0/kino", AWAY),
    "port refused": ("postgresql://kino_worker@127.0.0.1:1/kino", AWAY),
    "port too high": ("postgresql://kino_worker@127.0.0.1:99999/kino", AWAY),
    "port below zero": ("postgresql://kino_worker@127.0.0.1:-1/kino", AWAY),
    "port a word": ("postgresql://kino_worker@127.0.0.1:port/kino", USAGE),
    "port a word, as an option": ("postgresql://kino_worker@127.0.0.1/kino?port=port", USAGE),
    "empty password": ("postgresql://kino_worker:@127.0.0.1:1/kino", AWAY),
    "IPv6": ("postgresql://kino_worker@[::1]:1/kino", AWAY),
    "IPv6 cut off": ("postgresql://kino_worker@[::1/kino", USAGE),
    "a socket": ("postgresql://kino_worker@/kino?host=/nowhere", AWAY),
    "hosts": ("postgresql://kino_worker@/kino?host=127.0.0.1,127.0.0.1&port=1,1", AWAY),
    "hosts, each with its port": ("postgresql://kino_worker@/kino?host=127.0.0.1:1&host=127.0.0.1:1", AWAY),
    "hosts and too many ports": ("postgresql://kino_worker@/kino?host=127.0.0.1,127.0.0.1&port=1,1,1", USAGE),
    "hosts in two ways": ("postgresql://kino_worker@/kino?host=127.0.0.1&host=127.0.0.1&port=1&port=1", USAGE),
    "hosts before the path": ("postgresql://kino_worker@127.0.0.1:1,127.0.0.1:1/kino", USAGE),
    "a host with an empty part": ("postgresql://kino_worker@postgres..example/kino", AWAY),
    "a host with a part of 300": (f"postgresql://kino_worker@{'a' * 300}/kino", AWAY),
    "a host of no letters": ("postgresql://kino_worker@\U0001f3ac/kino", AWAY),
    "no root certificate": ("postgresql://kino_worker@127.0.0.1:1/kino?sslmode=verify-full&sslrootcert=/nowhere", AWAY),
    "a service that is not there": ("postgresql:///?service=nowhere", AWAY),
    "NUL in the user": ("postgresql://kino%00worker@127.0.0.1:1/kino", USAGE),
    "NUL in the database": ("postgresql://kino_worker@127.0.0.1:1/kino%00", USAGE),
    "not UTF-8": ("postgresql://kino%ff@127.0.0.1:1/kino", AWAY),
    "another driver": ("postgresql+asyncpg://kino_worker@127.0.0.1:1/kino", USAGE),
    "another server": ("mysql://kino_worker@127.0.0.1:1/kino", USAGE),
    "an option of SQLAlchemy's": ("postgresql://kino_worker@127.0.0.1:1/kino?prepare_threshold=0", USAGE),
    "blank": (" ", USAGE),
    "no URL": ("kino", USAGE),
}


@pytest.mark.parametrize("what", URLS)
def test_a_url_that_leads_nowhere_is_said_in_one_line(run: Run, what: str) -> None:
    """A URL that cannot be read is wrong usage (2), one that leads to no server means that it is away (3)."""
    url, code = URLS[what]

    assert unclear(run, url, code) == {}


VARIABLES = {
    "PGHOST": "postgres..example",
    "PGDATESTYLE": "nonsense",
    "PGTZ": "Mars",
    "PGOPTIONS": "-c nonsense=1",
    "PGSERVICE": "nowhere",
    "PGSSLMODE": "nonsense",
    "PGTARGETSESSIONATTRS": "nonsense",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_libpq_is_said_in_one_line(run: Run, database: Database, name: str) -> None:
    """What the environment adds to the URL can be as wrong as the URL itself."""
    server = {"PGHOST": LOOPBACK, "PGPORT": str(database.servers.postgres_port), "PGUSER": "kino_worker"}
    environment = {**server, name: VARIABLES[name]}

    assert unclear(run, f"postgresql:///{database.name}", AWAY, **environment) == {}


SOURCES = {
    "blank": " ",
    "no URL": "jobs",
    "another driver": "postgresql+asyncpg://reader@127.0.0.1:1/jobs",
    "another server": "mysql://reader@127.0.0.1:1/jobs",
    "port a word": "postgresql://reader@127.0.0.1/jobs?port=port",
}


@pytest.mark.parametrize("what", SOURCES)
def test_the_job_source_s_url_is_read_as_strictly(run: Run, what: str) -> None:
    """The database of the source `sql` has the same kind of URL, and the same line where it cannot be read."""
    source = {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": SOURCES[what],
        "KINO_JOB_SOURCE_QUERY": "SELECT unnest(:job_ids) AS job_id, 'running' AS state",
    }

    asked, doctor = run("overdue", "run", stdin=b"", **source), run("doctor", stdin=b"", **source)

    assert is_one_clear_line(asked)
    assert "KINO_JOB_SOURCE_URL" in asked.err
    assert (asked.code, doctor.code) == (USAGE, USAGE)


# --- the server


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def foreign(request: pytest.FixtureRequest, database: Database) -> Iterator[Database]:
    """A database that is not encoded in UTF8, with our roles."""
    encoding: str = request.param
    name = f"{database.name}_{encoding.lower()}"
    with database.servers.postgres.connect() as superuser:
        superuser.execute(
            sql.SQL(
                "CREATE DATABASE {} OWNER kino_owner ENCODING {} TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER libc"
            ).format(sql.Identifier(name), sql.Literal(encoding))
        )
    yield Database(name, database.servers)
    with database.servers.postgres.connect() as superuser:
        superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_a_database_that_is_not_utf8_is_refused_by_name(run: Run, foreign: Database) -> None:
    """Every command names the database, its encoding and what to do, before anything is written there."""
    urls = {
        "KINO_DATABASE_URL": foreign.url(),
        "KINO_PRODUCT_DATABASE_URL": foreign.url("kino_product"),
        "KINO_MIGRATION_DATABASE_URL": foreign.url("kino_owner"),
    }
    encoding = foreign.name.partition("_")[2].partition("_")[2].upper()

    said = {command: run(*command, stdin=b"", **urls) for command in COMMANDS}
    doctor = run("doctor", "--json", stdin=b"", **urls)

    refusal = f"database {foreign.name} is encoded in {encoding}, the ledger needs UTF8: CREATE DATABASE …"
    assert {command: result for command, result in said.items() if not is_one_clear_line(result)} == {}
    assert {result.code for result in said.values()} == {AWAY}
    assert all(refusal in result.err for result in said.values())
    assert doctor.code == FINDING
    assert [item["level"] for item in doctor.json["items"] if refusal in item["found"]] == ["fail"]


Plant = Callable[[Scene, str], None]


def statements(*planted: str) -> Plant:
    """Change the server as superuser; DB is this test's database."""
    return lambda scene, name: scene.as_superuser(*(each.replace("DB", name) for each in planted))


TROUBLES: dict[str, tuple[Plant, int]] = {
    "no ledger": (statements("DROP SCHEMA kino CASCADE"), AWAY),
    "no right to look": (statements("REVOKE USAGE ON SCHEMA kino FROM kino_worker"), AWAY),
    "no right to read": (statements("REVOKE SELECT ON ALL TABLES IN SCHEMA kino FROM kino_worker, kino_read"), AWAY),
    "no right to connect": (statements("REVOKE CONNECT ON DATABASE DB FROM kino_worker, PUBLIC"), AWAY),
    "too many connections": (statements("ALTER DATABASE DB CONNECTION LIMIT 0"), AWAY),
    "a role that may not log in": (statements("ALTER ROLE kino_worker NOLOGIN"), AWAY),
    "no view": (statements("DROP VIEW kino.account_balance", "DROP VIEW kino.charge_status"), AWAY),
    "a column of another build": (statements("ALTER TABLE kino.account RENAME COLUMN account_id TO id"), AWAY),
    "no row of the gate": (statements("DELETE FROM kino.intake_state"), FINDING),
    "two revisions": (statements("INSERT INTO kino.alembic_version VALUES ('0001')"), FINDING),
    "no revision": (statements("DELETE FROM kino.alembic_version"), AWAY),
    "a revision of another time": (statements("UPDATE kino.alembic_version SET version_num = '0001'"), AWAY),
    "a foreign table of revisions": (
        statements("DROP TABLE kino.alembic_version", "CREATE TABLE kino.alembic_version (x integer)"),
        AWAY,
    ),
    "a time that Python has not": (statements("UPDATE kino.intake_state SET changed_at = 'infinity'"), FINDING),
}


@pytest.fixture
def mended(database: Database) -> Iterator[None]:
    """Take back what concerns the role and not the database."""
    yield
    with database.servers.postgres.connect() as superuser:
        superuser.execute("ALTER ROLE kino_worker LOGIN")


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("what", TROUBLES)
def test_trouble_of_the_server_is_said_in_one_line(run: Run, scene: Scene, database: Database, what: str) -> None:
    """Whatever a command meets, it answers, or it ends with one line and the exit code that means it."""
    scene.grant(ACCOUNT)
    scene.open("job-1", ACCOUNT)
    plant, code = TROUBLES[what]
    plant(scene, database.name)

    said = {command: run(*command) for command in COMMANDS}
    doctor = run("doctor", "--json")

    failed = {command: result for command, result in said.items() if result.err}
    assert {command: result for command, result in failed.items() if not is_one_clear_line(result)} == {}
    # `show 1` finds no letter, which is a finding, wherever it gets an answer.
    assert {result.code for command, result in failed.items() if command != ("dead-letters", "show", "1")} <= {code}
    assert doctor.code in {FINDING, AWAY}
    assert doctor.err == ""


def test_a_build_that_is_ahead_of_the_schema_says_so(run: Run, scene: Scene) -> None:
    """A column that is not there is no missing server: the line says to migrate."""
    scene.as_superuser("ALTER TABLE kino.break RENAME COLUMN status TO state")

    result = run("breaks", "list")

    assert result.code == AWAY
    assert result.err.startswith("error: the schema is not this build's: ")
    assert "run `kino-refunds migrate` as kino_owner" in result.err


# --- worker and sweeps


@pytest.mark.parametrize(
    "setting",
    [
        {"KINO_DATABASE_URL": ""},
        {"KINO_DATABASE_URL": "kino"},
        {"KINO_DATABASE_URL": "postgresql://kino_worker@127.0.0.1/kino?nonsense=1"},
        {"KINO_REDIS_URL": ""},
        {"KINO_INTAKE_BATCH": "many"},
    ],
    ids=lambda setting: "=".join(*setting.items()),
)
def test_a_worker_with_a_wrong_setting_ends_with_one_line(
    database: Database, redis_url: str, setting: dict[str, str]
) -> None:
    """A worker that cannot begin says which setting it is, and ends with 2; not with Celery's traceback."""
    settings = {"KINO_DATABASE_URL": database.url(), "KINO_REDIS_URL": redis_url, **setting}

    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers.app", "worker"],
        cwd=Path(tasks.__file__).parents[1],
        env=environment_of(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == USAGE
    assert [line.split()[1].rstrip(":") for line in errors] == list(setting)
    assert "Traceback" not in ended.stderr + ended.stdout


def test_a_sweep_without_postgres_is_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away for an hour must not fill the log with tracebacks of every sweep."""
    away = create_engine("postgresql://kino_worker@127.0.0.1:1/kino", pooled=False)
    monkeypatch.setattr(tasks, "_engine", lambda: away)

    with structlog.testing.capture_logs() as lines:
        tasks.sweep_retries()

    [line] = lines
    assert (line["event"], line["task"]) == ("sweep failed: the next run goes on from there", "kino.sweep_retries")
    assert line["error"].startswith("OperationalError: ")
