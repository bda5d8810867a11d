"""`report month` and `report liability`: tables for people, CSV and JSON for programs, refusals in one line."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.clock import clock_at
from tests.command_line import Run, error
from tests.conftest import Database
from tests.integration.reconciliation.bookkeeping import day, november, october, the_liability, the_month
from tests.scenario import Scene

LATER = datetime(2041, 1, 2, tzinfo=UTC)


@pytest.fixture
def read(run: Run, scene: Scene, database: Database) -> Run:
    """Run a command on 2 January 2041, as a login that may only read; two months of 2040 are in the books."""
    october(scene)
    november(scene, database)

    def ask(*arguments: str, **environment: Any) -> Any:
        with clock_at(scene.worker, LATER):
            return run(*arguments, KINO_DATABASE_URL=database.url("kino_read"), **environment)

    return ask


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_month_for_programs(read: Run, database: Database) -> None:
    """JSON is the report as it is; CSV has the same figures, a line a class and one for all."""
    as_json, as_csv = read("report", "month", "2040-11", "--json"), read("report", "month", "2040-11", "--csv")

    report = the_month(database, 11, now=LATER).as_dict()
    assert (as_json.code, as_json.err, as_json.json) == (0, "", report)
    lines = {**report["classes"], "total": report["total"]}
    assert rows(as_csv.out) == [
        {"class": name, **{figure: str(n) for figure, n in line.items()}} for name, line in lines.items()
    ]
    assert "\r" not in as_csv.out


def test_a_month_for_people(read: Run) -> None:
    """Figures stand in rows and classes in columns; a class that never had credits is left out."""
    said = read("report", "month", "2040-11")

    lines = [line.split() for line in said.out.splitlines()]
    assert said.code == 0
    assert lines[:3] == [
        ["credits", "from", "2040-11-01T00:00:00Z", "to", "before", "2040-12-01T00:00:00Z"],
        ["promotional", "purchased", "lifetime", "total"],
        ["opening", "40", "100", "30", "170"],
    ]
    assert ["closing", "wallet", "0", "100", "30", "130"] in lines
    assert " ".join(lines[-1]) == (
        "checked: opening + granted - captured + reversed - expired - voided + unvoided = closing"
    )
    assert max(map(len, said.out.splitlines())) <= 90


def test_a_ledger_without_credits_has_a_month_too(run: Run, scene: Scene) -> None:
    """Zeros are an answer: nothing was granted yet."""
    with clock_at(scene.worker, LATER):
        said = run("report", "month", "2040-11")
        owed = run("report", "liability")
        as_csv = run("report", "liability", "--csv")

    assert (said.code, owed.code, as_csv.code) == (0, 0, 0)
    assert ["closing", "0"] in [line.split() for line in said.out.splitlines()]
    assert ["spendable", "0"] in [line.split() for line in owed.out.splitlines()]
    assert sum(int(row["credits"]) for row in rows(as_csv.out)) == 0


def test_what_can_be_spent_for_programs(read: Run, database: Database) -> None:
    """JSON is the report as it is; CSV has a line for each class and month, and what is frozen, expired and held."""
    at = "2040-10-31T00:00:00Z"
    as_json, as_csv = (read("report", "liability", "--at", at, form) for form in ("--json", "--csv"))

    report = the_liability(database, day("10-31"), now=LATER).as_dict()
    assert (as_json.code, as_json.err, as_json.json) == (0, "", report)
    told = rows(as_csv.out)
    assert {row["at"] for row in told} == {"2040-10-31T00:00:00+00:00"}
    assert [tuple(row.values())[1:] for row in told][:3] == [
        ("promotional", "spendable", "2040-11", "8"),
        ("purchased", "spendable", "2040-12", "87"),
        ("lifetime", "spendable", "never", "30"),
    ]
    assert {(row["class"], row["what"]): int(row["credits"]) for row in told if row["what"] != "spendable"} == {
        (name, what): line[what] for name, line in report["classes"].items() for what in ("frozen", "expired", "held")
    }


def test_what_can_be_spent_for_people(read: Run) -> None:
    """Without an instant it is the latest that can be given, and the answer says which."""
    said = read("report", "liability")

    lines = [line.split() for line in said.out.splitlines()]
    assert said.code == 0
    assert lines[0] == ["credits", "at", "2041-01-02T00:00:00Z"]
    assert ["lifetime", "never", "30"] in lines
    assert lines[1:3] == [["purchased", "lifetime", "total"], ["spendable", "100", "30", "130"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("month", "2040-11", "--csv", "--json"), "--csv and --json are two forms of one answer: choose one"),
        (("liability", "--csv", "--json"), "--csv and --json are two forms of one answer: choose one"),
        (("month", "November"), "'November' is not a month; for example 2026-01"),
        (("month", "2040-11-01"), "'2040-11-01' is not a month; for example 2026-01"),
        (("month", "2040-13"), "2040-13 is not a month: the years are 1 to 9998, the months 1 to 12"),
        (("liability", "--at", "2040-10-31"), "'2040-10-31' is a day, not an instant"),
        (("liability", "--at", "2041-01-03T00:00:00Z"), "lies in the future"),
    ],
)
def test_a_wrong_question_is_a_usage_error(read: Run, arguments: tuple[str, ...], text: str) -> None:
    """One line says what was wrong and what to type."""
    said = read("report", *arguments)

    assert (said.code, said.out) == (2, "")
    assert text in " ".join(said.err.split())


def test_a_month_that_has_not_ended_names_what_is_final(read: Run) -> None:
    """The month of today has no report yet."""
    said = read("report", "month", "2041-01")

    assert said == error(
        "month 2041-01 ends at 2041-02-01 00:00:00Z, and what was after 2041-01-02 00:00:00.000000Z may still change;"
        " ask for an earlier one, or again when it has ended"
    )


def test_a_month_that_does_not_tie_is_a_finding(read: Run, scene: Scene) -> None:
    """No figure is printed, in no form, and the exit code is 1."""
    scene.as_superuser(
        "ALTER TABLE kino.transfer DROP CONSTRAINT transfer_check",
        "SET session_replication_role = replica",
        "UPDATE kino.transfer SET kind = 'void' WHERE kind = 'hold' AND lot_id = 2",
    )

    for form in ((), ("--csv",), ("--json",)):
        said = read("report", "month", "2040-10", *form)
        assert (said.code, said.out) == (1, "")
        assert said.err.startswith("error: the figures of class purchased do not tie: book held opened with ")
