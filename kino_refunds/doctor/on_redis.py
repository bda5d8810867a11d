"""Redis: whether it keeps every event, whether a worker may do its work there, and what is queued."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, Final

import redis

from kino_refunds.doctor.findings import Finding, expect
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.connection import redis_client
from kino_refunds.events.envelope import contents, parse
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, depths, read_queued
from kino_refunds.events.schema import Queue
from kino_refunds.settings import Settings, redacted

REDIS_MIN: Final = (6, 2)
"""Has LMOVE, which moves every event."""
ACL_SELECTORS_SINCE: Final = (7, 0)
"""An older server runs everything except deploy/users.acl, so this is a warning: you must write its rights yourself."""
SKEW_MAX: Final = timedelta(seconds=5)
MEMORY_SHARE_MAX: Final = 0.8
OLDEST_MAX: Final = timedelta(minutes=1)
"""Events are settled within seconds; one that is queued for a minute means that no worker takes events."""
_SHOWN = 3
_SCAN_STEP, _SCANS_MAX = 1_000, 1_000
"""A million keys, in about a second on the server's host; the finding says if there were more."""
_ALMOST = 0.85
"""A letter or two differ; `generation.jobs` is another name."""
_WORTH_A_LOOK: Final = re.compile("gen|era|tion|job|time|safe|rej", re.IGNORECASE)
"""A key that is almost a queue's name has at least one of these; the others of a million keys are skipped fast."""
_PRIORITY: Final = re.compile(r"\x06\x16\d+$")
_BETWEEN_WORDS: Final = re.compile(r"[^a-z0-9]+")
_LIBRARIES: Final = frozenset(
    {"arq", "bq", "bull", "bullmq", "celery", "dramatiq", "huey", "kue", "laravel", "q", "queue", "queues"}
    | {"resque", "rq", "sidekiq", "taskiq"}
)
"""The prefixes of other queue libraries, before a colon and the queue's name."""
_KEEP_MESSAGES: Final = (b"stream", b"zset", b"hash")
"""The types of key, beside a list, that a queue can be."""
_PLAIN_NAMES: Final = {queue.replace(".", "-"): queue for queue in SERVED}
_OURS: Final = ("kino:", "kino.", "_kombu.")
"""The prefixes of our own keys, some of which end with a queue's name."""


def check_redis(url: str, settings: Settings) -> Iterator[Finding]:
    """Connect as a worker does and look at the server, the user's rights, and the queues."""
    with redis_client(url) as client:
        if client.ping() is not True:
            raise redis.exceptions.InvalidResponse("no Redis answers there: PING has another answer than PONG")
        try:
            info: dict[str, Any] | None = client.info()
        except redis.exceptions.NoPermissionError:
            info = None  # INFO is one of the rights that are checked next
        primary = info is None or info["role"] == "master"
        if primary:
            refused = refused_commands(client, settings.relay_queue)
            yield expect(
                "redis rights",
                not refused,
                f"refused: {_listed(refused)}" if refused else "this user may do what a worker does",
                "connect as the user `worker` of this build's deploy/users.acl; `ACL LOG` names what was refused",
            )
        info = info or client.info()
        yield from _server(info, url)
        yield from _keeping(info)
        seconds, micros = client.time()
        now = datetime.fromtimestamp(seconds + micros / 1e6, UTC)
        skew = abs(now - datetime.now(UTC))
        yield expect(
            "redis clock",
            skew < SKEW_MAX,
            f"{skew.total_seconds():,.3f} s from this host's",
            "set both by NTP: 30 s apart presumed timeouts and expiry are withheld",
        )
        if primary:  # a replica may be behind, and would refuse the check of the rights
            yield _misspelt(client, settings.relay_queue)
            yield from _queues(client, now)


