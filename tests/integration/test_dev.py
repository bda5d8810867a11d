"""`kino-refunds dev`: servers, worker and beat that work, keep their data, and never outlive their owner."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from kino_refunds.db.engine import create_engine
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.settings import PREFIX
from tests.scenario import make_event, until

SCRIPT = Path(sys.executable).with_name("kino-refunds")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that everybody may enter: as root, Postgres runs as somebody else."""
    folder = Path(tempfile.mkdtemp(prefix="kino-test-"))
    folder.chmod(0o711)
    yield folder / "data"
    shutil.rmtree(folder)


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
    settings: dict[str, str]
    family: set[int]

    def url(self, role: str) -> str:
        return self.settings["KINO_DATABASE_URL"].replace("kino_worker", role)

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


@contextmanager
def dev(data_dir: Path) -> Iterator[Dev]:
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
            env=ENVIRONMENT,
        )
    assert process.stdout is not None
    started = Dev(process, {}, set())
    try:
        for line in process.stdout:
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
    stale = {**ENVIRONMENT, "KINO_RETRY_EVERY_S": "1", "KINO_JOB_SOURCE_URL": "postgresql://elsewhere/gone"}
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
            [SCRIPT, "dev", "--data-dir", data_dir], capture_output=True, text=True, env=ENVIRONMENT, check=False
        )
        first.charge("job-1")
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
        "KINO_MIGRATION_DATABASE_URL",
        "KINO_REDIS_URL",
        "KINO_JOB_SOURCE",
    ]
    assert sourced == (first.settings, str(SCRIPT))
    assert (in_use.returncode, in_use.stderr.count("\n")) == (3, 1)
    assert f"{data_dir}/postgres is in use by the servers of process {first.process.pid}" in in_use.stderr
    assert (code, left) == (0, set())
    assert (last_words[0], last_words[-1]) == ("stopping", f"stopped; the data is kept in {data_dir}")
    assert kept == ["refunded", "captured"]
    # Itself, two guards, Postgres and Valkey, worker and beat, at least.
    assert lived >= 7
