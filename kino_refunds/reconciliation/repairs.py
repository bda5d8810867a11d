"""Repair a break: by the event that never came, or by a reversal of the capture; once a charge (design, part B).

There is no automatic repair. A person asks for each, and the next run of the break's check closes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BreakNotFound, CannotRepair
from kino_refunds.events.schema import Event, stored_ids
from kino_refunds.ledger import Reversal, reverse_charges
from kino_refunds.ledger.accounts import PastStatus
from kino_refunds.ledger.values import LotState, SettlementKind
from kino_refunds.policy.automatic import Coverage, coverage_of
from kino_refunds.reconciliation.decisions import event_of_ending
from kino_refunds.reconciliation.endings import event_of
from kino_refunds.reconciliation.guard import OverdueCharge
from kino_refunds.reconciliation.sources import Answer, JobState, answers_of
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.breaks import LIVE, Break, BreakKind, raise_breaks
from kino_refunds.settlement.charges import read_charges
from kino_refunds.settlement.decide import decide
from kino_refunds.settlement.deliveries import Delivery, delivery_of
from kino_refunds.settlement.inbox import read_record
from kino_refunds.settlement.outcomes import SETTLING, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings
    from kino_refunds.settlement.rules import Rules


class Means(StrEnum):
    """How a break is repaired."""

    EVENT = "event"
    """The event that never came is settled, as the job source tells it: the charge is still open."""
    REVERSAL = "reversal"
    """A captured charge is refunded by a correction; the charge stays captured."""


MEANS = {
    BreakKind.MISSING_EVENT: Means.EVENT,
    BreakKind.RUNNING_PAST_CAP: Means.EVENT,
    BreakKind.FAILED_AFTER_CAPTURE: Means.REVERSAL,
    BreakKind.FAILED_BUT_CAPTURED: Means.REVERSAL,
    BreakKind.WRONGFUL_TERMINATION: Means.REVERSAL,
    BreakKind.ACCOUNT_STATUS_DIFFERS: Means.REVERSAL,
    BreakKind.DECISION_DIFFERS: Means.REVERSAL,
}
"""The kinds that can be repaired. The others are accepted, or end when their cause does."""
NEEDS_REFERENCE = {BreakKind.WRONGFUL_TERMINATION, BreakKind.ACCOUNT_STATUS_DIFFERS}
"""Kinds that no event and no source tells: a case, in which somebody decided, stands behind each."""

BY_OUR_OWN_ENDING = {*NEEDS_REFERENCE, BreakKind.DECISION_DIFFERS}
"""Kinds in which nobody doubts how the job ended, only what was made of it: the settlement's own ending counts."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of the charge becomes: whole `credits` of lot `lot_id`, and their fate in words."""

    lot_id: int
    credits: int
    fate: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair does, or with a dry run would do, as the ledger is now."""

    break_id: int
    kind: str
    job_id: str
    charge_id: int
    account_id: str
    means: Means
    outcome: str
    """Of an event: what settling it comes to. Of a reversal: `corrected`."""
    reason: str
    clause: str
    credits: int
    lines: Sequence[Line]
    available: int
    """What the account can spend now, in whole credits."""
    available_after: int
    held: int
    held_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What repairs work with. `oncall` may reverse charges, `worker` settles events and writes breaks."""

    worker: sa.Engine
    oncall: sa.Engine
    rules: Rules
    settings: Settings
    source: JobSource | None


@dataclass(frozen=True, slots=True)
class _Facts:
    break_id: int
    kind: str
    status: str
    ending: str | None
    job_id: str
    charge_id: int
    account_id: str
    credits: int
    opened_at: datetime
    deadline_at: datetime
    settled_as: str | None
    settled_ending: str | None
    judged_status: str | None
    policy_version: str | None
    corrected_by: str | None
    available: int
    held: int


