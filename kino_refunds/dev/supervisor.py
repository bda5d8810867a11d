"""The small process that stands between a server and the program that owns it.

Run by file path with the standard library only, so that it starts fast and sees nothing of the owner's
environment. Its standard input is a pipe of which the owner alone holds the other end:

- the owner writes `stop` or `kill`: the server is stopped, or killed without warning;
- the pipe ends without a word: the owner died, however that was. The server is stopped and, where the
  folder was scratch, the folder goes with it;
- the guard itself is killed: the kernel sends the server its stop signal (PR_SET_PDEATHSIG).

It lives in a session of its own, so that Ctrl-C in a terminal reaches the owner and not the servers.
Standard output carries its reports: `pid N`, then `ended CODE`, or `failed TEXT`.
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
# Any number but 0: how the process sees itself inside its own user namespace.
INSIDE_ID = 1000
# A folder whose owner was killed a moment ago is still being shut down by that owner's guard.
LOCK_PATIENCE_S = 15.0
# The file in a server's folder that says whose it is.
IN_USE = "in-use"

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Step:
    """How long to wait after a signal before the next, harder one."""

    signal: int
    patience_s: float


@dataclass(frozen=True)
class Orders:
    """What the owner wants run; JSON on the command line.

    `command` may name `binaries` by its path: if they have to be copied, the copy is run instead.
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
        """Read what `to_json` wrote."""
        given = json.loads(text)
        given["stop"] = [Step(**step) for step in given["stop"]]
        return Orders(**given)

    def to_json(self) -> str:
        """Write the orders for the guard's command line."""
        return json.dumps({**vars(self), "stop": [vars(step) for step in self.stop]})


class Refusal(Exception):
    """The server cannot be run like this; the text says why."""


# --- who the server runs as -------------------------------------------------------------------------------


def as_is() -> None:
    """Stay who we are: an ordinary user, or a server that does not mind root."""


def in_user_namespace() -> None:
    """Stay the same user to the file system, but be an ordinary one in the server's own eyes.

    Postgres refuses to run as root because of what root may do. In a new user namespace root's folders
    (a virtual environment below /root, say) stay open to it, while exec drops every capability.
    """
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{INSIDE_ID} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{INSIDE_ID} {gid} 1", encoding="ascii")


def as_nobody() -> None:
    """Become `nobody` for good: where user namespaces are not allowed."""
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
    os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)


Identity = Callable[[], None]


def reaches(identity: Identity, programs: list[str], folder: str) -> bool:
    """Tell whether this identity can be taken, run the programs and write into the folder.

    Tried in a child, because none of the identities can be left again.
    """
    child = os.fork()
    if child == 0:
        try:
            identity()
            fits = os.access(folder, os.W_OK | os.X_OK) and all(os.access(p, os.X_OK) for p in programs)
            os._exit(0 if fits else 1)
        except BaseException:  # noqa: BLE001 -- a forked child must end here, whatever went wrong
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
    """Copy folders of programs and libraries; returns each old path with its new one.

    They keep their places relative to each other, by which the programs find their libraries. Copied at
    every start: a copy that is kept would outlive an upgrade.
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
    """Find an identity under which the server runs here; raises Refusal when there is none.

    Returns it with the orders, in which the paths are those of the copy if one was needed.
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
        "choose a data folder that everybody may enter, or do not run as root"
    )
    raise Refusal(text)


