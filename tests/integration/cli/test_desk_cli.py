"""The desk on the command line: what each command says, exits with, and refuses; hostile text stays text."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from redis import Redis

from kino_refunds.cli.main import _run, main
from kino_refunds.desk import replays
from kino_refunds.desk.protection import discard_although_open, read_protection
from kino_refunds.errors import LetterProtects
from kino_refunds.events.envelope import message_key
from kino_refunds.events.schema import Queue, to_json
from kino_refunds.reconciliation.guard import OverdueCharge, read_guard
from kino_refunds.schedule import Entry
from kino_refunds.settings import load_settings
from kino_refunds.settlement.dead_letters import DeadLetter, poison_letter, storable
from tests.clock import claim_slot, record_dead_letters
from tests.conftest import Database
from tests.malformed import bare, envelope
from tests.scenario import NOW, PATIENT, Broken, Scene, Waits, make_event, until

SCRIPT = Path(sys.executable).with_name("kino-refunds")
FAILED = "generation.job-failed"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\x00\r\x7f"
MARKUP = "[bold red]x[/] [link=http://evil]y[/link] :warning: [/nonsense]"
TEN_KB = "x" * 10_000


class Said(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its one JSON document, on one line."""
        (line,) = self.out.splitlines()
        return json.loads(line)


Cli = Callable[..., Said]


@pytest.fixture
def lonely_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, without a terminal, where both servers are away."""
    monkeypatch.setenv("KINO_DATABASE_URL", "postgresql://kino_worker@127.0.0.1:9/kino")
    monkeypatch.setenv("KINO_REDIS_URL", "redis://127.0.0.1:9/0")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = _run(arguments)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli(lonely_cli: Cli, database: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command against the test's servers."""
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    return lonely_cli


def harmless(said: Said) -> bool:
    """Nothing that was printed acts on a terminal."""
    return all(c.isprintable() or c == "\n" for c in said.out + said.err)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def keep(scene: Scene, *letters: DeadLetter) -> None:
    with scene.worker.begin() as connection:
        record_dead_letters(connection, letters, now=NOW, build="test")


def letter(raw: bytes, *, job_id: str | None = None, detail: str = "detail", reason: str = "bad_json") -> DeadLetter:
    return DeadLetter(message_key(raw), raw, FAILED, reason, detail, job_id=job_id, may_hold_others=job_id is None)


def unread(scene: Scene, job_id: str = "job-1", kind: str = "failed platform") -> bytes:
    """A dead letter whose event would settle; returns its bytes."""
    raw = to_json(make_event(kind, job_id))
    keep(scene, poison_letter(raw, FAILED, 3))
    return raw


def statuses(scene: Scene) -> list[tuple[str, str | None]]:
    rows = scene.rows("SELECT status, status_actor FROM kino.dead_letter ORDER BY dead_letter_id")
    return [tuple(row) for row in rows]


def is_time(text: str) -> bool:
    return datetime.fromisoformat(text).utcoffset() is not None


# --- every command


COMMANDS = [
    "intake",
    "intake status",
    "intake pause",
    "intake resume",
    "retries",
    "retries list",
    "retries show",
    "retries run-now",
    "dead-letters",
    "dead-letters list",
    "dead-letters show",
    "dead-letters replay",
    "dead-letters discard",
    "dead-letters note",
    "breaks",
    "breaks list",
    "breaks show",
    "breaks accept",
    "charges",
    "charges list",
    "charges open",
    "relay",
    "relay rewind",
    "schedule",
    "overdue",
    "overdue run",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's help says what it does and shows how it is typed; each group lists its commands."""
    code = _run([*command.split(), "--help"])
    said = capsys.readouterr().out

    group = any(other.startswith(f"{command} ") for other in COMMANDS)
    assert code == 0
    assert ("Commands" if group else f"Example: kino-refunds {command}") in " ".join(said.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["intake", "pause", "--reason", "r"],
        ["dead-letters", "discard", "1", "--note", "n"],
        ["dead-letters", "discard", "1", "--note", "n", "--although-open", "job-1"],
        ["breaks", "accept", "1", "--note", "n"],
        ["relay", "rewind", "--to", "2026-01-31T12:00:00Z"],
    ],
    ids=" ".join,
)
def test_what_others_feel_needs_yes_without_a_terminal(lonely_cli: Cli, arguments: list[str]) -> None:
    """Where nobody can be asked, a command that others feel asks no server for anything, says --yes, and exits 2."""
    said = lonely_cli(*arguments)

    assert said.code == 2
    assert "--yes" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["intake", "pause", "--yes"],
        ["intake", "stop"],
        ["dead-letters", "show", "one"],
        ["dead-letters", "show", ESCAPES],
        ["dead-letters", "replay"],
        ["dead-letters", "replay", "1", "2", "--edited", __file__],
        ["dead-letters", "list", "--limit", "0"],
        ["dead-letters", "list", "--status", "opne"],
        ["dead-letters", "discard", "1", "--yes"],
        ["breaks", "list", "--status", "opne"],
        ["breaks", "accept", "1", "--yes"],
        ["breaks", "accept", "1", "--note", " ", "--yes"],
        ["dead-letters", "discard", "1", "--note", "", "--yes"],
        ["dead-letters", "note", "1", " "],
        ["intake", "pause", "--reason", "", "--yes"],
        ["intake", "resume", "--by", ""],
        ["retries", "show"],
    ],
    ids=lambda arguments: ascii(" ".join(arguments[:4]))[:60],
)
def test_what_cannot_be_meant_is_a_usage_error(lonely_cli: Cli, arguments: list[str]) -> None:
    """A command that lacks something, or names what there is not, exits 2 and says so on standard error."""
    said = lonely_cli(*arguments)

    assert said.code == 2
    assert said.out == ""
    assert said.err != ""


