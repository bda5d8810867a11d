"""Events of one job that wait, and a new one: they are decided together, by the order of their own times."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from kino_refunds.db.engine import SessionLimits
from kino_refunds.events.schema import Event
from kino_refunds.settlement import inbox
from kino_refunds.settlement.decide import Busy
from kino_refunds.settlement.pending import read_pending
from tests.clock import SECOND
from tests.conftest import Database
from tests.scenario import EVENT_AT, NOW, Scene, make_event, until

HOLD_LOTS = "SELECT FROM kino.credit_lot FOR NO KEY UPDATE"


def failed(at: datetime = EVENT_AT, **fields: str) -> Event:
    return make_event("failed platform", at=at, **fields)


def completed(at: datetime = EVENT_AT + SECOND) -> Event:
    return make_event("completed", at=at)


def wait_as_busy(scene: Scene, *events: Event) -> None:
    """Let events wait because a session holds their job's lots."""
    with scene.superuser.connect() as holding:
        holding.exec_driver_sql(HOLD_LOTS)
        found = scene.settle_batch(*events)
    assert set(found.values()) == {"busy"}


@pytest.mark.parametrize("sweep_has_it", [False, True])
def test_a_completion_does_not_overtake_a_failure_that_waits_for_a_lot(scene: Scene, sweep_has_it: bool) -> None:
    """A failure that was only put off comes first, as if both had come in one batch; a sweep's lease hinders nobody."""
    scene.charged()
    wait_as_busy(scene, failed())
    if sweep_has_it:
        scene.as_superuser("UPDATE kino.pending_event SET leased_until = now() + interval '1 minute'")

    said = scene.settle_batch(completed())

    assert said == {"job-1 completed": "completed_after_refund"}
    assert scene.inbox() == {"job-1 completed": "completed_after_refund", "job-1 failed platform": "refunded"}
    assert scene.pending() == {}
    assert scene.balance("acct of job-1").available == 100


def test_a_completion_does_not_overtake_a_failure_that_waits_for_its_charge(scene: Scene) -> None:
    """A failure that came before its charge is decided with whatever comes first after the charge."""
    scene.grant("acct-1")
    scene.settle_batch(failed())
    scene.open("job-1", "acct-1")

    scene.settle_batch(completed())

    assert scene.inbox() == {"job-1 completed": "completed_after_refund", "job-1 failed platform": "refunded"}


def test_the_order_is_that_of_the_events(scene: Scene) -> None:
    """A job that completed first and then failed is captured, although the failure was here first."""
    scene.charged()
    wait_as_busy(scene, failed(EVENT_AT + SECOND))

    said = scene.settle_batch(completed(EVENT_AT))

    assert said == {"job-1 completed": "captured"}
    assert scene.inbox() == {"job-1 completed": "captured", "job-1 failed platform": "failed_after_capture"}


def test_what_still_waits_puts_the_new_one_off(scene: Scene) -> None:
    """While the lot is held both wait: the new event must not take the place of the one before it."""
    scene.charged()

    with scene.superuser.connect() as holding:
        holding.exec_driver_sql(HOLD_LOTS)
        scene.settle_batch(failed())
        said = scene.settle_batch(completed())
    scene.sweep(now=NOW + timedelta(hours=1))

    assert said == {"job-1 completed": "busy"}
    assert scene.inbox() == {"job-1 completed": "completed_after_refund", "job-1 failed platform": "refunded"}


def test_other_jobs_are_left_alone(scene: Scene) -> None:
    """Only what waits for a job of the batch is decided with it."""
    scene.charged("job-1")
    scene.charged("job-2")
    wait_as_busy(scene, make_event("timeout", "job-1"), make_event("timeout", "job-2"))

    scene.settle_batch(make_event("completed", "job-2", at=EVENT_AT + SECOND))

    assert scene.pending().keys() == {"job-1 timeout"}


def test_a_flood_delays_its_own_job_only(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what waits for a job so many are taken along, the oldest first; the others wait for the sweep."""
    monkeypatch.setattr(inbox, "TOGETHER_MAX", 3)
    scene.charged()
    for number in range(5):
        wait_as_busy(scene, failed(event_id=f"evt-{number}"))
        scene.as_superuser(
            f"UPDATE kino.pending_event SET first_seen_at = first_seen_at - interval '{number} min'"
            f" WHERE event_id = 'evt-{number}'"
        )

    scene.settle_batch(completed())

    assert scene.pending().keys() == {"evt-0", "evt-1"}


def test_a_waiting_event_that_ends_settling_takes_no_new_one_with_it(scene: Scene) -> None:
    """What waits is a delivery of its own: when our code cannot apply it, that one becomes the letter."""
    scene.charged()
    wait_as_busy(scene, failed())
    scene.as_superuser(
        "CREATE FUNCTION kino.plant() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF starts_with(NEW.event_id, 'job-1 f') THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER plant BEFORE INSERT ON kino.inbox_event FOR EACH ROW EXECUTE FUNCTION kino.plant()",
    )

    said = scene.settle_batch(completed())

    assert said == {"job-1 completed": "captured"}
    assert [(letter.event_id, letter.reason) for letter in scene.dead_letters()] == [
        ("job-1 failed platform", "apply_error")
    ]
    assert scene.pending() == {}


def test_what_waits_for_a_settled_charge_waits_for_the_sweep(scene: Scene) -> None:
    """A charge that is settled has nothing left to decide: what waits for it costs a new event nothing."""
    scene.charged()
    wait_as_busy(scene, failed())
    scene.as_superuser("UPDATE kino.pending_event SET job_id = 'job-2'")
    scene.charged("job-2")
    scene.settle(make_event("completed", "job-2"))

    scene.settle_batch(make_event("completed", "job-2", event_id="again"))

    assert scene.pending().keys() == {"job-1 failed platform"}


def test_a_sweep_and_a_new_event_meet_without_a_deadlock(database: Database) -> None:
    """Both lock what waited in the order of its keys before anything else: one waits, and finds it decided."""
    limits = SessionLimits(lock_timeout_ms=60_000, statement_timeout_ms=60_000, idle_in_transaction_timeout_ms=60_000)
    with Scene.of(database, limits=limits) as scene, ThreadPoolExecutor(2) as threads:
        scene.charged()
        first, second = failed(event_id="a"), failed(event_id="b")
        scene.settle(first, second, busy=Busy(jobs=frozenset({"job-1"})))
        with scene.superuser.connect() as holding:
            holding.exec_driver_sql("SELECT FROM kino.pending_event WHERE event_id = 'a' FOR UPDATE")
            live = threads.submit(scene.settle_batch, completed())
            sweep = threads.submit(scene.sweep, now=NOW + timedelta(hours=1))
            until(lambda: scene.waiting_for_locks() == 2)
        live.result(60)
        sweep.result(60)

        assert scene.inbox() == {"a": "refunded", "b": "already_refunded", "job-1 completed": "completed_after_refund"}
        assert scene.pending() == {}


def test_a_waiting_event_that_this_build_cannot_read_stays_for_the_sweep(scene: Scene) -> None:
    """An event of a newer build is not guessed at; the sweep makes a letter of it, and the new one is decided."""
    scene.charged()
    wait_as_busy(scene, failed())
    scene.as_superuser("UPDATE kino.pending_event SET event = jsonb_set(event, '{type}', '\"kino.later.v9\"')")

    with scene.worker.connect() as connection:
        read = read_pending(connection, {failed().identity})
    said = scene.settle_batch(completed())

    assert read == []
    assert said == {"job-1 completed": "captured"}
    assert scene.pending().keys() == {"job-1 failed platform"}
