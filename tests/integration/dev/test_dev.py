"""`kino-refunds dev`: servers, worker and beat that work, keep their data, and never outlive their owner."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from kino_refunds.db.engine import create_engine
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.settings import PREFIX
from tests.command_line import SCRIPT, outside
from tests.scenario import make_event, until


@pytest.fixture
def data_dir(folder: Path) -> Path:
    return folder / "data"


def family(pid: int) -> set[int]:
    """A process and all that descend from it, by process id."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            stat = (process / "stat").read_text(encoding="utf-8", errors="replace")
            parents[int(process.name)] = int(stat.rpartition(")")[2].split()[1])
    found, size = {pid}, 0
    while size != len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does nothing any more."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            if stat.rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
    return found


@dataclass(frozen=True)
class Dev:
    process: subprocess.Popen[str]
    data_dir: Path
    settings: dict[str, str]
    family: set[int]
    introduction: list[str] = field(default_factory=list)

    def url(self, role: str) -> str:
        return self.settings["KINO_DATABASE_URL"].replace("kino_worker", role)

    def celery(self, name: str) -> set[int]:
        """The process ids of its worker, or of its beat."""
        wanted = f"workers.app\0{name}\0".encode()
        found = set()
        for pid in family(self.process.pid):
            with suppress(OSError):
                if wanted in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(pid)
        self.family.update(found)
        return alive(found)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a shell that has read dev's settings."""
        program = f". {self.data_dir}/env; {command}"
        return subprocess.run(["/bin/sh", "-c", program], env=outside(), capture_output=True, text=True, check=False)

    def stop(self) -> int:
        """Ctrl-C; returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def status(self, job_id: str) -> str | None:
        """Where a job's charge stands; None without one."""
        with psycopg.connect(self.url("kino_read").replace("+psycopg", "")) as connection:
            row = connection.execute("SELECT status FROM kino.charge_status WHERE job_id = %s", [job_id]).fetchone()
        return None if row is None else str(row[0])

    def charge(self, job_id: str) -> None:
        engine = create_engine(self.url("kino_product"))
        deadline = datetime.now(UTC) + timedelta(hours=1)
        with engine.begin() as connection:
            grant_lots(connection, [Grant("order-1", "acme", 100, LotClass.PURCHASED)])
            open_charges(connection, [ChargeRequest(job_id, "acme", 5, deadline)])
        engine.dispose()

    def said(self) -> str:
        """What it has said on standard error until now."""
        return (self.data_dir.parent / "said").read_text(encoding="utf-8")


@contextmanager
def dev(data_dir: Path, **environment: str) -> Iterator[Dev]:
    """Run dev until it has said where everything is; whatever the test does, nothing of it is left.

    It runs in a folder where somebody else's `workers` lies, as it may: Python looks there first.
    """
    (data_dir.parent / "workers").mkdir(exist_ok=True)
    (data_dir.parent / "workers" / "__init__.py").write_text("raise SystemExit('not ours')", encoding="utf-8")
    with (data_dir.parent / "said").open("a") as said:
        process = subprocess.Popen(
            [SCRIPT, "dev", "--data-dir", data_dir],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=data_dir.parent,
            env=outside() | environment,
        )
    assert process.stdout is not None
    started = Dev(process, data_dir, {}, set())
    try:
        for line in process.stdout:
            started.introduction.append(line.rstrip("\n"))
            name, _, value = line.rstrip("\n").partition("=")
            if name.startswith(PREFIX):
                started.settings[name] = value
            if line.startswith("in another terminal"):
                break
        assert process.poll() is None, (data_dir.parent / "said").read_text(encoding="utf-8")
        started.family.update(family(process.pid))
        yield started
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        until(lambda: not alive(started.family), deadline_s=60)


