"""A product in Node, and a person in psql, call the ledger's functions in a transaction of their own.

They run what kino_refunds/ledger/README.md shows, and the programs in other_languages/ beside this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa

from kino_refunds.ledger import AccountStatus, Balance, Charge
from kino_refunds.ledger.callers import RAISED
from tests.documents import LEDGER, example, text_of
from tests.integration.ledger.languages import PROGRAMS, Node, Psql, Said
from tests.scenario import Scene, make_event

MOST_LOTS = 32_767
SAFE = 9_007_199_254_740_991
"""2^53 - 1: the most credits of one lot, and the last whole number that is exact in JavaScript."""


# --- what stands in the way of a charge ------------------------------------------------------------------------


class Refusal(NamedTuple):
    arrange: Callable[[Scene], Any]
    sqlstate: str
    message: str
    credits: int = 8


def acme(credits: int) -> Callable[[Scene], Any]:
    return lambda scene: scene.grant("acme", credits)


def suspended(scene: Scene) -> None:
    scene.grant("acme", 10)
    scene.set_status("acme", AccountStatus.SUSPENDED)


def charged(credits: int) -> Callable[[Scene], Charge]:
    def arrange(scene: Scene) -> Charge:
        scene.grant("acme", 10)
        return scene.open("job-42", "acme", credits)

    return arrange


def settled(scene: Scene) -> None:
    charged(8)(scene)
    assert scene.settle(make_event("timeout", "job-42"), now=None) == ["refunded"]


def small_lots(scene: Scene) -> None:
    """One lot more than a charge can take from, one credit in each."""
    scene.grant("acme", 1)
    scene.as_superuser(
        "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)"
        f" SELECT 'small ' || n, 'acme', 'purchased', 1, 1 FROM generate_series(1, {MOST_LOTS}) AS n",
        "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor)"
        " SELECT 'grant', 'issued', 'wallet', account_id, lot_id, 1, class, 'test' FROM kino.credit_lot"
        " WHERE starts_with(reference, 'small')",
    )


def constrained(kind: str) -> Callable[[Scene], None]:
    """Plant what a fault of ours would be: a row that the ledger writes and its own constraint refuses."""

    def arrange(scene: Scene) -> None:
        scene.grant("acme", 10)
        scene.as_superuser(f"ALTER TABLE kino.transfer ADD CONSTRAINT no_{kind} CHECK (kind <> '{kind}') NOT VALID")

    return arrange


@contextmanager
def held(scene: Scene, statement: str) -> Iterator[None]:
    """Let another session hold what this statement locks, for as long as the block runs."""
    with scene.superuser.connect() as connection:
        connection.execute(sa.text(statement))
        yield
        connection.rollback()


LOT_HELD = "SELECT FROM kino.credit_lot FOR NO KEY UPDATE"
CHARGES = {
    "on other terms": Refusal(charged(5), "KR002", "job 'job-42' is charged 5 credits of account 'acme' already"),
    "settled": Refusal(settled, "KR003", "the charge of job 'job-42' is refunded already"),
    "too few credits": Refusal(acme(7), "KR004", "job 'job-42' needs 8 credits; account 'acme' has 7"),
    "no account": Refusal(lambda _: None, "KR005", "account 'acme' does not exist; its first grant creates it"),
    "suspended": Refusal(suspended, "KR005", "account 'acme' is suspended"),
    "bad input": Refusal(acme(10), "KR006", "items[0].credits must be a whole number from 0 to 9007199254740991", -1),
    "busy": Refusal(acme(10), "KR007", "busy: another session holds what this charge needs; try again"),
    "inconsistent": Refusal(constrained("hold"), "KR008", "the ledger refuses this by its constraint no_hold"),
    "too many lots": Refusal(
        small_lots, "KR009", "job 'job-42' would take from more than 32767 lots of account 'acme'", MOST_LOTS + 1
    ),
}
"""Every error of `open_charges` that is the ledger's own: how it comes about, and what is said."""


def item(credits: int) -> dict[str, Any]:
    return {"job_id": "job-42", "account_id": "acme", "credits": credits, "deadline_at": "2030-01-01T00:00:00Z"}


def charge_in_psql(psql: Psql, credits: int) -> str:
    return psql(example(LEDGER, "submit.psql"), job_id="job-42", account_id="acme", credits=str(credits)).errors


