"""Intake that closes itself: when the tripwire trips, what a probe tries, and how the gate opens again."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import depths
from kino_refunds.intake.gate import TRIPWIRE
from tests.failing import BadBuild, fail_first
from tests.intake import A, B, make_intake
from tests.integration.intake.gates import (
    AT_ONCE,
    AWAY,
    NEVER,
    OPEN,
    State,
    bad_intake,
    charge_and_fail,
    letters_by_reason,
    pause,
    state,
)
from tests.malformed import bare
from tests.pipeline import EMPTY, FAILED, drain, failures, numbered, open_jobs, push, refunded, several
from tests.scenario import Scene, make_event
from workers import intake as intake_module

# --- closed by the tripwire


def test_a_bad_build_pauses_intake_and_keeps_the_rest_on_the_queue(
    scene: Scene, redis: Redis, bad_build: BadBuild
) -> None:
    """A build whose settle raises for everything leaves 51 dead letters and no more: the gate says why."""
    charge_and_fail(scene, redis, 60)
    waiting = redis.lrange(FAILED, 0, -1)
    bad_build.fails_for(".")
    intake = bad_intake(scene, redis)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [60, 0]
    assert letters_by_reason(scene) == {"apply_error": (51, 51)}
    assert state(scene) == State(
        paused=True, reason="51 of the last 51 events failed in build bad (worker worker-a)", actor=TRIPWIRE
    )
    assert redis.lrange(FAILED, 0, -1) == waiting
    assert depths(redis) == {**EMPTY, FAILED: 60}
    assert refunded(scene) == []


def test_a_gate_that_cannot_be_closed_is_closed_at_the_next_failure(
    scene: Scene, redis: Redis, bad_build: BadBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Postgres goes away as the tripwire trips, the count stands: one more failure closes the gate, not fifty."""
    charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    intake = bad_intake(scene, redis)
    fail_first(monkeypatch, intake_module, "pause_intake", AWAY)

    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    before = state(scene)
    intake.run_once()

    assert (before.paused, state(scene).paused) == (False, True)
    assert letters_by_reason(scene) == {"apply_error": (51, 52)}
    assert depths(redis) == {**EMPTY, FAILED: 60}


@pytest.mark.parametrize(("errors", "tripped"), [(50, False), (51, True)])
def test_more_than_fifty_errors_trip(
    scene: Scene, redis: Redis, bad_build: BadBuild, errors: int, *, tripped: bool
) -> None:
    """Fifty events of a thousand may be bad by themselves; one more is a bad build."""
    charge_and_fail(scene, redis, errors)
    bad_build.fails_for(".")

    bad_intake(scene, redis).run_once()

    assert state(scene).paused is tripped
    assert letters_by_reason(scene) == {"apply_error": (errors, errors)}
    assert depths(redis) == {**EMPTY, FAILED: errors if tripped else 0}


@pytest.mark.parametrize(("between", "tripped"), [(900, True), (1000, False)])
def test_only_the_last_thousand_events_count(
    scene: Scene, redis: Redis, bad_build: BadBuild, between: int, *, tripped: bool
) -> None:
    """Errors that lie more than a thousand events back do not add up with today's."""
    bad_build.fails_for("bad")
    intake = bad_intake(scene, redis)
    for prefix, count in (("bad", 30), ("good", between), ("bad again", 30)):
        push(redis, *[make_event("failed platform", f"{prefix}-{n}") for n in range(count)])
        drain(intake)

    gate = state(scene)

    assert gate.paused is tripped
    assert len(scene.pending()) == between


