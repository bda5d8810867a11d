"""The command line as people, programs and attackers use it: exit codes, shapes, and errors that help."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from redis import Redis
from structlog.testing import capture_logs

from kino_refunds.cli import main as cli
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import waiting
from kino_refunds.events.schema import to_json
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.settings import PREFIX
from kino_refunds.settlement.dead_letters import malformed_letter
from tests.clock import clock_at, record_dead_letters
from tests.command_line import Result, Run
from tests.conftest import Database
from tests.scenario import NOW, Scene, make_event, until

SCRIPT = Path(sys.executable).with_name("kino-refunds")
AWAY_PORT = 1
"""Nobody listens on tcpmux here, and a connection to it is refused at once."""
HOSTILE = "\x1b[2J\x9b31m[red]\u202egnp.exe[/red]\x07"
"""Clears the screen, colours by C1, reverses what follows, rings; and rich's markup, if anybody reads it as such."""
HARMLESS = "[red]"


def error(text: str, code: int = 2) -> Result:
    """One line on standard error, and nothing on standard output."""
    return Result(code, "", f"error: {text}\n")


def outside() -> dict[str, str]:
    """This environment without any ledger that it may name."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def lines(*events: object) -> bytes:
    return b"".join(each if isinstance(each, bytes) else to_json(each) + b"\n" for each in events)  # type: ignore[arg-type]


def instant(text: str) -> datetime:
    """Read a time of a JSON document: RFC 3339, with an offset."""
    value = datetime.fromisoformat(text)
    assert value.utcoffset() == timedelta(0)
    return value


# --- help


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its words."""

    def walk(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, (*words, name))
            else:
                yield " ".join((*words, name)), command

    return dict(walk(typer.main.get_command(cli.app), ()))


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command_has_an_example_and_fits_a_terminal(bare: Run, command: str) -> None:
    """A person finds an example to copy, on one line, and no line is wider than 80 columns."""
    shown = bare(*command.split(), "--help")

    examples = [line for line in shown.out.splitlines() if line.startswith("  Example: ")]
    assert (shown.code, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert [shlex.split(line)[1 : 2 + len(command.split())] for line in examples] == [
        ["kino-refunds", *command.split()]
    ]
    assert shown.out.partition(examples[0])[2].startswith("\n\n")


def test_list_of_commands_says_each_in_a_whole_line(bare: Run) -> None:
    """What a command does is not cut off in the list of all of them."""
    shown = bare("--help")

    listed = {line.split()[0] for line in shown.out.partition("Commands:\n")[2].splitlines()}
    assert listed == {command.split()[0] for command in commands()}
    assert "..." not in shown.out.replace("[ARGS]...", "")
    assert bare("-h") == shown


@pytest.mark.parametrize("group", ["", *sorted({words.split()[0] for words in commands() if " " in words})])
def test_help_of_every_group_has_an_example_and_says_each_command_whole(bare: Run, group: str) -> None:
    """Also before the verb is known there is something to copy: a command that exists."""
    shown = bare(*group.split(), "--help")

    (example,) = [line for line in shown.out.splitlines() if line.startswith("  Example: kino-refunds ")]
    words = shlex.split(example)[2:]
    assert (shown.code, shown.err) == (0, "")
    assert " ".join(words[: 2 if group else 1]) in commands()
    assert words[: len(group.split())] == group.split()
    assert "..." not in shown.out.replace("[ARGS]...", "")
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [(), ("overdue",)])
def test_command_without_its_verb_shows_help(bare: Run, arguments: tuple[str, ...]) -> None:
    """Who types only the name is shown what there is; a script that does is told that it used it wrongly."""
    shown = bare(*arguments)

    assert (shown.code, shown.out) == (2, "")
    assert shown.err == bare(*arguments, "--help").out


