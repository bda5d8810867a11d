"""Dead letters for the desk: recorded, replayed, and what became of them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from kino_refunds.desk.replays import Replay
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.schema import Event
from kino_refunds.settlement.dead_letters import DeadLetter, malformed_letter
from kino_refunds.settlement.deliveries import read_delivery
from tests.clock import replay_letter
from tests.pipeline import FAILED
from tests.scenario import NOW, Scene, make_rules

LATER = NOW + timedelta(minutes=10)


def replay(scene: Scene, number: int = 1, **options: Any) -> Replay:
    return replay_letter(scene.worker, number, make_rules(), LATER, actor="anna", **options)


def malformed(raw: bytes) -> DeadLetter:
    with pytest.raises(MalformedMessage) as caught:
        read_delivery(raw, FAILED)
    return malformed_letter(raw, FAILED, caught.value)


def with_id(event: Event, event_id: str) -> Event:
    """The event under an id that may only be stored."""
    return event.model_copy(update={"id": event_id})


class Letter(NamedTuple):
    number: int
    event_id: str | None
    reason: str
    seen: int
    status: str
    actor: str | None


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows(
        "SELECT dead_letter_id, event_id, reason, seen, status, status_actor FROM kino.dead_letter"
        " ORDER BY dead_letter_id"
    )
    return [Letter(*row) for row in rows]


def history(scene: Scene, number: int = 1) -> list[dict[str, Any]]:
    """The letter's history, without times and details."""
    ((entries,),) = scene.rows("SELECT history FROM kino.dead_letter WHERE dead_letter_id = :n", n=number)
    return [{key: value for key, value in entry.items() if key not in {"at", "detail"}} for entry in entries]


def exhaust(scene: Scene, event: Event) -> None:
    """Let an event wait for its charge for a day, in vain."""
    scene.settle(event, now=NOW - timedelta(hours=25))
    scene.sweep(now=NOW)
