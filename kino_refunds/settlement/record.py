"""The record: what was said of an event before, and what else waits for its job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

    from kino_refunds.settlement.outcomes import Outcome

Identity = tuple[str, str]
"""(source, event id): what makes two deliveries the same event (P2)."""


class KnownEvent(NamedTuple):
    """What an event said and came to before; `outcome` is None while it is pending."""

    fingerprint: str
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a batch's events: decided for good, or pending. An event can be in both for a moment.

    `read_at` is when it was read, by the ledger's clock: the present time of a batch, without a round trip of its own.
    """

    decided: dict[Identity, KnownEvent]
    pending: dict[Identity, KnownEvent]
    beside: frozenset[Identity]
    """Other pending events of the same jobs, where the job's charge is open: they are decided together."""
    read_at: datetime

    def first(self, identity: Identity) -> KnownEvent | None:
        """Return what counts: the decision if there is one."""
        return self.decided.get(identity) or self.pending.get(identity)

    def is_pending(self, identity: Identity, fingerprint: str) -> bool:
        """Say whether this event, with this content, has a pending row."""
        known = self.pending.get(identity)
        return known is not None and known.fingerprint == fingerprint
