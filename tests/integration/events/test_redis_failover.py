"""A failover of Redis in which the old primary lives on as a replica and connections stay open: all goes on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.dev.processes import start_beat, start_worker
from kino_refunds.errors import DependencyAway
from kino_refunds.events.broker import kombu_connection
from kino_refunds.events.connection import NotPrimary, redis_client
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import SERVED, BindReport, Queues, Recovery, depths, read_queued
from kino_refunds.outbox.relay import relay_refunds
from tests.conftest import Database
from tests.failover import Pair, pair
from tests.intake import make_intake, queues_of
from tests.pipeline import EMPTY, FAILED, REFUNDED, ledger, open_jobs, push
from tests.processes import wait_for
from tests.scenario import Scene, make_event, until


@pytest.fixture(scope="module")
def _servers() -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="kino-failover-") as folder, pair(Path(folder)) as both:
        yield both


@pytest.fixture
def redises(_servers: Pair) -> Pair:
    """Give the test an empty primary with its replica, and an address that leads to it."""
    _servers.mend()
    return _servers


@pytest.fixture
def client(redises: Pair) -> Iterator[Redis]:
    """Give the test a client of the address with a connection that is open."""
    with redis_client(redises.url()) as client:
        client.ping()
        yield client


# --- each client, over the switch

CALLS: dict[str, Callable[[Queues], object]] = {
    "claim": lambda queues: len(queues.claim().messages),
    "begin": lambda queues: queues.begin(queues.claim().token, None),
    "drop": lambda queues: queues.drop(queues.claim().token),
    "release": lambda queues: queues.release(queues.claim().token),
    "refresh": lambda queues: queues.refresh(),
    "bind": lambda queues: queues.bind(),
    "leave": lambda queues: queues.leave(),
    "recover": lambda queues: queues.recover(),
}
WORTH: dict[str, object] = {
    "claim": 1,
    "begin": None,  # a batch that is no recovered message
    "drop": True,
    "release": 1,
    "refresh": None,
    "bind": BindReport(tuple(sorted(SERVED)), ()),
    "leave": None,
    "recover": Recovery((), 0, ()),
}


def test_every_command_of_a_worker_is_tried() -> None:
    """Whatever is added to a worker's commands is tried here over a failover."""
    public = {name for name, value in vars(Queues).items() if callable(value) and not name.startswith("_")}

    assert public == set(CALLS) == set(WORTH)


@pytest.mark.parametrize("cut_off", [False, True], ids=["follows", "cut off"])
@pytest.mark.parametrize("call", CALLS)
def test_worker_s_command_goes_to_the_new_primary(redises: Pair, client: Redis, call: str, cut_off: bool) -> None:
    """No command of intake stays with a demoted primary, also where nothing is to be written."""
    redises.fail_over(cut_off=cut_off)
    with redises.client() as primary:
        primary.lpush(FAILED, "{}")

    found = CALLS[call](queues_of(client))

    assert found == WORTH[call]
    assert client.info("replication")["role"] == "master"


@pytest.mark.parametrize("read", [read_queued, depths], ids=["waiting", "depths"])
def test_reading_goes_to_the_new_primary(redises: Pair, client: Redis, read: Callable[[Redis], Any]) -> None:
    """A demoted primary that hears nothing would say that nothing waits: no verdict may rest on it (P9)."""
    redises.fail_over(cut_off=True)
    with redises.client() as primary:
        primary.lpush(FAILED, "{}")
        expected = read(primary)

    found = read(client)

    assert found == expected != read_of_nothing(read)


def read_of_nothing(read: Callable[[Redis], Any]) -> Any:
    return EMPTY if read is depths else ()


def test_intake_settles_what_the_new_primary_has(redises: Pair, client: Redis, scene: Scene) -> None:
    """An intake that had a batch in flight at the switch drops it at the new primary, and claims what comes there."""
    open_jobs(scene, "before", "after")
    intake = make_intake(scene, client)
    push(client, make_event("failed platform", "before"))
    queues_of(client).claim()

    redises.fail_over()
    sizes = [intake.run_once()]
    with redises.client() as primary:
        push(primary, make_event("failed platform", "after"))
        sizes.append(intake.run_once())
        left = depths(primary)

    assert sizes == [1, 1]
    assert left == EMPTY
    assert ledger(scene) == {"before": REFUNDED, "after": REFUNDED}


