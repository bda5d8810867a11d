"""Replay: a dead letter goes back through `settle`, as the event that it is (section 6)."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.errors import DeadLetterClosed, DeadLetterNotFound, MalformedMessage
from kino_refunds.events.envelope import MalformedReason, split
from kino_refunds.events.schema import EDITED_ID_LENGTH_MAX
from kino_refunds.settlement.batch import keep_letters, settle_batch
from kino_refunds.settlement.charges import read_charges
from kino_refunds.settlement.dead_letters import (
    LetterReason,
    LetterStatus,
    event_letter,
    malformed_letter,
    record_dead_letters,
)
from kino_refunds.settlement.decide import decide
from kino_refunds.settlement.deliveries import RECONCILER, Delivery, delivery_of, read_kept, read_message
from kino_refunds.settlement.inbox import read_record
from kino_refunds.settlement.outcomes import ChargeState, Disposition, Outcome
from kino_refunds.settlement.pending import read_pending

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kino_refunds.settlement.decide import Ruling
    from kino_refunds.settlement.rules import Rules

LOCK_CLASS = 0x6B696E6F
"""`kino`, in the space of Postgres' advisory locks."""
HELD_FOR_S_MAX = 10.0
"""A replay takes milliseconds; whoever holds a letter for longer than this is not waited for."""
LOOK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replay came to; `closed` says that the letter needs nobody any more."""

    dead_letter_id: int
    event_id: str | None
    job_id: str | None
    outcome: str
    closed: bool
    protects: tuple[str, ...] = ()
    """Jobs with open charges that the letter names beside the corrected one: for their sake it stays open (P9)."""


def replay_letter(
    engine: sa.Engine,
    dead_letter_id: int,
    rules: Rules,
    *,
    actor: str,
    edited: bytes | None = None,
    dry_run: bool = False,
) -> Replay:
    """Settle a dead letter's event; it keeps its identity, so what was settled meanwhile is a duplicate.

    A letter of one element settles that element. A letter of a whole message that holds several events settles each;
    one that fails gets a letter of its own, and the outcome counts them.

    An event that names another account than its charge is closed where that charge is settled: nothing can move.
    `edited` is a corrected message; it settles as `<id>+edit.N`, because its content is not the original's. It
    must be of the letter's event, and the letter not replayed yet: a second correction would contradict the first.
    With `dry_run` the outcome is what it would be now, and nothing is written. A replay that fails leaves the
    letter open, counted once more, also if it was discarded. Raises DeadLetterNotFound, DeadLetterClosed,
    MalformedMessage if `edited` is no event or another one, and whatever is transient.
    """
    with nullcontext() if dry_run else _alone_with(engine, dead_letter_id):
        return _replay(engine, dead_letter_id, rules, actor=actor, edited=edited, dry_run=dry_run)


@contextmanager
def _alone_with(engine: sa.Engine, dead_letter_id: int) -> Iterator[None]:
    """Keep everybody else from replaying this letter meanwhile.

    Not by the letter's row: a replay that fails writes to it from a session of its own.
    """
    key = _lock_key(dead_letter_id)
    deadline = time.monotonic() + HELD_FOR_S_MAX
    # In no transaction, which would be idle for as long as the settling takes.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.execute(_TRY_LOCK, key).scalar_one():
            if time.monotonic() > deadline:
                raise DeadLetterClosed(_held(dead_letter_id))
            time.sleep(LOOK_EVERY_S)
        try:
            yield
        finally:
            _unlock(connection, key)


_TRY_LOCK = sa.text("SELECT pg_try_advisory_lock(:class, :id)")
_TRY_LOCK_HERE = sa.text("SELECT pg_try_advisory_xact_lock(:class, :id)")
_UNLOCK = sa.text("SELECT pg_advisory_unlock(:class, :id)")


def _unlock(connection: sa.Connection, key: dict[str, int]) -> None:
    """Give the letter free; a session that is gone has taken its lock along, and must not hide what was settled."""
    try:
        unlocked = connection.execute(_UNLOCK, key).scalar_one()
    except sa.exc.DBAPIError:
        unlocked = False
    if not unlocked:
        connection.invalidate()


def _lock_key(dead_letter_id: int) -> dict[str, int]:
    return {"class": LOCK_CLASS, "id": dead_letter_id % 2**31}


def _held(dead_letter_id: int) -> str:
    return f"dead letter {dead_letter_id} is being replayed by somebody else; nothing was done, look at it again"


def _replay(
    engine: sa.Engine,
    dead_letter_id: int,
    rules: Rules,
    *,
    actor: str,
    edited: bytes | None,
    dry_run: bool,
) -> Replay:
    with engine.connect() as connection:
        letter = require_letter(connection, dead_letter_id)
    if edited is not None and letter.status == LetterStatus.REPLAYED:
        raise DeadLetterClosed(_closed(dead_letter_id, letter))

    def close(status: LetterStatus, **entry: Any) -> None:
        with engine.begin() as connection:
            set_letter_status(connection, dead_letter_id, status, actor=actor, entry=entry)

    if edited is None and letter.element_index is None and split(letter.raw) is not None:
        outcome = _settle_each(engine, letter, rules, dry_run=dry_run)
        if not dry_run:
            close(LetterStatus.REPLAYED, outcome=outcome)
        return Replay(dead_letter_id, None, None, outcome, closed=True)

    try:
        ours = _is_ours(letter)
        delivery = (
            _edited(edited, letter, ours=ours)
            if edited is not None
            else read_kept(letter.raw, letter.queue, letter.element_index, ours=ours)
        )
    except MalformedMessage as error:
        if edited is not None:
            raise
        if not dry_run:
            replaced = _keep_again(engine, letter, error, rules)
            if replaced or letter.status == LetterStatus.DISCARDED:
                close(LetterStatus.REPLAYED if replaced else LetterStatus.OPEN, outcome=error.code)
        return Replay(dead_letter_id, letter.event_id, letter.job_id, error.code, closed=False)
    outcome, closed = _would_settle(engine, delivery, rules) if dry_run else _settle(engine, delivery, rules)
    # A letter under another key has taken this one's place: the same message, read by another build.
    replaced = not closed and event_letter(delivery, LetterReason.APPLY_ERROR, "").key != bytes(letter.message_key)
    protects = () if edited is None else _open_jobs(engine, letter, delivery.event.job_id)
    if not dry_run:
        if closed or replaced:
            became = {} if edited is None else {"as": delivery.event.id}
            close(LetterStatus.OPEN if protects else LetterStatus.REPLAYED, outcome=outcome, **became)
        elif letter.status == LetterStatus.DISCARDED:
            close(LetterStatus.OPEN, outcome=outcome)
    return Replay(
        dead_letter_id=dead_letter_id,
        event_id=delivery.event.id,
        job_id=delivery.event.job_id,
        outcome=outcome,
        closed=closed and not protects,
        protects=protects,
    )


def _open_jobs(engine: sa.Engine, letter: Any, settled_job: str) -> tuple[str, ...]:
    """Return the further jobs with open charges that a letter names, beside the one that its correction settles."""
    named = {letter.job_id, *letter.other_job_ids} - {None, settled_job}
    with engine.connect() as connection:
        charges = read_charges(connection, named)
    return tuple(sorted(job_id for job_id, charge in charges.items() if charge.state is ChargeState.OPEN))


def _keep_again(engine: sa.Engine, letter: Any, error: MalformedMessage, rules: Rules) -> bool:
    """Count a message that still cannot be read; returns whether that is another row, as by another build's key."""
    element = next((each for each in split(letter.raw) or () if each.index == letter.element_index), None)
    again = malformed_letter(letter.raw, letter.queue, error, element=element)
    with engine.begin() as connection:
        record_dead_letters(connection, [again], build=rules.build)
    return again.key != bytes(letter.message_key)


