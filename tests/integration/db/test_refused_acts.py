"""Sessions that go beyond their role: each act is refused, and the books stay as they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import psycopg
import pytest

from tests.conftest import INSUFFICIENT_PRIVILEGE, Database
from tests.integration.db.past import books, catalog, findings
from tests.integration.db.rights import (
    ATTACKERS,
    FUNCTION,
    LEDGER,
    LOGINS,
    MAY,
    NO_TRIGGER_CALL,
    NOT_A_TABLE,
    VIEWS,
    Statements,
    columns_of,
    names,
    rows,
)
from tests.ledger_items import Connection, session


def refusal(connection: Connection, statement: str) -> str | None:
    """Say with which SQLSTATE a statement is refused; None if it is not. It leaves nothing behind either way."""
    try:
        with connection.transaction(force_rollback=True):
            if statement.startswith("COPY"):
                with connection.cursor().copy(statement.encode()):
                    pass
            else:
                connection.execute(statement.encode())
    except psycopg.Error as error:
        return error.sqlstate
    return None


def not_refused(
    database: Database, role: str, statements: Iterable[str], *, by: Sequence[str] = (INSUFFICIENT_PRIVILEGE,)
) -> dict[str, str | None]:
    """Try each statement as a role; returns what was not refused by one of these SQLSTATEs."""
    with session(database, role, autocommit=True) as hostile:
        found = {statement: refusal(hostile, statement) for statement in statements}
    return {statement: sqlstate for statement, sqlstate in found.items() if sqlstate not in by}


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_becomes_another(arranged: Database, role: str) -> None:
    """No session switches to another role of ours, to the superuser, or past the triggers."""
    others = [
        other
        for other in (
            "kino_ledger",
            "kino_owner",
            "kino_worker",
            "kino_product",
            "kino_oncall",
            "kino_read",
            "postgres",
        )
        if other != role
    ]
    tries = [
        *(f"SET ROLE {other}" for other in others),
        *(f"SET SESSION AUTHORIZATION {other}" for other in others),
        *(f"GRANT {other} TO {role}" for other in others),
        *(f"ALTER ROLE {other} SET search_path = pg_temp" for other in others),
        "SET session_replication_role = replica",
        "SET session_replication_role = local",
        f"ALTER ROLE {role} CREATEROLE",
        "CREATE ROLE kino_other",
        f"ALTER DATABASE {arranged.name} SET search_path = pg_temp",
    ]

    assert not_refused(arranged, role, tries) == {}


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_creates_anything_outside_its_temporary_schema(
    arranged: Database, superuser: Connection, role: str
) -> None:
    """A session can create nothing outside pg_temp, so a search_path can lead to no other schema of its own."""
    schemas = names(superuser, "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_temp|^pg_toast'")
    tries = [
        "CREATE SCHEMA mine",
        *(f"CREATE TABLE {schema}.t (a text)" for schema in schemas),
        *(f"CREATE FUNCTION {schema}.f() RETURNS text LANGUAGE sql AS 'SELECT NULL::text'" for schema in schemas),
        *(f"CREATE TYPE {schema}.y AS (a text)" for schema in schemas),
    ]

    assert not_refused(arranged, role, tries) == {}


def writes(table: str, columns: Sequence[str]) -> Statements:
    """Every way to write a table, with each of its columns."""
    return [
        f"INSERT INTO kino.{table} DEFAULT VALUES",
        f"DELETE FROM kino.{table}",
        f"TRUNCATE kino.{table}",
        f"TRUNCATE kino.{table} CASCADE",
        f"MERGE INTO kino.{table} USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE",
        f"MERGE INTO kino.{table} USING (SELECT 1) AS s ON false WHEN NOT MATCHED THEN INSERT DEFAULT VALUES",
        *(f'INSERT INTO kino.{table} ("{c}") OVERRIDING SYSTEM VALUE VALUES (DEFAULT)' for c in columns),
        *(f'UPDATE kino.{table} SET "{c}" = DEFAULT' for c in columns),
        *(f'COPY kino.{table} ("{c}") FROM STDIN' for c in columns),
    ]


def locks(table: str) -> Statements:
    """Every lock that would keep the ledger's functions waiting."""
    return [
        *(f"SELECT FROM kino.{table} FOR {s}" for s in ("UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE")),
        *(
            f"LOCK TABLE kino.{table} IN {mode} MODE"
            for mode in (
                "ROW SHARE",
                "ROW EXCLUSIVE",
                "SHARE UPDATE EXCLUSIVE",
                "SHARE",
                "SHARE ROW EXCLUSIVE",
                "EXCLUSIVE",
                "ACCESS EXCLUSIVE",
            )
        ),
    ]


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_writes_or_locks_a_table_of_the_ledger(arranged: Database, superuser: Connection, role: str) -> None:
    """Every statement that would write a table of the ledger, column by column, or lock it is refused."""
    columns = columns_of(superuser)
    tables = set(LEDGER.split()) if role == "kino_worker" else set(columns) - set(VIEWS.split())
    before = books(superuser)

    found = not_refused(arranged, role, [s for t in sorted(tables) for s in (*writes(t, columns[t]), *locks(t))])

    assert (found, books(superuser), findings(arranged)) == ({}, before, [])


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_writes_through_a_view(arranged: Database, superuser: Connection, role: str) -> None:
    """A view is read only, also where Postgres could write through it."""
    columns, before = columns_of(superuser), books(superuser)
    tries = [statement for view in VIEWS.split() for statement in writes(view, columns[view])]

    found = not_refused(arranged, role, tries, by=[INSUFFICIENT_PRIVILEGE, *NOT_A_TABLE])

    assert (found, books(superuser)) == ({}, before)


