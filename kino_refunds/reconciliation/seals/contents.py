"""Read what a range of transactions wrote, and compute the digest of each table's rows."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.reconciliation.seals.format import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FETCH = 1_000
"""Rows that are in our memory at once."""
BIGINT_MAX = 2**63 - 1


class Range(NamedTuple):
    """Transactions from `from_xid` to before `to_xid`."""

    from_xid: int
    to_xid: int

    @property
    def bound(self) -> dict[str, Any]:
        """The range as the statements take it."""
        # A range that a forger wrote may end beyond what a bigint holds; no transaction does.
        low, high = (min(each, BIGINT_MAX) for each in self)
        return {"from_xid": low, "to_xid": high, "from_text": str(low), "to_text": str(high)}


@dataclass(slots=True)
class Content:
    """What a range has: for each table how many rows and their digest; and the credits of its transfers."""

    tables: dict[str, tuple[int, str]] = field(default_factory=dict)
    credits: int = 0

    @property
    def rows(self) -> int:
        """How many rows there are, over all tables."""
        return sum(rows for rows, _ in self.tables.values())

    def __str__(self) -> str:
        some = ", ".join(f"{name} {rows:,}" for name, (rows, _) in self.tables.items() if rows)
        return f"{self.rows:,} rows of {self.credits:,} credits" + (f" ({some})" if some else "")


# Everything is reached by the index on the transaction's number; and to compile a statement takes longer than most runs
# of it.
_PREPARE = sa.text("""
    SELECT set_config(name, 'off', true)
    FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin', 'jit']) AS name
""")


@contextmanager
def session(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Give a connection in a transaction whose plans go by the number of transactions."""
    with engine.begin() as connection:
        connection.execute(_PREPARE)
        yield connection


def read_contents(connection: sa.Connection, number: int, ranges: Sequence[Range]) -> list[Content]:
    """Read the rows of ranges that follow each other, in this format; return the content of each.

    Each table is read once, by a cursor of the server: our memory stays the same, whatever the size.
    """
    found = [Content() for _ in ranges]
    whole = Range(ranges[0].from_xid, ranges[-1].to_xid)
    for name, statement in ROWS[number].items():
        digests = [hashlib.sha256() for _ in ranges]
        counts = [0 for _ in ranges]
        at = 0
        result = connection.execute(
            statement, whole.bound, execution_options={"stream_results": True, "yield_per": FETCH}
        )
        for xid, encoded, credits in result:
            while int(xid) >= ranges[at].to_xid:
                at += 1
            digests[at].update(encoded.encode())
            counts[at] += 1
            found[at].credits += credits
        for content, count, digest in zip(found, counts, digests, strict=True):
            content.tables[name] = (count, digest.hexdigest())
    return found
