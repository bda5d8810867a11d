"""A ledger with rows in every sealed table, its seals, and the digests computed again by this file alone."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

import psycopg
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.ledger import AccountStatus
from kino_refunds.reconciliation import verified
from kino_refunds.reconciliation.comparison import LiveBreak, Scope, Window
from kino_refunds.reconciliation.seals import Seal, append_seal, newest_seal, verify_seals
from kino_refunds.settlement.breaks import Break
from tests.clock import DAY, MINUTE, clock_at, expire_lots, sample_at
from tests.conftest import Database
from tests.scenario import NOW, Scene, make_event, make_rules, until

# Written down once more, from the page and not from the code.
COLUMNS = {
    "transfer": "transfer_id kind from_book to_book account_id lot_id to_lot_id charge_id credits reason actor event_at"
    " created_at xid cause_kind cause_id",
    "settlement": "charge_id kind reason clause policy_version event_source event_id event_time settled_at xid ending"
    " account_status",
    "correction": "charge_id reason clause policy_version actor reference corrected_at xid",
    "charge": "charge_id job_id account_id credits deadline_at opened_at xid",
    "charge_line": "charge_id seq lot_id credits",
    "account_status_change": "change_id account_id from_status to_status reason actor changed_at xid",
    "lot_change": "change_id lot_id account_id from_state to_state from_expires_at to_expires_at changed_at xid",
}


def busy_ledger(scene: Scene, name: str = "acme") -> None:
    """Write rows into every sealed table: a capture that is corrected, a refund, a status, an expiry; all at NOW."""
    with clock_at(scene.worker, NOW):
        scene.grant(name, 100, expires_at=NOW + DAY)
        first = scene.open(f"{name} ünï 1", name)
        scene.open(f"{name} 2", name)
        scene.settle(make_event("completed", f"{name} ünï 1"), make_event("timeout", f"{name} 2"), now=None)
        scene.correct(first)
        scene.set_status(name, AccountStatus.SUSPENDED, 'they said "wait", so we do: 10:ab-')
    with scene.worker.begin() as connection:
        expire_lots(connection, now=NOW + DAY)


def sample(scene: Scene, at: datetime | None = None) -> int:
    """Take a sample of the clock; return its transaction's number."""
    if at is not None:
        sample_at(scene.worker, at)
    else:
        with scene.worker.begin() as connection:
            verified.sample_clock(connection)
    return int(scene.rows("SELECT max(CAST(CAST(xid AS text) AS bigint)) FROM kino.xid_clock")[0][0])


def seal_all(scene: Scene, at: datetime | None = None, *, rows_max: int = 200_000) -> Seal:
    """Take a sample and seal up to it; return the newest seal. Postgres' own transactions may hold the horizon back."""
    through = sample(scene, at)
    found: list[Seal] = []

    def reached() -> bool:
        append_seal(scene.worker, rows_max=rows_max)
        with scene.worker.begin() as connection:
            newest = newest_seal(connection)
        found[:] = [newest] if newest is not None else []
        return newest is not None and newest.to_xid == through

    until(reached)
    return found[0]


def seals(scene: Scene) -> list[Any]:
    return scene.rows(
        "SELECT s.*, CAST(CAST(from_xid AS text) AS bigint) AS low,"
        " CAST(CAST(to_xid AS text) AS bigint) AS high FROM kino.seal s ORDER BY seal_id"
    )


def found(database: Database, role: str = "kino_read", **bounds: Any) -> dict[str, Break]:
    """Verify as a login that may only read; return the breaks by what they are about."""
    engine = create_engine(database.url(role), pooled=False)
    breaks = [each for some in verify_seals(engine, **bounds) for each in some.breaks]
    assert all(each.kind == "history_changed" for each in breaks)
    return {str(each.subject): each for each in breaks}


def a_scope(engine: sa.Engine, *, full: bool = False, dry_run: bool = False) -> Scope:
    return Scope(
        engine=engine,
        window=Window(None, NOW, 0, 0),
        full=full,
        dry_run=dry_run,
        now=NOW,
        policy=make_rules().policy,
        overdue_grace=MINUTE,
        grace=timedelta(0),
    )


