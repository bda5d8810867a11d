"""Runs of the check `matching` against sources in Python, page by page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from kino_refunds.ledger import Charge
from kino_refunds.policy.document import published_policy
from kino_refunds.reconciliation import matching
from kino_refunds.reconciliation.comparison import LiveBreak, Scope, Window
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.settlement.breaks import Break
from tests.clock import DAY, HOUR, MINUTE
from tests.integration.reconciliation.finished_jobs import Lister, ended
from tests.scenario import NOW, Scene, make_event

GRACE = timedelta(seconds=60)
AT = NOW - MINUTE
"""When a job finished, and its event's time, unless a test says otherwise."""
LATER = NOW + HOUR
"""When the check runs: every charge is settled, or should be."""


@dataclass
class Found:
    """All pages of a run."""

    compared: int = 0
    broken: int = 0
    not_comparable: Counter[str] = field(default_factory=Counter)
    breaks: list[Break] = field(default_factory=list)
    comparable: bool = True
    detail: dict[str, Any] = field(default_factory=dict)
    cursors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, set[str]]:
        kinds: dict[str, set[str]] = {}
        for each in self.breaks:
            assert each.job_id is not None
            kinds.setdefault(each.job_id, set()).add(each.kind)
        return kinds

    @property
    def numbers(self) -> tuple[int, int, dict[str, int]]:
        return self.compared, self.broken, dict(self.not_comparable)


def scope_of(reader: sa.Engine, source: Any, *, now: datetime = LATER, **changes: Any) -> Scope:
    with reader.connect() as connection:
        horizon = connection.execute(sa.text("SELECT CAST(CAST(kino.horizon() AS text) AS bigint)")).scalar_one()
    return Scope(
        engine=reader,
        window=Window(since=NOW - DAY, until=LATER, from_xid=0, to_xid=horizon),
        full=False,
        now=now,
        policy=published_policy(),
        overdue_grace=GRACE,
        grace=5 * MINUTE,
        source=source,
        **changes,
    )


def run_of(scope: Scope, cursor: dict[str, Any] | None = None, *, pages: int | None = None) -> Found:
    found = Found()
    for number, page in enumerate(matching.pages(scope, cursor or {}), start=1):
        found.compared += page.compared
        found.broken += page.broken
        found.not_comparable.update(page.not_comparable)
        found.breaks += page.breaks
        found.comparable = found.comparable and page.is_comparable
        found.detail = dict(page.detail)
        found.cursors.append(json.loads(json.dumps(dict(page.cursor))))
        if number == pages:
            break
    return found


def match(reader: sa.Engine, source: Any, **scope: Any) -> Found:
    return run_of(scope_of(reader, source, **scope))


def done(job_id: str, state: str = "completed", *, at: datetime = AT, **more: Any) -> FinishedJob:
    return ended(job_id, state, at=at, **more)


def lister(*jobs: FinishedJob, promise: datetime | None = LATER) -> Lister:
    return Lister(jobs, promise=promise)


def settled(scene: Scene, *job_ids: str) -> list[Charge]:
    charges = [scene.charged(job_id) for job_id in job_ids]
    scene.settle(*(make_event("completed", job_id) for job_id in job_ids))
    return charges


class Fails(Lister):
    """A source that fails in one of its three questions."""

    def __init__(self, error: Exception, *, what: str, jobs: tuple[FinishedJob, ...] = ()) -> None:
        super().__init__(jobs, promise=LATER)
        self.error, self.what = error, what

    def ask(self, job_ids: Any) -> Any:
        if self.what == "ask":
            raise self.error
        return super().ask(job_ids)

    def finished(self, since: datetime, until: datetime) -> Any:
        yield from super().finished(since, until)
        if self.what == "finished":
            raise self.error

    def complete_through(self) -> datetime | None:
        if self.what == "complete_through":
            raise self.error
        return super().complete_through()


def again(reader: sa.Engine, source: Any, found: list[Break], *, now: datetime = LATER) -> dict[str, str | None]:
    """Look again at these breaks; returns kind and job -> the kind that it still has, None if both sides agree."""
    live = [
        LiveBreak(number, str(each.kind), each.key[1], each.job_id, each.charge_id) for number, each in enumerate(found)
    ]
    looked = matching.again(scope_of(reader, source, now=now), live)
    return {
        f"{found[number].kind} {found[number].job_id}": None if one is None else str(one.kind)
        for number, one in looked.items()
    }