_FACTS = sa.text("""
    SELECT b.break_id, b.kind, b.status, b.ending, c.job_id, c.charge_id, c.account_id, c.credits, c.opened_at,
           c.deadline_at, s.kind AS settled_as, s.ending AS settled_ending,
           s.account_status AS judged_status, s.policy_version, k.reference,
           bal.available, bal.held
    FROM kino.break b
    LEFT JOIN kino.charge c ON c.charge_id = b.charge_id OR b.charge_id IS NULL AND c.job_id = b.job_id
    LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
    LEFT JOIN kino.correction k ON k.charge_id = c.charge_id
    LEFT JOIN LATERAL (SELECT * FROM kino.account_balance own WHERE own.account_id = c.account_id) bal ON true
    WHERE b.break_id = :break_id
""")
_LINES = sa.text("""
    SELECT o_lot_id, o_lot_state, o_credits, o_fate, o_until
    FROM kino.planned_lines(CAST(:items AS jsonb)) ORDER BY o_seq
""")
_REPAIRED = sa.text("""
    UPDATE kino.break SET status = 'repaired', status_actor = :actor, status_note = :note, status_at = kino.clock(),
           notes = notes || jsonb_build_array(jsonb_build_object(
               'at', kino.clock(), 'actor', CAST(:actor AS text), 'text', CAST(:note AS text)))
    WHERE break_id = :break_id AND status = ANY (CAST(:live AS text[]))
""")


def plan_repair(shop: Workshop, break_id: int, *, ending: str | None = None) -> Plan:
    """Return what the repair of a break would do now; nothing is written and nothing locked.

    `ending` says how the job ended, in the word of a settlement, for a break of a build that did not store it. Raises
    BreakNotFound, CannotRepair, and SourceUnavailable if the source does not answer.
    """
    return _prepare(shop, break_id, ending=ending)[0]


def repair(
    shop: Workshop,
    break_id: int,
    *,
    actor: str,
    note: str,
    reference: str | None = None,
    ending: str | None = None,
    confirmed: Plan | None = None,
) -> Plan:
    """Repair a break and return what was done; the next run of its check closes it.

    `confirmed` is the plan that the person said yes to: if it is another by now, because the source answers otherwise
    or a lot has changed, nothing is done.

    A person who repeats it, after a kill in between too, moves nothing twice: the event has its own identity, and the
    reversal its charge and reference (`break:NUMBER`, or the case that is named). Raises as `plan_repair` does, and
    what settling and reversing raise.
    """
    plan, delivery = _prepare(shop, break_id, ending=ending)
    if confirmed is not None and _what_moves(plan) != _what_moves(confirmed):
        raise CannotRepair(f"the plan has changed since it was shown: look again with --dry-run, break {break_id}")
    if plan.kind in NEEDS_REFERENCE and not (reference or "").strip():
        raise CannotRepair(f"a break {plan.kind} needs --reference: the case in which it was decided")
    if delivery is not None:
        [ruling] = settle_batch(shop.worker, [delivery], shop.rules)
        # Busy: a session holds one of its lots. The event waits in `retries`, and settles by itself.
        if ruling.outcome not in {*SETTLING, Outcome.DUPLICATE, Outcome.BUSY}:
            raise CannotRepair(f"the event was settled as {ruling.outcome}; look at `kino-refunds why` of its job")
    else:
        version = _policy_version(shop, break_id)
        reversal = Reversal(
            charge_id=plan.charge_id,
            reason=plan.reason,
            clause=plan.clause,
            policy_version=version,
            reference=reference or f"break:{break_id}",
            actor=actor,
        )
        with shop.oncall.begin() as connection:
            reverse_charges(connection, [reversal])
    with shop.worker.begin() as connection:
        connection.execute(_REPAIRED, {"break_id": break_id, "actor": actor, "note": note, "live": [*LIVE]})
    return plan


def _what_moves(plan: Plan) -> tuple[object, ...]:
    """Return what a person agrees to; the fate of a line without its instant, which moves on with the clock."""
    lines = [(line.lot_id, line.credits, line.fate.partition(" that expires at ")[0]) for line in plan.lines]
    return plan.means, plan.outcome, plan.reason, plan.clause, plan.credits, lines


def report_termination(shop: Workshop, job_id: str, *, detail: str) -> int:
    """Open a break for a job that was captured because its account was terminated, wrongly as it turned out.

    Return its number: no event and no source tells of it, a person does. Raises CannotRepair if clause 6 did not
    capture this job's charge.
    """
    with shop.worker.begin() as connection:
        row = connection.execute(_TERMINATED, {"job_id": job_id}).one_or_none()
        if row is None:
            raise CannotRepair(
                f"job {job_id!r} was not captured by clause 6.terminated; `kino-refunds why` shows how it was settled"
            )
        found = Break(
            kind=BreakKind.WRONGFUL_TERMINATION,
            job_id=job_id,
            charge_id=row.charge_id,
            credits=row.credits,
            detail=detail,
            sides=f"captured 6.terminated / {detail}",
            happened_at=row.settled_at,
            ending=row.ending,
        )
        raise_breaks(connection, [found])
        number: int | None = connection.execute(
            _LIVE_BREAK, {"kind": found.kind, "job_id": job_id}
        ).scalar_one_or_none()
    if number is None:
        raise CannotRepair(f"this very termination of job {job_id!r} was accepted before; name another case")
    return number


