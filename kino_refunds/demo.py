"""The demo: the story of `story.py` on real servers, with real workers, one of which is killed in the middle.

Nothing here settles anything: charges are opened as a product opens them, events are published as the
pipeline publishes them, and two workers and beat do the rest. Afterwards `promises.py`, a program of its own
that imports nothing of this project, compares the ledger with the record of what was asked of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter, deque
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import sqlalchemy as sa

from kino_refunds import figures, promises
from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.errors import MalformedMessage, ServerFailed
from kino_refunds.events.client import redis_client
from kino_refunds.events.envelope import MalformedReason, parse
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import depths, in_flight
from kino_refunds.events.schema import QUEUES, Queue
from kino_refunds.figures import Snapshot, Told
from kino_refunds.ledger import (
    VIOLATION,
    AccountStatus,
    ChargeRequest,
    Grant,
    LotClass,
    grant_lots,
    open_charges,
    set_account_status,
)
from kino_refunds.processes import CeleryProcess, settings_for, start_beat, start_worker
from kino_refunds.reconciliation.overdue import EVENT_SOURCE as RECONCILER
from kino_refunds.settings import Settings
from kino_refunds.story import (
    ENDINGS,
    SUSPENDED,
    TERMINATED,
    Job,
    Twist,
    document,
    make_closed_jobs,
    make_jobs,
    make_lots,
    malformed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kino_refunds.embedded import Servers

CHUNK = 50
PAUSE_S = 0.1
"""Between chunks: 500 jobs a second, far below what two workers settle, so that latencies are those of a calm day."""
EARLY_CHUNKS = 10
COPY_CHUNKS = 5
KILLED_AT = 0.4
"""The share of the jobs that is submitted when a worker is killed."""
CATCHES_MAX = 400
LOOK_EVERY_S = 0.25
WAIT_S = 0.05
STANDSTILL_S = 45.0
"""When nothing has moved for so long, the waiting ends, and the promises are judged as things are."""
RATE_OVER_S = 2.0

LIMITS_MS = {"lock": 500, "statement": 1500, "idle_in_transaction": 500, "transaction": 1500, "tcp_user": 500}
OVERDUE_GRACE_S = 2.0
SILENT_FOR_S = 1.0
"""How long after its submission the deadline of a job is whose event never comes; the others have ten minutes."""
DEADLINE = timedelta(minutes=10)
SOURCE_QUERY = "SELECT job_id, state, origin, stage FROM pipeline.job WHERE job_id = ANY(:job_ids)"

SETTINGS = {
    # A worker's batch is taken over once its alive key has run out: 9.5 s with these, 65 s with the defaults.
    **{f"KINO_{name.upper()}_TIMEOUT_MS": str(value) for name, value in LIMITS_MS.items()},
    "KINO_JOB_SOURCE": "sql",
    "KINO_JOB_SOURCE_QUERY": SOURCE_QUERY,
    "KINO_OVERDUE_EVERY_S": "1",
    "KINO_OVERDUE_GRACE_S": str(OVERDUE_GRACE_S),
    "KINO_OVERDUE_ASK_WINDOW_S": "4",
    "KINO_RETRY_EVERY_S": "1",
}
"""What the demo sets otherwise than by default: everything that would take minutes takes seconds."""


class View(Protocol):
    """Whoever shows the demo while it runs."""

    def say(self, at_s: float, what: str, text: str) -> None:
        """Say one thing that happened; `what` is `broken`, `healed` or empty."""

    def show(self, now: Snapshot) -> None:
        """Show how things stand."""


@dataclass
class _Wound:
    """Something that was broken on purpose, and the question whether it has healed."""

    healed: str
    query: str
    values: dict[str, Any]
    wanted: int


@dataclass
class _Killed:
    at: datetime
    events: list[str] = field(default_factory=list)


class _Message(NamedTuple):
    """A message to publish; `event` is None where nobody can read it."""

    queue: str
    event: dict[str, Any] | None
    bytes: bytes
    reason: str | None
    """Of the dead letter that it must become, if it must."""
    copied: bool = False
    together: bool = False
    """One of two whose order on the queue matters: both go by LPUSH."""


class Demo:
    """One run on `running`, which nobody else uses: `run` once; until the end of the block a worker and beat stay.

    `started` is when all this began (`time.monotonic()`), the servers included.
    """

    def __init__(self, running: Servers, view: View, *, jobs: int, seed: int, started: float) -> None:
        self._servers = running
        self._view = view
        self._chance = random.Random(seed)  # noqa: S311 - a story, not a secret
        self._closed = make_closed_jobs()
        self._jobs = make_jobs(jobs - len(self._closed), self._chance)
        self._everybody = [*self._closed, *self._jobs]
        self._stack = ExitStack()
        self._workers: dict[int, CeleryProcess] = {}
        self._wounds: list[_Wound] = []
        self._killed: _Killed | None = None
        self._record: dict[str, Any] = {"jobs": [], "answers": {}, "silent": []}
        self._messages: list[dict[str, Any]] = []
        self._kombu = False
        self._started = started
        self._stage = "starting"
        self._looked = 0.0
        self._submitted = 0
        self._lately: deque[tuple[float, int]] = deque([(self._started, 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def settings(self) -> dict[str, str]:
        """The KINO_* variables of the processes, for whoever wants to look at the same ledger."""
        return settings_for(self._servers, **SETTINGS, KINO_JOB_SOURCE_URL=self._servers.database_url(role="kino_read"))

    def run(self) -> Told:
        """Tell the story to its end and judge it; raises ServerFailed if a process ends by itself."""
        self._begin()
        self._submit_all()
        self._afterwards()
        self._settle_down()
        seconds = time.monotonic() - self._started
        self._stage = "checking the promises"
        self._look(now=True)
        return self._told(seconds)

    def open_one_more(self) -> dict[str, str]:
        """Open a charge `walk-1` for a customer `acme`; returns two files: its event gone wrong, and corrected."""
        now = datetime.now(UTC)
        with self._product.begin() as connection:
            grant_lots(connection, [Grant("acme-order-1", "acme", 100, LotClass.PURCHASED)])
            open_charges(connection, [ChargeRequest("walk-1", "acme", 8, now + timedelta(hours=1))])
        wrong = document("walk-1", "failed, platform", at=now, account_id="somebody-else")
        right = document("walk-1", "failed, platform", at=now, account_id="acme")
        return {"misdirected.jsonl": json.dumps(wrong) + "\n", "corrected.json": json.dumps(right) + "\n"}

    def require_alive(self) -> None:
        """Raise ServerFailed if a process has ended by itself."""
        for process in (*self._workers.values(), self._beat):
            process.require_alive()

    # --- the beginning ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        running = self._servers
        migrate(running.database_url(role="kino_owner"))
        with running.postgres.connect("kino") as superuser:
            superuser.execute(b"CREATE SCHEMA pipeline")
            superuser.execute(
                b"CREATE TABLE pipeline.job (job_id text PRIMARY KEY, state text, origin text, stage text)"
            )
            superuser.execute(b"GRANT USAGE ON SCHEMA pipeline TO kino_read")
            superuser.execute(b"GRANT SELECT ON pipeline.job TO kino_read")
        self._product = self._engine("kino_product")
        self._operator = self._engine("kino_worker")
        self._redis = self._stack.enter_context(redis_client(running.redis_url()))
        self._publisher = self._stack.enter_context(EventPublisher(running.redis_url()))
        self._workers = {number: self._start_worker(number) for number in (1, 2)}
        beat = start_beat(self.settings, running.data_dir / "beat-schedule", running.data_dir / "beat.log")
        self._stack.callback(beat.stop)
        self._beat = beat
        self._grant()
        self._close_accounts()
        if not self._wait(lambda: self._one("SELECT count(*) FROM kino.intake_worker") == len(self._workers)):
            raise ServerFailed(f"the workers' intake did not start within {STANDSTILL_S:.0f} s")
        self._worker_ids = self._one("SELECT jsonb_object_agg(pid, worker_id) FROM kino.intake_worker")
        self._say("", f"2 workers and beat run; {self._accounts} customers have 3 lots each")

    def _engine(self, role: str) -> sa.Engine:
        engine = create_engine(self._servers.database_url(role=role), application_name=f"kino-demo-{role}")
        self._stack.callback(engine.dispose)
        return engine

    def _start_worker(self, number: int) -> CeleryProcess:
        worker = start_worker(
            self.settings | {"KINO_LOG_FORMAT": "json"}, self._servers.data_dir / f"worker-{number}.log"
        )
        self._stack.callback(worker.stop)
        return worker

    def _grant(self) -> None:
        now = datetime.now(UTC)
        grants = [
            Grant(
                lot.reference,
                lot.account_id,
                lot.credits,
                LotClass(lot.lot_class),
                None if lot.days is None else now + timedelta(days=lot.days),
                lot.priority,
            )
            for lot in make_lots(self._everybody, self._chance)
        ]
        with self._product.begin() as connection:
            grant_lots(connection, grants)
        self._accounts = len({grant.account_id for grant in grants})
        self._record["grants"] = [
            {"reference": g.reference, "account_id": g.account_id, "credits": g.credits, "class": g.lot_class.value}
            for g in grants
        ]

    def _close_accounts(self) -> None:
        """Two accounts are closed while their jobs run."""
        self._open(self._closed)
        with self._operator.begin() as connection:
            set_account_status(connection, TERMINATED, AccountStatus.TERMINATED, reason=VIOLATION, actor="demo")
            set_account_status(connection, SUSPENDED, AccountStatus.SUSPENDED, reason="chargeback", actor="demo")
        self._record["terminated_for_violation"] = [TERMINATED]

    # --- jobs and their messages -----------------------------------------------------------------------------

    def _submit_all(self) -> None:
        self._stage = "jobs run, events come"
        self._say_what_is_wrong()
        self._publish([message for job in self._closed for message in _ends(job)])
        chunks = [self._jobs[start : start + CHUNK] for start in range(0, len(self._jobs), CHUNK)]
        kill_from = int(len(chunks) * KILLED_AT)
        unreadable = list(MalformedReason)
        copies: dict[int, list[_Message]] = {}
        charges: dict[int, list[Job]] = {}
        due = time.monotonic()
        for number, chunk in enumerate(chunks):
            charges.setdefault(number + EARLY_CHUNKS, []).extend(job for job in chunk if job.twist is Twist.EARLY)
            self._open([job for job in chunk if job.twist is not Twist.EARLY] + charges.pop(number, []))
            messages = [message for job in chunk for message in _ends(job)]
            again = [message for message in messages if message.copied]
            copies[number + COPY_CHUNKS] = again
            messages += again + copies.pop(number, [])
            if unreadable:
                messages.append(self._unreadable(unreadable.pop()))
            self._publish(messages)
            self._submitted += len(chunk)
            if number >= kill_from and self._killed is None:
                self._kill(last=number == len(chunks) - 1)
            due = max(due + PAUSE_S, time.monotonic() - PAUSE_S)
            while time.monotonic() < due:
                self._look()
                time.sleep(WAIT_S / 5)
        self._publish([message for messages in copies.values() for message in messages])
        self._publish([self._unreadable(reason) for reason in unreadable])
        self._open([job for jobs in charges.values() for job in jobs])

    def _unreadable(self, reason: MalformedReason) -> _Message:
        queue = self._chance.choice(list(Queue))
        return _Message(queue.value, None, malformed(reason, at=datetime.now(UTC)), reason.value)

    def _open(self, jobs: Sequence[Job]) -> None:
        """Open charges as the product does; where the event will not come, the pipeline's own table knows, or not."""
        now = datetime.now(UTC)
        silent = [job for job in jobs if job.twist is Twist.SILENT]
        deadlines = {job.job_id: now + timedelta(seconds=SILENT_FOR_S) for job in silent}
        asked = [
            ChargeRequest(job.job_id, job.account_id, job.credits, deadlines.get(job.job_id, now + DEADLINE))
            for job in jobs
        ]
        known = [(job.job_id, ENDINGS[job.ending]) for job in silent if job.ending is not None]
        with self._product.begin() as connection:
            open_charges(connection, asked)
        with self._servers.postgres.connect("kino") as superuser:
            for job_id, how in known:
                origin, stage = how.data.get("error", {}).get("origin"), how.data.get("stage")
                superuser.execute(
                    "INSERT INTO pipeline.job VALUES (%s, %s, %s, %s)", [job_id, how.state, origin, stage]
                )
        self._record["jobs"] += [{**asdict(each), "deadline_at": each.deadline_at.isoformat()} for each in asked]
        self._record["answers"] |= {job_id: {"type": how.type, "data": how.data} for job_id, how in known}
        self._record["silent"] += [job.job_id for job in silent]

    def _publish(self, messages: Sequence[_Message]) -> None:
        """Put messages on their queues: every second event through kombu, everything else by a bare LPUSH."""
        if not messages:
            return
        kombu, bare = [], []
        for message in messages:
            self._kombu = not self._kombu
            if message.event is not None and message.reason is None and not message.together and self._kombu:
                kombu.append(message)
            else:
                bare.append(message)
        with self._redis.pipeline(transaction=False) as pipeline:
            for message in bare:
                pipeline.lpush(message.queue, message.bytes)
            pipeline.execute()
        self._publisher.publish_many(message.event for message in kombu if message.event is not None)
        burst = len(self._messages)
        self._messages += [
            {
                "burst": burst,
                "form": form,
                "queue": message.queue,
                "event": message.event,
                "raw": b64encode(message.bytes).decode() if message.reason else None,
                "reason": message.reason,
            }
            for form, sent in (("lpush", bare), ("kombu", kombu))
            for message in sent
        ]

    def _say_what_is_wrong(self) -> None:
        """Say what is wrong with the messages from now on; each is said to be healed when the ledger shows it."""
        twists = Counter(job.twist for job in self._everybody)
        jobs = {twist: [job.job_id for job in self._everybody if job.twist is twist] for twist in Twist}
        settled = "SELECT count(*) FROM kino.settlement JOIN kino.charge USING (charge_id) WHERE job_id = ANY(:jobs)"
        letters = "SELECT count(*) FROM kino.dead_letter WHERE reason = ANY(:reasons)"
        copied, early, silent = twists[Twist.COPIES], twists[Twist.EARLY], twists[Twist.SILENT]
        self._break(
            f"{copied} events come three times, {twists[Twist.PAIR]} jobs end twice",
            f"those {copied + twists[Twist.PAIR]} jobs are settled, once each",
            settled,
            copied + twists[Twist.PAIR],
            jobs=jobs[Twist.COPIES] + jobs[Twist.PAIR],
        )
        self._break(
            f"{early} events come before their charge",
            f"those {early} waited in Postgres until their charge was there",
            settled,
            early,
            jobs=jobs[Twist.EARLY],
        )
        kinds = len(MalformedReason)
        self._break(
            f"{kinds} messages that nobody can read, one of each kind",
            f"those {kinds} are dead letters, whole; no neighbour waited",
            letters,
            kinds,
            reasons=[reason.value for reason in MalformedReason],
        )
        self._break(
            f"{twists[Twist.CONTRADICTION]} jobs both complete and fail",
            f"for those {twists[Twist.CONTRADICTION]} the first word stands, each is a break for a person",
            "SELECT count(*) FROM kino.break",
            twists[Twist.CONTRADICTION],
        )
        self._break(
            f"{silent} jobs whose event never comes",
            f"those {silent} were found overdue, and somebody was asked",
            settled,
            silent,
            jobs=jobs[Twist.SILENT],
        )

    def _afterwards(self) -> None:
        """What may only come when something else is decided: twins of decided events, and corrected ones."""
        self._stage = "afterthoughts"
        twins = [job for job in self._jobs if job.twist is Twist.TWIN]
        wrong = [job for job in self._jobs if job.twist is Twist.MISDIRECTED]
        decided = "SELECT count(*) FROM kino.inbox_event WHERE job_id = ANY(:jobs)"
        letters = "SELECT count(*) FROM kino.dead_letter WHERE reason = ANY(:reasons)"
        # Where one of them does not come the judgement will say which.
        self._wait(lambda: self._one(decided, jobs=[job.job_id for job in twins]) == len(twins))
        self._wait(lambda: self._one(letters, reasons=["account_mismatch"]) == len(wrong))
        now = datetime.now(UTC)
        again = [document(job.job_id, job.other, at=now) for job in twins if job.other is not None]
        right = [
            document(job.job_id, job.ending, at=now, account_id=job.account_id, event_id=f"{job.job_id}-corrected")
            for job in wrong
            if job.ending is not None
        ]
        self._publish([_message(event, reason="conflicting_duplicate") for event in again])
        self._publish([_message(event) for event in right])
        self._break(
            f"{len(again)} other endings come under the id of a decided event",
            f"those {len(again)} are dead letters, and moved nothing",
            letters,
            len(again),
            reasons=["conflicting_duplicate"],
        )
        self._break(
            f"{len(wrong)} events named another account; now corrected ones follow",
            f"those {len(wrong)} are dead letters, the corrected ones settled their jobs",
            "SELECT count(*) FROM kino.settlement WHERE event_id = ANY(:events)",
            len(wrong),
            events=[event["id"] for event in right],
        )

    # --- what is broken on purpose ---------------------------------------------------------------------------

    def _kill(self, *, last: bool) -> None:
        """Kill a worker that is caught with messages in its hands; at the `last` chance one that holds nothing."""
        caught = self._catch()
        if caught is None and not last:
            return
        number, held = caught or (1, [])
        self._workers.pop(number).kill()
        events = [event for raw in held if (event := _id_in(raw)) is not None]
        self._killed = _Killed(datetime.now(UTC), events)
        self._note_transfers()
        self._break(
            f"worker {number} is killed by SIGKILL with {len(held)} messages in its hands",
            f"the other worker recovered those {len(held)}, and settled them one at a time",
            "SELECT count(*) FROM kino.inbox_event WHERE event_id = ANY(:events)",
            self._decidable(events),
            events=events,
        )

    def _catch(self) -> tuple[int, list[bytes]] | None:
        """Stop one worker after the other for an instant; the first that holds messages is left stopped."""
        for _ in range(CATCHES_MAX):
            for number, worker in self._workers.items():
                os.kill(worker.pid, signal.SIGSTOP)
                if held := in_flight(self._redis, self._worker_ids[str(worker.pid)]):
                    return number, held
                os.kill(worker.pid, signal.SIGCONT)
            if not sum(depths(self._redis).values()):
                return None
        return None

    def _decidable(self, events: Sequence[str]) -> int:
        """Count the events that end in the inbox: those that name another account become dead letters."""
        doomed = {each["event"]["id"] for each in self._messages if each["event"] and each["reason"]}
        return len(set(events) - doomed)

    def _note_transfers(self) -> None:
        """Digest every transfer that no open transaction can still add to: none of them may ever change (P5)."""
        horizon = self._one("SELECT CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text)")
        with self._servers.postgres.connect("kino") as superuser:
            self._record["transfers"] = {"below": horizon, **promises.digest_transfers(superuser, horizon)}

    def _break(self, broken: str, healed: str, query: str, wanted: int, **values: Any) -> None:
        self._say("broken", broken)
        self._wounds.append(_Wound(healed, query, values, wanted))

    def _say(self, what: str, text: str) -> None:
        self._view.say(time.monotonic() - self._started, what, text)

    # --- looking ---------------------------------------------------------------------------------------------

    def _settle_down(self) -> None:
        """Wait until nothing waits anywhere and every charge is settled; or until nothing moves any more."""
        self._stage = "the last ones settle"
        moved, stood = time.monotonic(), -1
        while True:
            with self._operator.connect() as connection:
                unsettled = figures.unsettled(connection)
            open_or_waiting = unsettled + sum(depths(self._redis).values()) + len(self._wounds)
            if not open_or_waiting or time.monotonic() - moved > STANDSTILL_S:
                return
            if open_or_waiting != stood:
                moved, stood = time.monotonic(), open_or_waiting
            self._look()
            time.sleep(WAIT_S)

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Wait for something that must come within seconds, and say whether it has."""
        deadline = time.monotonic() + STANDSTILL_S
        while not (come := until()) and time.monotonic() < deadline:
            self._look()
            time.sleep(WAIT_S)
        return come

    def _look(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self.require_alive()
        for wound in list(self._wounds):
            if self._one(wound.query, **wound.values) >= wound.wanted:
                self._wounds.remove(wound)
                self._say("healed", wound.healed)
        with self._operator.connect() as connection:
            standing = figures.standing(connection)
        settled = sum(standing["settled"].values())
        self._lately.append((self._looked, settled))
        while len(self._lately) > 2 and self._lately[1][0] < self._looked - RATE_OVER_S:  # noqa: PLR2004 - two points
            self._lately.popleft()
        (then, before), (at, after) = self._lately[0], self._lately[-1]
        self._view.show(
            Snapshot(
                at_s=self._looked - self._started,
                stage=self._stage,
                jobs=len(self._everybody),
                submitted=self._submitted,
                per_second=(after - before) / max(at - then, LOOK_EVERY_S),
                queues=depths(self._redis),
                **standing,
            )
        )

    def _one(self, query: str, **values: Any) -> Any:
        """Read the one value that a query gives."""
        with self._operator.connect() as connection:
            return connection.execute(sa.text(query), values).scalar_one()

    # --- the end ---------------------------------------------------------------------------------------------

    def _told(self, seconds: float) -> Told:
        killed = self._killed or _Killed(datetime.now(UTC), [])
        with self._operator.connect() as connection:
            found = figures.ending(connection, events=killed.events, killed_at=killed.at)
        return Told(
            jobs=len(self._everybody),
            messages=len(self._messages),
            duplicates_absorbed=self._duplicates(),
            seconds=round(seconds, 1),
            promises=self._judge(killed),
            **found,
        )

    def _duplicates(self) -> int:
        """Add up what the workers said of their batches: a duplicate leaves no row, which is the point of it."""
        found = 0
        for log_file in self._servers.data_dir.glob("worker-*.log"):
            for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, AttributeError):  # not every line of a worker's log is ours
                    found += json.loads(line).get("outcomes", {}).get("duplicate", 0)
        return found

    def _judge(self, killed: _Killed) -> list[dict[str, Any]]:
        """Have the promises checked by a process that knows nothing of this one but the record."""
        limits: dict[str, Any] = {f"{name}_timeout_ms": value for name, value in LIMITS_MS.items()}
        self._record |= {
            "database_url": _plain(self._servers.superuser_url()),
            "worker_url": _plain(self._servers.database_url()),
            "redis_url": self._servers.redis_url(),
            "policy_versions": ["2025-12-14"],
            "reconciler": RECONCILER,
            "overdue_grace_s": OVERDUE_GRACE_S,
            "alive_ttl_s": Settings.model_construct(**limits).alive_ttl_s,
            "killed": {"at": killed.at.isoformat(), "events": killed.events},
            "messages": self._messages,
        }
        path = self._servers.data_dir / "record.json"
        path.write_text(json.dumps(self._record), encoding="utf-8")
        return judge(path)


def judge(record: Path) -> list[dict[str, Any]]:
    """Run `promises.py` on a record in a process of its own; returns one entry for each promise."""
    ran = subprocess.run(  # noqa: S603 - our own interpreter and file
        [sys.executable, "-I", promises.__file__, str(record), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if not ran.stdout:
        raise ServerFailed(f"the promises could not be checked: {ran.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(ran.stdout)["items"]
    return found


def _ends(job: Job) -> list[_Message]:
    """Write the messages of one job's end, in the order in which they go onto the queue."""
    now = datetime.now(UTC)
    if job.ending is None or job.twist is Twist.SILENT:
        return []
    if job.twist is Twist.MISDIRECTED:
        wrong = document(job.job_id, job.ending, at=now, account_id="somebody-else")
        return [_message(wrong, reason="account_mismatch")]
    if job.other is not None and job.twist in {Twist.PAIR, Twist.CONTRADICTION}:
        before = now - timedelta(milliseconds=20)
        later = document(job.job_id, job.other, at=now, event_id=f"{job.job_id}-later")
        return [_message(later, together=True), _message(document(job.job_id, job.ending, at=before), together=True)]
    return [_message(document(job.job_id, job.ending, at=now), copied=job.twist is Twist.COPIES)]


def _message(
    event: dict[str, Any], *, reason: str | None = None, copied: bool = False, together: bool = False
) -> _Message:
    return _Message(QUEUES[event["type"]].value, event, json.dumps(event).encode(), reason, copied, together)


def _id_in(raw: bytes) -> str | None:
    try:
        return parse(raw).id
    except MalformedMessage:
        return None


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")
