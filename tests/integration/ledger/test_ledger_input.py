"""What the ledger's functions take: every item is read whole, or refused by name and leaves nothing behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import product
from typing import Any, Final, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kino_refunds.ledger.callers import ITEMS_MAX, RAISED
from kino_refunds.ledger.values import CREDITS_MAX, require_id, require_instant
from kino_refunds.reconciliation.integrity import violations
from tests.conftest import Database

Connection = psycopg.Connection[Any]
Item = dict[str, Any]

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

DEADLINE = "2030-01-01T00:00:00Z"
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


def a_settlement(charge_id: int, **terms: Any) -> Item:
    return {
        "charge_id": charge_id,
        "kind": "refunded",
        "reason": "timeout",
        "clause": "2.timeout",
        "policy_version": "v",
        "ending": "timeout.no_result",
        "account_status": "active",
        "event_source": "s",
        "event_id": f"event {charge_id}",
        "event_time": "2026-01-01T00:00:00Z",
        **terms,
    }


def a_reversal(charge_id: int, **terms: Any) -> Item:
    return {
        "charge_id": charge_id,
        "reason": "timeout",
        "clause": "2.timeout",
        "policy_version": "v",
        "reference": "ticket-1",
        "actor": "ann",
        **terms,
    }


def a_grant(reference: str, **terms: Any) -> Item:
    return {"reference": reference, "account_id": "ada", "credits": 10, "class": "purchased", **terms}


def a_charge(job_id: str, **terms: Any) -> Item:
    return {"job_id": job_id, "account_id": "ada", "credits": 10, "deadline_at": DEADLINE, **terms}


def a_status(account_id: str, **terms: Any) -> Item:
    return {"account_id": account_id, "status": "suspended", "reason": "asked for", "actor": "ann", **terms}


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

NO_NUMBERS_OF_CREDITS = (
    -1,
    1.5,
    2**53,
    2**63,
    2**64,
    10**400,
    Raw("1e400"),
    Raw("-1e400"),
    Raw("1e-400"),
    Raw("1.0"),
    "5",
    "",
    "ten",
    "0x10",
)
NO_INSTANTS = (
    "",
    " ",
    "tomorrow",
    "now",
    "today",
    "epoch",
    "infinity",
    "-infinity",
    "1893456000",
    "2030-01-01",
    "2030-01-01T00:00:00",
    "2030-01-01T00:00Z",
    "20300101T000000Z",
    "2030-W01-1T00:00:00Z",
    "2030-1-1T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00+00:01",
    "10000-01-01T00:00:00Z",
    "-2030-01-01T00:00:00Z",
    "+2030-01-01T00:00:00Z",
    "0044-03-15T00:00:00Z BC",
    "2029-02-29T00:00:00Z",
    "2100-02-29T00:00:00Z",
    "2030-04-31T00:00:00Z",
    "2030-00-01T00:00:00Z",
    "2030-13-01T00:00:00Z",
    "2030-01-00T00:00:00Z",
    "2030-01-32T00:00:00Z",
    "2030-01-01T24:00:00Z",
    "2030-01-01T23:60:00Z",
    "2030-01-01T23:59:60Z",
    "2030-01-01T00:00:00+16:00",
    "2030-01-01T00:00:00-16:00",
    "2030-01-01T00:00:00+05:60",
    "2030-01-01T00:00:00+5:00",
    "2030-01-01T00:00:00+0500",
    "2030-01-01T00:00:00+05",
    "2030-01-01T00:00:00+05:00:30",
    "2030-01-01T00:00:00\u221205:00",
    "2030-01-01T00:00:00 +05:00",
    "2030-01-01T00:00:00 UTC",
    "2030-01-01T00:00:00 Europe/Berlin",
    "2030-01-01T00:00:00ZZ",
    "2030-01-01T00:00:00.Z",
    "2030-01-01T00:00:00,5Z",
    "2030-01-01T00:00:00x5Z",
    "2030-01-01T00:00:00.1234567890Z",
    " 2030-01-01T00:00:00Z",
    "2030-01-01T00:00:00Z ",
    "2030-01-01T00:00:00Z\n",
    "2030-01-01\u00a000:00:00Z",
    "\u0662\u0660\u0663\u0660-01-01T00:00:00Z",
)
NO_IDS = (
    "",
    " ",
    "a" * 129,
    "\u00e9" * 129,
    "\U0001f3ac" * 129,
    " a",
    "a ",
    *(f"a{space}" for space in "\t\n\r\x0b\x0c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000"),
    *(f"{space}a" for space in "\t\n\u00a0\u3000"),
    *(f"a{control}b" for control in "\x01\x08\x1b\x1f\x7f\x80\x9f"),
    *(f"a{bidi}b" for bidi in "\u061c\u200e\u200f\u202a\u202e\u2066\u2069"),
    *(f"a{unseen}b" for unseen in "\u00ad\u180e\u200b\u200c\u200d\u2060\ufeff\U000e0001\U000e0020"),
    *(f"a{unknown}b" for unknown in "\u0378\ue000\ufdd0\ufffe\uffff\U000f0000\U0010ffff"),
)
NO_TEXTS = ("", " ", "   ", "a" * 1001, *(f"a{control}b" for control in "\x01\t\n\r\x1b\x1f\x7f\x80\x9f"))

BAD: Final[Mapping[str, Sequence[Any]]] = {
    "id": NO_IDS,
    "text": NO_TEXTS,
    "event's id": NO_TEXTS,
    "word": ("", " ", "x", "Refunded", "REFUNDED", "refunded ", "1 ", "active\n", "act\u0131ve", "a" * 10_000),
    "charge": (*NO_NUMBERS_OF_CREDITS, 0, Raw("-0")),
    "credits": NO_NUMBERS_OF_CREDITS,
    "credits above zero": (*NO_NUMBERS_OF_CREDITS, 0, Raw("-0"), Raw("0e5")),
    "priority": (1.5, 2**31, -(2**31) - 1, 2**63, Raw("1e400"), Raw("1.0"), "5", ""),
    "instant": (
        *NO_INSTANTS,
        "9998-12-31T23:59:59.9999999Z",
        "9998-12-31T23:59:59-00:01",
        "9999-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
    ),
    "event's instant": (*NO_INSTANTS, "9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59-00:01"),
}
"""For each kind of field, values of the right type that are none of it, and numbers written as text."""


# --- a ledger with a past, and calls ---------------------------------------------------------------------------


class Refusal(NamedTuple):
    """What a caller is told."""

    sqlstate: str | None
    message: str
    detail: str | None


@contextmanager
def session(database: Database, role: str) -> Iterator[Connection]:
    """Open a session of a role's own."""
    with psycopg.connect(database.url(role).replace("+psycopg", "")) as connection:
        yield connection


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


