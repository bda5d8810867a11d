"""Tables: in a narrow terminal nothing is cut off or squeezed, and in a pipe a row is a line."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from kino_refunds.cli import output

AT = datetime(2026, 11, 2, 10, 0, tzinfo=UTC)
JOB = "job-b80c8fef-a677-5340-85fb-2c162d75df03"
EVENT = f"{JOB}-job-failed-event"
SOURCE = "urn:kino:pipeline:eu-west-1:gpu-pool-a"


def table(capsys: pytest.CaptureFixture[str], *items: dict[str, Any], title: str | None = None) -> list[str]:
    """The lines that are printed."""
    output.print_table(items, title=title)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.mark.usefixtures("narrow")
def test_table_that_fits_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers to the right, the rest to the left, nothing is a dash, truth a word, and no blanks at the end."""
    rows = [
        {"what": "a", "credits": 1234, "alive": True, "seen_at": AT, "note": None},
        {"what": "longer", "credits": -5, "alive": False, "seen_at": None, "note": "x"},
    ]

    assert table(capsys, *rows, title="[b]title[/b]") == [
        "[b]title[/b]",
        "what    credits  alive  seen at               note",
        "a         1,234  yes    2026-11-02 10:00:00Z  -",
        "longer       -5  no     -                     x",
    ]


@pytest.mark.usefixtures("narrow")
def test_number_that_names_something_is_shown_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """`show 1,234` would be refused, so an id has no thousands separators; amounts have."""
    lines = table(capsys, {"number": 1234, "lot_id": 5678, "pid": 4321, "seen": 9876})

    assert lines == ["number  lot id   pid   seen", "  1234    5678  4321  9,876"]


@pytest.mark.usefixtures("narrow")
def test_longest_texts_go_below_a_row_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Ids stay in one piece, each with its name, as many to a line as fit; what is empty is left out."""
    rows = [
        {"number": 1, "reason": "busy", "job_id": JOB, "event_id": EVENT, "source": SOURCE, "at": AT, "seen": 1},
        {"number": 2, "reason": "x", "job_id": None, "event_id": "e-2", "source": "s", "at": AT, "seen": 1},
    ]

    assert table(capsys, *rows) == [
        "number  reason  at                    seen",
        "     1  busy    2026-11-02 10:00:00Z     1",
        f"    job id {JOB}",
        f"    event id {EVENT}",
        f"    source {SOURCE}",
        "     2  x       2026-11-02 10:00:00Z     1",
        "    event id e-2  source s",
    ]


@pytest.mark.usefixtures("narrow")
def test_what_names_a_row_stays_in_it_while_something_else_can_go(capsys: pytest.CaptureFixture[str]) -> None:
    """The first column goes last, however wide; what fits again after it went comes back."""
    keeps = table(capsys, {"event_id": JOB, "note": "y" * 30, "at": AT})
    goes = table(capsys, {"event_id": EVENT, "outcome": "charge_not_found", "first": AT, "next": AT, "credits": 7})

    assert keeps == [
        f"{'event id':<40}  at",
        f"{JOB:<40}  2026-11-02 10:00:00Z",
        f"    note {'y' * 30}",
    ]
    assert goes == [
        "outcome           first                 next                  credits",
        "charge_not_found  2026-11-02 10:00:00Z  2026-11-02 10:00:00Z        7",
        f"    event id {EVENT}",
    ]


@pytest.mark.usefixtures("narrow")
def test_text_that_is_longer_than_a_line_is_folded_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence goes on below itself, within the terminal's width; a word without an end is folded, not cut."""
    lines = table(capsys, {"number": 1, "detail": "a few words " * 12}, {"number": 2, "detail": "x" * 100})

    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines).count("a few words") == 12
    assert "".join(line.strip() for line in lines if "xx" in line) == "x" * 100


@pytest.mark.usefixtures("pipe")
def test_row_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """`| grep` finds an id with the rest of its row, however long that is."""
    lines = table(
        capsys, {"number": 1, "event_id": EVENT, "detail": "x " * 500}, {"number": 2, "event_id": "e", "detail": ""}
    )

    assert len(lines) == 3
    assert lines[1].split()[:3] == ["1", EVENT, "x"]
    assert lines[2] == "     2  e"


@pytest.mark.usefixtures("pipe")
def test_facts_are_one_line_each_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A long message beside them adds no blanks to the others, and no smiley or markup is read into any."""
    output.print_facts([("message", "x " * 500 + ":warning: [red]"), ("break id", 1234), ("credits", 1234)])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"message   {'x ' * 500}:warning: [red]"
    assert lines[1:] == ["break id  1234", "credits   1,234"]
