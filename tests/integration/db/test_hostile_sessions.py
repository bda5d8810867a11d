"""Sessions that put their own objects and settings in the way of the ledger: every outcome stays the honest one."""

from __future__ import annotations

from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Database
from tests.integration.db.past import act, arrange, books, call, findings
from tests.integration.db.rights import ATTACKERS, Statements, names, rows
from tests.ledger_items import Connection, a_charge, session

# --- a ledger with a past --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def honest_outcomes() -> dict[str, Any]:
    """What each role's work comes to in a session that does nothing else, once it was tried."""
    return {}


# --- hostile sessions ------------------------------------------------------------------------------------------


FORGED_CREDITS = 1_000_000
FORGERIES: Final = (
    f"UPDATE pg_temp.credit_lot SET granted = {FORGED_CREDITS}, remaining = {FORGED_CREDITS}, state = 'active'",
    f"UPDATE pg_temp.charge_line SET credits = {FORGED_CREDITS}",
    f"UPDATE pg_temp.charge SET credits = {FORGED_CREDITS}, account_id = 'eve'",
    f"UPDATE pg_temp.open_charge SET credits = {FORGED_CREDITS}",
    "UPDATE pg_temp.account SET status = 'active'",
    "UPDATE pg_temp.ledger_setting SET lot_grace_days = 365000",
    "DELETE FROM pg_temp.settlement",
    "DELETE FROM pg_temp.correction",
)
"""What the temporary tables claim: a million credits in each lot, and no charge settled yet."""

HIJACK = "BEGIN RAISE EXCEPTION 'hijacked as %', current_user; END"
"""Of a function that must never run."""

OURS_FIRST = "SET search_path = pg_temp, kino, pg_catalog"


def literal(text: str, connection: Connection) -> str:
    return sql.Literal(text).as_string(connection)


def forged_tables(superuser: Connection, prefix: str = "") -> Statements:
    """Write temporary tables with the name, the columns and the rows of each of ours, and forge them."""
    query = """
        SELECT c.relname, string_agg(format('%I %s', a.attname, format_type(a.atttypid, NULL)), ', ' ORDER BY a.attnum)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind IN ('r', 'v') GROUP BY c.relname
    """
    statements: Statements = []
    for table, definition in rows(superuser, query):
        statements.append(f"CREATE TEMP TABLE {prefix}{table} ({definition})")
        statements += [
            f"INSERT INTO pg_temp.{prefix}{table} SELECT ({literal(row, superuser)}::pg_temp.{prefix}{table}).*"
            for row in names(superuser, f"SELECT t::text FROM kino.{table} t")
        ]
    return statements + [statement.replace("pg_temp.", f"pg_temp.{prefix}") for statement in FORGERIES]


def temp_tables(superuser: Connection) -> Statements:
    return forged_tables(superuser)


def temp_views(superuser: Connection) -> Statements:
    tables = names(
        superuser, "SELECT relname FROM pg_class WHERE relnamespace = 'kino'::regnamespace AND relkind = 'r'"
    )
    views = [f"CREATE TEMP VIEW {table} AS SELECT * FROM pg_temp.forged_{table}" for table in tables]
    return [*forged_tables(superuser, "forged_"), *views]


def temp_triggers(superuser: Connection) -> Statements:
    """Let a function of the attacker's run at every touch of temporary tables with our names."""
    tables = names(
        superuser, "SELECT relname FROM pg_class WHERE relnamespace = 'kino'::regnamespace AND relkind = 'r'"
    )
    function = f"CREATE FUNCTION pg_temp.hijack() RETURNS trigger LANGUAGE plpgsql AS $${HIJACK}$$"
    triggers = [
        f"CREATE TRIGGER hijack BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON pg_temp.{table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION pg_temp.hijack()"
        for table in tables
    ]
    return [*forged_tables(superuser), function, *triggers]


def temp_functions_of_ours(superuser: Connection) -> Statements:
    """Write functions with the name and the arguments of each of ours."""
    query = """
        SELECT format('CREATE FUNCTION pg_temp.%I(%s) RETURNS %s', proname, pg_get_function_arguments(oid),
                      pg_get_function_result(oid))
        FROM pg_proc WHERE pronamespace = 'kino'::regnamespace
    """
    return [f"{head} LANGUAGE plpgsql AS $${HIJACK}$$" for head in names(superuser, query)]