# --- usage errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["refund"], "No such command 'refund'"),
        (["--versoin"], "No such option: --versoin"),
        (["why"], "Missing argument 'JOB'"),
        (["grant", "acme", "5"], "Missing option '--reference'"),
        (["grant", "acme", "-5", "--reference", "r"], "No such option: -5"),
        (["grant", "acme", "1.5", "--reference", "r"], "Invalid value for 'CREDITS': Input should be a valid integer"),
        (["grant", "acme", "0", "--reference", "r"], "credits must be a whole number from 1 to "),
        (["grant", "--reference", "r", "acme", "--", "-5"], "credits must be a whole number from 1 to "),
        (["grant", "acme", "9" * 30, "--reference", "r"], "credits must be a whole number from 1 to "),
        (["grant", "acme", "5", "--reference", "r", "--class", "gift"], "Invalid value for '--class'"),
        (["grant", "acme", "5", "--reference", "r", "--priority", "3000000000"], "Invalid value for '--priority'"),
        (["grant", "acme", "5", "--reference", "r", "--expires-at", "soon"], "'soon' is not a time; for example 2026-"),
        (
            ["grant", "acme", "5", "--reference", "r", "--expires-at", "0001-01-01T00:00:00+10:00"],
            "'0001-01-01T00:00:00+10:00' is not a time; for example 2026-",
        ),
        (["grant", "", "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", "a" * 129, "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", HOSTILE, "5", "--reference", "r"], "account_id must be 1 to 128 printable characters"),
        (["grant", "acme", "5", "--reference", "a\nb"], "reference must be 1 to 128 printable characters"),
        (["balance", "acme", "--at", "2026-13-01"], "'2026-13-01' is not a time; for example 2026-"),
        (
            ["grant", "acme", "5", "--reference", "r", "--expires-at", "2031-03-28"],
            "'2031-03-28' is a day, not an instant; in UTC it ends at 2031-03-29T00:00:00Z: type that",
        ),
        (["balance", "acme", "--at", "20260131"], "in UTC it ends at 2026-02-01T00:00:00Z: type that"),
        (
            ["balance", "acme", "--at", "2026-01-31 12:00"],
            "has no offset; type 2026-01-31T12:00:00Z for UTC, or for example 2026-01-31T12:00:00+01:00",
        ),
        (["balance", "acme", "--at", "9999-12-31"], "'9999-12-31' has no offset; type 9999-12-31T00:00:00Z for UTC"),
        (["balance", "acme", "--at", ""], "'' is not a time; for example 2026-"),
        (["relay", "rewind", "--to", "2026-01-31", "--yes"], "in UTC it begins at 2026-01-31T00:00:00Z: type that"),
        (["charges", "open", "j", "acme", "-5"], "No such option: -5"),
        (["charges", "open", "--", "j", "acme", "-5"], "credits must be a whole number from 0 to "),
        (["charges", "open", "", "acme", "5"], "job_id must be 1 to 128 printable characters"),
        (["dev", "--data-dir", ""], "Invalid value for '--data-dir': it is empty; name a folder"),
        (["statement", "acme", "--limit", "0"], "Invalid value for '--limit'"),
        (["statement", "acme", "--limit", "10001"], "Invalid value for '--limit'"),
        (["statement", "acme", "--after", "x"], "Invalid value for '--after'"),
        (["publish", "no such file"], "'no such file': No such file or directory"),
        (["publish", "/"], "'/': Is a directory"),
        (["demo", "--jobs", "0"], "Invalid value for '--jobs'"),
        ([HOSTILE], "No such command "),
    ],
)
def test_wrong_usage_is_one_line_that_leads_to_the_help(bare: Run, arguments: list[str], says: str) -> None:
    """Exit code 2, one line that names what is wrong and where to read on, no traceback, nothing connected to."""
    result = bare(*arguments, KINO_DATABASE_URL=f"postgresql://kino_worker@127.0.0.1:{AWAY_PORT}/kino")

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert says in result.err
    assert result.err.endswith("--help\n")
    assert result.err.count("\n") == 1
    assert result.err[:-1].isprintable()


@pytest.mark.parametrize("command", ["balance", "statement", "why"])
def test_argument_that_is_not_utf_8_is_refused(run: Run, command: str) -> None:
    """Bytes that no id can have are a wrong argument, not a crash."""
    result = run(command, "acme\udcff")

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: 'acme\\udcff' is not text: write it in UTF-8")


GIVEN = {"number": "1", "numbers": "1", "credits": "5", "file": "-", "edited": "/dev/null", "to": "2026-01-31T12:00Z"}
"""What a parameter is given while another one of its command is odd; the others get a plain word."""
ODD = [
    "", " ", "0", "-1", "9" * 40, str(2**63), HOSTILE, "/", "x" * 200_000, "9999-12-31T23:59:59-12:00", "a\0b",
    "\udcff",
]  # fmt: skip
STARTS_SERVERS = {"demo", "dev", "replay-trace"}


