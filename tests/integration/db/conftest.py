"""Sessions of the superuser, and a ledger with a past, for the tests of rights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Database
from tests.integration.db.past import arrange
from tests.ledger_items import Connection, session


@pytest.fixture
def superuser(database: Database) -> Iterator[Connection]:
    """A session that reads everything."""
    with session(database, "postgres", autocommit=True) as connection:
        yield connection


@pytest.fixture
def arranged(database: Database) -> Database:
    """A database whose ledger has a past."""
    arrange(database)
    return database
