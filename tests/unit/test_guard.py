"""The guard of presumed timeouts, as a table: which are withheld, and why. No server, no clock."""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from itertools import product
from typing import Any

import pytest

from kino_refunds.events.schema import to_json
from kino_refunds.reconciliation.guard import Guard, OverdueCharge, WithheldReason, _Message, _oldest, _Queued, _read
from tests.clock import HOUR, TICK
from tests.malformed import envelope
from tests.pipeline import several
from tests.scenario import NOW, make_event

DUE = NOW - HOUR
OPENED_AT = NOW - 3 * HOUR
CHARGE = OverdueCharge(
    charge_id=7, job_id="job-1", account_id="acct-1", credits=10, opened_at=OPENED_AT, due_at=DUE, asks=0
)


def guard(
    *,
    refused: WithheldReason | None = None,
    oldest_queued: datetime | None = None,
    queued_jobs: tuple[str, ...] = (),
    named_jobs: tuple[str, ...] = (),
    nameless: tuple[datetime, ...] = (),
) -> Guard:
    return Guard(
        refused=refused,
        oldest_queued=oldest_queued,
        queued_jobs=queued_jobs,
        named_jobs=named_jobs,
        nameless=nameless,
    )


FOUND: dict[str, tuple[Guard, WithheldReason | None]] = {
    "nothing": (guard(), None),
    "an event of before the timeout is queued": (guard(oldest_queued=DUE - TICK), WithheldReason.OLDER_MESSAGE),
    "an event of the timeout's instant is queued": (guard(oldest_queued=DUE), WithheldReason.OLDER_MESSAGE),
    "only later events are queued": (guard(oldest_queued=DUE + TICK), None),
    "a queued message names the job": (guard(queued_jobs=("job-1",)), WithheldReason.NAMED_BY_MESSAGE),
    "a queued message names another job": (guard(queued_jobs=("job-2",)), None),
    "an event of the job is pending": (guard(named_jobs=("job-1",)), WithheldReason.NAMED_BY_EVENT),
    "an event of another job is pending": (guard(named_jobs=("job-2",)), None),
    "a nameless letter is newer than the charge": (
        guard(nameless=(OPENED_AT + TICK,)),
        WithheldReason.UNREADABLE_COMPLETION,
    ),
    "a nameless letter came as the charge was opened": (guard(nameless=(OPENED_AT,)), None),
    "a nameless letter is older than the charge": (guard(nameless=(OPENED_AT - TICK,)), None),
    "one of many nameless letters is newer": (
        guard(nameless=(OPENED_AT - HOUR, NOW, OPENED_AT - TICK)),
        WithheldReason.UNREADABLE_COMPLETION,
    ),
    **{f"{reason} holds for every charge": (guard(refused=reason), reason) for reason in WithheldReason},
}


@pytest.mark.parametrize("found", FOUND)
def test_what_is_found_withholds_a_presumed_timeout(found: str) -> None:
    """A timeout is presumed only where nothing that we hold could be the job's own end."""
    guard, reason = FOUND[found]

    assert guard.reason(CHARGE) is reason


def test_of_several_reasons_the_widest_is_told() -> None:
    """On-call reads the reason that holds for the most charges first: mending it may mend the others."""
    order: tuple[tuple[WithheldReason, dict[str, Any]], ...] = (
        (WithheldReason.REDIS_AWAY, {"refused": WithheldReason.REDIS_AWAY}),
        (WithheldReason.OLDER_MESSAGE, {"oldest_queued": DUE}),
        (WithheldReason.NAMED_BY_MESSAGE, {"queued_jobs": ("job-1",)}),
        (WithheldReason.NAMED_BY_EVENT, {"named_jobs": ("job-1",)}),
        (WithheldReason.UNREADABLE_COMPLETION, {"nameless": (NOW,)}),
    )

    for chosen in product((False, True), repeat=len(order)):
        present = [each for each, there in zip(order, chosen, strict=True) if there]
        fields = {name: value for _, named in present for name, value in named.items()}
        assert guard(**fields).reason(CHARGE) is (present[0][0] if present else None)


def message(digest: bytes, time: datetime | None) -> _Message:
    return _Message(digest=digest, time=time, job_ids=())


EARLY, LATE, UNREADABLE = message(b"early", DUE), message(b"late", NOW), message(b"unreadable", None)


@pytest.mark.parametrize(
    ("messages", "stuck", "expected"),
    [
        ((), (), (None, None)),
        ((LATE,), (), (None, NOW)),
        ((LATE, EARLY), (), (None, DUE)),
        ((LATE, EARLY), (b"early",), (None, NOW)),
        ((EARLY,), (b"early",), (None, None)),
        ((LATE, UNREADABLE), (), (WithheldReason.UNREADABLE_MESSAGE, None)),
        ((LATE, UNREADABLE), (b"unreadable",), (None, NOW)),
    ],
    ids=["empty", "one", "two", "one is stuck", "all is stuck", "one is unreadable", "the unreadable one is stuck"],
)
def test_the_oldest_event_of_what_is_not_stuck_decides(
    messages: tuple[_Message, ...], stuck: tuple[bytes, ...], expected: tuple[WithheldReason | None, datetime | None]
) -> None:
    """What has been queued for a day holds back its own jobs only; the oldest of the rest holds back all."""
    assert _oldest(_Queued(refused=None, messages=messages), stuck) == expected


@pytest.mark.parametrize(
    "reason", [WithheldReason.REDIS_AWAY, WithheldReason.UNREADABLE_QUEUE, WithheldReason.BACKLOG_TOO_LARGE]
)
def test_what_cannot_be_read_whole_says_nothing_of_its_oldest_event(reason: WithheldReason) -> None:
    """Of messages that were not read none can be said to be newer than a timeout."""
    assert _oldest(_Queued(refused=reason, messages=()), ()) == (reason, None)


COMPLETED = to_json(make_event("completed", "job-1", at=DUE))
FAILED = to_json(make_event("failed platform", "job-2", at=NOW))
BROKEN = b'{"specversion":"1.0","subject":"job-3","data":{"job_id":"job-3"}}'
MESSAGES: dict[str, tuple[bytes, datetime | None, set[str]]] = {
    "an event": (COMPLETED, DUE, {"job-1"}),
    "an event as kombu writes it": (envelope(COMPLETED), DUE, {"job-1"}),
    "several events": (several(FAILED, COMPLETED), DUE, {"job-1", "job-2"}),
    "several events as kombu writes them": (envelope(several(FAILED, COMPLETED)), DUE, {"job-1", "job-2"}),
    "an event beside one that cannot be read": (several(FAILED, BROKEN), None, {"job-2", "job-3"}),
    "an event that cannot be read": (BROKEN, None, {"job-3"}),
    "an event that was cut off": (COMPLETED[:-20], None, {"job-1"}),
    "two events on two lines": (COMPLETED + b"\n" + FAILED, None, {"job-1", "job-2"}),
    "nonsense": (b"nonsense", None, set()),
    "nothing": (b"", None, set()),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_queued_message_says_its_oldest_time_and_every_job(kind: str) -> None:
    """A time is known only where every event of the message is; the jobs are those that can be found at all."""
    raw, time, jobs = MESSAGES[kind]

    read = _read(raw)

    assert (read.digest, read.time, set(read.job_ids)) == (sha256(raw).digest(), time, jobs)
