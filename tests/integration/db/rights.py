"""The list of who may do what, and what the catalog says of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tests.ledger_items import Connection

Rights = dict[tuple[str, str], set[str]]
"""By role and right: what it is held on. A column is written table.column."""

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
PROOF = "check_run seal"
OLD = "verified_through alembic_version"
VIEWS = "charge_status account_balance"

OBJECTS: Final[Mapping[str, str]] = {
    "table": f"{LEDGER} {WORK} {RUNNING} {PROOF} {OLD}",
    "view": VIEWS,
    "sequence": """
        account_status_change_change_id_seq break_break_id_seq charge_charge_id_seq check_run_run_id_seq
        credit_lot_lot_id_seq
        dead_letter_dead_letter_id_seq lot_change_change_id_seq transfer_transfer_id_seq
    """,
    "function for a login": """
        grant_lots(jsonb) open_charges(jsonb)
        settle_charges(jsonb) held_lots(jsonb) expire_lots(integer)
        reverse_charges(jsonb) set_account_status(jsonb)
        planned_lines(jsonb)
    """,
    "function for other functions": """
        hold_purchase(text,text,text,text) release_purchase(text,text,text,text)
        void_purchase(text,text,text,text) unvoid_purchase(text,text,text,text)
        named(bigint) lock_purchase(text,text,text,text) place_lots(bigint[])
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
        "SELECT": f"{LEDGER} {WORK} {RUNNING} {PROOF} {OLD} {VIEWS}",
        "INSERT": """
            inbox_event pending_event dead_letter break overdue_ask schedule_slot intake_worker relay_cursor
            waiting_message xid_clock check_run seal
        """,
        "UPDATE": """
            pending_event dead_letter break overdue_ask schedule_slot intake_worker intake_state relay_cursor
            verified_through check_run
        """,
        "DELETE": "pending_event overdue_ask schedule_slot intake_worker waiting_message",
        "EXECUTE": """
            settle_charges(jsonb) held_lots(jsonb) expire_lots(integer) planned_lines(jsonb)
        """,
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
        "SELECT": f"""
            {LEDGER} {WORK} overdue_ask schedule_slot intake_worker intake_state relay_cursor xid_clock {PROOF} {VIEWS}
        """,
        "EXECUTE": """
            reverse_charges(jsonb) set_account_status(jsonb) planned_lines(jsonb)
        """,
    },
    "kino_read": {
        "USAGE": "kino",
        "SELECT": f"{LEDGER} inbox_event break relay_cursor xid_clock verified_through {PROOF} {VIEWS}",
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


def functions_listed(*groups: str) -> set[str]:
    return {function for group in groups for function in OBJECTS[group].split()}


Statements = list[str]
