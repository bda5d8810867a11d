"""The check `matching`: what the source lists against what the ledger settled, both ways."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import chain, count, repeat
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import BadSettings, SourceBroken, SourceTimeout, SourceUnavailable, SourceUnreachable
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.ledger import AccountStatus, Charge
from kino_refunds.policy.document import published_policy
from kino_refunds.reconciliation import judging, matching
from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.comparison import LiveBreak, Scope, Window
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource
from kino_refunds.reconciliation.matching_window import NO_LIST, NO_SOURCE, READ_AGAIN, window
from kino_refunds.reconciliation.run_rows import Run, RunState
from kino_refunds.reconciliation.runs import run_check
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.breaks import Break, BreakKind
from tests.clock import DAY, HOUR, MINUTE, SECOND, clock_at, sample_at
from tests.conftest import Database
from tests.integration.reconciliation.checking import bench, live
from tests.integration.reconciliation.finished_jobs import Liar, Lister, ended
from tests.integration.reconciliation.sweeps import Source
from tests.scenario import NOW, Scene, make_event

GRACE = timedelta(seconds=60)
AT = NOW - MINUTE
"""When a job finished, and its event's time, unless a test says otherwise."""
LATER = NOW + HOUR
"""When the check runs: every charge is settled, or should be."""


@pytest.fixture(autouse=True)
def opened_before(scene: Scene) -> Iterator[None]:
    """Charges are opened an hour before their jobs end."""
    with clock_at(scene.worker, NOW - HOUR):
        yield


@pytest.fixture
def reader(database: Database) -> Iterator[sa.Engine]:
    """A session that may only read: the check writes nothing."""
    engine = create_engine(database.url("kino_read"))
    yield engine
    engine.dispose()


@dataclass
class Found:
    """All pages of a run."""

    compared: int = 0
    broken: int = 0
    not_comparable: Counter[str] = field(default_factory=Counter)
    breaks: list[Break] = field(default_factory=list)
    comparable: bool = True
    detail: dict[str, Any] = field(default_factory=dict)
    cursors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, set[str]]:
        kinds: dict[str, set[str]] = {}
        for each in self.breaks:
            assert each.job_id is not None
            kinds.setdefault(each.job_id, set()).add(each.kind)
        return kinds

    @property
    def numbers(self) -> tuple[int, int, dict[str, int]]:
        return self.compared, self.broken, dict(self.not_comparable)


def scope_of(reader: sa.Engine, source: Any, *, now: datetime = LATER, **changes: Any) -> Scope:
    with reader.connect() as connection:
        horizon = connection.execute(sa.text("SELECT CAST(CAST(kino.horizon() AS text) AS bigint)")).scalar_one()
    return Scope(
        engine=reader,
        window=Window(since=NOW - DAY, until=LATER, from_xid=0, to_xid=horizon),
        full=False,
        now=now,
        policy=published_policy(),
        overdue_grace=GRACE,
        grace=5 * MINUTE,
        source=source,
        **changes,
    )


def run_of(scope: Scope, cursor: dict[str, Any] | None = None, *, pages: int | None = None) -> Found:
    found = Found()
    for number, page in enumerate(matching.pages(scope, cursor or {}), start=1):
        found.compared += page.compared
        found.broken += page.broken
        found.not_comparable.update(page.not_comparable)
        found.breaks += page.breaks
        found.comparable = found.comparable and page.is_comparable
        found.detail = dict(page.detail)
        found.cursors.append(json.loads(json.dumps(dict(page.cursor))))
        if number == pages:
            break
    return found


def match(reader: sa.Engine, source: Any, **scope: Any) -> Found:
    return run_of(scope_of(reader, source, **scope))


def done(job_id: str, state: str = "completed", *, at: datetime = AT, **more: Any) -> FinishedJob:
    return ended(job_id, state, at=at, **more)


def lister(*jobs: FinishedJob, promise: datetime | None = LATER) -> Lister:
    return Lister(jobs, promise=promise)


# --- planted mismatches -------------------------------------------------------------------------------------------

USERS = {"state": "failed", "origin": ErrorOrigin.USER}
OURS = {"state": "failed", "origin": ErrorOrigin.PROVIDER}
LATE = {"state": "rejected", "stage": SafetyStage.AFTER_GENERATION}
EARLY = {"state": "rejected", "stage": SafetyStage.BEFORE_GENERATION}
RESULT = {"state": "timed_out", "result_produced": True}
NO_RESULT = {"state": "timed_out"}
DONE = {"state": "completed"}

