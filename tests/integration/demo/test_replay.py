"""Whole runs: a trace through scratch servers and a real worker, and what must come out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from redis import Redis

from kino_refunds.cli import main as cli
from kino_refunds.demo.trace import Workload, read_trace
from kino_refunds.settings import PREFIX
from tests.conftest import Database
from tests.scenario import Scene

HEADER = "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,num_images_per_prompt\n"
# Every status; several groups; empty and zero credits; a job that ends behind its deadline.
TRACE = f"""{HEADER}\
2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0000,1.0
2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,43.5,G0001,8.0
2024-11-15 16:58:01,IMG_2_IMG,FAILED,3.0,G0001,4.0
2024-11-15 16:58:02,IMG_2_IMG,PENDING,,G0000,
2024-11-16 00:00:00,IMG_2_IMG,PROCESSING,,G0002,2.0
2024-11-16 00:00:00,TXT_2_IMG,SUCCEED,700.0,G0002,
2024-11-16 00:00:01,TXT_2_IMG,FAILED,0.0,G0003,0.0
2024-11-16 00:00:02,TXT_2_IMG,SUCCEED,10.0,G0000,2.0
"""
FIGURES = {
    "jobs": 8,
    "captured": 4,
    "captured_credits": 12,
    "refunded": 2,
    "refunded_credits": 4,
    "overdue_refunded": 2,
    "overdue_refunded_credits": 3,
    "open": 0,
    "dead_letters": 0,
    "breaks": 0,
}
GRACE = timedelta(minutes=1)


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Run(Protocol):
    def __call__(self, *arguments: str) -> Result: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; the KINO_* variables are those that the test sets."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["kino-refunds"])

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = cli._run(list(arguments))
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE, encoding="utf-8")
    return path


def figures(result: Result) -> dict[str, Any]:
    """The figures that do not depend on this machine; of those that do, that they are there and above zero."""
    assert result.out.count("\n") == 1
    found: dict[str, Any] = json.loads(result.out)
    seconds, events_per_second = found.pop("seconds"), found.pop("events_per_second")
    assert seconds > 0
    assert events_per_second > 0
    return found


def test_small_trace_comes_out_right_on_servers_of_its_own(
    run: Run, trace: Path, database: Database, redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are exact, and a real ledger that the environment names is neither read nor written."""
    monkeypatch.setenv("KINO_DATABASE_URL", database.url("kino_worker"))
    monkeypatch.setenv("KINO_MIGRATION_DATABASE_URL", database.url("kino_owner"))
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    monkeypatch.setenv("KINO_OVERDUE_GRACE_S", "86400")
    with Scene.of(database) as scene:
        before = scene.everything()

        result = run("replay-trace", str(trace), "--json")

        assert (result.code, figures(result)) == (0, FIGURES)
        assert result.err.splitlines() == [
            "starting Postgres, Valkey and a worker",
            "jobs submitted, events published",
            "events settled",
            "asking about jobs without an event",
        ]
        assert scene.everything() == before
    assert redis.keys() == []