def charge_in_node(node: Node, credits: int) -> str:
    said = node("charge", {"id": "job-42", "items": [item(credits)]})
    return f"ERROR:  {said.get('refused')}: {said.get('message')}"


@pytest.fixture(params=["psql", "node"])
def charge(request: pytest.FixtureRequest) -> Callable[[int], str]:
    """Charge job-42 of acme beside the product's own row, in each language; gives back the error's text."""
    act = charge_in_psql if request.param == "psql" else charge_in_node
    return partial(act, request.getfixturevalue(request.param))


def product_rows(scene: Scene, table: str) -> list[tuple[str, str]]:
    return [tuple(row) for row in scene.rows(f"SELECT * FROM shop.{table}")]


@pytest.mark.usefixtures("sound_books")
@pytest.mark.parametrize("why", CHARGES)
def test_a_refused_charge_leaves_the_products_own_row(scene: Scene, charge: Callable[[int], str], why: str) -> None:
    """After each error of open_charges the product rolls back to its savepoint and commits its own row."""
    refusal = CHARGES[why]
    refusal.arrange(scene)
    before = scene.balance("acme")

    with held(scene, LOT_HELD) if refusal.sqlstate == "KR007" else nullcontext():
        said = charge(refusal.credits)

    assert refusal.message in said
    assert "DETAIL" not in said
    assert product_rows(scene, "job") == [("job-42", refusal.sqlstate)]
    assert scene.balance("acme") == before


# --- what stands in the way of a grant -------------------------------------------------------------------------


GRANT = {"reference": "order-1", "account_id": "acme", "credits": 10, "class": "purchased"}
ACCOUNT_HELD = "INSERT INTO kino.account (account_id) VALUES ('acme')"


class GrantRefusal(NamedTuple):
    arrange: Callable[[Scene], Any]
    items: list[dict[str, Any]]
    sqlstate: str
    message: str


GRANTS = {
    "on other terms": GrantRefusal(
        lambda scene: scene.grant("acme", 7, reference="order-1"),
        [GRANT],
        "KR001",
        "grant 'order-1' was given on other terms: credits 7, not 10",
    ),
    "twice here": GrantRefusal(
        lambda _: None,
        [GRANT, GRANT | {"credits": 9}],
        "KR001",
        "grant 'order-1' is given twice here, on different terms",
    ),
    "bad input": GrantRefusal(
        lambda _: None,
        [GRANT, GRANT | {"reference": "order-2", "class": "gift"}],
        "KR006",
        "items[1].class must be one of promotional, courtesy, subscription, purchased, lifetime",
    ),
    "busy": GrantRefusal(
        lambda _: None, [GRANT], "KR007", "busy: another session holds what this grant needs; try again"
    ),
    "inconsistent": GrantRefusal(
        constrained("grant"), [GRANT], "KR008", "the ledger refuses this by its constraint no_grant"
    ),
}
"""Every error of `grant_lots` that is the ledger's own."""


def grant_in_psql(psql: Psql, items: list[dict[str, Any]]) -> str:
    script = (PROGRAMS / "product.psql").read_text("utf-8")
    return psql(script, purchase_id="purchase-1", items=json.dumps(items)).errors


def grant_in_node(node: Node, items: list[dict[str, Any]]) -> str:
    said = node("buy", {"id": "purchase-1", "items": items})
    return f"ERROR:  {said.get('refused')}: {said.get('message')}"


@pytest.fixture(params=["psql", "node"])
def buy(request: pytest.FixtureRequest) -> Callable[[list[dict[str, Any]]], str]:
    """Grant beside the product's own row, in each language; gives back the error's text."""
    act = grant_in_psql if request.param == "psql" else grant_in_node
    return partial(act, request.getfixturevalue(request.param))


@pytest.mark.usefixtures("sound_books")
@pytest.mark.parametrize("why", GRANTS)
def test_a_refused_grant_leaves_the_products_own_row(
    scene: Scene, buy: Callable[[list[dict[str, Any]]], str], why: str
) -> None:
    """After each error of grant_lots the product rolls back to its savepoint and commits its own row."""
    refusal = GRANTS[why]
    refusal.arrange(scene)
    before = scene.balance("acme")

    with held(scene, ACCOUNT_HELD) if refusal.sqlstate == "KR007" else nullcontext():
        said = buy(refusal.items)

    assert refusal.message in said
    assert "DETAIL" not in said
    assert product_rows(scene, "purchase") == [("purchase-1", refusal.sqlstate)]
    assert scene.balance("acme") == before


