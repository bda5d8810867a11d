"""Charges: what a job took from its account's lots, and how they end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.errors import (
    AccountNotActive,
    ChargeAlreadySettled,
    ChargeConflict,
    InsufficientCredits,
    LedgerInconsistent,
)
from kino_refunds.ledger.accounts import AccountStatus
from kino_refunds.ledger.callers import instant, microseconds, savepoint
from kino_refunds.ledger.lots import (
    SUCCESSOR_PREFIX,
    LockedLot,
    LotClass,
    LotState,
    add_successors,
    add_to_lots,
    lock_lots,
    require_credits,
    require_id,
    require_instant,
)
from kino_refunds.ledger.transfers import Transfer, TransferKind, post_transfers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """What a job is about to take: whole `credits`, zero allowed; `deadline_at` may lie in the past."""

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
    """An opened charge; `lines` are (lot id, credits) in the order they were drawn."""

    charge_id: int
    job_id: str
    account_id: str
    credits: int
    deadline_at: datetime
    opened_at: datetime
    lines: list[tuple[int, int]]


def open_charge(
    connection: sa.Connection,
    *,
    job_id: str,
    account_id: str,
    credits: int,
    deadline_at: datetime,
) -> Charge:
    """Open one charge; see `open_charges`."""
    return open_charges(connection, [ChargeRequest(job_id, account_id, credits, deadline_at)])[0]


def open_charges(connection: sa.Connection, requests: Iterable[ChargeRequest]) -> list[Charge]:
    """Move credits from wallet to held for each job, all or nothing, in the caller's transaction (clause 1).

    Runs in a savepoint: an error that the caller catches leaves nothing behind. Idempotent on `job_id`:
    the same request again returns the charge it opened. Returns one charge a request, in their order.

    Raises ChargeConflict (the job is charged on other terms), ChargeAlreadySettled, AccountNotActive,
    InsufficientCredits, in this precedence. Lots are locked in the order of their ids within one call:
    call it once per transaction, or be ready to retry after a deadlock. At REPEATABLE READ or SERIALIZABLE be ready
    to retry after a serialization failure (SQLSTATE 40001) as well. Raises UnfitSession if the connection is in
    autocommit or its encoding lacks an id.
    """
    wanted: dict[str, ChargeRequest] = {}
    order: list[str] = []
    for request in requests:
        first = wanted.setdefault(request.job_id, request)
        if (first.account_id, first.credits) != (request.account_id, request.credits):
            message = f"job {request.job_id!r} is charged twice here, on different terms"
            raise ChargeConflict(message)
        order.append(request.job_id)
    if not order:
        return []
    with savepoint(connection):
        opened = _insert_charges(connection, [wanted[job_id] for job_id in sorted(wanted)])
        charges = _charges_opened_before(connection, [r for j, r in wanted.items() if j not in opened])
        fresh = [(row, wanted[job_id]) for job_id in wanted if (row := opened.get(job_id)) is not None]
        charges |= _draw(connection, fresh)
    return [charges[job_id] for job_id in order]


def _insert_charges(connection: sa.Connection, requests: Sequence[ChargeRequest]) -> dict[str, Any]:
    # The charge goes in before any lot is locked, and sorted: two sessions that open the same job meet
    # here, where the second waits for the first's commit and then finds its charge.
    rows = connection.execute(
        sa.text(f"""
            INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)
            SELECT * FROM unnest(CAST(:job_ids AS text[]), CAST(:account_ids AS text[]),
                                 CAST(:credits AS bigint[]), CAST(:deadlines AS timestamptz[]))
            ON CONFLICT (job_id) DO NOTHING
            RETURNING charge_id, job_id, {microseconds("opened_at")} AS opened_us
        """),  # noqa: S608 - a constant
        {
            "job_ids": [request.job_id for request in requests],
            "account_ids": [request.account_id for request in requests],
            "credits": [request.credits for request in requests],
            "deadlines": [request.deadline_at for request in requests],
        },
    )
    return {row.job_id: row for row in rows}


def _charges_opened_before(connection: sa.Connection, requests: Sequence[ChargeRequest]) -> dict[str, Charge]:
    if not requests:
        return {}
    rows = connection.execute(
        sa.text(f"""
            SELECT c.charge_id, c.job_id, c.account_id, c.credits, {microseconds("c.deadline_at")} AS deadline_us,
                   {microseconds("c.opened_at")} AS opened_us, s.kind,
                   ARRAY(SELECT l.lot_id FROM kino.charge_line l WHERE l.charge_id = c.charge_id ORDER BY l.seq)
                       AS lot_ids,
                   ARRAY(SELECT l.credits FROM kino.charge_line l WHERE l.charge_id = c.charge_id ORDER BY l.seq)
                       AS line_credits
            FROM kino.charge c LEFT JOIN kino.settlement s USING (charge_id)
            WHERE c.job_id = ANY(CAST(:job_ids AS text[]))
        """),  # noqa: S608 - a constant
        {"job_ids": [request.job_id for request in requests]},
    )
    found = {row.job_id: row for row in rows}
    for request in requests:
        row = found[request.job_id]
        if (row.account_id, row.credits) != (request.account_id, request.credits):
            message = f"job {row.job_id!r} is charged {row.credits} credits of account {row.account_id!r} already"
            raise ChargeConflict(message)
    for row in found.values():
        if row.kind is not None:
            message = f"the charge of job {row.job_id!r} is {row.kind} already"
            raise ChargeAlreadySettled(message)
    return {
        row.job_id: Charge(
            row.charge_id,
            row.job_id,
            row.account_id,
            row.credits,
            instant(row.deadline_us),
            instant(row.opened_us),
            list(zip(row.lot_ids, row.line_credits, strict=True)),
        )
        for row in found.values()
    }


def _draw(connection: sa.Connection, fresh: Sequence[tuple[Any, ChargeRequest]]) -> dict[str, Charge]:
    """Draw new charges from their accounts' lots, in burn order; write lots, lines and holds."""
    account_ids = sorted({request.account_id for _, request in fresh})
    _require_active(connection, account_ids)
    left = _spendable(connection, sorted({request.account_id for _, request in fresh if request.credits}))
    drawn: dict[int, int] = defaultdict(int)
    charges = {}
    for row, request in fresh:
        lines = list(_take(left.get(request.account_id, []), request.credits))
        taken = sum(credits for _, credits in lines)
        if taken < request.credits:
            message = (
                f"job {request.job_id!r} needs {request.credits} credits; account {request.account_id!r} has {taken}"
            )
            raise InsufficientCredits(message)
        for lot_id, credits in lines:
            drawn[lot_id] -= credits
        charges[request.job_id] = Charge(
            row.charge_id,
            request.job_id,
            request.account_id,
            request.credits,
            request.deadline_at,
            instant(row.opened_us),
            lines,
        )
    add_to_lots(connection, drawn)
    _insert_lines(connection, charges.values())
    post_transfers(
        connection,
        [
            Transfer(TransferKind.HOLD, charge.account_id, lot_id, credits, charge_id=charge.charge_id)
            for charge in charges.values()
            for lot_id, credits in charge.lines
        ],
        actor="product",
    )
    return charges