NOT_THERE = (
    "dead-letters show 7",
    "dead-letters replay 7",
    "dead-letters replay 7 --dry-run",
    "dead-letters discard 7 --note n --yes",
    "dead-letters note 7 text",
    f"dead-letters show {'9' * 40}",
    "breaks show 7",
    "breaks accept 7 --note n --yes",
    "retries show no-such-event",
)


def test_what_is_not_there_is_one_line_and_exit_1(cli: Cli, scene: Scene) -> None:
    """A number or id that nobody has is said in one line on standard error; nothing is written."""
    before = scene.everything()

    said = {command: cli(*command.split()) for command in NOT_THERE}

    assert {command: (each.code, each.out) for command, each in said.items()} == dict.fromkeys(NOT_THERE, (1, ""))
    assert [each.err for each in said.values() if not re.fullmatch(r"error: [^\n]+\n", each.err)] == []
    assert scene.everything() == before


def test_an_event_that_does_not_wait_cannot_be_run(cli: Cli) -> None:
    """Whoever mistypes an event's id is told so, and does not believe that it was tried."""
    said = cli("retries", "run-now", "no-such-event")

    assert said.code == 1
    assert re.fullmatch(r"error: [^\n]*no-such-event[^\n]*\n", said.err)


AWAY = ["intake status", "intake resume", "retries list", "retries run-now", "dead-letters list", "breaks list"]


@pytest.mark.parametrize("command", [*AWAY, "dead-letters replay 1", "schedule"])
def test_without_postgres_a_command_exits_3(lonely_cli: Cli, command: str) -> None:
    """A database that is away is exit 3 and one line that names the setting, without a traceback."""
    said = lonely_cli(*command.split())

    assert said.code == 3
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]*KINO_DATABASE_URL[^\n]*\n", said.err)


def test_without_redis_a_command_exits_3(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that is away is exit 3 and one line that names the setting."""
    monkeypatch.setenv("KINO_REDIS_URL", "redis://127.0.0.1:9/0")

    said = cli("intake", "status")

    assert said.code == 3
    assert re.fullmatch(r"error: [^\n]*KINO_REDIS_URL[^\n]*\n", said.err)


def test_a_redis_url_that_cannot_be_one_exits_2(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that cannot be what it says is exit 2 and one line that names it."""
    said = []
    for url in ("http://127.0.0.1/0", "redis://127.0.0.1:port/0", "127.0.0.1"):
        monkeypatch.setenv("KINO_REDIS_URL", url)
        said.append(cli("intake", "status"))

    assert [each.code for each in said] == [2, 2, 2]
    assert all(re.fullmatch(r"error: [^\n]*KINO_REDIS_URL[^\n]*\n", each.err) for each in said)


# --- intake


def test_intake_is_paused_and_resumed_by_name(cli: Cli, redis: Redis) -> None:
    """Who pauses says why; status exits 1 meanwhile and says who, why and what waits; resuming ends it."""
    redis.lpush(FAILED, b"1", b"2")

    paused = cli("intake", "pause", "--reason", "maintenance", "--by", "bob", "--yes")
    again = cli("intake", "pause", "--reason", "another", "--yes")
    closed = cli("intake", "status", "--json")
    shown = cli("intake", "status")
    resumed = cli("intake", "resume")
    opened = cli("intake", "status", "--json")

    assert [paused.code, again.code, closed.code, resumed.code] == [0, 0, 1, 0]
    assert closed.document.keys() == {"paused", "reason", "actor", "changed_at", "workers", "waiting"}
    assert is_time(closed.document.pop("changed_at"))
    assert {k: v for k, v in closed.document.items() if k != "changed_at"} == {
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
    assert (opened.document["paused"], opened.document["actor"]) == (False, "anna")


def test_status_exits_1_unless_somebody_takes_events(cli: Cli, scene: Scene) -> None:
    """An open gate without a living worker is a finding; with one it is fine."""
    nobody = cli("intake", "status")
    for number, stopped in enumerate(("now()", "NULL")):
        scene.as_superuser(
            "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at, stopped_at, counts)"
            f" VALUES ('00000000-0000-4000-8000-00000000000{number}', 'h', 1, 'b', now(), now(), {stopped},"
            """ '{"messages": 5}')"""
        )
    somebody = cli("intake", "status", "--json")

    workers = [(each["worker_id"][-1], each["alive"], each["messages"]) for each in somebody.document["workers"]]
    assert (nobody.code, somebody.code) == (1, 0)
    assert workers == [("1", True, 5), ("0", False, 5)]


def test_nobody_pauses_in_the_name_of_the_tripwire(cli: Cli) -> None:
    """A person's pause ends only by a person: it cannot be signed with the name that opens by itself."""
    said = cli("intake", "pause", "--reason", "r", "--by", "tripwire", "--yes")

    assert said.code == 2
    assert not cli("intake", "status", "--json").document["paused"]


# --- retries


def test_retries_are_listed_shown_and_run(cli: Cli, scene: Scene) -> None:
    """A waiting event is seen with its job and attempts, and settles at once when somebody says so."""
    scene.settle(make_event("failed platform", event_id="e-1"))
    listed = cli("retries", "list", "--json").document
    tried = cli("retries", "run-now", "--by", "bob", "--json")
    shown = cli("retries", "show", "e-1", "--json").document
    table = cli("retries", "show", "e-1")
    scene.charged()
    settled = cli("retries", "run-now", "e-1", "--json")

    (waiting,) = listed["items"]
    assert listed["next"] is None
    assert (waiting["event_id"], waiting["job_id"], waiting["attempts"]) == ("e-1", "job-1", 0)
    assert (tried.code, tried.document) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})
    (row,) = shown["items"]
    assert row["attempts"] == 1
    assert [(entry.get("actor"), entry.get("outcome")) for entry in row["history"]] == [
        ("bob", None),
        (None, "charge_not_found"),
    ]
    assert (table.code, "bob" in table.out) == (0, True)
    assert (settled.code, settled.document) == (0, {"tried": 1, "outcomes": {"refunded": 1}})
    assert cli("retries", "list", "--json").document == {"items": [], "next": None}


