"""Intake as it runs: a real Celery worker process that is stopped, killed, cut off and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
from celery.bin.celery import celery as celery_command
from kombu import Connection
from redis import Redis

from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import DATABASE, Servers, servers
from kino_refunds.dev.processes import CeleryProcess, environment_of, start_beat, start_worker
from kino_refunds.errors import DependencyAway
from kino_refunds.events.connection import redis_client
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import SERVED, Queues, Recovered, depths, waiting
from kino_refunds.events.schema import Event, queue_of, to_json
from kino_refunds.ledger import ChargeRequest, open_charges
from tests.conftest import Database
from tests.faults.proxy import Proxy
from tests.pipeline import CAPTURED, EMPTY, REFUNDED, ledger, numbered, open_jobs, push
from tests.scenario import Scene, make_event, until

FAILED, TIMEOUT, SAFETY, COMPLETED = SERVED
KINDS = ("failed platform", "timeout", "safety before", "completed")


class Start(Protocol):
    """Starts a worker, or beat, that ends with the test at the latest."""

    def __call__(self, what: str = "worker", **settings: str) -> CeleryProcess: ...


def settings_of(database: Database, redis_url: str) -> dict[str, str]:
    return {"KINO_DATABASE_URL": database.url(), "KINO_REDIS_URL": redis_url, "KINO_LOG_FORMAT": "json"}


@pytest.fixture
def processes() -> Iterator[list[CeleryProcess]]:
    started: list[CeleryProcess] = []
    yield started
    for process in started:
        process.kill()


def starter(processes: list[CeleryProcess], common: dict[str, str], folder: Path) -> Start:
    def start(what: str = "worker", **settings: str) -> CeleryProcess:
        log_file = folder / f"{what}-{len(processes)}.log"
        if what == "worker":
            process = start_worker(common | settings, log_file)
        else:
            process = start_beat(common | settings, folder / "schedule", log_file)
        processes.append(process)
        return process

    return start


@pytest.fixture
def start(processes: list[CeleryProcess], database: Database, redis_url: str, tmp_path: Path) -> Start:
    return starter(processes, settings_of(database, redis_url), tmp_path)


def log_of(process: CeleryProcess) -> list[dict[str, Any]]:
    """What a process has said so far, a line each."""
    assert process.log_file is not None
    return log_of_file(process.log_file)


def log_of_file(log_file: Path) -> list[dict[str, Any]]:
    lines = log_file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def said(process: CeleryProcess, sentence: str) -> bool:
    return any(line["event"] == sentence for line in log_of(process))


def endings(job_ids: list[str]) -> list[Event]:
    """An event for each job, of all kinds in turn."""
    return [make_event(KINDS[number % len(KINDS)], job_id) for number, job_id in enumerate(job_ids)]


def settled(job_ids: list[str]) -> dict[str, list[tuple[str, int]]]:
    """What `ledger` reads when `endings` are settled."""
    return {
        job_id: CAPTURED if KINDS[number % len(KINDS)] == "completed" else REFUNDED
        for number, job_id in enumerate(job_ids)
    }


def count_settled(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.settlement")[0][0])


def make_slow(scene: Scene) -> None:
    """Let every batch take a while, so that something is in flight at nearly every instant."""
    scene.as_superuser(
        "CREATE FUNCTION kino.dawdle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$",
        "CREATE TRIGGER dawdle AFTER INSERT ON kino.inbox_event EXECUTE FUNCTION kino.dawdle()",
    )


def make_quick(scene: Scene) -> None:
    scene.as_superuser("DROP TRIGGER dawdle ON kino.inbox_event")


def wait_for(condition: Callable[[], bool], *alive: CeleryProcess) -> None:
    """Look until it is so; fail at once, with its last words, when a process ends that should not."""

    def look() -> bool:
        for process in alive:
            process.require_alive()
        return condition()

    until(look, deadline_s=60)


def drained(client: Redis) -> Callable[[], bool]:
    return lambda: depths(client) == EMPTY


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
    found = {message.raw for message in waiting(redis).messages}
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
    assert recovered == Recovered(workers=(dead.decode(),), messages=in_flight, skipped=())
    assert ledger(scene) == settled(jobs)
    assert Counter(scene.inbox().values()) == {"refunded": 450, "captured": 150}


@pytest.mark.faults
def test_a_flushed_redis_does_not_end_the_worker(scene: Scene, redis: Redis, redis_url: str, start: Start) -> None:
    """After FLUSHALL the worker settles what comes, and a kombu SimpleQueue that lived on is bound again and heard."""
    jobs = numbered("job", 8)
    open_jobs(scene, *jobs)
    events = endings(jobs)
    bindings = [f"_kombu.{kind}.{queue}" for kind in ("binding", "binding_permanent") for queue in SERVED]
    restored = "kombu bindings were missing and are back; publish again what a SimpleQueue sent meanwhile"
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


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Servers]:
    """Servers that these tests may kill."""
    with servers() as running:
        migrate(running.database_url(role="kino_owner"))
        yield running


@pytest.fixture
def own(own_servers: Servers) -> Iterator[Database]:
    """The database of servers that may be killed; they run again after the test."""
    with redis_client(own_servers.redis_url()) as client:
        client.flushdb()
    yield Database(DATABASE, own_servers)
    own_servers.redis.restart()
    own_servers.postgres.restart()


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


# --- settings that Celery reads by itself

ELSEWHERE = "redis://127.0.0.1:1/0"
CELERY_S_OWN = {
    "CELERY_BROKER_URL": ELSEWHERE,
    "CELERY_BROKER_READ_URL": ELSEWHERE,
    "CELERY_BROKER_WRITE_URL": ELSEWHERE,
    "CELERY_RESULT_BACKEND": "nonsense://",
    "CELERY_CONFIG_MODULE": "a_module_that_is_not",
    "CELERY_LOADER": "a_module_that_is_not:Loader",
    "CELERY_CUSTOM_WORKER_POOL": "a_module_that_is_not:Pool",
    "CELERY_WORKER_POOL": "solo",
    "CELERY_WORKER_QUEUES": "another",
    "CELERY_WORKER_CONCURRENCY": "none",
    "CELERY_BEAT_SCHEDULER": "a_module_that_is_not:Scheduler",
    "BROKER_URL": ELSEWHERE,
    "RESULT_BACKEND": "nonsense://",
    "CONFIG_MODULE": "a_module_that_is_not",
    "LOADER": "a_module_that_is_not:Loader",
    "DJANGO_SETTINGS_MODULE": "a_module_that_is_not",
}


def test_celery_s_own_settings_do_not_win(scene: Scene, start: Start) -> None:
    """Whatever broker, loader, configuration, pool or queue Celery's variables name, sweeps run; each is named."""
    worker = start(KINO_RETRY_EVERY_S="1", **CELERY_S_OWN)
    beat = start("beat", KINO_RETRY_EVERY_S="1", **CELERY_S_OWN)
    swept = "SELECT count(*) FROM kino.schedule_slot WHERE name = 'kino.sweep_retries' AND finished_at IS NOT NULL"

    wait_for(lambda: scene.rows(swept)[0][0] > 1, worker, beat)

    for process in (worker, beat):
        (warning,) = [line for line in log_of(process) if "Celery's own settings" in line["event"]]
        assert set(warning["names"]) == CELERY_S_OWN.keys() - {"DJANGO_SETTINGS_MODULE"}
        assert ELSEWHERE not in json.dumps(warning)
    assert (beat.stop(), worker.stop()) == (0, 0)