def sourced_settings(file: Path) -> tuple[dict[str, str], str]:
    """What a shell in which another ledger's settings were left has after `. FILE`, and its kino-refunds."""
    stale = {**outside(), "KINO_RETRY_EVERY_S": "1", "KINO_JOB_SOURCE_URL": "postgresql://elsewhere/gone"}
    ran = subprocess.run(
        ["/bin/sh", "-c", f". {file}; env; command -v kino-refunds"],
        env=stale,
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, program = ran.stdout.splitlines()
    return {
        name: value for name, _, value in (line.partition("=") for line in lines) if name.startswith(PREFIX)
    }, program


def test_dev_settles_keeps_its_data_and_leaves_nothing_behind(data_dir: Path) -> None:
    """What a product and a pipeline do is settled, Ctrl-C is clean, the next run finds it all, SIGKILL takes all."""
    with dev(data_dir) as first:
        in_use = subprocess.run(
            [SCRIPT, "dev", "--data-dir", data_dir], capture_output=True, text=True, env=outside(), check=False
        )
        granted = first.run("kino-refunds grant acme 100 --reference order-1")
        charged = first.run("kino-refunds charges open job-1 acme 5 --json")
        with EventPublisher(first.settings["KINO_REDIS_URL"]) as pipeline:
            pipeline.publish(make_event("failed platform", "job-1"))
            pipeline.publish(make_event("completed", "job-2"))
        until(lambda: first.status("job-1") == "refunded")
        # The event of job-2 came before its charge: beat has it tried again.
        first.charge("job-2")
        until(lambda: first.status("job-2") == "captured")
        sourced = sourced_settings(data_dir / "env")

        first.process.send_signal(signal.SIGINT)
        assert first.process.stdout is not None
        last_words = first.process.stdout.read().splitlines()
        code = first.process.wait(60)
        left = alive(first.family)

    with dev(data_dir) as second:
        kept = [second.status(job_id) for job_id in ("job-1", "job-2")]
        second.charge("job-3")
        with EventPublisher(second.settings["KINO_REDIS_URL"]) as pipeline:
            pipeline.publish(make_event("timeout", "job-3"))
        until(lambda: second.status("job-3") == "refunded")
        lived = len(alive(second.family))

        second.process.kill()

        until(lambda: not alive(second.family), deadline_s=60)

    assert list(first.settings) == [
        "KINO_DATABASE_URL",
        "KINO_PRODUCT_DATABASE_URL",
        "KINO_MIGRATION_DATABASE_URL",
        "KINO_REDIS_URL",
    ]
    assert sourced == (first.settings | {"KINO_JOB_SOURCE": "none"}, str(SCRIPT))
    assert [line for line in first.introduction if "KINO_JOB_SOURCE" in line] == [
        "job source: none, KINO_JOB_SOURCE is not set; a job without an event is refunded once it is overdue"
    ]
    assert [(each.returncode, each.stderr) for each in (granted, charged)] == [(0, "")] * 2
    assert (in_use.returncode, in_use.stderr.count("\n")) == (3, 1)
    assert f"{data_dir}/postgres is in use by the servers of process {first.process.pid}" in in_use.stderr
    assert (code, left) == (0, set())
    assert (last_words[0], last_words[-1]) == ("stopping", f"stopped; the data is kept in {data_dir}")
    assert kept == ["refunded", "captured"]
    # Itself, two guards, Postgres and Valkey, worker and beat, at least.
    assert lived >= 7


def test_settings_of_the_shell_hold_in_dev_except_the_servers(data_dir: Path) -> None:
    """What is set where dev starts reaches worker, beat and the other shells; which ledger it is, dev says itself."""
    secret = "hunter2"
    chosen = {
        "KINO_JOB_SOURCE": "http",
        "KINO_JOB_SOURCE_URL": "http://127.0.0.1:9/",
        "KINO_JOB_SOURCE_TOKEN": secret,
        "KINO_RETRY_EVERY_S": "1",
        "KINO_RELAY_QUEUE": "told",
    }
    elsewhere = {"KINO_DATABASE_URL": f"postgresql://kino_worker:{secret}@db.example/kino", "KINO_REDIS_URL": ""}
    with dev(data_dir, **chosen, **elsewhere) as running:
        sourced = sourced_settings(data_dir / "env")[0]
        (worker,), (beat,) = running.celery("worker"), running.celery("beat")
        environments = [
            dict(
                each.split("=", 1)
                for each in Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
                if each.startswith(PREFIX)
            )
            for pid in (worker, beat)
        ]
        mode = (data_dir / "env").stat().st_mode
        code = running.stop()

    assert code == 0
    assert sourced == running.settings | chosen
    assert environments == [sourced, sourced]
    assert mode & 0o077 == 0
    assert "not used: KINO_DATABASE_URL of this shell; dev has servers of its own" in running.introduction
    (passed_on,) = (line for line in running.introduction if line.startswith("taken from this shell: "))
    assert set(passed_on.removeprefix("taken from this shell: ").split(", ")) == set(chosen)
    assert secret not in "\n".join(running.introduction)


def test_a_setting_that_cannot_be_starts_nothing(data_dir: Path) -> None:
    """A wrong setting is told at once, by its name, and no server is started for it."""
    wrong = [{"KINO_RETRY_EVERY_S": "0"}, {"KINO_JOB_SOURCE": "sql"}, {"KINO_JOB_SOURCE": "everybody"}]

    ran = [
        subprocess.run(
            [SCRIPT, "dev", "--data-dir", data_dir],
            env=outside() | each,
            capture_output=True,
            text=True,
            check=False,
        )
        for each in wrong
    ]

    assert [(each.returncode, each.stdout, each.stderr.count("\n")) for each in ran] == [(2, "", 1)] * 3
    assert [next(iter(names)) in each.stderr for names, each in zip(wrong, ran, strict=True)] == [True] * 3
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["worker", "beat"])
def test_what_is_killed_is_started_again(data_dir: Path, name: str) -> None:
    """A worker or beat that ends is told and replaced; events go on being settled, and Ctrl-C stops the new one."""
    with dev(data_dir) as running:
        (first,) = running.celery(name)

        os.kill(first, signal.SIGKILL)
        until(lambda: f"the {name} was ended by SIGKILL; it is started again in 1 s\n" in running.said())
        until(lambda: running.celery(name) - {first})
        running.charge("job-1")
        with EventPublisher(running.settings["KINO_REDIS_URL"]) as pipeline:
            pipeline.publish(make_event("failed platform", "job-1"))
        until(lambda: running.status("job-1") == "refunded")
        code = running.stop()

        until(lambda: not alive(running.family))
    assert code == 0