@pytest.mark.parametrize("command", sorted(commands().keys() - STARTS_SERVERS))
def test_an_odd_value_for_any_parameter_is_an_answer_or_one_clear_line(
    run: Run, scene: Scene, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Whatever is typed for whichever argument: an exit code that means something, and no more than a screen of it."""
    monkeypatch.chdir(tmp_path)  # an odd name of a file makes a file
    scene.charged("job-1")
    with scene.worker.begin() as connection:
        letter = malformed_letter(b"{", "generation.job-failed", MalformedMessage("bad_json", "cut off"))
        record_dead_letters(connection, [letter], now=NOW, build="test")
    parameters = [each for each in commands()[command].params if each.name != "help"]
    product = database.url("kino_product")

    wrong = []
    for parameter in parameters:
        for odd in [] if getattr(parameter, "is_flag", False) else ODD:
            arguments = typed(command, parameters, str(parameter.name), odd)
            said = run(*arguments, KINO_PRODUCT_DATABASE_URL=product)
            one_line = said.err.startswith("error: ") and said.err.count("\n") == 1
            answered = said.code in {0, 1} and (said.code == 0 or said.out != "")
            if not (harmless(said) and len(said.err) < 2_500 and (answered or (said.code in {1, 2} and one_line))):
                wrong.append((parameter.name, odd[:40], said.code, said.out[:200], said.err[:200]))
    assert wrong == []


def typed(command: str, parameters: list[Any], name: str, odd: str) -> list[str]:
    """A command line on which one parameter is odd and the others that it needs are given."""
    arguments, behind = command.split(), ["--"]
    for each in parameters:
        value = odd if each.name == name else GIVEN.get(str(each.name), "x")
        if each.name == "yes":
            arguments.append("--yes")
        elif each.name == name or each.required:
            if each.param_type_name == "option":
                arguments.append(f"{each.opts[0]}={value}")
            else:
                behind.append(value)
    return arguments + behind


def harmless(said: Result) -> bool:
    """Nothing that was printed acts on a terminal."""
    return all(c.isprintable() or c == "\n" for c in said.out + said.err)


def test_a_file_whose_name_breaks_a_line_is_shown_on_one(run: Run, scene: Scene, tmp_path: Path) -> None:
    """A file's name is text as any other: in an error it neither ends the line nor acts on the terminal."""
    scene.charged()
    with scene.worker.begin() as connection:
        letter = malformed_letter(b"{", "generation.job-failed", MalformedMessage("bad_json", "cut off"))
        record_dead_letters(connection, [letter], now=NOW, build="test")
    edited = tmp_path / f"{HOSTILE.replace('/', '')}\n"
    edited.write_bytes(b"no event")

    said = run("dead-letters", "replay", "1", "--edited", str(edited))

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err[:-1].isprintable()
    assert "bad_json" in said.err


READ_ONLY = {
    "balance", "breaks list", "breaks show", "charges list", "dead-letters list", "dead-letters show", "doctor",
    "intake status", "retries list", "retries show", "schedule", "statement", "status", "why",
}  # fmt: skip
NOBODY_ACTS = STARTS_SERVERS | {"migrate"}
"""Scratch servers; and the schema, whose owner's login is known."""


def test_every_command_that_changes_something_asks_who_does_it() -> None:
    """Whoever looks next finds a name: no command that writes comes without --by."""
    without = {words for words, command in commands().items() if "by" not in {each.name for each in command.params}}

    assert without == READ_ONLY | NOBODY_ACTS


# --- settings and servers


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["balance", "acme"], "KINO_DATABASE_URL"),
        (["statement", "acme"], "KINO_DATABASE_URL"),
        (["why", "job-1"], "KINO_DATABASE_URL"),
        (["grant", "acme", "5", "--reference", "r"], "KINO_DATABASE_URL"),
        (["overdue", "run"], "KINO_DATABASE_URL"),
        (["migrate"], "KINO_MIGRATION_DATABASE_URL"),
        (["publish", "-"], "KINO_REDIS_URL"),
    ],
)
def test_missing_and_unreadable_urls_are_named(bare: Run, arguments: list[str], name: str) -> None:
    """Which variable, and how one looks; the password of a wrong one is not shown."""
    stdin = lines(make_event("completed"))
    missing = bare(*arguments, stdin=stdin, KINO_JOB_SOURCE="none")
    wrong = bare(*arguments, stdin=stdin, KINO_JOB_SOURCE="none", **{name: "db:hunter2@localhost"})

    for result in (missing, wrong):
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith(f"error: {name} ")
        assert "; for example " in result.err
    assert "hunter2" not in wrong.err


def test_server_that_is_away_is_exit_3_and_named(bare: Run, tmp_path: Path) -> None:
    """Nobody listens: the variable that leads there is named, its password is not, and what to look at is said."""
    (tmp_path / "events").write_bytes(lines(make_event("completed")))
    at = f":hunter2@127.0.0.1:{AWAY_PORT}"

    results = {
        "KINO_DATABASE_URL": bare("balance", "acme", KINO_DATABASE_URL=f"postgresql://kino_worker{at}/kino"),
        "KINO_MIGRATION_DATABASE_URL": bare("migrate", KINO_MIGRATION_DATABASE_URL=f"postgresql://kino_owner{at}/kino"),
        "Redis": bare("publish", str(tmp_path / "events"), KINO_REDIS_URL=f"redis://{at}/0"),
    }

    for name, result in results.items():
        assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
        assert name in result.err
        assert "hunter2" not in result.err
        assert "psycopg" not in result.err
    assert "check that it runs and can be reached, and user, password" in results["KINO_DATABASE_URL"].err
    assert "check that it runs and can be reached" in results["KINO_MIGRATION_DATABASE_URL"].err
    assert "publish all of them again" in results["Redis"].err


def test_database_without_a_ledger_is_exit_3_and_says_migrate(run: Run, database: Database) -> None:
    """Not migrated yet: every command that reads says how to mend that, and migrate mends it, once."""
    with database.servers.postgres.connect(database.name) as superuser:
        superuser.execute("DROP SCHEMA kino CASCADE")

    before = [run(*arguments) for arguments in (["balance", "a"], ["statement", "a"], ["why", "j"], ["overdue", "run"])]
    migrated = run("migrate", "--json")
    again = run("migrate", "--json")

    assert before == [error("the database has no ledger yet; run `kino-refunds migrate` as kino_owner", 3)] * 4
    head = migrated.json["after"]
    assert migrated.json == {"before": None, "after": head, "newer": False}
    assert again.json == {"before": head, "after": head, "newer": False}
    closed = "the ledger's tables are written by its functions only"
    assert run("migrate") == Result(0, f"the schema is at {head}, nothing to do\n{closed}\n", "")


