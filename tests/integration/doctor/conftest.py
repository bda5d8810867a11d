"""The doctor against servers of the test, sound or to be spoiled."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kino_refunds.dev.embedded import EmbeddedValkey
from tests.command_line import Run
from tests.integration.doctor.diagnosis import CHOSEN, Diagnosis, Doctor, Found, OwnPostgres, work
from tests.scenario import Scene


@pytest.fixture
def run(run: Run) -> Run:
    """Run a command where a job source is chosen, unless the test says otherwise."""
    return lambda *arguments, stdin=b"", **environment: run(*arguments, stdin=stdin, **(CHOSEN | environment))


@pytest.fixture
def doctor(run: Run) -> Doctor:
    """Run the doctor against this test's servers, or those that are given."""

    def examine(**environment: str | None) -> Diagnosis:
        result = run("doctor", "--json", stdin=b"", **environment)
        assert set(result.json) == {"items", "next"}
        items = result.json["items"]
        assert {item["advice"] for item in items if item["level"] == "ok"} <= {None}
        return Diagnosis(result.code, [Found(**item) for item in items if item["level"] != "ok"])

    return examine


@pytest.fixture
def well(scene: Scene) -> Scene:
    """A ledger on which a worker and beat work."""
    work(scene)
    return scene


@pytest.fixture(scope="module")
def own_valkey() -> Iterator[EmbeddedValkey]:
    """A Redis whose configuration may be spoiled."""
    with tempfile.TemporaryDirectory(prefix="kino-doctor-") as folder:
        server = EmbeddedValkey(Path(folder) / "valkey", scratch=True).start()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[OwnPostgres]:
    with tempfile.TemporaryDirectory(prefix="kino-doctor-") as folder:
        Path(folder).chmod(0o711)
        server = OwnPostgres(Path(folder) / "postgres", scratch=True).start()
        yield server
        server.stop()
