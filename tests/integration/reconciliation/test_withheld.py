"""What forbids a verdict of our own: a closed gate, and letters that may hold the end of a job."""

from __future__ import annotations

import gzip
import zlib
from datetime import datetime, timedelta

import pytest
from redis import Redis

from kino_refunds.events.schema import Queue, to_json
from kino_refunds.settlement.decide import Busy
from tests.clock import HOUR, SECOND, TICK, clock_at
from tests.intake import make_intake
from tests.integration.reconciliation.sweeps import (
    REFUNDED_ONE,
    SPACING,
    UNKNOWN,
    Source,
    charged,
    keep_letter,
    statuses,
    sweep,
    withheld,
)
from tests.malformed import WIRE_FORMS, envelope
from tests.pipeline import drain, several
from tests.scenario import NOW, Scene, make_event

pytestmark = pytest.mark.usefixtures("stopped_clock")


def test_no_verdict_while_intake_is_paused(scene: Scene, redis: Redis) -> None:
    """While intake is paused, what we have not heard may be waiting for us."""
    charged(scene, "job-1")
    scene.as_superuser("UPDATE kino.intake_state SET paused = true")

    came_to = sweep(scene, redis)

    assert came_to == withheld(intake_paused=1)


def test_no_verdict_on_a_job_that_a_waiting_event_names(scene: Scene, redis: Redis) -> None:
    """A pending event speaks of its own job only: that one waits, its neighbour is settled."""
    charged(scene, "job-1", "job-2")
    scene.settle(make_event("completed"), busy=Busy(jobs=frozenset({"job-1"})))

    came_to = sweep(scene, redis)

    assert came_to == {
        **REFUNDED_ONE,
        "overdue": 2,
        "answers": {"unknown": 2},
        "withheld": {"named_by_waiting_event": 1},
    }
    assert statuses(scene) == {"job-1": "open", "job-2": "refunded"}


def test_no_verdict_on_a_job_that_an_open_dead_letter_names(scene: Scene, redis: Redis) -> None:
    """An open dead letter about a job may be its end; one that a person has judged is not, nor another job's."""
    charged(scene, "open", "replayed", "discarded", "unnamed")
    for status in ("open", "replayed", "discarded"):
        keep_letter(scene, job_id=status, queue=Queue.JOB_FAILED, status=status)

    came_to = sweep(scene, redis)

    assert came_to["withheld"] == {"named_by_waiting_event": 1}
    assert statuses(scene) == {"discarded": "refunded", "open": "open", "replayed": "refunded", "unnamed": "refunded"}


NAMELESS_NOW = NOW + timedelta(hours=2)
"""Far enough from the charge that `newer than the charge` and `younger than an hour` are told apart."""


@pytest.mark.parametrize(
    ("at", "queue", "status", "holds_back"),
    [
        pytest.param(NAMELESS_NOW - HOUR + TICK, Queue.JOB_COMPLETED, "open", True, id="younger than an hour"),
        pytest.param(NAMELESS_NOW - HOUR, Queue.JOB_COMPLETED, "open", False, id="an hour old"),
        *(pytest.param(NAMELESS_NOW, queue, "open", True, id=f"by {queue}") for queue in Queue),
        pytest.param(NAMELESS_NOW, Queue.JOB_COMPLETED, "discarded", False, id="discarded"),
        pytest.param(NAMELESS_NOW, Queue.JOB_COMPLETED, "replayed", False, id="replayed"),
    ],
)
def test_no_verdict_while_an_unreadable_completion_could_be_anybodys(
    scene: Scene, redis: Redis, at: datetime, queue: str, status: str, *, holds_back: bool
) -> None:
    """Without a source, an open letter that names no job counts for an hour, whichever queue it came by."""
    charged(scene, "job-1")
    keep_letter(scene, queue=queue, at=at, status=status)

    came_to = sweep(scene, redis, now=NAMELESS_NOW)

    assert came_to["withheld"] == ({"unreadable_completion": 1} if holds_back else {})
    assert statuses(scene) == {"job-1": "open" if holds_back else "refunded"}


@pytest.mark.parametrize(("after", "status"), [(TICK, "open"), (TICK * 0, "refunded")])
def test_unreadable_completion_from_before_the_charge_is_not_its_end(
    scene: Scene, redis: Redis, after: timedelta, status: str
) -> None:
    """A job cannot have ended before it was charged."""
    (charge,) = charged(scene, "job-1")
    keep_letter(scene, at=charge.opened_at + after)

    sweep(scene, redis, now=charge.opened_at + SECOND)

    assert statuses(scene) == {"job-1": status}


