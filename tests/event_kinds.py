"""One of each kind of event: as JSON has it, as it is built in Python, and the queue that it travels on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import describe, parse
from kino_refunds.events.schema import (
    ErrorOrigin,
    Event,
    JobCompleted,
    JobFailed,
    JobSafetyRejected,
    JobTimedOut,
    SafetyStage,
)
from tests.malformed import data, event, without

AT = datetime(2026, 11, 2, 9, 11, 12, 500_000, tzinfo=UTC)
COMMON: dict[str, Any] = {"id": "evt-1", "source": "/pipeline/eu-1", "time": AT, "job_id": "job-1"}

KINDS: dict[str, tuple[dict[str, Any], Event, str]] = {
    "completed": (
        event(type="kino.generation.job-completed.v1", data={"job_id": "job-1"}),
        JobCompleted.of(**COMMON),
        "generation.job-completed",
    ),
    "failed": (
        event(data=without(data(), "account_id")),
        JobFailed.of(
            **COMMON,
            error={"code": "GPU_OOM", "origin": ErrorOrigin.PLATFORM, "message": "out of memory on node 7"},
        ),
        "generation.job-failed",
    ),
    "timed out": (
        event(type="kino.generation.timeout.v1", data={"job_id": "job-1", "result_produced": True}),
        JobTimedOut.of(**COMMON, result_produced=True),
        "generation.timeout",
    ),
    "rejected": (
        event(
            type="kino.generation.safety-rejection.v1",
            data={"job_id": "job-1", "stage": "after_generation", "category": "gore"},
        ),
        JobSafetyRejected.of(**COMMON, stage=SafetyStage.AFTER_GENERATION, category="gore"),
        "generation.safety-rejection",
    ),
}


def reason_of(raw: bytes) -> tuple[str, str]:
    """Parse what must be malformed, and return the code and text of it."""
    with pytest.raises(MalformedMessage) as caught:
        parse(raw)
    return caught.value.code, caught.value.text


def ids(raw: bytes) -> tuple[str | None, str | None, str | None]:
    """Whom a malformed message is about."""
    about = describe(raw)
    return about.source, about.event_id, about.job_id


def malformed(raw: bytes) -> MalformedMessage:
    with pytest.raises(MalformedMessage) as caught:
        parse(raw)
    return caught.value
