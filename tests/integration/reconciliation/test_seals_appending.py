"""Appending seals: all history is sealed, in one chain, whatever writes or seals at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from kino_refunds.reconciliation.seals import append, append_seal, newest_seal, seal_text
from kino_refunds.reconciliation.seals.contents import read_contents
from tests.clock import MINUTE
from tests.conftest import Database
from tests.integration.reconciliation.sealing import COLUMNS, busy_ledger, digest_again, found, sample, seal_all, seals
from tests.scenario import NOW, Scene


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
