"""The Redis side of intake: a worker claims a batch, and drops it only after its outcomes are in Postgres.

Where a message is at every instant (promise P6), while Redis keeps its data:

    queue  --claim-->  in-flight list of one worker  --drop (after COMMIT)-->  gone
      ^                   |            |   ^
      '-----release-------'     recover|   |claim, one at a time
                                       v   |
                                 recovered list

Every list is pushed on its left and read on its right, as kombu does: the tail is the oldest message.

Each arrow is one script (scripts/*.lua), so a message is never between two places. Every script that writes keeps three
rules:

- If a key of our own name has the wrong type, the script refuses (`WrongKeyType`) before it writes anything.
- Its first write is a DEL, of a key that may be missing. A full Redis refuses a script that needs memory, but only at
  its first write: after a DEL, which needs none, the rest is accepted. So workers can still drain a full Redis. A
  shebang line would switch this off.
- A drop, release or begin names the token of its batch. redis-py repeats a command whose answer it did not receive, and
  a drop that arrives late must not delete the batch that was claimed after it.

Redis Cluster is not supported: the scripts span keys and build the names of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

import redis

from kino_refunds.errors import WrongKeyType
from kino_refunds.events.envelope import ELEMENTS_MAX
from kino_refunds.events.queue_names import CLAIM_LIMIT_MAX
from kino_refunds.events.queue_names import QUEUE_KEYS as QUEUE_KEYS  # noqa: PLC0414 - found here by who reads queues
from kino_refunds.events.queue_names import SERVED as SERVED  # noqa: PLC0414
from kino_refunds.events.schema import Queue

# A recovered message that has ended this many workers, each time alone in flight, is not settled again.
POISON_CRASHES: Final = 3
# How long a crash is counted: long enough for a message to be claimed again behind a recovered backlog.
_CRASH_TTL_S: Final = 3600
# The end of a token whose batch is one recovered message: only a crash with such a token is counted. If the message
# holds several events, the key of the token also says which of them is in work, `<time>:<index>:alone`, and the crash
# is counted for that event. The token that the worker knows has no index.
_ALONE: Final = ":alone"


@dataclass(frozen=True, slots=True)
class Message:
    """The bytes of a message as they were on the wire, and the base queue that they came by."""

    queue: Queue
    raw: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """A batch in this worker's in-flight lists, in the order of `SERVED`, and the oldest first in each queue.

    `token` is empty if no message is queued. `again`: this batch was returned before and not dropped. `recovered`: it
    is one message of a dead worker, alone in flight; `crashes` is how many workers ended while it was alone. `skipped`
    names the queue keys that do not hold a list.
    """

    token: str
    messages: tuple[Message, ...]
    again: bool = False
    recovered: bool = False
    crashes: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of one recovery.

    `workers` are the dead workers that had messages in flight; an idle worker that ended needs no attention. `messages`
    is how many messages were moved. `skipped` names keys of dead workers that have the wrong type.
    """

    workers: tuple[str, ...]
    messages: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BindReport:
    """Queues whose kombu binding was missing and is restored, and the keys of bindings that have the wrong type."""

    restored: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueuedMessages:
    """Every message in Redis that is not decided yet; if not `complete`, only some of them.

    `unreadable` names keys of the wrong type. An incomplete reading proves nothing: a timeout that was presumed from it
    could refund a job whose completion is queued.
    """

    messages: tuple[Message, ...]
    complete: bool
    unreadable: tuple[str, ...]


