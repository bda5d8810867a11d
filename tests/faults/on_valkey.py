"""Faults of Valkey: killed, emptied, full, silent, and answers that never arrive."""

from __future__ import annotations

import base64
import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import redis
from kombu import Connection
from redis.backoff import NoBackoff
from redis.retry import Retry

from kino_refunds.events.connection import redis_client
from tests.failover import pair
from tests.faults.harness import scenario
from tests.faults.on_events import Truth
from tests.faults.proxy import Proxy
from tests.faults.workload import TIMED_OUT
from tests.faults.world import World, require

if TYPE_CHECKING:
    from kino_refunds.events.queues import Queues

KINDS = ("completed", "failed", "failed user", "timeout", "rejected before")


@scenario("Valkey killed and restarted")
def valkey_killed(world: World) -> None:
    """Valkey killed under load and started again: what it confirmed is settled, once (P6)."""
    world.start_worker(KINO_INTAKE_BATCH="20")
    world.until_ready()
    messages = world.workload.some(300)
    world.open(messages)
    world.publish(messages[:200])
    world.until(lambda: world.settled() > 10, "the first settlements")
    world.servers.redis.kill()
    world.faults["Valkey killed"] += 1
    world.servers.redis.start()
    world.publish(messages[200:])
    world.settle_down()


@scenario("Valkey emptied", quick=True)
def flushed_between_batches(world: World) -> None:
    """FLUSHALL takes events away; the jobs are found overdue, asked about, and end as they did (P9)."""
    messages = world.workload.some(40, kinds=KINDS, overdue_s=60)
    world.open(messages)
    world.publish(messages)
    intake = world.intake(intake_batch=10)
    intake.run_once()
    world.redis.flushall()
    world.faults["FLUSHALL"] += 1
    _may_be_gone(world)
    world.consume(intake)
    require(world.settled() < len(messages), "events are gone")
    world.sweep_overdue(Truth(world))


@scenario("Valkey emptied")
def flushed_under_load(world: World) -> None:
    """FLUSHALL under load, with nobody to ask: what vanished is refunded as overdue, and nothing twice (P1, P9)."""
    worker = world.start_worker(KINO_INTAKE_BATCH="20")
    world.until_ready()
    fatal = world.chance.randrange(3, 8)
    for step in world.stream(200):
        if step == fatal:
            world.signal(worker, signal.SIGSTOP)
        elif step == fatal + 1:
            # What was published at this step is on the queues for certain.
            world.redis.flushall()
            world.faults["FLUSHALL"] += 1
            world.signal(worker, signal.SIGCONT)
    _may_be_gone(world)
    # Nobody knows of a job whose event is gone: the doubt is the customer's.
    for job_id, job in list(world.workload.jobs.items()):
        world.workload.jobs[job_id] = type(job)(
            job.job_id, job.account_id, job.credits, job.endings | {TIMED_OUT}, job.deadline_at
        )
    world.settle_down()
    require(0 < world.settled() <= 180, "some events are gone, and some were settled")
    world.workload.published_at.clear()  # two hours that go by would count as lateness
    world.sweep_overdue(None, later_s=7200)


@scenario("Valkey emptied")
def flushed_beside_a_simple_queue(world: World) -> None:
    """After FLUSHALL a living stock SimpleQueue delivers again as soon as the bindings are back (P6)."""
    world.start_worker()
    world.until_ready()
    messages = world.workload.some(20, kinds=("timeout",))
    world.open(messages)
    with Connection(world.servers.redis.url()) as connection, connection.SimpleQueue(messages[0].queue) as queue:
        for message in messages[:10]:
            queue.put(json.loads(_bare(message.raw)))
        world.until(lambda: world.settled() == 10, "what was sent before")
        world.redis.flushall()
        world.faults["FLUSHALL"] += 1
        world.until(lambda: world.redis.exists(f"_kombu.binding.{messages[0].queue}"), "the binding is back")
        for message in messages[10:]:
            queue.put(json.loads(_bare(message.raw)))
    world.settle_down()
    require(world.settled() == len(messages), "nothing that was sent afterwards is lost")


def _bare(raw: bytes) -> bytes:
    document = json.loads(raw)
    return base64.b64decode(document["body"]) if "body" in document else raw


@scenario("Redis failover")
def failover_with_a_living_old_primary(world: World) -> None:
    """The old primary lives on as a replica, and connections stay open: workers go on at the new one (P6)."""
    with tempfile.TemporaryDirectory(prefix="kino-failover-") as folder, pair(Path(folder)) as servers:
        before, world.redis = world.redis, redis_client(servers.url())
        try:
            world.start_worker(KINO_REDIS_URL=servers.url(), KINO_INTAKE_BATCH="20")
            world.until_ready()
            messages = world.workload.some(200)
            world.open(messages)
            world.publish(messages[:100])
            world.until(lambda: world.settled() > 10, "the first settlements")
            servers.fail_over()
            world.faults["Redis failover"] += 1
            world.publish(messages[100:])
            world.settle_down()
        finally:
            world.redis.close()
            world.redis = before


def _may_be_gone(world: World) -> None:
    work = world.workload
    work.messages[:] = [type(m)(m.raw, m.queue, m.source, m.event_id, m.job_id, "lost to redis") for m in work.messages]


