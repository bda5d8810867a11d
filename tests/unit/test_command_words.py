"""Words that stand in the command line once more, because the modules that own them take a while to load."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from kino_refunds.cli import accounts, breaks, dead_letters, options
from kino_refunds.intake.gate import TRIPWIRE
from kino_refunds.ledger import LotClass
from kino_refunds.settlement.breaks import BreakStatus
from kino_refunds.settlement.dead_letters import LetterStatus


@pytest.mark.parametrize(
    ("command", "parameter", "words"),
    [
        (accounts.grant, "lot_class", [*LotClass]),
        (breaks.list_breaks, "status", ["live", *BreakStatus, "all"]),
        (dead_letters.list_letters, "status", [*LetterStatus, "all"]),
    ],
    ids=["lot class", "break", "letter"],
)
def test_choices_of_an_option_are_the_words_of_their_enum(command: object, parameter: str, words: list[str]) -> None:
    """A word that is added where it is decided can be typed as well, in the same order."""
    assert list(get_args(get_type_hints(command)[parameter])) == [str(word) for word in words]


def test_tripwire_has_one_name() -> None:
    """Nobody acts under the name of the tripwire, whose pauses end by themselves."""
    assert options.TRIPWIRE == TRIPWIRE
