"""A worker at the queues, and everything that Redis holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis import Redis

from kino_refunds.events.queues import SERVED, Claim, Message
from kino_refunds.events.schema import Queue
from tests.intake import die, queues_of


def messages(queue: Queue, *raws: bytes) -> tuple[Message, ...]:
    return tuple(Message(queue, raw) for raw in raws)


def numbered_raws(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}-{number}".encode() for number in range(count)]


def contents(client: Redis) -> dict[bytes, object]:
    """Every key with its whole value, whatever its type."""
    read: dict[Any, Callable[[Any], object]] = {
        b"string": client.get,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"hash": client.hgetall,
    }
    return {key: read[client.type(key)](key) for key in client.scan_iter()}


def counts(*, in_flight: int = 0, recovered: int = 0, **waiting: int) -> dict[str, int]:
    """Name what `depths` should count; what is not named is 0."""
    names: dict[str, int] = {queue: waiting.get(queue.name, 0) for queue in SERVED}
    return {**names, "in-flight": in_flight, "recovered": recovered}


KINDS = ("_kombu.binding", "_kombu.binding_permanent")
BINDINGS = [f"{kind}.{queue}" for kind in KINDS for queue in SERVED]


def claim_alone(client: Redis, worker_id: str) -> Claim:
    """Claim what waits, die with it, recover it, and claim one message of it."""
    queues_of(client, "first").claim()
    die(client, "first")
    queues_of(client, worker_id).recover()
    return queues_of(client, worker_id).claim()


def claim_alone_of_one(client: Redis) -> Claim:
    queues_of(client, "first").claim()
    die(client, "first")
    queues = queues_of(client)
    queues.recover()
    return queues.claim()
