"""The planted bugs fit the code: `make faults` would find out after minutes only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.planted import PLANTED, Planted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_bug_has_its_place(planted: Planted) -> None:
    """The text that it replaces stands in its file once, and the tests that must catch it exist."""
    text = (ROOT / planted.edit.file).read_text(encoding="utf-8")
    assert text.count(planted.edit.old) == 1, (planted.edit.file, planted.edit.old)
    for test in planted.tests:
        file, _, name = test.partition("::")
        assert name.partition("::")[0] in (ROOT / file).read_text(encoding="utf-8")
