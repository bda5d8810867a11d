"""The overdue sweep on real Redis and Postgres: who is asked, what is settled, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from redis import Redis

from kino_refunds.events.schema import ErrorOrigin, Queue, SafetyStage, to_json
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.reconciliation.overdue import OverdueReport
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.clock import SECOND, TICK
from tests.integration.reconciliation.sweeps import (
    COMPLETED,
    DUE,
    GRACE,
    REFUNDED_ONE,
    RULES,
    RUNNING,
    SPACING,
    UNKNOWN,
    Source,
    asks,
    charged,
    keep_letter,
    report,
    statuses,
    sweep,
    withheld,
)
from tests.pipeline import ENDS
from tests.scenario import NOW, Broken, Scene, make_event

pytestmark = pytest.mark.usefixtures("stopped_clock")


# --- what a source says


def test_what_the_source_knows_settles_as_an_event_of_ours(scene: Scene, redis: Redis) -> None:
    """A terminal answer settles at once, under an id and a time made from charge and answer alone."""
    failure, rejection = (
        ("refunded", "generation_failure", "2.failure"),
        ("refunded", "content_policy_rejection", "2.safety"),
    )
    cases = {
        "completed": (COMPLETED, ("captured", "completed", "1")),
        "failed.platform": (Answer(JobState.FAILED, origin=ErrorOrigin.PLATFORM), failure),
        "failed.provider": (Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER), failure),
        "failed.unknown": (Answer(JobState.FAILED), failure),
        "failed.user": (Answer(JobState.FAILED, origin=ErrorOrigin.USER), ("captured", "not_covered", "2.failure")),
        "timed_out": (Answer(JobState.TIMED_OUT), ("refunded", "timeout", "2.timeout")),
        "timed_out.result_produced": (
            Answer(JobState.TIMED_OUT, result_produced=True),
            ("captured", "not_covered", "2.timeout"),
        ),
        "rejected.before_generation": (Answer(JobState.REJECTED, stage=SafetyStage.BEFORE_GENERATION), rejection),
        "rejected.during_generation": (Answer(JobState.REJECTED), rejection),
        "rejected.after_generation": (
            Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
            ("captured", "not_covered", "2.safety"),
        ),
    }
    charges = charged(scene, *cases)

    sweep(scene, redis, Source({said: answer for said, (answer, _) in cases.items()}))

    events = [("kino-reconciler", f"overdue:{charge.charge_id}:{charge.job_id}", DUE) for charge in charges]
    assert sorted(
        scene.rows("SELECT kind, reason, clause, event_source, event_id, event_time FROM kino.settlement")
    ) == sorted((*cases[charge.job_id][1], *event) for charge, event in zip(charges, events, strict=True))
    assert sorted(scene.rows("SELECT source, event_id, event_at FROM kino.inbox_event")) == sorted(events)
    with scene.superuser.connect() as connection:
        assert violations(connection, without=("times",)) == []


FINISHED = DUE - timedelta(minutes=5, microseconds=1)


@pytest.mark.parametrize(
    "finished_at",
    [FINISHED, NOW + timedelta(days=400), NOW - timedelta(days=4000)],
    ids=["known", "in the future", "long before the charge"],
)
@pytest.mark.parametrize("answer", ENDS, ids=str)
def test_time_that_the_source_gives_is_the_events(
    scene: Scene, redis: Redis, answer: Answer, finished_at: datetime
) -> None:
    """The settlement has the source's time, and moves the credits as it would without one, however odd it is."""
    charged(scene, "timed", "untimed")

    sweep(scene, redis, Source({"timed": replace(answer, finished_at=finished_at), "untimed": answer}))

    timed, untimed = scene.rows(
        "SELECT kind, reason, clause, policy_version, event_time FROM kino.settlement ORDER BY event_time <> :at",
        at=finished_at,
    )
    assert tuple(timed) == (*untimed[:4], finished_at)
    assert untimed.event_time == DUE


