"""Section 5 of the design, cell by cell, in the real database: what each event does to each charge."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import pytest

from kino_refunds.ledger import VIOLATION, AccountStatus, Balance, Charge
from kino_refunds.settlement.breaks import Break, raise_breaks
from tests.clock import clock_at
from tests.scenario import (
    EVENT_AT,
    KINDS,
    NOT_COVERED,
    NOW,
    REFUNDABLE,
    Broken,
    Moved,
    Scene,
    Settled,
    Story,
    make_event,
)

ACCOUNT = "acct of job-1"
EVENT = "event of:"
BEFORE = "event before of:"

# kind of event -> how its charge is settled while it is open: kind, reason, clause.
OPEN = {
    "completed": ("captured", "completed", "1"),
    "failed platform": ("refunded", "generation_failure", "2.failure"),
    "failed provider": ("refunded", "generation_failure", "2.failure"),
    "failed unknown": ("refunded", "generation_failure", "2.failure"),
    "failed user": ("captured", "not_covered", "2.failure"),
    "timeout": ("refunded", "timeout", "2.timeout"),
    "timeout with result": ("captured", "not_covered", "2.timeout"),
    "safety before": ("refunded", "content_policy_rejection", "2.safety"),
    "safety during": ("refunded", "content_policy_rejection", "2.safety"),
    "safety after": ("captured", "not_covered", "2.safety"),
}


def word_of(kind: str) -> str:
    """Say what settling an open charge by this kind of event is called."""
    settled_as, reason, _ = OPEN[kind]
    return "captured_not_covered" if reason == "not_covered" else settled_as


def settled(charge: Charge, settled_as: str, reason: str, clause: str, *, by: str) -> Story:
    """Tell of a job whose open charge was settled by one event: each line of the charge moves once."""
    transfer = "refund" if settled_as == "refunded" else "capture"
    return Story(
        settlement=Settled(settled_as, reason, clause, by),
        moved=[Moved(transfer, lot_id, None, credits, reason) for lot_id, credits in charge.lines],
    )


class Row(NamedTuple):
    """One cell of the table: the outcome, what the database then says of the job, and its account's balance."""

    outcome: str
    story: Story
    balance: Balance


def settle_one_of_each(scene: Scene) -> dict[str, Row]:
    """Settle one event of each kind, each about a job of its own that is named as the kind, in one batch."""
    said = scene.settle(*(make_event(kind, kind, event_id=EVENT + kind) for kind in KINDS))
    return {
        kind: Row(outcome, scene.story(kind), scene.balance(f"acct of {kind}"))
        for kind, outcome in zip(KINDS, said, strict=True)
    }


def charge_one_of_each(scene: Scene) -> dict[str, Charge]:
    return {kind: scene.charged(kind) for kind in KINDS}


def settle_before(scene: Scene, before: str) -> str:
    """Settle every job by an earlier event; returns the outcome, the same for all."""
    [word] = set(scene.settle(*(make_event(before, kind, event_id=BEFORE + kind) for kind in KINDS)))
    return word


def test_an_event_on_an_open_charge(scene: Scene) -> None:
    """The first event settles the charge: completed and not covered capture, everything else refunds."""
    charges = charge_one_of_each(scene)

    cells = settle_one_of_each(scene)

    assert cells == {
        kind: Row(
            word_of(kind),
            replace(settled(charges[kind], *OPEN[kind], by=EVENT + kind), inbox={EVENT + kind: word_of(kind)}),
            Balance(100 if kind in REFUNDABLE else 90, 0),
        )
        for kind in KINDS
    }