@pytest.fixture
def arranged(database: Database) -> Database:
    """A ledger with three accounts and eight charges: open, captured, refunded, and one of eve's."""
    with session(database, "kino_product") as shop:
        call(shop, "grant_lots", [a_grant(f"first of {each}", account_id=each, credits=5_000) for each in ACCOUNTS])
        jobs = [*OPEN, *CAPTURED, REFUNDED]
        call(shop, "open_charges", [a_charge(f"job {n}") for n in jobs])
        call(shop, "open_charges", [a_charge(f"job {OF_EVE}", account_id="eve")])
    with session(database, "kino_worker") as worker:
        captured = {"kind": "captured", "reason": "completed", "clause": "1"}
        call(worker, "settle_charges", [a_settlement(n, **captured) for n in CAPTURED])
        call(worker, "settle_charges", [a_settlement(REFUNDED)])
    return database


@pytest.fixture
def ledger(arranged: Database) -> Iterator[Database]:
    """The arranged ledger; its books are sound when the test ends."""
    yield arranged
    with session(arranged, "kino_read") as reader:
        assert violations(reader) == []


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


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_not_an_array_of_objects_is_refused(ledger: Database, function: str) -> None:
    """A call that brings no array, or something else than objects in it, is refused and told which one."""
    samples = FUNCTIONS[function].samples
    whole: list[tuple[object, list[str]]] = [
        (items, ["items must be a JSON array"])
        for items in (None, Raw("null"), True, 5, "x", "[]", {}, samples[0], {"items": list(samples)})
    ]
    parts: list[tuple[object, list[str]]] = [
        ([*samples[:2], part], ["items[2] must be an object"])
        for part in (None, True, 5, "x", [], [samples[2]], [None])
    ]
    alone: list[tuple[object, list[str]]] = [
        (Raw(items), ["items[0]"]) for items in ("[null]", "[[]]", "[5]", '["x"]', "[{}]")
    ]

    with nothing_left_behind(ledger, FUNCTIONS[function].role) as connection:
        assert wrong(connection, function, [*whole, *parts, *alone]) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_items_are_no_rows(ledger: Database, function: str) -> None:
    """An empty array is answered by no rows, and writes none."""
    with nothing_left_behind(ledger, FUNCTIONS[function].role) as connection:
        assert call(connection, function, []) == []


