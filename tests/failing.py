"""Faults that a test plants: a method that raises, a build that is wrong, a database that refuses a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from kino_refunds.settlement import batch
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.deliveries import Delivery
from kino_refunds.settlement.rules import Rules
from kino_refunds.settlement.settle import settle
from tests.scenario import Scene


class Killed(BaseException):
    """As kill -9: nothing of ours catches it, and nothing is cleaned up."""


def fail_first(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *errors: Exception, after: bool = False
) -> list[Exception]:
    """Let a method raise these errors first, before or after its work; returns the errors still to come."""
    real = getattr(owner, name)
    left = list(errors)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise left.pop(0)

    monkeypatch.setattr(owner, name, failing)
    return left


def refuse(scene: Scene, table: str, condition: str, action: str) -> None:
    """Make the database do `action` (plpgsql) for each row of a table that fulfils `condition`."""
    scene.as_superuser(
        f"CREATE FUNCTION kino.planted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {action}; RETURN NEW; END $$",
        "GRANT EXECUTE ON FUNCTION kino.planted() TO PUBLIC",
        f"CREATE TRIGGER planted BEFORE INSERT ON kino.{table} FOR EACH ROW WHEN ({condition})"
        " EXECUTE FUNCTION kino.planted()",
    )


def mend(scene: Scene) -> None:
    scene.as_superuser("DROP FUNCTION kino.planted() CASCADE")


class BadBuild:
    """Lets every settle of a build raise, for events whose job matches, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def fails_for(self, jobs: str, *, build: str = "bad") -> None:
        """From now on `build` makes a mistake with the jobs that this expression matches."""

        def failing(connection: Any, deliveries: Sequence[Delivery], rules: Rules, **more: Any) -> list[Ruling]:
            if rules.build == build and any(re.match(jobs, each.event.job_id) for each in deliveries):
                raise ZeroDivisionError("a mistake of this build")
            return settle(connection, deliveries, rules, **more)

        self._monkeypatch.setattr(batch, "settle", failing)

    def mend(self) -> None:
        """From now on every build settles as it should."""
        self._monkeypatch.setattr(batch, "settle", settle)
