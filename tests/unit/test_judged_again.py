"""A settlement stores how its job ended as one word, and is judged again from it."""

from __future__ import annotations

import pytest

from kino_refunds.reconciliation.decisions import event_of_ending
from tests.scenario import KINDS, make_event


@pytest.mark.parametrize("kind", KINDS)
def test_every_ending_that_a_settlement_stores_is_known(kind: str) -> None:
    """What an event says of the end can be read back from its word, or the settlement could not be judged again."""
    ending = make_event(kind).ending

    read = event_of_ending(ending)

    assert read is not None
    assert read.ending == ending


@pytest.mark.parametrize("word", ["", "failed", "failed.by magic", "Completed", "completed ", "timeout"])
def test_a_word_that_no_event_writes_is_no_ending(word: str) -> None:
    """It is not taken for the nearest one: the difference would be hidden."""
    assert event_of_ending(word) is None
