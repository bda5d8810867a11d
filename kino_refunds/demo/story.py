"""The demo's story: how each job ends, and what happens to its messages. This module only makes values.

The same seed makes the same story.
"""

from __future__ import annotations

import gzip
import json
import random
from base64 import b64encode
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from kino_refunds.events.envelope import MESSAGE_BYTES_MAX, MalformedReason
from kino_refunds.events.schema import COMPLETED, FAILED, SAFETY_REJECTED, TIMED_OUT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

EVENT_SOURCE = "generation-pipeline"
TERMINATED = "customer-terminated"
"""An account that is terminated for violation while its jobs run: by clause 6 its credits are not refunded."""
SUSPENDED = "customer-suspended"
"""An account that is suspended while its jobs run: its wallet is frozen and not forfeited, so it is refunded."""
ACCOUNTS = 50


class Ending(NamedTuple):
    """One way in which a job can end, as its event says; `weight` of a thousand jobs end so."""

    type: str
    data: dict[str, Any]
    weight: int
    state: str
    """The state of such a job in the pipeline's own table (design, section 7)."""


def _failed(origin: str, weight: int) -> Ending:
    return Ending(FAILED, {"error": {"code": f"{origin}_error", "origin": origin}}, weight, "failed")


def _rejected(stage: str, weight: int) -> Ending:
    return Ending(SAFETY_REJECTED, {"stage": stage, "category": "violence"}, weight, "rejected")


ENDINGS: dict[str, Ending] = {
    "completed": Ending(COMPLETED, {}, 700, "completed"),
    "failed, platform": _failed("platform", 60),
    "failed, provider": _failed("provider", 60),
    "failed, unknown": _failed("unknown", 20),
    "failed, user": _failed("user", 40),
    "timed out": Ending(TIMED_OUT, {"result_produced": False}, 40, "timed_out"),
    "timed out, with a result": Ending(TIMED_OUT, {"result_produced": True}, 20, "timed_out"),
    "rejected before": _rejected("before_generation", 25),
    "rejected during": _rejected("during_generation", 25),
    "rejected after": _rejected("after_generation", 10),
}
REFUNDABLE = ("failed, platform", "failed, provider", "failed, unknown", "timed out", "rejected before")


class Twist(StrEnum):
    """What happens to a job's messages."""

    PLAIN = auto()
    COPIES = auto()
    """The same event three times, in both wire forms."""
    TWIN = auto()
    """Later, when the event is decided, another ending comes under its id."""
    PAIR = auto()
    """Two endings that both refund; the later one is first on the queue."""
    CONTRADICTION = auto()
    """The job both completes and fails."""
    EARLY = auto()
    """The event comes before the charge."""
    MISDIRECTED = auto()
    """The event names another account; a corrected event follows."""
    SILENT = auto()
    """The event never comes."""


_TWISTS = {
    Twist.SILENT: 4,
    Twist.TWIN: 4,
    Twist.CONTRADICTION: 4,
    Twist.MISDIRECTED: 1,
    Twist.PAIR: 20,
    Twist.EARLY: 20,
    Twist.COPIES: 100,
}
"""How many jobs of a thousand have this twist; each has at least two."""

SILENT_ENDINGS = ("completed", "failed, platform", "failed, user", "timed out", "rejected during", None)
"""How jobs ended whose event never comes, as the pipeline knows. None: it does not know, so a timeout is presumed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job; `other` is the second ending of a pair, a contradiction or a twin."""

    job_id: str
    account_id: str
    credits: int
    twist: Twist
    ending: str | None
    other: str | None = None


class Lot(NamedTuple):
    """Credits to grant; `days` until they expire, None: never."""

    reference: str
    account_id: str
    credits: int
    lot_class: str
    priority: int
    days: int | None


