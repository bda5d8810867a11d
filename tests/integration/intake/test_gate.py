"""The gate of intake: who may close it and open it, and that the tripwire never takes the place of a person."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import depths
from kino_refunds.intake.gate import TRIPWIRE, Gate, read_gate
from kino_refunds.settlement import batch
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.settle import settle
from tests.failing import BadBuild, fail_first
from tests.integration.intake.batches import running
from tests.integration.intake.gates import ANNA, AT_ONCE, AWAY, State, bad_intake, charge_and_fail, pause, resume, state
from tests.pipeline import EMPTY, FAILED, drain, refunded
from tests.scenario import Scene, until
from workers import intake as intake_module

# --- closed by a person


def test_a_person_s_pause_leaves_every_message_where_it_is(scene: Scene, redis: Redis) -> None:
    """While a person holds intake nothing is claimed and nothing is probed, however long it lasts."""
    charge_and_fail(scene, redis, 3)
    waiting = redis.lrange(FAILED, 0, -1)
    pause(scene)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [0, 0, 0]
    assert redis.lrange(FAILED, 0, -1) == waiting
    assert list(redis.scan_iter("kino:*")) == []
    assert state(scene) == ANNA
    assert refunded(scene) == []


def test_a_worker_that_runs_sees_a_pause_and_its_end(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes by what it read of the gate for a moment only: a pause stops it, and its end lets it go on."""
    read: list[bool] = []

    def counted(connection: sa.Connection) -> Gate:
        gate = read_gate(connection)
        read.append(gate.paused)
        return gate

    monkeypatch.setattr(intake_module, "read_gate", counted)
    first = charge_and_fail(scene, redis, 1, "first")

    with running(bad_intake(scene, redis)):
        until(lambda: refunded(scene) == first)
        pause(scene)
        until(lambda: True in read)
        second = charge_and_fail(scene, redis, 1, "second")
        looks = len(read)
        until(lambda: len(read) >= looks + 2)
        paused = depths(redis)
        resume(scene, "anna")
        until(lambda: depths(redis) == EMPTY)

    assert paused == {**EMPTY, FAILED: 1}
    assert refunded(scene) == sorted(first + second)


def test_a_batch_in_flight_is_given_back_when_a_person_pauses(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that was kept for later goes back to its queue in its order, and settles once after the pause."""
    jobs = charge_and_fail(scene, redis, 3)
    waiting = redis.lrange(FAILED, 0, -1)
    fail_first(monkeypatch, intake_module, "settle_parts", AWAY)
    intake = bad_intake(scene, redis)
    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    in_flight = depths(redis)
    pause(scene)

    paused = intake.run_once()
    given_back = redis.lrange(FAILED, 0, -1)
    resume(scene, "anna")
    sizes = drain(intake)

    assert in_flight == {**EMPTY, "in-flight": 3}
    assert (paused, given_back) == (0, waiting)
    assert sizes == [3]
    assert refunded(scene) == jobs
    assert depths(redis) == EMPTY


# --- a person and the tripwire


def test_a_person_s_pause_takes_the_place_of_the_tripwire_s(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """What a person holds is not probed and not opened, though the build is fixed: only a person ends it."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)
    intake.run_once()
    taken = pause(scene)
    bad_build.mend()

    sizes = [intake.run_once() for _ in range(3)]
    held = state(scene)
    opened_by = resume(scene, TRIPWIRE), resume(scene, "anna")
    drain(intake)

    assert taken
    assert sizes == [0, 0, 0]
    assert held == ANNA
    assert opened_by == (False, True)
    assert refunded(scene) == sorted(jobs)


def test_the_tripwire_does_not_take_the_place_of_a_person_s_pause(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that trips while a person pauses is given back, and the gate stays the person's."""
    charge_and_fail(scene, redis, 60)

    def paused_meanwhile(*_: Any, **__: Any) -> list[Ruling]:
        pause(scene)
        raise ZeroDivisionError("a mistake of this build")

    monkeypatch.setattr(batch, "settle", paused_meanwhile)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [60, 0]
    assert state(scene) == ANNA
    assert depths(redis) == {**EMPTY, FAILED: 60}


def test_a_probe_does_not_open_what_a_person_closed_meanwhile(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who pauses while a probe is under way finds the gate closed afterwards."""
    jobs = charge_and_fail(scene, redis, 2)
    pause(scene, "a bad build", TRIPWIRE)

    def paused_meanwhile(*args: Any, **kwargs: Any) -> list[Ruling]:
        pause(scene)
        return settle(*args, **kwargs)

    monkeypatch.setattr(batch, "settle", paused_meanwhile)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [1, 0]
    assert state(scene) == ANNA
    assert refunded(scene) == jobs[:1]


def test_a_person_may_open_what_the_tripwire_closed(scene: Scene, redis: Redis) -> None:
    """Whoever knows better does not have to wait for a probe."""
    jobs = charge_and_fail(scene, redis, 2)
    pause(scene, "a bad build", TRIPWIRE)

    opened = resume(scene, "anna")
    sizes = drain(bad_intake(scene, redis))

    assert opened
    assert sizes == [2]
    assert state(scene) == State(paused=False, reason="it is fine", actor="anna")
    assert refunded(scene) == jobs


def test_a_pause_that_stands_is_not_written_over(scene: Scene) -> None:
    """The first person's reason stands until somebody resumes; who comes second is told so."""
    first, second, tripwire = pause(scene), pause(scene, "another", "bob"), pause(scene, "bad", TRIPWIRE)

    assert (first, second, tripwire) == (True, False, False)
    assert state(scene) == ANNA