def of_the_command_line() -> set[str]:
    """The variables that Celery's global options read under a name without `CELERY_`."""
    return {str(option.envvar) for option in celery_command.params if getattr(option, "envvar", None)}


def test_every_variable_that_celery_copies_is_known() -> None:
    """A global option of Celery that is also read from a variable of another name is tried above."""
    harmless = {"NO_COLOR", "SKIP_CHECKS", "APP"}

    assert of_the_command_line() - harmless == {
        name for name in CELERY_S_OWN if not name.startswith(("CELERY_", "DJANGO_"))
    }


def celery_fails(*arguments: str, **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers.app", *arguments],
        env=environment_of(environment),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("what", ["worker", "beat"])
def test_celery_s_own_settings_on_the_command_line_are_refused(database: Database, redis_url: str, what: str) -> None:
    """`-- broker.url=…` would be another broker; it is a wrong usage, and its value is not shown."""
    code, text = celery_fails(what, "--", "broker.url=redis://:hunter2@a", **settings_of(database, redis_url))

    assert code == 2
    assert "this app takes no" in text
    assert "use KINO_*" in text
    assert "hunter2" not in text
    assert "Traceback" not in text


def test_broker_of_the_command_line_does_not_win(
    scene: Scene, database: Database, redis_url: str, processes: list[CeleryProcess], tmp_path: Path
) -> None:
    """`--broker`, `--loader`, `--config` and `--result-backend` are named and ignored, as their variables are."""
    options = ["--broker", ELSEWHERE, "--loader", "no:no", "--config", "no", "--result-backend", "no://"]
    common = settings_of(database, redis_url) | {"KINO_RETRY_EVERY_S": "1"}
    worker = CeleryProcess([*options, "worker"], common, tmp_path / "worker.log")
    processes.append(worker)
    beat = CeleryProcess([*options, "beat", "--schedule", str(tmp_path / "s")], common, tmp_path / "beat.log")
    processes.append(beat)
    swept = "SELECT count(*) FROM kino.schedule_slot WHERE name = 'kino.sweep_retries' AND finished_at IS NOT NULL"

    wait_for(lambda: scene.rows(swept)[0][0] > 1, worker, beat)

    names = {"CELERY_BROKER_URL", "CELERY_LOADER", "CELERY_CONFIG_MODULE", "CELERY_RESULT_BACKEND"}
    for process in (worker, beat):
        (warning,) = [line for line in log_of(process) if "Celery's own settings" in line["event"]]
        assert set(warning["names"]) == names


# --- the Redis URL of a worker


@pytest.mark.parametrize("what", ["worker", "beat"])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KINO_REDIS_URL", "redis://:hunter2@a/0?max_connections=1", "has options that are not taken"),
        ("KINO_REDIS_URL", "sentinel://:hunter2@a/0", "is a Sentinel URL"),
        ("KINO_REDIS_URL", "", "is not set"),
        ("KINO_LOG_LEVEL", "loud", ": Input should be"),
    ],
)
def test_wrong_setting_ends_a_process_with_one_line(
    database: Database, redis_url: str, what: str, name: str, value: str, says: str
) -> None:
    """Exit code 2 and the setting's name, where Celery would show how it came to import this."""
    code, text = celery_fails(what, **settings_of(database, redis_url) | {name: value})

    assert code == 2
    assert text.startswith(f"error: {name}")
    assert says in text
    assert text.count("\n") == 1
    assert "hunter2" not in text


