"""Run checks in a test, by name, as a worker or a person does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.repairs import Workshop
from kino_refunds.reconciliation.run_rows import Run
from kino_refunds.reconciliation.runs import Bench, run_check
from kino_refunds.reconciliation.sources import Answer, JobSource, JobState
from kino_refunds.reconciliation.windows import Wanted
from kino_refunds.settings import Settings
from kino_refunds.settlement.rules import Rules
from tests.scenario import Scene, make_rules


def bench(scene: Scene, *, source: JobSource | None = None, rules: Rules | None = None, **settings: Any) -> Bench:
    """What checks of this scene work with; settings are the defaults but for those that are named."""
    return Bench(
        engine=scene.worker,
        rules=rules or make_rules(),
        settings=Settings.model_construct(**{"check_grace_s": 0.0, **settings}),
        source=source,
        actor="test",
    )


def check(
    scene: Scene,
    name: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    full: bool = False,
    dry_run: bool = False,
    budget_s: float | None = None,
    source: JobSource | None = None,
    rules: Rules | None = None,
    **settings: Any,
) -> Run:
    """Run one check, and return the run."""
    return run_check(
        check_named(name),
        bench(scene, source=source, rules=rules, **settings),
        Wanted(since=since, until=until, full=full),
        dry_run=dry_run,
        budget_s=budget_s,
    )


def shop(scene: Scene, *, source: JobSource | None = None, **settings: Any) -> Workshop:
    """What repairs of this scene work with."""
    return Workshop(
        worker=scene.worker,
        oncall=scene.oncall,
        rules=make_rules(),
        settings=Settings.model_construct(**settings),
        source=source,
    )


def numbers(run: Run) -> tuple[int, int, int, int]:
    """The four numbers of a run: compared, matched, broken, not comparable."""
    return run.compared, run.matched, run.broken, run.uncomparable


def live(scene: Scene) -> list[tuple[str, str, int]]:
    """Every live break: its kind, its subject and the credits."""
    return [
        (row.kind, row.subject, row.credits)
        for row in scene.rows(
            "SELECT kind, coalesce(subject, job_id) AS subject, credits FROM kino.break"
            " WHERE status IN ('open', 'investigating', 'repaired') ORDER BY kind, subject"
        )
    ]


def statuses(scene: Scene) -> list[tuple[str, str]]:
    """Every break: kind and status, in the order of their numbers."""
    return [(row.kind, row.status) for row in scene.rows("SELECT kind, status FROM kino.break ORDER BY break_id")]


def database_url(engine: sa.Engine) -> SecretStr:
    """The URL of an engine, as a setting."""
    return SecretStr(engine.url.render_as_string(hide_password=False))


class Pipeline:
    """A source with a list, complete through now."""

    def __init__(self, *jobs: FinishedJob) -> None:
        self.jobs = sorted(jobs, key=lambda job: job.place)

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        known = {job.job_id: job.answer for job in self.jobs}
        return {job_id: known.get(job_id, Answer(JobState.UNKNOWN)) for job_id in job_ids}

    def finished(self, since: datetime, until: datetime) -> Iterator[FinishedJob]:
        return (job for job in self.jobs if since <= job.finished_at < until)

    def complete_through(self) -> datetime:
        return datetime.now(UTC)
