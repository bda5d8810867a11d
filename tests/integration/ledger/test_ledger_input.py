"""What the ledger's functions take: every item is read whole, or refused by name and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kino_refunds.ledger.callers import ITEMS_MAX, RAISED
from kino_refunds.ledger.values import CREDITS_MAX, require_instant
from tests.conftest import Database
from tests.integration.ledger.items import (
    FUNCTIONS,
    ON_ONE_DATABASE,
    REFUSED_BY_JSONB,
    RIGHT_TYPE,
    TYPES,
    Raw,
    Refusal,
    attempt,
    call,
    names,
    nothing_left_behind,
    wrong,
)
from tests.ledger_items import Item, a_charge, a_grant, a_reversal, a_settlement, a_status, session

# --- what each function takes ----------------------------------------------------------------------------------


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
