"""Replay: a dead letter goes back through `settle`, as the event that it is (section 6)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.errors import DeadLetterNotFound, MalformedMessage
from kino_refunds.events.envelope import parse
from kino_refunds.events.schema import ID_LENGTH_MAX
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.dead_letters import APPLY_ERROR, event_letter, malformed_letter, record_dead_letters
from kino_refunds.settlement.deliveries import Delivery, delivery_of, read_delivery
from kino_refunds.settlement.inbox import read_record
from kino_refunds.settlement.outcomes import Disposition, disposition
from kino_refunds.settlement.settle import decide, read_charges

if TYPE_CHECKING:
    from datetime import datetime

    from kino_refunds.settlement.settle import Terms


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replay came to; `closed` says that the letter needs nobody any more."""

    dead_letter_id: int
    event_id: str | None
    job_id: str | None
    outcome: str
    closed: bool


def replay_letter(
    engine: sa.Engine,
    dead_letter_id: int,
    terms: Terms,
    now: datetime,
    *,
    actor: str,
    edited: bytes | None = None,
    dry_run: bool = False,
) -> Replay:
    """Settle a dead letter's event; it keeps its identity, so what was settled meanwhile is a duplicate.

    `edited` is a corrected message; it settles as `<id>+edit.N`, because its content is not the original's.
    With `dry_run` the outcome is what it would be now, and nothing is written. A replay that fails leaves the
    letter open, counted once more. Raises DeadLetterNotFound, and whatever is transient.
    """
    with engine.connect() as connection:
        letter = connection.execute(_LETTER, {"dead_letter_id": dead_letter_id}).one_or_none()
    if letter is None:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")
    try:
        delivery = read_delivery(letter.raw, letter.queue) if edited is None else _edited(edited, letter)
    except MalformedMessage as error:
        if edited is not None:
            raise
        if not dry_run:
            with engine.begin() as connection:
                again = malformed_letter(letter.raw, letter.queue, error)
                record_dead_letters(connection, [again], now=now, build=terms.build)
                if again.key != bytes(letter.message_key):
                    entry = {"outcome": error.code}
                    set_letter_status(connection, dead_letter_id, "replayed", actor=actor, now=now, entry=entry)
        return Replay(dead_letter_id, letter.event_id, letter.job_id, error.code, closed=False)
    outcome, closed = _would_settle(engine, delivery, terms, now) if dry_run else _settle(engine, delivery, terms, now)
    # A letter under another key has taken this one's place: the same message, read by another build.
    replaced = not closed and event_letter(delivery, "", "").key != bytes(letter.message_key)
    if (closed or replaced) and not dry_run:
        change = {"outcome": outcome, "as": delivery.event.id} if edited is not None else {"outcome": outcome}
        with engine.begin() as connection:
            set_letter_status(connection, dead_letter_id, "replayed", actor=actor, now=now, entry=change)
    return Replay(dead_letter_id, delivery.event.id, delivery.event.job_id, outcome, closed)


_LETTER = sa.text("""
    SELECT raw, queue, message_key, event_id, job_id,
           (SELECT count(*) FROM jsonb_array_elements(history) h WHERE h ? 'as') AS edits
    FROM kino.dead_letter WHERE dead_letter_id = :dead_letter_id
""")


def _edited(message: bytes, letter: Any) -> Delivery:
    event = parse(message)
    event_id = f"{event.id}+edit.{letter.edits + 1}"
    if len(event_id) > ID_LENGTH_MAX:
        raise MalformedMessage("invalid_event", f"the id of the edited event is over {ID_LENGTH_MAX} characters")
    return delivery_of(event.model_copy(update={"id": event_id}))


def _settle(engine: sa.Engine, delivery: Delivery, terms: Terms, now: datetime) -> tuple[str, bool]:
    decisions = settle_batch(engine, [delivery], terms, now)
    if not decisions:
        return APPLY_ERROR, False
    outcome = decisions[0].outcome
    return outcome.value, disposition(outcome) is not Disposition.DEAD_LETTER


def _would_settle(engine: sa.Engine, delivery: Delivery, terms: Terms, now: datetime) -> tuple[str, bool]:
    with engine.connect() as connection:
        record = read_record(connection, {delivery.identity})
        charges = read_charges(connection, {delivery.event.job_id})
    (decision,) = decide([delivery], record, charges, terms.policy, now)
    return decision.outcome.value, disposition(decision.outcome) is not Disposition.DEAD_LETTER


def set_letter_status(
    connection: sa.Connection,
    dead_letter_id: int,
    status: str,
    *,
    actor: str,
    now: datetime,
    entry: dict[str, Any],
) -> None:
    """Change a letter's status and keep who did it and why; raises DeadLetterNotFound."""
    changed = connection.execute(
        sa.text("""
            UPDATE kino.dead_letter SET status = :status, status_actor = :actor, status_at = :now,
                   history = history || CAST(:entry AS jsonb)
            WHERE dead_letter_id = :dead_letter_id
        """),
        {
            "dead_letter_id": dead_letter_id,
            "status": status,
            "actor": actor,
            "now": now,
            "entry": json.dumps([{"at": now.isoformat(), "status": status, "actor": actor, **entry}]),
        },
    ).rowcount
    if not changed:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")


def require_letter(connection: sa.Connection, dead_letter_id: int) -> None:
    """Raise DeadLetterNotFound unless there is such a letter."""
    if connection.execute(_LETTER, {"dead_letter_id": dead_letter_id}).one_or_none() is None:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")


def note_letter(connection: sa.Connection, dead_letter_id: int, text: str, *, actor: str, now: datetime) -> None:
    """Write a note on a letter; raises DeadLetterNotFound."""
    changed = connection.execute(
        sa.text("UPDATE kino.dead_letter SET notes = notes || CAST(:note AS jsonb) WHERE dead_letter_id = :id"),
        {"id": dead_letter_id, "note": json.dumps([{"at": now.isoformat(), "actor": actor, "text": text}])},
    ).rowcount
    if not changed:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")
