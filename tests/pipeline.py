"""The pipeline's side of intake: jobs, their ends on the queues, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from redis import Redis

from kino_refunds.events.queues import SERVED
from kino_refunds.events.schema import ErrorOrigin, Event, SafetyStage, queue_of, to_json
from kino_refunds.ledger import ChargeRequest, open_charges
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.scenario import NOW, Scene, make_event
from workers.intake import Intake

FAILED, TIMEOUT, SAFETY, COMPLETED = SERVED

REFUNDED, CAPTURED = [("refund", 10)], [("capture", 10)]
"""What `ledger` reads of a job of `open_jobs`."""
EMPTY: dict[str, int] = {**dict.fromkeys(map(str, SERVED), 0), "in-flight": 0, "recovered": 0}

ENDS = (
    Answer(JobState.COMPLETED),
    *(Answer(JobState.FAILED, origin=origin) for origin in ErrorOrigin),
    *(Answer(JobState.REJECTED, stage=stage) for stage in SafetyStage),
    *(Answer(JobState.TIMED_OUT, result_produced=produced) for produced in (False, True)),
)
"""Every answer of a job source that is the end of a job."""


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def open_jobs(
    scene: Scene, *job_ids: str, account_id: str = "acct-1", deadline: timedelta = timedelta(hours=1)
) -> None:
    """Charge 10 credits for each job, all to one account whose one lot just covers them; `deadline` is from NOW on."""
    scene.grant(account_id, credits=10 * len(job_ids))
    requests = [ChargeRequest(job_id, account_id, 10, NOW + deadline) for job_id in job_ids]
    with scene.product.begin() as connection:
        open_charges(connection, requests)


def failures(*job_ids: str) -> list[Event]:
    """Say of each job that it failed on our side."""
    return [make_event("failed platform", job_id) for job_id in job_ids]


def several(*events: Event | bytes) -> bytes:
    """Write one message that holds all of these."""
    return b"[%s]" % b",".join(event if isinstance(event, bytes) else to_json(event) for event in events)


def push(client: Redis, *events: Event) -> None:
    """Publish bare events, each on its queue."""
    with client.pipeline(transaction=False) as bare:
        for event in events:
            bare.lpush(queue_of(event), to_json(event))
        bare.execute()


def drain(intake: Intake) -> list[int]:
    """Settle batches until nothing waits; returns their sizes."""
    sizes = []
    while size := intake.run_once():
        sizes.append(size)
    return sizes


def ledger(scene: Scene) -> dict[str, list[tuple[str, int]]]:
    """Every job with what moved after its hold, in a ledger without a contradiction."""
    with scene.superuser.begin() as connection:
        assert violations(connection, without=("times",)) == []
    moved: dict[str, list[tuple[str, int]]] = {}
    for job_id, kind, credits in scene.rows(
        "SELECT c.job_id, t.kind, t.credits FROM kino.charge c"
        " LEFT JOIN kino.transfer t ON t.charge_id = c.charge_id AND t.kind <> 'hold' ORDER BY t.transfer_id"
    ):
        moved.setdefault(job_id, [])
        if kind is not None:
            moved[job_id].append((kind, credits))
    return moved


def refunded(scene: Scene) -> list[str]:
    """Jobs by refund transfer, in a ledger without a contradiction."""
    return sorted(job_id for job_id, moved in ledger(scene).items() for kind, _ in moved if kind == "refund")


class Says:
    """A job source that says what a function says."""

    def __init__(self, say: Callable[[str], Answer | None]) -> None:
        self._say = say

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Answer for each job, but for those of which the function says None."""
        return {job_id: answer for job_id in job_ids if (answer := self._say(job_id)) is not None}