def items_of(ledger: Database, function: str, count: int) -> list[Item]:
    """Prepare the ledger for a call of so many items that all belong."""
    numbers = range(count)
    if function == "grant_lots":
        return [a_grant(f"many {n}") for n in numbers]
    if function == "open_charges":
        return [a_charge(f"many {n}", credits=n % 3) for n in numbers]
    with session(ledger, "kino_product") as shop:
        if function == "set_account_status":
            accounts = [f"many {n}" for n in numbers]
            call(shop, "grant_lots", [a_grant(f"for {each}", account_id=each) for each in accounts])
            return [a_status(each) for each in accounts]
        charges = [row[0] for row in call(shop, "open_charges", [a_charge(f"many {n}", credits=1) for n in numbers])]
    if function == "settle_charges":
        return [a_settlement(charge_id) for charge_id in charges]
    if function == "held_lots":
        return [{"charge_id": charge_id} for charge_id in charges]
    with session(ledger, "kino_worker") as worker:
        captured = {"kind": "captured", "reason": "completed", "clause": "1"}
        call(worker, "settle_charges", [a_settlement(charge_id, **captured) for charge_id in charges])
    return [a_reversal(charge_id) for charge_id in charges]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_takes_a_thousand_items_and_no_more(ledger: Database, function: str) -> None:
    """1,000 items are done in one call, one row back for each in their order; the 1,001st is refused by its place."""
    items = items_of(ledger, function, ITEMS_MAX)
    key = next(iter(items[0]))

    with session(ledger, FUNCTIONS[function].role) as connection:
        too_many = attempt(connection, function, [*items, FUNCTIONS[function].samples[0]])
        rows = call(connection, function, items)

    place = {"grant_lots": 1, "open_charges": 1}.get(function, 0)
    assert names(too_many, f"items[{ITEMS_MAX}]"), too_many
    assert [row[place] for row in rows] == [item[key] for item in items]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_missing_key_is_named(ledger: Database, function: str) -> None:
    """An item without one of its keys is refused; an optional key may be left out."""
    spec = FUNCTIONS[function]
    without = {key: {k: v for k, v in spec.samples[2].items() if k != key} for key in spec.kinds}
    required = [key for key in spec.kinds if key not in spec.optional]

    with nothing_left_behind(ledger, spec.role) as connection:
        refused = wrong(
            connection, function, [([*spec.samples[:2], without[key]], ["items[2]", key]) for key in required]
        )
        taken = {key: attempt(connection, function, [*spec.samples[:2], without[key]]) for key in spec.optional}

    assert refused == []
    assert {key: len(rows) for key, rows in taken.items() if isinstance(rows, list)} == dict.fromkeys(spec.optional, 3)


