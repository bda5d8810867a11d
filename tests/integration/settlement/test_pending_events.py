"""Events that wait: when they are tried again, who has them in hand, and when they are given up."""

from __future__ import annotations

from datetime import timedelta

import pytest

from kino_refunds.ledger import Balance
from kino_refunds.settlement.decide import Busy
from kino_refunds.settlement.deliveries import GIVE_UP_AFTER, delivery_of
from kino_refunds.settlement.pending import LONGEST_DELAY
from tests.clock import SECOND, lease_due
from tests.scenario import EVENT_AT, LEASE, NOW, Dead, Scene, Waits, make_event


def test_a_charge_that_arrives_makes_its_event_due(scene: Scene) -> None:
    """An event that overtook its charge is settled by the next sweep after the charge, whatever its delay."""
    scene.settle(make_event("timeout"))
    scene.as_superuser(f"UPDATE kino.pending_event SET next_attempt_at = '{NOW + timedelta(minutes=15)}'")
    too_early = scene.sweep()
    scene.charged()

    said = scene.sweep()

    assert (too_early, said) == ({}, {"refunded": 1})
    assert scene.pending() == {}
    assert scene.inbox() == {"job-1 timeout": "refunded"}
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_a_live_copy_of_an_event_that_waits_is_simply_decided(scene: Scene) -> None:
    """Redelivery decides an event as soon as it can be, and its pending row goes."""
    event = make_event("timeout")
    scene.settle(event)
    scene.charged()

    said = scene.settle(event)

    assert said == ["refunded"]
    assert scene.pending() == {}
    assert scene.sweep() == {}


def test_an_attempt_that_came_to_nothing_is_counted_and_put_off(scene: Scene) -> None:
    """A try that finds no charge raises the count, keeps what it came to, and gives the row back for later."""
    scene.settle(make_event("timeout"))
    due_at = NOW + LONGEST_DELAY

    said = scene.sweep(now=due_at)

    [row] = scene.rows("SELECT attempts, leased_until, history, next_attempt_at, first_seen_at FROM kino.pending_event")
    attempts, leased_until, history, next_attempt_at, first_seen_at = row
    assert said == {"charge_not_found": 1}
    assert (attempts, leased_until, first_seen_at) == (1, None, NOW)
    assert history == [{"at": due_at.isoformat(), "outcome": "charge_not_found"}]
    assert due_at <= next_attempt_at <= due_at + LONGEST_DELAY


def test_a_leased_event_is_left_to_who_leased_it(scene: Scene) -> None:
    """Two sweeps do not try the same event; if the first dies, its lease runs out and the event is due again."""
    scene.settle(make_event("timeout"))
    due_at = NOW + LONGEST_DELAY
    with scene.worker.begin() as connection:
        leased = lease_due(connection, now=due_at, lease=LEASE, build="test")

    meanwhile = scene.sweep(now=due_at + LEASE - SECOND)
    afterwards = scene.sweep(now=due_at + LEASE)

    assert [(d.event.id, d.pending_since) for d in leased] == [("job-1 timeout", NOW)]
    assert (meanwhile, afterwards) == ({}, {"charge_not_found": 1})


def test_a_leased_event_comes_back_as_the_event_that_was_parked(scene: Scene) -> None:
    """Waiting in Postgres changes nothing of an event: the same fingerprint, so still the same event."""
    parked = delivery_of(make_event("safety before", "job-\u00e9\u4e16", account_id="a\u00df"))
    scene.settle(parked)

    with scene.worker.begin() as connection:
        [leased] = lease_due(connection, now=NOW + LONGEST_DELAY, lease=LEASE, build="test")

    assert (leased.event, leased.fingerprint, leased.raw) == (parked.event, parked.fingerprint, parked.raw)
    assert leased.pending_since == NOW


@pytest.mark.parametrize(
    ("waited", "word"), [(GIVE_UP_AFTER - SECOND, "waits"), (GIVE_UP_AFTER, "dead"), (GIVE_UP_AFTER * 2, "dead")]
)
def test_retries_end_after_a_day(scene: Scene, waited: timedelta, word: str) -> None:
    """An event that was tried for 24 hours is a dead letter that keeps its reason, and waits no more."""
    scene.settle(make_event("timeout"))

    said = scene.sweep(now=NOW + waited)

    dead = [Dead("job-1 timeout", "job-1", "charge_not_found", 1, "open")]
    assert said == {"charge_not_found": 1}
    assert scene.dead_letters() == (dead if word == "dead" else [])
    assert scene.pending() == ({} if word == "dead" else {"job-1 timeout": Waits("job-1", "charge_not_found", 1)})


def test_an_exhausted_event_says_how_often_it_was_tried(scene: Scene) -> None:
    """A dead letter keeps the history of its event, attempts included: a person starts from what we know."""
    scene.settle(make_event("timeout"))
    scene.sweep(now=NOW + timedelta(hours=1))
    scene.sweep(now=NOW + timedelta(hours=2))

    scene.sweep(now=NOW + GIVE_UP_AFTER)

    assert scene.rows("SELECT reason, attempts FROM kino.dead_letter") == [("charge_not_found", 3)]


def test_the_last_try_may_still_succeed(scene: Scene) -> None:
    """A charge that came after a day, before we gave up, is settled and not a dead letter."""
    scene.settle(make_event("timeout"))
    scene.charged()

    said = scene.sweep(now=NOW + GIVE_UP_AFTER * 2)

    assert said == {"refunded": 1}
    assert scene.dead_letters() == []


def test_an_exhausted_event_that_is_delivered_again_is_tried_again(scene: Scene) -> None:
    """Giving up is no decision: when the charge is there after all, the event's next delivery settles it."""
    event = make_event("timeout")
    scene.settle(event)
    scene.sweep(now=NOW + GIVE_UP_AFTER)
    scene.charged()

    said = scene.settle(event)

    assert said == ["refunded"]


def test_a_job_s_events_that_wait_are_tried_together(scene: Scene) -> None:
    """Events of one job that were put off together come back in one claim: chance must not reorder them."""
    scene.charged()
    scene.settle(
        make_event("failed platform", at=EVENT_AT - SECOND),
        make_event("completed", at=EVENT_AT),
        busy=Busy(jobs=frozenset({"job-1"})),
    )
    later = NOW + timedelta(minutes=10)
    scene.as_superuser(
        f"UPDATE kino.pending_event SET next_attempt_at = '{later}' WHERE event_id = 'job-1 failed platform'",
        f"UPDATE kino.pending_event SET next_attempt_at = '{NOW}' WHERE event_id = 'job-1 completed'",
    )

    scene.sweep(now=NOW + SECOND)
    scene.sweep(now=later)

    assert scene.inbox() == {"job-1 completed": "completed_after_refund", "job-1 failed platform": "refunded"}


def test_a_busy_job_is_put_off_without_being_looked_at(scene: Scene) -> None:
    """Every event of a busy job waits, its neighbours are settled, and the next sweep settles it."""
    scene.charged("job-1")
    scene.charged("job-2")
    events = [
        make_event("timeout", "job-1", at=EVENT_AT - SECOND),
        make_event("completed", "job-1"),
        make_event("timeout", "job-2"),
    ]

    said = scene.settle(*events, busy=Busy(jobs=frozenset({"job-1"})))

    assert said == ["busy", "busy", "refunded"]
    assert scene.pending() == {
        "job-1 completed": Waits("job-1", "busy", 0),
        "job-1 timeout": Waits("job-1", "busy", 0),
    }
    assert scene.sweep(now=NOW + LONGEST_DELAY) == {"refunded": 1, "completed_after_refund": 1}