def test_wrong_role_is_exit_3_and_says_which_may(run: Run, database: Database, scene: Scene) -> None:
    """A role without the right changes nothing, and reads which to use."""
    scene.grant("acct-1")
    before = scene.everything()

    reading = run("grant", "acct-1", "5", "--reference", "r", KINO_PRODUCT_DATABASE_URL=database.url("kino_read"))
    worker = run("migrate", KINO_MIGRATION_DATABASE_URL=database.url("kino_worker"))
    nobody = run("balance", "acct-1", KINO_DATABASE_URL=database.url("kino_nobody"))

    assert scene.everything() == before
    assert [(result.code, result.out, result.err.count("\n")) for result in (reading, worker, nobody)] == [
        (3, "", 1)
    ] * 3
    denied = "permission denied for function grant_lots; connect with the role that may (see KINO_PRODUCT_DATABASE_URL)"
    assert denied in reading.err
    assert "connect as kino_owner; nothing was changed" in worker.err
    assert 'role "kino_nobody" does not exist' in nobody.err


def test_wrong_settings_are_all_named(run: Run) -> None:
    """A wrong value stops a command before it connects; each is named, in one line."""
    result = run("balance", "acme", KINO_RETRY_EVERY_S="x", KINO_OVERDUE_ASKS="0")

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "KINO_RETRY_EVERY_S: " in result.err
    assert "KINO_OVERDUE_ASKS: " in result.err


# --- grant, balance, statement


def test_grant_gives_once_and_a_conflict_changes_nothing(run: Run, scene: Scene) -> None:
    """The same grant again shows the same lot; other terms under its reference are a finding."""
    arguments = (
        "grant",
        "acme",
        "500",
        "--reference",
        "order-1",
        "--expires-at",
        "2100-01-01T02:00:00+02:00",
        "--json",
    )
    first, again = run(*arguments), run(*arguments)
    before = scene.everything()
    conflict = run("grant", "acme", "501", "--reference", "order-1")

    assert (first.code, first.err) == (0, "")
    assert first.json == {
        "lot_id": first.json["lot_id"],
        "reference": "order-1",
        "account_id": "acme",
        "lot_class": "purchased",
        "granted": 500,
        "remaining": 500,
        "priority": 100,
        "expires_at": "2100-01-01T00:00:00+00:00",
        "state": "active",
    }
    assert again == first
    assert scene.everything() == before
    assert conflict == error(
        "grant 'order-1' was given on other terms: credits 500, not 501; expires_at 2100-01-01 00:00:00+00, not never",
        1,
    )


def test_who_granted_is_kept_with_the_transfer(run: Run, scene: Scene) -> None:
    """The grant's transfer says who gave the credits; the same grant by another changes nothing."""
    for who in ("anna", "bob"):
        assert run("grant", "acme", "5", "--reference", "order-1", "--by", who).code == 0

    assert [tuple(row) for row in scene.rows("SELECT kind, actor FROM kino.transfer")] == [("grant", "anna")]


def test_credits_that_have_expired_already_are_granted_only_if_that_is_meant(run: Run, scene: Scene) -> None:
    """An expiry in the past by the ledger's clock is refused, unless it is said or the grant is an old one."""
    grant = ("grant", "acme", "5", "--reference", "order-1", "--expires-at")

    with clock_at(scene.worker, datetime(2040, 1, 1, tzinfo=UTC)):
        refused = run(*grant, "2040-01-01T00:00:00Z")
        nothing = scene.rows("SELECT 1 FROM kino.account")
        meant = run(*grant, "2040-01-01T00:00:00Z", "--although-past")
        again = run(*grant, "2040-01-01T01:00:00+01:00")
        future = run(*grant[:4], "order-2", "--expires-at", "2040-01-01T00:00:01Z")

    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "--expires-at 2040-01-01T00:00:00Z lies in the past (it is 2040-01-01T00:00:00Z)" in refused.err
    assert "add --although-past if you mean it" in refused.err
    assert nothing == []
    assert [each.code for each in (meant, again, future)] == [0, 0, 0]
    assert "2040-01-01 00:00:01Z" in future.out


def test_a_balance_of_the_future_is_refused(run: Run, scene: Scene) -> None:
    """What an account will have nobody knows; what was understood is shown with the answer."""
    scene.grant("acme", 5)
    ((now,),) = scene.rows("SELECT kino.clock()")

    future = run("balance", "acme", "--at", (now + timedelta(hours=1)).isoformat())
    past = run("balance", "acme", "--at", now.isoformat())

    assert (future.code, future.out, future.err.count("\n")) == (2, "", 1)
    assert "lies in the future (it is " in future.err
    assert past.code == 0
    assert ["at", *f"{now:%Y-%m-%d %H:%M:%SZ}".split()] in [line.split() for line in past.out.splitlines()]


def test_balance_and_statement_say_what_an_account_has_and_why(run: Run, scene: Scene) -> None:
    """A page of the statement names where the next begins, until there is none."""
    lot = scene.grant("acme", 100)
    scene.open("job-1", "acme", 8)

    balance = run("balance", "acme", "--json")
    before = run("balance", "acme", "--at", "2020-01-01T02:00:00+02:00", "--json")
    page = run("statement", "acme", "--limit", "1", "--json")
    rest = run("statement", "acme", "--after", str(page.json["next"]), "--json")
    end = run("statement", "acme", "--after", str(rest.json["items"][-1]["transfer_id"]), "--json")
    nowhere = run("statement", "acme", "--after", "99", "--json")

    def line(of: Result, kind: str, credits: int, job_id: str | None, reason: str | None) -> dict[str, Any]:
        (item,) = of.json["items"]
        assert instant(item["at"]) > NOW - timedelta(hours=1)
        ids = {"transfer_id": item["transfer_id"], "at": item["at"]}
        return {**ids, "kind": kind, "credits": credits, "lot_id": lot.lot_id, "job_id": job_id, "reason": reason}

    assert balance.json == {"account_id": "acme", "available": 92, "held": 8}
    assert before.json == {"account_id": "acme", "at": "2020-01-01T00:00:00+00:00", "available": 0, "held": 0}
    granted = line(page, "grant", 100, None, "purchased")
    assert page.json == {"items": [granted], "next": granted["transfer_id"]}
    assert rest.json == {"items": [line(rest, "hold", -8, "job-1", None)], "next": None}
    assert end.json == {"items": [], "next": None}
    assert nowhere == error("account 'acme' has no transfer 99 to go on behind", 2)


