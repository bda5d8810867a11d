"""Which window a run compares: from where the last complete run ended to the newest sample below the horizon."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BadWindow
from kino_refunds.reconciliation.comparison import Scope, Window

if TYPE_CHECKING:
    from kino_refunds.reconciliation.checks import Check


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a run was asked for: a window of time (None: from where the last complete run ended), or everything."""

    since: datetime | None = None
    until: datetime | None = None
    full: bool = False

    @property
    def has_window(self) -> bool:
        """Whether a window was named: then an interrupted run of another window is given up."""
        return self.full or self.since is not None or self.until is not None


_NEWEST = sa.text("""
    SELECT sampled_at, CAST(CAST(xid AS text) AS bigint) AS xid FROM kino.xid_clock
    WHERE xid < kino.horizon() ORDER BY xid DESC LIMIT 1
""")
_SAMPLE_BEFORE = sa.text("""
    SELECT sampled_at, CAST(CAST(xid AS text) AS bigint) AS xid FROM kino.xid_clock
    WHERE sampled_at <= :instant AND xid < kino.horizon() ORDER BY xid DESC LIMIT 1
""")
# Complete runs end to end, from the beginning: a run of a later window that was asked for by hand leaves a gap, and
# what lies in the gap was not compared.
_REACH = sa.text("""
    WITH RECURSIVE run AS (
        SELECT run_id, CAST(CAST(to_xid AS text) AS bigint) AS to_xid, since, until,
               -- One that a person began later is no beginning: what ended before was compared by nobody.
               greatest(CAST(CAST(from_xid AS text) AS bigint), CASE WHEN detail ? 'asked_since' THEN 1 ELSE 0 END)
                   AS from_xid
        FROM kino.check_run WHERE "check" = :check AND state = 'complete' AND until IS NOT NULL
    ), reached AS (
        SELECT *, max(to_xid) OVER (ORDER BY from_xid, run_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reach
        FROM run
    ), islands AS (
        SELECT *, count(*) FILTER (WHERE reach IS NULL AND from_xid > 0 OR from_xid > reach)
                  OVER (ORDER BY from_xid, run_id) AS island
        FROM reached
    )
    SELECT max(to_xid) AS to_xid, max(until) AS until FROM islands WHERE island = 0
""")


def choose_window(check: Check, connection: sa.Connection, scope: Scope, wanted: Wanted) -> tuple[Window, str | None]:
    """Return what to compare, and why it cannot be compared, if that is so; raises BadWindow."""
    if wanted.since is not None and wanted.until is not None and wanted.since >= wanted.until:
        raise BadWindow(
            f"the window ends at {wanted.until:%Y-%m-%dT%H:%M:%SZ}, before it begins: exchange --since and --until"
        )
    newest = connection.execute(_NEWEST).one_or_none()
    if newest is None:
        raise BadWindow(
            "no sample of the clock is below the horizon yet: a worker takes one every minute, try again then"
        )
    latest = min(newest.sampled_at, scope.now)
    for name, instant in (("--since", wanted.since), ("--until", wanted.until)):
        if instant is not None and instant > latest:
            raise BadWindow(
                f"{name} {instant:%Y-%m-%dT%H:%M:%SZ} is later than what can be compared now: the latest is"
                f" {latest.isoformat().replace('+00:00', 'Z')}"
            )
    reach = connection.execute(_REACH, {"check": check.name}).one()
    until_at, to_xid = latest, newest.xid
    if wanted.until is not None:
        # To the sample, and not to the instant: what was written in between has a number that is not in the window.
        sample = connection.execute(_SAMPLE_BEFORE, {"instant": wanted.until}).one_or_none()
        if sample is None:
            raise BadWindow(f"no sample of the clock is as old as --until {wanted.until:%Y-%m-%dT%H:%M:%SZ}")
        until_at, to_xid = sample.sampled_at, sample.xid
    since_at, from_xid = reach.until, reach.to_xid or 0
    if wanted.full:
        since_at, from_xid = None, 0
    elif wanted.since is not None:
        sample = connection.execute(_SAMPLE_BEFORE, {"instant": wanted.since}).one_or_none()
        since_at, from_xid = wanted.since, sample.xid if sample is not None else 0
    window = Window(since=since_at, until=until_at, from_xid=min(from_xid, to_xid), to_xid=to_xid)
    if check.window is None:
        return window, None
    return check.window(connection, replace(scope, window=window), wanted_since=wanted.since, wanted_until=wanted.until)
