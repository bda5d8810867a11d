"""Seals: any change of sealed history is found, and its range named; by a login that may only read."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import BadCopy
from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.runs import run_check
from kino_refunds.reconciliation.seals import (
    CopyState,
    again,
    append,
    append_seal,
    check,
    compare_with_copy,
    newest_seal,
    pages,
    seal_text,
    verify,
)
from kino_refunds.reconciliation.seals.contents import Range, read_contents, session
from kino_refunds.reconciliation.seals.format import FORMATS, NEWEST_FORMAT, ROWS, instant_sql
from kino_refunds.reconciliation.windows import Wanted
from tests.clock import MINUTE
from tests.conftest import Database
from tests.integration.reconciliation.checking import bench, numbers, statuses
from tests.integration.reconciliation.checking import live as live_breaks
from tests.integration.reconciliation.sealing import (
    COLUMNS,
    a_scope,
    busy_ledger,
    digest_again,
    found,
    live,
    sample,
    seal_all,
    seals,
)
from tests.scenario import NOW, Scene

UNBOUND = """
    DO $$ DECLARE each record; BEGIN
        FOR each IN SELECT conrelid::regclass AS on_table, conname FROM pg_constraint
                    WHERE connamespace = 'kino'::regnamespace AND contype IN ('c', 'f') LOOP
            EXECUTE 'ALTER TABLE ' || each.on_table || ' DROP CONSTRAINT ' || each.conname;
        END LOOP;
        FOR each IN SELECT attrelid::regclass AS on_table, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
                    WHERE c.relnamespace = 'kino'::regnamespace AND attidentity <> ''
                      AND c.relname NOT IN ('check_run', 'break') LOOP
            EXECUTE 'ALTER TABLE ' || each.on_table || ' ALTER COLUMN ' || each.attname || ' DROP IDENTITY';
        END LOOP;
    END $$