def make_jobs(count: int, chance: random.Random) -> list[Job]:
    """Return jobs in the order of their submission; jobs with twins come first, so that they are decided in time."""
    twists = [twist for twist, of_thousand in _TWISTS.items() for _ in range(max(2, -(-count * of_thousand // 1000)))]
    twists += [Twist.PLAIN] * (count - len(twists))
    twists = twists[:count]
    chance.shuffle(twists)
    twists.sort(key=lambda twist: twist is not Twist.TWIN)
    return [_job(number, twist, chance) for number, twist in enumerate(twists, start=1)]


def _job(number: int, twist: Twist, chance: random.Random) -> Job:
    endings = list(ENDINGS)
    ending: str | None = chance.choices(endings, weights=[ENDINGS[each].weight for each in endings])[0]
    other: str | None = None
    match twist:
        case Twist.PAIR:
            ending, other = chance.sample(REFUNDABLE, 2)
        case Twist.CONTRADICTION:
            ending, other = chance.choice(REFUNDABLE), "completed"
        case Twist.TWIN:
            other = "failed, platform" if ending == "completed" else "completed"
        case Twist.SILENT:
            ending = SILENT_ENDINGS[number % len(SILENT_ENDINGS)]
        case Twist.PLAIN | Twist.COPIES | Twist.EARLY | Twist.MISDIRECTED:
            pass
        case _:
            assert_never(twist)
    account_id = f"customer-{chance.randrange(ACCOUNTS):02d}"
    return Job(
        job_id=f"demo-{number:05d}",
        account_id=account_id,
        credits=chance.choice((1, 2, 4, 8)),
        twist=twist,
        ending=ending,
        other=other,
    )


def make_closed_jobs() -> list[Job]:
    """Return jobs of the two accounts that are terminated or suspended while their jobs run."""
    return [
        Job(job_id=f"{account_id}-{number}", account_id=account_id, credits=4, twist=Twist.PLAIN, ending=ending)
        for account_id in (TERMINATED, SUSPENDED)
        for number, ending in enumerate([*REFUNDABLE, "completed", "failed, user"], start=1)
    ]


def make_lots(jobs: Sequence[Job], chance: random.Random) -> Iterator[Lot]:
    """Yield lots of several classes for each account; the first is small and burns first, so that charges span lots.

    Some welcome lots expire within the lot grace: credits that a refund returns to them go to a successor.
    """
    needed: dict[str, int] = defaultdict(int)
    for job in jobs:
        needed[job.account_id] += job.credits
    for account_id, credits in sorted(needed.items()):
        yield Lot(
            reference=f"{account_id}-welcome",
            account_id=account_id,
            credits=25,
            lot_class="promotional",
            priority=50,
            days=chance.choice((2, 5, 20)),
        )
        yield Lot(
            reference=f"{account_id}-month",
            account_id=account_id,
            credits=75,
            lot_class="subscription",
            priority=100,
            days=30,
        )
        yield Lot(
            reference=f"{account_id}-pack",
            account_id=account_id,
            credits=max(credits - 50, 25),
            lot_class="purchased",
            priority=100,
            days=None,
        )


def document(
    job_id: str, ending: str, *, at: datetime, account_id: str | None = None, event_id: str | None = None
) -> dict[str, Any]:
    """Return the event of a job's end, as the pipeline writes it."""
    how = ENDINGS[ending]
    data = {"job_id": job_id, **how.data}
    if account_id is not None:
        data["account_id"] = account_id
    return {
        "specversion": "1.0",
        "id": event_id or f"{job_id}-end",
        "source": EVENT_SOURCE,
        "type": how.type,
        "time": at.isoformat(),
        "subject": job_id,
        "data": data,
    }


def malformed(reason: MalformedReason, *, at: datetime) -> bytes:
    """Return a message that no worker can understand, for this reason; a new reason does not type-check."""
    event = document("demo-unreadable", "completed", at=at, event_id=f"unreadable-{reason}")
    match reason:
        case MalformedReason.TOO_LARGE:
            return json.dumps({**event, "padding": "x" * MESSAGE_BYTES_MAX}).encode()
        case MalformedReason.BAD_ENCODING:
            return gzip.compress(json.dumps(event).encode(), mtime=0)
        case MalformedReason.BAD_JSON:
            return json.dumps(event).encode()[:-20]
        case MalformedReason.BAD_ENVELOPE:
            return _envelope(event, properties=[])
        case MalformedReason.WRONG_CONTENT_TYPE:
            return _envelope(event, **{"content-type": "application/x-python-serialize"})
        case MalformedReason.COMPRESSED:
            return _envelope(event, headers={"compression": "application/x-gzip"})
        case MalformedReason.BAD_BASE64:
            return _envelope(event, body="%%%")
        case MalformedReason.UNKNOWN_VERSION:
            return json.dumps({**event, "specversion": "0.3"}).encode()
        case MalformedReason.UNKNOWN_TYPE:
            return json.dumps({**event, "type": "kino.generation.job-paused.v1"}).encode()
        case MalformedReason.INVALID_EVENT:
            return json.dumps({**event, "time": at.replace(tzinfo=None).isoformat()}).encode()
        case _:
            assert_never(reason)


def _envelope(event: dict[str, Any], **changes: Any) -> bytes:
    envelope = {
        "body": b64encode(json.dumps(event).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {},
        "properties": {"body_encoding": "base64", "delivery_tag": event["id"], "delivery_info": {}, "priority": 0},
    }
    return json.dumps({**envelope, **changes}).encode()
