"""The check `settled`: no charge is open long after its job should have ended (P9; design, part B)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.reconciliation.comparison import PAGE, LiveBreak, Page, Scope
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from datetime import datetime

OVERDUE_MAX = timedelta(minutes=5)
"""P9: a job without an event is settled within 5 minutes of its deadline and grace; until then the sweep asks."""

# What is known of a charge that nothing ended: the first that is there is the reason. The kind that the overdue sweep
# raises for a job that runs for too long says the same, and no second break is opened beside it.
_OPEN = """
    SELECT o.charge_id, c.job_id, o.credits, o.deadline_at,
           CASE
               WHEN p.outcome IS NOT NULL THEN 'its event waits for another try (' || p.outcome || ')'
               WHEN d.dead_letter_id IS NOT NULL THEN 'dead letter ' || d.dead_letter_id || ' holds its event ('
                                                      || d.reason || ')'
               WHEN a.last_answer = 'running' THEN 'the job source says that it is running'
               WHEN a.last_answer IS NOT NULL THEN 'the job source answered ' || a.last_answer || ', ' || a.asks
                    || ' times in a row, and a presumed timeout is withheld'
               ELSE 'the job source has not answered for it'
           END AS why,
           EXISTS (SELECT FROM kino.break b WHERE b.kind = 'running_past_cap' AND b.job_id = c.job_id
                   AND b.subject IS NULL AND b.status IN ('open', 'investigating', 'repaired')) AS runs_for_long
    FROM kino.open_charge o
    JOIN kino.charge c USING (charge_id)
    LEFT JOIN kino.overdue_ask a USING (charge_id)
    LEFT JOIN LATERAL (SELECT outcome FROM kino.pending_event e WHERE e.job_id = c.job_id LIMIT 1) p ON true
    LEFT JOIN LATERAL (SELECT dead_letter_id, reason FROM kino.dead_letter l
                       WHERE l.job_id = c.job_id AND l.status = 'open' LIMIT 1) d ON true
"""
_PAGE = sa.text(f"""
    {_OPEN}
    WHERE CAST(:after_deadline AS timestamptz) IS NULL
       OR (o.deadline_at, o.charge_id) > (CAST(:after_deadline AS timestamptz), CAST(:after_id AS bigint))
    ORDER BY o.deadline_at, o.charge_id LIMIT :limit
""")
_SOME = sa.text(f"{_OPEN} WHERE o.charge_id = ANY (CAST(:charge_ids AS bigint[]))")


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Compare every open charge with the clock."""
    after = cursor
    while True:
        with scope.engine.connect() as connection:
            rows = connection.execute(
                _PAGE, {"after_deadline": after.get("deadline_at"), "after_id": after.get("charge_id"), "limit": PAGE}
            ).all()
        if not rows:
            return
        late = [row for row in rows if _is_late(row.deadline_at, scope)]
        after = {"deadline_at": rows[-1].deadline_at.isoformat(), "charge_id": rows[-1].charge_id}
        yield Page(
            cursor=after,
            compared=len(rows),
            broken=len(late),
            breaks=[_break_of(row, scope) for row in late if not row.runs_for_long],
        )


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Look whether the charges of these breaks are still open, and late."""
    with scope.engine.connect() as connection:
        rows = connection.execute(
            _SOME, {"charge_ids": [each.charge_id for each in live if each.charge_id is not None]}
        ).all()
    late = {row.charge_id: _break_of(row, scope) for row in rows if _is_late(row.deadline_at, scope)}
    # A job that runs past its cap stays that kind for as long as its charge is open.
    still_open = {row.charge_id for row in rows}
    found: dict[int, Break | None] = {}
    for each in live:
        if each.kind == BreakKind.OPEN_PAST_DEADLINE:
            found[each.break_id] = late.get(each.charge_id or 0)
        elif each.charge_id not in still_open:
            found[each.break_id] = None
    return found


def _is_late(deadline_at: datetime, scope: Scope) -> bool:
    return deadline_at + scope.overdue_grace + OVERDUE_MAX < scope.now


def _break_of(row: sa.Row[Any], scope: Scope) -> Break:
    due_at = row.deadline_at + scope.overdue_grace
    return Break(
        kind=BreakKind.OPEN_PAST_DEADLINE,
        job_id=row.job_id,
        charge_id=row.charge_id,
        credits=row.credits,
        detail=f"nothing has ended this charge since {due_at:%Y-%m-%d %H:%M:%SZ}, its deadline and grace: {row.why}",
        sides="open / past its deadline",
        happened_at=due_at + OVERDUE_MAX,
    )
