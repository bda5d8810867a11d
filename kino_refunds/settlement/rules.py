"""What a settlement goes by beside the events and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kino_refunds.policy.document import published_policy

if TYPE_CHECKING:
    from kino_refunds.policy.document import Policy
    from kino_refunds.settings import Settings


@dataclass(frozen=True, slots=True)
class Rules:
    """The policy that rules on endings, and the build that dead letters name."""

    policy: Policy
    build: str


def rules_of(settings: Settings) -> Rules:
    """Return the rules of this build: the published policy, under the settings' build."""
    return Rules(policy=published_policy(), build=settings.build)
