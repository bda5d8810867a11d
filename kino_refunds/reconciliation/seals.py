"""Seals: digests over closed ranges of transactions, each chained to the one before, so that a changed row is found.

Who may change the ledger's tables past their triggers (a superuser) may also write seals anew. Against that only a copy
outside of this database proves anything: `seal_text` writes it, `compare_with_copy` compares it.

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

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from kino_refunds.errors import BadCopy
from kino_refunds.ledger.callers import EPOCH
from kino_refunds.reconciliation.comparison import Page
from kino_refunds.settlement.breaks import Break, BreakKind
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from kino_refunds.reconciliation.comparison import LiveBreak, Scope

log = get_logger("kino.seals")

ROWS_MAX = 200_000
"""Rows that a seal has at most, lines not counted: it is written in a few seconds, within the limits of a session. A
single transaction that wrote more is one seal nevertheless."""
SEALS_A_PAGE = 500
FETCH = 1_000
"""Rows that are in our memory at once."""
LOCK = 0x6B696E6F5EA1
"""An advisory lock: any number that no other program uses in this database. Its first bytes are those of "kino"."""
FIRST = bytes(32)
"""The digest before the first seal."""
BIGINT_MAX = 2**63 - 1
FIRST_INSTANT, LAST_INSTANT = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
NOT_A_SUM = -1
"""In the place of a seal's credits that are no whole number: no seal was written with it."""


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


# --- the rows of a range -----------------------------------------------------------------------------------------


def _instant_sql(value: str) -> str:
    # Whole microseconds as a numeric: a bigint of them ends in the year 294247, and a timestamp does not.
    number = f"CAST(trunc(EXTRACT(EPOCH FROM {value}) * 1000000) AS text)"
    return f"CASE WHEN isfinite({value}) THEN {number} ELSE CAST({value} AS text) END"


def _field_sql(column: str) -> str:
    name, _, kind = column.partition(":")
    value = {"": f"r.{name}", "n": f"CAST(r.{name} AS text)", "t": _instant_sql(f"r.{name}")}[kind]
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


_ROWS: Final = {number: {table.name: _rows_sql(table) for table in tables} for number, tables in FORMATS.items()}

# No table has more rows than its LIMIT read. Lines are not counted: each has a transfer of its own.
_FEW = " + ".join(
    f"(SELECT count(*) FROM (SELECT FROM kino.{table.name} AS r WHERE {_range_sql(table)} LIMIT :most) AS few)"  # noqa: S608
    for table in FORMATS[NEWEST_FORMAT]
    if table.name != "charge_line"
)
_COUNT = sa.text(f"SELECT {_FEW}")