def test_people_read_tables(run: Run, scene: Scene) -> None:
    """Without --json a person reads names, separated thousands and what to type next."""
    scene.grant("acme", 1_234_567)
    scene.open("job-1", "acme", 4_567)

    balance = run("balance", "acme")
    statement = run("statement", "acme", "--limit", "1")

    assert [line.split() for line in balance.out.splitlines()] == [
        ["account", "acme"],
        ["available", "1,230,000"],
        ["held", "4,567"],
    ]
    first = scene.rows("SELECT min(transfer_id) FROM kino.transfer")[0][0]
    assert statement.out.splitlines()[-2:] == [f"more: --after {first}", "sum of these lines: 1,234,567"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_statement_says_that_later_lines_exist(run: Run, scene: Scene, form: tuple[str, ...]) -> None:
    """What an open transaction holds back is said on standard error; the listing keeps its shape."""
    scene.grant("acme")
    with scene.product.begin() as slow:
        slow.exec_driver_sql("SELECT pg_current_xact_id()")
        scene.grant("acme", reference="second")
        held_back = run("statement", "acme", *form)
    after = run("statement", "acme", *form)

    said = "later lines exist: a transaction before them is still open; ask again soon\n"
    assert (held_back.code, held_back.err, after.err) == (0, said, "")
    if form:
        assert set(held_back.json) == {"items", "next"}
        assert [len(result.json["items"]) for result in (held_back, after)] == [1, 2]


@pytest.mark.parametrize("command", ["balance", "statement"])
def test_unknown_account_is_a_finding_that_says_how_accounts_begin(run: Run, command: str) -> None:
    """Zero credits and no such account are not the same answer."""
    result = run(command, "nobody", "--json")

    assert result == error("there is no account 'nobody'; its first grant creates it (kino-refunds grant)", 1)


# --- publish


def test_publish_puts_every_event_on_its_queue(run: Run, redis: Redis, tmp_path: Path) -> None:
    """A file and standard input are published alike; empty lines are passed over."""
    failed, completed = make_event("failed platform"), make_event("completed", "job-2")
    (tmp_path / "events").write_bytes(lines(failed, b"\n", b"  \r\n", completed))

    by_file = run("publish", str(tmp_path / "events"), "--json")
    by_stdin = run("publish", "-", stdin=lines(failed))
    nothing = run("publish", "-", "--json")

    assert (by_file.code, by_file.json, by_file.err) == (0, {"published": 2}, "")
    assert (by_stdin.code, by_stdin.err) == (0, "")
    assert nothing.json == {"published": 0}
    assert [parse(message.raw) for message in waiting(redis).messages] == [failed, failed, completed]


def test_publish_names_every_wrong_line_and_publishes_nothing(run: Run, redis: Redis) -> None:
    """One wrong line keeps all from their queues: a half-published file is hard to correct."""
    good = make_event("completed")
    naive = to_json(good).replace(b"Z", b"", 1) + b"\n"

    result = run("publish", "-", stdin=lines(good, b"{\n", b"\n", good, naive, HOSTILE.encode() + b"\n"))

    said = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert [line.split(":")[:3] for line in said[:-1]] == [
        ["error", " line 2", " bad_json"],
        ["error", " line 5", " invalid_event"],
        ["error", " line 6", " bad_json"],
    ]
    assert said[-1].startswith("error: nothing was published: 3 ")
    assert said[-1].endswith("correct them and run this again")
    assert all(line.isprintable() for line in said)
    assert redis.keys() == []


def test_publish_checks_what_it_will_send_and_not_only_what_it_read(run: Run, redis: Redis) -> None:
    """A line that is fine as it stands but not on the wire is named before anything is published."""
    good = to_json(make_event("completed"))
    inside = good.replace(b"{", b'{"extra":NaN,', 1) + b"\n"
    large = good.replace(b"{", b'{"extra":"' + b"x" * 200_000 + b'",', 1) + b"\n"

    result = run("publish", "-", stdin=lines(*[good + b"\n"] * 501, inside, large))

    assert (result.code, result.out) == (2, "")
    assert [line.split(":")[:3] for line in result.err.splitlines()[:-1]] == [
        ["error", " line 502", " bad_json"],
        ["error", " line 503", " too_large"],
    ]
    assert redis.keys() == []


def test_publish_shows_ten_wrong_lines_of_many(run: Run) -> None:
    """A wrong file does not fill the terminal; how many more there are is said."""
    result = run("publish", "-", stdin=b"x\n" * 12)

    assert len(result.err.splitlines()) == 11
    assert "12 lines are wrong (and 2 more)" in result.err.splitlines()[-1]


# --- why


WHY_PARTS = ("lots", "settlement", "correction", "transfers", "asks", "events", "waiting", "dead_letters", "breaks")


def parts_of(result: Result) -> set[str]:
    """The parts of a job's story that are not empty; all of them are there."""
    assert set(result.json) == {"charge", *WHY_PARTS}
    return {name for name in result.json if result.json[name]}


def test_why_explains_every_state_of_a_job(run: Run, scene: Scene, redis: Redis) -> None:
    """Whatever became of a job: a sentence for people, and for programs every row that speaks of it."""
    jobs = ("open", "captured", "refunded", "corrected", "broken", "asked")
    charges = {job_id: scene.charged(job_id, credits=5) for job_id in jobs}
    scene.settle(
        make_event("completed", "captured"),
        make_event("safety before", "refunded"),
        make_event("failed user", "corrected"),
        make_event("timeout", "broken"),
        make_event("completed", "early"),
    )
    scene.settle(make_event("completed", "broken"))
    scene.correct(charges["corrected"])
    scene.as_superuser(
        "INSERT INTO kino.overdue_ask"
        " SELECT charge_id, 2, 'unknown', now(), now() FROM kino.charge WHERE job_id = 'asked'"
    )
    letter = malformed_letter(b'{"job_id": "lost",', "generation.timeout", MalformedMessage("bad_json", "cut off"))
    with scene.worker.begin() as connection:
        record_dead_letters(connection, [letter], now=NOW, build="test")

    found = {job_id: (run("why", job_id), run("why", job_id, "--json")) for job_id in (*jobs, "early", "lost")}

    assert {job_id: (text.code, document.code) for job_id, (text, document) in found.items()} == dict.fromkeys(
        found, (0, 0)
    )
    taken = {"charge", "lots", "transfers"}
    assert {job_id: parts_of(document) for job_id, (_, document) in found.items()} == {
        "open": taken,
        "captured": taken | {"settlement", "events"},
        "refunded": taken | {"settlement", "events"},
        "corrected": taken | {"settlement", "events", "correction"},
        "broken": taken | {"settlement", "events", "breaks"},
        "asked": taken | {"asks"},
        "early": {"waiting"},
        "lost": {"dead_letters"},
    }
    sentences = {job_id: " ".join(text.out.partition("\n\n")[0].split()) for job_id, (text, _) in found.items()}
    nothing = "has no charge; events about it wait or are dead letters."
    deadline = f"{charges['open'].deadline_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
    assert sentences == {
        "open": f"Job open took 5 credits of account acct of open; it is open, with its deadline at {deadline}.",
        "captured": "Job captured took 5 credits of account acct of captured; they were captured: completed, clause 1"
        " of policy 2025-12-14, by event captured completed.",
        "refunded": "Job refunded took 5 credits of account acct of refunded; they came back: content policy rejection,"
        " clause 2.safety of policy 2025-12-14, by event refunded safety before.",
        "corrected": "Job corrected took 5 credits of account acct of corrected; they were captured: not covered,"
        " clause 2.failure of policy 2025-12-14, by event corrected failed user; a correction returned them later.",
        "broken": "Job broken took 5 credits of account acct of broken; they came back: timeout, clause 2.timeout of"
        " policy 2025-12-14, by event broken timeout.",
        "asked": f"Job asked took 5 credits of account acct of asked; it is open, with its deadline at {deadline}.",
        "early": f"Job early {nothing}",
        "lost": f"Job lost {nothing}",
    }
    assert redis.keys() == []


def test_why_shows_a_settlement_whole(run: Run, scene: Scene) -> None:
    """P10: event, lots, clause, policy version, time and who are all in one document."""
    charge = scene.charged("job-1", credits=7)
    scene.settle(make_event("failed provider"))

    document = run("why", "job-1", "--json").json

    (lot,) = scene.rows("SELECT lot_id FROM kino.credit_lot")[0]
    (settlement,), (event,) = document["settlement"], document["events"]
    assert document["charge"] == {
        "charge_id": charge.charge_id,
        "job_id": "job-1",
        "account_id": "acct of job-1",
        "credits": 7,
        "deadline_at": charge.deadline_at.isoformat(),
        "opened_at": charge.opened_at.isoformat(),
        "status": "refunded",
        "refunded": 7,
    }
    assert settlement == {
        "kind": "refunded",
        "reason": "generation_failure",
        "clause": "2.failure",
        "policy_version": "2025-12-14",
        "ending": "failed.provider",
        "account_status": "active",
        "event_source": "/pipeline/eu-1",
        "event_id": "job-1 failed provider",
        "event_time": (NOW - timedelta(minutes=1)).isoformat(),
        "settled_at": settlement["settled_at"],
    }
    assert [
        (t["kind"], t["from_book"], t["to_book"], t["lot_id"], t["credits"], t["actor"]) for t in document["transfers"]
    ] == [
        ("hold", "wallet", "held", lot, 7, "product"),
        ("refund", "held", "wallet", lot, 7, "settlement"),
    ]
    assert (event["event_id"], event["outcome"]) == ("job-1 failed provider", "refunded")


def test_why_of_an_unknown_job_is_a_finding(run: Run) -> None:
    """Nothing known is said so, with where was looked."""
    assert run("why", "job-1") == error("nothing is known of job 'job-1': no charge, no event, no dead letter", 1)


# --- overdue run


def test_overdue_run_needs_to_be_told_that_nobody_knows(run: Run) -> None:
    """Without a source every overdue job is refunded in one pass: that is chosen, never fallen into."""
    result = run("overdue", "run", KINO_JOB_SOURCE=None)

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(
        "error: KINO_JOB_SOURCE is not set: a job whose event is lost is never found, and stays open for good; set it"
    )


def test_overdue_run_settles_what_the_dry_run_announced(run: Run, scene: Scene) -> None:
    """A dry run says what would be, the run does it, and a second run finds nothing left."""
    scene.grant("acme")
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest("job-1", "acme", 8, NOW - timedelta(minutes=10))])

    dry = run("overdue", "run", "--dry-run", "--json")
    held = scene.balance("acme").held
    wet = run("overdue", "run", "--json")
    again = run("overdue", "run")

    nothing: dict[str, Any] = {
        "asked": 0,
        "source_errors": 0,
        "source_broken": 0,
        "source_problem": None,
        "withheld": {},
    }
    assert dry.json == nothing | {
        "dry_run": True,
        "overdue": 1,
        "answers": {"unknown": 1},
        "outcomes": {"would settle: kino.generation.timeout.v1": 1},
        "refunded": 0,
        "refunded_credits": 0,
        "verified_through": None,
    }
    assert held == 8
    assert wet.json == nothing | {
        "dry_run": False,
        "overdue": 1,
        "answers": {"unknown": 1},
        "outcomes": {"refunded": 1},
        "refunded": 1,
        "refunded_credits": 8,
        "verified_through": None,
    }
    assert ["overdue", "0"] in [line.split() for line in again.out.splitlines()]
    assert scene.balance("acme").held == 0


