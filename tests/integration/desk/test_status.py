"""`status`: one screen that says how things stand, and goes on saying it while a server is away."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any

import pytest
from redis import Redis

from kino_refunds.cli import status, status_screen
from kino_refunds.cli.tables import console
from kino_refunds.dev.embedded import LOOPBACK
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.queues import QUEUE_KEYS, SERVED
from kino_refunds.intake.gate import pause_intake
from kino_refunds.ledger import ChargeRequest, open_charges
from kino_refunds.settlement.dead_letters import malformed_letter
from tests.command_line import AWAY_PORT, SCRIPT, Result, Run, outside
from tests.conftest import Database
from tests.pipeline import EMPTY
from tests.scenario import NOW, Scene, make_event

NO_WORKER = {"what": "no worker is alive", "command": "kino-refunds intake status"}
QUIET = {
    "fine": False,
    "troubles": [NO_WORKER],
    "intake": "open",
    "intake_reason": None,
    "intake_paused_by": None,
    "workers_alive": 0,
    "waiting_for_retry": 0,
    "waiting_since": None,
    "breaks_open": 0,
    "charges_open": 0,
    "credits_held": 0,
    "charges_overdue": 0,
    "credits_overdue": 0,
    "queues": EMPTY,
    "dead_letters_open": {},
    "credits_at_stake": 0,
    "verified_through": None,
    "missed_runs": {},
    "late_runs": {},
}


def fill(scene: Scene, redis: Redis) -> None:
    """Something of everything that on-call wants to see."""
    scene.grant("acct-1")
    with scene.product.begin() as connection:
        deadlines = {"job-1": NOW + timedelta(hours=1), "job-late": NOW - timedelta(hours=2), "job-graced": NOW}
        open_charges(connection, [ChargeRequest(job_id, "acct-1", 5, at) for job_id, at in deadlines.items()])
    scene.charged("job-2")
    scene.settle(make_event("failed platform", "job-2"))
    scene.settle(make_event("completed", "job-2"), make_event("completed", "job-early"))
    letters = [
        malformed_letter(raw, SERVED[0], MalformedMessage(reason, "x"))
        for raw, reason in ((b"{", "bad_json"), (b"[", "bad_json"), (b"}", "unknown_type"))
    ]
    scene.keep(*letters)
    with scene.worker.begin() as connection:
        pause_intake(connection, reason="[red]maintenance[/red]", actor="anna")
    scene.as_superuser(
        "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at, stopped_at) VALUES"
        " (gen_random_uuid(), 'lives', 1, 'b', now(), clock_timestamp(), NULL),"
        " (gen_random_uuid(), 'silent', 1, 'b', now(), clock_timestamp() - interval '31 seconds', NULL),"
        " (gen_random_uuid(), 'ended', 1, 'b', now(), clock_timestamp(), now())",
        "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by) VALUES"
        " ('kino.sweep_retries', clock_timestamp(), 'beat'),"
        " ('kino.expire_lots', date_trunc('minute', clock_timestamp()) - interval '2 days', 'beat')",
    )
    redis.lpush(QUEUE_KEYS[0], "one", "two")
    redis.lpush(QUEUE_KEYS[1], "three")
    redis.lpush(f"kino:recovered:{SERVED[1]}", "four")


def test_quiet_ledger_has_every_name(run: Run) -> None:
    """A program reads the same names whatever there is; an instant says when it was so."""
    result = run("status", "--json")

    document = result.json
    at = datetime.fromisoformat(document.pop("at"))
    assert (result.code, result.err, document) == (1, "", QUIET)
    assert at.utcoffset() == timedelta(0)


def test_everything_is_counted(run: Run, scene: Scene, redis: Redis) -> None:
    """Each number is of what is open: settled charges, ended workers and closed letters are not in it."""
    fill(scene, redis)

    # An hour, because NOW is when the tests began.
    document = run("status", "--json", KINO_OVERDUE_GRACE_S="3600").json

    (last,) = scene.rows("SELECT slot_at FROM kino.schedule_slot WHERE name = 'kino.expire_lots'")[0]
    assert datetime.fromisoformat(document.pop("at")) <= datetime.now(UTC)
    assert document.pop("waiting_since").startswith(f"{NOW:%Y}")
    assert document.pop("missed_runs")["expire lots"] >= 60
    assert document == {
        "fine": False,
        "troubles": [
            {"what": "intake is paused by anna: [red]maintenance[/red]", "command": "kino-refunds intake status"},
            {"what": "overdue and not settled: 1 charge, 5 credits", "command": "kino-refunds why job-late"},
            {"what": "3 dead letters open, 0 credits at stake", "command": "kino-refunds dead-letters list"},
            {"what": "1 break open", "command": "kino-refunds breaks show 1"},
            {"what": "expire lots: does not run", "command": "kino-refunds schedule"},
        ],
        "intake": "paused",
        "intake_reason": "[red]maintenance[/red]",
        "intake_paused_by": "anna",
        "workers_alive": 1,
        "waiting_for_retry": 1,
        "breaks_open": 1,
        "charges_open": 3,
        "credits_held": 15,
        "charges_overdue": 1,
        "credits_overdue": 5,
        "queues": EMPTY | {SERVED[0]: 3, "recovered": 1},
        "dead_letters_open": {"bad_json": 2, "unknown_type": 1},
        "credits_at_stake": 0,
        "verified_through": None,
        "late_runs": {"expire lots": last.isoformat()},
    }


def test_person_reads_one_screen(run: Run, scene: Scene, redis: Redis) -> None:
    """Names and values within 80 columns and 24 lines; what has no value is a dash, and reasons are no markup."""
    fill(scene, redis)

    # An hour, because NOW is when the tests began.
    result = run("status", KINO_OVERDUE_GRACE_S="3600")

    lines = result.out.splitlines()
    told = [" ".join(line.split()) for line in lines]
    assert (result.code, result.err) == (1, "")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 34
    assert told[0].startswith("not fine: 5 things 20")
    assert "overdue and not settled: 1 charge, 5 credits: kino-refunds why job-late" in told
    assert told.index("intake paused") > told.index("expire lots: does not run: kino-refunds schedule")
    assert "reason [red]maintenance[/red]" in told
    assert "dead letters open bad_json 2, unknown_type 1" in told
    assert any(line.startswith("late runs expire lots 20") for line in told)


def test_what_does_not_apply_is_not_on_the_screen(run: Run) -> None:
    """An open intake has no reason; an empty list is a dash."""
    lines = [line.split() for line in run("status").out.splitlines()]

    assert ["intake", "open"] in lines
    assert [line for line in lines if line[0] in {"reason", "paused"}] == []
    assert ["dead", "letters", "open", "-"] in lines


def test_schedule_that_stands_still_is_a_finding(run: Run, scene: Scene) -> None:
    """What ran once and has not for three of its periods is exit code 1, also where no whole slot was missed."""
    scene.as_superuser(
        "INSERT INTO kino.schedule_slot (name, slot_at, claimed_by)"
        " VALUES ('kino.expire_lots', clock_timestamp() - interval '20 minutes', 'beat')",
    )

    assert run("schedule", KINO_EXPIRY_EVERY_S="3600").code == 0
    assert run("schedule", KINO_EXPIRY_EVERY_S="300").code == 1


@pytest.mark.parametrize("away", ["KINO_DATABASE_URL", "KINO_REDIS_URL"])
def test_server_that_is_away_is_exit_3(run: Run, away: str) -> None:
    """A status that cannot be read is no status: one line that names the server."""
    scheme = {"KINO_DATABASE_URL": "postgresql://kino_worker@", "KINO_REDIS_URL": "redis://"}[away]

    result = run("status", "--json", **{away: f"{scheme}{LOOPBACK}:{AWAY_PORT}/0"}, stdin=b"")

    assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
    assert away in result.err


def test_watching_is_for_people(bare: Run) -> None:
    """A screen that is drawn again and again is no JSON document."""
    result = bare("status", "--watch", "--json")

    assert result.code == 2
    assert result.err.startswith("error: Invalid value: --watch draws a screen; ")


def watched(run: Run, monkeypatch: pytest.MonkeyPatch, *between: Callable[[], object]) -> Result:
    """Watch, do one thing after each look, and interrupt after the last."""
    todo = list(between)

    def sleep(_seconds: float) -> None:
        if not todo:
            raise KeyboardInterrupt
        todo.pop(0)()

    monkeypatch.setattr(time, "sleep", sleep)
    return run("status", "--watch")


def test_watch_looks_again_and_ends_with_130(run: Run, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is read anew, and Ctrl-C ends it with one word."""

    def pause() -> None:
        with scene.worker.begin() as connection:
            pause_intake(connection, reason="maintenance", actor="anna")

    result = watched(run, monkeypatch, pause)

    states = [line.split()[1] for line in result.out.splitlines() if line.startswith("intake ")]
    assert (result.code, result.err, states) == (130, "interrupted\n", ["open", "paused"])


