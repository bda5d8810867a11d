"""The incident of a thousand jobs: a few documented commands bring every customer to the truth, and prove it."""

from __future__ import annotations

import os
import re

import pytest

from tests.faults import incident
from tests.faults.harness import arena
from tests.project import ROOT

RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
BLOCK = re.compile(r"<!-- incident -->\n```\n(.*?)\n```\n<!-- end -->", re.DOTALL)
COMMANDS_MAX = 9
"""What a person types at most: "few commands" of the promise. A loop over a listing counts as one."""


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_bad_hour_is_brought_home_by_a_few_commands() -> None:
    """Lost, spoiled, doubled and untrue events, a FLUSHALL and two SIGKILLs: at the end nothing is open or wrong.

    The runbook shows these commands and no others; with KINO_WRITE_RUNBOOK=1 this test writes its transcript there.
    """
    with arena() as place:
        played = incident.play(place.servers, jobs=incident.SCALE)
    text = RUNBOOK.read_text(encoding="utf-8")
    if os.environ.get("KINO_WRITE_RUNBOOK"):
        block = f"<!-- incident -->\n```\n{played.transcript()}\n```\n<!-- end -->"
        text = BLOCK.sub(lambda _: block, text)
        RUNBOOK.write_text(text, encoding="utf-8")

    assert played.wrong == [], played.transcript()
    assert played.before["balances that are wrong"] > 0
    assert [each.code for each in played.typed[-3:]] == [0, 0, 0]
    assert len(played.typed) <= COMMANDS_MAX
    shown = BLOCK.search(text)
    assert shown is not None
    commands = [each.command for each in played.typed]
    assert re.findall(r"^\$ (.*(?:\n    .*)*)", shown[1], re.MULTILINE) == commands
