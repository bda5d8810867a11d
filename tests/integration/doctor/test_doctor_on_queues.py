"""Keys that nobody reads, names that are misspelt, and events that wait too long are found."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis

from kino_refunds.dev.embedded import EmbeddedValkey
from kino_refunds.doctor import findings, on_redis
from kino_refunds.events.queues import QUEUE_KEYS, SERVED
from kino_refunds.events.schema import to_json
from tests.clock import MINUTE
from tests.command_line import Run
from tests.integration.doctor.diagnosis import Diagnosis, Doctor, Found
from tests.pipeline import several
from tests.scenario import EVENT_AT, Scene, make_event

FOREIGN = "another program writes under our names: RENAME that key, as admin, and find out what it is"


@pytest.mark.usefixtures("well")
def test_key_that_is_not_a_queue_is_found(doctor: Doctor, redis: Redis) -> None:
    """A queue's name that holds something else is never read; its control characters are shown escaped."""
    redis.set(QUEUE_KEYS[1], "x")

    found = doctor()

    says = r"of the wrong type: 'generation.job-failed\x06\x163'"
    assert found == Diagnosis(1, [Found("queue keys", "fail", says, FOREIGN)])


@pytest.mark.usefixtures("well")
def test_key_of_ours_that_holds_something_else_is_found(doctor: Doctor, redis: Redis) -> None:
    """Every script of intake refuses then, and kombu's publishers too, while nothing seems to wait."""
    redis.sadd("kino:workers", "w")
    redis.set("kino:inflight:w:generation.timeout", "x")
    redis.set("kino:recovered:generation.job-failed", "x")
    for queue in SERVED:
        redis.set(f"_kombu.binding.{queue}", "x")

    found = doctor()
    redis.set("kino:workers", "x")
    registry = doctor()

    says = (
        "of the wrong type: 'kino:inflight:w:generation.timeout', 'kino:recovered:generation.job-failed', "
        + ", ".join(f"'_kombu.binding.{queue}'" for queue in SERVED)
    )
    assert found == Diagnosis(1, [Found("queue keys", "fail", says, FOREIGN)])
    assert "'kino:workers'" in registry.bad[0].found


@pytest.mark.usefixtures("well")
def test_queue_whose_name_is_misspelt_is_found(doctor: Doctor, redis: Redis) -> None:
    """A publisher's typo is a list that nobody reads; lists of other people are none of our business."""
    redis.lpush("generation.job-complete", "{}")
    redis.lpush("generation.time-out", "{}")
    for name in ("jobs.to-do", "generation.jobs", "generation.timeouts", "kino:inflight:w:generation.job-failed"):
        redis.lpush(name, "{}")

    found = doctor(KINO_RELAY_QUEUE="generation.timeouts")

    advice = (
        "if those are events: fix their publisher, then move each, as admin: LMOVE 'generation.job-complete'"
        " generation.job-completed RIGHT LEFT, LMOVE 'generation.time-out' generation.timeout RIGHT LEFT"
    )
    says = "no worker reads 'generation.job-complete', 'generation.time-out'"
    assert [each for each in found.bad if each.check != "beat"] == [Found("queue names", "warn", says, advice)]


