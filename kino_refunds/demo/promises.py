"""The referee: judge P1 to P10 from a record of what was asked of a ledger, and from the ledger's state now.

    python -I kino_refunds/demo/promises.py RECORD [--json]

It imports nothing of this project, so that a mistake which the product and its own views share is still a finding here.
It reads tables and Redis keys with its own queries, and has its own reading of the policy.

RECORD is a JSON object: `database_url` (of a superuser: the referee tries changes that no role may make, and rolls them
back), `worker_url`, `redis_url`; `grants` and `jobs` as they were asked for; `messages` in the order in which Redis
confirmed them (`queue`; `event`, null if it cannot be read; `reason` and base64 `raw` if it must become a dead letter;
`burst`: the number of the messages that were pushed together); `silent` jobs and the `answers` that are known for them;
`terminated_for_violation` accounts; `killed` (`at`, and the `events` that the worker had in flight); `transfers`, a
digest taken halfway; `policy_versions`, `reconciler`, `overdue_grace_s`, `alive_ttl_s`, `lot_grace_days`. The record
must not ask for a lot to be frozen, expired or voided.

Exit code: 0 every promise held (or was only late: a slow machine loses no refund), 1 one was broken, 2 usage, 3 a
dependency is away.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import psycopg.rows
import redis

INTEGRITY = Path(__file__).parents[1] / "reconciliation" / "integrity"
"""The queries that find everything in a ledger that must not be, whatever was asked of it: the one thing that this
program shares with the product, read as text."""
FACTS = ("charge", "charge_line", "settlement", "transfer", "inbox_event")
"""Tables whose rows are only inserted."""
WRITTEN_BY_FUNCTIONS = (
    "UPDATE kino.credit_lot SET remaining = granted",
    "UPDATE kino.account SET status = 'active'",
    "DELETE FROM kino.open_charge",
    "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining) SELECT 'x', 'x', 'courtesy', 1, 1",
    "INSERT INTO kino.account (account_id) VALUES ('x')",
)
"""Statements that no role that logs in may run, because only the ledger's functions write these tables."""
SHOWN_MAX = 5
P99_MAX_S = 5.0
OVERDUE_MAX_S = 300.0
SETTLING = {
    ("captured", "1"): "captured",
    ("captured", "6.terminated"): "captured_terminated",
    **{("captured", clause): "captured_not_covered" for clause in ("2.failure", "2.timeout", "2.safety")},
    **{("refunded", clause): "refunded" for clause in ("2.failure", "2.timeout", "2.safety")},
}
"""The outcome that the inbox must have for the event that settled a charge in this way, and for no other event."""

PROMISES = {
    "P1": "A charge is settled once.",
    "P2": "The same event again changes nothing; its id with other content is a conflict.",
    "P3": "Different events about one job refund once.",
    "P4": "A refund goes back to the lots it came from, or their successors.",
    "P5": "Transfers are append-only, and the books sum to zero.",
    "P6": "While Redis keeps its data, an event is queued, pending or decided.",
    "P7": "What cannot be understood or applied is kept whole.",
    "P8": "One bad event never blocks or fails its neighbours.",
    "P9": "Every job that the policy refunds is refunded in time, and no other job is.",
    "P10": "Every settlement can be explained.",
}

Row = dict[str, Any]


class Reading(NamedTuple):
    """How a charge must be settled for one ending of its job, by the policy."""

    kind: str
    reason: str
    clause: str


OPEN = Reading("open", "-", "-")


def read_policy(type_: str, data: Row, *, terminated: bool) -> Reading:
    """Return what clauses 1, 2 and 6 say of one event, independently of the product's own reading."""
    if type_ == "kino.generation.job-completed.v1":
        return Reading("captured", "completed", "1")
    if type_ == "kino.generation.job-failed.v1":
        clause, reason, covered = "2.failure", "generation_failure", data["error"]["origin"] != "user"
    elif type_ == "kino.generation.timeout.v1":
        clause, reason, covered = "2.timeout", "timeout", not data.get("result_produced", False)
    else:
        clause, reason, covered = "2.safety", "content_policy_rejection", data["stage"] != "after_generation"
    if covered and terminated:
        return Reading("captured", "not_covered", "6.terminated")
    return Reading("refunded", reason, clause) if covered else Reading("captured", "not_covered", clause)


