"""The check `decisions`: every settlement judged again, from what it stores, gives the same (P10; design, part B)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.events.schema import (
    ErrorOrigin,
    Event,
    JobCompleted,
    JobFailed,
    JobSafetyRejected,
    JobTimedOut,
    SafetyStage,
)
from kino_refunds.ledger.accounts import PastStatus
from kino_refunds.ledger.values import SettlementKind
from kino_refunds.policy.automatic import Coverage, coverage_of
from kino_refunds.policy.document import Policy, PolicyDocument, clamped
from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, rows_in_pages
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

NO_ENDING = "settled before migration 0005, which first stored how the job ended"
UNKNOWN_VERSION = "settled by a policy version that this build does not have"
READ_TO_SETTLED = timedelta(minutes=1)
"""What may lie between the instant that a settlement was ruled by and the one that its row carries: a batch's time."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A settlement with what it was decided from; `credits` are whole."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    opened_at: datetime
    kind: str
    reason: str
    clause: str
    policy_version: str
    ending: str | None
    account_status: str | None
    event_time: datetime
    settled_at: datetime
    corrected: bool
    """Whether the capture was corrected: then the customer has what the policy says, whatever was decided first."""

    @property
    def as_of(self) -> datetime:
        """The instant whose policy and account status apply (design, section 5)."""
        return clamped(self.event_time, opened_at=self.opened_at, now=self.settled_at)


_COLUMNS = """
    s.charge_id, c.job_id, c.account_id, c.credits, c.opened_at, s.kind, s.reason, s.clause, s.policy_version, s.ending,
    s.account_status, s.event_time, s.settled_at,
    EXISTS (SELECT FROM kino.correction k WHERE k.charge_id = s.charge_id)
"""
# In the order of the charges. Of a window the rows are found by the index over transactions and then sorted: OFFSET 0
# keeps the planner from walking through all charges in order instead.
_ALL = sa.text(f"""
    SELECT {_COLUMNS} FROM kino.settlement s JOIN kino.charge c USING (charge_id)
    WHERE s.charge_id > :after AND CAST(CAST(s.xid AS text) AS bigint) < :to_xid ORDER BY s.charge_id
""")  # noqa: S608
_NEW = sa.text(f"""
    SELECT {_COLUMNS}
    FROM (SELECT * FROM kino.settlement
          WHERE CAST(CAST(xid AS text) AS bigint) >= :from_xid AND CAST(CAST(xid AS text) AS bigint) < :to_xid
            AND charge_id > :after OFFSET 0) s
    CROSS JOIN LATERAL (SELECT * FROM kino.charge own WHERE own.charge_id = s.charge_id OFFSET 0) c
    ORDER BY s.charge_id
""")  # noqa: S608
_SOME = sa.text(f"""
    SELECT {_COLUMNS} FROM kino.settlement s JOIN kino.charge c USING (charge_id)
    WHERE s.charge_id = ANY (CAST(:charge_ids AS bigint[]))
""")  # noqa: S608


def settlements_in(scope: Scope, cursor: Mapping[str, Any]) -> Iterator[list[Settled]]:
    """Give the settlements of the scope's window in pages, by charge, behind the cursor's `charge_id`."""
    window = scope.window
    wanted = {"after": cursor.get("charge_id", 0), "from_xid": window.from_xid, "to_xid": window.to_xid}
    statement = _ALL if window.from_xid == 0 else _NEW
    for rows in rows_in_pages(scope.engine, statement, wanted):
        yield [Settled(*row) for row in map(tuple, rows)]