def live(subject: str, break_id: int = 1) -> LiveBreak:
    return LiveBreak(break_id, "history_changed", subject, None, None)


# --- changes by a superuser --------------------------------------------------------------------------------------

UNBOUND = """
    DO $$ DECLARE each record; BEGIN
        FOR each IN SELECT conrelid::regclass AS on_table, conname FROM pg_constraint
                    WHERE connamespace = 'kino'::regnamespace AND contype IN ('c', 'f') LOOP
            EXECUTE 'ALTER TABLE ' || each.on_table || ' DROP CONSTRAINT ' || each.conname;
        END LOOP;
        FOR each IN SELECT attrelid::regclass AS on_table, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
                    WHERE c.relnamespace = 'kino'::regnamespace AND attidentity <> ''
                      AND c.relname NOT IN ('check_run', 'break') LOOP
            EXECUTE 'ALTER TABLE ' || each.on_table || ' ALTER COLUMN ' || each.attname || ' DROP IDENTITY';
        END LOOP;
    END $$
"""
"""Drops every rule of the tables but their keys: what a superuser may do."""
UNWATCHED = "SET LOCAL session_replication_role = replica"


def tamper(scene: Scene, *statements: str) -> None:
    scene.as_superuser(UNBOUND, UNWATCHED, *statements)


def in_seal(scene: Scene, table: str, seal_id: int) -> Any:
    """A row of a table that a seal covers, and its key as a condition."""
    xid, source = (
        ("c.xid", f"kino.{table} t JOIN kino.charge c USING (charge_id)")
        if table == "charge_line"
        else ("t.xid", f"kino.{table} t")
    )
    (row, *_) = scene.rows(
        f"SELECT t.* FROM {source} JOIN kino.seal s ON {xid} >= s.from_xid AND {xid} < s.to_xid"
        f" WHERE s.seal_id = {seal_id} ORDER BY 1 LIMIT 1"
    )
    return row


def forge(scene: Scene, database: Database, seal_id: int) -> None:
    """Give a seal the digest of what its range has now."""
    stored = seals(scene)[seal_id - 1]
    tamper(
        scene,
        f"UPDATE kino.seal SET digest = decode('{digest_again(database, stored)}', 'hex') WHERE seal_id = {seal_id}",
    )


# --- the format, by another program ------------------------------------------------------------------------------


def a_field(value: Any) -> bytes:
    if value is None:
        return b"-"
    if isinstance(value, datetime):
        value = round(value.timestamp() * 1_000_000)
    encoded = str(value).encode("utf-8")
    return str(len(encoded)).encode("ascii") + b":" + encoded


def digest_again(database: Database, seal: Any) -> str:
    """Compute a seal's digest from the rows, in Python and by plain statements."""
    head = [
        "kino-seal", 1, seal.seal_id, seal.low, seal.high, seal.as_of, seal.sealed_at, seal.rows, int(seal.credits),
        bytes(seal.previous_digest).hex(),
    ]  # fmt: skip
    digest = hashlib.sha256(b"".join(map(a_field, head)))
    url = database.url("postgres").replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, options="-c TimeZone=UTC") as connection:
        for table, columns in COLUMNS.items():
            key, xid = columns.split()[0], "t.xid"
            joined = f"kino.{table} t"
            if table == "charge_line":
                joined, key, xid = (
                    f"{joined} JOIN kino.charge c ON c.charge_id = t.charge_id",
                    "charge_id, t.seq",
                    "c.xid",
                )
            chosen = ", ".join(f"t.{column}::text" if column == "xid" else f"t.{column}" for column in columns.split())
            rows = connection.execute(
                f"SELECT {chosen} FROM {joined} WHERE {xid} >= '{seal.low}' AND {xid} < '{seal.high}'"
                f" ORDER BY {xid}, t.{key}"
            ).fetchall()
            of_table = hashlib.sha256(b"".join(a_field(value) for row in rows for value in row))
            digest.update(b"".join(map(a_field, [table, len(rows), of_table.hexdigest()])))
    return digest.hexdigest()
