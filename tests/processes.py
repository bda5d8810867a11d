"""Real processes: workers and beats of Celery, what they log and settle, and what runs in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from redis import Redis

from kino_refunds.dev.processes import CeleryProcess, environment_of, start_beat, start_worker
from kino_refunds.events.queues import depths
from kino_refunds.events.schema import Event
from tests.conftest import Database
from tests.pipeline import CAPTURED, EMPTY, REFUNDED
from tests.scenario import Scene, make_event, until

KINDS = ("failed platform", "timeout", "safety before", "completed")


class Start(Protocol):
    """Starts a worker, or beat, that ends with the test at the latest."""

    def __call__(self, what: str = "worker", **settings: str) -> CeleryProcess: ...


def settings_of(database: Database, redis_url: str) -> dict[str, str]:
    return {"KINO_DATABASE_URL": database.url(), "KINO_REDIS_URL": redis_url, "KINO_LOG_FORMAT": "json"}


def starter(processes: list[CeleryProcess], common: dict[str, str], folder: Path) -> Start:
    def start(what: str = "worker", **settings: str) -> CeleryProcess:
        log_file = folder / f"{what}-{len(processes)}.log"
        if what == "worker":
            process = start_worker(common | settings, log_file)
        else:
            process = start_beat(common | settings, folder / "schedule", log_file)
        processes.append(process)
        return process

    return start


def log_of(process: CeleryProcess) -> list[dict[str, Any]]:
    """What a process has said so far, a line each."""
    assert process.log_file is not None
    return log_of_file(process.log_file)


def log_of_file(log_file: Path) -> list[dict[str, Any]]:
    lines = log_file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def said(process: CeleryProcess, sentence: str) -> bool:
    return any(line["event"] == sentence for line in log_of(process))


def endings(job_ids: list[str]) -> list[Event]:
    """An event for each job, of all kinds in turn."""
    return [make_event(KINDS[number % len(KINDS)], job_id) for number, job_id in enumerate(job_ids)]


def settled(job_ids: list[str]) -> dict[str, list[tuple[str, int]]]:
    """What `ledger` reads when `endings` are settled."""
    return {
        job_id: CAPTURED if KINDS[number % len(KINDS)] == "completed" else REFUNDED
        for number, job_id in enumerate(job_ids)
    }


def count_settled(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.settlement")[0][0])


def make_slow(scene: Scene) -> None:
    """Let every batch take a while, so that something is in flight at nearly every instant."""
    scene.as_superuser(
        "CREATE FUNCTION kino.dawdle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$",
        "CREATE TRIGGER dawdle AFTER INSERT ON kino.inbox_event EXECUTE FUNCTION kino.dawdle()",
    )


def make_quick(scene: Scene) -> None:
    scene.as_superuser("DROP TRIGGER dawdle ON kino.inbox_event")


def wait_for(condition: Callable[[], bool], *alive: CeleryProcess) -> None:
    """Look until it is so; fail at once, with its last words, when a process ends that should not."""

    def look() -> bool:
        for process in alive:
            process.require_alive()
        return condition()

    until(look, deadline_s=60)


def drained(client: Redis) -> Callable[[], bool]:
    return lambda: depths(client) == EMPTY


def celery_fails(*arguments: str, **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers.app", *arguments],
        env=environment_of(environment),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stderr


def sweeps_of(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.schedule_slot")[0][0])


def text_of(process: CeleryProcess) -> str:
    assert process.log_file is not None
    return process.log_file.read_text(encoding="utf-8")


def processes_of(folder: Path) -> set[int]:
    """Every process but this one that works in the folder, or has it on its command line or in its environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            named = os.fsencode(folder) in told or (process / "cwd").readlink().is_relative_to(folder)
            if named and process.name != str(os.getpid()):
                found.add(int(process.name))
    return found
