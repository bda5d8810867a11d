"""The gate of intake, and workers of a build that fails in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import SERVED, Queues
from kino_refunds.intake.gate import pause_intake, read_gate, resume_intake
from kino_refunds.settings import Settings
from kino_refunds.settlement import batch
from kino_refunds.settlement.batch import Part
from kino_refunds.settlement.rules import rules_of
from tests.pipeline import numbered, open_jobs, push
from tests.scenario import Scene, make_event
from workers import intake as intake_module
from workers.intake import Intake

A, B = "worker-a", "worker-b"
FAILED = SERVED[0]
EMPTY: dict[str, int] = {**dict.fromkeys(map(str, SERVED), 0), "in-flight": 0, "recovered": 0}
NEVER, AT_ONCE = 3600.0, 0.0
"""How often a probe is tried: not within a test, or with every look."""
AWAY = sa.exc.OperationalError("SELECT", None, psycopg.OperationalError("away"))


class State(NamedTuple):
    """The gate without its time."""

    paused: bool
    reason: str | None
    actor: str | None


OPEN = State(paused=False, reason=None, actor=None)
ANNA = State(paused=True, reason="maintenance", actor="anna")


def make_intake(
    scene: Scene, client: Redis, worker_id: str = A, *, build: str = "bad", probe_every_s: float = NEVER
) -> Intake:
    settings = Settings.model_construct(build=build)
    queues = Queues(client, worker_id, alive_ttl_s=60)
    return Intake(scene.worker, queues, rules_of(settings), settings, name=worker_id, probe_every_s=probe_every_s)


def charge_and_fail(scene: Scene, client: Redis, count: int, prefix: str = "job") -> list[str]:
    """Charge jobs, and let the pipeline say that each failed."""
    jobs = numbered(prefix, count)
    open_jobs(scene, *jobs, account_id=f"acct {prefix}")
    push(client, *[make_event("failed platform", job) for job in jobs])
    return jobs


def fail_with(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """Let settling the next batches fail with these errors first."""
    left = list(errors)

    def failing(*args: Any, **kwargs: Any) -> Iterator[Part]:
        if left:
            raise left.pop(0)
        return batch.settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", failing)


def state(scene: Scene) -> State:
    with scene.superuser.begin() as connection:
        gate = read_gate(connection)
    return State(gate.paused, gate.reason, gate.actor)


def pause(scene: Scene, reason: str = "maintenance", actor: str = "anna") -> bool:
    with scene.worker.begin() as connection:
        return pause_intake(connection, reason=reason, actor=actor)


def resume(scene: Scene, actor: str) -> bool:
    with scene.worker.begin() as connection:
        return resume_intake(connection, reason="it is fine", actor=actor)


def letters(scene: Scene) -> dict[str, tuple[int, int]]:
    """Dead letters by reason: how many, and how often they were seen."""
    rows = scene.rows("SELECT reason, count(*), CAST(sum(seen) AS bigint) FROM kino.dead_letter GROUP BY reason")
    return {row[0]: (row[1], row[2]) for row in rows}
