"""The demo: the story on its stage, with real workers, one of which is killed halfway.

No code here settles a charge: charges are opened as a product opens them, events are published as the pipeline
publishes them, and two workers and beat do the rest. Afterwards `promises.py`, a separate program that imports nothing
of this project, compares the ledger with the record of what was asked of it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from kino_refunds.db.clock import read_clock
from kino_refunds.demo import figures, promises
from kino_refunds.demo.figures import Snapshot, StoryReport
from kino_refunds.demo.stage import OVERDUE_GRACE_S, Stage, alive_ttl_s, events_in
from kino_refunds.demo.story import Job, Twist, document, make_closed_jobs, make_jobs, make_lots
from kino_refunds.demo.traffic import Message, Traffic, ends, message, unreadable
from kino_refunds.errors import ServerFailed
from kino_refunds.events.envelope import MalformedReason
from kino_refunds.events.queues import depths
from kino_refunds.events.schema import Queue
from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.reconciliation.proof import SourceSaid, prove
from kino_refunds.reconciliation.runs import bench_for, run_check
from kino_refunds.settings import PREFIX, Settings
from kino_refunds.settlement.deliveries import RECONCILER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK = 50
PAUSE_S = 0.1
"""The pause between chunks: 500 jobs a second, far below what two workers settle, so that they are not overloaded."""
EARLY_CHUNKS = 10
COPY_CHUNKS = 5
KILLED_AT = 0.4
"""The share of the jobs that is submitted when a worker is killed."""
LOOK_EVERY_S = 0.25
WAIT_S = 0.05
STANDSTILL_S = 45.0
"""If nothing changes for so long, the demo stops waiting, and the promises are judged as things are."""
RATE_OVER_S = 2.0
LOT_GRACE_DAYS = 7
"""The lot grace of a new ledger: the referee must not read it from the ledger that it judges."""


class View(Protocol):
    """The display of the demo while it runs."""

    def say(self, at_s: float, what: str, text: str) -> None:
        """Print one thing that happened; `what` is `broken`, `healed` or empty."""

    def show(self, now: Snapshot) -> None:
        """Show the present figures."""


@dataclass
class _InjectedFault:
    """A fault that was injected on purpose: the text for when it has healed, and the check whether it has."""

    healed: str
    is_healed: Callable[[], bool]


@dataclass
class _Kill:
    at: datetime
    events: list[str] = field(default_factory=list)


class Demo:
    """One run on a stage; `started` is the `time.monotonic()` at which the start of the servers began."""

    def __init__(self, stage: Stage, view: View, *, jobs: int, seed: int, started: float) -> None:
        self._stage = stage
        self._view = view
        self._started = started
        self._chance = random.Random(seed)  # noqa: S311 - a story, not a secret
        self._closed = make_closed_jobs()
        self._jobs = make_jobs(jobs - len(self._closed), self._chance)
        self._all_jobs = [*self._closed, *self._jobs]
        self._traffic = Traffic(stage)
        self._injected: list[_InjectedFault] = []
        self._killed: _Kill | None = None
        self._chapter = "starting"
        self._submitted = 0
        self._looked = 0.0
        self._lately: deque[tuple[float, int]] = deque([(started, 0)])

    def run(self) -> StoryReport:
        """Run the story to its end and return its report; raises ServerFailed if a process ends unexpectedly."""
        self._begin()
        self._submit_all()
        self._afterwards()
        self._settle_down()
        seconds = time.monotonic() - self._started
        self._chapter = "checking the promises"
        self._look(now=True)
        return self._report(seconds)

    # --- the story -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        accounts = self._traffic.grant(make_lots(self._all_jobs, self._chance))
        self._traffic.open(self._closed)
        self._traffic.close_accounts()
        if not self._wait(self._stage.ready):
            raise ServerFailed(f"the workers' intake did not start within {STANDSTILL_S:.0f} s")
        self._say("", f"2 workers and beat run; {accounts} customers have 3 lots each")

    def _submit_all(self) -> None:
        self._chapter = "jobs run, events come"
        self._say_what_is_wrong()
        self._traffic.publish([each for job in self._closed for each in ends(job)])
        self._submitted = len(self._closed)
        chunks = [self._jobs[start : start + CHUNK] for start in range(0, len(self._jobs), CHUNK)]
        kill_from = int(len(chunks) * KILLED_AT)
        kinds = list(MalformedReason)
        copies: dict[int, list[Message]] = {}
        charges: dict[int, list[Job]] = {}
        due = time.monotonic()
        for number, chunk in enumerate(chunks):
            charges.setdefault(number + EARLY_CHUNKS, []).extend(job for job in chunk if job.twist is Twist.EARLY)
            self._traffic.open([job for job in chunk if job.twist is not Twist.EARLY] + charges.pop(number, []))
            messages = [each for job in chunk for each in ends(job)]
            again = [each for each in messages if each.copied]
            copies[number + COPY_CHUNKS] = again
            messages += again + copies.pop(number, [])
            if kinds:
                messages.append(unreadable(kinds.pop(), self._chance.choice(list(Queue))))
            self._traffic.publish(messages)
            self._submitted += len(chunk)
            if number >= kill_from and self._killed is None:
                self._kill(last=number == len(chunks) - 1)
            due = max(due + PAUSE_S, time.monotonic() - PAUSE_S)
            while time.monotonic() < due:
                self._look()
                time.sleep(WAIT_S / 5)
        self._traffic.publish([each for messages in copies.values() for each in messages])
        self._traffic.publish([unreadable(reason, Queue.TIMEOUT) for reason in kinds])
        self._traffic.open([job for jobs in charges.values() for job in jobs])

    def _say_what_is_wrong(self) -> None:
        """Announce what is wrong with the messages from now on; each fault is announced as healed by the ledger."""
        twists = Counter(job.twist for job in self._all_jobs)
        jobs = {twist: [job.job_id for job in self._all_jobs if job.twist is twist] for twist in Twist}
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
            f"those {early} are settled, now that their charge is there",
            settled,
            early,
            jobs=jobs[Twist.EARLY],
        )
        kinds = len(MalformedReason)
        self._break(
            f"{kinds} messages cannot be read, one of each kind",
            f"those {kinds} are kept whole as dead letters",
            letters,
            kinds,
            reasons=[reason.value for reason in MalformedReason],
        )
        self._break(
            f"{twists[Twist.CONTRADICTION]} jobs both complete and fail",
            f"for those {twists[Twist.CONTRADICTION]} the first settlement stands, each is a break for a person",
            "SELECT count(*) FROM kino.break",
            twists[Twist.CONTRADICTION],
        )
        self._break(
            f"the events of {silent} jobs never come",
            f"those {silent} were found overdue, and the job source was asked",
            settled,
            silent,
            jobs=jobs[Twist.SILENT],
        )

    def _afterwards(self) -> None:
        """Publish what may come only after other events are decided: twins of decided events, and corrected events."""
        self._chapter = "afterthoughts"
        twins = [job for job in self._jobs if job.twist is Twist.TWIN]
        wrong = [job for job in self._jobs if job.twist is Twist.MISDIRECTED]
        decided = "SELECT count(*) FROM kino.inbox_event WHERE job_id = ANY(:jobs)"
        letters = "SELECT count(*) FROM kino.dead_letter WHERE reason = ANY(:reasons)"
        # If one of them is missing, the referee reports which.
        self._wait(lambda: self._stage.one(decided, jobs=[job.job_id for job in twins]) == len(twins))
        self._wait(lambda: self._stage.one(letters, reasons=["account_mismatch"]) == len(wrong))
        now = datetime.now(UTC)
        again = [document(job.job_id, job.other, at=now) for job in twins if job.other is not None]
        right = [
            document(job.job_id, job.ending, at=now, account_id=job.account_id, event_id=f"{job.job_id}-corrected")
            for job in wrong
            if job.ending is not None
        ]
        self._traffic.publish([message(event, reason="conflicting_duplicate") for event in again])
        self._traffic.publish([message(event) for event in right])
        self._break(
            f"{len(again)} other endings come under the id of a decided event",
            f"those {len(again)} are dead letters",
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
        """Kill a worker that has messages in flight; at the `last` chance one that has none."""
        caught = self._stage.catch()
        if caught is None and not last:
            return
        number, held = caught or (1, [])
        self._stage.kill(number)
        events = events_in(held)
        self._killed = _Kill(datetime.now(UTC), events)
        self._note_transfers()
        self._break(
            f"worker {number} is killed by SIGKILL with {len(held)} messages in flight",
            f"the other worker has recovered and decided those {len(held)}",
            "SELECT count(*) FROM kino.inbox_event WHERE event_id = ANY(:events)",
            len(set(events) - self._traffic.doomed()),
            events=events,
        )

    def _note_transfers(self) -> None:
        """Store a digest of the transfers below the horizon: none can be added to them, and none may change (P5)."""
        horizon = self._stage.one("SELECT CAST(kino.horizon() AS text)")
        with self._stage.servers.postgres.connect("kino") as superuser:
            self._traffic.record["transfers"] = {"below": horizon, **promises.digest_transfers(superuser, horizon)}

    def _break(self, broken: str, healed: str, query: str, wanted: int, **values: Any) -> None:
        """Announce a fault; it has healed when `query` counts `wanted`."""
        self._say("broken", broken)
        self._injected.append(_InjectedFault(healed, lambda: bool(self._stage.one(query, **values) >= wanted)))

    def _say(self, what: str, text: str) -> None:
        self._view.say(time.monotonic() - self._started, what, text)

    # --- looking ---------------------------------------------------------------------------------------------

    def _settle_down(self) -> None:
        """Wait until no event is queued or pending and every charge is settled, or until nothing changes any more."""
        self._chapter = "the last ones settle"
        moved, stood = time.monotonic(), -1
        while True:
            with self._stage.operator.connect() as connection:
                unsettled = figures.unsettled(connection)
            undecided = unsettled + self._stage.queued() + len(self._injected)
            if not undecided or time.monotonic() - moved > STANDSTILL_S:
                return
            if undecided != stood:
                moved, stood = time.monotonic(), undecided
            self._look()
            time.sleep(WAIT_S)

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Wait for a condition that must be true within seconds; return whether it is."""
        deadline = time.monotonic() + STANDSTILL_S
        while not (come := until()) and time.monotonic() < deadline:
            self._look()
            time.sleep(WAIT_S)
        return come

    def _look(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self._stage.require_alive()
        for wound in list(self._injected):
            if wound.is_healed():
                self._injected.remove(wound)
                self._say("healed", wound.healed)
        with self._stage.operator.connect() as connection:
            standing = figures.standing(connection)
        settled = sum(standing["settled"].values())
        self._lately.append((self._looked, settled))
        while len(self._lately) > 2 and self._lately[1][0] < self._looked - RATE_OVER_S:  # noqa: PLR2004 - two points
            self._lately.popleft()
        (then, before), (at, after) = self._lately[0], self._lately[-1]
        self._view.show(
            Snapshot(
                at_s=self._looked - self._started,
                stage=self._chapter,
                jobs=len(self._all_jobs),
                submitted=self._submitted,
                per_second=(after - before) / max(at - then, LOOK_EVERY_S),
                queues=depths(self._stage.redis),
                **standing,
            )
        )

    # --- the end ---------------------------------------------------------------------------------------------

    def _report(self, seconds: float) -> StoryReport:
        killed = self._killed or _Kill(datetime.now(UTC), [])
        with self._stage.operator.connect() as connection:
            found = figures.ending(connection, events=killed.events, killed_at=killed.at)
        return StoryReport(
            jobs=len(self._all_jobs),
            messages=len(self._traffic.messages),
            duplicates_absorbed=self._stage.duplicates(),
            seconds=round(seconds, 1),
            promises=self._judge(killed),
            proof=self._prove(),
            **found,
        )

    def _prove(self) -> dict[str, Any]:
        """Run every check against the pipeline's own table, which knows by now how each job ended, and prove it."""
        self._traffic.tell_ends(self._all_jobs)
        settings = Settings.model_validate(
            {name.removeprefix(PREFIX).lower(): value for name, value in self._stage.settings.items()}
        )
        for check in CHECKS:
            with bench_for(check, settings, actor="demo") as bench:
                run_check(check, bench)
        with self._stage.operator.connect() as connection:
            said = SourceSaid(settings.job_source_name, read_clock(connection))
            proof = prove(connection, settings, source=said)
        return {"holds": proof.holds, "sentences": [asdict(each) for each in proof.sentences]}

    def _judge(self, killed: _Kill) -> list[dict[str, Any]]:
        """Have the referee check the promises, in a process that gets only the record; return its entries."""
        self._traffic.record |= {
            "database_url": _plain(self._stage.servers.superuser_url()),
            "worker_url": _plain(self._stage.servers.database_url()),
            "redis_url": self._stage.servers.redis_url(),
            "policy_versions": ["2025-12-14"],
            "reconciler": RECONCILER,
            "overdue_grace_s": OVERDUE_GRACE_S,
            "alive_ttl_s": alive_ttl_s(),
            "lot_grace_days": LOT_GRACE_DAYS,
            "killed": {"at": killed.at.isoformat(), "events": killed.events},
        }
        path = self._stage.servers.data_dir / "record.json"
        path.write_text(json.dumps(self._traffic.record), encoding="utf-8")
        return judge(path)


def judge(record: Path) -> list[dict[str, Any]]:
    """Run `promises.py` on a record in a process of its own; return one entry for each promise. Raises ServerFailed."""
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


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")
