"""The incident of a thousand jobs: a few documented commands bring every customer to the truth, and prove it."""

from __future__ import annotations

import re

import pytest

from tests.faults import incident
from tests.faults.harness import arena
from tests.project import ROOT

RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
COMMANDS_MAX = 9
"""What a person types at most: "few commands" of the promise."""


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_bad_hour_is_brought_home_by_a_few_commands() -> None:
    """Lost, spoiled, doubled and untrue events, a FLUSHALL and two SIGKILLs: at the end nothing is open or wrong."""
    with arena() as place:
        played = incident.play(place.servers, jobs=1_000)

    assert played.wrong == [], played.transcript()
    assert played.before["balances that are wrong"] > 0
    assert [each.code for each in played.typed[-3:]] == [0, 0, 0]
    assert len(played.typed) <= COMMANDS_MAX
    shown = RUNBOOK.read_text(encoding="utf-8")
    for each in played.typed:
        assert each.command in shown, "the runbook shows each command"
    assert re.search(r"a thousand jobs", shown)