_LETTER = sa.text("""
    SELECT raw, queue, element_index, reason, message_key, source, event_id, job_id, other_job_ids,
           status, status_actor, status_at,
           (SELECT count(*) FROM jsonb_array_elements(history) h WHERE h ? 'as') AS edits
    FROM kino.dead_letter WHERE dead_letter_id = :dead_letter_id
""")


def _is_ours(letter: Any) -> bool:
    """Tell an event that we wrote ourselves from one that somebody published under our name."""
    return letter.source == RECONCILER and letter.reason not in {reason.value for reason in MalformedReason}


def _edited(message: bytes, letter: Any, *, ours: bool) -> Delivery:
    event = read_kept(message, letter.queue, None, ours=ours).event
    known = {"source": letter.source, "id": letter.event_id}
    if letter.event_id is None or (letter.source == RECONCILER and not ours):
        known = {"job_id": letter.job_id}  # all that can tell two letters apart
    for name, value in known.items():
        # White space at the ends may be what is corrected.
        if value is not None and getattr(event, name).strip() != value.strip():
            found = f"its {name} is {getattr(event, name)!r}, the letter's is {value!r}"
            raise MalformedMessage("invalid_event", f"{found}; a correction is of the same event")
    event_id = f"{event.id}+edit.{letter.edits + 1}"
    if len(event_id) > EDITED_ID_LENGTH_MAX:
        found = f"the id of the edited event is over {EDITED_ID_LENGTH_MAX} characters"
        raise MalformedMessage("invalid_event", found)
    return delivery_of(event.model_copy(update={"id": event_id}))


