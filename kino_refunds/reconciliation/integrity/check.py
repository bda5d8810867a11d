"""The check `integrity`: ask every query of what is new, or of everything, and look again at what is broken.

An incremental run asks about the charges, jobs, lots and accounts that transactions of its window touched. A row that
was changed without a transaction of its window (by a superuser, or in a table without numbers: the inbox, causes, the
lots themselves) is found by it only if something else touched the same key; `--full` finds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.reconciliation.comparison import PAGE, LiveBreak, Page
from kino_refunds.reconciliation.integrity.queries import KEY_TYPES, KeyScope, Query, all_queries
from kino_refunds.settlement.breaks import Break

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Mapping, Sequence

    from kino_refunds.reconciliation.comparison import Scope, Window

KINDS = frozenset(query.name for query in all_queries())
"""The kinds of the breaks of this check."""
TOUCHED_MAX = 100_000
"""Keys of one scope: for more of them it is faster to read the tables whole."""
BREAKS_MAX = 10_000
"""Breaks that one query may write in a run. A change to a whole table would else write a row for each of its rows; the
others are counted, and the next run finds them when these are mended."""
SAMPLE = 100
"""Lots whose whole history an incremental run reads: the history of 1,000 lots took 2 s where that of 100 takes 0.2. A
mistake of a function shows in any of them, and `--full` reads all."""
TOO_MANY = f"broken in the same way as {BREAKS_MAX:,} others, which are breaks"

Key = int | str


def violations(connection: Any, *, without: Collection[str] = ()) -> list[str]:
    """Return one sentence for each impossible thing in the ledger, in one snapshot.

    `connection` is psycopg's or SQLAlchemy's, of any role that may read the ledger. `without` names queries, or topics,
    that are left out: a test that settles without an inbox leaves out `inbox`, one that moves the clock `times`.
    """
    asked = [query for query in all_queries() if not {query.name, query.topic} & set(without)]
    whole = "\nUNION ALL\n".join(
        f"SELECT {number} AS place, found.sentence FROM (\n{query.of_everything}\n) AS found"  # noqa: S608 - constants
        for number, query in enumerate(asked)
    )
    driver = getattr(connection, "connection", connection)
    return [sentence for _, sentence in sorted(driver.cursor().execute(whole.encode()).fetchall())]


@dataclass(frozen=True, slots=True)
class Touched:
    """The keys that transactions of a window touched, by scope."""

    keys: Mapping[KeyScope, Sequence[Key]] = field(default_factory=dict)

    def of(self, scope: KeyScope) -> Sequence[Key]:
        """Return the keys of one scope, sorted."""
        return self.keys.get(scope, ())


# The number is compared as the index holds it: a range of blocks for large tables, single rows for small ones.
_IN_LARGE = "CAST(CAST({0}.xid AS text) AS bigint) >= :from_xid AND CAST(CAST({0}.xid AS text) AS bigint) < :to_xid"
_IN_SMALL = "{0}.xid >= CAST(CAST(:from_xid AS text) AS xid8) AND {0}.xid < CAST(CAST(:to_xid AS text) AS xid8)"
_TOUCHED = sa.text(f"""
    WITH moved AS MATERIALIZED (
        SELECT DISTINCT t.account_id, t.lot_id, t.to_lot_id, t.charge_id FROM kino.transfer t
        WHERE {_IN_LARGE.format("t")}
    ), changed AS MATERIALIZED (
        SELECT h.lot_id, h.account_id FROM kino.lot_change h WHERE {_IN_SMALL.format("h")}
    ), charge AS MATERIALIZED (
        SELECT moved.charge_id FROM moved WHERE moved.charge_id IS NOT NULL
        UNION SELECT s.charge_id FROM kino.settlement s WHERE {_IN_LARGE.format("s")}
        UNION SELECT c.charge_id FROM kino.charge c WHERE {_IN_LARGE.format("c")}
        UNION SELECT k.charge_id FROM kino.correction k WHERE {_IN_SMALL.format("k")}
    )
    SELECT 'charge' AS scope, CAST(charge.charge_id AS text) AS key FROM charge
    UNION ALL
    SELECT 'job', c.job_id FROM charge JOIN kino.charge c ON c.charge_id = charge.charge_id
    UNION ALL
    SELECT 'lot', CAST(lot.lot_id AS text)
    FROM (SELECT moved.lot_id FROM moved UNION SELECT moved.to_lot_id FROM moved
          UNION SELECT changed.lot_id FROM changed) AS lot
    WHERE lot.lot_id IS NOT NULL
    UNION ALL
    SELECT 'account', account.account_id
    FROM (SELECT moved.account_id FROM moved
          UNION SELECT changed.account_id FROM changed
          UNION SELECT c.account_id FROM charge JOIN kino.charge c ON c.charge_id = charge.charge_id
          UNION SELECT a.account_id FROM kino.account_status_change a WHERE {_IN_SMALL.format("a")}) AS account
    LIMIT :limit