def test_what_does_not_parse_never_counts(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """A publisher that sends nonsense cannot close the gate: its messages are kept, and the next one settles."""
    bad_build.fails_for("bad")
    redis.lpush(FAILED, *[bare({"nonsense": number}) for number in range(200)])
    push(redis, *[make_event("failed platform", f"bad-{n}") for n in range(50)])
    jobs = charge_and_fail(scene, redis, 1)

    sizes = drain(bad_intake(scene, redis))

    assert sizes == [251]
    assert state(scene) == OPEN
    assert letters_by_reason(scene) == {"invalid_event": (200, 200), "apply_error": (50, 50)}
    assert refunded(scene) == jobs


# --- probing


def test_between_probes_nothing_is_tried(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """Even a fixed build waits for its probe: a closed gate is not looked behind with every poll."""
    charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    intake = bad_intake(scene, redis, probe_every_s=NEVER)
    intake.run_once()
    bad_build.mend()

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [0, 0, 0]
    assert state(scene).paused
    assert depths(redis) == {**EMPTY, FAILED: 60}


def test_a_probe_tries_one_event_and_the_gate_stays_closed_while_the_bug_remains(
    scene: Scene, redis: Redis, bad_build: BadBuild
) -> None:
    """A probe costs one event at most: the gate stays as the tripwire closed it, and the others wait."""
    charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)
    intake.run_once()
    closed = state(scene)

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [1, 1, 1]
    assert state(scene) == closed
    # The probed events had become dead letters before: they were given back with their batch.
    assert letters_by_reason(scene) == {"apply_error": (51, 54)}
    assert depths(redis) == {**EMPTY, FAILED: 57}


def test_the_fixed_build_opens_the_gate_by_itself(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """The first event that settles opens the gate; then everything settles, once, without anybody's help."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    bad_intake(scene, redis).run_once()
    fixed = make_intake(scene, redis, B, build="good", probe_every_s=AT_ONCE)

    sizes = drain(fixed)

    assert sizes == [1, 59]
    assert state(scene) == State(paused=False, reason="an event settled in build good", actor=TRIPWIRE)
    assert refunded(scene) == sorted(jobs)
    assert depths(redis) == EMPTY


def test_a_message_that_does_not_parse_proves_nothing(scene: Scene, redis: Redis) -> None:
    """A probe that meets nonsense keeps it, leaves the gate closed, and the next probe decides."""
    redis.lpush(FAILED, b"nonsense")
    jobs = charge_and_fail(scene, redis, 1)
    pause(scene, "a bad build", TRIPWIRE)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    first, closed = intake.run_once(), state(scene).paused
    second = intake.run_once()

    assert (first, closed, second) == (1, True, 1)
    assert not state(scene).paused
    assert letters_by_reason(scene) == {"bad_json": (1, 1)}
    assert refunded(scene) == jobs


def test_a_probe_tries_one_event_although_a_batch_is_in_flight(
    scene: Scene, redis: Redis, bad_build: BadBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that kept a batch for later gives it back before it probes: the probe is one event."""
    charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    fail_first(monkeypatch, intake_module, "settle_parts", AWAY)
    intake = bad_intake(scene, redis, B, probe_every_s=AT_ONCE)
    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    pause(scene, "another worker's tripwire", TRIPWIRE)

    size = intake.run_once()

    assert size == 1
    assert letters_by_reason(scene) == {"apply_error": (1, 1)}
    assert depths(redis) == {**EMPTY, FAILED: 59}


# --- several events in one message


def test_the_tripwire_counts_events_and_not_messages(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """One message of sixty events that fail closes the gate, and is given back whole."""
    jobs = numbered("job", 60)
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, several(*failures(*jobs)))
    bad_build.fails_for(".")

    bad_intake(scene, redis).run_once()

    assert state(scene).actor == TRIPWIRE
    assert letters_by_reason(scene) == {"apply_error": (51, 51)}
    assert depths(redis) == {**EMPTY, FAILED: 1}


def test_a_probe_tries_one_event_of_several(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """Each probe tries the next event of the message, which stays until each has its row."""
    jobs = numbered("job", 3)
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, several(*failures(*jobs)))
    bad_build.fails_for(".")
    pause(scene, "a bad build", TRIPWIRE)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    found = [(intake.run_once(), letters_by_reason(scene)["apply_error"], depths(redis)[FAILED]) for _ in jobs]

    assert found == [(1, (1, 1), 1), (1, (2, 2), 1), (1, (3, 3), 0)]
    assert state(scene).paused
    assert [row.element_index for row in scene.rows("SELECT element_index FROM kino.dead_letter ORDER BY 1")] == [
        0,
        1,
        2,
    ]


def test_one_bad_event_of_several_does_not_keep_the_gate_closed(
    scene: Scene, redis: Redis, bad_build: BadBuild
) -> None:
    """The probe passes over what fails and what proves nothing; the first event that settles opens the gate."""
    jobs = numbered("job", 4)
    open_jobs(scene, *jobs)
    redis.lpush(
        FAILED,
        several(b'{"specversion":"1.0"}', *failures("no charge", *jobs)),
    )
    bad_build.fails_for("job-0")
    pause(scene, "a bad build", TRIPWIRE)
    intake = bad_intake(scene, redis, probe_every_s=AT_ONCE)

    probes = [(intake.run_once(), state(scene).paused) for _ in range(3)]
    drain(intake)

    assert probes == [(1, True), (1, True), (1, False)]
    assert refunded(scene) == jobs[1:]
    assert letters_by_reason(scene) == {"apply_error": (1, 2), "invalid_event": (1, 1)}
    assert [*scene.pending()] == ["no charge failed platform"]
    assert depths(redis) == EMPTY


# --- two workers


def test_one_worker_s_tripwire_stops_the_other(scene: Scene, redis: Redis, bad_build: BadBuild) -> None:
    """The gate is one row for all: what one worker found, no other has to find for itself."""
    charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    first = bad_intake(scene, redis, A)
    second = bad_intake(scene, redis, B, probe_every_s=NEVER)
    first.run_once()
    second.run_once()

    sizes = [first.run_once(), second.run_once()]

    assert sizes == [0, 0]
    assert letters_by_reason(scene)["apply_error"][0] <= 52
    assert state(scene).actor == TRIPWIRE
    assert sum(depths(redis).values()) >= 59
    assert refunded(scene) == []


def test_beside_a_bad_build_the_good_one_goes_on_after_its_probe(
    scene: Scene, redis: Redis, bad_build: BadBuild
) -> None:
    """In a rolling deploy each bad worker costs its 51 letters a time; what the good one takes settles once."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build.fails_for(".")
    bad = bad_intake(scene, redis, A)
    good = make_intake(scene, redis, B, build="good", probe_every_s=AT_ONCE)

    sizes = [bad.run_once(), good.run_once(), bad.run_once(), good.run_once(), good.run_once()]

    assert sizes == [60, 1, 59, 1, 58]
    assert refunded(scene) == sorted(jobs)
    assert depths(redis) == EMPTY
