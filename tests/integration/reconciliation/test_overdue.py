"""The overdue sweep on real Redis and Postgres: who is asked, what is settled, and when nothing may be said."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.errors import BadSettings, SourceUnreachable
from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import Queues, waiting
from kino_refunds.events.schema import ID_LENGTH_MAX, ErrorOrigin, Queue, SafetyStage, to_json
from kino_refunds.ledger import Charge, ChargeRequest, open_charges
from kino_refunds.reconciliation import guard
from kino_refunds.reconciliation.guard import OverdueCharge
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.reconciliation.overdue import (
    OverdueReport,
    OverdueRules,
    event_of,
    sweep_overdue,
)
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import Settings
from kino_refunds.settlement.dead_letters import DeadLetter
from kino_refunds.settlement.decide import Busy
from kino_refunds.settlement.rules import rules_of
from tests.clock import clock_at, record_dead_letters
from tests.malformed import MALFORMED, envelope
from tests.pipeline import drain
from tests.scenario import NOW, Broken, Scene, make_event, make_rules
from workers.intake import Intake

SECOND, HOUR, TICK = timedelta(seconds=1), timedelta(hours=1), timedelta(microseconds=1)
GRACE = timedelta(seconds=60)
RULES = OverdueRules(grace=GRACE, asks=3, ask_window=timedelta(minutes=3), running_max=timedelta(hours=24))
SPACING = RULES.ask_spacing
DUE = NOW - SECOND
"""Deadline plus grace of a charge that is overdue at NOW, unless a test says otherwise."""
UNKNOWN, RUNNING, COMPLETED = (Answer(s) for s in (JobState.UNKNOWN, JobState.RUNNING, JobState.COMPLETED))
WIRE_FORMS: dict[str, Callable[[bytes], bytes]] = {"bare": lambda raw: raw, "kombu": envelope}


@pytest.fixture(autouse=True)
def stopped_clock(scene: Scene) -> Iterator[None]:
    """It is NOW in this file, unless a test says otherwise: charges are opened before they are swept."""
    with clock_at(scene.worker, NOW):
        yield


class Source:
    """A job source that says what the test told it, and remembers whom it was asked about."""

    def __init__(self, answers: Mapping[str, Any], *, fails_for: str = "", error: Exception | None = None) -> None:
        self.answers = answers
        self.fails_for = fails_for
        self.error = error or TimeoutError("no answer within 5 s")
        self.asked: list[list[str]] = []

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        self.asked.append(list(job_ids))
        if self.fails_for in job_ids:
            raise self.error
        return {job_id: self.answers[job_id] for job_id in job_ids if job_id in self.answers}


class Careless(Source):
    """A job source that returns the same whatever it is asked, and remembers whom it was asked about."""

    def __init__(self, said: Any) -> None:
        super().__init__({})
        self.said = said

    def ask(self, job_ids: Sequence[str]) -> Any:
        self.asked.append(list(job_ids))
        return self.said


def charged(scene: Scene, *job_ids: str, due: datetime = DUE, credits: int = 10) -> list[Charge]:
    """Charge jobs whose deadline and grace end at `due`, all to one account with enough credits."""
    scene.grant("acct-1", 100_000)
    requests = [ChargeRequest(job_id, "acct-1", credits, due - GRACE) for job_id in job_ids]
    with scene.product.begin() as connection:
        return open_charges(connection, requests)


def sweep(scene: Scene, redis: Redis, source: Any = None, *, now: datetime = NOW, **options: Any) -> dict[str, Any]:
    with clock_at(scene.worker, now):
        return sweep_overdue(scene.worker, redis, source, make_rules(), overdue=RULES, **options).as_dict()


def report(**changes: Any) -> dict[str, Any]:
    """What a sweep at NOW reports, where the test does not say otherwise."""
    return {
        "dry_run": False,
        "overdue": 1,
        "asked": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "answers": {"unknown": 1},
        "outcomes": {},
        "refunded": 0,
        "refunded_credits": 0,
        "withheld": {},
        "verified_through": None,
        **changes,
    }


REFUNDED_ONE = report(outcomes={"refunded": 1}, refunded=1, refunded_credits=10)


def withheld(**reasons: int) -> dict[str, Any]:
    return report(withheld=reasons)


def statuses(scene: Scene) -> dict[str, str]:
    rows = scene.rows("SELECT job_id, status FROM kino.charge_status ORDER BY job_id")
    return {row.job_id: row.status for row in rows}


def asks(scene: Scene) -> dict[str, tuple[int, str]]:
    """How often in a row nobody knew, and what was said last, by job."""
    rows = scene.rows("SELECT job_id, asks, last_answer FROM kino.overdue_ask JOIN kino.charge USING (charge_id)")
    return {row[0]: (row[1], row[2]) for row in rows}


def keep_letter(
    scene: Scene,
    *,
    job_id: str | None = None,
    queue: str = Queue.JOB_COMPLETED,
    at: datetime = NOW,
    status: str = "open",
    others: tuple[str, ...] = (),
    may_hold_others: bool | None = None,
) -> None:
    key = f"key of {job_id}".encode()
    nameless = job_id is None if may_hold_others is None else may_hold_others
    letter = DeadLetter(
        key, b"raw", queue, "bad_json", "cut off", job_id=job_id, other_job_ids=others, may_hold_others=nameless
    )
    with scene.worker.begin() as connection:
        record_dead_letters(connection, [letter], now=at, build="test")
        connection.execute(
            sa.text("UPDATE kino.dead_letter SET status = :status WHERE message_key = :key"),
            {"status": status, "key": key},
        )


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
        assert violations(connection) == []


FINISHED = DUE - timedelta(minutes=5, microseconds=1)
ENDINGS = [
    COMPLETED,
    *(Answer(JobState.FAILED, origin=origin) for origin in ErrorOrigin),
    *(Answer(JobState.REJECTED, stage=stage) for stage in SafetyStage),
    *(Answer(JobState.TIMED_OUT, result_produced=produced) for produced in (False, True)),
]


def test_all_that_an_event_says_stands_in_its_id() -> None:
    """Two answers give two ids or the same event: never one id with two contents, which would be a conflict."""
    charge = OverdueCharge(7, "job-1", "acct-1", 10, NOW - HOUR, DUE, 0)
    times = [None, DUE, FINISHED, FINISHED + TICK, datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)]
    answers = [replace(answer, finished_at=at) for answer in ENDINGS for at in times]

    events = [event_of(charge, answer) for answer in answers]

    assert len({event.id for event in events}) == len({to_json(event) for event in events}) == len(answers)
    assert [event_of(charge, replace(answer)) for answer in answers] == events
    assert max(len(event.id.replace(":7:", f":{2**63 - 1}:")) for event in events) <= ID_LENGTH_MAX
    assert event_of(charge, replace(COMPLETED, finished_at=FINISHED)).id == (
        f"overdue:7:completed@{FINISHED:%Y-%m-%dT%H:%M:%S.%fZ}"
    )


def test_one_instant_in_two_time_zones_is_one_event() -> None:
    """A source whose sessions differ in their time zone says the same thing."""
    charge = OverdueCharge(7, "job-1", "acct-1", 10, NOW - HOUR, DUE, 0)
    elsewhere = FINISHED.astimezone(timezone(timedelta(hours=-7, minutes=-30)))

    here, there = (event_of(charge, replace(COMPLETED, finished_at=at)) for at in (FINISHED, elsewhere))

    assert (here.id, to_json(here)) == (there.id, to_json(there))


@pytest.mark.parametrize(
    "finished_at",
    [FINISHED, NOW + timedelta(days=400), NOW - timedelta(days=4000)],
    ids=["known", "in the future", "long before the charge"],
)
@pytest.mark.parametrize("answer", ENDINGS, ids=str)
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
@pytest.mark.parametrize("answer", ENDINGS, ids=str)
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
    """An event that settles the charge between our question and our settling is the first ruling."""
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


# --- a source that fails


@pytest.mark.parametrize("error", [TimeoutError("hung"), AssertionError()])
def test_job_on_which_the_source_fails_does_not_cost_the_others(scene: Scene, redis: Redis, error: Exception) -> None:
    """A batch that errors is halved until the job that errors is alone; the others settle in this pass."""
    job_ids = [f"job-{number}" for number in range(8)]
    charged(scene, *job_ids)
    source = Source(dict.fromkeys(job_ids, COMPLETED), fails_for="job-5", error=error)

    came_to = sweep(scene, redis, source)

    assert statuses(scene) == {**dict.fromkeys(job_ids, "captured"), "job-5": "open"}
    assert (came_to["source_errors"], came_to["answers"]) == (1, {"completed": 7})
    assert source.asked == [
        job_ids,
        job_ids[:4],
        job_ids[4:],
        ["job-4", "job-5"],
        ["job-4"],
        ["job-5"],
        ["job-6", "job-7"],
    ]


def test_error_is_not_an_answer(scene: Scene, redis: Redis) -> None:
    """However often the source fails, it counts as no ask: the job stays open, and the count where it was."""
    charged(scene, "job-1")
    sweep(scene, redis, Source({"job-1": UNKNOWN}))

    for number in range(1, 6):
        sweep(scene, redis, Source({}, fails_for="job-1"), now=NOW + number * SPACING)

    assert asks(scene) == {"job-1": (1, "unknown")}
    assert statuses(scene) == {"job-1": "open"}


def test_a_job_that_is_missing_was_not_answered(scene: Scene, redis: Redis) -> None:
    """Silence about a job is no `unknown`: no ask counts, it is reported, and its neighbour settles."""
    charged(scene, "job-1", "job-2")

    came_to = sweep(scene, redis, Source({"job-2": COMPLETED}))

    assert came_to == report(
        overdue=2,
        asked=2,
        source_errors=1,
        source_problem="the job source left out jobs that it was asked for: it must say `unknown` of those that it"
        " does not know",
        answers={"completed": 1},
        outcomes={"captured": 1},
    )
    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open", "job-2": "captured"}


FOREIGN: dict[str, Any] = {
    "padded": "job-1    ",
    "indented": " job-1",
    "folded": "JOB-1",
    "another's": "job-9",
    "not yet overdue": "not overdue",
    "empty": "",
    "huge": "x" * 10_000,
    "control characters": "job-1\x1b[2J",
    "None": None,
    "NaN": float("nan"),
    "a number": 1,
    "bytes": b"job-1",
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("others", [{}, {"job-2": COMPLETED}, {"job-1": UNKNOWN, "job-2": UNKNOWN}])
def test_an_answer_for_another_job_is_no_verdict_on_any(
    scene: Scene, redis: Redis, foreign: Any, others: dict[str, Answer]
) -> None:
    """However often a source answers for a job that it was not asked for, no job of that ask is counted or settled."""
    charged(scene, "job-1", "job-2")
    charged(scene, "not overdue", due=NOW + HOUR)
    source = Careless({foreign: COMPLETED, **others})

    sweeps = [sweep(scene, redis, source, now=NOW + number * SPACING) for number in range(4)]

    assert [(each["source_broken"], each["source_errors"], each["answers"]) for each in sweeps] == [(2, 0, {})] * 4
    problem = sweeps[-1]["source_problem"]
    assert "not asked for" in problem
    assert problem.isprintable()
    assert len(problem) < 250
    assert source.asked == [["job-1", "job-2"]] * 4
    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open", "job-2": "open", "not overdue": "open"}


def test_a_padded_id_is_named_beside_the_one_that_was_sent(scene: Scene, redis: Redis) -> None:
    """The report says which id came back and which was sent, for that is what a person must compare."""
    charged(scene, "job-1")

    came_to = sweep(scene, redis, Careless({"job-1    ": COMPLETED}))

    assert came_to["source_problem"] == (
        "the job source answered for job 'job-1    ', which it was not asked for, but job 'job-1' was:"
        " ids must come back exactly as they were sent"
    )


def test_halving_makes_no_verdict_of_an_answer_for_another_job(scene: Scene, redis: Redis) -> None:
    """A batch that fails is halved; a half that answers for another job, down to one alone, is still no answer."""
    job_ids = [f"job-{number}" for number in range(8)]
    charged(scene, *job_ids)

    class Twin(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            twin = {"JOB-3": UNKNOWN} if "job-3" in job_ids else {}
            return {**super().ask(job_ids), **twin}

    source = Twin(dict.fromkeys(job_ids, UNKNOWN), fails_for="job-5")
    sweeps = [sweep(scene, redis, source, now=NOW + number * SPACING) for number in range(3)]

    assert [(each["source_broken"], each["source_errors"]) for each in sweeps] == [(4, 1)] * 3
    assert statuses(scene) == {
        **dict.fromkeys(job_ids[:4], "open"),
        "job-4": "refunded",
        "job-5": "open",
        **dict.fromkeys(job_ids[6:], "refunded"),
    }


def test_any_error_of_a_source_can_be_kept_and_shown(scene: Scene, redis: Redis) -> None:
    """What a source raises is kept on one short printable line, which jsonb can hold whatever it was."""
    charged(scene, "job-1")
    error = ValueError("<html>\n\x00\x1b[2J\ud800" + "x" * 10_000)

    came_to = sweep(scene, redis, Source({}, fails_for="job-1", error=error))

    problem = came_to["source_problem"]
    assert problem.startswith(r"ValueError: <html>\n\x00\x1b[2J\ud800xxx")
    assert len(problem) < 400
    assert scene.rows("SELECT CAST(:result AS jsonb)", result=json.dumps(came_to)) == [(came_to,)]


def test_a_mended_source_is_believed_at_once(scene: Scene, redis: Redis) -> None:
    """What a broken source said leaves nothing behind: the next sweep captures what had completed."""
    charged(scene, "job-1")
    sweep(scene, redis, Careless({"job-1 ": COMPLETED}))

    came_to = sweep(scene, redis, Source({"job-1": COMPLETED}))

    assert came_to == report(asked=1, answers={"completed": 1}, outcomes={"captured": 1})


def test_garbage_about_a_job_does_not_cost_the_others(scene: Scene, redis: Redis) -> None:
    """What is no Answer is an error like any other: its job is left for later, the others settle."""
    garbage: list[Any] = ["completed", None, {"state": "completed"}, JobState.COMPLETED]
    answers = {f"garbage-{number}": each for number, each in enumerate(garbage)}
    charged(scene, "job-1", *answers)

    came_to = sweep(scene, redis, Source({"job-1": COMPLETED, **answers}))

    assert statuses(scene) == {**dict.fromkeys(answers, "open"), "job-1": "captured"}
    assert (came_to["source_broken"], came_to["source_errors"], came_to["answers"]) == (4, 0, {"completed": 1})
    assert came_to["source_problem"] == "the job source said JobState, not Answer"


def test_source_that_answers_with_no_mapping_settles_nothing(scene: Scene, redis: Redis) -> None:
    """A source that returns nothing at all fails for every job, and the sweep goes on to its end."""
    charged(scene, "job-1", "job-2")

    came_to = sweep(scene, redis, Careless(None))

    assert came_to == report(
        overdue=2,
        asked=2,
        source_broken=2,
        source_problem="the job source returned NoneType, not a mapping of job id to Answer",
        answers={},
    )


@pytest.mark.parametrize(
    ("error", "asked", "problem"),
    [
        (SourceUnreachable("nobody listens"), 100, "nobody listens"),
        (TimeoutError("hung"), 100 + 50 + 25 + 12 + 6 + 3 + 1 + 2 + 1 + 1 + 3, "TimeoutError: hung"),
    ],
)
def test_a_source_that_is_away_is_given_up_until_the_next_sweep(
    scene: Scene, redis: Redis, error: Exception, asked: int, problem: str
) -> None:
    """A source that nobody reaches, or that hangs on every ask, does not hold a sweep for 199 asks a batch."""
    job_ids = [f"job-{number:04d}" for number in range(501)]
    charged(scene, *job_ids)

    class Away(Source):
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            self.asked.append(list(job_ids))
            raise self.error

    came_to = sweep(scene, redis, Away({}, error=error))
    mended = sweep(scene, redis, Source(dict.fromkeys(job_ids, COMPLETED)))

    assert came_to == report(overdue=501, asked=asked, source_errors=501, source_problem=problem, answers={})
    assert mended["outcomes"] == {"captured": 501}


def test_a_setting_that_the_source_finds_wrong_ends_the_sweep(scene: Scene, redis: Redis) -> None:
    """A query that runs for no job is a wrong setting: no job is asked about, and the sweep says which it is."""
    charged(scene, "job-1")

    with pytest.raises(BadSettings, match="no query"):
        sweep(scene, redis, Source({}, fails_for="job-1", error=BadSettings("that is no query")))

    assert asks(scene) == {}
    assert statuses(scene) == {"job-1": "open"}


# --- what forbids a verdict of our own


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
    "an array cut off": b"[" + b",".join(completions("job-1", "job-2", "job-3"))[:-2],
    "an array of too many": b"[" + b",".join(completions(*(f"job-{number}" for number in range(1, 102)))) + b"]",
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
    settings = Settings.model_construct()
    with clock_at(scene.worker, NOW + TICK):
        drain(Intake(scene.worker, Queues(redis, "worker-1", alive_ttl_s=60), rules_of(settings), settings))

    came_to = sweep(scene, redis, now=NOW + SECOND)

    assert sum(came_to["withheld"].values()) == 2
    assert statuses(scene) == {"job-1": "open", "job-2": "open"}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_completions_in_one_message_are_captured(scene: Scene, redis: Redis, form: str) -> None:
    """An array of three completions is three completions."""
    charged(scene, "job-1", "job-2", "job-3")
    redis.lpush(Queue.JOB_COMPLETED, WIRE_FORMS[form](b"[%s]" % b",".join(completions("job-1", "job-2", "job-3"))))
    settings = Settings.model_construct()
    drain(Intake(scene.worker, Queues(redis, "worker-1", alive_ttl_s=60), rules_of(settings), settings))

    sweep(scene, redis)

    assert statuses(scene) == dict.fromkeys(["job-1", "job-2", "job-3"], "captured")


def on(key: str) -> Callable[[Redis, bytes], object]:
    return lambda redis, raw: redis.lpush(key, raw)


def in_flight(redis: Redis, raw: bytes) -> None:
    redis.lpush(Queue.JOB_COMPLETED, raw)
    Queues(redis, "worker-1", alive_ttl_s=60).claim()


def recovered(redis: Redis, raw: bytes) -> None:
    in_flight(redis, raw)
    redis.delete("kino:alive:worker-1")
    Queues(redis, "worker-2", alive_ttl_s=60).recover()


PLACES: dict[str, Callable[[Redis, bytes], object]] = {
    **{queue.value: on(queue) for queue in Queue},
    **{f"priority {n}": on(f"{Queue.JOB_COMPLETED}\x06\x16{n}") for n in (3, 6, 9)},
    "in flight": in_flight,
    "recovered": recovered,
}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_no_verdict_unless_every_waiting_message_is_newer(scene: Scene, redis: Redis, form: str) -> None:
    """A message from not after deadline and grace may be the job's end, wherever it waits; a newer one is not."""
    message_at = NOW - 10 * SECOND
    raw = WIRE_FORMS[form](to_json(make_event("completed", "somebody", at=message_at)))

    found = {}
    for number, (place, put) in enumerate(PLACES.items()):
        redis.flushdb()
        put(redis, raw)
        charged(scene, f"due before {place}", due=message_at - TICK)
        charged(scene, f"due as sent {place}", due=message_at)
        came_to = sweep(scene, redis, now=NOW + number * SPACING)
        found[place] = [message.raw for message in waiting(redis).messages], came_to["withheld"]

    # What was withheld at one place is looked at again at the next.
    assert found == {p: ([raw], {"older_message_waiting": n}) for n, p in enumerate(PLACES, start=1)}
    assert statuses(scene) == {f"due as sent {place}": "open" for place in PLACES} | {
        f"due before {place}": "refunded" for place in PLACES
    }


