"""Intake in this process, what it settles, and what stands in its way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from redis import Redis
from structlog.testing import CapturingLogger

from kino_refunds.db.engine import SessionLimits
from kino_refunds.events.queues import SERVED, Queues
from kino_refunds.events.schema import Event
from kino_refunds.settings import Settings
from kino_refunds.settlement.rules import rules_of
from tests.scenario import Scene, make_event
from workers.intake import Intake

FAILED, TIMEOUT, SAFETY, COMPLETED = SERVED
A, B = "worker-a", "worker-b"
ACCOUNT = "acct-1"
BRISK = SessionLimits(lock_timeout_ms=50, statement_timeout_ms=300)


def outcomes(said: CapturingLogger) -> list[dict[str, int]]:
    """What each batch came to, as its log line has it."""
    return [call.kwargs["outcomes"] for call in said.calls if call.args == ("batch",)]


def make_intake(scene: Scene, client: Redis, worker_id: str = A, **chosen: Any) -> Intake:
    settings = Settings.model_construct(**chosen)
    return Intake(scene.worker, Queues(client, worker_id, alive_ttl_s=60), rules_of(settings), settings)


def failures(job_ids: list[str]) -> list[Event]:
    return [make_event("failed platform", job_id) for job_id in job_ids]


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


def refuse(scene: Scene, event_id: str, does: str = "RAISE EXCEPTION 'not this one'") -> None:
    """Let the database do something of its own when an event whose id matches this expression settles."""
    scene.as_superuser(
        f"""CREATE FUNCTION kino.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.event_id ~ '{event_id}' THEN {does}; END IF; RETURN NEW; END $$""",
        "CREATE TRIGGER refuse BEFORE INSERT ON kino.settlement FOR EACH ROW EXECUTE FUNCTION kino.refuse()",
    )


def refuse_no_more(scene: Scene) -> None:
    scene.as_superuser("DROP TRIGGER refuse ON kino.settlement")


def fail_first(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *errors: Exception, after: bool = False
) -> list[Exception]:
    """Let a method raise these errors first, before or after its work; returns the errors still to come."""
    real = getattr(owner, name)
    left = list(errors)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise left.pop(0)

    monkeypatch.setattr(owner, name, failing)
    return left


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
