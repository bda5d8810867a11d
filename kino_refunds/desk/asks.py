"""The overdue sweep by hand: ask the job source about open charges, also before their deadline."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from kino_refunds.reconciliation.overdue import OVERDUE, sweep_overdue
from kino_refunds.schedule import Entry, begin_by_hand, finish_slot

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from kino_refunds.db.engine import Engine
    from kino_refunds.reconciliation.overdue import OverdueReport, OverdueRules, Which
    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settlement.rules import Rules

BY_HAND = Entry("by hand: overdue run", timedelta(0), "a person asked about jobs without an event")
"""The row of `kino.schedule_slot` that keeps the person. Rows with this name exist, so the name stays."""


def ask_now(
    engine: Engine,
    client: redis.Redis,
    source: JobSource | None,
    rules: Rules,
    *,
    overdue: OverdueRules,
    actor: str,
    which: Which = OVERDUE,
    dry_run: bool,
    progress: Callable[[OverdueReport], None],
) -> OverdueReport:
    """Run the overdue sweep once over the charges of `which`, and return its report.

    A row keeps the person and the report, except in a dry run. Raises what the sweep raises; the row then stays without
    a result.
    """
    slot_at = None
    if not dry_run:
        with engine.begin() as connection:
            slot_at = begin_by_hand(connection, BY_HAND, actor=actor)
    report = sweep_overdue(
        engine, client, source, rules, overdue=overdue, which=which, dry_run=dry_run, progress=progress
    )
    if slot_at is not None:
        with engine.begin() as connection:
            finish_slot(connection, BY_HAND, slot_at, report.as_dict())
    return report
