"""A worker's settings: Celery's own do not win, wrong ones end it with one line, the URL's reach every connection."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.bin.celery import celery as celery_command
from redis import Redis

from kino_refunds.dev.processes import CeleryProcess
from kino_refunds.errors import DependencyAway
from kino_refunds.events.publisher import EventPublisher
from tests.conftest import Database
from tests.faults.proxy import Proxy
from tests.pipeline import REFUNDED, ledger, open_jobs
from tests.processes import Start, celery_fails, log_of, said, settings_of, starter, wait_for
from tests.scenario import Scene, make_event

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
        ("KINO_REDIS_URL", "redis://:hunter2@a/0?max_connections=1", "has options that are not supported"),
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