""")  # noqa: S608 - constants


def touched(connection: sa.Connection, window: Window) -> Touched | None:
    """Return what transactions of the window touched; None if that is more than TOUCHED_MAX of one scope."""
    limit = TOUCHED_MAX * len(KEY_TYPES) + 1
    found: dict[KeyScope, set[Key]] = {scope: set() for scope in KEY_TYPES}
    parameters = {"from_xid": window.from_xid, "to_xid": window.to_xid, "limit": limit}
    for word, text in connection.execute(_TOUCHED, parameters):
        scope = KeyScope(word)
        found[scope].add(_key(scope, text))
    if any(len(keys) > TOUCHED_MAX for keys in found.values()):
        return None
    return Touched({scope: sorted(keys) for scope, keys in found.items()})


def _sample(keys: Sequence[Key], window: Window) -> Sequence[Key]:
    """Return some of the keys: the same ones for the same window, and others for the next."""
    by_chance = sorted(keys, key=lambda key: blake2b(f"{window.to_xid}:{key}".encode()).digest())
    return sorted(by_chance[:SAMPLE])


def _key(scope: KeyScope, text: str) -> Key:
    return int(text) if KEY_TYPES.get(scope) == "bigint" else text


@dataclass(frozen=True, slots=True)
class Found:
    """What is wrong with one key, by one query; `others` counts its further sentences, `broken` all broken keys."""

    key: str
    charge_id: int | None
    job_id: str | None
    account_id: str | None
    credits: int
    sentence: str
    others: int
    sides: str
    broken: int


# The digest of all sentences of a key takes no memory, however many they are, and does not depend on their order.
_ONE_A_KEY = """
    SELECT broken.*, c.job_id
    FROM (SELECT CAST(found.key AS text) COLLATE "C" AS key, min(found.charge_id) AS charge_id,
                 min(found.account_id) AS account_id,
                 CAST(least(sum(found.credits), 9223372036854775807) AS bigint) AS credits,
                 min(found.sentence) AS sentence, count(*) - 1 AS others,
                 CAST(sum(CAST(hashtextextended(found.sentence, 0) AS numeric)) AS text) AS sides,
                 count(*) OVER () AS broken
          FROM (
{query}
          ) AS found
          GROUP BY found.key ORDER BY 1 LIMIT :limit) AS broken
    LEFT JOIN kino.charge c ON c.charge_id = broken.charge_id
    ORDER BY broken.key
"""


def _ask(connection: sa.Connection, query: Query, keys: Sequence[Key] | None) -> list[Found]:
    """Ask one query of these keys, or of everything (None); return up to BREAKS_MAX keys that are broken."""
    text = query.of_everything if keys is None else query.of_keys
    parameters: dict[str, Any] = {"limit": BREAKS_MAX}
    if keys is not None and query.scope is not KeyScope.LEDGER:
        parameters["keys"] = list(keys)
    rows = connection.execute(sa.text(_ONE_A_KEY.format(query=text)), parameters).mappings()
    return [Found(**row) for row in rows]


# A plan for these very keys: one that is kept for any number of them reads a large ledger whole, or key by key what it
# should read whole. What was touched a moment ago is in memory, so a page that an index leads to costs little more than
# the next one. No parallel workers: what settles meanwhile needs the processors.
_SESSION = sa.text("""
    SELECT set_config('plan_cache_mode', 'force_custom_plan', true), set_config('jit', 'off', true),
           set_config('max_parallel_workers_per_gather', '0', true), set_config('work_mem', '32MB', true),
           set_config('transaction_read_only', 'on', true),
           CASE WHEN :by_key THEN set_config('random_page_cost', '1.1', true) END
