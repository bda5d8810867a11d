"""What a command's exit code means, and the one line that an error becomes."""

from __future__ import annotations

import errno

from kino_refunds.errors import (
    BadCopy,
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

FINDING, USAGE, AWAY, INTERRUPTED = 1, 2, 3, 130
_WRONGLY_NAMED = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EROFS, errno.ENXIO,
}  # fmt: skip
"""Errors that a wrong file name causes; a full disk, for example, is not a usage error."""


def explained(error: Exception) -> tuple[int, str] | None:
    """Return an error's exit code, and in one line what went wrong and what to do; None for a bug of ours."""
    match error:
        case KinoError():
            return _explained_ours(error)
        case OSError():
            return _explained_os(error)
        case _:
            return explained_by_server(error)


def explained_by_server(error: Exception) -> tuple[int, str] | None:
    """Return the same for an error of Postgres or Redis; None for any other."""
    import redis

    from kino_refunds.db.faults import REACH, Meaning, explain
    from kino_refunds.events.connection import NotPrimary
    from kino_refunds.settings import DATABASE_URL

    if isinstance(error, redis.RedisError):
        advice = "give an address that follows the primary" if isinstance(error, NotPrimary) else REACH
        return AWAY, f"Redis (KINO_REDIS_URL): {_first_line(error)}; {advice}"
    found = explain(error, setting=DATABASE_URL)
    if found is None:
        return None
    meaning, text = found
    match meaning:
        case Meaning.USAGE:
            return USAGE, text
        case Meaning.AWAY | Meaning.NO_RIGHT:
            return AWAY, text
        case Meaning.FINDING:
            return FINDING, text


def _explained_ours(error: KinoError) -> tuple[int, str]:
    match error:
        case BadCopy() | BadSettings() | BadTrace() | TransferNotFound() | InstantNotFinal() | LetterProtects():
            return USAGE, _first_line(error)
        case DependencyAway() | ServerFailed() | SourceUnavailable():
            return AWAY, str(error)
        case _:
            return FINDING, str(error)


def _explained_os(error: OSError) -> tuple[int, str]:
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of the working folder itself
        return USAGE, "the working folder is gone; change to another"
    if error.filename is not None and error.errno in _WRONGLY_NAMED:
        return USAGE, f"{error.filename}: {error.strerror}"
    return FINDING, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
