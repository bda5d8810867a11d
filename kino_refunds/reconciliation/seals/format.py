"""The format of seals: which tables and columns are sealed, and as what text.

Format 1, exactly, so that another program can compute the same digests. It is never changed; what must differ is a new
format, which begins at a new seal.

- A *field* is a text: its length in bytes (UTF-8) in decimal, a colon, its bytes. NULL is the byte `-`. The empty text
  is `0:`. A number is written in decimal. An instant is the number of microseconds since 1970 in UTC (negative before
  that), or the text `infinity` or `-infinity`.
- A *row* is its fields, one behind the other, in the order of `FORMATS[1]`.
- A *table's digest* is SHA-256 over its rows whose transaction number is at least `from_xid` and below `to_xid`, in the
  order that `FORMATS[1]` gives. A row of charge_line belongs to the transaction of its charge. Rows without a number
  (NULL: of before revision 0006) are not sealed.
- A *seal's digest* is SHA-256 over these fields: the text `kino-seal`, format, seal_id, from_xid, to_xid, as_of,
  sealed_at, rows (over all tables), credits (the sum over transfers), previous_digest in hex; then for each table, in
  the order of `FORMATS[1]`: its name, its number of rows, its digest in hex. Hex is written with small letters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class _Table(NamedTuple):
    """What a format says of a table: the columns in their order, each a text, number (`n`) or instant (`t`)."""

    name: str
    columns: str
    order: str
    """Behind the transaction's number."""
    source: str = "kino.{name} AS r"
    xid: str = "r.xid"
    is_large: bool = False
    """Its index by number is one over the number as a bigint."""


FORMATS: Final[Mapping[int, Sequence[_Table]]] = {
    1: (
        _Table(
            "transfer",
            "transfer_id:n kind from_book to_book account_id lot_id:n to_lot_id:n charge_id:n credits:n reason actor"
            " event_at:t created_at:t xid:n cause_kind cause_id",
            "transfer_id",
            is_large=True,
        ),
        _Table(
            "settlement",
            "charge_id:n kind reason clause policy_version event_source event_id event_time:t settled_at:t xid:n ending"
            " account_status",
            "charge_id",
            is_large=True,
        ),
        _Table(
            "correction",
            "charge_id:n reason clause policy_version actor reference corrected_at:t xid:n",
            "charge_id",
        ),
        _Table(
            "charge",
            "charge_id:n job_id account_id credits:n deadline_at:t opened_at:t xid:n",
            "charge_id",
            is_large=True,
        ),
        _Table(
            "charge_line",
            "charge_id:n seq:n lot_id:n credits:n",
            "charge_id, r.seq",
            # By the key, whatever the planner believes of the range: else it would read every line for each seal.
            source="kino.charge AS c CROSS JOIN LATERAL"
            " (SELECT * FROM kino.{name} AS own WHERE own.charge_id = c.charge_id OFFSET 0) AS r",
            xid="c.xid",
            is_large=True,
        ),
        _Table(
            "account_status_change",
            "change_id:n account_id from_status to_status reason actor changed_at:t xid:n",
            "change_id",
        ),
        _Table(
            "lot_change",
            "change_id:n lot_id:n account_id from_state to_state from_expires_at:t to_expires_at:t changed_at:t xid:n",
            "change_id",
        ),
    )
}
"""By format: the tables in their order, the columns in theirs, and the order of the rows."""
NEWEST_FORMAT = 1


def instant_sql(value: str) -> str:
    """Return the SQL that gives an instant its text."""
    # Whole microseconds as a numeric: a bigint of them ends in the year 294247, and a timestamp does not.
    number = f"CAST(trunc(EXTRACT(EPOCH FROM {value}) * 1000000) AS text)"
    return f"CASE WHEN isfinite({value}) THEN {number} ELSE CAST({value} AS text) END"


def _field_sql(column: str) -> str:
    name, _, kind = column.partition(":")
    value = {"": f"r.{name}", "n": f"CAST(r.{name} AS text)", "t": instant_sql(f"r.{name}")}[kind]
    # The server's encoding is UTF8 (`db/engine.py` connects to no other), so its bytes are the format's.
    return f"coalesce(octet_length({value}) || ':' || {value}, '-')"


def _range_sql(table: _Table) -> str:
    if table.is_large:
        number = f"CAST(CAST({table.xid} AS text) AS bigint)"
        return f"{number} >= :from_xid AND {number} < :to_xid"
    return f"{table.xid} >= CAST(:from_text AS xid8) AND {table.xid} < CAST(:to_text AS xid8)"


def _rows_sql(table: _Table) -> sa.TextClause:
    fields = " || ".join(map(_field_sql, table.columns.split()))
    credits = "r.credits" if table.name == "transfer" else "0"
    return sa.text(
        f"SELECT CAST({table.xid} AS text) AS of_xid, {fields} AS encoded, {credits} AS credits"  # noqa: S608 - constants
        f" FROM {table.source.format(name=table.name)} WHERE {_range_sql(table)}"
        f" ORDER BY {table.xid}, r.{table.order}"
    )


ROWS: Final = {number: {table.name: _rows_sql(table) for table in tables} for number, tables in FORMATS.items()}

# No table has more rows than its LIMIT read. Lines are not counted: each has a transfer of its own.
_FEW = " + ".join(
    f"(SELECT count(*) FROM (SELECT FROM kino.{table.name} AS r WHERE {_range_sql(table)} LIMIT :most) AS few)"  # noqa: S608
    for table in FORMATS[NEWEST_FORMAT]
    if table.name != "charge_line"
)
ROW_COUNT = sa.text(f"SELECT {_FEW}")