def lost(scene: Scene, *job_ids: str) -> None:
    scene.grant("acme", 1_000)
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest(job_id, "acme", 1, NOW - timedelta(minutes=10)) for job_id in job_ids])


ROW = "SELECT {job_id} AS job_id, {state} AS state FROM unnest(CAST(:job_ids AS text[])) AS asked (id)"
BY_QUERY = {
    "sound": ("asked.id", "'running'", 0, None),
    "padded": ("CAST(asked.id AS char(20))", "'completed'", 1, "which it was not asked for, but job 'job-1' was"),
    "an unknown word": (
        "asked.id",
        "'gone fishing'",
        1,
        "the job source's state: Input should be 'completed', 'failed'",
    ),
    "one job's error": (
        "asked.id",
        "CASE asked.id WHEN 'job-2' THEN 'running' ELSE (1 / (length(asked.id) - 5))::text END",
        *(1, "the job source's query failed: division by zero"),
    ),
    "every job's error": (
        "asked.id",
        "(1 / (length(asked.id) - 5))::text",
        *(3, "the job source's query failed: division by zero"),
    ),
}


@pytest.mark.parametrize(("job_id", "state", "code", "problem"), BY_QUERY.values(), ids=BY_QUERY)
def test_overdue_run_says_what_is_wrong_with_the_source(
    run: Run, scene: Scene, database: Database, job_id: str, state: str, code: int, problem: str | None
) -> None:
    """What the source broke is exit 1, a source that answers nothing 3; a person reads why, and no traceback."""
    lost(scene, "job-1", "job-2")
    source: dict[str, Any] = {
        "KINO_JOB_SOURCE": "sql",
        "KINO_JOB_SOURCE_URL": database.url("kino_read"),
        "KINO_JOB_SOURCE_QUERY": ROW.format(job_id=job_id, state=state),
    }

    with capture_logs() as logged:
        told = run("overdue", "run", "--dry-run", "--json", **source)
    shown = run("overdue", "run", **source)

    assert (told.code, shown.code) == (code, code)
    said = told.json["source_problem"]
    assert said is None if problem is None else problem in said
    assert problem is None or problem in " ".join(shown.out.split())
    assert "Traceback" not in told.err + shown.err + shown.out
    assert [line["error"] for line in logged] == ([] if problem is None else [said])
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("this is no query :job_ids", 'cannot run: syntax error at or near "this"'),
        ("SELECT job_id, state FROM nowhere WHERE job_id = ANY(:job_ids)", 'cannot run: relation "nowhere" does not'),
        ("SELECT x AS id FROM unnest(CAST(:job_ids AS text[])) x", "gives no column job_id and no state"),
        ("UPDATE kino.charge SET credits = 0 WHERE job_id = ANY(:job_ids) RETURNING job_id, ''", "cannot run: syntax"),
        ("SELECT job_id, '' AS state FROM kino.charge WHERE job_id = ANY(:job_ids) FOR UPDATE", "cannot run: "),
        ("SELECT job_id, state FROM kino.charge", "needs KINO_JOB_SOURCE_QUERY with the parameter :job_ids"),
        ("SELECT :a, :job_ids", "has the parameter :a, and only :job_ids is given"),
    ],
)
def test_overdue_run_with_a_query_that_answers_for_no_job_is_wrong_usage(
    run: Run, scene: Scene, database: Database, query: str, says: str
) -> None:
    """A query that cannot run is a wrong setting: exit 2 and one line that names it, and nothing is settled."""
    lost(scene, "job-1")

    result = run(
        *("overdue", "run"),
        KINO_JOB_SOURCE="sql",
        KINO_JOB_SOURCE_URL=database.url("kino_read"),
        KINO_JOB_SOURCE_QUERY=query,
    )

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: KINO_JOB_SOURCE")
    assert says in result.err
    assert scene.rows("SELECT count(*) FROM kino.settlement") == [(0,)]