"""
"""Drops every rule of the tables but their keys: what a superuser may do."""
UNWATCHED = "SET LOCAL session_replication_role = replica"


@pytest.fixture
def three_seals(scene: Scene, database: Database) -> Scene:
    """A ledger with three seals, each with rows in every table; nothing is broken."""
    for n in range(3):
        busy_ledger(scene, f"acme-{n}")
        seal_all(scene, NOW + n * MINUTE)
    assert [row.rows > 0 for row in seals(scene)] == [True] * 3
    assert found(database) == {}
    return scene


def tamper(scene: Scene, *statements: str) -> None:
    scene.as_superuser(UNBOUND, UNWATCHED, *statements)


def in_seal(scene: Scene, table: str, seal_id: int) -> Any:
    """A row of a table that a seal covers, and its key as a condition."""
    xid, source = (
        ("c.xid", f"kino.{table} t JOIN kino.charge c USING (charge_id)")
        if table == "charge_line"
        else ("t.xid", f"kino.{table} t")
    )
    (row, *_) = scene.rows(
        f"SELECT t.* FROM {source} JOIN kino.seal s ON {xid} >= s.from_xid AND {xid} < s.to_xid"
        f" WHERE s.seal_id = {seal_id} ORDER BY 1 LIMIT 1"
    )
    return row


class TestWhatIsFound:
    @pytest.mark.parametrize("table", COLUMNS)
    def test_a_change_of_any_column_is_found(self, three_seals: Scene, database: Database, table: str) -> None:
        """Another value in one column of one row breaks the seal of its range, and no other; the range is named."""
        scene = three_seals
        key = COLUMNS[table].split()[0]
        where = f"{key} = {in_seal(scene, table, 2)[0]}"
        types = dict(
            map(
                tuple,
                scene.rows(
                    f"SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
                    f" WHERE attrelid = 'kino.{table}'::regclass AND attnum > 0 AND NOT attisdropped"
                ),
            )
        )
        second = seals(scene)[1]
        named = {}
        scene.as_superuser(UNBOUND)
        scene.as_superuser(f"CREATE TABLE public.kept AS SELECT * FROM kino.{table} WHERE {where}")
        for column, kind in types.items():
            other = {
                "timestamp with time zone": f"coalesce({column} + interval '1 microsecond', kino.clock())",
                "text": f"coalesce({column} || ' ', '')",
                "xid8": "CAST('3' AS xid8)",
            }.get(kind, f"coalesce({column} + 4000, 1)")
            scene.as_superuser(UNWATCHED, f"UPDATE kino.{table} SET {column} = {other} WHERE {where}")
            breaks = found(database)
            named[column] = {
                subject: f"transactions {second.low} to before {second.high} (from {NOW:%Y-%m-%d %H:%M:%S}Z to "
                f"{NOW + MINUTE:%Y-%m-%d %H:%M:%S}Z)" in each.detail
                for subject, each in breaks.items()
                # A row that was moved into another range breaks the seal of that one, too.
                if not (column in {"xid", "charge_id"} and subject == "seal:1")
            }
            scene.as_superuser(
                UNWATCHED,
                f"DELETE FROM kino.{table} WHERE ctid = (SELECT max(ctid) FROM kino.{table})",
                f"INSERT INTO kino.{table} OVERRIDING SYSTEM VALUE SELECT * FROM public.kept",
            )
            assert found(database) == {}, column

        assert set(named) == set(COLUMNS[table].split())
        assert named == {column: {"seal:2": True} for column in named}

    @pytest.mark.parametrize("table", COLUMNS)
    def test_a_row_that_was_deleted_or_added_is_found(self, three_seals: Scene, database: Database, table: str) -> None:
        """A row less or a row more in a sealed range breaks its seal."""
        key = COLUMNS[table].split()[0]
        row = in_seal(three_seals, table, 2)
        copy = ", ".join(
            {"charge_id": "charge_id + 5000", "job_id": "'other'"}.get(column, column)
            if table in {"charge", "settlement", "correction"}
            else {key: f"{key} + 5000", "charge_id": "charge_id", "seq": "seq + 1"}.get(column, column)
            if table != "charge_line"
            else {"seq": "CAST(seq + 1 AS smallint)"}.get(column, column)
            for column in COLUMNS[table].split()
        )
        names = COLUMNS[table].replace(" ", ", ")
        tamper(
            three_seals,
            f"INSERT INTO kino.{table} ({names}) OVERRIDING SYSTEM VALUE"
            f" SELECT {copy} FROM kino.{table} WHERE {key} = {row[0]} LIMIT 1",
        )
        added = found(database)
        tamper(three_seals, f"DELETE FROM kino.{table} WHERE {key} = {row[0]}")
        deleted = found(database)

        assert (set(added), set(deleted)) == ({"seal:2"}, {"seal:2"})

    @pytest.mark.parametrize(
        "instant", ["infinity", "-infinity", "294276-12-31 23:59:59+00", "4713-01-01 00:00:00+00 BC"]
    )
    def test_an_instant_that_no_program_writes_is_a_change_like_another(
        self, three_seals: Scene, database: Database, instant: str
    ) -> None:
        """Times that Python cannot represent end no verification with an error."""
        row = in_seal(three_seals, "transfer", 2)
        tamper(
            three_seals,
            f"UPDATE kino.transfer SET created_at = '{instant}' WHERE transfer_id = {row[0]}",
            f"UPDATE kino.seal SET as_of = '{instant}' WHERE seal_id = 3",
        )

        assert set(found(database)) == {"seal:2", "seal:3"}

    @pytest.mark.parametrize(
        ("column", "other"),
        [
            ("format", "format + 1"),
            ("from_xid", "CAST('1' AS xid8)"),
            ("to_xid", "CAST('18446744073709551615' AS xid8)"),
            ("previous_to_xid", "NULL"),
            ("as_of", "as_of + interval '1 microsecond'"),
            ("rows", "rows + 1"),
            ("credits", "credits + 1"),
            ("credits", "'NaN'"),
            ("credits", "credits + 0.5"),
            ("previous_digest", "sha256('x')"),
            ("digest", "sha256('x')"),
            ("sealed_at", "sealed_at - interval '1 microsecond'"),
            ("seal_id", "7000000000"),
        ],
    )
    def test_a_seal_that_was_changed_is_found(
        self, three_seals: Scene, database: Database, column: str, other: str
    ) -> None:
        """Each column of a seal is part of what it proves; a full run and an incremental one both find it."""
        columns = three_seals.rows(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'kino.seal'::regclass AND attnum > 0"
        )
        tamper(three_seals, f"UPDATE kino.seal SET {column} = {other} WHERE seal_id = 2")

        expected = {"seal:2", "seal:4", "seal:7000000000"} if column == "seal_id" else {"seal:2"}
        assert column in {name for (name,) in columns}
        assert set(found(database)) == expected

    def test_seals_that_are_missing_are_found(self, three_seals: Scene, database: Database) -> None:
        """A deleted seal leaves a hole that is named, with the transactions that it sealed."""
        first, second, third = seals(three_seals)
        tamper(three_seals, "DELETE FROM kino.seal WHERE seal_id < 3")

        (missing,) = found(database).values()

        assert missing.subject == "seal:1"
        assert missing.detail.startswith(f"seals 1 to 2 are missing: transactions 0 to before {third.low} ")
        assert (first.low, first.high, second.high) == (0, second.low, third.low)

    def test_a_seal_that_was_forged_with_its_rows_is_found_by_the_next(
        self, three_seals: Scene, database: Database
    ) -> None:
        """Who changes rows and seals them anew breaks the chain, at that seal."""
        row = in_seal(three_seals, "transfer", 2)
        tamper(three_seals, f"UPDATE kino.transfer SET actor = 'me' WHERE transfer_id = {row[0]}")
        forge(three_seals, database, 2)

        (broken,) = found(database).values()

        assert broken.subject == "seal:2"
        assert broken.detail.startswith("seal 2 was written anew: seal 3 continues one with digest ")

    def test_what_no_seal_covers_is_not_found(self, three_seals: Scene, database: Database) -> None:
        """Rows without a number are of before, and rows behind the newest seal are not sealed yet."""
        busy_ledger(three_seals, "late")
        tamper(
            three_seals,
            "UPDATE kino.charge SET credits = credits + 1 WHERE account_id = 'late'",
            "INSERT INTO kino.charge (charge_id, job_id, account_id, credits, deadline_at, xid)"
            " VALUES (5000, 'before', 'late', 1, kino.clock(), NULL)",
        )

        assert found(database) == {}

    def test_the_credits_at_stake_are_the_difference(self, three_seals: Scene, database: Database) -> None:
        """A break says by how many credits the range's transfers differ, and how many rows of each table there are."""
        row = in_seal(three_seals, "transfer", 2)
        tamper(three_seals, f"UPDATE kino.transfer SET credits = credits + 7 WHERE transfer_id = {row[0]}")

        (broken,) = found(database).values()

        assert (broken.credits, broken.job_id, broken.happened_at) == (7, None, None)
        second = seals(three_seals)[1]
        assert (
            f"it seals {second.rows} rows of {second.credits} credits, there are {second.rows} rows of "
            f"{second.credits + 7} credits (transfer " in broken.detail
        )


