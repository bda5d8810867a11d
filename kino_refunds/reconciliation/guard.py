"""The guard of our own verdicts: what forbids saying that a job timed out (P9; design, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import redis
import sqlalchemy as sa

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import waiting
from kino_refunds.events.schema import Queue
from kino_refunds.log import get_logger
from kino_refunds.settlement.gate import read_gate

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

log = get_logger(__name__)

NAMELESS_COUNTS_FOR = timedelta(hours=1)
"""An unreadable completion is somebody's: for an hour it could be that of any charge older than it."""


@dataclass(frozen=True, slots=True)
class OverdueCharge:
    """A charge past its deadline and grace that nothing has settled."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    opened_at: datetime
    due_at: datetime
    """Deadline plus grace: the time of the event that we may have to write."""
    asks: int


@dataclass(frozen=True, slots=True)
class Guard:
    """What forbids a timed-out verdict of our own, read at one point: P9, never because *we* were behind.

    Redis is read first, Postgres after it: an event that leaves Redis in between has been committed, so
    Postgres shows what it did. The other way round it could be missed by both.
    """

    refused: str | None
    """A reason that holds for every charge."""
    oldest_waiting: datetime | None
    named_jobs: Collection[str]
    """Jobs that an event waiting for a retry, or an open dead letter, speaks of."""
    nameless: Sequence[datetime]
    """When open dead letters of the completed queue came that name no job: any charge's end could be there."""

    def reason(self, charge: OverdueCharge) -> str | None:
        """Say why there must be no verdict on this charge; None if there may be one."""
        if self.refused is not None:
            return self.refused
        if self.oldest_waiting is not None and self.oldest_waiting <= charge.due_at:
            return "older_message_waiting"
        if charge.job_id in self.named_jobs:
            return "named_by_waiting_event"
        if any(seen_at > charge.opened_at for seen_at in self.nameless):
            return "unreadable_completion"
        return None


def read_guard(
    engine: sa.Engine,
    redis_client: redis.Redis,
    charges: Sequence[OverdueCharge],
    *,
    now: datetime,
    source_configured: bool,
) -> Guard:
    """Read what waits and what is paused, for these charges; raises what Postgres raises.

    A Redis that cannot be read refuses every verdict.
    """
    refused, oldest = _read_waiting(redis_client)
    with engine.connect() as connection:
        if read_gate(connection).paused:
            refused = "intake_paused"
        job_ids = {"job_ids": [charge.job_id for charge in charges]}
        named = set(connection.execute(_NAMED_JOBS, job_ids).scalars())
        nameless: Sequence[datetime] = ()
        if not source_configured:
            nameless = (
                connection.execute(_NAMELESS, {"queue": Queue.JOB_COMPLETED.value, "since": now - NAMELESS_COUNTS_FOR})
                .scalars()
                .all()
            )
    return Guard(refused, oldest, named, nameless)


_NAMED_JOBS = sa.text("""
    SELECT job_id FROM kino.pending_event WHERE job_id = ANY(CAST(:job_ids AS text[]))
    UNION
    SELECT job_id FROM kino.dead_letter WHERE status = 'open' AND job_id = ANY(CAST(:job_ids AS text[]))
""")

_NAMELESS = sa.text("""
    SELECT last_seen_at FROM kino.dead_letter
    WHERE status = 'open' AND job_id IS NULL AND queue = :queue AND last_seen_at > :since
""")


def _read_waiting(redis_client: redis.Redis) -> tuple[str | None, datetime | None]:
    """Find the oldest event time that waits anywhere in Redis; or why nothing can be said."""
    try:
        found = waiting(redis_client)
    except redis.RedisError as error:
        log.warning("no verdict: Redis cannot be read", error=f"{type(error).__name__}: {error}")
        return "redis_away", None
    if not found.complete:
        return "backlog_too_large" if not found.unreadable else "unreadable_queue", None
    oldest = None
    for message in found.messages:
        try:
            time = parse(message.raw).time
        except MalformedMessage:
            return "unreadable_message_waiting", None
        oldest = time if oldest is None else min(oldest, time)
    return None, oldest
