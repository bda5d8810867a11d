"""The incident: a bad hour of events that were lost, spoiled, doubled and untrue, and what brings it home.

Real workers, a real pipeline table as the truth, a FLUSHALL and two SIGKILLs. Then a person types the documented
commands, and no others. At the end every customer has what the pipeline's own table says, and the proof holds.
"""

from __future__ import annotations

import gzip
import json
import random
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from kino_refunds.dev.embedded import Servers
from kino_refunds.events.schema import Queue
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from tests.faults.harness import TEMPLATE
from tests.faults.world import LIMITS_MS, World, require

SCALE = 1_000
LOST, SPOILED, DOUBLED, UNTRUE = 30, 20, 10, 2
"""Of a thousand jobs: events that never come, that nobody can read, that come twice, that say another ending."""
JOBS_EACH = 10
"""Jobs of one account."""
CHUNKS = 10
BY = "dana"

Answer = dict[str, Any]
ENDINGS: Sequence[tuple[str, Queue, Answer, dict[str, Any], bool]] = (
    ("completed", Queue.JOB_COMPLETED, {"state": "completed"}, {}, False),
    ("completed", Queue.JOB_COMPLETED, {"state": "completed"}, {}, False),
    ("completed", Queue.JOB_COMPLETED, {"state": "completed"}, {}, False),
    *(
        (
            "failed",
            Queue.JOB_FAILED,
            {"state": "failed", "origin": origin},
            {"error": {"code": "E", "origin": origin}},
            origin != "user",
        )
        for origin in ("platform", "provider", "unknown", "user")
    ),
    *(
        ("timeout", Queue.TIMEOUT, {"state": "timed_out", "result_produced": made}, {"result_produced": made}, not made)
        for made in (False, True)
    ),
    *(
        (
            "rejected",
            Queue.SAFETY_REJECTION,
            {"state": "rejected", "stage": stage},
            {"stage": stage, "category": "gore"},
            stage != "after_generation",
        )
        for stage in ("before_generation", "during_generation", "after_generation")
    ),
)
"""Each ending: its name, its queue, what the pipeline's table says, what its event says, and whether it is refunded.

The last column is this test's own reading of clause 2, and shares nothing with the product's.
"""
TYPES = {
    Queue.JOB_COMPLETED: "kino.generation.job-completed.v1",
    Queue.JOB_FAILED: "kino.generation.job-failed.v1",
    Queue.TIMEOUT: "kino.generation.timeout.v1",
    Queue.SAFETY_REJECTION: "kino.generation.safety-rejection.v1",
}
SPOIL: Sequence[Callable[[bytes], bytes]] = (
    lambda raw: raw[: len(raw) // 2],
    lambda raw: b"\xff" + raw,
    lambda raw: raw.replace(b"kino.generation.", b"kino.degeneration."),
    lambda raw: raw.replace(b'"1.0"', b'"0.3"'),
    lambda raw: raw.replace(b"+00:00", b""),
    lambda raw: raw.replace(b'"data"', b'"date"'),
    lambda raw: raw.replace(b'"subject": "', b'"subject": "other-'),
    lambda raw: raw.replace(b'"id"', b'"ID"'),
    lambda raw: b"<event>" + raw + b"</event>",
    lambda raw: raw[:0],
    gzip.compress,
    lambda raw: b"[" + raw,
    lambda raw: raw.replace(b"job-", b"job-\\u0000"),
    lambda raw: raw + b" " * (256 * 1024),
)
"""Ways in which a message is spoiled, used in turn."""


@dataclass(frozen=True)
class Job:
    """A job of the incident, as the pipeline's own table has it."""

    job_id: str
    account_id: str
    credits: int
    ending: int
    finished_at: datetime

    @property
    def refunded(self) -> bool:
        """Whether the policy returns its credits."""
        return ENDINGS[self.ending][4]


@dataclass(frozen=True)
class Typed:
    """A command that a person typed, its exit code, and the line that says what came of it."""

    command: str
    code: int
    said: str


@dataclass
class Incident:
    """What happened, what was typed, and what it came to."""

    jobs: int
    faults: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    """How it stood when the queues were empty: what a person finds."""
    typed: list[Typed] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Customers whose balance is not the truth, and whatever else is left; nothing, if all went well."""

    def transcript(self) -> str:
        """Write what was typed, with exit codes, as the runbook shows it."""
        lines = [f"$ {each.command}\n{each.said}  (exit {each.code})" for each in self.typed]
        return "\n".join(lines)


def play(running: Servers, *, jobs: int, seed: int = 1) -> Incident:
    """Play the incident with this many jobs, type what the runbook says, and look at what it came to."""
    name = f"incident_{next(_numbers)}"
    with running.postgres.connect() as superuser:
        superuser.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER kino_owner".encode())
    try:
        with World(running, name, seed, Counter()) as world:
            return _Play(world, jobs, seed).run()
    finally:
        with running.postgres.connect() as superuser:
            superuser.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


_numbers = count(1)


class _Play:
    def __init__(self, world: World, number: int, seed: int) -> None:
        self.world = world
        self.chance = random.Random(seed)
        self.incident = Incident(number)
        self.jobs = [self._job(each) for each in range(number)]
        self.lied_about: set[str] = set()

    def _job(self, number: int) -> Job:
        return Job(
            job_id=f"job-{number:05}",
            account_id=f"acct-{number // JOBS_EACH:04}",
            credits=self.chance.randint(1, 12),
            ending=self.chance.randrange(len(ENDINGS)),
            finished_at=datetime.now(UTC) - timedelta(seconds=self.chance.uniform(0, 60)),
        )

    def run(self) -> Incident:
        self._open()
        self._write_truth()
        self._happen()
        self._look()
        with _commands(self.world) as environment:
            self._type_what_the_runbook_says(environment)
        self._judge()
        return self.incident

    # --- before -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        accounts = sorted({job.account_id for job in self.jobs})
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        terms = [
            ("promo", LotClass.PROMOTIONAL, 15, tomorrow),
            ("plan", LotClass.SUBSCRIPTION, 40, datetime.now(UTC) + timedelta(days=30)),
            ("bought", LotClass.PURCHASED, 100, None),
        ]
        grants = [
            Grant(f"{name} {account}", account, credits, lot_class, expires)
            for account in accounts
            for name, lot_class, credits, expires in terms
        ]
        deadline = datetime.now(UTC) + timedelta(hours=1)
        for start in range(0, len(grants), 300):
            with self.world.product.begin() as connection:
                grant_lots(connection, grants[start : start + 300])
        for start in range(0, len(self.jobs), 200):
            requests = [
                ChargeRequest(job.job_id, job.account_id, job.credits, deadline)
                for job in self.jobs[start : start + 200]
            ]
            with self.world.product.begin() as connection:
                open_charges(connection, requests)

    def _write_truth(self) -> None:
        """Write the pipeline's own table, which the job source reads."""
        with self.world.servers.postgres.connect(self.world.database) as superuser:
            superuser.execute(
                "CREATE SCHEMA pipeline; GRANT USAGE ON SCHEMA pipeline TO kino_read;"
                ' CREATE TABLE pipeline.job (job_id text COLLATE "C" PRIMARY KEY, state text NOT NULL, origin text,'
                " stage text, result_produced boolean, finished_at timestamptz NOT NULL, account_id text,"
                " credits bigint);"
                " GRANT SELECT ON pipeline.job TO kino_read"
            )
            with superuser.cursor() as cursor, cursor.copy("COPY pipeline.job FROM STDIN") as copy:
                for job in self.jobs:
                    says = ENDINGS[job.ending][2]
                    copy.write_row(
                        (
                            job.job_id,
                            says["state"],
                            says.get("origin"),
                            says.get("stage"),
                            says.get("result_produced"),
                            job.finished_at,
                            job.account_id,
                            job.credits,
                        )
                    )

    # --- the bad hour -------------------------------------------------------------------------------------------

    def _happen(self) -> None:
        world, chance = self.world, self.chance
        shuffled = chance.sample(self.jobs, len(self.jobs))
        each = len(self.jobs) // SCALE
        lost, spoiled, doubled, untrue = (number * each for number in (LOST, SPOILED, DOUBLED, UNTRUE))
        silent, rest = shuffled[:lost], shuffled[lost:]
        # As many lies for the customers as against them, and first of all: what FLUSHALL takes was never heard.
        liars = [job for job in rest if job.refunded][: untrue // 2]
        liars += [job for job in rest if not job.refunded][: untrue - untrue // 2]
        self.lied_about = {job.job_id for job in liars}
        honest = [job for job in rest if job.job_id not in self.lied_about]
        messages = [self._spoiled(job, number) for number, job in enumerate(honest[:spoiled])]
        true = [self._message(job, job.ending) for job in honest[spoiled:]]
        messages += true + chance.sample(true, doubled)
        chance.shuffle(messages)
        messages = [self._untrue(job) for job in liars] + messages
        world.start_beat(**_source(world))
        workers = [world.start_worker(**_source(world)), world.start_worker(**_source(world))]
        world.until_ready(2)
        flushed = 0
        for number in range(CHUNKS):
            part = messages[number * len(messages) // CHUNKS : (number + 1) * len(messages) // CHUNKS]
            with world.redis.pipeline(transaction=False) as pipeline:
                for queue, raw in part:
                    pipeline.lpush(queue, raw)
                pipeline.execute()
            if number in {2, 6}:
                world.kill(workers.pop(0))
                workers.append(world.start_worker(**_source(world)))
            if number == CHUNKS // 2 - 1:
                world.until(lambda: not world.waiting(), "the first half is settled, all but what the dead had in hand")
            if number == CHUNKS // 2:
                flushed = world.waiting()
                world.redis.flushall()
        world.settle_down()
        self.incident.faults = {
            "events that never came": len(silent),
            "messages that nobody can read": spoiled,
            "events that came twice": doubled,
            "events that lied": untrue,
            "messages that FLUSHALL took": flushed,
            "workers killed": 2,
        }

    def _message(self, job: Job, ending: int) -> tuple[str, bytes]:
        _, queue, _, says, _ = ENDINGS[ending]
        event = {
            "specversion": "1.0",
            "id": f"{job.job_id}.end",
            "source": "/pipeline/eu-1",
            "type": TYPES[queue],
            "time": job.finished_at.isoformat(),
            "subject": job.job_id,
            "data": {"job_id": job.job_id, "account_id": job.account_id, **says},
        }
        return str(queue), json.dumps(event).encode()

    def _spoiled(self, job: Job, number: int) -> tuple[str, bytes]:
        queue, raw = self._message(job, job.ending)
        return queue, SPOIL[number % len(SPOIL)](raw)

    def _untrue(self, job: Job) -> tuple[str, bytes]:
        """Say a well-formed ending that the policy judges the other way."""
        other = next(
            index
            for index in self.chance.sample(range(len(ENDINGS)), len(ENDINGS))
            if ENDINGS[index][4] is not job.refunded
        )
        return self._message(job, other)

    def _look(self) -> None:
        [row] = self.world.sql(
            "SELECT (SELECT count(*) FROM kino.open_charge),"
            " (SELECT count(*) FROM kino.dead_letter WHERE status = 'open')"
        )
        self.incident.before = {
            "charges open": row[0],
            "dead letters open": row[1],
            "balances that are wrong": len(self._wrong_balances()),
        }
        require(row[0] >= len(self.jobs) * LOST // SCALE, "what was lost is open")

    # --- the commands -------------------------------------------------------------------------------------------

    def _type_what_the_runbook_says(self, environment: Mapping[str, str]) -> None:
        asked = self._type(environment, "charges ask --all-open")
        self._said(asked, lambda said: f"settled {sum(said['outcomes'].values()):,}, refunded {said['refunded']:,}")
        ran = self._type(environment, "reconcile run")
        self._said(ran, _said_of_runs)
        self._each_break(
            environment, "failed_but_captured", "repair", '--note "incident 7: the event lied" --yes', code=0
        )
        for kind in ("completed_but_refunded", "not_covered_but_refunded"):
            self._each_break(environment, kind, "accept", '--note "the customer keeps the credits" --yes', code=0)
        self._each_letter(environment)
        self._said(self._type(environment, "reconcile run"), _said_of_runs)
        self._said(self._type(environment, "status"), lambda said: "fine" if said["fine"] else str(said["troubles"]))
        self._said(
            self._type(environment, "reconcile prove"), lambda said: "all of it holds" if said["holds"] else "FAILS"
        )

    def _type(self, environment: Mapping[str, str], command: str) -> tuple[str, int, Any]:
        code, out, err = _run(environment, f"{command} --json")
        return f"kino-refunds {command}", code, json.loads(out) if out else {"error": err}

    def _said(self, typed: tuple[str, int, Any], say: Callable[[Any], str]) -> None:
        command, code, said = typed
        self.incident.typed.append(Typed(command, code, said["error"] if "error" in said else say(said)))

    def _each_break(self, environment: Mapping[str, str], kind: str, verb: str, options: str, *, code: int) -> None:
        """Type the loop of the runbook: one command for all breaks of a kind."""
        _, out, _ = _run(environment, f"breaks list --kind {kind} --limit 10000 --json")
        numbers = [item["number"] for item in json.loads(out)["items"]]
        if not numbers:
            return
        ended = [_run(environment, f"breaks {verb} {number} {options}") for number in numbers]
        codes = [each[0] for each in ended]
        command = (
            f"kino-refunds breaks list --kind {kind} --limit 10000 --json | jq .items[].number |\n"
            f"    xargs -I{{}} kino-refunds breaks {verb} {{}} {options}"
        )
        self.incident.typed.append(Typed(command, max(codes), _counted(len(numbers), "break")))
        require(set(codes) == {code}, f"each break is {verb}ed: {ended[0][2]}")

    def _each_letter(self, environment: Mapping[str, str]) -> None:
        """Discard what nobody can read: the source has told the endings, so the letters protect nothing."""
        _, out, _ = _run(environment, "dead-letters list --limit 10000 --json")
        numbers = [item["number"] for item in json.loads(out)["items"]]
        options = '--note "incident 7: the source told the ending" --yes'
        codes = [_run(environment, f"dead-letters discard {number} {options}")[0] for number in numbers]
        command = (
            "kino-refunds dead-letters list --limit 10000 --json | jq .items[].number |\n"
            f"    xargs -I{{}} kino-refunds dead-letters discard {{}} {options}"
        )
        self.incident.typed.append(Typed(command, max(codes, default=0), _counted(len(codes), "letter")))

    # --- the truth ----------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        wrong = self._wrong_balances()
        [row] = self.world.sql(
            "SELECT (SELECT count(*) FROM kino.open_charge), (SELECT count(*) FROM kino.pending_event),"
            " (SELECT count(*) FROM kino.dead_letter WHERE status = 'open'),"
            " (SELECT count(*) FROM kino.break WHERE status IN ('open', 'investigating', 'repaired'))"
        )
        names = ("charges open", "events pending", "dead letters open", "breaks live")
        wrong += [f"{number} {name}" for name, number in zip(names, row, strict=True) if number]
        wrong += [f"{each.command}: exit {each.code}" for each in self.incident.typed[-3:] if each.code]
        self.incident.wrong = wrong

    def _wrong_balances(self) -> list[str]:
        """Compare every customer's balance with the pipeline's table, read by this test's own eyes."""
        granted: dict[str, int] = {}
        for job in self.jobs:
            granted.setdefault(job.account_id, 155)
            # Of two that lied the customer keeps what was refunded: that is not taken back (design, part B).
            if not job.refunded and job.job_id not in self.lied_about:
                granted[job.account_id] -= job.credits
        found = dict(self.world.sql("SELECT account_id, available FROM kino.account_balance"))
        return [
            f"{account} has {found.get(account)} credits, the truth is {credits}"
            for account, credits in granted.items()
            if found.get(account) != credits
        ]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _said_of_runs(said: Any) -> str:
    compared = sum(item["compared"] for item in said["items"])
    return f"{compared:,} compared, {sum(item['broken'] for item in said['items']):,} differ"


# --- what every process is told ---------------------------------------------------------------------------------


def _source(world: World) -> dict[str, str]:
    columns = "job_id, state, origin, stage, result_produced, finished_at"
    return {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": world.servers.database_url(role="kino_read", database=world.database),
        "KINO_JOB_SOURCE_QUERY": f"SELECT {columns} FROM pipeline.job WHERE job_id = ANY(:job_ids)",
        "KINO_JOB_SOURCE_FINISHED_QUERY": f"SELECT {columns}, account_id, credits FROM pipeline.job"
        " WHERE finished_at >= :since AND finished_at < :until ORDER BY finished_at, job_id",
        "KINO_JOB_SOURCE_COMPLETE_QUERY": "SELECT clock_timestamp()",
        "KINO_CHECK_GRACE_S": "0",
        # The checks are run by hand here: a scheduled run would find some of it first.
        "KINO_CHECK_EVERY_S": "86400",
    }


@contextmanager
def _commands(world: World) -> Iterator[dict[str, str]]:
    """Give the environment of a person's commands."""
    patient = {f"KINO_{name.upper()}": str(value * 20) for name, value in LIMITS_MS.items()}
    yield (
        world.environment(**_source(world))
        | patient
        | {"KINO_ONCALL_DATABASE_URL": world.servers.database_url(role="kino_oncall", database=world.database)}
    )


def _run(environment: Mapping[str, str], command: str) -> tuple[int, str, str]:
    arguments = shlex.split(command)
    if arguments[0] != "status" and "list" not in arguments and "prove" not in arguments:
        arguments += ["--by", BY]
    ended = subprocess.run(
        [sys.executable, "-m", "kino_refunds", *arguments],
        env={**environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return ended.returncode, ended.stdout, ended.stderr
