"""The Redis side of intake: a batch is claimed, and dropped only once Postgres has decided it.

Where a message is, at every instant (promise P6), while Redis keeps its data:

    queue  --claim-->  in-flight list of one worker  --drop (after COMMIT)-->  gone
      ^                   |            |   ^
      '-----release-------'     recover|   |claim, one at a time
                                       v   |
                                 recovered list

Every list is pushed on its left and read on its right, as kombu does: the tail is the oldest message.

Each arrow is one script (scripts/*.lua), so nothing is ever between two places. Three rules hold in all that write:

- A key of our own name that holds something else refuses (`WrongKeyType`) before anything is written.
- The first write is a DEL, of a key that may well be missing. Redis refuses a script that would use memory
  while it is full, but only at its first write: after a DEL, which needs none, the rest goes through. So a
  full Redis can still be drained. A shebang line would switch this off.
- A drop, release or begin names the token of its batch. redis-py repeats a command whose answer it did not see, and
  a drop that arrives late must not delete the batch that was claimed since.

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
from kino_refunds.events.schema import Queue

# A claim serves them in this order: a customer waits for a refund, nobody waits for a capture.
SERVED: Final = (Queue.JOB_FAILED, Queue.TIMEOUT, Queue.SAFETY_REJECTION, Queue.JOB_COMPLETED)
# kombu keeps one list per priority; 0, the plain name, is served first.
PRIORITY_SUFFIXES: Final = ("", "\x06\x163", "\x06\x166", "\x06\x169")
QUEUE_KEYS: Final = tuple(queue + suffix for queue in SERVED for suffix in PRIORITY_SUFFIXES)

# 1,000 messages hold Redis for some 4 ms (measured); while a script runs nobody else is served.
CLAIM_LIMIT_MAX: Final = 1000
# A recovered message that has ended this many workers, each time alone in flight, is not tried again.
POISON_CRASHES: Final = 3
# How long a crash is remembered. Long enough to meet a message again behind a recovered backlog.
_CRASH_TTL_S: Final = 3600
# The tail of a token whose batch is one recovered message: only a crash with such a token counts. Where the message
# holds several events, the token's key also says which of them is in work, `<time>:<index>:alone`; then the crash is
# that element's. What a worker knows as its token stays without the index.
_ALONE: Final = ":alone"


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes as they were on the wire, and the base queue they came by."""

    queue: Queue
    raw: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """A batch in this worker's in-flight lists; by queue as `SERVED`, the oldest first in each.

    `token` is empty when nothing waits. `again`: this batch was returned before and never dropped.
    `recovered`: it is one message that another worker died with, alone in flight; `crashes` says how many
    workers ended while it was alone. `skipped` names the queue keys that hold something other than a list.
    """

    token: str
    messages: tuple[Message, ...]
    again: bool = False
    recovered: bool = False
    crashes: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one recovery did.

    `workers` are those that had messages in flight: an idle one that ended needs nobody's attention. `skipped`
    names own keys of dead workers that hold something foreign.
    """

    workers: tuple[str, ...]
    messages: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BindReport:
    """Queues whose kombu binding was missing and is back, and the keys of bindings that hold something foreign."""

    restored: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QueuedMessages:
    """Every message not yet decided, or, where not `complete`, only some of them.

    `unreadable` names keys of the wrong type. Nothing may be concluded from an incomplete reading.
    """

    messages: tuple[Message, ...]
    complete: bool
    unreadable: tuple[str, ...]


class Queues:
    """One worker's hold on the queues. `worker_id` is new for every process, never a host's name."""

    def __init__(self, client: redis.Redis, worker_id: str, *, alive_ttl_s: float) -> None:
        self._worker_id = worker_id
        self._alive_ms = int(alive_ttl_s * 1000)
        # A fresh process takes new work first: a poisonous message must not hold up a restarted worker.
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
        """Return the batch in flight, whatever its size; else move up to `limit` waiting messages there.

        The first message always goes, also above `max_bytes`. From a `limit` of 4 on, every queue that waits
        has its share in every batch. Recovered messages alternate with normal batches while both wait. When
        nothing waits, nothing is written, so this may be polled.
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
        """Say which event of the one recovered message is in work from now on, and that this worker lives.

        Returns how many workers ended with that event in work; None if the batch is not in flight under this token.
        An `index` of None says that it is none of them: a crash is the whole message's again.
        """
        crashes = self._run(self._begin, (token, self._alive_ms, "" if index is None else index))
        return None if crashes < 0 else int(crashes)

    def drop(self, token: str) -> bool:
        """Forget the batch, which Postgres has decided.

        False: it is not in flight under this token (any more). It was dropped before, by this very call when
        its answer was lost, or handed on after this worker seemed dead. Neither needs anything done.
        """
        return bool(self._run(self._drop, (token, ELEMENTS_MAX)))

    def release(self, token: str) -> int:
        """Put an undecided batch back where it is claimed next, in its order; return how many messages."""
        return int(self._run(self._release, (token,)))

    def refresh(self) -> None:
        """Say that this worker lives, for another alive TTL; between sub-batches, and while it backs off."""
        self._run(self._refresh, (self._alive_ms,))

    def bind(self) -> BindReport:
        """Put back kombu's bindings of our queues that are missing; writes nothing where none is.

        Without its binding, which a FLUSHALL takes, a live kombu `SimpleQueue` drops what it is given without
        an error. A binding's key that holds something foreign is left alone and named.
        """
        restored, skipped = self._run(self._bind, (self._alive_ms,), parts=2)
        return BindReport(restored=_names(restored), skipped=_names(skipped))

    def leave(self) -> None:
        """Say that this worker ends. What is still in flight is recovered at once and counts as no crash."""
        self._run(self._leave)

    def recover(self) -> Recovery:
        """Move what dead workers had in flight to the recovered lists. Any worker may, at any time."""
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
    """Read every message on the queues, in flight and recovered, at one instant; move nothing.

    Up to `limit` messages and about `max_bytes`: more than that waiting means that we are behind, and whoever
    asks needs to know no more.
    """
    script = client.register_script(_script("names", "queued"))
    complete, unreadable, lists = _answer(script, (limit, max_bytes), parts=3)
    return QueuedMessages(messages=tuple(_messages(lists)), complete=bool(complete), unreadable=_names(unreadable))


