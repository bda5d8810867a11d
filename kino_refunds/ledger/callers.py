"""Call the ledger's SQL functions in the caller's transaction: items in as JSON, rows out, errors as this package's."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from kino_refunds.errors import (
    AccountNotActive,
    ChargeAlreadySettled,
    ChargeConflict,
    ChargeNotCaptured,
    GrantConflict,
    InsufficientCredits,
    LedgerBusy,
    LedgerInconsistent,
    RefusedInput,
    TooManyLots,
    UnfitSession,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kino_refunds.errors import KinoError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_TRANSACTION = "25P01"
UNTRANSLATABLE = "22P05"
ITEMS_MAX: Final = 1_000
"""What one call of a function takes."""

RAISED: Final[Mapping[str, type[KinoError]]] = {
    "KR001": GrantConflict,
    "KR002": ChargeConflict,
    "KR003": ChargeAlreadySettled,
    "KR004": InsufficientCredits,
    "KR005": AccountNotActive,
    "KR006": RefusedInput,
    "KR007": LedgerBusy,
    "KR008": LedgerInconsistent,
    "KR009": TooManyLots,
    "KR010": LedgerInconsistent,
    "KR011": ChargeNotCaptured,
}
"""What each SQLSTATE of the ledger's functions is here."""


def microseconds(column: str) -> str:
    """Write SQL that gives an instant as microseconds since 1970, exactly.

    A whole number is the same in every DateStyle and TimeZone. The text of an instant is not: psycopg reads only
    ISO's, and east of UTC the end of the year 9999 is in the year 10000, which Python has not.
    """
    return f"CAST(EXTRACT(EPOCH FROM {column}) * 1000000 AS bigint)"


def instant(since_epoch_us: int) -> datetime:
    """Turn what `microseconds` gave into an aware datetime in UTC."""
    return EPOCH + timedelta(microseconds=since_epoch_us)


def instant_or_none(since_epoch_us: int | None) -> datetime | None:
    """Turn what `microseconds` gave, of a column that may be null, into an aware datetime in UTC."""
    return None if since_epoch_us is None else instant(since_epoch_us)


def call(connection: sa.Connection, statement: sa.TextClause, items: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Run `statement`, which calls one of the functions on `:items`; returns its rows, one an item, in their order.

    More items than a call takes go in several. Raises what `ledger_errors` says.
    """
    rows: list[Any] = []
    with ledger_errors():
        for first in range(0, len(items), ITEMS_MAX):
            rows += connection.execute(statement, {"items": json.dumps(items[first : first + ITEMS_MAX])})
    return rows


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Turn what a function raised in the block into this package's error; its text is the function's."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raised = RAISED.get(getattr(error.orig, "sqlstate", None) or "")
        if raised is None:
            raise
        diagnostics: Any = getattr(error.orig, "diag", None)
        raise raised(diagnostics.message_primary) from error


@contextmanager
def savepoint(connection: sa.Connection) -> Iterator[None]:
    """Run the block in a savepoint of the caller's transaction: an error that the caller catches leaves nothing.

    Raises UnfitSession where the caller's session is in autocommit or cannot carry the block's texts.
    """
    with fit(connection), connection.begin_nested():
        yield


@contextmanager
def fit(connection: sa.Connection) -> Iterator[None]:
    """Raise UnfitSession, which says what to set, where the block fails by the caller's session alone."""
    driver: Any = connection.connection.driver_connection
    encoding = driver.info.parameter_status("client_encoding")
    if encoding == "SQL_ASCII":  # psycopg would give bytes for every text
        raise UnfitSession(_encoding(encoding))
    try:
        yield
    except UnicodeEncodeError as error:
        raise UnfitSession(_encoding(encoding)) from error
    except sa.exc.DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        if sqlstate == UNTRANSLATABLE:
            raise UnfitSession(_encoding(encoding)) from error
        if sqlstate == NO_TRANSACTION:
            message = "the connection is in autocommit; the ledger needs a transaction of yours, to be all or nothing"
            raise UnfitSession(message) from error
        raise


def _encoding(name: str) -> str:
    return f"client_encoding {name} cannot carry every id; SET client_encoding = 'UTF8' in this session"
