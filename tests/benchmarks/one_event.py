"""What a task queue's task does with an event: parse it, and settle it in a transaction of its own."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.events.schema import Queue
from kino_refunds.settings import load_settings
from kino_refunds.settlement.deliveries import read_delivery
from kino_refunds.settlement.rules import Rules, rules_of
from kino_refunds.settlement.settle import settle


def settle_one(raw: str) -> None:
    """Settle one event as the worker would, alone."""
    engine, rules = _means()
    delivery = read_delivery(raw.encode(), Queue.JOB_FAILED)
    with engine.connect() as connection:
        settle(connection, [delivery], rules)


@cache
def _means() -> tuple[sa.Engine, Rules]:
    """Once a process, at its first event: what was opened before a fork would be shared."""
    settings = load_settings()
    engine = create_engine(settings.require_database_url(), limits=settings.session_limits)
    return engine, rules_of(settings)