@pytest.mark.parametrize("before", ["completed", *NOT_COVERED])
def test_an_event_on_a_captured_charge(scene: Scene, before: str) -> None:
    """A capture stands, whatever captured it; an ending that should have refunded is a break."""
    charges = charge_one_of_each(scene)
    first = settle_before(scene, before)

    cells = settle_one_of_each(scene)

    words = {kind: "failed_after_capture" if kind in REFUNDABLE else "already_captured" for kind in KINDS}
    assert cells == {
        kind: Row(
            word,
            replace(
                settled(charges[kind], *OPEN[before], by=BEFORE + kind),
                inbox={BEFORE + kind: first, EVENT + kind: word},
                breaks=["failed_after_capture"] if kind in REFUNDABLE else [],
            ),
            Balance(90, 0),
        )
        for kind, word in words.items()
    }


@pytest.mark.parametrize("before", REFUNDABLE)
def test_an_event_on_a_refunded_charge(scene: Scene, before: str) -> None:
    """A refund stands, whatever was refunded; only a completion contradicts it, and that is a break."""
    charges = charge_one_of_each(scene)
    settle_before(scene, before)

    cells = settle_one_of_each(scene)

    words = {kind: "completed_after_refund" if kind == "completed" else "already_refunded" for kind in KINDS}
    assert cells == {
        kind: Row(
            word,
            replace(
                settled(charges[kind], *OPEN[before], by=BEFORE + kind),
                inbox={BEFORE + kind: "refunded", EVENT + kind: word},
                breaks=["completed_after_refund"] if kind == "completed" else [],
            ),
            Balance(100, 0),
        )
        for kind, word in words.items()
    }


def test_an_event_on_a_capture_that_was_corrected(scene: Scene) -> None:
    """A capture that was corrected counts as refunded: nothing is returned a second time."""
    charges = charge_one_of_each(scene)
    settle_before(scene, "completed")
    for charge in charges.values():
        scene.correct(charge)

    cells = settle_one_of_each(scene)

    words = {kind: "completed_after_refund" if kind == "completed" else "already_refunded" for kind in KINDS}
    lot_of = {kind: charge.lines[0][0] for kind, charge in charges.items()}
    assert cells == {
        kind: Row(
            word,
            Story(
                settlement=Settled("captured", "completed", "1", BEFORE + kind),
                moved=[
                    Moved("capture", lot_of[kind], None, 10, "completed"),
                    Moved("reversal", lot_of[kind], None, 10, "generation_failure"),
                ],
                inbox={BEFORE + kind: "captured", EVENT + kind: word},
                breaks=["completed_after_refund"] if kind == "completed" else [],
            ),
            Balance(100, 0),
        )
        for kind, word in words.items()
    }


def test_an_event_of_a_job_that_has_no_charge(scene: Scene) -> None:
    """An event that overtook its charge waits for it, and nothing else is written."""
    cells = settle_one_of_each(scene)

    assert cells == {
        kind: Row("charge_not_found", Story(pending={EVENT + kind: "charge_not_found"}), Balance(0, 0))
        for kind in KINDS
    }


def test_an_event_of_an_account_terminated_for_violation(scene: Scene) -> None:
    """Clause 6: what would be refunded is captured under 6.terminated; every other ending is as ever."""
    with clock_at(scene.worker, EVENT_AT - timedelta(minutes=1)):
        charges = charge_one_of_each(scene)
        for charge in charges.values():
            scene.set_status(charge.account_id, AccountStatus.TERMINATED)

    cells = settle_one_of_each(scene)

    forfeit = ("captured", "not_covered", "6.terminated")
    words = {kind: "captured_terminated" if kind in REFUNDABLE else word_of(kind) for kind in KINDS}
    assert cells == {
        kind: Row(
            word,
            replace(
                settled(charges[kind], *(forfeit if kind in REFUNDABLE else OPEN[kind]), by=EVENT + kind),
                inbox={EVENT + kind: word},
            ),
            Balance(90, 0),
        )
        for kind, word in words.items()
    }


