"""What a command's exit code means, and the one line that an error becomes."""

from __future__ import annotations

import errno

import redis
import sqlalchemy as sa

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import (
    BadSettings,
    BadTrace,
    DependencyAway,
    InstantNotFinal,
    KinoError,
    LetterProtects,
    ServerFailed,
    SourceUnavailable,
    TransferNotFound,
)
from kino_refunds.events.connection import NotPrimary
from kino_refunds.settings import DATABASE_URL

FINDING, USAGE, AWAY, INTERRUPTED = 1, 2, 3, 130
INSUFFICIENT_PRIVILEGE = "42501"
_WRONGLY_NAMED = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EROFS, errno.ENXIO,
}  # fmt: skip
"""What a person's file name can be wrong by; a full disk, for one, is no wrong usage."""
_CHECK = "check that it runs and can be reached, and user, password and database in its URL (`kino-refunds doctor`)"


def explained(error: Exception, *, setting: str = DATABASE_URL) -> tuple[int, str]:
    """Say in one line what went wrong and what to do next, with the exit code that belongs to it.

    `setting` names the variable whose server an error of Postgres comes from.
    """
    first_line = str(getattr(error, "orig", None) or error).partition("\n")[0]
    match error:
        case BadSettings() | BadTrace() | TransferNotFound() | InstantNotFinal() | LetterProtects():
            return USAGE, first_line
        case DependencyAway() | ServerFailed() | SourceUnavailable():
            return AWAY, str(error)
        case KinoError():
            return FINDING, str(error)
        case NotPrimary():
            return AWAY, f"Redis (KINO_REDIS_URL): {first_line}; give an address that follows the primary"
        case redis.RedisError():
            return AWAY, f"Redis (KINO_REDIS_URL): {first_line}; {_CHECK}"
        case FileNotFoundError() if error.filename is None:  # where we are is gone
            return USAGE, "the working folder is gone; change to another"
        case sa.exc.ArgumentError():
            return USAGE, f"a database URL cannot be read: {first_line}"
        case sa.exc.SQLAlchemyError():
            return _explained_postgres(error, first_line, setting)
        case OSError() if error.filename is not None and error.errno in _WRONGLY_NAMED:
            return USAGE, f"{error.filename}: {error.strerror}"
        case _:
            return FINDING, f"{type(error).__name__}: {first_line}"


def _explained_postgres(error: sa.exc.SQLAlchemyError, first_line: str, setting: str) -> tuple[int, str]:
    match error:
        case sa.exc.NoResultFound():
            text = "the ledger lacks a row that its migrations made; restore it, or the database, from a backup"
            return FINDING, text
        case sa.exc.DBAPIError() if getattr(error.orig, "sqlstate", None) in {"42P01", "3F000"}:
            return AWAY, "the database has no ledger yet; run `kino-refunds migrate` as kino_owner"
        case sa.exc.DBAPIError() if getattr(error.orig, "sqlstate", None) in {"42703", "42883"}:
            return AWAY, f"the schema is not this build's: {first_line}; run `kino-refunds migrate` as kino_owner"
        case sa.exc.DBAPIError() if getattr(error.orig, "sqlstate", None) == INSUFFICIENT_PRIVILEGE:
            return AWAY, f"Postgres: {first_line}; connect with the role that may (see {setting})"
        case _ if classify(error) in {Fault.KEEP, Fault.LOCK, Fault.SPLIT}:
            return AWAY, f"Postgres ({setting}): {first_line}; {_CHECK}"
        case _:
            return FINDING, f"{type(error).__name__}: {first_line}"
