"""Who may do what: every right in the catalog against a list, what the functions are, and sessions that attack them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql

from kino_refunds.db.migrate import migrate
from kino_refunds.reconciliation.integrity import violations
from tests.conftest import Database

Connection = psycopg.Connection[Any]
Rights = dict[tuple[str, str], set[str]]
"""By role and right: what it is held on. A column is written table.column."""

INSUFFICIENT_PRIVILEGE = "42501"
NOT_A_TABLE = ("55000", "0A000", "42809")
"""What a view that cannot be written says before anybody's rights are looked at."""
NO_TRIGGER_CALL = "0A000"

LOGINS = ("kino_worker", "kino_product", "kino_oncall", "kino_read")
ROLES = (*LOGINS, "kino_ledger", "public")
ATTACKERS = ("kino_product", "kino_worker", "kino_oncall")

# --- the list --------------------------------------------------------------------------------------------------

HISTORY = "account_status_change lot_change lot_hold lot_void"
BOOKS = f"account credit_lot charge charge_line open_charge settlement correction transfer {HISTORY}"
LEDGER = f"{BOOKS} ledger_setting"
WORK = "inbox_event pending_event dead_letter break"
RUNNING = "overdue_ask schedule_slot intake_worker intake_state relay_cursor waiting_message xid_clock"
OLD = "verified_through alembic_version"
VIEWS = "charge_status account_balance"

OBJECTS: Final[Mapping[str, str]] = {
    "table": f"{LEDGER} {WORK} {RUNNING} {OLD}",
    "view": VIEWS,
    "sequence": """
        account_status_change_change_id_seq break_break_id_seq charge_charge_id_seq credit_lot_lot_id_seq
        dead_letter_dead_letter_id_seq lot_change_change_id_seq transfer_transfer_id_seq
    """,
    "function for a login": """
        grant_lots(jsonb) open_charges(jsonb)
        settle_charges(jsonb) held_lots(jsonb) expire_lots(integer)
        reverse_charges(jsonb) set_account_status(jsonb)
    """,
    "function for other functions": """
        hold_purchase(text,text,text,text) release_purchase(text,text,text,text)
        void_purchase(text,text,text,text) unvoid_purchase(text,text,text,text)
        lock_purchase(text,text,text,text) place_lots(bigint[])
        refund_lines(bigint[],boolean) give_back(text,bigint[],text[],text[],timestamptz[])
        take_rest(bigint[],text,text,text,text,text) expire_due(bigint[]) lot_grace() keep_lot_change()
        require_items(jsonb,text[],text[]) require_id(text,text) refuse_constraint(text)
        is_id(text) has_unprintable(text)
        read_id(bigint,text,jsonb) read_credits(bigint,text,jsonb,bigint) read_instant(bigint,text,jsonb,integer)
        read_text(bigint,text,jsonb) read_word(bigint,text,jsonb,text[]) read_priority(bigint,text,jsonb)
        has_plain_types(jsonb,jsonpath) take_id(boolean,text,jsonb,bigint,text)
        take_text(boolean,text,jsonb,bigint,text)
        take_number(boolean,text,jsonb,bigint,text,bigint) take_word(boolean,text,jsonb,bigint,text,text[])
        take_instant(boolean,text,jsonb,bigint,text,integer)
    """,
    "function for every role": "clock() this_transaction() horizon() refuse_change()",
    "trigger function for older builds": "charge_opens() charge_ends()",
}
"""Everything in schema kino: an object that a migration adds and this list lacks fails the test."""