def test_the_page_tells_every_error_that_these_functions_raise() -> None:
    """The table of errors names each SQLSTATE of grant_lots and open_charges, under the name that it has in Python."""
    rows = re.findall(r"^\| `(KR\d+)` \| (\w+) \|", text_of(LEDGER), re.MULTILINE)
    tried = {refusal.sqlstate for refusal in CHARGES.values()} | {refusal.sqlstate for refusal in GRANTS.values()}

    assert rows == [(sqlstate, RAISED[sqlstate].__name__) for sqlstate in sorted(tried)]


# --- what goes well --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sound_books")
def test_a_person_in_psql_grants_charges_and_reads(scene: Scene, psql: Psql) -> None:
    """The page's example in psql opens a charge beside the product's row, and again changes nothing."""
    script = (PROGRAMS / "product.psql").read_text("utf-8")
    items = json.dumps([GRANT | {"expires_at": "2090-01-31T12:00:00+01:00", "purchase_id": "p-1"}])
    job = {"job_id": "job-42", "account_id": "acme", "credits": "8"}

    granted = [psql(script, purchase_id="purchase-1", items=items) for _ in range(2)]
    opened = [psql(example(LEDGER, "submit.psql"), **job) for _ in range(2)]

    lot = ["order-1", "acme", "purchased", "10", "10", "100", "2090-01-31 11:00:00+00", "p-1", "active"]
    assert granted == [Said([lot], "")] * 2
    assert opened[0] == opened[1]
    row, *read = opened[0].rows
    assert ([*row[1:4], *row[6:]], opened[0].errors) == (["job-42", "acme", "8", "{1}", "{8}"], "")
    assert read == [["open", "8", "0", "", ""], ["2", "8"]]
    assert product_rows(scene, "job") == [("job-42", "charged")]
    assert product_rows(scene, "purchase") == [("purchase-1", "granted")]


@pytest.mark.usefixtures("sound_books")
def test_a_product_in_node_grants_charges_and_reads(scene: Scene, node: Node) -> None:
    """The page's example in Node opens a charge once, says the same again, and reads what came of it."""
    bought = node("buy", {"id": "purchase-1", "items": [GRANT]})
    job = {"id": "job-42", "account": "acme", "credits": 8}

    before = node("read", {"job": "job-42", "account": "nobody"})
    opened = [node("submit", job) for _ in range(2)]
    running = node("read", {"job": "job-42", "account": "acme"})
    scene.settle(make_event("timeout", "job-42"), now=None)
    ended = node("read", {"job": "job-42", "account": "acme"})

    (charge_id,) = (row[0] for row in scene.rows("SELECT charge_id FROM kino.charge"))
    assert [(row["o_granted"], row["o_remaining"], row["o_priority"]) for row in bought["rows"]] == [("10", "10", 100)]
    assert before == {"available": 0, "held": 0}
    assert opened == [{"state": "charged", "chargeId": charge_id}] * 2
    assert running["charge"] | {"settled_at": None} == {
        "job_id": "job-42",
        "account_id": "acme",
        "credits": "8",
        "refunded": "0",
        "status": "open",
        "reason": None,
        "clause": None,
        "policy_version": None,
        "settled_at": None,
    }
    assert (running["available"], running["held"]) == (2, 8)
    assert [ended["charge"][name] for name in ("status", "refunded", "reason", "clause")] == [
        "refunded",
        "8",
        "timeout",
        "2.timeout",
    ]
    assert ended["available"] == 10
    assert product_rows(scene, "job") == [("job-42", "charged")]