def with_paths(orders: Orders, moved: dict[str, str]) -> Orders:
    """Return the orders with the programs taken from their copies."""

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
    """Take the lock if nobody has it."""
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
    """Hold the folder for one server at a time; yields the descriptor that the server inherits.

    The lock lives as long as any process has the descriptor: a folder is free only when the last process
    of the last server is gone, whoever was killed in which order. The file names the owner: if that one
    lives, waiting is in vain; if it is dead, or is our own, the server is on its way out.
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
    """Remove the pid file of a Postgres that was killed, unless that Postgres lives.

    Postgres itself only asks whether *some* process has the pid by now, and then refuses to start.
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
    """Remove the server's folder, and the one around it, logs and all, once the last server has left it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not any(folder.parent.glob(f"*/{IN_USE}")):
        shutil.rmtree(folder.parent, ignore_errors=True)


# --- the server's life ------------------------------------------------------------------------------------


def report(text: str) -> None:
    """Tell the owner; if it is gone, nobody needs to know."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{text}\n".encode())


def spawn(command: list[str], identity: Identity, lock: int, death_signal: int) -> subprocess.Popen[bytes]:
    """Start a program under the identity, to be signalled by the kernel when the guard dies."""
    guard = os.getpid()

    def before_exec() -> None:
        identity()
        libc.prctl(PR_SET_PDEATHSIG, death_signal)
        # Inside a user namespace getppid still names the guard: process ids are not in it.
        if os.getppid() != guard:
            os._exit(1)

    # In a session of its own, so that what the server signals by group can never reach the guard.
    return subprocess.Popen(  # noqa: S603 -- the owner's own command
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        cwd="/",
        pass_fds=[lock],
        preexec_fn=before_exec,  # noqa: PLW1509 -- the guard has a single thread
        start_new_session=True,
    )


class Children:
    """Waits for the server, its orphans (the guard is their reaper) and the owner's word, together."""

    def __init__(self) -> None:
        self._wake, woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        self.codes: dict[int, int] = {}

    def reap(self) -> bool:
        """Collect what has ended; tells whether any child is left."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return False

    def wait(self, descriptors: list[int], patience_s: float | None) -> list[int]:
        """Sleep until a child ended, a descriptor can be read, or the time is up; returns the readable."""
        readable, _, _ = select.select([self._wake, *descriptors], [], [], patience_s)
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)
        return [descriptor for descriptor in readable if descriptor != self._wake]

    def wait_until_gone(self, server: int | None, patience_s: float) -> bool:
        """Wait for one child, or for all of them (None); False when the time is up first."""
        deadline = time.monotonic() + patience_s
        while True:
            left = self.reap()
            if not left or server in self.codes:
                return True
            if (remaining := deadline - time.monotonic()) <= 0:
                return False
            self.wait([], remaining)


def run_until_word(pid: int, children: Children) -> str:
    """Wait while the server runs; returns `stop`, `kill`, `ended` or, when the owner died, `orphaned`."""
    owner = sys.stdin.fileno()
    while True:
        children.reap()
        if pid in children.codes:
            return "ended"
        if children.wait([owner], None):
            return os.read(owner, 64).decode().strip() or "orphaned"


def end(pid: int, steps: list[Step], children: Children) -> None:
    """Stop the server, ever harder; returns once no process of it is left."""
    for step in [*steps, Step(signal.SIGKILL, 60.0)]:
        if pid in children.codes:
            break
        os.kill(pid, step.signal)
        children.wait_until_gone(pid, step.patience_s)
    # A killed Postgres leaves its backends to notice by themselves; until then the port and the shared
    # memory are not free.
    children.wait_until_gone(None, 60.0)


def prepare(orders: Orders, identity: Identity, lock: int) -> None:
    """Run what must have run once, in a way that a kill halfway is started over."""
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


def guard(orders: Orders) -> int:
    """Run one server from its first signal to its last process; returns the exit code of the guard."""
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
            # Reaped above, by the loop that reaps everything.
            server.returncode = children.codes.get(server.pid, 0)
            report(f"ended {server.returncode}")
    except (Refusal, OSError, subprocess.SubprocessError) as error:
        report(f"failed {error}")
        return 1
    if word == "orphaned" and orders.scratch:
        remove_scratch(folder)
    return 0


if __name__ == "__main__":
    sys.exit(guard(Orders.from_json(sys.argv[1])))
