"""Who works on the ledger and what waits for a person: each lack is planted, and only that is found."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.intake.gate import TRIPWIRE, pause_intake
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from tests.integration.doctor.diagnosis import CHECKED, OVERDUE, SWEEPS, Diagnosis, Doctor, Found, work
from tests.scenario import NOW, Scene, make_event

# --- who works on it


FAILING_BUILD = (
    "our own code fails: see `kino-refunds dead-letters list --reason apply_error`; a fixed build reopens it"
)


@pytest.mark.parametrize(
    ("actor", "advice"),
    [
        ("anna", "when the reason is gone: `kino-refunds intake resume`"),
        (TRIPWIRE, FAILING_BUILD),
    ],
)
def test_paused_intake_is_found_and_who_can_open_it(doctor: Doctor, well: Scene, actor: str, advice: str) -> None:
    """What a person closed a person opens; what the tripwire closed opens by itself once the build works."""
    with well.worker.begin() as connection:
        pause_intake(connection, reason="51 of the last 1000", actor=actor)

    found = doctor()

    at = well.rows("SELECT to_char(changed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM kino.intake_state")
    says = f"paused by {actor} at {at[0][0]}Z: 51 of the last 1000"
    assert found == Diagnosis(1, [Found("intake", "fail", says, advice)])


START = "start `celery -A workers.app worker`; if one runs and is not seen, its log says why"


@pytest.mark.parametrize("ago", ["31 seconds", "3 days"])
def test_worker_that_is_silent_is_found(doctor: Doctor, well: Scene, ago: str) -> None:
    """Nobody takes events, and when somebody last did."""
    well.as_superuser(f"UPDATE kino.intake_worker SET seen_at = clock_timestamp() - interval '{ago}'")

    found = doctor()

    seen = well.rows("SELECT to_char(seen_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM kino.intake_worker")
    says = f"0 alive; the last was seen {seen[0][0]}Z"
    assert found == Diagnosis(1, [Found("workers", "fail", says, START)])


def test_worker_that_ended_or_never_was_is_found(doctor: Doctor, well: Scene) -> None:
    """A worker that said that it ends is not alive, however fresh its heartbeat; nor is one that never started."""
    well.as_superuser("UPDATE kino.intake_worker SET stopped_at = seen_at")
    ended = doctor()
    well.as_superuser("DELETE FROM kino.intake_worker")
    never = doctor()

    assert [(each.code, [bad[:2] for bad in each.bad]) for each in (ended, never)] == [(1, [("workers", "fail")])] * 2
    assert ended.bad[0].found.startswith("0 alive; the last was seen ")
    assert never.bad == [Found("workers", "fail", "0 alive; none was ever seen", START)]


LATE = "check that `celery -A workers.app beat` and a worker run, and that Redis is not full"


@pytest.mark.parametrize(
    ("ago_s", "late"),
    [(20, []), (31, ["retry pending events"]), (181, [*SWEEPS, OVERDUE[0]])],
)
def test_sweep_that_stands_still_is_found(doctor: Doctor, scene: Scene, ago_s: int, late: list[str]) -> None:
    """Three slots without a run, and never less than half a minute, mean that beat is dead."""
    work(scene, ago=timedelta(seconds=ago_s))
    scene.as_superuser("UPDATE kino.intake_worker SET seen_at = clock_timestamp()")

    found = doctor()

    assert found.code == (1 if late else 0)
    assert [(each.check, each.level, each.found.partition(": last 2")[0], each.advice) for each in found.bad] == [
        ("beat", "fail", what, LATE) for what in late
    ]


@pytest.mark.parametrize(("started_s_ago", "level", "code"), [(10, "warn", 0), (181, "fail", 1)])
def test_sweep_that_never_ran_is_late_once_a_worker_was_there(
    doctor: Doctor, scene: Scene, started_s_ago: int, level: str, code: int
) -> None:
    """Just after the start it is too early to say; a worker that waited for three slots says that beat is missing."""
    work(scene, started_ago=timedelta(seconds=started_s_ago), name="kino.sweep_retries")

    found = doctor()

    assert found.code == code
    assert [each[:3] for each in found.bad] == [
        ("beat", level, "expire lots: last never"),
        ("beat", level, "note which time belongs to which transaction: last never"),
        ("beat", level, f"{OVERDUE[0]}: last never"),
        ("beat", "warn", f"{CHECKED[0]}: last never"),
    ]


def test_sweep_that_begins_and_never_ends_is_a_warning(doctor: Doctor, well: Scene) -> None:
    """A sweep that raises takes its slot every time, so it looks alive; that none came to its end shows it."""
    well.as_superuser(
        "UPDATE kino.schedule_slot SET slot_at = slot_at - interval '10 minutes' WHERE name = 'kino.expire_lots'",
        "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by) VALUES ('kino.expire_lots', now(), 'beat')",
    )

    found = doctor()

    ((check, level, text, advice),) = found.bad
    assert (found.code, check, level, advice) == (0, "beat", "warn", "a worker's log says why it does not end")
    assert re.fullmatch(r"expire lots: last \S+ \S+Z, ended last \S+ \S+Z", text)


# --- work


def test_work_that_waits_for_a_person_is_found(doctor: Doctor, well: Scene) -> None:
    """Overdue charges, letters with credits at stake and breaks fail the doctor, each with the command to type."""
    well.grant("acct-1")
    with well.product.begin() as connection:
        late = ChargeRequest("job-late", "acct-1", 5, NOW - timedelta(hours=2))
        open_charges(connection, [late, ChargeRequest("job-letter", "acct-1", 3, NOW + timedelta(hours=2))])
    well.charged("job-2")
    well.settle(make_event("failed platform", "job-2"), now=None)
    wrong = make_event("timeout", "job-letter", account_id="somebody else")
    well.settle(make_event("completed", "job-2"), wrong, now=None)

    found = doctor()

    assert found.code == 1
    assert found.bad == [
        Found(
            "overdue charges",
            "fail",
            "1 charge with 5 credits open more than 5 min past deadline and grace",
            "`kino-refunds charges ask --dry-run` shows what the job source knows, and why refunds are withheld",
        ),
        Found(
            "dead letters",
            "fail",
            "1 open (account_mismatch 1), 3 credits at stake",
            "`kino-refunds dead-letters list`",
        ),
        Found("breaks", "fail", "1 break open", "a job's ending disagrees with the ledger: `kino-refunds breaks list`"),
    ]


def test_a_charge_that_is_being_asked_about_is_a_warning(doctor: Doctor, well: Scene) -> None:
    """For 5 minutes past deadline and grace the sweep asks: that is said, and nothing has to be mended."""
    well.grant("acct-1")
    with well.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acct-1", 5, datetime.now(UTC) - timedelta(minutes=2))])

    found = doctor()

    assert (found.code, [each[:3] for each in found.bad]) == (
        0,
        [("overdue charges", "warn", "1 charge past deadline and grace")],
    )


@pytest.mark.parametrize(("minutes", "level", "code"), [(4, None, 0), (6, "warn", 0), (61, "fail", 1)])
def test_who_holds_the_horizon_is_named(
    doctor: Doctor, well: Scene, minutes: int, level: str | None, code: int
) -> None:
    """A writing transaction that stays open holds back statements and relay: its session is named with its program."""
    well.as_superuser(f"UPDATE kino.xid_clock SET sampled_at = kino.clock() - interval '{minutes} minutes'")
    with well.product.begin() as forgotten:
        grant_lots(forgotten, [Grant("never committed", "acct-1", 5, LotClass.COURTESY)])
        pid = forgotten.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        well.as_superuser("INSERT INTO kino.xid_clock DEFAULT VALUES")

        found = doctor()

        forgotten.rollback()
    assert (found.code, [each[:2] for each in found.bad]) == (code, [("horizon", level)] if level else [])
    for each in found.bad:
        assert each.found == f"held for {minutes} min by pid {pid} (kino_product, kino-refunds)"