def test_run_now_tries_the_event_it_was_told(cli: Cli, scene: Scene) -> None:
    """Naming one event leaves the others' attempts and times as they are, due or not."""
    scene.settle(make_event("timeout", event_id="told"), make_event("timeout", "job-2", event_id="not told"))
    scene.as_superuser("UPDATE kino.pending_event SET next_attempt_at = now() - interval '1 minute'")

    cli("retries", "run-now", "told")

    waits = scene.pending()
    assert waits == {"told": Waits("job-1", "charge_not_found", 1), "not told": Waits("job-2", "charge_not_found", 0)}


def test_what_is_tried_by_hand_is_leased_as_by_a_sweep(cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed in the middle holds its events no longer than a worker that died."""
    scene.settle(make_event("timeout"))

    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr("kino_refunds.cli.retries.settle_batch", killed)
    ttl = timedelta(seconds=load_settings().alive_ttl_s)
    before = datetime.now(UTC)
    with pytest.raises(SystemExit):
        cli("retries", "run-now")
    after = datetime.now(UTC)

    ((leased_until,),) = scene.rows("SELECT leased_until FROM kino.pending_event")
    assert before + ttl <= leased_until <= after + ttl


def test_who_has_an_event_tried_is_kept_within_the_history_s_bounds(cli: Cli, scene: Scene) -> None:
    """However often people try an event by hand, its history keeps its first entry and its latest, and no more."""
    scene.settle(make_event("timeout"))
    scene.as_superuser(
        "UPDATE kino.pending_event SET history ="
        " (SELECT jsonb_agg(jsonb_build_object('outcome', n)) FROM generate_series(1, 50) AS n)"
    )

    cli("retries", "run-now", "--by", "bob")

    ((history,),) = scene.rows("SELECT history FROM kino.pending_event")
    assert len(history) == 50
    assert history[0] == {"outcome": 1}
    assert [entry.get("actor") for entry in history[-2:]] == ["bob", None]


def test_an_event_that_a_sweep_has_in_hand_holds_up_nobody(cli: Cli, scene: Scene) -> None:
    """A row that another session has locked is passed over: the other events are tried, and nothing waits."""
    scene.settle(make_event("timeout", "job-1"), make_event("timeout", "job-2"))

    with scene.superuser.begin() as sweep:
        sweep.exec_driver_sql("SELECT 1 FROM kino.pending_event WHERE job_id = 'job-1' FOR UPDATE")
        said = cli("retries", "run-now", "--json")

    assert (said.code, said.document) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})


def test_a_letter_in_somebody_s_hands_does_not_keep_the_others(
    cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several letters the one that is being replayed elsewhere is named, and the others settle."""
    scene.charged()
    keep(scene, letter(b"nonsense"))
    unread(scene)
    monkeypatch.setattr(replays, "HELD_FOR_S_MAX", 0.1)

    with replays._alone_with(scene.worker, 1):
        said = cli("dead-letters", "replay", "1", "2", "--json")

    assert said.code == 1
    assert said.err.startswith("error: dead letter 1 is being replayed by somebody else")
    assert [(each["number"], each["outcome"]) for each in said.document["items"]] == [(2, "refunded")]


@pytest.mark.parametrize("cursor", ["a", "5", "null", '["a"]', '["\\u0000", "x"]', '["\\ud800", "x"]', "[" * 100_000])
def test_what_is_no_cursor_is_refused(cli: Cli, cursor: str) -> None:
    """Whatever is given to go on behind, what is not of our making is one line and exit 2."""
    said = cli("retries", "list", "--after", cursor)

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)


def test_an_event_is_tried_however_many_others_are_due(cli: Cli, scene: Scene) -> None:
    """A sweep takes some hundreds at a time; the one that a person names is among them."""
    scene.settle(*(make_event("timeout", f"job-{n}") for n in range(600)))
    scene.as_superuser("UPDATE kino.pending_event SET next_attempt_at = now() - interval '1 hour'")

    said = cli("retries", "run-now", "job-599 timeout", "--json")

    assert (said.code, said.document) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})


def test_a_cursor_is_what_it_says(cli: Cli, scene: Scene) -> None:
    """What is printed to go on with can be pasted, whatever is in an id; what is no cursor is refused."""
    for event_id, source in (("[/red]", "a b"), ("a", "b c"), ("a b", "c")):
        scene.settle(make_event("timeout", event_id=event_id, source=source))

    first = cli("retries", "list", "--limit", "1")
    pasted = shlex.split(first.out.splitlines()[-1].removeprefix("more: "))
    second = cli("retries", "list", "--limit", "1", *pasted, "--json")

    assert pasted == ["--after", '["[/red]", "a b"]']
    assert second.document["next"] == '["a", "b c"]'


def test_no_page_of_retries_leaves_one_out(cli: Cli, scene: Scene) -> None:
    """Paging through a list shows every row once, also events of several sources under one id."""
    sources = ["one", "two", "three"]
    scene.settle(*[make_event("timeout", f"job {s}", event_id="same", source=s) for s in sources])
    scene.settle(make_event("timeout", "job-9", event_id="then"))

    found, after = [], None
    for _ in range(6):
        page = cli("retries", "list", "--limit", "1", "--json", *(("--after", str(after)) if after else ())).document
        found += [each["source"] for each in page["items"]]
        after = page["next"]
        if after is None:
            break

    assert sorted(found) == sorted([*sources, "/pipeline/eu-1"])


# --- dead letters


