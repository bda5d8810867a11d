"""The check `seals`: what a run appends, verifies and looks at again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kino_refunds.db.engine import create_engine
from kino_refunds.reconciliation.checks import check_named
from kino_refunds.reconciliation.runs import run_check
from kino_refunds.reconciliation.seals import again, check, pages, verify
from kino_refunds.reconciliation.windows import Wanted
from tests.conftest import Database
from tests.integration.reconciliation.checking import bench, numbers, statuses
from tests.integration.reconciliation.checking import live as live_breaks
from tests.integration.reconciliation.sealing import a_scope, busy_ledger, forge, in_seal, live, sample, seals, tamper
from tests.scenario import Scene


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
