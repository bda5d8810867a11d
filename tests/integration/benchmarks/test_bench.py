"""The benchmark keeps its own word: it measures what settles the right rows, and says what it says it will."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.demo.trace_run import scratch
from kino_refunds.dev.embedded import Servers
from kino_refunds.events.connection import redis_client
from kino_refunds.events.schema import Event
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.settings import Settings
from kino_refunds.settlement import pending
from kino_refunds.settlement.decide import Busy
from kino_refunds.settlement.deliveries import delivery_of
from kino_refunds.settlement.rules import rules_of
from kino_refunds.settlement.settle import settle
from tests.benchmarks import postgres_alone
from tests.benchmarks.backlog import engine_of, grant, mixture, open_jobs, refund
from tests.benchmarks.rows import differences
from tests.benchmarks.throughput import Bench, made
from tests.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SHAPE = {
    "refunds_per_second": int,
    "ratio_to_batch_1": float,
    "mixed_events_per_second": int,
    "worker_rss_mib_max": float,
    "contestants": {
        name: {"per_second": int, "ours_is": float}
        for name in (
            "ours_1_worker",
            "ours_again",
            "ours_2_workers",
            "ours_batch_1",
            "celery",
            "dramatiq",
            "kombu",
            "postgres_alone",
        )
    },
    "latency_ms": {
        pace: {"per_second": float, "p50_ms": float, "p99_ms": float, "max_ms": float} for pace in ("10", "100", "500")
    },
    "hot_account": {"one_worker_per_second": int, "two_workers_per_second": int},
    "settled_before": {"charges": int, "refunds_per_second": int, "ratio_to_none": float},
    "in_process": {
        "opened_one_per_second": int,
        "opened_call_per_second": int,
        "growing_per_second": int,
        "growing_last_to_first": float,
    },
}
FORGET_ONE = "DELETE FROM kino.transfer WHERE transfer_id = (SELECT max(transfer_id) FROM kino.transfer)"
# Each makes rows that no settle would have written.
SABOTAGE = {
    "a transfer is missing": FORGET_ONE,
    "a refund is posted twice": """
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor)
        SELECT kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor
        FROM kino.transfer ORDER BY transfer_id DESC LIMIT 1""",
    "a charge is not settled": "DELETE FROM kino.settlement WHERE charge_id = (SELECT max(charge_id) FROM kino.charge)",
    "a clause is another": """
        UPDATE kino.settlement SET reason = 'content_policy_rejection', clause = '2.safety' WHERE kind = 'refunded'""",
    "an outcome is another": "UPDATE kino.inbox_event SET outcome = 'already_refunded'",
    "a fingerprint is another": "UPDATE kino.inbox_event SET fingerprint = 'v1:' || md5(event_id)",
    "an event is in no inbox": "DELETE FROM kino.inbox_event",
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with scratch() as servers, redis_client(servers.redis_url()) as client:
        grant(servers)
        yield Bench(servers, client)


@pytest.fixture(scope="module")
def settled(bench: Bench) -> list[Event]:
    """Refunds that Postgres wrote by itself."""
    events = made(open_jobs(bench.servers, "settled", 20), refund)
    postgres_alone.settle_staged(bench.servers, events)
    return events


@pytest.fixture
def superuser(bench: Bench) -> Iterator[sa.Connection]:
    """A session whose changes no trigger refuses, and which are rolled back."""
    engine = sa.create_engine(bench.servers.superuser_url())
    with engine.connect() as connection:
        connection.execute(sa.text("SET LOCAL session_replication_role = replica"))
        yield connection
        connection.rollback()
    engine.dispose()


def shape(value: Any) -> Any:
    """What a JSON value is made of."""
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


@pytest.mark.slow
def test_bench_runs_every_contestant_and_ends_with_one_json_object() -> None:
    """A whole run, tiny: every contestant writes the same rows, and the last line has every figure."""
    small = ["--events", "300", "--single", "10", "--before", "2000", "--pace-s", "1"]

    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.throughput", *small],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert shape(found) == SHAPE
    assert found["settled_before"]["charges"] == 2000
    assert table[-1] == "every contestant wrote the same rows, and the books are in order"
    assert [line for line in table if len(line) > 80] == []


def test_postgres_alone_writes_the_rows_that_settle_writes(settled: Sequence[Event], superuser: sa.Connection) -> None:
    """The ceiling is that of the same work: nothing is left out, and the books are in order."""
    assert list(differences(superuser, settled)) == []
    assert violations(superuser) == []


@pytest.mark.parametrize("statement", SABOTAGE.values(), ids=SABOTAGE.keys())
def test_other_rows_are_noticed(settled: Sequence[Event], superuser: sa.Connection, statement: str) -> None:
    """A contestant that writes too little, too much or something else has no time to show."""
    superuser.execute(sa.text(statement))

    assert list(differences(superuser, settled)) != []


def test_rows_of_other_events_are_noticed(bench: Bench, superuser: sa.Connection) -> None:
    """A job that completed and was refunded is not taken for a fast one."""
    jobs = open_jobs(bench.servers, "mistaken", 10)
    postgres_alone.settle_staged(bench.servers, made(jobs, refund))

    assert list(differences(superuser, made(jobs, mixture))) != []


def test_jobs_that_were_busy_are_settled_within_the_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without beat nobody would try them again: the bench does, says so, and counts the time."""
    monkeypatch.setattr(pending, "FIRST_DELAY", timedelta(0))
    events = made(open_jobs(bench.servers, "busy", 10), refund)
    with engine_of(bench.servers) as engine, engine.connect() as connection:
        settle(
            connection,
            [delivery_of(event) for event in events],
            rules_of(Settings.model_construct()),
            busy=Busy(jobs=frozenset(event.job_id for event in events)),
        )

    bench.conclude("busy", "somebody", events, 0.0)

    assert "10 jobs were busy, and settled by the retry sweep" in capsys.readouterr().out
    assert bench.runs["busy"].seconds > 0


def test_contestant_with_other_rows_ends_the_bench(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench fails, and says whose rows they were and which."""
    honest = postgres_alone.settle_staged

    def forget_one(servers: Servers, events: Sequence[Event]) -> float:
        seconds = honest(servers, events)
        with servers.postgres.connect("kino") as superuser:
            superuser.execute("SET session_replication_role = replica")
            superuser.execute(FORGET_ONE)
        return seconds

    monkeypatch.setattr(postgres_alone, "settle_staged", forget_one)

    with pytest.raises(SystemExit) as ended:
        bench.postgres_alone(10)

    assert ended.value.code == (
        "postgres alone, set-based wrote other rows than it had to:\n"
        "transfer (refund held wallet generation_failure settlement): 9 rows of 18 credits, must be 10 of 20"
    )
