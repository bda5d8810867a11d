"""`retries`: what waits is listed page by page, shown, and tried by hand as a sweep would."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.desk import replays
from kino_refunds.settings import load_settings
from tests.command_line import Run
from tests.failing import Killed
from tests.integration.cli.letters import letter, unread
from tests.scenario import Scene, Waits, make_event


def test_retries_are_listed_shown_and_run(cli: Run, scene: Scene) -> None:
    """A waiting event is seen with its job and attempts, and settles at once when somebody says so."""
    scene.settle(make_event("failed platform", event_id="e-1"))
    listed = cli("retries", "list", "--json").json
    tried = cli("retries", "run-now", "--by", "bob", "--json")
    shown = cli("retries", "show", "e-1", "--json").json
    table = cli("retries", "show", "e-1")
    scene.charged()
    settled = cli("retries", "run-now", "e-1", "--json")

    (waiting,) = listed["items"]
    assert listed["next"] is None
    assert (waiting["event_id"], waiting["job_id"], waiting["attempts"]) == ("e-1", "job-1", 0)
    assert (tried.code, tried.json) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})
    (row,) = shown["items"]
    assert row["attempts"] == 1
    assert [(entry.get("actor"), entry.get("outcome")) for entry in row["history"]] == [
        ("bob", None),
        (None, "charge_not_found"),
    ]
    assert (table.code, "bob" in table.out) == (0, True)
    assert (settled.code, settled.json) == (0, {"tried": 1, "outcomes": {"refunded": 1}})
    assert cli("retries", "list", "--json").json == {"items": [], "next": None}


def test_run_now_tries_the_event_it_was_told(cli: Run, scene: Scene) -> None:
    """Naming one event leaves the others' attempts and times as they are, due or not."""
    scene.settle(make_event("timeout", event_id="told"), make_event("timeout", "job-2", event_id="not told"))
    scene.as_superuser("UPDATE kino.pending_event SET next_attempt_at = now() - interval '1 minute'")

    cli("retries", "run-now", "told")

    waits = scene.pending()
    assert waits == {"told": Waits("job-1", "charge_not_found", 1), "not told": Waits("job-2", "charge_not_found", 0)}


def test_what_is_tried_by_hand_is_leased_as_by_a_sweep(cli: Run, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed in the middle holds its events no longer than a worker that died."""
    scene.settle(make_event("timeout"))

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("kino_refunds.settlement.retries.settle_batch", killed)
    ttl = timedelta(seconds=load_settings().alive_ttl_s)
    before = datetime.now(UTC)
    with pytest.raises(Killed):
        cli("retries", "run-now")
    after = datetime.now(UTC)

    ((leased_until,),) = scene.rows("SELECT leased_until FROM kino.pending_event")
    assert before + ttl <= leased_until <= after + ttl


def test_who_has_an_event_tried_is_kept_within_the_history_s_bounds(cli: Run, scene: Scene) -> None:
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


def test_an_event_that_a_sweep_has_in_hand_holds_up_nobody(cli: Run, scene: Scene) -> None:
    """A row that another session has locked is passed over: the other events are tried, and nothing waits."""
    scene.settle(make_event("timeout", "job-1"), make_event("timeout", "job-2"))

    with scene.superuser.begin() as sweep:
        sweep.exec_driver_sql("SELECT 1 FROM kino.pending_event WHERE job_id = 'job-1' FOR UPDATE")
        said = cli("retries", "run-now", "--json")

    assert (said.code, said.json) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})


def test_a_letter_in_somebody_s_hands_does_not_keep_the_others(
    cli: Run, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several letters the one that is being replayed elsewhere is named, and the others settle."""
    scene.charged()
    scene.keep(letter(b"nonsense"))
    unread(scene)
    monkeypatch.setattr(replays, "HELD_FOR_S_MAX", 0.1)

    with replays._alone_with(scene.worker, 1):
        said = cli("dead-letters", "replay", "1", "2", "--json")

    assert said.code == 1
    assert said.err.startswith("error: dead letter 1 is being replayed by somebody else")
    assert [(each["number"], each["outcome"]) for each in said.json["items"]] == [(2, "refunded")]


@pytest.mark.parametrize("cursor", ["a", "5", "null", '["a"]', '["\\u0000", "x"]', '["\\ud800", "x"]', "[" * 100_000])
def test_what_is_no_cursor_is_refused(cli: Run, cursor: str) -> None:
    """Whatever is given to go on behind, what is not of our making is one line and exit 2."""
    said = cli("retries", "list", "--after", cursor)

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)


def test_an_event_is_tried_however_many_others_are_due(cli: Run, scene: Scene) -> None:
    """A sweep takes some hundreds at a time; the one that a person names is among them."""
    scene.settle(*(make_event("timeout", f"job-{n}") for n in range(600)))
    scene.as_superuser("UPDATE kino.pending_event SET next_attempt_at = now() - interval '1 hour'")

    said = cli("retries", "run-now", "job-599 timeout", "--json")

    assert (said.code, said.json) == (0, {"tried": 1, "outcomes": {"charge_not_found": 1}})


def test_a_cursor_is_what_it_says(cli: Run, scene: Scene) -> None:
    """What is printed to go on with can be pasted, whatever is in an id; what is no cursor is refused."""
    for event_id, source in (("[/red]", "a b"), ("a", "b c"), ("a b", "c")):
        scene.settle(make_event("timeout", event_id=event_id, source=source))

    first = cli("retries", "list", "--limit", "1")
    pasted = shlex.split(first.out.splitlines()[-1].removeprefix("more: "))
    second = cli("retries", "list", "--limit", "1", *pasted, "--json")

    assert pasted == ["--after", '["[/red]", "a b"]']
    assert second.json["next"] == '["a", "b c"]'


def test_no_page_of_retries_leaves_one_out(cli: Run, scene: Scene) -> None:
    """Paging through a list shows every row once, also events of several sources under one id."""
    sources = ["one", "two", "three"]
    scene.settle(*[make_event("timeout", f"job {s}", event_id="same", source=s) for s in sources])
    scene.settle(make_event("timeout", "job-9", event_id="then"))

    found, after = [], None
    for _ in range(6):
        page = cli("retries", "list", "--limit", "1", "--json", *(("--after", str(after)) if after else ())).json
        found += [each["source"] for each in page["items"]]
        after = page["next"]
        if after is None:
            break

    assert sorted(found) == sorted([*sources, "/pipeline/eu-1"])
