"""The workload of a scenario: jobs, their events, and what must come of them.

It imports nothing of the project: what the oracle expects must not be what the product says.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


Ending: TypeAlias = tuple[str, str]
"""Where a charge stands, and for which reason."""

OPEN: Ending = ("open", "")
CAPTURED: Ending = ("captured", "completed")
NOT_COVERED: Ending = ("captured", "not_covered")
FAILED: Ending = ("refunded", "generation_failure")
TIMED_OUT: Ending = ("refunded", "timeout")
REJECTED: Ending = ("refunded", "content_policy_rejection")


class Kind(NamedTuple):
    """One way in which a job can end: the event that says so, and what the policy makes of it."""

    queue: str
    type: str
    data: dict[str, Any]
    ending: Ending


def _error(origin: str) -> dict[str, Any]:
    return {"error": {"code": "E42", "origin": origin, "message": "said for people"}}


def _failed(origin: str, ending: Ending) -> Kind:
    return Kind("generation.job-failed", "kino.generation.job-failed.v1", _error(origin), ending)


def _timeout(ending: Ending, **data: Any) -> Kind:
    return Kind("generation.timeout", "kino.generation.timeout.v1", data, ending)


def _rejected(stage: str, ending: Ending) -> Kind:
    data = {"stage": stage, "category": "violence"}
    return Kind("generation.safety-rejection", "kino.generation.safety-rejection.v1", data, ending)


KINDS: dict[str, Kind] = {
    "completed": Kind("generation.job-completed", "kino.generation.job-completed.v1", {}, CAPTURED),
    "failed": _failed("platform", FAILED),
    "failed provider": _failed("provider", FAILED),
    "failed unknown": _failed("unknown", FAILED),
    "failed user": _failed("user", NOT_COVERED),
    "timeout": _timeout(TIMED_OUT),
    "timeout with result": _timeout(NOT_COVERED, result_produced=True),
    "rejected before": _rejected("before_generation", REJECTED),
    "rejected during": _rejected("during_generation", REJECTED),
    "rejected after": _rejected("after_generation", NOT_COVERED),
}

Fate: TypeAlias = Literal["decided", "dead", "either", "lost to redis"]
"""What may become of a message: decided for good; kept as a dead letter; one of both; or nothing at all,
because the test took it from Redis."""


@dataclass(frozen=True)
class Grant:
    """Credits of an account; `lives` None means for ever."""

    reference: str
    account_id: str
    credits: int
    lot_class: str
    lives: timedelta | None


@dataclass(frozen=True)
class Job:
    """What a job takes, and every ending that its charge may come to."""

    job_id: str
    account_id: str
    credits: int
    endings: frozenset[Ending]
    deadline_at: datetime


@dataclass(frozen=True)
class Message:
    """Bytes on a queue, the event in them, and what may become of them."""

    raw: bytes
    queue: str
    source: str
    event_id: str
    job_id: str
    fate: Fate


class Workload:
    """Jobs, their events, and what must come of them; the same seed makes the same workload."""

    def __init__(self, seed: int, *, accounts: int = 4) -> None:
        self.chance = random.Random(seed)
        self.now = datetime.now(UTC)
        self.accounts = [f"customer-{number}" for number in range(accounts)]
        self.grants = [grant for account_id in self.accounts for grant in self._lots(account_id)]
        self.jobs: dict[str, Job] = {}
        self.messages: list[Message] = []
        self.breaks: set[tuple[str, str]] = set()
        """(kind, job) of every disagreement that must have been raised, and no others."""
        self.rivals: list[tuple[str, str]] = []
        """Pairs of jobs under one event id: exactly one of each may be settled."""
        self.dead_letters_max: dict[str, int] = {}
        """How many dead letters of a reason may be there beside those of messages whose fate allows it."""
        self.published_at: dict[str, datetime] = {}
        """When the first event of a job was on its queue."""
        self.published: set[bytes] = set()
        """Every message that Redis confirmed."""
        self._numbers = 0

    def _lots(self, account_id: str) -> Iterator[Grant]:
        """Small lots first, so that charges span lots; one expires so soon that refunds need a successor."""
        for number in range(12):
            lives = timedelta(days=1 if number % 3 == 0 else 20 + number)
            credits = self.chance.randrange(3, 9)
            yield Grant(f"{account_id}-lot-{number}", account_id, credits, "subscription", lives)
        yield Grant(f"{account_id}-pack", account_id, 1_000_000, "purchased", None)

    def job(
        self,
        *endings: Ending,
        account_id: str | None = None,
        credits: int | None = None,
        overdue_s: float = -3600.0,
    ) -> Job:
        """Add a job; `overdue_s` says for how long its deadline has passed."""
        self._numbers += 1
        job = Job(
            f"job-{self._numbers:05d}",
            account_id or self.chance.choice(self.accounts),
            self.chance.randrange(1, 9) if credits is None else credits,
            frozenset(endings),
            self.now - timedelta(seconds=overdue_s),
        )
        self.jobs[job.job_id] = job
        return job

    def event(
        self,
        job: Job | str,
        kind: str,
        *,
        event_id: str | None = None,
        at_s: float = 0.0,
        fate: Fate = "decided",
        wire: Literal["bare", "kombu", "either"] = "either",
        **fields: Any,
    ) -> Message:
        """Make the message that a job ended like this, `at_s` after the workload was made."""
        job_id = job if isinstance(job, str) else job.job_id
        how = KINDS[kind]
        event_id = event_id or f"{job_id}-{kind.replace(' ', '-')}"
        document = {
            "specversion": "1.0",
            "id": event_id,
            "source": "pipeline",
            "type": how.type,
            "time": (self.now + timedelta(seconds=at_s)).isoformat(),
            "subject": job_id,
            "data": {"job_id": job_id, **how.data, **fields},
        }
        form = self.chance.choice(("bare", "kombu")) if wire == "either" else wire
        raw = json.dumps(document).encode()
        return self.add(
            Message(self._envelope(raw) if form == "kombu" else raw, how.queue, "pipeline", event_id, job_id, fate)
        )

    def add(self, message: Message) -> Message:
        """Keep account of a message that a test made itself."""
        self.messages.append(message)
        return message

    def some(self, number: int, *, kinds: Sequence[str] = tuple(KINDS), **job: Any) -> list[Message]:
        """Add jobs that end in various ways; returns their events in the order to publish."""
        made = []
        for index in range(number):
            # Every kind once before any comes twice.
            kind = kinds[index] if index < len(kinds) else self.chance.choice(kinds)
            made.append(self.event(self.job(KINDS[kind].ending, **job), kind))
        self.chance.shuffle(made)
        return made

    def _envelope(self, raw: bytes) -> bytes:
        """Write the message as kombu does."""
        return json.dumps(
            {
                "body": base64.b64encode(raw).decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": {},
                "properties": {
                    "delivery_mode": 2,
                    "delivery_info": {"exchange": "", "routing_key": "generation"},
                    "priority": 0,
                    "body_encoding": "base64",
                    "delivery_tag": str(UUID(int=self.chance.getrandbits(128))),
                },
            }
        ).encode()
