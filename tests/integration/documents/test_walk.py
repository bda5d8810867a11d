"""The five-minute walk, taken by a newcomer's hands; what it prints is what the pages show."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests import walk
from tests.documents import DEMO, README, block

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[walk.KeptDemo]:
    with walk.kept_demo(tmp_path_factory.mktemp("walk"), 100) as kept:
        yield kept


def shape(text: str) -> str:
    """What is the same in every run: words without numbers, times (or that there is none yet), and widths."""
    text = re.sub(r"\d[\d,.:+TZ-]*|(?<= )-(?= )", "#", text)
    text = re.sub(r"[ \n]+", " ", re.sub(r"# #", "#", text)).strip()
    # A sweep of every minute has run before the walk asks, or has not: that is the clock's.
    return text.replace("not yet next #", "runs last # next #")


def test_walk_prints_what_its_page_shows(demo: walk.KeptDemo) -> None:
    """Command by command, in the order of the page, with the numbers and times of this run."""
    steps = list(walk.walk(demo))
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block(DEMO, "walk"), re.MULTILINE)

    assert [shape(command) for command, _ in shown] == [shape(command) for command, _ in steps]
    for (command, expected), (_, found) in zip(shown, steps, strict=True):
        assert shape(found) == shape(expected), command


def test_walk_moves_the_credits_once(demo: walk.KeptDemo) -> None:
    """After the walk the customer has every credit back, and the letter is closed by the person who replayed it."""
    assert re.search(r"available\s+100\nheld\s+0\n", demo.shell("kino-refunds accounts show acme"))
    assert "no open dead letters" in demo.shell("kino-refunds dead-letters list --job walk-1")


def test_demo_prints_what_the_pages_show(demo: walk.KeptDemo) -> None:
    """Its page shows all that was broken and every figure's name, the README every promise; the numbers differ."""
    line = re.compile(
        r"(?:# )?(?:BROKEN|HEALED|held|late) .*|(?:duplicates|retries|overdue|breaks|latency|seconds) [^#-]*"
    )

    def lines(text: str) -> set[str]:
        # A slow machine is late, and no test is about that.
        found = (line.match(shape(each)) for each in text.splitlines())
        return {each[0].replace("late P", "held P") for each in found if each}

    story, promises = map(lines, walk.halves(demo.output))
    assert (len(story), len(promises)) == (20, 10)
    assert story == lines(block(DEMO, "demo"))
    assert promises == lines(block(README, "promises"))