@pytest.mark.parametrize(
    "source",
    [
        {"KINO_JOB_SOURCE": "http", "KINO_JOB_SOURCE_URL": "http://127.0.0.1:1/jobs"},
        {
            "KINO_JOB_SOURCE": "sql",
            "KINO_JOB_SOURCE_URL": "postgresql://reader:hunter2@127.0.0.1:1/jobs",
            "KINO_JOB_SOURCE_QUERY": "SELECT :job_ids",
        },
    ],
    ids=lambda source: source["KINO_JOB_SOURCE"],
)
def test_overdue_run_with_a_source_that_nobody_reaches_is_exit_3(
    run: Run, scene: Scene, source: dict[str, Any]
) -> None:
    """A source that is away costs one connection and one line, however many jobs are overdue, and no verdict."""
    lost(scene, *(f"job-{number}" for number in range(150)))

    with capture_logs() as logged:
        result = run("overdue", "run", "--json", **source)

    assert (result.code, result.err, len(logged)) == (3, "", 1)
    assert (result.json["asked"], result.json["source_errors"], result.json["answers"]) == (50, 150, {})
    assert "refused" in result.json["source_problem"]
    assert "hunter2" not in result.out + result.err


# --- hostile content


def test_hostile_text_in_the_database_is_shown_harmlessly(run: Run, scene: Scene) -> None:
    """Whatever got into a row neither acts on the terminal nor is read as markup, in tables and in JSON."""
    scene.grant("acme")
    scene.open("job-1", "acme")
    literal = "'" + HOSTILE + "'"
    replica = "SET session_replication_role = replica"
    scene.as_superuser(
        replica,
        f"UPDATE kino.credit_lot SET reference = {literal}, account_id = {literal}",
        f"UPDATE kino.account SET account_id = {literal}",
        f"UPDATE kino.charge SET job_id = {literal}, account_id = {literal}",
        f"UPDATE kino.transfer SET account_id = {literal}, reason = {literal}, actor = {literal}",
        "INSERT INTO kino.break (kind, job_id, credits, detail)"
        f" VALUES ('failed_after_capture', {literal}, 1, {literal})",
    )

    shown = [
        run(*arguments, *form)
        for arguments in (["why", HOSTILE], ["balance", HOSTILE], ["statement", HOSTILE])
        for form in ([], ["--json"])
    ]

    assert [(result.code, result.err) for result in shown] == [(0, "")] * 6
    assert [result.out.replace("\n", "").isprintable() for result in shown] == [True] * 6
    assert [HARMLESS in result.out for result in shown] == [True] * 6


