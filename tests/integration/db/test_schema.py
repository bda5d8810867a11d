"""What the schema itself promises: facts that nobody changes, roles that cannot do more than their work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import current_revision, head_revision, migrate
from tests.conftest import INSUFFICIENT_PRIVILEGE, Database
from tests.faults.oracle import BOOKS

FACTS = {
    "account_status_change": "reason",
    "charge": "credits",
    "charge_line": "credits",
    "settlement": "kind",
    "correction": "reason",
    "transfer": "credits",
    "inbox_event": "outcome",
}
"""Each fact table with a column that somebody might want to mend."""

RESTRICT_VIOLATION = "23001"
CHECK_VIOLATION = "23514"
UNIQUE_VIOLATION = "23505"

ROWS = """
    INSERT INTO kino.account (account_id) VALUES ('a');
    INSERT INTO kino.account_status_change (account_id, from_status, to_status, reason, actor)
        VALUES ('a', 'active', 'active', 'r', 'x');
    INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining) VALUES ('l', 'a', 'courtesy', 9, 9);
    INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('j', 'a', 1, now());
    INSERT INTO kino.charge_line VALUES (1, 1, 1, 1);
    INSERT INTO kino.settlement (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
        VALUES (1, 'captured', 'completed', '1', 'v', 's', 'e', now());
    INSERT INTO kino.correction (charge_id, reason, clause, policy_version, actor, reference)
        VALUES (1, 'generation_failure', '2.failure', 'v', 'x', 't');
    INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, actor)
        VALUES ('grant', 'issued', 'wallet', 'a', 1, 9, 'x');
    INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)
        VALUES ('s', 'e', 'j', 'f', 'captured', now());