@pytest.mark.parametrize("first_knows", [True, False])
@pytest.mark.parametrize("answer", ENDS, ids=str)
def test_two_sweeps_that_disagree_on_the_time_settle_once(
    scene: Scene, redis: Redis, answer: Answer, *, first_knows: bool
) -> None:
    """A sweep that heard `finished_at` and one that did not are no conflict: the second changes nothing."""
    charged(scene, "job-1")
    said = [replace(answer, finished_at=FINISHED), answer]
    first, second = said if first_knows else reversed(said)

    class Overtaken(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            sweep(scene, redis, Source({"job-1": first}))
            return super().ask(job_ids)

    came_to = sweep(scene, redis, Overtaken({"job-1": second}))

    assert sum(came_to["outcomes"].values()) == 1
    assert set(came_to["outcomes"]) <= {"already_captured", "already_refunded"}
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(1,)]
    assert scene.rows("SELECT count(*) FROM kino.dead_letter") == [(0,)]
    assert scene.rows("SELECT count(*) FROM kino.break") == [(0,)]


def test_answer_of_the_source_is_not_held_back_by_what_waits(scene: Scene, redis: Redis) -> None:
    """The guards are for verdicts of our own: what the source knows for certain settles all the same."""
    charged(scene, "job-1", "job-2")
    scene.as_superuser("UPDATE kino.intake_state SET paused = true")
    redis.lpush(Queue.JOB_COMPLETED, b"unreadable")
    keep_letter(scene, job_id="job-1")

    came_to = sweep(scene, redis, Source({"job-1": COMPLETED, "job-2": Answer(JobState.TIMED_OUT)}))

    assert came_to == report(
        overdue=2,
        asked=2,
        answers={"completed": 1, "timed_out": 1},
        outcomes={"captured": 1, "refunded": 1},
        refunded=1,
        refunded_credits=10,
    )