UNKNOWN_KEYS = ("x", "charge_Id", " kind", "opened_at", "created_at", "settled_at", "remaining", "xid", "lot_id", "")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_key_is_named(ledger: Database, function: str) -> None:
    """An item with a key that the function does not read is refused: no caller thinks that it was read."""
    spec = FUNCTIONS[function]
    calls = [([*spec.samples[:2], {**spec.samples[2], key: 1}], ["items[2]", key]) for key in UNKNOWN_KEYS]

    with nothing_left_behind(ledger, spec.role) as connection:
        assert wrong(connection, function, calls) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_refusal_is_one_short_printable_line(ledger: Database, function: str) -> None:
    """An error is at most 1,000 printable characters, so a caller's text cannot break or fill a log."""
    spec = FUNCTIONS[function]
    keys = [{f"key\n\x1b[31m{n}\u202e": n} for n in range(3)]
    many = {f"key {n} {'x' * 50}": n for n in range(2_000)}
    values = [
        [{**spec.samples[0], field: f"a\n\x1b[31m\u202e{'x' * 5_000}"}]
        for field, kind in spec.kinds.items()
        if kind not in RIGHT_TYPE
    ]
    with nothing_left_behind(ledger, spec.role) as connection:
        calls = [*([{**spec.samples[0], **key}] for key in keys), [{**spec.samples[0], **many}], *values]
        found = [attempt(connection, function, items) for items in calls]

    messages = [refusal.message for refusal in found if isinstance(refusal, Refusal)]
    assert len(messages) == len(calls)
    assert [(len(m), m[:200]) for m in messages if len(m) > 1_000 or not m.isprintable()] == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_value_of_the_wrong_json_type_is_named(ledger: Database, function: str) -> None:
    """Each key takes one JSON type, and a value of any other is refused by item and key."""
    spec = FUNCTIONS[function]
    calls = [
        ([*spec.samples[:2], {**spec.samples[2], field: value}], [f"items[2].{field}"])
        for field, kind in spec.kinds.items()
        for value in TYPES
        if type(value) is not RIGHT_TYPE.get(kind, str) and not (value is None and field in spec.nullable)
    ]

    with nothing_left_behind(ledger, spec.role) as connection:
        assert wrong(connection, function, calls) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_value_that_is_none_of_its_kind_is_named(ledger: Database, function: str) -> None:
    """An id, a number, an instant, a word or a text that breaks its rule is refused by item and key."""
    spec = FUNCTIONS[function]
    calls = [
        ([*spec.samples[:2], {**spec.samples[2], field: value}], [f"items[2].{field}"])
        for field, kind in spec.kinds.items()
        for value in BAD[kind]
    ]

    with nothing_left_behind(ledger, spec.role) as connection:
        assert wrong(connection, function, calls) == []


@pytest.mark.parametrize("field", ["event_source", "event_id"])
def test_an_event_is_named_as_it_was_stored(ledger: Database, field: str) -> None:
    """Ids of before today's rule, white space at their ends, still settle; what nobody can read is no id."""
    samples = FUNCTIONS["settle_charges"].samples

    with nothing_left_behind(ledger, "kino_worker") as connection:
        taken = attempt(connection, "settle_charges", [{**samples[0], field: " of before "}])
        calls = [
            ([*samples[:2], {**samples[2], field: text}], [f"items[2].{field}"])
            for text in ("", " ", "a\u200bb", "a\u202eb", "a\nb", "\xa0", "a" * 1_001)
        ]
        assert (isinstance(taken, list), wrong(connection, "settle_charges", calls)) == (True, [])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nul_and_lone_surrogates_are_refused_before_the_function(ledger: Database, function: str) -> None:
    """Postgres itself makes no jsonb of the escape of NUL, or of half a surrogate pair, wherever it stands."""
    spec = FUNCTIONS[function]
    calls = [
        [{**spec.samples[0], field: f"a{half}b"}]
        for field, kind in spec.kinds.items()
        for half in ("\x00", "\ud800", "\udfff", "\udc00\ud800")
        if kind not in RIGHT_TYPE
    ]

    with nothing_left_behind(ledger, spec.role) as connection:
        found = [attempt(connection, function, items) for items in calls]

    assert [refusal for refusal in found if isinstance(refusal, list) or refusal.sqlstate not in REFUSED_BY_JSONB] == []


ACCEPTED: Final[Mapping[str, Sequence[Any]]] = {
    "id": (
        "a" * 128,
        "\U0001f3ac" * 128,
        "a b",
        "\u00e9",
        "\u65e5\u672c",
        "a\u0301",
        "'; --",
        "a\\b",
        '"',
        "NULL",
        "{}",
    ),
    "text": ("a" * 1000, "\u65e5\u672c", "'; --", "a\\b", "two words "),
    "event's id": ("a" * 128, "\U0001f3ac" * 128, "overdue:1:timed_out", "a b", "a\\b"),
    "credits": (0, 1, Raw("1e2"), Raw("0.1e1"), Raw("-0"), 10),
    "credits above zero": (1, Raw("1e2"), CREDITS_MAX, Raw(str(CREDITS_MAX))),
    "priority": (0, -(2**31), 2**31 - 1, Raw("1e2")),
    "instant": ("0001-01-01T00:00:00Z", "9998-12-31T23:59:59.999999Z", "9998-12-31T23:59:59+15:59"),
    "event's instant": ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59+15:59"),
}
"""For each kind of field, what stands at the edge and is still taken."""


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_value_at_the_edge_of_its_kind_is_taken(ledger: Database, function: str) -> None:
    """The longest, smallest and oddest values that the rule of a field allows are taken."""
    spec = FUNCTIONS[function]
    named = {"set_account_status": {"account_id"}, "open_charges": {"account_id"}}.get(function, set())

    with nothing_left_behind(ledger, spec.role) as connection:
        found = [
            (field, value, attempt(connection, function, [{**spec.samples[0], field: value}]))
            for field, kind in spec.kinds.items()
            if field not in named
            for value in ACCEPTED.get(kind, ())
        ]

    assert [each for each in found if isinstance(each[2], Refusal)] == []