def test_a_worker_that_cannot_start_is_told_and_slowed_down(data_dir: Path) -> None:
    """Whoever has broken the code reads it, is not flooded, and goes on by correcting it; nothing has to be started."""
    data_dir.parent.joinpath("broken").mkdir()
    celery = data_dir.parent / "broken" / "celery.py"
    celery.write_text("raise SystemExit('broken on purpose')", encoding="utf-8")

    with dev(data_dir, PYTHONPATH=str(celery.parent)) as running:
        until(lambda: ", for the 3. time in a row; it is started again in 4 s\n" in running.said())
        said = running.said()
        celery.unlink()
        until(lambda: running.celery("worker") and running.celery("beat"))
        running.charge("job-1")
        with EventPublisher(running.settings["KINO_REDIS_URL"]) as pipeline:
            pipeline.publish(make_event("failed platform", "job-1"))
        until(lambda: running.status("job-1") == "refunded")
        code = running.stop()

    assert code == 0
    for name in ("worker", "beat"):
        told = [line for line in said.splitlines() if line.startswith(f"the {name} ")]
        assert told[:2] == [
            f"the {name} ended with code 1; it is started again in 1 s",
            f"the {name} ended with code 1, for the 2. time in a row; it is started again in 2 s",
        ]
    assert "broken on purpose" in said


def test_a_server_that_ends_ends_dev(data_dir: Path) -> None:
    """Without its servers dev is nothing: it says which one ended, and stops the rest."""
    with dev(data_dir) as running:
        (postgres,) = (int(line.split()[-1]) for line in running.introduction if line.startswith("Postgres on "))

        os.kill(postgres, signal.SIGKILL)
        code = running.process.wait(60)

        until(lambda: not alive(running.family))
    assert code == 3
    assert "error: Postgres ended unexpectedly" in running.said()


def test_data_of_a_newer_build_is_left_alone(data_dir: Path) -> None:
    """A folder whose schema this build does not know is one line and exit 2; nothing is left running."""
    with dev(data_dir) as running:
        with psycopg.connect(running.url("kino_owner").replace("+psycopg", "")) as owner:
            owner.execute("UPDATE kino.alembic_version SET version_num = '9999'")
        running.stop()

    ran = subprocess.run(
        [SCRIPT, "dev", "--data-dir", data_dir], env=outside(), capture_output=True, text=True, check=False
    )

    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "9999" in ran.stderr