def temp_functions_of_postgres(superuser: Connection) -> Statements:
    """Write functions with the name and the arguments of each function of Postgres' own that ours call."""
    query = """
        WITH called AS (
            SELECT DISTINCT m[1] AS name FROM pg_proc p, regexp_matches(p.prosrc, '([a-z_]+)\\(', 'g') AS m
            WHERE p.pronamespace = 'kino'::regnamespace
        )
        SELECT format('CREATE FUNCTION pg_temp.%I(%s) RETURNS %s', p.proname, pg_get_function_identity_arguments(p.oid),
                      CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL))
        FROM called JOIN pg_proc p ON p.proname = called.name AND p.pronamespace = 'pg_catalog'::regnamespace
        WHERE p.prokind = 'f' AND NOT EXISTS (
            SELECT FROM unnest(p.proargtypes || p.prorettype) AS a (type) JOIN pg_type t ON t.oid = a.type
            WHERE t.typtype = 'p' AND t.typname NOT LIKE 'any%' OR t.typname = 'any')
          AND (p.prorettype <> ALL ('{anyelement,anyarray}'::regtype[]) OR p.pronargs > 0)
          AND p.proargmodes IS NULL
    """
    heads = names(superuser, query)
    assert len(heads) > 20, "the attack must know what our functions call"
    aggregates = [
        f"CREATE AGGREGATE pg_temp.{name}(bigint) (SFUNC = pg_temp.add, STYPE = bigint)"
        for name in ("sum", "min", "max", "count", "array_agg")
    ]
    return [
        *(f"{head} LANGUAGE plpgsql AS $${HIJACK}$$" for head in heads),
        f"CREATE FUNCTION pg_temp.add(bigint, bigint) RETURNS bigint LANGUAGE plpgsql AS $${HIJACK}$$",
        *aggregates,
    ]


def temp_types(_: Connection) -> Statements:
    """Write types, with the names of those that our functions use, that hold no value at all."""
    used = "text int8 int4 int2 bool timestamptz interval jsonb numeric xid8 record bigint integer boolean smallint"
    return [f'CREATE DOMAIN pg_temp."{name}" AS pg_catalog.text CHECK (false)' for name in used.split()]


def temp_operators(_: Connection) -> Statements:
    """Write operators for the types that our functions compare and add."""
    operators = ["=", "<>", "<", ">", "<=", ">=", "+", "-", "||", "~", "!~", "->", "->>", "#>>", "?", "?&", "@>"]
    types = ("text", "int8", "int4", "jsonb", "timestamptz", "text[]", "int8[]")
    statements = [
        f"CREATE FUNCTION pg_temp.hijack({left}, {right}) RETURNS boolean LANGUAGE plpgsql AS $${HIJACK}$$"
        for left in types
        for right in types
    ]
    return statements + [
        f"CREATE OPERATOR pg_temp.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = pg_temp.hijack)"
        for operator in operators
        for left in types
        for right in types
    ]


def temp_casts(_: Connection) -> Statements:
    """Write a type that turns into text and JSON by a function of the attacker."""
    return [
        "CREATE TYPE pg_temp.odd AS (a text)",
        f"CREATE FUNCTION pg_temp.hijack(pg_temp.odd) RETURNS text LANGUAGE plpgsql AS $${HIJACK}$$",
        "CREATE CAST (pg_temp.odd AS text) WITH FUNCTION pg_temp.hijack(pg_temp.odd) AS IMPLICIT",
        f"CREATE FUNCTION pg_temp.hijack_json(pg_temp.odd) RETURNS jsonb LANGUAGE plpgsql AS $${HIJACK}$$",
        "CREATE CAST (pg_temp.odd AS jsonb) WITH FUNCTION pg_temp.hijack_json(pg_temp.odd) AS IMPLICIT",
    ]


def no_plans(superuser: Connection) -> Statements:
    """Forbid every plan node that a session can forbid."""
    return [f"SET {name} = off" for name in names(superuser, "SELECT name FROM pg_settings WHERE name LIKE 'enable%'")]


SHADOWS: Final = (
    temp_tables,
    temp_views,
    temp_triggers,
    temp_functions_of_ours,
    temp_functions_of_postgres,
    temp_types,
    temp_operators,
    temp_casts,
)
SETTINGS: Final = (
    "search_path = pg_temp, kino",
    "search_path = nowhere",
    "TimeZone = 'Asia/Tokyo'",
    "TimeZone = '<Z>-5'",
    "timezone_abbreviations = 'India'",
    "DateStyle = 'German'",
    "IntervalStyle = 'sql_standard'",
    "extra_float_digits = -15",
    "standard_conforming_strings = off",
    "transform_null_equals = on",
    "array_nulls = off",
    "quote_all_identifiers = on",
    "bytea_output = 'escape'",
    "lock_timeout = '1ms'",
    "plan_cache_mode = force_generic_plan",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_isolation = 'repeatable read'",
)


