"""The five-minute walk: run its commands against a demo that was kept, and take down what they print.

    python -m tests.walk        # a whole demo, then the walk; rewrites what the README and the demo's page show

The tests do the same with a small demo, and compare.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kino_refunds.settings import PREFIX
from tests.documents import DEMO, README, rewrite

KINO_REFUNDS = Path(sys.executable).with_name("kino-refunds")
DEADLINE_S = 240.0
LOOK_EVERY_S = 0.1
READY = "Everything stays up until Ctrl-C."
PROMISES = "the promises, checked by"
"""Begins the last part of the demo's output, which the README shows; its own page shows what comes before."""

COMMANDS = (
    "kino-refunds publish .kino-demo/misdirected.jsonl",
    "kino-refunds why walk-1",
    "kino-refunds dead-letters list --job walk-1",
    "kino-refunds dead-letters replay LETTER --dry-run",
    "kino-refunds dead-letters replay LETTER --edited .kino-demo/corrected.json --dry-run",
    "kino-refunds dead-letters replay LETTER --edited .kino-demo/corrected.json",
    "kino-refunds why walk-1",
    "kino-refunds accounts show acme",
    "kino-refunds schedule",
)
"""LETTER is the number that the list has given."""


class KeptDemo:
    """A demo that stays up in a folder of its own."""

    def __init__(self, folder: Path, output: str) -> None:
        self.folder = folder
        self.output = output
        """What the demo printed, until it was ready."""

    def shell(self, command: str) -> str:
        """Run a command line as a newcomer's second terminal would, and return what it says on both streams."""
        ran = subprocess.run(
            ["/bin/sh", "-c", f". .kino-demo/env; {command}"],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return ran.stdout


def environment() -> dict[str, str]:
    """The environment of a terminal of 80 columns in which nobody has set anything of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**kept, "COLUMNS": "80", "NO_COLOR": "1"}


@contextmanager
def kept_demo(folder: Path, jobs: int) -> Iterator[KeptDemo]:
    """Run `demo --keep` in `folder` until it says that it is ready, and stop it by Ctrl-C at the end."""
    printed = folder / "printed"
    with printed.open("w") as out:
        process = subprocess.Popen(
            [KINO_REFUNDS, "demo", "--keep", "--jobs", str(jobs)],
            cwd=folder,
            env=environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while READY not in printed.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the demo did not get so far:\n{printed.read_text()}")
            time.sleep(LOOK_EVERY_S)
        yield KeptDemo(folder, printed.read_text().partition(READY)[0])
    finally:
        process.send_signal(signal.SIGINT)
        if process.wait(60) != 0 or (folder / ".kino-demo").exists():
            raise RuntimeError(f"the demo did not end well:\n{printed.read_text()}")


def walk(demo: KeptDemo) -> Iterator[tuple[str, str]]:
    """Take the walk; yields each command with its output."""
    letter = "LETTER"
    for command in COMMANDS:
        typed = command.replace("LETTER", letter)
        yield typed, demo.shell(typed)
        if " publish " in command:
            letter = _letter(demo)


def _letter(demo: KeptDemo) -> str:
    """Wait for the dead letter, as a person does without noticing, and return its number."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if items := json.loads(demo.shell("kino-refunds dead-letters list --job walk-1 --json"))["items"]:
            return str(items[0]["number"])
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError("the misdirected event did not become a dead letter")


def halves(output: str) -> tuple[str, str]:
    """Part the demo's output into its story with the figures, and the promises."""
    story, marker, promises = output.partition(PROMISES)
    return story.strip("\n"), (marker + promises).strip("\n")


def written(steps: Iterator[tuple[str, str]]) -> str:
    """Write commands and outputs as they stand in a terminal."""
    return "\n".join(f"$ {command}\n{output.rstrip()}\n" for command, output in steps)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, kept_demo(Path(folder), 5_000) as demo:
        story, promises = halves(demo.output)
        rewrite(DEMO, "demo", story)
        rewrite(README, "promises", promises)
        rewrite(DEMO, "walk", written(walk(demo)))


if __name__ == "__main__":
    main()