def test_the_oldest_of_many_waiting_messages_decides(scene: Scene, redis: Redis) -> None:
    """One old message among new ones, on whatever queue, is enough."""
    charged(scene, "job-1")
    for number in range(20):
        at = DUE if number == 7 else NOW + number * SECOND
        redis.lpush([*Queue][number % 4], to_json(make_event("completed", f"other-{number}", at=at)))

    came_to = sweep(scene, redis)

    assert came_to == withheld(older_message_waiting=1)


@pytest.mark.parametrize("form", WIRE_FORMS)
@pytest.mark.parametrize("at", [NOW, NOW + 365 * 24 * HOUR])
def test_no_verdict_on_a_job_that_a_waiting_message_names(scene: Scene, redis: Redis, form: str, at: datetime) -> None:
    """Its end waits for us, however new it says it is; its neighbour, of whom nothing waits, is settled."""
    charged(scene, "job-1", "job-2", "job-3")
    other = to_json(make_event("completed", "job-2", at=at))
    both = b"[%s]" % b",".join([to_json(make_event("failed platform", "somebody", at=at)), other])
    redis.lpush(Queue.TIMEOUT, WIRE_FORMS[form](to_json(make_event("completed", at=at))), WIRE_FORMS[form](both))

    came_to = sweep(scene, redis)

    assert came_to["withheld"] == {"named_by_waiting_message": 2}
    assert statuses(scene) == {"job-1": "open", "job-2": "open", "job-3": "refunded"}


