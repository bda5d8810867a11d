"""Read a trace: jobs with a known ending. Each job says what the ledger must contain after the run."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from kino_refunds.errors import BadTrace
from kino_refunds.events.schema import ErrorOrigin, Event, JobCompleted, JobFailed
from kino_refunds.ledger import Grant, LotClass
from kino_refunds.ledger.values import require_credits, require_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

EVENT_SOURCE = "generation-pipeline"
TRACE_DEADLINE = timedelta(minutes=10)
MARGIN = timedelta(minutes=1)
"""How long ago the last deadline and its grace end, so that the overdue sweep finds the charge."""

TRACE_COLUMNS = ("gmt_create", "predict_status", "exec_time_seconds", "groupId", "num_images_per_prompt")


@dataclass(frozen=True, slots=True)
class Job:
    """One job: the credits that it takes, the event that ends it (None: no event comes), and whether it is refunded."""

    job_id: str
    account_id: str
    credits: int
    deadline_at: datetime
    event: Event | None
    refunded: bool


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs in the order of their submission, and the lots that they draw from."""

    name: str
    grants: list[Grant]
    jobs: list[Job]


def read_trace(path: Path, *, now: datetime, grace: timedelta) -> Workload:
    """Return the workload in a CSV like gentd26-first60.csv (the README beside it has the mapping).

    All times are shifted by the same amount, so that every deadline and its grace are before `now`. Raises BadTrace,
    which names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise BadTrace(f"{path}: it has no column {', '.join(missing)}")
            jobs = [_trace_job(f"{path}, line {reader.line_num}", n, row) for n, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadTrace(f"{path}: {error}") from error
    if not jobs:
        raise BadTrace(f"{path}: it has no requests")
    ends = [job.deadline_at + grace for job in jobs] + [job.event.time for job in jobs if job.event is not None]
    shift = now - MARGIN - max(ends)
    shifted = [_shifted(job, shift) for job in jobs]
    return Workload(path.name, list(_one_lot_each(shifted)), shifted)


def _trace_job(where: str, number: int, row: dict[str, Any]) -> Job:
    if None in (row[name] for name in TRACE_COLUMNS):
        raise BadTrace(f"{where}: it has fewer fields than the first line")
    try:
        created = datetime.strptime(row["gmt_create"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        status = row["predict_status"]
        credits = _whole("num_images_per_prompt", row["num_images_per_prompt"] or "1")
        job_id = f"gentd26-{number:06d}"
        require_id("groupId", row["groupId"])
        require_credits(credits, at_least=0)
        event: Event | None
        match status:
            case "SUCCEED" | "FAILED":
                ended = created + timedelta(seconds=float(row["exec_time_seconds"]))
                event = _ending(job_id, status, ended)
            case "PENDING" | "PROCESSING":
                event = None
            case _:
                raise BadTrace(f"{where}: predict_status {status!r} is not known")
    except (TypeError, ValueError, OverflowError) as error:
        raise BadTrace(f"{where}: {error}") from error
    return Job(
        job_id=job_id,
        account_id=row["groupId"],
        credits=credits,
        deadline_at=created + TRACE_DEADLINE,
        event=event,
        refunded=status != "SUCCEED",
    )


def _whole(name: str, text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"{name} {value} is not whole")
    return int(value)


def _ending(job_id: str, status: str, ended: datetime) -> Event:
    common: dict[str, Any] = {"id": f"{job_id}-end", "source": EVENT_SOURCE, "time": ended, "job_id": job_id}
    if status == "SUCCEED":
        return JobCompleted.of(**common)
    return JobFailed.of(error={"code": "FAILED", "origin": ErrorOrigin.PLATFORM}, **common)


def _shifted(job: Job, shift: timedelta) -> Job:
    event = job.event and job.event.model_copy(update={"time": job.event.time + shift})
    return replace(job, deadline_at=job.deadline_at + shift, event=event)


def _one_lot_each(jobs: Iterable[Job]) -> Iterator[Grant]:
    needed: Counter[str] = Counter()
    for job in jobs:
        needed[job.account_id] += job.credits
    for account_id, credits in sorted(needed.items()):
        # An account whose jobs all take zero credits needs a lot too: its first grant creates it.
        yield Grant(f"lot-{account_id}", account_id, max(credits, 1), LotClass.SUBSCRIPTION)
