"""Every function of the ledger with an item that it takes, and calls that say how they were refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import psycopg
from hypothesis import HealthCheck, settings

from tests.conftest import Database
from tests.ledger_items import (
    DEADLINE,
    Connection,
    Item,
    a_charge,
    a_grant,
    a_reversal,
    a_settlement,
    a_status,
    session,
)

ON_ONE_DATABASE = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
"""Each example is rolled back, so one database serves all of them."""

REFUSED_BY_JSONB = ("22P02", "22P05")
"""NUL and lone surrogates: Postgres makes no jsonb of them, so no function of ours is reached."""


class Raw(str):
    """A number as it is written in JSON, which Python could not write so."""

    __slots__ = ()


def written(value: object) -> str:
    """Write a value as JSON, `Raw` numbers as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


# --- what each function takes ----------------------------------------------------------------------------------


OPEN, CAPTURED, REFUNDED, OF_EVE = (1, 2, 3), (4, 5, 6), 7, 8
"""The charges of the `arranged` ledger."""
ACCOUNTS = ("ada", "eve", "bob")


@dataclass(frozen=True)
class Function:
    """One function: who calls it, the kind of each field, and items that it takes."""

    role: str
    kinds: Mapping[str, str]
    samples: Sequence[Item]
    """Three items that can stand in one call."""
    optional: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()
    """Fields in which null says what their absence says."""


FUNCTIONS: Final[Mapping[str, Function]] = {
    "grant_lots": Function(
        "kino_product",
        {
            "reference": "id",
            "account_id": "id",
            "credits": "credits above zero",
            "class": "word",
            "expires_at": "instant",
            "priority": "priority",
            "purchase_id": "id",
            "actor": "text",
        },
        [a_grant(f"new {n}", expires_at=DEADLINE, priority=5, purchase_id="order-1", actor="shop") for n in range(3)],
        optional=frozenset({"expires_at", "priority", "purchase_id", "actor"}),
        nullable=frozenset({"expires_at", "purchase_id"}),
    ),
    "open_charges": Function(
        "kino_product",
        {"job_id": "id", "account_id": "id", "credits": "credits", "deadline_at": "instant", "actor": "text"},
        [a_charge(f"new {n}", actor="shop") for n in range(3)],
        optional=frozenset({"actor"}),
    ),
    "settle_charges": Function(
        "kino_worker",
        {
            "charge_id": "charge",
            "kind": "word",
            "reason": "word",
            "clause": "word",
            "policy_version": "text",
            "ending": "text",
            "account_status": "word",
            "event_source": "event's id",
            "event_id": "event's id",
            "event_time": "event's instant",
        },
        [a_settlement(charge_id) for charge_id in OPEN],
    ),
    "held_lots": Function("kino_worker", {"charge_id": "charge"}, [{"charge_id": charge_id} for charge_id in OPEN]),
    "reverse_charges": Function(
        "kino_oncall",
        {
            "charge_id": "charge",
            "reason": "word",
            "clause": "word",
            "policy_version": "text",
            "reference": "id",
            "actor": "text",
        },
        [a_reversal(charge_id) for charge_id in CAPTURED],
    ),
    "set_account_status": Function(
        "kino_oncall",
        {"account_id": "id", "status": "word", "reason": "text", "actor": "text"},
        [a_status(account_id) for account_id in ACCOUNTS],
    ),
}

TYPES: Final[Sequence[Any]] = (None, True, False, 12, "12", [], [12], {}, {"a": 12})
"""A value of every JSON type."""
RIGHT_TYPE: Final[Mapping[str, type]] = {
    "credits": int,
    "credits above zero": int,
    "charge": int,
    "priority": int,
}
"""The type of a kind of field; of all others it is a string."""


# --- a ledger with a past, and calls ---------------------------------------------------------------------------


class Refusal(NamedTuple):
    """What a caller is told."""

    sqlstate: str | None
    message: str
    detail: str | None


def call(connection: Connection, function: str, items: object) -> list[Any]:
    """Call a function on items written as JSON; None is SQL's null."""
    parameter = None if items is None else written(items)
    return connection.execute(f"SELECT * FROM kino.{function}(%s::jsonb)".encode(), [parameter]).fetchall()


def attempt(connection: Connection, function: str, items: object) -> Refusal | list[Any]:
    """Call a function in a savepoint that is rolled back; returns its rows, or how it refused."""
    try:
        with connection.transaction(force_rollback=True):
            return call(connection, function, items)
    except psycopg.Error as error:
        return Refusal(error.sqlstate, error.diag.message_primary or "", error.diag.message_detail)


def everything(database: Database) -> dict[str, list[str]]:
    """Every row of every table."""
    with session(database, "postgres") as superuser:
        tables = superuser.execute(b"SELECT tablename FROM pg_tables WHERE schemaname = 'kino'").fetchall()
        return {
            table: [row for (row,) in superuser.execute(f"SELECT t::text FROM kino.{table} t ORDER BY 1".encode())]
            for (table,) in tables
        }


@contextmanager
def nothing_left_behind(database: Database, role: str) -> Iterator[Connection]:
    """Open a session whose calls are refused or rolled back; fail if any row differs after its commit."""
    before = everything(database)
    with session(database, role) as connection:
        yield connection
    assert everything(database) == before


def names(refusal: Refusal | list[Any], *words: str, sqlstate: str = "KR006") -> bool:
    """Tell whether a call was refused as it should be: by this SQLSTATE, naming the item, and saying no more."""
    return (
        isinstance(refusal, Refusal)
        and refusal.sqlstate == sqlstate
        and refusal.detail is None
        and all(word in refusal.message for word in words)
    )


def wrong(connection: Connection, function: str, calls: Sequence[tuple[object, Sequence[str]]]) -> list[Any]:
    """Try calls that must all be refused, naming these words; returns those that were not, and what they said."""
    found = [(items, words, attempt(connection, function, items)) for items, words in calls]
    return [(items, refusal) for items, words, refusal in found if not names(refusal, *words)]
