"""Items that do not belong together, and what the ledger cannot do: refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Final

import psycopg
import pytest

from kino_refunds.ledger.values import CREDITS_MAX
from tests.conftest import Database
from tests.integration.ledger.items import FUNCTIONS, Refusal, attempt, call, names, nothing_left_behind
from tests.ledger_items import DEADLINE, Item, a_charge, a_grant, a_reversal, a_settlement, a_status, session

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


@pytest.mark.parametrize(
    ("function", "items", "held"),
    [
        ("reverse_charges", [a_reversal(4)], "SELECT FROM kino.credit_lot FOR UPDATE"),
        ("set_account_status", [a_status("ada")], "SELECT FROM kino.account FOR UPDATE"),
    ],
)
def test_on_call_that_waits_is_told_to_try_again(ledger: Database, function: str, items: list[Item], held: str) -> None:
    """A person's call that waits for longer than the session's lock timeout says so in words, and changes nothing."""
    with session(ledger, "postgres") as other, nothing_left_behind(ledger, "kino_oncall") as connection:
        other.execute(held.encode())
        connection.execute(b"SET lock_timeout = 100")
        found = attempt(connection, function, items)
        other.rollback()

    assert names(found, "busy", "try again", sqlstate="KR007"), found


def test_a_charge_that_is_settled_already_is_named_with_its_job(ledger: Database) -> None:
    """Who reads the error knows jobs and not numbers."""
    with session(ledger, "kino_worker") as connection:
        call(connection, "settle_charges", [a_settlement(1)])

    with nothing_left_behind(ledger, "kino_worker") as connection:
        found = attempt(connection, "settle_charges", [a_settlement(1)])

    assert names(found, "charge 1 of job 'job 1'", sqlstate="KR003"), found


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
