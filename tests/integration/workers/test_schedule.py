"""What runs by itself: one run a slot, and who notices a missing one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.schedule import KEPT_FOR, Entry, Run, finish_slot
from kino_refunds.settings import Settings, load_settings
from tests.clock import HOUR, MINUTE, SECOND, claim_slot, read_schedule
from tests.conftest import Database
from tests.failing import Killed
from tests.scenario import Scene, make_event
from workers import tasks
from workers.schedule import beat_schedule

SLOT = datetime(2026, 11, 2, 10, 0, tzinfo=UTC)
ENTRY = Entry("kino.expire_lots", MINUTE, "expire lots")


# --- slots


def claim(scene: Scene, now: datetime, by: str = "beat-1", entry: Entry = ENTRY) -> datetime | None:
    with scene.worker.begin() as connection:
        return claim_slot(connection, entry, now=now, claimed_by=by)


def run_at(scene: Scene, *instants: datetime, entry: Entry = ENTRY) -> None:
    """Run an entry at these instants, in one transaction."""
    with scene.worker.begin() as connection:
        for now in instants:
            slot_at = claim_slot(connection, entry, now=now, claimed_by="beat-1")
            if slot_at is not None:
                finish_slot(connection, entry, slot_at, {"lots": 0})


def read(scene: Scene, now: datetime, entry: Entry = ENTRY) -> Run:
    with scene.worker.begin() as connection:
        (run,) = read_schedule(connection, [entry], now=now)
    return run


def slots(scene: Scene) -> list[tuple[str, datetime, str]]:
    rows = scene.rows("SELECT name, slot_at, claimed_by FROM kino.schedule_slot ORDER BY name, slot_at")
    return [tuple(row) for row in rows]


def test_two_beats_make_one_run(scene: Scene) -> None:
    """Whoever comes second in a slot does not run, early or late in it; the next slot is another run."""
    instants = (SLOT, SLOT + MINUTE - timedelta(microseconds=1), SLOT + MINUTE)

    claimed = [claim(scene, now, f"beat-{number}") for number, now in enumerate(instants)]

    assert claimed == [SLOT, None, SLOT + MINUTE]
    assert slots(scene) == [(ENTRY.name, SLOT, "beat-0"), (ENTRY.name, SLOT + MINUTE, "beat-2")]


def test_two_that_claim_at_the_same_instant_make_one_run(scene: Scene) -> None:
    """The row is the promise: of eight that ask together exactly one is given the slot."""
    together = threading.Barrier(8)

    def ask(number: int) -> datetime | None:
        together.wait(30)
        return claim(scene, SLOT, f"beat-{number}")

    with ThreadPoolExecutor(8) as pool:
        claimed = sorted(pool.map(ask, range(8)), key=str)

    assert claimed == [SLOT, *[None] * 7]
    assert len(slots(scene)) == 1


def test_a_claim_that_is_rolled_back_leaves_the_slot(scene: Scene) -> None:
    """Whoever dies before its claim is committed has not taken the run from anybody."""
    with scene.worker.connect() as connection:
        claim_slot(connection, ENTRY, now=SLOT, claimed_by="dies")
        connection.rollback()

    claimed = claim(scene, SLOT)

    assert claimed == SLOT


def test_each_entry_has_its_own_slots(scene: Scene) -> None:
    """Two tasks in the same instant are two runs."""
    other = Entry("kino.sweep_retries", MINUTE, "try again")

    claimed = [claim(scene, SLOT), claim(scene, SLOT, entry=other)]

    assert claimed == [SLOT, SLOT]


def test_a_late_beat_runs_now_and_not_twice(scene: Scene) -> None:
    """Beat that comes back after ten minutes makes one run, not ten; what it skipped is counted as missed."""
    run_at(scene, SLOT, SLOT + 10 * MINUTE, SLOT + 10 * MINUTE + SECOND)

    found = read(scene, SLOT + 11 * MINUTE + SECOND)

    assert [slot for _, slot, _ in slots(scene)] == [SLOT, SLOT + 10 * MINUTE]
    assert (found.last, found.next, found.missed) == (SLOT + 10 * MINUTE, SLOT + 12 * MINUTE, 9)


def test_slots_of_a_day_ago_are_forgotten(scene: Scene) -> None:
    """A claim clears what is older than a day of its own entry, and nothing else."""
    other = Entry("kino.sweep_retries", MINUTE, "try again")
    run_at(scene, SLOT - KEPT_FOR - MINUTE, SLOT - KEPT_FOR, SLOT - HOUR)
    run_at(scene, SLOT - KEPT_FOR - MINUTE, entry=other)

    claim(scene, SLOT)

    assert [(name, slot) for name, slot, _ in slots(scene)] == [
        (ENTRY.name, SLOT - KEPT_FOR),
        (ENTRY.name, SLOT - HOUR),
        (ENTRY.name, SLOT),
        (other.name, SLOT - KEPT_FOR - MINUTE),
    ]


# --- what the schedule says


def test_what_never_ran_is_said_so(scene: Scene) -> None:
    """On the first day there is a next run and no last one, and nothing was missed yet."""
    found = read(scene, SLOT + SECOND)

    assert found == Run(
        name=ENTRY.name,
        every_s=60.0,
        last=None,
        finished=None,
        ended=None,
        result=None,
        next=SLOT + MINUTE,
        missed=0,
        late=False,
        stuck=False,
        what="expire lots",
    )


def test_a_run_is_kept_with_its_result(scene: Scene) -> None:
    """Of a run one sees when it was, that it has ended, and what it came to."""
    claim(scene, SLOT)
    started = read(scene, SLOT + SECOND)
    with scene.worker.begin() as connection:
        finish_slot(connection, ENTRY, SLOT, {"lots": 3})

    found = read(scene, SLOT + SECOND)

    assert (started.last, started.finished, started.result) == (SLOT, None, None)
    assert found.finished is not None
    assert (found.last, found.result, found.missed) == (SLOT, {"lots": 3}, 0)


def test_a_regular_run_misses_nothing(scene: Scene) -> None:
    """As long as every slot of the last hour has its run nothing is missed."""
    run_at(scene, *[SLOT + n * MINUTE for n in range(90)])

    found = read(scene, SLOT + 90 * MINUTE)

    assert found.missed == 0


def test_the_slot_that_has_just_begun_is_not_missed(scene: Scene) -> None:
    """A run is missed only once its slot is over."""
    run_at(scene, SLOT)

    missed = [read(scene, SLOT + n * MINUTE + SECOND).missed for n in range(3)]

    assert missed == [0, 0, 1]


def test_a_beat_that_died_long_ago_is_missed(scene: Scene) -> None:
    """When nothing has run for hours every slot of the last hour is missed: silence is not health."""
    run_at(scene, *[SLOT - 5 * HOUR + n * MINUTE for n in range(10)])

    found = read(scene, SLOT)

    assert (found.last, found.missed) == (SLOT - 5 * HOUR + 9 * MINUTE, 60)


def test_a_gap_that_began_before_the_last_hour_is_missed(scene: Scene) -> None:
    """Beat that has just come back does not hide the hour before it."""
    run_at(scene, SLOT - 3 * HOUR, SLOT - MINUTE)

    found = read(scene, SLOT)

    assert found.missed == 59


def test_a_beat_that_is_a_little_late_each_time_misses_nothing(scene: Scene) -> None:
    """Celery's beat counts each period from its last tick, so it drifts; that must not skip a run."""
    period = beat_schedule(Settings.model_construct())[ENTRY.name]["schedule"]
    ticks = [SLOT + 50 * SECOND + n * timedelta(seconds=period + 0.4) for n in range(int(3600 // period))]
    run_at(scene, *ticks)

    found = read(scene, ticks[-1])

    assert found.missed == 0


def test_a_sweep_that_dies_gives_its_events_back_as_soon_as_its_worker_counts_as_dead(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a retry sweep had in hand when it was killed waits no longer than its worker's batch: the alive TTL."""
    scene.settle(make_event("timeout"))
    scene.as_superuser("UPDATE kino.pending_event SET next_attempt_at = now() - interval '1 hour'")
    monkeypatch.setenv("KINO_STATEMENT_TIMEOUT_MS", "1000")
    monkeypatch.setattr(tasks, "_engine", lambda: scene.worker)

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("kino_refunds.settlement.retries.settle_batch", killed)
    alive_ttl = timedelta(seconds=load_settings().alive_ttl_s)
    before = datetime.now(UTC)
    with pytest.raises(Killed):
        tasks.sweep_retries()
    after = datetime.now(UTC)

    ((leased_until,),) = scene.rows("SELECT leased_until FROM kino.pending_event")
    assert before + alive_ttl <= leased_until <= after + alive_ttl


@pytest.fixture
def swept(scene: Scene, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A worker's settings, for tasks that run in this process."""
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    monkeypatch.setattr(tasks, "_engine", lambda: scene.worker)
    return scene


def test_a_round_runs_every_check(swept: Scene) -> None:
    """One after the other, by nobody's hand; without a source `matching` says that it compares nothing."""
    swept.charged("job-1")
    swept.settle(make_event("timeout", "job-1"), now=None)

    tasks.run_checks()

    rows = swept.rows('SELECT "check", state, compared, actor FROM kino.check_run ORDER BY run_id')
    assert [row.check for row in rows] == [check.name for check in CHECKS]
    assert {row.actor for row in rows} == {"schedule"}
    assert {row.check: row.compared for row in rows}["decisions"] == 1
    [slot] = swept.rows("SELECT result FROM kino.schedule_slot WHERE name = 'kino.run_checks'")
    assert {name: said["state"] for name, said in slot.result.items()} == {
        "matching": "not_comparable",
        "relay": "not_comparable",
    }


def test_a_check_that_fails_keeps_no_other_from_running(swept: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose settings are wrong ends `matching` alone, and the round's row says so."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "sql")
    monkeypatch.setenv("KINO_JOB_SOURCE_URL", "postgresql://reader@127.0.0.1:9/jobs")
    monkeypatch.setenv("KINO_JOB_SOURCE_QUERY", "SELECT 1")

    tasks.run_checks()

    [slot] = swept.rows("SELECT result FROM kino.schedule_slot WHERE name = 'kino.run_checks'")
    assert "needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids" in slot.result["matching"]["error"]
    ran = {row.check for row in swept.rows('SELECT "check" FROM kino.check_run')}
    assert ran == {check.name for check in CHECKS} - {"matching"}
