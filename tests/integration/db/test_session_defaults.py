"""Whatever a role, a database or the environment sets by default, events settle and every answer is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from psycopg import sql

from kino_refunds.cli import main as cli
from kino_refunds.db.engine import PINNED, SEARCH_PATH, SessionLimits, create_engine
from kino_refunds.db.migrate import head_revision, migrate
from kino_refunds.demo import promises
from kino_refunds.ledger import Balance
from tests.command_line import Run
from tests.conftest import Database
from tests.integration.db.odd_defaults import DEFAULTS, EMOJI, LATEST
from tests.scenario import Scene, make_event

VARIABLES: Sequence[tuple[str, str]] = (
    ("PGDATESTYLE", "German"),
    ("PGTZ", "Asia/Tokyo"),
    ("PGCLIENTENCODING", "LATIN1"),
    ("PGCLIENTENCODING", "no such encoding"),
    ("PGGEQO", "off"),
    ("PGAPPNAME", "somebody"),
)
OURS = ("kino_worker", "kino_owner")

SHADOWS = (
    "CREATE SCHEMA shadow",
    "GRANT USAGE ON SCHEMA shadow TO PUBLIC",
    *(
        f"CREATE FUNCTION shadow.{name} LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'shadow of {name}'; END $$"
        for name in (
            "clock_timestamp() RETURNS timestamptz",
            "now() RETURNS timestamptz",
            "unnest(text[]) RETURNS SETOF text",
            "pg_current_snapshot() RETURNS pg_snapshot",
            "pg_is_in_recovery() RETURNS boolean",
            "has_table_privilege(oid, text) RETURNS boolean",
        )
    ),
)


def set_default(scene: Scene, scope: str, name: str, value: str) -> None:
    """Set a default of the database, or of our roles in it; both go with the database."""
    database = sql.Identifier(scene.worker.url.database or "")
    values = sql.SQL(", ").join(map(sql.Literal, value.split(", ") if name == "search_path" else [value]))
    targets = [sql.SQL("DATABASE {}").format(database)]
    if scope == "role":
        targets = [sql.SQL("ROLE {} IN DATABASE {}").format(sql.Identifier(role), database) for role in OURS]
    with scene.superuser.connect() as connection:
        raw: Any = connection.connection.driver_connection
        for target in targets:
            raw.execute(sql.SQL("ALTER {} SET {} = {}").format(target, sql.Identifier(name), values))
        raw.commit()


def reset_defaults(scene: Scene) -> None:
    """Take back what `set_default` set."""
    database = scene.worker.url.database
    for target in (f"DATABASE {database}", *(f"ROLE {role} IN DATABASE {database}" for role in OURS)):
        scene.as_superuser(f"ALTER {target} RESET ALL")


@pytest.fixture
def told(scene: Scene) -> Scene:
    """A ledger with something in every answer: charges of every ending, a parked event, a letter, old and far times."""
    scene.as_superuser(*SHADOWS)
    scene.grant("acct-1", 500, expires_at=LATEST)
    scene.grant("acct-2", 500, reference="promo", expires_at=None)
    for job_id in ("refunded", "captured", "open", EMOJI):
        scene.open(job_id, "acct-1")
    scene.settle(
        make_event("failed platform", "refunded"),
        make_event("completed", "captured"),
        make_event("timeout", EMOJI),
        make_event("timeout", "without a charge"),
    )
    scene.settle(make_event("completed", "captured", event_id="refunded failed platform"))
    return scene


JOBS = ("refunded", EMOJI, "without a charge")
CHANGING = frozenset({"at", "missed_runs", "late_runs"})
"""What `status` says of this very moment."""


def answers(run: Run) -> dict[str, Any]:
    """Ask every command that reads the ledger; what changes by itself is left out."""
    said: dict[str, Any] = {}
    for command in (
        *(("why", job_id) for job_id in JOBS),
        ("balance", "acct-1"),
        ("balance", "acct-1", "--at", "2026-01-01T00:00:00Z"),
        ("statement", "acct-1"),
        ("retries", "list"),
        ("dead-letters", "list"),
        ("breaks", "list"),
        ("overdue", "run", "--dry-run"),
    ):
        result = run(*command, "--json")
        said[" ".join(command)] = (result.code, result.json if result.out else None, result.err)
    status = run("status", "--json")
    said["status"] = {name: value for name, value in status.json.items() if name not in CHANGING}
    doctor = run("doctor", "--json")
    said["doctor"] = {item["check"]: item["level"] for item in doctor.json["items"] if item["check"] != "beat"}
    return said


def settle_one(scene: Scene, number: int) -> tuple[list[str], Balance]:
    """Charge a job and settle its event, in fresh sessions and with an id that few encodings have."""
    scene.product.dispose()
    scene.worker.dispose()
    job_id = f"{EMOJI} {number}"
    scene.open(job_id, "acct-2")
    return scene.settle(make_event("failed platform", job_id)), scene.balance("acct-2")


@pytest.mark.parametrize("scope", ["role", "database"])
def test_a_default_of_a_role_or_a_database_changes_no_answer(told: Scene, run: Run, scope: str) -> None:
    """Under each default of the list every command says what it said before, and an event settles."""
    baseline = answers(run)
    said, settled = {}, {}

    for number, default in enumerate(DEFAULTS):
        set_default(told, scope, *default)
        said[default] = answers(run)
        settled[default] = settle_one(told, number)
        reset_defaults(told)

    assert settled == dict.fromkeys(DEFAULTS, (["refunded"], Balance(500, 0)))
    assert differing(said, baseline) == {}


def differing(said: Mapping[tuple[str, str], dict[str, Any]], baseline: dict[str, Any]) -> dict[Any, Any]:
    """Say which answer of which default is another one than without it."""
    return {
        (default, question): answer
        for default, answered in said.items()
        for question, answer in answered.items()
        if answer != baseline[question]
    }


def test_a_default_of_the_environment_changes_no_answer(told: Scene, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGOPTIONS with each default of the list, and libpq's own variables, change nothing either."""
    baseline = answers(run)
    options = {default: f"-c {default[0]}={default[1].replace(' ', chr(92) + ' ')}" for default in DEFAULTS}
    said, settled = {}, {}

    for number, default in enumerate((*DEFAULTS, *VARIABLES)):
        with monkeypatch.context() as environment:
            if default in options:
                environment.setenv("PGOPTIONS", options[default])
            else:
                environment.setenv(*default)
            said[default] = answers(run)
            settled[default] = settle_one(told, number)

    assert settled == dict.fromkeys((*DEFAULTS, *VARIABLES), (["refunded"], Balance(500, 0)))
    assert differing(said, baseline) == {}


