"""Two sessions at once on a real Postgres: each test stops one inside its transaction and watches the other wait."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from kino_refunds.ledger import Balance
from tests.integration.settlement.races import LOCK_LOT, SETTLE_BY_HAND, Gate, held, race
from tests.scenario import NOW, Broken, Dead, Scene, Waits, make_event, until

LATER = NOW + timedelta(hours=1)


@pytest.mark.parametrize("step", ["settle_charges", "insert_inbox"])
@pytest.mark.parametrize(("kind", "available"), [("timeout", 100), ("completed", 90)])
def test_the_same_event_in_two_workers_is_settled_once(
    patient: Scene,
    threads: ThreadPoolExecutor,
    gate_after: Callable[[str], Gate],
    step: str,
    kind: str,
    available: int,
) -> None:
    """Whoever comes second waits, reads again, and is told what the first one decided."""
    patient.charged()
    event = make_event(kind)

    said = race(patient, threads, gate_after(step), *[lambda: patient.settle(event)] * 2)

    first = "refunded" if kind == "timeout" else "captured"
    story = patient.story()
    assert said == [[first], ["duplicate"]]
    assert [moved.credits for moved in story.moved] == [10]
    assert story.inbox == {event.id: first}
    assert patient.balance("acct of job-1") == Balance(available, 0)


@pytest.mark.parametrize("kind", ["timeout", "completed"])
def test_the_same_event_in_two_workers_is_settled_once_also_inside_the_function(
    patient: Scene, threads: ThreadPoolExecutor, kind: str
) -> None:
    """One has its settlement and waits for what somebody holds; the other waits for that settlement, and finds it."""
    patient.charged()
    event = make_event(kind)

    with held(patient, "SELECT FROM kino.open_charge FOR UPDATE"):
        futures = [threads.submit(patient.settle, event) for _ in range(2)]
        until(lambda: patient.waiting_for_locks() == 2)
    said = sorted(future.result(60) for future in futures)

    first = "refunded" if kind == "timeout" else "captured"
    assert said == sorted([[first], ["duplicate"]])
    assert [moved.credits for moved in patient.story().moved] == [10]


def test_one_event_id_under_two_jobs_in_two_workers_refunds_one(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Two charges, two lots, nothing shared but the id: the inbox alone keeps the second from being refunded."""
    patient.charged("job-1")
    patient.charged("job-2")

    said = race(
        patient,
        threads,
        gate_after("insert_inbox"),
        lambda: patient.settle(make_event("timeout", "job-1", event_id="evt")),
        lambda: patient.settle(make_event("timeout", "job-2", event_id="evt")),
    )

    assert said == [["refunded"], ["conflicting_duplicate"]]
    assert patient.inbox() == {"evt": "refunded"}
    assert patient.dead_letters() == [Dead("evt", "job-2", "conflicting_duplicate", 1, "open")]
    assert patient.balance("acct of job-1") == Balance(100, 0)
    assert patient.balance("acct of job-2") == Balance(90, 10)


@pytest.mark.parametrize(
    ("first", "second", "expected", "available"),
    [
        ("failed platform", "completed", ["refunded", "completed_after_refund"], 100),
        ("completed", "failed platform", ["captured", "failed_after_capture"], 90),
        ("failed platform", "timeout", ["refunded", "already_refunded"], 100),
        ("completed", "failed user", ["captured", "already_captured"], 90),
    ],
)
def test_two_events_of_one_job_in_two_workers_settle_it_once(
    patient: Scene,
    threads: ThreadPoolExecutor,
    gate_after: Callable[[str], Gate],
    first: str,
    second: str,
    expected: list[str],
    available: int,
) -> None:
    """The key is the charge: the second worker finds it settled and says what that makes of its own event."""
    patient.charged()

    said = race(
        patient,
        threads,
        gate_after("settle_charges"),
        lambda: patient.settle(make_event(first)),
        lambda: patient.settle(make_event(second)),
    )

    story = patient.story()
    assert said == [[expected[0]], [expected[1]]]
    assert [moved.credits for moved in story.moved] == [10]
    assert story.breaks == ([expected[1]] if "_after_" in expected[1] else [])
    assert patient.balance("acct of job-1") == Balance(available, 0)