class _Range(NamedTuple):
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
class _Content:
    """What a range has: for each table how many rows and their digest; and the credits of its transfers."""

    tables: dict[str, tuple[int, str]] = field(default_factory=dict)
    credits: int = 0

    @property
    def rows(self) -> int:
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
def _session(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Give a connection in a transaction whose plans go by the number of transactions."""
    with engine.begin() as connection:
        connection.execute(_PREPARE)
        yield connection


def _contents(connection: sa.Connection, number: int, ranges: Sequence[_Range]) -> list[_Content]:
    """Read the rows of ranges that follow each other, in this format; return the content of each.

    Each table is read once, by a cursor of the server: our memory stays the same, whatever the size.
    """
    found = [_Content() for _ in ranges]
    whole = _Range(ranges[0].from_xid, ranges[-1].to_xid)
    for name, statement in _ROWS[number].items():
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


# --- seals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seal:
    """A seal as it is stored: what the transactions from `from_xid` to before `to_xid` wrote has this digest.

    `as_of`: everything that was written before this instant has been sealed with this seal or an earlier one (for a
    seal that is older than every sample of the clock: the oldest sample). `rows` counts all tables, `credits` are the
    sum of the transfers'.
    """

    seal_id: int
    format: int
    from_xid: int
    to_xid: int
    previous_to_xid: int | None
    """As `from_xid`; None for the first seal."""
    as_of: datetime
    sealed_at: datetime
    rows: int
    credits: int
    previous_digest: bytes
    digest: bytes

    @property
    def transactions(self) -> _Range:
        """The range of transactions that it seals."""
        return _Range(self.from_xid, self.to_xid)

    def digest_of(self, content: _Content) -> bytes:
        """Return the digest that a seal of this content has."""
        head: list[object] = [
            "kino-seal",
            self.format,
            self.seal_id,
            self.from_xid,
            self.to_xid,
            _microseconds(self.as_of),
            _microseconds(self.sealed_at),
            self.rows,
            self.credits,
            self.previous_digest.hex(),
        ]
        tables = [part for name, (rows, digest) in content.tables.items() for part in (name, rows, digest)]
        return hashlib.sha256(b"".join(map(_field, [*head, *tables]))).digest()


def seal_text(seal: Seal) -> str:
    """Return the seal as people keep it outside: its number, a colon and its digest in hex."""
    return f"{seal.seal_id}:{seal.digest.hex()}"


def _field(value: object) -> bytes:
    encoded = str(value).encode()
    return b"%d:%s" % (len(encoded), encoded)


def _microseconds(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1)


_STORED = f"""
    SELECT seal_id, format, CAST(from_xid AS text) AS from_xid, CAST(to_xid AS text) AS to_xid,
           CAST(previous_to_xid AS text) AS previous_to_xid,
           {_instant_sql("as_of")} AS as_of, {_instant_sql("sealed_at")} AS sealed_at, rows,
           CAST(credits AS text) AS credits, previous_digest, digest
    FROM kino.seal
"""  # noqa: S608 - a constant
_NEWEST = sa.text(f"{_STORED} ORDER BY seal_id DESC LIMIT 1")
_FROM = sa.text(f"{_STORED} WHERE seal_id >= :first ORDER BY seal_id LIMIT :limit")
_NEXT_ID = sa.text("SELECT min(seal_id) FROM kino.seal WHERE seal_id > :seal_id")
_NEWEST_KNOWN = sa.text("""
    SELECT seal_id FROM kino.seal WHERE format = ANY (CAST(:formats AS bigint[])) ORDER BY seal_id DESC LIMIT 1
""")
_BEFORE = sa.text(f"{_STORED} WHERE seal_id < :first ORDER BY seal_id DESC LIMIT 1")


def _seal(row: sa.Row[*tuple[Any, ...]]) -> Seal:
    # What a forger wrote must come to a wrong digest, and not end the check with an error.
    return Seal(
        seal_id=row.seal_id,
        format=row.format,
        from_xid=int(row.from_xid),
        to_xid=int(row.to_xid),
        previous_to_xid=None if row.previous_to_xid is None else int(row.previous_to_xid),
        as_of=_instant(row.as_of),
        sealed_at=_instant(row.sealed_at),
        rows=row.rows,
        credits=_whole(row.credits),
        previous_digest=bytes(row.previous_digest),
        digest=bytes(row.digest),
    )


def _instant(text: str) -> datetime:
    try:
        return EPOCH + timedelta(microseconds=int(text))
    except (ValueError, OverflowError):  # infinity, or a year that Python does not have
        return FIRST_INSTANT if text.startswith("-") else LAST_INSTANT


def _whole(text: str) -> int:
    try:
        number = Decimal(text)
        return int(number) if number == number.to_integral_value() else NOT_A_SUM
    except (InvalidOperation, ValueError, OverflowError):  # NaN, infinity
        return NOT_A_SUM


def newest_seal(connection: sa.Connection) -> Seal | None:
    """Return the newest seal; None if there is none yet."""
    row = connection.execute(_NEWEST).one_or_none()
    return None if row is None else _seal(row)


# --- appending ---------------------------------------------------------------------------------------------------

_LOCK = sa.text("SELECT pg_try_advisory_xact_lock(:key)")
# Ordered by the number and not by its text, in which 99 is newer than 100.
_SAMPLE = sa.text("""
    SELECT CAST(c.xid AS text) AS to_text FROM kino.xid_clock c WHERE c.xid < kino.horizon() ORDER BY c.xid DESC LIMIT 1
""")
# The newest sample that is not younger; where a first range was split before any sample, the oldest.
_AS_OF = sa.text("""
    SELECT sampled_at AS as_of, kino.clock() AS now FROM (
        (SELECT sampled_at, 1 AS nth FROM kino.xid_clock WHERE xid <= CAST(:to_text AS xid8) ORDER BY xid DESC LIMIT 1)
        UNION ALL
        (SELECT sampled_at, 2 FROM kino.xid_clock ORDER BY xid LIMIT 1)
    ) AS sample ORDER BY nth LIMIT 1
""")
_INSERT = sa.text("""
    INSERT INTO kino.seal (seal_id, format, from_xid, to_xid, previous_to_xid, as_of, rows, credits, previous_digest,
                           digest, sealed_at)
    VALUES (:seal_id, :format, CAST(:from_text AS xid8), CAST(:to_text AS xid8), CAST(:previous AS xid8), :as_of,
            :rows, :credits, :previous_digest, :digest, :sealed_at)
""")


def append_seal(engine: sa.Engine, *, rows_max: int = ROWS_MAX) -> Seal | None:
    """Seal what follows the last seal, up to the newest sample of the clock below the horizon; return the new seal.

    A range with more than `rows_max` rows is sealed in parts, a part at each call. A range without rows is sealed too:
    that nothing happened is history as well. Returns None if there is no newer sample, or if another session seals now.
    Nothing remains of a call that is killed. Raises what Postgres raises.
    """
    with _session(engine) as connection:
        # (1) A has the lock, reads the newest seal and writes the next, (2) B does not get the lock and leaves,
        # (3) A commits, which frees the lock, (4) C gets the lock and reads A's seal. If two wrote a seal nevertheless,
        # the keys of the table would refuse the second.
        if not connection.execute(_LOCK, {"key": LOCK}).scalar_one():
            return None
        last = newest_seal(connection)
        begin = 0 if last is None else last.to_xid
        sample = connection.execute(_SAMPLE).scalar_one_or_none()
        if sample is None or int(sample) <= begin:
            return None
        found = _Range(begin, _end(connection, _Range(begin, int(sample)), rows_max))
        (content,) = _contents(connection, NEWEST_FORMAT, [found])
        times = connection.execute(_AS_OF, found.bound).one()
        draft = Seal(
            seal_id=1 if last is None else last.seal_id + 1,
            format=NEWEST_FORMAT,
            from_xid=found.from_xid,
            to_xid=found.to_xid,
            previous_to_xid=None if last is None else last.to_xid,
            as_of=times.as_of,
            sealed_at=times.now,
            rows=content.rows,
            credits=content.credits,
            previous_digest=FIRST if last is None else last.digest,
            digest=FIRST,
        )
        digest = draft.digest_of(content)
        connection.execute(
            _INSERT,
            found.bound
            | {
                "seal_id": draft.seal_id,
                "format": draft.format,
                "previous": None if last is None else str(found.from_xid),
                "as_of": draft.as_of,
                "rows": draft.rows,
                "credits": draft.credits,
                "previous_digest": draft.previous_digest,
                "digest": digest,
                "sealed_at": draft.sealed_at,
            },
        )
    # Read again, so that what is logged is what is stored.
    with engine.begin() as connection:
        seal = next(_read(connection, draft.seal_id, 1))
    log.info(
        "the ledger's history is sealed: keep this seal outside of the database",
        seal=seal_text(seal),
        as_of=seal.as_of.isoformat(),
        rows=seal.rows,
    )
    return seal


def _end(connection: sa.Connection, wanted: _Range, rows_max: int) -> int:
    """Return where a seal that begins at the range's begin ends: its end, or before it has more than `rows_max` rows.

    Counts at most about twice what the seal will have, whatever lies behind it.
    """

    def fits(end: int) -> bool:
        bound = _Range(wanted.from_xid, end).bound | {"most": rows_max + 1}
        return bool(connection.execute(_COUNT, bound).scalar_one() <= rows_max)

    if fits(wanted.to_xid):
        return wanted.to_xid
    width, fitting = 1_024, 0
    while wanted.from_xid + width < wanted.to_xid and fits(wanted.from_xid + width):
        fitting, width = width, 2 * width
    too_wide = min(width, wanted.to_xid - wanted.from_xid)
    # Close enough: a seal that is an eighth smaller than it could be does no harm, and each step counts again.
    while too_wide - fitting > max(1, fitting // 8):
        middle = (fitting + too_wide) // 2
        if fits(wanted.from_xid + middle):
            fitting = middle
        else:
            too_wide = middle
    return wanted.from_xid + max(fitting, 1)


# --- verifying ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """What came of comparing some seals: how many had two sides, how many rows they have, and what is broken.

    `unknown` of them are in a format that this build does not know. `next_id`: where the next seals begin; None: these
    were the last.
    """

    compared: int
    rows: int
    breaks: Sequence[Break]
    unknown: int
    next_id: int | None


def verify_seals(engine: sa.Engine, *, since_seal: int = 1, until_seal: int | None = None) -> Iterator[Verified]:
    """Compute the digests of these seals again, and compare; None: to the newest. Needs the right to read only.

    A break is of kind history_changed; its subject is `seal:` and the number. Each item is read in a transaction of its
    own, of at most about ROWS_MAX rows. Raises what Postgres raises.
    """
    at: int | None = since_seal
    while at is not None:
        found = _verify_some(engine, at, until_seal)
        yield found
        at = found.next_id


def _read(connection: sa.Connection, first: int, limit: int) -> Iterator[Seal]:
    return map(_seal, connection.execute(_FROM, {"first": first, "limit": limit}).all())


def _verify_some(engine: sa.Engine, first: int, until: int | None) -> Verified:
    with _session(engine) as connection:
        before = connection.execute(_BEFORE, {"first": first}).one_or_none()
        previous = None if before is None else _seal(before)
        stored = [seal for seal in _read(connection, first, SEALS_A_PAGE + 1) if until is None or seal.seal_id <= until]
        some = _first_rows(stored[:SEALS_A_PAGE])
        newest_known = connection.execute(_NEWEST_KNOWN, {"formats": list(FORMATS)}).scalar_one_or_none() or 0
        breaks: dict[tuple[str, str], Break] = {}
        gaps = unknown = 0
        sound = _Sound(connection)
        sound.read_ahead(some)
        for seal in some:
            found: list[Break] = []
            expected = 1 if previous is None else previous.seal_id + 1
            if seal.seal_id != expected:
                gaps += 1
                found.append(_missing(expected, seal, previous))
            if seal.format not in FORMATS and seal.seal_id > newest_known:
                unknown += 1  # a newer build writes seals beside this one
            else:
                if not sound.is_sound(seal):
                    found.append(_changed(seal, sound.content(seal), previous))
                if seal.seal_id == expected:
                    found += _unchained(seal, previous, sound)
            for each in found:
                breaks.setdefault(each.key, each)
            previous = seal
    return Verified(
        compared=len(some) - unknown + gaps,
        rows=sum(seal.rows for seal in some),
        breaks=list(breaks.values()),
        unknown=unknown,
        next_id=some[-1].seal_id + 1 if len(some) < len(stored) else None,
    )


def _first_rows(seals: Sequence[Seal]) -> list[Seal]:
    """Return as many of these seals as have ROWS_MAX rows together, one at least."""
    some: list[Seal] = []
    rows = 0
    for seal in seals:
        rows += seal.rows
        if some and rows > ROWS_MAX:
            break
        some.append(seal)
    return some


class _Sound:
    """The contents of seals' ranges, read once; of seals that follow each other, in one pass over each table."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._contents: dict[int, _Content] = {}

    def read_ahead(self, seals: Iterable[Seal]) -> None:
        line: list[Seal] = []
        for seal in [*seals, None]:
            follows = line and seal is not None and (seal.from_xid, seal.format) == (line[-1].to_xid, line[-1].format)
            if line and not follows:
                self._read(line)
                line = []
            if seal is not None and seal.format in FORMATS and seal.from_xid < seal.to_xid:
                line.append(seal)

    def _read(self, line: Sequence[Seal]) -> None:
        contents = _contents(self._connection, line[0].format, [seal.transactions for seal in line])
        self._contents |= {seal.seal_id: content for seal, content in zip(line, contents, strict=True)}

    def content(self, seal: Seal) -> _Content | None:
        """Return what the seal's range has now; None if the range or the format is none."""
        if seal.seal_id not in self._contents:
            self.read_ahead([seal])
        return self._contents.get(seal.seal_id)

    def is_sound(self, seal: Seal) -> bool:
        content = self.content(seal)
        return (
            content is not None
            and seal.digest_of(content) == seal.digest
            and seal.previous_to_xid == (seal.from_xid if seal.seal_id > 1 else None)
        )


def _unchained(seal: Seal, previous: Seal | None, sound: _Sound) -> Iterator[Break]:
    """Give the break of two seals that do not fit together, unless the digest of one of them says what is wrong."""
    if previous is None:
        if (seal.from_xid, seal.previous_digest) != (0, FIRST) and sound.is_sound(seal):
            yield _changed(seal, None, previous)
    elif seal.previous_digest != previous.digest:
        # Where only the later seal's copy of that digest was changed, the earlier seal is as it was.
        if sound.is_sound(previous) and not sound.is_sound(replace(seal, previous_digest=previous.digest)):
            yield _rewritten(previous, seal)
    elif seal.from_xid != previous.to_xid and sound.is_sound(seal) and sound.is_sound(previous):
        yield _changed(seal, None, previous)


def _where(seal: Seal, previous: Seal | None) -> str:
    since = "the beginning" if previous is None else _time(previous.as_of)
    return f"transactions {seal.from_xid} to before {seal.to_xid} (from {since} to {_time(seal.as_of)})"


def _time(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M:%S}Z"


def _changed(seal: Seal, now: _Content | None, previous: Seal | None) -> Break:
    where = _where(seal, previous)
    if now is None:
        detail, found = f"seal {seal.seal_id} was changed: no seal has its range or its format ({where})", "nothing"
    else:
        detail = (
            f"the ledger's rows of {where}, or seal {seal.seal_id} itself, were changed since it was written: it seals"
            f" {seal.rows:,} rows of {seal.credits:,} credits, there are {now} now"
        )
        found = seal.digest_of(now).hex()
    return _break(
        seal.seal_id,
        detail,
        sides=f"{seal.digest.hex()} / {found}",
        credits=abs(seal.credits - now.credits) if now is not None else seal.credits,
    )


def _rewritten(seal: Seal, following: Seal) -> Break:
    detail = (
        f"seal {seal.seal_id} was written anew: seal {following.seal_id} continues one with digest"
        f" {following.previous_digest.hex()}, this one has {seal.digest.hex()}; what transactions {seal.from_xid} to"
        f" before {seal.to_xid} (to {_time(seal.as_of)}) wrote, or earlier ones, may have been changed with it"
    )
    return _break(seal.seal_id, detail, sides=f"{seal.digest.hex()} / {following.previous_digest.hex()}", credits=0)


def _missing(seal_id: int, following: Seal, previous: Seal | None) -> Break:
    last = following.seal_id - 1
    names = f"seal {seal_id} is" if last == seal_id else f"seals {seal_id} to {last} are"
    begin = 0 if previous is None else previous.to_xid
    since = "the beginning" if previous is None else _time(previous.as_of)
    detail = (
        f"{names} missing: transactions {begin} to before {following.from_xid} (from {since}, to before"
        f" {_time(following.as_of)}) are not sealed any more"
    )
    return _break(seal_id, detail, sides=f"missing / {last}", credits=0)


def _break(seal_id: int, detail: str, *, sides: str, credits: int) -> Break:
    return Break(
        kind=BreakKind.HISTORY_CHANGED,
        subject=f"seal:{seal_id}",
        credits=max(0, min(credits, BIGINT_MAX)),
        detail=detail,
        sides=sides,
    )


# --- the check ---------------------------------------------------------------------------------------------------

# Reads every seal and no row of the ledger. A seal whose own row was changed mostly shows here: the next one has its
# digest.
_LOOSE = sa.text("""
    SELECT seal_id FROM (
        SELECT seal_id, from_xid, previous_digest, lag(seal_id) OVER along AS before_id,
               lag(to_xid) OVER along AS before_to, lag(digest) OVER along AS before_digest
        FROM kino.seal WINDOW along AS (ORDER BY seal_id)
    ) AS s
    WHERE seal_id <> coalesce(before_id, 0) + 1 OR from_xid <> coalesce(before_to, CAST('0' AS xid8))
       OR previous_digest <> coalesce(before_digest, CAST(:first AS bytea))
    ORDER BY seal_id LIMIT :limit
""")

NOT_KNOWN = "sealed in a format that this build does not know"


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Append what is new and verify the newest seals and the chain; with `scope.full`, verify every seal.

    The full run appends nothing, so a login that may only read can do it; neither does a dry run. The other one
    verifies the seal that was the newest before it began; those that it appends, it has just computed.
    """
    yield from _full(scope, cursor) if scope.full else _incremental(scope, cursor)


def _full(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    at, rows = cursor.get("seal", 1), cursor.get("rows", 0)
    if at is None:
        return
    until = cursor.get("until")
    if until is None:
        newest = _newest(scope.engine)
        until = 0 if newest is None else newest.seal_id
    for found in verify_seals(scope.engine, since_seal=at, until_seal=until):
        rows += found.rows
        yield _page(found, {"seal": found.next_id, "rows": rows, "until": until}, _detail(scope.engine, rows))


def _incremental(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    # Stored before anything is appended: a run that goes on verifies the seal that it found, and not its own.
    if "newest" not in cursor:
        newest = _newest(scope.engine)
        cursor = {"newest": 0 if newest is None else newest.seal_id}
        yield Page(cursor=cursor)
    while not scope.dry_run and append_seal(scope.engine) is not None:
        yield Page(cursor=cursor, detail=_detail(scope.engine, 0))
    with scope.engine.begin() as connection:
        loose = connection.execute(_LOOSE, {"first": FIRST, "limit": SEALS_A_PAGE}).scalars().all()
    # Of a seal and the one before it that do not fit together, either may have been changed.
    wanted = {cursor["newest"], *loose, *(seal_id - 1 for seal_id in loose)} - {0}
    rows = 0
    for seal_id in sorted(wanted):
        if seal_id <= cursor.get("seal", 0):
            continue
        for found in verify_seals(scope.engine, since_seal=seal_id, until_seal=seal_id):
            rows += found.rows
            yield _page(found, {**cursor, "seal": seal_id}, _detail(scope.engine, rows))


def _page(found: Verified, cursor: Mapping[str, Any], detail: Mapping[str, Any]) -> Page:
    return Page(
        cursor=cursor,
        compared=found.compared,
        broken=min(len(found.breaks), found.compared),
        breaks=found.breaks,
        not_comparable={NOT_KNOWN: found.unknown} if found.unknown else {},
        detail=detail,
    )


def _newest(engine: sa.Engine) -> Seal | None:
    with engine.begin() as connection:
        return newest_seal(connection)


def _detail(engine: sa.Engine, rows: int) -> dict[str, Any]:
    newest = _newest(engine)
    if newest is None:
        return {"rows": rows}
    return {"rows": rows, "newest_seal": seal_text(newest), "sealed_through": newest.as_of.isoformat()}


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Look again at breaks of this check, by their seals."""
    found: dict[int, Break | None] = {}
    newest = _newest(scope.engine)
    for each in live:
        number = re.fullmatch(r"seal:(\d{1,18})", each.subject)
        # A seal behind the newest one cannot be compared: it is gone with all that followed.
        if number is None or newest is None or (seal_id := int(number[1])) > newest.seal_id:
            continue
        # The next one that there is, too: it says what digest this one had, or that this one is missing.
        with scope.engine.begin() as connection:
            following = connection.execute(_NEXT_ID, {"seal_id": seal_id}).scalar_one()
        verified = list(verify_seals(scope.engine, since_seal=seal_id, until_seal=following or seal_id))
        breaks = {one.key: one for some in reversed(verified) for one in some.breaks}
        now = breaks.get((each.kind, each.subject))
        if now is not None or not any(some.unknown for some in verified):
            found[each.break_id] = now
    return found


# --- a copy outside ----------------------------------------------------------------------------------------------

_COPIED = re.compile(r"(?<![0-9a-fA-F])(\d{1,18}):([0-9a-fA-F]{64})(?![0-9a-fA-F])")


class CopyState(StrEnum):
    """What the ledger has of a seal that was copied."""

    SAME = "same"
    OTHER_DIGEST = "other digest"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class CopiedSeal:
    """A seal of a copy, and what the ledger has of it; `digest` is the copy's, in hex."""

    seal_id: int
    digest: str
    state: CopyState


@dataclass(frozen=True, slots=True)
class CopyComparison:
    """The seals of a copy beside the ledger's, and what verifying every seal up to the newest of them found."""

    seals: Sequence[CopiedSeal]
    verified: int
    """How many seals of the ledger were computed again."""
    breaks: Sequence[Break]
    unknown: int
    """How many seals are in a format that this build does not know."""

    @property
    def is_same(self) -> bool:
        """Whether the ledger's history, up to the newest seal of the copy, is what it was when that was copied."""
        return not self.breaks and not self.unknown and all(seal.state is CopyState.SAME for seal in self.seals)


def compare_with_copy(
    engine: sa.Engine, copy: str, *, progress: Callable[[Verified], None] | None = None
) -> CopyComparison:
    """Compare the ledger's seals with a copy that was kept outside; reads every row up to the newest of them.

    `copy` is `4711:` and a digest in hex, or the name of a file that has such texts anywhere: log lines do. `progress`
    is called with each part. Raises BadCopy if it has none, and what opening the file raises.
    """
    wanted = _copied(copy)
    with engine.begin() as connection:
        stored = {
            row.seal_id: row.digest
            for row in connection.execute(_DIGESTS, {"ids": sorted({seal_id for seal_id, _ in wanted})})
        }
    seals = [CopiedSeal(seal_id, digest, _state(stored.get(seal_id), digest)) for seal_id, digest in wanted]
    breaks: dict[tuple[str, str], Break] = {}
    verified = unknown = 0
    for found in verify_seals(engine, until_seal=max(seal.seal_id for seal in seals)):
        verified, unknown = verified + found.compared, unknown + found.unknown
        breaks |= {each.key: each for each in found.breaks}
        if progress is not None:
            progress(found)
    return CopyComparison(seals=seals, verified=verified, breaks=list(breaks.values()), unknown=unknown)


_DIGESTS = sa.text(
    "SELECT seal_id, encode(digest, 'hex') AS digest FROM kino.seal WHERE seal_id = ANY (CAST(:ids AS bigint[]))"
)


def _state(stored: str | None, copied: str) -> CopyState:
    if stored is None:
        return CopyState.MISSING
    return CopyState.SAME if stored == copied else CopyState.OTHER_DIGEST


def _copied(copy: str) -> list[tuple[int, str]]:
    if _COPIED.fullmatch(copy.strip()):
        return _copied_in(copy)
    with Path(copy).open(encoding="utf-8", errors="replace") as file:
        # One seal may stand in several lines, and once with another digest: then both are compared.
        found = {each: None for line in file for each in _copied_in(line)}
    if not found:
        raise BadCopy(f"{copy} names no seal: a seal is its number, a colon and 64 hexadecimal digits")
    return list(found)


def _copied_in(text: str) -> list[tuple[int, str]]:
    return [(int(seal_id), digest.lower()) for seal_id, digest in _COPIED.findall(text)]
