"""The overdue sweep at an instant of the test, with a source that answers as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from redis import Redis

from kino_refunds.events.schema import Queue
from kino_refunds.ledger import Charge, ChargeRequest, open_charges
from kino_refunds.reconciliation.overdue import OverdueRules, sweep_overdue
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.dead_letters import DeadLetter, LetterReason
from tests.clock import SECOND, clock_at
from tests.scenario import NOW, Scene, make_rules

GRACE = timedelta(seconds=60)
RULES = OverdueRules(grace=GRACE, asks=3, ask_window=timedelta(minutes=3), running_max=timedelta(hours=24))
SPACING = RULES.ask_spacing
DUE = NOW - SECOND
"""Deadline plus grace of a charge that is overdue at NOW, unless a test says otherwise."""
UNKNOWN, RUNNING, COMPLETED = (Answer(s) for s in (JobState.UNKNOWN, JobState.RUNNING, JobState.COMPLETED))


class Source:
    """A job source that says what the test told it, and remembers whom it was asked about."""

    def __init__(self, answers: Mapping[str, Any], *, fails_for: str = "", error: Exception | None = None) -> None:
        self.answers = answers
        self.fails_for = fails_for
        self.error = error or TimeoutError("no answer within 5 s")
        self.asked: list[list[str]] = []

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        self.asked.append(list(job_ids))
        if self.fails_for in job_ids:
            raise self.error
        return {job_id: self.answers[job_id] for job_id in job_ids if job_id in self.answers}


class Careless(Source):
    """A job source that returns the same whatever it is asked, and remembers whom it was asked about."""

    def __init__(self, said: Any) -> None:
        super().__init__({})
        self.said = said

    def ask(self, job_ids: Sequence[str]) -> Any:
        self.asked.append(list(job_ids))
        return self.said


def charged(scene: Scene, *job_ids: str, due: datetime = DUE, credits: int = 10) -> list[Charge]:
    """Charge jobs whose deadline and grace end at `due`, all to one account with enough credits."""
    scene.grant("acct-1", 100_000)
    requests = [ChargeRequest(job_id, "acct-1", credits, due - GRACE) for job_id in job_ids]
    with scene.product.begin() as connection:
        return open_charges(connection, requests)


def sweep(scene: Scene, redis: Redis, source: Any = None, *, now: datetime = NOW, **options: Any) -> dict[str, Any]:
    with clock_at(scene.worker, now):
        return sweep_overdue(scene.worker, redis, source, make_rules(), overdue=RULES, **options).as_dict()


def report(**changes: Any) -> dict[str, Any]:
    """What a sweep at NOW reports, where the test does not say otherwise."""
    return {
        "dry_run": False,
        "overdue": 1,
        "early": 0,
        "asked": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "answers": {"unknown": 1},
        "outcomes": {},
        "refunded": 0,
        "refunded_credits": 0,
        "withheld": {},
        "verified_through": None,
        **changes,
    }


REFUNDED_ONE = report(outcomes={"refunded": 1}, refunded=1, refunded_credits=10)


def withheld(**reasons: int) -> dict[str, Any]:
    return report(withheld=reasons)


def statuses(scene: Scene) -> dict[str, str]:
    rows = scene.rows("SELECT job_id, status FROM kino.charge_status ORDER BY job_id")
    return {row.job_id: row.status for row in rows}


def asks(scene: Scene) -> dict[str, tuple[int, str]]:
    """How often in a row nobody knew, and what was said last, by job."""
    rows = scene.rows("SELECT job_id, asks, last_answer FROM kino.overdue_ask JOIN kino.charge USING (charge_id)")
    return {row[0]: (row[1], row[2]) for row in rows}


def keep_letter(
    scene: Scene,
    *,
    job_id: str | None = None,
    queue: str = Queue.JOB_COMPLETED,
    at: datetime = NOW,
    status: str = "open",
    others: tuple[str, ...] = (),
    may_hold_others: bool | None = None,
) -> None:
    key = f"key of {job_id}".encode()
    nameless = job_id is None if may_hold_others is None else may_hold_others
    letter = DeadLetter(
        key,
        b"raw",
        queue,
        LetterReason.BAD_JSON,
        "cut off",
        job_id=job_id,
        other_job_ids=others,
        may_hold_others=nameless,
    )
    scene.keep(letter, at=at)
    scene.rows(
        "UPDATE kino.dead_letter SET status = :status WHERE message_key = :key RETURNING 1", status=status, key=key
    )
