"""Call the ledger's SQL functions in the caller's transaction: JSON items in, rows or this package's errors out."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias

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

Row: TypeAlias = "sa.Row[*tuple[Any, ...]]"
"""One row of a function: as many values as the function's statement selects."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_TRANSACTION = "25P01"
UNTRANSLATABLE = "22P05"
ITEMS_MAX: Final = 1_000
"""The most items that one call of a function takes."""

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
"""The error that is raised for each SQLSTATE of the ledger's functions."""


def microseconds(column: str) -> str:
    """Return SQL that reads `column`, an instant, as whole microseconds since 1970, exactly.

    A whole number is the same in every DateStyle and TimeZone. The text of an instant is not: psycopg reads only the
    ISO style, and east of UTC the end of the year 9999 is in the year 10000, which Python cannot represent.
    """
    return f"CAST(EXTRACT(EPOCH FROM {column}) * 1000000 AS bigint)"


def instant(since_epoch_us: int) -> datetime:
    """Return the aware datetime in UTC for a value that `microseconds` read."""
    return EPOCH + timedelta(microseconds=since_epoch_us)


def instant_or_none(since_epoch_us: int | None) -> datetime | None:
    """Return the aware datetime in UTC for a value that `microseconds` read from a column that may be null."""
    return None if since_epoch_us is None else instant(since_epoch_us)


def call(connection: sa.Connection, statement: sa.TextClause, items: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Run `statement`, which calls one of the functions on `:items`; return one row for each item, in their order.

    More than ITEMS_MAX items go in several calls. Raises the errors of `RAISED`.
    """
    rows: list[Row] = []
    # All calls run in the caller's one transaction, so a refused call leaves no part of the others committed. Each call
    # locks in order by itself: two callers with several calls each can meet in a deadlock, which moves no credits.
    with ledger_errors():
        for first in range(0, len(items), ITEMS_MAX):
            rows += connection.execute(statement, {"items": json.dumps(items[first : first + ITEMS_MAX])})
    return rows


@contextmanager
def ledger_errors() -> Iterator[None]:
    """Raise this package's error in place of the SQLSTATE that a function raised in the block; keep its message."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raised = RAISED.get(getattr(error.orig, "sqlstate", None) or "")
        # Not a refusal of the ledger but a fault of the server or the session: `db.faults.classify` decides whether the
        # batch is kept or split. As a KinoError it would look like a refusal, and an event would become a dead letter.
        if raised is None:
            raise
        # Only the message. DETAIL and CONTEXT may quote other accounts' rows, and this text reaches products and logs.
        diagnostics: Any = getattr(error.orig, "diag", None)
        raise raised(diagnostics.message_primary) from error


@contextmanager
def savepoint(connection: sa.Connection) -> Iterator[None]:
    """Run the block in a savepoint: if the caller catches its error, no part of the block's work is committed.

    Raises UnfitSession if the caller's session is in autocommit or cannot carry the block's texts.
    """
    with fit(connection), connection.begin_nested():
        yield


@contextmanager
def fit(connection: sa.Connection) -> Iterator[None]:
    """Raise UnfitSession, whose text says what to set, if the block fails because of the caller's session alone."""
    driver: Any = connection.connection.driver_connection
    encoding = driver.info.parameter_status("client_encoding")
    # psycopg would return bytes in place of every text, and no job id or reference would equal the caller's.
    if encoding == "SQL_ASCII":
        raise UnfitSession(_encoding(encoding))
    try:
        yield
    except UnicodeEncodeError as error:
        raise UnfitSession(_encoding(encoding)) from error
    except sa.exc.DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        if sqlstate == UNTRANSLATABLE:
            raise UnfitSession(_encoding(encoding)) from error
        # In autocommit each statement commits by itself: credits could be held for a job that the caller never stored.
        if sqlstate == NO_TRANSACTION:
            message = "the connection is in autocommit: begin a transaction, or a part of the call could be committed"
            raise UnfitSession(message) from error
        raise


def _encoding(name: str) -> str:
    return f"client_encoding {name} cannot carry every id; SET client_encoding = 'UTF8' in this session"