def _settle_each(engine: sa.Engine, letter: Any, rules: Rules, *, dry_run: bool) -> str:
    """Settle every event of a kept message, as intake would; each is decided or has its row then."""
    deliveries, dead = read_message(letter.raw, letter.queue)
    if dry_run:
        rulings = _decide(engine, deliveries, rules)
    else:
        rulings = settle_batch(engine, deliveries, rules)
        keep_letters(engine, dead, build=rules.build)
    outcomes = Counter(ruling.outcome.value for ruling in rulings)
    outcomes.update(each.reason for each in dead)
    outcomes[LetterReason.APPLY_ERROR.value] += len(deliveries) - len(rulings)
    return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items()) if count)


def _settle(engine: sa.Engine, delivery: Delivery, rules: Rules) -> tuple[str, bool]:
    rulings = settle_batch(engine, [delivery], rules)
    return _came_to(rulings[0]) if rulings else (LetterReason.APPLY_ERROR.value, False)


def _would_settle(engine: sa.Engine, delivery: Delivery, rules: Rules) -> tuple[str, bool]:
    (ruling,) = _decide(engine, [delivery], rules)
    return _came_to(ruling)


def _decide(engine: sa.Engine, deliveries: Sequence[Delivery], rules: Rules) -> list[Ruling]:
    with engine.connect() as connection:
        together = list(deliveries)
        record = read_record(connection, [delivery.event for delivery in together])
        if record.beside:  # as `settle_batch` does
            together += read_pending(connection, record.beside)
            record = read_record(connection, [delivery.event for delivery in together])
        charges = read_charges(connection, {delivery.event.job_id for delivery in together})
    return decide(together, record, charges, rules.policy)[: len(deliveries)]


def _came_to(ruling: Ruling) -> tuple[str, bool]:
    """Return the outcome, and whether the letter needs nobody any more."""
    settled = ruling.charge is not None and ruling.charge.state is not ChargeState.OPEN
    closed = ruling.disposition is not Disposition.DEAD_LETTER
    return ruling.outcome.value, closed or (ruling.outcome is Outcome.ACCOUNT_MISMATCH and settled)


def set_letter_status(
    connection: sa.Connection,
    dead_letter_id: int,
    status: LetterStatus,
    *,
    actor: str,
    entry: dict[str, Any],
) -> None:
    """Change a letter's status and keep who did it and why; raises DeadLetterNotFound."""
    changed = connection.execute(
        sa.text("""
            UPDATE kino.dead_letter SET status = :status, status_actor = :actor, status_at = kino.clock(),
                   history = history || (jsonb_build_object('at', kino.clock()) || CAST(:entry AS jsonb))
            WHERE dead_letter_id = :dead_letter_id
        """),
        {
            "dead_letter_id": dead_letter_id,
            "status": status,
            "actor": actor,
            "entry": json.dumps({"status": status, "actor": actor, **entry}),
        },
    ).rowcount
    if not changed:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")


def discard_letter(connection: sa.Connection, dead_letter_id: int, *, note: str, actor: str) -> None:
    """Close an open letter without replaying it; raises DeadLetterNotFound, or DeadLetterClosed if it is not open."""
    # As a replay does: a letter whose credits are about to move must not be discarded meanwhile.
    if not connection.execute(_TRY_LOCK_HERE, _lock_key(dead_letter_id)).scalar_one():
        raise DeadLetterClosed(_held(dead_letter_id))
    letter = require_letter(connection, dead_letter_id)
    if letter.status != LetterStatus.OPEN:
        raise DeadLetterClosed(_closed(dead_letter_id, letter))
    set_letter_status(connection, dead_letter_id, LetterStatus.DISCARDED, actor=actor, entry={"note": note})


def _closed(dead_letter_id: int, letter: Any) -> str:
    by = f"{letter.status} by {letter.status_actor} at {letter.status_at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    return f"dead letter {dead_letter_id} was {by}; see `kino-refunds dead-letters show {dead_letter_id}`"


def require_letter(connection: sa.Connection, dead_letter_id: int) -> Any:
    """Return the row of a letter; raises DeadLetterNotFound."""
    letter = connection.execute(_LETTER, {"dead_letter_id": dead_letter_id}).one_or_none()
    if letter is None:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")
    return letter


def note_letter(connection: sa.Connection, dead_letter_id: int, text: str, *, actor: str) -> None:
    """Write a note on a letter; raises DeadLetterNotFound."""
    changed = connection.execute(
        sa.text("""
            UPDATE kino.dead_letter
            SET notes = notes || (jsonb_build_object('at', kino.clock()) || CAST(:note AS jsonb))
            WHERE dead_letter_id = :id
        """),
        {"id": dead_letter_id, "note": json.dumps({"actor": actor, "text": text})},
    ).rowcount
    if not changed:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}; see `kino-refunds dead-letters list`")