def test_relay_tells_the_new_primary(redises: Pair, client: Redis, scene: Scene, engine: sa.Engine) -> None:
    """The product hears of a refund at the new primary, and once."""
    relay_refunds(engine, client, "product.refunds")  # from here on
    open_jobs(scene, "job-1")
    intake = make_intake(scene, client)
    push(client, make_event("failed platform", "job-1"))
    intake.run_once()

    redises.fail_over(cut_off=True)
    until(lambda: relay_refunds(engine, client, "product.refunds") == 1)

    with redises.client() as primary:
        told = [json.loads(raw)["subject"] for raw in cast("list[bytes]", primary.lrange("product.refunds", 0, -1))]
    assert told == ["job-1"]


def test_publisher_raises_once_and_then_goes_to_the_new_primary(redises: Pair) -> None:
    """What is published at the switch is refused, as a publisher knows it; the same publisher then goes on."""
    event = make_event("failed platform", "job-1")
    with EventPublisher(redises.url()) as publisher:
        publisher.publish(make_event("failed platform", "job-0"))
        redises.fail_over()

        with pytest.raises(DependencyAway, match="takes no writes"):
            publisher.publish(event)
        publisher.publish(event)

    with redises.client() as primary:
        assert len(read_queued(primary).messages) == 2


def test_kombu_publishes_to_the_new_primary_by_its_own_retry(redises: Pair) -> None:
    """Beat's producer is kombu's: to it a demoted server is a lost connection, which it opens anew."""
    with kombu_connection(redises.url()) as connection:
        producer = connection.Producer()
        producer.publish({"n": 1}, routing_key="sweeps", retry=True)
        redises.fail_over()

        with pytest.raises(connection.connection_errors):
            producer.publish({"n": 2}, routing_key="sweeps", retry=False)
        producer.publish({"n": 2}, routing_key="sweeps", retry=True, retry_policy={"max_retries": 3})

    with redises.client() as primary:
        assert primary.llen("sweeps") == 2


def test_the_idle_connections_go_with_the_first(redises: Pair, client: Redis) -> None:
    """One READONLY is enough: what else is open to the demoted server is closed, and not met one by one."""
    pool = client.connection_pool
    several: list[Any] = [pool.get_connection() for _ in range(4)]
    for connection in several:
        pool.release(connection)
    redises.fail_over()

    client.set("x", "1")

    assert sum(connection.is_connected for connection in several) == 1


# --- each way in which a server says it

SAYS_NO: dict[str, Callable[[Any], object]] = {
    "a command": lambda ask: ask("LPUSH", "x", "1"),
    "a script": lambda ask: ask("EVAL", "return redis.call('DEL', 'x')", "0"),
    "a script on Redis 6": lambda ask: ask(
        "EVAL",
        'return redis.error_reply("ERR Error running script (call to f_1): @script:1: -READONLY You can\'t write")',
        "0",
    ),
    "a queued command": lambda ask: (ask("MULTI"), ask("LPUSH", "x", "1")),
    "a script in a transaction": lambda ask: (
        ask("MULTI"),
        ask("EVAL", "return redis.call('DEL', 'x')", "0"),
        ask("EXEC"),
    ),
}


@pytest.fixture
def ask(client: Redis) -> Iterator[Callable[..., object]]:
    """Ask on one connection, without redis-py's repetition."""
    connection: Any = client.connection_pool.get_connection()

    def ask(*command: str) -> object:
        connection.send_command(*command)
        return connection.read_response()

    yield ask
    client.connection_pool.release(connection)