"""


@pytest.fixture
def filled(database: Database) -> Database:
    """A database with one row in every fact table."""
    database.execute("postgres", ROWS)
    return database


@pytest.fixture
def reader(database: Database) -> Iterator[sa.Connection]:
    """A connection as kino_read."""
    with database.connect("kino_read") as connection:
        yield connection


@pytest.mark.parametrize("role", ["kino_owner", "postgres"])
def test_facts_are_not_changed_once_written(filled: Database, role: str) -> None:
    """Nobody updates, deletes or empties a table of facts, its owner and the superuser included."""
    tries = {
        statement
        for table, column in FACTS.items()
        for statement in (
            f"UPDATE kino.{table} SET {column} = {column}",
            f"DELETE FROM kino.{table}",
            f"TRUNCATE kino.{table}",
        )
    }

    found = {statement: filled.refusal(role, statement) for statement in sorted(tries)}

    assert found == dict.fromkeys(tries, RESTRICT_VIOLATION)


def test_an_upsert_does_not_change_a_fact(filled: Database) -> None:
    """A settlement that is inserted again cannot update the first one by way of ON CONFLICT."""
    statement = """
        INSERT INTO kino.settlement
            (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
        VALUES (1, 'refunded', 'timeout', '2.timeout', 'v', 's', 'e', now())
        ON CONFLICT (charge_id) DO UPDATE SET kind = excluded.kind
    """

    found = filled.refusal("kino_owner", statement)

    assert found == RESTRICT_VIOLATION


def test_emptying_the_accounts_does_not_empty_their_history(filled: Database) -> None:
    """A cascade does not reach a table of facts either."""
    found = filled.refusal("kino_owner", "TRUNCATE kino.account CASCADE")

    assert found == RESTRICT_VIOLATION


INSERTS = {
    "charge": "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('k', 'a', 0, now())",
    "charge_line": "INSERT INTO kino.charge_line VALUES (1, 2, 1, 1)",
    "settlement": "INSERT INTO kino.settlement"
    " (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)"
    " VALUES (2, 'captured', 'completed', '1', 'v', 's', 'f', now())",
    "correction": "INSERT INTO kino.correction (charge_id, reason, clause, policy_version, actor, reference)"
    " VALUES (2, 'generation_failure', '2.failure', 'v', 'x', 't')",
    "inbox_event": "INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)"
    " VALUES ('s', 'f', 'j', 'f', 'captured', now())",
    "pending_event": "INSERT INTO kino.pending_event"
    " (source, event_id, job_id, fingerprint, event, queue, outcome, next_attempt_at)"
    " VALUES ('s', 'f', 'j', 'f', '{}', 'q', 'busy', now())",
    "dead_letter": "INSERT INTO kino.dead_letter (message_key, raw, queue, reason, detail, group_fingerprint, build)"
    " VALUES ('k', 'r', 'q', 'bad_json', 'd', 'g', 'b')",
    "break": "INSERT INTO kino.break (kind, job_id, credits, detail) VALUES ('k', 'j', 1, 'd')",
    "account_status_change": "INSERT INTO kino.account_status_change"
    " (account_id, from_status, to_status, reason, actor) VALUES ('a', 'active', 'suspended', 'r', 'x')",
    "account": "INSERT INTO kino.account (account_id) VALUES ('b')",
    "credit_lot": "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)"
    " VALUES ('m', 'a', 'courtesy', 1, 1)",
    "transfer": "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, actor)"
    " VALUES ('grant', 'issued', 'wallet', 'a', 1, 1, 'x')",
}

UPDATES = {
    "account": "UPDATE kino.account SET status = 'suspended'",
    "lot_remaining": "UPDATE kino.credit_lot SET remaining = 1",
    "lot_state": "UPDATE kino.credit_lot SET state = 'voided'",
    "lot_granted": "UPDATE kino.credit_lot SET granted = 99",
    "lot_account": "UPDATE kino.credit_lot SET account_id = 'b'",
    "verified_through": "UPDATE kino.verified_through SET opened_at = now()",
    "intake_state": "UPDATE kino.intake_state SET paused = true",
    "dead_letter": "UPDATE kino.dead_letter SET status = 'discarded'",
}

DELETES = {
    table: f"DELETE FROM kino.{table}"
    for table in (*FACTS, "account", "credit_lot", "dead_letter", "break", "pending_event", "verified_through")
}

MAY = {
    "kino_worker": {
        *(f"insert {table}" for table in ("inbox_event", "pending_event", "dead_letter", "break")),
        *(f"update {what}" for what in ("verified_through", "intake_state", "dead_letter")),
        "delete pending_event",
    },
    "kino_product": set[str](),
    "kino_oncall": set[str](),
    "kino_read": set[str](),
}
"""What each role may write, of all that is tried below: the ledger's tables are written by its functions alone."""


@pytest.mark.parametrize("role", MAY)
def test_a_role_writes_what_its_work_needs_and_nothing_else(filled: Database, role: str) -> None:
    """Inbox, pending, letters and breaks are the worker's own; nobody else writes a table, and nobody the ledger's."""
    tries = {
        **{f"insert {table}": statement for table, statement in INSERTS.items()},
        **{f"update {what}": statement for what, statement in UPDATES.items()},
        **{f"delete {table}": statement for table, statement in DELETES.items()},
    }

    found = {what: filled.refusal(role, statement) for what, statement in tries.items()}

    assert found == {what: None if what in MAY[role] else INSUFFICIENT_PRIVILEGE for what in tries}


@pytest.mark.parametrize("role", MAY)
def test_no_role_that_runs_owns_anything(filled: Database, role: str) -> None:
    """Tables are made, emptied and dropped by the owner's role alone, which nothing that runs uses."""
    tries = ("CREATE TABLE kino.x ()", "TRUNCATE kino.transfer", "DROP TABLE kino.transfer")

    found = [filled.refusal(role, statement) for statement in tries]

    assert found == [INSUFFICIENT_PRIVILEGE] * len(tries)


def test_raw_messages_are_read_by_the_worker_alone(filled: Database) -> None:
    """Raw messages may hold what a customer wrote, so reports and the product cannot read them."""
    tries = [(role, table) for role in ("kino_product", "kino_read") for table in ("dead_letter", "pending_event")]

    found = [filled.refusal(role, f"SELECT FROM kino.{table}") for role, table in tries]

    assert found == [INSUFFICIENT_PRIVILEGE] * len(tries)


def test_every_role_reads_the_views(filled: Database) -> None:
    """The read interface is open to every role."""
    tries = [(role, view) for role in MAY for view in ("charge_status", "account_balance")]

    found = [filled.refusal(role, f"SELECT FROM kino.{view}") for role, view in tries]

    assert found == [None] * len(tries)


def test_a_transfer_moves_between_the_books_of_its_kind_only(database: Database) -> None:
    """Of all kinds and pairs of books, the eight that the ledger knows are accepted and no other."""
    statement = """
        DO $$
        BEGIN
            INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits, actor)
            SELECT kind, give, take, 'a', 1, CASE WHEN kind NOT IN ('grant', 'unvoid') THEN 1 END, 1, 'x'
            FROM (VALUES ('{}', '{}', '{}')) AS v (kind, give, take);
        EXCEPTION WHEN check_violation THEN NULL;
        END $$
    """
    books = sorted({book for route in BOOKS.values() for book in route})

    everything = [statement.format(k, give, take) for k in (*BOOKS, "gift") for give in books for take in books]
    database.execute("postgres", ";".join(everything))

    with database.connect("kino_read") as connection:
        rows = connection.exec_driver_sql("SELECT kind, from_book, to_book FROM kino.transfer ORDER BY transfer_id")
        assert [tuple(row) for row in rows] == [(kind, *route) for kind, route in BOOKS.items()]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE kino.credit_lot SET remaining = granted + 1",
        "UPDATE kino.credit_lot SET remaining = -1",
        "UPDATE kino.credit_lot SET granted = 0, remaining = 0",
        "UPDATE kino.credit_lot SET class = 'gift'",
        "UPDATE kino.credit_lot SET state = 'lost'",
        "UPDATE kino.credit_lot SET extended_from = now()",
        "UPDATE kino.account SET status = 'closed'",
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('k', 'a', -1, now())",
        "INSERT INTO kino.charge_line VALUES (1, 2, 1, 0)",
        INSERTS["transfer"].replace("1, 1,", "1, 0,"),
        INSERTS["settlement"].replace("captured", "lost"),
        INSERTS["settlement"].replace("completed", "whim"),
        INSERTS["settlement"].replace("'1'", "'7'"),
    ],
)
def test_the_schema_refuses_what_cannot_be(filled: Database, statement: str) -> None:
    """No program, ours or another, writes a number or a word that the ledger does not know."""
    found = filled.refusal("postgres", statement)

    assert found == CHECK_VIOLATION


