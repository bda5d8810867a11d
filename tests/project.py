"""Where the project stands that the tests are about."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
