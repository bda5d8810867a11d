"""What can go wrong in a row of the ledger: changes generated over every table and column that means money."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from tests.ledger_items import Connection

SHAPES: Final[Mapping[str, str]] = {
    "account": "status",
    "account_status_change": "from_status || ' to ' || to_status",
    "charge": "CASE WHEN credits = 0 THEN 'free, ' ELSE '' END || coalesce((SELECT s.kind FROM kino.settlement s"
    " WHERE s.charge_id = t.charge_id), 'open')",
    "charge_line": "coalesce((SELECT s.kind FROM kino.settlement s WHERE s.charge_id = t.charge_id), 'open')",
    "correction": "'correction'",
    "credit_lot": "CASE WHEN successor_of IS NULL THEN 'granted, ' WHEN (SELECT o.successor_of FROM kino.credit_lot o"
    " WHERE o.lot_id = t.successor_of) IS NULL THEN 'successor, ' ELSE 'later successor, ' END || state"
    " || CASE WHEN EXISTS (SELECT FROM kino.lot_change h WHERE h.lot_id = t.lot_id) AND state = 'active'"
    " THEN ' again' ELSE '' END || CASE WHEN expires_at IS NULL THEN '' ELSE ', expires' END",
    "inbox_event": "outcome",
    "lot_change": "from_state || ' to ' || to_state",
    "lot_hold": "CASE WHEN until IS NULL THEN 'open' ELSE 'ended' END",
    "lot_void": "CASE WHEN until IS NULL THEN 'open' ELSE 'ended' END",
    "open_charge": "CASE WHEN credits = 0 THEN 'free' ELSE 'charged' END",
    "relay_cursor": "'cursor'",
    "settlement": "kind || ' by ' || clause",
    "transfer": "kind || CASE WHEN to_lot_id IS NULL THEN '' ELSE ' onward' END"
    " || CASE WHEN charge_id IS NOT NULL AND kind IN ('void', 'expire') THEN ' of a charge' ELSE '' END",
}
"""The tables whose rows mean money, and what tells their rows apart: one row of each shape is corrupted."""

ELSEWHERE: Final[Mapping[str, str]] = {
    "alembic_version": "what the schema is",
    "break": "what was found; the catalogue deletes it as a whole",
    "check_run": "what was compared",
    "dead_letter": "what could not be decided",
    "intake_state": "whether work goes on",
    "intake_worker": "who works",
    "ledger_setting": "how long what comes back lives from now on",
    "overdue_ask": "who was asked",
    "pending_event": "what waits for another try",
    "schedule_slot": "what ran",
    "seal": "the check `seals` recomputes it",
    "verified_through": "read by older builds only",
    "waiting_message": "what waits in Redis",
    "xid_clock": "which instant belongs to which transaction: only a number that has not been is found",
}
"""The other tables, and what they are about."""

WORDS: Final[Mapping[str, Sequence[str]]] = {
    "account.status": ("active", "suspended", "terminated"),
    "account_status_change.from_status": ("active", "suspended", "terminated"),
    "account_status_change.to_status": ("active", "suspended", "terminated"),
    "correction.reason": ("generation_failure", "timeout", "content_policy_rejection"),
    "correction.clause": ("2.failure", "2.timeout", "2.safety", "1"),
    "credit_lot.class": ("promotional", "courtesy", "subscription", "purchased", "lifetime"),
    "credit_lot.state": ("active", "frozen", "expired", "voided"),
    "inbox_event.outcome": (
        "captured", "captured_not_covered", "captured_terminated", "refunded", "already_captured", "already_refunded",
        "completed_after_refund", "failed_after_capture", "busy",
    ),
    "lot_change.from_state": ("active", "frozen", "expired", "voided"),
    "lot_change.to_state": ("active", "frozen", "expired", "voided"),
    "lot_hold.cause_kind": ("dispute", "payout"),
    "lot_void.cause_kind": ("dispute", "payout"),
    "settlement.account_status": ("active", "suspended", "terminated", "terminated_for_violation"),
    "settlement.kind": ("captured", "refunded"),
    "settlement.reason": ("completed", "not_covered", "generation_failure", "timeout", "content_policy_rejection"),
    "settlement.clause": ("1", "2.failure", "2.timeout", "2.safety", "6.terminated"),
    "transfer.kind": ("grant", "hold", "capture", "refund", "expire", "void", "unvoid", "reversal"),
    "transfer.from_book": ("issued", "wallet", "held", "consumed", "expired", "voided"),
    "transfer.to_book": ("issued", "wallet", "held", "consumed", "expired", "voided"),
    "transfer.cause_kind": ("dispute", "payout"),
}  # fmt: skip
"""The words of columns that hold one of a few: each is tried in the place of each other."""

NUMBERS: Final = ("credits", "granted", "remaining", "priority", "seq")
LOTS: Final = ("lot_id", "to_lot_id", "successor_of")
NAMES: Final = (
    "reference", "job_id", "purchase_id", "policy_version", "ending", "event_source", "event_id", "source",
    "fingerprint", "actor", "until_actor", "cause_id", "reason", "status_reason",
)  # fmt: skip
ROW_IDS: Final = ("change_id", "transfer_id", "singleton")
"""Made by the database: a row's own number means nothing but its place in the order."""
ANOTHER_LOT: Final = """
    (SELECT min(o.lot_id) FROM kino.credit_lot o WHERE o.lot_id IS DISTINCT FROM t.{column}
     AND (o.account_id = (SELECT m.account_id FROM kino.credit_lot m WHERE m.lot_id = t.lot_id)) = {same})
"""
ANOTHER_CHARGE: Final = "(SELECT min(o.charge_id) FROM kino.charge o WHERE o.charge_id IS DISTINCT FROM t.charge_id)"
A_NEW_CHARGE: Final = "(SELECT max(o.charge_id) FROM kino.charge o WHERE o.charge_id IS DISTINCT FROM t.charge_id)"
OF_KIND: Final = (
    "SET kind = k.kind, from_book = k.from_book, to_book = k.to_book FROM (VALUES ('grant', 'issued', 'wallet'),"
    " ('hold', 'wallet', 'held'), ('capture', 'held', 'consumed'), ('refund', 'held', 'wallet'),"
    " ('expire', 'wallet', 'expired'), ('void', 'wallet', 'voided'), ('unvoid', 'voided', 'wallet'),"
    " ('reversal', 'consumed', 'wallet')) AS k (kind, from_book, to_book)"
)


