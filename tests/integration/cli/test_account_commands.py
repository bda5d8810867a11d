"""`grant`, `balance` and `statement`: what people and programs read, and what a repetition does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.clock import clock_at
from tests.command_line import Result, Run, error
from tests.scenario import NOW, Scene


def instant(text: str) -> datetime:
    """Read a time of a JSON document: RFC 3339, with an offset."""
    value = datetime.fromisoformat(text)
    assert value.utcoffset() == timedelta(0)
    return value


def test_grant_gives_once_and_a_conflict_changes_nothing(run: Run, scene: Scene) -> None:
    """The same grant again shows the same lot; other terms under its reference are a finding."""
    arguments = (
        "grant",
        "acme",
        "500",
        "--reference",
        "order-1",
        "--expires-at",
        "2100-01-01T02:00:00+02:00",
        "--json",
    )
    first, again = run(*arguments), run(*arguments)
    before = scene.everything()
    conflict = run("grant", "acme", "501", "--reference", "order-1")

    assert (first.code, first.err) == (0, "")
    assert first.json == {
        "lot_id": first.json["lot_id"],
        "reference": "order-1",
        "account_id": "acme",
        "lot_class": "purchased",
        "granted": 500,
        "remaining": 500,
        "priority": 100,
        "expires_at": "2100-01-01T00:00:00+00:00",
        "state": "active",
    }
    assert again == first
    assert scene.everything() == before
    assert conflict == error(
        "grant 'order-1' was given on other terms: credits 500, not 501; expires_at 2100-01-01 00:00:00+00, not never",
        1,
    )


def test_who_granted_is_kept_with_the_transfer(run: Run, scene: Scene) -> None:
    """The grant's transfer says who gave the credits; the same grant by another changes nothing."""
    for who in ("anna", "bob"):
        assert run("grant", "acme", "5", "--reference", "order-1", "--by", who).code == 0

    assert [tuple(row) for row in scene.rows("SELECT kind, actor FROM kino.transfer")] == [("grant", "anna")]


def test_credits_that_have_expired_already_are_granted_only_if_that_is_meant(run: Run, scene: Scene) -> None:
    """An expiry in the past by the ledger's clock is refused, unless it is said or the grant is an old one."""
    grant = ("grant", "acme", "5", "--reference", "order-1", "--expires-at")

    with clock_at(scene.worker, datetime(2040, 1, 1, tzinfo=UTC)):
        refused = run(*grant, "2040-01-01T00:00:00Z")
        nothing = scene.rows("SELECT 1 FROM kino.account")
        meant = run(*grant, "2040-01-01T00:00:00Z", "--although-past")
        again = run(*grant, "2040-01-01T01:00:00+01:00")
        future = run(*grant[:4], "order-2", "--expires-at", "2040-01-01T00:00:01Z")

    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "--expires-at 2040-01-01T00:00:00Z lies in the past (it is 2040-01-01T00:00:00Z)" in refused.err
    assert "add --although-past if you mean it" in refused.err
    assert nothing == []
    assert [each.code for each in (meant, again, future)] == [0, 0, 0]
    assert "2040-01-01 00:00:01Z" in future.out


def test_a_balance_of_the_future_is_refused(run: Run, scene: Scene) -> None:
    """What an account will have nobody knows; what was understood is shown with the answer."""
    scene.grant("acme", 5)
    ((now,),) = scene.rows("SELECT kino.clock()")

    future = run("balance", "acme", "--at", (now + timedelta(hours=1)).isoformat())
    past = run("balance", "acme", "--at", now.isoformat())

    assert (future.code, future.out, future.err.count("\n")) == (2, "", 1)
    assert "lies in the future (it is " in future.err
    assert past.code == 0
    assert ["at", *f"{now:%Y-%m-%d %H:%M:%SZ}".split()] in [line.split() for line in past.out.splitlines()]


def test_balance_and_statement_say_what_an_account_has_and_why(run: Run, scene: Scene) -> None:
    """A page of the statement names where the next begins, until there is none."""
    lot = scene.grant("acme", 100)
    scene.open("job-1", "acme", 8)

    balance = run("balance", "acme", "--json")
    before = run("balance", "acme", "--at", "2020-01-01T02:00:00+02:00", "--json")
    page = run("statement", "acme", "--limit", "1", "--json")
    rest = run("statement", "acme", "--after", str(page.json["next"]), "--json")
    end = run("statement", "acme", "--after", str(rest.json["items"][-1]["transfer_id"]), "--json")
    nowhere = run("statement", "acme", "--after", "99", "--json")

    def line(of: Result, kind: str, credits: int, job_id: str | None, reason: str | None) -> dict[str, Any]:
        (item,) = of.json["items"]
        assert instant(item["at"]) > NOW - timedelta(hours=1)
        ids = {"transfer_id": item["transfer_id"], "at": item["at"]}
        return {**ids, "kind": kind, "credits": credits, "lot_id": lot.lot_id, "job_id": job_id, "reason": reason}

    assert balance.json == {"account_id": "acme", "available": 92, "held": 8}
    assert before.json == {"account_id": "acme", "at": "2020-01-01T00:00:00+00:00", "available": 0, "held": 0}
    granted = line(page, "grant", 100, None, "purchased")
    assert page.json == {"items": [granted], "next": granted["transfer_id"]}
    assert rest.json == {"items": [line(rest, "hold", -8, "job-1", None)], "next": None}
    assert end.json == {"items": [], "next": None}
    assert nowhere == error("account 'acme' has no transfer 99 to go on behind", 2)


def test_people_read_tables(run: Run, scene: Scene) -> None:
    """Without --json a person reads names, separated thousands and what to type next."""
    scene.grant("acme", 1_234_567)
    scene.open("job-1", "acme", 4_567)

    balance = run("balance", "acme")
    statement = run("statement", "acme", "--limit", "1")

    assert [line.split() for line in balance.out.splitlines()] == [
        ["account", "acme"],
        ["available", "1,230,000"],
        ["held", "4,567"],
    ]
    first = scene.rows("SELECT min(transfer_id) FROM kino.transfer")[0][0]
    assert statement.out.splitlines()[-2:] == [f"more: --after {first}", "sum of these lines: 1,234,567"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_statement_says_that_later_lines_exist(run: Run, scene: Scene, form: tuple[str, ...]) -> None:
    """What an open transaction holds back is said on standard error; the listing keeps its shape."""
    scene.grant("acme")
    with scene.product.begin() as slow:
        slow.exec_driver_sql("SELECT pg_current_xact_id()")
        scene.grant("acme", reference="second")
        held_back = run("statement", "acme", *form)
    after = run("statement", "acme", *form)

    said = "later lines exist: a transaction before them is still open; ask again soon\n"
    assert (held_back.code, held_back.err, after.err) == (0, said, "")
    if form:
        assert set(held_back.json) == {"items", "next"}
        assert [len(result.json["items"]) for result in (held_back, after)] == [1, 2]


@pytest.mark.parametrize("command", ["balance", "statement"])
def test_unknown_account_is_a_finding_that_says_how_accounts_begin(run: Run, command: str) -> None:
    """Zero credits and no such account are not the same answer."""
    result = run(command, "nobody", "--json")

    assert result == error("there is no account 'nobody'; its first grant creates it (kino-refunds accounts grant)", 1)
