"""redis.conf and users.acl, loaded into a real server and overstepped: each user does its work and no more."""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress

import pytest
from kombu import Connection as KombuConnection
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.doctor.on_redis import refused_commands
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, BindReport, Queues, depths, read_queued
from kino_refunds.events.schema import Queue
from tests.integration.deploy.deployed_valkey import DeployedValkey, Q, ask, event, read, refused_for, text_of
from tests.integration.deploy.files import DEPLOY, RELAY_QUEUE, USERS, password
from tests.scenario import until


def test_server_takes_the_configuration(admin: Redis) -> None:
    """redis.conf gives a server that keeps every event: no eviction, an append-only file, no snapshots."""
    names = ("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "save")

    found = {name: admin.config_get(name)[name] for name in names}

    assert found == {
        "maxmemory-policy": "noeviction",
        "maxmemory": str(2**30),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "no-appendfsync-on-rewrite": "no",
        "save": "",
    }


def test_nobody_comes_in_without_a_name(valkey: DeployedValkey) -> None:
    """Without a user, as `default`, or with another's password, the server answers nothing."""
    for url in (
        f"redis://{LOOPBACK}:{valkey.port}/0",
        f"redis://default:x@{LOOPBACK}:{valkey.port}/0",
        f"redis://worker:{password('publisher')}@{LOOPBACK}:{valkey.port}/0",
    ):
        with Redis.from_url(url) as client, pytest.raises((AuthenticationError, ResponseError)):
            client.ping()


def test_user_without_a_password_is_off() -> None:
    """render-acl.sh switches a user off whose password is not given, instead of letting everybody in."""
    done = subprocess.run(
        [DEPLOY / "render-acl.sh"],
        env={"PATH": os.defpath, "REDIS_WORKER_PASSWORD": "w"},
        capture_output=True,
        text=True,
        check=True,
    )
    states = {line.split()[1]: line.split()[3] for line in done.stdout.splitlines()}

    assert states == {"default": "off", "worker": "on"} | dict.fromkeys(set(USERS) - {"worker"}, "off")
    assert "@" not in re.sub(r"[-+]@all", "", done.stdout)


def test_publisher_publishes_through_kombu(valkey: DeployedValkey, admin: Redis) -> None:
    """EventPublisher, as the user `publisher`, puts an event of each kind on its queue and is refused nothing."""
    with EventPublisher(valkey.url_of("publisher")) as publisher:
        publisher.publish_many(event(number, queue) for number, queue in enumerate(Queue))

    arrived = {queue: [read(raw) for raw in admin.lrange(queue, 0, -1)] for queue in Queue}
    assert arrived == {queue: [f"job-{number}"] for number, queue in enumerate(Queue)}
    assert refused_for(admin, "publisher") == []


def test_publisher_pushes_by_hand(valkey: DeployedValkey, admin: Redis) -> None:
    """A bare LPUSH as `publisher` reaches each queue and each of its kombu priorities."""
    with valkey.client("publisher") as client:
        for key in QUEUE_KEYS:
            client.lpush(key, "{}")

    assert {key: admin.llen(key) for key in QUEUE_KEYS} == dict.fromkeys(QUEUE_KEYS, 1)


def test_publisher_may_use_stock_kombu(valkey: DeployedValkey, admin: Redis) -> None:
    """A kombu SimpleQueue as `publisher` finds its binding and puts its message on the queue."""
    with KombuConnection(valkey.url_of("publisher")) as connection:
        queue = connection.SimpleQueue(Queue.TIMEOUT.value)
        queue.put(event(7, Queue.TIMEOUT), serializer="json")
        queue.close()

    (raw,) = admin.lrange(Queue.TIMEOUT, 0, -1)
    assert read(raw) == "job-7"


WHOLE_SERVER = [
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET *",
    "CONFIG SET maxmemory-policy allkeys-lru",
    "CONFIG REWRITE",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "EVAL return 0",
    "FUNCTION LIST",
    "MONITOR",
    "SUBSCRIBE news",
    "PUBLISH news 1",
    "ACL LIST",
    "ACL SETUSER publisher allkeys",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "SHUTDOWN NOSAVE",
    "SAVE",
    "BGREWRITEAOF",
    "REPLICAOF NO ONE",
    "SWAPDB 0 0",
    "SLOWLOG GET",
    "COMMAND COUNT",
]
OVERSTEPS = {
    "publisher": [
        *WHOLE_SERVER,
        "INFO",
        f"LRANGE {Q} 0 -1",
        f"LINDEX {Q} -1",
        f"RPOP {Q}",
        f"BRPOP {Q} 1",
        f"LPOP {Q}",
        f"LMOVE {Q} {Queue.TIMEOUT.value} LEFT LEFT",
        f"LTRIM {Q} 1 0",
        f"LREM {Q} 0 x",
        f"LSET {Q} 0 x",
        f"DEL {Q}",
        f"SET {Q} x",
        f"RENAME {Q} {Q}2",
        f"COPY {Q} {Queue.TIMEOUT.value}",
        f"SORT {Q} BY nosort STORE {Queue.TIMEOUT.value}",
        f"DUMP {Q}",
        f"EXPIRE {Q} 1",
        f"TYPE {Q}",
        f"SADD {Q} x",
        f"LPUSH {Q}-other x",
        f"LPUSH {Q}aa3 x y".replace("aa3", "aa4"),
        "LPUSH other x",
        "LPUSH kino:recovered:generation.timeout x",
        "LPUSH kino:celery:sweeps x",
        f"LPUSH {RELAY_QUEUE} x",
        "LPUSH _kombu.binding.generation.timeout x",
        "LLEN kino:recovered:generation.timeout",
        "SADD kino:workers x",
        "SADD kino:celery:_kombu.binding.sweeps x",
        "SADD _kombu.binding.other x",
        "DEL _kombu.binding.generation.timeout",
        "GET kino:token:x",
        "SET kino:alive:x 1",
        "SCRIPT LOAD return",
        "EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 0",
    ],
    "worker": [
        *WHOLE_SERVER,
        f"DEL {Q}",
        f"SET {Q} x",
        f"LTRIM {Q} 1 0",
        f"RPOP {Q}",
        f"LREM {Q} 0 x",
        f"RENAME {Q} x",
        f"EXPIRE {Q} 1",
        "GET other",
        "LPUSH other x",
        f"LRANGE {RELAY_QUEUE} 0 -1",
        f"DEL {RELAY_QUEUE}",
        "DEL _kombu.binding.generation.timeout",
        "SADD _kombu.binding.other x",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
    ],
    "product": [
        *WHOLE_SERVER,
        f"LPUSH {RELAY_QUEUE} x",
        f"DEL {RELAY_QUEUE}",
        f"RPOP {Q}",
        f"LPUSH {Q} x",
        "LPUSH kino:celery:sweeps x",
    ],
    "readonly": [
        *WHOLE_SERVER,
        f"LRANGE {Q} 0 -1",
        f"LINDEX {Q} 0",
        f"LPUSH {Q} x",
        f"DEL {Q}",
        "SMEMBERS kino:workers",
        "LLEN other",
    ],
    "scaler": [
        *(each for each in WHOLE_SERVER if not each.startswith("EVAL")),
        f"LRANGE {Q} 0 -1",
        f"LPUSH {Q} x",
        f"DEL {Q}",
        "LLEN kino:workers",
    ],
}


@pytest.mark.parametrize(("user", "line"), [(user, line) for user, lines in OVERSTEPS.items() for line in lines])
def test_overstep_is_refused(valkey: DeployedValkey, admin: Redis, user: str, line: str) -> None:
    """What a user does not need is refused by the server, and changes nothing."""
    admin.lpush(Q, "first", "second")
    admin.sadd("_kombu.binding.generation.timeout", "bound")
    before = {key: admin.dump(key) for key in sorted(admin.keys("*"))}
    words = line.split() if not line.startswith("EVAL ") else ["EVAL", "return 0", "0"]

    with valkey.client(user) as client, pytest.raises(NoPermissionError):
        ask(client, *words)

    assert {key: admin.dump(key) for key in sorted(admin.keys("*"))} == before


# The server lets everybody say AUTH, HELLO, QUIT and RESET, whatever their rights are.
GREETING = {"auth", "hello", "ping", "quit", "reset", "select", "client|setinfo", "client|setname"}
TRANSACTION = {"multi", "exec", "discard"}
KEYLESS = {
    "publisher": GREETING | TRANSACTION,
    "product": GREETING | TRANSACTION,
    "worker": GREETING | TRANSACTION | {"unwatch", "info", "time", "script|load", "evalsha"},
    "readonly": GREETING | {"info", "dbsize", "time", "latency|latest", "latency|histogram", "slowlog|len"},
    "scaler": GREETING | {"eval", "evalsha"},
}


@pytest.mark.parametrize("user", KEYLESS)
def test_every_command_of_the_server_is_refused_elsewhere(admin: Redis, user: str) -> None:
    """Of all commands that the server has, on a key that is nobody's, only the named few pass."""
    passed = set()
    for name in map(text_of, ask(admin, "COMMAND LIST")):
        ((_, arity, *_),) = ask(admin, "COMMAND INFO", name)
        words = name.split("|")
        # A number serves as a count of keys, a time-out or a cursor; where a key is asked for it is one of nobody's.
        words += ["1"] * max(abs(arity) - len(words), 0)
        # A family such as CLIENT is listed too, and is no command by itself.
        with suppress(ResponseError):
            if text_of(ask(admin, "ACL DRYRUN", user, *words)) == "OK":
                passed.add(name)

    assert passed == KEYLESS[user]


def test_script_of_a_worker_has_no_more_rights_than_the_worker(valkey: DeployedValkey, admin: Redis) -> None:
    """A worker may run scripts, and a script may not do what the worker may not."""
    with valkey.client("worker") as client:
        for body in (
            "return redis.call('FLUSHALL')",
            f"return redis.call('DEL', '{Q}')",
            "return redis.call('KEYS', '*')",
        ):
            digest = client.script_load(body)
            with pytest.raises(ResponseError, match=r"(?i)acl|permission"):
                client.evalsha(digest, 0)

    assert len(refused_for(admin, "worker")) == 3


def test_queues_work_with_a_workers_rights(valkey: DeployedValkey, admin: Redis) -> None:
    """Claim, drop, release, recovery, the poison count, bindings, reading and leaving all run as the user `worker`."""
    with valkey.client("worker") as client:
        admin.lpush(Queue.TIMEOUT, "one")
        admin.lpush(QUEUE_KEYS[1], "two")
        workers = [Queues(client, f"worker-{number}", alive_ttl_s=60) for number in range(5)]
        first, *others = workers

        bound = first.bind()
        released = first.release(first.claim().token)
        first.refresh()
        dropped = first.drop(first.claim().token)
        admin.lpush(Queue.TIMEOUT, "poison")
        first.claim()
        crashes = []
        for number, next_worker in enumerate(others):
            admin.delete(f"kino:alive:worker-{number}")
            recovered, claim = next_worker.recover(), next_worker.claim()
            crashes.append((recovered.messages, claim.recovered, claim.crashes))
        seen = (len(read_queued(client).messages), depths(client)["in-flight"])
        settled = others[-1].drop(others[-1].claim().token)
        for each in workers:
            each.leave()

    assert bound == BindReport(restored=tuple(sorted(SERVED)), skipped=())
    assert (released, dropped, settled) == (2, True, True)
    assert crashes == [(1, True, 0), (1, True, 1), (1, True, 2), (1, True, 3)]
    assert seen == (1, 1)
    assert admin.keys("kino:*") == []
    assert refused_for(admin, "worker") == []


@pytest.mark.parametrize("user", USERS)
def test_doctor_knows_who_could_be_a_worker(valkey: DeployedValkey, admin: Redis, user: str) -> None:
    """The rights that the doctor asks for are those of `worker`, which is refused nothing; nobody else has them all."""
    with valkey.client(user) as client:
        try:
            refused = bool(refused_commands(client, RELAY_QUEUE))
        except NoPermissionError:
            refused = True

    assert refused == (user not in {"worker", "admin"})
    assert refused_for(admin, "worker") == []


def test_broker_restores_with_a_workers_rights(valkey: DeployedValkey, admin: Redis) -> None:
    """What Celery fetched and never acknowledged comes again, as the user `worker`."""
    options = {"global_keyprefix": "kino:celery:", "visibility_timeout": 0, "unacked_restore_throttle": 0}
    with KombuConnection(valkey.url_of("worker"), transport_options=options) as connection:
        queue = connection.SimpleQueue("sweeps")
        queue.put({"sweep": 1})
        fetched = queue.get(timeout=5)
        until(lambda: time.time() > fetched.delivery_info.get("at", 0))
        fetched.channel.qos.restore_visible(num=10)
        again = queue.get(timeout=5)
        again.ack()
        queue.clear()
        queue.close()

    assert again.payload == {"sweep": 1}
    assert refused_for(admin, "worker") == []


def test_monitoring_reads_lengths(valkey: DeployedValkey, admin: Redis) -> None:
    """`readonly` sees how much waits and how the server is; KEDA's script, as `scaler`, sees the length."""
    admin.lpush(Q, "first", "second")
    script = "local t = redis.call('type', KEYS[1]).ok; return redis.call(({list = 'llen', none = 'llen'})[t], KEYS[1])"

    with valkey.client("readonly") as monitor, valkey.client("scaler") as scaler:
        seen = (monitor.llen(Q), monitor.info("memory")["maxmemory_policy"], scaler.eval(script, 1, Q), scaler.llen(Q))

    assert seen == (2, "noeviction", 2, 2)
