"""The one clock that decides: `kino.clock()`, one line over Postgres' own clock (design, first page).

The clocks of hosts differ. A sweep on a host whose clock was an hour fast refunded jobs that were running. A host's
clock may time pauses and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

if TYPE_CHECKING:
    from datetime import datetime

CLOCK_BODY: Final = "SELECT pg_catalog.clock_timestamp()"

_READ = sa.text("SELECT kino.clock()")
_IS_OURS = sa.text("""
    SELECT p.prosrc = :body AND l.lanname = 'sql' AND NOT p.prosecdef AND p.proconfig IS NULL
           AND p.prorettype = CAST('timestamptz' AS regtype)
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = 'kino')
      AND p.proname = 'clock' AND p.pronargs = 0
""")


def read_clock(connection: sa.Connection) -> datetime:
    """Return the present instant by the ledger's database: an aware datetime in UTC."""
    now: datetime = connection.execute(_READ).scalar_one()
    return now


def is_real_clock(connection: sa.Connection) -> bool:
    """Tell whether `kino.clock()` is the function that migrations install, and not a test's."""
    return bool(connection.execute(_IS_OURS, {"body": CLOCK_BODY}).scalar_one_or_none())


def restore_clock(connection: sa.Connection) -> bool:
    """Install the real clock if another function has its name; return whether that was so."""
    if is_real_clock(connection):
        return False
    connection.exec_driver_sql(
        f"CREATE OR REPLACE FUNCTION kino.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE"
        f" AS '{CLOCK_BODY}'"
    )
    return True