def in_flight(client: redis.Redis, worker_id: str) -> list[bytes]:
    """Read the messages that one worker has claimed and not dropped, at one instant: a batch is seen whole or not."""
    with client.pipeline(transaction=True) as pipeline:
        for queue in SERVED:
            pipeline.lrange(f"kino:inflight:{worker_id}:{queue}", 0, -1)
        return [raw for raws in pipeline.execute() for raw in raws]


def depths(client: redis.Redis) -> dict[str, int]:
    """Count the messages on each base queue, and under `in-flight` and `recovered`, at one instant."""
    counts = _answer(client.register_script(_script("names", "depths")), parts=len(SERVED) + 2)
    return dict(zip((*SERVED, "in-flight", "recovered"), counts, strict=True))


def _answer(script: Any, arguments: Sequence[str | int] = (), *, parts: int = 0) -> Any:
    """Run a script and return its answer, a list of so many `parts` where it is one; raises RedisError otherwise."""
    try:
        answer = script(keys=QUEUE_KEYS, args=arguments)
    except redis.exceptions.NoScriptError:
        # redis-py loads a missing script once; in a failover that may have been at the old primary.
        answer = script(keys=QUEUE_KEYS, args=arguments)
    if parts and (not isinstance(answer, list) or len(answer) != parts):
        raise redis.exceptions.InvalidResponse("no Redis answers there: it does not run scripts")
    return answer


def _messages(lists: Iterator[Iterator[bytes]] | Sequence[Sequence[bytes]]) -> Iterator[Message]:
    for queue, raws in zip(SERVED, lists, strict=True):
        for raw in raws:
            yield Message(queue, raw)


def _names(keys: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(sorted(key.decode(errors="backslashreplace") for key in keys))


@cache
def _script(*parts: str) -> str:
    """Put a script together from its files: the names first, then what a worker's scripts share, then its own part."""
    folder = resources.files("kino_refunds.events") / "scripts"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in parts)