OFFSETS = st.integers(-15 * 60 - 59, 15 * 60 + 59).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(at=st.datetimes(timezones=OFFSETS), separator=st.sampled_from("Tt "), zulu=st.sampled_from(["+00:00", "Z", "z"]))
@ON_ONE_DATABASE
def test_an_instant_is_read_as_python_reads_it(ledger: Database, at: datetime, separator: str, zulu: str) -> None:
    """Every instant that Python's rule takes is stored as the same instant, and every other one is refused."""
    text = at.isoformat(sep=separator).replace("+00:00", zulu)
    try:
        expected = require_instant("deadline_at", at)
    except ValueError:
        expected = None

    with session(ledger, "kino_product") as connection:
        connection.execute(b"SET TimeZone = 'UTC'")
        found = attempt(connection, "open_charges", [a_charge("new", deadline_at=text)])

    if expected is None:
        assert names(found, "items[0].deadline_at"), found
    else:
        assert isinstance(found, list), found
        assert found[0][4] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.loads(json.dumps(value), parse_constant=str))


@given(data=st.data())
@ON_ONE_DATABASE
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_json_is_taken_or_refused_by_an_error_of_ours(ledger: Database, function: str, data: st.DataObject) -> None:
    """No JSON value, in place of an item, a field or the array, makes a function fail in any other way."""
    spec = FUNCTIONS[function]
    items: Any = [dict(item) for item in spec.samples]
    match data.draw(st.sampled_from(["field", "fields", "item", "array"])):
        case "field":
            items[data.draw(st.integers(0, 2))][data.draw(st.sampled_from(sorted(spec.kinds)))] = data.draw(JSON)
        case "fields":
            items[0] = {field: data.draw(JSON) for field in spec.kinds}
        case "item":
            items[data.draw(st.integers(0, 2))] = data.draw(JSON)
        case _:
            items = data.draw(JSON)

    with session(ledger, spec.role) as connection:
        found = attempt(connection, function, items)

    if isinstance(found, Refusal) and found.sqlstate not in REFUSED_BY_JSONB:
        assert (found.sqlstate in RAISED, found.detail) == (True, None), found


# --- what does not belong together -----------------------------------------------------------------------------

KINDS = ("captured", "refunded")
CLAUSES = ("1", "2.failure", "2.timeout", "2.safety", "6.terminated")
CLAUSE_OF = {"generation_failure": "2.failure", "timeout": "2.timeout", "content_policy_rejection": "2.safety"}
REASONS = ("completed", "not_covered", *CLAUSE_OF)

SETTLEMENTS = {
    ("captured", "completed", "1"),
    *(("captured", "not_covered", clause) for clause in CLAUSES if clause != "1"),
    *(("refunded", reason, clause) for reason, clause in CLAUSE_OF.items()),
}
"""The endings that the policy knows."""


FORFEITS = "terminated_for_violation"


def test_only_the_endings_that_the_policy_knows_settle_a_charge(ledger: Database) -> None:
    """Of all kinds, reasons and clauses, those that belong together are taken and no others."""
    with nothing_left_behind(ledger, "kino_worker") as connection:
        found = {
            terms: attempt(
                connection,
                "settle_charges",
                [
                    a_settlement(
                        1, account_status=FORFEITS, **dict(zip(("kind", "reason", "clause"), terms, strict=True))
                    )
                ],
            )
            for terms in product(KINDS, REASONS, CLAUSES)
        }

    assert {terms for terms, answer in found.items() if isinstance(answer, list)} == SETTLEMENTS
    assert [answer for answer in found.values() if isinstance(answer, Refusal) and not names(answer, "items[0]")] == []


