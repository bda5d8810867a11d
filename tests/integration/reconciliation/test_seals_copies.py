"""A copy of a seal outside of the database: it finds what a superuser changed and sealed anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import BadCopy
from kino_refunds.reconciliation.seals import CopyState, compare_with_copy, newest_seal, seal_text
from tests.conftest import Database
from tests.integration.reconciliation.sealing import forge, found, in_seal, seals, tamper
from tests.scenario import Scene


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