def test_unreadable_completion_does_not_overrule_a_source_that_was_asked(scene: Scene, redis: Redis) -> None:
    """A source that has never heard of the job says more than a letter that names nobody."""
    (charge,) = charged(scene, "job-1")
    keep_letter(scene, at=charge.opened_at + TICK)
    source = Source({"job-1": UNKNOWN})

    for number in range(3):
        sweep(scene, redis, source, now=NOW + number * SPACING)

    assert statuses(scene) == {"job-1": "refunded"}


def test_a_letter_that_may_hold_others_counts_as_nameless_although_it_names_a_job(scene: Scene, redis: Redis) -> None:
    """What could not be read to its end may be anybody's completion; what was read whole is its own job's."""
    charged(scene, "job-1", "job-2")
    keep_letter(scene, job_id="job-1", at=NAMELESS_NOW, may_hold_others=True)
    held = sweep(scene, redis, now=NAMELESS_NOW)["withheld"]
    scene.as_superuser("UPDATE kino.dead_letter SET may_hold_others = false")

    came_to = sweep(scene, redis, now=NAMELESS_NOW)

    assert held == {"named_by_waiting_event": 1, "unreadable_completion": 1}
    assert came_to["withheld"] == {"named_by_waiting_event": 1}
    assert statuses(scene) == {"job-1": "open", "job-2": "refunded"}


def test_every_job_that_an_open_letter_names_is_protected(scene: Scene, redis: Redis) -> None:
    """The second job of a letter is as safe as the first, for as long as the letter is open, also from a source."""
    charged(scene, "job-1", "job-2", "job-3")
    keep_letter(scene, job_id="job-1", others=("job-2",), at=NOW - HOUR, may_hold_others=True)
    source = Source(dict.fromkeys(["job-1", "job-2", "job-3"], UNKNOWN))

    for number in range(3):
        sweep(scene, redis, source, now=NAMELESS_NOW + number * SPACING)

    assert statuses(scene) == {"job-1": "open", "job-2": "open", "job-3": "refunded"}


def completions(*jobs: str) -> list[bytes]:
    return [to_json(make_event("completed", job)) for job in jobs]


HELD_BY_US: dict[str, bytes] = {
    "two lines": b"\n".join(completions("job-1", "job-2")),
    "one after the other": b"".join(completions("job-1", "job-2")),
    "two jobs": completions("job-1")[0].replace(b'"subject":"job-1"', b'"subject":"job-2"'),
    "an array cut off": several(*completions("job-1", "job-2", "job-3"))[:-3],
    "an array of too many": several(*completions(*(f"job-{number}" for number in range(1, 102)))),
    "an object around them": b'{"events":[' + b",".join(completions("job-1", "job-2")) + b"]}",
    "base64 cut off": envelope(b"\n".join(completions("job-1", "job-2")))[:-40],
    "not utf-8": b"\xff" + b"".join(completions("job-1", "job-2")),
    "gzip": gzip.compress(b"".join(completions("job-1", "job-2"))),
    "compressed": envelope(zlib.compress(completions("job-1")[0]), headers={"compression": "application/x-gzip"}),
    "nothing": b"",
    "white space at the id": completions("job-1")[0].replace(b'"job-1"', b'"job-1 "'),
}


@pytest.mark.parametrize("queue", Queue)
@pytest.mark.parametrize("raw", HELD_BY_US.values(), ids=HELD_BY_US)
def test_a_completion_that_we_hold_and_cannot_read_protects_its_job(
    scene: Scene, redis: Redis, raw: bytes, queue: Queue
) -> None:
    """Whatever came instead of an event, and by whichever queue: no job that could be in it is refunded meanwhile."""
    charged(scene, "job-1", "job-2")
    redis.lpush(queue, raw)
    with clock_at(scene.worker, NOW + TICK):
        drain(make_intake(scene, redis))

    came_to = sweep(scene, redis, now=NOW + SECOND)

    assert sum(came_to["withheld"].values()) == 2
    assert statuses(scene) == {"job-1": "open", "job-2": "open"}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_completions_in_one_message_are_captured(scene: Scene, redis: Redis, form: str) -> None:
    """An array of three completions is three completions."""
    charged(scene, "job-1", "job-2", "job-3")
    redis.lpush(Queue.JOB_COMPLETED, WIRE_FORMS[form](several(*completions("job-1", "job-2", "job-3"))))
    drain(make_intake(scene, redis))

    sweep(scene, redis)

    assert statuses(scene) == dict.fromkeys(["job-1", "job-2", "job-3"], "captured")