def test_letters_are_listed_with_what_is_at_stake(cli: Cli, scene: Scene) -> None:
    """The list joins the credits of charges that are still open; filters narrow it, pages go through it."""
    for job in ("open", "settled"):
        scene.charged(job)
    scene.settle(make_event("completed", "settled"))
    keep(scene, letter(b"1", job_id="open"))
    keep(scene, letter(b"2", job_id="settled", reason="poison_crash"))
    keep(scene, letter(b"3"))

    everything = cli("dead-letters", "list", "--json").document
    first = cli("dead-letters", "list", "--limit", "2", "--json").document
    second = cli("dead-letters", "list", "--after", str(first["next"]), "--json").document
    by_reason = cli("dead-letters", "list", "--reason", "poison_crash", "--json").document
    by_job = cli("dead-letters", "list", "--job", "open", "--json").document
    by_group = cli("dead-letters", "list", "--group", everything["items"][0]["group"], "--json").document

    assert everything["items"][0].keys() == {
        "number", "reason", "job_id", "event_id", "queue", "element_index", "credits_at_stake", "seen", "last_seen_at",
        "status", "group", "detail",
    }  # fmt: skip
    assert [(each["number"], each["credits_at_stake"]) for each in everything["items"]] == [(1, 10), (2, 0), (3, 0)]
    assert [[each["number"] for each in page["items"]] for page in (first, second, by_reason, by_job, by_group)] == [
        [1, 2],
        [3],
        [2],
        [1],
        [1, 3],
    ]
    assert everything["next"] is None


def test_a_letter_is_found_under_every_job_that_it_names(cli: Cli, scene: Scene) -> None:
    """Who asks about the second job of an unreadable message finds its letter, in the list and by `why`."""
    keep(scene, DeadLetter(b"k", b"raw", FAILED, "bad_json", "x", job_id="job-1", other_job_ids=("job-2", "job-3")))

    listed = [cli("dead-letters", "list", "--job", job, "--json").document["items"] for job in ("job-2", "job-9")]
    why = cli("why", "job-3", "--json").document

    assert [[each["number"] for each in items] for items in listed] == [[1], []]
    assert [each["dead_letter_id"] for each in why["dead_letters"]] == [1]


BODIES: dict[str, tuple[bytes, int | None, str | None]] = {
    "bare": (b'{"a": 1}', None, None),
    "kombu": (envelope(b'{"a": "\x1b[2J"}'), None, '{"a": "\\x1b[2J"}'),
    "pickle": (envelope(b"\x80\x04N."), None, "\\x80\\x04N."),
    "an element": (b'[{"specversion":"1.0"},{"b": 2}]', 1, '{"b": 2}'),
    "an element in kombu's": (envelope(b'[{"specversion":"1.0"},{"b": 2}]'), 1, '{"b": 2}'),
}


@pytest.mark.parametrize(("raw", "index", "body"), BODIES.values(), ids=BODIES)
def test_a_letter_is_shown_decoded(cli: Cli, scene: Scene, raw: bytes, index: int | None, body: str | None) -> None:
    """Nobody has to decode base64 by hand: the body stands beside the bytes, escaped, and of several events the one."""
    keep(scene, DeadLetter(b"k", raw, FAILED, "bad_json", "x", element_index=index))

    shown = cli("dead-letters", "show", "1", "--json").document
    for_people = cli("dead-letters", "show", "1")

    assert (shown["body"], shown["element_index"]) == (body, index)
    assert shown["message"] == storable(raw.decode("utf-8", "backslashreplace"), 4_000)
    assert harmless(for_people)
    assert squeezed(body or "") in squeezed(for_people.out)


def test_a_letter_is_replayed_noted_and_discarded(cli: Cli, scene: Scene) -> None:
    """Each act is done by somebody, exits 0 when the letter needs nobody any more, and is kept with it."""
    scene.charged()
    unread(scene)
    keep(scene, letter(b"nonsense"))

    dry = cli("dead-letters", "replay", "1", "--dry-run", "--json")
    untouched = statuses(scene)
    replayed = cli("dead-letters", "replay", "1", "--by", "bob", "--json")
    failed = cli("dead-letters", "replay", "1", "2", "--json")
    noted = cli("dead-letters", "note", "2", "look here")
    discarded = cli("dead-letters", "discard", "2", "--note", "a test", "--yes")
    shown = cli("dead-letters", "show", "2", "--json").document

    item = {
        "number": 1,
        "event_id": "job-1 failed platform",
        "job_id": "job-1",
        "outcome": "refunded",
        "closed": True,
        "protects": [],
    }
    assert (dry.code, dry.document) == (0, {"items": [item], "next": None})
    assert untouched == [("open", None), ("open", None)]
    assert (replayed.code, replayed.document) == (0, {"items": [item], "next": None})
    assert failed.code == 1
    assert [(each["outcome"], each["closed"]) for each in failed.document["items"]] == [
        ("duplicate", True),
        ("bad_json", False),
    ]
    assert (noted.code, discarded.code) == (0, 0)
    assert statuses(scene) == [("replayed", "anna"), ("discarded", "anna")]
    assert [(each["actor"], each["text"]) for each in shown["notes"]] == [("anna", "look here")]
    assert shown["history"][-1]["note"] == "a test"


def test_a_correction_that_fails_exits_1(cli: Cli, scene: Scene, tmp_path: Path) -> None:
    """As long as a letter of the message is open somebody has to look: exit 1, edited or not."""
    scene.charged()
    scene.settle(make_event("failed platform", account_id="somebody else"))
    edited = tmp_path / "edited.json"
    edited.write_bytes(to_json(make_event("failed platform", account_id="a third one")))

    said = cli("dead-letters", "replay", "1", "--edited", str(edited), "--json")

    assert "open" in [status for status, _ in statuses(scene)]
    assert said.code == 1


