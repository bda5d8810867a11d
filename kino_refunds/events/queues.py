"""The Redis side of intake: a batch is claimed, and dropped only once Postgres has decided it.

Where a message is, at every instant (promise P6), while Redis keeps its data:

    queue  --claim-->  in-flight list of one worker  --drop (after COMMIT)-->  gone
      ^                   |            |   ^
      '-----release-------'     recover|   |claim, one at a time
                                       v   |
                                 recovered list

Every list is pushed on its left and read on its right, as kombu does: the tail is the oldest message.

Each arrow is one script, so nothing is ever between two places. Three rules hold in all that write:

- A key of our own name that holds something else refuses (`ForeignKey`) before anything is written.
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
from typing import Any, Final

import redis

from kino_refunds.errors import ForeignKey
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
class Recovered:
    """What one recovery did.

    `workers` are those that had messages in flight: an idle one that ended needs nobody's attention. `skipped`
    names own keys of dead workers that hold something foreign.
    """

    workers: tuple[str, ...]
    messages: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """Queues whose kombu binding was missing and is back, and the keys of bindings that hold something foreign."""

    restored: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
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
        self._claim = client.register_script(_OWN + _CLAIM)
        self._begin = client.register_script(_OWN + _BEGIN)
        self._drop = client.register_script(_OWN + _DROP)
        self._release = client.register_script(_OWN + _RELEASE)
        self._refresh = client.register_script(_OWN + _REFRESH)
        self._bind = client.register_script(_OWN + _BIND)
        self._leave = client.register_script(_OWN + _LEAVE)
        self._recover = client.register_script(_OWN + _RECOVER)

    def claim(self, limit: int = 500, max_bytes: int = 8 * 2**20) -> Claim:
        """Return the batch in flight, whatever its size; else move up to `limit` waiting messages there.

        The first message always goes, also above `max_bytes`. From a `limit` of 4 on, every queue that waits
        has its share in every batch. Recovered messages alternate with normal batches while both wait. When
        nothing waits, nothing is written, so this may be polled.
        """
        if not 1 <= limit <= CLAIM_LIMIT_MAX:
            raise ValueError(f"a claim takes 1 to {CLAIM_LIMIT_MAX} messages, not {limit}")
        token, again, crashes, skipped, lists = self._run(
            self._claim, limit, max_bytes, self._alive_ms, int(self._recovered_next), parts=5
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
        crashes = self._run(self._begin, token, self._alive_ms, "" if index is None else index)
        return None if crashes < 0 else int(crashes)

    def drop(self, token: str) -> bool:
        """Forget the batch, which Postgres has decided.

        False: it is not in flight under this token (any more). It was dropped before, by this very call when
        its answer was lost, or handed on after this worker seemed dead. Neither needs anything done.
        """
        return bool(self._run(self._drop, token))

    def release(self, token: str) -> int:
        """Put an undecided batch back where it is claimed next, in its order; return how many messages."""
        return int(self._run(self._release, token))

    def refresh(self) -> None:
        """Say that this worker lives, for another alive TTL; between sub-batches, and while it backs off."""
        self._run(self._refresh, self._alive_ms)

    def bind(self) -> Bound:
        """Put back kombu's bindings of our queues that are missing; writes nothing where none is.

        Without its binding, which a FLUSHALL takes, a live kombu `SimpleQueue` drops what it is given without
        an error. A binding's key that holds something foreign is left alone and named.
        """
        restored, skipped = self._run(self._bind, self._alive_ms, parts=2)
        return Bound(restored=_names(restored), skipped=_names(skipped))

    def leave(self) -> None:
        """Say that this worker ends. What is still in flight is recovered at once and counts as no crash."""
        self._run(self._leave)

    def recover(self) -> Recovered:
        """Move what dead workers had in flight to the recovered lists. Any worker may, at any time."""
        workers, messages, skipped = self._run(self._recover, _CRASH_TTL_S, parts=3)
        return Recovered(workers=_names(workers), messages=messages, skipped=_names(skipped))

    def _run(self, script: Any, *arguments: str | int, parts: int = 0) -> Any:
        try:
            return _answer(script, self._worker_id, *arguments, parts=parts)
        except redis.ResponseError as error:
            if str(error).startswith("FOREIGN "):
                raise ForeignKey(str(error).removeprefix("FOREIGN ")) from error
            raise


def waiting(client: redis.Redis, *, limit: int = 10_000, max_bytes: int = 16 * 2**20) -> Waiting:
    """Read every message on the queues, in flight and recovered, at one instant; move nothing.

    Up to `limit` messages and about `max_bytes`: more than that waiting means that we are behind, and whoever
    asks needs to know no more.
    """
    complete, unreadable, lists = _answer(client.register_script(_WAITING), limit, max_bytes, parts=3)
    return Waiting(messages=tuple(_messages(lists)), complete=bool(complete), unreadable=_names(unreadable))


def in_flight(client: redis.Redis, worker_id: str) -> list[bytes]:
    """Read the messages that one worker has claimed and not dropped, at one instant: a batch is seen whole or not."""
    with client.pipeline(transaction=True) as pipeline:
        for queue in SERVED:
            pipeline.lrange(f"kino:inflight:{worker_id}:{queue}", 0, -1)
        return [raw for raws in pipeline.execute() for raw in raws]


def depths(client: redis.Redis) -> dict[str, int]:
    """Count the messages on each base queue, and under `in-flight` and `recovered`, at one instant."""
    counts = _answer(client.register_script(_DEPTHS), parts=len(SERVED) + 2)
    return dict(zip((*SERVED, "in-flight", "recovered"), counts, strict=True))


def _answer(script: Any, *arguments: str | int, parts: int = 0) -> Any:
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


# In every script: KEYS are QUEUE_KEYS, so every fourth is a base queue.
_NAMES: Final = """
local queues = {}
for i = 1, #KEYS, 4 do queues[#queues + 1] = KEYS[i] end

