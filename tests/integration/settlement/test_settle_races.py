"""Two sessions at once on a real Postgres: each test stops one inside its transaction and watches the other wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from kino_refunds.ledger import Balance
from kino_refunds.settlement import batch as batch_module
from kino_refunds.settlement import settle as settle_module
from tests.clock import expire_lots, set_lot_grace
from tests.ledger_acts import void
from tests.scenario import (
    EVENT_AT,
    NOW,
    PATIENT,
    SOURCE,
    Broken,
    Dead,
    Moved,
    Scene,
    Waits,
    make_event,
    until,
)

if TYPE_CHECKING:
    from tests.conftest import Database

SECOND = timedelta(seconds=1)
LATER = NOW + timedelta(hours=1)


@pytest.fixture
def patient(database: Database) -> Iterator[Scene]:
    """A worker that waits for a lock for as long as the test wants it to."""
    with Scene.of(database, limits=PATIENT) as scene:
        yield scene


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        yield pool


@dataclass
class Gate:
    """Stops the first session that comes by, inside its transaction, until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def stop_the_first(self) -> None:
        if self._taken.acquire(blocking=False):
            self.reached.set()
            assert self.opened.wait(60), "nobody opened the gate"


@pytest.fixture
def gate_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    """Stop the first session right after one of settle's own steps, by the step's name."""
    gates = []

    def install(step: str) -> Gate:
        gate = Gate()
        gates.append(gate)
        original: Callable[..., Any] = getattr(settle_module, step)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            gate.stop_the_first()
            return result

        monkeypatch.setattr(settle_module, step, stepped)
        return gate

    yield install
    for gate in gates:
        gate.opened.set()


@contextmanager
def held(scene: Scene, statement: str, **parameters: Any) -> Iterator[sa.Connection]:
    """Hold what `statement` locks, in a session of somebody else, until the block ends; then roll back."""
    with scene.superuser.connect() as connection:
        connection.execute(sa.text(statement), parameters)
        yield connection
        connection.rollback()


LOCK_LOT = "SELECT FROM kino.credit_lot WHERE lot_id = :lot_id FOR NO KEY UPDATE"
SETTLE_BY_HAND = (
    "INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)"
    " VALUES (:charge_id, 'refunded', 'timeout', '2.timeout', '2025-12-14', 'by hand', 'by hand', now())"
)


def race(scene: Scene, threads: ThreadPoolExecutor, gate: Gate, *sides: Callable[[], Any]) -> list[Any]:
    """Start the first side, stop it at the gate, let the others run into it, then open; returns the results."""
    futures: list[Future[Any]] = [threads.submit(sides[0])]
    assert gate.reached.wait(30), "the first session did not reach its gate"
    futures += [threads.submit(side) for side in sides[1:]]
    until(lambda: scene.waiting_for_locks() >= len(sides) - 1 or any(f.done() for f in futures))
    gate.opened.set()
    return [future.result(60) for future in futures]


# Settling against settling.


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


# Somebody else holds what we need.


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

        def alone_and_then_free(*args: Any) -> Any:
            rulings = settle_alone(*args)
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


# A refund against what happens to its lot. The grace is nought here, so that the lot's state alone decides.

EXPIRES_AT = NOW + timedelta(hours=2)
JUST_BEFORE = EXPIRES_AT - SECOND


def test_a_refund_that_waits_for_the_expiry_of_its_lot(patient: Scene, threads: ThreadPoolExecutor) -> None:
    """Expiry first: the refund sees the expired lot and opens a successor, so no credit falls into a dead lot."""
    set_lot_grace(patient.superuser, 0)
    charge = patient.charged(expires_at=EXPIRES_AT)
    lot_id = charge.lines[0][0]

    with patient.worker.connect() as expiry:
        expired = expire_lots(expiry, now=EXPIRES_AT)
        settling = threads.submit(patient.settle, make_event("timeout"), now=JUST_BEFORE)
        until(lambda: patient.waiting_for_locks() == 1 or settling.done())
        expiry.commit()
    said = settling.result(60)

    lots = patient.rows("SELECT lot_id, state, granted, remaining, successor_of FROM kino.credit_lot ORDER BY lot_id")
    successor_id = lots[1][0]
    assert (expired, said) == (1, ["refunded"])
    assert lots == [(lot_id, "expired", 100, 0, None), (successor_id, "active", 10, 10, lot_id)]
    assert patient.story().moved == [Moved("refund", lot_id, successor_id, 10, "timeout")]


def test_an_expiry_passes_over_the_lot_of_a_refund(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Refund first: expiry does not wait for the lot, and its next run takes the returned credits too."""
    set_lot_grace(patient.superuser, 0)
    charge = patient.charged(expires_at=EXPIRES_AT)
    gate = gate_after("settle_charges")

    settling = threads.submit(patient.settle, make_event("timeout"), now=JUST_BEFORE)
    assert gate.reached.wait(30)
    with patient.worker.begin() as connection:
        passed_over = expire_lots(connection, now=EXPIRES_AT)
    gate.opened.set()
    said = settling.result(60)
    with patient.worker.begin() as connection:
        expired = expire_lots(connection, now=EXPIRES_AT)

    assert (passed_over, said, expired) == (0, ["refunded"], 1)
    assert patient.rows("SELECT lot_id, state, remaining FROM kino.credit_lot") == [(charge.lines[0][0], "expired", 0)]
    assert patient.rows("SELECT credits FROM kino.transfer WHERE kind = 'expire'") == [(100,)]


def test_a_refund_that_waits_for_the_voiding_of_its_lot(patient: Scene, threads: ThreadPoolExecutor) -> None:
    """Voiding first: the refunded credits are voided in the same transaction and cannot be spent."""
    charge = patient.charged(purchase_id="order-1")
    lot_id = charge.lines[0][0]

    with patient.superuser.connect() as voiding:
        voided = void(voiding, "order-1")
        settling = threads.submit(patient.settle, make_event("timeout"))
        until(lambda: patient.waiting_for_locks() == 1 or settling.done())
        voiding.commit()
    said = settling.result(60)

    assert (voided, said) == (90, ["refunded"])
    assert patient.story().moved == [
        Moved("refund", lot_id, None, 10, "timeout"),
        Moved("void", lot_id, None, 10, "payout"),
    ]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0)]


def test_a_voiding_that_waits_for_a_refund(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """Refund first: the voiding waits and takes back what was returned as well."""
    patient.charged(purchase_id="order-1")

    def act() -> int:
        with patient.superuser.begin() as connection:
            return void(connection, "order-1")

    said = race(patient, threads, gate_after("settle_charges"), lambda: patient.settle(make_event("timeout")), act)

    assert said == [["refunded"], 100]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0)]


def test_a_voiding_finds_the_successor_that_a_refund_opens(
    patient: Scene, threads: ThreadPoolExecutor, gate_after: Callable[[str], Gate]
) -> None:
    """A successor that is born while the voiding waits for its parent is voided too."""
    patient.charged(purchase_id="order-1", expires_at=NOW + timedelta(days=1))

    def act() -> int:
        with patient.superuser.begin() as connection:
            return void(connection, "order-1")

    said = race(patient, threads, gate_after("settle_charges"), lambda: patient.settle(make_event("timeout")), act)

    assert said == [["refunded"], 100]
    assert patient.rows("SELECT state, remaining FROM kino.credit_lot") == [("voided", 0), ("voided", 0)]


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