def test_the_oldest_event_of_a_waiting_message_decides(scene: Scene, redis: Redis) -> None:
    """Of several events in one message each could be what holds a verdict back."""
    charged(scene, "job-1")
    times = [NOW, DUE, NOW + SECOND]
    raw = b"[%s]" % b",".join(to_json(make_event("completed", f"o-{n}", at=at)) for n, at in enumerate(times))
    redis.lpush(Queue.JOB_COMPLETED, raw)

    assert sweep(scene, redis) == withheld(older_message_waiting=1)


DAY = 24 * HOUR
STUCK: dict[str, bytes] = {
    "nonsense": b"nonsense",
    "old": to_json(make_event("completed", "somebody", at=NOW - DAY)),
    "several, one unreadable": b"[%s,{}]" % to_json(make_event("completed", "somebody", at=NOW - DAY)),
}


@pytest.mark.parametrize("raw", STUCK.values(), ids=STUCK)
def test_a_message_that_is_stuck_for_a_day_holds_back_its_own_job_only(scene: Scene, redis: Redis, raw: bytes) -> None:
    """What nobody removes must not end all verdicts for good: after a day by the sweep's own row it is passed over."""
    charged(scene, "somebody")
    redis.lpush(Queue.JOB_COMPLETED, raw)
    first = sweep(scene, redis)["withheld"]
    charged(scene, "job-1")

    a_day_later = sweep(scene, redis, now=NOW + DAY)
    later = sweep(scene, redis, now=NOW + DAY + TICK)

    assert sum(first.values()) == 1
    assert sum(a_day_later["withheld"].values()) == 2
    named = b"somebody" in raw
    assert later["withheld"] == ({"named_by_waiting_message": 1} if named else {})
    assert statuses(scene) == {"job-1": "refunded", "somebody": "open" if named else "refunded"}