def test_only_a_violation_forfeits_a_refund(ledger: Database) -> None:
    """Clause 6.terminated belongs to an account that was terminated for violation, and to no other."""
    terms = {"kind": "captured", "reason": "not_covered", "clause": "6.terminated"}
    with nothing_left_behind(ledger, "kino_worker") as connection:
        for status in ("active", "suspended", "terminated"):
            answer = attempt(connection, "settle_charges", [a_settlement(1, account_status=status, **terms)])
            assert isinstance(answer, Refusal)
            assert names(answer, "items[0].account_status")


def test_only_a_refundable_ending_reverses_a_charge(ledger: Database) -> None:
    """A correction names one of the three refundable reasons, under its own clause."""
    with nothing_left_behind(ledger, "kino_oncall") as connection:
        found = {
            (reason, clause): attempt(connection, "reverse_charges", [a_reversal(4, reason=reason, clause=clause)])
            for reason, clause in product(REASONS, CLAUSES)
        }

    assert {terms for terms, answer in found.items() if isinstance(answer, list)} == set(CLAUSE_OF.items())
    assert [answer for answer in found.values() if isinstance(answer, Refusal) and not names(answer, "items[0]")] == []


@pytest.mark.parametrize(
    ("function", "items", "named"),
    [
        ("settle_charges", [a_settlement(1), a_settlement(2), a_settlement(1)], ["items[2]", "charge 1"]),
        ("reverse_charges", [a_reversal(4), a_reversal(5), a_reversal(4)], ["items[2]", "charge 4"]),
        ("set_account_status", [a_status("ada"), a_status("eve"), a_status("ada")], ["items[2]", "ada"]),
    ],
)
def test_one_thing_twice_in_a_call_is_refused(
    ledger: Database, function: str, items: list[Item], named: list[str]
) -> None:
    """A charge or an account that stands twice in one call is named, by its place or its id."""
    with nothing_left_behind(ledger, FUNCTIONS[function].role) as connection:
        found = attempt(connection, function, items)

    assert isinstance(found, Refusal)
    assert (found.sqlstate, found.detail) == ("KR006", None)
    assert [word for word in named if word in found.message] != [], found.message


def test_a_grant_or_a_charge_twice_in_a_call_is_one(ledger: Database) -> None:
    """The same grant or job twice in one call is given or charged once, and both items are answered."""
    with nothing_left_behind(ledger, "kino_product") as connection:
        granted = attempt(connection, "grant_lots", [a_grant("new"), a_grant("other"), a_grant("new")])
        charged = attempt(connection, "open_charges", [a_charge("new"), a_charge("other"), a_charge("new")])

    assert isinstance(granted, list)
    assert isinstance(charged, list)
    assert (granted[0], charged[0]) == (granted[2], charged[2])
    assert (granted[0][0], charged[0][0]) != (granted[1][0], charged[1][0])