@pytest.mark.usefixtures("sound_books")
def test_the_node_example_answers_each_refusal_with_a_state(scene: Scene, node: Node) -> None:
    """The page's example gives a job the state of its refusal; an error that a program causes is thrown."""
    scene.grant("acme", 10)
    scene.grant("beta", 10)
    scene.set_status("beta", AccountStatus.TERMINATED)
    scene.open("old", "acme", 1)
    scene.charged("ended", credits=5)
    scene.settle(make_event("completed", "ended"), now=None)

    said = node(
        "submitAll",
        [
            {"id": "good", "account": "acme", "credits": 9},
            {"id": "old", "account": "acme", "credits": 2},
            {"id": "ended", "account": "acct of ended", "credits": 5},
            {"id": "dear", "account": "acme", "credits": 11},
            {"id": "banned", "account": "beta", "credits": 1},
        ],
    )
    with held(scene, LOT_HELD):
        busy = node("submit", {"id": "busy", "account": "acct of ended", "credits": 1})
    wrong = node("submit", {"id": "wrong", "account": "acme", "credits": 0.5})

    states = [
        ("banned", "account not active"),
        ("busy", "try again"),
        ("dear", "needs credits"),
        ("ended", "ended"),
        ("good", "charged"),
        ("old", "charged on other terms"),
    ]
    assert [each["state"] for each in said] == [dict(states)[job] for job in ("good", "old", "ended", "dear", "banned")]
    assert busy == {"state": "try again"}
    assert wrong["threw"].startswith("job wrong cannot be charged: KR006 items[0].credits must be a whole number")
    assert sorted(product_rows(scene, "job")) == states
    assert scene.balance("acme") == Balance(0, 10)


@pytest.mark.usefixtures("sound_books")
def test_numbers_past_javascripts_are_exact(scene: Scene, node: Node) -> None:
    """A bigint comes to Node as a string, in arrays too, and BigInt reads what a number would round."""
    lots = [GRANT | {"reference": f"order-{n}", "credits": SAFE} for n in range(3)]

    bought = node("buy", {"id": "purchase-1", "items": lots})
    opened = node("charge", {"id": "job-42", "items": [item(SAFE)]})
    read = node("read", {"job": "job-42", "account": "acme"})

    assert [row["o_remaining"] for row in bought["rows"]] == [str(SAFE)] * 3
    (row,) = opened["rows"]
    assert (row["o_credits"], row["o_lot_ids"], row["o_lot_credits"]) == (str(SAFE), ["1"], [str(SAFE)])
    assert row["o_deadline_at"] == "2030-01-01T00:00:00.000Z"
    assert read["available"] == 2 * SAFE
    assert float(3 * SAFE) != 3 * SAFE
    assert scene.balance("acme") == Balance(2 * SAFE, SAFE)


def test_an_array_that_is_not_a_string_is_refused(node: Node) -> None:
    """`pg` makes a Postgres array of a JavaScript array, as the page says, and the server refuses it as jsonb."""
    assert node("array") == "22P02"


# --- two transactions at once ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("sound_books")
@pytest.mark.parametrize(("end", "same"), [("COMMIT", True), ("ROLLBACK", False)])
def test_one_job_from_two_connections_is_charged_once(scene: Scene, node: Node, end: str, *, same: bool) -> None:
    """The second opener waits for the first: after its commit it gets that charge, after its rollback its own."""
    scene.grant("acme", 10)

    said = node("twice", {"end": end})

    assert said == {"same": same}
    assert scene.balance("acme") == Balance(2, 8)


@pytest.mark.usefixtures("sound_books")
def test_a_deadlock_is_tried_again(scene: Scene, node: Node) -> None:
    """Of two transactions that wait for each other one is ended; the page's `transaction` runs it again."""
    scene.grant("acme", 10)
    scene.grant("beta", 10)

    said = node("crossed")

    # Three at least: the one that is run again can lock its lots before the other wakes, and both meet once more.
    assert (said["opened"], said["tries"] > 2) == ([[1, 1], [1, 1]], True)
    assert [scene.balance(account) for account in ("acme", "beta")] == [Balance(8, 2)] * 2


@pytest.mark.usefixtures("sound_books")
def test_a_serialization_failure_is_tried_again(scene: Scene, node: Node) -> None:
    """At REPEATABLE READ a lot that changed after the snapshot ends the transaction; the page's runs it again."""
    scene.grant("acme", 10)

    assert node("overtaken") == {"opened": 1, "tries": 2}
    assert scene.balance("acme") == Balance(1, 9)


@pytest.mark.usefixtures("sound_books")
def test_a_cut_connection_leaves_nothing_and_the_next_goes_on(scene: Scene, node: Node) -> None:
    """A session that the server ends leaves no row and does not end the process; the pool takes another."""
    scene.grant("acme", 10)

    said = node("cut")

    assert (said["failed"], said["then"]["state"]) == ("57P01", "charged")
    assert product_rows(scene, "job") == [("job-42", "charged")]