def test_since_when_a_message_waits_is_noted_without_any_verdict_due(scene: Scene, redis: Redis) -> None:
    """The first overdue charge does not wait another day for a message that has been stuck for months."""
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")
    sweep(scene, redis, now=NOW - 2 * DAY)
    charged(scene, "job-1")

    came_to = sweep(scene, redis)

    assert came_to == REFUNDED_ONE


def noted(scene: Scene) -> list[tuple[datetime, list[str]]]:
    return [tuple(row) for row in scene.rows("SELECT first_seen_at, job_ids FROM kino.waiting_message ORDER BY 1, 2")]


def test_what_waits_no_longer_is_forgotten(scene: Scene, redis: Redis) -> None:
    """A message that was taken leaves no row: the same one a week later is new."""
    raw = to_json(make_event("completed"))
    redis.lpush(Queue.JOB_COMPLETED, raw)
    sweep(scene, redis)
    before = noted(scene)
    redis.delete(Queue.JOB_COMPLETED)
    sweep(scene, redis, now=NOW + SECOND)
    gone = noted(scene)
    redis.lpush(Queue.JOB_COMPLETED, raw)

    sweep(scene, redis, now=NOW + 2 * SECOND)

    assert (before, gone, noted(scene)) == ([(NOW, ["job-1"])], [], [(NOW + 2 * SECOND, ["job-1"])])


