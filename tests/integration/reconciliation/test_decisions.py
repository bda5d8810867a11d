"""The checks `decisions` and `account_status`: a settlement is what the policy and the history say."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from kino_refunds.events.schema import ErrorOrigin
from kino_refunds.ledger import AccountStatus
from kino_refunds.policy.document import Policy, published_policy
from kino_refunds.reconciliation.decisions import NO_ENDING, UNKNOWN_VERSION
from kino_refunds.reconciliation.repairs import repair
from kino_refunds.reconciliation.run_rows import RunState
from tests.clock import clock_at
from tests.integration.reconciliation.checking import check, live, numbers, shop, statuses
from tests.scenario import EVENT_AT, KINDS, NOW, Scene, make_event, make_rules


@pytest.fixture(autouse=True)
def _now(scene: Scene) -> Iterator[None]:
    with clock_at(scene.worker, NOW):
        yield


def settle_every_kind(scene: Scene) -> None:
    """Settle a job of each kind of ending, and one of an account that was terminated for violation."""
    for kind in KINDS:
        scene.charged(kind)
        scene.settle(make_event(kind, kind))
    scene.charged("violator")
    with clock_at(scene.worker, EVENT_AT - timedelta(hours=1)):
        scene.set_status("acct of violator", AccountStatus.TERMINATED)
    scene.settle(make_event("timeout", "violator"))


def corrupt(scene: Scene, assignment: str, job_id: str) -> None:
    """Change a settlement as no role can: past the triggers."""
    scene.as_superuser(
        "SET session_replication_role = replica",
        "ALTER TABLE kino.settlement DROP CONSTRAINT IF EXISTS settlement_cites_its_clause",
        f"UPDATE kino.settlement SET {assignment} WHERE charge_id ="
        f" (SELECT charge_id FROM kino.charge WHERE job_id = '{job_id}')",
    )


def test_every_settlement_judged_again_gives_the_same(scene: Scene) -> None:
    """Every kind of ending, and a forfeit, by both checks."""
    settle_every_kind(scene)
    count = len(KINDS) + 1

    assert numbers(check(scene, "decisions")) == (count, count, 0, 0)
    assert numbers(check(scene, "account_status")) == (count, count, 0, 0)
    assert live(scene) == []


@pytest.mark.parametrize(
    ("assignment", "job_id"),
    [
        ("clause = '2.timeout'", "failed provider"),
        ("reason = 'timeout', clause = '2.timeout'", "failed provider"),
        ("kind = 'captured', reason = 'not_covered'", "failed provider"),
        ("kind = 'refunded', reason = 'generation_failure', clause = '2.failure'", "completed"),
        ("kind = 'refunded', reason = 'timeout'", "violator"),
        ("clause = '6.terminated'", "failed user"),
        ("ending = 'failed.user'", "failed provider"),
        ("ending = 'completed'", "timeout"),
        ("ending = 'nonsense'", "timeout"),
        ("account_status = 'terminated_for_violation'", "timeout"),
        ("account_status = 'active'", "violator"),
    ],
)
def test_a_planted_wrong_clause_kind_or_ending_is_found(scene: Scene, assignment: str, job_id: str) -> None:
    """Whatever of a decision is changed behind our back is a break about that job, with its credits."""
    settle_every_kind(scene)
    corrupt(scene, assignment, job_id)

    found = check(scene, "decisions", full=True)

    assert (found.broken, found.compared) == (1, len(KINDS) + 1)
    assert live(scene) == [("decision_differs", job_id, 10)]


def test_a_changed_policy_file_is_found(scene: Scene) -> None:
    """If the file of a version says something else by now, what was settled by it differs."""
    settle_every_kind(scene)
    [document] = published_policy().versions
    automatic = document.automatic.model_copy(update={"failure_origins": frozenset({ErrorOrigin.PLATFORM})})
    changed = make_rules(policy=Policy((document.model_copy(update={"automatic": automatic}),)))

    check(scene, "decisions", rules=changed)

    assert live(scene) == [
        ("decision_differs", "failed provider", 10),
        ("decision_differs", "failed unknown", 10),
    ]


def test_a_version_that_was_not_in_force_is_found(scene: Scene) -> None:
    """A settlement must cite the version of its event's time, and not another that this build has too."""
    settle_every_kind(scene)
    [document] = published_policy().versions
    later = document.model_copy(update={"version": "later", "effective_at": EVENT_AT - timedelta(hours=1)})
    rules = make_rules(policy=Policy((document, later)))

    found = check(scene, "decisions", rules=rules)

    # Opened just now: every event is clamped to its charge's opening, at which the later version was in force.
    assert found.broken == len(KINDS) + 1


