"""The proof: it holds where all is well, names what is not, and says nothing that it does not know."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kino_refunds.errors import BadWindow
from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.proof import Proof, SourceSaid, prove
from kino_refunds.reconciliation.seals import compare_with_copy, newest_seal, seal_text
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import Settings
from tests.clock import DAY, clock_at
from tests.conftest import Database
from tests.integration.reconciliation.checking import Pipeline, check
from tests.scenario import EVENT_AT, Scene, make_event

SETTINGS = Settings.model_construct(check_grace_s=0.0)


def timed_out(job_id: str) -> FinishedJob:
    return FinishedJob(job_id, Answer(JobState.TIMED_OUT, finished_at=EVENT_AT))


def settled(scene: Scene, *job_ids: str) -> Pipeline:
    """Jobs that timed out, and the source that says so."""
    for job_id in job_ids:
        scene.charged(job_id)
    scene.settle(*[make_event("timeout", job_id) for job_id in job_ids], now=None)
    return Pipeline(*map(timed_out, job_ids))


def run_all(scene: Scene, source: Pipeline, **wanted: Any) -> None:
    for each in CHECKS:
        check(scene, each.name, source=source if each.asks_source else None, **wanted)


def proof_of(scene: Scene, source: Pipeline | None, **wanted: Any) -> Proof:
    said = None if source is None else SourceSaid("pipeline", source.complete_through())
    with scene.worker.connect() as connection:
        return prove(connection, SETTINGS, source=said, **wanted)


def failing(proof: Proof) -> list[str]:
    return [sentence.text for sentence in proof.sentences if not sentence.holds]


def test_all_of_it_holds_where_all_is_well(scene: Scene) -> None:
    """The sentences have the numbers, and name the source, the policy and the seal."""
    source = settled(scene, "job-1", "job-2")
    run_all(scene, source)

    proof = proof_of(scene, source)

    assert failing(proof) == []
    text = " ".join(sentence.text for sentence in proof.sentences)
    assert "The source pipeline (complete through" in text
    assert "reports 2 finished jobs; 2 compared, 2 matched, 0 not comparable." in text
    assert "Every settlement (2, of them 2 refunds of 20 credits) follows policy 2025-12-14." in text
    assert "Books sum to zero" in text
    assert "No live break from before the end" in text
    with scene.worker.connect() as connection:
        newest = newest_seal(connection)
    assert newest is not None
    assert f"Seal {seal_text(newest)} stands for everything before" in text


def test_a_reader_can_prove(scene: Scene, database: Database) -> None:
    """An auditor needs no right but to read."""
    source = settled(scene, "job-1")
    run_all(scene, source)

    with database.connect("kino_read") as connection:
        proof = prove(connection, SETTINGS, source=SourceSaid("pipeline", source.complete_through()))

    assert proof.holds


def test_nothing_is_proven_before_the_first_run(scene: Scene) -> None:
    """And the command is named that changes it."""
    proof = proof_of(scene, settled(scene, "job-1"))

    assert not proof.holds
    assert [sentence.command for sentence in proof.sentences] == ["kino-refunds reconcile run"]


def test_without_a_source_nothing_outside_was_compared(scene: Scene) -> None:
    """The proof says so, and does not hold: matching has no complete run."""
    settled(scene, "job-1")
    for each in CHECKS:
        check(scene, each.name)

    assert failing(proof_of(scene, None)) == ["Nothing is proven: matching has no complete run yet."]


def test_a_live_break_fails_it_until_it_is_decided(scene: Scene) -> None:
    """Repaired is not enough: the next run has to find that both sides agree. Accepted is."""
    source = settled(scene, "job-1")
    source.jobs = [FinishedJob("job-1", Answer(JobState.COMPLETED, finished_at=EVENT_AT))]
    run_all(scene, source)
    assert "Live breaks from before the end: 1, about 10 credits" in failing(proof_of(scene, source))[0]

    scene.as_superuser("UPDATE kino.break SET status = 'repaired'")
    assert len(failing(proof_of(scene, source))) == 1

    scene.as_superuser("UPDATE kino.break SET status = 'accepted'")
    assert failing(proof_of(scene, source)) == []


def test_a_break_that_has_no_instant_counts_as_old(scene: Scene) -> None:
    """It may be as old as the ledger, so no proof holds beside it, however far back it ends."""
    source = settled(scene, "job-1")
    scene.charged("running")
    run_all(scene, source)
    scene.as_superuser(
        "INSERT INTO kino.break (kind, subject, credits, detail) VALUES ('lot_differs_from_transfers', 'lot:1', 3, 'd')"
    )

    assert "Live breaks from before the end: 1," in failing(proof_of(scene, source))[0]


def test_what_a_superuser_changed_fails_it_by_a_copy(scene: Scene) -> None:
    """The seals of the database may be written anew; the one that is kept elsewhere may not."""
    source = settled(scene, "job-1")
    run_all(scene, source)
    with scene.worker.connect() as connection:
        newest = newest_seal(connection)
    assert newest is not None
    kept = seal_text(newest)
    assert proof_of(scene, source, copy=compare_with_copy(scene.worker, kept)).holds

    scene.as_superuser(
        "SET session_replication_role = replica", "UPDATE kino.transfer SET reason = 'other' WHERE kind = 'refund'"
    )

    proof = proof_of(scene, source, copy=compare_with_copy(scene.worker, kept))
    assert len(failing(proof)) == 1
    assert "History is not what it was when the copy was made" in failing(proof)[0]


def test_it_ends_at_the_oldest_open_charge(scene: Scene) -> None:
    """Of a job that still runs nothing is known yet; later is refused, and the latest is named."""
    source = settled(scene, "job-1")
    running = scene.charged("running")
    run_all(scene, source)

    proof = proof_of(scene, source)

    assert proof.until == running.opened_at
    with pytest.raises(BadWindow, match="cannot be proven yet; the latest is"):
        proof_of(scene, source, until=running.opened_at + timedelta(seconds=1))
    with pytest.raises(BadWindow, match="what can be proven ends at"):
        proof_of(scene, source, since=running.opened_at + timedelta(seconds=1))


def test_a_run_over_everything_is_counted_once(scene: Scene) -> None:
    """After a full run the earlier ones, which compared the same, count no more."""
    source = settled(scene, "job-1")
    run_all(scene, source)
    run_all(scene, source, full=True)

    text = " ".join(sentence.text for sentence in proof_of(scene, source).sentences)

    assert "reports 1 finished jobs; 1 compared, 1 matched" in text


def test_it_begins_no_earlier_than_every_check(scene: Scene) -> None:
    """What was settled before the first run of a check that began later was compared by nobody."""
    source = settled(scene, "job-1")
    run_all(scene, source)
    with scene.worker.connect() as connection:
        begun = connection.exec_driver_sql("SELECT min(since) FROM kino.check_run").scalar_one()

    with pytest.raises(BadWindow, match="every check has compared everything since"):
        proof_of(scene, source, since=begun - timedelta(seconds=1))

    assert proof_of(scene, source, since=begun).holds


def test_a_window_that_a_person_began_later_is_no_beginning(scene: Scene) -> None:
    """The next run begins at the beginning, and finds what lies before."""
    source = settled(scene, "job-1")
    scene.as_superuser("SET session_replication_role = replica", "UPDATE kino.settlement SET ending = 'failed.user'")
    check(scene, "settled")
    [sample] = scene.rows("SELECT max(sampled_at) AS at FROM kino.xid_clock")
    check(scene, "decisions", since=sample.at)

    assert check(scene, "decisions").broken == 1
    assert source.jobs


def test_an_end_that_no_sample_reaches_is_not_covered(scene: Scene) -> None:
    """A run ends at the sample before `--until`, and says so: what came in between has another number."""
    settled(scene, "job-1")
    check(scene, "settled")
    [sample] = scene.rows("SELECT max(sampled_at) AS at FROM kino.xid_clock")
    with pytest.raises(BadWindow, match="no sample of the clock is as old as --until"):
        check(scene, "decisions", until=sample.at - DAY)

    ran = check(scene, "decisions", until=sample.at)

    assert ran.window.until == sample.at


def test_runs_of_another_source_are_named(scene: Scene) -> None:
    """What one pipeline was compared with says nothing of another."""
    source = settled(scene, "job-1")
    run_all(scene, source, job_source_name="old pipeline")

    assert "asked another source (old pipeline)" in failing(proof_of(scene, source))[0]


def test_a_relay_that_is_on_must_have_been_checked(scene: Scene) -> None:
    """Without its check the product may have heard of nothing; where the relay is off, the proof says so."""
    source = settled(scene, "job-1")
    run_all(scene, source)
    on = SETTINGS.model_copy(update={"relay_queue": "kino.credits-refunded"})

    with scene.worker.connect() as connection:
        proof = prove(connection, on, source=SourceSaid("pipeline", source.complete_through()))

    assert failing(proof) == ["Nothing is proven: relay has no complete run yet."]
    assert "The relay is off" in " ".join(each.text for each in proof_of(scene, source).sentences)


def test_a_clock_that_was_set_back_proves_nothing_that_came_later(scene: Scene) -> None:
    """A run of an hour that lies ahead covers no transaction of after: those have earlier instants."""
    source = settled(scene, "job-1")
    with clock_at(scene.worker, datetime.now(UTC) + DAY):
        check(scene, "decisions")
    run_all(scene, source)
    until = proof_of(scene, source).until
    settled(scene, "job-2")
    for each in CHECKS:
        if each.name != "decisions":
            check(scene, each.name, source=source if each.asks_source else None)

    assert proof_of(scene, source).until <= until + timedelta(seconds=5)


@pytest.mark.parametrize("happened", ["now() + interval '1 year'", "NULL"])
def test_a_break_of_the_future_is_one_of_now(scene: Scene, happened: str) -> None:
    """An event chooses its own time; a proof must not be deaf to it for a year."""
    source = settled(scene, "job-1")
    run_all(scene, source)
    scene.as_superuser(
        "INSERT INTO kino.break (kind, job_id, credits, detail, happened_at)"
        f" VALUES ('failed_after_capture', 'job-1', 3, 'd', {happened})"
    )

    assert not proof_of(scene, source).holds