PLANTED: dict[str, tuple[str | None, dict[str, Any], set[str]]] = {
    # what the event said (None: it never came), what the source says, what that is
    "completed": ("completed", DONE, set()),
    "failed": ("failed provider", OURS, set()),
    "failed by the user": ("failed user", USERS, set()),
    "ended otherwise, covered too": ("timeout", OURS, set()),
    "ended otherwise, not covered either": ("completed", USERS, set()),
    "a lost completion": (None, DONE, {"missing_event"}),
    "a lost failure": (None, OURS, {"missing_event"}),
    "a lie that captured": ("completed", OURS, {"failed_but_captured"}),
    "a lie that captured a timeout": ("completed", NO_RESULT, {"failed_but_captured"}),
    "a lie that captured a rejection": ("safety after", EARLY, {"failed_but_captured"}),
    "the user's fault, by mistake": ("failed user", OURS, {"failed_but_captured"}),
    "a lie that refunded": ("failed provider", DONE, {"completed_but_refunded"}),
    "a presumed timeout": ("timeout", DONE, {"completed_but_refunded"}),
    "refunded, the user's fault": ("failed provider", USERS, {"not_covered_but_refunded"}),
    "refunded with a result": ("timeout", RESULT, {"not_covered_but_refunded"}),
    "refunded after the generation": ("safety during", LATE, {"not_covered_but_refunded"}),
    "another account": ("completed", DONE | {"account_id": "acct-9"}, {"account_differs"}),
    "other credits": ("completed", DONE | {"credits": 9}, {"credits_differ"}),
    "no credits": ("completed", DONE | {"credits": 0}, {"credits_differ"}),
    "the same account and credits": ("completed", DONE | {"account_id": "acct of job", "credits": 10}, set()),
    "all at once": (
        "completed",
        OURS | {"account_id": "Acct of job", "credits": 11},
        {"failed_but_captured", "account_differs", "credits_differ"},
    ),
}


@pytest.mark.parametrize(("event", "said", "kinds"), PLANTED.values(), ids=PLANTED)
def test_each_planted_mismatch_is_found(
    scene: Scene, reader: sa.Engine, event: str | None, said: dict[str, Any], kinds: set[str]
) -> None:
    """What the source says and the ledger settled otherwise is a break of its kind; what agrees is none."""
    scene.charged("job")
    if event is not None:
        scene.settle(make_event(event, "job"))

    found = match(reader, lister(done("job", **said)))

    assert found.kinds == ({"job": kinds} if kinds else {})
    assert found.numbers == (1, 1 if kinds else 0, {})
    assert found.comparable


def test_a_completed_job_without_a_charge_is_found(scene: Scene, reader: sa.Engine) -> None:
    """A video for nothing is a break of the source's credits; other endings without a charge owe nothing."""
    scene.charged("job")
    scene.settle(make_event("completed", "job"))

    found = match(
        reader, lister(done("job"), done("free"), done("priced", credits=7), done("failed", "failed"), done("x" * 129))
    )

    assert {each.job_id: (each.kind, each.credits) for each in found.breaks} == {
        "free": ("uncharged_job", 0),
        "priced": ("uncharged_job", 7),
    }
    assert "the source's list must leave it out" in found.breaks[0].detail
    assert found.numbers == (4, 2, {judging.NO_CHARGE_CAN_HAVE_THIS_ID: 1})


def test_a_settled_charge_whose_job_is_unknown_is_found(scene: Scene, reader: sa.Engine) -> None:
    """The source is asked about each job that the ledger settled: one that it does not know is an orphan."""
    for job_id in ("job", "orphan", "runs"):
        scene.charged(job_id)
        scene.settle(make_event("completed", job_id))
    scene.charged("open")
    source = lister(done("job"))
    source.answers = {"runs": Answer(JobState.RUNNING)}

    found = match(reader, source)

    assert found.kinds == {"orphan": {"orphan_charge"}}
    assert found.numbers == (2, 1, {"the source says that the job still runs": 1})


def test_a_refund_that_came_too_late_is_found(scene: Scene, reader: sa.Engine) -> None:
    """Late is more than 5 min after the end and after deadline and grace: the later of the two counts."""
    due = NOW + HOUR + GRACE
    for job_id in ("by its end", "late by a second", "in time"):
        scene.charged(job_id)
    by_end = due + 10 * MINUTE
    scene.settle(make_event("failed provider", "by its end", at=by_end), now=by_end + 5 * MINUTE)
    scene.settle(make_event("failed provider", "late by a second"), now=due + 5 * MINUTE + SECOND)
    scene.settle(make_event("failed provider", "in time"), now=due + 5 * MINUTE)
    jobs = [done("by its end", "failed", at=by_end), done("late by a second", "failed"), done("in time", "failed")]

    scope = scope_of(reader, lister(*jobs, promise=due + HOUR), now=due + HOUR)
    found = run_of(replace(scope, window=replace(scope.window, until=due + HOUR)))

    assert found.kinds == {"late by a second": {"late"}}
    assert found.numbers == (3, 1, {})