TIMED_OUT = ("kino.generation.timeout.v1", {"result_produced": False})


@dataclass
class Judgement:
    """The judgement of one promise. A promise for which there was nothing to look at was not checked, and is broken."""

    promise: str
    says: str
    looked_at: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    late: bool = False
    """Whether the only finding is that something took too long: then the machine may be slow."""

    @property
    def word(self) -> str:
        """The judgement in one word: `held`, `late` or `broken`."""
        if not self.findings:
            return "held"
        return "late" if self.late else "broken"

    def as_dict(self) -> Row:
        """Return the judgement as plain values for JSON."""
        return {
            "promise": self.promise,
            "says": self.says,
            "word": self.word,
            "looked_at": dict(self.looked_at),
            "findings": self.findings,
        }

    def say(self, text: str) -> None:
        """Add a finding."""
        self.findings.append(text)

    def require(self, good: object, text: str) -> None:
        """Add a finding unless `good` is true."""
        if not good:
            self.findings.append(text)


class Books(NamedTuple):
    """Everything in the ledger, in one snapshot, and how many messages are left in Redis, by key."""

    charges: dict[str, Row]
    settlements: dict[int, list[Row]]
    transfers: dict[int | None, list[Row]]
    """By charge id; transfers without a charge are under None."""
    lots: dict[str, Row]
    inbox: dict[tuple[str, str], list[Row]]
    pending: set[tuple[str, str]]
    letters: list[Row]
    breaks: list[Row]
    queued: dict[str, int]
    integrity: dict[str, list[str]]