local registry = 'kino:workers'
local function alive(worker) return 'kino:alive:' .. worker end
local function token_of(worker) return 'kino:token:' .. worker end
local function inflight(worker, queue) return 'kino:inflight:' .. worker .. ':' .. queue end
local function recovered(queue) return 'kino:recovered:' .. queue end

local function type_of(key) return redis.call('TYPE', key).ok end

-- Also for what only reads: a primary that was demoted while a connection was open may never catch up with the new
-- one, and an idle worker would poll it for ever. redis-py asks for the address anew at this answer.
local role = redis.pcall('INFO', 'replication')
if type(role) == 'string' and role:find('role:slave', 1, true) then
  return redis.error_reply('READONLY this server is a replica')
end
"""

# For the scripts of one worker, ARGV[1]: what it owns is what it should be, or nothing happens at all.
_OWN: Final = (
    _NAMES
    + """
local me = ARGV[1]

-- Of a message, or of one of its elements.
local function crashes(message, element)
  return 'kino:crashes:' .. redis.sha1hex(message) .. (element and ':' .. element or '')
end
local function is_alone(token) return token and token:sub(-6) == ':alone' end

-- The token as its worker knows it, and the element in work.
local function read_token(worker)
  local held = redis.call('GET', token_of(worker))
  if not held then return held end
  return held:gsub(':%d+:alone$', ':alone'), held:match(':(%d+):alone$')
end

-- The first of these keys that is neither missing nor of its type.
local function foreign(types)
  for key, wanted in pairs(types) do
    local found = type_of(key)
    if found ~= wanted and found ~= 'none' then return key, found end
  end
end

local function owned_by(worker)
  local types = {[alive(worker)] = 'string', [token_of(worker)] = 'string'}
  local element = type_of(token_of(worker)) == 'string' and select(2, read_token(worker))
  for _, queue in ipairs(queues) do
    types[inflight(worker, queue)] = 'list'
    -- A message alone in flight has its count of crashes, and so has its element in work.
    if type_of(inflight(worker, queue)) == 'list' then
      local message = redis.call('LINDEX', inflight(worker, queue), -1)
      types[crashes(message)] = 'string'
      if element then types[crashes(message, element)] = 'string' end
    end
  end
  return types
end

local types = owned_by(me)
types[registry] = 'set'
for _, queue in ipairs(queues) do
  types[recovered(queue)] = 'list'
  if type_of(recovered(queue)) == 'list' then
    types[crashes(redis.call('LINDEX', recovered(queue), -1))] = 'string'
  end
end
local key, found = foreign(types)
if key then return redis.error_reply('FOREIGN ' .. key .. ' holds a ' .. found) end

local token, element = read_token(me)

local function say_alive(alive_ms)
  redis.call('DEL', alive(me))
  redis.call('SET', alive(me), '1', 'PX', alive_ms)
  redis.call('SADD', registry, me)
end
"""
)

_CLAIM: Final = """
local limit, max_bytes, alive_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local recovered_next = ARGV[5] == '1'

local again, rescued = 0, nil
for _, queue in ipairs(queues) do
  if redis.call('EXISTS', inflight(me, queue)) == 1 then again = 1 end
  if not rescued and redis.call('EXISTS', recovered(queue)) == 1 then rescued = queue end
end

