"""Whatever a role, a database or the environment sets by default, events settle and every answer is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from psycopg import sql

from kino_refunds.ledger import (
    Balance,
)
from tests.command_line import Run
from tests.scenario import Scene, make_event

EMOJI = "\U0001f3ac"
LATEST = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
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
        ("balance", "acct-1", "--at", "2100-01-01T00:00:00Z"),
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
    migrated = run("migrate", "--json")
    said["migrate"] = (migrated.code, migrated.out, migrated.err)
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
