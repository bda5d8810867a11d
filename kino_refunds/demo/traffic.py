"""The demo's traffic: lots, charges and messages, as product and pipeline make them, and the record of them."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from kino_refunds.demo.story import ENDINGS, SUSPENDED, TERMINATED, Job, Lot, Twist, document, malformed
from kino_refunds.events.schema import QUEUES, Queue
from kino_refunds.ledger import (
    VIOLATION,
    AccountStatus,
    ChargeRequest,
    Grant,
    LotClass,
    grant_lots,
    open_charges,
    set_account_status,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kino_refunds.demo.stage import Stage
    from kino_refunds.events.envelope import MalformedReason

DEADLINE = timedelta(minutes=10)
SILENT_FOR = timedelta(seconds=1)
"""The time from submission to deadline of a job whose event never comes."""


class Message(NamedTuple):
    """A message to publish; `event` is None if the message cannot be read."""

    queue: str
    event: dict[str, Any] | None
    bytes: bytes
    reason: str | None
    """The reason of the dead letter that it must become; None if it must not."""
    copied: bool = False
    together: bool = False
    """Whether it is one of two messages whose order on the queue matters: both are sent by LPUSH."""


def message(
    event: dict[str, Any], *, reason: str | None = None, copied: bool = False, together: bool = False
) -> Message:
    """Return the message of an event, for the queue of its type."""
    return Message(
        queue=QUEUES[event["type"]].value,
        event=event,
        bytes=json.dumps(event).encode(),
        reason=reason,
        copied=copied,
        together=together,
    )


def unreadable(reason: MalformedReason, queue: Queue) -> Message:
    """Return a message that cannot be read, for this reason."""
    return Message(queue.value, None, malformed(reason, at=datetime.now(UTC)), reason.value)


def ends(job: Job) -> list[Message]:
    """Return the messages of one job's end, in the order in which they go onto the queue."""
    now = datetime.now(UTC)
    if job.ending is None or job.twist is Twist.SILENT:
        return []
    if job.twist is Twist.MISDIRECTED:
        wrong = document(job.job_id, job.ending, at=now, account_id="somebody-else")
        return [message(wrong, reason="account_mismatch")]
    if job.other is not None and job.twist in {Twist.PAIR, Twist.CONTRADICTION}:
        before = now - timedelta(milliseconds=20)
        later = document(job.job_id, job.other, at=now, event_id=f"{job.job_id}-later")
        return [message(later, together=True), message(document(job.job_id, job.ending, at=before), together=True)]
    return [message(document(job.job_id, job.ending, at=now), copied=job.twist is Twist.COPIES)]


