"""What runs on the product's own connections reads and writes the same in every session, or refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import UnfitSession
from kino_refunds.ledger import (
    Balance,
    ChargeRequest,
    Grant,
    LotClass,
    balance,
    grant_lots,
    open_charge,
    open_charges,
    statement,
)
from tests.clock import sample_at
from tests.conftest import Database
from tests.integration.db.odd_defaults import DEFAULTS, EARLIEST, EMOJI, LATEST
from tests.scenario import NOW, Scene

PRODUCT_DEFAULTS = [
    default
    for default in DEFAULTS
    # What the product may not be served by: a session that writes nothing, gives bytes for text, or ends while the
    # product does something else, and functions that it put before Postgres' own.
    if default
    not in {
        ("default_transaction_read_only", "on"),
        ("client_encoding", "SQL_ASCII"),
        ("search_path", "shadow, pg_catalog"),
        ("array_nulls", "off"),
        ("idle_session_timeout", "50ms"),
    }
]


@contextmanager
def product_session(database: Database, *settings: tuple[str, str], **options: Any) -> Iterator[sa.Connection]:
    """A connection as the product opens it: none of our pins, and these settings of its own."""
    engine = sa.create_engine(database.url("kino_product"), poolclass=sa.NullPool, **options)
    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        for name, value in settings:
            raw.execute("SELECT set_config(%s, %s, false)", [name, value])
        raw.commit()
        yield connection


def use_the_ledger(connection: sa.Connection, name: str) -> dict[str, Any]:
    """Grant, charge, do both again, and read everything back."""
    grants = [
        Grant(f"late {name}", name, 10, LotClass.PURCHASED, expires_at=LATEST),
        Grant(f"never {name}", name, 10, LotClass.SUBSCRIPTION, purchase_id="p-1"),
        Grant(f"early {name}", name, 10, LotClass.COURTESY, expires_at=NOW + timedelta(days=36_500, microseconds=1)),
    ]
    lots = grant_lots(connection, grants)
    charge = open_charge(connection, job_id=f"job {name}", account_id=name, credits=15, deadline_at=LATEST)
    again = open_charge(connection, job_id=f"job {name}", account_id=name, credits=15, deadline_at=EARLIEST)
    lots_again = grant_lots(connection, grants)
    connection.commit()
    sample_at(connection, LATEST)
    lines = statement(connection, name)
    return {
        "lots": [(lot.expires_at, lot.lot_class, lot.remaining) for lot in lots],
        "lots again": [(lot.expires_at, lot.lot_class, lot.remaining) for lot in lots_again],
        "drawn": [
            (next(lot.reference for lot in lots if lot.lot_id == lot_id), taken) for lot_id, taken in charge.lines
        ],
        "the same charge": charge == again,
        "deadline": again.deadline_at,
        "balance": (balance(connection, name), balance(connection, name, at=LATEST)),
        "statement": [(line.kind, line.credits, line.job_id) for line in lines],
        "in UTC": {value.tzinfo for value in (charge.opened_at, again.opened_at, *(line.at for line in lines))},
        "in order": charge.opened_at < max(line.at for line in lines) < datetime.now(UTC) + timedelta(minutes=1),
    }


def test_a_default_of_the_product_s_session_changes_no_answer(database: Database) -> None:
    """Grants, charges, balances and statements are the same in every session of the product, to the microsecond."""
    answered = {}
    for number, default in enumerate(PRODUCT_DEFAULTS):
        with product_session(database, default) as connection:
            answered[default] = use_the_ledger(connection, f"acct-{number}")

    for number, default in enumerate(PRODUCT_DEFAULTS):
        name = f"acct-{number}"
        far = NOW + timedelta(days=36_500, microseconds=1)
        assert answered[default] == {
            "lots": [
                (LATEST, LotClass.PURCHASED, 10),
                (None, LotClass.SUBSCRIPTION, 10),
                (far, LotClass.COURTESY, 10),
            ],
            "lots again": [
                (LATEST, LotClass.PURCHASED, 5),
                (None, LotClass.SUBSCRIPTION, 10),
                (far, LotClass.COURTESY, 0),
            ],
            "drawn": [(f"early {name}", 10), (f"late {name}", 5)],
            "the same charge": True,
            "deadline": LATEST,
            "balance": (Balance(15, 15), Balance(10, 15)),
            "statement": [
                ("grant", 10, None),
                ("grant", 10, None),
                ("grant", 10, None),
                ("hold", -10, f"job {name}"),
                ("hold", -5, f"job {name}"),
            ],
            "in UTC": {UTC},
            "in order": True,
        }, default


@pytest.mark.parametrize("at", [EARLIEST, LATEST, datetime(2026, 7, 1, 12, 30, 0, 1, tzinfo=UTC)])
def test_every_instant_of_the_calendar_is_read_as_it_was_written(database: Database, at: datetime) -> None:
    """From the year 1 to the last microsecond of 9998 nothing is rounded, in a zone where both ends do not exist."""
    for zone in ("Asia/Tokyo", "America/New_York"):
        with product_session(database, ("TimeZone", zone)) as connection:
            grant_lots(connection, [Grant(f"lot {zone}", "acct-1", 1, LotClass.PURCHASED)])
            open_charge(connection, job_id=zone, account_id="acct-1", credits=0, deadline_at=at)

            read = open_charge(connection, job_id=zone, account_id="acct-1", credits=0, deadline_at=NOW).deadline_at

            connection.rollback()
        assert (read, read.tzinfo) == (at, UTC)


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_an_encoding_without_an_id_is_refused_and_leaves_nothing(
    scene: Scene, database: Database, encoding: str
) -> None:
    """The product is told what to set; what it had done in its transaction stands, and nothing of the call does."""
    scene.charged(EMOJI)
    grant = Grant(f"lot {EMOJI}", "acct-1", 10, LotClass.PURCHASED)
    refused = pytest.raises(UnfitSession, match=f"client_encoding {encoding} cannot .* SET client_encoding = 'UTF8'")
    before = scene.everything()

    with product_session(database, ("client_encoding", encoding)) as connection:
        with refused:
            grant_lots(connection, [Grant("fine", "acct-1", 10, LotClass.PURCHASED), grant])
        with refused:
            open_charges(connection, [ChargeRequest(EMOJI, "acct-1", 0, NOW)])
        with refused:
            balance(connection, EMOJI)
        connection.rollback()
        with refused:
            statement(connection, EMOJI)
        connection.commit()

    assert scene.everything() == before


def test_a_text_that_the_session_cannot_be_given_is_refused(scene: Scene, database: Database) -> None:
    """A statement that names a job which the session's encoding lacks says so, and not a character's bytes."""
    scene.grant("acct-1")
    scene.open(EMOJI, "acct-1")

    with product_session(database, ("client_encoding", "LATIN1")) as connection:
        with pytest.raises(UnfitSession, match="client_encoding LATIN1"):
            statement(connection, "acct-1")
        connection.rollback()
        assert balance(connection, "acct-1") == Balance(90, 10)


def test_a_connection_in_autocommit_is_refused_and_leaves_nothing(scene: Scene, database: Database) -> None:
    """All or nothing needs a transaction: without one nothing is begun; reading needs none."""
    scene.grant("acct-1")
    before = scene.everything()

    with product_session(database, isolation_level="AUTOCOMMIT") as connection:
        for act in (
            lambda: grant_lots(connection, [Grant("lot", "acct-1", 10, LotClass.PURCHASED)]),
            lambda: open_charges(connection, [ChargeRequest("job-1", "acct-1", 10, NOW)]),
        ):
            with pytest.raises(UnfitSession, match="the connection is in autocommit"):
                act()
            connection.rollback()
        read = balance(connection, "acct-1"), len(statement(connection, "acct-1"))

    assert read == (Balance(100, 0), 1)
    assert scene.everything() == before


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_is_too_old_is_a_serialization_failure(scene: Scene, database: Database, level: str) -> None:
    """Two transactions draw from one lot: the second is told to try again, and then draws what is left."""
    scene.grant("acct-1", 15)

    with product_session(database, isolation_level=level) as connection:
        assert balance(connection, "acct-1") == Balance(15, 0)  # from here on it sees the ledger as it is now
        scene.open("first", "acct-1", 10)
        with pytest.raises(sa.exc.OperationalError) as raised:
            open_charge(connection, job_id="second", account_id="acct-1", credits=5, deadline_at=NOW)
        connection.rollback()
        charge = open_charge(connection, job_id="second", account_id="acct-1", credits=5, deadline_at=NOW)
        connection.commit()

    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    assert classify(raised.value) is Fault.KEEP
    assert charge.credits == 5
    assert scene.balance("acct-1") == Balance(0, 15)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_same_job_in_an_older_snapshot_is_a_serialization_failure(
    scene: Scene, database: Database, level: str
) -> None:
    """A charge that was opened after our snapshot is no error of its own kind: try again, and it is found."""
    scene.grant("acct-1", 100)

    with product_session(database, isolation_level=level) as connection:
        balance(connection, "acct-1")
        opened = scene.open("job-1", "acct-1", 10)
        with pytest.raises(sa.exc.OperationalError) as raised:
            open_charge(connection, job_id="job-1", account_id="acct-1", credits=10, deadline_at=NOW)
        connection.rollback()
        again = open_charge(connection, job_id="job-1", account_id="acct-1", credits=10, deadline_at=NOW)

    assert getattr(raised.value.orig, "sqlstate", None) == "40001"
    assert again == opened