@pytest.mark.parametrize(
    "other",
    [
        {"account_id": "eve"},
        {"credits": 11},
        {"class": "courtesy"},
        {"expires_at": DEADLINE},
        {"priority": 7},
        {"purchase_id": "order-2"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_reference_on_other_terms_is_a_conflict(ledger: Database, other: Item) -> None:
    """The reference of a grant that was given is refused with any other term, in the same call or later."""
    earlier = a_grant("first of ada", credits=5_000)

    with nothing_left_behind(ledger, "kino_product") as connection:
        in_one_call = attempt(connection, "grant_lots", [a_grant("new"), a_grant("new", **other)])
        later = attempt(connection, "grant_lots", [{**earlier, **other}])
        same = attempt(connection, "grant_lots", [earlier])

    assert names(in_one_call, "'new'", sqlstate="KR001"), in_one_call
    assert names(later, "'first of ada'", next(iter(other)), sqlstate="KR001"), later
    assert isinstance(same, list)


REFUSALS: Final[Sequence[tuple[str, str, list[Item], str, str]]] = (
    ("a reference of the ledger's own", "grant_lots", [a_grant("successor:1:1")], "KR006", "items[0].reference"),
    ("a job on other terms in one call", "open_charges", [a_charge("n"), a_charge("n", credits=9)], "KR002", "'n'"),
    ("a job with other credits", "open_charges", [a_charge("job 1", credits=9)], "KR002", "'job 1'"),
    ("another account's job", "open_charges", [a_charge("job 8")], "KR002", "'job 8'"),
    ("a captured job", "open_charges", [a_charge("job 4")], "KR003", "'job 4'"),
    ("a refunded job", "open_charges", [a_charge("job 7")], "KR003", "'job 7'"),
    ("an unknown account", "open_charges", [a_charge("n", account_id="zoe")], "KR005", "'zoe'"),
    ("more than there is", "open_charges", [a_charge("n", credits=5_000)], "KR004", "'n'"),
    ("the most there can be", "open_charges", [a_charge("n", credits=CREDITS_MAX)], "KR004", "'n'"),
    (
        "together more than there is",
        "open_charges",
        [a_charge(f"n{i}", credits=2_500) for i in range(2)],
        "KR004",
        "'n1'",
    ),
    ("an unknown charge", "settle_charges", [a_settlement(1), a_settlement(999)], "KR010", "charge 999"),
    ("the largest charge id", "settle_charges", [a_settlement(CREDITS_MAX)], "KR010", f"charge {CREDITS_MAX}"),
    ("a captured charge", "settle_charges", [a_settlement(1), a_settlement(4)], "KR003", "charge 4"),
    ("a refunded charge", "settle_charges", [a_settlement(7)], "KR003", "charge 7"),
    ("an unknown charge to reverse", "reverse_charges", [a_reversal(999)], "KR011", "charge 999"),
    ("an open charge to reverse", "reverse_charges", [a_reversal(4), a_reversal(1)], "KR011", "charge 1"),
    ("a refunded charge to reverse", "reverse_charges", [a_reversal(7)], "KR011", "charge 7"),
    ("an unknown account to suspend", "set_account_status", [a_status("ada"), a_status("zoe")], "KR005", "'zoe'"),
)


@pytest.mark.parametrize(
    ("function", "items", "sqlstate", "named"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_what_the_ledger_cannot_do_is_refused_by_name(
    ledger: Database, function: str, items: list[Item], sqlstate: str, named: str
) -> None:
    """A call that one item makes impossible is refused whole, by that item's id and its own SQLSTATE."""
    with nothing_left_behind(ledger, FUNCTIONS[function].role) as connection:
        found = attempt(connection, function, items)

    assert names(found, named, sqlstate=sqlstate), found


def test_a_reversal_again_changes_nothing(ledger: Database) -> None:
    """The same reversal again is answered as the first was; under other terms it is a conflict."""
    with session(ledger, "kino_oncall") as connection:
        first = call(connection, "reverse_charges", [a_reversal(4)])

    with nothing_left_behind(ledger, "kino_oncall") as connection:
        again = call(connection, "reverse_charges", [a_reversal(4)])
        others = [{"reference": "ticket-2"}, {"reason": "generation_failure", "clause": "2.failure"}]
        conflicts = [attempt(connection, "reverse_charges", [a_reversal(4, **other)]) for other in others]

    assert again == first
    assert [each for each in conflicts if not names(each, "charge 4", sqlstate="KR002")] == []


def test_a_suspended_account_is_not_charged(ledger: Database) -> None:
    """An account that is not active opens no charge, and an earlier charge of its own is still answered."""
    with session(ledger, "kino_oncall") as connection:
        call(connection, "set_account_status", [a_status("ada")])

    with nothing_left_behind(ledger, "kino_product") as connection:
        refused = attempt(connection, "open_charges", [a_charge("new")])
        earlier = attempt(connection, "open_charges", [a_charge("job 1")])

    assert names(refused, "'ada'", "suspended", sqlstate="KR005"), refused
    assert isinstance(earlier, list)


@pytest.mark.parametrize(
    ("function", "items", "held"),
    [
        ("open_charges", [a_charge("new")], "SELECT FROM kino.credit_lot FOR UPDATE"),
        ("grant_lots", [a_grant("new", account_id="zoe")], "INSERT INTO kino.account (account_id) VALUES ('zoe')"),
    ],
)
def test_a_product_that_waits_is_told_to_try_again(
    ledger: Database, function: str, items: list[Item], held: str
) -> None:
    """A call that waits for another session is refused as busy by its own lock timeout, not by the session's."""
    with session(ledger, "postgres") as other, nothing_left_behind(ledger, "kino_product") as connection:
        other.execute(held.encode())
        connection.execute(b"SET lock_timeout = 0")
        found = attempt(connection, function, items)
        other.rollback()

    assert names(found, "busy", "try again", sqlstate="KR007"), found


PLANTED: Final[Sequence[tuple[str, str, str]]] = (
    ("another account's lot", "UPDATE kino.charge_line SET lot_id = 2 WHERE charge_id IN (1, 4)", "KR010"),
    ("a lot that does not exist", "UPDATE kino.charge_line SET lot_id = 99 WHERE charge_id IN (1, 4)", "KR010"),
    ("a lot that is full", "UPDATE kino.credit_lot SET remaining = granted", "KR008"),
)


@pytest.mark.parametrize(
    ("function", "item"),
    [("settle_charges", a_settlement(1)), ("reverse_charges", a_reversal(4))],
    ids=["end", "reverse"],
)
@pytest.mark.parametrize(("fault", "sqlstate"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED])
def test_rows_that_disagree_are_told_without_their_contents(
    arranged: Database, function: str, item: Item, fault: str, sqlstate: str
) -> None:
    """A charge whose rows disagree is not given back, and the error shows no row."""
    with session(arranged, "postgres") as superuser:
        superuser.execute(b"SET session_replication_role = replica")
        superuser.execute(fault.encode())

    with nothing_left_behind(arranged, FUNCTIONS[function].role) as connection:
        found = attempt(connection, function, [item])

    assert names(found, sqlstate=sqlstate), found


# --- the rest --------------------------------------------------------------------------------------------------


def test_the_limit_of_an_expiry_run_is_bounded(ledger: Database) -> None:
    """expire_lots takes a limit from 1 to 10,000 and refuses every other one."""
    limits = (None, 0, -1, 10_001, 2**31 - 1, -(2**31))

    with nothing_left_behind(ledger, "kino_worker") as connection:
        found: dict[int | None, Any] = {}
        for limit in limits:
            try:
                with connection.transaction(force_rollback=True):
                    found[limit] = connection.execute(b"SELECT kino.expire_lots(%s::integer)", [limit]).fetchall()
            except psycopg.Error as error:
                found[limit] = Refusal(error.sqlstate, error.diag.message_primary or "", error.diag.message_detail)
        taken = [connection.execute(b"SELECT kino.expire_lots(%s::integer)", [n]).fetchall() for n in (1, 10_000)]

    assert {limit: answer for limit, answer in found.items() if not names(answer, "limit")} == {}
    assert taken == [[(0,)], [(0,)]]


def is_id(text: str) -> bool:
    """Ask Python's rule."""
    try:
        require_id("id", text)
    except ValueError:
        return False
    return True


EXACT: Final = sys.version_info[:2] == (3, 11)
"""kino.is_id() knows Unicode as Python 3.11 does; a newer one knows more characters, and never fewer."""
SURROGATES = range(0xD800, 0xE000)


def test_an_id_is_the_same_in_sql_and_in_python(database: Database) -> None:
    """Every code point, alone and between two letters, is an id in SQL exactly where it is one in Python.

    A job with another id could be charged, and its events would be refused.
    """
    query = """
        SELECT c, kino.is_id(chr(c)), kino.is_id('a' || chr(c) || 'b')
        FROM generate_series(1, 1114111) AS c WHERE c NOT BETWEEN 55296 AND 57343
    """
    with session(database, "postgres") as superuser:
        found = superuser.execute(query.encode()).fetchall()

    assert len(found) == 0x10FFFF - len(SURROGATES)
    differs = [
        (hex(c), alone, between)
        for c, alone, between in found
        if (alone, between) != (is_id(chr(c)), is_id(f"a{chr(c)}b"))
        and (EXACT or (alone and not is_id(chr(c))) or (between and not is_id(f"a{chr(c)}b")))
    ]
    assert differs == []


CHARACTERS = st.sampled_from("aZ09~! -\u00e9\u00a0\u3000\u200b\u202e\n\x01\U0001f3ac\u0301") | st.characters(
    exclude_categories=["Cs"], exclude_characters="\x00"
)


@given(text=st.text(CHARACTERS, max_size=6) | st.text(st.sampled_from("a\u00e9 "), min_size=120, max_size=135))
@example("a" * 128)
@example("a" * 129)
@example("\U0001f3ac" * 128)
@example("\U0001f3ac" * 129)
@example("a\n")
@ON_ONE_DATABASE
def test_a_text_is_an_id_in_sql_where_it_is_one_in_python(database: Database, text: str) -> None:
    """Length, ends and every character of a whole text are judged alike by both."""
    with session(database, "postgres") as superuser:
        found = superuser.execute(b"SELECT kino.is_id(%s)", [text]).fetchall()

    assert found == [(is_id(text),)] or (not EXACT and found == [(False,)])
