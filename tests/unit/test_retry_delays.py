"""How long an event waits before its next try. No server, no clock."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from kino_refunds.settlement.pending import FIRST_DELAY, LONGEST_DELAY, retry_delay

CEILINGS_S = (5, 10, 20, 40, 80, 160, 320, 640, 900, 900)
"""The longest wait after so many attempts: doubled from 5 s, and never above 15 min."""


@pytest.mark.parametrize("attempts", [*range(len(CEILINGS_S)), 16, 17, 10_000, 2**31 - 1])
@pytest.mark.parametrize("drawn", [0.0, 0.25, 1.0])
def test_the_wait_is_drawn_below_a_ceiling_that_doubles(
    monkeypatch: pytest.MonkeyPatch, attempts: int, drawn: float
) -> None:
    """Events that failed together do not all come back together, and none waits for more than 15 minutes."""
    monkeypatch.setattr(random, "random", lambda: drawn)
    ceiling = CEILINGS_S[min(attempts, len(CEILINGS_S) - 1)]

    assert retry_delay(attempts) == timedelta(seconds=ceiling * drawn)


def test_the_ceilings_are_those_of_the_settings() -> None:
    """The first and the longest wait are what the constants say, whose reasons stand beside them."""
    assert [each.total_seconds() for each in (FIRST_DELAY, LONGEST_DELAY)] == [CEILINGS_S[0], CEILINGS_S[-1]]


def test_waits_are_spread_over_the_whole_range() -> None:
    """Full jitter: a thousand events that were parked at once use the whole of the first five seconds."""
    waits = [retry_delay(0) for _ in range(1_000)]

    assert timedelta(0) <= min(waits) < FIRST_DELAY / 10
    assert FIRST_DELAY * 9 / 10 < max(waits) < FIRST_DELAY
