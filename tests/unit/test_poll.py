"""The pace of a worker's loop, by a clock that the test moves."""

from __future__ import annotations

import pytest

from kino_refunds.intake import poll as module
from kino_refunds.intake.poll import EAGER_FOR_S, EAGER_S, Poll

IDLE_S = 0.1


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.usefixtures("clock")
def test_a_worker_that_never_had_an_event_is_slow() -> None:
    """An idle worker looks ten times a second."""
    assert Poll(IDLE_S).wait_s(0) == IDLE_S


@pytest.mark.parametrize(("later_s", "waits_s"), [(0.0, EAGER_S), (EAGER_FOR_S - 0.01, EAGER_S), (EAGER_FOR_S, IDLE_S)])
def test_a_worker_is_eager_for_a_second_after_an_event(clock: Clock, later_s: float, waits_s: float) -> None:
    """After a batch the next look follows at once, then every few milliseconds, and after a second slowly again."""
    poll = Poll(IDLE_S)

    at_once = poll.wait_s(7)
    clock.now += later_s

    assert (at_once, poll.wait_s(0)) == (0.0, waits_s)


@pytest.mark.usefixtures("clock")
def test_a_shorter_pause_is_kept_while_events_come() -> None:
    """Whoever has set a pause below a few milliseconds keeps it."""
    poll = Poll(0.001)
    poll.wait_s(1)

    assert poll.wait_s(0) == 0.001


@pytest.mark.parametrize(("later_s", "old"), [(0.0, False), (IDLE_S - 0.01, False), (IDLE_S, True)])
def test_the_gate_is_asked_for_once_in_the_idle_pause(clock: Clock, later_s: float, *, old: bool) -> None:
    """However many batches come, Postgres is asked for the gate at most as often as an idle worker asks."""
    poll = Poll(IDLE_S)
    at_first = poll.gate_is_old
    poll.gate_was_read()
    clock.now += later_s

    assert (at_first, poll.gate_is_old) == (True, old)


@pytest.mark.usefixtures("clock")
def test_a_gate_that_was_changed_here_is_read_again() -> None:
    """A worker that has closed or opened the gate itself does not go by what it read before."""
    poll = Poll(IDLE_S)
    poll.gate_was_read()

    poll.forget_gate()

    assert poll.gate_is_old
