"""Lots: a grant and what is left of it; how they are granted, locked, expired, frozen and voided."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.errors import GrantConflict
from kino_refunds.events.schema import ID_LENGTH_MAX
from kino_refunds.ledger.callers import instant_or_none, microseconds, savepoint
from kino_refunds.ledger.transfers import Transfer, TransferKind, post_transfers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import datetime, timedelta

CREDITS_MAX = 2**53 - 1
"""Exact in every JSON reader, and a thousand such lots still add up within Postgres' bigint."""

SUCCESSOR_PREFIX = "successor:"
"""Begins the reference of a lot that took what another could not: nobody's grant may stand in its way."""

PRIORITIES = range(-(2**31), 2**31)
"""Postgres' integer."""


class LotClass(StrEnum):
    """Where a lot's credits came from, in burn order: what cost the customer nothing burns first."""

    PROMOTIONAL = "promotional"
    COURTESY = "courtesy"
    SUBSCRIPTION = "subscription"
    PURCHASED = "purchased"
    LIFETIME = "lifetime"


class LotState(StrEnum):
    """What may happen to a lot; where more than one holds, voided > frozen > expired."""

    ACTIVE = "active"
    FROZEN = "frozen"
    EXPIRED = "expired"
    VOIDED = "voided"


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits to be given; `reference` makes giving them idempotent.

    `credits` are whole and above zero. `priority` burns low numbers first. Raises ValueError where a
    field cannot be.
    """

    reference: str
    account_id: str
    credits: int
    lot_class: LotClass
    expires_at: datetime | None = None
    priority: int = 100
    purchase_id: str | None = None

    def __post_init__(self) -> None:
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
    """A lot as it stands in the database; `remaining` is what can still be drawn, in credits."""

    lot_id: int
    reference: str
    account_id: str
    lot_class: LotClass
    granted: int
    remaining: int
    priority: int
    expires_at: datetime | None
    state: LotState


def require_id(name: str, value: str) -> None:
    """Raise ValueError unless `value` is 1 to 128 printable characters without white space at its ends, as ids are.

    `order-1 ` beside `order-1` would be two orders, and credit one purchase twice.
    """
    if not 1 <= len(value) <= ID_LENGTH_MAX or not value.isprintable() or value.strip() != value:
        message = f"{name} must be 1 to 128 printable characters, without white space at either end"
        raise ValueError(message)


def require_credits(credits: int, *, at_least: int) -> None:
    """Raise ValueError unless `credits` is a whole number that the ledger can hold."""
    if type(credits) is not int or not at_least <= credits <= CREDITS_MAX:
        message = f"credits must be a whole number from {at_least} to {CREDITS_MAX}"
        raise ValueError(message)


def require_instant(name: str, value: datetime) -> datetime:
    """Return `value` in UTC; raise ValueError if it has no offset, or lies beyond the calendar there.

    In UTC, because in its own zone an hour that comes twice equals no instant anywhere else (PEP 495),
    and because what is stored must be readable again: Postgres' years go on after 9999, Python's do not.
    """
    if value.utcoffset() is None:
        message = f"{name} must carry an offset"
        raise ValueError(message)
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        message = f"{name} lies beyond the years 1 to 9999 in UTC"
        raise ValueError(message) from error


_LOT_COLUMNS = (
    "lot_id, reference, account_id, class, granted, remaining, priority, state,"
    f" {microseconds('expires_at')} AS expires_us"
)


def _lot(row: Any) -> Lot:
    return Lot(
        row.lot_id,
        row.reference,
        row.account_id,
        LotClass(row[3]),
        row.granted,
        row.remaining,
        row.priority,
        instant_or_none(row.expires_us),
        LotState(row.state),
    )


def grant_lots(connection: sa.Connection, grants: Iterable[Grant], *, actor: str = "grant") -> list[Lot]:
    """Give credits, in the caller's transaction; one lot a grant, in the order of `grants`.

    `actor` is kept with the transfer of each lot that is new: who gave the credits.

    Idempotent on `reference`: the same grant again returns its lot as it stands now. Raises GrantConflict
    if a reference already names other terms (clause 1: a customer must be able to trust what was bought).
    The account is created by its first grant. Runs in a savepoint: an error that the caller catches
    leaves nothing behind. Raises UnfitSession if the connection is in autocommit or its encoding lacks an id.
    """
    wanted: dict[str, Grant] = {}
    order: list[str] = []
    for grant in grants:
        if wanted.setdefault(grant.reference, grant) != grant:
            message = f"grant {grant.reference!r} is given twice here, on different terms"
            raise GrantConflict(message)
        order.append(grant.reference)
    by_reference = [wanted[reference] for reference in sorted(wanted)]
    if not by_reference:
        return []

    with savepoint(connection):
        lots = _insert_lots(connection, by_reference, actor=actor)
        lots |= _same_grants(connection, {r: g for r, g in wanted.items() if r not in lots})
    return [lots[reference] for reference in order]


def _insert_lots(connection: sa.Connection, by_reference: Sequence[Grant], *, actor: str) -> dict[str, Lot]:
    connection.execute(
        sa.text(
            "INSERT INTO kino.account (account_id) SELECT * FROM unnest(CAST(:ids AS text[]))"
            " ON CONFLICT (account_id) DO NOTHING"
        ),
        {"ids": sorted({grant.account_id for grant in by_reference})},
    )
    granted = connection.execute(
        sa.text(f"""
            INSERT INTO kino.credit_lot
                (reference, account_id, class, granted, remaining, priority, expires_at, purchase_id)
            SELECT reference, account_id, class, credits, credits, priority, expires_at, purchase_id
            FROM unnest(CAST(:references AS text[]), CAST(:account_ids AS text[]), CAST(:classes AS text[]),
                        CAST(:credits AS bigint[]), CAST(:priorities AS integer[]),
                        CAST(:expiries AS timestamptz[]), CAST(:purchase_ids AS text[]))
                 AS g (reference, account_id, class, credits, priority, expires_at, purchase_id)
            ON CONFLICT (reference) DO NOTHING
            RETURNING {_LOT_COLUMNS}
        """),  # noqa: S608 - a constant of this file
        {
            "references": [grant.reference for grant in by_reference],
            "account_ids": [grant.account_id for grant in by_reference],
            "classes": [grant.lot_class.value for grant in by_reference],
            "credits": [grant.credits for grant in by_reference],
            "priorities": [grant.priority for grant in by_reference],
            "expiries": [grant.expires_at for grant in by_reference],
            "purchase_ids": [grant.purchase_id for grant in by_reference],
        },
    )
    lots = {row.reference: _lot(row) for row in granted}
    post_transfers(
        connection,
        [
            Transfer(TransferKind.GRANT, lot.account_id, lot.lot_id, lot.granted, reason=lot.lot_class.value)
            for lot in sorted(lots.values(), key=lambda lot: lot.lot_id)
        ],
        actor=actor,
    )
    return lots


def _same_grants(connection: sa.Connection, grants: Mapping[str, Grant]) -> dict[str, Lot]:
    """Read the lots that `grants` were given as before; refuse where the terms differ."""
    if not grants:
        return {}
    rows = connection.execute(
        sa.text(
            f"SELECT {_LOT_COLUMNS}, purchase_id,"  # noqa: S608 - a constant of this file
            f" {microseconds('coalesce(extended_from, expires_at)')} AS expiry_granted_us"
            " FROM kino.credit_lot WHERE reference = ANY(CAST(:references AS text[]))"
        ),
        {"references": list(grants)},
    )
    lots = {}
    for row in rows:
        lot = _lot(row)
        terms = Grant(
            lot.reference,
            lot.account_id,
            lot.granted,
            lot.lot_class,
            instant_or_none(row.expiry_granted_us),
            lot.priority,
            row.purchase_id,
        )
        if terms != grants[lot.reference]:
            asked = asdict(grants[lot.reference])
            other = (
                f"{name} {value}, not {asked[name]}" for name, value in asdict(terms).items() if value != asked[name]
            )
            message = f"grant {lot.reference!r} was given on other terms: {'; '.join(other)}"
            raise GrantConflict(message)
        lots[lot.reference] = lot
    return lots


@dataclass(frozen=True, slots=True)
class LockedLot:
    """What decides a refund's way, read under the lot's lock: nothing can change it until we commit."""

    lot_id: int
    account_id: str
    state: LotState
    ends_soon: bool
    """It has expired, or will within the lot grace."""


def lock_lots(connection: sa.Connection, lot_ids: Collection[int], *, lot_grace: timedelta) -> dict[int, LockedLot]:
    """Lock lots in the order of their ids (so that no two sessions wait for each other) and read them."""
    # The clock is read when a lot is had: one that expired while we waited for it has expired.
    rows = connection.execute(
        sa.text("""
            WITH locked AS MATERIALIZED (
                SELECT lot_id, account_id, state, expires_at FROM kino.credit_lot
                WHERE lot_id = ANY(CAST(:lot_ids AS bigint[])) ORDER BY lot_id FOR NO KEY UPDATE
            )
            SELECT lot_id, account_id, state, coalesce(expires_at <= kino.clock() + CAST(:lot_grace AS interval), false)
            FROM locked
        """),
        {"lot_ids": sorted(lot_ids), "lot_grace": lot_grace},
    )
    return {lot_id: LockedLot(lot_id, account_id, LotState(state), soon) for lot_id, account_id, state, soon in rows}


def lots_held_elsewhere(connection: sa.Connection, lot_ids: Collection[int]) -> set[int]:
    """Ask which lots another session holds at this instant; waits for none, keeps the others until commit."""
    free = connection.execute(
        sa.text(
            "SELECT lot_id FROM kino.credit_lot"
            " WHERE lot_id = ANY(CAST(:lot_ids AS bigint[])) ORDER BY lot_id FOR NO KEY UPDATE SKIP LOCKED"
        ),
        {"lot_ids": sorted(lot_ids)},
    ).scalars()
    return set(lot_ids) - set(free)


def add_to_lots(connection: sa.Connection, credits_by_lot: Mapping[int, int]) -> None:
    """Raise (or, with negative credits, lower) `remaining` of locked lots; one UPDATE, whatever the number."""
    if not credits_by_lot:
        return
    lot_ids = sorted(credits_by_lot)
    connection.execute(
        sa.text(
            "UPDATE kino.credit_lot AS l SET remaining = l.remaining + u.credits"
            " FROM unnest(CAST(:lot_ids AS bigint[]), CAST(:credits AS bigint[])) AS u (lot_id, credits)"
            " WHERE l.lot_id = u.lot_id"
        ),
        {"lot_ids": lot_ids, "credits": [credits_by_lot[lot_id] for lot_id in lot_ids]},
    )


def add_successors(
    connection: sa.Connection,
    credits_by_lot: Mapping[int, int],
    *,
    references: Mapping[int, str],
    lot_grace: timedelta,
) -> dict[int, int]:
    """Open a successor for each locked lot that expired or soon will, to live `lot_grace`; return lot id -> its id.

    Class, priority and purchase are copied, so the credits burn and are refunded as what they were
    (P4); `granted` is what comes back. There is no grant transfer: the refund's own names both lots.
    """
    if not credits_by_lot:
        return {}
    lot_ids = sorted(credits_by_lot)
    rows = connection.execute(
        sa.text("""
            INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining, priority, expires_at,
                                         purchase_id, successor_of)
            SELECT u.reference, l.account_id, l.class, u.credits, u.credits, l.priority,
                   kino.clock() + CAST(:lot_grace AS interval),
                   l.purchase_id, l.lot_id
            FROM unnest(CAST(:lot_ids AS bigint[]), CAST(:credits AS bigint[]), CAST(:references AS text[]))
                 AS u (lot_id, credits, reference)
            JOIN kino.credit_lot l ON l.lot_id = u.lot_id
            RETURNING successor_of, lot_id
        """),
        {
            "lot_ids": lot_ids,
            "credits": [credits_by_lot[lot_id] for lot_id in lot_ids],
            "references": [references[lot_id] for lot_id in lot_ids],
            "lot_grace": lot_grace,
        },
    )
    return {row[0]: row[1] for row in rows}


def expire_lots(connection: sa.Connection, *, limit: int = 1000) -> int:
    """Expire up to `limit` active lots whose time has come; return how many; call again until it is 0.

    A lot that somebody holds is passed over: the next run finds it, and until then it is not drawn from,
    because `open_charges` looks at the clock and not at the state. Frozen lots do not expire.
    """
    rows = connection.execute(
        sa.text(
            "SELECT lot_id, account_id, remaining FROM kino.credit_lot WHERE state = 'active'"
            # As a sub-select it is read once, and the index on expires_at can be used.
            " AND expires_at <= (SELECT kino.clock())"
            " ORDER BY lot_id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED"
        ),
        {"limit": limit},
    ).all()
    _empty_lots(connection, rows, TransferKind.EXPIRE, LotState.EXPIRED, reason="expired", actor="expiry")
    return len(rows)


def freeze_purchase(connection: sa.Connection, purchase_id: str) -> list[int]:
    """Freeze every lot of a purchase, expired ones and successors too; return their ids.

    A frozen lot keeps its credits but nobody can draw them; refunds go back into it.
    """
    frozen = []
    while rows := _lock_purchase(connection, purchase_id, [LotState.ACTIVE, LotState.EXPIRED]):
        lot_ids = [row.lot_id for row in rows]
        _set_state(connection, lot_ids, LotState.FROZEN)
        frozen += lot_ids
    return frozen


def unfreeze_purchase(connection: sa.Connection, purchase_id: str, *, lot_grace: timedelta) -> list[int]:
    """Make a purchase's frozen lots active again; none of them expires within `lot_grace` from now."""
    lot_ids = [row.lot_id for row in _lock_purchase(connection, purchase_id, [LotState.FROZEN])]
    connection.execute(
        sa.text(
            "UPDATE kino.credit_lot SET state = 'active',"
            " extended_from = CASE WHEN expires_at < :until THEN coalesce(extended_from, expires_at)"
            "                      ELSE extended_from END,"
            " extended_at = CASE WHEN expires_at < :until THEN kino.clock() ELSE extended_at END,"
            " expires_at = CASE WHEN expires_at < :until THEN :until ELSE expires_at END"
            " WHERE lot_id = ANY(CAST(:lot_ids AS bigint[]))"
        ),
        {"lot_ids": lot_ids, "until": read_clock(connection) + lot_grace},
    )
    return lot_ids


