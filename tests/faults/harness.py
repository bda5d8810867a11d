"""The harness: scenarios, scratch servers for them, and copies of the project to plant bugs in."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeAlias

import psycopg
import redis

from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import Servers, servers
from tests.faults.oracle import Verdict, judge, summary
from tests.faults.world import Stuck, World
from tests.project import ROOT

TEMPLATE = "kino_faults"


@dataclass(frozen=True)
class Edit:
    """A mistake that somebody could make: `old` becomes `new` in a file of the project."""

    file: str
    old: str
    new: str


def copy_project(folder: Path, edits: Sequence[Edit]) -> Path:
    """Copy the packages and the tests to `folder`, with mistakes; an edit that does not fit is an error."""
    for name in ("kino_refunds", "workers", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        path = folder / edit.file
        text = path.read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise Stuck(f"{edit.file} holds {text.count(edit.old)} times, not once: {edit.old!r}")
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    return folder


@dataclass
class Result:
    """How one scenario went."""

    name: str
    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the promises held."""
        return not self.error and not self.verdict.findings

    def why(self) -> str:
        """Say what went wrong."""
        return "\n".join(part for part in (self.error, summary(self.verdict.findings)) if part)


Play: TypeAlias = Callable[["World"], None]


@dataclass(frozen=True)
class Scenario:
    """A named play; `quick` ones run with every `make test`."""

    name: str
    cause: str
    quick: bool
    play: Play

    @property
    def promise(self) -> str:
        """The first line of its docstring."""
        return (self.play.__doc__ or "").strip().partition("\n")[0]


SCENARIOS: dict[str, Scenario] = {}


def scenario(cause: str, *, quick: bool = False) -> Callable[[Play], Play]:
    """Register a play under its function's name; `cause` is what lateness is reported under."""

    def register(play: Play) -> Play:
        name: str = play.__name__
        SCENARIOS[name] = Scenario(name, cause, quick, play)
        return play

    return register


class Arena:
    """The servers of a run; scenarios take turns in it."""

    def __init__(self, running: Servers) -> None:
        self.servers = running
        self._databases = count(1)
        running.create_database(TEMPLATE)
        migrate(running.database_url(role="kino_owner", database=TEMPLATE))

    def run(self, chosen: Scenario, seed: int) -> Result:
        """Play one scenario in a world of its own, repair the world, and let the oracle judge."""
        result = Result(chosen.name, seed)
        started = time.monotonic()
        name = f"faults_{next(self._databases)}"
        with self.servers.postgres.connect() as superuser:
            superuser.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER kino_owner".encode())
        with redis.Redis.from_url(self.servers.redis_url()) as client:
            client.flushall()
        world = World(self.servers, name, seed, result.faults)
        try:
            with world:
                try:
                    world.prepare()
                    chosen.play(world)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this scenario's result
                    result.error = f"{type(error).__name__}: {error}\n{world.last_words()}".rstrip()
            with self.servers.postgres.connect(name) as superuser:
                result.verdict = judge(superuser, world.workload)
        except Exception as error:  # noqa: BLE001 - likewise: the next scenario still has to run
            result.error += f"\nafterwards: {type(error).__name__}: {error}"
        finally:
            with suppress(psycopg.Error), self.servers.postgres.connect() as superuser:
                superuser.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        result.seconds = time.monotonic() - started
        return result


@contextmanager
def arena() -> Iterator[Arena]:
    """Run scratch servers for as many scenarios as follow."""
    with servers() as running:
        yield Arena(running)
