"""One clock decides: hosts, Redis and Postgres on wrong clocks, and what is then refunded, expired and said."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import DATABASE, EmbeddedPostgres
from kino_refunds.dev.processes import die_with_parent, environment_of
from kino_refunds.dev.supervisor import Orders
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, balance, grant_lots, open_charges
from kino_refunds.reconciliation.overdue import OverdueRules, sweep_overdue
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.verified import read_verified, sample_clock
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.deliveries import delivery_of
from tests.clock import HOUR, MINUTE, clock_at, run_ahead
from tests.command_line import Run
from tests.conftest import Database
from tests.processes import log_of_file, settings_of
from tests.scenario import Scene, make_event, make_rules, until
from workers import tasks

RULES = OverdueRules(grace=MINUTE, asks=3, ask_window=3 * MINUTE, running_max=24 * HOUR)


def now() -> datetime:
    return datetime.now(UTC)


def charged(scene: Scene, job_id: str, *, deadline: timedelta, credits: int = 8) -> None:
    """Charge a job that has this long until its deadline, by the real clock."""
    scene.grant(f"acct of {job_id}", 100)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest(job_id, f"acct of {job_id}", credits, now() + deadline)])


def status_of(scene: Scene, job_id: str) -> str:
    return str(scene.rows("SELECT status FROM kino.charge_status WHERE job_id = :job_id", job_id=job_id)[0][0])


def sweep(scene: Scene, redis: Redis) -> dict[str, int]:
    """Sweep without a source; returns what was withheld."""
    return dict(sweep_overdue(scene.worker, redis, None, make_rules(), overdue=RULES).withheld)


# --- a host that is wrong


@pytest.mark.parametrize("hours", [1, -1, 3])
def test_a_host_on_another_clock_refunds_no_running_job(scene: Scene, run: Run, hours: int) -> None:
    """`overdue run` on a host that is off finds overdue what is overdue by Postgres' clock, and that only."""
    charged(scene, "running", deadline=30 * MINUTE)

    with time_machine.travel(now() + hours * HOUR, tick=True):
        result = run("overdue", "run", "--json")

    assert (result.code, result.json["overdue"], result.json["outcomes"]) == (0, 0, {})
    assert status_of(scene, "running") == "open"


def test_a_host_on_another_clock_presumes_no_timeout(scene: Scene, redis: Redis) -> None:
    """What is overdue waits while the sweep's own clock differs: the reason is named, and the next sweep settles it."""
    charged(scene, "lost", deadline=-10 * MINUTE)

    with time_machine.travel(now() + HOUR, tick=True):
        withheld = sweep(scene, redis)
    on_time = sweep(scene, redis)

    assert (withheld, on_time) == ({"clock": 1}, {})
    assert status_of(scene, "lost") == "refunded"


def test_a_host_on_another_clock_settles_events(scene: Scene) -> None:
    """Refunds and captures by event go on whatever a host's clock says."""
    charged(scene, "failed", deadline=30 * MINUTE)
    charged(scene, "completed", deadline=30 * MINUTE)
    events = [make_event("failed platform", "failed"), make_event("completed", "completed")]

    with time_machine.travel(now() + 3 * HOUR, tick=True):
        settle_batch(scene.worker, [delivery_of(event) for event in events], make_rules())

    assert [status_of(scene, job_id) for job_id in ("failed", "completed")] == ["refunded", "captured"]


def test_a_charge_opened_after_a_sweep_of_a_fast_host_is_found(scene: Scene, redis: Redis) -> None:
    """A sweep three hours ahead hides nothing: what is opened later and never heard of is overdue in its time."""
    with time_machine.travel(now() + 3 * HOUR, tick=True):
        sweep(scene, redis)
    charged(scene, "lost", deadline=-10 * MINUTE)

    sweep(scene, redis)

    assert status_of(scene, "lost") == "refunded"


OPENED_BY_HAND = """
    INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)
    SELECT charge_id, account_id, deadline_at, credits FROM kino.charge ON CONFLICT DO NOTHING
"""