class Queues:
    """The queues as one worker uses them. `worker_id` is new for every process, never a host's name.

    Each method runs one script, and raises WrongKeyType or redis-py's RedisError; then nothing was moved, unless only
    the answer was lost.
    """

    def __init__(self, client: redis.Redis, worker_id: str, *, alive_ttl_s: float) -> None:
        self._worker_id = worker_id
        self._alive_ms = int(alive_ttl_s * 1000)
        # A new process takes new work first: a message that ends workers must not block a worker that was restarted.
        self._recovered_next = False
        self._claim = client.register_script(_script("names", "own", "claim"))
        self._begin = client.register_script(_script("names", "own", "begin"))
        self._drop = client.register_script(_script("names", "own", "drop"))
        self._release = client.register_script(_script("names", "own", "release"))
        self._refresh = client.register_script(_script("names", "own", "refresh"))
        self._bind = client.register_script(_script("names", "own", "bind"))
        self._leave = client.register_script(_script("names", "own", "leave"))
        self._recover = client.register_script(_script("names", "own", "recover"))

    def claim(self, limit: int = 500, max_bytes: int = 8 * 2**20) -> Claim:
        """Return the batch in flight, whatever its size; if there is none, move up to `limit` queued messages there.

        The first message is always taken, even above `max_bytes`. With a `limit` of 4 or more, every queue that is not
        empty has its share in every batch. While there are both, recovered messages and normal batches alternate. If no
        message is queued, nothing is written, so this may be polled.
        """
        if not 1 <= limit <= CLAIM_LIMIT_MAX:
            raise ValueError(f"a claim takes 1 to {CLAIM_LIMIT_MAX} messages, not {limit}")
        token, again, crashes, skipped, lists = self._run(
            self._claim, (limit, max_bytes, self._alive_ms, int(self._recovered_next)), parts=5
        )
        claim = Claim(
            token=token.decode(),
            messages=tuple(_messages(reversed(raws) for raws in lists)),
            again=bool(again),
            recovered=token.endswith(_ALONE.encode()),
            crashes=crashes,
            skipped=_names(skipped),
        )
        if claim.messages:
            self._recovered_next = not claim.recovered
        return claim

    def begin(self, token: str, index: int | None) -> int | None:
        """Note which event of the one recovered message is in work from now on, and refresh the alive key.

        Returns how many workers ended with that event in work; None if the batch is not in flight under this token.
        With an `index` of None no event is in work: a crash is counted for the whole message again.
        """
        crashes = self._run(self._begin, (token, self._alive_ms, "" if index is None else index))
        return None if crashes < 0 else int(crashes)

    def drop(self, token: str) -> bool:
        """Delete the batch, whose outcomes are in Postgres; call this only after the COMMIT (P6).

        Returns False if it is not in flight under this token (any more): this very call dropped it and its answer was
        lost, or another worker recovered it after this one seemed dead. Neither case needs an action.
        """
        return bool(self._run(self._drop, (token, ELEMENTS_MAX)))

    def release(self, token: str) -> int:
        """Put an undecided batch back to be claimed next, in its order; return how many messages."""
        return int(self._run(self._release, (token,)))

    def refresh(self) -> None:
        """Set the alive key for another alive TTL; called between sub-batches, and while the worker backs off."""
        self._run(self._refresh, (self._alive_ms,))

    def bind(self) -> BindReport:
        """Restore kombu's bindings of our queues that are missing; writes nothing if none is missing.

        A FLUSHALL deletes the bindings, and without its binding a running kombu `SimpleQueue` drops its messages
        without an error. A binding's key of the wrong type is left unchanged and named in the report.
        """
        restored, skipped = self._run(self._bind, (self._alive_ms,), parts=2)
        return BindReport(restored=_names(restored), skipped=_names(skipped))

    def leave(self) -> None:
        """Note that this worker ends: messages still in flight are recovered at once, and no crash is counted."""
        self._run(self._leave)

    def recover(self) -> Recovery:
        """Move what dead workers had in flight to the recovered lists; any worker may call it at any time."""
        workers, messages, skipped = self._run(self._recover, (_CRASH_TTL_S,), parts=3)
        return Recovery(workers=_names(workers), messages=messages, skipped=_names(skipped))

    def _run(self, script: Any, arguments: Sequence[str | int] = (), *, parts: int = 0) -> Any:
        try:
            return _answer(script, (self._worker_id, *arguments), parts=parts)
        except redis.ResponseError as error:
            if str(error).startswith("WRONG TYPE "):
                raise WrongKeyType(str(error).removeprefix("WRONG TYPE ")) from error
            raise


def read_queued(client: redis.Redis, *, limit: int = 10_000, max_bytes: int = 16 * 2**20) -> QueuedMessages:
    """Return every message on the queues, in flight and recovered, at one instant; move nothing.

    Reads up to `limit` messages and about `max_bytes`. With more than that queued, the system is behind, and the caller
    needs no exact answer. Raises RedisError.
    """
    script = client.register_script(_script("names", "queued"))
    complete, unreadable, lists = _answer(script, (limit, max_bytes), parts=3)
    return QueuedMessages(messages=tuple(_messages(lists)), complete=bool(complete), unreadable=_names(unreadable))


def in_flight(client: redis.Redis, worker_id: str) -> list[bytes]:
    """Return the messages that one worker has claimed and not dropped, at one instant: a whole batch or none of it."""
    with client.pipeline(transaction=True) as pipeline:
        for queue in SERVED:
            pipeline.lrange(f"kino:inflight:{worker_id}:{queue}", 0, -1)
        return [raw for raws in pipeline.execute() for raw in raws]


def depths(client: redis.Redis) -> dict[str, int]:
    """Return how many messages each base queue has, and `in-flight` and `recovered`, at one instant."""
    counts = _answer(client.register_script(_script("names", "depths")), parts=len(SERVED) + 2)
    return dict(zip((*SERVED, "in-flight", "recovered"), counts, strict=True))


def _answer(script: Any, arguments: Sequence[str | int] = (), *, parts: int = 0) -> Any:
    """Run a script and return its answer; raises RedisError if it should be a list of so many `parts` and is not."""
    try:
        answer = script(keys=QUEUE_KEYS, args=arguments)
    except redis.exceptions.NoScriptError:
        # redis-py loads a missing script once, and in a failover it may have loaded it at the old primary.
        answer = script(keys=QUEUE_KEYS, args=arguments)
    if parts and (not isinstance(answer, list) or len(answer) != parts):
        raise redis.exceptions.InvalidResponse("the server at this address is not a Redis: it does not run scripts")
    return answer


def _messages(lists: Iterator[Iterator[bytes]] | Sequence[Sequence[bytes]]) -> Iterator[Message]:
    for queue, raws in zip(SERVED, lists, strict=True):
        for raw in raws:
            yield Message(queue, raw)


def _names(keys: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(sorted(key.decode(errors="backslashreplace") for key in keys))


@cache
def _script(*parts: str) -> str:
    """Return a script, joined from its files: the names first, then the part that all scripts of a worker share."""
    folder = resources.files("kino_refunds.events") / "scripts"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in parts)
