"""The catalogue: every way in which a row that means money can be wrong, and which query finds it.

`integrity_catalogue.txt` has a line for each change of each column of the ledger's tables: what was changed, in which
rows, and what finds it. `WRITE_CATALOGUE=1 pytest` of this file writes it anew; what nothing finds needs a reason here.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from kino_refunds.reconciliation.integrity import all_queries, violations
from tests.integration.reconciliation.corruptions import (
    ELSEWHERE,
    ROW_IDS,
    SHAPES,
    changes_of,
    corruptions,
    lift,
    plant,
    tables_and_columns,
)
from tests.ledger_items import Connection

CATALOGUE = Path(__file__).with_name("integrity_catalogue.txt")
NOTHING = "nothing"

GRANTED = "it stands once, as it was granted: only the product's record of the grant says what it was"
SEALED = "its table is sealed: the check `seals` finds it"
JUDGED = "the check `decisions` judges the settlement again by what it stores, and finds it"
PEOPLE = "who did it and why, in words: nothing is computed from it"
TOLD = "this event moved nothing: only the pipeline's own record says that it was ever sent, and what it said"
FREE = "the charge took no credits, so no transfer stands beside it"
CAUSES = "the name of a cause stands once while it voided nothing: only the dispute or request itself says what it was"
RELAYED = "the check `relay` compares it with what the product was told"
UNSEEN: Final[Mapping[str, str]] = {
    r"account_status_change\.(reason|changed_at|xid) .*": SEALED,
    r"(account_status_change|lot_hold|lot_void|transfer)\.(until_)?actor to another .*": PEOPLE,
    r"correction\.(actor|reference) to another .*": PEOPLE,
    r"charge\.job_id to another \| (free, )?open": "the check `matching` compares jobs with the pipeline's own record",
    r"charge\.(account_id|opened_at|xid) .* \| free, .*": FREE,
    r"charge\.deadline_at .* \| (?!open|free, open).*": "nothing is computed from it once the charge is settled",
    r"charge\.xid to null \| .*": SEALED,
    r"correction\.policy_version to another .*": SEALED,
    r"credit_lot\.(reference|priority|purchase_id|expires_at) .* \| granted, .*": GRANTED,
    r"credit_lot\.root_expires_at to null .*": "a successor of an older build has none: its own expiry stands for it",
    r"inbox_event\.fingerprint .*": "only the event itself says it: sent again, it would be a conflict",
    r"inbox_event\..* \| (already_captured|already_refunded|completed_after_refund|failed_after_capture)": TOLD,
    r"lot_change\.from_state to (frozen|expired) \| active to (frozen|voided)": SEALED,
    r"lot_change\.(xid|from_expires_at|to_expires_at) .*": SEALED,
    r"lot_hold\.cause_(id|kind) .*": CAUSES,
    r"relay_cursor\..*": RELAYED,
    r"settlement\.xid .* \| captured by 1": FREE,
    r"settlement\.(clause|policy_version|ending|account_status) .*": JUDGED,
    r"transfer\.xid .* \| (grant|void|unvoid)": SEALED,
}
"""What no query can see from one ledger, and why: patterns of `table.column change | shape of the row`."""


WHICH = "\nUNION ALL\n".join(
    f"SELECT '{query.name}' AS query FROM (\n{query.of_everything}\n) AS found" for query in all_queries()
)


def found_by(superuser: Connection) -> str:
    """The names of the queries that find something."""
    names = {name for (name,) in superuser.execute(WHICH.encode(), prepare=True)}
    return " ".join(sorted(names)) or NOTHING


def judge(superuser: Connection, table: str) -> list[str]:
    """Make every change of a table, one at a time; a line for each says who finds it, in rows of which shapes."""
    shapes: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for corruption in corruptions(superuser, table, tables_and_columns(superuser)[table]):
        with superuser.transaction(force_rollback=True):
            changed, refused = plant(superuser, corruption)
            found = f"refused by {refused}" if refused else found_by(superuser) if changed else None
            while refused and lift(superuser, table, refused):
                changed, refused = plant(superuser, corruption)
                if changed:
                    found = f"{found}, in an old row {found_by(superuser)}"
        if found is not None:
            shapes[corruption.column, corruption.change][found].append(corruption.shape)
    return [
        f"{table}.{column} {change} | {'; '.join(each)} | {found}"
        for (column, change), by_found in shapes.items()
        for found, each in by_found.items()
    ]


def test_the_ledger_is_in_order(eventful: Connection) -> None:
    """What the catalogue corrupts is a ledger in which every kind of act has happened, and nothing is wrong."""
    assert violations(eventful) == []


@pytest.mark.slow
@pytest.mark.parametrize("table", SHAPES)
def test_every_corruption_is_found_by_what_the_catalogue_says(eventful: Connection, table: str) -> None:
    """Each column of each table that means money, changed in each way: the catalogue says who finds it, or nothing."""
    lines = judge(eventful, table)

    known = CATALOGUE.read_text(encoding="utf-8").splitlines() if CATALOGUE.exists() else []
    if os.environ.get("WRITE_CATALOGUE"):
        known = sorted([line for line in known if not line.startswith(f"{table}.")] + lines)
        CATALOGUE.write_text("\n".join(known) + "\n", encoding="utf-8")
    assert sorted(lines) == sorted(line for line in known if line.startswith(f"{table}."))


def test_what_nothing_finds_is_named_with_its_reason() -> None:
    """No corruption is beyond every query without a reason, and no reason outlives what it excuses."""
    unseen = [
        f"{what} | {shape}"
        for what, shapes, found in (line.split(" | ") for line in CATALOGUE.read_text(encoding="utf-8").splitlines())
        if found.split()[-1] == NOTHING
        for shape in shapes.split("; ")
    ]

    matched = {pattern: [each for each in unseen if re.fullmatch(pattern, each)] for pattern in UNSEEN}
    assert [each for each in unseen if not any(each in found for found in matched.values())] == []
    assert [pattern for pattern, found in matched.items() if not found] == []


def test_every_query_finds_a_corruption() -> None:
    """A query that finds nothing must be able to find something."""
    found = set(re.findall(r"\w+", CATALOGUE.read_text(encoding="utf-8")))

    assert [query.name for query in all_queries() if query.name not in found] == []


def test_every_table_and_column_that_means_money_is_in_the_catalogue(eventful: Connection) -> None:
    """A table or column that a migration adds is not left out in silence: how it can be wrong must be said."""
    tables = tables_and_columns(eventful)

    assert tables.keys() == SHAPES.keys() | ELSEWHERE.keys()
    assert [
        f"{table}.{column}"
        for table in SHAPES
        for column, of_type in tables[table].items()
        if changes_of(table, column, of_type) is None
    ] == []
    assert {column for table in SHAPES for column in tables[table]} >= set(ROW_IDS)
