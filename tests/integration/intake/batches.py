"""Intake in this process, what it settles, and what stands in its way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from structlog.testing import CapturingLogger

from kino_refunds.db.engine import SessionLimits
from tests.scenario import Scene
from workers.intake import Intake

ACCOUNT = "acct-1"
BRISK = SessionLimits(lock_timeout_ms=50, statement_timeout_ms=300)


def outcomes(said: CapturingLogger) -> list[dict[str, int]]:
    """What each batch came to, as its log line has it."""
    return [call.kwargs["outcomes"] for call in said.calls if call.args == ("batch",)]


class Letter(NamedTuple):
    """A dead letter as it was received."""

    raw: bytes
    queue: str
    reason: str
    seen: int


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows("SELECT raw, queue, reason, seen FROM kino.dead_letter")
    return sorted(Letter(*row) for row in rows)


def count_letters(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.dead_letter")[0][0])


@contextmanager
def running(intake: Intake, **options: Any) -> Iterator[threading.Thread]:
    """Run intake in a thread, as a worker does, and stop it as a worker does."""
    thread = threading.Thread(target=intake.run, kwargs=options, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        intake.stopping.set()
        thread.join(30)
    assert not thread.is_alive()
