"""How the ledger's functions come into a database, who may write beside them, and what an older build finds."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from kino_refunds.db import migrate as migrations
from kino_refunds.db.engine import create_engine
from kino_refunds.db.functions import FILES, FOLDER, WRITTEN_BY_FUNCTIONS, digest_of_functions
from kino_refunds.db.migrate import functions_of_head, migrate
from kino_refunds.reconciliation.integrity import violations
from tests.command_line import Run
from tests.conftest import Database
from tests.scenario import Scene, make_event

NEWER = "9999"
ANOTHER_GRACE = (
    "CREATE OR REPLACE FUNCTION kino.lot_grace() RETURNS interval LANGUAGE sql STABLE AS $$ SELECT interval '1 y' $$"
)
OURS = (
    "SELECT proname, prosrc, proconfig, proacl::text FROM pg_proc WHERE pronamespace = 'kino'::regnamespace ORDER BY 1"
)


def digest(database: Database) -> str:
    engine = create_engine(database.url("kino_read"), pooled=False)
    with engine.connect() as connection:
        return digest_of_functions(connection)


def test_the_functions_belong_to_the_newest_revision(database: Database) -> None:
    """Other functions need another migration: an older `migrate` would else put its own in the place of newer ones.

    Where this fails after the SQL was changed on purpose: add a migration, and write the digest there.
    """
    assert functions_of_head() == digest(database)


def test_every_file_is_installed() -> None:
    """A file of functions that nobody installs would be read as if it held."""
    assert sorted(path.stem for path in FOLDER.glob("*.sql")) == sorted(FILES)


def test_every_name_is_written_whole() -> None:
    """A table without its schema would be found in the caller's session first; a temp table minted credits so."""
    tables = "|".join((*WRITTEN_BY_FUNCTIONS, "ledger_setting"))
    bare = re.compile(rf"\b(?:FROM|JOIN|INTO|UPDATE|USING|TABLE)\s+({tables})\b", re.IGNORECASE)
    found = {
        f"{path.name}:{number}": line.strip()
        for path in FOLDER.glob("*.sql")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if bare.search(line.partition("--")[0])
    }

    assert found == {}


@pytest.mark.parametrize(
    "change",
    [
        ANOTHER_GRACE,
        "ALTER FUNCTION kino.open_charges(jsonb) RESET search_path",
        "ALTER FUNCTION kino.open_charges(jsonb) SECURITY INVOKER",
        "GRANT EXECUTE ON FUNCTION kino.void_purchase(text, text, text, text) TO kino_product",
        "GRANT EXECUTE ON FUNCTION kino.settle_charges(jsonb) TO PUBLIC",
        "ALTER FUNCTION kino.give_back(text, bigint[], text[], text[], timestamptz[]) OWNER TO kino_owner",
        "CREATE FUNCTION kino.mint() RETURNS void LANGUAGE sql AS ''",
    ],
)
def test_the_doctor_sees_a_function_that_is_not_ours(run: Run, scene: Scene, change: str) -> None:
    """Another text, another setting, another owner or one right more, and the doctor says what puts it back."""
    before = run("doctor", "--json")
    scene.as_superuser(change)

    after = run("doctor", "--json")

    found = [
        (each["level"], each["advice"] or "")
        for said in (before, after)
        for each in said.json["items"]
        if each["check"] == "ledger functions"
    ]
    assert [level for level, _ in found] == ["ok", "fail"]
    assert "kino-refunds migrate" in found[1][1]


def test_migrate_puts_the_functions_and_rights_back(database: Database, scene: Scene) -> None:
    """What somebody changed by hand is as this build installs it after the next `migrate`."""
    scene.as_superuser(
        ANOTHER_GRACE,
        "GRANT EXECUTE ON FUNCTION kino.settle_charges(jsonb) TO PUBLIC",
        "GRANT UPDATE ON kino.credit_lot TO kino_product",
    )

    migrate(database.url("kino_owner"))

    assert digest(database) == functions_of_head()
    assert scene.rows("SELECT has_any_column_privilege('kino_product', 'kino.credit_lot', 'UPDATE')") == [(False,)]