@pytest.mark.parametrize(
    ("before", "word", "available"), [("completed", "already_captured", 90), ("timeout", "already_refunded", 100)]
)
def test_a_termination_after_the_settlement_changes_nothing(
    scene: Scene, before: str, word: str, available: int
) -> None:
    """A failure that is reported once the account is terminated contradicts neither capture nor refund."""
    charges = charge_one_of_each(scene)
    first = settle_before(scene, before)
    with clock_at(scene.worker, EVENT_AT):
        for charge in charges.values():
            scene.set_status(charge.account_id, AccountStatus.TERMINATED)

    cells = settle_one_of_each(scene)

    assert {kind: cells[kind] for kind in REFUNDABLE} == {
        kind: Row(
            word,
            replace(
                settled(charges[kind], *OPEN[before], by=BEFORE + kind),
                inbox={BEFORE + kind: first, EVENT + kind: word},
            ),
            Balance(available, 0),
        )
        for kind in REFUNDABLE
    }


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (AccountStatus.SUSPENDED, "chargeback"),
        (AccountStatus.SUSPENDED, "terms_violation"),
        (AccountStatus.TERMINATED, "closed_by_customer"),
    ],
)
def test_any_other_account_that_is_not_active_is_refunded(scene: Scene, status: AccountStatus, reason: str) -> None:
    """A suspended wallet is frozen and a closed one is not forfeited: their jobs settle like everybody's."""
    with clock_at(scene.worker, EVENT_AT - timedelta(minutes=1)):
        charges = charge_one_of_each(scene)
        for charge in charges.values():
            scene.set_status(charge.account_id, status, reason)

    cells = settle_one_of_each(scene)

    assert cells == {
        kind: Row(
            word_of(kind),
            replace(settled(charges[kind], *OPEN[kind], by=EVENT + kind), inbox={EVENT + kind: word_of(kind)}),
            Balance(100 if kind in REFUNDABLE else 90, 0),
        )
        for kind in KINDS
    }


BEFORE_IT, AFTER_IT = EVENT_AT - timedelta(seconds=30), EVENT_AT + timedelta(seconds=30)
VIOLATED = (AccountStatus.TERMINATED, VIOLATION)
CLOSED = (AccountStatus.TERMINATED, "closed_by_customer")
HISTORIES = {
    "never changed": ([], "refunded", "active"),
    "terminated for violation before it": ([(BEFORE_IT, *VIOLATED)], "captured", "terminated_for_violation"),
    "terminated for violation after it": ([(AFTER_IT, *VIOLATED)], "refunded", "active"),
    "closed at its own request after a violation": (
        [(BEFORE_IT, *VIOLATED), (BEFORE_IT, *CLOSED)],
        "captured",
        "terminated_for_violation",
    ),
    "reinstated before it": (
        [(BEFORE_IT, *VIOLATED), (BEFORE_IT, AccountStatus.ACTIVE, "appeal")],
        "refunded",
        "active",
    ),
    "reinstated after it": (
        [(BEFORE_IT, *VIOLATED), (AFTER_IT, AccountStatus.ACTIVE, "appeal")],
        "captured",
        "terminated_for_violation",
    ),
    "suspended before it": ([(BEFORE_IT, AccountStatus.SUSPENDED, "chargeback")], "refunded", "suspended"),
    "closed before it": ([(BEFORE_IT, *CLOSED)], "refunded", "terminated"),
}
"""What happened to the account around the job's failure; what must come of it, and what is kept as judged by."""


@pytest.mark.parametrize("history", HISTORIES)
def test_an_account_is_judged_as_it_was_when_its_job_failed(scene: Scene, history: str) -> None:
    """Clause 6 asks the event's time: nobody forfeits because we came late, and a violation stands until an appeal."""
    changes, kind, judged = HISTORIES[history]
    with clock_at(scene.worker, EVENT_AT - timedelta(minutes=1)):
        charge = scene.charged()
    for at, status, reason in changes:
        with clock_at(scene.worker, at):
            scene.set_status(charge.account_id, status, reason)

    scene.settle(make_event("failed platform"))

    assert scene.rows("SELECT kind, account_status, ending FROM kino.settlement") == [(kind, judged, "failed.platform")]


