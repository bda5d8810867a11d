"""The supervisor: a small process between an embedded server and the program that owns it.

It is run by file path with the standard library only, so that it starts fast and reads nothing of the owner's
environment. Its standard input is a pipe; only the owner holds the other end:

- the owner writes `stop` or `kill`: the supervisor stops the server, or kills it without warning;
- the pipe ends without a word: the owner is dead, whatever the cause. The supervisor stops the server, and removes its
  folder if that was scratch;
- the supervisor itself is killed: the kernel sends the server its stop signal (PR_SET_PDEATHSIG).

It has a session of its own, so that Ctrl-C in a terminal reaches the owner and not the servers. It writes its reports
to standard output: `pid N`, then `ended CODE`, or `failed TEXT`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWUSER = 0x10000000
# The user and group id of the process inside its own user namespace: any number but 0.
INSIDE_ID = 1000
# How long to wait for a folder: the supervisor of an owner that was killed a moment ago may still be stopping its
# server.
LOCK_PATIENCE_S = 15.0
# The file in a server's folder that names the owner.
IN_USE = "in-use"

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Step:
    """A signal, and how long to wait after it before the next, harder one."""

    signal: int
    patience_s: float


@dataclass(frozen=True)
class Orders:
    """What the owner wants to run; sent as JSON on the command line.

    If `binaries` have to be copied, a `command` or `prepare` whose path is below them is run from the copy.
    """

    folder: str
    command: list[str]
    stop: list[Step]
    not_as_root: bool = False
    binaries: list[str] = field(default_factory=list)
    prepare: list[str] = field(default_factory=list)
    prepare_result: tuple[str, str] | None = None
    scratch: bool = False

    @staticmethod
    def from_json(text: str) -> Orders:
        """Return the orders that `to_json` wrote."""
        given = json.loads(text)
        given["stop"] = [Step(**step) for step in given["stop"]]
        return Orders(**given)

    def to_json(self) -> str:
        """Return the orders as JSON, for the supervisor's command line."""
        return json.dumps({**vars(self), "stop": [vars(step) for step in self.stop]})


class Refusal(Exception):
    """The server cannot be run with these orders; the text says why."""


# --- who the server runs as -------------------------------------------------------------------------------


def as_is() -> None:
    """Keep the identity: it is an ordinary user, or the server may run as root."""


def in_user_namespace() -> None:
    """Keep the user for the file system, but become an ordinary user inside a new user namespace.

    Postgres refuses to run as root because of root's rights. In a new user namespace root's folders (for example a
    virtual environment below /root) stay accessible, while exec drops every capability.
    """
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{INSIDE_ID} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{INSIDE_ID} {gid} 1", encoding="ascii")


def as_nobody() -> None:
    """Become the user `nobody`, which cannot be undone; used where user namespaces are not allowed."""
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
    os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)


Identity = Callable[[], None]


def reaches(identity: Identity, programs: list[str], folder: str) -> bool:
    """Tell whether the process can take this identity, and with it run the programs and write into the folder.

    Tried in a child process, because a process cannot leave an identity again.
    """
    child = os.fork()
    if child == 0:
        try:
            identity()
            fits = os.access(folder, os.W_OK | os.X_OK) and all(os.access(p, os.X_OK) for p in programs)
            os._exit(0 if fits else 1)
        except BaseException:  # noqa: BLE001 -- a forked child must end here, after any error
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def give_to(identity: Identity, folder: Path) -> None:
    """Make the identity the owner of the folder and of everything in it."""
    if identity is as_nobody:
        nobody = pwd.getpwnam("nobody")
        uid, gid = nobody.pw_uid, nobody.pw_gid
    else:
        uid, gid = os.geteuid(), os.getegid()
    if folder.stat().st_uid == uid:
        return
    for parent, _, files in os.walk(folder):
        os.lchown(parent, uid, gid)
        for name in files:
            os.lchown(Path(parent, name), uid, gid)


