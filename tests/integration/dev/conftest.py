"""Folders in which servers run as somebody else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import processes_of
from tests.scenario import until


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter: pytest closes its own to `nobody`, as whom Postgres runs under root."""
    folder = Path(tempfile.mkdtemp(prefix="kino-test-"))
    folder.chmod(0o711)
    yield folder
    # The guards of an owner that was killed may still be at work.
    until(lambda: not processes_of(folder))
    shutil.rmtree(folder)