def test_a_publishers_clock_cannot_choose_the_account_s_status(scene: Scene) -> None:
    """An event that says it was before the charge is judged at the opening, when the account was terminated."""
    with clock_at(scene.worker, BEFORE_IT):
        charge = scene.charged()
        scene.set_status(charge.account_id, *VIOLATED)

    said = scene.settle(make_event("failed platform", at=EVENT_AT - timedelta(days=30)))

    assert said == ["captured_terminated"]


ENDINGS = {
    "completed": "completed",
    **{f"failed {origin}": f"failed.{origin}" for origin in ("platform", "provider", "user", "unknown")},
    "timeout": "timeout.no_result",
    "timeout with result": "timeout.result",
    **{f"safety {stage}": f"rejected.{stage}_generation" for stage in ("before", "during", "after")},
}


def test_a_settlement_keeps_how_the_job_ended(scene: Scene) -> None:
    """Every kind of event leaves its ending, so that the settlement can be judged again from its own row."""
    for kind in KINDS:
        scene.charged(kind)
    scene.settle(*(make_event(kind, kind) for kind in KINDS))

    rows = scene.rows("SELECT c.job_id, s.ending FROM kino.settlement s JOIN kino.charge c USING (charge_id)")
    assert dict(map(tuple, rows)) == ENDINGS
    assert ENDINGS.keys() == KINDS.keys()


def test_a_charge_over_several_lots_comes_back_to_each(scene: Scene) -> None:
    """A refund returns to every lot what was taken from it, and not to one lot what another gave."""
    first = scene.grant("acct-1", 4, reference="a", priority=1)
    second = scene.grant("acct-1", 100, reference="b", priority=2)
    scene.open("job-1", "acct-1", 10)

    said = scene.settle(make_event("failed platform", event_id=EVENT))

    assert said == ["refunded"]
    assert scene.story().moved == [
        Moved("refund", first.lot_id, None, 4, "generation_failure"),
        Moved("refund", second.lot_id, None, 6, "generation_failure"),
    ]
    assert scene.rows("SELECT lot_id, remaining FROM kino.credit_lot ORDER BY lot_id") == [
        (first.lot_id, 4),
        (second.lot_id, 100),
    ]


def test_a_job_that_cost_nothing_is_settled_like_any_other(scene: Scene) -> None:
    """A charge of zero credits is refunded by a row that moves nothing."""
    scene.charged(credits=0)

    said = scene.settle(make_event("failed platform", event_id=EVENT))

    assert said == ["refunded"]
    assert scene.story() == Story(
        settlement=Settled("refunded", "generation_failure", "2.failure", EVENT), inbox={EVENT: "refunded"}
    )


def test_jobs_of_one_lot_in_one_batch_come_back_together(scene: Scene) -> None:
    """Many refunds into one lot are one batch, and the lot ends with exactly what was held."""
    scene.grant("acct-1", 100)
    for number in range(8):
        scene.open(f"job-{number}", "acct-1", number)

    said = scene.settle(*(make_event("timeout", f"job-{number}") for number in range(8)))

    assert said == ["refunded"] * 8
    assert scene.balance("acct-1") == Balance(100, 0)


def test_a_second_contradiction_raises_the_count_of_the_same_break(scene: Scene) -> None:
    """A break is one row per kind and job while it is open, however many events disagree."""
    scene.charged()
    scene.settle(make_event("failed platform", event_id=BEFORE))

    scene.settle(
        make_event("completed", event_id="one"),
        make_event("completed", event_id="two"),
    )
    scene.settle(make_event("completed", event_id="three"), now=NOW + timedelta(minutes=5))

    assert scene.breaks() == [Broken("completed_after_refund", "job-1", 10, 3, "open")]


