"""Whatever order, copies and batches events come in, the money ends where the policy says (hypothesis)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kino_refunds.ledger import Balance
from kino_refunds.reconciliation.integrity import violations
from tests.scenario import EVENT_AT, KINDS, NOT_COVERED, NOW, REFUNDABLE, Scene, make_event

if TYPE_CHECKING:
    from kino_refunds.events.schema import Event

LATER = NOW + timedelta(hours=1)
CREDITS_A_JOB = 7
# One database for all examples of a test; every example has an account and jobs of its own.
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_examples = count(1)


@dataclass(frozen=True)
class Tale:
    """What was said of each job, by number, and how it was delivered: batches of (job, index of the event)."""

    endings: list[list[tuple[str, int]]]
    """Of each job its events: kind, and seconds after the first."""
    batches: list[list[tuple[int, int]]]
    charged_before: list[int]
    """For each job, how many batches were settled before its charge was there."""


def tales(endings: st.SearchStrategy[list[tuple[str, int]]]) -> st.SearchStrategy[Tale]:
    """Draw up to four jobs with their events, every event delivered once or more, in any order and batches."""

    @st.composite
    def draw_tale(draw: st.DrawFn) -> Tale:
        jobs = draw(st.lists(endings, min_size=1, max_size=4))
        each_once = [(job, index) for job, events in enumerate(jobs) for index in range(len(events))]
        copies = draw(st.lists(st.sampled_from(each_once), max_size=6))
        order = draw(st.permutations(each_once + copies))
        cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
        batches = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
        charged_before = [draw(st.integers(0, len(batches))) if draw(st.booleans()) else 0 for _ in jobs]
        return Tale(jobs, batches, charged_before)

    return draw_tale()


def play(scene: Scene, tale: Tale) -> tuple[str, list[str]]:
    """Tell a tale to the database, then let the retries settle what waited; returns account and jobs."""
    example = next(_examples)
    account_id = f"acct-{example}"
    jobs = [f"job-{example}-{job}" for job in range(len(tale.endings))]
    scene.grant(account_id, 100)
    events: dict[tuple[int, int], Event] = {
        (job, index): make_event(kind, jobs[job], event_id=f"{jobs[job]}-{index}", at=EVENT_AT + timedelta(seconds=s))
        for job, ending in enumerate(tale.endings)
        for index, (kind, s) in enumerate(ending)
    }
    for turn, batch in enumerate([*tale.batches, []]):
        for job, job_id in enumerate(jobs):
            if tale.charged_before[job] == turn:
                scene.open(job_id, account_id, CREDITS_A_JOB)
        scene.settle_batch(*(events[key] for key in batch))
    scene.sweep(now=LATER)
    return account_id, jobs


def agreeing(*kinds: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 3)), min_size=1, max_size=3)


AGREEING = st.one_of(agreeing(*REFUNDABLE), agreeing("completed", *NOT_COVERED))
ANY = st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 3)), min_size=1, max_size=4)


@PROPERTY
@given(tale=tales(AGREEING))
def test_events_that_agree_leave_the_same_balances_however_they_come(scene: Scene, tale: Tale) -> None:
    """Any duplication, order and batching of events that agree about a job settles it alike, without a break."""
    account_id, jobs = play(scene, tale)

    refunded = [ending[0][0] in REFUNDABLE for ending in tale.endings]
    spent = CREDITS_A_JOB * refunded.count(False)
    settled = [scene.story(job_id) for job_id in jobs]
    assert scene.balance(account_id) == Balance(100 - spent, 0)
    assert [s.settlement is not None and s.settlement.kind == "refunded" for s in settled] == refunded
    assert [(s.breaks, s.pending, s.dead_letters) for s in settled] == [([], {}, {})] * len(jobs)
    assert [len(s.inbox) for s in settled] == [len(ending) for ending in tale.endings]
    with scene.worker.connect() as connection:
        assert violations(connection, without=("times",)) == []


@PROPERTY
@given(tale=tales(ANY))
def test_events_that_disagree_leave_one_result_and_a_break(scene: Scene, tale: Tale) -> None:
    """One event of the job decides it; a break stands if, and only if, another says what section 5 names one for."""
    account_id, jobs = play(scene, tale)

    spent = 0
    for job_id, ending in zip(jobs, tale.endings, strict=True):
        told = scene.story(job_id)
        said = {kind for kind, _ in ending}
        assert told.settlement is not None
        deciding = ending[int(told.settlement.event_id.rpartition("-")[2])][0]
        refunded = told.settlement.kind == "refunded"
        expected = ["completed_after_refund"] if "completed" in said else []
        if not refunded:
            expected = ["failed_after_capture"] if said & set(REFUNDABLE) else []
            spent += CREDITS_A_JOB
        assert refunded == (deciding in REFUNDABLE)
        assert [moved.credits for moved in told.moved] == [CREDITS_A_JOB]
        assert (told.breaks, told.pending, told.dead_letters) == (expected, {}, {})
    assert scene.balance(account_id) == Balance(100 - spent, 0)
    with scene.worker.connect() as connection:
        assert violations(connection, without=("times",)) == []


@PROPERTY
@given(tale=tales(ANY), shuffled=st.randoms(use_true_random=False))
def test_telling_a_tale_again_changes_nothing(scene: Scene, tale: Tale, shuffled: Random) -> None:
    """Once everything is decided, every event once more, in any order, writes not one row."""
    _, jobs = play(scene, tale)
    before = scene.everything()
    events = [
        make_event(kind, jobs[job], event_id=f"{jobs[job]}-{index}", at=EVENT_AT + timedelta(seconds=s))
        for job, ending in enumerate(tale.endings)
        for index, (kind, s) in enumerate(ending)
    ]
    shuffled.shuffle(events)

    said = scene.settle_batch(*events)

    assert set(said.values()) == {"duplicate"}
    assert scene.everything() == before


@PROPERTY
@given(ending=ANY)
def test_within_one_claim_the_first_of_a_job_s_events_decides(scene: Scene, ending: list[tuple[str, int]]) -> None:
    """However a claim is ordered, the event with the earliest time is the one that settles the charge."""
    example = next(_examples)
    job_id = f"job-{example}"
    scene.charged(job_id)

    scene.settle(
        *(
            make_event(kind, job_id, event_id=f"{example}-{index}", at=EVENT_AT + timedelta(seconds=s))
            for index, (kind, s) in enumerate(ending)
        )
    )

    settlement = scene.story(job_id).settlement
    first = min(range(len(ending)), key=lambda index: (ending[index][1], index))
    assert settlement is not None
    assert settlement.event_id == f"{example}-{first}"