@dataclass(frozen=True)
class Corruption:
    """One change to the last row of a shape; `column` is `row` where the whole row is added or lost."""

    table: str
    shape: str
    column: str
    change: str
    statement: str


def tables_and_columns(superuser: Connection) -> dict[str, dict[str, str]]:
    """Every table of the schema with its columns and their types."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for table, column, of_type in superuser.execute(
        "SELECT c.relname, a.attname, format_type(a.atttypid, NULL) FROM pg_class c"
        " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relnamespace = 'kino'::regnamespace AND c.relkind = 'r' ORDER BY c.relname, a.attnum"
    ):
        found[table][column] = of_type
    return dict(found)


def changes_of(table: str, column: str, of_type: str) -> dict[str, str] | None:
    """How a column can be wrong: what the change is called, and what is SET; None if no rule knows such a column."""
    set_to = f"SET {column} = "
    if column in ROW_IDS:
        return {}
    if words := WORDS.get(f"{table}.{column}"):
        changes = {f"to {word}": f"{set_to}'{word}' WHERE t.{column} IS DISTINCT FROM '{word}'" for word in words}
        if (table, column) == ("transfer", "kind"):
            changes |= {f"and books to {word}": f"{OF_KIND} WHERE k.kind = '{word}'" for word in words}
    elif of_type == "timestamp with time zone":
        changes = {
            f"{days:+,} days": f"{set_to}coalesce({column}, clock_timestamp()) + interval '{days} days'"
            for days in (-1, 1, 1_000)
        }
    elif of_type == "xid8":
        changes = {
            what: f"{set_to}CAST(CAST(CAST(CAST({column} AS text) AS bigint) + {by} AS text) AS xid8)"
            for what, by in (("+1", 1), ("-1", -1), ("+1,000,000", 1_000_000))
        }
    elif column in NUMBERS:
        changes = {"+1": f"{set_to}{column} + 1", "-1": f"{set_to}{column} - 1"}
    elif column == "account_id":
        another = "(SELECT min(o.account_id) FROM kino.account o WHERE o.account_id <> t.account_id)"
        changes = {"to another": set_to + another, "to none's": f"{set_to}'nobody'"}
    elif column in LOTS:
        changes = {
            "to another of the account": set_to + ANOTHER_LOT.format(column=column, same="true"),
            "to another account's": set_to + ANOTHER_LOT.format(column=column, same="false"),
            "to none": f"{set_to}999",
        }
    elif column == "charge_id":
        changes = {"to another": set_to + ANOTHER_CHARGE, "to a new": set_to + A_NEW_CHARGE, "to none": f"{set_to}999"}
    elif column in NAMES:
        changes = {"to another": f"{set_to}'another'"}
    else:
        return None
    return changes | {"to null": f"{set_to}NULL WHERE t.{column} IS NOT NULL"}


def rows_of(superuser: Connection, table: str) -> Iterator[tuple[str, str]]:
    """The last row of each shape, as (shape, place); rows are told apart by their place in the table's file."""
    yield from superuser.execute(
        f"SELECT shape, max(place)::text FROM (SELECT {SHAPES[table]} AS shape, t.ctid AS place FROM kino.{table} t)"
        " AS shaped GROUP BY shape ORDER BY shape".encode()
    ).fetchall()


