"""Ruling on a batch, as a table: identity x state x busy x order. No server, no clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import permutations
from typing import Any, NamedTuple

import pytest

from kino_refunds.ledger.accounts import VIOLATION, StatusHistory
from kino_refunds.policy.document import published_policy
from kino_refunds.settlement.decide import Busy, ChargeFacts, Ruling, decide
from kino_refunds.settlement.deliveries import GIVE_UP_AFTER, Delivery, delivery_of
from kino_refunds.settlement.outcomes import ChargeState, Disposition, Outcome, disposition
from kino_refunds.settlement.record import KnownEvent, Record
from tests.clock import SECOND
from tests.scenario import EVENT_AT, NOW, make_event, words

JOB, ACCOUNT, CHARGE = "job-1", "acct-1", 7
OPENED_AT = EVENT_AT - timedelta(hours=1)
ENDINGS = {"completed": "completed", "covered": "timeout", "not covered": "failed user"}
STATES: dict[str, ChargeState | None] = {
    "none": None,
    "open": ChargeState.OPEN,
    "captured": ChargeState.CAPTURED,
    "refunded": ChargeState.REFUNDED,
}
BUSY = {
    "nothing": Busy(),
    "another job": Busy(jobs=frozenset({"job-2"}), charges=frozenset({8})),
    "the job": Busy(jobs=frozenset({JOB})),
    "the charge": Busy(charges=frozenset({CHARGE})),
}
RULED = {
    ("none", "completed"): "charge_not_found",
    ("none", "covered"): "charge_not_found",
    ("none", "not covered"): "charge_not_found",
    ("open", "completed"): "captured",
    ("open", "covered"): "refunded",
    ("open", "not covered"): "captured_not_covered",
    ("captured", "completed"): "already_captured",
    ("captured", "covered"): "failed_after_capture",
    ("captured", "not covered"): "already_captured",
    ("refunded", "completed"): "completed_after_refund",
    ("refunded", "covered"): "already_refunded",
    ("refunded", "not covered"): "already_refunded",
}
"""Section 5 of the design, where no other session holds anything."""


class Known(NamedTuple):
    """What is known of an event before: in which table, by the same content or by other, and what it was told."""

    decided: bool = False
    pending: bool = False
    same: bool = True


IDENTITIES = {
    "new": Known(),
    "decided": Known(decided=True),
    "decided, other content": Known(decided=True, same=False),
    "pending": Known(pending=True),
    "pending, other content": Known(pending=True, same=False),
    "decided and pending": Known(decided=True, pending=True),
}


def record_of(delivery: Delivery, known: Known) -> Record:
    content = delivery.fingerprint if known.same else "v1:another"
    decided = {delivery.identity: KnownEvent(content, Outcome.REFUNDED)} if known.decided else {}
    pending = {delivery.identity: KnownEvent(content, None)} if known.pending else {}
    return Record(decided=decided, pending=pending, beside=frozenset(), read_at=NOW)


NEW = Record(decided={}, pending={}, beside=frozenset(), read_at=NOW)


def charge_in(state: ChargeState | None, **changed: Any) -> dict[str, ChargeFacts]:
    if state is None:
        return {}
    facts = ChargeFacts(
        charge_id=CHARGE, account_id=ACCOUNT, credits=4, opened_at=OPENED_AT, state=state, history=StatusHistory()
    )
    return {JOB: facts._replace(**changed)}


def rule(*deliveries: Delivery, record: Record = NEW, **more: Any) -> list[Ruling]:
    charges = more.pop("charges", charge_in(ChargeState.OPEN))
    return decide(deliveries, record, charges, published_policy(), **more)


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize(("state", "ending"), RULED)
def test_every_row_of_the_table(identity: str, busy: str, state: str, ending: str) -> None:
    """Identity comes first, then what is put off, then the design's table; the ruling says what becomes of it."""
    known = IDENTITIES[identity]
    delivery = delivery_of(make_event(ENDINGS[ending]))

    (ruling,) = rule(delivery, record=record_of(delivery, known), charges=charge_in(STATES[state]), busy=BUSY[busy])

    expected, first = RULED[state, ending], None
    if busy == "the job" or (busy == "the charge" and expected == "refunded"):
        expected = "busy"
    if not known.same:
        expected = "conflicting_duplicate"
    elif known.decided:
        expected, first = "duplicate", Outcome.REFUNDED
    assert (ruling.delivery, ruling.outcome.value, ruling.first) == (delivery, expected, first)
    assert ruling.disposition is disposition(ruling.outcome)


PAIRS = list(permutations(ENDINGS, 2))
SECOND_WORD = {
    "captured": {"completed": "already_captured", "covered": "failed_after_capture", "not covered": "already_captured"},
    "captured_not_covered": {"completed": "already_captured", "covered": "failed_after_capture"},
    "refunded": {"completed": "completed_after_refund", "not covered": "already_refunded"},
}


