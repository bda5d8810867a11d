"""`why`: every settlement is explained, with its event, lots, clause, policy version and time."""

from __future__ import annotations

from datetime import UTC, timedelta

from redis import Redis

from kino_refunds.errors import MalformedMessage
from kino_refunds.settlement.dead_letters import malformed_letter
from tests.command_line import Result, Run, error
from tests.scenario import NOW, Scene, make_event

WHY_PARTS = ("lots", "settlement", "correction", "transfers", "asks", "events", "waiting", "dead_letters", "breaks")


def parts_of(result: Result) -> set[str]:
    """The parts of a job's story that are not empty; all of them are there."""
    assert set(result.json) == {"charge", *WHY_PARTS}
    return {name for name in result.json if result.json[name]}


def test_why_explains_every_state_of_a_job(run: Run, scene: Scene, redis: Redis) -> None:
    """Whatever became of a job: a sentence for people, and for programs every row that speaks of it."""
    jobs = ("open", "captured", "refunded", "corrected", "broken", "asked")
    charges = {job_id: scene.charged(job_id, credits=5) for job_id in jobs}
    scene.settle(
        make_event("completed", "captured"),
        make_event("safety before", "refunded"),
        make_event("failed user", "corrected"),
        make_event("timeout", "broken"),
        make_event("completed", "early"),
    )
    scene.settle(make_event("completed", "broken"))
    scene.correct(charges["corrected"])
    scene.as_superuser(
        "INSERT INTO kino.overdue_ask"
        " SELECT charge_id, 2, 'unknown', now(), now() FROM kino.charge WHERE job_id = 'asked'"
    )
    letter = malformed_letter(b'{"job_id": "lost",', "generation.timeout", MalformedMessage("bad_json", "cut off"))
    scene.keep(letter)

    found = {job_id: (run("why", job_id), run("why", job_id, "--json")) for job_id in (*jobs, "early", "lost")}

    assert {job_id: (text.code, document.code) for job_id, (text, document) in found.items()} == dict.fromkeys(
        found, (0, 0)
    )
    taken = {"charge", "lots", "transfers"}
    assert {job_id: parts_of(document) for job_id, (_, document) in found.items()} == {
        "open": taken,
        "captured": taken | {"settlement", "events"},
        "refunded": taken | {"settlement", "events"},
        "corrected": taken | {"settlement", "events", "correction"},
        "broken": taken | {"settlement", "events", "breaks"},
        "asked": taken | {"asks"},
        "early": {"waiting"},
        "lost": {"dead_letters"},
    }
    sentences = {job_id: " ".join(text.out.partition("\n\n")[0].split()) for job_id, (text, _) in found.items()}
    nothing = "has no charge; its events are pending or dead letters."
    deadline = f"{charges['open'].deadline_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    assert sentences == {
        "open": f"Job open took 5 credits of account acct of open; it is open, with its deadline at {deadline}.",
        "captured": "Job captured took 5 credits of account acct of captured; they were captured: completed, clause 1"
        " of policy 2025-12-14, by event captured completed.",
        "refunded": "Job refunded took 5 credits of account acct of refunded; they were returned: content policy"
        " rejection, clause 2.safety of policy 2025-12-14, by event refunded safety before.",
        "corrected": "Job corrected took 5 credits of account acct of corrected; they were captured: not covered,"
        " clause 2.failure of policy 2025-12-14, by event corrected failed user; a correction returned them later.",
        "broken": "Job broken took 5 credits of account acct of broken; they were returned: timeout, clause 2.timeout"
        " of policy 2025-12-14, by event broken timeout.",
        "asked": f"Job asked took 5 credits of account acct of asked; it is open, with its deadline at {deadline}.",
        "early": f"Job early {nothing}",
        "lost": f"Job lost {nothing}",
    }
    assert redis.keys() == []


def test_why_shows_a_settlement_whole(run: Run, scene: Scene) -> None:
    """P10: event, lots, clause, policy version, time and who are all in one document."""
    charge = scene.charged("job-1", credits=7)
    scene.settle(make_event("failed provider"))

    document = run("why", "job-1", "--json").json

    (lot,) = scene.rows("SELECT lot_id FROM kino.credit_lot")[0]
    (settlement,), (event,) = document["settlement"], document["events"]
    assert document["charge"] == {
        "charge_id": charge.charge_id,
        "job_id": "job-1",
        "account_id": "acct of job-1",
        "credits": 7,
        "deadline_at": charge.deadline_at.isoformat(),
        "opened_at": charge.opened_at.isoformat(),
        "status": "refunded",
        "refunded": 7,
    }
    assert settlement == {
        "kind": "refunded",
        "reason": "generation_failure",
        "clause": "2.failure",
        "policy_version": "2025-12-14",
        "ending": "failed.provider",
        "account_status": "active",
        "event_source": "/pipeline/eu-1",
        "event_id": "job-1 failed provider",
        "event_time": (NOW - timedelta(minutes=1)).isoformat(),
        "settled_at": settlement["settled_at"],
    }
    assert [
        (t["kind"], t["from_book"], t["to_book"], t["lot_id"], t["credits"], t["actor"]) for t in document["transfers"]
    ] == [
        ("hold", "wallet", "held", lot, 7, "product"),
        ("refund", "held", "wallet", lot, 7, "settlement"),
    ]
    assert (event["event_id"], event["outcome"]) == ("job-1 failed provider", "refunded")


def test_why_of_an_unknown_job_is_a_finding(run: Run) -> None:
    """Nothing known is said so, with where was looked."""
    assert run("why", "job-1") == error("nothing is known of job 'job-1': no charge, no event, no dead letter", 1)
