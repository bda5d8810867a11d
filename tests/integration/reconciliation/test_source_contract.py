"""The contract of a job source finds each source that breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.contract import JobSourceContract
from kino_refunds.reconciliation.sources import Answer
from tests.integration.reconciliation.job_sources import COMPLETED, ENDED_AT, KNOWN, UNKNOWN


class Knows:
    """A source in Python that knows KNOWN, and then says what the test makes of it."""

    def __init__(self, lie: Lie) -> None:
        self._lie = lie

    def ask(self, job_ids: Sequence[str]) -> Any:
        return self._lie(job_ids, {job_id: KNOWN.get(job_id, UNKNOWN) for job_id in job_ids})


Lie = Callable[[Sequence[str], dict[str, Answer]], Any]


def told(**changes: Any) -> Lie:
    """A source that says the same of each answer, whatever it knows."""
    return lambda _, true: {job_id: replace(answer, **changes) for job_id, answer in true.items()}


def never_twice(job_ids: Sequence[str], true: dict[str, Answer]) -> dict[str, Answer]:
    return true if len(job_ids) == len(true) else {}


CLOCK = iter(range(10**6))
CARELESS: dict[str, tuple[Lie, str]] = {
    "honest": (lambda _, true: true, ""),
    "pads": (lambda _, true: {job_id.ljust(20): a for job_id, a in true.items()}, "no_other_job_is_answered_for"),
    "cuts": (lambda _, true: {job_id[:20]: a for job_id, a in true.items()}, "no_other_job_is_answered_for"),
    "strips": (
        lambda _, true: {job_id: KNOWN.get(job_id.strip(), UNKNOWN) for job_id in true},
        "a_like_id_is_not_the_job",
    ),
    "folds": (
        lambda _, true: {
            job_id: {k.lower(): a for k, a in KNOWN.items()}.get(job_id.lower(), UNKNOWN) for job_id in true
        },
        "a_like_id_is_not_the_job",
    ),
    "gives the whole table": (lambda _, true: KNOWN | true, "no_other_job_is_answered_for"),
    "answers by place": (
        lambda ids, _: dict(zip(ids, [KNOWN.get(each, UNKNOWN) for each in sorted(ids)], strict=True)),
        "the_order_does_not_matter",
    ),
    "is confused by an id twice": (never_twice, "a_job_asked_twice_is_answered_once"),
    "leaves out what it does not know": (
        lambda _, true: {job_id: a for job_id, a in true.items() if job_id in KNOWN},
        "an_unheard_of_job_is_unknown",
    ),
    "takes forty at most": (lambda _, true: dict([*true.items()][:40]), "a_whole_batch_is_answered"),
    "has no result": (told(result_produced=False), "known_jobs_are_answered_as_they_are"),
    "has no time": (told(finished_at=None), "known_jobs_are_answered_as_they_are"),
    "has no origin": (told(origin=ErrorOrigin.UNKNOWN), "known_jobs_are_answered_as_they_are"),
    "has no stage": (told(stage=SafetyStage.DURING_GENERATION), "known_jobs_are_answered_as_they_are"),
    "says the time of the ask": (
        lambda _, true: {j: replace(a, finished_at=ENDED_AT + timedelta(next(CLOCK))) for j, a in true.items()},
        "asking_again_gives_the_same",
    ),
    "gives rows": (lambda _, true: [*true.items()], "every_value_is_an_answer"),
    "gives words": (lambda _, true: {job_id: a.state for job_id, a in true.items()}, "every_value_is_an_answer"),
    "knows jobs in a crowd only": (
        lambda ids, true: true if len(ids) > 1 else dict.fromkeys(true, UNKNOWN),
        "each_job_is_answered_alone_as_among_others",
    ),
    "reads wildcards": (
        lambda _, true: true | {"%": COMPLETED} if "%" in true else true,
        "hostile_ids_are_only_ids",
    ),
    "cuts what is unknown": (
        lambda _, true: {job_id[:100]: a for job_id, a in true.items()} if "l" * 128 not in true else true,
        "an_unheard_of_job_is_unknown_whatever_its_length",
    ),
    "errs for all where one is unknown": (
        lambda _, true: true if true.keys() <= KNOWN.keys() else dict.fromkeys(true, UNKNOWN),
        "one_unheard_of_job_spoils_no_other_answer",
    ),
}


def broken_promises(source: Knows) -> set[str]:
    """The tests of the contract that this source fails."""
    broken = set()
    for name, test in vars(JobSourceContract).items():
        if name.startswith("test_"):
            given: dict[str, Any] = {"source": source, "known": KNOWN}
            wanted = {each: given[each] for each in inspect.signature(test).parameters if each in given}
            try:
                test(JobSourceContract(), **wanted)
            except Exception:  # noqa: BLE001 - whatever a careless source makes of its test, it is not passed
                broken.add(name.removeprefix("test_"))
    return broken


@pytest.mark.parametrize(("lie", "promise"), CARELESS.values(), ids=CARELESS)
def test_the_contract_finds_a_careless_source(lie: Lie, promise: str) -> None:
    """Each careless source fails the test that speaks of its carelessness; an honest one fails none."""
    broken = broken_promises(Knows(lie))

    assert promise in broken if promise else broken == set()


def test_every_promise_of_the_contract_is_broken_by_somebody() -> None:
    """No test of the contract is hollow: for each there is a careless source that fails it."""
    promises = {name.removeprefix("test_") for name in vars(JobSourceContract) if name.startswith("test_")}

    assert promises == {promise for _, promise in CARELESS.values() if promise}