@pytest.mark.parametrize(
    "statement",
    [
        INSERTS["settlement"].replace("(2,", "(1,"),
        INSERTS["correction"].replace("(2,", "(1,"),
        INSERTS["charge"].replace("'k'", "'j'"),
        INSERTS["credit_lot"].replace("'m'", "'l'"),
        INSERTS["inbox_event"].replace("('s', 'f'", "('s', 'e'"),
    ],
)
def test_what_happens_once_is_a_key(filled: Database, statement: str) -> None:
    """A charge is settled and corrected once, a job charged once, a lot granted once, an event decided once."""
    found = filled.refusal("postgres", statement)

    assert found == UNIQUE_VIOLATION


def columns(connection: sa.Connection, view: str) -> list[tuple[str, str]]:
    rows = connection.execute(
        sa.text(
            "SELECT column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = 'kino' AND table_name = :view ORDER BY ordinal_position"
        ),
        {"view": view},
    )
    return [(row.column_name, row.data_type) for row in rows]


def test_the_views_have_the_columns_that_others_rely_on(reader: sa.Connection) -> None:
    """The read interface keeps its names, its types and their order."""
    found = {view: columns(reader, view) for view in ("charge_status", "account_balance")}

    assert found == {
        "charge_status": [
            ("job_id", "text"),
            ("account_id", "text"),
            ("credits", "bigint"),
            ("refunded", "bigint"),
            ("status", "text"),
            ("reason", "text"),
            ("clause", "text"),
            ("policy_version", "text"),
            ("settled_at", "timestamp with time zone"),
        ],
        "account_balance": [("account_id", "text"), ("available", "bigint"), ("held", "bigint")],
    }