def test_the_correction_of_another_letter_is_refused(cli: Cli, scene: Scene, tmp_path: Path) -> None:
    """Who takes the wrong file is told by one line that names it, and no letter is closed by it."""
    for job_id in ("job-1", "job-2"):
        scene.charged(job_id)
        scene.settle(make_event("failed platform", job_id, account_id="somebody else"))
    edited = tmp_path / "edited.json"
    edited.write_bytes(to_json(make_event("failed platform", "job-2")))

    wrong = cli("dead-letters", "replay", "1", "--edited", str(edited))
    missing = cli("dead-letters", "replay", "1", "--edited", str(tmp_path / "none"))
    right = cli("dead-letters", "replay", "2", "--edited", str(edited))
    again = cli("dead-letters", "replay", "2", "--edited", str(edited))
    thrown_away = cli("dead-letters", "discard", "2", "--note", "x", "--yes")

    assert (wrong.code, wrong.out) == (2, "")
    assert f"{edited}: invalid_event: its id is 'job-2 failed platform', the letter's is 'job-1" in wrong.err
    assert (missing.code, missing.err) == (2, f"error: {tmp_path / 'none'}: No such file or directory\n")
    assert right.code == 0
    assert [each.code for each in (again, thrown_away)] == [1, 1]
    assert again.err == thrown_away.err
    assert again.err.startswith("error: dead letter 2 was replayed by anna at ")
    assert statuses(scene) == [("open", None), ("replayed", "anna")]


def test_settling_by_hand_during_a_pause_says_so(cli: Cli, scene: Scene) -> None:
    """A pause stops workers; whoever settles all the same is told by whom and why there is one."""
    scene.charged()
    unread(scene)
    cli("intake", "pause", "--reason", MARKUP, "--by", "bob", "--yes")

    replayed = cli("dead-letters", "replay", "1", "--json")
    tried = cli("retries", "run-now", "--json")

    warning = f"warning: intake is paused by bob ({MARKUP}); what you run settles all the same\n"
    assert (replayed.code, replayed.err, tried.code, tried.err) == (0, warning, 0, warning)


def test_replaying_several_says_what_was_done_before_it_failed(cli: Cli, scene: Scene) -> None:
    """When one number of several is wrong, what has been replayed by then is not left unsaid."""
    scene.charged()
    unread(scene)

    said = cli("dead-letters", "replay", "1", "7", "--json")

    assert said.code == 1
    assert statuses(scene)[0][0] == "open" or '"outcome": "refunded"' in said.out


def test_the_exact_bytes_can_be_saved(cli: Cli, scene: Scene, tmp_path: Path) -> None:
    """What came is given out as it came, byte by byte; a file that cannot be written is one line."""
    raw = bytes(range(256)) * 100
    keep(scene, letter(raw))

    saved = cli("dead-letters", "show", "1", "--save", str(tmp_path / "message.bin"))
    again = cli("dead-letters", "show", "1", "--save", str(tmp_path / "message.bin"))
    refused = cli("dead-letters", "show", "1", "--save", str(tmp_path / "no" / "such" / "folder"))

    assert saved.code == 0
    assert harmless(saved)
    assert (tmp_path / "message.bin").read_bytes() == raw
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "File exists" in again.err
    assert refused.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", refused.err)


# --- what a letter protects

OLD = timedelta(minutes=61)
"""Longer than a letter without a job counts."""


def came(scene: Scene, *, ago: timedelta = timedelta(0)) -> None:
    """The letters of a scene came at this time, by the clock that opened its charges."""
    scene.as_superuser(f"UPDATE kino.dead_letter SET last_seen_at = kino.clock() - interval '{ago.total_seconds()} s'")


def opened_long_ago(scene: Scene) -> None:
    """The charges that there are were opened before any letter came."""
    scene.as_superuser(
        "ALTER TABLE kino.charge DISABLE TRIGGER append_only",
        "UPDATE kino.charge SET opened_at = kino.clock() - interval '1 day'",
        "ALTER TABLE kino.charge ENABLE TRIGGER append_only",
    )


def make_overdue(scene: Scene) -> None:
    scene.as_superuser(
        "ALTER TABLE kino.charge DISABLE TRIGGER append_only",
        "UPDATE kino.charge SET deadline_at = opened_at - interval '1 hour'",
        "ALTER TABLE kino.charge ENABLE TRIGGER append_only",
        "UPDATE kino.open_charge SET deadline_at = deadline_at - interval '1 day'",
    )


def unreadable_completion(job_id: str | None = None) -> DeadLetter:
    letter = DeadLetter(message_key(b"nonsense"), b"nonsense", Queue.JOB_COMPLETED, "bad_json", "detail", job_id=job_id)
    return replace(letter, may_hold_others=job_id is None)


