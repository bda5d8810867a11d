"""Compare the clocks, because presumed timeouts and expiry cannot be undone (design, first page).

One clock decides (`kino.clock()`), but a clock can be wrong. Refunds and captures by event go on, whatever it says. A
presumed timeout or an expired lot by a wrong clock gives or takes credits, and nothing reverses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import redis
import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterator

SKEW_MAX = timedelta(seconds=30)
"""Far above the error that NTP leaves and a slow answer adds, and far below any deadline or expiry that matters."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of Postgres, this host and Redis, read within one moment, and the time of the ledger's newest row."""

    postgres: datetime
    host: datetime
    redis: datetime | None
    """None: Redis could not be read, so no second clock confirms Postgres'."""
    decides: datetime
    """`kino.clock()`: Postgres' own clock, except in tests."""
    newest_row: datetime | None

    def disagreement(self) -> str | None:
        """Return in one sentence why timeouts and expiry must be withheld; None if the clocks agree."""
        return next(self._disagreements(), None)

    def _disagreements(self) -> Iterator[str]:
        if self.redis is None:
            yield "Redis' clock cannot be read, so no second clock confirms Postgres'"
            return
        clocks = {"Postgres": self.postgres, "this host": self.host, "Redis": self.redis}
        behind, ahead = min(clocks, key=clocks.__getitem__), max(clocks, key=clocks.__getitem__)
        if (apart := clocks[ahead] - clocks[behind]) > SKEW_MAX:
            yield f"the clock of {ahead} is {apart.total_seconds():,.0f} s ahead of that of {behind}"
        if self.newest_row is not None and (apart := self.newest_row - self.decides) > SKEW_MAX:
            yield f"Postgres' clock is {apart.total_seconds():,.0f} s behind the ledger's newest row: it was set back"


# By primary key, backwards: four rows are read, whatever the size of the ledger.
_READ = sa.text("""
    SELECT clock_timestamp() AS postgres, kino.clock() AS decides,
           greatest((SELECT opened_at FROM kino.charge ORDER BY charge_id DESC LIMIT 1),
                    (SELECT created_at FROM kino.transfer ORDER BY transfer_id DESC LIMIT 1),
                    (SELECT granted_at FROM kino.credit_lot ORDER BY lot_id DESC LIMIT 1),
                    (SELECT sampled_at FROM kino.xid_clock ORDER BY xid DESC LIMIT 1)) AS newest_row
""")


def read_clocks(connection: sa.Connection, redis_client: redis.Redis) -> Clocks:
    """Return the clocks of Postgres, this host and Redis; raises what Postgres raises."""
    row = connection.execute(_READ).one()
    host = datetime.now(UTC)  # only compared with the others
    return Clocks(
        postgres=row.postgres,
        host=host,
        redis=_redis_clock(redis_client),
        decides=row.decides,
        newest_row=row.newest_row,
    )


def _redis_clock(client: redis.Redis) -> datetime | None:
    try:
        seconds, micros = client.time()
    except (redis.RedisError, TypeError, ValueError, IndexError):  # another kind of server may answer anything
        return None
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)