def test_what_cannot_be_judged_again_is_counted_and_is_no_break(scene: Scene) -> None:
    """Rows of before the ending was stored, and of a version that this build does not have."""
    settle_every_kind(scene)
    corrupt(scene, "ending = NULL", "timeout")
    corrupt(scene, "policy_version = '2099-01-01'", "completed")

    found = check(scene, "decisions", full=True)

    assert found.not_comparable == {NO_ENDING: 1, UNKNOWN_VERSION: 1}
    assert (found.broken, found.compared) == (0, len(KINDS) - 1)


def test_a_status_that_the_account_never_had_is_found(scene: Scene) -> None:
    """The history decides, with ten minutes on either side of the event."""
    settle_every_kind(scene)
    corrupt(scene, "account_status = 'suspended'", "timeout")

    check(scene, "account_status", full=True)

    assert live(scene) == [("account_status_differs", "timeout", 10)]


@pytest.mark.parametrize(("minutes", "broken"), [(9, 0), (11, 1)])
def test_a_change_near_the_event_counts_on_both_sides(scene: Scene, minutes: int, broken: int) -> None:
    """Judged as active although it was terminated some minutes before: clocks differ, but not by more than ten."""
    scene.charged("job-1")
    scene.as_superuser(
        "SET session_replication_role = replica",
        "UPDATE kino.charge SET opened_at = opened_at - interval '1 hour'",
    )
    scene.settle(make_event("timeout", "job-1"))
    with clock_at(scene.worker, EVENT_AT - timedelta(minutes=minutes)):
        scene.set_status("acct of job-1", AccountStatus.TERMINATED)

    assert check(scene, "account_status").broken == broken


def test_a_forfeit_that_was_wrong_is_repaired_by_reversal_and_stays_closed(scene: Scene) -> None:
    """The settlement stays what it is, and the customer has the credits: neither check opens the break again."""
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1"))
    corrupt(
        scene,
        "kind = 'captured', reason = 'not_covered', clause = '6.terminated',"
        " account_status = 'terminated_for_violation'",
        "job-1",
    )
    scene.as_superuser(
        "SET session_replication_role = replica",
        "UPDATE kino.transfer SET kind = 'capture', to_book = 'consumed' WHERE kind = 'refund'",
        "UPDATE kino.credit_lot SET remaining = remaining - 10",
    )
    check(scene, "account_status")
    [number] = [row.break_id for row in scene.rows("SELECT break_id FROM kino.break")]

    done = repair(shop(scene), number, actor="dana", note="case 12", reference="case-12")
    check(scene, "account_status", full=True)

    assert (done.clause, done.available, done.available_after) == ("2.timeout", 90, 100)
    assert scene.balance("acct of job-1").available == 100
    assert statuses(scene) == [("account_status_differs", "closed")]


def test_an_incremental_run_judges_only_what_is_new(scene: Scene) -> None:
    """The second run goes on behind the first; together they cover everything without a gap."""
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1"))
    first = check(scene, "decisions")
    scene.charged("job-2")
    scene.settle(make_event("completed", "job-2"))

    second = check(scene, "decisions")
    third = check(scene, "decisions")

    assert [run.compared for run in (first, second, third)] == [1, 1, 0]
    assert [run.state for run in (first, second, third)] == [RunState.COMPLETE] * 3
    assert second.window.from_xid == first.window.to_xid