def _require_active(connection: sa.Connection, account_ids: Sequence[str]) -> None:
    rows = connection.execute(
        sa.text("SELECT account_id, status FROM kino.account WHERE account_id = ANY(CAST(:ids AS text[]))"),
        {"ids": list(account_ids)},
    )
    status = {row.account_id: row.status for row in rows}
    for account_id in account_ids:
        if account_id not in status:
            message = f"account {account_id!r} does not exist; its first grant creates it"
            raise AccountNotActive(message)
        if status[account_id] != AccountStatus.ACTIVE:
            message = f"account {account_id!r} is {status[account_id]}"
            raise AccountNotActive(message)


_CLASS_ORDER = {lot_class.value: order for order, lot_class in enumerate(LotClass)}


def _spendable(connection: sa.Connection, account_ids: Sequence[str]) -> dict[str, list[list[int]]]:
    """Lock what can be drawn, per account in burn order, as mutable [lot id, remaining]."""
    # Postgres checks the inner condition again after a wait only if the holder changed the row; the outer
    # one looks at the clock when the lot is had, so a lot that expired while we waited is not drawn either.
    # The clock and not now(): the caller's transaction may be old.
    rows = connection.execute(
        sa.text(f"""
            WITH locked AS MATERIALIZED (
                SELECT lot_id, account_id, class, remaining, priority, granted_at, expires_at FROM kino.credit_lot
                WHERE account_id = ANY(CAST(:ids AS text[])) AND state = 'active' AND remaining > 0
                  AND (expires_at IS NULL OR expires_at > kino.clock())
                ORDER BY lot_id FOR NO KEY UPDATE
            )
            SELECT lot_id, account_id, class, remaining, priority, {microseconds("granted_at")} AS granted_us,
                   {microseconds("expires_at")} AS expires_us
            FROM locked WHERE expires_at IS NULL OR expires_at > kino.clock()
        """),  # noqa: S608 - a constant
        {"ids": list(account_ids)},
    ).all()

    def burn_order(row: Any) -> tuple[Any, ...]:
        return (
            row.priority,
            row.expires_us is None,
            row.expires_us or 0,
            _CLASS_ORDER[row[2]],
            row.granted_us,
            row.lot_id,
        )

    spendable: dict[str, list[list[int]]] = defaultdict(list)
    for row in sorted(rows, key=burn_order):
        spendable[row.account_id].append([row.lot_id, row.remaining])
    return spendable


def _take(lots: list[list[int]], wanted: int) -> Iterator[tuple[int, int]]:
    """Take `wanted` credits from the first lots that have any; lowers what is left in `lots`."""
    for lot in lots:
        if not wanted:
            return
        if credits := min(lot[1], wanted):
            lot[1] -= credits
            wanted -= credits
            yield lot[0], credits


