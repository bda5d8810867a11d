"""What lies in deploy/."""

from __future__ import annotations

from tests.project import ROOT

DEPLOY = ROOT / "deploy"
RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text(encoding="utf-8")
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
USERS = ("publisher", "worker", "product", "readonly", "scaler", "admin")
RELAY_QUEUE = "kino.credits-refunded"


def password(user: str) -> str:
    return f"{user}-password"
