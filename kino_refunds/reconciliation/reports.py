"""Reports for accounts: a month by lot class, and the credits that customers can still spend.

Both are read from transfers and from the history of lots, never from what a lot has now. A transfer belongs to the
instant at which it was posted (`created_at`). An instant is refused while an open transaction could still post before
it, so the figures of a month or an instant never change: a report that is run a year later is the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from kino_refunds.errors import InstantNotFinal, LedgerInconsistent
from kino_refunds.ledger import LotClass
from kino_refunds.ledger.statement import final_through, require_final
from kino_refunds.ledger.values import LAST_YEAR, require_instant

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NEVER = "never"
"""In the place of a month: the credits do not expire."""


# --- a month -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MonthLine:
    """What happened to the credits of one lot class in a month, in whole credits.

    Opening and closing are what customers had at the month's two ends: in wallets, or held by jobs that had not ended.
    """

    opening_wallet: int
    opening_held: int
    granted: int
    held: int
    captured: int
    refunded: int
    reversed: int
    expired: int
    voided: int
    unvoided: int
    closing_wallet: int
    closing_held: int

    @property
    def opening(self) -> int:
        """Wallet and held together."""
        return self.opening_wallet + self.opening_held

    @property
    def closing(self) -> int:
        """Wallet and held together."""
        return self.closing_wallet + self.closing_held

    def as_dict(self) -> dict[str, int]:
        """Return every figure by its name, in the order of a statement of accounts."""
        own = asdict(self)
        closing = {name: own.pop(name) for name in ("closing_wallet", "closing_held")}
        return {"opening": self.opening, **own, "closing": self.closing, **closing}


@dataclass(frozen=True, slots=True)
class MonthReport:
    """A month in UTC: `since` to before `until`; a line for every lot class, also one without credits."""

    year: int
    month: int
    since: datetime
    until: datetime
    classes: Mapping[LotClass, MonthLine]

    @property
    def total(self) -> MonthLine:
        """All classes together."""
        lines = [asdict(line) for line in self.classes.values()]
        return MonthLine(**{each.name: sum(line[each.name] for line in lines) for each in fields(MonthLine)})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; nothing in it depends on when it was made."""
        return {
            "month": f"{self.year:04}-{self.month:02}",
            "since": self.since.isoformat(),
            "until": self.until.isoformat(),
            "classes": {lot_class.value: line.as_dict() for lot_class, line in self.classes.items()},
            "total": self.total.as_dict(),
        }


# Each transfer as its two halves: what one book gave and another got. A refund into a successor gives from its lot and
# arrives in another, so each half counts for the class of its own lot.
_MONTH = sa.text("""
    SELECT kind, from_book, to_book, from_class, to_class, is_inside, sum(credits) AS credits
    FROM (
        SELECT t.kind, t.from_book, t.to_book, given.class AS from_class,
               CASE WHEN t.to_lot_id IS NULL THEN given.class ELSE taken.class END AS to_class,
               t.created_at >= :since AS is_inside, t.credits
        FROM kino.transfer t
        LEFT JOIN kino.credit_lot given ON given.lot_id = t.lot_id
        LEFT JOIN kino.credit_lot taken ON taken.lot_id = t.to_lot_id
        WHERE t.created_at < :until
    ) AS moved
    GROUP BY kind, from_book, to_book, from_class, to_class, is_inside
""")

_FLOWS: Final[Mapping[str, str]] = {
    "grant": "granted",
    "hold": "held",
    "capture": "captured",
    "refund": "refunded",
    "reversal": "reversed",
    "expire": "expired",
    "void": "voided",
    "unvoid": "unvoided",
}
"""By kind of transfer: the figure that it counts for."""
_CUSTOMERS = ("wallet", "held")
"""The books whose credits customers have."""


def report_month(connection: sa.Connection, year: int, month: int) -> MonthReport:
    """Return the report of a month in UTC; reads every transfer up to its end.

    Raises ValueError for a month that does not exist, InstantNotFinal if the month has not ended or an open transaction
    may still post into it, and LedgerInconsistent, which names the class, if the figures do not tie.
    """
    since, until = _month(year, month)
    require_final(connection, until, what=f"month {year:04}-{month:02} ends at {_written(until)}")
    # By books: what customers had at both ends. By kinds: what happened in between. That both agree is the identity.
    books: Counter[tuple[str | None, str, bool]] = Counter()
    flows: Counter[tuple[str | None, str]] = Counter()
    for row in connection.execute(_MONTH, {"since": since, "until": until}):
        credits = int(row.credits)
        books[row.to_class, row.to_book, row.is_inside] += credits
        books[row.from_class, row.from_book, row.is_inside] -= credits
        if row.is_inside:
            flows[row.from_class, _FLOWS.get(row.kind, row.kind)] += credits
    _require_classes({each[0] for each in books} | {each[0] for each in flows})
    return MonthReport(
        year=year,
        month=month,
        since=since,
        until=until,
        classes={each: _month_line(each, books, flows) for each in LotClass},
    )


