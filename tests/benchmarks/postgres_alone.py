"""The ceiling: the same rows, written by Postgres alone from events that it has in a table already.

No Redis, no Python per event, no round trip per batch: nothing that reads events and tells apart what
may be settled can be faster than this on the same disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import psycopg

from kino_refunds.dev.embedded import DATABASE, LOOPBACK, Servers
from kino_refunds.events.schema import Event, fingerprint
from kino_refunds.policy.document import published_policy

NAME = "postgres alone, set-based"
BATCH = 500

_STAGE = """
    CREATE TEMPORARY TABLE staged (
        batch integer, job_id text, source text, event_id text, event_at timestamptz, fingerprint text)
"""

# Sorted as the worker sorts; a temporary table costs the event's side nothing, so what is timed are the writes.
_SETTLE = """
    DO $$ BEGIN
    FOR this IN 0 .. (SELECT max(batch) FROM staged) LOOP
        INSERT INTO kino.settlement
            (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
        SELECT c.charge_id, 'refunded', 'generation_failure', '2.failure', '{policy}', e.source, e.event_id, e.event_at
        FROM staged e JOIN kino.charge c USING (job_id) WHERE e.batch = this
        ORDER BY c.charge_id ON CONFLICT (charge_id) DO NOTHING;

        UPDATE kino.credit_lot AS lot SET remaining = lot.remaining + back.credits
        FROM (SELECT l.lot_id, sum(l.credits) AS credits
              FROM staged e JOIN kino.charge c USING (job_id) JOIN kino.charge_line l USING (charge_id)
              WHERE e.batch = this GROUP BY l.lot_id) back
        WHERE lot.lot_id = back.lot_id;

        INSERT INTO kino.transfer
            (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor, event_at)
        SELECT 'refund', 'held', 'wallet', c.account_id, l.lot_id, c.charge_id, l.credits, 'generation_failure',
               'settlement', e.event_at
        FROM staged e JOIN kino.charge c USING (job_id) JOIN kino.charge_line l USING (charge_id)
        WHERE e.batch = this ORDER BY c.charge_id, l.seq;

        INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)
        SELECT e.source, e.event_id, e.job_id, e.fingerprint, 'refunded', e.event_at
        FROM staged e WHERE e.batch = this
        ORDER BY e.source, e.event_id ON CONFLICT (source, event_id) DO NOTHING;

        DELETE FROM kino.open_charge o USING staged e JOIN kino.charge c USING (job_id)
        WHERE e.batch = this AND o.charge_id = c.charge_id;
        COMMIT;
    END LOOP;
    END $$
"""


def settle_staged(servers: Servers, events: Sequence[Event]) -> float:
    """Stage `events`, which all refund, then let Postgres settle them; returns the seconds of the second part."""
    # As the owner, who alone may write the tables. Not by our engine: its statement time-out is for batches, and this
    # is all of them in one statement.
    with psycopg.connect(
        host=LOOPBACK, port=servers.postgres_port, user="kino_owner", dbname=DATABASE, autocommit=True
    ) as connection:
        connection.execute(_STAGE)
        with connection.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as copy:
            for number, event in enumerate(events):
                copy.write_row((number // BATCH, event.job_id, *event.identity, event.time, fingerprint(event)))
        connection.execute("CREATE INDEX ON staged (batch)")
        connection.execute("ANALYZE staged")
        # By its keys, as the worker goes: for 500 of them the planner would read tables of 100,000 rows whole.
        connection.execute("SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off")
        policy = published_policy().at(datetime.now(UTC)).version
        started = time.monotonic()
        connection.execute(_SETTLE.format(policy=policy).encode())
        return time.monotonic() - started
