"""Intake as it runs: a real Celery worker process that is stopped, killed, cut off and started again."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import cast

import pytest
from kombu import Connection
from redis import Redis

from kino_refunds.dev.processes import CeleryProcess
from kino_refunds.events.connection import redis_client
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import SERVED, Queues, Recovery, depths, read_queued
from kino_refunds.events.schema import queue_of, to_json
from tests.conftest import Database
from tests.pipeline import EMPTY, REFUNDED, ledger, numbered, open_jobs, push
from tests.processes import (
    Start,
    count_settled,
    drained,
    endings,
    log_of,
    make_quick,
    make_slow,
    said,
    settings_of,
    settled,
    starter,
    wait_for,
)
from tests.scenario import Scene


def test_a_worker_settles_what_is_published_by_any_means(
    scene: Scene, redis: Redis, redis_url: str, start: Start
) -> None:
    """Through real processes, kombu messages and bare ones of all four queues each move their credits once."""
    jobs = numbered("job", 400)
    open_jobs(scene, *jobs)
    events = endings(jobs)
    with EventPublisher(redis_url) as publisher:
        publisher.publish_many(events[:100])
    worker = start()
    push(redis, *events[100:200])
    wait_for(drained(redis), worker)
    with EventPublisher(redis_url) as publisher:
        publisher.publish_many(events[200:300])
    push(redis, *events[300:])
    wait_for(drained(redis), worker)

    code = worker.stop()

    assert code == 0
    assert ledger(scene) == settled(jobs)


def test_a_stop_under_load_leaves_nothing_behind(scene: Scene, redis: Redis, start: Start) -> None:
    """After SIGTERM all is settled or queued again, no key names the worker, and the next one settles the rest."""
    jobs = numbered("job", 1_000)
    open_jobs(scene, *jobs)
    push(redis, *endings(jobs))
    make_slow(scene)
    first = start(KINO_INTAKE_BATCH="20")
    wait_for(lambda: count_settled(scene) > 0, first)

    code = first.stop()
    left = depths(redis)
    keys = [key for key in redis.scan_iter("kino:*") if not key.startswith(b"kino:celery:")]
    done = count_settled(scene)
    make_quick(scene)
    second = start()
    wait_for(drained(redis), second)

    assert code == 0
    assert (left["in-flight"], left["recovered"]) == (0, 0)
    assert done + sum(left.values()) == 1_000
    assert done < 1_000
    assert keys == []
    assert said(first, "intake stopped")
    assert ledger(scene) == settled(jobs)


def test_a_stop_while_redis_and_postgres_are_away_ends_the_worker(
    own: Database, processes: list[CeleryProcess], tmp_path: Path
) -> None:
    """A worker whose servers are gone can still be stopped in order."""
    start = starter(processes, settings_of(own, own.servers.redis_url()), tmp_path)
    worker = start()
    wait_for(lambda: said(worker, "intake started"), worker)
    own.servers.redis.kill()
    own.servers.postgres.kill()
    wait_for(lambda: said(worker, "batch kept"), worker)

    code = worker.stop()

    assert code == 0


def stop_in_the_middle(worker: CeleryProcess, client: Redis) -> None:
    """Freeze the worker at an instant at which it has a batch in flight."""

    def frozen_with_a_batch() -> bool:
        os.kill(worker.pid, signal.SIGSTOP)
        if depths(client)["in-flight"]:
            return True
        os.kill(worker.pid, signal.SIGCONT)
        return False

    wait_for(frozen_with_a_batch, worker)


@pytest.mark.faults
def test_a_killed_worker_loses_nothing_and_pays_nothing_twice(scene: Scene, redis: Redis, start: Start) -> None:
    """After SIGKILL every event is on a queue, in flight or decided; once recovered, all settle exactly once."""
    jobs = numbered("job", 600)
    open_jobs(scene, *jobs)
    push(redis, *endings(jobs))
    make_slow(scene)
    first = start(KINO_INTAKE_BATCH="50")
    wait_for(lambda: count_settled(scene) >= 50, first)
    stop_in_the_middle(first, redis)

    first.kill()
    found = {message.raw for message in read_queued(redis).messages}
    in_flight = depths(redis)["in-flight"]
    (dead,) = cast("set[bytes]", redis.smembers("kino:workers"))
    decided = set(scene.inbox())
    lost = [event.id for event in endings(jobs) if to_json(event) not in found and event.id not in decided]
    make_quick(scene)
    second = start()
    wait_for(lambda: depths(redis) == {**EMPTY, "in-flight": in_flight}, second)
    redis.delete(b"kino:alive:" + dead)  # as when its TTL is over
    recovered = Queues(redis, "test", alive_ttl_s=60).recover()
    wait_for(drained(redis), second)

    assert lost == []
    assert 0 < len(decided) < 600
    assert recovered == Recovery(workers=(dead.decode(),), messages=in_flight, skipped=())
    assert ledger(scene) == settled(jobs)
    assert Counter(scene.inbox().values()) == {"refunded": 450, "captured": 150}


@pytest.mark.faults
def test_a_flushed_redis_does_not_end_the_worker(scene: Scene, redis: Redis, redis_url: str, start: Start) -> None:
    """After FLUSHALL the worker settles what comes, and a kombu SimpleQueue that lived on is bound again and heard."""
    jobs = numbered("job", 8)
    open_jobs(scene, *jobs)
    events = endings(jobs)
    bindings = [f"_kombu.{kind}.{queue}" for kind in ("binding", "binding_permanent") for queue in SERVED]
    restored = "kombu bindings were missing and are restored; publish again what a SimpleQueue sent meanwhile"
    with Connection(redis_url) as stock:
        simple = {queue: stock.SimpleQueue(queue.value) for queue in SERVED}
        worker = start()
        push(redis, *events[:4])
        wait_for(lambda: count_settled(scene) == 4 and redis.exists(*bindings) == len(bindings), worker)

        redis.flushall()
        wait_for(lambda: redis.exists(*bindings) == len(bindings), worker)
        for event in events[4:]:
            simple[queue_of(event)].put(json.loads(to_json(event)))
        wait_for(lambda: count_settled(scene) == 8, worker)
        for queue in simple.values():
            queue.close()
    code = worker.stop()

    assert code == 0
    assert said(worker, restored)
    assert ledger(scene) == settled(jobs)


@pytest.mark.faults
def test_a_worker_survives_its_servers(own: Database, processes: list[CeleryProcess], tmp_path: Path) -> None:
    """Redis and Postgres are killed and come back, one after the other, and what was and is published settles."""
    jobs = numbered("survivor", 16)
    with Scene.of(own) as scene:
        open_jobs(scene, *jobs, account_id="acct of survivors")
    events = endings(jobs)
    start = starter(processes, settings_of(own, own.servers.redis_url()), tmp_path)
    worker = start(KINO_RETRY_EVERY_S="1")
    client = redis_client(own.servers.redis_url())
    push(client, *events[:4])
    wait_for(drained(client), worker)

    own.servers.redis.kill()
    wait_for(lambda: said(worker, "batch kept"), worker)
    own.servers.redis.start()
    push(client, *events[4:8])
    wait_for(drained(client), worker)
    kept = [line["event"] for line in log_of(worker)].count("batch kept")
    own.servers.postgres.kill()
    push(client, *events[8:12])
    wait_for(lambda: [line["event"] for line in log_of(worker)].count("batch kept") > kept, worker)
    own.servers.postgres.start()
    push(client, *events[12:])
    wait_for(drained(client), worker)
    code = worker.stop()

    assert code == 0
    with Scene.of(own) as scene:
        moved = ledger(scene)
    assert {job: moved[job] for job in jobs} == settled(jobs)
    client.close()


@pytest.mark.faults
def test_a_full_redis_ends_no_worker(own: Database, processes: list[CeleryProcess], tmp_path: Path) -> None:
    """A worker that meets a full Redis, at its start or with a sweep to fetch, lives on and drains the queues."""
    jobs = numbered("full", 40)
    with Scene.of(own) as scene:
        open_jobs(scene, *jobs, account_id="acct of the full")
    start = starter(processes, settings_of(own, own.servers.redis_url()), tmp_path)
    client = redis_client(own.servers.redis_url())
    push(client, *endings(jobs))
    beat = start("beat", KINO_RETRY_EVERY_S="1")
    wait_for(lambda: client.llen("kino:celery:sweeps") > 0, beat)
    client.config_set("maxmemory", 1)

    worker = start(KINO_INTAKE_BATCH="5")
    wait_for(drained(client), worker)
    client.config_set("maxmemory", 0)
    wait_for(lambda: client.llen("kino:celery:sweeps") == 0, worker)
    codes = worker.stop(), beat.stop()

    assert codes == (0, 0)
    with Scene.of(own) as scene:
        moved = ledger(scene)
    assert {job: moved[job] for job in jobs} == settled(jobs)
    client.close()


def test_an_event_before_its_charge_settles_once_the_charge_is_there(scene: Scene, redis: Redis, start: Start) -> None:
    """An event that overtakes its charge waits, and the sweep that beat starts settles it."""
    worker, beat = start(KINO_RETRY_EVERY_S="1"), start("beat", KINO_RETRY_EVERY_S="1")
    push(redis, *endings(["early"]))
    wait_for(lambda: "early failed platform" in scene.pending(), worker, beat)
    redis.flushall()  # sweeps need nothing that Redis could have lost

    open_jobs(scene, "early")
    wait_for(lambda: scene.pending() == {}, worker, beat)

    assert ledger(scene) == {"early": REFUNDED}
    assert scene.inbox() == {"early failed platform": "refunded"}
    assert (beat.stop(), worker.stop()) == (0, 0)