def test_a_copy_of_a_contradiction_is_not_another(scene: Scene) -> None:
    """The same event again changes nothing, not even how often its break was seen."""
    scene.charged()
    contradiction = make_event("completed", event_id=EVENT)
    scene.settle(make_event("failed platform", event_id=BEFORE))

    scene.settle(contradiction, contradiction)
    scene.settle(contradiction)

    assert scene.breaks() == [Broken("completed_after_refund", "job-1", 10, 1, "open")]


def test_a_difference_that_a_person_accepted_opens_again_only_when_a_side_changes(scene: Scene) -> None:
    """The same ending said once more is what was accepted; another ending is another difference, and a new row."""
    scene.charged()
    scene.settle(make_event("completed", event_id=BEFORE), make_event("failed platform", event_id="one"))
    scene.as_superuser("UPDATE kino.break SET status = 'accepted'")

    scene.settle(make_event("failed platform", event_id="two"))
    assert scene.breaks() == [Broken("failed_after_capture", "job-1", 10, 1, "accepted")]

    scene.settle(make_event("failed provider", event_id="three"))
    assert scene.breaks() == [
        Broken("failed_after_capture", "job-1", 10, 1, "accepted"),
        Broken("failed_after_capture", "job-1", 10, 1, "open"),
    ]


def test_a_settlement_can_be_explained(scene: Scene) -> None:
    """The row names the event, its time, the clause and the policy version, and the transaction it was in."""
    charge = scene.charged()
    event = make_event("safety during", event_id=EVENT)

    scene.settle(event)

    [row] = scene.rows("SELECT to_jsonb(s) FROM kino.settlement s")
    explained = row[0]
    assert explained.pop("settled_at") is not None
    assert explained.pop("xid") == scene.rows("SELECT xid::text FROM kino.transfer WHERE kind = 'refund'")[0][0]
    assert explained.pop("event_time").startswith(event.time.strftime("%Y-%m-%dT%H:%M:%S"))
    assert explained == {
        "charge_id": charge.charge_id,
        "kind": "refunded",
        "reason": "content_policy_rejection",
        "clause": "2.safety",
        "policy_version": "2025-12-14",
        "ending": "rejected.during_generation",
        "account_status": "active",
        "event_source": event.source,
        "event_id": EVENT,
    }


def test_an_expired_lot_s_credits_come_back_as_a_successor(scene: Scene) -> None:
    """Credits whose lot ends within the grace come back in a lot of the same class that lives for the grace."""
    expires_at = NOW + timedelta(days=6)
    charge = scene.charged(expires_at=expires_at)
    lot_id = charge.lines[0][0]

    said = scene.settle(make_event("timeout", event_id=EVENT))

    [successor] = scene.rows(
        "SELECT lot_id, class, granted, remaining, expires_at FROM kino.credit_lot WHERE successor_of = :lot_id",
        lot_id=lot_id,
    )
    assert said == ["refunded"]
    assert scene.story().moved == [Moved("refund", lot_id, successor[0], 10, "timeout")]
    assert tuple(successor)[1:] == ("purchased", 10, 10, NOW + timedelta(days=7))
    assert scene.balance(ACCOUNT) == Balance(100, 0)


def test_an_empty_batch_is_nothing(scene: Scene) -> None:
    """A claim in which no message could be read settles nothing and fails nothing."""
    before = scene.everything()

    said = scene.settle()

    assert said == []
    assert scene.settle_batch() == {}
    assert scene.everything() == before


def test_two_lots_of_one_job_are_two_breaks(scene: Scene) -> None:
    """Builds of before keep one open break for each kind and job: the job stands with a break about a job only."""
    found = [
        Break(kind="lot_differs", subject=f"lot:{number}", job_id="job-1", credits=1, detail="d", sides="a / b")
        for number in (1, 2)
    ]

    with scene.worker.begin() as connection:
        raise_breaks(connection, found)

    rows = scene.rows("SELECT subject, job_id FROM kino.break ORDER BY subject")
    assert [tuple(row) for row in rows] == [("lot:1", None), ("lot:2", None)]
