"""The installed script: its streams, completion, signals, and surroundings that are odd."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from tests.command_line import AWAY_PORT, HOSTILE, SCRIPT, outside
from tests.conftest import Database
from tests.processes import processes_of
from tests.scenario import NOW, Scene, until


def script(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [SCRIPT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outside() | environment,
    )


def test_installed_script_answers_and_warns(database: Database, scene: Scene) -> None:
    """The answer on one stream; on the other, each name that is no setting, with the nearest that is one."""
    scene.grant("acme", 5)

    wrong = {"KINO_REDIS_ULR": "x", f"KINO_{HOSTILE}": "x"}
    program = script("balance", "acme", "--json", KINO_DATABASE_URL=database.url(), **wrong)
    out, err = program.communicate(timeout=60)

    said = err.decode().splitlines()
    assert (program.returncode, json.loads(out)) == (0, {"account_id": "acme", "available": 5, "held": 0})
    assert said[1] == "warning: KINO_REDIS_ULR is not a setting and is ignored; did you mean KINO_REDIS_URL?"
    assert [line.startswith("warning: KINO_") and line.isprintable() for line in said] == [True, True]


def test_json_is_all_there_is_on_standard_output(database: Database, scene: Scene) -> None:
    """What the program has to say beside its answer goes to standard error, so that the answer can be piped."""
    scene.grant("acme")
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acme", 8, NOW - timedelta(minutes=10))])

    program = script(
        "overdue",
        "run",
        "--json",
        KINO_DATABASE_URL=database.url(),
        KINO_REDIS_URL=f"redis://127.0.0.1:{AWAY_PORT}/0",
        KINO_JOB_SOURCE="none",
    )
    out, err = program.communicate(timeout=60)

    assert (program.returncode, json.loads(out)["withheld"]) == (3, {"redis_away": 1})
    assert b"no timeout is presumed: Redis cannot be read" in err


COMPLETE = "_KINO_REFUNDS_COMPLETE"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dea", ["dead-letters"]),
        ("dead-letters re", ["replay"]),
        ("dead-letters list --st", ["--status"]),
        ("breaks list --status a", ["accepted", "all"]),
        ("nothing", []),
    ],
)
def test_bash_completes_what_is_typed(typed: str, offered: list[str]) -> None:
    """The script that bash sources asks the installed program, which answers and says nothing besides."""
    words = ["kino-refunds", *typed.split()]
    program = (
        f'source <({COMPLETE}=source_bash kino-refunds); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        ' _kino_refunds_completion kino-refunds; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    noisy = {"KINO_REDIS_ULR": "x", "KINO_LOG_FORMAT": "json"}

    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", *words],
        env=outside() | noisy | {"PATH": f"{SCRIPT.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize(("shell", "asks"), [("zsh", "compdef"), ("fish", "complete --command kino-refunds")])
def test_other_shells_are_given_a_script_and_answers(shell: str, asks: str) -> None:
    """What zsh and fish would source and ask, as far as it can be seen without them."""
    typed = {
        "_TYPER_COMPLETE_ARGS": "kino-refunds dea",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }

    source, answer = (
        script(**{COMPLETE: f"{step}_{shell}"}, **typed).communicate(timeout=60) for step in ("source", "complete")
    )

    assert asks in source[0].decode()
    assert "dead-letters" in answer[0].decode()
    assert (source[1], answer[1]) == (b"", b"")


def test_completion_can_be_installed(tmp_path: Path) -> None:
    """`--install-completion` writes a file and has the shell read it at its next start."""
    done = subprocess.run(
        [SCRIPT, "--install-completion", "bash"],
        env=outside() | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    installed = tmp_path / ".bash_completions" / "kino-refunds.sh"
    assert (done.returncode, done.stderr) == (0, "")
    assert COMPLETE in installed.read_text(encoding="utf-8")
    assert str(installed) in (tmp_path / ".bashrc").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_reader_that_leaves_early_is_no_error(database: Database, scene: Scene, form: list[str]) -> None:
    """`| head` has what it wanted: exit code 0 and not a word, for more than a pipe holds."""
    with scene.product.begin() as connection:
        grant_lots(connection, [Grant(f"lot-{n}", "acme", 1, LotClass.COURTESY) for n in range(3_000)])

    program = script("statement", "acme", "--limit", "3000", *form, KINO_DATABASE_URL=database.url())
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.read(10)
    program.stdout.close()
    said = program.stderr.read()
    program.stderr.close()

    assert (program.wait(60), said) == (0, b"")


@pytest.mark.parametrize(("answer", "code", "says"), [(b"n\n", 1, b"nothing was done"), (b"\x04", 130, b"interrupted")])
def test_no_is_an_answer(database: Database, answer: bytes, code: int, says: bytes) -> None:
    """Whoever is asked and does not mean it gets one word, and nothing has happened."""
    ours, theirs = pty.openpty()
    program = subprocess.Popen(
        [SCRIPT, "intake", "pause", "--reason", "x"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outside() | {"KINO_DATABASE_URL": database.url()},
    )
    os.close(theirs)
    os.write(ours, answer)

    out, err = program.communicate(timeout=60)

    os.close(ours)
    assert (program.returncode, out.strip()) == (code, b"")  # the blank behind a question is readline's
    assert err.endswith(says + b"\n")
    assert b"Traceback" not in err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("publish - --json", 0),
        ("--help", 0),
        ("balance acme --json", 0),
        ("charges list --open", 0),
        ("balance nobody", 1),
        ("dead-letters discard 1 --note n", 2),
        ("demo --jobs 1", 2),
        ("retries run-now --json", 0),
    ],
)
def test_closed_stream_is_no_traceback(
    database: Database, scene: Scene, redis_url: str, command: str, code: int, closed: str
) -> None:
    """A parent that closes a stream (cron, some supervisors) gets its exit code all the same."""
    scene.grant("acme")
    ran = subprocess.run(
        ["sh", "-c", f'"$0" {command} {closed}', SCRIPT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=outside() | {"KINO_DATABASE_URL": database.url(), "KINO_REDIS_URL": redis_url},
        check=False,
    )

    assert (ran.returncode, b"Traceback" in ran.stderr) == (code, False), ran.stderr


@pytest.mark.parametrize(
    "surroundings",
    [
        {"COLUMNS": "0"},
        {"COLUMNS": "1"},
        {"COLUMNS": "-5"},
        {"COLUMNS": "\u00b2"},
        {"COLUMNS": "9" * 5_000},
        {"LINES": "\u00b2"},
        {"TERM": "nothing"},
        {"PYTHONIOENCODING": "ascii"},
        {"HOME": "/nowhere", "USER": "", "LOGNAME": ""},
        {"PATH": ""},
    ],
    ids=lambda each: ascii(" ".join(f"{name}={value[:9]}" for name, value in each.items())),
)
def test_odd_surroundings_change_no_answer(database: Database, scene: Scene, surroundings: dict[str, str]) -> None:
    """A terminal without a size, a locale without the letters, a user without a name: an answer, or one line."""
    account = "caf\u00e9 \u2026"
    scene.grant(account, 5)
    urls = {"KINO_DATABASE_URL": database.url()}

    answer = script("balance", account, **urls, **surroundings)
    out, err = answer.communicate(timeout=60)
    refused = script("balance", f"{account}!", **urls, **surroundings)
    nothing, why = refused.communicate(timeout=60)
    act = script("intake", "resume", **urls, **surroundings)
    done = act.communicate(timeout=60)

    assert (answer.returncode, err, b"5" in out) == (0, b"", True)
    assert (refused.returncode, nothing, why.count(b"\n")) == (1, b"", 1)
    assert why.startswith(b"error: there is no account ")
    assert (act.returncode, done[1]) == (0, b"")


def test_working_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """A shell may stand in a folder that somebody has removed: one line says so."""
    gone = tmp_path / "gone"
    gone.mkdir()

    ran = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD"; "$0" dev', SCRIPT], cwd=gone, capture_output=True, env=outside(), check=False
    )

    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (2, b"", 1)
    assert b"the working folder is gone" in ran.stderr


@pytest.mark.parametrize("folder", ["/proc/no", "/dev/null", "/dev/null/below", "x" * 300])
def test_folder_in_which_nothing_can_be_kept_is_a_usage_error(tmp_path: Path, folder: str) -> None:
    """`dev` names the folder and why, and starts nothing."""
    ran = subprocess.run(
        [SCRIPT, "dev", "--data-dir", folder], cwd=tmp_path, capture_output=True, env=outside(), check=False
    )

    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (2, b"", 1)
    assert folder.encode() in ran.stderr


def test_disk_that_is_full_is_no_traceback() -> None:
    """An answer that cannot be written is an error and no success, also in its exit code."""
    for command in (["--help"], ["doctor"], ["doctor", "--json"]):
        with Path("/dev/full").open("wb") as full:
            ran = subprocess.run([SCRIPT, *command], stdout=full, stderr=subprocess.PIPE, env=outside(), check=False)

        assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1), ran.stderr


def ended_by(
    number: signal.Signals, program: subprocess.Popen[bytes], *, once: Callable[[bytes], bool]
) -> tuple[int, bytes]:
    """Signal the script once it has said so, and return its exit code and what it said on stderr."""
    assert program.stdout is not None
    assert program.stderr is not None
    said = b""
    while not once(said):
        line = program.stderr.readline()
        assert line, f"it ended too soon, and said {said!r}"
        said += line
    program.send_signal(number)
    rest = program.stderr.read()
    program.stdout.close()
    program.stderr.close()
    return program.wait(60), said + rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_with_130_and_leaves_nothing(number: signal.Signals, scratch: Path) -> None:
    """Ctrl-C, SIGTERM or a closed terminal in the middle of a demo: one word, 130, no process and no file left."""
    # Under nohup a closed terminal is ignored, and what is ignored is inherited.
    before = signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    try:
        code, said = demo_ended_by(number, scratch)
    finally:
        signal.signal(number, before)

    assert code == 130
    assert said.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in said
    until(lambda: processes_of(scratch) == set() and not any(scratch.iterdir()))


@pytest.mark.faults
def test_killed_demo_leaves_nothing_either(scratch: Path) -> None:
    """SIGKILL gives it no time to put anything away: the servers' guards do, logs and all."""
    code, _ = demo_ended_by(signal.SIGKILL, scratch)

    assert code == -signal.SIGKILL
    until(lambda: processes_of(scratch) == set() and not any(scratch.iterdir()))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for scratch servers, which whoever they run as may enter."""
    with tempfile.TemporaryDirectory(prefix="kino-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def demo_ended_by(number: signal.Signals, scratch: Path) -> tuple[int, bytes]:
    program = script("demo", "--jobs", "20000", TMPDIR=str(scratch))
    return ended_by(number, program, once=lambda said: b"BROKEN" in said)


@pytest.mark.parametrize(
    ("module", "later"), [(b" typer.core", b"kino_refunds.cli.main"), (b" sqlalchemy.sql.base", b"KINO_DATABASE_URL")]
)
def test_interrupt_while_it_is_loaded_is_no_traceback(module: bytes, later: bytes) -> None:
    """Ctrl-C in the middle of the imports, the program's own or its command's, ends as it does later."""
    program = script("accounts", "show", "acme", PYTHONPROFILEIMPORTTIME="1")
    code, said = ended_by(signal.SIGINT, program, once=lambda said: module + b"\n" in said)

    assert code == 130
    assert b"interrupted" in said.splitlines()
    assert b"Traceback" not in said
    assert later not in said


def test_interrupt_that_is_ignored_stays_ignored() -> None:
    """Started in the background of a script (SIGINT ignored), it goes on to its own end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = script("accounts", "show", "acme", PYTHONPROFILEIMPORTTIME="1")
    finally:
        signal.signal(signal.SIGINT, before)
    code, said = ended_by(signal.SIGINT, program, once=lambda said: b" typer.core\n" in said)

    assert code == 2
    assert b"KINO_DATABASE_URL is not set" in said
