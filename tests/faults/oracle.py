"""The oracle: what a ledger must have come to, whatever broke on the way.

It imports nothing of the project. It knows the workload, because it made it, and it reads the database by
SQL. A mistake that the product and its own views share is therefore still a finding here.

It shares no line with the referee of the demo (`kino_refunds/demo/promises.py`) either. Both know which clause
gives which ending, and what the inbox says of it. That stands twice on purpose: the referee runs without the tests,
in a process of its own, from a record of what was asked; the oracle also knows what only a fault allows, such as a
message that a scenario took from Redis. A rule that one of them reads wrongly is found by the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tests.faults.workload import CAPTURED, FAILED, NOT_COVERED, OPEN, REJECTED, TIMED_OUT, Ending, Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import psycopg

CLAUSES = {
    CAPTURED: {"1"},
    NOT_COVERED: {"2.failure", "2.timeout", "2.safety", "6.terminated"},
    FAILED: {"2.failure"},
    TIMED_OUT: {"2.timeout"},
    REJECTED: {"2.safety"},
}

SETTLING = {"captured", "captured_not_covered", "captured_terminated", "refunded"}
BOOKS = {
    "grant": ("issued", "wallet"),
    "hold": ("wallet", "held"),
    "capture": ("held", "consumed"),
    "refund": ("held", "wallet"),
    "expire": ("wallet", "expired"),
    "void": ("wallet", "voided"),
    "unvoid": ("voided", "wallet"),
    "reversal": ("consumed", "wallet"),
}


class Finding(NamedTuple):
    """One thing that must not be."""

    kind: str
    text: str


@dataclass
class Verdict:
    """Everything that the oracle found."""

    jobs: int = 0
    findings: list[Finding] = field(default_factory=list)
    dead_letters: Counter[str] = field(default_factory=Counter)
    lateness_s: float = 0.0
    """The longest time from an event's publication to its job's settlement."""

    def count(self, kind: str) -> int:
        """How many findings are of this kind."""
        return sum(finding.kind == kind for finding in self.findings)

    def say(self, kind: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, text))


Row: TypeAlias = dict[str, Any]


class _Ledger(NamedTuple):
    """Everything that the oracle reads, in one snapshot."""

    charges: dict[str, Row]
    lines: Mapping[int, list[Row]]
    transfers: list[Row]
    lots: dict[int, Row]
    inbox: dict[tuple[str, str], Row]
    pending: set[tuple[str, str]]
    letters: list[Row]
    breaks: set[tuple[str, str]]


def judge(connection: psycopg.Connection[Any], workload: Workload) -> Verdict:
    """Compare the ledger at `connection` (a superuser's) with the workload."""
    ledger = _read(connection)
    verdict = Verdict(jobs=len(workload.jobs))
    verdict.dead_letters.update(letter["reason"] for letter in ledger.letters)
    _judge_jobs(verdict, workload, ledger)
    _judge_credits(verdict, ledger)
    _judge_books(verdict, ledger)
    _judge_explanations(verdict, ledger)
    _judge_messages(verdict, workload, ledger)
    _judge_letters(verdict, workload, ledger)
    _judge_breaks(verdict, workload, ledger)
    return verdict


def _read(connection: psycopg.Connection[Any]) -> _Ledger:
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    lines = defaultdict(list)
    for line in _rows(connection, "SELECT * FROM kino.charge_line ORDER BY charge_id, seq"):
        lines[line["charge_id"]].append(line)
    ledger = _Ledger(
        {
            row["job_id"]: row
            for row in _rows(
                connection,
                "SELECT c.charge_id, c.job_id, c.account_id, c.credits, s.kind, s.reason, s.clause, s.policy_version,"
                " s.event_source, s.event_id, s.event_time, s.settled_at"
                " FROM kino.charge c LEFT JOIN kino.settlement s USING (charge_id)",
            )
        },
        lines,
        _rows(connection, "SELECT * FROM kino.transfer ORDER BY transfer_id"),
        {row["lot_id"]: row for row in _rows(connection, "SELECT * FROM kino.credit_lot")},
        {(row["source"], row["event_id"]): row for row in _rows(connection, "SELECT * FROM kino.inbox_event")},
        {
            (row["source"], row["event_id"])
            for row in _rows(connection, "SELECT source, event_id FROM kino.pending_event")
        },
        _rows(connection, "SELECT * FROM kino.dead_letter"),
        {(row["kind"], row["job_id"]) for row in _rows(connection, "SELECT kind, job_id FROM kino.break")},
    )
    connection.execute("COMMIT")
    return ledger


def _rows(connection: psycopg.Connection[Any], query: str) -> list[Row]:
    cursor = connection.execute(query.encode())
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _ending(charge: Row) -> Ending:
    return (charge["kind"], charge["reason"]) if charge["kind"] else OPEN


def _judge_jobs(verdict: Verdict, workload: Workload, ledger: _Ledger) -> None:
    """Every job ended in a way that it may end; nothing was charged that nobody asked for."""
    rivals = {job_id for pair in workload.rivals for job_id in pair}
    for job in workload.jobs.values():
        charge = ledger.charges.get(job.job_id)
        if charge is None:
            verdict.say("lost", f"{job.job_id} has no charge")
            continue
        ending = _ending(charge)
        if ending not in job.endings and not (ending == OPEN and job.job_id in rivals):
            allowed = " or ".join("/".join(each).rstrip("/") for each in sorted(job.endings))
            verdict.say("lost", f"{job.job_id} is {'/'.join(ending).rstrip('/')}, must be {allowed}")
        if charge["settled_at"] is not None and job.job_id in workload.published_at:
            late = (charge["settled_at"] - workload.published_at[job.job_id]).total_seconds()
            verdict.lateness_s = max(verdict.lateness_s, late)
    for job_id in ledger.charges.keys() - workload.jobs.keys():
        verdict.say("unexplained", f"{job_id} was charged and is no job of ours")
    for pair in workload.rivals:
        settled = [job_id for job_id in pair if job_id in ledger.charges and ledger.charges[job_id]["kind"]]
        if len(settled) != 1:
            verdict.say("twice" if settled else "lost", f"of {pair}, which share one event, {settled} were settled")


def _judge_credits(verdict: Verdict, ledger: _Ledger) -> None:
    """What a charge took, it took by its lines; what came back, came back to those lots, once."""
    moved: dict[int, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for transfer in ledger.transfers:
        if transfer["charge_id"] is not None:
            moved[transfer["charge_id"]][transfer["kind"]][transfer["lot_id"]] += transfer["credits"]
    for job_id, charge in ledger.charges.items():
        of_charge = moved.pop(charge["charge_id"], {})
        held = of_charge.get("hold", Counter())
        lines = Counter({line["lot_id"]: line["credits"] for line in ledger.lines.get(charge["charge_id"], ())})
        if held != lines or lines.total() != charge["credits"]:
            verdict.say("lots", f"{job_id} took {charge['credits']}, by its lines {lines}, by its holds {held}")
        back, kept = of_charge.get("refund", Counter()), of_charge.get("capture", Counter())
        wanted = {"refunded": (held, Counter()), "captured": (Counter(), held)}.get(
            charge["kind"], (Counter(), Counter())
        )
        if (back, kept) == wanted:
            continue
        if (back + kept).total() > held.total() or (back and kept):
            verdict.say("twice", f"{job_id} took {held.total()}; {back.total()} came back, {kept.total()} were kept")
        elif (back + kept).total() < held.total() and charge["kind"]:
            verdict.say("lost", f"{job_id} took {held.total()}; only {(back + kept).total()} were settled")
        else:
            verdict.say("wrong lot", f"{job_id} is {charge['kind']}, held {held}, gave back {back}, kept {kept}")
    for charge_id in moved:
        verdict.say("unexplained", f"credits moved for charge {charge_id}, which does not exist")


def _judge_books(verdict: Verdict, ledger: _Ledger) -> None:
    """The books sum to zero, agree with lots and open charges, and no refund changes the kind of a credit."""
    books: dict[tuple[str, str], int] = defaultdict(int)
    lots: dict[int, int] = defaultdict(int)
    for transfer in ledger.transfers:
        kind, account_id, credits = transfer["kind"], transfer["account_id"], transfer["credits"]
        if BOOKS.get(kind) != (transfer["from_book"], transfer["to_book"]) or credits <= 0:
            verdict.say("books", f"transfer {transfer['transfer_id']} is no {kind}")
        books[account_id, transfer["from_book"]] -= credits
        books[account_id, transfer["to_book"]] += credits
        target = transfer["to_lot_id"] or transfer["lot_id"]
        if transfer["from_book"] == "wallet":
            lots[transfer["lot_id"]] -= credits
        if transfer["to_book"] == "wallet":
            lots[target] += credits
            _judge_successor(verdict, ledger, transfer, target)
    remaining: dict[str, int] = defaultdict(int)
    for lot in ledger.lots.values():
        remaining[lot["account_id"]] += lot["remaining"]
        if lots[lot["lot_id"]] != lot["remaining"] or not 0 <= lot["remaining"] <= lot["granted"]:
            verdict.say(
                "lots", f"lot {lot['reference']} has {lot['remaining']}; its transfers say {lots[lot['lot_id']]}"
            )
    held: dict[str, int] = defaultdict(int)
    for charge in ledger.charges.values():
        held[charge["account_id"]] += 0 if charge["kind"] else charge["credits"]
    for account_id in {account_id for account_id, _ in books}:
        of_account = {book: credits for (owner, book), credits in books.items() if owner == account_id}
        if sum(of_account.values()) != 0:
            verdict.say("books", f"the books of {account_id} sum to {sum(of_account.values())}")
        if (of_account.get("wallet", 0), of_account.get("held", 0)) != (remaining[account_id], held[account_id]):
            verdict.say(
                "books", f"{account_id}: {of_account}; lots {remaining[account_id]}, open charges {held[account_id]}"
            )


def _judge_successor(verdict: Verdict, ledger: _Ledger, transfer: Row, target: int) -> None:
    lot, after = ledger.lots.get(transfer["lot_id"]), ledger.lots.get(target)
    if lot is None or after is None or lot["account_id"] != transfer["account_id"]:
        verdict.say("wrong lot", f"transfer {transfer['transfer_id']} names a lot that its account does not have")
    elif transfer["to_lot_id"] is not None and (
        after["successor_of"] != lot["lot_id"]
        or (after["account_id"], after["class"], after["purchase_id"])
        != (lot["account_id"], lot["class"], lot["purchase_id"])
    ):
        verdict.say("wrong lot", f"lot {after['reference']} is no successor of {lot['reference']}")


def _judge_explanations(verdict: Verdict, ledger: _Ledger) -> None:
    """Every settlement names its event, and every event that settled has its settlement (P10)."""
    settled = {}
    for job_id, charge in ledger.charges.items():
        if not charge["kind"]:
            continue
        identity = (charge["event_source"], charge["event_id"])
        settled[identity] = job_id
        event = ledger.inbox.get(identity)
        if event is None or event["job_id"] != job_id or event["outcome"] not in SETTLING:
            verdict.say("unexplained", f"{job_id} was settled by {identity}, of which the inbox says {event}")
        if charge["clause"] not in CLAUSES.get(_ending(charge), set()) or not charge["policy_version"]:
            verdict.say("unexplained", f"{job_id} is {_ending(charge)} by clause {charge['clause']}")
    for identity, event in ledger.inbox.items():
        if event["outcome"] in SETTLING and settled.get(identity) != event["job_id"]:
            verdict.say("unexplained", f"event {identity} {event['outcome']} {event['job_id']}, but has no settlement")


def _judge_messages(verdict: Verdict, workload: Workload, ledger: _Ledger) -> None:
    """Every message was decided or is kept; nothing disappears (P6, P7)."""
    kept = {bytes(letter["raw"]) for letter in ledger.letters}
    # An event that waited for a retry is kept as it was understood, and no longer as it was on the wire.
    named = {(letter["source"], letter["event_id"], letter["job_id"]) for letter in ledger.letters}
    dead = {(letter["source"], letter["event_id"]) for letter in ledger.letters if letter["status"] == "open"}
    for message in workload.messages:
        if message.raw not in workload.published:
            continue
        identity = (message.source, message.event_id)
        decided, letter = identity in ledger.inbox, message.raw in kept or (*identity, message.job_id) in named
        fine = {"decided": decided, "dead": letter, "either": decided or letter, "lost to redis": True}
        if fine[message.fate]:
            continue
        waits = "waits" if identity in ledger.pending else "is an open dead letter" if identity in dead else "is gone"
        verdict.say("vanished" if waits == "is gone" else "undecided", f"event {message.event_id} {waits}")


def _judge_letters(verdict: Verdict, workload: Workload, ledger: _Ledger) -> None:
    """Nothing became a dead letter that could be understood and applied (P8)."""
    may_die = [message for message in workload.messages if message.fate in {"dead", "either"}]
    raws, names = {m.raw for m in may_die}, {(m.source, m.event_id, m.job_id) for m in may_die}
    too_many = Counter(
        letter["reason"]
        for letter in ledger.letters
        if bytes(letter["raw"]) not in raws and (letter["source"], letter["event_id"], letter["job_id"]) not in names
    )
    for reason, number in too_many.items():
        if number > workload.dead_letters_max.get(reason, 0):
            example = next(letter["detail"] for letter in ledger.letters if letter["reason"] == reason)
            verdict.say("dead letters", f"{number} of reason {reason}, for example: {example[:200]}")


def _judge_breaks(verdict: Verdict, workload: Workload, ledger: _Ledger) -> None:
    for kind, job_id in workload.breaks - ledger.breaks:
        verdict.say("breaks", f"{job_id}: nobody was told of {kind}")
    for kind, job_id in ledger.breaks - workload.breaks:
        verdict.say("breaks", f"{job_id}: there is no {kind}")


def summary(findings: Iterable[Finding], most: int = 5) -> str:
    """Say the first findings on one line each."""
    said = [f"{finding.kind}: {finding.text}" for finding in findings]
    more = [f"and {len(said) - most} more"] if len(said) > most else []
    return "\n".join([*said[:most], *more])
