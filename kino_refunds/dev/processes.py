"""Start the real worker and beat as processes of their own, for `dev`, the replay and the demo."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from kino_refunds.errors import ServerFailed
from kino_refunds.settings import PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from kino_refunds.dev.embedded import Servers

PR_SET_PDEATHSIG = 1
STOP_DEADLINE_S = 30.0
"""Twice what a worker promises for its stop; then it is killed, and its batch is recovered."""
LOG_LINES_SHOWN = 15
STEADY_AFTER_S = 60.0
"""A process that has run for this long had started well; its next end is a new matter."""
RESTART_WAIT_S_MAX = 30
"""A person who has corrected a file waits no longer than this to see it work."""
ADDRESSES = frozenset(
    f"{PREFIX}{name}" for name in ("DATABASE_URL", "PRODUCT_DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL")
)
"""The settings that `settings_for` makes: scratch work uses its own servers, whatever these say."""

_libc = ctypes.CDLL(None)


class CeleryProcess:
    """A running `celery -A workers.app …`; it ends with its owner, however that ends."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log_file: Path | None) -> None:
        self.name = arguments[0]
        self.log_file = log_file
        log = log_file.open("ab") if log_file is not None else None
        # A session of its own: Ctrl-C in our terminal reaches us, and we stop it in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and app
            [sys.executable, "-m", "celery", "--quiet", "-A", "workers.app", *arguments],
            env=environment_of(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # `-m` looks into the working folder first: a `workers` of somebody else there is not ours.
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, before exec
        )
        if log is not None:
            log.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ended(self) -> str | None:
        """Say how it ended; None while it runs."""
        if (code := self._process.poll()) is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the {self.name} {how}"

    def require_alive(self) -> None:
        """Raise ServerFailed with its last log lines if it has ended."""
        if (how := self.ended()) is not None:
            raise ServerFailed(f"{how}{self._last_words()}")

    def stop(self) -> int:
        """Stop it in order and return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGCONT)  # one that somebody has stopped would not hear the first
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it with SIGKILL, as a lost machine would."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        if self.log_file is None:
            return ""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            said = "".join(deque(log, LOG_LINES_SHOWN)).rstrip()
        return f"; it said last:\n{said}" if said else ""


class RestartingProcess:
    """A process that is started again when it ends, as a supervisor in production does.

    One that dies soon after its start is waited for, longer each time: a worker that cannot start must be seen, and not
    fill the screen.
    """

    def __init__(self, start: Callable[[], CeleryProcess], tell: Callable[[str], None]) -> None:
        self._start = start
        self._tell = tell
        self._deaths = 0
        self._process: CeleryProcess | None = start()
        self._began_at = time.monotonic()
        self._again_at = self._began_at

    def look(self) -> None:
        """Start it again if it has ended and its time has come; call it every now and then."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._again_at:
                self._process, self._began_at = self._start(), now
            return
        how = self._process.ended()
        if how is None:
            return
        self._deaths = 1 if now - self._began_at > STEADY_AFTER_S else self._deaths + 1
        wait_s = min(RESTART_WAIT_S_MAX, 2 ** (self._deaths - 1))
        self._process, self._again_at = None, now + wait_s
        times = "" if self._deaths == 1 else f", for the {self._deaths}. time in a row"
        self._tell(f"{how}{times}; it is started again in {wait_s} s")

    def stop(self) -> None:
        """Stop it in order, and for good."""
        if self._process is not None:
            self._process.stop()


def start_worker(environment: Mapping[str, str], log_file: Path | None = None) -> CeleryProcess:
    """Start a worker with its intake."""
    return CeleryProcess(["worker"], environment, log_file)


def start_beat(environment: Mapping[str, str], schedule_file: Path, log_file: Path | None = None) -> CeleryProcess:
    """Start beat; it keeps when it last did what in `schedule_file`."""
    return CeleryProcess(["beat", "--schedule", str(schedule_file)], environment, log_file)


def settings_for(servers: Servers, **more: str) -> dict[str, str]:
    """Return the KINO_* variables with which a process uses these servers."""
    return {
        "KINO_DATABASE_URL": servers.database_url(role="kino_worker"),
        "KINO_PRODUCT_DATABASE_URL": servers.database_url(role="kino_product"),
        "KINO_MIGRATION_DATABASE_URL": servers.database_url(role="kino_owner"),
        "KINO_REDIS_URL": servers.redis_url(),
        **more,
    }


def passed_on() -> dict[str, str]:
    """Return the settings of this environment that do not lead to servers."""
    names = (f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
    return {name: value for name in names if name not in ADDRESSES and (value := os.environ.get(name))}


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this environment with exactly these KINO_* variables: scratch work never meets a real ledger."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(settings)


def die_with_parent() -> None:
    """Have this process told to stop when the one that started it ends, however it ends; call it before exec."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
