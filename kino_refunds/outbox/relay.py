"""The relay: send the product an event for each refund, oldest transaction first, at least once (design, section 7)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import RelayNotReady

if TYPE_CHECKING:
    from datetime import datetime

    import redis

EVENT_TYPE = "kino.credits-refunded.v1"
EVENT_SOURCE = "kino-refunds"
BATCH = 500
CURSOR_WAIT_MS = 5_000
"""How long a rewind waits for the cursor, in ms: a round that holds it for longer than this hangs at Redis."""

# The first round starts at the horizon: the product is told of refunds from the time when the relay is switched on.
_START = sa.text("""
    INSERT INTO kino.relay_cursor (xid, charge_id) VALUES (kino.horizon(), 0)
    ON CONFLICT DO NOTHING
""")
_LOCK = sa.text("SELECT CAST(xid AS text), charge_id FROM kino.relay_cursor FOR UPDATE SKIP LOCKED")

# Below the horizon every transaction has ended, so no row can still appear behind the cursor: such a refund would never
# be sent.
_NEXT = sa.text("""
    WITH refund AS (
        SELECT 'refund' AS what, s.xid, s.charge_id, s.reason, s.clause, s.policy_version, s.settled_at AS at
        FROM kino.settlement s
        WHERE s.kind = 'refunded' AND (s.xid, s.charge_id) > (CAST(:xid AS xid8), :charge_id)
          AND s.xid < kino.horizon()
        UNION ALL
        SELECT 'correction', k.xid, k.charge_id, k.reason, k.clause, k.policy_version, k.corrected_at
        FROM kino.correction k
        WHERE (k.xid, k.charge_id) > (CAST(:xid AS xid8), :charge_id)
          AND k.xid < kino.horizon()
    )
    SELECT CAST(r.xid AS text) AS xid, r.what, r.charge_id, r.reason, r.clause, r.policy_version, r.at,
           c.job_id, c.account_id, c.credits
    FROM refund r JOIN kino.charge c USING (charge_id)
    ORDER BY r.xid, r.charge_id LIMIT :limit
