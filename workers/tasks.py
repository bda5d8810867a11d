"""The sweeps, as Celery tasks: each opens what it needs, does one round, and says what it did."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from celery import shared_task

from kino_refunds.db.engine import create_engine
from kino_refunds.ledger import expire_lots as expire
from kino_refunds.log import get_logger
from kino_refunds.settings import load_settings
from kino_refunds.settlement.batch import outcomes_of, settle_batch
from kino_refunds.settlement.retries import sweep_retries as sweep
from workers.intake import terms_of

if TYPE_CHECKING:
    import sqlalchemy as sa

log = get_logger(__name__)


@cache
def _engine() -> sa.Engine:
    settings = load_settings()
    return create_engine(
        settings.require_database_url(), limits=settings.session_limits, application_name="kino-sweeps"
    )


@shared_task(name="kino.sweep_retries")
def sweep_retries() -> None:
    """Try events again whose time, or whose charge, has come."""
    terms = terms_of(load_settings())
    swept = sweep(
        _engine(),
        lambda due, now: outcomes_of(settle_batch(_engine(), due, terms, now)),
        now=datetime.now(UTC),
    )
    if swept.tried:
        log.info("retries swept", tried=swept.tried, outcomes=swept.outcomes)


@shared_task(name="kino.expire_lots")
def expire_lots() -> None:
    """Expire lots whose time has come, in small transactions: a refund may be waiting for one of them."""
    count = 0
    while True:
        with _engine().begin() as connection:
            expired = expire(connection, now=datetime.now(UTC))
        count += expired
        if not expired:
            break
    if count:
        log.info("lots expired", lots=count)