MAY: Final[Mapping[str, Mapping[str, str]]] = {
    "kino_worker": {
        "USAGE": "kino",
        "SELECT": f"{LEDGER} {WORK} {RUNNING} {OLD} {VIEWS}",
        "INSERT": """
            inbox_event pending_event dead_letter break overdue_ask schedule_slot intake_worker relay_cursor
            waiting_message xid_clock
        """,
        "UPDATE": """
            pending_event dead_letter break overdue_ask schedule_slot intake_worker intake_state relay_cursor
            verified_through
        """,
        "DELETE": "pending_event overdue_ask schedule_slot intake_worker waiting_message",
        "EXECUTE": "settle_charges(jsonb) held_lots(jsonb) expire_lots(integer)",
    },
    "kino_product": {
        "USAGE": "kino",
        "SELECT": f"""
            account credit_lot charge charge_line open_charge settlement correction transfer
            lot_change lot_hold lot_void ledger_setting xid_clock verified_through {VIEWS}
        """,
        "EXECUTE": "grant_lots(jsonb) open_charges(jsonb)",
    },
    "kino_oncall": {
        "USAGE": "kino",
        "SELECT": f"{LEDGER} inbox_event break xid_clock {VIEWS}",
        "EXECUTE": "reverse_charges(jsonb) set_account_status(jsonb)",
    },
    "kino_read": {
        "USAGE": "kino",
        "SELECT": f"{LEDGER} inbox_event break xid_clock verified_through {VIEWS}",
    },
    "kino_ledger": {
        "USAGE": "kino",
        "SELECT": LEDGER,
        "INSERT": BOOKS,
        "UPDATE": """
            account.status account.status_reason credit_lot.remaining credit_lot.state credit_lot.expires_at
            lot_hold.until lot_hold.until_actor lot_void.until lot_void.until_actor
        """,
        "DELETE": "open_charge",
        "EXECUTE": f"{OBJECTS['function for a login']} {OBJECTS['function for other functions']}",
    },
    "public": {
        "USAGE": "public",
        "EXECUTE": OBJECTS["function for every role"],
    },
}
"""What each role may do. Every role may do what PUBLIC may."""

# --- what the catalog says -------------------------------------------------------------------------------------

_OBJECTS = """
    SELECT relname FROM pg_class WHERE relnamespace = 'kino'::regnamespace AND relkind NOT IN ('i', 'I', 't', 'c')
    UNION ALL
    SELECT {function} FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace
"""
FUNCTION = """
    proname || '(' || (SELECT coalesce(string_agg(replace(format_type(a.type, NULL), 'timestamp with time zone',
                                                          'timestamptz'), ',' ORDER BY a.nth), '')
                       FROM unnest(proargtypes) WITH ORDINALITY AS a (type, nth)) || ')'
"""

_COLUMN_RIGHTS = """
    SELECT r.role, p.held, c.relname || '.' || a.attname
    FROM unnest(%(roles)s::text[]) AS r (role)
    CROSS JOIN unnest('{SELECT,INSERT,UPDATE,REFERENCES}'::text[]) AS p (held)
    CROSS JOIN pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND has_column_privilege(r.role, c.oid, a.attnum, p.held)
"""
_TABLE_RIGHTS = """
    SELECT r.role, p.held, c.relname
    FROM unnest(%(roles)s::text[]) AS r (role) CROSS JOIN unnest(%(rights)s::text[]) AS p (held) CROSS JOIN pg_class c
    WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND has_table_privilege(r.role, c.oid, p.held)
"""
_OTHER_RIGHTS = """
    SELECT r.role, p.held, c.relname
    FROM unnest(%(roles)s::text[]) AS r (role) CROSS JOIN unnest('{{USAGE,SELECT,UPDATE}}'::text[]) AS p (held)
    -- OFFSET 0: has_sequence_privilege() fails where it is asked about a table.
    CROSS JOIN (SELECT oid, relname FROM pg_class WHERE relnamespace = 'kino'::regnamespace AND relkind = 'S'
                OFFSET 0) AS c
    WHERE has_sequence_privilege(r.role, c.oid, p.held)
    UNION ALL
    SELECT r.role, 'EXECUTE', {function}
    FROM unnest(%(roles)s::text[]) AS r (role)
    CROSS JOIN pg_proc p
    WHERE p.pronamespace = 'kino'::regnamespace AND has_function_privilege(r.role, p.oid, 'EXECUTE')
    UNION ALL
    SELECT r.role, p.held, n.nspname
    FROM unnest(%(roles)s::text[]) AS r (role) CROSS JOIN unnest('{{USAGE,CREATE}}'::text[]) AS p (held)
    CROSS JOIN pg_namespace n
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND has_schema_privilege(r.role, n.oid, p.held)
"""


