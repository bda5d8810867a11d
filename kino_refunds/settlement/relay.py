"""The relay: tells the product of every refund, oldest transaction first, at least once (section 7)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    import redis

EVENT_TYPE = "kino.credits-refunded.v1"
EVENT_SOURCE = "kino-refunds"
BATCH = 500

# The first round starts at the horizon: whoever switches the relay on is told of what happens from then on.
_START = sa.text("""
    INSERT INTO kino.relay_cursor (xid, charge_id) VALUES (kino.horizon(), 0)
    ON CONFLICT DO NOTHING
""")
_LOCK = sa.text("SELECT CAST(xid AS text), charge_id FROM kino.relay_cursor FOR UPDATE SKIP LOCKED")

# Below the horizon every transaction has ended: nothing can still appear behind the cursor.
_NEXT = sa.text("""
    WITH refund AS (
        SELECT s.xid, s.charge_id, s.reason, s.clause, s.policy_version, s.settled_at AS at FROM kino.settlement s
        WHERE s.kind = 'refunded' AND (s.xid, s.charge_id) > (CAST(:xid AS xid8), :charge_id)
          AND s.xid < kino.horizon()
        UNION ALL
        SELECT k.xid, k.charge_id, k.reason, k.clause, k.policy_version, k.corrected_at FROM kino.correction k
        WHERE (k.xid, k.charge_id) > (CAST(:xid AS xid8), :charge_id)
          AND k.xid < kino.horizon()
    )
    SELECT CAST(r.xid AS text) AS xid, r.charge_id, r.reason, r.clause, r.policy_version, r.at,
           c.job_id, c.account_id, c.credits
    FROM refund r JOIN kino.charge c USING (charge_id)
    ORDER BY r.xid, r.charge_id LIMIT :limit
""")
_ADVANCE = sa.text("UPDATE kino.relay_cursor SET xid = CAST(:xid AS xid8), charge_id = :charge_id")


def relay_refunds(engine: sa.Engine, client: redis.Redis, queue: str, *, limit: int = BATCH) -> int:
    """Push up to `limit` refunds to the Redis list `queue` as bare CloudEvents; returns how many.

    The cursor moves after Redis has them: if anything fails in between they are pushed again, so consumers
    deduplicate by id (`refund:<charge_id>`; a charge is refunded once). Two at once: the second does nothing.
    Raises what Redis and Postgres raise.
    """
    with engine.begin() as connection:
        connection.execute(_START)
        cursor = connection.execute(_LOCK).one_or_none()
        if cursor is None:
            return 0
        rows = connection.execute(_NEXT, {"xid": cursor[0], "charge_id": cursor[1], "limit": limit}).all()
        if not rows:
            return 0
        client.lpush(queue, *(json.dumps(refund_event(row)) for row in rows))
        connection.execute(_ADVANCE, {"xid": rows[-1].xid, "charge_id": rows[-1].charge_id})
        return len(rows)


def refund_event(row: Any) -> dict[str, Any]:
    """Write the CloudEvent of one refund; credits are whole."""
    return {
        "specversion": "1.0",
        "id": f"refund:{row.charge_id}",
        "source": EVENT_SOURCE,
        "type": EVENT_TYPE,
        "time": row.at.isoformat(),
        "subject": row.job_id,
        "data": {
            "job_id": row.job_id,
            "account_id": row.account_id,
            "credits": row.credits,
            "reason": row.reason,
            "clause": row.clause,
            "policy_version": row.policy_version,
        },
    }
