"""What another session holds delays the jobs that need it, and no others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from kino_refunds.ledger import Balance
from kino_refunds.settlement import batch as batch_module
from tests.clock import SECOND
from tests.integration.settlement.races import LOCK_LOT, SETTLE_BY_HAND, held
from tests.scenario import EVENT_AT, NOW, SOURCE, Scene, Waits, make_event

LATER = NOW + timedelta(hours=1)


def test_a_lot_held_elsewhere_makes_its_jobs_busy_and_nobody_else(scene: Scene) -> None:
    """Jobs that must return credits to a held lot are put off; every neighbour is settled at once."""
    lots = {name: scene.grant(name, 100) for name in ("held", "free")}
    for job_id, account_id in [("held-1", "held"), ("held-2", "held"), ("held-3", "held"), ("free-1", "free")]:
        scene.open(job_id, account_id, 10)
    events = [
        make_event("timeout", "held-1"),
        make_event("completed", "held-2"),
        make_event("failed user", "held-3"),
        make_event("timeout", "free-1"),
        make_event("timeout", "unknown"),
    ]

    with held(scene, LOCK_LOT, lot_id=lots["held"].lot_id):
        said = scene.settle(*events)
        balances = {name: scene.balance(name) for name in lots}

    assert said == ["busy", "captured", "captured_not_covered", "refunded", "charge_not_found"]
    assert balances == {"held": Balance(70, 10), "free": Balance(100, 0)}
    assert scene.pending() == {
        "held-1 timeout": Waits("held-1", "busy", 0),
        "unknown timeout": Waits("unknown", "charge_not_found", 0),
    }
    assert scene.sweep(now=LATER) == {"refunded": 1, "charge_not_found": 1}
    assert scene.balance("held") == Balance(80, 0)


def test_a_later_event_of_a_busy_job_is_put_off_as_well(scene: Scene) -> None:
    """A completion must not overtake the failure before it because the failure's lot was held."""
    charge = scene.charged()
    events = [make_event("completed", at=EVENT_AT), make_event("timeout", at=EVENT_AT - SECOND)]

    with held(scene, LOCK_LOT, lot_id=charge.lines[0][0]):
        said = scene.settle(*events)

    assert said == ["busy", "busy"]
    assert scene.story().settlement is None
    assert scene.sweep(now=LATER) == {"refunded": 1, "completed_after_refund": 1}


def test_a_charge_that_is_being_settled_elsewhere_delays_itself_only(scene: Scene) -> None:
    """While another session holds a charge's key its job is busy; neighbours settle, and it does so later."""
    charges = [scene.charged(f"job-{number}") for number in range(5)]
    events = [make_event("timeout", f"job-{number}") for number in range(5)]

    with held(scene, SETTLE_BY_HAND, charge_id=charges[2].charge_id):
        said = scene.settle_batch(*events)

    assert said == {event.id: "busy" if event.job_id == "job-2" else "refunded" for event in events}
    assert scene.pending() == {"job-2 timeout": Waits("job-2", "busy", 0)}
    assert scene.sweep(now=LATER) == {"refunded": 1}
    assert [scene.balance(charge.account_id) for charge in charges] == [Balance(100, 0)] * 5


def test_a_charge_that_was_settled_elsewhere_meanwhile(scene: Scene) -> None:
    """When the other session commits after all, the busy event finds the charge settled."""
    charge = scene.charged()
    event = make_event("timeout")

    with held(scene, SETTLE_BY_HAND, charge_id=charge.charge_id) as stranger:
        said = scene.settle_batch(event)
        stranger.commit()

    assert said == {event.id: "busy"}
    assert scene.sweep(now=LATER) == {"already_refunded": 1}
    assert scene.story().moved == []


def test_a_completion_does_not_overtake_the_failure_that_was_found_busy(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose first event had to be given up as busy has its later ones put off, though the lock is gone.

    (1) a stranger holds the charge's key, (2) the job is tried alone and then event by event, (3) the failure
    is parked as busy, (4) the stranger rolls back, (5) the completion comes.
    """
    charge = scene.charged()
    events = [make_event("timeout", at=EVENT_AT - SECOND), make_event("completed", at=EVENT_AT)]

    with held(scene, SETTLE_BY_HAND, charge_id=charge.charge_id) as stranger:
        settle_alone = batch_module._settle_alone

        def alone_and_then_free(*args: Any, **named: Any) -> Any:
            rulings = settle_alone(*args, **named)
            stranger.rollback()
            return rulings

        monkeypatch.setattr(batch_module, "_settle_alone", alone_and_then_free)
        said = scene.settle_batch(*events)

    assert said == {"job-1 timeout": "busy", "job-1 completed": "busy"}
    assert scene.sweep(now=LATER) == {"refunded": 1, "completed_after_refund": 1}


def test_an_inbox_key_held_elsewhere_delays_its_event_only(scene: Scene) -> None:
    """An id that another session is deciding makes the event under it busy, and nothing of it is kept."""
    scene.charged("job-1")
    scene.charged("job-2")
    events = [make_event("timeout", job_id, event_id=f"evt of {job_id}") for job_id in ("job-1", "job-2")]

    with held(
        scene,
        "INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)"
        " VALUES (:source, 'evt of job-1', 'job-9', 'v1:0', 'refunded', now())",
        source=SOURCE,
    ):
        said = scene.settle_batch(*events)

    assert said == {"evt of job-1": "busy", "evt of job-2": "refunded"}
    assert scene.balance("acct of job-1") == Balance(90, 10)


def test_a_dead_letter_that_cannot_be_written_now_stops_no_neighbour(scene: Scene) -> None:
    """A conflict whose dead letter somebody holds is kept in a row of its own; its neighbours are settled."""
    for job_id in ("job-1", "job-2", "job-3"):
        scene.charged(job_id)
    conflict = make_event("completed", event_id="evt")
    scene.settle(make_event("timeout", event_id="evt"), conflict)

    with held(scene, "SELECT FROM kino.dead_letter FOR UPDATE"):
        said = scene.settle_batch(conflict, make_event("timeout", "job-2"), make_event("timeout", "job-3"))

    assert said == {"evt": "conflicting_duplicate", "job-2 timeout": "refunded", "job-3 timeout": "refunded"}
    assert [(letter.event_id, letter.seen) for letter in scene.dead_letters()] == [("evt", 1), ("evt", 1)]