def test_a_backfilled_charge_is_seen_by_everybody(scene: Scene, redis: Redis, run: Run) -> None:
    """A charge that was opened three hours ago by its row is open all the same: held, counted, and swept."""
    scene.grant("acct of import", 100)
    scene.as_superuser(
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at, opened_at) VALUES"
        " ('import', 'acct of import', 0, kino.clock() - interval '2 hours', kino.clock() - interval '3 hours')",
        OPENED_BY_HAND,
    )

    found = run("status", "--json").json
    swept = sweep_overdue(scene.worker, redis, None, make_rules(), overdue=RULES)

    assert (found["charges_open"], found["charges_overdue"]) == (1, 1)
    assert (swept.overdue, status_of(scene, "import")) == (1, "refunded")


def test_lots_do_not_expire_on_a_host_that_is_ahead(
    scene: Scene, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expiry sweep of a fast host takes nothing: the lot has its hour, and the row of the run says why."""
    scene.grant("acct-1", 100, expires_at=now() + HOUR)
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    monkeypatch.setattr(tasks, "_engine", lambda: scene.worker)
    tasks._redis.cache_clear()

    with time_machine.travel(now() + 2 * HOUR, tick=True):
        tasks.expire_lots()

    ((result,),) = scene.rows("SELECT result FROM kino.schedule_slot WHERE name = 'kino.expire_lots'")
    assert result == {"withheld": {"clock": 1}}
    assert scene.balance("acct-1").available == 100


def test_a_clock_that_was_set_back_presumes_nothing(scene: Scene, redis: Redis) -> None:
    """While Postgres lies behind its own newest row nobody knows what time it is; events settle all the same."""
    run_ahead(scene.worker, 2 * HOUR)
    charged(scene, "lost", deadline=-10 * MINUTE)
    charged(scene, "failed", deadline=HOUR)
    run_ahead(scene.worker, timedelta(0))

    withheld = sweep(scene, redis)
    settle_batch(scene.worker, [delivery_of(make_event("failed platform", "failed"))], make_rules())

    assert withheld == {"clock": 1}
    assert [status_of(scene, job_id) for job_id in ("lost", "failed")] == ["open", "refunded"]


def test_an_ask_of_a_clock_that_was_ahead_is_none(scene: Scene, redis: Redis) -> None:
    """What a sweep noted a year ahead does not keep its charge from being asked about once the clock is right."""
    charged(scene, "lost", deadline=-10 * MINUTE)
    run_ahead(scene.worker, timedelta(days=365))
    sweep_overdue(scene.worker, redis, Running(), make_rules(), overdue=RULES)
    run_ahead(scene.worker, timedelta(0))

    swept = sweep_overdue(scene.worker, redis, Ended(), make_rules(), overdue=RULES)

    assert (swept.overdue, status_of(scene, "lost")) == (1, "captured")


class Running:
    """A job source by which every job runs."""

    state = JobState.RUNNING

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        return dict.fromkeys(job_ids, Answer(self.state))


class Ended(Running):
    """A job source by which every job has completed."""

    state = JobState.COMPLETED


@pytest.mark.parametrize("column", ["next_attempt_at", "leased_until"])
def test_what_waits_since_a_clock_was_ahead_is_due(scene: Scene, column: str) -> None:
    """A time of another try, or a lease, longer than any of ours comes of a wrong clock: the event is tried now."""
    scene.settle(make_event("timeout", "job-1"), now=None)
    scene.charged("job-1")
    scene.as_superuser(
        "UPDATE kino.pending_event SET next_attempt_at = kino.clock()",
        f"UPDATE kino.pending_event SET {column} = kino.clock() + interval '1 year'",
    )

    outcomes = scene.sweep(now=None)

    assert outcomes == {"refunded": 1}


def test_a_clock_that_is_set_back_during_a_sweep_refunds_no_running_job(scene: Scene, redis: Redis) -> None:
    """A job that was due by the clock of the sweep's beginning is not presumed by the one of its end."""
    charged(scene, "running", deadline=30 * MINUTE)
    run_ahead(scene.worker, HOUR)

    class SetsBack:
        def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
            run_ahead(scene.worker, timedelta(0))
            return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN))

    swept = sweep_overdue(scene.worker, redis, SetsBack(), make_rules(), overdue=replace(RULES, asks=1))

    assert (swept.overdue, dict(swept.withheld)) == (1, {"clock": 1})
    assert status_of(scene, "running") == "open"


# --- slots


