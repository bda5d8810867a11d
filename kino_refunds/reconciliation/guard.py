"""The guard of presumed timeouts: what forbids the presumption that a job timed out (P9; design, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING

import redis
import sqlalchemy as sa

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import contents, describe, parse
from kino_refunds.events.queues import read_queued
from kino_refunds.intake.gate import read_gate
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

log = get_logger(__name__)

NAMELESS_COUNTS_FOR = timedelta(hours=1)
"""A dead letter that cannot be read may hold a completion: for an hour it may be that of any charge older than it."""
STUCK_AFTER = timedelta(days=1)
"""A message that is queued for longer than this is stuck, not late. It withholds the timeouts of its own jobs only:
otherwise one message that is never settled would withhold every presumed timeout forever."""
NOTED_MAX = 1_000
"""Rows of `waiting_message`. More queued messages are a backlog: stuck ones among them are noted once it drained."""


class WithheldReason(StrEnum):
    """Why a timeout is withheld. The words are stored in the sweep's report, so a word here never changes."""

    INTAKE_PAUSED = "intake_paused"
    REDIS_AWAY = "redis_away"
    BACKLOG_TOO_LARGE = "backlog_too_large"
    UNREADABLE_QUEUE = "unreadable_queue"
    UNREADABLE_MESSAGE = "unreadable_message_waiting"
    OLDER_MESSAGE = "older_message_waiting"
    NAMED_BY_MESSAGE = "named_by_waiting_message"
    NAMED_BY_EVENT = "named_by_waiting_event"
    """An event of this job is pending, or an open dead letter names it."""
    UNREADABLE_COMPLETION = "unreadable_completion"
    CLOCK = "clock"
    IDS = "ids_that_no_event_can_carry"


@dataclass(frozen=True, slots=True)
class OverdueCharge:
    """An open charge that is past its deadline and grace; `credits` are whole."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    opened_at: datetime
    due_at: datetime
    """Deadline plus grace: the time of the event that the sweep may write."""
    asks: int


@dataclass(frozen=True, slots=True)
class Guard:
    """What forbids a presumed timeout, as read by `read_guard`: P9, never a refund because *we* were behind.

    Redis is read first, and Postgres after it. An event that leaves Redis in between was committed before, so Postgres
    shows its outcome. In the other order both readings could miss it, and a completed job would be refunded.
    """

    refused: WithheldReason | None
    """A reason that holds for every charge."""
    oldest_queued: datetime | None
    """The earliest time of an event that is queued in Redis, without messages that are stuck."""
    queued_jobs: Collection[str]
    """Jobs that a queued message names, whatever its time."""
    named_jobs: Collection[str]
    """Jobs that a pending event, or an open dead letter, names."""
    nameless: Sequence[datetime]
    """When the open dead letters were last seen that may hold the end of a job that they do not name: of any charge."""

    def reason(self, charge: OverdueCharge) -> WithheldReason | None:
        """Return why this charge's timeout must be withheld; None if it may be presumed."""
        if self.refused is not None:
            return self.refused
        if self.oldest_queued is not None and self.oldest_queued <= charge.due_at:
            return WithheldReason.OLDER_MESSAGE
        if charge.job_id in self.queued_jobs:
            return WithheldReason.NAMED_BY_MESSAGE
        if charge.job_id in self.named_jobs:
            return WithheldReason.NAMED_BY_EVENT
        if any(seen_at > charge.opened_at for seen_at in self.nameless):
            return WithheldReason.UNREADABLE_COMPLETION
        return None


def read_guard(
    engine: sa.Engine,
    redis_client: redis.Redis,
    charges: Sequence[OverdueCharge],
    *,
    now: datetime,
    source_configured: bool,
) -> Guard:
    """Return the guard for these charges, from what is queued, pending and paused; raises what Postgres raises.

    If Redis cannot be read, every presumed timeout is withheld.
    """
    found = _read_queued(redis_client)
    if found.error is not None:
        log.warning("no timeout is presumed: Redis cannot be read", error=found.error)
    with engine.connect() as connection:
        stuck = set(connection.execute(_STUCK, {"since": now - STUCK_AFTER}).scalars())
        refused, oldest = _oldest(found, stuck)
        if read_gate(connection).paused:
            refused = WithheldReason.INTAKE_PAUSED
        job_ids = {"job_ids": [charge.job_id for charge in charges]}
        named = set(connection.execute(_NAMED_JOBS, job_ids).scalars())
        nameless: Sequence[datetime] = ()
        if not source_configured:
            nameless = connection.execute(_NAMELESS, {"since": now - NAMELESS_COUNTS_FOR}).scalars().all()
    return Guard(
        refused=refused,
        oldest_queued=oldest,
        queued_jobs={job_id for each in found.messages for job_id in each.job_ids},
        named_jobs=named,
        nameless=nameless,
    )