def test_migrating_again_locks_no_table(database: Database, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all stands already, `migrate` waits for no transaction of a product, and nobody waits behind it."""
    monkeypatch.setattr(migrations, "TABLE_LOCK_TIMEOUT_MS", 200)
    scene.grant("acct-1")
    with scene.superuser.begin() as forgotten:
        for table in WRITTEN_BY_FUNCTIONS:
            forgotten.exec_driver_sql(f"LOCK TABLE kino.{table} IN ROW EXCLUSIVE MODE")

        found = migrate(database.url("kino_owner"))

    assert found[0] == found[1]


def test_an_older_build_changes_nothing_and_says_so(run: Run, scene: Scene) -> None:
    """`migrate` of a build that does not know the schema leaves it alone, its functions too, and is no error."""
    scene.as_superuser(
        f"UPDATE kino.alembic_version SET version_num = '{NEWER}'",
        ANOTHER_GRACE,
    )
    before, rows = scene.rows(OURS), scene.everything()

    said, machine = run("migrate", "--lot-grace-days", "3"), run("migrate", "--json")

    assert (said.code, machine.code) == (0, 0)
    assert f"the schema is at {NEWER}, of a newer build than this one: nothing was changed" in said.out
    assert machine.json == {"before": NEWER, "after": NEWER, "newer": True}
    assert scene.rows(OURS) == before
    assert scene.everything() == rows


def test_the_lot_grace_is_written_by_migrate(run: Run, scene: Scene) -> None:
    """It is bounded, kept by a `migrate` that does not name it, and read by the ledger's functions."""
    grace = "SELECT kino.lot_grace()::text"

    said = [run("migrate", "--lot-grace-days", days).code for days in ("14", "366", "-1", "x")]
    run("migrate")
    kept = scene.rows(grace)
    run("migrate", "--lot-grace-days", "0")

    assert said == [0, 2, 2, 2]
    assert (kept, scene.rows(grace)) == ([("14 days",)], [("00:00:00",)])


@pytest.mark.parametrize(("says", "level"), [("7", "ok"), ("14", "fail"), ("seven", "fail")])
def test_the_doctor_fails_where_the_variable_of_before_says_otherwise(run: Run, says: str, level: str) -> None:
    """A house that had another grace must not find out by its refunds that nobody reads the variable any more."""
    said = run("doctor", "--json", KINO_LOT_GRACE_DAYS=says)

    (found,) = [each for each in said.json["items"] if each["check"] == "lot grace"]
    assert found["level"] == level
    assert level == "ok" or "--lot-grace-days" in found["advice"]


# A build of before 0006 writes the tables itself.

HOLD = """
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor)
    SELECT 'hold', 'wallet', 'held', 'acct-1', 1, charge_id, 10, 'product' FROM kino.charge WHERE job_id = 'old'
"""
SETTLE = """
    INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
    SELECT charge_id, 'captured', 'completed', '1', 'v', 's', 'e', now() FROM kino.charge WHERE job_id = 'old'
"""
CAPTURE = """
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor,
                               event_at)
    SELECT 'capture', 'held', 'consumed', 'acct-1', 1, charge_id, 10, 'completed', 'settlement', now()
    FROM kino.charge WHERE job_id = 'old'
"""
OF_BEFORE = {
    "kino_product": (
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('old', 'acct-1', 10, now())",
        "UPDATE kino.credit_lot SET remaining = remaining - 10 WHERE account_id = 'acct-1'",
        "INSERT INTO kino.charge_line SELECT charge_id, 1, 1, 10 FROM kino.charge WHERE job_id = 'old'",
        HOLD,
    ),
    "kino_worker": (SETTLE, CAPTURE),
}


def run_as(database: Database, role: str, *statements: str) -> None:
    engine = create_engine(database.url(role), pooled=False)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_two_builds_work_beside_each_other_during_an_upgrade(database: Database, scene: Scene) -> None:
    """With the tables left open, what either build charges the other settles, and the books stay true."""
    migrate(database.url("kino_owner"), beside_older_builds=True)
    scene.grant("acct-1")

    run_as(database, "kino_product", *OF_BEFORE["kino_product"])
    scene.charged("new")
    open_then = scene.rows("SELECT count(*) FROM kino.open_charge")
    run_as(database, "kino_worker", *OF_BEFORE["kino_worker"])
    said = scene.settle(make_event("timeout", "new"))

    assert open_then == [(2,)]
    assert said == ["refunded"]
    assert scene.rows("SELECT count(*) FROM kino.open_charge") == [(0,)]
    with scene.superuser.connect() as connection:
        assert violations(connection, without=("inbox", "times")) == []


def test_what_an_older_build_charged_is_settled_by_this_one(database: Database, scene: Scene) -> None:
    """A charge that was opened row by row ends by the function like any other."""
    migrate(database.url("kino_owner"), beside_older_builds=True)
    scene.grant("acct-1")
    run_as(database, "kino_product", *OF_BEFORE["kino_product"])
    migrate(database.url("kino_owner"))

    said = scene.settle(make_event("timeout", "old"))

    assert said == ["refunded"]
    assert scene.balance("acct-1").available == 100


@pytest.mark.parametrize("role", OF_BEFORE)
def test_after_the_upgrade_an_older_build_stands_still(database: Database, scene: Scene, role: str) -> None:
    """Closed again, the tables refuse what a build of before writes: its events wait, and nothing is lost."""
    scene.grant("acct-1")
    migrate(database.url("kino_owner"), beside_older_builds=True)
    migrate(database.url("kino_owner"))

    for statement in OF_BEFORE[role]:
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            run_as(database, role, statement)

    assert scene.rows("SELECT tgname FROM pg_trigger WHERE tgname IN ('charge_opens', 'charge_ends')") == []


def test_the_doctor_says_that_the_tables_are_open(database: Database, run: Run) -> None:
    """An upgrade that nobody finishes is a red line until somebody does."""
    migrate(database.url("kino_owner"), beside_older_builds=True)

    said = run("doctor", "--json")

    (found,) = [each for each in said.json["items"] if each["check"] == "ledger closed"]
    assert found["level"] == "fail"
    assert "kino_product, kino_worker may write" in found["found"]
