"""Faults of clocks: hosts that are fast or slow, and a Postgres whose clock jumps."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import time_machine

from tests.clock import run_ahead
from tests.faults.harness import scenario
from tests.faults.workload import TIMED_OUT
from tests.faults.world import World, require

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def host_ahead(world: World, hours: float) -> Iterator[None]:
    """Let this process, its sweeps and its intake live on another wall clock than the servers."""
    world.faults["host clock off"] += 1
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=hours), tick=True):
        yield


@scenario("clocks", quick=True)
def host_that_is_fast(world: World) -> None:
    """On a host three hours ahead no running job is overdue and nothing is presumed; events settle as ever (P9)."""
    running = world.workload.some(20)
    lost = [world.workload.job(TIMED_OUT, overdue_s=60) for _ in range(5)]
    world.open(running, lost)
    world.publish(running)
    with host_ahead(world, 3):
        swept = world.sweep_overdue(None)
        require(swept.overdue == len(lost), "what is overdue is so by Postgres' clock")
        require(swept.withheld == {"clock": len(lost)}, "and is not presumed while the clocks differ")
        require(world.settled() == 0, "nobody is refunded on a wrong clock")
        world.drain(world.intake())
    late = [world.workload.job(TIMED_OUT, overdue_s=60) for _ in range(5)]
    world.open(jobs=late)
    world.sweep_overdue(None)
    require(world.settled() == len(running) + len(lost) + len(late), "a fast sweep has hidden nothing")


@scenario("clocks", quick=True)
def host_that_is_slow(world: World) -> None:
    """On a host three hours behind nothing is presumed either; what waits for a retry is not put off for it (P9)."""
    messages = world.workload.some(20)
    lost = [world.workload.job(TIMED_OUT, overdue_s=60) for _ in range(5)]
    world.open(jobs=lost)
    world.publish(messages)
    with host_ahead(world, -3):
        swept = world.sweep_overdue(None)
        require(swept.withheld == {"clock": len(lost)}, "nothing is presumed while the clocks differ")
        intake = world.intake()
        intake.run_once()
        world.open(messages)
        world.drain(intake)
    world.sweep_overdue(None)


@scenario("clocks", quick=True)
def clock_that_jumps_and_is_set_back(world: World) -> None:
    """Postgres' clock jumps two hours ahead and is set back: nothing is presumed until it has come that far (P9)."""
    messages = world.workload.some(20)
    world.open(messages)
    world.publish(messages)
    world.workload.published_at.clear()  # the jump would count as lateness
    run_ahead(world.engine, timedelta(hours=2))
    world.faults["clock jump"] += 1
    world.drain(world.intake())
    lost = [world.workload.job(TIMED_OUT, overdue_s=60) for _ in range(5)]
    world.open(jobs=lost)
    run_ahead(world.engine, timedelta(0))
    world.faults["clock set back"] += 1
    swept = world.sweep_overdue(None)
    require(swept.withheld == {"clock": len(lost)}, "a clock behind its own rows presumes nothing")
    world.sweep_overdue(None, later_s=7_300)
    require(world.settled() == len(messages) + len(lost), "once the clock has come that far they are refunded")