def _month_line(
    lot_class: LotClass, books: Mapping[tuple[str | None, str, bool], int], flows: Mapping[tuple[str | None, str], int]
) -> MonthLine:
    before = {book: books[lot_class, book, False] for book in _CUSTOMERS}
    after = {book: before[book] + books[lot_class, book, True] for book in _CUSTOMERS}
    line = MonthLine(
        opening_wallet=before["wallet"],
        opening_held=before["held"],
        closing_wallet=after["wallet"],
        closing_held=after["held"],
        **{figure: flows[lot_class, figure] for figure in _FLOWS.values()},
    )
    _require_tie(lot_class, line)
    return line


def _require_tie(lot_class: LotClass, line: MonthLine) -> None:
    wallet = (
        line.opening_wallet
        + line.granted
        - line.held
        + line.refunded
        + line.reversed
        - line.expired
        - line.voided
        + line.unvoided
    )
    held = line.opening_held + line.held - line.captured - line.refunded
    for name, opening, due, closing in (
        ("wallet", line.opening_wallet, wallet, line.closing_wallet),
        ("held", line.opening_held, held, line.closing_held),
    ):
        if due != closing:
            raise LedgerInconsistent(
                f"the figures of class {lot_class} do not tie: book {name} opened with {opening:,} and closed with"
                f" {closing:,} credits, what happened in between makes {due:,}; run kino-refunds doctor"
            )
        if min(opening, closing) < 0:
            raise LedgerInconsistent(
                f"the figures of class {lot_class} cannot be: book {name} is {min(opening, closing):,} credits"
            )


def _month(year: int, month: int) -> tuple[datetime, datetime]:
    if not (1 <= year <= LAST_YEAR and 1 <= month <= 12):  # noqa: PLR2004 - December
        message = f"{year:04}-{month:02} is not a month: the years are 1 to {LAST_YEAR}, the months 1 to 12"
        raise ValueError(message)
    following = (year + 1, 1) if month == 12 else (year, month + 1)  # noqa: PLR2004 - December
    return datetime(year, month, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC)


# --- what can still be spent -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiring:
    """Credits of one class that can be spent until a month: `expires` is that month (`2026-12`), or NEVER."""

    lot_class: LotClass
    expires: str
    credits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiabilityLine:
    """What customers have of one lot class, in whole credits.

    `spendable`: of lots that are active and have not expired, whatever their account's status is. `frozen`: of lots
    that a dispute, a payout or a request holds. `expired`: of lots whose time is over and that the sweep has not
    emptied yet; nobody can spend these any more. `held`: taken by jobs that had not ended.
    """

    spendable: int
    frozen: int
    expired: int
    held: int