class Traffic:
    """The acts of product and pipeline on this stage; `record` keeps what they asked for, for the referee."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._kombu = False
        self.messages: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {"jobs": [], "answers": {}, "silent": [], "messages": self.messages}

    def grant(self, lots: Iterable[Lot]) -> int:
        """Grant lots, which creates their accounts; return how many accounts."""
        now = datetime.now(UTC)
        grants = [
            Grant(
                reference=lot.reference,
                account_id=lot.account_id,
                credits=lot.credits,
                lot_class=LotClass(lot.lot_class),
                expires_at=None if lot.days is None else now + timedelta(days=lot.days),
                priority=lot.priority,
            )
            for lot in lots
        ]
        with self._stage.product.begin() as connection:
            grant_lots(connection, grants)
        self.record["grants"] = [
            {
                "reference": each.reference,
                "account_id": each.account_id,
                "credits": each.credits,
                "class": each.lot_class.value,
                "priority": each.priority,
                "expires_at": each.expires_at and each.expires_at.isoformat(),
            }
            for each in grants
        ]
        return len({grant.account_id for grant in grants})

    def close_accounts(self) -> None:
        """Terminate one account for violation and suspend another, while their jobs run."""
        with self._stage.oncall.begin() as connection:
            set_account_status(connection, TERMINATED, AccountStatus.TERMINATED, reason=VIOLATION, actor="demo")
            set_account_status(connection, SUSPENDED, AccountStatus.SUSPENDED, reason="chargeback", actor="demo")
        self.record["terminated_for_violation"] = [TERMINATED]

    def open(self, jobs: Sequence[Job]) -> None:
        """Open charges as the product does; for jobs whose event never comes, fill the pipeline's own table."""
        now = datetime.now(UTC)
        silent = [job for job in jobs if job.twist is Twist.SILENT]
        deadlines = {job.job_id: now + SILENT_FOR for job in silent}
        asked = [
            ChargeRequest(job.job_id, job.account_id, job.credits, deadlines.get(job.job_id, now + DEADLINE))
            for job in jobs
        ]
        known = [job for job in silent if job.ending is not None]
        with self._stage.product.begin() as connection:
            open_charges(connection, asked)
        self.tell_ends(known)
        self.record["jobs"] += [{**asdict(each), "deadline_at": each.deadline_at.isoformat()} for each in asked]
        self.record["answers"] |= {
            job.job_id: {"type": ENDINGS[job.ending].type, "data": ENDINGS[job.ending].data}
            for job in known
            if job.ending is not None
        }
        self.record["silent"] += [job.job_id for job in silent]

    def tell_ends(self, jobs: Sequence[Job]) -> None:
        """Write into the pipeline's own table how these jobs ended; of one that nobody knows, that it timed out."""
        with self._stage.servers.postgres.connect("kino") as superuser, superuser.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO pipeline.job (job_id, state, origin, stage, result_produced, account_id, credits)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (job_id) DO NOTHING",
                [_end_of(job) for job in jobs],
            )

    def open_one_more(self) -> dict[str, str]:
        """Open a charge `walk-1` for a customer `acme`; return two files: its event with a mistake, and corrected."""
        now = datetime.now(UTC)
        with self._stage.product.begin() as connection:
            grant_lots(connection, [Grant("acme-order-1", "acme", 100, LotClass.PURCHASED)])
            open_charges(connection, [ChargeRequest("walk-1", "acme", 8, now + timedelta(hours=1))])
        wrong = document("walk-1", "failed, platform", at=now, account_id="somebody-else")
        right = document("walk-1", "failed, platform", at=now, account_id="acme")
        return {"misdirected.jsonl": json.dumps(wrong) + "\n", "corrected.json": json.dumps(right) + "\n"}

    def publish(self, messages: Sequence[Message]) -> None:
        """Put messages on their queues: every second event by kombu, all others by a bare LPUSH."""
        kombu: list[Message] = []
        bare: list[Message] = []
        for each in messages:
            self._kombu = not self._kombu
            by_kombu = each.event is not None and each.reason is None and not each.together and self._kombu
            (kombu if by_kombu else bare).append(each)
        with self._stage.redis.pipeline(transaction=False) as pipeline:
            for each in bare:
                pipeline.lpush(each.queue, each.bytes)
            pipeline.execute()
        self._stage.publisher.publish_many(each.event for each in kombu if each.event is not None)
        burst = len(self.messages)
        self.messages += [
            {
                "burst": burst,
                "form": form,
                "queue": each.queue,
                "event": each.event,
                "raw": b64encode(each.bytes).decode() if each.reason else None,
                "reason": each.reason,
            }
            for form, sent in (("lpush", bare), ("kombu", kombu))
            for each in sent
        ]

    def doomed(self) -> set[str]:
        """Return the ids of the published events that must become dead letters."""
        return {each["event"]["id"] for each in self.messages if each["event"] and each["reason"]}


def _end_of(job: Job) -> tuple[str, str, str | None, str | None, bool | None, str, int]:
    how = ENDINGS[job.ending or "timed out"]
    data = how.data
    error = data.get("error", {})
    return (
        job.job_id,
        how.state,
        error.get("origin"),
        data.get("stage"),
        data.get("result_produced"),
        job.account_id,
        job.credits,
    )
