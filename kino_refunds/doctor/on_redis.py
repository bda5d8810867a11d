"""Redis: would it keep every event, may a worker do its work there, and what waits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, Final

import redis

from kino_refunds.doctor.findings import Finding, judge
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.client import redis_client
from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, depths, waiting
from kino_refunds.settings import Settings, redacted

REDIS_MIN: Final = (6, 2)
"""LMOVE, with which every event travels."""
ACL_SELECTORS_SINCE: Final = (7, 0)
"""An older server runs everything but deploy/users.acl, so it is a warning: who may do what is then up to you."""
SKEW_MAX: Final = timedelta(seconds=5)
MEMORY_SHARE_MAX: Final = 0.8
OLDEST_MAX: Final = timedelta(minutes=1)
"""Events are settled within seconds; one that waits for a minute means that nobody takes them."""
_SHOWN = 3
_SCAN_STEP, _SCANS_MAX = 1_000, 1_000
"""A million keys, in about a second beside the server; who keeps more there than events is told how far we looked."""
_ALMOST = 0.85
"""A letter or two: `generation.jobs` is a name of its own."""
_OURS: Final = ("kino:", "kino.", "_kombu.")
"""What keys begin with that we write, some of which end with a queue's name."""


def check_redis(url: str, settings: Settings) -> Iterator[Finding]:
    """Connect as a worker does and look at the server, the user's rights, and the queues."""
    with redis_client(url) as client:
        client.ping()
        refused = refused_commands(client, settings.relay_queue)
        yield judge(
            "redis rights",
            not refused,
            f"refused: {_listed(refused)}" if refused else "this user may do what a worker does",
            "connect as the user `worker` of this build's deploy/users.acl; `ACL LOG` names what was refused",
        )
        info: dict[str, Any] = client.info()
        yield from _server(info, url)
        yield from _keeping(info)
        seconds, micros = client.time()
        now = datetime.fromtimestamp(seconds + micros / 1e6, UTC)
        skew = abs(now - datetime.now(UTC))
        yield judge(
            "redis clock",
            skew < SKEW_MAX,
            f"{skew.total_seconds():,.3f} s from this host's",
            "set both by NTP: 30 s apart presumed timeouts and expiry are withheld",
        )
        yield _misspelt(client, settings.relay_queue)
        yield from _queues(client, now)


def _needed_commands(relay_queue: str | None) -> Iterator[tuple[str, ...]]:
    """What workers and beat do, by hand or inside a script, as commands that would be harmless if they ran."""
    me = "doctor"
    yield from (("INFO",), ("TIME",), ("SCRIPT LOAD", "return 0"), ("EVALSHA", "0" * 40, "0"))
    for key in QUEUE_KEYS:
        inflight = f"kino:inflight:{me}:{key}"
        yield from (("TYPE", key), ("LLEN", key), ("LINDEX", key, "-1"), ("LRANGE", key, "0", "0"))
        # Both ways: what was claimed may have to go back.
        yield from (("LMOVE", key, inflight, "RIGHT", "LEFT"), ("LMOVE", inflight, key, "LEFT", "RIGHT"))
    for queue in SERVED:
        yield ("LMOVE", f"kino:recovered:{queue}", f"kino:inflight:{me}:{queue}", "RIGHT", "LEFT")
        yield from (("DEL", f"kino:inflight:{me}:{queue}"), ("SADD", f"_kombu.binding.{queue}", me))
    for key in (f"kino:alive:{me}", f"kino:token:{me}", f"kino:crashes:{me}"):
        yield from (("SET", key, "1"), ("GET", key), ("EXISTS", key), ("DEL", key))
    yield from (("SADD", "kino:workers", me), ("SREM", "kino:workers", me), ("SMEMBERS", "kino:workers"))
    # Celery's sweeps, and what it keeps about those that were fetched and not acknowledged.
    yield from (("LPUSH", "kino:celery:sweeps", me), ("BRPOP", "kino:celery:sweeps", "1"))
    yield from (("HSET", "kino:celery:unacked", me, me), ("HDEL", "kino:celery:unacked", me))
    yield from (("ZADD", "kino:celery:unacked_index", "1", me), ("ZREM", "kino:celery:unacked_index", me))
    yield ("SADD", "kino:celery:_kombu.binding.sweeps", me)
    if relay_queue is not None:
        yield ("LPUSH", relay_queue, me)


