"""The check `matching` where a source is away, empty, behind or lying: nothing is verified by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, repeat
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import BadSettings, SourceBroken, SourceTimeout, SourceUnavailable, SourceUnreachable
from kino_refunds.reconciliation import judging, matching
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.matching_window import NO_LIST, NO_SOURCE
from tests.clock import HOUR, MINUTE, SECOND
from tests.integration.reconciliation.finished_jobs import Liar
from tests.integration.reconciliation.matching_scene import (
    AT,
    LATER,
    Fails,
    done,
    lister,
    match,
    run_of,
    scope_of,
    settled,
)
from tests.integration.reconciliation.sweeps import Source
from tests.scenario import Scene

pytestmark = pytest.mark.usefixtures("opened_before")

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
