"""Hostile text in the database and in arguments is shown as text."""

from __future__ import annotations

import pytest

from tests.command_line import HARMLESS, HOSTILE, Run
from tests.scenario import Scene


def test_hostile_text_in_the_database_is_shown_harmlessly(run: Run, scene: Scene) -> None:
    """Whatever got into a row neither acts on the terminal nor is read as markup, in tables and in JSON."""
    scene.grant("acme")
    scene.open("job-1", "acme")
    literal = "'" + HOSTILE + "'"
    replica = "SET session_replication_role = replica"
    scene.as_superuser(
        replica,
        f"UPDATE kino.credit_lot SET reference = {literal}, account_id = {literal}",
        f"UPDATE kino.account SET account_id = {literal}",
        f"UPDATE kino.charge SET job_id = {literal}, account_id = {literal}",
        f"UPDATE kino.transfer SET account_id = {literal}, reason = {literal}, actor = {literal}",
        "INSERT INTO kino.break (kind, job_id, credits, detail)"
        f" VALUES ('failed_after_capture', {literal}, 1, {literal})",
    )

    shown = [
        run(*arguments, *form)
        for arguments in (["why", HOSTILE], ["balance", HOSTILE], ["statement", HOSTILE])
        for form in ([], ["--json"])
    ]

    assert [(result.code, result.err) for result in shown] == [(0, "")] * 6
    assert [result.out.replace("\n", "").isprintable() for result in shown] == [True] * 6
    assert [HARMLESS in result.out for result in shown] == [True] * 6


@pytest.mark.parametrize("arguments", [["why"], ["balance"], ["statement"]])
def test_hostile_argument_is_shown_harmlessly(run: Run, arguments: list[str]) -> None:
    """An id that is echoed in an error keeps to its line and its colour."""
    result = run(*arguments, HOSTILE)

    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err[:-1].isprintable()
    assert HARMLESS in result.err