""")
_ADVANCE = sa.text("UPDATE kino.relay_cursor SET xid = CAST(:xid AS xid8), charge_id = :charge_id")


def relay_refunds(engine: sa.Engine, client: redis.Redis, queue: str, *, limit: int = BATCH) -> int:
    """Push up to `limit` refunds to the Redis list `queue` as bare CloudEvents; return how many.

    The cursor moves after Redis has them. If anything fails in between, they are pushed again, so consumers deduplicate
    by id: `refund:<charge_id>`, or `correction:<charge_id>` for a capture that was refunded later; a charge has one of
    them, once. If two run at once, the second does nothing. Raises what Redis and Postgres raise.
    """
    with engine.begin() as connection:
        connection.execute(_START)
        cursor = connection.execute(_LOCK).one_or_none()
        if cursor is None:
            return 0
        rows = connection.execute(_NEXT, {"xid": cursor[0], "charge_id": cursor[1], "limit": limit}).mappings().all()
        if not rows:
            return 0
        client.lpush(
            queue, *(json.dumps(refund_event(Refund(**{name: row[name] for name in Refund._fields}))) for row in rows)
        )
        connection.execute(_ADVANCE, {"xid": rows[-1]["xid"], "charge_id": rows[-1]["charge_id"]})
        return len(rows)


@dataclass(frozen=True, slots=True)
class Rewind:
    """The result of a rewind: how many refunds are sent again, and when the oldest of them was settled."""

    told_again: int
    oldest_at: datetime | None


def rewind_relay(connection: sa.Connection, to: datetime, *, dry_run: bool = False) -> Rewind:
    """Set the cursor back so that every refund and correction settled at or after `to` is sent again; return how many.

    "At least once" ends at Redis: an event that Redis lost before the product read it is sent again only by this. The
    ids stay the same, so a consumer that deduplicates takes each event once. The order is that of transactions and not
    of time, so some refunds settled before `to` may be sent again too. With `dry_run` nothing is written.

    Raises RelayNotReady if the relay has no cursor yet, or a round holds it for longer than CURSOR_WAIT_MS.
    """
    if dry_run:
        cursor = connection.execute(_READ).one_or_none()
    else:
        # A longer wait than elsewhere, because a round holds the cursor while it pushes to Redis.
        connection.execute(sa.text("SELECT set_config('lock_timeout', :ms, true)"), {"ms": str(CURSOR_WAIT_MS)})
        try:
            # (1) A round has read the cursor and pushes, (2) this waits, (3) the round moves the cursor and commits,
            # (4) this reads the moved cursor, so the refunds of that round are sent again too.
            cursor = connection.execute(_LOCK_FOR_REWIND).one_or_none()
        except sa.exc.OperationalError as error:
            if classify(error) is not Fault.LOCK:
                raise
            raise RelayNotReady("a round of the relay holds its cursor; nothing was moved, try again") from error
    if cursor is None:
        raise RelayNotReady("the relay has no cursor: no worker has run it yet (KINO_RELAY_QUEUE); nothing was moved")
    told = {"xid": cursor[0], "charge_id": cursor[1], "to": to}
    first = connection.execute(_FIRST_SINCE, told).one_or_none()
    if first is None:
        return Rewind(0, None)
    # One behind: the cursor names the last refund that was sent, and this one must be sent again.
    before = {"first_xid": first.xid, "first_charge_id": first.charge_id - 1}
    found = connection.execute(_BETWEEN, told | before).one()
    if not dry_run:
        connection.execute(_ADVANCE, {"xid": first.xid, "charge_id": first.charge_id - 1})
    return Rewind(found.told_again, found.oldest_at)


_READ = sa.text("SELECT CAST(xid AS text), charge_id FROM kino.relay_cursor")
_LOCK_FOR_REWIND = sa.text("SELECT CAST(xid AS text), charge_id FROM kino.relay_cursor FOR UPDATE")
# There is no index by time: this reads every refund that was sent, once for each rewind.
_FIRST_SINCE = sa.text("""
    WITH refund AS (
        SELECT s.xid, s.charge_id, s.settled_at AS at FROM kino.settlement s WHERE s.kind = 'refunded'
        UNION ALL
        SELECT k.xid, k.charge_id, k.corrected_at FROM kino.correction k
    )
    SELECT CAST(r.xid AS text) AS xid, r.charge_id FROM refund r
    WHERE r.at >= :to AND (r.xid, r.charge_id) <= (CAST(:xid AS xid8), :charge_id)
    ORDER BY r.xid, r.charge_id LIMIT 1
""")
_BETWEEN = sa.text("""
    WITH refund AS (
        SELECT s.xid, s.charge_id, s.settled_at AS at FROM kino.settlement s WHERE s.kind = 'refunded'
        UNION ALL
        SELECT k.xid, k.charge_id, k.corrected_at FROM kino.correction k
    )
    SELECT count(*) AS told_again, min(r.at) AS oldest_at FROM refund r
    WHERE (r.xid, r.charge_id) > (CAST(:first_xid AS xid8), :first_charge_id)
      AND (r.xid, r.charge_id) <= (CAST(:xid AS xid8), :charge_id)
""")


class Refund(NamedTuple):
    """A refund or a correction (`what`) that the product is told of; `credits` are whole."""

    what: str
    charge_id: int
    job_id: str
    account_id: str
    credits: int
    reason: str
    clause: str
    policy_version: str
    at: datetime


def refund_event(refund: Refund) -> dict[str, Any]:
    """Return the CloudEvent of one refund; credits are whole."""
    return {
        "specversion": "1.0",
        "id": f"{refund.what}:{refund.charge_id}",
        "source": EVENT_SOURCE,
        "type": EVENT_TYPE,
        "time": refund.at.isoformat(),
        "subject": refund.job_id,
        "data": {
            "job_id": refund.job_id,
            "account_id": refund.account_id,
            "credits": refund.credits,
            "reason": refund.reason,
            "clause": refund.clause,
            "policy_version": refund.policy_version,
        },
    }
