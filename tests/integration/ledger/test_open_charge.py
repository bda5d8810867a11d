"""`kino.open_charge` says what is open: whoever opens or settles a charge, and whenever that was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command

from kino_refunds.db import migrate as migrations
from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import _config, migrate
from kino_refunds.dev.embedded import Servers
from kino_refunds.ledger import ChargeRequest, open_charges
from kino_refunds.reconciliation.integrity import violations
from tests.clock import HOUR
from tests.command_line import Run
from tests.conftest import INSUFFICIENT_PRIVILEGE, Database
from tests.scenario import NOW, Scene, make_event, until

SETTLED_RAW = """
    INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
    SELECT charge_id, 'captured', 'completed', '1', 'v', 's', job_id, now() FROM kino.charge WHERE job_id = '{}'
"""


def open_jobs(scene: Scene) -> list[tuple[str, str, int]]:
    """Each open charge's job, account and credits, as the table says."""
    rows = scene.rows(
        "SELECT c.job_id, o.account_id, o.credits FROM kino.open_charge o JOIN kino.charge c USING (charge_id)"
        " WHERE o.deadline_at = c.deadline_at ORDER BY c.job_id"
    )
    return [tuple(row) for row in rows]


@pytest.mark.usefixtures("sound_books")
def test_a_charge_is_open_until_it_is_settled(scene: Scene) -> None:
    """Opening brings a row for each charge, a charge of nothing too; settling takes exactly those away."""
    scene.grant("acct-1")
    with scene.product.begin() as connection:
        open_charges(connection, [ChargeRequest(f"job-{n}", "acct-1", n, NOW + HOUR) for n in range(4)])
    opened = open_jobs(scene)

    scene.settle(make_event("failed platform", "job-1"), make_event("completed", "job-2"))

    assert opened == [(f"job-{n}", "acct-1", n) for n in range(4)]
    assert open_jobs(scene) == [("job-0", "acct-1", 0), ("job-3", "acct-1", 3)]
    assert scene.balance("acct-1").held == 3


@pytest.mark.usefixtures("sound_books")
def test_a_charge_that_is_rolled_back_was_never_open(scene: Scene) -> None:
    """An error that the product catches, or a transaction that it gives up, leaves no row behind."""
    scene.grant("acct-1", 5)
    requests = [ChargeRequest(job_id, "acct-1", 4, NOW + HOUR) for job_id in ("job-1", "job-2")]

    with scene.product.begin() as connection, pytest.raises(Exception, match="needs 4 credits"):
        open_charges(connection, requests)
    with scene.product.connect() as connection:
        open_charges(connection, requests[:1])
        connection.rollback()

    assert open_jobs(scene) == []


def test_a_build_of_before_keeps_the_table_too(scene: Scene, database: Database) -> None:
    """Rows written one by one, as a build without this table writes them, open and end their charges all the same."""
    migrate(database.url("kino_owner"), beside_older_builds=True)
    scene.grant("acct-1")
    with scene.product.begin() as connection:
        for job_id in ("job-1", "job-2"):
            connection.exec_driver_sql(
                "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)"
                f" VALUES ('{job_id}', 'acct-1', 0, now()) ON CONFLICT (job_id) DO NOTHING"
            )
    opened = open_jobs(scene)

    with scene.worker.begin() as connection:
        connection.exec_driver_sql(SETTLED_RAW.format("job-1") + " ON CONFLICT (charge_id) DO NOTHING RETURNING 1")

    assert opened == [("job-1", "acct-1", 0), ("job-2", "acct-1", 0)]
    assert open_jobs(scene) == [("job-2", "acct-1", 0)]


FORGED = {
    "opened_at": "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at, opened_at)"
    " VALUES ('j', 'a', 0, now(), now() - interval '3 hours')",
    "charge_id": "INSERT INTO kino.charge (charge_id, job_id, account_id, credits, deadline_at)"
    " OVERRIDING SYSTEM VALUE VALUES (7, 'j', 'a', 0, now())",
    "created_at": "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, actor, created_at)"
    " VALUES ('grant', 'issued', 'wallet', 'a', 1, 1, 'x', now() - interval '1 year')",
    "xid": "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, actor, xid)"
    " VALUES ('grant', 'issued', 'wallet', 'a', 1, 1, 'x', '3')",
    "granted_at": "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, granted_at)"
    " VALUES ('r', 'a', 'courtesy', 1, 1, now() - interval '1 year')",
    "state": "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, state)"
    " VALUES ('r', 'a', 'courtesy', 1, 1, 'frozen')",
    "status": "INSERT INTO kino.account (account_id, status) VALUES ('a', 'terminated')",
    "what opens": "INSERT INTO kino.open_charge VALUES (1, 'a', now(), 1)",
    "what is open": "DELETE FROM kino.open_charge",
    "a deadline": "UPDATE kino.open_charge SET deadline_at = 'infinity'",
    "a sample": "INSERT INTO kino.xid_clock DEFAULT VALUES",
}


