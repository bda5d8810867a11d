"""The demo tells its story and keeps every promise; and the referee finds each promise that is broken on purpose."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from psycopg import sql
from redis import Redis
from rich.console import Console

from kino_refunds.cli import demo as command
from kino_refunds.cli import demo_screen
from kino_refunds.cli.output import print_json
from kino_refunds.demo import promises
from kino_refunds.demo.figures import Snapshot, StoryReport
from kino_refunds.demo.run import Demo, judge
from kino_refunds.demo.stage import Stage
from kino_refunds.dev.embedded import Servers, servers
from kino_refunds.errors import ServerFailed
from kino_refunds.events.envelope import MalformedReason
from tests.integration.demo.broken_promises import PLANTED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

JOBS = 300


class Seen:
    """Whoever looks on: what was said, and the last picture."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.last: Snapshot | None = None

    def say(self, at_s: float, what: str, text: str) -> None:
        assert at_s >= 0
        self.said.append((what, text))

    def show(self, now: Snapshot) -> None:
        self.last = now


class Run(NamedTuple):
    servers: Servers
    told: StoryReport
    seen: Seen
    record: dict[str, Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One demo; its ledger stays for the tests, which copy it."""
    seen = Seen()
    with servers() as running:
        with Stage(running) as stage:
            told = Demo(stage, seen, jobs=JOBS, seed=3, started=time.monotonic()).run()
        record = json.loads((running.data_dir / "record.json").read_text())
        yield Run(running, told, seen, record)


_copies = count(1)


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Iterator[Copy]:
    """A copy of the demo's ledger and an empty Redis db, to break."""
    number = next(_copies)
    name = f"copy_{number}"
    with run.servers.postgres.connect() as superuser:
        superuser.execute(sql.SQL("CREATE DATABASE {} TEMPLATE kino").format(sql.Identifier(name)))
    copied = Copy(run, name, number, tmp_path / "record.json")
    yield copied
    with run.servers.postgres.connect() as superuser:
        superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class Copy:
    """A ledger to break, and the referee's word on it."""

    def __init__(self, run: Run, database: str, redis_db: int, path: Path) -> None:
        self._run = run
        self._database = database
        self.path = path
        self.record = json.loads(json.dumps(run.record))
        for name in ("database_url", "worker_url"):
            self.record[name] = self.record[name].removesuffix("/kino") + f"/{database}"
        self.record["redis_url"] = run.servers.redis_url(redis_db)

    def execute(self, statements: str) -> None:
        """Do what no role may do: without triggers, as superuser."""
        with self._run.servers.postgres.connect(self._database) as superuser:
            superuser.execute(f"SET session_replication_role = replica; {statements}".encode())

    def digest(self, below: str) -> dict[str, Any]:
        """What the referee makes of the transfers below a horizon as they are now."""
        with self._run.servers.postgres.connect(self._database) as superuser:
            return promises.digest_transfers(superuser, below)

    def push(self, key: str, message: bytes) -> None:
        with Redis.from_url(self.record["redis_url"]) as client:
            client.lpush(key, message)

    def save(self) -> Path:
        self.path.write_text(json.dumps(self.record))
        return self.path

    def findings(self) -> dict[str, list[str]]:
        """What the referee, in a process of its own, finds; lateness is the machine's and not asserted."""
        return {each["promise"]: each["findings"] for each in judge(self.save()) if each["word"] != "late"}


# --- the story ------------------------------------------------------------------------------------------------


def test_every_promise_holds_and_was_looked_at(run: Run) -> None:
    """Every promise is judged by something, and nothing but slowness of the machine may be found."""
    judged = {each["promise"]: each for each in run.told.promises}

    assert list(judged) == [f"P{number}" for number in range(1, 11)]
    assert {each["word"] for each in judged.values()} <= {"held", "late"}, judged
    assert all(each["looked_at"] and all(each["looked_at"].values()) for each in judged.values())


def test_figures_are_those_of_the_story(run: Run) -> None:
    """Every job is settled, every bad message a dead letter, and every silent job found."""
    told = run.told
    outcomes = {row["outcome"]: row["events"] for row in told.outcomes}
    settling = ("captured", "captured_not_covered", "captured_terminated", "refunded")
    letters = {row["reason"]: row["letters"] for row in told.dead_letters}
    silent = run.record["silent"]

    assert told.jobs == JOBS
    # A silent job's event is the reconciler's, and is decided like any other.
    assert sum(outcomes.get(each, 0) for each in settling) == JOBS
    assert letters == {
        **{reason.value: 1 for reason in MalformedReason},
        "conflicting_duplicate": 2,
        "account_mismatch": 2,
    }
    assert told.overdue_found == len(silent) == 2
    assert told.breaks == 2
    events = Counter((m["event"]["id"], m["reason"]) for m in run.record["messages"] if m["event"] is not None)
    assert told.duplicates_absorbed >= events.total() - len(events) > 0
    assert told.retried > 0
    assert told.latency["jobs"] + told.latency_of_killed["jobs"] + told.overdue_found == JOBS


def test_both_wire_forms_carry_half_of_the_events(run: Run) -> None:
    """The record says what went by bare LPUSH and what through kombu; neither is a sideshow."""
    plain_events = [m for m in run.record["messages"] if m["event"] is not None and m["reason"] is None]
    kombu = sum(message["form"] == "kombu" for message in plain_events)

    assert 0.4 < kombu / len(plain_events) < 0.6


def test_whatever_was_broken_is_said_to_have_healed(run: Run) -> None:
    """On-call reads both lines, for the killed worker too."""
    broken = [text for what, text in run.seen.said if what == "broken"]
    healed = [text for what, text in run.seen.said if what == "healed"]

    assert len(broken) == len(healed) == 8
    assert any("is killed by SIGKILL" in text for text in broken)
    assert any(text.startswith("the other worker has recovered") for text in healed)


def test_end_table_names_everything(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person sees outcomes, refunds, dead letters, latency, the killed worker's batch apart, and each promise."""
    monkeypatch.setenv("COLUMNS", "80")
    demo_screen.show(run.told)

    said = capsys.readouterr().out
    for word in ("refunded", "captured_terminated", "generation_failure", "too_large", "duplicates absorbed"):
        assert word in said
    assert "the killed worker's batch" in said
    assert said.count("held") + said.count("late ") >= 10
    assert max(map(len, said.splitlines())) <= 80
    print_json(run.told)
    assert json.loads(capsys.readouterr().out)["jobs"] == run.told.jobs


def test_picture_fits_a_small_terminal(run: Run) -> None:
    """The live picture names throughput, outcomes, latency and queues within 80 columns."""
    assert run.seen.last is not None
    console = Console(width=80, record=True, file=StringIO())
    console.print(demo_screen.picture(run.seen.last))
    said = console.export_text()

    assert f"settled  {JOBS} of {JOBS} jobs" in said
    assert "event to commit: p50" in said
    assert "job-failed 0" in said


# --- the referee ----------------------------------------------------------------------------------------------


def test_referee_imports_nothing_of_the_project() -> None:
    """It is judged by its imports, not by its word."""
    tree = ast.parse(Path(promises.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert imported <= {*sys.stdlib_module_names, "psycopg", "redis"}


def test_referee_finds_nothing_in_a_copy_that_nobody_touched(copy: Copy) -> None:
    """Otherwise what it finds in the others would prove nothing."""
    assert not any(copy.findings().values())


@pytest.mark.parametrize("name", PLANTED)
def test_broken_promise_is_found(copy: Copy, name: str) -> None:
    """Each way of breaking a promise makes the referee name that promise."""
    promise, statements = PLANTED[name]
    copy.execute(statements)

    assert copy.findings().get(promise)


@pytest.mark.parametrize(
    "key", ["generation.timeout", "generation.job-failed\x06\x163", "kino:recovered:generation.timeout"]
)
def test_message_that_is_left_somewhere_is_found(copy: Copy, key: str) -> None:
    """P6: an event that still lies in Redis is not decided, whatever key it lies under."""
    copy.push(key, b"{}")

    assert copy.findings()["P6"]


def test_lateness_is_found_and_told_apart(copy: Copy) -> None:
    """P9 has a figure: when most events were settled a minute late the referee says by how much, as lateness only."""
    for message in copy.record["messages"]:
        if message["event"] is not None:
            message["event"]["time"] = message["event"]["time"].replace("+00:00", "+00:01")
    copy.execute(
        "UPDATE kino.settlement SET event_time = event_time - interval '1 minute'"
        " WHERE event_source <> 'kino-reconciler';"
        "UPDATE kino.inbox_event SET event_at = event_at - interval '1 minute'"
        " WHERE source <> 'kino-reconciler';"
        "UPDATE kino.transfer t SET event_at = s.event_time FROM kino.settlement s"
        " WHERE s.charge_id = t.charge_id AND t.event_at IS NOT NULL;"
        # Less than what integrity takes for two dates of one act.
        "UPDATE kino.charge SET opened_at = opened_at - interval '4 minutes'"
    )
    copy.record["transfers"] |= copy.digest(copy.record["transfers"]["below"])

    code, said = refereed(copy)

    assert code == 0, said
    assert "P9  late " in said
    assert "promised are 5.0 s" in said


def test_killed_worker_s_batch_that_nobody_settled_late_is_not_mere_lateness(copy: Copy) -> None:
    """A batch in its hands, all of which was settled before the kill, proves nothing: P9 says so, late or not."""
    copy.record["killed"]["at"] = "2100-01-01T00:00:00+00:00"
    copy.execute("UPDATE kino.charge SET opened_at = opened_at - interval '1 hour'")
    copy.execute("UPDATE kino.settlement SET event_time = event_time - interval '1 minute'")

    p9 = next(each for each in judge(copy.save()) if each["promise"] == "P9")

    assert p9["word"] == "broken"
    assert any("promised are" in text for text in p9["findings"])
    assert any("not checked" in text for text in p9["findings"])


def test_promise_with_nothing_to_look_at_is_not_held(copy: Copy) -> None:
    """A check that looked at nothing must not say that all is well."""
    copy.record["messages"] = [message for message in copy.record["messages"] if message["reason"] is None]

    found = copy.findings()

    assert any("not checked" in text for text in found["P7"])
    assert any("not checked" in text for text in found["P2"])


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        pytest.param({}, 0, "P1  held", id="held"),
        pytest.param({"policy_versions": ["1999-01-01"]}, 1, "P10 broken", id="broken"),
        pytest.param({"jobs": None}, 2, "is no record", id="record"),
        pytest.param({"database_url": "postgresql://postgres@127.0.0.1:1/kino"}, 3, "error: ", id="away"),
    ],
)
def test_referee_speaks_to_people_too(copy: Copy, change: dict[str, Any], code: int, says: str) -> None:
    """Without --json one line a promise; exit codes as everywhere: finding, usage, dependency away."""
    copy.record |= change

    ended_with, said = refereed(copy)

    assert (ended_with, says in said) == (code, True), said


def refereed(copy: Copy) -> tuple[int, str]:
    """Run the referee as a person would; returns its exit code and what it printed."""
    command = [sys.executable, "-I", promises.__file__, str(copy.save())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


# --- the command's own ends -----------------------------------------------------------------------------------


def ended(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a folder until it ends by itself."""
    script = Path(sys.executable).with_name("kino-refunds")
    ran = subprocess.run([script, "demo", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_kept_demo_refuses_a_folder_that_is_somebody_s(tmp_path: Path) -> None:
    """Before any server starts: what lies in .kino-demo is another demo's, or a person's, and stays."""
    (tmp_path / ".kino-demo").mkdir()
    (tmp_path / ".kino-demo" / "env").write_text("mine")

    code, said = ended(tmp_path, "--keep")

    assert (code, said.count("\n")) == (2, 1)
    assert "exists: another demo runs" in said
    assert (tmp_path / ".kino-demo" / "env").read_text() == "mine"


def test_kept_demo_says_so_where_it_cannot_write(tmp_path: Path) -> None:
    """A folder that is a file, here; nothing was started."""
    (tmp_path / ".kino-demo").write_text("")

    code, said = ended(tmp_path, "--keep")

    assert (code, said.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["postgres", "redis"])
def test_demo_whose_server_ends_says_which(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A server that ends under the demo is named; the user's own settings are not blamed."""
    killed: list[int] = []

    def show(_view: object, now: Snapshot) -> None:
        if now.submitted and not killed:
            killed.append(now.submitted)
            os.kill(getattr(stages[0].servers, name).pid, signal.SIGKILL)

    stages: list[Stage] = []
    monkeypatch.setattr(Stage, "__init__", remembered(stages, Stage.__init__))
    monkeypatch.setattr(demo_screen._Lines, "show", show)

    with pytest.raises(ServerFailed, match="ended unexpectedly"):
        command.demo(jobs=1_000, seed=1, keep=False, as_json=True)


def remembered(made: list[Any], init: Callable[..., None]) -> Callable[..., None]:
    def remember(self: Any, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    return remember
