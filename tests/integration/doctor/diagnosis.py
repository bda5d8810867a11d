"""What the doctor finds, and a ledger on which workers work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from redis import Redis

from kino_refunds.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from kino_refunds.dev.supervisor import Orders
from tests.clock import MINUTE
from tests.scenario import Scene

SWEEPS = {
    "retry pending events": "kino.sweep_retries",
    "expire lots": "kino.expire_lots",
    "note which time belongs to which transaction": "kino.sample_clock",
}
CHECKED = ("run the checks of reconciliation", "kino.run_checks")
OVERDUE = ("ask about jobs without an event", "kino.sweep_overdue")


class Found(NamedTuple):
    """A finding that is not `ok`."""

    check: str
    level: str
    found: str
    advice: str


class Diagnosis(NamedTuple):
    code: int
    bad: list[Found]


Doctor = Callable[..., Diagnosis]
CHOSEN: dict[str, str | None] = {"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "https://jobs.example/ask"}
"""A source about which the doctor has nothing to say: it reads the setting, and asks nobody."""


def work(scene: Scene, *, ago: timedelta = timedelta(0), started_ago: timedelta = MINUTE, name: str = "") -> None:
    """Let a worker have been seen that long ago, and every sweep (or one) have run to its end then."""
    seconds = f"interval '{ago.total_seconds()} seconds'"
    started = f"interval '{started_ago.total_seconds()} seconds'"
    scene.as_superuser(
        "DELETE FROM kino.intake_worker",
        "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
        f" VALUES (gen_random_uuid(), 'host-1', 1, 'b1', clock_timestamp() - {started}, clock_timestamp() - {seconds})",
        *(
            "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by, finished_at, result)"
            f" VALUES ('{each}', clock_timestamp() - {seconds}, 'beat', clock_timestamp(), '{{}}')"
            for each in ((name,) if name else (*SWEEPS.values(), OVERDUE[1], CHECKED[1]))
        ),
        "INSERT INTO kino.xid_clock DEFAULT VALUES",
    )


@contextmanager
def spoiled(server: EmbeddedValkey, **options: str) -> Iterator[str]:
    """Give the URL of a server that is configured like this for as long as the block runs."""
    with Redis.from_url(server.url()) as client:
        before = {name: client.config_get(name)[name] for name in (each.replace("_", "-") for each in options)}
        for name, value in options.items():
            client.config_set(name.replace("_", "-"), value)
        try:
            yield server.url()
        finally:
            for name, value in before.items():
                client.config_set(name, value)


class OwnPostgres(EmbeddedPostgres):
    """A fresh Postgres, without roles or ledger, whose options may be spoiled."""

    options: tuple[str, ...] = ()

    def _orders(self, port: int) -> Orders:
        orders = super()._orders(port)
        return replace(orders, command=[*orders.command, *self.options])