def _needed_commands(relay_queue: str | None) -> Iterator[tuple[str, ...]]:
    """Give the commands that workers and beat need, alone or inside a script; each would be harmless if it ran."""
    me = "doctor"
    yield from (("INFO",), ("TIME",), ("SCRIPT LOAD", "return 0"), ("EVALSHA", "0" * 40, "0"))
    for key in QUEUE_KEYS:
        inflight = f"kino:inflight:{me}:{key}"
        yield from (("TYPE", key), ("LLEN", key), ("LINDEX", key, "-1"), ("LRANGE", key, "0", "0"))
        # Both ways: a claimed batch may be released.
        yield from (("LMOVE", key, inflight, "RIGHT", "LEFT"), ("LMOVE", inflight, key, "LEFT", "RIGHT"))
    for queue in SERVED:
        yield ("LMOVE", f"kino:recovered:{queue}", f"kino:inflight:{me}:{queue}", "RIGHT", "LEFT")
        yield ("DEL", f"kino:inflight:{me}:{queue}")
        for key in (f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}"):
            yield from (("SMEMBERS", key), ("SADD", key, me))
    for key in (f"kino:alive:{me}", f"kino:token:{me}", f"kino:crashes:{me}"):
        yield from (("SET", key, "1"), ("GET", key), ("EXISTS", key), ("DEL", key))
    yield from (("SADD", "kino:workers", me), ("SREM", "kino:workers", me), ("SMEMBERS", "kino:workers"))
    # Celery's queue of sweeps, and its keys for sweeps that were fetched and not acknowledged.
    yield from (("LPUSH", "kino:celery:sweeps", me), ("BRPOP", "kino:celery:sweeps", "1"))
    yield from (("HSET", "kino:celery:unacked", me, me), ("HDEL", "kino:celery:unacked", me))
    yield from (("ZADD", "kino:celery:unacked_index", "1", me), ("ZREM", "kino:celery:unacked_index", me))
    yield ("SADD", "kino:celery:_kombu.binding.sweeps", me)
    if relay_queue is not None:
        yield ("LPUSH", relay_queue, me)


def refused_commands(client: redis.Redis, relay_queue: str | None) -> list[str]:
    """Return the commands that this user may not use; none of them runs.

    The server checks the right to a command when it is queued in a transaction, and this transaction is discarded. ACL
    DRYRUN would answer the same, but a worker has no right to it.
    """
    refused = []
    connection: Any = client.connection_pool.get_connection()
    try:
        _ask(connection, "MULTI")
        for name, *arguments in _needed_commands(relay_queue):
            try:
                _ask(connection, name, *arguments)
            except redis.exceptions.NoPermissionError:
                refused.append(" ".join((name, *arguments[:1])))
            except redis.ResponseError:
                continue  # a full server, for example, refuses it now; that is not about rights
    finally:
        # Without an EXEC no command has run, however this ends.
        connection.disconnect()
        client.connection_pool.release(connection)
    return refused


def _listed(commands: list[str]) -> str:
    rest = f" and {len(commands) - _SHOWN} more" if len(commands) > _SHOWN else ""
    return ", ".join(commands[:_SHOWN]) + rest


def _ask(connection: Any, command: str, *arguments: str) -> None:
    connection.send_command(*command.split(), *arguments)
    connection.read_response()


def _server(info: dict[str, Any], url: str) -> Iterator[Finding]:
    known_as = str(info["redis_version"])
    version = tuple(int(part) for part in known_as.split(".")[:2])
    name = f"Valkey {info['valkey_version']}, as Redis {known_as}," if "valkey_version" in info else known_as
    yield expect(
        "redis version",
        version >= ACL_SELECTORS_SINCE,
        f"{name} at {redacted(url)}",
        "Redis 6.2 or newer, or Valkey, is needed"
        if version < REDIS_MIN
        else "deploy/users.acl needs 7.0 (selectors), and nothing is tried with less than 7.2: upgrade",
        level="fail" if version < REDIS_MIN else "warn",
    )
    yield expect(
        "redis role",
        info["role"] == "master",
        "primary" if info["role"] == "master" else "replica; rights and queues were not checked",
        "a replica takes no writes: give KINO_REDIS_URL an address that follows the primary",
    )
    yield expect(
        "redis cluster",
        not info.get("cluster_enabled"),
        "on" if info.get("cluster_enabled") else "off",
        "the scripts span keys: use one primary with replicas (managed, or behind an address that follows it)",
    )