_TERMINATED = sa.text("""
    SELECT c.charge_id, c.credits, s.ending, s.settled_at FROM kino.charge c JOIN kino.settlement s USING (charge_id)
    WHERE c.job_id = :job_id AND s.clause = '6.terminated'
""")
_LIVE_BREAK = sa.text("""
    SELECT break_id FROM kino.break WHERE kind = :kind AND job_id = :job_id
       AND status IN ('open', 'investigating', 'repaired')
""")


def _prepare(shop: Workshop, break_id: int, *, ending: str | None) -> tuple[Plan, Delivery | None]:
    facts = _read_facts(shop, break_id)
    means = MEANS.get(BreakKind(facts.kind)) if facts.kind in set(BreakKind) else None
    if means is None:
        raise CannotRepair(
            f"there is no repair for a break {facts.kind}: accept it, or mark it as a false alarm, with a note"
            " (`kino-refunds breaks accept`, `breaks false-alarm`)"
        )
    if means is Means.EVENT:
        return _plan_event(shop, facts)
    return _plan_reversal(shop, facts, _ending(shop, facts, ending)), None


def _ending(shop: Workshop, facts: _Facts, said: str | None) -> str | None:
    """Return how the job ended, in the word of a settlement: by the settlement itself, or by who contradicts it.

    The job source is asked anew, where there is one that knows the job: the event that contradicts the capture may have
    lied, and the source may have corrected itself since. `said` is a person's word, for a break that has none.
    """
    if facts.kind in BY_OUR_OWN_ENDING:
        return facts.settled_ending
    stored = facts.ending or said
    if said is not None and said != stored:
        raise CannotRepair(f"the break says that the job ended {stored}: --ending is for a break that does not say it")
    answer = None if shop.source is None else _asked(shop.source, facts.job_id)
    if answer is None or answer.state in {JobState.RUNNING, JobState.UNKNOWN}:
        return stored
    return _event(shop, facts, answer).ending


def _read_facts(shop: Workshop, break_id: int) -> _Facts:
    with shop.worker.connect() as connection:
        row = connection.execute(_FACTS, {"break_id": break_id}).one_or_none()
    if row is None:
        raise BreakNotFound(f"there is no break {break_id}; see `kino-refunds breaks list --status all`")
    if row.status not in LIVE:
        raise CannotRepair(f"break {break_id} is {row.status}: only one that lives is repaired")
    if row.charge_id is None:
        raise CannotRepair(f"break {break_id} is about no charge, so there are no credits to move")
    return _Facts(*tuple(row))


def _plan_event(shop: Workshop, facts: _Facts) -> tuple[Plan, Delivery]:
    if facts.settled_as is not None:
        raise CannotRepair(
            f"the charge of job {facts.job_id} is {facts.settled_as} by now: the next run of its check closes the break"
        )
    answer = _answer(shop, facts)
    delivery = delivery_of(_event(shop, facts, answer))
    with shop.worker.connect() as connection:
        record = read_record(connection, [delivery.event])
        charges = read_charges(connection, {facts.job_id})
        [ruling] = decide([delivery], record, charges, shop.rules.policy)
    coverage = ruling.coverage
    if coverage is None or ruling.outcome not in SETTLING:
        raise CannotRepair(f"the event would come to {ruling.outcome}; look at `kino-refunds why {facts.job_id}`")
    refund = ruling.outcome is Outcome.REFUNDED
    lines = _lines(shop, facts.charge_id, captured=not refund)
    return _plan(facts, Means.EVENT, outcome=ruling.outcome, coverage=coverage, lines=lines, refund=refund), delivery


def _answer(shop: Workshop, facts: _Facts) -> Answer:
    """Return how the job ended, by the source; of one that it says still runs, a person says that it timed out."""
    answer = None if shop.source is None else _asked(shop.source, facts.job_id)
    if facts.kind == BreakKind.RUNNING_PAST_CAP and (
        answer is None or answer.state in {JobState.RUNNING, JobState.UNKNOWN}
    ):
        return Answer(JobState.TIMED_OUT)
    if shop.source is None:
        raise CannotRepair("no job source is configured that could say how the job ended (KINO_JOB_SOURCE)")
    if answer is None or answer.state in {JobState.RUNNING, JobState.UNKNOWN}:
        said = "nothing" if answer is None else answer.state
        raise CannotRepair(f"the job source says {said} of job {facts.job_id} now: there is no ending to settle")
    return answer


