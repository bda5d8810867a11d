"""Whatever a role, a database or the environment sets by default, events settle and every answer is the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from psycopg import sql

from kino_refunds.cli import main as cli
from kino_refunds.db.engine import PINNED, SEARCH_PATH, SessionLimits, create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.db.migrate import head_revision, migrate
from kino_refunds.demo import promises
from kino_refunds.errors import UnfitSession
from kino_refunds.ledger import (
    Balance,
    ChargeRequest,
    Grant,
    LotClass,
    balance,
    grant_lots,
    open_charge,
    open_charges,
    statement,
)
from tests.clock import sample_at
from tests.command_line import Run
from tests.conftest import Database
from tests.scenario import NOW, Scene, make_event

EMOJI = "\U0001f3ac"
LATEST = datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
"""In Asia/Tokyo it is the year 10000."""
EARLIEST = datetime(1, 1, 1, tzinfo=UTC)

DEFAULTS: Sequence[tuple[str, str]] = (
    ("DateStyle", "SQL, DMY"),
    ("DateStyle", "German"),
    ("DateStyle", "Postgres, MDY"),
    ("IntervalStyle", "iso_8601"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "Asia/Tokyo"),
    ("TimeZone", "America/New_York"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "EUC_JP"),
    ("client_encoding", "SQL_ASCII"),
    ("bytea_output", "escape"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_deferrable", "on"),
    ("default_transaction_read_only", "on"),
    ("search_path", "nowhere"),
    ("search_path", "shadow, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("array_nulls", "off"),
    ("extra_float_digits", "-15"),
    ("plan_cache_mode", "force_generic_plan"),
    ("plan_cache_mode", "force_custom_plan"),
    ("statement_timeout", "1s"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "1s"),
    ("transaction_timeout", "1s"),
    ("idle_session_timeout", "50ms"),
)
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
    "kino_refunds/embedded.py": "reads no times, and only from servers of its own",
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


# --- what runs on the product's own connections

PRODUCT_DEFAULTS = [
    default
    for default in DEFAULTS
    # What the product may not be served by: a session that writes nothing or gives bytes for text, and functions that
    # it put before Postgres' own.
    if default
    not in {
        ("default_transaction_read_only", "on"),
        ("client_encoding", "SQL_ASCII"),
        ("search_path", "shadow, pg_catalog"),
        ("array_nulls", "off"),
    }
]


@contextmanager
def product_session(database: Database, *settings: tuple[str, str], **options: Any) -> Iterator[sa.Connection]:
    """A connection as the product opens it: none of our pins, and these settings of its own."""
    engine = sa.create_engine(database.url("kino_product"), poolclass=sa.NullPool, **options)
    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        for name, value in settings:
            raw.execute("SELECT set_config(%s, %s, false)", [name, value])
        raw.commit()
        yield connection


def use_the_ledger(connection: sa.Connection, name: str) -> dict[str, Any]:
    """Grant, charge, do both again, and read everything back."""
    grants = [
        Grant(f"late {name}", name, 10, LotClass.PURCHASED, expires_at=LATEST),
        Grant(f"never {name}", name, 10, LotClass.SUBSCRIPTION, purchase_id="p-1"),
        Grant(f"early {name}", name, 10, LotClass.COURTESY, expires_at=NOW + timedelta(days=36_500, microseconds=1)),
    ]
    lots = grant_lots(connection, grants)
    charge = open_charge(connection, job_id=f"job {name}", account_id=name, credits=15, deadline_at=LATEST)
    again = open_charge(connection, job_id=f"job {name}", account_id=name, credits=15, deadline_at=EARLIEST)
    lots_again = grant_lots(connection, grants)
    connection.commit()
    sample_at(connection, LATEST)
    lines = statement(connection, name)
    return {
        "lots": [(lot.expires_at, lot.lot_class, lot.remaining) for lot in lots],
        "lots again": [(lot.expires_at, lot.lot_class, lot.remaining) for lot in lots_again],
        "drawn": [
            (next(lot.reference for lot in lots if lot.lot_id == lot_id), taken) for lot_id, taken in charge.lines
        ],
        "the same charge": charge == again,
        "deadline": again.deadline_at,
        "balance": (balance(connection, name), balance(connection, name, at=LATEST)),
        "statement": [(line.kind, line.credits, line.job_id) for line in lines],
        "in UTC": {value.tzinfo for value in (charge.opened_at, again.opened_at, *(line.at for line in lines))},
        "in order": charge.opened_at < max(line.at for line in lines) < datetime.now(UTC) + timedelta(minutes=1),
    }


def test_a_default_of_the_product_s_session_changes_no_answer(database: Database) -> None:
    """Grants, charges, balances and statements are the same in every session of the product, to the microsecond."""
    answered = {}
    for number, default in enumerate(PRODUCT_DEFAULTS):
        with product_session(database, default) as connection:
            answered[default] = use_the_ledger(connection, f"acct-{number}")

    for number, default in enumerate(PRODUCT_DEFAULTS):
        name = f"acct-{number}"
        far = NOW + timedelta(days=36_500, microseconds=1)
        assert answered[default] == {
            "lots": [
                (LATEST, LotClass.PURCHASED, 10),
                (None, LotClass.SUBSCRIPTION, 10),
                (far, LotClass.COURTESY, 10),
            ],
            "lots again": [
                (LATEST, LotClass.PURCHASED, 5),
                (None, LotClass.SUBSCRIPTION, 10),
                (far, LotClass.COURTESY, 0),
            ],
            "drawn": [(f"early {name}", 10), (f"late {name}", 5)],
            "the same charge": True,
            "deadline": LATEST,
            "balance": (Balance(15, 15), Balance(10, 15)),
            "statement": [
                ("grant", 10, None),
                ("grant", 10, None),
                ("grant", 10, None),
                ("hold", -10, f"job {name}"),
                ("hold", -5, f"job {name}"),
            ],
            "in UTC": {UTC},
            "in order": True,
        }, default


@pytest.mark.parametrize("at", [EARLIEST, LATEST, datetime(2026, 7, 1, 12, 30, 0, 1, tzinfo=UTC)])
def test_every_instant_of_the_calendar_is_read_as_it_was_written(database: Database, at: datetime) -> None:
    """From the year 1 to the last microsecond of 9998 nothing is rounded, in a zone where both ends do not exist."""
    for zone in ("Asia/Tokyo", "America/New_York"):
        with product_session(database, ("TimeZone", zone)) as connection:
            grant_lots(connection, [Grant(f"lot {zone}", "acct-1", 1, LotClass.PURCHASED)])
            open_charge(connection, job_id=zone, account_id="acct-1", credits=0, deadline_at=at)

            read = open_charge(connection, job_id=zone, account_id="acct-1", credits=0, deadline_at=NOW).deadline_at

            connection.rollback()
        assert (read, read.tzinfo) == (at, UTC)


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_an_encoding_without_an_id_is_refused_and_leaves_nothing(
    scene: Scene, database: Database, encoding: str
) -> None:
    """The product is told what to set; what it had done in its transaction stands, and nothing of the call does."""
    scene.charged(EMOJI)
    grant = Grant(f"lot {EMOJI}", "acct-1", 10, LotClass.PURCHASED)
    refused = pytest.raises(UnfitSession, match=f"client_encoding {encoding} cannot .* SET client_encoding = 'UTF8'")
    before = scene.everything()

    with product_session(database, ("client_encoding", encoding)) as connection:
        with refused:
            grant_lots(connection, [Grant("fine", "acct-1", 10, LotClass.PURCHASED), grant])
        with refused:
            open_charges(connection, [ChargeRequest(EMOJI, "acct-1", 0, NOW)])
        with refused:
            balance(connection, EMOJI)
        connection.rollback()
        with refused:
            statement(connection, EMOJI)
        connection.commit()

    assert scene.everything() == before


def test_a_text_that_the_session_cannot_be_given_is_refused(scene: Scene, database: Database) -> None:
    """A statement that names a job which the session's encoding lacks says so, and not a character's bytes."""
    scene.grant("acct-1")
    scene.open(EMOJI, "acct-1")

    with product_session(database, ("client_encoding", "LATIN1")) as connection:
        with pytest.raises(UnfitSession, match="client_encoding LATIN1"):
            statement(connection, "acct-1")
        connection.rollback()
        assert balance(connection, "acct-1") == Balance(90, 10)


def test_a_connection_in_autocommit_is_refused_and_leaves_nothing(scene: Scene, database: Database) -> None:
    """All or nothing needs a transaction: without one nothing is begun; reading needs none."""
    scene.grant("acct-1")
    before = scene.everything()

    with product_session(database, isolation_level="AUTOCOMMIT") as connection:
        for act in (
            lambda: grant_lots(connection, [Grant("lot", "acct-1", 10, LotClass.PURCHASED)]),
            lambda: open_charges(connection, [ChargeRequest("job-1", "acct-1", 10, NOW)]),
        ):
            with pytest.raises(UnfitSession, match="the connection is in autocommit"):
                act()
            connection.rollback()
        read = balance(connection, "acct-1"), len(statement(connection, "acct-1"))

    assert read == (Balance(100, 0), 1)
    assert scene.everything() == before


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_is_too_old_is_a_serialization_failure(scene: Scene, database: Database, level: str) -> None:
    """Two transactions draw from one lot: the second is told to try again, and then draws what is left."""
    scene.grant("acct-1", 15)

    with product_session(database, isolation_level=level) as connection:
        assert balance(connection, "acct-1") == Balance(15, 0)  # from here on it sees the ledger as it is now
        scene.open("first", "acct-1", 10)
        with pytest.raises(sa.exc.OperationalError) as raised:
            open_charge(connection, job_id="second", account_id="acct-1", credits=5, deadline_at=NOW)
        connection.rollback()
        charge = open_charge(connection, job_id="second", account_id="acct-1", credits=5, deadline_at=NOW)
        connection.commit()

    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    assert classify(raised.value) is Fault.KEEP
    assert charge.credits == 5
    assert scene.balance("acct-1") == Balance(0, 15)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_same_job_in_an_older_snapshot_is_a_serialization_failure(
    scene: Scene, database: Database, level: str
) -> None:
    """A charge that was opened after our snapshot is no error of its own kind: try again, and it is found."""
    scene.grant("acct-1", 100)

    with product_session(database, isolation_level=level) as connection:
        balance(connection, "acct-1")
        opened = scene.open("job-1", "acct-1", 10)
        with pytest.raises(sa.exc.OperationalError) as raised:
            open_charge(connection, job_id="job-1", account_id="acct-1", credits=10, deadline_at=NOW)
        connection.rollback()
        again = open_charge(connection, job_id="job-1", account_id="acct-1", credits=10, deadline_at=NOW)

    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    assert again == opened
