"""Each new migration is rendered to SQL and read by squawk; those of before 0007 are exempt (they have run)."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script

from kino_refunds.db.migrate import migrations
from tests.project import ROOT

SQUAWK = shutil.which("squawk", path=str(Path(sys.executable).parent)) or "squawk"
EXEMPT_THROUGH = 6


def lint(sql: str) -> list[str]:
    """Say what squawk finds in a migration, a line each."""
    command = [SQUAWK, "--config", str(ROOT / ".squawk.toml"), "--reporter", "gcc", "--stdin-filepath", "migration.sql"]
    found = subprocess.run(command, input=sql, capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode in (0, 1), found.stderr
    return [line for line in found.stdout.splitlines() if line.startswith("migration.sql:")]


def rendered(script: Script) -> str:
    """Write the SQL of a migration without running it."""
    buffer = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": buffer, "version_table_schema": "kino"}
    )
    with Operations.context(context):
        script.module.upgrade()
    return buffer.getvalue()


def test_new_migrations_lock_no_table_for_long_and_break_no_older_build() -> None:
    """Squawk finds nothing in any migration that is newer than the exempt ones."""
    scripts = list(migrations().walk_revisions())
    assert len(scripts) >= EXEMPT_THROUGH

    found = {each.revision: lint(rendered(each)) for each in scripts if int(each.revision) > EXEMPT_THROUGH}

    assert not any(found.values()), found


def test_a_migration_that_breaks_an_older_build_is_named() -> None:
    """A required column without a default, a changed type and a renamed column are each found."""
    found = lint(
        "ALTER TABLE kino.charge ADD COLUMN note text NOT NULL;\n"
        "ALTER TABLE kino.charge ALTER COLUMN credits TYPE integer;\n"
        "ALTER TABLE kino.charge RENAME COLUMN credits TO amount;\n"
    )

    rules = {line.split()[2] for line in found}
    assert {"adding-required-field", "changing-column-type", "renaming-column"} <= rules, found
