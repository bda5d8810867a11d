"""`demo`: the main job with everything that can go wrong, live, and the promises checked afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kino_refunds.cli.dev import exports
from kino_refunds.cli.exit_codes import explained_by_server
from kino_refunds.cli.options import AsJson
from kino_refunds.cli.output import print_json, say, tell
from kino_refunds.cli.signals import interrupted_by_signals, stopping
from kino_refunds.errors import DependencyAway

if TYPE_CHECKING:
    from collections.abc import Callable

    from kino_refunds.demo.stage import Stage

KEPT_IN = Path(".kino-demo")
"""Where --keep leaves the settings and two events to try, in the working folder."""
LOOK_EVERY_S = 0.5
LAST_LOOK_S = 2.0
"""The connections of a killed server break a little before its supervisor reports it."""


def demo(
    jobs: Annotated[int, typer.Option(min=100, max=1_000_000, help="How many jobs.")] = 5_000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same jobs.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run jobs, break things, check the promises.

    Uses scratch servers, real workers (one is killed) and beat; KINO_* URLs are not used. Exit code 1: a promise was
    broken.

    Example: kino-refunds demo --keep
    """
    started = time.monotonic()
    from kino_refunds.cli.demo_screen import opened_view, show
    from kino_refunds.demo.run import Demo
    from kino_refunds.demo.stage import Stage
    from kino_refunds.dev.embedded import servers

    with ExitStack() as stack:
        if keep:
            stack.enter_context(_kept_folder())
        stack.enter_context(interrupted_by_signals())
        view = stack.enter_context(opened_view())
        view.say(0.0, "", "starting Postgres and Valkey, on loopback")
        stage = stack.enter_context(Stage(stack.enter_context(servers())))
        try:
            told = Demo(stage, view, jobs=jobs, seed=seed, started=started).run()
        except Exception as error:
            if isinstance(error, DependencyAway) or explained_by_server(error) is not None:
                stage.require_alive(for_s=LAST_LOOK_S)  # if a server of the demo has ended, that is the error to name
            raise
        view.close()
        if as_json:
            print_json({**asdict(told), "kept": told.kept})
        else:
            show(told)
        if keep:
            _keep(stage, tell if as_json else partial(say, whole=True))
    return 0 if told.kept else 1


@contextmanager
def _kept_folder() -> Iterator[None]:
    """Make the folder first and remove it at the end. Raises a usage error if it exists: another demo may use it."""
    try:
        KEPT_IN.mkdir()
    except FileExistsError as error:
        text = f"{KEPT_IN} exists: another demo runs in this folder, or one was killed; then remove it"
        raise typer.BadParameter(text) from error
    except OSError as error:
        raise typer.BadParameter(f"{KEPT_IN} cannot be made here: {error.strerror}") from error
    try:
        yield
    finally:
        shutil.rmtree(KEPT_IN, ignore_errors=True)


def _keep(stage: Stage, tell: Callable[[str], None]) -> None:
    """Leave servers, one worker and beat running; say how to reach them and what to try."""
    from kino_refunds.demo.traffic import Traffic

    files = {"env": exports(stage.settings), **Traffic(stage).open_one_more()}
    for name, text in files.items():
        (KEPT_IN / name).write_text(text, encoding="utf-8")
    with stopping() as stop:
        tell(_TRY_NEXT)
        while not stop.wait(LOOK_EVERY_S):
            stage.require_alive()
    tell("stopping")


_TRY_NEXT = f"""
Everything stays up until Ctrl-C. In another terminal, from this folder:

  . {KEPT_IN}/env
  kino-refunds status --watch
  kino-refunds publish {KEPT_IN}/misdirected.jsonl
  kino-refunds why walk-1
  kino-refunds dead-letters list --job walk-1

The five-minute walk in kino_refunds/demo/README.md goes on from there.
"""
