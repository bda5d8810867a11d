"""A ledger with a past, every act of its functions, and what they left in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kino_refunds.reconciliation.integrity import violations
from tests.conftest import Database
from tests.integration.db.rights import Connection, names, rows, session

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
