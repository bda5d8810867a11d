"""The gate of intake: who may close it, when it closes itself, and how it finds out that it may open again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import SERVED, Queues, depths
from kino_refunds.events.schema import to_json
from kino_refunds.intake.gate import TRIPWIRE, pause_intake, read_gate, resume_intake
from kino_refunds.settings import Settings
from kino_refunds.settlement import batch
from kino_refunds.settlement.batch import Part
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.rules import rules_of
from kino_refunds.settlement.settle import settle
from tests.malformed import bare
from tests.pipeline import drain, numbered, open_jobs, push, refunded
from tests.scenario import Scene, make_event
from workers import intake as intake_module
from workers.intake import Intake

A, B = "worker-a", "worker-b"
FAILED = SERVED[0]
EMPTY: dict[str, int] = {**dict.fromkeys(map(str, SERVED), 0), "in-flight": 0, "recovered": 0}
NEVER, AT_ONCE = 3600.0, 0.0
"""How often a probe is tried: not within a test, or with every look."""
AWAY = sa.exc.OperationalError("SELECT", None, psycopg.OperationalError("away"))


class State(NamedTuple):
    """The gate without its time."""

    paused: bool
    reason: str | None
    actor: str | None


OPEN = State(paused=False, reason=None, actor=None)
ANNA = State(paused=True, reason="maintenance", actor="anna")


@pytest.fixture
def bad_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every settle raise in a build named `bad`, for events whose job matches; "" mends it."""

    def break_for(jobs: str) -> None:
        def failing(connection: Any, deliveries: Sequence[Any], rules: Any, **more: Any) -> list[Ruling]:
            if jobs and rules.build == "bad" and any(re.match(jobs, d.event.job_id) for d in deliveries):
                raise ZeroDivisionError("a mistake of this build")
            return settle(connection, deliveries, rules, **more)

        monkeypatch.setattr(batch, "settle", failing)

    return break_for


def make_intake(
    scene: Scene, client: Redis, worker_id: str = A, *, build: str = "bad", probe_every_s: float = NEVER
) -> Intake:
    settings = Settings.model_construct(build=build)
    queues = Queues(client, worker_id, alive_ttl_s=60)
    return Intake(scene.worker, queues, rules_of(settings), settings, name=worker_id, probe_every_s=probe_every_s)


def charge_and_fail(scene: Scene, client: Redis, count: int, prefix: str = "job") -> list[str]:
    """Charge jobs, and let the pipeline say that each failed."""
    jobs = numbered(prefix, count)
    open_jobs(scene, *jobs, account_id=f"acct {prefix}")
    push(client, *[make_event("failed platform", job) for job in jobs])
    return jobs


