"""Engines whose sessions have the same settings everywhere, and hold no lock for longer than the settings allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from psycopg.types.array import ListBinaryDumper
from pydantic import BaseModel, PositiveInt
from sqlalchemy import Connection as Connection  # noqa: PLC0414 - rooms without SQL name these two by this module
from sqlalchemy import Engine as Engine  # noqa: PLC0414
from sqlalchemy.pool import NullPool

from kino_refunds.errors import WrongEncoding

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection

TRANSACTION_TIMEOUT_SINCE = 17_00_00
READ_ONLY = "25006"
ENCODING = "UTF8"

PINNED = {
    # Times arrive as text. psycopg reads no other style, and in a zone east of UTC the year 9999 is the year 10000,
    # which Python cannot represent.
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    # An array of only None is sent as text, in which NULL would be read as a word.
    "array_nulls": "on",
    # For statements outside a transaction. Inside one, each BEGIN names its level.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # With a read-only default of the role a worker would keep its batches forever. A standby refuses writes all the
    # same.
    "default_transaction_read_only": "off",
    # The pool closes its own connections. A connection that the server closed would fail the next batch that uses it.
    "idle_session_timeout": "0",
}
"""Settings that a server, role, database or PG* variable may set to another value, which would change what is read or
written. Planner settings (plan_cache_mode) are left to the server: they change no answer."""
SEARCH_PATH = "pg_catalog, pg_temp"
"""Our statements name the schema of every table. Names without a schema (functions, types) must be Postgres' own: a
function of the same name in another schema could otherwise be called in their place."""


class SessionLimits(BaseModel, frozen=True):
    """How long one session may wait, work or sleep, in milliseconds (design, section 3).

    Intake's alive TTL is longer than their sum. So a worker that was stopped or cut off has lost its transaction, and
    with it every lock, before another worker gets its batch.
    """

    lock_timeout_ms: PositiveInt = 500
    """Below Postgres' deadlock_timeout (1 s): two batches that wait for each other end as `busy`, not as a deadlock,
    which rolls a whole batch back."""
    statement_timeout_ms: PositiveInt = 15_000
    idle_in_transaction_timeout_ms: PositiveInt = 5_000
    transaction_timeout_ms: PositiveInt = 30_000
    tcp_user_timeout_ms: PositiveInt = 10_000

    @property
    def longest_hold_s(self) -> float:
        """Seconds after which a session that was cut off or stopped holds no lock any more: the sum of the limits."""
        return (
            self.lock_timeout_ms
            + self.statement_timeout_ms
            + self.idle_in_transaction_timeout_ms
            + self.transaction_timeout_ms
            + self.tcp_user_timeout_ms
        ) / 1000


def create_engine(
    url: str,
    *,
    limits: SessionLimits | None = None,
    application_name: str = "kino-refunds",
    pooled: bool = True,
    holds_ledger: bool = True,
) -> sa.Engine:
    """Return an engine for `url` (`postgresql+psycopg://…`) at READ COMMITTED; nothing connects before the first use.

    Every session gets `limits` and `PINNED`. `holds_ledger=False` is for a database that is not ours, such as a job
    source: it may have any encoding, and the search_path of its role stays. Connecting to a ledger that is not encoded
    in UTF8 raises WrongEncoding.
    """
    limits = limits or SessionLimits()
    options: dict[str, Any] = (
        {"pool_size": 4, "max_overflow": 4, "pool_pre_ping": False} if pooled else {"poolclass": NullPool}
    )
    engine = sa.create_engine(
        driver_url(url),
        isolation_level="READ COMMITTED",
        # Errors are logged, and the parameters of a statement hold ids of customers and texts of users.
        hide_parameters=True,
        connect_args={
            # In the first packet, so that it also holds behind a pooler.
            "client_encoding": ENCODING,
            "application_name": application_name,
            "connect_timeout": 5,
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": limits.tcp_user_timeout_ms,
        },
        **options,
    )

    @sa.event.listens_for(engine, "do_connect")
    def connect(dialect: sa.Dialect, _record: object, _arguments: object, options: dict[str, Any]) -> DBAPIConnection:
        try:
            return dialect.connect(**options)
        except UnicodeError as error:  # in a host's name, also one of libpq's environment or service file
            raise psycopg.OperationalError(f"the host name of a database cannot be read: {error}") from error

    # Before every other listener, so that SQLAlchemy's own first questions already run in a pinned session.
    @sa.event.listens_for(engine, "connect", insert=True)
    def pin_session(dbapi_connection: DBAPIConnection, _record: object) -> None:
        raw: Any = dbapi_connection
        if holds_ledger:
            _require_encoding(raw)
        # Every set-based statement sends its rows as arrays: in binary they cost a quarter of what psycopg's
        # default takes (500 rows of 7 columns: 2.3 ms instead of 8.7 ms, round trip included).
        raw.adapters.register_dumper(list, ListBinaryDumper)
        wanted = {
            "statement_timeout": limits.statement_timeout_ms,
            "lock_timeout": limits.lock_timeout_ms,
            "idle_in_transaction_session_timeout": limits.idle_in_transaction_timeout_ms,
            **PINNED,
        }
        if holds_ledger:
            wanted["search_path"] = SEARCH_PATH
        if raw.info.server_version >= TRANSACTION_TIMEOUT_SINCE:
            wanted["transaction_timeout"] = limits.transaction_timeout_ms
        # Our own statement instead of libpq's `options`: connection poolers refuse that parameter.
        settings = ", ".join(["pg_catalog.set_config(%s, %s, false)"] * len(wanted))
        raw.autocommit = True
        raw.execute(f"SELECT {settings}", [str(each) for pair in wanted.items() for each in pair])
        raw.autocommit = False

    @sa.event.listens_for(engine, "handle_error")
    def leave_read_only(context: sa.engine.ExceptionContext) -> None:
        # A session with a standby stays on that standby, although the URL may lead to the new primary by now.
        if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
            context.is_disconnect = True

    return engine


def _require_encoding(raw: Any) -> None:
    """Raise WrongEncoding for a database that cannot keep every id unchanged, before SQLAlchemy fails on it."""
    found = raw.info.parameter_status("server_encoding")
    if found not in {None, ENCODING}:
        raise WrongEncoding(
            f"database {raw.info.dbname} is encoded in {found}, the ledger needs {ENCODING}: CREATE DATABASE …"
            f" ENCODING '{ENCODING}' TEMPLATE template0, and change the URL to that database"
        )


def driver_url(url: str) -> sa.URL:
    """Return the URL with our driver's name in place of `postgres://` or `postgresql://`; any other URL unchanged."""
    parsed = sa.make_url(url)
    if parsed.drivername in {"postgres", "postgresql"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed
