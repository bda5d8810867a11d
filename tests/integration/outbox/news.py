"""Refunds, and what a consumer of the relay hears of them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from redis import Redis

from tests.scenario import NOW, Scene, make_event

QUEUE = "kino.credits-refunded"


def told(redis: Redis) -> list[dict[str, Any]]:
    """What a consumer has read: the oldest first."""
    return [json.loads(raw) for raw in reversed(redis.lrange(QUEUE, 0, -1))]


def ids(redis: Redis) -> list[str]:
    return [event["id"] for event in told(redis)]


def cursor(scene: Scene) -> list[Any]:
    return scene.rows("SELECT CAST(xid AS text), charge_id FROM kino.relay_cursor")


def refund(scene: Scene, *job_ids: str, at: datetime = NOW) -> list[str]:
    """Charge jobs, refund them in one transaction at an instant, and return the ids of the news."""
    charges = [scene.charged(job_id) for job_id in job_ids]
    scene.settle(*[make_event("failed platform", job_id) for job_id in job_ids], now=at)
    return [f"refund:{charge.charge_id}" for charge in charges]


def read_news(redis: Redis) -> list[str]:
    """The ids of what a consumer reads, the oldest first; they are read only once."""
    news = ids(redis)
    redis.delete(QUEUE)
    return news
