"""Lots as the ledger has them: when they expire, and what moved in and out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from kino_refunds.ledger import grant_lots
from tests.clock import DAY, expire_lots
from tests.ledger_acts import NOW, SOLD, charge, end, transfers


def purchase_of_every_kind(product: sa.Connection, connection: sa.Connection) -> None:
    """Purchase p-1: lot 2 active, lot 3 expired, and its successor, lot 4, drawn from; lot 1 is another's.

    Six credits of lot 4 remain, of ten; job `late` holds the other four.
    """
    grant_lots(
        product,
        [
            replace(SOLD, reference="a", purchase_id="p-2", priority=90),
            replace(SOLD, reference="b", priority=80),
            replace(SOLD, reference="c", credits=10, priority=1, expires_at=NOW + 8 * DAY),
        ],
    )
    product.commit()
    early = charge(product, "early", 10)
    expire_lots(connection, now=NOW + 8 * DAY)
    end(connection, early, now=NOW + 8 * DAY)
    connection.commit()
    late = charge(product, "late", 4)
    assert late.lines == [(4, 4)]


def lot_transfers(connection: sa.Connection, *kinds: str) -> list[tuple[Any, ...]]:
    """Every transfer of these kinds: kind, lot, credits, actor."""
    return transfers(connection, *kinds, columns="lot_id, credits, actor")