class Referee:
    """Judges one record; `judge` returns a judgement for each promise."""

    def __init__(self, record: Row, books: Books) -> None:
        self._record = record
        self._books = books
        self._judgements = {name: Judgement(name, says) for name, says in PROMISES.items()}
        self._jobs: dict[str, Row] = {job["job_id"]: job for job in record["jobs"]}
        terminated = set(record["terminated_for_violation"])
        self._terminated = {job_id for job_id, job in self._jobs.items() if job["account_id"] in terminated}
        self._events: dict[str, dict[tuple[str, str], Row]] = defaultdict(dict)
        """By job: every event that can be applied, by its identity, as it came first."""
        self._published: Counter[tuple[str, str]] = Counter()
        for message in record["messages"]:
            if message["event"] is not None and message["reason"] is None:
                identity = (message["event"]["source"], message["event"]["id"])
                self._published[identity] += 1
                self._events[message["event"]["data"]["job_id"]].setdefault(identity, message["event"])
        self._raws = [(m, base64.b64decode(m["raw"])) for m in record["messages"] if m["reason"] is not None]

    def judge(self) -> list[Judgement]:
        """Check every promise; return one judgement for each."""
        self._settled_once()
        self._same_event_again()
        self._one_refund_a_job()
        self._lots()
        self._append_only()
        self._nothing_lost()
        self._kept_whole()
        self._neighbours()
        self._every_refund()
        self._explained()
        for name, texts in self._books.integrity.items():
            self._judgements[name].findings += texts
        for judgement in self._judgements.values():
            if not judgement.looked_at or not all(judgement.looked_at.values()):
                judgement.late = False
                judgement.say(f"not checked: there was nothing to look at in {dict(judgement.looked_at)}")
        return list(self._judgements.values())

    def _readings(self, job_id: str) -> dict[Reading, Row]:
        """Return every way in which this job's charge may be settled, each with the event that settles it so."""
        terminated = job_id in self._terminated
        if job_id in self._record["silent"]:
            answer = self._record["answers"].get(job_id)
            type_, data = (answer["type"], answer["data"]) if answer else TIMED_OUT
            return {read_policy(type_, data, terminated=terminated): {"source": self._record["reconciler"]}}
        events = self._events[job_id].values()
        return {read_policy(event["type"], event["data"], terminated=terminated): event for event in events}

    def _standing(self, job_id: str) -> Reading:
        charge = self._books.charges.get(job_id)
        settled = self._books.settlements.get(charge["charge_id"], []) if charge else []
        return Reading(settled[0]["kind"], settled[0]["reason"], settled[0]["clause"]) if settled else OPEN

    def _moved(self, job_id: str, *kinds: str) -> int:
        charge = self._books.charges.get(job_id)
        transfers = self._books.transfers.get(charge["charge_id"], []) if charge else []
        return sum(each["credits"] for each in transfers if each["kind"] in kinds)

    def _settled_once(self) -> None:
        p1 = self._judgements["P1"]
        p1.looked_at["charges"] = len(self._books.charges)
        for job_id in self._books.charges.keys() - self._jobs.keys():
            p1.say(f"{job_id} was charged, and the record does not ask for it")
        for job_id, job in self._jobs.items():
            charge = self._books.charges.get(job_id)
            if charge is None:
                p1.say(f"{job_id} has no charge")
                continue
            asked, found = (job["account_id"], job["credits"]), (charge["account_id"], charge["credits"])
            p1.require(asked == found, f"{job_id} is charged {found}, asked for was {asked}")
            until = datetime.fromisoformat(job["deadline_at"])
            same = until == charge["deadline_at"]
            p1.require(same, f"the deadline of {job_id} is {charge['deadline_at']}, asked for was {until}")
            times = len(self._books.settlements.get(charge["charge_id"], []))
            p1.require(times == 1, f"{job_id} is settled {times} times")
            ended = self._moved(job_id, "capture") + self._moved(job_id, "refund")
            p1.require(ended == charge["credits"], f"{job_id} took {charge['credits']} credits, {ended} were settled")

    def _same_event_again(self) -> None:
        p2 = self._judgements["P2"]
        p2.looked_at["events that came again"] = p2.looked_at["conflicts"] = 0
        letters = {bytes(letter["raw"]) for letter in self._books.letters}
        for job_id, events in self._events.items():
            for identity, event in events.items():
                rows = self._books.inbox.get(identity, [])
                p2.looked_at["events that came again"] += self._published[identity] > 1
                p2.require(len(rows) <= 1, f"event {identity} is decided {len(rows)} times")
                for row in rows:
                    p2.require(row["job_id"] == job_id, f"event {identity} of {job_id} decided {row['job_id']}")
                    same = row["event_at"] == datetime.fromisoformat(event["time"])
                    p2.require(same, f"event {identity}: what is decided is not the event that came first")
        for message, raw in self._raws:
            if message["reason"] == "conflicting_duplicate":
                p2.looked_at["conflicts"] += 1
                p2.require(raw in letters, f"the other content of {message['event']['id']} is not kept as a conflict")
                job_id = message["event"]["data"]["job_id"]
                allowed, standing = self._readings(job_id), self._standing(job_id)
                p2.require(standing in allowed, f"{job_id} is {'/'.join(standing)}, by an event in conflict")

    def _one_refund_a_job(self) -> None:
        p3 = self._judgements["P3"]
        p3.looked_at["jobs with several events"] = 0
        told = Counter((each["kind"], each["job_id"]) for each in self._books.breaks)
        for job_id, events in self._events.items():
            if len(events) < 2:  # noqa: PLR2004 - one event cannot contradict itself
                continue
            p3.looked_at["jobs with several events"] += 1
            credits, standing = self._jobs[job_id]["credits"], self._standing(job_id)
            back, kept = self._moved(job_id, "refund"), self._moved(job_id, "capture")
            wanted = (credits, 0) if standing.kind == "refunded" else (0, credits)
            p3.require((back, kept) == wanted, f"{job_id} took {credits}: {back} came back, {kept} were kept")
            kinds = {reading.kind for reading in self._readings(job_id)}
            contradiction = "completed_after_refund" if standing.kind == "refunded" else "failed_after_capture"
            wanted_breaks = int(len(kinds) > 1)
            found = told[contradiction, job_id]
            p3.require(found == wanted_breaks, f"{job_id}: {found} breaks {contradiction}, not {wanted_breaks}")
        for each in self._books.breaks:
            open_ = each["status"] == "open" and each["credits"] == self._jobs[each["job_id"]]["credits"]
            several = len(self._events[each["job_id"]]) > 1
            p3.require(open_ and several, f"{each['job_id']}: a break {each['kind']} without a contradiction")

    def _lots(self) -> None:
        p4 = self._judgements["P4"]
        p4.looked_at["lots"] = len(self._record["grants"])
        p4.looked_at["refunds"] = sum(self._standing(job_id).kind == "refunded" for job_id in self._jobs)
        p4.looked_at["successors"] = sum(lot["successor_of"] is not None for lot in self._books.lots.values())
        for grant in self._record["grants"]:
            lot = self._books.lots.get(grant["reference"])
            until = grant["expires_at"] and datetime.fromisoformat(grant["expires_at"])
            asked = (grant["account_id"], grant["credits"], grant["class"], grant["priority"], until)
            found = lot and (lot["account_id"], lot["granted"], lot["class"], lot["priority"], lot["expires_at"])
            p4.require(found == asked, f"lot {grant['reference']} is {found}, granted was {asked}")
        granted = {grant["reference"] for grant in self._record["grants"]}
        for reference, lot in self._books.lots.items():
            asked_for = lot["successor_of"] is not None or reference in granted
            p4.require(asked_for, f"{lot['granted']} credits were granted as {reference}, which is not in the record")
            if lot["successor_of"] is not None:
                lives = timedelta(days=self._record["lot_grace_days"])
                enough = lot["expires_at"] - lot["granted_at"] > lives - timedelta(minutes=1)
                p4.require(enough, f"{reference} has expired {lot['expires_at']}: what came back cannot be spent")
            p4.require(lot["state"] == "active", f"{reference} is {lot['state']}, which the record does not ask for")
        for each in (each for transfers in self._books.transfers.values() for each in transfers):
            asked_for = each["kind"] in {"grant", "hold", "capture", "refund"}
            p4.require(asked_for, f"{each['credits']} credits of {each['account_id']} were taken: {each['kind']}")

    def _append_only(self) -> None:
        p5, halfway = self._judgements["P5"], self._record["transfers"]
        p5.looked_at["transfers halfway"] = halfway["count"]
        with _connect(self._record["database_url"]) as superuser:
            found = digest_transfers(superuser, halfway["below"])
        wanted = {name: halfway[name] for name in found}
        p5.require(found == wanted, f"the transfers from before halfway are {found} now, and were {wanted}")
        for url, who in ((self._record["worker_url"], "a worker"), (self._record["database_url"], "a superuser")):
            for statement in (
                *(f"DELETE FROM kino.{table}" for table in FACTS),  # noqa: S608 - constants
                *(f"TRUNCATE kino.{table}" for table in FACTS),
                "UPDATE kino.transfer SET credits = credits + 1",
                "UPDATE kino.settlement SET policy_version = 'another'",
            ):
                p5.looked_at["attempts to change facts"] += 1
                p5.require(_refused(url, statement), f"{who} may {statement}")
        for statement in WRITTEN_BY_FUNCTIONS:
            p5.looked_at["attempts to go around the ledger's functions"] += 1
            p5.require(_refused(self._record["worker_url"], statement), f"a worker may {statement}")

    def _nothing_lost(self) -> None:
        p6 = self._judgements["P6"]
        p6.looked_at["events"] = len(self._published)
        for key, count in self._books.queued.items():
            p6.say(f"{count} messages are left in Redis under {key}")
        kept = {(letter["source"], letter["event_id"]) for letter in self._books.letters}
        for identity in self._published:
            decided = identity in self._books.inbox or identity in self._books.pending or identity in kept
            p6.require(decided, f"event {identity} is gone")

    def _kept_whole(self) -> None:
        p7 = self._judgements["P7"]
        letters = {bytes(letter["raw"]): letter for letter in self._books.letters}
        times = Counter(raw for _, raw in self._raws)
        p7.looked_at["dead letters"] = len(times)
        for message, raw in self._raws:
            name = f"the {message['reason']} message on {message['queue']}"
            letter = letters.get(raw)
            if letter is None:
                p7.say(f"{name} is not kept with its exact bytes")
                continue
            asked, found = (message["reason"], message["queue"]), (letter["reason"], letter["queue"])
            p7.require(asked == found, f"{name} is kept as {found}")
            p7.require(letter["detail"], f"{name} is kept without a detail that says why")
            p7.require(letter["status"] == "open", f"{name} is {letter['status']}, and must be open")
            p7.require(letter["seen"] >= times[raw], f"{name} came {times[raw]} times, counted is {letter['seen']}")

    def _neighbours(self) -> None:
        p8 = self._judgements["P8"]
        p8.looked_at["events pushed together with a bad one"] = 0
        bad = {bytes(raw) for _, raw in self._raws}
        for letter in self._books.letters:
            fine = bytes(letter["raw"]) in bad
            p8.require(fine, f"event {letter['event_id']} of {letter['job_id']} is a dead letter: {letter['detail']}")
        for source, event_id in self._books.pending:
            p8.say(f"event {event_id} of {source} is still pending")
        bursts = {message["burst"] for message, _ in self._raws}
        for message in self._record["messages"]:
            if message["burst"] in bursts and message["reason"] is None:
                p8.looked_at["events pushed together with a bad one"] += 1
                identity = (message["event"]["source"], message["event"]["id"])
                p8.require(identity in self._books.inbox, f"event {identity} came with a bad one, and is not decided")

    def _every_refund(self) -> None:
        p9 = self._judgements["P9"]
        for job_id in self._jobs:
            standing, allowed = self._standing(job_id), self._readings(job_id)
            due = {reading.kind for reading in allowed}
            p9.looked_at["refunds due"] += due == {"refunded"}
            text = " or ".join("/".join(reading) for reading in allowed) or "open"
            p9.require(standing in allowed, f"{job_id} is {'/'.join(standing)}, must be {text}")
            p9.require(not self._settled_too_early(job_id), f"{job_id} was settled before it was overdue")
        wrong = bool(p9.findings)
        for what, seconds, most in self._lateness():
            p9.looked_at[what] = len(seconds)
            p99 = sorted(seconds)[int(len(seconds) * 0.99) - (len(seconds) % 100 == 0)] if seconds else 0.0
            p9.require(p99 <= most, f"{what}: p99 is {p99:.1f} s, promised are {most:.1f} s")
        p9.late = bool(p9.findings) and not wrong

    def _settled_too_early(self, job_id: str) -> bool:
        """Return whether the reconciler settled this job before its deadline and grace had passed."""
        charge = self._books.charges.get(job_id)
        due = datetime.fromisoformat(self._jobs[job_id]["deadline_at"])
        due += timedelta(seconds=self._record["overdue_grace_s"])
        settled = self._books.settlements.get(charge["charge_id"], []) if charge else []
        return any(row["event_source"] == self._record["reconciler"] and row["committed_at"] < due for row in settled)

    def _lateness(self) -> list[tuple[str, list[float], float]]:
        """Return seconds from event (or charge, if that is later) to COMMIT; those of the killed worker separately."""
        killed_at = datetime.fromisoformat(self._record["killed"]["at"])
        in_hand = set(self._record["killed"]["events"])
        grace = timedelta(seconds=self._record["overdue_grace_s"])
        live: list[float] = []
        killed: list[float] = []
        overdue: list[float] = []
        for job_id in self._jobs:
            charge = self._books.charges.get(job_id)
            for row in self._books.settlements.get(charge["charge_id"], []) if charge else ():
                assert charge is not None
                if row["event_source"] == self._record["reconciler"]:
                    due = max(charge["deadline_at"] + grace, charge["opened_at"])
                    overdue.append((row["committed_at"] - due).total_seconds())
                    continue
                late = (row["committed_at"] - max(row["event_time"], charge["opened_at"])).total_seconds()
                held = row["event_id"] in in_hand and row["committed_at"] > killed_at
                (killed if held else live).append(late)
        slow = P99_MAX_S + self._record["alive_ttl_s"]
        found = [("settled by their event", live, P99_MAX_S), ("settled without an event", overdue, OVERDUE_MAX_S)]
        # The killed worker's batch may settle nothing, for example if it is one event for a wrong account: then no
        # settlement can be late.
        settles = any(row["event_id"] in in_hand for rows in self._books.settlements.values() for row in rows)
        return [*found, ("settled after their worker was killed", killed, slow)] if settles else found

    def _explained(self) -> None:
        p10 = self._judgements["P10"]
        for job_id, charge in self._books.charges.items():
            for row in self._books.settlements.get(charge["charge_id"], []):
                p10.looked_at["settlements"] += 1
                self._explain(p10, job_id, charge, row)
            for transfer in self._books.transfers.get(charge["charge_id"], []):
                named = transfer["actor"] and (transfer["kind"] == "hold" or transfer["reason"])
                p10.require(named, f"a {transfer['kind']} of {job_id} has no actor or no reason")

        for identity, rows in self._books.inbox.items():
            for row in rows:
                charge = self._books.charges.get(row["job_id"], {})
                settled = self._books.settlements.get(charge.get("charge_id", 0), [])
                mine = identity in {(each["event_source"], each["event_id"]) for each in settled}
                word = row["outcome"]
                p10.require(mine or word not in SETTLING.values(), f"event {identity} is {word}, and settled nothing")

    def _explain(self, p10: Judgement, job_id: str, charge: Row, row: Row) -> None:
        identity = (row["event_source"], row["event_id"])
        said = self._books.inbox.get(identity, [])
        outcomes = [(each["job_id"], each["outcome"]) for each in said]
        wanted = [(job_id, SETTLING.get((row["kind"], row["clause"])))]
        p10.require(outcomes == wanted, f"{job_id} is settled by {identity}, of which the inbox says {said}")
        p10.require(row["policy_version"] in self._record["policy_versions"], f"{job_id}: {row['policy_version']}?")
        in_time = charge["opened_at"] <= row["settled_at"] <= row["committed_at"] + timedelta(seconds=1)
        p10.require(in_time, f"{job_id} says that it was settled at {row['settled_at']}")
        reading = Reading(row["kind"], row["reason"], row["clause"])
        event = self._events.get(job_id, {}).get(identity)
        if event is None:
            by_answer = row["event_source"] == self._record["reconciler"] and job_id in self._record["silent"]
            p10.require(by_answer, f"{job_id} is settled by {identity}, which was not published")
            return
        mine = read_policy(event["type"], event["data"], terminated=job_id in self._terminated)
        p10.require(reading == mine, f"{job_id} is {'/'.join(reading)}; its event says {'/'.join(mine)}")
        at = datetime.fromisoformat(event["time"]).astimezone(UTC)
        p10.require(row["event_time"] == at, f"{job_id}: its event happened at {at}, not at {row['event_time']}")