def test_a_slot_from_the_future_is_no_run(
    scene: Scene, run: Run, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a clock that has been set back silence nothing: they are no runs, and the slot is run over them."""
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    monkeypatch.setattr(tasks, "_engine", lambda: scene.worker)
    tasks._redis.cache_clear()
    at = now().replace(minute=30, second=0, microsecond=0)
    for ahead in (timedelta(0), MINUTE, HOUR):
        scene.as_superuser(
            "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by, claimed_at, finished_at)"
            f" VALUES ('kino.expire_lots', '{at + ahead}', 'fast', '{at + HOUR}', '{at + HOUR}')"
        )

    with clock_at(scene.worker, at + timedelta(seconds=5)):
        before = run("schedule", "--json").json["items"]
        tasks.expire_lots()
        after = run("schedule", "--json").json["items"]

    runs = [{item["name"]: item["last"] for item in items}["kino.expire_lots"] for items in (before, after)]
    assert runs == [None, at.isoformat()]


# --- verified through


def test_verified_through_is_a_sample_below_the_horizon(scene: Scene) -> None:
    """Before the first sample nothing is vouched for; then T is its instant, and never one to come."""
    with scene.worker.begin() as connection:
        nothing = read_verified(connection)
    with clock_at(scene.worker, at := now()), scene.worker.begin() as connection:
        sample_clock(connection)
    with clock_at(scene.worker, at + MINUTE), scene.worker.begin() as connection:
        sampled = read_verified(connection)
    with clock_at(scene.worker, at - HOUR), scene.worker.begin() as connection:
        set_back = read_verified(connection)

    assert (nothing.through, nothing.horizon_age) == (None, None)
    assert (sampled.through, sampled.horizon_age) == (at, MINUTE)
    assert set_back.through == at - HOUR


def test_verified_through_stops_at_the_oldest_open_charge(scene: Scene) -> None:
    """T does not pass a charge that is open, whatever its deadline, and goes on when it is settled."""
    start = now()
    with clock_at(scene.worker, start):
        charge = scene.charged("job-1")
    with clock_at(scene.worker, start + MINUTE), scene.worker.begin() as connection:
        sample_clock(connection)

    with clock_at(scene.worker, start + 2 * MINUTE), scene.worker.begin() as connection:
        waits = read_verified(connection)
    scene.settle(make_event("completed"), now=start + 2 * MINUTE)
    with clock_at(scene.worker, start + 2 * MINUTE), scene.worker.begin() as connection:
        goes_on = read_verified(connection)

    assert (waits.through, waits.oldest_open) == (charge.opened_at, charge.opened_at)
    assert (goes_on.through, goes_on.oldest_open) == (start + MINUTE, None)


def test_an_open_transaction_holds_verified_through(scene: Scene) -> None:
    """A sample that a writing transaction is older than vouches for nothing until that one has ended."""
    with scene.product.begin() as forgotten:
        grant_lots(forgotten, [Grant("g", "acct-1", 5, LotClass.COURTESY)])
        with scene.worker.begin() as connection:
            sample_clock(connection)
        with scene.worker.begin() as connection:
            held = read_verified(connection)
    with scene.worker.begin() as connection:
        free = read_verified(connection)

    assert held.through is None
    assert free.through is not None


# --- whole servers


WORKER_AHEAD = """
import datetime, sys, time_machine
ahead = datetime.timedelta(seconds=float(sys.argv.pop(1)))
time_machine.travel(datetime.datetime.now(datetime.timezone.utc) + ahead, tick=True).start()
from celery.__main__ import main
main()
"""


def test_a_worker_with_beat_on_a_fast_host(
    scene: Scene, database: Database, redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    """A whole worker an hour ahead: it says so, settles events, and neither refunds a running job nor expires a lot."""
    charged(scene, "running", deadline=30 * MINUTE)
    charged(scene, "lost", deadline=-10 * MINUTE)
    charged(scene, "failed", deadline=30 * MINUTE)
    scene.grant("acct-1", 100, expires_at=now() + 30 * MINUTE)
    redis.lpush("generation.job-failed", make_event("failed platform", "failed").model_dump_json())
    log_file = tmp_path / "worker.log"
    settings = settings_of(database, redis_url) | {
        "KINO_JOB_SOURCE": "none",
        "KINO_OVERDUE_EVERY_S": "1",
        "KINO_EXPIRY_EVERY_S": "1",
    }
    ahead = (sys.executable, "-c", WORKER_AHEAD, "3600")
    # time_machine in the process itself: under libfaketime Python's own waits do not return.
    with (
        log_file.open("wb") as log,
        subprocess.Popen(
            [*ahead, "-q", "-A", "workers.app", "worker", "-B", "--schedule", str(tmp_path / "schedule")],
            env=environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, before exec
        ) as worker,
    ):
        try:
            swept = "SELECT count(*) FROM kino.schedule_slot WHERE result -> 'withheld' ->> 'clock' = '1' AND name = :n"
            until(
                lambda: (
                    all(scene.rows(swept, n=n)[0][0] for n in ("kino.sweep_overdue", "kino.expire_lots"))
                    and status_of(scene, "failed") == "refunded"
                ),
                deadline_s=60,
            )
        finally:
            worker.terminate()

    warned = [line for line in log_of_file(log_file) if line["event"].startswith("this host's clock differs")]
    assert [line["ahead_s"] for line in warned] == [pytest.approx(3600, abs=5)]
    assert [status_of(scene, job_id) for job_id in ("running", "lost")] == ["open", "open"]
    assert scene.balance("acct-1").available == 100


@dataclass(frozen=True)
class Ledger:
    """A ledger on a Postgres of its own."""

    url: str
    worker: sa.Engine
    product: sa.Engine


FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


class FastPostgres(EmbeddedPostgres):
    """A Postgres on a machine that is an hour ahead."""

    def _orders(self, port: int) -> Orders:
        orders = super()._orders(port)
        return replace(orders, command=["/usr/bin/env", f"LD_PRELOAD={FAKETIME[0]}", "FAKETIME=+1h", *orders.command])


@pytest.fixture
def fast_postgres() -> Iterator[Ledger]:
    """A Postgres whose machine is an hour ahead."""
    if not FAKETIME:
        pytest.skip("needs Debian's faketime (`.ci/run` installs it)")
    with tempfile.TemporaryDirectory(prefix="kino-clock-") as folder:
        Path(folder).chmod(0o711)
        server = FastPostgres(Path(folder) / "postgres", scratch=True).start()
        try:
            with server.connect() as superuser:
                superuser.execute(f"CREATE DATABASE {DATABASE}".encode())
            with server.connect(DATABASE) as superuser:
                roles = Path(migrate.__code__.co_filename).with_name("roles.sql").read_text(encoding="utf-8")
                superuser.execute(roles.encode())
            migrate(server.url("kino_owner", DATABASE))
            engines = [create_engine(server.url(role, DATABASE)) for role in ("kino_worker", "kino_product")]
            yield Ledger(server.url("kino_worker", DATABASE), *engines)
            for engine in engines:
                engine.dispose()
        finally:
            server.stop()


def test_a_postgres_that_is_ahead_refunds_no_running_job(fast_postgres: Ledger, redis: Redis, run: Run) -> None:
    """Its clock decides what is overdue, and host and Redis confirm nothing: presumed timeouts and expiry wait."""
    with fast_postgres.product.begin() as connection:
        grant_lots(connection, [Grant("g", "ada", 100, LotClass.PURCHASED, expires_at=now() + 2 * HOUR)])
        open_charges(
            connection,
            [ChargeRequest("running", "ada", 8, now() + 30 * MINUTE), ChargeRequest("failed", "ada", 8, now() + HOUR)],
        )

    swept = sweep_overdue(fast_postgres.worker, redis, None, make_rules(), overdue=RULES)
    settle_batch(fast_postgres.worker, [delivery_of(make_event("failed platform", "failed"))], make_rules())
    doctor = run("doctor", "--json", KINO_DATABASE_URL=fast_postgres.url)

    assert (swept.overdue, dict(swept.withheld), dict(swept.outcomes)) == (1, {"clock": 1}, {})
    with fast_postgres.product.begin() as connection:
        assert (balance(connection, "ada").available, balance(connection, "ada").held) == (92, 8)
    found = {item["check"]: item["level"] for item in doctor.json["items"]}
    assert (found["postgres clock"], found["redis clock"]) == ("fail", "ok")