def test_charge_status_says_how_each_charge_stands(database: Database, reader: sa.Connection) -> None:
    """A charge is open, captured or refunded, and one that was corrected counts as refunded."""
    settled = "now(), 'v', 's'"
    database.execute(
        "postgres",
        f"""
        INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)
        SELECT job_id, 'a', 7, now() FROM unnest(ARRAY['open', 'captured', 'refunded', 'corrected']) AS j (job_id);
        INSERT INTO kino.settlement
            (charge_id, kind, reason, clause, event_time, policy_version, event_source, event_id)
        VALUES (2, 'captured', 'completed', '1', {settled}, 'e2'),
               (3, 'refunded', 'timeout', '2.timeout', {settled}, 'e3'),
               (4, 'captured', 'not_covered', '2.failure', {settled}, 'e4');
        INSERT INTO kino.correction (charge_id, reason, clause, policy_version, actor, reference)
        VALUES (4, 'generation_failure', '2.failure', 'w', 'x', 't');
        """,
    )

    rows = reader.exec_driver_sql(
        "SELECT job_id, account_id, credits, refunded, status, reason, clause, policy_version,"
        " settled_at IS NOT NULL FROM kino.charge_status ORDER BY job_id"
    )

    assert [tuple(row) for row in rows] == [
        ("captured", "a", 7, 0, "captured", "completed", "1", "v", True),
        ("corrected", "a", 7, 7, "refunded", "generation_failure", "2.failure", "w", True),
        ("open", "a", 7, 0, "open", None, None, None, False),
        ("refunded", "a", 7, 7, "refunded", "timeout", "2.timeout", "v", True),
    ]


def test_account_balance_counts_what_can_be_spent_and_what_is_held(database: Database, reader: sa.Connection) -> None:
    """Only active, unexpired lots are available, only open charges are held, and an empty account has zero."""
    database.execute(
        "postgres",
        """
        INSERT INTO kino.account (account_id) VALUES ('a'), ('b');
        INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, expires_at, state)
        VALUES ('1', 'a', 'courtesy', 9, 1, NULL, 'active'),
               ('2', 'a', 'courtesy', 9, 2, now() + interval '1 day', 'active'),
               ('3', 'a', 'courtesy', 9, 4, now(), 'active'),
               ('4', 'a', 'courtesy', 9, 8, NULL, 'frozen');
        INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)
        VALUES ('i', 'a', 16, now()), ('j', 'a', 32, now()), ('k', 'a', 64, now());
        INSERT INTO kino.settlement
            (charge_id, kind, reason, clause, event_time, policy_version, event_source, event_id)
        VALUES (2, 'captured', 'completed', '1', now(), 'v', 's', 'e');
        INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)
        SELECT charge_id, account_id, deadline_at, credits FROM kino.charge WHERE charge_id <> 2;
        """,
    )

    rows = reader.exec_driver_sql("SELECT * FROM kino.account_balance ORDER BY account_id")

    assert [tuple(row) for row in rows] == [("a", 3, 80), ("b", 0, 0)]


def test_migrating_again_changes_nothing(database: Database) -> None:
    """A database that is at this build's schema stays as it is, rows included."""
    database.execute("postgres", ROWS)

    found = migrate(database.url("kino_owner"))

    engine = create_engine(database.url("kino_owner"), pooled=False)
    with engine.connect() as connection:
        assert found == (head_revision(), head_revision())
        assert current_revision(connection) == head_revision()
        assert connection.exec_driver_sql("SELECT count(*) FROM kino.charge").scalar_one() == 1