# --- reading ---------------------------------------------------------------------------------------------------


def _connect(url: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(url, connect_timeout=5, application_name="kino-promises", client_encoding="UTF8")
    # Times arrive as text: PGDATESTYLE or a default of the role must not change how they are read.
    connection.execute("SET DateStyle = 'ISO, MDY'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres'")
    connection.commit()
    return connection


def digest_transfers(connection: psycopg.Connection[Any], below: str) -> Row:
    """Return count and digest of the transfers below a horizon: none can be added to them, and none may change."""
    cursor = connection.execute(
        "SELECT CAST(t AS text) FROM kino.transfer t WHERE t.xid < CAST(%s AS xid8) ORDER BY t.transfer_id", [below]
    )
    digest, count = hashlib.sha256(), 0
    for (text,) in cursor:
        digest.update(text.encode())
        count += 1
    return {"count": count, "digest": digest.hexdigest()}


def _refused(url: str, statement: str) -> bool:
    """Run a statement that must be refused, and roll it back; return whether it was refused."""
    with _connect(url) as connection:
        try:
            connection.execute("SET lock_timeout = '5s'")
            connection.execute(statement.encode())
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.RestrictViolation):
            return True
        finally:
            connection.rollback()
    return False


def read_books(record: Row) -> Books:
    """Return the ledger in one snapshot, and then Redis; raises what psycopg and redis raise."""
    with _connect(record["database_url"]) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        settlements, transfers, inbox = defaultdict(list), defaultdict(list), defaultdict(list)
        for row in _rows(
            connection, "SELECT *, pg_xact_commit_timestamp(CAST(xid AS xid)) AS committed_at FROM kino.settlement"
        ):
            settlements[row["charge_id"]].append(row)
        for row in _rows(connection, "SELECT * FROM kino.transfer"):
            transfers[row["charge_id"]].append(row)
        for row in _rows(connection, "SELECT * FROM kino.inbox_event"):
            inbox[row["source"], row["event_id"]].append(row)
        integrity = defaultdict(list)
        for promise, query in integrity_queries():
            for row in _rows(connection, query):
                integrity[promise].append(row["sentence"])
        return Books(
            charges={row["job_id"]: row for row in _rows(connection, "SELECT * FROM kino.charge")},
            settlements=settlements,
            transfers=transfers,
            lots={row["reference"]: row for row in _rows(connection, "SELECT * FROM kino.credit_lot")},
            inbox=inbox,
            pending={(row["source"], row["event_id"]) for row in _rows(connection, "SELECT * FROM kino.pending_event")},
            letters=_rows(connection, "SELECT * FROM kino.dead_letter"),
            breaks=_rows(connection, "SELECT * FROM kino.break"),
            queued=_queued(record["redis_url"]),
            integrity=integrity,
        )


