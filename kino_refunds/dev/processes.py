"""Start the real worker and beat as processes of their own, for `dev`, the trace run and the demo."""

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
"""Twice the time that a worker allows itself to stop. After this it is killed, and its batch is recovered."""
LOG_LINES_SHOWN = 15
STEADY_AFTER_S = 60.0
"""A process that ran for this long had started well: its next end is counted as the first again."""
RESTART_WAIT_S_MAX = 30
"""The longest wait before a restart: a person who has corrected a file sees the result within this time."""
ADDRESSES = frozenset(
    f"{PREFIX}{name}" for name in ("DATABASE_URL", "PRODUCT_DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL")
)
"""The settings that `settings_for` returns: the demo and its like use their own servers, whatever these are set to."""

_libc = ctypes.CDLL(None)


class CeleryProcess:
    """A running `celery -A workers.app …`; it stops when the process that started it exits, for whatever reason."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log_file: Path | None) -> None:
        self.name = arguments[0]
        self.log_file = log_file
        log = log_file.open("ab") if log_file is not None else None
        # A session of its own: Ctrl-C in the terminal reaches only this process, which stops it in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and app
            [sys.executable, "-m", "celery", "--quiet", "-A", "workers.app", *arguments],
            env=environment_of(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # `-m` searches the working folder first, and another package there may be named `workers`.
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, before exec
        )
        if log is not None:
            log.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ended(self) -> str | None:
        """Return in words how the process ended; None while it runs."""
        if (code := self._process.poll()) is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the {self.name} {how}"

    def require_alive(self) -> None:
        """Raise ServerFailed, with its last log lines, if the process has ended."""
        if (how := self.ended()) is not None:
            raise ServerFailed(f"{how}{self._last_words()}")

    def stop(self) -> int:
        """Stop the process in order, or kill it after STOP_DEADLINE_S; return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGCONT)  # a stopped process would not react to the first signal
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End the process with SIGKILL, as the loss of a machine would."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        if self.log_file is None:
            return ""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            said = "".join(deque(log, LOG_LINES_SHOWN)).rstrip()
        return f"; its log ends with:\n{said}" if said else ""


class RestartingProcess:
    """A process that is started again when it ends, as a service manager does in production.

    After an end soon after its start the next start waits, each time longer: a person must see that a worker cannot
    start, and its messages must not fill the screen.
    """

    def __init__(self, start: Callable[[], CeleryProcess], tell: Callable[[str], None]) -> None:
        self._start = start
        self._tell = tell
        self._deaths = 0
        self._process: CeleryProcess | None = start()
        self._began_at = time.monotonic()
        self._again_at = self._began_at

    def look(self) -> None:
        """Start the process again if it has ended and the wait is over; call this periodically."""
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
        """Stop the process in order, without another start."""
        if self._process is not None:
            self._process.stop()


def start_worker(environment: Mapping[str, str], log_file: Path | None = None) -> CeleryProcess:
    """Start a worker with its intake; return its process."""
    return CeleryProcess(["worker"], environment, log_file)


def start_beat(environment: Mapping[str, str], schedule_file: Path, log_file: Path | None = None) -> CeleryProcess:
    """Start beat, which keeps the times of its last ticks in `schedule_file`; return its process."""
    return CeleryProcess(["beat", "--schedule", str(schedule_file)], environment, log_file)


def settings_for(servers: Servers, **more: str) -> dict[str, str]:
    """Return the KINO_* variables for a process that uses these servers."""
    return {
        "KINO_DATABASE_URL": servers.database_url(role="kino_worker"),
        "KINO_PRODUCT_DATABASE_URL": servers.database_url(role="kino_product"),
        "KINO_MIGRATION_DATABASE_URL": servers.database_url(role="kino_owner"),
        "KINO_REDIS_URL": servers.redis_url(),
        **more,
    }


def passed_on() -> dict[str, str]:
    """Return the settings in this environment, without the addresses of servers."""
    names = (f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
    return {name: value for name in names if name not in ADDRESSES and (value := os.environ.get(name))}


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this environment with exactly these KINO_* variables, so that no demo can reach a real ledger."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(settings)


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the process that started it ends; call it before exec."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