THEFTS: Final = """
    UPDATE kino.credit_lot SET remaining = granted;
    UPDATE kino.credit_lot SET remaining = granted, state = 'active', expires_at = NULL WHERE account_id = 'ada';
    WITH w AS (UPDATE kino.credit_lot SET remaining = granted RETURNING 1) SELECT * FROM w;
    INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)
        VALUES ('x', 'ada', 'courtesy', 9, 9);
    INSERT INTO kino.charge (charge_id, job_id, account_id, credits, deadline_at, opened_at, xid)
        OVERRIDING SYSTEM VALUE VALUES (77, 'x', 'eve', 9, 'infinity', '-infinity', '1');
    INSERT INTO kino.charge_line VALUES (4, 2, 1, 50);
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at, xid)
        VALUES ('grant', 'issued', 'wallet', 'ada', 1, NULL, 9, 'x', now(), '1');
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at, xid)
        VALUES ('refund', 'held', 'wallet', 'ada', 1, 1, 9, 'x', now(), '1');
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at, xid)
        VALUES ('reversal', 'consumed', 'wallet', 'ada', 1, 3, 9, 'x', now(), '1');
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at, xid)
        VALUES ('unvoid', 'voided', 'wallet', 'ada', 1, NULL, 9, 'x', now(), '1');
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at, xid)
        VALUES ('expire', 'wallet', 'expired', 'eve', 2, NULL, 9, 'x', now(), '1');
    INSERT INTO kino.settlement
        (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time, settled_at, xid)
        VALUES (1, 'refunded', 'timeout', '2.timeout', 'v', 's', 'e', now(), now(), '1');
    INSERT INTO kino.settlement SELECT * FROM kino.settlement
        ON CONFLICT (charge_id) DO UPDATE SET kind = 'refunded';
    INSERT INTO kino.correction (charge_id, reason, clause, policy_version, actor, reference)
        VALUES (3, 'timeout', '2.timeout', 'v', 'x', 'y');
    DELETE FROM kino.open_charge;
    INSERT INTO kino.open_charge VALUES (3, 'ada', now(), 10);
    UPDATE kino.account SET status = 'active';
    UPDATE kino.ledger_setting SET lot_grace_days = 0;
    SELECT nextval('kino.charge_charge_id_seq');
    SELECT setval('kino.charge_charge_id_seq', 1);
    ALTER SEQUENCE kino.charge_charge_id_seq RESTART
"""


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_moves_credits_without_the_functions(arranged: Database, superuser: Connection, role: str) -> None:
    """A statement that fills a lot, posts a transfer, or settles or reopens a charge is refused."""
    before = books(superuser)

    found = not_refused(arranged, role, THEFTS.split(";"))

    assert (found, books(superuser), findings(arranged)) == ({}, before, [])


def changes_of_functions(superuser: Connection) -> Statements:
    """Every change of each of our functions that would open the ledger."""
    query = "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'kino'::regnamespace"
    return [
        f"ALTER FUNCTION {function} {change}"
        for function in names(superuser, query)
        for change in (
            "SECURITY INVOKER",
            "SECURITY DEFINER",
            "SET search_path = pg_temp",
            "RESET ALL",
            "OWNER TO CURRENT_USER",
            "RENAME TO gone",
            "SET SCHEMA public",
            "DEPENDS ON EXTENSION plpgsql",
        )
    ] + [f"DROP FUNCTION {function} CASCADE" for function in names(superuser, query)]