local sources, some, skipped = {}, false, {}
for i, key in ipairs(KEYS) do
  local queue = math.ceil(i / 4)
  sources[queue] = sources[queue] or {}
  local found = type_of(key)
  if found == 'list' then
    table.insert(sources[queue], key)
    some = true
  elseif found ~= 'none' then
    table.insert(skipped, key)
  end
end

if again == 0 and not some and not rescued then return {'', 0, 0, skipped, {{}, {}, {}, {}}} end

say_alive(alive_ms)

local function new_token(tail)
  local time = redis.call('TIME')
  token = time[1] .. string.format('%06d', time[2]) .. tail
  redis.call('SET', token_of(me), token)
end

-- At most so many messages and bytes from one base queue, within what is left for the batch. It looks before
-- it moves: what does not fit stays where it is.
local count, bytes = 0, 0
local function take(queue, most, most_bytes)
  local taken, taken_bytes = 0, 0
  for _, key in ipairs(sources[queue]) do
    while taken < most and count < limit do
      local message = redis.call('LINDEX', key, -1)
      if not message then break end
      if count > 0 and bytes + #message > max_bytes then return end
      if taken > 0 and taken_bytes + #message > most_bytes then return end
      redis.call('LMOVE', key, inflight(me, queues[queue]), 'RIGHT', 'LEFT')
      count, bytes = count + 1, bytes + #message
      taken, taken_bytes = taken + 1, taken_bytes + #message
    end
  end
end

if again == 1 then
  -- A batch without its token (somebody deleted it) gets another; it no longer says that it was alone.
  if not token or not token:match('^%d+:?%a*$') then new_token('') end
elseif rescued and (recovered_next or not some) then
  redis.call('LMOVE', recovered(rescued), inflight(me, rescued), 'RIGHT', 'LEFT')
  new_token(':alone')
else
  local share = math.max(1, math.floor(limit / 10))
  for queue in ipairs(queues) do take(queue, share, max_bytes / 10) end
  for queue in ipairs(queues) do take(queue, limit, max_bytes) end
  new_token('')
end

local crashed, lists = 0, {}
for i, queue in ipairs(queues) do
  lists[i] = redis.call('LRANGE', inflight(me, queue), 0, -1)
  if is_alone(token) and lists[i][1] then
    crashed = tonumber(redis.call('GET', crashes(lists[i][1])) or 0) or 0
  end
end
return {token, again, crashed, skipped, lists}
"""

# Elements that were settled keep their counts until the drop: after a crash with another one, the poisonous one must
# still be known as such.
_BEGIN: Final = """
if token ~= ARGV[2] or not is_alone(token) then return -1 end
local counter
for _, queue in ipairs(queues) do
  local message = redis.call('LINDEX', inflight(me, queue), -1)
  if message and ARGV[4] ~= '' then counter = crashes(message, ARGV[4]) end
end
local key, found = foreign(counter and {[counter] = 'string'} or {})
if key then return redis.error_reply('FOREIGN ' .. key .. ' holds a ' .. found) end

say_alive(ARGV[3])
redis.call('SET', token_of(me), counter and token:gsub(':alone$', ':' .. ARGV[4] .. ':alone') or token)
return counter and tonumber(redis.call('GET', counter) or 0) or 0
"""

_DROP: Final = f"""
if token ~= ARGV[2] then return 0 end

redis.call('DEL', token_of(me))
for _, queue in ipairs(queues) do
  local message = is_alone(token) and redis.call('LINDEX', inflight(me, queue), -1)
  if message then
    redis.call('DEL', crashes(message))
    for index = 0, {ELEMENTS_MAX - 1} do redis.call('DEL', crashes(message, index)) end
  end
  redis.call('DEL', inflight(me, queue))
end
return 1
"""

# The newest first, each onto the tail: the oldest is then the next to be claimed. What was recovered goes
# back to be claimed alone again, and so does what came by a queue whose key can no longer hold it.
_RELEASE: Final = """
if token ~= ARGV[2] then return 0 end

redis.call('DEL', token_of(me))
local count = 0
for _, queue in ipairs(queues) do
  local held = type_of(queue)
  local back = queue
  if is_alone(token) or (held ~= 'list' and held ~= 'none') then back = recovered(queue) end
  while redis.call('LMOVE', inflight(me, queue), back, 'LEFT', 'RIGHT') do count = count + 1 end
