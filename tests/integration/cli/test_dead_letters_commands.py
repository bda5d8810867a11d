"""`dead-letters`: listed with what is at stake, shown decoded, replayed, corrected, noted and discarded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kino_refunds.events.schema import to_json
from kino_refunds.settlement.dead_letters import DeadLetter, LetterReason, storable
from tests.command_line import MARKUP, Run, harmless, squeezed
from tests.integration.cli.letters import letter, letter_statuses, unread
from tests.malformed import envelope
from tests.pipeline import FAILED
from tests.scenario import Scene, make_event


def test_letters_are_listed_with_what_is_at_stake(cli: Run, scene: Scene) -> None:
    """The list joins the credits of charges that are still open; filters narrow it, pages go through it."""
    for job in ("open", "settled"):
        scene.charged(job)
    scene.settle(make_event("completed", "settled"))
    scene.keep(letter(b"1", job_id="open"))
    scene.keep(letter(b"2", job_id="settled", reason=LetterReason.POISON_CRASH))
    scene.keep(letter(b"3"))

    everything = cli("dead-letters", "list", "--json").json
    first = cli("dead-letters", "list", "--limit", "2", "--json").json
    second = cli("dead-letters", "list", "--after", str(first["next"]), "--json").json
    by_reason = cli("dead-letters", "list", "--reason", "poison_crash", "--json").json
    by_job = cli("dead-letters", "list", "--job", "open", "--json").json
    by_group = cli("dead-letters", "list", "--group", everything["items"][0]["group"], "--json").json

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


def test_a_letter_is_found_under_every_job_that_it_names(cli: Run, scene: Scene) -> None:
    """Who asks about the second job of an unreadable message finds its letter, in the list and by `why`."""
    scene.keep(
        DeadLetter(b"k", b"raw", FAILED, LetterReason.BAD_JSON, "x", job_id="job-1", other_job_ids=("job-2", "job-3"))
    )

    listed = [cli("dead-letters", "list", "--job", job, "--json").json["items"] for job in ("job-2", "job-9")]
    why = cli("why", "job-3", "--json").json

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
def test_a_letter_is_shown_decoded(cli: Run, scene: Scene, raw: bytes, index: int | None, body: str | None) -> None:
    """Nobody has to decode base64 by hand: the body stands beside the bytes, escaped, and of several events the one."""
    scene.keep(DeadLetter(b"k", raw, FAILED, LetterReason.BAD_JSON, "x", element_index=index))

    shown = cli("dead-letters", "show", "1", "--json").json
    for_people = cli("dead-letters", "show", "1")

    assert (shown["body"], shown["element_index"]) == (body, index)
    assert shown["message"] == storable(raw.decode("utf-8", "backslashreplace"), 4_000)
    assert harmless(for_people)
    assert squeezed(body or "") in squeezed(for_people.out)


def test_a_letter_is_replayed_noted_and_discarded(cli: Run, scene: Scene) -> None:
    """Each act is done by somebody, exits 0 when the letter needs nobody any more, and is kept with it."""
    scene.charged()
    unread(scene)
    scene.keep(letter(b"nonsense"))

    dry = cli("dead-letters", "replay", "1", "--dry-run", "--json")
    untouched = letter_statuses(scene)
    replayed = cli("dead-letters", "replay", "1", "--by", "bob", "--json")
    failed = cli("dead-letters", "replay", "1", "2", "--json")
    noted = cli("dead-letters", "note", "2", "look here")
    discarded = cli("dead-letters", "discard", "2", "--note", "a test", "--yes")
    shown = cli("dead-letters", "show", "2", "--json").json

    item = {
        "number": 1,
        "event_id": "job-1 failed platform",
        "job_id": "job-1",
        "outcome": "refunded",
        "closed": True,
        "protects": [],
    }
    assert (dry.code, dry.json) == (0, {"items": [item], "next": None})
    assert untouched == [("open", None), ("open", None)]
    assert (replayed.code, replayed.json) == (0, {"items": [item], "next": None})
    assert failed.code == 1
    assert [(each["outcome"], each["closed"]) for each in failed.json["items"]] == [
        ("duplicate", True),
        ("bad_json", False),
    ]
    assert (noted.code, discarded.code) == (0, 0)
    assert letter_statuses(scene) == [("replayed", "anna"), ("discarded", "anna")]
    assert [(each["actor"], each["text"]) for each in shown["notes"]] == [("anna", "look here")]
    assert shown["history"][-1]["note"] == "a test"


def test_a_correction_that_fails_exits_1(cli: Run, scene: Scene, tmp_path: Path) -> None:
    """As long as a letter of the message is open somebody has to look: exit 1, edited or not."""
    scene.charged()
    scene.settle(make_event("failed platform", account_id="somebody else"))
    edited = tmp_path / "edited.json"
    edited.write_bytes(to_json(make_event("failed platform", account_id="a third one")))

    said = cli("dead-letters", "replay", "1", "--edited", str(edited), "--json")

    assert "open" in [status for status, _ in letter_statuses(scene)]
    assert said.code == 1


def test_the_correction_of_another_letter_is_refused(cli: Run, scene: Scene, tmp_path: Path) -> None:
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
    assert letter_statuses(scene) == [("open", None), ("replayed", "anna")]


def test_settling_by_hand_during_a_pause_says_so(cli: Run, scene: Scene) -> None:
    """A pause stops workers; whoever settles all the same is told by whom and why there is one."""
    scene.charged()
    unread(scene)
    cli("intake", "pause", "--reason", MARKUP, "--by", "bob", "--yes")

    replayed = cli("dead-letters", "replay", "1", "--json")
    tried = cli("retries", "run-now", "--json")

    warning = f"warning: intake is paused by bob ({MARKUP}); this command settles events in spite of it\n"
    assert (replayed.code, replayed.err, tried.code, tried.err) == (0, warning, 0, warning)


def test_replaying_several_says_what_was_done_before_it_failed(cli: Run, scene: Scene) -> None:
    """When one number of several is wrong, what has been replayed by then is not left unsaid."""
    scene.charged()
    unread(scene)

    said = cli("dead-letters", "replay", "1", "7", "--json")

    assert said.code == 1
    assert letter_statuses(scene)[0][0] == "open" or '"outcome": "refunded"' in said.out


def test_the_exact_bytes_can_be_saved(cli: Run, scene: Scene, tmp_path: Path) -> None:
    """What came is given out as it came, byte by byte; a file that cannot be written is one line."""
    raw = bytes(range(256)) * 100
    scene.keep(letter(raw))

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
