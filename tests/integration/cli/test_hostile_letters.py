"""Hostile messages, and hostile words of colleagues, are shown as text."""

from __future__ import annotations

import pytest

from tests.command_line import ESCAPES, MARKUP, Run, harmless, squeezed
from tests.integration.cli.letters import letter
from tests.malformed import TEN_KB, bare
from tests.scenario import Scene

HOSTILE = {
    "escapes": ESCAPES.encode("utf-8", "surrogatepass"),
    "c1 controls": b"\xc2\x9b31m\xc2\x90",
    "markup": MARKUP.encode(),
    "binary": bytes(range(256)),
    "10 kB in one word": TEN_KB.encode(),
    "an event with all of it": bare({"id": ESCAPES, "source": MARKUP, "subject": TEN_KB, "type": ESCAPES}),
}


@pytest.mark.parametrize("form", ["table", "json"])
def test_hostile_messages_are_shown_harmlessly(cli: Run, scene: Scene, form: str) -> None:
    """Nothing in a message acts on the terminal of who looks at it: neither escapes nor markup."""
    for raw in HOSTILE.values():
        scene.keep(letter(raw, detail=f"{ESCAPES}{MARKUP}"))
    flags = ["--json"] if form == "json" else []

    said = [cli("dead-letters", "list", *flags)]
    said += [cli("dead-letters", "show", str(number), *flags) for number in range(1, len(HOSTILE) + 1)]

    assert [each.code for each in said] == [0] * (len(HOSTILE) + 1)
    assert all(harmless(each) for each in said)
    if form == "table":
        assert squeezed(MARKUP) in squeezed(said[3].out)


@pytest.mark.parametrize("form", ["table", pytest.param("json")])
def test_hostile_words_of_colleagues_are_shown_harmlessly(cli: Run, scene: Scene, form: str) -> None:
    """What somebody typed or pasted (a note, a reason, a name) is text on everybody else's screen too."""
    pasted = f"{ESCAPES} {MARKUP}".replace("\x00", "")
    scene.keep(letter(b"nonsense"))
    flags = ["--json"] if form == "json" else []

    done = [
        cli("dead-letters", "note", "1", pasted, "--by", pasted),
        cli("dead-letters", "discard", "1", "--note", pasted, "--by", pasted, "--yes"),
        cli("intake", "pause", "--reason", pasted, "--by", pasted, "--yes"),
    ]
    said = [cli("dead-letters", "show", "1", *flags), cli("intake", "status", *flags)]

    assert [each.code for each in done] == [0, 0, 0]
    assert [each.code for each in said] == [0, 1]
    assert all(harmless(each) for each in (*done, *said))


TAKES_TEXT = (
    "dead-letters note 1 {}",
    "dead-letters list --job {}",
    "dead-letters discard 1 --yes --note {}",
    "intake pause --yes --reason {}",
    "intake resume --by {}",
    "retries show {}",
    "retries list --after {}",
    "why {}",
)


@pytest.mark.parametrize(
    "odd",
    [
        TEN_KB,
        pytest.param("\udcff"),
        pytest.param("a\x00b"),
    ],
    ids=["10 kB", "no UTF-8", "NUL"],
)
def test_odd_arguments_are_text_or_one_clear_line(cli: Run, scene: Scene, odd: str) -> None:
    """Bytes that are no UTF-8, NUL and 10 kB on the command line end in a row or in one line that is ours."""
    scene.keep(letter(b"nonsense"))

    said = {c: cli(*[odd if word == "{}" else word for word in c.split()]) for c in TAKES_TEXT}

    assert {command for command, each in said.items() if each.code not in {0, 1, 2} or not harmless(each)} == set()
    assert {command for command, each in said.items() if "psycopg" in each.err} == set()