def copy_of(binaries: list[str], folder: Path, identity: Identity) -> dict[str, str]:
    """Copy folders of programs and libraries; return the new path for each old path.

    They keep their relative places, by which the programs find their libraries. They are copied at every start, because
    a copy that was kept would be out of date after an upgrade.
    """
    copies = folder / "binaries"
    shutil.rmtree(copies, ignore_errors=True)
    around = os.path.commonpath(binaries)
    moved = {old: str(copies / os.path.relpath(old, around)) for old in binaries}
    for old, new in moved.items():
        shutil.copytree(old, new, symlinks=True)
    give_to(identity, copies)
    return moved


def choose(orders: Orders, folder: Path) -> tuple[Identity, Orders]:
    """Return an identity with which the server can run here, and the orders; raises Refusal if there is none.

    If a copy was needed, the paths in the orders are those of the copy.
    """
    if os.geteuid() != 0 or not orders.not_as_root:
        return as_is, orders
    programs = [command[0] for command in (orders.command, orders.prepare) if command]
    for identity in (in_user_namespace, as_nobody):
        give_to(identity, folder)
        if reaches(identity, programs, str(folder)):
            return identity, orders
    for identity in (in_user_namespace, as_nobody):
        give_to(identity, folder)
        if reaches(identity, [], str(folder)):
            moved = copy_of(orders.binaries, folder, identity)
            return identity, with_paths(orders, moved)
    give_to(as_is, folder)
    text = (
        f"as root, the server must run as an ordinary user, and none can enter {folder}: "
        "choose a data folder that every user may enter, or do not run as root"
    )
    raise Refusal(text)


def with_paths(orders: Orders, moved: dict[str, str]) -> Orders:
    """Return the orders with the paths of the programs' copies."""

    def path(program: str) -> str:
        for old, new in moved.items():
            if program.startswith(f"{old}/"):
                return new + program.removeprefix(old)
        return program

    changed = {
        **vars(orders),
        "command": [path(orders.command[0]), *orders.command[1:]],
        "prepare": [path(orders.prepare[0]), *orders.prepare[1:]] if orders.prepare else [],
    }
    return Orders(**changed)


# --- the folder -------------------------------------------------------------------------------------------


def try_lock(descriptor: int) -> bool:
    """Take the lock if no other process has it; return whether it was taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_alive(pid: str) -> bool:
    """Tell whether a process with this id exists."""
    return pid.isdecimal() and Path("/proc", pid).exists()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock the folder for one server at a time; yield the descriptor that the server inherits. Raises Refusal.

    The lock is held as long as any process has the descriptor. So the folder is free only when the last process of the
    last server has ended, in whatever order they were killed. The file names the owner. If that owner is alive, waiting
    would be in vain; if it is dead, or is our own, its server is being stopped.
    """
    descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while not try_lock(descriptor):
        holder = os.pread(descriptor, 32, 0).decode()
        if time.monotonic() > deadline or (holder != str(os.getppid()) and is_alive(holder)):
            os.close(descriptor)
            raise Refusal(f"{folder} is in use by the servers of process {holder or '?'}, which are running")
        time.sleep(0.05)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getppid()).encode(), 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def forget_dead_postmaster(folder: Path) -> None:
    """Remove the pid file of a Postgres that was killed, unless that Postgres is alive.

    Postgres itself only checks whether *some* process has that pid by now, and then refuses to start.
    """
    for pid_file in folder.glob("*/postmaster.pid"):
        with suppress(OSError, ValueError, IndexError):
            pid = int(pid_file.read_text(encoding="utf-8").splitlines()[0])
            try:
                alive = Path(f"/proc/{pid}/cwd").readlink() == pid_file.parent
            except FileNotFoundError:
                alive = False
            if not alive:
                pid_file.unlink()


def remove_scratch(folder: Path) -> None:
    """Remove the server's folder, and with the last server also the folder around it, with its logs."""
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.glob(f"*/{IN_USE}")):
        shutil.rmtree(folder.parent, ignore_errors=True)


# --- the server's life ------------------------------------------------------------------------------------


