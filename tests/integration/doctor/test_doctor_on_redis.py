"""What can be wrong with Redis is planted on real servers, and only that is found, with what to do."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import Redis

from kino_refunds.dev.embedded import LOOPBACK, EmbeddedValkey
from kino_refunds.doctor import on_redis
from kino_refunds.events.queues import QUEUE_KEYS
from kino_refunds.events.schema import to_json
from tests.command_line import AWAY_PORT
from tests.integration.doctor.diagnosis import Diagnosis, Doctor, Found, spoiled
from tests.scenario import make_event


@pytest.mark.parametrize(
    ("options", "check", "says", "advice"),
    [
        (
            {"maxmemory_policy": "allkeys-lru"},
            "redis eviction",
            "allkeys-lru",
            "set maxmemory-policy noeviction: every other policy deletes events silently",
        ),
        (
            {"appendonly": "no"},
            "redis persistence",
            "append-only file off",
            "set appendonly yes: an event that a restart loses is found only after its job's deadline",
        ),
    ],
)
@pytest.mark.usefixtures("well")
def test_redis_that_would_lose_events_is_found(
    doctor: Doctor, own_valkey: EmbeddedValkey, options: dict[str, str], check: str, says: str, advice: str
) -> None:
    """A Redis that evicts or forgets is a cache, and events are not."""
    with spoiled(own_valkey, **options) as url:
        found = doctor(KINO_REDIS_URL=url)

    assert found == Diagnosis(1, [Found(check, "fail", says, advice)])


FULL = (
    "a full Redis refuses publishers and beat's sweeps, while workers still drain it: see what is queued with"
    " `kino-refunds intake status`"
)


@pytest.mark.usefixtures("well")
def test_full_redis_is_found_with_what_it_means(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """At its limit it refuses publishers; that no right is missing is told apart from it."""
    with spoiled(own_valkey, maxmemory="1mb") as url:
        found = doctor(KINO_REDIS_URL=url)

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (1, "redis memory", "fail", FULL)
    assert re.fullmatch(r"full: \d+\.\d MiB of 1\.0 MiB", text)


@pytest.mark.usefixtures("well")
def test_redis_that_fills_up_is_a_warning(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """Above four fifths there is still time to look at what waits."""
    with Redis.from_url(own_valkey.url()) as client:
        used = client.info("memory")["used_memory"]
    with spoiled(own_valkey, maxmemory=str(int(used * 1.12))) as url:
        found = doctor(KINO_REDIS_URL=url)

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (0, "redis memory", "warn", FULL)
    assert not text.startswith("full")


@pytest.mark.usefixtures("well")
def test_replica_is_found(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """A replica answers and takes no writes: the URL must follow the primary."""
    with Redis.from_url(own_valkey.url()) as client:
        client.replicaof(LOOPBACK, AWAY_PORT)
        try:
            found = doctor(KINO_REDIS_URL=own_valkey.url())
        finally:
            client.replicaof("NO", "ONE")

    advice = "a replica takes no writes: give KINO_REDIS_URL an address that follows the primary"
    assert found == Diagnosis(1, [Found("redis role", "fail", "replica; rights and queues were not checked", advice)])


@pytest.mark.parametrize(
    ("oldest", "level", "code", "advice"),
    [
        ("REDIS_MIN", "fail", 1, "Redis 6.2 or newer, or Valkey, is needed"),
        (None, "warn", 0, "deploy/users.acl needs 7.0 (selectors), and nothing is tried with less than 7.2: upgrade"),
    ],
)
@pytest.mark.usefixtures("well")
def test_old_redis_is_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, oldest: str | None, level: str, code: int, advice: str
) -> None:
    """Without LMOVE nothing works; without ACL selectors deploy/users.acl does not, and the rest does."""
    monkeypatch.setattr(on_redis, "ACL_SELECTORS_SINCE", (99, 0))
    if oldest is not None:
        monkeypatch.setattr(on_redis, oldest, (99, 0))

    found = doctor()

    assert (found.code, [(each.check, each.level, each.advice) for each in found.bad]) == (
        code,
        [("redis version", level, advice)],
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"cluster_enabled": 1}, ("redis cluster", "on", "the scripts span keys: ")),
        (
            {"aof_last_write_status": "err"},
            ("redis persistence", "the append-only file cannot be written", "see Redis' log and its disk: "),
        ),
    ],
)
@pytest.mark.usefixtures("well")
def test_redis_that_says_so_of_itself_is_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    """A cluster, and a disk that is full, as INFO reports them: neither can be had here for real."""
    info = Redis.info
    monkeypatch.setattr(Redis, "info", lambda client: info(client) | said)

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, level, check, text) == (1, "fail", *expected[:2])
    assert advice.startswith(expected[2])


RIGHTS = "connect as the user `worker` of this build's deploy/users.acl; `ACL LOG` names what was refused"


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("+@all ~* -lmove", "refused: LMOVE generation.job-failed, LMOVE kino:inflight:doctor:generation.job-failed,"),
        ("+@all ~* -evalsha", "refused: EVALSHA 0000"),
        ("+@all ~* -script|load", "refused: SCRIPT LOAD return 0"),
        ("+@all ~generation.* ~_kombu.* ~kino:celery:*", "refused: LMOVE generation.job-failed,"),
        ("+@all ~generation.* ~_kombu.* ~kino:*", None),
        ("+@all ~generation.* ~kino:*", "refused: SMEMBERS _kombu.binding.generation.job-failed,"),
        ("+@all ~* -zadd", "refused: ZADD kino:celery:unacked_index"),
        ("+@all ~* -time", "refused: TIME"),
    ],
)
@pytest.mark.usefixtures("well")
def test_right_that_a_worker_lacks_is_found_and_nothing_is_tried_for_real(
    doctor: Doctor, own_valkey: EmbeddedValkey, rules: str, says: str | None
) -> None:
    """The server is asked inside a transaction that is thrown away: every key is as it was."""
    with Redis.from_url(own_valkey.url()) as client:
        client.flushall()
        client.lpush(QUEUE_KEYS[0], to_json(make_event("completed", at=datetime.now(UTC))))
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rules.split())
        before = {key: client.dump(key) for key in client.scan_iter()}
        try:
            found = doctor(KINO_REDIS_URL=own_valkey.url().replace("redis://", "redis://limited:secret@"))
            after = {key: client.dump(key) for key in client.scan_iter()}
        finally:
            client.execute_command("ACL", "DELUSER", "limited")
            client.flushall()

    assert after == before
    assert found.code == (1 if says else 0)
    if says is None:
        assert found.bad == []
    else:
        assert (found.bad[0].check, found.bad[0].level, found.bad[0].advice) == ("redis rights", "fail", RIGHTS)
        assert found.bad[0].found.startswith(says)


@pytest.mark.usefixtures("well")
def test_relay_needs_a_right_to_its_queue(doctor: Doctor, own_valkey: EmbeddedValkey) -> None:
    """Only where the product is told of refunds is the right to tell it asked for."""
    with Redis.from_url(own_valkey.url()) as client:
        rules = ["+@all", "~generation.*", "~_kombu.*", "~kino:*"]
        client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret", *rules)
        url = own_valkey.url().replace("redis://", "redis://limited:secret@")
        try:
            found = doctor(KINO_REDIS_URL=url, KINO_RELAY_QUEUE="product.refunds")
        finally:
            client.execute_command("ACL", "DELUSER", "limited")

    assert [each[:3] for each in found.bad if each.check != "beat"] == [
        ("redis rights", "fail", "refused: LPUSH product.refunds")
    ]
