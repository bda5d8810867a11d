"""The pace of a worker's loop: short waits while events arrive, long waits while none do."""

from __future__ import annotations

import time
from typing import Final

EAGER_S: Final = 0.005
"""Seconds between two claims while events arrive: on average an event is queued for half of it."""
EAGER_FOR_S: Final = 1.0
"""Seconds after the last event with short waits. With one event a second or more the waits stay short, and the worker
asks Redis some 200 times a second."""


class Poll:
    """How long to wait before the next claim; `idle_s` is the wait while no event arrives, and the most a gate may age.

    The gate is read once in `idle_s` at most, however many batches are settled meanwhile. Otherwise a worker with short
    waits would ask Postgres for it 200 times a second.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._eager_until = 0.0
        self._gate_until = 0.0

    def wait_s(self, messages: int) -> float:
        """Return the seconds to wait after a claim of so many messages."""
        now = time.monotonic()
        if messages:
            self._eager_until = now + EAGER_FOR_S
            return 0.0
        return min(EAGER_S, self._idle_s) if now < self._eager_until else self._idle_s

    @property
    def gate_is_old(self) -> bool:
        """Whether the gate must be read again."""
        return time.monotonic() >= self._gate_until

    def gate_was_read(self) -> None:
        """Note that the gate was read now."""
        self._gate_until = time.monotonic() + self._idle_s

    def forget_gate(self) -> None:
        """Have the gate read before the next batch: this worker changed it, or an error occurred."""
        self._gate_until = 0.0