def test_of_a_backlog_the_oldest_are_noted(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much waits, a sweep writes a bounded number of rows: the unreadable first, then by age."""
    monkeypatch.setattr(guard, "NOTED_MAX", 3)
    for number in range(5):
        redis.lpush(Queue.TIMEOUT, to_json(make_event("timeout", f"job-{number}", at=NOW - number * SECOND)))
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")

    sweep(scene, redis)
    sweep(scene, redis, now=NOW + SECOND)

    assert noted(scene) == [(NOW, []), (NOW, ["job-3"]), (NOW, ["job-4"])]


def test_what_cannot_be_read_whole_is_not_forgotten(scene: Scene, redis: Redis) -> None:
    """A reading that is not complete says nothing about what waits no longer."""
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")
    sweep(scene, redis)
    redis.delete(Queue.JOB_COMPLETED)
    redis.set(Queue.TIMEOUT, "not a list")

    sweep(scene, redis, now=NOW + SECOND)

    assert noted(scene) == [(NOW, [])]


@pytest.mark.parametrize("kind", ["time naive, bare", "time naive, kombu", "not json, bare"])
def test_no_verdict_while_a_message_waits_whose_time_cannot_be_read(scene: Scene, redis: Redis, kind: str) -> None:
    """What cannot be read may be as old as it likes, and anybody's, wherever it waits."""
    charged(scene, "job-1")

    found = {}
    for number, (place, put) in enumerate(PLACES.items()):
        redis.flushdb()
        put(redis, MALFORMED[kind][0])
        found[place] = sweep(scene, redis, now=NOW + number * SPACING)["withheld"]

    assert found == {place: {"unreadable_message_waiting": 1} for place in PLACES}
    assert statuses(scene) == {"job-1": "open"}


def test_no_verdict_while_a_key_cannot_be_read(scene: Scene, redis: Redis) -> None:
    """A queue key, or the registry that leads to the in-flight lists, of another type hides what waits there."""
    charged(scene, "job-1")
    keys = [Queue.JOB_COMPLETED.value, f"{Queue.TIMEOUT}\x06\x166", "kino:recovered:generation.timeout", "kino:workers"]

    found = {}
    for number, key in enumerate(keys):
        redis.flushdb()
        redis.set(key, "not a list")
        found[key] = sweep(scene, redis, now=NOW + number * SPACING)["withheld"]

    assert found == {key: {"unreadable_queue": 1} for key in keys}


def test_no_verdict_while_redis_is_away(scene: Scene) -> None:
    """Who cannot look at the queues must not say that nothing waits there; what a source knows settles."""
    charged(scene, "job-1", "job-2")
    source = Source({"job-1": COMPLETED, "job-2": UNKNOWN})
    with redis_client("redis://127.0.0.1:1/0") as away:
        found = [sweep(scene, away, source, now=NOW + number * SPACING)["withheld"] for number in range(3)]

    assert found == [{}, {}, {"redis_away": 1}]
    assert statuses(scene) == {"job-1": "captured", "job-2": "open"}


@pytest.mark.parametrize("kept_back", [False, True])
def test_no_verdict_behind_a_backlog_that_cannot_be_read(scene: Scene, redis: Redis, *, kept_back: bool) -> None:
    """One message more than is ever read, however new, and we are too far behind to judge."""
    charged(scene, "job-1")
    limit = (waiting.__kwdefaults__ or {})["limit"]
    raw = to_json(make_event("completed", "other", at=NOW))
    redis.lpush(Queue.JOB_COMPLETED, *[raw] * (limit + kept_back))

    came_to = sweep(scene, redis)

    assert came_to == (withheld(backlog_too_large=1) if kept_back else REFUNDED_ONE)


def test_no_verdict_behind_a_backlog_of_too_many_bytes(scene: Scene, redis: Redis) -> None:
    """Few but large messages are a backlog too."""
    charged(scene, "job-1")
    max_bytes = (waiting.__kwdefaults__ or {})["max_bytes"]
    raw = to_json(make_event("completed", "other", at=NOW)).replace(b"{", b"{" + b" " * 200_000, 1)
    redis.lpush(Queue.JOB_COMPLETED, *[raw] * (max_bytes // len(raw) + 20))

    came_to = sweep(scene, redis)

    assert came_to == withheld(backlog_too_large=1)


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
        assert violations(connection) == []


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
