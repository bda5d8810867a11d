"""The rules of a settlement: all that it depends on beside the events and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kino_refunds.policy.document import published_policy

if TYPE_CHECKING:
    from kino_refunds.policy.document import Policy
    from kino_refunds.settings import Settings


@dataclass(frozen=True, slots=True)
class Rules:
    """The policy that says which endings are refunded, and the name of the build, which dead letters carry."""

    policy: Policy
    build: str


def rules_of(settings: Settings) -> Rules:
    """Return the rules of this build: its published policy, and the build's name from the settings."""
    return Rules(policy=published_policy(), build=settings.build)