def forge(scene: Scene, database: Database, seal_id: int) -> None:
    """Give a seal the digest of what its range has now."""
    stored = seals(scene)[seal_id - 1]
    tamper(
        scene,
        f"UPDATE kino.seal SET digest = decode('{digest_again(database, stored)}', 'hex') WHERE seal_id = {seal_id}",
    )


class TestFormat:
    def test_another_program_computes_the_same_digests(self, three_seals: Scene, database: Database) -> None:
        """The format is what the page says: these digests are made by other statements, in another language's way."""
        stored = seals(three_seals)

        assert [digest_again(database, each) for each in stored] == [bytes(each.digest).hex() for each in stored]
        assert [bytes(each.previous_digest) for each in stored] == [bytes(32), *(bytes(s.digest) for s in stored[:2])]

    @pytest.mark.parametrize(
        ("instant", "text"),
        [
            ("infinity", "infinity"),
            ("-infinity", "-infinity"),
            ("1970-01-01 00:00:00.000001+00", "1"),
            ("1969-12-31 23:59:59.999999+00", "-1"),
            ("294276-12-31 00:00:00+00", "9224317929600000000"),
        ],
    )
    def test_every_instant_of_the_database_has_a_text(self, connection: sa.Connection, instant: str, text: str) -> None:
        """Microseconds are exact, a bigint is not too small for them, and the two infinities are words."""
        wanted = instant_sql(f"CAST('{instant}' AS timestamptz)")

        assert connection.execute(sa.text(f"SELECT {wanted.replace(':', chr(92) + ':')}")).scalar_one() == text

    def test_every_column_of_a_sealed_table_is_sealed(self, scene: Scene) -> None:
        """A migration that adds a column to one of these tables adds a format."""
        formats = {table.name: {c.partition(":")[0] for c in table.columns.split()} for table in FORMATS[NEWEST_FORMAT]}
        rows = scene.rows(
            "SELECT CAST(attrelid AS regclass)::text, attname FROM pg_attribute"
            " WHERE attnum > 0 AND NOT attisdropped AND attrelid = ANY(CAST(:tables AS regclass[]))",
            tables=[f"kino.{table}" for table in COLUMNS],
        )
        columns: dict[str, set[str]] = {}
        for table, column in rows:
            columns.setdefault(table.removeprefix("kino."), set()).add(column)

        assert formats == columns == {table: set(names.split()) for table, names in COLUMNS.items()}

    def test_format_1_is_never_changed(self) -> None:
        """What is sealed can be verified for as long as the ledger lives; what must differ is format 2."""
        (first, *_) = [FORMATS[1]]

        assert [(table.name, " ".join(c.partition(":")[0] for c in table.columns.split())) for table in first] == [
            *COLUMNS.items()
        ]

    def test_a_format_of_a_newer_build_is_not_comparable(self, three_seals: Scene, database: Database) -> None:
        """While two builds run, the older one leaves out the newest seals; one among older seals was changed."""
        tamper(three_seals, "UPDATE kino.seal SET format = 2 WHERE seal_id = 3")
        (page,) = pages(a_scope(three_seals.worker, full=True), {})
        tamper(three_seals, "UPDATE kino.seal SET format = 2 WHERE seal_id = 1")

        assert (page.compared, page.broken, dict(page.not_comparable)) == (2, 0, {check.NOT_KNOWN: 1})
        assert set(found(database)) == {"seal:1"}
        assert again(a_scope(three_seals.worker), [live("seal:3")]) == {}

    def test_ranges_are_reached_by_the_number_of_their_transactions(self, scene: Scene) -> None:
        """No table is read whole for a seal: the large ones by blocks, the small ones by key, lines by their charge."""
        bound = Range(100, 200).bound
        plans = {}
        with session(scene.worker) as connection:
            for name, statement in ROWS[1].items():
                plan = connection.execute(sa.text(f"EXPLAIN {statement.text}"), bound).scalars().all()
                plans[name] = "\n".join(plan)

        used = {name: f"{'charge' if name == 'charge_line' else name}_xid" in plan for name, plan in plans.items()}
        assert used == dict.fromkeys(COLUMNS, True)
        assert "charge_line_pkey" in plans["charge_line"]
        assert not [name for name, plan in plans.items() if "Seq Scan" in plan]