def test_ledger_that_disagrees_with_its_trace_is_a_finding(
    run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one job came out otherwise than the trace says, that job and its account are named, with exit code 1."""

    def tampered(*arguments: Any, **options: Any) -> Workload:
        workload = read_trace(*arguments, **options)
        first = workload.jobs[0]
        return replace(workload, jobs=[replace(first, refunded=not first.refunded), *workload.jobs[1:]])

    monkeypatch.setattr("kino_refunds.demo.trace.read_trace", tampered)

    result = run("replay-trace", str(trace))

    said = result.err.splitlines()[4:]
    assert result.code == 1
    assert "trace.csv: how 8 jobs ended" in result.out
    assert "every job and every wallet is as the workload says" not in result.out
    assert said[0].startswith("error: job gentd26-000001 must be refunded")
    assert said[1:] == ["error: account G0000 has 1 available and 0 held of 4"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("", "it has no column gmt_create, predict_status, ", id="empty"),
        pytest.param(HEADER, "it has no requests", id="no rows"),
        pytest.param("gmt_create,predict_status\n1,2\n", "it has no column exec_time_seconds, groupId, ", id="columns"),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,LOST,1.0,G,1.0\n", "line 10: predict_status 'LOST'", id="status"),
        pytest.param(TRACE + "16.11.2024,T,SUCCEED,1.0,G,1.0\n", "line 10: time data '16.11.2024'", id="time"),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,SUCCEED,,G,1.0\n", "line 10: ", id="no duration"),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,SUCCEED,nan,G,1.0\n", "line 10: ", id="duration is no number"),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,SUCCEED,1e300,G,1.0\n", "line 10: ", id="endless"),
        pytest.param(
            TRACE + "2024-11-16 00:00:02,T,SUCCEED,1.0,,1.0\n", "line 10: groupId must be 1 to 128", id="group"
        ),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,SUCCEED,1.0,G,-1.0\n", "line 10: credits must be", id="negative"),
        pytest.param(
            TRACE + "2024-11-16 00:00:02,T,SUCCEED,1.0,G,1.5\n", "line 10: num_images_per_prompt 1.5", id="half"
        ),
        pytest.param(TRACE + "2024-11-16 00:00:02,T,SUCCEED\n", "line 10: it has fewer fields", id="short"),
        pytest.param(TRACE + "\n\n2024-11-16 00:00:02,T,LOST,1.0,G,1.0\n", "line 12: predict_status", id="blank lines"),
        pytest.param(TRACE.encode() + b"\xff\n", "can't decode byte 0xff", id="not UTF-8"),
        pytest.param(None, "No such file or directory", id="missing"),
    ],
)
def test_trace_that_cannot_be_read_is_refused_with_its_line(
    run: Run, tmp_path: Path, content: str | bytes | None, says: str
) -> None:
    """Before any server starts: the file, the line and what is wrong with it; never exit code 1, a disagreement."""
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    result = run("replay-trace", str(path))

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert str(path) in result.err
    assert says in result.err


def test_times_are_shifted_by_one_amount_into_the_past(tmp_path: Path) -> None:
    """Distances stay; every deadline with its grace and every event lie before now, however long a job ran."""
    now = datetime(2026, 11, 2, 12, tzinfo=UTC)
    path = tmp_path / "trace.csv"
    path.write_text(TRACE + "2024-11-16 00:00:02,T,SUCCEED,90000.0,G0000,1\n", encoding="utf-8-sig")

    jobs = read_trace(path, now=now, grace=GRACE).jobs

    events = [job.event for job in jobs]
    assert [job.job_id for job in jobs] == [f"gentd26-{number:06d}" for number in range(1, 10)]
    assert [job.deadline_at - jobs[0].deadline_at for job in jobs] == [
        timedelta(seconds=seconds) for seconds in (0, 0, 11, 12, 25330, 25330, 25331, 25332, 25332)
    ]
    assert [event and event.time - job.deadline_at for event, job in zip(events, jobs, strict=True)] == [
        None if seconds is None else timedelta(seconds=seconds - 600)
        for seconds in (32, 43.5, 3, None, None, 700, 0, 10, 90000)
    ]
    assert max(job.deadline_at for job in jobs) + GRACE < now
    assert max(event.time for event in events if event is not None) < now


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("KINO_TRACE" not in os.environ, reason="set KINO_TRACE to the path of gentd26-first60.csv")
def test_real_trace_comes_out_right(run: Run) -> None:
    """Two weeks of a real service: the figures that the trace's README names, to the credit."""
    path = TRACE_PATH

    result = run("replay-trace", path, "--json")

    assert (result.code, figures(result)) == (
        0,
        {
            "jobs": 16_093,
            "captured": 15_823,
            "captured_credits": 41_922,
            "refunded": 255,
            "refunded_credits": 540,
            "overdue_refunded": 15,
            "overdue_refunded_credits": 15,
            "open": 0,
            "dead_letters": 0,
            "breaks": 0,
        },
    )


TRACE_PATH = os.environ.get("KINO_TRACE", "")
"""Read before the tests take every KINO_* name out of the environment."""
