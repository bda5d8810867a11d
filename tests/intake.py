"""Workers that take events in this process: their names, their queues, their intake, and their death."""

from __future__ import annotations

from typing import Any

from redis import Redis

from kino_refunds.events.queues import Queues
from kino_refunds.intake.tripwire import PROBE_EVERY_S
from kino_refunds.settings import Settings
from kino_refunds.settlement.rules import rules_of
from tests.scenario import Scene
from workers.intake import Intake

A, B = "worker-a", "worker-b"


def queues_of(client: Redis, worker_id: str = A) -> Queues:
    """Take the place of one worker at the queues."""
    return Queues(client, worker_id, alive_ttl_s=60)


def make_intake(
    scene: Scene, client: Redis, worker_id: str = A, *, probe_every_s: float = PROBE_EVERY_S, **chosen: Any
) -> Intake:
    """Take the place of one worker altogether, with the default settings but for those that are chosen."""
    settings = Settings.model_construct(**chosen)
    return Intake(
        scene.worker,
        queues_of(client, worker_id),
        rules_of(settings),
        settings,
        name=worker_id,
        probe_every_s=probe_every_s,
    )


def die(client: Redis, worker_id: str = A) -> None:
    """As when the alive key of a killed worker runs out."""
    client.delete(f"kino:alive:{worker_id}")
