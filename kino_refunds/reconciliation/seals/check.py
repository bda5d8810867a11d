"""The check `seals`: append what is new, verify the newest seal and the chain, and look again at what is broken."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.reconciliation.comparison import Page
from kino_refunds.reconciliation.seals.append import append_seal
from kino_refunds.reconciliation.seals.stored import FIRST, Seal, newest_seal, seal_text
from kino_refunds.reconciliation.seals.verify import SEALS_A_PAGE, Verified, verify_seals

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from kino_refunds.reconciliation.comparison import LiveBreak, Scope
    from kino_refunds.settlement.breaks import Break

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

_NEXT_ID = sa.text("SELECT min(seal_id) FROM kino.seal WHERE seal_id > :seal_id")

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