def test_event_that_comes_while_we_ask_stands(scene: Scene, redis: Redis) -> None:
    """An event that settles the charge between our question and our settling is the first decision."""
    charged(scene, "job-1")

    class Slow(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            scene.settle(make_event("completed"))
            return super().ask(job_ids)

    came_to = sweep(scene, redis, Slow({"job-1": COMPLETED}))

    assert came_to == report(asked=1, answers={"completed": 1}, outcomes={"already_captured": 1})
    assert scene.rows("SELECT event_id FROM kino.settlement") == [("job-1 completed",)]


# --- whom it concerns


def test_charge_is_overdue_only_past_its_deadline_and_grace(scene: Scene, redis: Redis) -> None:
    """At deadline plus grace nobody is asked yet; one tick later somebody is."""
    charged(scene, "at", due=NOW)
    charged(scene, "past", due=NOW - TICK)
    source = Source({"at": COMPLETED, "past": COMPLETED})

    sweep(scene, redis, source)

    assert source.asked == [["past"]]
    assert statuses(scene) == {"at": "open", "past": "captured"}


def test_settled_charge_is_not_asked_about(scene: Scene, redis: Redis) -> None:
    """Only a charge without a settlement can be overdue."""
    charged(scene, "job-1")
    scene.settle(make_event("failed user"))
    source = Source({"job-1": COMPLETED})

    came_to = sweep(scene, redis, source)

    assert came_to == report(overdue=0, answers={})
    assert source.asked == []


def test_more_than_a_page_is_swept_in_one_pass(scene: Scene, redis: Redis) -> None:
    """However many charges are overdue, one pass asks about each once, at most a hundred at a time."""
    job_ids = [f"job-{number:04d}" for number in range(1_001)]
    charged(scene, *job_ids, credits=1)
    source = Source(dict.fromkeys(job_ids, Answer(JobState.FAILED)))
    seen: list[int] = []

    came_to = sweep(scene, redis, source, progress=lambda sofar: seen.append(sofar.overdue))

    assert came_to == report(
        overdue=1_001,
        asked=1_001,
        answers={"failed": 1_001},
        outcomes={"refunded": 1_001},
        refunded=1_001,
        refunded_credits=1_001,
    )
    assert sorted(job_id for asked in source.asked for job_id in asked) == job_ids
    assert max(map(len, source.asked)) == 100
    assert seen == [500, 1_000, 1_001]


def test_pages_that_were_asked_lately_do_not_hide_those_behind(scene: Scene, redis: Redis) -> None:
    """A whole page that must not be asked again yet is passed over, not taken for the end."""
    charged(scene, *(f"job-{number:04d}" for number in range(501)))
    sweep(scene, redis, Source({f"job-{number:04d}": RUNNING for number in range(500)}))
    source = Source({"job-0500": COMPLETED})

    came_to = sweep(scene, redis, source, now=NOW + SECOND)

    assert source.asked == [["job-0500"]]
    assert came_to["outcomes"] == {"captured": 1}


# --- nobody knows


def test_without_a_source_one_pass_settles_as_timed_out(scene: Scene, redis: Redis) -> None:
    """Where running without a source is chosen, a job that nobody speaks of has timed out (clause 2.timeout)."""
    (charge,) = charged(scene, "job-1")

    came_to = sweep(scene, redis)

    assert came_to == REFUNDED_ONE
    assert scene.rows("SELECT kind, reason, clause, event_source, event_id, event_time FROM kino.settlement") == [
        ("refunded", "timeout", "2.timeout", "kino-reconciler", f"overdue:{charge.charge_id}:timed_out", DUE)
    ]


def test_withheld_verdict_without_a_source_is_looked_at_again_at_once(scene: Scene, redis: Redis) -> None:
    """Once the reason is gone, the next pass settles; the spacing is for asks, and nobody was asked."""
    charged(scene, "job-1")
    scene.as_superuser("UPDATE kino.intake_state SET paused = true")
    paused = sweep(scene, redis)
    scene.as_superuser("UPDATE kino.intake_state SET paused = false")

    came_to = sweep(scene, redis, now=NOW + TICK)

    assert paused == withheld(intake_paused=1)
    assert came_to == REFUNDED_ONE


def test_unknown_is_a_verdict_only_after_the_spaced_asks(scene: Scene, redis: Redis) -> None:
    """Three spaced asks within the window must find nobody who knows; an ask too soon is not made."""
    charged(scene, "job-1")
    source = Source({"job-1": UNKNOWN})

    counted = []
    for after in (SPACING * 0, SPACING - TICK, SPACING, SPACING * 2 - TICK, SPACING * 2):
        came_to = sweep(scene, redis, source, now=NOW + after)
        counted.append((came_to["overdue"], asks(scene)["job-1"], came_to["outcomes"]))

    assert counted == [
        (1, (1, "unknown"), {}),
        (0, (1, "unknown"), {}),
        (1, (2, "unknown"), {}),
        (0, (2, "unknown"), {}),
        (1, (3, "unknown"), {"refunded": 1}),
    ]
    assert source.asked == [["job-1"]] * 3
    assert RULES.ask_window > SPACING * 2


def test_running_starts_the_count_again(scene: Scene, redis: Redis) -> None:
    """A job that somebody saw running is known: only asks in a row make a verdict."""
    charged(scene, "job-1")
    said = [UNKNOWN, UNKNOWN, RUNNING, UNKNOWN, UNKNOWN, UNKNOWN]

    counted = []
    for number, answer in enumerate(said):
        came_to = sweep(scene, redis, Source({"job-1": answer}), now=NOW + number * SPACING)
        counted.append((asks(scene)["job-1"][0], came_to["refunded"]))

    assert counted == [(1, 0), (2, 0), (0, 0), (1, 0), (2, 0), (3, 1)]


def test_running_job_is_given_time_and_past_the_cap_a_break(scene: Scene, redis: Redis) -> None:
    """A running job is never settled by us; longer than the cap after its grace it is a break for a person."""
    charged(scene, "job-1")
    source = Source({"job-1": RUNNING})

    at_the_cap = sweep(scene, redis, source, now=DUE + RULES.running_max), scene.breaks()
    past_it = sweep(scene, redis, source, now=DUE + RULES.running_max + SPACING), scene.breaks()
    later = sweep(scene, redis, source, now=DUE + RULES.running_max + 2 * SPACING), scene.breaks()

    assert at_the_cap[1] == []
    assert past_it[1] == [Broken("running_past_cap", "job-1", 10, 1, "open")]
    assert later[1] == [Broken("running_past_cap", "job-1", 10, 2, "open")]
    assert [came_to["outcomes"] for came_to, _ in (at_the_cap, past_it, later)] == [{}, {}, {}]
    assert statuses(scene) == {"job-1": "open"}


# --- ids from before today's rule


@pytest.mark.parametrize("source", [None, Source({"job-1 ": Answer(JobState.TIMED_OUT)})], ids=["none", "a source"])
def test_a_charge_whose_ids_have_white_space_still_ends(scene: Scene, redis: Redis, source: Source | None) -> None:
    """What stood in the ledger before ids were refused for it is refunded by an event of ours."""
    charged(scene, "other")
    scene.as_superuser(
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)"
        f" VALUES ('job-1 ', ' acct-2', 0, '{(DUE - GRACE).isoformat()}')",
        "INSERT INTO kino.account (account_id) VALUES (' acct-2')",
        "INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)"
        " SELECT charge_id, account_id, deadline_at, credits FROM kino.charge WHERE job_id = 'job-1 '",
    )

    came_to = sweep(scene, redis, source)

    assert came_to["withheld"] == {}
    assert statuses(scene)["job-1 "] == "refunded"


