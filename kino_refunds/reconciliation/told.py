"""The check `relay`: the product was told of every refund and every correction (design, part B).

What lies behind the relay's cursor counts as told: of refunds from before it was switched on, which the product was
never told, the ledger knows no more than of those that Redis lost (`kino-refunds relay rewind`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, Window, rows_in_pages
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from datetime import datetime

OFF = "the relay is off: KINO_RELAY_QUEUE is not set, and the product is told of nothing"
NO_CURSOR = "the relay has not run yet: it has no cursor"

_REFUNDS = """
    SELECT r.charge_id, c.job_id, c.credits, r.what, r.at,
           r.xid < k.xid OR r.xid = k.xid AND r.charge_id <= k.charge_id AS told
    FROM ({refunds}) r JOIN kino.charge c USING (charge_id) CROSS JOIN kino.relay_cursor k
"""
_SETTLED = "SELECT charge_id, xid, 'refund' AS what, settled_at AS at FROM kino.settlement WHERE kind = 'refunded'"
_CORRECTED = "SELECT charge_id, xid, 'correction' AS what, corrected_at AS at FROM kino.correction WHERE true"
_WINDOW = sa.text(
    _REFUNDS.format(
        refunds=f"""
            {_SETTLED} AND CAST(CAST(xid AS text) AS bigint) >= :from_xid
                AND CAST(CAST(xid AS text) AS bigint) < :to_xid
            UNION ALL
            {_CORRECTED} AND xid >= CAST(CAST(:from_xid AS text) AS xid8) AND xid < CAST(CAST(:to_xid AS text) AS xid8)
            OFFSET 0
        """
    )
    + " WHERE r.charge_id > :after ORDER BY r.charge_id"
)
_SOME = sa.text(
    _REFUNDS.format(
        refunds=f"""
            {_SETTLED} AND charge_id = ANY (CAST(:charge_ids AS bigint[]))
            UNION ALL {_CORRECTED} AND charge_id = ANY (CAST(:charge_ids AS bigint[]))
        """
    )
)
_EARLIER = sa.text("""
    SELECT sampled_at, CAST(CAST(xid AS text) AS bigint) AS xid FROM kino.xid_clock
    WHERE sampled_at <= :before AND xid < kino.horizon() ORDER BY xid DESC LIMIT 1
""")
_HAS_CURSOR = sa.text("SELECT EXISTS (SELECT FROM kino.relay_cursor)")


def window(
    connection: sa.Connection,
    scope: Scope,
    *,
    wanted_since: datetime | None,  # noqa: ARG001 - every check's window is asked for so
    wanted_until: datetime | None,
) -> tuple[Window, str | None]:
    """Return the window up to the grace ago: what is younger may still be on its way to the product."""
    asked = scope.window
    if scope.relay_queue is None:
        return asked, OFF
    if not connection.execute(_HAS_CURSOR).scalar_one():
        return asked, NO_CURSOR
    before = min(scope.now - scope.grace, wanted_until or asked.until)
    sample = connection.execute(_EARLIER, {"before": before}).one_or_none()
    to_xid, until = (sample.xid, sample.sampled_at) if sample is not None else (0, before)
    to_xid = max(asked.from_xid, to_xid)
    return Window(
        since=asked.since, until=max(until, asked.since or until), from_xid=asked.from_xid, to_xid=to_xid
    ), None


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Compare every refund and correction of the window with the relay's cursor."""
    wanted = {
        "from_xid": scope.window.from_xid,
        "to_xid": scope.window.to_xid,
        "after": cursor.get("charge_id", 0),
    }
    for rows in rows_in_pages(scope.engine, _WINDOW, wanted):
        untold = [_untold(row) for row in rows if not row.told]
        yield Page(cursor={"charge_id": rows[-1].charge_id}, compared=len(rows), broken=len(untold), breaks=untold)


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Look whether the product was told by now."""
    with scope.engine.connect() as connection:
        rows = connection.execute(
            _SOME, {"charge_ids": [each.charge_id for each in live if each.charge_id is not None]}
        ).all()
    untold = {row.charge_id: _untold(row) for row in rows if not row.told}
    known = {row.charge_id for row in rows}
    return {each.break_id: untold.get(each.charge_id) for each in live if each.charge_id in known}


def _untold(row: sa.Row[Any]) -> Break:
    return Break(
        kind=BreakKind.UNTOLD_REFUND,
        job_id=row.job_id,
        charge_id=row.charge_id,
        credits=row.credits,
        detail=f"the product was not told of this {row.what} of {row.at:%Y-%m-%d %H:%M:%SZ}:"
        " the relay has not come so far",
        sides=f"{row.what} / not told",
        happened_at=row.at,
    )
