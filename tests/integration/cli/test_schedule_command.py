"""`schedule`: what runs, when it ran, and what was missed."""

from __future__ import annotations

from datetime import datetime, timedelta

from kino_refunds.schedule import Entry
from tests.clock import claim_slot
from tests.command_line import Run
from tests.scenario import NOW, Scene


def test_schedule_says_what_runs(cli: Run, scene: Scene) -> None:
    """Each entry with its last and next run; exit 1 when one was missed."""
    fresh = cli("schedule", "--json")
    with scene.worker.begin() as connection:
        entry = Entry("kino.expire_lots", timedelta(seconds=60), "")
        claim_slot(connection, entry, now=datetime.now(NOW.tzinfo) - timedelta(minutes=5), claimed_by="test")
    missed = cli("schedule", "--json")
    table = cli("schedule")

    assert fresh.code == 0
    assert [each["name"] for each in fresh.json["items"]] == [
        "kino.sweep_retries",
        "kino.expire_lots",
        "kino.sample_clock",
        "kino.sweep_overdue",
        "kino.run_checks",
    ]
    assert fresh.json["items"][0].keys() == {
        "name", "every_s", "last", "finished", "ended", "result", "next", "missed", "late", "stuck", "what",
    }  # fmt: skip
    assert (missed.code, table.code) == (1, 1)
    assert missed.json["items"][1]["missed"] in {4, 5}
    assert "expire lots" in table.out
