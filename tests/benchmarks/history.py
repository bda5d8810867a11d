"""Charges that were settled before: rows as the ledger writes them, but by SQL alone, a million in a minute or two."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.policy.document import published_policy
from tests.benchmarks.backlog import ACCOUNTS, CREDITS_A_JOB

CHUNK = 100_000

# Three months of jobs, one line each, of the accounts' large lots; one in five was refunded.
_CHARGES = """
    INSERT INTO kino.charge (job_id, account_id, credits, deadline_at, opened_at)
    SELECT 'before-' || left(md5(n::text), 16), 'account-' || n % {accounts}, {credits},
           opened_at + interval '10 minutes', opened_at
    FROM (SELECT n, now() - interval '1 hour' - interval '90 days' * (1 - n::float8 / {count}) AS opened_at
          FROM generate_series({first}, {last}) n) AS job
    ORDER BY n
"""

# What follows takes the charges of this chunk from here.
_ENDED = """
    CREATE TEMPORARY TABLE ended ON COMMIT DROP AS
    SELECT c.charge_id, c.job_id, c.account_id, c.credits, lot.lot_id, c.opened_at + interval '1 minute' AS ended_at,
           c.charge_id % 5 = 0 AS refunded
    FROM kino.charge c JOIN kino.credit_lot lot ON lot.reference = 'pack-' || split_part(c.account_id, '-', 2)
    WHERE c.charge_id > {newest}
    ORDER BY c.charge_id
"""

_REST = (
    "INSERT INTO kino.charge_line (charge_id, seq, lot_id, credits) SELECT charge_id, 1, lot_id, credits FROM ended",
    """
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor, created_at)
    SELECT 'hold', 'wallet', 'held', account_id, lot_id, charge_id, credits, 'product',
           ended_at - interval '1 minute' FROM ended
    """,
    """
    INSERT INTO kino.settlement
        (charge_id, kind, reason, clause, policy_version, ending, account_status, event_source, event_id, event_time,
         settled_at)
    SELECT charge_id, CASE WHEN refunded THEN 'refunded' ELSE 'captured' END,
           CASE WHEN refunded THEN 'generation_failure' ELSE 'completed' END,
           CASE WHEN refunded THEN '2.failure' ELSE '1' END, '{policy}',
           CASE WHEN refunded THEN 'failed.platform' ELSE 'completed' END, 'active', 'bench', md5(job_id), ended_at,
           ended_at
    FROM ended
    """,
    """
    UPDATE kino.credit_lot AS lot SET remaining = lot.remaining - spent.credits
    FROM (SELECT lot_id, sum(credits) AS credits FROM ended WHERE NOT refunded GROUP BY lot_id) spent
    WHERE lot.lot_id = spent.lot_id
    """,
    """
    INSERT INTO kino.transfer
        (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor, event_at, created_at)
    SELECT CASE WHEN refunded THEN 'refund' ELSE 'capture' END, 'held',
           CASE WHEN refunded THEN 'wallet' ELSE 'consumed' END, account_id, lot_id, charge_id, credits,
           CASE WHEN refunded THEN 'generation_failure' ELSE 'completed' END, 'settlement', ended_at, ended_at
    FROM ended
    """,
    """
    INSERT INTO kino.xid_clock (sampled_at, xid) SELECT max(ended_at), pg_current_xact_id() FROM ended
    """,
    """
    INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at, received_at)
    SELECT 'bench', md5(job_id), job_id, 'v1:' || encode(sha256(job_id::bytea), 'hex'),
           CASE WHEN refunded THEN 'refunded' ELSE 'captured' END, ended_at, ended_at
    FROM ended
    """,
)


# The accounts' lots are older than the jobs that they paid for.
_GRANTED = (
    "SET LOCAL session_replication_role = replica",
    "UPDATE kino.credit_lot SET granted_at = now() - interval '91 days'",
    "UPDATE kino.account SET created_at = now() - interval '91 days'",
    "UPDATE kino.transfer SET created_at = now() - interval '91 days' WHERE kind = 'grant'",
)


def settled_before(servers: Servers, count: int, tell: Callable[[str], None]) -> None:
    """Write `count` settled charges; leaves books in order, statistics fresh and nothing to be flushed."""
    known = {
        "accounts": ACCOUNTS,
        "credits": CREDITS_A_JOB,
        "count": count,
        "policy": published_policy().at(datetime.now(UTC)).version,
    }
    with servers.postgres.connect(DATABASE) as superuser:
        with superuser.transaction():
            for statement in _GRANTED:
                superuser.execute(statement.encode())
        for first in range(1, count + 1, CHUNK):
            last = min(first + CHUNK - 1, count)
            (newest,) = superuser.execute("SELECT coalesce(max(charge_id), 0) FROM kino.charge").fetchone() or (0,)
            with superuser.transaction():
                for statement in (_CHARGES, _ENDED, "ANALYZE ended", *_REST):
                    superuser.execute(statement.format(**known, first=first, last=last, newest=newest).encode())
            tell(f"{last:,} of {count:,} settled charges written")
        # Autovacuum would come a minute later, into somebody's figures.
        for table in ("charge", "charge_line", "settlement", "transfer", "inbox_event", "credit_lot"):
            superuser.execute(f"VACUUM (ANALYZE) kino.{table}".encode())
        superuser.execute("CHECKPOINT")
