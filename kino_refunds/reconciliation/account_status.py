"""The check `account_status`: each settlement judged its account by what the account's history says (clause 6)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kino_refunds.ledger.accounts import StatusHistory, read_status_histories
from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope
from kino_refunds.reconciliation.decisions import NO_ENDING, Settled, settlements_in, settlements_of
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

TOLERANCE = timedelta(minutes=10)
"""A status that the account had within this of the event counts as right: clocks differ, and a change that was
committed while a batch was read may lie on either side of it."""


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Compare the account status of every settlement of the window with the account's history."""
    for settled in settlements_in(scope, cursor):
        known = [each for each in settled if each.account_status is not None]
        breaks = [found for found in _compare(scope, known).values() if found is not None]
        yield Page(
            cursor={"charge_id": settled[-1].charge_id},
            compared=len(known),
            broken=len(breaks),
            breaks=breaks,
            not_comparable={NO_ENDING: len(settled) - len(known)} if len(known) < len(settled) else {},
        )


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Compare the settlements of these breaks again; one whose charge was corrected is settled as the history says."""
    settled = settlements_of(scope, live)
    found = _compare(scope, [each for each in settled.values() if each.account_status is not None])
    return {each.break_id: found[each.charge_id] for each in live if each.charge_id in found}


def _compare(scope: Scope, settled: Iterable[Settled]) -> dict[int, Break | None]:
    """Return by charge id the break, or None where status and history agree."""
    settled = list(settled)
    with scope.engine.connect() as connection:
        histories = read_status_histories(connection, {each.account_id for each in settled})
    return {each.charge_id: _differs(each, histories.get(each.account_id, StatusHistory())) for each in settled}


def _differs(each: Settled, history: StatusHistory) -> Break | None:
    begins, ends = each.as_of - TOLERANCE, each.as_of + TOLERANCE
    instants = {begins, ends, *(changed_at for changed_at, _, _ in history.changes if begins <= changed_at <= ends)}
    statuses = {history.at(instant) for instant in instants}
    if each.corrected or each.account_status in statuses:
        return None
    had = " or ".join(sorted(statuses))
    return Break(
        kind=BreakKind.ACCOUNT_STATUS_DIFFERS,
        job_id=each.job_id,
        charge_id=each.charge_id,
        credits=each.credits,
        detail=f"the settlement judged account {each.account_id} as {each.account_status}; at the event's time, and"
        f" {TOLERANCE.total_seconds() / 60:.0f} minutes around it, the account's history says {had}",
        sides=f"{each.account_status} / {had}",
        happened_at=each.settled_at,
    )