def integrity_queries() -> list[tuple[str, str]]:
    """Return each query as (promise, statement): it begins with its name and its promise, and looks at every key."""
    found = []
    for file in sorted(INTEGRITY.glob("*.sql")):
        _, *sections = re.split(r"^-- name: ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections:
            promise = section.partition("-- promise: ")[2].partition("\n")[0]
            found.append((promise, re.sub(r"\b(keys|of_lots)\([\w.]+\)", "true", section.partition("\n")[2])))
    return found


def _rows(connection: psycopg.Connection[Any], query: str) -> list[Row]:
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        return cursor.execute(query.encode()).fetchall()


def _queued(url: str) -> dict[str, int]:
    """Return the length of every list that can hold an event: queues with their priorities, in flight, recovered."""
    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        keys = [
            key for pattern in ("generation.*", "kino:inflight:*", "kino:recovered:*") for key in client.keys(pattern)
        ]
        return {key.decode(): client.llen(key) for key in keys if client.type(key) == b"list"}


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Judge the record that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the record, a JSON file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    try:
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        judgements = Referee(record, read_books(record)).judge()
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{arguments.record} is no record: {type(error).__name__}: {error}")
    except (psycopg.Error, redis.RedisError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)  # noqa: T201 - a program's output
        return 3
    if arguments.json:
        print(json.dumps({"items": [judgement.as_dict() for judgement in judgements], "next": None}))  # noqa: T201
    else:
        for judgement in judgements:
            looked = ", ".join(f"{count:,} {what}" for what, count in judgement.looked_at.items())
            print(f"{judgement.promise:<4}{judgement.word:<6}  {judgement.says}  ({looked})")  # noqa: T201
            for text in judgement.findings[:SHOWN_MAX]:
                print(f"      {text}")  # noqa: T201
            if len(judgement.findings) > SHOWN_MAX:
                print(f"      and {len(judgement.findings) - SHOWN_MAX:,} more")  # noqa: T201
    return int(any(judgement.word == "broken" for judgement in judgements))


if __name__ == "__main__":
    sys.exit(main())
