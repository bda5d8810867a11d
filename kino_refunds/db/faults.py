"""The one place that says what an exception means: for the batch that it stopped, and for a person's command."""

from __future__ import annotations

from enum import Enum, auto

import psycopg
import sqlalchemy as sa

from kino_refunds.errors import DependencyAway, SettledElsewhere


class Fault(Enum):
    """What to do with a batch that failed."""

    KEEP = auto()
    """Nothing is wrong with the events: keep the batch, back off, settle it again."""
    LOCK = auto()
    """Another session holds a row for longer than the lock timeout: settle without the jobs that it concerns."""
    SPLIT = auto()
    """The batch is too slow or too contended: settle it in parts; an event that is so by itself is retried later."""
    BISECT = auto()
    """One event causes this, and would again: find it, keep it as a dead letter, settle the rest."""


LOCK_NOT_AVAILABLE = "55P03"

_SPLIT = frozenset(
    {
        "57014",  # query_canceled: the statement timeout
        "25P04",  # transaction_timeout
    }
)

_KEEP_CLASSES = frozenset(
    {
        "08",  # connection exceptions
        "28",  # authentication: a password is being rotated
        "53",  # insufficient resources: disk full, out of memory, too many connections
        "57",  # operator intervention: shutdown, crash recovery, session terminated (57014 is looked up first)
        "58",  # system errors outside Postgres: I/O
    }
)

_KEEP = frozenset(
    {
        "0A000",  # "cached plan must not change result type": a migration changed a table under a prepared statement
        "25006",  # read-only transaction: a failover is under way
        "25P03",  # idle_in_transaction_session_timeout: this process was stopped; the events are not the cause
        "26000",  # a prepared statement is gone: a pooler gave us another session
        "3D000",  # the database is missing
        "3F000",  # the schema is missing: not migrated yet
        "40001",  # serialization failure
        "40P01",  # deadlock
        "42501",  # insufficient privilege
        "42P05",  # a prepared statement exists already: likewise a pooler
        "42703",  # undefined column: this build is ahead of the schema
        "42883",  # undefined function: likewise
        "42P01",  # undefined table: likewise
        "42P10",  # no such unique index for ON CONFLICT: likewise
    }
)


def classify(error: BaseException) -> Fault:
    """Return what to do with a batch that `error` stopped; an error that is not known to be transient is BISECT."""
    if isinstance(error, (DependencyAway, sa.exc.TimeoutError, MemoryError)):
        return Fault.KEEP
    if isinstance(error, SettledElsewhere):
        return Fault.SPLIT
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    if not isinstance(cause, psycopg.Error):
        return Fault.BISECT
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return Fault.SPLIT if cause.sqlstate in _SPLIT else Fault.KEEP
    sqlstate = cause.sqlstate
    if sqlstate is None:
        # The driver raised it: the server went away or the session is closed. Any other driver error is our mistake.
        connection_lost = isinstance(cause, (psycopg.OperationalError, psycopg.InterfaceError))
        return Fault.KEEP if connection_lost else Fault.BISECT
    if sqlstate == LOCK_NOT_AVAILABLE:
        return Fault.LOCK
    if sqlstate in _SPLIT:
        return Fault.SPLIT
    if sqlstate in _KEEP or sqlstate[:2] in _KEEP_CLASSES:
        return Fault.KEEP
    return Fault.BISECT


class Meaning(Enum):
    """What an error of Postgres means to the person whose command it ended."""

    USAGE = auto()
    """The URL cannot be read."""
    AWAY = auto()
    """The server, or the ledger in it, cannot be used now."""
    NO_RIGHT = auto()
    """The login may not do this; another may."""
    FINDING = auto()
    """The server answered, and its answer is the finding."""


_NO_LEDGER = frozenset({"42P01", "3F000"})
_OTHER_SCHEMA = frozenset({"42703", "42883"})
_INSUFFICIENT_PRIVILEGE = "42501"
REACH = "check that it runs and can be reached, and user, password and database in its URL (`kino-refunds doctor`)"


def explain(error: BaseException, *, setting: str) -> tuple[Meaning, str] | None:
    """Return what an error of Postgres means, and in one line what went wrong and what to do; None for any other error.

    `setting` names the variable that leads to the server.
    """
    if not isinstance(error, sa.exc.SQLAlchemyError):
        return None
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else None
    sqlstate = getattr(cause, "sqlstate", None)
    first_line = str(cause or error).partition("\n")[0]
    if isinstance(error, sa.exc.ArgumentError):
        return Meaning.USAGE, f"a database URL cannot be read: {first_line}"
    if isinstance(error, sa.exc.NoResultFound):
        text = "the ledger lacks a row that its migrations made; restore it, or the database, from a backup"
        return Meaning.FINDING, text
    if sqlstate in _NO_LEDGER:
        return Meaning.AWAY, "the database has no ledger yet; run `kino-refunds migrate` as kino_owner"
    if sqlstate in _OTHER_SCHEMA:
        text = f"the schema is not this build's: {first_line}; run `kino-refunds migrate` as kino_owner"
        return Meaning.AWAY, text
    if sqlstate == _INSUFFICIENT_PRIVILEGE:
        return Meaning.NO_RIGHT, f"Postgres: {first_line}; connect with the role that may (see {setting})"
    if classify(error) in {Fault.KEEP, Fault.LOCK, Fault.SPLIT}:
        return Meaning.AWAY, f"Postgres ({setting}): {first_line}; {REACH}"
    return Meaning.FINDING, f"{type(error).__name__}: {first_line}"
