"""Programs in Node, with the packages that the pages' examples import."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = ("pg@8.23.x", "redis@6.3.x")
DEADLINE_S = 15.0
"""A program that has not ended by then waits for a lock without an end; where it does not wait it takes a second."""
NPM_DEADLINE_S = 60.0
NPM_INSTALL = "npm install --no-package-lock --no-audit --no-fund --ignore-scripts --prefer-offline --fetch-retries=0"
NPM_AWAY = ("EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT")
"""What npm says where it has no network, by its own codes."""


def install_packages(folder: Path) -> None:
    """Install the packages for programs in `folder` and below; skips the test where they cannot be had."""
    if missing := [name for name in ("node", "npm") if shutil.which(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not found: apt-get install nodejs npm")
    try:
        installed = subprocess.run(
            [*NPM_INSTALL.split(), *PACKAGES],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=NPM_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm gave no answer: the npm registry must be reachable, for {' and '.join(PACKAGES)}")
    if installed.returncode and any(code in installed.stderr for code in NPM_AWAY):
        pytest.skip(f"npm has no network: the npm registry must be reachable, for {' and '.join(PACKAGES)}")
    assert installed.returncode == 0, installed.stderr


def run_node(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; of the environment it has PATH and what is given."""
    return subprocess.run(
        ["node", str(program), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
