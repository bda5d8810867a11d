"""Settings that are wrong and servers that are away: what a command says, and how it exits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import AWAY_PORT, Result, Run, error, lines
from tests.conftest import Database
from tests.scenario import Scene, make_event


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
