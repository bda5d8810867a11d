"""Time for tests: `kino.clock()` of a test's own database reads a row, and the acts below run at an instant."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from kino_refunds import ledger, schedule
from kino_refunds.db.engine import create_engine
from kino_refunds.desk import replays
from kino_refunds.reconciliation import verified
from kino_refunds.settlement import batch, dead_letters, retries, settle
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.deliveries import Delivery
from kino_refunds.settlement.rules import Rules

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
TICK = timedelta(microseconds=1)
"""The smallest step of Postgres' clock and of Python's."""

_INSTALL = """
CREATE SCHEMA IF NOT EXISTS kino_test;
GRANT USAGE ON SCHEMA kino_test TO PUBLIC;
CREATE TABLE IF NOT EXISTS kino_test.clock (at timestamptz, ahead interval);
GRANT SELECT ON kino_test.clock TO PUBLIC;
CREATE OR REPLACE FUNCTION kino.clock() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT coalesce(max(at), clock_timestamp() + coalesce(max(ahead), interval ''0'')) FROM kino_test.clock';
"""

_standing: dict[str, list[datetime]] = defaultdict(list)
_lock = threading.Lock()


@contextmanager
def clock_at(bind: sa.Engine | sa.Connection, at: datetime | None) -> Iterator[None]:
    """Stop the clock of this database at `at` while the block runs, for every session; None leaves it as it is.

    Where blocks overlap (one inside the other, or in two threads) the one that began last counts.
    """
    if at is None:
        yield
        return
    url = bind.engine.url
    standing = _standing[f"{url.host}:{url.port}/{url.database}"]
    with _lock:
        standing.append(at)
        _write(url, at)
    try:
        yield
    finally:
        with _lock:
            standing.remove(at)
            _write(url, standing[-1] if standing else None)


def run_ahead(bind: sa.Engine | sa.Connection, ahead: timedelta) -> None:
    """Let the clock of this database run `ahead` of the real one from here on."""
    _write(bind.engine.url, None, ahead)


def _write(url: sa.URL, at: datetime | None, ahead: timedelta | None = None) -> None:
    engine = create_engine(url.set(username="postgres").render_as_string(hide_password=False), pooled=False)
    with engine.begin() as superuser:
        installed = superuser.exec_driver_sql("SELECT to_regclass('kino_test.clock') IS NOT NULL").scalar_one()
        if not installed:
            superuser.exec_driver_sql(_INSTALL)
        superuser.exec_driver_sql("DELETE FROM kino_test.clock")
        superuser.execute(sa.text("INSERT INTO kino_test.clock VALUES (:at, :ahead)"), {"at": at, "ahead": ahead})


def sample_at(bind: sa.Engine | sa.Connection, at: datetime) -> None:
    """Take a sample of the clock, as the sweep does, while it stands at `at`."""
    url = bind.engine.url.set(username="kino_worker").render_as_string(hide_password=False)
    engine = create_engine(url, pooled=False)
    with clock_at(bind, at), engine.begin() as worker:
        verified.sample_clock(worker)


def settle_at(
    connection: sa.Connection, deliveries: Sequence[Delivery], rules: Rules, now: datetime | None, **options: Any
) -> list[Ruling]:
    with clock_at(connection, now):
        return settle.settle(connection, deliveries, rules, **options)


def settle_batch_at(
    engine: sa.Engine, deliveries: Sequence[Delivery], rules: Rules, now: datetime, **options: Any
) -> list[Ruling]:
    with clock_at(engine, now):
        return batch.settle_batch(engine, deliveries, rules, **options)


def lease_due(connection: sa.Connection, *, now: datetime, **options: Any) -> list[Delivery]:
    with clock_at(connection, now):
        return retries.lease_due(connection, **options)


def replay_letter(
    engine: sa.Engine, dead_letter_id: int, rules: Rules, now: datetime, **options: Any
) -> replays.Replay:
    with clock_at(engine, now):
        return replays.replay_letter(engine, dead_letter_id, rules, **options)


def discard_letter(connection: sa.Connection, dead_letter_id: int, *, now: datetime, **options: Any) -> None:
    with clock_at(connection, now):
        replays.discard_letter(connection, dead_letter_id, **options)


def note_letter(connection: sa.Connection, dead_letter_id: int, text: str, *, now: datetime, **options: Any) -> None:
    with clock_at(connection, now):
        replays.note_letter(connection, dead_letter_id, text, **options)


def set_letter_status(
    connection: sa.Connection, dead_letter_id: int, status: dead_letters.LetterStatus, *, now: datetime, **options: Any
) -> None:
    with clock_at(connection, now):
        replays.set_letter_status(connection, dead_letter_id, status, **options)


def record_dead_letters(
    connection: sa.Connection, letters: Sequence[dead_letters.DeadLetter], *, now: datetime, build: str
) -> None:
    with clock_at(connection, now):
        dead_letters.record_dead_letters(connection, letters, build=build)


def expire_lots(connection: sa.Connection, *, now: datetime, limit: int = 1000) -> int:
    with clock_at(connection, now):
        return ledger.expire_lots(connection, limit=limit)


def release_purchase(connection: sa.Connection, purchase_id: str, *, now: datetime, **cause: Any) -> list[int]:
    with clock_at(connection, now):
        return ledger.release_purchase(connection, purchase_id, **cause)


def settle_charges(
    connection: sa.Connection, settlements: Sequence[ledger.Settlement], *, now: datetime | None
) -> None:
    with clock_at(connection, now):
        ledger.settle_charges(connection, settlements)


def set_lot_grace(bind: sa.Engine | sa.Connection, days: int) -> None:
    """Write this database's lot grace, as `migrate --lot-grace-days` does."""
    engine = create_engine(bind.engine.url.set(username="postgres").render_as_string(hide_password=False), pooled=False)
    with engine.begin() as superuser:
        superuser.execute(sa.text("UPDATE kino.ledger_setting SET lot_grace_days = :days"), {"days": days})


def claim_slot(connection: sa.Connection, entry: schedule.Entry, *, now: datetime, claimed_by: str) -> datetime | None:
    with clock_at(connection, now):
        return schedule.claim_slot(connection, entry, claimed_by=claimed_by)


def read_schedule(
    connection: sa.Connection, scheduled: Sequence[schedule.Entry], *, now: datetime
) -> list[schedule.Run]:
    with clock_at(connection, now):
        return schedule.read_schedule(connection, scheduled)
