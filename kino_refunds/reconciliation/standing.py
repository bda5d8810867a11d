"""How each check stands: its last run, how far and since when it has compared everything, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from kino_refunds.reconciliation.checks import CHECKS, Check
from kino_refunds.reconciliation.run_rows import Coverage, Run, read_coverage, read_last_runs

UNSEEN_FOR = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class CheckStanding:
    """One check as it stands. `live` breaks wait; `detect` is the median time to detect of the last 30 days' breaks."""

    check: Check
    last: Run | None
    coverage: Coverage | None
    """What its complete runs compared without a gap; None if none was complete."""
    live: int
    credits: int
    """Whole credits that its live breaks are about."""
    detect: timedelta | None
    unseen: int
    """Live breaks that no run could look at again for UNSEEN_FOR: the check cannot compare them, and they stay."""


_BREAKS = sa.text("""
    SELECT kind, count(*) FILTER (WHERE is_live) AS live, coalesce(sum(credits) FILTER (WHERE is_live), 0) AS credits
    FROM (SELECT kind, credits, status IN ('open', 'investigating', 'repaired') AS is_live FROM kino.break
          WHERE NOT canary) b
    GROUP BY kind
""")
_UNSEEN = sa.text("""
    SELECT count(*) FROM kino.break
    WHERE kind = ANY (CAST(:kinds AS text[])) AND NOT canary AND status IN ('open', 'investigating', 'repaired')
      AND last_seen_at < kino.clock() - CAST(:unseen_for AS interval)
""")
_DETECT = sa.text("""
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY greatest(first_seen_at - happened_at, interval '0'))
    FROM kino.break
    WHERE kind = ANY (CAST(:kinds AS text[])) AND happened_at IS NOT NULL AND NOT canary
      AND first_seen_at > kino.clock() - interval '30 days'
""")


_ALL_LIVE = sa.text("""
    SELECT count(*) FROM kino.break WHERE NOT canary AND status IN ('open', 'investigating', 'repaired')
""")


def count_live(connection: sa.Connection) -> int:
    """Return how many breaks live, those that events and people have opened among them."""
    return int(connection.execute(_ALL_LIVE).scalar_one())


def read_checks(connection: sa.Connection) -> list[CheckStanding]:
    """Return how every check of the registry stands, in its order; raises what Postgres raises."""
    breaks = {row.kind: row for row in connection.execute(_BREAKS)}
    last = read_last_runs(connection, [check.name for check in CHECKS])
    return [
        CheckStanding(
            check=check,
            last=last.get(check.name),
            coverage=read_coverage(connection, check.name),
            live=sum(breaks[kind].live for kind in check.finds if kind in breaks),
            credits=sum(int(breaks[kind].credits) for kind in check.finds if kind in breaks),
            detect=connection.execute(_DETECT, {"kinds": [*check.finds]}).scalar_one(),
            unseen=connection.execute(_UNSEEN, {"kinds": [*check.closes], "unseen_for": UNSEEN_FOR}).scalar_one(),
        )
        for check in CHECKS
    ]