def _keeping(info: dict[str, Any]) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy", "unknown")
    yield expect(
        "redis eviction",
        policy == "noeviction",
        str(policy),
        "set maxmemory-policy noeviction: every other policy deletes events silently",
    )
    on, written = bool(info.get("aof_enabled")), info.get("aof_last_write_status", "ok") == "ok"
    yield expect(
        "redis persistence",
        on and written,
        ("append-only file on" if written else "the append-only file cannot be written")
        if on
        else "append-only file off",
        "see Redis' log and its disk: it refuses publishers until it can write"
        if on
        else "set appendonly yes: an event that a restart loses is found only after its job's deadline",
    )
    limit = int(info.get("maxmemory", 0))
    # As the server counts: the buffers of replicas and of the append-only file do not count against the limit.
    used = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
    full = bool(limit) and used >= limit
    yield expect(
        "redis memory",
        not limit or used / limit < MEMORY_SHARE_MAX,
        f"{'full: ' if full else ''}{used / 2**20:,.1f} MiB of {f'{limit / 2**20:,.1f} MiB' if limit else 'no limit'}",
        "a full Redis refuses publishers and beat's sweeps, while workers still drain it: see what is queued with"
        " `kino-refunds intake status`",
        level="fail" if full else "warn",
    )


def _misspelt(client: redis.Redis, relay_queue: str | None) -> Finding:
    """Look for keys whose names are almost our queues': no worker reads what a publisher writes there."""
    name = "queue names"
    if client.get_connection_kwargs().get("username") not in {None, "default"}:
        # By deploy/users.acl no publisher may write there, and `worker` may not list keys: a refusal would be logged.
        return Finding(name, "ok", "not checked: the ACL says where a publisher may write")
    meant, cursor = dict[bytes | str, Queue](), 0
    for _ in range(_SCANS_MAX):
        try:
            cursor, keys = client.scan(cursor, count=_SCAN_STEP)
        except redis.exceptions.NoPermissionError:
            return Finding(name, "ok", "not checked: this user may not list keys")
        for raw in keys:
            key = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
            if key not in {*QUEUE_KEYS, relay_queue} and (queue := meant_by(key)) is not None:
                meant[raw] = queue
        if not cursor:
            break
    lists, others = _told_apart(client, meant)
    advice = []
    if lists:
        moves = _listed([f"LMOVE {key!a} {queue} RIGHT LEFT" for key, queue in lists.items()])
        advice.append(f"if those are events: fix their publisher, then move each, as admin: {moves}")
    if others:
        ways = "EventPublisher, kombu without a key prefix, or a bare LPUSH"
        advice.append(
            f"another library wrote {_listed([ascii(key) for key in others])} in a form of its own: publish by {ways},"
            " and publish those events again"
        )
    return expect(
        name,
        not lists and not others,
        f"no worker reads {_listed([ascii(key) for key in (*lists, *others)])}"
        if lists or others
        else "no key has a name like theirs" + ("" if not cursor else ", among the keys that were checked"),
        "; ".join(advice),
        level="warn",
    )