def _asked(source: JobSource, job_id: str) -> Answer | None:
    """Return the source's answer for one job; None if it left the job out. Raises what the source raises."""
    return answers_of(source.ask([job_id]), [job_id]).get(job_id)


def _event(shop: Workshop, facts: _Facts, answer: Answer) -> Event:
    charge = OverdueCharge(
        charge_id=facts.charge_id,
        job_id=facts.job_id,
        account_id=facts.account_id,
        credits=facts.credits,
        opened_at=facts.opened_at,
        due_at=facts.deadline_at + shop.settings.overdue_grace,
        asks=0,
    )
    with stored_ids():
        return event_of(charge, answer)


def _plan_reversal(shop: Workshop, facts: _Facts, ending: str | None) -> Plan:
    if facts.corrected_by is not None:
        raise CannotRepair(
            f"the charge of job {facts.job_id} was corrected before, by {facts.corrected_by}: the next run of the check"
            " `corrected` closes the break"
        )
    if facts.settled_as != SettlementKind.CAPTURED:
        state = facts.settled_as or "open"
        raise CannotRepair(f"the charge of job {facts.job_id} is {state}: only a capture is reversed")
    event = None if ending is None else event_of_ending(ending)
    if event is None:
        raise CannotRepair(
            f"it is not known how job {facts.job_id} ended: say it with --ending, for example failed.provider,"
            " timeout.no_result or rejected.during_generation"
        )
    document = next((each for each in shop.rules.policy.versions if each.version == facts.policy_version), None)
    if document is None:
        raise CannotRepair(f"this build does not have policy {facts.policy_version}, by which the job was settled")
    # A wrong termination is owed what clause 2 says; a wrong decision is judged as the account was.
    forfeits = facts.kind not in NEEDS_REFERENCE and facts.judged_status == PastStatus.TERMINATED_FOR_VIOLATION
    coverage = coverage_of(event, document, terminated_for_violation=forfeits)
    if not coverage.refund:
        raise CannotRepair(
            f"policy {document.version} does not refund a job that ended {ending} (clause {coverage.clause}): accept"
            " the break, or give courtesy credits"
        )
    lines = _lines(shop, facts.charge_id, captured=False)
    return _plan(facts, Means.REVERSAL, outcome="corrected", coverage=coverage, lines=lines, refund=True)


def _plan(
    facts: _Facts, means: Means, *, outcome: str, coverage: Coverage, lines: Sequence[Line], refund: bool
) -> Plan:
    spendable = sum(each.credits for each in lines if each.fate.startswith(SPENDABLE)) if refund else 0
    return Plan(
        break_id=facts.break_id,
        kind=facts.kind,
        job_id=facts.job_id,
        charge_id=facts.charge_id,
        account_id=facts.account_id,
        means=means,
        outcome=str(outcome),
        reason=coverage.reason,
        clause=coverage.clause,
        credits=facts.credits,
        lines=lines,
        available=facts.available,
        available_after=facts.available + spendable,
        held=facts.held,
        held_after=facts.held - (facts.credits if facts.settled_as is None else 0),
    )


SPENDABLE = ("back into", "into a successor")
_FATES = {
    "back": "back into the lot",
    "onward": "into a successor of the lot that expires at {until:%Y-%m-%dT%H:%M:%SZ}",
    "void": "back, and voided again under the cause that voided the lot",
    "expire": "back, and expired: the lot's line of successors has had its time",
    "frozen": "back to the lot, which stays frozen",
}


def _lines(shop: Workshop, charge_id: int, *, captured: bool) -> list[Line]:
    """Return what becomes of the charge's lines, by the ledger's own function; `captured`: they are consumed."""
    with shop.worker.connect() as connection:
        rows = connection.execute(_LINES, {"items": json.dumps([{"charge_id": charge_id}])}).all()
    return [
        Line(
            row.o_lot_id,
            row.o_credits,
            "consumed"
            if captured
            else _FATES["frozen" if row.o_lot_state == LotState.FROZEN else row.o_fate].format(until=row.o_until),
        )
        for row in rows
    ]


def _policy_version(shop: Workshop, break_id: int) -> str:
    version = _read_facts(shop, break_id).policy_version
    assert version is not None, "a captured charge has a settlement"
    return version
