"""Faults of workers: killed, stopped, replaced, poisoned, badly built."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kino_refunds.desk.replays import replay_letter
from tests.faults.harness import Edit, copy_project, scenario
from tests.faults.proxy import Proxy
from tests.faults.workload import OPEN, TIMED_OUT
from tests.faults.world import World, require


@scenario("worker killed", quick=True)
def killed_between_claim_and_commit(world: World) -> None:
    """A worker killed inside its transaction loses nothing: another one settles its batch (P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with world.locked_lots():
        world.publish(messages)
        worker = world.start_worker()
        world.until_settling()
        world.kill(worker)
        require(world.in_flight() == len(messages), "the batch is in flight")
    require(world.settled() == 0, "nothing is committed")
    world.start_worker()
    world.settle_down()


@scenario("worker killed")
def killed_between_commit_and_drop(world: World) -> None:
    """A worker killed after its commit leaves a batch that settles again as duplicates (P2, P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy:
        with world.locked_lots():
            world.publish(messages)
            worker = world.start_worker(KINO_REDIS_URL=world.port_in(world.servers.redis_url(), proxy.port))
            world.until_settling()
            proxy.freeze()
        world.until(lambda: world.settled() == len(messages), "the commit")
        world.kill(worker)
        proxy.cut()
        require(world.in_flight() == len(messages), "the drop never reached Redis")
    world.start_worker()
    world.settle_down()


@scenario("worker killed")
def killed_while_valkey_stood_still(world: World) -> None:
    """A worker killed after its commit, while Valkey hangs, pays nothing twice, however late its drop is (P2)."""
    messages = world.workload.some(30)
    world.open(messages)
    with contextlib.ExitStack() as stack:
        with world.locked_lots():
            world.publish(messages)
            worker = world.start_worker()
            world.until_settling()
            stack.enter_context(world.stopped_valkey())
        world.until(lambda: world.settled() == len(messages), "the commit")
        world.kill(worker)
    world.start_worker()
    world.settle_down()


@scenario("worker stopped past its alive TTL")
def zombie_beside_its_successors(world: World) -> None:
    """A worker that stood still past its alive TTL comes back beside two others, and nothing is paid twice (P1)."""
    messages = world.workload.some(30)
    world.open(messages)
    with world.locked_lots():
        world.publish(messages)
        zombie = world.start_worker()
        world.until_settling()
        world.signal(zombie, signal.SIGSTOP)
        world.faults["worker stopped"] += 1
    world.start_worker()
    world.settle_down()
    restarted = world.start_worker()
    for step in world.stream(60):
        if step == 1:
            world.signal(zombie, signal.SIGCONT)
    world.settle_down()
    require(world.stop(zombie) == 0, "the zombie ends in order")
    require(world.stop(restarted) == 0, "the restarted worker ends in order")


@scenario("worker stopped past its alive TTL")
def zombie_after_its_commit(world: World) -> None:
    """A worker that stood still between commit and drop comes back late, and its drop takes nothing away (P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy:
        with world.locked_lots():
            world.publish(messages)
            zombie = world.start_worker(KINO_REDIS_URL=world.port_in(world.servers.redis_url(), proxy.port))
            world.until_settling()
            proxy.freeze()
        world.until(lambda: world.settled() == len(messages), "the commit")
        world.signal(zombie, signal.SIGSTOP)
        world.faults["worker stopped"] += 1
        world.start_worker()
        world.settle_down()
        for step in world.stream(60):
            if step == 1:
                world.signal(zombie, signal.SIGCONT)
                proxy.thaw()
        world.settle_down()
        world.stop(zombie)


@scenario("worker killed")
def one_of_two_workers_killed(world: World) -> None:
    """Two workers share the queues; one is killed under load, and the other one settles everything (P6)."""
    victim = world.start_worker(KINO_INTAKE_BATCH="10")
    world.start_worker(KINO_INTAKE_BATCH="10")
    world.until_ready(2)
    fatal = world.chance.randrange(5, 15)
    killed = False
    for step in world.stream(400):
        if step >= fatal and not killed and world.caught_with_a_batch(victim):
            world.kill(victim)
            killed = True
    require(killed, "the victim was caught with a batch in flight")
    world.settle_down()


@scenario("worker told to stop")
def stopped_under_load(world: World) -> None:
    """SIGTERM in the middle of the work: the batch is ended or released, and the next worker goes on at once."""
    first = world.start_worker(KINO_INTAKE_BATCH="10")
    world.until_ready()
    fatal = world.chance.randrange(3, 8)
    for step in world.stream(240):
        if step == fatal:
            require(world.stop(first) == 0, "it ends in order")
            require(world.in_flight() == 0, "its batch was ended or released")
            world.start_worker(KINO_INTAKE_BATCH="50")
    world.settle_down()


@scenario("worker killed", quick=True)
def poisonous_message(world: World) -> None:
    """Only dying three times, each time alone, makes a message a dead letter; its neighbours settle (P8)."""
    work = world.workload
    neighbours = work.some(8)
    poison = work.event(work.job(OPEN), "failed", fate="dead")
    # Once in a batch and twice alone: that is two.
    weak = work.event(work.job(TIMED_OUT), "timeout", wire="bare")
    deaths = {poison.raw: 3, weak.raw: 2}
    # The one that is pushed first is the head of its queue: a count of batches would be kept under it.
    world.open([weak, poison, *neighbours])
    world.publish([weak, poison, *neighbours])
    _die_with_batch(world)
    while world.waiting():
        queues = world.queues(alive_ttl_s=0.03)
        (message,) = queues.claim().messages
        if deaths.get(message.raw, 0):
            deaths[message.raw] -= 1
            world.until(lambda: world.queues().recover().messages, "the death of a worker")
            world.faults["worker killed"] += 1
        else:
            world.intake(queues=queues).run_once()
    require(not any(deaths.values()), "every death was died")


def _die_with_batch(world: World) -> None:
    """Let a worker die with everything that waits in flight."""
    claim = world.queues(alive_ttl_s=0.03).claim()
    require(len(claim.messages) > 1, "a batch")
    world.until(lambda: world.queues().recover().messages, "the death of a worker")
    world.faults["worker killed"] += 1


@scenario("worker stopped past its alive TTL", quick=True)
def slow_worker_keeps_its_batch(world: World) -> None:
    """A worker that is slow and alive is not taken for dead, so its message is not taken for poison (P6, P8)."""
    messages = world.workload.some(4)
    world.open(messages)
    world.publish(messages)
    _die_with_batch(world)
    workers = [world.queues(alive_ttl_s=60), world.queues(alive_ttl_s=60)]
    workers[0].claim()
    # Whoever recovers puts it behind the others: for each of them to seem dead three times takes rounds.
    for turn in range(1, 5 * len(messages)):
        # What the chores of the other worker do, again and again.
        workers[turn % 2].recover()
        workers[turn % 2].claim()
    for _ in range(2 * len(messages)):
        for queues in workers:
            world.intake(queues=queues).run_once()
    world.settle_down()


class _NoPolicy:
    """What a bad build has in the place of its policy."""

    def at(self, *_: object, **__: object) -> None:
        raise RuntimeError("a bad build")


@scenario("bad deploy", quick=True)
def tripwire_and_probe(world: World) -> None:
    """Where nothing can be settled, intake closes after few dead letters, and a good build opens it (P8)."""
    world.workload.dead_letters_max["apply_error"] = 60
    messages = world.workload.some(150)
    world.open(messages)
    world.publish(messages)
    bad: Any = _NoPolicy()
    broken = world.intake(rules=dataclasses.replace(world.rules, policy=bad), probe_every_s=1000)
    for _ in range(20):
        broken.run_once()
    world.faults["bad build"] += 1
    require(world.sql("SELECT 1 FROM kino.intake_state WHERE paused"), "intake is closed")
    require(world.in_flight() == 0, "nobody sits on the events")
    world.drain(world.intake())
    _replay_letters(world)


def _replay_letters(world: World) -> None:
    for (letter,) in world.sql("SELECT dead_letter_id FROM kino.dead_letter WHERE status = 'open'"):
        replay_letter(world.engine, letter, world.rules, actor="faults")


BAD_BUILD = Edit(
    "kino_refunds/settlement/settle.py",
    "    asked = False\n",
    '    asked = False\n    raise RuntimeError("a bad build")\n',
)


@scenario("bad deploy")
def bad_deploy(world: World) -> None:
    """A build that cannot settle closes intake after few dead letters; the fixed build opens it by itself (P8)."""
    world.workload.dead_letters_max["apply_error"] = 60
    messages = world.workload.some(150)
    world.open(messages)
    with tempfile.TemporaryDirectory() as folder:
        build = copy_project(Path(folder), [BAD_BUILD])
        with patch.dict(os.environ, PYTHONPATH=str(build)):
            bad = world.start_worker()
        world.until_ready()
    world.publish(messages)
    world.until(lambda: world.sql("SELECT 1 FROM kino.intake_state WHERE paused"), "the tripwire")
    world.faults["bad build"] += 1
    require(world.stop(bad) == 0, "the bad build ends in order")
    require(world.waiting() > 0, "most events still wait")
    world.start_worker()
    world.settle_down()
    _replay_letters(world)


@scenario("bad deploy", quick=True)
def bad_event_among_good_ones(world: World) -> None:
    """One event that our own code fails on becomes a dead letter; its neighbours settle with that batch (P8)."""
    work = world.workload
    messages = work.some(20)
    # The charge's lines contradict it: nobody may move these credits.
    broken = work.event(work.job(OPEN, credits=5), "failed", fate="dead")
    world.open([*messages, broken])
    (charge,) = world.sql("SELECT charge_id FROM kino.charge WHERE job_id = %s", broken.job_id)[0]
    world.sql("ALTER TABLE kino.charge_line DISABLE TRIGGER ALL")
    world.sql("UPDATE kino.charge_line SET credits = credits + 1 WHERE charge_id = %s", charge)
    world.publish([*messages, broken])
    world.drain(world.intake())
    world.sql("UPDATE kino.charge_line SET credits = credits - 1 WHERE charge_id = %s", charge)
