"""Append a seal: seal what follows the newest one, under a lock, in one transaction."""

from __future__ import annotations

import sqlalchemy as sa

from kino_refunds.reconciliation.seals.contents import Range, read_contents, session
from kino_refunds.reconciliation.seals.format import NEWEST_FORMAT, ROW_COUNT
from kino_refunds.reconciliation.seals.stored import FIRST, ROWS_MAX, Seal, newest_seal, read_seals, seal_text
from kino_refunds.telemetry.log import get_logger

log = get_logger("kino.seals")

LOCK = 0x6B696E6F5EA1
"""An advisory lock: any number that no other program uses in this database. Its first bytes are those of "kino"."""

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
    with session(engine) as connection:
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
        found = Range(begin, _end(connection, Range(begin, int(sample)), rows_max))
        (content,) = read_contents(connection, NEWEST_FORMAT, [found])
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
        seal = next(read_seals(connection, draft.seal_id, 1))
    log.info(
        "the ledger's history is sealed: keep this seal outside of the database",
        seal=seal_text(seal),
        as_of=seal.as_of.isoformat(),
        rows=seal.rows,
    )
    return seal


def _end(connection: sa.Connection, wanted: Range, rows_max: int) -> int:
    """Return where a seal that begins at the range's begin ends: its end, or before it has more than `rows_max` rows.

    Counts at most about twice what the seal will have, whatever lies behind it.
    """

    def fits(end: int) -> bool:
        bound = Range(wanted.from_xid, end).bound | {"most": rows_max + 1}
        return bool(connection.execute(ROW_COUNT, bound).scalar_one() <= rows_max)

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
