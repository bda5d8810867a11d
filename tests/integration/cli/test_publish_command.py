"""`publish`: every event goes to its queue, or none does and each wrong line is named."""

from __future__ import annotations

from pathlib import Path

from redis import Redis

from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import read_queued
from kino_refunds.events.schema import to_json
from tests.command_line import HOSTILE, Run, lines
from tests.scenario import make_event


def test_publish_puts_every_event_on_its_queue(run: Run, redis: Redis, tmp_path: Path) -> None:
    """A file and standard input are published alike; empty lines are passed over."""
    failed, completed = make_event("failed platform"), make_event("completed", "job-2")
    (tmp_path / "events").write_bytes(lines(failed, b"\n", b"  \r\n", completed))

    by_file = run("publish", str(tmp_path / "events"), "--json")
    by_stdin = run("publish", "-", stdin=lines(failed))
    nothing = run("publish", "-", "--json")

    assert (by_file.code, by_file.json, by_file.err) == (0, {"published": 2}, "")
    assert (by_stdin.code, by_stdin.err) == (0, "")
    assert nothing.json == {"published": 0}
    assert [parse(message.raw) for message in read_queued(redis).messages] == [failed, failed, completed]


def test_publish_names_every_wrong_line_and_publishes_nothing(run: Run, redis: Redis) -> None:
    """One wrong line keeps all from their queues: a half-published file is hard to correct."""
    good = make_event("completed")
    naive = to_json(good).replace(b"Z", b"", 1) + b"\n"

    result = run("publish", "-", stdin=lines(good, b"{\n", b"\n", good, naive, HOSTILE.encode() + b"\n"))

    said = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert [line.split(":")[:3] for line in said[:-1]] == [
        ["error", " line 2", " bad_json"],
        ["error", " line 5", " invalid_event"],
        ["error", " line 6", " bad_json"],
    ]
    assert said[-1].startswith("error: nothing was published: 3 ")
    assert said[-1].endswith("correct them and run this again")
    assert all(line.isprintable() for line in said)
    assert redis.keys() == []


def test_publish_checks_what_it_will_send_and_not_only_what_it_read(run: Run, redis: Redis) -> None:
    """A line that is fine as it stands but not on the wire is named before anything is published."""
    good = to_json(make_event("completed"))
    inside = good.replace(b"{", b'{"extra":NaN,', 1) + b"\n"
    large = good.replace(b"{", b'{"extra":"' + b"x" * 200_000 + b'",', 1) + b"\n"

    result = run("publish", "-", stdin=lines(*[good + b"\n"] * 501, inside, large))

    assert (result.code, result.out) == (2, "")
    assert [line.split(":")[:3] for line in result.err.splitlines()[:-1]] == [
        ["error", " line 502", " bad_json"],
        ["error", " line 503", " too_large"],
    ]
    assert redis.keys() == []


def test_publish_shows_ten_wrong_lines_of_many(run: Run) -> None:
    """A wrong file does not fill the terminal; how many more there are is said."""
    result = run("publish", "-", stdin=b"x\n" * 12)

    assert len(result.err.splitlines()) == 11
    assert "12 lines are wrong (and 2 more)" in result.err.splitlines()[-1]
