"""Seals: any change of sealed history is found, and its range named; by a login that may only read."""

from __future__ import annotations

import pytest

from tests.clock import MINUTE
from tests.conftest import Database
from tests.integration.reconciliation.sealing import (
    COLUMNS,
    UNBOUND,
    UNWATCHED,
    busy_ledger,
    forge,
    found,
    in_seal,
    seals,
    tamper,
)
from tests.scenario import NOW, Scene


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