def test_every_session_of_ours_has_the_values_that_are_pinned(told: Scene, database: Database) -> None:
    """What a role sets by default is overridden for a worker and for migrations; a job source keeps its search_path."""
    for name, value in DEFAULTS:
        set_default(told, "role", name, value)
    engines = [create_engine(database.url()), create_engine(database.url(), holds_ledger=False)]
    limits = SessionLimits()

    found = []
    for engine in engines:
        with engine.connect() as connection:
            found.append({name: shown(connection, name) for name in (*dict(DEFAULTS), "server_encoding")})
        engine.dispose()

    assert found[0] == {
        **PINNED,
        "client_encoding": "UTF8",
        "server_encoding": "UTF8",
        "search_path": SEARCH_PATH,
        "statement_timeout": f"{limits.statement_timeout_ms // 1000}s",
        "lock_timeout": f"{limits.lock_timeout_ms}ms",
        "idle_in_transaction_session_timeout": f"{limits.idle_in_transaction_timeout_ms // 1000}s",
        "transaction_timeout": f"{limits.transaction_timeout_ms // 1000}s",
        # What changes no answer stays as the server has it.
        "extra_float_digits": "-15",
        "plan_cache_mode": "force_custom_plan",
    }
    assert found[1] == {**found[0], "search_path": "shadow, pg_catalog"}


def shown(connection: sa.Connection, name: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())


def test_a_database_of_odd_defaults_is_migrated(database: Database) -> None:
    """An owner whose sessions begin read-only, with a second for a statement and other styles, still migrates."""
    name = f"{database.name}_new"
    postgres = database.servers.postgres
    database.servers.create_database(name)
    try:
        with postgres.connect() as superuser:
            for setting, value in dict(DEFAULTS).items():
                superuser.execute(
                    sql.SQL("ALTER ROLE kino_owner IN DATABASE {} SET {} = {}").format(
                        sql.Identifier(name), sql.Identifier(setting), sql.Literal(value)
                    )
                )

        done = migrate(database.servers.database_url(role="kino_owner", database=name))

        assert done == (None, head_revision())
    finally:
        with postgres.connect() as superuser:
            superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_the_referee_reads_the_same_in_every_environment(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's judge, which shares no line with what it judges, pins its own sessions."""
    for name, value in (("PGDATESTYLE", "German"), ("PGTZ", "Asia/Tokyo"), ("PGCLIENTENCODING", "LATIN1")):
        monkeypatch.setenv(name, value)

    with promises._connect(database.url().replace("+psycopg", "")) as connection:
        row = connection.execute("SELECT CAST(%s AS timestamptz), CAST(%s AS text)", [LATEST, EMOJI]).fetchone()

    assert row == (LATEST, EMOJI)


OWN_SESSIONS = {
    "kino_refunds/db/engine.py": "pins",
    "kino_refunds/demo/promises.py": "pins its own",
    "kino_refunds/dev/embedded.py": "reads no times, and only from servers of its own",
}


def test_nothing_opens_a_session_past_the_pins() -> None:
    """What connects to Postgres goes through the one engine, or is named here with the reason why not."""
    root = Path(cli.__file__).parents[2]
    found = {
        str(path.relative_to(root))
        for room in ("kino_refunds", "workers", "deploy")
        for path in (root / room).rglob("*.py")
        if re.search(r"\b(sa|sqlalchemy)\.create_engine\(|psycopg\.connect\(", path.read_text(encoding="utf-8"))
    }

    assert found == OWN_SESSIONS.keys()
