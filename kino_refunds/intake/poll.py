"""The pace of a worker's loop: eager while events come, slow while none do."""

from __future__ import annotations

import time
from typing import Final

EAGER_S: Final = 0.005
"""Between two looks at the queues while events come. An event waits half of it on average before it is claimed."""
EAGER_FOR_S: Final = 1.0
"""After the last event. With one event a second or more it stays eager, and asks Redis some 200 times a second."""


class Poll:
    """How long to wait before the next look; `idle_s` is the wait while no event comes, and the age a gate may have.

    The gate is read at most so often, however many batches are settled meanwhile: an eager worker would else ask
    Postgres for it 200 times a second.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._eager_until = 0.0
        self._gate_until = 0.0

    def wait_s(self, messages: int) -> float:
        """Return the seconds to wait after a look that found so many messages."""
        now = time.monotonic()
        if messages:
            self._eager_until = now + EAGER_FOR_S
            return 0.0
        return min(EAGER_S, self._idle_s) if now < self._eager_until else self._idle_s

    @property
    def gate_is_old(self) -> bool:
        """Whether the gate has to be read again."""
        return time.monotonic() >= self._gate_until

    def gate_was_read(self) -> None:
        """Note that the gate was read just now."""
        self._gate_until = time.monotonic() + self._idle_s

    def forget_gate(self) -> None:
        """Let the gate be read before the next batch: it was changed here, or something failed."""
        self._gate_until = 0.0