@dataclass(frozen=True, slots=True)
class LiabilityReport:
    """What customers had at an instant: `expiring` says until when the spendable credits can be spent."""

    at: datetime
    expiring: tuple[Expiring, ...]
    classes: Mapping[LotClass, LiabilityLine]

    @property
    def total(self) -> LiabilityLine:
        """All classes together."""
        lines = [asdict(line) for line in self.classes.values()]
        return LiabilityLine(**{each.name: sum(line[each.name] for line in lines) for each in fields(LiabilityLine)})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types; nothing in it depends on when it was made."""
        return {
            "at": self.at.isoformat(),
            "expiring": [
                {"class": each.lot_class.value, "expires": each.expires, "credits": each.credits}
                for each in self.expiring
            ],
            "classes": {lot_class.value: asdict(line) for lot_class, line in self.classes.items()},
            "total": asdict(self.total),
        }


# A lot's state and expiry as they were: the first change after the instant says what they were before it. Credits in a
# voided lot are there for the moment in which an undo has posted its transfer and not yet changed the lot.
_LIABILITY = sa.text("""
    WITH posted AS (
        SELECT t.* FROM kino.transfer t WHERE t.created_at <= :at
    ), wallet AS (
        SELECT lot_id, sum(credits) AS credits FROM (
            SELECT coalesce(to_lot_id, lot_id) AS lot_id, credits FROM posted WHERE to_book = 'wallet'
            UNION ALL
            SELECT lot_id, -credits FROM posted WHERE from_book = 'wallet'
        ) AS entry GROUP BY lot_id HAVING sum(credits) <> 0
    ), lot AS (
        SELECT l.lot_id, l.class,
               CASE WHEN later.lot_id IS NULL THEN l.state ELSE later.from_state END AS state,
               CASE WHEN later.lot_id IS NULL THEN l.expires_at ELSE later.from_expires_at END AS expires_at
        FROM wallet w JOIN kino.credit_lot l USING (lot_id)
        LEFT JOIN LATERAL (SELECT c.lot_id, c.from_state, c.from_expires_at FROM kino.lot_change c
                           WHERE c.lot_id = l.lot_id AND c.changed_at > :at
                           ORDER BY c.change_id LIMIT 1) AS later ON true
    ), placed AS (
        SELECT lot.class, w.credits,
               CASE WHEN lot.state IN ('frozen', 'voided') THEN 'frozen'
                    WHEN lot.state = 'expired' OR lot.expires_at <= :at THEN 'expired'
                    ELSE 'spendable' END AS place,
               CASE WHEN isfinite(lot.expires_at) THEN to_char(lot.expires_at AT TIME ZONE 'UTC', 'YYYY-MM')
                    ELSE 'never' END AS expires
        FROM wallet w LEFT JOIN lot USING (lot_id)
    )
    SELECT class, place, CASE place WHEN 'spendable' THEN expires END AS expires, sum(credits) AS credits,
           min(credits) AS least
    FROM placed GROUP BY 1, 2, 3
    UNION ALL
    SELECT l.class, 'held', NULL, sum(CASE WHEN p.to_book = 'held' THEN p.credits ELSE -p.credits END), 0
    FROM posted p LEFT JOIN kino.credit_lot l USING (lot_id) WHERE 'held' IN (p.from_book, p.to_book) GROUP BY l.class
    UNION ALL
    SELECT l.class, 'book', NULL, sum(CASE WHEN p.to_book = 'wallet' THEN p.credits ELSE -p.credits END), 0
    FROM posted p LEFT JOIN kino.credit_lot l USING (lot_id) WHERE 'wallet' IN (p.from_book, p.to_book) GROUP BY l.class
    ORDER BY 3, 1, 2
""")


def report_liability(connection: sa.Connection, *, at: datetime | None = None) -> LiabilityReport:
    """Return what customers had at an instant; None: the latest that cannot change any more. Reads every transfer.

    Raises ValueError if `at` has no offset, InstantNotFinal, whose text names the latest instant that can be asked for,
    and LedgerInconsistent, which names the class, if the credits of the lots are not those of the wallets.
    """
    if at is None:
        instant = final_through(connection)
        if instant is None:
            raise InstantNotFinal("no instant is final yet: a transaction is open, and no sample is below it; ask soon")
    else:
        instant = require_instant("at", at)
        require_final(connection, instant)
    places: Counter[tuple[str | None, str]] = Counter()
    expiring: list[tuple[LotClass, str, int]] = []
    rows = connection.execute(_LIABILITY, {"at": instant}).all()
    _require_classes({row[0] for row in rows})
    for row in rows:
        lot_class, credits = LotClass(row[0]), int(row.credits)
        if row.least < 0:
            raise LedgerInconsistent(f"a lot of class {lot_class} had {row.least:,} credits; run kino-refunds doctor")
        places[lot_class, row.place] += credits
        if row.expires is not None:
            expiring.append((lot_class, row.expires, credits))
    return LiabilityReport(
        at=instant,
        expiring=tuple(
            Expiring(lot_class=lot_class, expires=expires, credits=credits)
            for lot_class, expires, credits in sorted(
                expiring, key=lambda each: (list(LotClass).index(each[0]), each[1])
            )
        ),
        classes={each: _liability_line(each, places) for each in LotClass},
    )


def _liability_line(lot_class: LotClass, places: Mapping[tuple[str | None, str], int]) -> LiabilityLine:
    line = LiabilityLine(
        **{each.name: places[lot_class, each.name] for each in fields(LiabilityLine)},
    )
    lots, book = line.spendable + line.frozen + line.expired, places[lot_class, "book"]
    if lots != book:
        raise LedgerInconsistent(
            f"the figures of class {lot_class} do not tie: its lots had {lots:,} credits, book wallet {book:,}; run"
            " kino-refunds doctor"
        )
    if line.held < 0:
        raise LedgerInconsistent(f"the figures of class {lot_class} cannot be: book held is {line.held:,} credits")
    return line


def _require_classes(found: Iterable[str | None]) -> None:
    if unknown := sorted(str(name) for name in set(found) - set(LotClass)):
        raise LedgerInconsistent(
            f"transfers name a lot that does not exist, or one of class {', '.join(unknown)}; run kino-refunds doctor"
        )


def _written(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M:%SZ}"