def fail_with(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """Let settling the next batches fail with these errors first."""
    left = list(errors)

    def failing(*args: Any, **kwargs: Any) -> Iterator[Part]:
        if left:
            raise left.pop(0)
        return batch.settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", failing)


def state(scene: Scene) -> State:
    with scene.superuser.begin() as connection:
        gate = read_gate(connection)
    return State(gate.paused, gate.reason, gate.actor)


def pause(scene: Scene, reason: str = "maintenance", actor: str = "anna") -> bool:
    with scene.worker.begin() as connection:
        return pause_intake(connection, reason=reason, actor=actor)


def resume(scene: Scene, actor: str) -> bool:
    with scene.worker.begin() as connection:
        return resume_intake(connection, reason="it is fine", actor=actor)


def letters(scene: Scene) -> dict[str, tuple[int, int]]:
    """Dead letters by reason: how many, and how often they were seen."""
    rows = scene.rows("SELECT reason, count(*), CAST(sum(seen) AS bigint) FROM kino.dead_letter GROUP BY reason")
    return {row[0]: (row[1], row[2]) for row in rows}


# --- closed by a person


def test_a_person_s_pause_leaves_every_message_where_it_is(scene: Scene, redis: Redis) -> None:
    """While a person holds intake nothing is claimed and nothing is probed, however long it lasts."""
    charge_and_fail(scene, redis, 3)
    waiting = redis.lrange(FAILED, 0, -1)
    pause(scene)
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [0, 0, 0]
    assert redis.lrange(FAILED, 0, -1) == waiting
    assert list(redis.scan_iter("kino:*")) == []
    assert state(scene) == ANNA
    assert refunded(scene) == []


def test_a_batch_in_flight_is_given_back_when_a_person_pauses(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that was kept for later goes back to its queue in its order, and settles once after the pause."""
    jobs = charge_and_fail(scene, redis, 3)
    waiting = redis.lrange(FAILED, 0, -1)
    fail_with(monkeypatch, AWAY)
    intake = make_intake(scene, redis)
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


# --- closed by the tripwire


def test_a_bad_build_pauses_intake_and_keeps_the_rest_on_the_queue(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """A build whose settle raises for everything leaves 51 dead letters and no more: the gate says why."""
    charge_and_fail(scene, redis, 60)
    waiting = redis.lrange(FAILED, 0, -1)
    bad_build(".")
    intake = make_intake(scene, redis)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [60, 0]
    assert letters(scene) == {"apply_error": (51, 51)}
    assert state(scene) == State(
        paused=True, reason="51 of the last 51 events failed in build bad (worker worker-a)", actor=TRIPWIRE
    )
    assert redis.lrange(FAILED, 0, -1) == waiting
    assert depths(redis) == {**EMPTY, FAILED: 60}
    assert refunded(scene) == []


@pytest.mark.parametrize(("errors", "tripped"), [(50, False), (51, True)])
def test_more_than_fifty_errors_trip(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None], errors: int, *, tripped: bool
) -> None:
    """Fifty events of a thousand may be bad by themselves; one more is a bad build."""
    charge_and_fail(scene, redis, errors)
    bad_build(".")

    make_intake(scene, redis).run_once()

    assert state(scene).paused is tripped
    assert letters(scene) == {"apply_error": (errors, errors)}
    assert depths(redis) == {**EMPTY, FAILED: errors if tripped else 0}


@pytest.mark.parametrize(("between", "tripped"), [(900, True), (1000, False)])
def test_only_the_last_thousand_events_count(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None], between: int, *, tripped: bool
) -> None:
    """Errors that lie more than a thousand events back do not add up with today's."""
    bad_build("bad")
    intake = make_intake(scene, redis)
    for prefix, count in (("bad", 30), ("good", between), ("bad again", 30)):
        push(redis, *[make_event("failed platform", f"{prefix}-{n}") for n in range(count)])
        drain(intake)

    gate = state(scene)

    assert gate.paused is tripped
    assert len(scene.pending()) == between


def test_what_does_not_parse_never_counts(scene: Scene, redis: Redis, bad_build: Callable[[str], None]) -> None:
    """A publisher that sends nonsense cannot close the gate: its messages are kept, and the next one settles."""
    bad_build("bad")
    redis.lpush(FAILED, *[bare({"nonsense": number}) for number in range(200)])
    push(redis, *[make_event("failed platform", f"bad-{n}") for n in range(50)])
    jobs = charge_and_fail(scene, redis, 1)

    sizes = drain(make_intake(scene, redis))

    assert sizes == [251]
    assert state(scene) == OPEN
    assert letters(scene) == {"invalid_event": (200, 200), "apply_error": (50, 50)}
    assert refunded(scene) == jobs


# --- probing


def test_between_probes_nothing_is_tried(scene: Scene, redis: Redis, bad_build: Callable[[str], None]) -> None:
    """Even a fixed build waits for its probe: a closed gate is not looked behind with every poll."""
    charge_and_fail(scene, redis, 60)
    bad_build(".")
    intake = make_intake(scene, redis, probe_every_s=NEVER)
    intake.run_once()
    bad_build("")

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [0, 0, 0]
    assert state(scene).paused
    assert depths(redis) == {**EMPTY, FAILED: 60}


def test_a_probe_tries_one_event_and_the_gate_stays_closed_while_the_bug_remains(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """A probe costs one event at most: the gate stays as the tripwire closed it, and the others wait."""
    charge_and_fail(scene, redis, 60)
    bad_build(".")
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)
    intake.run_once()
    closed = state(scene)

    sizes = [intake.run_once() for _ in range(3)]

    assert sizes == [1, 1, 1]
    assert state(scene) == closed
    # The probed events had become dead letters before: they were given back with their batch.
    assert letters(scene) == {"apply_error": (51, 54)}
    assert depths(redis) == {**EMPTY, FAILED: 57}


def test_the_fixed_build_opens_the_gate_by_itself(scene: Scene, redis: Redis, bad_build: Callable[[str], None]) -> None:
    """The first event that settles opens the gate; then everything settles, once, without anybody's help."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build(".")
    make_intake(scene, redis).run_once()
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
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

    first, closed = intake.run_once(), state(scene).paused
    second = intake.run_once()

    assert (first, closed, second) == (1, True, 1)
    assert not state(scene).paused
    assert letters(scene) == {"bad_json": (1, 1)}
    assert refunded(scene) == jobs


def test_a_probe_tries_one_event_although_a_batch_is_in_flight(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that kept a batch for later gives it back before it probes: the probe is one event."""
    charge_and_fail(scene, redis, 60)
    bad_build(".")
    fail_with(monkeypatch, AWAY)
    intake = make_intake(scene, redis, B, probe_every_s=AT_ONCE)
    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    pause(scene, "another worker's tripwire", TRIPWIRE)

    size = intake.run_once()

    assert size == 1
    assert letters(scene) == {"apply_error": (1, 1)}
    assert depths(redis) == {**EMPTY, FAILED: 59}


# --- several events in one message


def several(client: Redis, *jobs: str) -> None:
    """Publish one message with the failures of all these jobs."""
    client.lpush(FAILED, b"[" + b",".join(to_json(make_event("failed platform", job)) for job in jobs) + b"]")


def test_the_tripwire_counts_events_and_not_messages(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """One message of sixty events that fail closes the gate, and is given back whole."""
    jobs = numbered("job", 60)
    open_jobs(scene, *jobs)
    several(redis, *jobs)
    bad_build(".")

    make_intake(scene, redis).run_once()

    assert state(scene).actor == TRIPWIRE
    assert letters(scene) == {"apply_error": (51, 51)}
    assert depths(redis) == {**EMPTY, FAILED: 1}


def test_a_probe_tries_one_event_of_several(scene: Scene, redis: Redis, bad_build: Callable[[str], None]) -> None:
    """Each probe tries the next event of the message, which stays until each has its row."""
    jobs = numbered("job", 3)
    open_jobs(scene, *jobs)
    several(redis, *jobs)
    bad_build(".")
    pause(scene, "a bad build", TRIPWIRE)
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

    found = [(intake.run_once(), letters(scene)["apply_error"], depths(redis)[FAILED]) for _ in jobs]

    assert found == [(1, (1, 1), 1), (1, (2, 2), 1), (1, (3, 3), 0)]
    assert state(scene).paused
    assert [row.element_index for row in scene.rows("SELECT element_index FROM kino.dead_letter ORDER BY 1")] == [
        0,
        1,
        2,
    ]


def test_one_bad_event_of_several_does_not_keep_the_gate_closed(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """The probe passes over what fails and what proves nothing; the first event that settles opens the gate."""
    jobs = numbered("job", 4)
    open_jobs(scene, *jobs)
    redis.lpush(
        FAILED,
        b"[%s]"
        % b",".join(
            [b'{"specversion":"1.0"}', to_json(make_event("failed platform", "no charge"))]
            + [to_json(make_event("failed platform", job)) for job in jobs]
        ),
    )
    bad_build("job-0")
    pause(scene, "a bad build", TRIPWIRE)
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

    probes = [(intake.run_once(), state(scene).paused) for _ in range(3)]
    drain(intake)

    assert probes == [(1, True), (1, True), (1, False)]
    assert refunded(scene) == jobs[1:]
    assert letters(scene) == {"apply_error": (1, 2), "invalid_event": (1, 1)}
    assert [*scene.pending()] == ["no charge failed platform"]
    assert depths(redis) == EMPTY


# --- a person and the tripwire


def test_a_person_s_pause_takes_the_place_of_the_tripwire_s(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """What a person holds is not probed and not opened, though the build is fixed: only a person ends it."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build(".")
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)
    intake.run_once()
    taken = pause(scene)
    bad_build("")

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
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

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
    intake = make_intake(scene, redis, probe_every_s=AT_ONCE)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [1, 0]
    assert state(scene) == ANNA
    assert refunded(scene) == jobs[:1]


def test_a_person_may_open_what_the_tripwire_closed(scene: Scene, redis: Redis) -> None:
    """Whoever knows better does not have to wait for a probe."""
    jobs = charge_and_fail(scene, redis, 2)
    pause(scene, "a bad build", TRIPWIRE)

    opened = resume(scene, "anna")
    sizes = drain(make_intake(scene, redis))

    assert opened
    assert sizes == [2]
    assert state(scene) == State(paused=False, reason="it is fine", actor="anna")
    assert refunded(scene) == jobs


def test_a_pause_that_stands_is_not_written_over(scene: Scene) -> None:
    """The first person's reason stands until somebody resumes; who comes second is told so."""
    first, second, tripwire = pause(scene), pause(scene, "another", "bob"), pause(scene, "bad", TRIPWIRE)

    assert (first, second, tripwire) == (True, False, False)
    assert state(scene) == ANNA


# --- two workers


def test_one_worker_s_tripwire_stops_the_other(scene: Scene, redis: Redis, bad_build: Callable[[str], None]) -> None:
    """The gate is one row for all: what one worker found, no other has to find for itself."""
    charge_and_fail(scene, redis, 60)
    bad_build(".")
    first = make_intake(scene, redis, A)
    second = make_intake(scene, redis, B, probe_every_s=NEVER)
    first.run_once()
    second.run_once()

    sizes = [first.run_once(), second.run_once()]

    assert sizes == [0, 0]
    assert letters(scene)["apply_error"][0] <= 52
    assert state(scene).actor == TRIPWIRE
    assert sum(depths(redis).values()) >= 59
    assert refunded(scene) == []


def test_beside_a_bad_build_the_good_one_goes_on_after_its_probe(
    scene: Scene, redis: Redis, bad_build: Callable[[str], None]
) -> None:
    """In a rolling deploy each bad worker costs its 51 letters a time; what the good one takes settles once."""
    jobs = charge_and_fail(scene, redis, 60)
    bad_build(".")
    bad = make_intake(scene, redis, A, build="bad")
    good = make_intake(scene, redis, B, build="good", probe_every_s=AT_ONCE)

    sizes = [bad.run_once(), good.run_once(), bad.run_once(), good.run_once(), good.run_once()]

    assert sizes == [60, 1, 59, 1, 58]
    assert refunded(scene) == sorted(jobs)
    assert depths(redis) == EMPTY