@pytest.mark.parametrize("what", FORGED)
def test_the_product_does_not_choose_when_or_under_which_number(database: Database, what: str) -> None:
    """Times, numbers and states are the ledger's; what is open is nobody's to write."""
    assert database.refusal("kino_product", FORGED[what]) == INSUFFICIENT_PRIVILEGE


CHOSEN_INSTANTS = {
    "deadline_at_in_the_calendar": """
        INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('j', 'a', 0, '{}')""",
    "expires_at_in_the_calendar": """
        INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, priority, expires_at)
        VALUES ('r', 'a', 'purchased', 1, 1, 1, '{}')""",
    "event_at_in_the_calendar": """
        INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor, event_at)
        VALUES ('grant', 'issued', 'wallet', 'a', 1, 1, 'r', 'p', '{}')""",
}


@pytest.mark.parametrize("instant", ["infinity", "-infinity", "4000-01-01 BC", "12000-01-01"])
@pytest.mark.parametrize("constraint", CHOSEN_INSTANTS)
def test_an_instant_that_no_program_can_read_is_refused(scene: Scene, constraint: str, instant: str) -> None:
    """One such deadline would end every overdue sweep, for everybody."""
    with scene.superuser.connect() as connection, pytest.raises(sa.exc.IntegrityError) as refused:
        connection.exec_driver_sql(CHOSEN_INSTANTS[constraint].format(instant))

    assert isinstance(refused.value.orig, psycopg.errors.CheckViolation)
    assert refused.value.orig.diag.constraint_name == constraint


@pytest.mark.parametrize("function", ["charge_opens", "charge_ends"])
@pytest.mark.parametrize("role", ["kino_product", "kino_worker"])
def test_nobody_borrows_the_triggers(database: Database, role: str, function: str) -> None:
    """On a table of the caller's own the trigger would write open_charge with the owner's rights: it is refused."""
    database.execute("postgres", f"GRANT TEMPORARY ON DATABASE {database.name} TO PUBLIC")

    refused = database.refusal(
        role,
        "CREATE TEMP TABLE mine (charge_id bigint, account_id text, deadline_at timestamptz, credits bigint)",
        "CREATE TRIGGER t AFTER INSERT ON mine REFERENCING NEW TABLE AS new_rows"
        f" FOR EACH STATEMENT EXECUTE FUNCTION kino.{function}()",
    )

    assert refused == INSUFFICIENT_PRIVILEGE


def test_a_temporary_table_of_that_name_is_not_written(scene: Scene) -> None:
    """A session with a table `open_charge` of its own opens charges in the ledger's."""
    scene.grant("acct-1")
    with scene.product.begin() as connection:
        connection.exec_driver_sql("CREATE TEMP TABLE open_charge (LIKE kino.open_charge)")
        open_charges(connection, [ChargeRequest("job-1", "acct-1", 4, NOW + HOUR)])

    assert open_jobs(scene) == [("job-1", "acct-1", 4)]


# --- integrity


