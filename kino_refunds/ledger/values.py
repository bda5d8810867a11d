"""The values that the ledger takes and returns (lots, grants, charges, settlements), and the rules of their fields.

The functions in ledger/*.sql check the same rules for every language. They are checked here as well, so that a wrong
value is refused where it was made, before a transaction is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from kino_refunds.events.schema import ID_LENGTH_MAX

if TYPE_CHECKING:
    from datetime import datetime

CREDITS_MAX = 2**53 - 1
"""Exact in every JSON reader, and a thousand such lots still add up within Postgres' bigint."""

LAST_YEAR = 9998
"""East of UTC the end of 9999 is in the year 10000, which neither Python nor many another language can read."""

SUCCESSOR_PREFIX = "successor:"
"""How the reference of a successor lot begins. No grant may use it: it would take the reference that a refund needs,
and the refund would fail."""

PRIORITIES = range(-(2**31), 2**31)
"""The values of Postgres' integer."""


class LotClass(StrEnum):
    """Where a lot's credits came from, in burn order: credits that cost the customer nothing burn first."""

    PROMOTIONAL = "promotional"
    COURTESY = "courtesy"
    SUBSCRIPTION = "subscription"
    PURCHASED = "purchased"
    LIFETIME = "lifetime"


class LotState(StrEnum):
    """What may be done with a lot's credits; where more than one state applies, voided > frozen > expired."""

    ACTIVE = "active"
    FROZEN = "frozen"
    EXPIRED = "expired"
    VOIDED = "voided"


class CauseKind(StrEnum):
    """The kind of act that holds or voids a purchase's lots (design-policy, "Holds and causes")."""

    DISPUTE = "dispute"
    PAYOUT = "payout"
    REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits to give to an account; `reference` makes the grant idempotent.

    `credits` are whole and above zero. Lots with a low `priority` burn first. `expires_at` None: never. Raises
    ValueError for a field that breaks the rules.
    """

    reference: str
    account_id: str
    credits: int
    lot_class: LotClass
    expires_at: datetime | None = None
    priority: int = 100
    purchase_id: str | None = None

    def __post_init__(self) -> None:
        # A class by its plain word is taken too, and a wrong word is refused here: the class decides the burn order.
        object.__setattr__(self, "lot_class", LotClass(self.lot_class))
        require_id("reference", self.reference)
        require_id("account_id", self.account_id)
        if self.reference.startswith(SUCCESSOR_PREFIX):
            raise ValueError(f"references that start with {SUCCESSOR_PREFIX} belong to the ledger")
        if self.purchase_id is not None:
            require_id("purchase_id", self.purchase_id)
        require_credits(self.credits, at_least=1)
        if type(self.priority) is not int or self.priority not in PRIORITIES:
            message = f"priority must be a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}"
            raise ValueError(message)
        if self.expires_at is not None:
            object.__setattr__(self, "expires_at", require_instant("expires_at", self.expires_at))


@dataclass(frozen=True, slots=True)
class Lot:
    """A lot as it is in the database; `granted` and `remaining` are whole credits, `remaining` is what is left."""

    lot_id: int
    reference: str
    account_id: str
    lot_class: LotClass
    granted: int
    remaining: int
    priority: int
    expires_at: datetime | None
    state: LotState


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """A request to charge a job: whole `credits`, zero allowed; `deadline_at` may lie in the past.

    Raises ValueError for a field that breaks the rules.
    """

    job_id: str
    account_id: str
    credits: int
    deadline_at: datetime

    def __post_init__(self) -> None:
        require_id("job_id", self.job_id)
        require_id("account_id", self.account_id)
        require_credits(self.credits, at_least=0)
        object.__setattr__(self, "deadline_at", require_instant("deadline_at", self.deadline_at))


@dataclass(frozen=True, slots=True)
class Charge:
    """A charge that was opened; `lines` are (lot id, whole credits), in the order in which they were drawn."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    deadline_at: datetime
    opened_at: datetime
    lines: list[tuple[int, int]]


class SettlementKind(StrEnum):
    """How a charge ends: its credits are consumed (captured) or returned (refunded)."""

    CAPTURED = "captured"
    REFUNDED = "refunded"


class Settlement(NamedTuple):
    """How to settle one charge, and what that was decided from (P10); lots and amounts are the charge's own."""

    charge_id: int
    kind: SettlementKind
    reason: str
    clause: str
    policy_version: str
    ending: str
    """How the event says that the job ended, in short: `completed`, `failed.provider`."""
    account_status: str
    """The account's status at the event's time (`PastStatus`): clause 6 goes by it."""
    event_source: str
    event_id: str
    event_time: datetime


class Reversal(NamedTuple):
    """Why a captured charge is refunded; `reference` makes the reversal idempotent."""

    charge_id: int
    reason: str
    clause: str
    policy_version: str
    reference: str
    actor: str


def require_id(name: str, value: str) -> None:
    """Raise ValueError unless `value` is an id: 1 to 128 printable characters, no white space at either end.

    `order-1 ` beside `order-1` would be two orders, and one purchase would be credited twice.
    """
    if not 1 <= len(value) <= ID_LENGTH_MAX or not value.isprintable() or value.strip() != value:
        message = f"{name} must be 1 to 128 printable characters, without white space at either end"
        raise ValueError(message)


def require_credits(credits: int, *, at_least: int) -> None:
    """Raise ValueError unless `credits` is a whole number from `at_least` to CREDITS_MAX."""
    # By type and not isinstance: True is an int, and would be charged as one credit.
    if type(credits) is not int or not at_least <= credits <= CREDITS_MAX:
        message = f"credits must be a whole number from {at_least} to {CREDITS_MAX}"
        raise ValueError(message)


def require_instant(name: str, value: datetime) -> datetime:
    """Return `value` in UTC; raise ValueError if it has no offset or, in UTC, lies outside the years 1 to 9998.

    In UTC, because in its own zone an hour that occurs twice equals no instant in another zone (PEP 495), and because
    every language and time zone must be able to read the stored value again.
    """
    if value.utcoffset() is None:
        message = f"{name} must carry an offset"
        raise ValueError(message)
    try:
        in_utc = value.astimezone(UTC)
    except OverflowError:
        in_utc = None
    if in_utc is None or in_utc.year > LAST_YEAR:
        message = f"{name} lies beyond the years 1 to {LAST_YEAR} in UTC"
        raise ValueError(message)
    return in_utc
