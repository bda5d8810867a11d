"""A ledger with a past, every act of its functions, and what they left in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kino_refunds.reconciliation.integrity import violations
from tests.conftest import Database
from tests.integration.db.rights import names, rows
from tests.ledger_acts import WITHOUT
from tests.ledger_items import Connection, a_charge, a_grant, a_reversal, a_settlement, a_status, session

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


DUE: Final = {"deadline_at": "2030-01-01T00:00:00.25+05:30"}
REFUNDED: Final = {"event_time": "2026-01-01T00:00:00.5Z"}
CAPTURED: Final = {**REFUNDED, "kind": "captured", "reason": "completed", "clause": "1", "ending": "completed"}
"""Instants with a fraction and an offset: a session's settings change how such text is read and written."""

ACTS: Final[Mapping[str, Sequence[tuple[str, Items]]]] = {
    "kino_product": [
        ("grant_lots", [a_grant("later é \\ 1", credits=30, expires_at="2031-02-28T23:59:59.125-03:00", priority=7)]),
        ("grant_lots", [a_grant("first", credits=100)]),
        (
            "open_charges",
            [
                a_charge("job é \\ 5", credits=40, **DUE),
                a_charge("job 1", **DUE),
                a_charge("job 6", account_id="eve", credits=0, **DUE),
            ],
        ),
    ],
    "kino_worker": [
        ("held_lots", [{"charge_id": 2}, {"charge_id": 1}]),
        ("settle_charges", [a_settlement(2, **REFUNDED), a_settlement(1, **CAPTURED)]),
    ],
    "kino_oncall": [
        ("reverse_charges", [a_reversal(3, reference="ticket é \\ 1")]),
        ("set_account_status", [a_status("eve", reason="asked \\ for")]),
    ],
}
"""What each role does in its work, on the ledger that `arrange` leaves."""


def arrange(database: Database) -> None:
    """Give two accounts credits, open charges 1 to 4, capture the third and refund the fourth; one lot is due."""
    with (
        session(database, "kino_product", autocommit=True) as product,
        session(database, "kino_worker", autocommit=True) as worker,
    ):
        call(
            product,
            "grant_lots",
            [a_grant("first", credits=100), a_grant("of eve", account_id="eve", credits=100, purchase_id="order-1")],
        )
        call(product, "grant_lots", [a_grant("due", credits=5, expires_at="2020-02-29T00:00:00Z")])
        call(
            product,
            "open_charges",
            [a_charge(f"job {n}", account_id="ada" if n < 4 else "eve", **DUE) for n in (1, 2, 3, 4)],
        )
        call(worker, "settle_charges", [a_settlement(3, **CAPTURED), a_settlement(4, **REFUNDED)])


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
    with session(database, "kino_read", autocommit=True) as reader:
        return violations(reader, without=WITHOUT)