@pytest.mark.parametrize("way", SAYS_NO)
def test_every_form_of_readonly_is_understood(redises: Pair, ask: Callable[..., object], way: str) -> None:
    """READONLY, alone or inside another error, is a connection that is over and not an error of the command."""
    redises.fail_over()

    with pytest.raises(NotPrimary):
        SAYS_NO[way](ask)

    with suppress(NotPrimary):  # the connection was closed, so this opens another
        ask("PING")
    assert ask("SET", "x", "1") == b"OK"


def test_demotion_between_a_command_and_its_exec_is_understood(redises: Pair, ask: Callable[..., object]) -> None:
    """A transaction that was queued at a primary and ends at a replica is told as EXECABORT."""
    ask("MULTI")
    ask("LPUSH", "x", "1")
    redises.fail_over()

    with pytest.raises(NotPrimary):
        ask("EXEC")


@pytest.mark.parametrize(
    ("option", "value", "command"),
    [("replica-serve-stale-data", "no", ("GET", "x")), ("min-replicas-to-write", "9", ("SET", "x", "1"))],
    ids=["MASTERDOWN", "NOREPLICAS"],
)
def test_server_that_is_cut_off_is_not_the_primary(
    redises: Pair, ask: Callable[..., object], option: str, value: str, command: tuple[str, ...]
) -> None:
    """A replica without its primary, and a primary without its replicas, are left as a demoted one is."""
    with redises.client() as old:
        old.config_set(option, value)
        if option == "replica-serve-stale-data":
            redises.fail_over(cut_off=True)

    with pytest.raises(NotPrimary):
        ask(*command)


def test_other_errors_stay_what_they_are(client: Redis) -> None:
    """A wrong type, or a message that speaks of READONLY, is no failover and costs no connection."""
    client.set("x", "READONLY")
    before = client.client_id()

    with pytest.raises(Exception, match="WRONGTYPE"):
        client.lpush("x", "1")

    assert client.get("x") == b"READONLY"
    assert client.client_id() == before


# --- real processes


@pytest.mark.faults
def test_worker_and_beat_go_on(redises: Pair, database: Database, scene: Scene, tmp_path: Path) -> None:
    """Without a restart, events at the new primary settle and every sweep runs there; the product hears of it."""
    open_jobs(scene, "before", "after")
    settings = {
        "KINO_DATABASE_URL": database.url(),
        "KINO_REDIS_URL": redises.url(),
        "KINO_LOG_FORMAT": "json",
        "KINO_RETRY_EVERY_S": "1",
        "KINO_RELAY_QUEUE": "product.refunds",
        "KINO_RELAY_EVERY_S": "1",
        "KINO_JOB_SOURCE": "none",
        "KINO_OVERDUE_EVERY_S": "1",
    }
    worker = start_worker(settings, tmp_path / "worker.log")
    beat = start_beat(settings, tmp_path / "schedule", tmp_path / "beat.log")
    sweeps = {"kino.sweep_retries", "kino.sweep_overdue", "kino.relay_refunds"}

    def ran(since: Any) -> set[str]:
        rows = scene.rows("SELECT name, slot_at FROM kino.schedule_slot WHERE finished_at IS NOT NULL")
        return {name for name, slot_at in rows if since is None or slot_at > since}

    try:
        wait_for(lambda: ran(None) >= sweeps, worker, beat)  # the relay tells of what happens after its first round
        with redises.client() as primary:
            push(primary, make_event("failed platform", "before"))
        wait_for(lambda: scene.inbox() != {}, worker, beat)

        redises.fail_over()
        ((switched_at,),) = scene.rows("SELECT max(slot_at) FROM kino.schedule_slot")
        with redises.client() as primary:
            push(primary, make_event("failed platform", "after"))
            wait_for(lambda: len(scene.inbox()) == 2, worker, beat)
            wait_for(lambda: ran(switched_at) >= sweeps, worker, beat)
            wait_for(lambda: primary.llen("product.refunds") == 2, worker, beat)
        codes = worker.stop(), beat.stop()
    finally:
        worker.kill()
        beat.kill()

    assert codes == (0, 0)
    assert ledger(scene) == {"before": REFUNDED, "after": REFUNDED}