DAMAGE = {
    "DELETE FROM kino.open_charge": ("charge 1 is open, and nothing looks for its end: it has no row in open_charge"),
    "UPDATE kino.open_charge SET deadline_at = deadline_at + interval '1 year'": (
        "charge 1 and its row in open_charge differ"
    ),
    "UPDATE kino.open_charge SET credits = 1": "charge 1 and its row in open_charge differ",
    "INSERT INTO kino.open_charge VALUES (99, 'acct-1', now(), 1)": (
        "charge 99 has a row in open_charge and does not exist"
    ),
    "INSERT INTO kino.open_charge SELECT charge_id, account_id, deadline_at, credits FROM kino.charge"
    " WHERE job_id = 'settled'": "charge 2 has a row in open_charge and is settled",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_integrity_compares_what_is_open(scene: Scene, damage: str) -> None:
    """A charge without its row, a row without its charge, and a row that says something else are violations."""
    scene.charged("open")
    scene.charged("settled")
    scene.settle(make_event("timeout", "settled"))

    scene.as_superuser(damage)

    with scene.superuser.begin() as connection:
        assert DAMAGE[damage] in violations(connection)


# --- the migration


@pytest.fixture
def old_database(embedded: Servers) -> Iterator[Database]:
    """A database at the schema of before this table, and an engine of its owner's."""
    name = "t_before_0003"
    embedded.create_database(name)
    database = Database(name, embedded)
    engine = create_engine(database.url("kino_owner"), pooled=False)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS kino")
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    yield database
    with embedded.postgres.connect() as superuser:
        superuser.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_migrating_a_ledger_that_has_rows_finds_what_is_open(old_database: Database) -> None:
    """Charges that were open before, hours behind the old mark too, are open after; settled ones are not."""
    with Scene.of(old_database) as scene:
        scene.as_superuser(
            "INSERT INTO kino.account (account_id) VALUES ('acct-1')",
            "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at, opened_at) VALUES"
            " ('settled', 'acct-1', 0, now(), now()), ('open', 'acct-1', 0, now(), now()),"
            " ('behind the mark', 'acct-1', 0, now(), now() - interval '9 hours')",
            SETTLED_RAW.format("settled"),
            "UPDATE kino.verified_through SET opened_at = now()",
        )

        migrate(old_database.url("kino_owner"))

        assert open_jobs(scene) == [("behind the mark", "acct-1", 0), ("open", "acct-1", 0)]
        scene.settle(make_event("timeout", "behind the mark"), make_event("completed", "open"))
        assert open_jobs(scene) == []


CHARGED_BY_THE_BUILD_OF_BEFORE = (
    "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('{job}', 'acct-1', 1, now())",
    "SELECT status FROM kino.account WHERE account_id = 'acct-1'",
    "SELECT lot_id FROM kino.credit_lot WHERE account_id = 'acct-1' FOR NO KEY UPDATE",
    "UPDATE kino.credit_lot SET remaining = remaining - 1 WHERE account_id = 'acct-1'",
    "INSERT INTO kino.charge_line SELECT charge_id, 1, 1, 1 FROM kino.charge WHERE job_id = '{job}'",
)


def test_a_product_that_charges_meanwhile_loses_nothing(old_database: Database) -> None:
    """While the migration comes, products wait and go on: none ends in a deadlock, and no charge falls between."""
    with Scene.of(old_database) as scene:
        scene.as_superuser(
            "INSERT INTO kino.account (account_id) VALUES ('acct-1')",
            "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)"
            " VALUES ('r', 'acct-1', 'purchased', 1000, 1000)",
        )
        migrated = threading.Event()

        def charge(party: int) -> list[str]:
            jobs: list[str] = []
            while not migrated.is_set() or len(jobs) < 20:
                jobs.append(f"{party}-{len(jobs)}")
                with scene.product.begin() as connection:
                    for statement in CHARGED_BY_THE_BUILD_OF_BEFORE:
                        connection.exec_driver_sql(statement.format(job=jobs[-1]))
            return jobs

        with ThreadPoolExecutor(3) as pool:
            parties = [pool.submit(charge, party) for party in range(3)]
            until(lambda: scene.rows("SELECT count(*) FROM kino.charge")[0][0] >= 10)
            try:
                migrate(old_database.url("kino_owner"), beside_older_builds=True)
            finally:
                migrated.set()
            jobs = [job for party in parties for job in party.result()]

        assert sorted(job for job, *_ in open_jobs(scene)) == sorted(jobs)


def test_a_forgotten_transaction_does_not_stop_the_ledger_for_a_migration(
    old_database: Database, bare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that somebody holds is waited for 30 s and no longer; the error says what to do, nothing has changed."""
    monkeypatch.setattr(migrations, "TABLE_LOCK_TIMEOUT_MS", 200)
    with Scene.of(old_database) as scene, scene.product.begin() as forgotten:
        forgotten.exec_driver_sql("INSERT INTO kino.account (account_id) VALUES ('acct-1')")

        result = bare("migrate", KINO_MIGRATION_DATABASE_URL=old_database.url("kino_owner"))

        assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
        assert "holds a table of the ledger" in result.err
        assert scene.rows("SELECT version_num FROM kino.alembic_version") == [("0002",)]