_NAMED_JOBS = sa.text("""
    SELECT job_id FROM kino.pending_event WHERE job_id = ANY(CAST(:job_ids AS text[]))
    UNION
    SELECT job_id FROM kino.dead_letter WHERE status = 'open' AND job_id = ANY(CAST(:job_ids AS text[]))
    UNION
    SELECT unnest(other_job_ids) FROM kino.dead_letter
    WHERE status = 'open' AND other_job_ids && CAST(:job_ids AS text[])
""")

_NAMELESS = sa.text("""
    SELECT last_seen_at FROM kino.dead_letter WHERE status = 'open' AND may_hold_others AND last_seen_at > :since
""")

_STUCK = sa.text("SELECT digest FROM kino.waiting_message WHERE first_seen_at < :since")


def note_queued(engine: sa.Engine, redis_client: redis.Redis, *, now: datetime) -> None:
    """Note in `waiting_message` since when each message is queued, and delete the rows of messages that are gone.

    Runs once in each sweep, whether or not a timeout is due: otherwise a message that was stuck long before would
    withhold the first timeout for another day. If Redis cannot be read completely, nothing is written. Raises what
    Postgres raises.
    """
    found = _read_queued(redis_client)
    if found.refused is not None:
        return
    by_digest = {each.digest: each for each in found.messages}
    with engine.begin() as connection:
        noted = set(connection.execute(sa.text("SELECT digest FROM kino.waiting_message")).scalars())
        if gone := noted - by_digest.keys():
            connection.execute(_FORGET, {"digests": sorted(gone)})
        # Messages without a readable time come first, then the oldest: those are most likely to be stuck.
        new = sorted(by_digest.keys() - noted, key=lambda digest: (by_digest[digest].time or _EARLIEST, digest))
        del new[max(0, NOTED_MAX - len(noted - gone)) :]
        if new:
            rows = [{"digest": each, "job_ids": sorted(by_digest[each].job_ids), "now": now} for each in sorted(new)]
            connection.execute(_NOTE, rows)


_EARLIEST = datetime.min.replace(tzinfo=UTC)
_FORGET = sa.text("DELETE FROM kino.waiting_message WHERE digest = ANY(CAST(:digests AS bytea[]))")
_NOTE = sa.text("""
    INSERT INTO kino.waiting_message (digest, first_seen_at, job_ids)
    VALUES (:digest, :now, CAST(:job_ids AS text[])) ON CONFLICT (digest) DO NOTHING
""")


@dataclass(frozen=True, slots=True)
class _Message:
    """A queued message: `time` is the earliest time of its events, None if an event cannot be read."""

    digest: bytes
    time: datetime | None
    job_ids: Collection[str]


@dataclass(frozen=True, slots=True)
class _Queued:
    """Every message that is queued in Redis, or the reason why they are not known."""

    refused: WithheldReason | None
    messages: Sequence[_Message]
    error: str | None = None
    """The text of the error of Redis or of the client."""


def _read_queued(redis_client: redis.Redis) -> _Queued:
    try:
        found = read_queued(redis_client)
    except redis.RedisError as error:
        return _Queued(WithheldReason.REDIS_AWAY, (), f"{type(error).__name__}: {error}")
    if not found.complete:
        return _Queued(WithheldReason.UNREADABLE_QUEUE if found.unreadable else WithheldReason.BACKLOG_TOO_LARGE, ())
    return _Queued(None, [_read(message.raw) for message in found.messages])


def _read(raw: bytes) -> _Message:
    """Return a message of one event or several; from events that do not parse the job ids that can be found."""
    digest = sha256(raw).digest()
    try:
        event = parse(raw)
    except MalformedMessage:
        pass
    else:
        return _Message(digest, event.time, {event.job_id})
    times, job_ids, readable = list[datetime](), set[str](), True
    for content in contents(raw):
        try:
            event = parse(content)
        except MalformedMessage:
            about = describe(content)
            job_ids.update(each for each in (about.job_id, *about.other_job_ids) if each is not None)
            readable = False
        else:
            times.append(event.time)
            job_ids.add(event.job_id)
    return _Message(digest, min(times) if readable else None, job_ids)


def _oldest(found: _Queued, stuck: Collection[bytes]) -> tuple[WithheldReason | None, datetime | None]:
    """Return (None, the earliest time of a queued event), or the reason why that time is not known."""
    if found.refused is not None:
        return found.refused, None
    times = [each.time for each in found.messages if each.digest not in stuck]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return WithheldReason.UNREADABLE_MESSAGE, None
    return None, min(known, default=None)