def _told_apart(client: redis.Redis, meant: dict[bytes | str, Queue]) -> tuple[dict[str, Queue], dict[str, Queue]]:
    """Tell lists of events under a wrong name from what other libraries keep for a queue of our name.

    Of the latter a family of keys (`bull:generation.timeout:wait`, `:meta`, `:1` …) is one, written with a `*`.
    """
    lists, others = dict[str, Queue](), dict[str, Queue]()
    with client.pipeline(transaction=False) as pipeline:
        for raw in meant:
            pipeline.type(raw)
        types = pipeline.execute()
    for (raw, queue), held in zip(meant.items(), types, strict=True):
        key = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
        if _library(key) is None and held == b"list":
            lists[key] = queue
        elif _library(key) is not None or (held in _KEEP_MESSAGES and _nearest(key) is not None):
            parts = key.split(":")
            at = next((n for n, part in enumerate(parts) if _nearest(part)), len(parts) - 1)
            others[":".join(parts[: at + 1]) + (":*" if at + 1 < len(parts) else "")] = queue
    return dict(sorted(lists.items())), dict(sorted(others.items()))


def meant_by(key: str) -> Queue | None:
    """Return the queue whose name this key's almost is, or that it has in it as other libraries write their queues.

    `Generation_Job-Failed`, `bull:generation.job-failed:wait`, `rq:queue:generation.timeout` and, with a prefix of
    kombu's or anybody's, `prod:generation.timeout`; not a key of our own, nor one that only speaks of a queue.
    """
    if key.startswith(_OURS) or not _WORTH_A_LOOK.search(key):
        return None
    whole = _PRIORITY.sub("", key)
    if (found := _nearest(whole)) is not None:
        return found
    if _library(key) is not None:
        return next((found for part in whole.split(":")[1:] if (found := _nearest(part))), None)
    return next((queue for queue in SERVED if whole.lower().endswith(queue)), None)


def _nearest(name: str) -> Queue | None:
    plain = _plain(name)
    near = get_close_matches(plain, _PLAIN_NAMES, n=1, cutoff=_ALMOST)
    return _PLAIN_NAMES[near[0]] if near else None


def _library(key: str) -> str | None:
    first, colon, _ = key.partition(":")
    name = first.strip("{}").lower()
    return name if colon and any(name == each or name.startswith(f"{each}_") for each in _LIBRARIES) else None


def _plain(name: str) -> str:
    return _BETWEEN_WORDS.sub("-", name.lower())


def _queues(client: redis.Redis, now: datetime) -> Iterator[Finding]:
    found = read_queued(client)
    foreign = [*found.unreadable, *_foreign_bindings(client)]
    yield expect(
        "queue keys",
        not foreign,
        f"of the wrong type: {', '.join(map(ascii, foreign))}" if foreign else "all have the right type",
        "another program writes under our names: RENAME that key, as admin, and find out what it is",
    )
    waits = {name: count for name, count in depths(client).items() if count}
    if not waits:
        yield Finding("queues", "ok", "nothing is queued")
        return
    age = _oldest_age([message.raw for message in found.messages], now)
    oldest = "no age can be read" if age is None else f"the oldest event is {age.total_seconds():,.0f} s old"
    yield expect(
        "queues",
        age is None or age < OLDEST_MAX,
        f"{sum(waits.values()):,} queued ({', '.join(f'{name} {count:,}' for name, count in waits.items())}); {oldest}"
        + ("" if found.complete else ", of those that were read"),
        "see `kino-refunds intake status`: is intake open, are workers alive? Then start more of them",
        level="warn",
    )


def _foreign_bindings(client: redis.Redis) -> Iterator[str]:
    """Name kombu's bindings that are no sets: a publisher cannot declare its queue then."""
    for queue in SERVED:
        try:
            client.smembers(f"_kombu.binding.{queue}")
        except redis.exceptions.NoPermissionError:
            continue  # reported under `redis rights`
        except redis.ResponseError:
            yield f"_kombu.binding.{queue}"


def _oldest_age(raws: list[bytes], now: datetime) -> timedelta | None:
    times = []
    for raw in raws:
        for content in contents(raw):
            try:
                times.append(parse(content).time)
            except MalformedMessage:
                continue  # it becomes a dead letter when it is claimed
    return now - min(times) if times else None
