"""The check `corrected`: each correction moved its charge's credits, and ends the contradiction that it corrects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, rows_in_pages
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

_CORRECTED = """
    SELECT k.charge_id, c.job_id, coalesce(c.credits, 0) AS credits, s.kind, k.reference, k.corrected_at,
           (SELECT coalesce(sum(t.credits), 0) FROM kino.transfer t
            WHERE t.charge_id = k.charge_id AND t.kind = 'reversal') AS moved
    FROM kino.correction k
    LEFT JOIN kino.charge c USING (charge_id)
    LEFT JOIN kino.settlement s USING (charge_id)
"""
_WINDOW = sa.text(f"""
    {_CORRECTED}
    WHERE k.xid >= CAST(CAST(:from_xid AS text) AS xid8) AND k.xid < CAST(CAST(:to_xid AS text) AS xid8)
      AND k.charge_id > :after
    ORDER BY k.charge_id
""")
_SOME = sa.text(f"{_CORRECTED} WHERE k.charge_id = ANY (CAST(:charge_ids AS bigint[]))")


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Compare every correction of the window with its charge and its transfers."""
    window = scope.window
    wanted = {"from_xid": window.from_xid, "to_xid": window.to_xid, "after": cursor.get("charge_id", 0)}
    for rows in rows_in_pages(scope.engine, _WINDOW, wanted):
        breaks = [found for row in rows if (found := _differs(row)) is not None]
        yield Page(cursor={"charge_id": rows[-1].charge_id}, compared=len(rows), broken=len(breaks), breaks=breaks)


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Look whether the charges of these breaks are corrected by now, and whether their credits moved."""
    with scope.engine.connect() as connection:
        rows = connection.execute(
            _SOME, {"charge_ids": [each.charge_id for each in live if each.charge_id is not None]}
        ).all()
    corrections = {row.charge_id: _differs(row) for row in rows}
    return {
        each.break_id: corrections[each.charge_id]
        for each in live
        if each.charge_id in corrections
        # A contradiction ends with its correction; one whose credits did not move stays, beside what says so.
        and (each.kind == BreakKind.CORRECTION_DIFFERS or corrections[each.charge_id] is None)
    }


def _differs(row: sa.Row[Any]) -> Break | None:
    if row.kind == "captured" and row.moved == row.credits:
        return None
    named = {"job_id": row.job_id} if row.job_id is not None else {"subject": f"charge:{row.charge_id}"}
    return Break(
        kind=BreakKind.CORRECTION_DIFFERS,
        charge_id=row.charge_id,
        credits=abs(row.credits - int(row.moved)),
        detail=f"the correction {row.reference} refunds {row.credits:,} credits of a charge that is"
        f" {row.kind or 'not settled'}; its transfers moved {row.moved:,}",
        sides=f"{row.kind} {row.credits} / {row.moved}",
        happened_at=row.corrected_at,
        **named,
    )