def void_purchase(connection: sa.Connection, purchase_id: str, *, reason: str, actor: str) -> int:
    """Take back what is left in every lot of a purchase, for good; return the credits taken.

    Credits of these lots that are held by open jobs follow when those jobs are refunded.
    """
    voided = 0
    living = [LotState.ACTIVE, LotState.FROZEN, LotState.EXPIRED]
    while rows := _lock_purchase(connection, purchase_id, living):
        _empty_lots(connection, rows, TransferKind.VOID, LotState.VOIDED, reason=reason, actor=actor)
        voided += sum(row.remaining for row in rows)
    return voided


def _lock_purchase(connection: sa.Connection, purchase_id: str, states: Sequence[LotState]) -> Sequence[Any]:
    """Lock the purchase's lots in these states.

    Callers ask again until nothing new turns up: (1) a refund holds lot A and inserts its successor B,
    (2) we read A only, and wait for its lock, (3) the refund commits, (4) we get A, and now B is there.
    A refund that comes later waits for our A and then sees its new state, so it opens no successor.
    """
    return connection.execute(
        sa.text(
            "SELECT lot_id, account_id, remaining FROM kino.credit_lot"
            " WHERE purchase_id = :purchase_id AND state = ANY(CAST(:states AS text[]))"
            " ORDER BY lot_id FOR NO KEY UPDATE"
        ),
        {"purchase_id": purchase_id, "states": [state.value for state in states]},
    ).all()


def _set_state(connection: sa.Connection, lot_ids: Sequence[int], state: LotState) -> None:
    connection.execute(
        sa.text("UPDATE kino.credit_lot SET state = :state WHERE lot_id = ANY(CAST(:lot_ids AS bigint[]))"),
        {"lot_ids": list(lot_ids), "state": state.value},
    )


def _empty_lots(
    connection: sa.Connection,
    rows: Sequence[Any],
    kind: TransferKind,
    state: LotState,
    *,
    reason: str,
    actor: str,
) -> None:
    add_to_lots(connection, {row.lot_id: -row.remaining for row in rows if row.remaining})
    _set_state(connection, [row.lot_id for row in rows], state)
    post_transfers(
        connection,
        [Transfer(kind, row.account_id, row.lot_id, row.remaining, reason=reason) for row in rows if row.remaining],
        actor=actor,
    )