def _insert_lines(connection: sa.Connection, charges: Iterable[Charge]) -> None:
    lines = [
        (charge.charge_id, seq, lot_id, credits)
        for charge in charges
        for seq, (lot_id, credits) in enumerate(charge.lines, start=1)
    ]
    if not lines:
        return
    charge_ids, seqs, lot_ids, credits = map(list, zip(*lines, strict=True))
    connection.execute(
        sa.text(
            "INSERT INTO kino.charge_line (charge_id, seq, lot_id, credits) SELECT * FROM unnest("
            "CAST(:charge_ids AS bigint[]), CAST(:seqs AS smallint[]), CAST(:lot_ids AS bigint[]),"
            " CAST(:credits AS bigint[]))"
        ),
        {"charge_ids": charge_ids, "seqs": seqs, "lot_ids": lot_ids, "credits": credits},
    )


class Ending(NamedTuple):
    """How a charge ends: `lines` go to consumed (captured) or back to the wallet (refunded)."""

    charge_id: int
    account_id: str
    credits: int
    lines: Sequence[tuple[int, int]]
    refunded: bool
    reason: str
    event_at: datetime


def end_charges(connection: sa.Connection, endings: Sequence[Ending], *, lot_grace: timedelta, actor: str) -> None:
    """Capture and refund charges whose settlement the caller has just inserted (P1 is that insert).

    Refunded credits go where the lot's fate, read under its lock, sends them (design, section 4):
    voided: back, then void. Frozen: back, and stay frozen. Expired, or expiring within `lot_grace`: to a
    successor that lives `lot_grace`, so that a customer can still use what a failure of ours held. Else: back.
    Raises LedgerInconsistent if the lines are not what the charge took (P4); raises sqlalchemy's
    OperationalError (lock_not_available) if a lot is held for longer than the lock timeout.
    """
    for ending in endings:
        if sum(credits for _, credits in ending.lines) != ending.credits:
            message = f"charge {ending.charge_id} took {ending.credits} credits but its lines say otherwise"
            raise LedgerInconsistent(message)
    returns = [(ending, lot_id, credits) for ending in endings if ending.refunded for lot_id, credits in ending.lines]
    successors, voids = _give_back(connection, returns, lot_grace=lot_grace) if returns else ({}, [])
    post_transfers(connection, list(_endings_transfers(endings, successors, voids)), actor=actor)


_Return = tuple[Ending, int, int]
"""What one line of a refunded charge gives back: the ending, the lot, the credits."""


def _give_back(
    connection: sa.Connection, returns: Sequence[_Return], *, lot_grace: timedelta
) -> tuple[dict[int, int], list[_Return]]:
    """Put credits where their lots' fate sends them; return lot id -> successor, and what is to be voided."""
    lots = lock_lots(connection, {lot_id for _, lot_id, _ in returns}, lot_grace=lot_grace)
    back: dict[int, int] = defaultdict(int)
    onward: dict[int, int] = defaultdict(int)
    references: dict[int, str] = {}
    voids: list[_Return] = []
    for ending, lot_id, credits in returns:
        lot = lots.get(lot_id)
        if lot is None or lot.account_id != ending.account_id:
            message = f"charge {ending.charge_id} names lot {lot_id}, which account {ending.account_id!r} does not have"
            raise LedgerInconsistent(message)
        if lot.state is LotState.VOIDED:
            voids.append((ending, lot_id, credits))
        elif _needs_successor(lot):
            onward[lot_id] += credits
            # A charge is settled once, so a charge and a lot name one successor and no other.
            references.setdefault(lot_id, f"{SUCCESSOR_PREFIX}{lot_id}:{ending.charge_id}")
        else:
            back[lot_id] += credits
    add_to_lots(connection, back)
    return add_successors(connection, onward, references=references, lot_grace=lot_grace), voids


def _needs_successor(lot: LockedLot) -> bool:
    return lot.state is LotState.EXPIRED or (lot.state is LotState.ACTIVE and lot.ends_soon)


def _endings_transfers(
    endings: Sequence[Ending], successors: Mapping[int, int], voids: Sequence[tuple[Ending, int, int]]
) -> Iterator[Transfer]:
    for ending in endings:
        kind = TransferKind.REFUND if ending.refunded else TransferKind.CAPTURE
        for lot_id, credits in ending.lines:
            to_lot_id = successors.get(lot_id) if ending.refunded else None
            yield Transfer(
                kind,
                ending.account_id,
                lot_id,
                credits,
                ending.charge_id,
                to_lot_id,
                ending.reason,
                ending.event_at,
            )
    for ending, lot_id, credits in voids:
        yield Transfer(
            TransferKind.VOID,
            ending.account_id,
            lot_id,
            credits,
            ending.charge_id,
            None,
            "voided",
            ending.event_at,
        )
