"""Workers that die with what they claimed, and the letters of what killed them."""

from __future__ import annotations

from typing import Any, NamedTuple

from redis import Redis

from kino_refunds.events.queues import SERVED, Queues
from kino_refunds.events.schema import Event, to_json
from kino_refunds.settings import Settings
from kino_refunds.settlement.rules import rules_of
from tests.scenario import Scene, make_event
from workers.intake import Intake

A, B = "worker-a", "worker-b"
FAILED = SERVED[0]
EMPTY: dict[str, int] = {**dict.fromkeys(map(str, SERVED), 0), "in-flight": 0, "recovered": 0}


def queues(client: Redis, worker_id: str) -> Queues:
    return Queues(client, worker_id, alive_ttl_s=60)


def make_intake(scene: Scene, client: Redis, worker_id: str = B, **chosen: Any) -> Intake:
    settings = Settings.model_construct(**chosen)
    return Intake(scene.worker, queues(client, worker_id), rules_of(settings), settings, name=worker_id)


def die(client: Redis, worker_id: str) -> None:
    """As when the alive key of a killed worker runs out."""
    client.delete(f"kino:alive:{worker_id}")


def push(client: Redis, *jobs: str) -> None:
    client.lpush(FAILED, *[to_json(failed(job)) for job in jobs])


def failed(job: str) -> Event:
    return make_event("failed platform", job)


class Letter(NamedTuple):
    raw: bytes
    reason: str
    source: str | None
    event_id: str | None
    job_id: str | None
    attempts: int
    seen: int


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows("SELECT raw, reason, source, event_id, job_id, attempts, seen FROM kino.dead_letter ORDER BY raw")
    return [Letter(*row) for row in rows]
