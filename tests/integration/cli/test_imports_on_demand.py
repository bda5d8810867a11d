"""A command loads what it runs with: help, completion and usage errors load neither servers' libraries nor rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kino_refunds.settings import PREFIX
from tests.conftest import Database
from tests.scenario import Scene

HEAVY = {"sqlalchemy", "psycopg", "alembic", "redis", "celery", "kombu", "httpx", "pydantic_settings", "structlog"}
PROGRAM = """
import sys
from kino_refunds.__main__ import main
sys.argv[0] = "kino-refunds"
try:
    main()
finally:
    sys.stderr.write("\\nloaded: " + " ".join(sys.modules))
"""


def loaded(*arguments: str, **environment: str) -> set[str]:
    """The modules that a command has loaded when it ends."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=outside | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stderr.rpartition("\nloaded: ")[2].split())


COMPLETING = {"_KINO_REFUNDS_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "kino-refunds dead"}
SET = {"KINO_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "KINO_REDIS_URL": "redis://127.0.0.1:1/0"}


@pytest.mark.parametrize(
    ("arguments", "environment", "also_without"),
    [
        (["--help"], {}, {"pydantic", "rich"}),
        (["breaks", "--help"], {}, {"pydantic", "rich"}),
        (["dead-letters", "list", "--help"], {}, {"pydantic", "rich"}),
        (["accounts", "grant", "--help"], {}, {"pydantic", "rich"}),
        ([], COMPLETING, {"pydantic", "rich"}),
        ([], COMPLETING | {"COMP_WORDS": "kino-refunds breaks list --st", "COMP_CWORD": "3"}, set()),
        (["nonsense"], {}, {"pydantic"}),
        (["dead-letters", "nonsense"], {}, {"pydantic"}),
        (["status", "--nonsense"], {}, {"pydantic"}),
        # Where a command's own values are read, typer loads pydantic.
        (["why"], {}, set()),
        (["accounts", "grant", "acme", "5"], {}, set()),
        (["intake", "pause", "--yes"], {}, set()),
        (["charges", "list", "--limit", "x"], {}, set()),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_help_completion_and_usage_errors_load_little(
    arguments: list[str], environment: dict[str, str], also_without: set[str]
) -> None:
    """Who asks how a command is typed does not wait for what it would run with."""
    names = loaded(*arguments, **SET, **environment)

    assert "typer" in names
    assert names & (HEAVY | also_without) == set()
    assert {name for name in names if name.startswith("kino_refunds.") and name.count(".") == 1} <= {
        "kino_refunds.__main__",
        "kino_refunds.cli",
        "kino_refunds.errors",
    }


@pytest.mark.parametrize(
    ("command", "also_without"),
    [
        ("status --json", {"rich", "structlog", "alembic", "httpx"}),
        ("status", {"alembic", "httpx"}),
        ("accounts show acme --json", {"redis", "rich", "structlog", "alembic", "httpx"}),
        ("accounts statement acme", {"redis", "structlog", "alembic", "httpx"}),
        ("breaks list", {"redis", "structlog", "alembic", "httpx"}),
        ("charges list", {"redis", "structlog", "alembic", "httpx"}),
        ("dead-letters list", {"alembic", "httpx"}),
        ("intake status", {"alembic", "httpx"}),
        ("retries list", {"alembic", "httpx"}),
        ("schedule", {"alembic", "httpx"}),
        ("why job-1", {"redis", "structlog", "alembic", "httpx"}),
        ("doctor", set()),
    ],
)
def test_reading_command_loads_neither_workers_nor_what_is_for_development(
    database: Database, scene: Scene, redis_url: str, command: str, also_without: set[str]
) -> None:
    """On-call waits for Postgres and not for the libraries of a worker or of the demo."""
    scene.grant("acme")
    scene.open("job-1", "acme", 5)

    names = loaded(*command.split(), KINO_DATABASE_URL=database.url(), KINO_REDIS_URL=redis_url)

    assert "sqlalchemy" in names
    assert names & ({"celery", "billiard", "kombu", "kino_refunds.dev", "kino_refunds.demo"} | also_without) == set()