def refused_commands(client: redis.Redis, relay_queue: str | None) -> list[str]:
    """Name the commands that this user may not use, as the server sees it; none of them runs.

    The server judges a command when it is put into a transaction, and ours is discarded. ACL DRYRUN would say
    the same, and is nothing that a worker may use.
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
                continue  # a full server, for one, would refuse it now; that is no question of rights
    finally:
        # Without an EXEC nothing has happened, whatever ends this.
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
    yield judge(
        "redis version",
        version >= ACL_SELECTORS_SINCE,
        f"{name} at {redacted(url)}",
        "Redis 6.2 or newer, or Valkey, is needed"
        if version < REDIS_MIN
        else "deploy/users.acl needs 7.0 (selectors), and nothing is tried with less than 7.2: upgrade",
        level="fail" if version < REDIS_MIN else "warn",
    )
    yield judge(
        "redis role",
        info["role"] == "master",
        "primary" if info["role"] == "master" else "replica",
        "a replica takes no writes: give KINO_REDIS_URL an address that follows the primary",
    )
    yield judge(
        "redis cluster",
        not info.get("cluster_enabled"),
        "on" if info.get("cluster_enabled") else "off",
        "the scripts span keys: use one primary with replicas (managed, or behind an address that follows it)",
    )


def _keeping(info: dict[str, Any]) -> Iterator[Finding]:
    policy = info.get("maxmemory_policy", "unknown")
    yield judge(
        "redis eviction",
        policy == "noeviction",
        str(policy),
        "set maxmemory-policy noeviction: any other throws events away without a word",
    )
    on, written = bool(info.get("aof_enabled")), info.get("aof_last_write_status", "ok") == "ok"
    yield judge(
        "redis persistence",
        on and written,
        ("append-only file on" if written else "the append-only file cannot be written")
        if on
        else "append-only file off",
        "see Redis' log and its disk: until it can write it refuses publishers"
        if on
        else "set appendonly yes: what a restart forgets is found only after its job's deadline",
    )
    limit = int(info.get("maxmemory", 0))
    # As the server counts: buffers of replicas and of the append-only file are beside the limit.
    used = int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))
    full = bool(limit) and used >= limit
    yield judge(
        "redis memory",
        not limit or used / limit < MEMORY_SHARE_MAX,
        f"{'full: ' if full else ''}{used / 2**20:,.1f} MiB of {f'{limit / 2**20:,.1f} MiB' if limit else 'no limit'}",
        "a full Redis refuses publishers, and beat cannot hand out sweeps, while workers still drain it:"
        " see what waits with `kino-refunds intake status`",
        level="fail" if full else "warn",
    )


def _misspelt(client: redis.Redis, relay_queue: str | None) -> Finding:
    """Look for lists whose names are almost a queue's: nobody reads what a publisher writes there."""
    name = "queue names"
    if client.get_connection_kwargs().get("username") not in {None, "default"}:
        # By deploy/users.acl no publisher may write there, and `worker` may not list keys: a refusal would be logged.
        return Finding(name, "ok", "not looked at: the ACL says where a publisher may write")
    lists, cursor = set[str](), 0
    for _ in range(_SCANS_MAX):
        try:
            cursor, keys = client.scan(cursor, count=_SCAN_STEP, _type="list")
        except redis.exceptions.NoPermissionError:
            return Finding(name, "ok", "not looked at: this user may not list keys")
        lists |= {key.decode(errors="backslashreplace") for key in keys if isinstance(key, bytes)}
        if not cursor:
            break
    meant = {}
    for key in sorted(lists - {*QUEUE_KEYS, relay_queue}):
        if not key.startswith(_OURS) and (nearest := get_close_matches(key, SERVED, n=1, cutoff=_ALMOST)):
            meant[key] = nearest[0]
    return judge(
        name,
        not meant,
        f"nobody reads {_listed([ascii(key) for key in meant])}"
        if meant
        else "no list has a name like theirs" + ("" if not cursor else ", of the keys that were looked at"),
        "if those are events: mend their publisher, then move each, as admin: "
        + _listed([f"LMOVE {key!a} {queue} RIGHT LEFT" for key, queue in meant.items()]),
        level="warn",
    )


def _queues(client: redis.Redis, now: datetime) -> Iterator[Finding]:
    found = waiting(client)
    foreign = [*found.unreadable, *_foreign_bindings(client)]
    yield judge(
        "queue keys",
        not foreign,
        f"they hold something foreign: {', '.join(map(ascii, foreign))}" if foreign else "all are what they must be",
        "somebody else writes under our names: RENAME that key away, as admin, and look at what it is",
    )
    waits = {name: count for name, count in depths(client).items() if count}
    if not waits:
        yield Finding("queues", "ok", "nothing waits")
        return
    age = _oldest_age([message.raw for message in found.messages], now)
    oldest = "no age can be read" if age is None else f"the oldest event is {age.total_seconds():,.0f} s old"
    yield judge(
        "queues",
        age is None or age < OLDEST_MAX,
        f"{sum(waits.values()):,} wait ({', '.join(f'{name} {count:,}' for name, count in waits.items())}); {oldest}"
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
            continue  # said as `redis rights`
        except redis.ResponseError:
            yield f"_kombu.binding.{queue}"


def _oldest_age(raws: list[bytes], now: datetime) -> timedelta | None:
    times = []
    for raw in raws:
        try:
            times.append(parse(raw).time)
        except MalformedMessage:
            continue  # it becomes a dead letter when it is claimed
    return now - min(times) if times else None