@scenario("Valkey full")
def full_under_a_running_worker(world: World) -> None:
    """A Valkey that fills up under a worker does not end it: it drains, and goes on when there is room (P6)."""
    messages = world.workload.some(120)
    world.open(messages)
    world.start_worker()
    world.until_ready()
    world.sql("UPDATE kino.intake_state SET paused = true, actor = 'somebody'")
    world.publish(messages[:60])
    world.redis.config_set("maxmemory", 1)
    world.faults["Valkey full"] += 1
    world.sql("UPDATE kino.intake_state SET paused = false")
    world.until(lambda: world.settled() == 60 and world.waiting() == 0, "a drained Valkey")
    (since,) = world.sql("SELECT seen_at FROM kino.intake_worker")[0]
    # Two heartbeats: whatever Celery does with its own keys now and then, it has done by then.
    world.until(
        lambda: world.sql("SELECT 1 FROM kino.intake_worker WHERE seen_at > %s + interval '15 s'", since),
        "a live worker",
    )
    world.redis.config_set("maxmemory", 0)
    world.publish(messages[60:])
    world.settle_down()


@scenario("Valkey full")
def full_while_events_wait(world: World) -> None:
    """A worker that starts while Valkey is full drains it; publishers publish again, and all is settled (P6)."""
    messages = world.workload.some(120)
    world.open(messages)
    world.publish(messages[:60])
    world.redis.config_set("maxmemory", 1)
    world.faults["Valkey full"] += 1
    refused = False
    try:
        world.redis.lpush(messages[60].queue, messages[60].raw)
    except redis.ResponseError:
        refused = True
    require(refused, "Valkey is full")
    world.start_worker()
    world.until(lambda: world.waiting() == 0, "a drained Valkey")
    world.redis.config_set("maxmemory", 0)
    world.publish(messages[60:])
    world.settle_down()


@scenario("Valkey full", quick=True)
def full_before_the_claim(world: World) -> None:
    """A full Valkey lets a batch be claimed, dropped, released and recovered (P6)."""
    messages = world.workload.some(20)
    world.open(messages)
    world.publish(messages)
    world.redis.config_set("maxmemory", 1)
    world.faults["Valkey full"] += 1
    try:
        dying = world.queues(alive_ttl_s=0.03)
        dying.claim(10)
        world.until(lambda: world.queues().recover().messages, "the death of a worker")
        releasing = world.queues()
        releasing.release(releasing.claim().token)
        world.consume(world.intake(intake_batch=4))
    finally:
        world.redis.config_set("maxmemory", 0)
    world.settle_down()


@scenario("half-open connection")
def half_open_to_valkey(world: World) -> None:
    """A connection to Valkey that says nothing more is given up, and a new one goes on (P6)."""
    messages = world.workload.some(60)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy:
        with world.locked_lots():
            world.publish(messages[:30])
            world.start_worker(KINO_REDIS_URL=world.port_in(world.servers.redis_url(), proxy.port))
            world.until_settling()
            proxy.freeze()
            world.faults["half-open connection"] += 1
        world.until(lambda: world.settled() == 30, "the commit")
        world.publish(messages[30:])
        # Until somebody gave up waiting for an answer, and said so.
        world.until(lambda: "imeout" in world.last_words(), "a connection that was given up")
        proxy.thaw()
        world.settle_down()


def _impatient(proxy: Proxy) -> redis.Redis:
    """Make a client that waits shortly, and repeats a command as the worker's does."""
    return redis.Redis(port=proxy.port, socket_timeout=0.3, retry=Retry(NoBackoff(), retries=1))


def _sha(queues: Queues, script: str) -> bytes:
    sha: str = getattr(queues, f"_{script}").sha
    return sha.encode()


@scenario("answer lost", quick=True)
def answer_to_a_claim_lost(world: World) -> None:
    """A claim whose answer is lost is claimed again as it was: nothing is skipped, nothing comes twice (P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy, _impatient(proxy) as client:
        queues = world.queues(client=client)
        queues.claim()
        lost = proxy.lose_answer(request=_sha(queues, "claim"))
        world.publish(messages)
        world.drain(world.intake(queues=queues, intake_batch=7))
        require(lost.is_set(), "the answer is lost")
        world.faults["answer lost"] += 1


@scenario("answer lost", quick=True)
def answer_to_a_drop_lost(world: World) -> None:
    """A drop whose answer is lost, and is therefore repeated, drops one batch and not the next (P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy, _impatient(proxy) as client:
        queues = world.queues(client=client)
        queues.drop("0")
        world.publish(messages)
        lost = proxy.lose_answer(request=_sha(queues, "drop"))
        world.drain(world.intake(queues=queues, intake_batch=7))
        require(lost.is_set(), "the answer is lost")
        world.faults["answer lost"] += 1


@scenario("answer lost", quick=True)
def late_drop(world: World) -> None:
    """A drop that the network kept back, and that arrives when the next batch is in flight, takes nothing (P6)."""
    messages = world.workload.some(30)
    world.open(messages)
    with Proxy(world.servers.redis.port) as proxy, _impatient(proxy) as client:
        queues = world.queues(client=client)
        queues.drop("0")
        world.publish(messages[:10])
        late = proxy.hold(_sha(queues, "drop"))
        intake = world.intake(queues=queues)
        intake.run_once()
        require(late.sprung.is_set(), "the first drop is kept back")
        world.publish(messages[10:])
        claim = queues.claim()
        require(claim.messages, "the next batch is in flight")
        proxy.let_go(late)
        world.faults["drop arrived late"] += 1
        world.drain(intake)
