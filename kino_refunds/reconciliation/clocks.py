"""What cannot be undone needs two clocks: our presumed timeouts and expiry (design, first page).

One clock decides (`kino.clock()`), but a clock can be wrong. Refunds and captures by event go on whatever it says; a
presumed timeout or an expired lot on a wrong clock takes credits, or gives them, for good.
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
"""Far above what NTP leaves and a slow answer adds, far below any deadline or expiry that somebody would miss."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of the three parties, read within one moment, and the newest time that the ledger has a row of."""

    postgres: datetime
    host: datetime
    redis: datetime | None
    """None: Redis could not be read, so nobody confirms the others."""
    decides: datetime
    """`kino.clock()`, which is Postgres' own but in tests."""
    newest_row: datetime | None

    def disagreement(self) -> str | None:
        """Say in one sentence why these clocks decide nothing that cannot be undone; None if they agree."""
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
    """Read the clocks of Postgres, this host and Redis; raises what Postgres raises."""
    row = connection.execute(_READ).one()
    host = datetime.now(UTC)  # one of the clocks that are compared
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
    except (redis.RedisError, TypeError, ValueError, IndexError):  # a server of another kind answers anything
        return None
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)
