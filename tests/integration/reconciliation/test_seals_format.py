"""The format of seals: what is sealed, and the digests that another program computes too."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from kino_refunds.reconciliation.seals import again, check, pages
from kino_refunds.reconciliation.seals.contents import Range, session
from kino_refunds.reconciliation.seals.format import FORMATS, NEWEST_FORMAT, ROWS, instant_sql
from tests.conftest import Database
from tests.integration.reconciliation.sealing import COLUMNS, a_scope, digest_again, found, live, seals, tamper
from tests.scenario import Scene


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
