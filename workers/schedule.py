"""What Celery beat starts, and how often. A sweep that is missed is made up by the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kino_refunds.settings import Settings


def beat_schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return Celery's beat_schedule; a task that waited for longer than its period is not worth starting."""
    every_s = {"kino.sweep_retries": settings.retry_every_s, "kino.expire_lots": settings.expiry_every_s}
    return {
        name: {"task": name, "schedule": period_s, "options": {"expires": period_s}}
        for name, period_s in every_s.items()
    }