def corruptions(superuser: Connection, table: str, columns: Mapping[str, str]) -> Iterator[Corruption]:
    """Every change of this table, in a fixed order."""
    for shape, place in rows_of(superuser, table):
        for column, of_type in columns.items():
            for change, what in (changes_of(table, column, of_type) or {}).items():
                joins = "AND" if " WHERE " in what.rpartition(")")[2] else "WHERE"
                yield Corruption(
                    table, shape, column, change, f"UPDATE kino.{table} AS t {what} {joins} t.ctid = '{place}'"
                )
        yield Corruption(table, shape, "row", "deleted", f"DELETE FROM kino.{table} WHERE ctid = '{place}'")
        yield Corruption(table, shape, "row", "twice", _again(table, columns, place))


def _again(table: str, columns: Mapping[str, str], place: str) -> str:
    """Add the row once more, under a new number or name where the key asks for one."""
    keys: dict[str, str] = {
        "account": "account_id || ' again'",
        "charge": "job_id || ' again'",
        "charge_line": "seq + 100",
        "credit_lot": "reference || ' again'",
        "inbox_event": "event_id || ' again'",
    }
    new = {"account": "account_id", "charge": "job_id", "charge_line": "seq", "credit_lot": "reference"}
    key = new.get(table, "event_id" if table == "inbox_event" else None)
    generated = {"transfer": "transfer_id", "credit_lot": "lot_id", "charge": "charge_id"}.get(table)
    if table in {"account_status_change", "lot_change"}:
        generated = "change_id"
    names = [column for column in columns if column != generated]
    values = [keys[table] if column == key else column for column in names]
    if key is None and generated is None:
        values = ["999" if column in {"charge_id", "lot_id"} else column for column in names]
    return (
        f"INSERT INTO kino.{table} ({', '.join(names)}) SELECT {', '.join(values)} FROM kino.{table} AS t"
        f" WHERE ctid = '{place}'"
    )


def plant(superuser: Connection, corruption: Corruption) -> tuple[bool, str | None]:
    """Make the change in a savepoint; returns whether anything changed, and the constraint that refused it, if any."""
    table = f"SELECT sum(hashtextextended(CAST(t AS text), 0)) FROM kino.{corruption.table} t".encode()
    before = superuser.execute(table).fetchone()
    try:
        with superuser.transaction():
            superuser.execute(corruption.statement.encode())
    except psycopg.errors.IntegrityError as error:
        return False, error.diag.constraint_name or f"{error.diag.column_name} is never null"
    return superuser.execute(table).fetchone() != before, None


def lift(superuser: Connection, table: str, constraint: str) -> bool:
    """Take away a constraint that old rows need not obey, in the present transaction; returns whether it is one."""
    lifted = superuser.execute(
        "SELECT 1 FROM pg_constraint WHERE conname = %s AND conrelid = %s::regclass AND NOT convalidated",
        [constraint, f"kino.{table}"],
    ).fetchone()
    if lifted:
        superuser.execute(f"ALTER TABLE kino.{table} DROP CONSTRAINT {constraint}".encode())
    return lifted is not None
