"""Verified through: the time before which every charge is settled; shown to people (design, section 4).

Order and completeness come from transactions and not from time. A sample (an instant and a transaction's number) joins
the two: when the horizon has passed the number, every row that was written before the instant is visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Sequence

HORIZON_AGE_WARN = timedelta(minutes=5)
HORIZON_AGE_FAIL = timedelta(hours=1)
"""Statements and the relay read below the horizon only, and so does every proof: while it stands still, so do they."""

# The instant is read before the number is drawn (columns are evaluated in this order). A transaction that has a lower
# number and still writes then writes later instants, for which nothing is claimed. In the other order a row with an
# earlier instant could still appear.
_SAMPLE = sa.text("INSERT INTO kino.xid_clock (sampled_at, xid) VALUES (kino.clock(), kino.this_transaction())")


def sample_clock(connection: sa.Connection) -> None:
    """Store which instant belongs to which transaction; call it in a transaction that has written nothing yet."""
    connection.execute(_SAMPLE)


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the ledger is verified.

    `through`: every charge opened before this instant is settled; None until a sample is below the horizon.
    `horizon_age`: how long ago the newest sample below the horizon was taken; None if there is none. `oldest_open`:
    when the oldest open charge was opened; None if no charge is open.
    """

    through: datetime | None
    horizon_age: timedelta | None
    oldest_open: datetime | None


_VERIFIED = sa.text("""
    SELECT kino.clock() AS now,
           (SELECT sampled_at FROM kino.xid_clock WHERE xid < kino.horizon() ORDER BY xid DESC LIMIT 1) AS sampled_at,
           (SELECT min(c.opened_at) FROM kino.open_charge o JOIN kino.charge c USING (charge_id)) AS oldest_open
""")


def read_verified(connection: sa.Connection) -> Verification:
    """Return how far everything is settled, as of the newest sample below the horizon; raises what Postgres raises."""
    row = connection.execute(_VERIFIED).one()
    if row.sampled_at is None:
        return Verification(None, None, row.oldest_open)
    # A clock that has been set back since may have written a sample in the future: charges opened until then are not
    # settled yet.
    sampled_at = min(row.sampled_at, row.now)
    return Verification(min(sampled_at, row.oldest_open or sampled_at), row.now - sampled_at, row.oldest_open)


@dataclass(frozen=True, slots=True)
class Holder:
    """A session or prepared transaction whose open transaction holds back the horizon."""

    name: str
    started_at: datetime | None


# Every role may read pg_locks, where a transaction with a number holds a lock on that number. Postgres hides other
# columns of pg_stat_activity from us for sessions of other roles.
_HOLDERS = sa.text("""
    SELECT coalesce('pid ' || a.pid || ' (' || coalesce(a.usename, '?') || ', '
                    || coalesce(nullif(a.application_name, ''), 'no application name') || ')',
                    'pid ' || l.pid) AS name, a.xact_start AS started_at
    FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'transactionid' AND l.granted AND l.mode = 'ExclusiveLock' AND l.pid IS NOT NULL
      AND l.transactionid = CAST(kino.horizon() AS xid)
    UNION ALL
    SELECT 'prepared transaction ' || gid || ' of ' || owner, prepared FROM pg_catalog.pg_prepared_xacts
    WHERE transaction = CAST(kino.horizon() AS xid)
""")


def horizon_holders(connection: sa.Connection) -> Sequence[Holder]:
    """Return the sessions and prepared transactions that hold back the horizon at this moment; empty if none does."""
    return [Holder(row.name, row.started_at) for row in connection.execute(_HOLDERS)]