def test_a_worker_that_came_second_still_settles_the_rest_of_its_batch(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Losing one event to another worker costs a second reading, and no neighbour."""
    for number in range(4):
        patient.charged(f"job-{number}")
    events = [make_event("timeout", f"job-{number}") for number in range(4)]

    said = race(
        patient,
        threads,
        gate_after("settle_charges"),
        lambda: patient.settle(events[1]),
        lambda: patient.settle(*events),
    )

    assert said == [["refunded"], ["refunded", "duplicate", "refunded", "refunded"]]
    assert [patient.balance(f"acct of job-{n}") for n in range(4)] == [Balance(100, 0)] * 4


def test_the_same_event_parked_by_two_workers_waits_once(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Two workers that hold copies of an event without a charge leave one pending row."""
    event = make_event("timeout")

    said = race(patient, threads, gate_after("park"), *[lambda: patient.settle(event)] * 2)

    assert said == [["charge_not_found"], ["charge_not_found"]]
    assert patient.pending() == {event.id: Waits("job-1", "charge_not_found", 0)}


def test_one_event_id_under_two_contents_parked_by_two_workers(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Of two contents under one id that both wait for a charge, the one that was parked first is the event."""
    said = race(
        patient,
        threads,
        gate_after("park"),
        lambda: patient.settle(make_event("timeout", "job-1", event_id="evt")),
        lambda: patient.settle(make_event("timeout", "job-2", event_id="evt")),
    )

    assert said == [["charge_not_found"], ["conflicting_duplicate"]]
    assert patient.pending() == {"evt": Waits("job-1", "charge_not_found", 0)}
    assert patient.dead_letters() == [Dead("evt", "job-2", "conflicting_duplicate", 1, "open")]


def test_a_retry_and_a_live_copy_settle_once(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """The sweep and a redelivery of the same event meet at its charge; one refunds and nothing waits on."""
    event = make_event("timeout")
    patient.settle(event)
    patient.charged()

    said = race(patient, threads, gate_after("settle_charges"), patient.sweep, lambda: patient.settle(event))

    assert said == [{"refunded": 1}, ["duplicate"]]
    assert patient.pending() == {}
    assert patient.balance("acct of job-1") == Balance(100, 0)


def test_the_same_contradiction_in_two_workers_is_one_break(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Two workers that find the same disagreement by different events raise one row, seen twice."""
    patient.charged()
    patient.settle(make_event("timeout"))

    said = race(
        patient,
        threads,
        gate_after("raise_breaks"),
        lambda: patient.settle(make_event("completed", event_id="one")),
        lambda: patient.settle(make_event("completed", event_id="two")),
    )

    assert said == [["completed_after_refund"], ["completed_after_refund"]]
    assert patient.breaks() == [Broken("completed_after_refund", "job-1", 10, 2, "open")]


def test_batches_with_shared_jobs_in_opposite_orders_do_not_deadlock(
    patient: Scene, threads: ThreadPoolExecutor
) -> None:
    """Settlements are written in the order of their keys, so two workers meet at the first that they share.

    (1) a stranger holds the middle of three keys, (2) both workers run into it or into each other, (3) the
    stranger lets go. Written in the order of delivery, each worker would now hold what the other waits for.
    """
    jobs = ["job-1", "job-2", "job-3"]
    charges = [patient.charged(job_id) for job_id in jobs]
    events = [make_event("timeout", job_id) for job_id in jobs]

    with held(patient, SETTLE_BY_HAND, charge_id=charges[1].charge_id):
        futures = [threads.submit(patient.settle, *order) for order in (events, events[::-1])]
        until(lambda: patient.waiting_for_locks() == 2)
    said = sorted(future.result(60) for future in futures)

    assert said == [["duplicate"] * 3, ["refunded"] * 3]
    assert [patient.balance(charge.account_id) for charge in charges] == [Balance(100, 0)] * 3


def test_batches_with_shared_lots_in_opposite_orders_do_not_deadlock(
    patient: Scene, threads: ThreadPoolExecutor
) -> None:
    """Lots are locked in the order of their ids: refunds into three shared lots, by two workers, all arrive."""
    accounts = ["a", "b", "c"]
    lots = [patient.grant(account_id, 100) for account_id in accounts]
    for account_id in accounts:
        for number in (1, 2):
            patient.open(f"{account_id}{number}", account_id, 10)

    with held(patient, LOCK_LOT, lot_id=lots[1].lot_id):
        batches = [("a1", "b1", "c1"), ("c2", "b2", "a2")]
        futures = [threads.submit(patient.settle, *(make_event("timeout", j) for j in jobs)) for jobs in batches]
        until(lambda: patient.waiting_for_locks() == 2)
    said = [future.result(60) for future in futures]

    assert said == [["refunded"] * 3] * 2
    assert [patient.balance(account_id) for account_id in accounts] == [Balance(100, 0)] * 3


def test_many_workers_with_the_same_events_settle_each_once(scene: Scene, threads: ThreadPoolExecutor) -> None:
    """Four workers of production's time-outs, the same batch in four orders: every refund once, nobody fails."""
    scene.grant("acct-1", 1000)
    for number in range(20):
        scene.open(f"job-{number}", "acct-1", 10)
    events = [make_event("timeout", f"job-{number}") for number in range(20)]
    orders = [events, events[::-1], events[10:] + events[:10], events[::2] + events[1::2]]

    outcomes = [future.result(60) for future in [threads.submit(scene.settle_batch, *order) for order in orders]]
    while scene.pending():
        scene.sweep(now=LATER)

    said = sorted(word for each in outcomes for word in each.values())
    assert set(said) <= {"refunded", "duplicate", "busy"}
    assert scene.inbox() == {event.id: "refunded" for event in sorted(events, key=lambda event: event.id)}
    assert scene.balance("acct-1") == Balance(1000, 0)


def test_a_charge_that_commits_while_its_event_is_parked_is_settled_by_the_sweep(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """The charge may come between reading and parking: the event is due at once, because its charge is there."""
    gate = gate_after("read_charges")
    settling = threads.submit(patient.settle, make_event("timeout"))
    assert gate.reached.wait(30)

    patient.charged()
    gate.opened.set()
    said = settling.result(60)

    assert said == ["charge_not_found"]
    assert patient.sweep() == {"refunded": 1}