# --- sweeps beside each other


def test_two_sweeps_at_once_refund_once(scene: Scene, redis: Redis) -> None:
    """Two sweeps that have heard the same answer write the same event: one refunds, the other changes nothing."""
    job_ids = [f"job-{number}" for number in range(20)]
    charged(scene, *job_ids)
    together = threading.Barrier(2, timeout=30)

    class Meeting(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            together.wait()
            return super().ask(job_ids)

    source = Meeting(dict.fromkeys(job_ids, Answer(JobState.FAILED)))
    with ThreadPoolExecutor(2) as pool:
        both = [run.result() for run in [pool.submit(sweep, scene, redis, source) for _ in range(2)]]

    assert sum(came_to["refunded_credits"] for came_to in both) == 200
    assert sum(sum(came_to["outcomes"].values()) for came_to in both) == 40
    assert scene.balance("acct-1").available == 100_000
    assert statuses(scene) == dict.fromkeys(job_ids, "refunded")
    with scene.superuser.connect() as connection:
        assert violations(connection, without=("times",)) == []


def test_dry_run_writes_nothing_and_says_what_would_be(scene: Scene, redis: Redis) -> None:
    """Asking and deciding without settling leaves every table and every key as it was, also the mark."""
    after_the_cap = DUE + RULES.running_max + SECOND
    answers = {
        "completed": COMPLETED,
        "failed": Answer(JobState.FAILED),
        "rejected": Answer(JobState.REJECTED),
        "running": RUNNING,
        "timed out": Answer(JobState.TIMED_OUT),
        "unknown": UNKNOWN,
        "unknown at last": UNKNOWN,
    }
    charged(scene, *answers)
    for number in (3, 2):
        sweep(scene, redis, Source({"unknown at last": UNKNOWN}), now=after_the_cap - number * SPACING)
    redis.lpush(Queue.TIMEOUT, to_json(make_event("timeout", "other", at=after_the_cap)))
    before = scene.everything(), redis.dump(Queue.TIMEOUT), redis.keys()

    came_to = sweep(scene, redis, Source(answers), now=after_the_cap, dry_run=True)

    assert (scene.everything(), redis.dump(Queue.TIMEOUT), redis.keys()) == before
    assert came_to == report(
        dry_run=True,
        overdue=7,
        asked=7,
        answers={"completed": 1, "failed": 1, "rejected": 1, "running": 1, "timed_out": 1, "unknown": 2},
        outcomes={
            "would settle: kino.generation.job-completed.v1": 1,
            "would settle: kino.generation.job-failed.v1": 1,
            "would settle: kino.generation.safety-rejection.v1": 1,
            "would settle: kino.generation.timeout.v1": 2,
        },
    )


def test_report_counts_what_it_did() -> None:
    """A report of a sweep that found nothing says so in plain values, for JSON."""
    found = OverdueReport(dry_run=False)

    assert found.as_dict() == report(overdue=0, answers={})