def report(text: str) -> None:
    """Write a report to the owner; if the owner is gone, the report is dropped."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{text}\n".encode())


def spawn(command: list[str], identity: Identity, lock: int, death_signal: int) -> subprocess.Popen[bytes]:
    """Start a program with the identity; the kernel sends it `death_signal` when the supervisor dies."""
    own_pid = os.getpid()

    def before_exec() -> None:
        identity()
        libc.prctl(PR_SET_PDEATHSIG, death_signal)
        # Inside a user namespace getppid still names the supervisor: process ids are not in it.
        if os.getppid() != own_pid:
            os._exit(1)

    # In a session of its own, so that what the server signals by group can never reach the supervisor.
    return subprocess.Popen(  # noqa: S603 -- the owner's own command
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        cwd="/",
        pass_fds=[lock],
        preexec_fn=before_exec,  # noqa: PLW1509 -- the supervisor has a single thread
        start_new_session=True,
    )


class Children:
    """Waits at once for the server, for its orphans (the supervisor is their reaper), and for a word of the owner."""

    def __init__(self) -> None:
        self._wake, woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self.codes: dict[int, int] = {}

    def reap(self) -> bool:
        """Collect the exit codes of children that have ended; return whether any child is left."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return False

    def wait(self, descriptors: list[int], patience_s: float | None) -> list[int]:
        """Sleep until a child ends, a descriptor is readable, or the time is up; return the readable descriptors."""
        readable, _, _ = select.select([self._wake, *descriptors], [], [], patience_s)
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)
        return [descriptor for descriptor in readable if descriptor != self._wake]

    def wait_until_gone(self, server: int | None, patience_s: float) -> bool:
        """Wait for one child, or for all of them (None); return False if the time is up first."""
        deadline = time.monotonic() + patience_s
        while True:
            left = self.reap()
            if not left or server in self.codes:
                return True
            if (remaining := deadline - time.monotonic()) <= 0:
                return False
            self.wait([], remaining)


def run_until_word(pid: int, children: Children) -> str:
    """Wait while the server runs; return `stop`, `kill`, `ended` or, if the owner died, `orphaned`."""
    owner = sys.stdin.fileno()
    while True:
        children.reap()
        if pid in children.codes:
            return "ended"
        if children.wait([owner], None):
            return os.read(owner, 64).decode().strip() or "orphaned"


def end(pid: int, steps: list[Step], children: Children) -> None:
    """Stop the server with one signal after the other; return when none of its processes is left."""
    for step in [*steps, Step(signal.SIGKILL, 60.0)]:
        if pid in children.codes:
            break
        os.kill(pid, step.signal)
        children.wait_until_gone(pid, step.patience_s)
    # The backends of a killed Postgres end a little later. Until then they hold the port and the shared memory.
    children.wait_until_gone(None, 60.0)


def prepare(orders: Orders, identity: Identity, lock: int) -> None:
    """Run the preparation once; if it was killed halfway, it starts again from the beginning. Raises Refusal."""
    if not orders.prepare or orders.prepare_result is None:
        return
    half, whole = map(Path, orders.prepare_result)
    if whole.exists():
        return
    shutil.rmtree(half, ignore_errors=True)
    code = spawn(orders.prepare, identity, lock, signal.SIGKILL).wait()
    if code != 0:
        raise Refusal(f"{Path(orders.prepare[0]).name} ended with {code}")
    half.rename(whole)


def supervise(orders: Orders) -> int:
    """Run one server until its last process has ended; return the exit code of the supervisor."""
    folder = Path(orders.folder)
    os.umask(0o077)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    word = "orphaned"
    try:
        with locked(folder) as lock:
            forget_dead_postmaster(folder)
            identity, orders = choose(orders, folder)
            prepare(orders, identity, lock)
            children = Children()
            server = spawn(orders.command, identity, lock, orders.stop[0].signal)
            report(f"pid {server.pid}")
            word = run_until_word(server.pid, children)
            end(server.pid, [] if word == "kill" else orders.stop, children)
            # The loop above has reaped it already.
            server.returncode = children.codes.get(server.pid, 0)
            report(f"ended {server.returncode}")
    except (Refusal, OSError, subprocess.SubprocessError) as error:
        report(f"failed {error}")
        return 1
    if word == "orphaned" and orders.scratch:
        remove_scratch(folder)
    return 0


if __name__ == "__main__":
    sys.exit(supervise(Orders.from_json(sys.argv[1])))
