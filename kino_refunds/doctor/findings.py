"""What a check found, and how a check is run so that it always ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

import redis
import sqlalchemy as sa

from kino_refunds.errors import KinoError

CHECK_WITHIN_S = 20.0
"""Longer than the sum of a connection's own timeouts (5 s each). Only a wait that no timeout of a client ends lasts
this long, such as a name server that does not answer, or a pooler whose Postgres hangs."""

Level = Literal["ok", "warn", "fail", "away"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `advice` says what to do next if the level is not `ok`."""

    check: str
    level: Level
    found: str
    advice: str | None = None


def expect(check: str, good: bool, found: str, advice: str, *, level: Level = "fail") -> Finding:
    """Return the finding: `ok` if it is good, else with its level and the advice."""
    return Finding(check, "ok", found) if good else Finding(check, level, found, advice)


def bounded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Give what `look` finds; if it raises or does not end in time, that is a finding too."""
    found: SimpleQueue[Finding | Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            for each in look():
                found.put(each)
        except Exception as error:  # noqa: BLE001 - becomes a finding, or is raised again, in the main thread
            found.put(error)
        found.put(None)

    # A daemon thread: a check that hangs must not keep the program from ending.
    threading.Thread(target=run, name=f"doctor-{check}", daemon=True).start()
    deadline = time.monotonic() + CHECK_WITHIN_S
    while True:
        try:
            each = found.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            advice = "check that it runs, and that this machine reaches it by the address in its URL"
            yield Finding(check, "away", f"no answer within {CHECK_WITHIN_S:g} s", advice)
            return
        if each is None:
            return
        yield _explained(check, each) if isinstance(each, Exception) else each


def _explained(check: str, error: Exception) -> Finding:
    text = str(getattr(error, "orig", None) or error).partition("\n")[0]
    match error:
        case sa.exc.OperationalError() | redis.ConnectionError() | redis.TimeoutError():
            return Finding(check, "away", text, "check that it runs, its URL, and the user and password in it")
        case sa.exc.SQLAlchemyError() | redis.RedisError():
            return Finding(check, "fail", text, "fix this first: the checks after it did not run")
        case KinoError():
            return Finding(check, "fail", text)
        case _:
            raise error