class TestAppending:
    def test_seals_follow_each_other(self, three_seals: Scene) -> None:
        """Each begins where the one before ended, and says until when everything is sealed."""
        stored = seals(three_seals)

        assert [each.seal_id for each in stored] == [1, 2, 3]
        assert [each.low for each in stored] == [0, stored[0].high, stored[1].high]
        assert [each.as_of for each in stored] == [NOW, NOW + MINUTE, NOW + 2 * MINUTE]
        transfers = three_seals.rows("SELECT count(*), sum(credits) FROM kino.transfer")[0]
        tables = sum(three_seals.rows(f"SELECT count(*) FROM kino.{table}")[0][0] for table in COLUMNS)
        assert (sum(each.rows for each in stored), sum(each.credits for each in stored)) == (tables, transfers[1])

    def test_nothing_new_makes_no_seal(self, three_seals: Scene) -> None:
        """Without a newer sample nothing is known to be closed; with one, also nothing is sealed as nothing."""
        busy_ledger(three_seals, "late")
        none = append_seal(three_seals.worker)
        with_rows = seal_all(three_seals)
        without = seal_all(three_seals)

        assert none is None
        assert (with_rows.seal_id, without.seal_id, without.rows) == (4, 5, 0)

    def test_a_ledger_without_samples_has_no_seal(self, scene: Scene) -> None:
        """What no sample stands for cannot be said to be closed."""
        busy_ledger(scene)

        assert append_seal(scene.worker) is None
        with scene.worker.begin() as connection:
            assert newest_seal(connection) is None

    def test_the_newest_sample_is_the_one_with_the_highest_number(self, scene: Scene) -> None:
        """Numbers are compared as numbers: 100 is newer than 99."""
        scene.as_superuser("INSERT INTO kino.xid_clock (xid) VALUES ('9'), ('99'), ('100')")

        seal = append_seal(scene.worker)

        assert seal is not None
        assert (seal.from_xid, seal.to_xid) == (0, 100)

    @pytest.mark.parametrize("rows_max", [1, 3, 10, 1_000])
    def test_a_long_range_is_sealed_in_parts(self, scene: Scene, database: Database, rows_max: int) -> None:
        """A first range of any size takes a bounded time a seal; only one transaction's rows stay together."""
        for n in range(5):
            busy_ledger(scene, f"acme-{n}")
        last = seal_all(scene, NOW, rows_max=rows_max)

        stored = seals(scene)
        assert [each.low for each in stored] == [0, *(each.high for each in stored[:-1])]
        assert {each.as_of for each in stored} == {NOW}
        assert found(database) == {}
        counted = {
            each.seal_id: scene.rows(
                " UNION ALL ".join(
                    f"SELECT xid, count(*) AS rows FROM kino.{table} WHERE xid >= CAST('{each.low}' AS xid8)"
                    f" AND xid < CAST('{each.high}' AS xid8) GROUP BY xid"
                    for table in COLUMNS
                    if table != "charge_line"
                )
            )
            for each in stored
        }
        for rows in counted.values():
            assert sum(row.rows for row in rows) <= rows_max or len({row.xid for row in rows}) == 1
        assert (len(stored) == 1) == (rows_max == 1_000)
        assert last.seal_id == len(stored)

    def test_what_an_open_transaction_writes_is_sealed_later(self, scene: Scene, database: Database) -> None:
        """Nothing is sealed past a transaction that is still open; its rows are in a later seal, whole."""
        busy_ledger(scene)
        first = seal_all(scene)
        with scene.product.begin() as slow:
            slow.exec_driver_sql("SELECT kino.this_transaction()")
            busy_ledger(scene, "other")
            sample(scene)
            held_back = append_seal(scene.worker)
            from kino_refunds.ledger import Grant, LotClass, grant_lots  # noqa: PLC0415

            grant_lots(slow, [Grant("slow", "slow", 5, LotClass.COURTESY)])
        later = seal_all(scene)

        assert held_back is None or held_back.from_xid == first.to_xid
        (xid,) = scene.rows("SELECT CAST(CAST(xid AS text) AS bigint) FROM kino.transfer WHERE account_id = 'slow'")[0]
        assert xid >= first.to_xid
        assert later.to_xid > xid
        assert found(database) == {}
        # Its rows stand behind those of later transactions on disk, and before them in the seal.
        stored = seals(scene)
        assert [digest_again(database, each) for each in stored] == [bytes(each.digest).hex() for each in stored]

    def test_a_sealing_that_is_killed_costs_nothing(
        self, scene: Scene, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing of it remains, no lock either, and the next one writes the seal."""
        busy_ledger(scene)
        sample(scene)

        def killed(connection: sa.Connection, *arguments: Any) -> Any:
            contents = read_contents(connection, *arguments)
            scene.as_superuser(
                "SELECT pg_terminate_backend("
                f"{connection.exec_driver_sql('SELECT pg_backend_pid()').scalar_one()}, 10000)"
            )
            return contents

        with monkeypatch.context() as patch:
            patch.setattr(append, "read_contents", killed)
            with pytest.raises(sa.exc.OperationalError):
                append_seal(scene.worker)
        after = seals(scene)
        scene.worker.dispose()
        seal = seal_all(scene)

        assert after == []
        assert seal.seal_id in {1, 2}
        assert found(database) == {}

    def test_two_at_once_make_one_chain(self, scene: Scene, database: Database) -> None:
        """Whoever does not get the lock leaves; no range is sealed twice and none is left out."""
        for n in range(6):
            busy_ledger(scene, f"acme-{n}")
            sample(scene)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(12):
                    append_seal(scene.worker, rows_max=6)
            except BaseException as error:  # noqa: BLE001 - told below
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seal_all(scene, rows_max=6)

        stored = seals(scene)
        assert failed == []
        assert [each.seal_id for each in stored] == list(range(1, len(stored) + 1))
        assert [each.low for each in stored] == [0, *(each.high for each in stored[:-1])]
        assert found(database) == {}

    def test_a_seal_is_logged_so_that_a_copy_stands_elsewhere(self, scene: Scene) -> None:
        """The line has the text that `compare_with_copy` reads, and says what it is for."""
        busy_ledger(scene)
        with capture_logs() as logged:
            seal = seal_all(scene)

        line = logged[-1]
        assert line["event"] == "the ledger's history is sealed: keep this seal outside of the database"
        assert (line["seal"], line["rows"]) == (seal_text(seal), seal.rows)

    def test_no_login_may_change_a_seal(self, database: Database) -> None:
        """A worker may append; nobody who logs in may change or delete."""
        for role in ("kino_worker", "kino_oncall", "kino_product", "kino_read"):
            assert database.refusal(role, "UPDATE kino.seal SET rows = 0") == "42501"
            assert database.refusal(role, "DELETE FROM kino.seal") == "42501"
        assert database.refusal("kino_owner", "DELETE FROM kino.seal") == "23001"


class TestCheck:
    def test_an_incremental_run_appends_and_verifies_the_newest(self, three_seals: Scene) -> None:
        """What was sealed before the run is verified; what it seals itself it has just computed."""
        busy_ledger(three_seals, "late")
        through = sample(three_seals)
        run: list[Any] = []
        while not (stored := seals(three_seals)) or stored[-1].high != through:
            run = list(pages(a_scope(three_seals.worker), {}))

        assert [(page.compared, page.broken) for page in run][-1] == (1, 0)
        assert run[-1].detail["newest_seal"] == f"{stored[-1].seal_id}:{bytes(stored[-1].digest).hex()}"
        assert run[-1].detail["sealed_through"] == stored[-1].as_of.isoformat()

    @pytest.mark.parametrize("what", ["digest = sha256('x')", "rows = rows + 1, digest = sha256('x')"])
    def test_an_incremental_run_finds_a_broken_chain_anywhere(self, three_seals: Scene, what: str) -> None:
        """The chain of all seals is looked at in each run, for a fraction of what the rows cost."""
        tamper(three_seals, f"UPDATE kino.seal SET {what} WHERE seal_id = 1")

        run = list(pages(a_scope(three_seals.worker), {}))

        assert {each.subject for page in run for each in page.breaks} == {"seal:1"}
        assert sum(page.broken for page in run) == 1

    def test_an_incremental_run_finds_a_missing_seal(self, three_seals: Scene) -> None:
        """A hole in the numbers is a break of each run until it is closed."""
        tamper(three_seals, "DELETE FROM kino.seal WHERE seal_id = 2")

        run = list(pages(a_scope(three_seals.worker), {}))

        assert {each.subject for page in run for each in page.breaks} == {"seal:2"}

    @pytest.mark.parametrize("full", [True, False])
    def test_a_run_goes_on_where_it_was_killed(
        self, three_seals: Scene, monkeypatch: pytest.MonkeyPatch, full: bool
    ) -> None:
        """Each page's cursor, as JSON, leads to the same findings, wherever the run ended."""
        for module in (check, verify):
            monkeypatch.setattr(module, "SEALS_A_PAGE", 1)
        tamper(
            three_seals,
            "UPDATE kino.transfer SET credits = credits + 1",
            "UPDATE kino.seal SET digest = sha256('x') WHERE seal_id = 1",
        )
        scope = a_scope(three_seals.worker, full=full)
        whole = list(pages(scope, {}))

        for stop in range(1, len(whole)):
            cursor = json.loads(json.dumps(dict(whole[stop - 1].cursor)))
            rest = list(pages(scope, cursor))
            assert [(page.cursor, page.compared, page.breaks) for page in rest] == [
                (page.cursor, page.compared, page.breaks) for page in whole[stop:]
            ]
        assert list(pages(scope, json.loads(json.dumps(dict(whole[-1].cursor))))) == []
        assert {each.subject for page in whole for each in page.breaks} == {"seal:1", "seal:2", "seal:3"} - (
            set() if full else {"seal:none"}
        )

    def test_a_full_run_needs_no_right_but_to_read(self, three_seals: Scene, database: Database) -> None:
        """It appends nothing, also where there is something to seal."""
        sample(three_seals)
        reader = create_engine(database.url("kino_read"), pooled=False)

        (page,) = pages(a_scope(reader, full=True), {})

        assert (page.compared, page.broken, page.detail["rows"]) == (3, 0, sum(s.rows for s in seals(three_seals)))
        assert len(seals(three_seals)) == 3

    def test_a_dry_run_verifies_and_appends_nothing(self, three_seals: Scene, database: Database) -> None:
        """What a dry run finds it finds by reading alone."""
        sample(three_seals)
        tamper(three_seals, "UPDATE kino.charge SET credits = credits + 1")
        reader = create_engine(database.url("kino_read"), pooled=False)

        run = list(pages(a_scope(reader, dry_run=True), {}))

        assert [each.subject for page in run for each in page.breaks] == ["seal:3"]
        assert len(seals(three_seals)) == 3

    def test_a_full_run_over_nothing_compares_nothing(self, scene: Scene) -> None:
        """A ledger that has no seal yet is no break."""
        run = list(pages(a_scope(scene.worker, full=True), {}))

        assert [(page.compared, page.broken) for page in run] == [(0, 0)]

    def test_a_break_is_looked_at_again(self, three_seals: Scene) -> None:
        """While the row differs the break is as it was found; when it is as it was sealed there is none."""
        row = in_seal(three_seals, "transfer", 2)
        scope = a_scope(three_seals.worker)
        tamper(three_seals, f"UPDATE kino.transfer SET credits = credits + 1 WHERE transfer_id = {row[0]}")
        (first,) = (each for page in pages(a_scope(three_seals.worker, full=True), {}) for each in page.breaks)
        still = again(scope, [live("seal:2", 5), live("seal:1", 6), live("seal:99", 7), live("lot:1", 8)])
        tamper(three_seals, f"UPDATE kino.transfer SET credits = credits - 1 WHERE transfer_id = {row[0]}")
        mended = again(scope, [live("seal:2", 5)])

        assert still == {5: first, 6: None}
        assert mended == {5: None}

    def test_missing_and_forged_seals_are_looked_at_again(self, three_seals: Scene, database: Database) -> None:
        """The seal behind a hole tells of it, and the next seal tells of one that was written anew."""
        tamper(three_seals, "UPDATE kino.transfer SET actor = 'me'")
        forge(three_seals, database, 2)
        forged = again(a_scope(three_seals.worker), [live("seal:2")])
        tamper(
            three_seals, "UPDATE kino.seal SET seal_id = 9 WHERE seal_id = 3", "DELETE FROM kino.seal WHERE seal_id = 2"
        )
        missing = again(a_scope(three_seals.worker), [live("seal:2")])

        assert getattr(forged[1], "detail", "").startswith("seal 2 was written anew: seal 3 continues one with digest ")
        assert getattr(missing[1], "detail", "").startswith("seals 2 to 8 are missing")


class TestRuns:
    def test_a_break_lives_until_history_is_as_it_was(self, three_seals: Scene) -> None:
        """A full run opens it, an ordinary one keeps it, and closes it when the row is as it was sealed."""
        row = in_seal(three_seals, "transfer", 2)
        works = bench(three_seals)
        tamper(three_seals, f"UPDATE kino.transfer SET credits = credits + 3 WHERE transfer_id = {row[0]}")
        found_it = run_check(check_named("seals"), works, Wanted(full=True))
        opened = live_breaks(three_seals)
        ordinary = run_check(check_named("seals"), works)
        kept = live_breaks(three_seals)
        tamper(three_seals, f"UPDATE kino.transfer SET credits = credits - 3 WHERE transfer_id = {row[0]}")
        run_check(check_named("seals"), works)

        assert (numbers(found_it), found_it.is_complete) == ((3, 2, 1, 0), True)
        assert opened == kept == [("history_changed", "seal:2", 3)]
        assert (numbers(ordinary)[2:], ordinary.is_complete) == ((0, 0), True)
        assert statuses(three_seals) == [("history_changed", "closed")]

    def test_a_dry_run_writes_nothing(self, three_seals: Scene) -> None:
        """Neither a seal nor a break nor a run."""
        sample(three_seals)
        tamper(three_seals, "UPDATE kino.charge SET credits = credits + 1")
        before = three_seals.everything()

        found_it = run_check(check_named("seals"), bench(three_seals), dry_run=True)

        assert [each.subject for each in found_it.found] == ["seal:3"]
        assert three_seals.everything() == before


class TestCopy:
    def test_a_copy_of_the_newest_seal_proves_the_history(self, three_seals: Scene, database: Database) -> None:
        """A text that was kept outside is compared, and every row up to it is read; as a login that may only read."""
        with three_seals.worker.begin() as connection:
            newest = newest_seal(connection)
        assert newest is not None
        parts: list[Any] = []
        reader = create_engine(database.url("kino_read"), pooled=False)

        same = compare_with_copy(reader, f" {seal_text(newest).upper()}\n", progress=parts.append)

        assert same.is_same
        assert [(seal.seal_id, seal.state) for seal in same.seals] == [(3, CopyState.SAME)]
        assert (same.verified, len(parts)) == (3, 1)

    def test_a_chain_that_was_forged_whole_is_found_by_a_copy_only(
        self, three_seals: Scene, database: Database, tmp_path: Path
    ) -> None:
        """A superuser who seals everything anew deceives the ledger, and not the line in yesterday's log."""
        stored = seals(three_seals)
        log = tmp_path / "worker.log"
        log.write_text(
            "".join(
                json.dumps({"event": "sealed", "seal": f"{s.seal_id}:{bytes(s.digest).hex()}"}) + "\n" for s in stored
            ),
            encoding="utf-8",
        )
        before = compare_with_copy(three_seals.worker, str(log))
        tamper(
            three_seals,
            f"UPDATE kino.transfer SET credits = 1 WHERE transfer_id = {in_seal(three_seals, 'transfer', 2)[0]}",
        )
        total = three_seals.rows(
            "SELECT sum(credits) FROM kino.transfer WHERE xid >= CAST(:low AS xid8) AND xid < CAST(:high AS xid8)",
            low=str(stored[1].low),
            high=str(stored[1].high),
        )
        tamper(three_seals, f"UPDATE kino.seal SET credits = {total[0][0]} WHERE seal_id = 2")
        forge(three_seals, database, 2)
        tamper(
            three_seals,
            "UPDATE kino.seal SET previous_digest = (SELECT digest FROM kino.seal WHERE seal_id = 2) WHERE seal_id = 3",
        )
        forge(three_seals, database, 3)
        after = compare_with_copy(three_seals.worker, str(log))

        assert before.is_same
        assert found(database) == {}
        assert [seal.state for seal in after.seals] == [
            CopyState.SAME, CopyState.OTHER_DIGEST, CopyState.OTHER_DIGEST,
        ]  # fmt: skip
        assert not after.is_same

    def test_a_copy_of_a_seal_that_is_gone_is_no_match(self, three_seals: Scene) -> None:
        """Seals that were deleted from the end leave no hole; the copy names them."""
        with three_seals.worker.begin() as connection:
            newest = newest_seal(connection)
        assert newest is not None
        tamper(three_seals, "DELETE FROM kino.seal WHERE seal_id = 3")

        gone = compare_with_copy(three_seals.worker, seal_text(newest))

        assert ([seal.state for seal in gone.seals], gone.is_same) == ([CopyState.MISSING], False)

    def test_a_copy_beside_changed_rows_is_no_match(self, three_seals: Scene) -> None:
        """The same digest is not enough: the rows behind it are read."""
        with three_seals.worker.begin() as connection:
            newest = newest_seal(connection)
        assert newest is not None
        tamper(three_seals, "UPDATE kino.charge SET deadline_at = deadline_at + interval '1 s'")

        changed = compare_with_copy(three_seals.worker, seal_text(newest))

        assert [seal.state for seal in changed.seals] == [CopyState.SAME]
        assert [each.subject for each in changed.breaks] == ["seal:1", "seal:2", "seal:3"]
        assert not changed.is_same

    def test_a_copy_that_names_no_seal_is_refused(self, scene: Scene, tmp_path: Path) -> None:
        """A wrong file or a digest that was cut off is never taken for a proof."""
        file = tmp_path / "seals"
        file.write_text("3:abcd\n", encoding="utf-8")

        with pytest.raises(BadCopy, match="names no seal"):
            compare_with_copy(scene.worker, str(file))
        with pytest.raises(FileNotFoundError):
            compare_with_copy(scene.worker, "3:abcd")
