"""Two clocks for what cannot be undone: which differences withhold it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kino_refunds.reconciliation.clocks import SKEW_MAX, Clocks
from tests.clock import TICK

NOW = datetime(2026, 11, 2, 10, 0, tzinfo=UTC)
AGREED = Clocks(postgres=NOW, host=NOW, redis=NOW, decides=NOW, newest_row=NOW)


@pytest.mark.parametrize(
    "clocks",
    [
        AGREED,
        replace(AGREED, newest_row=None),
        replace(AGREED, host=NOW + SKEW_MAX),
        replace(AGREED, redis=NOW - SKEW_MAX),
        replace(AGREED, newest_row=NOW + SKEW_MAX),
        replace(AGREED, newest_row=NOW - timedelta(days=400)),
    ],
)
def test_clocks_that_agree_decide(clocks: Clocks) -> None:
    """Up to 30 s apart is what NTP and a slow answer leave; an old ledger's newest row is no matter."""
    assert clocks.disagreement() is None


@pytest.mark.parametrize(
    ("clocks", "why"),
    [
        (replace(AGREED, host=NOW + SKEW_MAX + TICK), "the clock of this host is 30 s ahead of that of Postgres"),
        (
            replace(AGREED, host=NOW - timedelta(hours=3)),
            "the clock of Postgres is 10,800 s ahead of that of this host",
        ),
        (
            replace(AGREED, postgres=NOW + timedelta(hours=1), decides=NOW + timedelta(hours=1)),
            "the clock of Postgres is 3,600 s ahead of that of this host",
        ),
        (
            replace(AGREED, host=NOW - timedelta(seconds=20), redis=NOW + timedelta(seconds=20)),
            "the clock of Redis is 40 s ahead of that of this host",
        ),
        (
            replace(AGREED, newest_row=NOW + timedelta(hours=2)),
            "Postgres' clock is 7,200 s behind the ledger's newest row: it was set back",
        ),
        (replace(AGREED, redis=None), "Redis' clock cannot be read, so no second clock confirms Postgres'"),
    ],
)
def test_clocks_that_disagree_withhold(clocks: Clocks, why: str) -> None:
    """Whichever clock is off, and whichever way, nothing is presumed and nothing expires; the sentence says which."""
    assert clocks.disagreement() == why