def settlements_of(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Settled]:
    """Return the settlements that these breaks are about, by charge id."""
    charge_ids = [each.charge_id for each in live if each.charge_id is not None]
    with scope.engine.connect() as connection:
        rows = connection.execute(_SOME, {"charge_ids": charge_ids}).all()
    return {row.charge_id: Settled(*tuple(row)) for row in rows}


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Judge every settlement of the window again, and give what differs."""
    for settled in settlements_in(scope, cursor):
        not_comparable: dict[str, int] = {}
        breaks = []
        for each in settled:
            judged = _judge(each, scope.policy)
            if isinstance(judged, str):
                not_comparable[judged] = not_comparable.get(judged, 0) + 1
            elif judged is not None:
                breaks.append(judged)
        compared = len(settled) - sum(not_comparable.values())
        yield Page(
            cursor={"charge_id": settled[-1].charge_id},
            compared=compared,
            broken=len(breaks),
            breaks=breaks,
            not_comparable=not_comparable,
        )


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Judge the settlements of these breaks again."""
    settled = settlements_of(scope, live)
    judged = {
        each.break_id: _judge(settled[each.charge_id], scope.policy) for each in live if each.charge_id in settled
    }
    return {break_id: found for break_id, found in judged.items() if not isinstance(found, str)}


def _judge(each: Settled, policy: Policy) -> Break | str | None:
    """Return the break, None if the settlement is as the policy says, or why it cannot be judged."""
    if each.ending is None or each.account_status is None:
        return NO_ENDING
    if each.corrected:
        return None
    document = _document(policy, each.policy_version)
    if document is None:
        return UNKNOWN_VERSION
    in_force = {policy.at(each.as_of).version}
    if each.event_time >= each.settled_at - READ_TO_SETTLED:
        in_force.add(policy.at(each.as_of - READ_TO_SETTLED).version)
    violation = each.account_status == PastStatus.TERMINATED_FOR_VIOLATION
    coverage = _coverage(each.ending, document, violation)
    if coverage is None:
        return _differs(each, f"the ending {each.ending!r} is none that an event can have", "no ending")
    due = (SettlementKind.REFUNDED if coverage.refund else SettlementKind.CAPTURED, coverage.reason, coverage.clause)
    if (each.kind, each.reason, each.clause) != due:
        says = " ".join(due)
        return _differs(
            each, f"policy {document.version} says {says} for {each.ending} of an {each.account_status} account", says
        )
    if each.policy_version not in in_force:
        named = " or ".join(sorted(in_force))
        return _differs(each, f"at the event's time policy {named} was in force", named)
    return None


def _differs(each: Settled, why: str, theirs: str) -> Break:
    ours = f"{each.kind} {each.reason} {each.clause} by {each.policy_version}"
    return Break(
        kind=BreakKind.DECISION_DIFFERS,
        job_id=each.job_id,
        charge_id=each.charge_id,
        credits=each.credits,
        detail=f"the settlement says {ours}; {why}",
        sides=f"{ours} / {theirs}",
        happened_at=each.settled_at,
    )


def _document(policy: Policy, version: str) -> PolicyDocument | None:
    return next((document for document in policy.versions if document.version == version), None)


@cache
def _coverage(ending: str, document: PolicyDocument, violation: bool) -> Coverage | None:
    event = event_of_ending(ending)
    return None if event is None else coverage_of(event, document, terminated_for_violation=violation)


@cache
def event_of_ending(ending: str) -> Event | None:
    """Return an event that ends a job as `ending` says (the word that a settlement stores); None for another word.

    Only its ending means something: id, job and time stand for any.
    """
    common: dict[str, Any] = {
        "id": "judged-again",
        "source": "kino",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "job_id": "any",
    }
    return {each.ending: each for each in _every_ending(common)}.get(ending)


def _every_ending(common: Mapping[str, Any]) -> Iterator[Event]:
    yield JobCompleted.of(**common)
    for origin in ErrorOrigin:
        yield JobFailed.of(error={"code": "any", "origin": origin}, **common)
    for result_produced in (False, True):
        yield JobTimedOut.of(result_produced=result_produced, **common)
    for stage in SafetyStage:
        yield JobSafetyRejected.of(stage=stage, category="any", **common)
