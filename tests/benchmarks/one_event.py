"""What a task queue's task does with an event: parse it, and settle it in a transaction of its own."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.events.schema import Queue
from kino_refunds.settings import load_settings
from kino_refunds.settlement.deliveries import read_delivery
from kino_refunds.settlement.settle import Terms, settle
from workers.bootstep import terms_of


def settle_one(raw: str) -> None:
    """Settle one event as the worker would, alone."""
    engine, terms = _means()
    delivery = read_delivery(raw.encode(), Queue.JOB_FAILED)
    with engine.connect() as connection:
        settle(connection, [delivery], terms)


@cache
def _means() -> tuple[sa.Engine, Terms]:
    """Once a process, at its first event: what was opened before a fork would be shared."""
    settings = load_settings()
    engine = create_engine(settings.require_database_url(), limits=settings.session_limits)
    return engine, terms_of(settings)