@pytest.mark.parametrize("arguments", [["why"], ["balance"], ["statement"]])
def test_hostile_argument_is_shown_harmlessly(run: Run, arguments: list[str]) -> None:
    """An id that is echoed in an error keeps to its line and its colour."""
    result = run(*arguments, HOSTILE)

    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err[:-1].isprintable()
    assert HARMLESS in result.err


# --- the installed script


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
    assert b"no verdict: Redis cannot be read" in err


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
    until(lambda: processes_of(scratch) == [] and not any(scratch.iterdir()))


@pytest.mark.faults
def test_killed_demo_leaves_nothing_either(scratch: Path) -> None:
    """SIGKILL gives it no time to put anything away: the servers' guards do, logs and all."""
    code, _ = demo_ended_by(signal.SIGKILL, scratch)

    assert code == -signal.SIGKILL
    until(lambda: processes_of(scratch) == [] and not any(scratch.iterdir()))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for scratch servers, which whoever they run as may enter."""
    with tempfile.TemporaryDirectory(prefix="kino-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def demo_ended_by(number: signal.Signals, scratch: Path) -> tuple[int, bytes]:
    program = script("demo", "--jobs", "20000", TMPDIR=str(scratch))
    return ended_by(number, program, once=lambda said: b"BROKEN" in said)


def test_interrupt_while_it_is_loaded_is_no_traceback() -> None:
    """Ctrl-C in the first second, in the middle of the imports, ends as it does later."""
    program = script("balance", "acme", PYTHONPROFILEIMPORTTIME="1")
    code, said = ended_by(signal.SIGINT, program, once=lambda said: b" redis\n" in said)

    assert code == 130
    assert said.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in said
    assert b"kino_refunds.cli.main" not in said


def test_interrupt_that_is_ignored_stays_ignored() -> None:
    """Started in the background of a script (SIGINT ignored), it goes on to its own end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = script("balance", "acme", PYTHONPROFILEIMPORTTIME="1")
    finally:
        signal.signal(signal.SIGINT, before)
    code, said = ended_by(signal.SIGINT, program, once=lambda said: b" redis\n" in said)

    assert code == 2
    assert b"KINO_DATABASE_URL is not set" in said


def processes_of(folder: Path) -> list[str]:
    """Every process that has the folder in its command line or environment, this one aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if os.fsencode(folder) in told and process.name != str(os.getpid()):
                found.append(told.decode(errors="replace"))
    return found