def test_a_corrected_capture_counts_as_refunded(scene: Scene, reader: sa.Engine) -> None:
    """A repair ends the break; a correction against the source's word is one of its own."""
    charges = {job_id: scene.charged(job_id) for job_id in ("repaired", "given")}
    for job_id, charge in charges.items():
        scene.settle(make_event("completed", job_id))
        scene.correct(charge)

    found = match(reader, lister(done("repaired", "failed"), done("given")))

    assert found.kinds == {"given": {"completed_but_refunded"}}


# --- when and by what is judged -----------------------------------------------------------------------------------


def test_an_ending_is_judged_by_the_status_of_its_time(scene: Scene, reader: sa.Engine) -> None:
    """An account that was terminated for violation forfeits what ended afterwards, and nothing of before."""
    for job_id in ("before", "after"):
        scene.charged(job_id)
    with clock_at(scene.worker, NOW - 30 * MINUTE):
        for job_id in ("before", "after"):
            scene.set_status(f"acct of {job_id}", AccountStatus.TERMINATED)
    early = NOW - 50 * MINUTE
    scene.settle(make_event("failed provider", "before", at=early), make_event("failed provider", "after"))

    right = match(reader, lister(done("before", "failed", at=early), done("after", "failed")))
    wrong = match(reader, lister(done("before", "failed"), done("after", "failed", at=early)))

    assert right.kinds == {}
    assert wrong.kinds == {"before": {"not_covered_but_refunded"}, "after": {"failed_but_captured"}}