end
return count
"""

_REFRESH: Final = """
say_alive(ARGV[2])
"""

# As kombu writes them, for an exchange of the queue's name (kombu.transport.redis, `_queue_bind`): in the second
# set stands what an expiring queue's end must not take away.
_BIND: Final = """
local separator = string.char(6, 22)
local missing, restored, skipped = {}, {}, {}
for _, queue in ipairs(queues) do
  local member = queue .. separator .. separator .. queue
  for _, prefix in ipairs({'_kombu.binding.', '_kombu.binding_permanent.'}) do
    local key = prefix .. queue
    local members = redis.pcall('SMEMBERS', key)
    if members.err then
      table.insert(skipped, key)
    else
      local found = false
      for _, each in ipairs(members) do found = found or each == member end
      if not found then
        table.insert(missing, {key, member})
        restored[queue] = true
      end
    end
  end
end

if #missing > 0 then
  redis.call('DEL', alive(me))
  redis.call('SET', alive(me), '1', 'PX', ARGV[2])
  redis.call('SADD', registry, me)
  for _, each in ipairs(missing) do redis.call('SADD', each[1], each[2]) end
end

local names = {}
for queue in pairs(restored) do table.insert(names, queue) end
return {names, skipped}
"""

# A worker with messages in flight stays registered, or nobody would find them. Without its token it no longer
# says that one was alone: to leave is not to crash.
_LEAVE: Final = """
redis.call('DEL', alive(me), token_of(me))
for _, queue in ipairs(queues) do
  if redis.call('EXISTS', inflight(me, queue)) == 1 then return end
end
redis.call('SREM', registry, me)
"""

# Whether a worker is dead is asked here, where nothing can happen between the question and the move. A worker
# that comes back after this finds its token gone: its drop does nothing, and its events settle as duplicates.
_RECOVER: Final = """
local workers, count, skipped = {}, 0, {}
for _, worker in ipairs(redis.call('SMEMBERS', registry)) do
  if worker ~= me and redis.call('EXISTS', alive(worker)) == 0 then
    local key = foreign(owned_by(worker))
    if key then
      table.insert(skipped, key)
    else
      local held, in_work = read_token(worker)
      local held_before = count
      redis.call('DEL', token_of(worker))
      for _, queue in ipairs(queues) do
        if is_alone(held) and redis.call('EXISTS', inflight(worker, queue)) == 1 then
          local counter = crashes(redis.call('LINDEX', inflight(worker, queue), -1), in_work)
          local before = tonumber(redis.call('GET', counter) or 0) or 0
          redis.call('SET', counter, before + 1, 'EX', ARGV[2])
        end
        while redis.call('LMOVE', inflight(worker, queue), recovered(queue), 'RIGHT', 'LEFT') do
          count = count + 1
        end
      end
      redis.call('SREM', registry, worker)
      if count > held_before then table.insert(workers, worker) end
    end
  end
end
return {workers, count, skipped}
"""

# In small pieces, so that no cap is overshot by much.
_WAITING: Final = (
    _NAMES
    + """
local limit, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local complete, unreadable, lists, count, bytes = 1, {}, {}, 0, 0

local function read(key, into)
  local held = type_of(key)
  if held == 'none' then return end
  if held ~= 'list' then
    complete = 0
    table.insert(unreadable, key)
    return
  end
  local length, at = redis.call('LLEN', key), 0
  while at < length do
    if count >= limit or bytes >= max_bytes then
      complete = 0
      return
    end
    local step = math.min(16, limit - count, length - at)
    local piece = redis.call('LRANGE', key, -at - step, -at - 1)
    for i = step, 1, -1 do
      table.insert(into, piece[i])
      bytes = bytes + #piece[i]
    end
    at, count = at + step, count + step
  end
end

local workers = {}
local held = type_of(registry)
if held == 'set' then
  workers = redis.call('SMEMBERS', registry)
elseif held ~= 'none' then
  complete = 0
  table.insert(unreadable, registry)
end

for i, queue in ipairs(queues) do
  lists[i] = {}
  for j = 4 * i - 3, 4 * i do read(KEYS[j], lists[i]) end
  read(recovered(queue), lists[i])
  for _, worker in ipairs(workers) do read(inflight(worker, queue), lists[i]) end
end
return {complete, unreadable, lists}
"""
)

_DEPTHS: Final = (
    _NAMES
    + """
local function depth(key) return type_of(key) == 'list' and redis.call('LLEN', key) or 0 end

local counts, in_flight, rescued = {}, 0, 0
local workers = type_of(registry) == 'set' and redis.call('SMEMBERS', registry) or {}
for i, queue in ipairs(queues) do
  counts[i] = 0
  for j = 4 * i - 3, 4 * i do counts[i] = counts[i] + depth(KEYS[j]) end
  rescued = rescued + depth(recovered(queue))
  for _, worker in ipairs(workers) do in_flight = in_flight + depth(inflight(worker, queue)) end
end
table.insert(counts, in_flight)
table.insert(counts, rescued)
return counts
"""
)