""")


def _prepare(connection: sa.Connection, *, by_key: bool) -> None:
    connection.execute(_SESSION, {"by_key": by_key})


def _break(query: Query, found: Found) -> Break:
    more = f" (and {found.others:,} more like it)" if found.others else ""
    of_job = query.scope is KeyScope.JOB
    return Break(
        kind=query.name,
        job_id=found.key if of_job else found.job_id,
        subject=None if of_job else f"{query.scope}:{found.key}",
        charge_id=found.charge_id,
        credits=found.credits,
        detail=f"{found.sentence}{more}",
        sides=f"{found.sentence}\n{found.sides}",
    )


_COUNTS = sa.text("""
    SELECT (SELECT count(*) FROM kino.charge) AS charge, (SELECT count(*) FROM kino.charge) AS job,
           (SELECT count(*) FROM kino.credit_lot) AS lot, (SELECT count(*) FROM kino.account) AS account, 1 AS ledger
""")


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Ask each query, one a page. The cursor holds the names of those that were asked.

    `compared` counts each key once for each query that was asked about it. Everything is read if that is asked for, if
    the window begins at the beginning, or if too much was touched in it.
    """
    done = list(cursor.get("done", ()))
    in_full = bool(scope.full or scope.window.from_xid == 0 or cursor.get("in_full", False))
    keys: Touched | None = None
    with scope.engine.begin() as connection:
        _prepare(connection, by_key=not in_full)
        if not in_full:
            keys = touched(connection, scope.window)
        if keys is None:
            counts = dict(connection.execute(_COUNTS).mappings().one())
        else:
            counts = {each.value: len(keys.of(each)) for each in KeyScope} | {KeyScope.LEDGER.value: 1}
    for query in all_queries():
        left_out = keys is not None and (query.only_in_full or not counts[query.scope])
        if query.name in done or left_out:
            continue
        wanted = None if keys is None else keys.of(query.scope)
        if wanted is not None and query.of_a_sample:
            wanted = _sample(wanted, scope.window)
        with scope.engine.begin() as connection:
            _prepare(connection, by_key=wanted is not None)
            found = _ask(connection, query, wanted)
        done.append(query.name)
        asked = len(wanted) if wanted is not None and query.of_a_sample else counts[query.scope]
        broken = found[0].broken if found else 0
        # A row may name a charge or lot that is not there: what is broken was looked at all the same.
        compared = max(asked, broken) - (broken - len(found))
        yield Page(
            cursor={"done": list(done), "in_full": keys is None},
            compared=compared,
            broken=len(found),
            breaks=[_break(query, each) for each in found],
            not_comparable={TOO_MANY: broken - len(found)} if broken > len(found) else {},
            detail={"looked_at": "everything" if keys is None else "what was touched", "keys": counts},
        )


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Look again at live breaks of this check, by their keys; one whose kind or key this build cannot read is left out.

    Returns by break id the break as it is now, or None if it is one no more.
    """
    now: dict[int, Break | None] = {}
    for query in all_queries():
        keys = {each.break_id: key for each in live if each.kind == query.name and (key := _key_of(query, each))}
        wanted = sorted(set(keys.values()))
        for start in range(0, len(wanted), PAGE):
            some = wanted[start : start + PAGE]
            with scope.engine.begin() as connection:
                _prepare(connection, by_key=True)
                found = _ask(connection, query, [_key(query.scope, key) for key in some])
            broken = {each.key: _break(query, each) for each in found}
            now |= {break_id: broken.get(key) for break_id, key in keys.items() if key in set(some)}
    return now


def _key_of(query: Query, live: LiveBreak) -> str | None:
    """Return the key that a subject names (`lot:7`); None if it is of another scope, or no number where one must be."""
    scope, _, key = live.subject.partition(":")
    if scope != query.scope or not key:
        return None
    is_number = key.isascii() and key.isdecimal()
    return key if is_number or KEY_TYPES.get(query.scope) != "bigint" else None
