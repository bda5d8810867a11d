"""`breaks`: findings until a person accepts them."""

from __future__ import annotations

from tests.command_line import ESCAPES, MARKUP, Run, harmless
from tests.scenario import Broken, Scene, make_event


def test_breaks_are_findings_until_somebody_accepts_them(cli: Run, scene: Scene) -> None:
    """An open break is exit 1; accepted with a reason it is kept, and the list is clean."""
    scene.charged()
    scene.settle(make_event("failed platform"), make_event("completed"))

    found = cli("breaks", "list", "--json")
    shown = cli("breaks", "show", "1", "--json")
    text = cli("breaks", "show", "1")
    accepted = cli("breaks", "accept", "1", "--note", "kept by agreement", "--by", "bob", "--yes")
    again = cli("breaks", "accept", "1", "--note", "n", "--yes")
    clean = cli("breaks", "list", "--json")
    after = cli("breaks", "show", "1", "--json").json

    assert [found.code, shown.code, text.code, accepted.code, again.code, clean.code] == [1, 0, 0, 0, 1, 0]
    assert found.json["items"][0].keys() == {
        "number", "kind", "job_id", "subject", "credits", "seen", "first_seen_at", "last_seen_at", "status", "assignee",
    }  # fmt: skip
    assert (shown.json["kind"], shown.json["job_id"]) == ("completed_after_refund", "job-1")
    assert "kino-refunds why job-1" in text.out
    assert clean.json == {"items": [], "next": None}
    assert (after["status"], after["status_actor"], after["status_note"]) == ("accepted", "bob", "kept by agreement")
    assert scene.breaks() == [Broken("completed_after_refund", "job-1", 10, 1, "accepted")]


def test_a_break_of_a_hostile_job_is_shown_harmlessly(cli: Run, scene: Scene) -> None:
    """Whatever another program wrote into the tables, showing it does nothing to a terminal."""
    job = f"{ESCAPES}{MARKUP}".replace("\x00", "")
    scene.rows(
        "INSERT INTO kino.break (kind, job_id, credits, detail) VALUES (:job, :job, 1, :job) RETURNING 1", job=job
    )

    said = [cli("breaks", "show", "1"), cli("breaks", "list"), cli("breaks", "show", "1", "--json")]

    assert [each.code for each in said] == [0, 1, 0]
    assert [harmless(each) for each in said] == [True, True, True]
