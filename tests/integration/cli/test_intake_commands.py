"""`intake pause`, `resume` and `status`: by name, and never in the name of the tripwire."""

from __future__ import annotations

from datetime import datetime

from redis import Redis

from tests.command_line import Run
from tests.pipeline import FAILED
from tests.scenario import Scene


def is_time(text: str) -> bool:
    return datetime.fromisoformat(text).utcoffset() is not None


def test_intake_is_paused_and_resumed_by_name(cli: Run, redis: Redis) -> None:
    """Who pauses says why; status exits 1 meanwhile and says who, why and what waits; resuming ends it."""
    redis.lpush(FAILED, b"1", b"2")

    paused = cli("intake", "pause", "--reason", "maintenance", "--by", "bob", "--yes")
    again = cli("intake", "pause", "--reason", "another", "--yes")
    closed = cli("intake", "status", "--json")
    shown = cli("intake", "status")
    resumed = cli("intake", "resume")
    opened = cli("intake", "status", "--json")

    assert [paused.code, again.code, closed.code, resumed.code] == [0, 0, 1, 0]
    assert closed.json.keys() == {"paused", "reason", "actor", "changed_at", "workers", "waiting"}
    assert is_time(closed.json.pop("changed_at"))
    assert {k: v for k, v in closed.json.items() if k != "changed_at"} == {
        "paused": True,
        "reason": "maintenance",
        "actor": "bob",
        "workers": [],
        "waiting": {
            FAILED: 2,
            "generation.timeout": 0,
            "generation.safety-rejection": 0,
            "generation.job-completed": 0,
            "in-flight": 0,
            "recovered": 0,
        },
    }
    assert "already" in again.out
    assert "maintenance" in shown.out
    assert (opened.json["paused"], opened.json["actor"]) == (False, "anna")


def test_status_exits_1_unless_somebody_takes_events(cli: Run, scene: Scene) -> None:
    """An open gate without a living worker is a finding; with one it is fine."""
    nobody = cli("intake", "status")
    for number, stopped in enumerate(("now()", "NULL")):
        scene.as_superuser(
            "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at, stopped_at, counts)"
            f" VALUES ('00000000-0000-4000-8000-00000000000{number}', 'h', 1, 'b', now(), now(), {stopped},"
            """ '{"messages": 5}')"""
        )
    somebody = cli("intake", "status", "--json")

    workers = [(each["worker_id"][-1], each["alive"], each["messages"]) for each in somebody.json["workers"]]
    assert (nobody.code, somebody.code) == (1, 0)
    assert workers == [("1", True, 5), ("0", False, 5)]


def test_nobody_pauses_in_the_name_of_the_tripwire(cli: Run) -> None:
    """A person's pause ends only by a person: it cannot be signed with the name that opens by itself."""
    said = cli("intake", "pause", "--reason", "r", "--by", "tripwire", "--yes")

    assert said.code == 2
    assert not cli("intake", "status", "--json").json["paused"]