@pytest.mark.parametrize(("earlier", "later"), PAIRS)
@pytest.mark.parametrize("arrives", ["in order", "reversed", "at one instant"])
def test_a_job_s_endings_are_ruled_on_by_their_own_times(earlier: str, later: str, arrives: str) -> None:
    """The ending with the earlier time settles, however they arrive; of one instant the first delivered does."""
    apart = timedelta(0) if arrives == "at one instant" else SECOND
    first = delivery_of(make_event(ENDINGS[earlier], at=EVENT_AT))
    second = delivery_of(make_event(ENDINGS[later], at=EVENT_AT + apart))
    delivered = [second, first] if arrives == "reversed" else [first, second]

    rulings = rule(*delivered)

    said = {ruling.delivery.event.id: ruling.outcome.value for ruling in rulings}
    settles = RULED["open", earlier]
    assert [ruling.delivery for ruling in rulings] == delivered
    assert said == {first.event.id: settles, second.event.id: SECOND_WORD[settles][later]}


@pytest.mark.parametrize("later", ENDINGS)
def test_no_later_event_overtakes_one_that_is_put_off(later: str) -> None:
    """A refund waits for a held lot, and so does everything that the job says after it; before it nothing waits."""
    before = delivery_of(make_event("completed", "job-2", at=EVENT_AT))
    refund = delivery_of(make_event("failed platform", at=EVENT_AT))
    after = delivery_of(make_event(ENDINGS[later], event_id="after", at=EVENT_AT + SECOND))
    charges = charge_in(ChargeState.OPEN)
    charges["job-2"] = charges[JOB]._replace(charge_id=8)

    rulings = rule(after, refund, before, charges=charges, busy=BUSY["the charge"])

    assert words(rulings) == ["busy", "busy", "captured"]


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ("nothing", ["refunded", "duplicate", "conflicting_duplicate"]),
        ("the job", ["busy", "busy", "conflicting_duplicate"]),
    ],
)
def test_of_two_messages_under_one_id_the_first_is_the_event(busy: str, expected: list[str]) -> None:
    """A copy in the same batch follows its first; other content under the same id is a conflict."""
    event = make_event("timeout", event_id="e")
    first, copy = delivery_of(event), delivery_of(event)
    other = delivery_of(make_event("completed", event_id="e"))

    rulings = rule(first, copy, other, busy=BUSY[busy])

    assert words(rulings) == expected
    assert [ruling.delivery for ruling in rulings] == [first, copy, other]
    assert rulings[1].first is (Outcome.REFUNDED if busy == "nothing" else None)


@pytest.mark.parametrize(
    ("waited", "fate"), [(GIVE_UP_AFTER - SECOND, Disposition.RETRY), (GIVE_UP_AFTER, Disposition.DEAD_LETTER)]
)
@pytest.mark.parametrize(
    ("state", "busy", "outcome"), [("none", "nothing", Outcome.CHARGE_NOT_FOUND), ("open", "the job", Outcome.BUSY)]
)
def test_trying_again_ends_after_a_day(
    waited: timedelta, fate: Disposition, state: str, busy: str, outcome: Outcome
) -> None:
    """What was pending for a day is a dead letter for a person, by the ledger's clock."""
    delivery = replace(delivery_of(make_event("timeout")), pending_since=NOW - waited, attempts=9)

    (ruling,) = rule(delivery, charges=charge_in(STATES[state]), busy=BUSY[busy])

    assert (ruling.outcome, ruling.disposition) == (outcome, fate)


def test_an_event_of_another_account_is_never_applied() -> None:
    """The account that the pipeline names must be the charge's: it is a dead letter, and the charge stays open."""
    rulings = rule(
        delivery_of(make_event("timeout", event_id="a", account_id="acct-2")),
        delivery_of(make_event("timeout", event_id="b", account_id=ACCOUNT, at=EVENT_AT + SECOND)),
    )

    assert words(rulings) == ["account_mismatch", "refunded"]
    assert [ruling.disposition for ruling in rulings] == [Disposition.DEAD_LETTER, Disposition.FINAL]


@pytest.mark.parametrize(
    ("changed_at", "expected"), [(EVENT_AT, "captured_terminated"), (EVENT_AT + SECOND, "refunded")]
)
def test_an_account_is_ruled_on_as_it_was_when_its_job_ended(changed_at: datetime, expected: str) -> None:
    """Clause 6 asks what the account was at the event's time, never what it is when we come to it."""
    history = StatusHistory(((changed_at, "terminated", VIOLATION),))

    (ruling,) = rule(delivery_of(make_event("timeout")), charges=charge_in(ChargeState.OPEN, history=history))

    assert ruling.outcome.value == expected
    assert (ruling.policy_version, ruling.account_status and ruling.account_status.value) == (
        published_policy().versions[0].version,
        "terminated_for_violation" if changed_at == EVENT_AT else "active",
    )
