"""The tripwire: a build that fails on too many events must not turn all queued events into dead letters (P7, P8).

When it trips, the gate closes for every worker. Then each worker tries one event from time to time (a probe). The first
event that a worker's build can decide opens the gate again. Events are counted, not messages: a message may hold
several.
"""

from __future__ import annotations

import time
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kino_refunds.intake.gate import Gate

PROBE_EVERY_S: Final = 30.0
"""Seconds between two probes: with a fixed build the gate opens within this time, without a person."""
WINDOW: Final = 1_000
ERRORS_MAX: Final = 50
"""If more than this many of the last thousand events fail in our own code, the build is bad and not the events."""


class Probe(Enum):
    """What a probe proves about the build."""

    FAILED = auto()
    """The build still fails: the gate stays closed until the next probe."""
    NOTHING = auto()
    """The event proves nothing (it is not readable, a duplicate, or put off): the next event is tried at once."""
    WORKS = auto()
    """The build decided an event: the gate opens."""


class Tripwire:
    """One worker's count of failures, and its place in the messages that it probes."""

    def __init__(self, *, probe_every_s: float = PROBE_EVERY_S) -> None:
        self._probe_every_s = probe_every_s
        self._next_probe = 0.0
        self._failures: deque[bool] = deque(maxlen=WINDOW)
        self._probed: dict[bytes, int] = {}
        """For a message that holds several events, by its digest: how many of them were probed."""

    # While the gate is open.

    def count(self, *, settled: int, failed: int) -> bool:
        """Count the events of a part; return whether the tripwire trips."""
        self._failures.extend([False] * settled + [True] * failed)
        return bool(failed) and sum(self._failures) > ERRORS_MAX

    @property
    def reason(self) -> str:
        """The reason why the gate closes, from the present count."""
        return f"{sum(self._failures)} of the last {len(self._failures)} events failed"

    def trip(self) -> None:
        """Start a new count, once the gate is closed; the first probe is due after the pause.

        Not before: if the gate could not be closed, a new count would make 50 more events dead letters.
        """
        self._failures.clear()
        self._next_probe = time.monotonic() + self._probe_every_s

    def forget_probes(self) -> None:
        """Forget which events of messages were probed, because the gate is open."""
        self._probed.clear()

    # While the tripwire holds it closed.

    def may_probe(self, gate: Gate) -> bool:
        """Return whether one event may be tried now; if so, the next may be tried only after the pause."""
        if not gate.probed or time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + self._probe_every_s
        return True

    def place(self, message: bytes) -> int:
        """Return the index of the event that the probe tries in a message: the first that was not tried.

        The message stays in Redis until all of it is decided, so a bad event at its head would keep the gate closed.
        """
        return self._probed.get(message, 0)

    def goes_on(self, message: bytes, events: int) -> bool:
        """Note that one more event of this message was tried; return whether any are left."""
        tried = self._probed.pop(message, 0) + 1
        if tried < events:
            self._probed[message] = tried
        return tried < events

    def conclude(self, probe: Probe) -> None:
        """Note what a probe proved: NOTHING makes the next probe due at once, WORKS starts a new count."""
        if probe is Probe.NOTHING:
            self._next_probe = 0.0
        elif probe is Probe.WORKS:
            self._failures.clear()