def honest_outcome(database: Database, role: str) -> Any:
    arrange(database)
    with (
        session(database, role, autocommit=True) as honest,
        session(database, "postgres", autocommit=True) as superuser,
    ):
        return act(honest, role), books(superuser)


def hostile_outcome(database: Database, role: str, statements: Statements) -> Any:
    with (
        session(database, role, autocommit=True) as hostile,
        session(database, "postgres", autocommit=True) as superuser,
    ):
        with hostile.transaction():
            for statement in statements:
                hostile.execute(statement.encode())
        return act(hostile, role), books(superuser)


@pytest.fixture
def honest(embedded: Any, postgres_template: str, honest_outcomes: dict[str, Any], role: str) -> Any:
    """What this role's work comes to in an honest session, on the same ledger."""
    if role not in honest_outcomes:
        name = f"honest_{role}"
        with embedded.postgres.connect() as postgres:
            postgres.execute(f"CREATE DATABASE {name} TEMPLATE {postgres_template} OWNER kino_owner".encode())
        honest_outcomes[role] = honest_outcome(Database(name, embedded), role)
        with embedded.postgres.connect() as postgres:
            postgres.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    return honest_outcomes[role]


@pytest.mark.parametrize("role", ATTACKERS)
@pytest.mark.parametrize("shadows", SHADOWS, ids=lambda shadows: shadows.__name__)
def test_temporary_objects_with_our_names_are_not_seen(
    arranged: Database, superuser: Connection, honest: Any, role: str, shadows: Any
) -> None:
    """A session with forged tables, views, functions, types or operators gets what an honest one gets, and no more."""
    statements = [*shadows(superuser), OURS_FIRST]

    found = hostile_outcome(arranged, role, statements)

    assert (found, findings(arranged)) == (honest, [])


@pytest.mark.parametrize("role", ATTACKERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_session_changes_nothing(arranged: Database, honest: Any, role: str, setting: str) -> None:
    """With any setting of the session, its calls read the same items, answer the same and leave the same rows."""
    found = hostile_outcome(arranged, role, [f"SET {setting}"])

    assert (found, findings(arranged)) == (honest, [])


@pytest.mark.parametrize("role", ATTACKERS)
def test_a_session_without_plans_changes_nothing(
    arranged: Database, superuser: Connection, honest: Any, role: str
) -> None:
    """With every plan node forbidden in the session, calls answer the same and leave the same rows."""
    found = hostile_outcome(arranged, role, no_plans(superuser))

    assert (found, findings(arranged)) == (honest, [])


BAD_INSTANTS = (
    "2030-01-01T00:00:00x5Z",
    "2030-01-01T00:00:00:5Z",
    "2030-01-01T00:00:00+5Z",
    "2030-01-01T00:00:00\t5Z",
    "01.02.2030 00:00:00 +00",
)
BAD_IDS = ("a\u0001b", "a\u007fé", "a\u200bb", "a\u202eb", "a\u00a0", "a\U000e0001")


@pytest.mark.parametrize(
    "setting", ["standard_conforming_strings = off", "DateStyle = 'German'", "TimeZone = '<Z>-5'", "jit = on"]
)
def test_a_setting_of_the_session_lets_no_bad_item_in(arranged: Database, setting: str) -> None:
    """An id or an instant that is refused in one session is refused in every other, by the same error."""
    good = a_charge("new")
    bad = [
        *({**good, "deadline_at": instant} for instant in BAD_INSTANTS),
        *({**good, "job_id": id_} for id_ in BAD_IDS),
        *({**good, "actor": actor} for actor in ("a\u0001b", "a\u007fb")),
    ]

    found: list[Any] = []
    with session(arranged, "kino_product", autocommit=True) as hostile:
        hostile.execute(f"SET {setting}".encode())
        for item in bad:
            try:
                found.append((item, call(hostile, "open_charges", [item])))
            except psycopg.Error as error:
                found.append((item, error.sqlstate))

    assert found == [(item, "KR006") for item in bad]
