"""The check `integrity`: what an incremental run looks at, what only a full one finds, and how breaks end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pytest
import sqlalchemy as sa

from kino_refunds.ledger import AccountStatus, CauseKind, release_purchase, unvoid_purchase
from kino_refunds.policy.document import published_policy
from kino_refunds.reconciliation import integrity
from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, Window
from kino_refunds.reconciliation.integrity import KeyScope, all_queries, check, describe, violations
from kino_refunds.reconciliation.integrity.queries import KEY_TYPES
from kino_refunds.settlement.breaks import Break, BreakKind
from tests.clock import DAY, MINUTE, clock_at
from tests.conftest import Database
from tests.ledger_acts import DISPUTE, PAYOUT, freeze, void
from tests.ledger_items import Connection
from tests.scenario import NOW, Scene, make_event

REPLICA = "SET LOCAL session_replication_role = replica"
"""Triggers are off in that transaction, as a superuser can have it."""


def transaction_number(scene: Scene) -> int:
    """The number below which every transaction has ended."""
    return int(scene.rows("SELECT CAST(kino.horizon() AS text)")[0][0])


def scope_of(scene: Scene, *, full: bool = False, from_xid: int = 1, to_xid: int | None = None) -> Scope:
    """A run of everything, or of the transactions from `from_xid` on."""
    return Scope(
        engine=scene.worker,
        window=Window(None, NOW, from_xid, to_xid or transaction_number(scene)),
        full=full,
        now=NOW,
        policy=published_policy(),
        overdue_grace=MINUTE,
        grace=0 * MINUTE,
    )


def run(scene: Scene, cursor: Mapping[str, Any] | None = None, **window: Any) -> list[Page]:
    return list(integrity.pages(scope_of(scene, **window), cursor or {}))


def broken(pages: Sequence[Page]) -> list[tuple[str, str]]:
    """Every break of these pages, as kind and subject."""
    return sorted(each.key for page in pages for each in page.breaks)


def breaks_of(pages: Sequence[Page]) -> list[Break]:
    return [each for page in pages for each in page.breaks]


def plant(scene: Scene, *statements: str) -> None:
    scene.as_superuser(REPLICA, *statements)


def live(found: Break, break_id: int = 1) -> LiveBreak:
    kind, subject = found.key
    return LiveBreak(break_id, kind, subject, found.job_id, found.charge_id)


@pytest.fixture
def told(scene: Scene) -> Scene:
    """Three jobs: one captured, one refunded, one refunded and then completed."""
    for job_id in ("captured", "refunded", "contradicted"):
        scene.charged(job_id)
    scene.settle(make_event("completed", "captured"), now=None)
    scene.settle(make_event("timeout", "refunded"), now=None)
    scene.settle(make_event("timeout", "contradicted"), now=None)
    scene.settle(make_event("completed", "contradicted"), now=None)
    return scene


# --- what no query found


WHERE_ACTIVE = (
    "WHERE lot_id = (SELECT min(lot_id) FROM kino.credit_lot WHERE class = 'promotional' AND state = 'active')"
)
CONTRADICTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "an open charge without its row": (
        "open_charge_without_row",
        "DELETE FROM kino.open_charge",
    ),
    "a row without its open charge": (
        "open_charge_row_without_open_charge",
        (
            "INSERT INTO kino.open_charge SELECT charge_id, account_id, deadline_at, credits FROM kino.charge"
            " WHERE job_id = 'captured'"
        ),
    ),
    "a promotional lot made purchased": (
        "lot_differs_from_its_grant",
        f"UPDATE kino.credit_lot SET class = 'purchased' {WHERE_ACTIVE}",
    ),
    "a refund that cites clause 1": (
        "settlement_cites_wrong_clause",
        "UPDATE kino.settlement SET clause = '1' WHERE kind = 'refunded'",
    ),
    "a refund that cites clause 6": (
        "settlement_cites_wrong_clause",
        "UPDATE kino.settlement SET clause = '6.terminated' WHERE kind = 'refunded'",
    ),
    "a settlement by an event that never was": (
        "settlement_without_event",
        (
            "UPDATE kino.settlement SET event_id = 'another' WHERE charge_id ="
            " (SELECT charge_id FROM kino.charge WHERE job_id = 'captured')"
        ),
    ),
    "an inbox that says otherwise": (
        "event_contradicts_settlement",
        "UPDATE kino.inbox_event SET outcome = 'captured' WHERE outcome = 'refunded'",
    ),
    "an event that was deleted": (
        "settlement_without_event",
        "DELETE FROM kino.inbox_event WHERE outcome = 'captured'",
    ),
    "a contradiction without its break": (
        "contradiction_without_break",
        "DELETE FROM kino.break",
    ),
    "an account terminated behind its history": (
        "account_status_differs_from_history",
        "UPDATE kino.account SET status = 'terminated' WHERE account_id = 'ada'",
    ),
    "a history with a gap": (
        "account_history_broken",
        "DELETE FROM kino.account_status_change WHERE from_status = 'active' AND to_status = 'suspended'",
    ),
    "credits that expired too early": (
        "lot_expired_too_early",
        "UPDATE kino.transfer SET created_at = created_at - interval '1 day' WHERE kind = 'expire'",
    ),
    "a hold before its lot was granted": (
        "charge_transfer_before_its_lot",
        "UPDATE kino.transfer SET created_at = created_at - interval '99 days' WHERE kind = 'hold'",
    ),
    "a transaction that has not been": (
        "transaction_has_not_been",
        "UPDATE kino.transfer SET xid = CAST(CAST(CAST(xid AS text) AS bigint) + 1000000 AS text)::xid8",
    ),
    "a cursor ahead of all": (
        "relay_cursor_ahead",
        "UPDATE kino.relay_cursor SET xid = CAST(CAST(CAST(xid AS text) AS bigint) + 1000000 AS text)::xid8",
    ),
}
"""What nothing found before this check had a query for each promise, and what finds it now."""


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions_are_found(eventful: Connection, what: str) -> None:
    """Each of the contradictions that nothing found has a query that finds it, in a ledger full of other acts."""
    name, statement = CONTRADICTIONS[what]
    (query,) = [query for query in all_queries() if query.name == name]

    with eventful.transaction(force_rollback=True):
        # Rows that were written before a CHECK need not obey it.
        eventful.execute("ALTER TABLE kino.settlement DROP CONSTRAINT settlement_cites_its_clause")
        before = eventful.execute(query.of_everything.encode()).fetchall()
        changed = eventful.execute(statement.encode()).rowcount
        after = eventful.execute(query.of_everything.encode()).fetchall()

    assert changed > 0
    assert (before, bool(after)) == ([], True)


def test_a_clock_that_stepped_back_a_minute_is_no_alarm(scene: Scene) -> None:
    """What happens within a minute before what came before it is what clocks do."""
    at = NOW - DAY
    with clock_at(scene.worker, at):
        scene.charged("refunded")
        scene.charged("captured")
    with clock_at(scene.worker, at - MINUTE):
        scene.settle(make_event("timeout", "refunded", at=at), now=None)
        scene.settle(make_event("completed", "captured", at=at), now=None)
        scene.set_status("acct of captured", AccountStatus.SUSPENDED, reason="asked for")
    with clock_at(scene.worker, at - 2 * MINUTE):
        scene.set_status("acct of captured", AccountStatus.ACTIVE, reason="came back")

        assert broken(run(scene, full=True)) == []


def test_a_lot_that_was_frozen_before_causes_had_a_table_is_no_alarm(scene: Scene, database: Database) -> None:
    """Migration 0006 wrote a cause for it and no change; other causes come and go beside that one."""
    scene.grant(purchase_id="p-1")
    plant(
        scene,
        "UPDATE kino.credit_lot SET state = 'frozen'",
        "INSERT INTO kino.lot_hold (lot_id, cause_kind, cause_id, actor) SELECT lot_id, 'request', 'before 0006',"
        " 'migration' FROM kino.credit_lot",
    )

    with database.connect("kino_owner") as owner:
        freeze(owner)
        void(owner)
        release_purchase(owner, "p-1", **DISPUTE)
        unvoid_purchase(owner, "p-1", **PAYOUT)
        release_purchase(owner, "p-1", cause_kind=CauseKind.REQUEST, cause_id="before 0006", actor="ops")
        owner.commit()

    assert broken(run(scene, full=True)) == []


# --- incremental and in full


def test_a_sound_ledger_matches_in_full(told: Scene) -> None:
    """Every query is asked, once, of every key; nothing is broken, and the numbers say how much was compared."""
    pages = run(told, full=True)

    assert [page.cursor["done"][-1] for page in pages] == [query.name for query in all_queries()]
    assert [(page.broken, page.not_comparable) for page in pages] == [(0, {})] * len(pages)
    assert {query.scope: page.compared for query, page in zip(all_queries(), pages, strict=True)} == {
        KeyScope.CHARGE: 3,
        KeyScope.JOB: 3,
        KeyScope.LOT: 3,
        KeyScope.ACCOUNT: 3,
        KeyScope.LEDGER: 1,
    }


def test_an_incremental_run_looks_at_what_its_window_touched(told: Scene) -> None:
    """One job is settled in the window: its charge, job, lot and account are looked at, and nothing else."""
    told.charged("late")
    first = transaction_number(told)
    told.settle(make_event("timeout", "late"), now=None)
    plant(told, "DELETE FROM kino.inbox_event WHERE outcome = 'refunded'")

    pages = run(told, from_xid=first)

    assert broken(pages) == [("settlement_without_event", "charge:4")]
    assert {page.compared for page in pages} == {1}
    assert pages[0].detail["looked_at"] == "what was touched"
    assert pages[0].detail["keys"] == {"charge": 1, "job": 1, "lot": 1, "account": 1, "ledger": 1}
    assert broken(run(told, full=True)) == [("settlement_without_event", f"charge:{n}") for n in (2, 3, 4)]


def test_a_window_without_a_transaction_asks_of_the_ledger_only(told: Scene) -> None:
    """Nothing new: only the queries that need no key are asked."""
    here = transaction_number(told)

    pages = run(told, from_xid=here, to_xid=here)

    assert [page.cursor["done"][-1] for page in pages] == ["transaction_has_not_been", "relay_cursor_ahead"]


@pytest.mark.parametrize(
    ("act", "keys"),
    [
        (lambda scene: scene.grant("new"), {"lot": 1, "account": 1}),
        (lambda scene: scene.charged("free", credits=0), {"lot": 1, "account": 1, "charge": 1, "job": 1}),
        (
            lambda scene: scene.set_status("acct of captured", AccountStatus.SUSPENDED, reason="asked"),
            {"account": 1},
        ),
        (
            lambda scene: scene.as_superuser("UPDATE kino.credit_lot SET expires_at = now() WHERE lot_id = 1"),
            {"lot": 1, "account": 1},
        ),
    ],
)
def test_every_act_leaves_its_keys_in_the_window(told: Scene, act: Any, keys: Mapping[str, int]) -> None:
    """A grant, a charge of nothing, a change of status and of a lot: what they touched is looked at."""
    first = transaction_number(told)
    act(told)

    pages = run(told, from_xid=first)

    found = pages[0].detail["keys"]
    assert {scope: count for scope, count in found.items() if count and scope != "ledger"} == keys


def test_too_much_in_the_window_is_read_whole(told: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more was touched than keys can be asked for, everything is read; a later part of the run does so too."""
    monkeypatch.setattr(check, "TOUCHED_MAX", 2)

    pages = run(told)
    monkeypatch.undo()
    rest = run(told, pages[0].cursor)

    assert pages[0].detail["looked_at"] == "everything"
    assert [page.cursor["done"] for page in rest] == [page.cursor["done"] for page in pages[1:]]
    assert rest[0].detail["looked_at"] == "everything"