def test_two_clocks_may_read_one_end_some_minutes_apart(scene: Scene, reader: sa.Engine) -> None:
    """Where the status changed between the event's time and the source's, either of them may be right."""
    scene.charged("job")
    with clock_at(scene.worker, AT + SECOND):
        scene.set_status("acct of job", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job"))

    near = match(reader, lister(done("job", "failed", at=AT + 10 * MINUTE)))
    far = match(reader, lister(done("job", "failed", at=AT + 10 * MINUTE + SECOND)))

    assert (near.kinds, far.kinds) == ({}, {"job": {"not_covered_but_refunded"}})


def test_a_wrongful_termination_that_was_corrected_is_no_break(scene: Scene, reader: sa.Engine) -> None:
    """A person gave the credits back although the history still says terminated: that is what a correction is for."""
    charge = scene.charged("job")
    scene.set_status("acct of job", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job"))
    scene.correct(charge)

    assert match(reader, lister(done("job", "failed"))).numbers == (1, 0, {})


def test_a_job_that_ended_just_now_is_not_judged_yet(scene: Scene, reader: sa.Engine) -> None:
    """For 5 minutes an event may be on its way; a settlement that contradicts is found at once."""
    for job_id in ("open", "captured"):
        scene.charged(job_id)
    scene.settle(make_event("completed", "captured"))
    source = lister(done("open"), done("free"), done("captured", "failed"))

    young = match(reader, source, now=AT + 5 * MINUTE - SECOND)
    old = match(reader, source, now=AT + 5 * MINUTE)

    assert (young.kinds, young.numbers) == ({"captured": {"failed_but_captured"}}, (1, 1, {judging.NOT_YET: 2}))
    assert old.kinds == {
        "open": {"missing_event"},
        "free": {"uncharged_job"},
        "captured": {"failed_but_captured"},
    }


def test_a_break_says_what_is_at_stake_since_when(scene: Scene, reader: sa.Engine) -> None:
    """Credits, both sides, and when they came apart: from that the time to detect is counted."""
    charge = scene.charged("open", credits=7)
    scene.charged("captured", credits=8)
    scene.settle(make_event("completed", "captured"), now=NOW)

    found = match(reader, lister(done("open", "failed"), done("captured", "failed", credits=5)))

    breaks = {(each.job_id, each.kind): each for each in found.breaks}
    missing = breaks["open", BreakKind.MISSING_EVENT]
    assert (missing.charge_id, missing.credits, missing.happened_at) == (charge.charge_id, 7, AT)
    assert missing.sides == "open / failed.unknown"
    assert breaks["captured", BreakKind.FAILED_BUT_CAPTURED].happened_at == NOW
    assert breaks["captured", BreakKind.CREDITS_DIFFER].credits == 3


def test_what_the_jobs_own_event_says_already_is_no_second_break(scene: Scene, reader: sa.Engine) -> None:
    """Of one matter there is one row, which the event raised; it counts as broken all the same."""
    for job_id in ("captured", "refunded"):
        scene.charged(job_id)
    scene.settle(make_event("completed", "captured"), make_event("failed provider", "refunded"))
    scene.settle(make_event("failed provider", "captured"), make_event("completed", "refunded"))
    source = lister(done("captured", "failed", credits=9), done("refunded"))

    live = match(reader, source)
    scene.as_superuser("UPDATE kino.break SET status = 'closed'")
    closed = match(reader, source)

    assert {each.kind for each in scene.breaks()} == {"failed_after_capture", "completed_after_refund"}
    assert (live.kinds, live.broken) == ({"captured": {"credits_differ"}}, 2)
    assert closed.kinds == {
        "captured": {"failed_but_captured", "credits_differ"},
        "refunded": {"completed_but_refunded"},
    }


def test_a_settlement_of_a_job_that_ended_in_another_window_is_judged(scene: Scene, reader: sa.Engine) -> None:
    """A charge that is settled days after its job ended is compared by the run that sees the settlement."""
    scene.charged("old")
    scene.charged("new")
    scene.settle(make_event("completed", "old"), make_event("completed", "new"))
    source = lister(done("new"), done("old", "failed", at=NOW - 3 * DAY))

    assert match(reader, source).kinds == {"old": {"failed_but_captured"}}


# --- sources that are away, empty, behind, lying ------------------------------------------------------------------


def settled(scene: Scene, *job_ids: str) -> list[Charge]:
    charges = [scene.charged(job_id) for job_id in job_ids]
    scene.settle(*(make_event("completed", job_id) for job_id in job_ids))
    return charges


class Fails(Lister):
    """A source that fails in one of its three questions."""

    def __init__(self, error: Exception, *, what: str, jobs: tuple[FinishedJob, ...] = ()) -> None:
        super().__init__(jobs, promise=LATER)
        self.error, self.what = error, what

    def ask(self, job_ids: Any) -> Any:
        if self.what == "ask":
            raise self.error
        return super().ask(job_ids)

    def finished(self, since: datetime, until: datetime) -> Any:
        yield from super().finished(since, until)
        if self.what == "finished":
            raise self.error

    def complete_through(self) -> datetime | None:
        if self.what == "complete_through":
            raise self.error
        return super().complete_through()


ERRORS: dict[str, tuple[Exception, str]] = {
    "away": (SourceUnreachable("no route"), "the source is away: no route"),
    "failing": (SourceUnavailable("status 500"), "the source is away: status 500"),
    "hanging": (SourceTimeout("no answer"), "the source is away: no answer"),
    "hanging in Python": (TimeoutError("5 s"), "the source is away: TimeoutError: 5 s"),
    "breaking its contract": (SourceBroken("a NaN"), "the source breaks its contract: a NaN"),
    "wrongly set": (BadSettings("no table"), "the source's settings are wrong: no table"),
    "with a bug": (KeyError("a\0b"), r"the source failed: KeyError: 'a\x00b'"),
}


@pytest.mark.parametrize("what", ["finished", "complete_through"])
@pytest.mark.parametrize(("error", "why"), ERRORS.values(), ids=ERRORS)
def test_a_source_that_fails_is_not_comparable(
    scene: Scene, reader: sa.Engine, error: Exception, why: str, what: str
) -> None:
    """Without a whole list nothing is verified, and the run says why; settlements in the window are counted."""
    settled(scene, "a", "b")

    found = match(reader, Fails(error, what=what))

    assert (found.comparable, found.numbers) == (False, (0, 0, {why: 2}))


def test_what_was_compared_before_the_source_failed_stays(scene: Scene, reader: sa.Engine) -> None:
    """A list that ends in an error is no whole list: what its pages found is found, and the run is not comparable."""
    jobs = tuple(done(f"job-{number:04}", "failed") for number in range(1_000))
    settled(scene, "job-0000")

    found = match(reader, Fails(SourceUnreachable("gone"), what="finished", jobs=jobs))

    assert found.kinds == {"job-0000": {"failed_but_captured"}}
    assert not found.comparable
    assert found.not_comparable["the source is away: gone"] == 1


@pytest.mark.parametrize(
    ("error", "comparable", "why"),
    [
        (SourceUnreachable("no route"), False, "the source is away: no route"),
        (BadSettings("no table"), False, "the source's settings are wrong: no table"),
        (SourceUnavailable("one bad job"), True, "the source has no answer: one bad job"),
        (SourceBroken("a NaN"), True, "the source has no answer: a NaN"),
    ],
    ids=str,
)
def test_a_source_that_cannot_be_asked_finds_no_orphan(
    scene: Scene, reader: sa.Engine, error: Exception, comparable: bool, why: str
) -> None:
    """An error is not an answer: no settled charge is an orphan by it."""
    settled(scene, "a", "b")

    found = match(reader, Fails(error, what="ask", jobs=(done("a"), done("b"))))

    assert (found.breaks, found.comparable) == ([], comparable)
    assert found.not_comparable == {why: 2}


def test_an_empty_list_beside_settlements_is_not_comparable(scene: Scene, reader: sa.Engine) -> None:
    """A source that lost its table makes no "0 breaks", and no orphans of all that was settled."""
    settled(scene, "a", "b")

    found = match(reader, lister())

    why = "the source lists no job where the ledger has 2 settlements"
    assert (found.comparable, found.numbers, found.breaks) == (False, (0, 0, {why: 2}), [])


def test_nothing_on_both_sides_agrees(reader: sa.Engine) -> None:
    """Where no job finished and none was settled there is nothing to compare, and nothing wrong."""
    found = match(reader, lister())

    assert (found.comparable, found.numbers) == (True, (0, 0, {}))


def test_a_source_that_is_behind_makes_no_orphans(scene: Scene, reader: sa.Engine) -> None:
    """Without a promise, a settled job that would stand behind the end of the list may just not be listed yet."""
    settled(scene, "a", "b")
    behind = lister(done("a", at=AT - MINUTE), promise=None)

    found = match(reader, behind)
    ahead = match(reader, lister(done("a"), promise=None))

    assert (found.breaks, found.not_comparable) == ([], {matching.BEHIND: 1})
    assert ahead.kinds == {"b": {"orphan_charge"}}
    assert "the last 24 h again" in found.detail["assumption"]


def test_a_promise_that_is_taken_back_is_not_comparable(scene: Scene, reader: sa.Engine) -> None:
    """A source that says less than when the window was chosen is not believed."""
    settled(scene, "a")

    found = match(reader, lister(done("a"), promise=LATER - SECOND))

    assert not found.comparable
    assert next(iter(found.not_comparable)).startswith("the source took back its promise")


LIES: dict[str, Callable[[Iterator[FinishedJob]], Any]] = {
    "out of order": lambda jobs: reversed(list(jobs)),
    "repeats rows": lambda jobs: (job for each in jobs for job in repeat(each, 2)),
    "goes round for ever": lambda jobs: chain.from_iterable(repeat(list(jobs))),
    "goes on for ever": lambda _: (done(f"{number}", at=AT + number * HOUR) for number in count()),
    "leaves its window": lambda _: [done("a", at=LATER)],
    "gives words": lambda _: ["a"],
    "gives nothing": lambda _: None,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_list_that_lies_is_never_a_match(scene: Scene, reader: sa.Engine, lie: Any) -> None:
    """A list that breaks the contract is not comparable, whatever of it looked right."""
    settled(scene, "a", "b")

    found = match(reader, Liar([done("a"), done("b")], lie))

    assert not found.comparable
    assert next(iter(found.not_comparable)).startswith(("the source breaks its contract: ", "the source failed: "))


@pytest.mark.parametrize(("source", "why"), [(None, NO_SOURCE), (Source({}), NO_LIST)], ids=["none", "no list"])
def test_without_a_list_nothing_is_comparable(scene: Scene, reader: sa.Engine, source: Any, why: str) -> None:
    """A deployment without a list is told what to set, and never that all agrees."""
    settled(scene, "a")

    found = match(reader, source)

    assert (found.comparable, found.numbers) == (False, (0, 0, {why: 1}))


def test_ids_that_no_ledger_can_hold_do_no_harm(scene: Scene, reader: sa.Engine) -> None:
    """NUL, surrogates and 10 kB in an id of the list are counted, and the run goes on behind them."""
    odd = ["a\0b", "\ud800", "x" * 10_000, "\x1b[31m", "a\n"]
    settled(scene, "z")

    scope = scope_of(reader, lister(*(done(job_id, at=AT + SECOND) for job_id in odd), done("z")))
    found = run_of(scope)
    resumed = run_of(scope, found.cursors[0])

    assert found.numbers == (1, 0, {judging.NO_CHARGE_CAN_HAVE_THIS_ID: 5})
    assert (resumed.compared, resumed.comparable) == (0, True)


# --- pages --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_killed(scene: Scene, reader: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each page's cursor on, the rest is found: no job is left out and none is counted twice."""
    monkeypatch.setattr(matching, "PAGE", 2)
    monkeypatch.setattr(matching, "_SETTLED", sa.text(str(matching._SETTLED).replace("LIMIT 1000", "LIMIT 2")))
    settled(scene, *"abcde")
    settled(scene, *"vwxyz")
    scope = scope_of(reader, lister(*(done(job_id, "failed") for job_id in "abcde")))

    whole = run_of(scope)

    assert whole.kinds == {
        **{job_id: {"failed_but_captured"} for job_id in "abcde"},
        **{job_id: {"orphan_charge"} for job_id in "vwxyz"},
    }
    assert len(whole.cursors) == 8
    for killed_after in range(1, 8):
        before = run_of(scope, pages=killed_after)
        rest = run_of(scope, before.cursors[-1])
        assert before.breaks + rest.breaks == whole.breaks, killed_after
        assert (before.compared + rest.compared, rest.comparable) == (whole.compared, True)


def test_the_list_is_streamed(reader: sa.Engine) -> None:
    """A page is compared before the next job is read: a million jobs take no more memory than a thousand."""
    read = Counter[str]()

    def streaming(_: Iterator[FinishedJob]) -> Iterator[FinishedJob]:
        for number in range(5_000):
            read["jobs"] += 1
            yield done(f"job-{number:05}", "failed")

    at_each_page = []
    for _ in matching.pages(scope_of(reader, Liar([], streaming)), {}):
        at_each_page.append(read["jobs"])  # noqa: PERF401 - the counter is read at each page

    assert at_each_page == [1_000, 2_000, 3_000, 4_000, 5_000]


def test_a_check_only_reads(scene: Scene, reader: sa.Engine) -> None:
    """A run leaves every row as it was."""
    settled(scene, "a", "b")
    before = scene.everything()

    match(reader, lister(done("a", "failed"), done("c")))

    assert scene.everything() == before


# --- looking again ------------------------------------------------------------------------------------------------


def again(reader: sa.Engine, source: Any, found: list[Break], *, now: datetime = LATER) -> dict[str, str | None]:
    """Look again at these breaks; returns kind and job -> the kind that it still has, None if both sides agree."""
    live = [
        LiveBreak(number, str(each.kind), each.key[1], each.job_id, each.charge_id) for number, each in enumerate(found)
    ]
    looked = matching.again(scope_of(reader, source, now=now), live)
    return {
        f"{found[number].kind} {found[number].job_id}": None if one is None else str(one.kind)
        for number, one in looked.items()
    }


def test_repaired_breaks_are_found_to_agree(scene: Scene, reader: sa.Engine) -> None:
    """After the event came, a correction was made or the source learnt of the job, both sides agree."""
    (captured, *_) = settled(scene, "captured", "orphan")
    scene.charged("open")
    source = lister(done("captured", "failed"), done("open", account_id="acct-9", credits=9), done("free", credits=3))
    found = match(reader, source).breaks

    still = again(reader, source, found)
    scene.correct(captured)
    scene.settle(make_event("completed", "open"))
    source.jobs = sorted(
        [
            done("captured", "failed"),
            done("open", account_id="acct of open", credits=10),
            done("free", "failed"),
            done("orphan"),
        ],
        key=lambda job: job.place,
    )
    now_agree = again(reader, source, found)

    assert still == {f"{each.kind} {each.job_id}": str(each.kind) for each in found}
    assert set(still) == {
        "failed_but_captured captured",
        "orphan_charge orphan",
        "missing_event open",
        "account_differs open",
        "credits_differ open",
        "uncharged_job free",
    }
    assert now_agree == dict.fromkeys(still)


@pytest.mark.parametrize(
    "answer",
    [Answer(JobState.UNKNOWN), Answer(JobState.RUNNING)],
    ids=["unknown", "running"],
)
def test_an_uncertain_answer_closes_nothing(scene: Scene, reader: sa.Engine, answer: Answer) -> None:
    """A source that says no certain end of a job now leaves its break as it is."""
    settled(scene, "job")
    source = lister(done("job", "failed"))
    found = match(reader, source).breaks
    source.jobs, source.answers = [], {"job": answer}

    assert again(reader, source, found) == {}


@pytest.mark.parametrize("source", [None, Fails(SourceUnreachable("away"), what="ask")], ids=["none", "away"])
def test_a_source_that_is_away_closes_nothing(scene: Scene, reader: sa.Engine, source: Any) -> None:
    """Without an answer every break stays."""
    settled(scene, "job")
    found = match(reader, lister(done("job", "failed"))).breaks

    assert again(reader, source, found) == {}


def test_a_late_refund_stays_late(scene: Scene, reader: sa.Engine) -> None:
    """Nothing makes a late refund timely: a person accepts it."""
    scene.charged("job")
    scene.settle(make_event("failed provider", "job"), now=NOW + DAY)
    source = lister(done("job", "failed"))
    found = match(reader, source).breaks

    assert again(reader, source, found) == {"late job": "late"}


# --- windows ------------------------------------------------------------------------------------------------------


DELAY = timedelta(minutes=15)


def window_of(
    scene: Scene,
    source: Any,
    *,
    now: datetime = LATER,
    last: Window | None = None,
    last_until: datetime | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    delay: timedelta = DELAY,
) -> Window | str:
    """The window as the runner asks for it: `last` is that of the last complete run."""
    reach = last.until if last else last_until
    asked = Window(since=since or reach, until=until or now, from_xid=last.to_xid if last else 0, to_xid=0)
    with scene.worker.connect() as connection:
        scope = replace(scope_of(scene.worker, source, now=now), window=asked, matching_delay=delay)
        found, why = window(connection, scope, wanted_since=since, wanted_until=until)
    return found if why is None else why


def span(found: Window | str) -> tuple[datetime | None, datetime]:
    assert isinstance(found, Window), found
    return found.since, found.until


def test_a_window_ends_where_the_promise_does(scene: Scene) -> None:
    """With a promise a run begins where the last one ended, and ends with it, a grace before now at the latest."""
    scene.charged("job")
    source = lister(promise=NOW)

    assert span(window_of(scene, source)) == (NOW - HOUR - DAY, NOW)
    assert span(window_of(scene, source, last_until=NOW - MINUTE)) == (NOW - MINUTE, NOW)
    assert span(window_of(scene, source, until=LATER)) == (NOW - HOUR - DAY, NOW)
    assert span(window_of(scene, source, since=AT, until=NOW - SECOND)) == (AT, NOW - SECOND)
    assert span(window_of(scene, lister(promise=LATER + SECOND))) == (NOW - HOUR - DAY, LATER - 5 * MINUTE)


def test_without_a_promise_a_run_keeps_its_distance(scene: Scene) -> None:
    """The last quarter of an hour is left out, and the day before the last run's end is read again."""
    scene.charged("job")
    source = lister(promise=None)

    assert span(window_of(scene, source)) == (NOW - HOUR - DAY, LATER - DELAY)
    assert span(window_of(scene, source, last_until=NOW)) == (NOW - READ_AGAIN, LATER - DELAY)
    assert span(window_of(scene, source, delay=6 * MINUTE)) == (NOW - HOUR - DAY, LATER - 6 * MINUTE)
    assert span(window_of(scene, source, delay=MINUTE)) == (NOW - HOUR - DAY, LATER - 5 * MINUTE)
    assert span(window_of(scene, source, until=LATER + DAY)) == (NOW - HOUR - DAY, LATER - DELAY)


class Promises(Lister):
    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def complete_through(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


NOTHING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no source": (None, {}, NO_SOURCE),
    "no list": (Source({}), {}, NO_LIST),
    "a promise in the future": (lister(promise=LATER + MINUTE), {}, "which is in the future"),
    "a promise of words": (Promises("soon"), {}, "the source failed: "),
    "a promise without an offset": (Promises(NOW.replace(tzinfo=None)), {}, "the source failed: "),
    "away": (Promises(SourceUnreachable("no route")), {}, "the source is away: no route"),
    "a window in the future": (
        lister(promise=NOW),
        {"since": LATER + DAY, "until": LATER + HOUR + DAY},
        "is not that far",
    ),
    "a window that is reversed": (lister(promise=NOW), {"since": AT, "until": AT - MINUTE}, "is not that far"),
    "a promise behind the last run": (lister(promise=AT), {"last_until": NOW}, "and it says that its list is complete"),
    "too soon": (lister(promise=None), {"since": LATER - MINUTE}, "and its list is taken as complete until"),
}


@pytest.mark.parametrize(("source", "asked", "why"), NOTHING.values(), ids=NOTHING)
def test_a_window_that_cannot_be_is_said_in_words(scene: Scene, source: Any, asked: dict[str, Any], why: str) -> None:
    """Where there is nothing to compare a person reads why, and no run begins."""
    scene.charged("job")

    found = window_of(scene, source, **asked)

    assert isinstance(found, str)
    assert why in found


def test_a_promise_that_stands_still_is_an_empty_run(scene: Scene, reader: sa.Engine) -> None:
    """Where the source knows no more than at the last run, nothing is compared, and nothing is wrong."""
    settled(scene, "job")
    source = lister(promise=NOW)

    found = window_of(scene, source, last_until=NOW)
    assert isinstance(found, Window)

    assert run_of(replace(scope_of(reader, source), window=found)).numbers == (0, 0, {})


def test_an_empty_ledger_has_no_window(scene: Scene) -> None:
    """Before the first charge there is nothing to compare."""
    assert window_of(scene, lister(promise=NOW)) == "the ledger has no charge yet"


def test_a_window_without_an_offset_is_refused(scene: Scene) -> None:
    """An instant that may mean two is not guessed."""
    with pytest.raises(ValueError, match="has no offset"):
        window_of(scene, lister(promise=NOW), since=NOW.replace(tzinfo=None))


def test_a_night_that_sets_the_clock_back_is_one_hour_longer(scene: Scene, reader: sa.Engine) -> None:
    """Two wall clocks with the same reading are two instants: the window is in UTC, and each job is listed once."""
    berlin = ZoneInfo("Europe/Berlin")
    first = datetime(2026, 10, 25, 2, 30, tzinfo=berlin, fold=0)
    second = datetime(2026, 10, 25, 2, 30, tzinfo=berlin, fold=1)
    source = Lister([done("summer", at=first), done("winter", at=second)], promise=NOW)

    found = window_of(scene, source, since=first, until=second)
    assert isinstance(found, Window)
    scope = replace(scope_of(reader, source), window=found)

    assert (found.since, found.until) == (
        datetime(2026, 10, 25, 0, 30, tzinfo=UTC),
        datetime(2026, 10, 25, 1, 30, tzinfo=UTC),
    )
    assert run_of(scope).kinds == {"summer": {"uncharged_job"}}


def test_windows_in_a_row_leave_no_settlement_out(scene: Scene, reader: sa.Engine) -> None:
    """The next run's first transaction is this run's last: each settlement is asked about by one run."""
    source = lister(promise=None)
    scene.charged("first")
    sample_at(scene.worker, NOW - 50 * MINUTE)
    asked, last, seen = list[list[str]](), None, list[Window]()
    for number in range(1, 5):
        at = NOW - 50 * MINUTE + number * 10 * MINUTE
        scene.charged(f"job-{number}")
        scene.settle(make_event("completed", f"job-{number}", at=at), now=at)
        sample_at(scene.worker, at + SECOND)
        source.promise = at + 2 * SECOND
        source.jobs = [done(f"job-{n}", at=NOW - 50 * MINUTE + n * 10 * MINUTE) for n in range(1, number + 1)]
        found = window_of(scene, source, now=at + 6 * MINUTE, last=last)
        assert isinstance(found, Window)
        source.asked.clear()
        result = run_of(replace(scope_of(reader, source), window=found))
        assert (result.comparable, result.kinds) == (True, {})
        asked += source.asked
        seen.append(found)
        last = found

    assert asked == [[f"job-{number}"] for number in range(1, 5)]
    assert [before.to_xid for before in seen[:-1]] == [after.from_xid for after in seen[1:]]


def test_a_run_begins_at_the_number_where_the_last_one_ended(scene: Scene) -> None:
    """A sample that the horizon had not passed at the last run counts now: what settled before it is not skipped."""
    scene.charged("job")
    sample_at(scene.worker, NOW - 10 * MINUTE)
    last = Window(since=None, until=NOW - 5 * MINUTE, from_xid=0, to_xid=7)

    found = window_of(scene, lister(promise=NOW), last=last)

    assert isinstance(found, Window)
    assert found.from_xid == 7
    assert found.to_xid > 7


def test_a_run_while_everything_is_being_settled(scene: Scene, reader: sa.Engine) -> None:
    """What settles between two pages is judged as it stands at its page, and nothing is raised that was never so."""
    jobs = [f"job-{number:04}" for number in range(1_500)]
    scene.grant("acct-1", 100_000)
    for job_id in jobs:
        scene.open(job_id, "acct-1")
    scope = scope_of(reader, lister(*(done(job_id) for job_id in jobs)))

    run = matching.pages(scope, {})
    first = next(run)
    scene.settle_batch(*(make_event("completed", job_id) for job_id in jobs))
    second = next(run)
    rest = list(run)

    assert ({each.kind for each in first.breaks}, first.broken) == ({BreakKind.MISSING_EVENT}, 1_000)
    assert (second.compared, second.broken, [page.breaks for page in rest]) == (500, 0, [])
    source = scope.source
    assert isinstance(source, FinishedSource)
    assert set(again(reader, source, list(first.breaks)).values()) == {None}


# --- as a run -----------------------------------------------------------------------------------------------------


def run_whole(scene: Scene, source: Any) -> Run:
    with clock_at(scene.worker, LATER):
        return run_check(check_named("matching"), bench(scene, source=source))


def test_runs_find_repair_and_close(scene: Scene) -> None:
    """A run raises breaks, the next one closes those that agree by now, and goes on where the last one ended."""
    scene.charged("open")
    settled(scene, "fine", "orphan")
    with clock_at(scene.worker, NOW):
        sample_at(scene.worker, NOW)
    source = lister(done("open", "failed"), done("fine"), promise=NOW + SECOND)

    first = run_whole(scene, source)
    raised = live(scene)
    scene.settle(make_event("failed provider", "open"))
    source.promise = NOW + MINUTE
    second = run_whole(scene, source)

    assert (first.state, first.compared, first.broken) == (RunState.COMPLETE, 3, 2)
    assert raised == [("missing_event", "open", 10), ("orphan_charge", "orphan", 10)]
    assert (second.state, second.window.since, second.window.until) == (
        RunState.COMPLETE,
        NOW + SECOND,
        NOW + MINUTE,
    )
    assert live(scene) == [("orphan_charge", "orphan", 10)]


def test_a_run_without_the_source_verifies_nothing(scene: Scene) -> None:
    """After a run that could not compare, the next one compares the same window."""
    settled(scene, "a")
    sample_at(scene.worker, NOW)
    jobs = (done("a", "failed"),)

    away = run_whole(scene, Fails(SourceUnreachable("no route"), what="finished", jobs=jobs))
    nothing = run_whole(scene, Source({}))
    back = run_whole(scene, lister(*jobs))

    assert (away.state, nothing.state) == (RunState.NOT_COMPARABLE, RunState.NOT_COMPARABLE)
    assert dict(nothing.not_comparable) == {NO_LIST: 1}
    assert (back.state, back.window.since, back.broken) == (RunState.COMPLETE, away.window.since, 1)
