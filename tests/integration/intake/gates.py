"""The gate of intake, and workers of a build that fails in front of it."""

from __future__ import annotations

from typing import NamedTuple

import psycopg
import sqlalchemy as sa
from redis import Redis

from kino_refunds.intake.gate import pause_intake, read_gate, resume_intake
from tests.intake import A, make_intake
from tests.pipeline import failures, numbered, open_jobs, push
from tests.scenario import Scene
from workers.intake import Intake

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


def bad_intake(scene: Scene, client: Redis, worker_id: str = A, *, probe_every_s: float = NEVER) -> Intake:
    """Take the place of one worker of the build that `bad_build` breaks."""
    return make_intake(scene, client, worker_id, build="bad", probe_every_s=probe_every_s)


def charge_and_fail(scene: Scene, client: Redis, count: int, prefix: str = "job") -> list[str]:
    """Charge jobs, and let the pipeline say that each failed."""
    jobs = numbered(prefix, count)
    open_jobs(scene, *jobs, account_id=f"acct {prefix}")
    push(client, *failures(*jobs))
    return jobs


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


def letters_by_reason(scene: Scene) -> dict[str, tuple[int, int]]:
    """Dead letters by reason: how many, and how often they were seen."""
    rows = scene.rows("SELECT reason, count(*), CAST(sum(seen) AS bigint) FROM kino.dead_letter GROUP BY reason")
    return {row[0]: (row[1], row[2]) for row in rows}
