"""One clock decides: the host's is read in few places, each of which decides nothing (design, first page)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import ROOT

HOST_CLOCK = {
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "localtime"),
    ("time", "gmtime"),
    ("time", "clock_gettime"),
}
SQL_CLOCK = re.compile(
    r"\b(clock_timestamp|now|statement_timestamp|transaction_timestamp|timeofday)\s*\(\s*\)"
    r"|\b(CURRENT_TIMESTAMP|CURRENT_DATE|CURRENT_TIME|LOCALTIMESTAMP|LOCALTIME)\b"
)

DECIDES_NOTHING = {
    "kino_refunds/cli/trace.py": "places a trace in the past, in scratch servers",
    "kino_refunds/cli/status_screen.py": "when the screen said that a server is away, which then cannot be asked",
    "kino_refunds/db/clock.py": "the definition of kino.clock()",
    "kino_refunds/db/migrations/versions/0003_one_clock.py": "the same",
    "kino_refunds/demo/run.py": "the demo is the pipeline and the product: it writes their times",
    "kino_refunds/demo/traffic.py": "the same",
    "kino_refunds/demo/stage.py": "the pipeline's own table has the pipeline's clock",
    "kino_refunds/doctor/on_postgres.py": "is compared with the servers' clocks, to be found wrong",
    "kino_refunds/doctor/on_redis.py": "the same",
    "kino_refunds/reconciliation/clocks.py": "is compared with the servers' clocks, to withhold what cannot be undone",
    "kino_refunds/reconciliation/contract.py": "an adopter runs it, without a ledger: no promise may lie in the future",
    "kino_refunds/intake/heartbeat.py": "is compared with Postgres', for a warning",
}
"""Where the host's clock or a bare SQL clock may stand, and why that decides nothing."""


def host_clocks(tree: ast.AST) -> Iterator[int]:
    """Lines that read the host's wall clock, by its usual names or under another name."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in HOST_CLOCK:
                yield node.lineno
            case ast.Attribute(value=ast.Attribute(attr=module), attr=name) if (module, name) in HOST_CLOCK:
                yield node.lineno
            case ast.ImportFrom(module="time", names=names) if {n.name for n in names} & {"time", "time_ns"}:
                yield node.lineno


def sql_clocks(tree: ast.AST) -> Iterator[int]:
    """Lines with a string that asks Postgres for another clock than `kino.clock()`; docstrings are prose."""
    prose = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in prose:
            continue
        if SQL_CLOCK.search(node.value):
            yield node.lineno


def sources() -> list[Path]:
    files = [*ROOT.glob("kino_refunds/**/*.py"), *ROOT.glob("workers/*.py"), *ROOT.glob("deploy/*.py")]
    # The migrations before the clock are history; those after it are looked at.
    return sorted(file for file in files if not re.search(r"versions/000[12]_", str(file)))


def test_the_hosts_clock_decides_nothing() -> None:
    """A new use of another clock than `kino.clock()` is named, unless the list says why it decides nothing."""
    found = {
        f"{name}:{line}"
        for file in sources()
        for name in [str(file.relative_to(ROOT))]
        if name not in DECIDES_NOTHING
        for tree in [ast.parse(file.read_text(encoding="utf-8"))]
        for line in [*host_clocks(tree), *sql_clocks(tree)]
    }

    assert found == set()


TRANSACTION = re.compile(r"\b(pg_current_xact_id|pg_snapshot_xmin|pg_current_snapshot|txid_\w+)\b")


def test_order_comes_by_two_functions_only() -> None:
    """A transaction's number is `kino.this_transaction()` and a horizon `kino.horizon()`, wherever one is asked for."""
    defined = ROOT / "kino_refunds/db/migrations/versions/0003_one_clock.py"
    # It asks which number comes next, to find one that has not been, and orders nothing by it.
    upcoming = ROOT / "kino_refunds/reconciliation/integrity/ledger.sql"
    files = [file for file in [*sources(), *ROOT.glob("kino_refunds/**/*.sql")] if file not in {defined, upcoming}]

    found = [str(file.relative_to(ROOT)) for file in files if TRANSACTION.search(file.read_text(encoding="utf-8"))]

    assert TRANSACTION.search(defined.read_text(encoding="utf-8"))
    assert found == []


def test_sql_files_ask_no_other_clock() -> None:
    """What stands in a file of SQL goes by the same clock."""
    files = [*ROOT.glob("kino_refunds/**/*.sql")]
    found = [str(file.relative_to(ROOT)) for file in files if SQL_CLOCK.search(file.read_text(encoding="utf-8"))]

    assert files
    assert found == []


def test_the_list_has_no_leftovers() -> None:
    """A file that stands in the list reads such a clock still."""
    trees = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in DECIDES_NOTHING}

    assert [name for name, tree in trees.items() if not [*host_clocks(tree), *sql_clocks(tree)]] == []


@pytest.mark.parametrize(
    "source",
    [
        "datetime.now(UTC)",
        "dt.datetime.now()",
        "import time\ntime.time()",
        "from time import time_ns",
        "date.today()",
        "sa.text('SELECT now()')",
        "sa.text('... < CURRENT_TIMESTAMP')",
        'f"SELECT clock_timestamp() {x}"',
    ],
)
def test_each_way_to_another_clock_is_seen(source: str) -> None:
    """The search itself can find something."""
    tree = ast.parse(source)

    assert [*host_clocks(tree), *sql_clocks(tree)] != []
