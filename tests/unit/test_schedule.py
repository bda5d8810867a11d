"""Slots of what runs by itself, and what a row of runs says: late, missed or stuck. No server, no clock."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.schedule import LATE_MIN, LATE_SLOTS, LOOK_BACK, Entry, Run, Slots, _run, entries
from kino_refunds.settings import Settings, load_settings
from tests.clock import HOUR, MINUTE, SECOND, TICK
from workers.schedule import beat_schedule

SLOT = datetime(2026, 11, 2, 10, 0, tzinfo=UTC)
ENTRY = Entry("kino.expire_lots", MINUTE, "expire lots")


@pytest.mark.parametrize("every", [2.0, 5.0, 60.0, 7.5])
def test_a_slot_begins_at_the_same_instant_everywhere(every: float) -> None:
    """Slots are counted from the epoch, so that machines agree without talking; every instant lies in one."""
    entry = Entry("any", timedelta(seconds=every), "any")

    starts = [entry.slot(SLOT + SECOND * n / 4) for n in range(40)]

    assert all(entry.slot(start) == start for start in starts)
    assert all(start <= SLOT + SECOND * n / 4 < start + entry.every for n, start in enumerate(starts))


def test_what_is_off_is_not_scheduled() -> None:
    """Without a job source nobody is asked, and without a queue nobody is told; both are off by default."""
    sweeps = ["kino.sweep_retries", "kino.expire_lots", "kino.sample_clock"]
    checks = ["kino.run_checks"]
    always = [*sweeps, *checks]

    default = entries(Settings.model_construct())
    everything = entries(Settings.model_construct(job_source="none", relay_queue="product.refunds"))

    assert [entry.name for entry in default] == always
    assert [entry.name for entry in everything] == [*sweeps, "kino.sweep_overdue", *checks, "kino.relay_refunds"]
    assert sorted(beat_schedule(Settings.model_construct())) == sorted(always)


def test_an_empty_setting_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """`KINO_RELAY_QUEUE=` in a compose file configures no queue: nothing must fill a Redis unread."""
    monkeypatch.setenv("KINO_RELAY_QUEUE", "")

    names = [entry.name for entry in entries(load_settings())]

    assert "kino.relay_refunds" not in names


@pytest.mark.parametrize(
    ("now", "slot"),
    [
        (SLOT, SLOT),
        (SLOT + TICK, SLOT),
        (SLOT + MINUTE - TICK, SLOT),
        (SLOT + MINUTE, SLOT + MINUTE),
        (SLOT - TICK, SLOT - MINUTE),
        (datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)),
        (datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(1969, 12, 31, 23, 59, tzinfo=UTC)),
    ],
)
def test_a_slot_has_its_first_instant_and_not_its_last(now: datetime, slot: datetime) -> None:
    """The instant at which a slot ends belongs to the next one, also before the epoch."""
    assert ENTRY.slot(now) == slot


SINCE = SLOT - LOOK_BACK
REGULAR = Slots(last=SLOT, finished=SLOT, first=SINCE, slots=60, ended=SLOT)
LATE_AFTER = LATE_SLOTS * MINUTE


def said(row: Slots, *, workers_since: datetime | None = SINCE, now: datetime = SLOT, entry: Entry = ENTRY) -> Run:
    return _run(entry, row, workers_since, now)


@pytest.mark.parametrize(
    ("row", "now", "missed"),
    [
        (REGULAR, SLOT, 0),
        (REGULAR, SLOT + MINUTE - TICK, 0),
        (REGULAR._replace(slots=59), SLOT, 1),
        (REGULAR._replace(slots=0), SLOT, 60),
        (Slots(last=SLOT - MINUTE, first=SLOT - 10 * MINUTE, slots=10), SLOT, 0),
        (Slots(last=SLOT - 10 * MINUTE, first=SLOT - 10 * MINUTE, slots=1), SLOT, 9),
        (Slots(), SLOT, 0),
        (Slots(last=SLOT, first=SLOT, slots=0), SLOT, 0),
        (Slots(first=SINCE, slots=61), SLOT, 0),
    ],
    ids=[
        "each minute of the hour",
        "the current slot is not over",
        "one gap",
        "a whole hour",
        "young, each minute",
        "young, then nothing",
        "never ran",
        "began in this slot",
        "once more than there are slots",
    ],
)
def test_slots_of_the_last_hour_without_a_run_are_missed(row: Slots, now: datetime, missed: int) -> None:
    """Only slots that are over count, from the first run or for an hour; nothing is missed of what never began."""
    assert said(row, now=now).missed == missed


@pytest.mark.parametrize(
    ("row", "workers_since", "now", "late"),
    [
        (REGULAR, SINCE, SLOT + LATE_AFTER, False),
        (REGULAR, SINCE, SLOT + LATE_AFTER + TICK, True),
        (Slots(), None, SLOT, False),
        (Slots(), SLOT - LATE_AFTER, SLOT, False),
        (Slots(), SLOT - LATE_AFTER - TICK, SLOT, True),
        (Slots(last=SLOT, first=SINCE), SLOT - HOUR, SLOT + SECOND, False),
    ],
    ids=["three slots ago", "before that", "no worker ever", "a young worker", "an old worker", "late, and runs again"],
)
def test_what_should_have_run_by_now_is_late(
    row: Slots, workers_since: datetime | None, now: datetime, *, late: bool
) -> None:
    """Three slots without a run are late; what never ran is late only where a worker was there to run it."""
    assert said(row, workers_since=workers_since, now=now).late is late


@pytest.mark.parametrize(("since_last", "late"), [(LATE_MIN, False), (LATE_MIN + TICK, True)])
def test_a_quick_sweep_is_not_late_within_a_restart(since_last: timedelta, *, late: bool) -> None:
    """A sweep of every two seconds is not dead after six: a restart of beat takes longer."""
    quick = replace(ENTRY, every=2 * SECOND)

    assert said(REGULAR, now=SLOT + since_last, entry=quick).late is late


@pytest.mark.parametrize(
    ("row", "workers_since", "stuck"),
    [
        (REGULAR, SINCE, False),
        (REGULAR._replace(ended=SLOT - LATE_AFTER), SINCE, False),
        (REGULAR._replace(ended=SLOT - LATE_AFTER - TICK), SINCE, True),
        (REGULAR._replace(ended=None), SLOT - LATE_AFTER, False),
        (REGULAR._replace(ended=None), SLOT - LATE_AFTER - TICK, True),
        (REGULAR._replace(ended=None), None, False),
        (Slots(), SINCE, False),
    ],
    ids=[
        "each run ends",
        "the last end is three slots ago",
        "the last end is before that",
        "a young worker's runs never ended",
        "an old worker's runs never ended",
        "no worker is known",
        "never ran",
    ],
)
def test_runs_that_start_and_do_not_end_are_stuck(row: Slots, workers_since: datetime | None, *, stuck: bool) -> None:
    """A sweep that dies each time is no sweep, although its slots are claimed."""
    assert said(row, workers_since=workers_since).stuck is stuck


def test_the_next_run_is_in_the_next_slot() -> None:
    """Whatever ran before, the next slot begins where this one ends."""
    found = said(REGULAR, now=SLOT + 59 * SECOND)

    assert (found.last, found.next, found.every_s) == (SLOT, SLOT + MINUTE, 60.0)