def test_worker_without_a_database_ends_with_one_line(redis_url: str) -> None:
    """Intake cannot start: the worker ends with exit code 2 and says which setting it needs."""
    code, text = celery_fails("worker", KINO_REDIS_URL=redis_url, KINO_LOG_FORMAT="json")

    assert code == 2
    assert "KINO_DATABASE_URL is not set" in text
    assert "Traceback" not in text


def connections(client: Redis, db: int) -> list[dict[str, str]]:
    found = client.client_list()
    return [each for each in found if each["db"] == str(db) and each["id"] != str(client.client_id())]


def test_options_of_the_url_reach_every_connection(
    scene: Scene, redis: Redis, redis_url: str, database: Database, processes: list[CeleryProcess], tmp_path: Path
) -> None:
    """A worker and beat start with every option there is, and each of their connections has them."""
    options = (
        "client_name=kino-test&protocol=2&socket_timeout=5&socket_connect_timeout=5"
        "&health_check_interval=5&socket_keepalive=true"
    )
    redis.ping()
    strangers = {each["id"] for each in connections(redis, int(redis_url.rsplit("/", 1)[1]))}
    start = starter(processes, settings_of(database, f"{redis_url}?{options}"), tmp_path)
    worker, beat = start(KINO_RETRY_EVERY_S="1"), start("beat", KINO_RETRY_EVERY_S="1")
    open_jobs(scene, "job-1")
    with EventPublisher(f"{redis_url}?{options}") as publisher:
        publisher.publish(make_event("failed platform", "job-1"))
        swept = "SELECT count(*) FROM kino.schedule_slot WHERE finished_at IS NOT NULL"
        wait_for(lambda: scene.inbox() != {} and scene.rows(swept)[0][0] > 1, worker, beat)
        found = [each for each in connections(redis, int(redis_url.rsplit("/", 1)[1])) if each["id"] not in strangers]

    assert {(each["name"], each["resp"]) for each in found} == {("kino-test", "2")}
    assert len(found) > 3
    assert {each["cmd"] for each in found} >= {"brpop", "evalsha"}
    assert ledger(scene) == {"job-1": REFUNDED}
    assert (beat.stop(), worker.stop()) == (0, 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, and one that is not for it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed, which makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("good", "other"):
        made = f"-keyout {name}.key -out {name}.pem -addext subjectAltName=IP:127.0.0.1"
        words = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 {made}".split()
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secured(redis_url: str, certificates: Path) -> Iterator[str]:
    """The URL of this test's Redis behind TLS."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / "good.pem", certificates / "good.key")
    port, db = redis_url.rsplit(":", 1)[1].split("/")
    with Proxy(int(port), tls=tls) as proxy:
        yield f"rediss://127.0.0.1:{proxy.port}/{db}"


def test_certificate_is_verified_alike_by_all_connections(
    scene: Scene,
    redis: Redis,
    secured: str,
    certificates: Path,
    database: Database,
    processes: list[CeleryProcess],
    tmp_path: Path,
) -> None:
    """With its authority intake, Celery and the publisher work; with another one, none of them sends a word."""
    open_jobs(scene, "job-1")
    wrong = f"{secured}?ssl_ca_certs={certificates}/other.pem"
    start = starter(processes, settings_of(database, wrong), tmp_path)
    refused = [start(KINO_RETRY_EVERY_S="1"), start("beat", KINO_RETRY_EVERY_S="1")]
    with EventPublisher(wrong) as publisher, pytest.raises(DependencyAway, match="CERTIFICATE_VERIFY_FAILED"):
        publisher.publish(make_event("failed platform", "job-1"))
    for process in refused:
        wait_for(
            lambda process=process: any("CERTIFICATE_VERIFY_FAILED" in json.dumps(line) for line in log_of(process)),  # type: ignore[misc]
            process,
        )
        process.kill()
    left = redis.keys()
    right = f"{secured}?ssl_ca_certs={certificates}/good.pem"
    start = starter(processes, settings_of(database, right), tmp_path)
    worker, beat = start(KINO_RETRY_EVERY_S="1"), start("beat", KINO_RETRY_EVERY_S="1")
    with EventPublisher(right) as publisher:
        publisher.publish(make_event("failed platform", "job-1"))
    swept = "SELECT count(*) FROM kino.schedule_slot WHERE finished_at IS NOT NULL"
    wait_for(lambda: scene.inbox() != {} and scene.rows(swept)[0][0] > 1, worker, beat)

    assert left == []
    assert ledger(scene) == {"job-1": REFUNDED}


def test_an_unknown_setting_is_named_with_the_nearest_known(redis: Redis, start: Start) -> None:
    """A misspelt variable is not silently ignored."""
    worker = start(KINO_INTAKE_BACTH="7")

    wait_for(lambda: said(worker, "intake started"), worker)
    (warning,) = [line for line in log_of(worker) if line["event"] == "unknown setting is ignored"]

    assert (warning["level"], warning["name"], warning["advice"]) == (
        "warning",
        "KINO_INTAKE_BACTH",
        "did you mean KINO_INTAKE_BATCH?",
    )
    assert redis.keys("kino:inflight:*") == []


WARNED_OF = "overdue jobs are not asked about"
UNSET = "KINO_JOB_SOURCE is not set: a job whose event is lost is never found"


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({}, "error", UNSET),
        ({"KINO_JOB_SOURCE": "none"}, "warning", "KINO_JOB_SOURCE=none: a job whose event is lost counts as timed out"),
        ({"KINO_JOB_SOURCE": "sql"}, "error", "KINO_JOB_SOURCE=sql needs KINO_JOB_SOURCE_URL"),
        ({"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "https://127.0.0.1:1/jobs"}, None, None),
    ],
    ids=["unset", "none", "incomplete", "chosen"],
)
def test_a_process_says_at_its_start_that_lost_jobs_are_not_found(
    scene: Scene, redis: Redis, start: Start, settings: dict[str, str], level: str | None, says: str | None
) -> None:
    """Worker and beat each log one line about a job source that is missing or none, and settle events all the same."""
    open_jobs(scene, "job-1")
    push(redis, *endings(["job-1"]))
    worker, beat = start(**settings), start("beat", **settings)
    wait_for(lambda: ledger(scene) == settled(["job-1"]), worker, beat)
    wait_for(lambda: sweeps_of(scene) > 0, worker, beat)

    for process in (worker, beat):
        lines = [
            line for line in log_of(process) if line["event"] == WARNED_OF and line["level"] in {"error", "warning"}
        ]
        assert [line["level"] for line in lines] == ([] if level is None else [level])
        assert says is None or says in lines[0]["error" if level == "error" else "warning"]
        assert "Traceback" not in text_of(process)


def sweeps_of(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.schedule_slot")[0][0])


def text_of(process: CeleryProcess) -> str:
    assert process.log_file is not None
    return process.log_file.read_text(encoding="utf-8")


READER = "postgresql://kino_read@127.0.0.1:1/kino"


@pytest.mark.parametrize(
    ("query", "url", "problem", "broken"),
    [
        (
            "SELECT CAST(x AS char(20)) AS job_id, 'completed' AS state FROM unnest(CAST(:job_ids AS text[])) x",
            None,
            "which it was not asked for, but job 'lost' was: ids must come back exactly as they were sent",
            1,
        ),
        ("this is no query :job_ids", None, "KINO_JOB_SOURCE_QUERY cannot run: syntax error", None),
        ("SELECT :job_ids", READER, "the job source's database cannot be reached: ", 0),
        ("SELECT :job_ids", "mysql://u:hunter2@h/d", "KINO_JOB_SOURCE_URL is not Postgres by psycopg but mysql", None),
    ],
    ids=["padded", "no query", "away", "another kind"],
)
def test_a_sweep_keeps_what_is_wrong_with_the_source(
    scene: Scene,
    database: Database,
    start: Start,
    query: str,
    url: str | None,
    problem: str,
    broken: int | None,
) -> None:
    """A source that cannot be asked, or is broken, ends no worker: its slot's row and one line of the log say why."""
    scene.grant("acct-1", 100)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("lost", "acct-1", 3, datetime.now(UTC) - timedelta(hours=1))])
    settings = {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": url or database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": query,
        "KINO_OVERDUE_EVERY_S": "1",
    }
    worker, beat = start(**settings), start("beat", **settings)

    wait_for(lambda: len(overdue_results(scene)) >= 2, worker, beat)

    for result in overdue_results(scene):
        assert problem in result["source_problem"]
        assert result.get("source_broken") == broken
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]
    assert "Traceback" not in text_of(worker)
    assert "hunter2" not in text_of(worker) + text_of(beat)
    assert any(problem in str(line.get("error")) for line in log_of(worker))


def overdue_results(scene: Scene) -> list[dict[str, Any]]:
    query = "SELECT result FROM kino.schedule_slot WHERE name = 'kino.sweep_overdue' AND finished_at IS NOT NULL"
    return [row.result for row in scene.rows(query)]