def test_a_letter_of_an_open_job_is_discarded_by_the_job_s_name_only(
    cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completed event with a bad time keeps its job from a refund; --yes alone does not end that."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "none")
    scene.charged()
    make_overdue(scene)
    keep(scene, unreadable_completion(job_id="job-1"))
    discard = ("dead-letters", "discard", "1", "--note", "n", "--yes")

    refused = [cli(*discard), cli(*discard, "--although-open", "job-2"), cli(*discard, "--although-open", "all")]
    swept = cli("overdue", "run", "--json").document
    still = statuses(scene)
    named = cli(*discard, "--although-open", "job-1", "--by", "bob")

    assert [(each.code, each.out, each.err.count("\n")) for each in refused] == [(2, "", 1)] * 3
    assert all("job job-1 (10 credits)" in each.err for each in refused)
    assert all("add --although-open job-1\n" in each.err for each in refused)
    assert (swept["refunded"], swept["withheld"]) == (0, {"named_by_waiting_event": 1})
    assert still == [("open", None)]
    assert (named.code, named.err) == (0, "")
    assert "no longer protected: open charges 1, credits 10" in named.out
    assert statuses(scene) == [("discarded", "bob")]


def test_a_correction_of_one_job_leaves_the_letter_s_other_jobs_protected(
    cli: Cli, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two completions on two lines are one letter: who corrects the first must not end what protects the second."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "none")
    for job_id in ("job-1", "job-2"):
        scene.charged(job_id)
    make_overdue(scene)
    keep(scene, replace(unreadable_completion(job_id="job-1"), other_job_ids=("job-2", "job-3")))
    corrected = tmp_path / "corrected.json"
    corrected.write_bytes(to_json(make_event("completed", "job-1")))
    replay = ("dead-letters", "replay", "1", "--edited", str(corrected), "--json")

    tried = cli(*replay, "--dry-run")
    replayed = cli(*replay, "--by", "bob")
    swept = cli("overdue", "run", "--json").document
    refused = cli("dead-letters", "discard", "1", "--note", "n", "--yes")
    scene.settle(make_event("completed", "job-2"))
    done = cli("dead-letters", "discard", "1", "--note", "both are captured", "--yes")

    for each in (tried, replayed):
        assert (each.code, each.document["items"][0]["outcome"]) == (1, "captured")
        assert (each.document["items"][0]["closed"], each.document["items"][0]["protects"]) == (False, ["job-2"])
        assert "dead letter 1 stays open: it also names job-2, whose charges are open" in each.err
    assert (swept["refunded"], swept["withheld"]) == (0, {"named_by_waiting_event": 1})
    assert (refused.code, done.code, statuses(scene)[0][0]) == (2, 0, "discarded")


def test_a_letter_that_names_no_job_says_that_it_protects_them_all(
    cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody can be asked, an unreadable completion may be any charge's: it is discarded by the word all."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "none")
    for number in range(12):
        scene.charged(f"job-{number}")
    keep(scene, unreadable_completion())
    came(scene)
    discard = ("dead-letters", "discard", "1", "--note", "n", "--yes")

    refused = [cli(*discard), cli(*discard, "--although-open", "job-1")]
    done = cli(*discard, "--although-open", "all")

    assert [(each.code, each.out, each.err.count("\n")) for each in refused] == [(2, "", 1)] * 2
    assert all("names no job" in each.err and "12 open charges of 120 credits" in each.err for each in refused)
    assert all("add --although-open all\n" in each.err for each in refused)
    assert done.code == 0
    assert "no longer protected: open charges 12, credits 120" in done.out


@pytest.mark.parametrize(
    ("letter_of", "ago", "source", "settled"),
    [
        ({"job_id": "job-1"}, OLD, "none", True),
        ({"job_id": "job-2"}, timedelta(0), "none", False),
        ({}, OLD, "none", False),
        ({}, timedelta(0), "sql", False),
        ({}, timedelta(0), "none", True),
    ],
    ids=["settled", "without a charge", "over an hour", "a source is asked", "nothing is open"],
)
def test_a_letter_that_protects_nothing_is_discarded_as_before(
    cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch, letter_of: dict[str, str], ago: timedelta, source: str,
    *, settled: bool,
) -> None:  # fmt: skip
    """Nobody is asked for names where discarding the letter leads to no refund."""
    monkeypatch.setenv("KINO_JOB_SOURCE", source)
    scene.charged()
    opened_long_ago(scene)
    if settled:
        scene.settle(make_event("completed"))
    keep(scene, unreadable_completion(**letter_of))
    came(scene, ago=ago)

    said = cli("dead-letters", "discard", "1", "--note", "n", "--yes")

    assert (said.code, said.out, said.err) == (0, "dead letter 1 is discarded; it is kept\n", "")


LETTERS: dict[str, Callable[[], DeadLetter]] = {
    "names a job": lambda: unreadable_completion(job_id="before"),
    "names a job, of another queue": lambda: letter(b"nonsense", job_id="before"),
    "names a job that there is not": lambda: unreadable_completion(job_id="none"),
    "names none": unreadable_completion,
    "names none, of another queue": lambda: letter(b"nonsense"),
}


@pytest.mark.parametrize("source_configured", [False, True])
@pytest.mark.parametrize("ago", [timedelta(0), OLD])
@pytest.mark.parametrize("kind", LETTERS)
def test_what_a_letter_protects_is_what_the_sweep_withholds(
    scene: Scene, redis: Redis, kind: str, ago: timedelta, *, source_configured: bool
) -> None:
    """Two readers of one rule: the charges that a person is shown are those whose verdicts the guard withholds."""
    for job_id in ("before", "also before"):
        scene.charged(job_id)
    opened_long_ago(scene)
    keep(scene, LETTERS[kind]())
    came(scene, ago=ago)
    scene.charged("after")
    now = datetime.now(UTC)
    opened = scene.rows("SELECT charge_id, job_id, account_id, credits, opened_at FROM kino.charge")
    charges = [OverdueCharge(c.charge_id, c.job_id, c.account_id, c.credits, c.opened_at, now, 3) for c in opened]

    guard = read_guard(scene.worker, redis, charges, now=now, source_configured=source_configured)
    with scene.worker.connect() as connection:
        found = read_protection(connection, 1, source_configured=source_configured)

    withheld = {charge.job_id for charge in charges if guard.reason(charge) is not None}
    assert {charge.job_id for charge in found.sample} == withheld
    assert (found.charges, found.credits) == (len(withheld), 10 * len(withheld))


def test_what_a_letter_protects_is_read_when_nobody_else_can_change_it(database: Database) -> None:
    """(1) its message comes again, (2) we discard and wait, (3) it is committed, (4) we see what it protects now."""
    with Scene.of(database, limits=PATIENT) as scene:
        scene.charged()
        opened_long_ago(scene)
        keep(scene, unreadable_completion())
        came(scene, ago=OLD)

        def discard() -> None:
            with scene.worker.begin() as ours:
                discard_although_open(ours, 1, although_open=(), source_configured=False, note="n", actor="bob")

        with ThreadPoolExecutor(1) as pool, scene.superuser.begin() as again:
            again.exec_driver_sql("UPDATE kino.dead_letter SET last_seen_at = kino.clock(), seen = seen + 1")
            discarding = pool.submit(discard)
            until(lambda: scene.waiting_for_locks() == 1)
            again.commit()
            refused = discarding.exception(60)

        assert isinstance(refused, LetterProtects)
        assert statuses(scene) == [("open", None)]


@pytest.mark.parametrize(("typed", "code"), [(b"job-1\n", 0), (b"all\n", 1), (b"yes\n", 1), (b"\x04", 130)])
def test_a_person_types_the_name_of_the_job(database: Database, scene: Scene, typed: bytes, code: int) -> None:
    """At a terminal the charges are shown with their credits, and only the job's own id discards the letter."""
    scene.charged()
    keep(scene, unreadable_completion(job_id="job-1"))
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [SCRIPT, "dead-letters", "discard", "1", "--note", "n", "--by", "bob", "--yes"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={n: v for n, v in os.environ.items() if not n.startswith("KINO_")} | {"KINO_DATABASE_URL": database.url()},
    )
    os.close(theirs)
    os.write(ours, typed)

    out, err = program.communicate(timeout=60)

    os.close(ours)
    assert program.returncode == code
    assert b"dead letter 1 protects open charges 1, credits 10: of its jobs\n" in err
    assert b"  job-1: 10 credits of account acct of job-1, deadline " in err
    assert statuses(scene) == ([("discarded", "bob")] if code == 0 else [("open", None)])
    assert (b"no longer protected" in out) == (code == 0)


HOSTILE = {
    "escapes": ESCAPES.encode("utf-8", "surrogatepass"),
    "c1 controls": b"\xc2\x9b31m\xc2\x90",
    "markup": MARKUP.encode(),
    "binary": bytes(range(256)),
    "10 kB in one word": TEN_KB.encode(),
    "an event with all of it": bare({"id": ESCAPES, "source": MARKUP, "subject": TEN_KB, "type": ESCAPES}),
}


@pytest.mark.parametrize("form", ["table", "json"])
def test_hostile_messages_are_shown_harmlessly(cli: Cli, scene: Scene, form: str) -> None:
    """Nothing in a message acts on the terminal of who looks at it: neither escapes nor markup."""
    for raw in HOSTILE.values():
        keep(scene, letter(raw, detail=f"{ESCAPES}{MARKUP}"))
    flags = ["--json"] if form == "json" else []

    said = [cli("dead-letters", "list", *flags)]
    said += [cli("dead-letters", "show", str(number), *flags) for number in range(1, len(HOSTILE) + 1)]

    assert [each.code for each in said] == [0] * (len(HOSTILE) + 1)
    assert all(harmless(each) for each in said)
    if form == "table":
        assert squeezed(MARKUP) in squeezed(said[3].out)


@pytest.mark.parametrize("form", ["table", pytest.param("json")])
def test_hostile_words_of_colleagues_are_shown_harmlessly(cli: Cli, scene: Scene, form: str) -> None:
    """What somebody typed or pasted (a note, a reason, a name) is text on everybody else's screen too."""
    pasted = f"{ESCAPES} {MARKUP}".replace("\x00", "")
    keep(scene, letter(b"nonsense"))
    flags = ["--json"] if form == "json" else []

    done = [
        cli("dead-letters", "note", "1", pasted, "--by", pasted),
        cli("dead-letters", "discard", "1", "--note", pasted, "--by", pasted, "--yes"),
        cli("intake", "pause", "--reason", pasted, "--by", pasted, "--yes"),
    ]
    said = [cli("dead-letters", "show", "1", *flags), cli("intake", "status", *flags)]

    assert [each.code for each in done] == [0, 0, 0]
    assert [each.code for each in said] == [0, 1]
    assert all(harmless(each) for each in (*done, *said))


TAKES_TEXT = (
    "dead-letters note 1 {}",
    "dead-letters list --job {}",
    "dead-letters discard 1 --yes --note {}",
    "intake pause --yes --reason {}",
    "intake resume --by {}",
    "retries show {}",
    "retries list --after {}",
    "why {}",
)


@pytest.mark.parametrize(
    "odd",
    [
        TEN_KB,
        pytest.param("\udcff"),
        pytest.param("a\x00b"),
    ],
    ids=["10 kB", "no UTF-8", "NUL"],
)
def test_odd_arguments_are_text_or_one_clear_line(cli: Cli, scene: Scene, odd: str) -> None:
    """Bytes that are no UTF-8, NUL and 10 kB on the command line end in a row or in one line that is ours."""
    keep(scene, letter(b"nonsense"))

    said = {c: cli(*[odd if word == "{}" else word for word in c.split()]) for c in TAKES_TEXT}

    assert {command for command, each in said.items() if each.code not in {0, 1, 2} or not harmless(each)} == set()
    assert {command for command, each in said.items() if "psycopg" in each.err} == set()


# --- disagreements


def test_breaks_are_findings_until_somebody_accepts_them(cli: Cli, scene: Scene) -> None:
    """An open break is exit 1; accepted with a reason it is kept, and the list is clean."""
    scene.charged()
    scene.settle(make_event("failed platform"), make_event("completed"))

    found = cli("breaks", "list", "--json")
    shown = cli("breaks", "show", "1", "--json")
    text = cli("breaks", "show", "1")
    accepted = cli("breaks", "accept", "1", "--note", "kept by agreement", "--by", "bob", "--yes")
    again = cli("breaks", "accept", "1", "--note", "n", "--yes")
    clean = cli("breaks", "list", "--json")
    after = cli("breaks", "show", "1", "--json").document

    assert [found.code, shown.code, text.code, accepted.code, again.code, clean.code] == [1, 0, 0, 0, 1, 0]
    assert found.document["items"][0].keys() == {
        "number", "kind", "job_id", "credits", "seen", "first_seen_at", "last_seen_at", "status",
    }  # fmt: skip
    assert (shown.document["kind"], shown.document["job_id"]) == ("completed_after_refund", "job-1")
    assert "kino-refunds why job-1" in text.out
    assert clean.document == {"items": [], "next": None}
    assert (after["status"], after["status_actor"], after["status_note"]) == ("accepted", "bob", "kept by agreement")
    assert scene.breaks() == [Broken("completed_after_refund", "job-1", 10, 1, "accepted")]


def test_a_break_of_a_hostile_job_is_shown_harmlessly(cli: Cli, scene: Scene) -> None:
    """Whatever another program wrote into the tables, showing it does nothing to a terminal."""
    job = f"{ESCAPES}{MARKUP}".replace("\x00", "")
    scene.rows(
        "INSERT INTO kino.break (kind, job_id, credits, detail) VALUES (:job, :job, 1, :job) RETURNING 1", job=job
    )

    said = [cli("breaks", "show", "1"), cli("breaks", "list"), cli("breaks", "show", "1", "--json")]

    assert [each.code for each in said] == [0, 1, 0]
    assert [harmless(each) for each in said] == [True, True, True]


# --- schedule and overdue


def test_schedule_says_what_runs(cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry with its last and next run; exit 1 when one was missed."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "none")
    fresh = cli("schedule", "--json")
    with scene.worker.begin() as connection:
        entry = Entry("kino.expire_lots", timedelta(seconds=60), "")
        claim_slot(connection, entry, now=datetime.now(NOW.tzinfo) - timedelta(minutes=5), claimed_by="test")
    missed = cli("schedule", "--json")
    table = cli("schedule")

    assert fresh.code == 0
    assert [each["name"] for each in fresh.document["items"]] == [
        "kino.sweep_retries",
        "kino.expire_lots",
        "kino.sample_clock",
        "kino.sweep_overdue",
    ]
    assert fresh.document["items"][0].keys() == {
        "name", "every_s", "last", "finished", "ended", "result", "next", "missed", "late", "stuck", "what",
    }  # fmt: skip
    assert (missed.code, table.code) == (1, 1)
    assert missed.document["items"][1]["missed"] in {4, 5}
    assert "expire lots" in table.out


def test_overdue_run_asks_and_settles(cli: Cli, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass: a dry run writes nothing and says what would be, the real one refunds."""
    monkeypatch.setenv("KINO_JOB_SOURCE", "none")
    scene.charged()
    scene.as_superuser(
        "ALTER TABLE kino.charge DISABLE TRIGGER append_only",
        "UPDATE kino.charge SET deadline_at = now() - interval '1 hour'",
        "ALTER TABLE kino.charge ENABLE TRIGGER append_only",
        "UPDATE kino.open_charge SET deadline_at = now() - interval '1 hour'",
    )
    before = scene.everything()

    dry = cli("overdue", "run", "--dry-run", "--json")
    after_dry = scene.everything()
    real = cli("overdue", "run", "--by", "bob", "--json")
    table = cli("overdue", "run")
    kept = scene.rows("SELECT name, claimed_by, finished_at, result FROM kino.schedule_slot ORDER BY slot_at")

    assert after_dry == before
    assert (dry.code, real.code, table.code) == (0, 0, 0)
    assert [(name, who, finished is not None) for name, who, finished, _ in kept] == [
        ("by hand: overdue run", "bob", True),
        ("by hand: overdue run", "anna", True),
    ]
    assert kept[0].result == real.document
    assert {k: v for k, v in real.document.items() if k != "verified_through"} == {
        "dry_run": False,
        "overdue": 1,
        "asked": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "answers": {"unknown": 1},
        "outcomes": {"refunded": 1},
        "refunded": 1,
        "refunded_credits": 10,
        "withheld": {},
    }


def test_overdue_run_without_a_source_says_how_to_choose(cli: Cli) -> None:
    """Nobody is refunded by a sweep that was not set up: exit 2 and the setting's name."""
    said = cli("overdue", "run", "--json")

    assert said.code == 2
    assert re.fullmatch(r"error: KINO_JOB_SOURCE is not set[^\n]+\n", said.err)


def test_where_logs_are_collected_each_command_leaves_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """The line names the command, how it ended and how long it took, and nothing that was typed behind it."""
    # The standard error of this test ends with it; loggers that were set up on it would outlive it.
    monkeypatch.setattr("structlog.configure", lambda **_: None)
    monkeypatch.setenv("KINO_LOG_FORMAT", "json")
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())

    with pytest.raises(SystemExit) as ended:
        main(["retries", "show", "somebody's secret"])

    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (ended.value.code, line["event"], line["command"], line["exit_code"]) == (1, "command", "retries show", 1)
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["publish", "-"], {"published": 0}),
        (["relay", "rewind", "--to", "2026-01-31T12:00:00Z", "--yes"], {"told_again": 0, "dry_run": False}),
        (["intake", "resume"], {}),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_the_line_of_a_command_says_who_and_how_much(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, database: Database, scene: Scene,
    redis_url: str, arguments: list[str], told: dict[str, Any],
) -> None:  # fmt: skip
    """Also what no row can say who did it is known by its line, and the next command's line is its own."""
    scene.rows("INSERT INTO kino.relay_cursor (xid, charge_id) VALUES (kino.horizon(), 0) RETURNING 1")
    monkeypatch.setattr("structlog.configure", lambda **_: None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setenv("KINO_LOG_FORMAT", "json")
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)

    lines = []
    for each in ([*arguments, "--by", "bob"], ["retries", "list"]):
        with pytest.raises(SystemExit):
            main(each)
        line = json.loads(capfd.readouterr().err.splitlines()[-1])
        lines.append({name: line[name] for name in line.keys() - {"timestamp", "event", "command", "took_ms"}})
    structlog.contextvars.clear_contextvars()

    assert lines == [{"exit_code": 0, "actor": "bob"} | told, {"exit_code": 0}]