@contextmanager
def session(database: Database, role: str) -> Iterator[Connection]:
    """Open a session of a role's own, with nothing pinned."""
    with psycopg.connect(database.url(role).replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


@pytest.fixture
def superuser(database: Database) -> Iterator[Connection]:
    """A session that reads everything."""
    with session(database, "postgres") as connection:
        yield connection


def rows(connection: Connection, query: str, parameters: Mapping[str, Any] | None = None) -> list[Any]:
    return connection.execute(query.encode(), parameters).fetchall()


def names(connection: Connection, query: str) -> list[str]:
    return [name for (name,) in rows(connection, query)]


def rights_held(superuser: Connection) -> Rights:
    """Read every right that the roles hold in this database: granted, inherited, or through PUBLIC."""
    table_rights = ["DELETE", "TRUNCATE", "TRIGGER", "REFERENCES"]
    if superuser.info.server_version >= 17_00_00:
        table_rights.append("MAINTAIN")
    parameters = {"roles": list(ROLES), "rights": table_rights}
    held: Rights = defaultdict(set)
    for query in (_COLUMN_RIGHTS, _TABLE_RIGHTS, _OTHER_RIGHTS.format(function=FUNCTION)):
        for role, right, thing in rows(superuser, query, parameters):
            held[role, right].add(thing)
    return dict(held)


def rights_listed(columns: Mapping[str, Sequence[str]]) -> Rights:
    """Spell the list out: a table stands for all of its columns, except where the right is one on whole tables."""
    listed: Rights = defaultdict(set)
    for role in ROLES:
        for holder in {role, "public"}:
            for right, things in MAY[holder].items():
                for thing in things.split():
                    by_column = thing in columns and right in {"SELECT", "INSERT", "UPDATE"}
                    listed[role, right] |= {f"{thing}.{c}" for c in columns[thing]} if by_column else {thing}
    return dict(listed)


def columns_of(superuser: Connection) -> dict[str, list[str]]:
    """Every table and view with its columns."""
    columns: dict[str, list[str]] = defaultdict(list)
    query = """
        SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
          AND a.attnum > 0 AND NOT a.attisdropped ORDER BY c.relname, a.attnum
    """
    for table, column in rows(superuser, query):
        columns[table].append(column)
    return dict(columns)


def differences(found: Rights, listed: Rights) -> list[str]:
    """Say, line by line, what is held and not listed, and what is listed and not held."""

    def lines(word: str, these: Rights, those: Rights) -> list[str]:
        return [
            f"{word}: {role} {right} {thing}"
            for (role, right), things in sorted(these.items())
            for thing in sorted(things - those.get((role, right), set()))
        ]

    return [*lines("too much", found, listed), *lines("missing", listed, found)]


def test_the_list_names_everything_in_the_schema(superuser: Connection) -> None:
    """Every table, view, sequence and function stands in the list, so a new one cannot go by unseen."""
    found = set(names(superuser, _OBJECTS.format(function=FUNCTION)))
    listed = {name for group in OBJECTS.values() for name in group.split()}

    wrong = [
        *(f"not in the list: {n}" for n in sorted(found - listed)),
        *(f"gone: {n}" for n in sorted(listed - found)),
    ]
    assert not wrong, "\n".join(wrong)


def test_every_role_holds_the_rights_of_the_list_and_no_others(superuser: Connection) -> None:
    """Each right on a table, column, sequence, function or schema is held by the roles that the list says alone."""
    wrong = differences(rights_held(superuser), rights_listed(columns_of(superuser)))

    assert not wrong, "\n".join(wrong)


def test_closing_the_ledger_after_an_upgrade_leaves_the_same_rights(database: Database, superuser: Connection) -> None:
    """What older builds need while an upgrade lasts is taken back whole by the next `migrate`."""
    migrate(database.url("kino_owner"), beside_older_builds=True)
    opened = differences(rights_held(superuser), rights_listed(columns_of(superuser)))

    migrate(database.url("kino_owner"))

    closed = differences(rights_held(superuser), rights_listed(columns_of(superuser)))
    assert "too much: kino_product UPDATE credit_lot.remaining" in opened
    assert not closed, "\n".join(closed)


def test_no_role_can_pass_a_right_on(superuser: Connection) -> None:
    """Only the owner of an object holds a right with grant option."""
    found = rows(
        superuser,
        """
        SELECT a.grantee::regrole::text, a.privilege_type, o.thing FROM (
            SELECT relname::text AS thing, relacl AS acl, relowner AS owner FROM pg_class
            WHERE relnamespace = 'kino'::regnamespace
            UNION ALL
            SELECT c.relname || '.' || t.attname, t.attacl, c.relowner FROM pg_attribute t
            JOIN pg_class c ON c.oid = t.attrelid WHERE c.relnamespace = 'kino'::regnamespace
            UNION ALL
            SELECT proname, proacl, proowner FROM pg_proc WHERE pronamespace = 'kino'::regnamespace
            UNION ALL
            SELECT nspname, nspacl, nspowner FROM pg_namespace WHERE nspname IN ('kino', 'public')
        ) AS o, aclexplode(o.acl) AS a WHERE a.is_grantable AND a.grantee <> o.owner
        """,
    )

    assert found == []


def test_no_default_right_is_set(superuser: Connection) -> None:
    """A table or function that a later migration makes is open to no role until that migration grants it."""
    assert rows(superuser, "SELECT * FROM pg_default_acl") == []


# --- the functions ---------------------------------------------------------------------------------------------


def functions_listed(*groups: str) -> set[str]:
    return {function for group in groups for function in OBJECTS[group].split()}


DEFINERS: Final = functions_listed("function for a login", "trigger function for older builds") | {
    "hold_purchase(text,text,text,text)",
    "release_purchase(text,text,text,text)",
    "void_purchase(text,text,text,text)",
    "unvoid_purchase(text,text,text,text)",
    "keep_lot_change()",
}
TRIGGERS: Final = functions_listed("trigger function for older builds") | {"keep_lot_change()"}


def test_these_functions_run_as_their_owner_and_no_others(superuser: Connection) -> None:
    """A function is SECURITY DEFINER only where it is an entrance to the ledger or keeps a table by a trigger."""
    query = f"SELECT {FUNCTION} FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef"

    assert set(names(superuser, query)) == DEFINERS


def test_a_function_that_runs_as_its_owner_is_closed_to_the_caller(superuser: Connection) -> None:
    """Each SECURITY DEFINER function has one search_path and the ledger's role as owner, and PUBLIC may not call it."""
    found = rows(
        superuser,
        f"""
        SELECT {FUNCTION}, proowner::regrole::text, has_function_privilege('public', p.oid, 'EXECUTE'),
               array(SELECT c FROM unnest(proconfig) AS c WHERE c LIKE 'search_path=%')
        FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef
        """,
    )

    of_older_builds = functions_listed("trigger function for older builds")
    assert sorted(found) == [
        (
            function,
            "kino_owner" if function in of_older_builds else "kino_ledger",
            False,
            ["search_path=pg_catalog, pg_temp"],
        )
        for function in sorted(DEFINERS)
    ]


def test_a_function_that_reads_or_writes_instants_as_text_pins_their_style(superuser: Connection) -> None:
    """Every function that is called from outside reads and writes instants the same in every session.

    A trigger's function hands instants on as they are.
    """
    query = f"""
        SELECT {FUNCTION} FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef
        AND proconfig @> ARRAY['DateStyle=ISO, MDY', 'TimeZone=UTC']
    """

    assert set(names(superuser, query)) == DEFINERS - TRIGGERS


def test_no_login_may_call_a_part_of_the_ledger(superuser: Connection) -> None:
    """A function without a search_path of its own runs inside the ledger's functions only; no login may call it."""
    query = f"""
        SELECT r.rolname || ' ' || {FUNCTION} FROM pg_proc p CROSS JOIN pg_roles r
        WHERE p.pronamespace = 'kino'::regnamespace AND NOT p.prosecdef
          AND {FUNCTION} <> ALL (%(open_to_all)s) AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
          AND r.rolcanlogin AND NOT r.rolsuper AND r.rolname <> 'kino_owner'
    """

    found = rows(superuser, query, {"open_to_all": sorted(functions_listed("function for every role"))})

    assert found == []


def test_a_function_for_every_role_names_the_schema_of_what_it_calls(superuser: Connection) -> None:
    """A function that runs with the caller's search_path calls Postgres' own functions by their schema."""
    query = """
        SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'kino'::regnamespace AND NOT prosecdef
        AND has_function_privilege('public', oid, 'EXECUTE')
    """

    found = {name: re.findall(r"[\w.]+(?=\()", body) for name, body in rows(superuser, query)}

    assert {name: [call for call in calls if not call.startswith("pg_catalog.")] for name, calls in found.items()} == {
        "clock": [],
        "this_transaction": [],
        "horizon": [],
        "refuse_change": [],
    }


def test_no_login_is_or_becomes_the_ledger(superuser: Connection) -> None:
    """kino_ledger cannot log in, has no power of its own, and no login but kino_owner may become it or kino_owner."""
    attributes = rows(
        superuser,
        """
        SELECT rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls
        FROM pg_roles WHERE rolname = 'kino_ledger'
        """,
    )
    members = rows(
        superuser,
        """
        SELECT r.rolname, o.rolname FROM pg_roles r CROSS JOIN pg_roles o
        WHERE NOT r.rolsuper AND r.rolname !~ '^pg_' AND r.oid <> o.oid AND o.rolname <> 'pg_database_owner'
          AND pg_has_role(r.oid, o.oid, 'MEMBER')
        """,
    )

    assert attributes == [(False,) * 6]
    assert members == [("kino_owner", "kino_ledger")]


def test_the_ledger_owns_its_functions_and_nothing_else(superuser: Connection) -> None:
    """kino_ledger owns no table, so a statement that runs as it cannot alter or drop one, or disable its triggers."""
    query = """
        SELECT DISTINCT d.classid::regclass::text FROM pg_shdepend d
        WHERE d.refobjid = 'kino_ledger'::regrole AND d.deptype = 'o'
    """

    assert names(superuser, query) == ["pg_proc"]


# --- a ledger with a past --------------------------------------------------------------------------------------

DEADLINE = "2030-01-01T00:00:00.25+05:30"
EVENT_TIME = "2026-01-01T00:00:00.5Z"

ANSWERS: Final[Mapping[str, str]] = {
    "grant_lots": "o_lot_id, o_reference, o_account_id, o_granted, o_remaining, o_state",
    "open_charges": "o_charge_id, o_job_id, o_account_id, o_credits, o_lot_ids, o_lot_credits",
    "settle_charges": "o_charge_id, o_kind, o_credits",
    "held_lots": "o_charge_id, o_lot_ids",
    "reverse_charges": "o_charge_id, o_credits",
    "set_account_status": "o_account_id, o_status_before",
}
"""What a function answers, without the instant of the call."""

Items = Sequence[Mapping[str, Any]]


def call(connection: Connection, function: str, items: Items) -> list[Any]:
    """Call a function in a transaction of its own, in a session with any settings."""
    statement = f"SELECT {ANSWERS[function]} FROM kino.{function}(%s::pg_catalog.jsonb)"
    return connection.execute(statement.encode(), [json.dumps(items)]).fetchall()


def a_grant(reference: str, account_id: str, credits: int = 100, **terms: Any) -> dict[str, Any]:
    return {"reference": reference, "account_id": account_id, "credits": credits, "class": "purchased", **terms}


def a_charge(job_id: str, account_id: str, credits: int = 10) -> dict[str, Any]:
    return {"job_id": job_id, "account_id": account_id, "credits": credits, "deadline_at": DEADLINE}


def a_settlement(charge_id: int, kind: str) -> dict[str, Any]:
    reason, clause = {"captured": ("completed", "1"), "refunded": ("timeout", "2.timeout")}[kind]
    return {
        "charge_id": charge_id,
        "kind": kind,
        "reason": reason,
        "clause": clause,
        "policy_version": "v",
        "ending": "e",
        "account_status": "active",
        "event_source": "s",
        "event_id": f"event {charge_id}",
        "event_time": EVENT_TIME,
    }


A_REVERSAL = {
    "charge_id": 3,
    "reason": "timeout",
    "clause": "2.timeout",
    "policy_version": "v",
    "reference": "ticket é \\ 1",
    "actor": "ann",
}
A_SUSPENSION = {"account_id": "eve", "status": "suspended", "reason": "asked \\ for", "actor": "ann"}

ACTS: Final[Mapping[str, Sequence[tuple[str, Items]]]] = {
    "kino_product": [
        ("grant_lots", [a_grant("later é \\ 1", "ada", 30, expires_at="2031-02-28T23:59:59.125-03:00", priority=7)]),
        ("grant_lots", [a_grant("first", "ada")]),
        ("open_charges", [a_charge("job é \\ 5", "ada", 40), a_charge("job 1", "ada"), a_charge("job 6", "eve", 0)]),
    ],
    "kino_worker": [
        ("held_lots", [{"charge_id": 2}, {"charge_id": 1}]),
        ("settle_charges", [a_settlement(2, "refunded"), a_settlement(1, "captured")]),
    ],
    "kino_oncall": [
        ("reverse_charges", [A_REVERSAL]),
        ("set_account_status", [A_SUSPENSION]),
    ],
}
"""What each role does in its work, on the ledger that `arrange` leaves."""


def arrange(database: Database) -> None:
    """Give two accounts credits, open charges 1 to 4, capture the third and refund the fourth; one lot is due."""
    with session(database, "kino_product") as product, session(database, "kino_worker") as worker:
        call(product, "grant_lots", [a_grant("first", "ada"), a_grant("of eve", "eve", purchase_id="order-1")])
        call(product, "grant_lots", [a_grant("due", "ada", 5, expires_at="2020-02-29T00:00:00Z")])
        call(product, "open_charges", [a_charge(f"job {n}", "ada" if n < 4 else "eve") for n in (1, 2, 3, 4)])
        call(worker, "settle_charges", [a_settlement(3, "captured"), a_settlement(4, "refunded")])


def act(connection: Connection, role: str) -> list[Any]:
    """Do a role's work in this session, once; returns all answers."""
    answers = [call(connection, function, items) for function, items in ACTS[role]]
    if role == "kino_worker":
        answers.append(connection.execute(b"SELECT kino.expire_lots()").fetchall())
    return answers


def books(superuser: Connection) -> dict[str, list[str]]:
    """Every row of every table, without the instant and the transaction in which it was written."""
    query = """
        SELECT c.relname, string_agg(format('t.%I', a.attname), ', ' ORDER BY a.attnum)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind = 'r'
          AND coalesce(pg_get_expr(d.adbin, d.adrelid), '') NOT IN ('kino.clock()', 'kino.this_transaction()')
        GROUP BY c.relname
    """
    return {
        table: names(superuser, f"SELECT ROW({columns})::text FROM kino.{table} t ORDER BY 1")
        for table, columns in rows(superuser, query)
    }


def catalog(superuser: Connection) -> list[Any]:
    """Everything that says what the schema is and who may do what."""
    queries = """
        SELECT proname, prosrc, proconfig, coalesce(proacl, acldefault('f', proowner))::text, proowner, prosecdef
        FROM pg_proc WHERE pronamespace = 'kino'::regnamespace ORDER BY oid;
        SELECT relname, relkind, relowner, coalesce(relacl, acldefault('r', relowner))::text, relhasrules
        FROM pg_class WHERE relnamespace = 'kino'::regnamespace ORDER BY oid;
        SELECT attrelid, attname, attacl::text FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
        WHERE relnamespace = 'kino'::regnamespace ORDER BY 1, 2;
        SELECT tgrelid, tgname, tgfoid, tgenabled FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
        WHERE relnamespace = 'kino'::regnamespace ORDER BY tgrelid, tgname;
        SELECT nspname, nspowner, nspacl::text FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY 1;
        SELECT roleid, member FROM pg_auth_members ORDER BY 1, 2;
        SELECT rolname, rolsuper, rolcanlogin, rolcreaterole, rolcreatedb FROM pg_roles ORDER BY 1
    """
    return [rows(superuser, query) for query in queries.split(";")]


def findings(database: Database) -> list[str]:
    with session(database, "kino_read") as reader:
        return violations(reader)


@pytest.fixture(scope="session")
def honest_outcomes() -> dict[str, Any]:
    """What each role's work comes to in a session that does nothing else, once it was tried."""
    return {}


@pytest.fixture
def arranged(database: Database) -> Database:
    """A database whose ledger has a past."""
    arrange(database)
    return database


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

Statements = list[str]


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
    with session(database, role) as honest, session(database, "postgres") as superuser:
        return act(honest, role), books(superuser)


def hostile_outcome(database: Database, role: str, statements: Statements) -> Any:
    with session(database, role) as hostile, session(database, "postgres") as superuser:
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
    good = a_charge("new", "ada")
    bad = [
        *({**good, "deadline_at": instant} for instant in BAD_INSTANTS),
        *({**good, "job_id": id_} for id_ in BAD_IDS),
        *({**good, "actor": actor} for actor in ("a\u0001b", "a\u007fb")),
    ]

    found: list[Any] = []
    with session(arranged, "kino_product") as hostile:
        hostile.execute(f"SET {setting}".encode())
        for item in bad:
            try:
                found.append((item, call(hostile, "open_charges", [item])))
            except psycopg.Error as error:
                found.append((item, error.sqlstate))

    assert found == [(item, "KR006") for item in bad]


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
    with session(database, role) as hostile:
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
        *(f"INSERT INTO kino.{table} ({c}) OVERRIDING SYSTEM VALUE VALUES (DEFAULT)" for c in columns),
        *(f"UPDATE kino.{table} SET {c} = DEFAULT" for c in columns),
        *(f"COPY kino.{table} ({c}) FROM STDIN" for c in columns),
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

    with session(arranged, role) as hostile:
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

    with session(arranged, role) as hostile:
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
