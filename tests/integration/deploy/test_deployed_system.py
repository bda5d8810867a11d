"""The whole system with the rights that deploy/ gives, and the health check of its containers."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.dev.processes import environment_of, start_beat, start_worker
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import SERVED, depths
from kino_refunds.events.schema import Queue
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from tests.conftest import Database
from tests.integration.deploy.deployed_valkey import DeployedValkey, event, refused_for
from tests.integration.deploy.files import DEPLOY, RELAY_QUEUE, USERS
from tests.project import ROOT
from tests.scenario import until


def healthcheck(**settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEPLOY / "healthcheck.py"],
        env={**environment_of(settings), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def open_two_charges(database: Database) -> None:
    """One whose event will come, and one that is overdue already."""
    engine = create_engine(database.url("kino_product"), pooled=False)
    now = datetime.now(UTC)
    with engine.begin() as connection:
        grant_lots(connection, [Grant("order-1", "acme", 100, LotClass.PURCHASED)])
        open_charges(
            connection,
            [
                ChargeRequest("job-1", "acme", credits=3, deadline_at=now + timedelta(hours=1)),
                ChargeRequest("job-lost", "acme", credits=5, deadline_at=now - timedelta(hours=1)),
            ],
        )


@pytest.mark.slow
def test_whole_system_runs_with_the_rights_that_deploy_gives(
    valkey: DeployedValkey, admin: Redis, database: Database, engine: sa.Engine, tmp_path: Path
) -> None:
    """A real worker and beat, as `worker` and `kino_worker`, settle, sweep, relay and are refused nothing."""
    settings = {
        "KINO_DATABASE_URL": database.url("kino_worker"),
        "KINO_REDIS_URL": valkey.url_of("worker"),
        "KINO_JOB_SOURCE": "none",
        "KINO_OVERDUE_EVERY_S": "1",
        "KINO_RELAY_QUEUE": RELAY_QUEUE,
        "KINO_RELAY_EVERY_S": "1",
        "KINO_EXPIRY_EVERY_S": "1",
        "KINO_LOG_FORMAT": "json",
    }

    # A foreign dead worker's batch is there to be recovered, and what no worker can read.
    admin.sadd("kino:workers", "dead")
    admin.lpush(f"kino:inflight:dead:{Queue.TIMEOUT.value}", "not an event")
    worker = start_worker(settings, tmp_path / "worker.log")
    beat = start_beat(settings, tmp_path / "beat-schedule", tmp_path / "beat.log")
    try:
        # The relay tells of what happens after its first round.
        until(lambda: count_rows(engine, "relay_cursor"), deadline_s=60)
        open_two_charges(database)
        with EventPublisher(valkey.url_of("publisher")) as publisher:
            publisher.publish(event(1))
        told: list[Any] = []

        def both_heard() -> bool:
            worker.require_alive()
            with valkey.client("product") as product:
                told.extend(product.rpop(RELAY_QUEUE, 10) or [])
            return len(told) >= 2

        until(both_heard, deadline_s=60)
        until(lambda: count_rows(engine, "dead_letter") == 1)
        until(lambda: count_rows(engine, "schedule_slot WHERE result IS NOT NULL AND name = 'kino.expire_lots'"))
        alive = healthcheck(**settings)
        doctor = subprocess.run(
            [sys.executable, "-c", "from kino_refunds.cli.main import main; main()", "doctor", "--json"],
            env=environment_of(settings),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        beat.stop()
        code = worker.stop()

    with engine.connect() as connection:
        settled = connection.execute(sa.text("SELECT job_id, status FROM kino.charge_status ORDER BY job_id")).all()
    assert settled == [("job-1", "refunded"), ("job-lost", "refunded")]
    assert code == 0
    assert (alive.returncode, alive.stderr) == (0, "")
    assert doctor.returncode == 0, doctor.stdout
    assert depths(admin) == dict.fromkeys((*SERVED, "in-flight", "recovered"), 0)
    assert [refused_for(admin, user) for user in USERS] == [[]] * len(USERS)


def count_rows(engine: sa.Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM kino.{table}")).scalar_one())


@pytest.mark.parametrize(
    ("seen_s_ago", "code", "said"),
    [(5, 0, ""), (500, 1, "the last heartbeat of host"), (None, 1, "no intake of host")],
)
def test_healthcheck_says_whether_the_heart_beats(
    database: Database, engine: sa.Engine, seen_s_ago: int | None, code: int, said: str
) -> None:
    """A container is healthy while its own intake writes heartbeats, and only then."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
                " SELECT gen_random_uuid(), host, 1, 'x', now(), clock_timestamp() - make_interval(secs => ago)"
                " FROM (VALUES (:host, CAST(:ago AS float8)), ('another', 1)) AS v (host, ago) WHERE ago IS NOT NULL"
            ),
            {"host": socket.gethostname(), "ago": seen_s_ago},
        )

    first = healthcheck(KINO_DATABASE_URL=database.url())
    done = healthcheck(KINO_DATABASE_URL=database.url())

    assert (first.returncode, done.returncode) == (code, code), "to look is not to beat"
    assert said in done.stderr


def test_healthcheck_does_not_blame_a_worker_for_its_database() -> None:
    """While Postgres is away the check says yes: restarting every worker would mend nothing."""
    assert healthcheck(KINO_DATABASE_URL=f"postgresql://kino_worker@{LOOPBACK}:1/kino").returncode == 0


def test_healthcheck_does_not_blame_a_worker_for_a_ledger_that_takes_no_writes(
    database: Database, engine: sa.Engine
) -> None:
    """On a read-only Postgres no heartbeat can be written; workers keep their batches, and must not be restarted."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
                " VALUES (gen_random_uuid(), :host, 1, 'x', now(), now() - interval '1 hour')"
            ),
            {"host": socket.gethostname()},
        )
    blamed = healthcheck(KINO_DATABASE_URL=database.url())
    with database.servers.postgres.connect(database.name) as superuser:
        superuser.execute(
            "CREATE FUNCTION kino.planted() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION 'a standby' USING ERRCODE = '25006'; END $$"
        )
        superuser.execute("CREATE TRIGGER planted BEFORE UPDATE ON kino.intake_worker EXECUTE FUNCTION kino.planted()")

    done = healthcheck(KINO_DATABASE_URL=database.url())

    assert (blamed.returncode, done.returncode) == (1, 0), done.stderr
