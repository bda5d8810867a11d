"""Two sessions at once: stop one inside its transaction, hold what the other needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from tests.scenario import Scene, until


@dataclass
class Gate:
    """Stops the first session that comes by, inside its transaction, until it is opened."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def stop_the_first(self) -> None:
        if self._taken.acquire(blocking=False):
            self.reached.set()
            assert self.opened.wait(60), "nobody opened the gate"


@contextmanager
def held(scene: Scene, statement: str, **parameters: Any) -> Iterator[sa.Connection]:
    """Hold what `statement` locks, in a session of somebody else, until the block ends; then roll back."""
    with scene.superuser.connect() as connection:
        connection.execute(sa.text(statement), parameters)
        yield connection
        connection.rollback()


LOCK_LOT = "SELECT FROM kino.credit_lot WHERE lot_id = :lot_id FOR NO KEY UPDATE"
SETTLE_BY_HAND = (
    "INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)"
    " VALUES (:charge_id, 'refunded', 'timeout', '2.timeout', '2025-12-14', 'by hand', 'by hand', now())"
)


def race(scene: Scene, threads: ThreadPoolExecutor, gate: Gate, *sides: Callable[[], Any]) -> list[Any]:
    """Start the first side, stop it at the gate, let the others run into it, then open; returns the results."""
    futures: list[Future[Any]] = [threads.submit(sides[0])]
    assert gate.reached.wait(30), "the first session did not reach its gate"
    futures += [threads.submit(side) for side in sides[1:]]
    until(lambda: scene.waiting_for_locks() >= len(sides) - 1 or any(f.done() for f in futures))
    gate.opened.set()
    return [future.result(60) for future in futures]
