#!/usr/bin/env python
"""Does intake's heart beat on this host? Exit code 0, or 1 with one line that says what is wrong.

For a container that holds one worker. It fails only where a restart helps: an intake thread that is
gone or stuck although a heartbeat could be written. A Postgres that is away, read-only, full or locked is not
fixed by restarting every worker, and a paused intake still writes heartbeats.
"""

from __future__ import annotations

import socket
import sys

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.settings import load_settings

# Six heartbeats: a worker that searches a bad batch for its bad event writes none in between.
SILENT_S_MAX = 60

# A heartbeat on trial, rolled back: where it fails, that is why the real ones do not come.
_TRY = sa.text("UPDATE kino.intake_worker SET seen_at = seen_at WHERE host = :host AND stopped_at IS NULL")
_BEAT = sa.text(
    "SELECT EXTRACT(EPOCH FROM kino.clock() - max(seen_at)) FROM kino.intake_worker"
    " WHERE host = :host AND stopped_at IS NULL"
)


def main() -> str | None:
    """Return what is wrong, or None."""
    settings = load_settings()
    engine = create_engine(
        settings.require_database_url(),
        limits=settings.session_limits,
        application_name="kino-healthcheck",
        pooled=False,
    )
    host = socket.gethostname()
    try:
        with engine.connect() as connection:
            silent_s = connection.execute(_BEAT, {"host": host}).scalar_one()
            connection.execute(_TRY, {"host": host})
            connection.rollback()
    except sa.exc.DBAPIError:
        return None
    if silent_s is None:
        return f"no intake of host {host} has written a heartbeat"
    if silent_s > SILENT_S_MAX:
        return f"the last heartbeat of host {host} is {silent_s:.0f} s old"
    return None


if __name__ == "__main__":
    sys.exit(main())