def test_watch_outlives_a_server_that_is_away(run: Run, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What on-call waits for is that it comes back: the error stands on the screen, and the next look is taken."""
    result = watched(
        run,
        monkeypatch,
        lambda: scene.as_superuser("ALTER TABLE kino.intake_state RENAME TO away"),
        lambda: scene.as_superuser("ALTER TABLE kino.away RENAME TO intake_state"),
    )

    looks = [line for line in result.out.splitlines() if line.startswith("intake ") or "no ledger" in line]
    assert result.code == 130
    assert [line.split("  ")[0] for line in (looks[0], looks[2])] == ["intake"] * 2
    assert looks[1].endswith("  the database has no ledger yet; run `kino-refunds migrate` as kino_owner")


def test_watch_says_that_a_server_hangs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a look gets no answer the screen says so, instead of showing the last one as if it were now."""
    told = Event()
    read, draw = status.read_status, status_screen._draw

    def hang(*arguments: Any) -> dict[str, Any]:
        assert told.wait(60)
        return read(*arguments)

    def drawn(seen: Any, live: Any) -> None:
        draw(seen, live)
        if "no answer for" in str(seen):
            told.set()

    monkeypatch.setattr(status_screen, "HANGS_AFTER_S", 0.05)
    monkeypatch.setattr(status, "read_status", hang)
    monkeypatch.setattr(status_screen, "_draw", drawn)
    result = watched(run, monkeypatch)

    first, *_, last = result.out.splitlines()
    assert result.code == 130
    assert re.fullmatch(r"[\d: Z-]+  no answer for \d+ s: Postgres or Redis hangs", first)
    assert last.startswith("late runs")


def test_fine_is_one_word_and_exit_code_0(run: Run, scene: Scene) -> None:
    """With a worker alive and nothing that waits for a person, the first line says fine."""
    scene.as_superuser(
        "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
        " VALUES (gen_random_uuid(), 'lives', 1, 'b', clock_timestamp(), clock_timestamp())"
    )

    result = run("status")

    assert result.code == 0
    assert result.out.splitlines()[0].startswith("fine  20")


def test_short_screen_has_what_is_not_fine(run: Run, scene: Scene) -> None:
    """Where not everything fits, what is cut off is never what is not fine."""
    scene.as_superuser(
        "INSERT INTO kino.dead_letter (message_key, raw, queue, reason, detail, group_fingerprint, build)"
        " VALUES ('x', 'x', 'generation.timeout', 'bad_json', 'x', 'x', 'x')"
    )
    found = json.loads(run("status", "--json").out)

    short = console.render_lines(status_screen._screen(found, lines_max=4))
    whole = console.render_lines(status_screen._screen(found, lines_max=100))

    told = ["".join(segment.text for segment in line).strip() for line in short]
    assert told[0].startswith("not fine: 2 things")
    assert told[1:3] == [
        "no worker is alive: kino-refunds intake status",
        "1 dead letter open, 0 credits at stake: kino-refunds dead-letters show 1",
    ]
    assert len(told) == 4 < len(whole)


def test_watch_knows_how_high_the_screen_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is known from the terminal itself."""
    heights: list[int | None] = []
    screen = status_screen._screen

    def seen(found: dict[str, Any], *, lines_max: int | None = None) -> Any:
        heights.append(lines_max)
        return screen(found, lines_max=lines_max)

    monkeypatch.setattr(status_screen, "_screen", seen)
    monkeypatch.setattr(console, "_height", 33)
    watched(run, monkeypatch)

    assert heights == [32]


def test_watch_ends_with_a_mistake_of_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a server that is away is waited for; anything else ends the command, and is not shown as a picture."""

    def fall(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(status, "read_status", fall)

    with pytest.raises(ZeroDivisionError):
        watched(run, monkeypatch)


def test_installed_script_stops_watching_on_ctrl_c(database: Database, redis_url: str) -> None:
    """SIGINT in the middle: exit code 130, one word, no traceback."""
    program = subprocess.Popen(
        [SCRIPT, "status", "--watch"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outside() | {"KINO_DATABASE_URL": database.url(), "KINO_REDIS_URL": redis_url, "PYTHONUNBUFFERED": "1"},
    )
    assert program.stdout is not None
    while not program.stdout.readline().startswith(b"late runs"):
        assert program.poll() is None
    program.send_signal(signal.SIGINT)

    _, err = program.communicate(timeout=60)

    assert (program.returncode, err) == (130, b"interrupted\n")