def test_the_history_of_some_lots_is_read_in_an_incremental_run(told: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left in a lot is compared for a sample, another one for another window; in full, and again, for all."""
    monkeypatch.setattr(check, "SAMPLE", 1)
    plant(told, "UPDATE kino.credit_lot SET remaining = remaining - 1")
    upto = transaction_number(told)

    windows = [run(told, to_xid=upto + number) for number in range(20)]

    pages = [page for pages in windows for page in pages if page.cursor["done"][-1] == "lot_differs_from_transfers"]
    assert {(page.compared, page.broken) for page in pages} == {(1, 1)}
    assert {each.subject for each in breaks_of(pages)} == {"lot:1", "lot:2", "lot:3"}
    in_full = [each for each in breaks_of(run(told, full=True)) if each.kind == "lot_differs_from_transfers"]
    assert len(in_full) == 3
    now = integrity.again(scope_of(told), [live(each, number) for number, each in enumerate(in_full)])
    assert list(now.values()) == in_full


@pytest.mark.parametrize("full", [True, False])
def test_a_run_goes_on_where_it_was_killed(told: Scene, full: bool) -> None:
    """From the cursor of any page, which is JSON, the pages that follow it come, and no other."""
    plant(told, "DELETE FROM kino.inbox_event", "UPDATE kino.credit_lot SET remaining = remaining - 1")
    pages = run(told, full=full)

    half = len(pages) // 2
    rest = run(told, json.loads(json.dumps(pages[half - 1].cursor)), full=full)

    assert rest == pages[half:]
    assert broken(pages) == sorted(broken(pages[:half]) + broken(rest)) != []


# --- what it raises


def test_a_break_says_what_is_wrong_with_one_key(told: Scene) -> None:
    """One break a kind and key, with its charge, job and credits; the digest changes only when what is wrong does."""
    plant(told, "DELETE FROM kino.transfer WHERE charge_id = 2")

    (found,) = [each for each in breaks_of(run(told, full=True)) if each.kind == "charge_lacks_transfer"]
    (again,) = [each for each in breaks_of(run(told, full=True)) if each.kind == "charge_lacks_transfer"]
    plant(told, "UPDATE kino.charge_line SET credits = 9 WHERE charge_id = 2")
    (other,) = [each for each in breaks_of(run(told, full=True)) if each.kind == "charge_lacks_transfer"]

    assert (found.key, found.job_id, found.charge_id, found.credits) == (
        ("charge_lacks_transfer", "charge:2"),
        "refunded",
        2,
        20,
    )
    assert found.detail == "charge 2 lacks a hold of 10 credits of lot 2 (and 1 more like it)"
    assert found.digest == again.digest != other.digest


def test_a_table_that_is_wrong_as_a_whole_does_not_drown_the_breaks(
    told: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over so many breaks of one kind the others are only counted, and called not comparable."""
    monkeypatch.setattr(check, "BREAKS_MAX", 1)
    plant(told, "DELETE FROM kino.inbox_event WHERE outcome IN ('captured', 'refunded')")

    (page,) = [page for page in run(told, full=True) if page.cursor["done"][-1] == "settlement_without_event"]

    assert (page.compared, page.broken, len(page.breaks)) == (1, 1, 1)
    assert page.not_comparable == {check.TOO_MANY: 2}


def test_a_live_break_is_looked_at_again_by_its_key(told: Scene) -> None:
    """What still is so is the break as it is now, what was mended is none; of every scope."""
    told.set_status("acct of captured", AccountStatus.SUSPENDED, reason="asked")
    plant(
        told,
        "DELETE FROM kino.inbox_event WHERE outcome = 'refunded'",
        "DELETE FROM kino.break",
        "UPDATE kino.credit_lot SET remaining = remaining - 1",
        "UPDATE kino.account SET status = 'terminated'",
        "INSERT INTO kino.relay_cursor (xid, charge_id) VALUES ('999999999', 0)",
    )
    found = breaks_of(run(told, full=True))
    plant(
        told,
        "UPDATE kino.credit_lot SET remaining = remaining + 1 WHERE lot_id = 1",
        "UPDATE kino.account SET status = 'suspended' WHERE account_id = 'acct of captured'",
        "DELETE FROM kino.relay_cursor",
    )

    asked = [live(each, number) for number, each in enumerate(found)]
    now = integrity.again(scope_of(told), asked)

    assert {each.subject.partition(":")[0] for each in asked} == {*KeyScope}
    assert now.keys() == set(range(len(found)))
    still = {each.key for each in breaks_of(run(told, full=True))}
    assert {number: each.key if each else None for number, each in now.items()} == {
        number: each.key if each.key in still else None for number, each in enumerate(found)
    }
    assert {number for number, each in now.items() if each} not in (set(), now.keys())


def test_a_break_that_this_build_cannot_read_is_left_out(told: Scene) -> None:
    """A kind of another build, a key of another scope and one that is no number are not called mended."""
    unreadable = [
        LiveBreak(1, "a_kind_of_tomorrow", "charge:1", None, 1),
        LiveBreak(2, "settlement_without_event", "lot:1", None, 1),
        LiveBreak(3, "settlement_without_event", "charge:first", None, 1),
        LiveBreak(4, "account_history_broken", "account:", None, None),
    ]

    assert integrity.again(scope_of(told), unreadable) == {}


@pytest.mark.parametrize("account_id", ["lot:7", "a'b\"c", "100%", ":keys", "ä \\ €"])
def test_ids_of_any_text_are_keys(scene: Scene, account_id: str) -> None:
    """An account's id comes back from a break's subject as it was."""
    scene.grant(account_id)
    plant(scene, "UPDATE kino.account SET status = 'terminated'")

    (found,) = breaks_of(run(scene))
    now = integrity.again(scope_of(scene), [live(found)])

    assert found.key == ("account_status_differs_from_history", f"account:{account_id}")
    assert now == {1: found}


# --- the queries


def test_queries_are_told_apart_and_explained() -> None:
    """Names are unique and no kinds of another check; each names a promise, and says what it finds and what to do."""
    names = [query.name for query in all_queries()]

    assert len(names) == len(set(names)) == len(describe())
    assert set(names) == integrity.KINDS
    assert set(names).isdisjoint(set(BreakKind))
    assert {query.promise for query in all_queries()} <= {f"P{number}" for number in range(1, 11)}
    assert [
        entry.name for entry in describe() if not (entry.cannot_be.endswith(".") and entry.advice.endswith("."))
    ] == []


@pytest.mark.parametrize("role", ["kino_worker", "kino_oncall", "kino_read"])
@pytest.mark.usefixtures("told")
def test_who_may_read_the_ledger_may_ask(database: Database, role: str) -> None:
    """The check needs no right but to read."""
    with database.connect(role) as connection:
        assert violations(connection) == []
        for query in all_queries():
            assert check._ask(connection, query, None) == []


def test_without_leaves_topics_and_queries_out(told: Scene) -> None:
    """A test that settles without an inbox leaves out what asks about it."""
    plant(told, "DELETE FROM kino.inbox_event", "UPDATE kino.charge SET opened_at = now() + interval '1 year'")

    with told.superuser.connect() as connection:
        assert violations(connection) != []
        assert violations(connection, without=("inbox", "times")) == []


LARGE = {"charge", "charge_line", "credit_lot", "inbox_event", "open_charge", "settlement", "transfer", "break"}


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


@pytest.mark.parametrize("query", [query for query in all_queries() if query.scope in KEY_TYPES], ids=lambda q: q.name)
def test_keys_are_looked_up_by_an_index(told: Scene, query: integrity.Query) -> None:
    """No query of some keys needs to read a large table whole: its cost follows what is new, not what there is."""
    keys = [1, 2] if KEY_TYPES[query.scope] == "bigint" else ["captured", "acct of captured"]
    with told.worker.begin() as connection:
        check._prepare(connection, by_key=True)
        connection.execute(sa.text("SET LOCAL enable_seqscan = off; SET LOCAL enable_mergejoin = off"))
        explained = connection.execute(
            sa.text("EXPLAIN (FORMAT JSON) " + check._ONE_A_KEY.format(query=query.of_keys)), {"keys": keys, "limit": 9}
        ).scalar_one()

    scans = [node for node in nodes(explained[0]["Plan"]) if node.get("Relation Name") in LARGE]
    assert [
        (node["Relation Name"], node["Node Type"])
        for node in scans
        if not (node.get("Index Cond") or node["Node Type"] == "Bitmap Heap Scan")
    ] == []
