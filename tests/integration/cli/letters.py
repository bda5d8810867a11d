"""Dead letters for the commands: made, kept, and what became of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from kino_refunds.events.envelope import message_key
from kino_refunds.events.schema import Queue, to_json
from kino_refunds.settlement.dead_letters import DeadLetter, LetterReason, poison_letter
from tests.pipeline import FAILED
from tests.scenario import Scene, make_event


def letter(
    raw: bytes, *, job_id: str | None = None, detail: str = "detail", reason: LetterReason = LetterReason.BAD_JSON
) -> DeadLetter:
    return DeadLetter(message_key(raw), raw, FAILED, reason, detail, job_id=job_id, may_hold_others=job_id is None)


def unread(scene: Scene, job_id: str = "job-1", kind: str = "failed platform") -> bytes:
    """A dead letter whose event would settle; returns its bytes."""
    raw = to_json(make_event(kind, job_id))
    scene.keep(poison_letter(raw, FAILED, 3))
    return raw


def letter_statuses(scene: Scene) -> list[tuple[str, str | None]]:
    rows = scene.rows("SELECT status, status_actor FROM kino.dead_letter ORDER BY dead_letter_id")
    return [tuple(row) for row in rows]


OLD = timedelta(minutes=61)
"""Longer than a letter without a job counts."""


def came(scene: Scene, *, ago: timedelta = timedelta(0)) -> None:
    """The letters of a scene came at this time, by the clock that opened its charges."""
    scene.as_superuser(f"UPDATE kino.dead_letter SET last_seen_at = kino.clock() - interval '{ago.total_seconds()} s'")


def opened_long_ago(scene: Scene) -> None:
    """The charges that there are were opened before any letter came."""
    scene.as_superuser(
        "ALTER TABLE kino.charge DISABLE TRIGGER append_only",
        "UPDATE kino.charge SET opened_at = kino.clock() - interval '1 day'",
        "ALTER TABLE kino.charge ENABLE TRIGGER append_only",
    )


def make_overdue(scene: Scene) -> None:
    scene.as_superuser(
        "ALTER TABLE kino.charge DISABLE TRIGGER append_only",
        "UPDATE kino.charge SET deadline_at = opened_at - interval '1 hour'",
        "ALTER TABLE kino.charge ENABLE TRIGGER append_only",
        "UPDATE kino.open_charge SET deadline_at = deadline_at - interval '1 day'",
    )


def unreadable_completion(job_id: str | None = None) -> DeadLetter:
    letter = DeadLetter(
        message_key(b"nonsense"), b"nonsense", Queue.JOB_COMPLETED, LetterReason.BAD_JSON, "detail", job_id=job_id
    )
    return replace(letter, may_hold_others=job_id is None)