MISSPELT = {
    "GENERATION.JOB-FAILED": "generation.job-failed",
    "Generation.Timeout": "generation.timeout",
    "generation_job-failed": "generation.job-failed",
    "generation:job-failed": "generation.job-failed",
    "generation.job_completed": "generation.job-completed",
    "generation/safety-rejection": "generation.safety-rejection",
    "generationJobFailed": "generation.job-failed",
    "prod:generation.timeout": "generation.timeout",
    "myapp_generation.job-failed": "generation.job-failed",
    "generation.timeout\x06\x165": "generation.timeout",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_each_form_of_a_misspelt_name_is_found(redis: Redis, name: str) -> None:
    """Another case, another separator, a prefix and a priority that kombu has elsewhere: each with how to move it."""
    redis.lpush(name, "{}")

    found = on_redis._misspelt(redis, None)

    move = f"LMOVE {name!a} {MISSPELT[name]} RIGHT LEFT"
    advice = f"if those are events: fix their publisher, then move each, as admin: {move}"
    assert found == findings.Finding("queue names", "warn", f"no worker reads {name!a}", advice)


OTHER_LIBRARIES = {
    "bull:generation.job-failed:*": ("bull:generation.job-failed:wait", "bull:generation.job-failed:meta"),
    "{bull}:generation.timeout:*": ("{bull}:generation.timeout:events",),
    "bq:generation.timeout:*": ("bq:generation.timeout:waiting",),
    "rq:queue:generation.timeout": ("rq:queue:generation.timeout",),
    "dramatiq:generation.timeout": ("dramatiq:generation.timeout",),
    "dramatiq:generation.timeout.msgs": ("dramatiq:generation.timeout.msgs",),
    "resque:queue:generation.job-completed": ("resque:queue:generation.job-completed",),
    "queue:generation.safety-rejection": ("queue:generation.safety-rejection",),
    "queues:generation.job-failed": ("queues:generation.job-failed",),
    "laravel_database_queues:generation.job-failed": ("laravel_database_queues:generation.job-failed",),
    "arq:queue:Generation.Job_Failed": ("arq:queue:Generation.Job_Failed",),
    "generation-timeout": ("generation-timeout",),
}


PUT = {
    "list": ("LPUSH", "{0}", "x"),
    "stream": ("XADD", "{0}", "*", "a", "b"),
    "zset": ("ZADD", "{0}", "1", "a"),
    "hash": ("HSET", "{0}", "a", "b"),
}


@pytest.mark.parametrize("family", OTHER_LIBRARIES)
@pytest.mark.parametrize("held", PUT)
def test_queue_of_another_library_is_found_once(redis: Redis, family: str, held: str) -> None:
    """Whatever type a library keeps its messages in; they are not events that could be moved, but published again."""
    put: Any = redis.execute_command
    for name in OTHER_LIBRARIES[family]:
        put(*(word.format(name) for word in PUT[held]))

    found = on_redis._misspelt(redis, None)

    assert (found.level, found.found) == ("warn", f"no worker reads {family!a}")
    if held == "list" and family == "generation-timeout":
        assert found.advice is not None
        assert "LMOVE 'generation-timeout' generation.timeout" in found.advice
    else:
        ways = "EventPublisher, kombu without a key prefix, or a bare LPUSH"
        assert found.advice == (
            f"another library wrote {family!a} in a form of its own: publish by {ways}, and publish those events again"
        )


def test_key_that_only_speaks_of_a_queue_is_not_named(redis: Redis) -> None:
    """Counters, caches and other people's queues are none of our business, nor are keys of our own."""
    redis.set("metrics:generation.timeout", 1)
    redis.hset("metrics:generation.job-failed", "count", "1")
    redis.set("generation.timeouts", "1")
    redis.lpush("bull:emails:wait", "1")
    redis.lpush("rq:queue:default", "1")
    redis.lpush("queue:generation.jobs", "1")
    redis.lpush("generation.jobs", "1")
    redis.lpush("kino.credits-refunded.generation.timeout", "1")

    assert on_redis._misspelt(redis, None).level == "ok"


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize(("user", "level"), [("default", "warn"), ("worker", "ok"), ("", "ok")])
def test_queue_names_are_looked_at_where_the_user_may(
    run: Run, own_valkey: EmbeddedValkey, user: str, level: str
) -> None:
    """Who says that it is `default` may list keys as a rule; who may not is told that nothing was looked at."""
    with Redis.from_url(own_valkey.url()) as admin:
        admin.lpush("generation.job-complete", "{}")
        admin.acl_setuser("worker", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"])
        if not user:
            admin.execute_command("ACL", "SETUSER", "default", "-scan")
        url = own_valkey.url().replace("//", f"//{user}:x@" if user else "//")
        try:
            items = run("doctor", "--json", KINO_REDIS_URL=url).json["items"]
        finally:
            admin.execute_command("ACL", "SETUSER", "default", "+@all")
            admin.flushall()

    ((found, told),) = [(each["level"], each["found"]) for each in items if each["check"] == "queue names"]
    assert found == level
    assert ("not checked" in told) == (level == "ok")
    assert [each["level"] for each in items if each["check"] == "queue keys"] == ["ok"]


@pytest.mark.usefixtures("well")
def test_old_event_that_waits_is_a_warning(doctor: Doctor, redis: Redis) -> None:
    """The oldest of all is what counts, on whatever queue and priority; what cannot be parsed has no age."""
    redis.lpush(QUEUE_KEYS[0], "{", to_json(make_event("completed", at=datetime.now(UTC))))
    redis.lpush(QUEUE_KEYS[5], to_json(make_event("timeout", at=EVENT_AT - 10 * MINUTE)))

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (0, "queues", "warn")
    assert advice == "see `kino-refunds intake status`: is intake open, are workers alive? Then start more of them"
    counts, age_s = text.split("; the oldest event is ")
    assert counts == "3 queued (generation.job-failed 2, generation.timeout 1)"
    assert int(age_s.removesuffix(" s old")) >= 660


@pytest.mark.usefixtures("well")
def test_events_of_one_message_have_their_age(doctor: Doctor, redis: Redis) -> None:
    """The oldest event of a message that holds several counts as any other."""
    events = [make_event("completed", at=datetime.now(UTC)), make_event("timeout", at=EVENT_AT - 10 * MINUTE)]
    redis.lpush(QUEUE_KEYS[0], several(*events))

    found = doctor()

    assert [each[:2] for each in found.bad] == [("queues", "warn")]


def test_message_that_waits_for_more_than_a_day_is_named(doctor: Doctor, well: Scene) -> None:
    """What no longer holds back other jobs' verdicts is shown, with the jobs that it still does hold back."""
    well.as_superuser(
        "INSERT INTO kino.waiting_message VALUES"
        " ('\\x01', clock_timestamp() - interval '25 hours', ARRAY['job-1', E'job\\x1b2']),"
        " ('\\x02', clock_timestamp() - interval '2 days', '{}'),"
        " ('\\x03', clock_timestamp() - interval '23 hours', ARRAY['job-3'])"
    )

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level) == (0, "waiting messages", "warn")
    assert re.fullmatch(r"2 queued for more than a day, the first since [\d :-]+Z, about 'job-1', 'job\\x1b2'", text)
    assert advice is not None
    assert "kino-refunds intake status" in advice


@pytest.mark.usefixtures("well")
def test_young_events_that_wait_are_fine(doctor: Doctor, run: Run, redis: Redis) -> None:
    """Waiting for a moment is what a queue is for; how much waits where is said all the same."""
    redis.lpush(QUEUE_KEYS[0], to_json(make_event("completed", at=datetime.now(UTC))))
    redis.sadd("kino:workers", "w")
    redis.lpush(f"kino:inflight:w:{QUEUE_KEYS[0]}", "no event")

    found = doctor()
    said = json.loads(run("doctor", "--json").out)["items"][-1]["found"]

    assert found == Diagnosis(0, [])
    assert re.fullmatch(r"2 queued \(generation\.job-failed 1, in-flight 1\); the oldest event is \d s old", said)


@pytest.mark.usefixtures("well")
def test_backlog_that_is_not_read_to_its_end_says_so(doctor: Doctor, redis: Redis) -> None:
    """Of a large backlog only the first part is read; the age is then that of those."""
    old = to_json(make_event("completed", at=EVENT_AT - MINUTE))
    redis.lpush(QUEUE_KEYS[0], *[old] * 10_001)

    found = doctor()

    assert [each[:2] for each in found.bad] == [("queues", "warn")]
    assert found.bad[0].found.startswith("10,001 queued (generation.job-failed 10,001); the oldest event is ")
    assert found.bad[0].found.endswith(" s old, of those that were read")
