"""The tripwire: a build that fails on too many events must not turn all that is queued into dead letters (P7, P8).

It trips, and the gate closes for every worker. Then one event is tried now and then (a probe): the first that this
build can decide opens the gate again. Events are counted, never messages: a message may hold several.
"""

from __future__ import annotations

import time
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kino_refunds.intake.gate import Gate

PROBE_EVERY_S: Final = 30.0
"""Seconds between two probes: a fixed build opens the gate within this time, without a person."""
WINDOW: Final = 1_000
ERRORS_MAX: Final = 50
"""More than this many of the last thousand events failing in our own code is a bad build, not bad events."""


class Probe(Enum):
    """What a probe proves."""

    FAILED = auto()
    """The build still fails: the gate stays closed until the next probe."""
    NOTHING = auto()
    """The event says nothing about the build (not readable, a duplicate, put off): the next is tried at once."""
    WORKS = auto()
    """The build decided an event: the gate opens."""


class Tripwire:
    """One worker's count of failures, and its place in the messages that it probes."""

    def __init__(self, *, probe_every_s: float = PROBE_EVERY_S) -> None:
        self._probe_every_s = probe_every_s
        self._next_probe = 0.0
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self._probed: dict[bytes, int] = {}
        """Of a message that holds several events: how many of them were probed."""

    # While the gate is open.

    def count(self, *, settled: int, failed: int) -> bool:
        """Count events; return whether the tripwire trips."""
        self._failures.extend([False] * settled + [True] * failed)
        return bool(failed) and sum(self._failures) > ERRORS_MAX

    def trip(self) -> str:
        """Begin to count anew; return the reason why the gate closes."""
        reason = f"{sum(self._failures)} of the last {len(self._failures)} events failed"
        self._failures.clear()
        self._next_probe = time.monotonic() + self._probe_every_s
        return reason

    def forget_probes(self) -> None:
        """Forget how far the messages were probed: the gate is open."""
        self._probed.clear()

    # While the tripwire holds it closed.

    def may_probe(self, gate: Gate) -> bool:
        """Say whether one event may be tried now; the next only after the pause."""
        if not gate.probed or time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + self._probe_every_s
        return True

    def place(self, message: bytes) -> int:
        """Return which event of a message the probe tries: the first that it has not tried.

        A bad event at its head would otherwise keep the gate closed: the message stays until all of it is decided.
        """
        return self._probed.get(message, 0)

    def goes_on(self, message: bytes, events: int) -> bool:
        """Note that one more event of this message was tried; return whether others are left."""
        tried = self._probed.pop(message, 0) + 1
        if tried < events:
            self._probed[message] = tried
        return tried < events

    def conclude(self, probe: Probe) -> None:
        """Take in what a probe proved."""
        if probe is Probe.NOTHING:
            self._next_probe = 0.0
        elif probe is Probe.WORKS:
            self._failures.clear()