CHANGES: Final = (
    "CREATE OR REPLACE FUNCTION kino.clock() RETURNS timestamptz LANGUAGE sql AS 'SELECT ''infinity''::timestamptz'",
    "CREATE OR REPLACE FUNCTION kino.is_id(p_text text) RETURNS boolean LANGUAGE sql AS 'SELECT true'",
    "CREATE FUNCTION kino.grant_lots(p_items json) RETURNS void LANGUAGE sql AS ''",
    "CREATE TABLE kino.mine ()",
    "CREATE VIEW kino.mine AS SELECT 1",
    "CREATE TYPE kino.mine AS (a text)",
    "CREATE OPERATOR kino.= (LEFTARG = text, RIGHTARG = text, FUNCTION = texteq)",
    "CREATE TRIGGER mine BEFORE INSERT ON kino.transfer FOR EACH ROW EXECUTE FUNCTION kino.refuse_change()",
    "CREATE RULE mine AS ON INSERT TO kino.transfer DO INSTEAD NOTHING",
    "CREATE POLICY mine ON kino.transfer",
    "CREATE INDEX mine ON kino.transfer (actor)",
    "CREATE STATISTICS kino.mine ON kind, actor FROM kino.transfer",
    "CREATE PUBLICATION mine FOR TABLE kino.transfer",
    "CREATE EVENT TRIGGER mine ON ddl_command_start EXECUTE FUNCTION kino.refuse_change()",
    "ALTER TABLE kino.transfer DISABLE TRIGGER ALL",
    "ALTER TABLE kino.credit_lot DROP CONSTRAINT credit_lot_check",
    "ALTER TABLE kino.credit_lot OWNER TO CURRENT_USER",
    "ALTER TABLE kino.charge ALTER COLUMN opened_at SET DEFAULT 'infinity'",
    "ALTER VIEW kino.account_balance SET (security_invoker = true)",
    "ALTER SCHEMA kino RENAME TO gone",
    "DROP TRIGGER append_only ON kino.transfer",
    "DROP TRIGGER lot_change ON kino.credit_lot",
    "DROP TABLE kino.transfer CASCADE",
    "DROP SCHEMA kino CASCADE",
    "REASSIGN OWNED BY kino_ledger TO CURRENT_USER",
    "DROP OWNED BY kino_ledger",
    "COMMENT ON TABLE kino.transfer IS 'mine'",
)


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_changes_the_schema(arranged: Database, superuser: Connection, role: str) -> None:
    """Every statement that would change, replace, take over or drop a function or a table of ours is refused."""
    before = catalog(superuser)

    found = not_refused(arranged, role, [*CHANGES, *changes_of_functions(superuser)])

    assert (found, catalog(superuser)) == ({}, before)


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_changes_rights(arranged: Database, superuser: Connection, role: str) -> None:
    """A GRANT or a REVOKE is refused or, where Postgres only warns, changes nothing."""
    functions = names(
        superuser, "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'kino'::regnamespace"
    )
    tables = columns_of(superuser)
    tries = [
        *(f"GRANT ALL ON FUNCTION {function} TO PUBLIC" for function in functions),
        *(f"GRANT ALL ON kino.{table} TO {role}" for table in tables),
        *(f"GRANT SELECT ON kino.{table} TO PUBLIC" for table in tables),
        *(f"REVOKE SELECT ON kino.{table} FROM kino_read" for table in tables),
        "GRANT ALL ON SCHEMA kino TO PUBLIC",
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA kino TO PUBLIC",
        "REVOKE USAGE ON SCHEMA kino FROM kino_worker",
    ]
    before = catalog(superuser)

    with session(arranged, role, autocommit=True) as hostile:
        for statement in tries:
            try:
                hostile.execute(statement.encode())
            except psycopg.errors.InsufficientPrivilege:
                continue

    assert catalog(superuser) == before


@pytest.mark.parametrize("role", LOGINS)
def test_a_role_calls_its_own_functions_and_no_others(arranged: Database, superuser: Connection, role: str) -> None:
    """A call of a function that is not the role's is refused before it begins."""
    query = f"""
        SELECT {FUNCTION}, format('SELECT kino.%I(%s)', proname,
               (SELECT string_agg('NULL::' || format_type(a.type, NULL), ', ' ORDER BY a.nth)
                FROM unnest(proargtypes) WITH ORDINALITY AS a (type, nth)))
        FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace
    """
    everything = dict(rows(superuser, query))
    allowed = {*MAY[role].get("EXECUTE", "").split(), *MAY["public"]["EXECUTE"].split()}

    with session(arranged, role, autocommit=True) as hostile:
        found = {function: refusal(hostile, statement) for function, statement in everything.items()}

    refused_input = dict.fromkeys(MAY[role].get("EXECUTE", "").split(), "KR006")
    expected = refused_input | {
        "clock()": None,
        "this_transaction()": None,
        "horizon()": None,
        "refuse_change()": NO_TRIGGER_CALL,
    }
    assert found == {
        function: expected[function] if function in allowed else INSUFFICIENT_PRIVILEGE for function in found
    }


@pytest.mark.parametrize("role", ATTACKERS)
def test_no_role_puts_our_trigger_functions_on_its_own_table(arranged: Database, role: str) -> None:
    """A trigger function that writes the ledger cannot be made to fire on a temporary table."""
    tries = [
        "CREATE TEMP TABLE lot (lot_id bigint, account_id text, state text, expires_at timestamptz);"
        f"CREATE TRIGGER mine AFTER {event} ON lot {rest} EXECUTE FUNCTION kino.{function}()"
        for function in ("keep_lot_change", "charge_opens", "charge_ends")
        for event, rest in (
            ("UPDATE", "FOR EACH ROW"),
            ("INSERT", "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT"),
        )
    ]

    assert not_refused(arranged, role, tries) == {}
