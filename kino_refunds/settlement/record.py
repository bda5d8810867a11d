"""The record: what was decided about an event before, and which other events of its job are pending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

    from kino_refunds.settlement.outcomes import Outcome

Identity = tuple[str, str]
"""(source, event id): what makes two deliveries the same event (P2)."""


class KnownEvent(NamedTuple):
    """The content of an event as its fingerprint, and its final outcome; `outcome` is None while it is pending."""

    fingerprint: str
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Record:
    """What is recorded about a batch's events: final outcomes (`decided`) and pending rows; an event can have both.

    `read_at` is the instant of the reading by the ledger's clock: it serves as the present time of the batch, without a
    round trip of its own.
    """

    decided: dict[Identity, KnownEvent]
    pending: dict[Identity, KnownEvent]
    beside: frozenset[Identity]
    """Other pending events of the same jobs, if the job's charge is open: they are decided together."""
    read_at: datetime

    def first(self, identity: Identity) -> KnownEvent | None:
        """Return what is known of an event: its final outcome if it has one, else its pending row, else None."""
        # The final outcome first: it has moved credits, or says why none move. A pending row beside it is out of date.
        return self.decided.get(identity) or self.pending.get(identity)

    def is_pending(self, identity: Identity, fingerprint: str) -> bool:
        """Tell whether this event, with this content, has a pending row."""
        known = self.pending.get(identity)
        return known is not None and known.fingerprint == fingerprint
