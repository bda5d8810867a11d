"""The schedule of Celery beat: what it starts and how often. The row of the slot then decides whether it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kino_refunds.schedule import entries

if TYPE_CHECKING:
    from kino_refunds.settings import Settings


def beat_schedule(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return Celery's beat_schedule; a task that was queued for longer than its period is not started any more."""
    return {
        entry.name: {
            "task": entry.name,
            # Twice in each slot: beat counts from its last tick and drifts, and a slot without a tick would be missed.
            "schedule": entry.every.total_seconds() / 2,
            "options": {"expires": entry.every.total_seconds()},
        }
        for entry in entries(settings)
    }
