"""The proof: what can be said of a stretch of time, and whether all of it is true (design, part B).

It reads only. Each sentence says what it rests on; it never says "every job" without the source's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.errors import BadWindow
from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.reconciliation.run_rows import Coverage, read_coverage
from kino_refunds.reconciliation.seals import CopyComparison, CopyState, newest_seal, seal_text
from kino_refunds.reconciliation.verified import read_verified

if TYPE_CHECKING:
    from kino_refunds.settings import Settings

Figures = dict[str, Any]
"""Figures for an auditor, as JSON."""
OPTIONAL = "relay"
"""The check that a proof does without where the relay is switched off: then the product is told of nothing."""


@dataclass(frozen=True, slots=True)
class SourceSaid:
    """The job source's name, and its promise; it was asked a moment ago. None: it promises nothing."""

    name: str
    complete_through: datetime | None


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a proof: whether it holds, and the command that shows more where it does not."""

    text: str
    holds: bool
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """What is proven between `since` and `until`; `figures` hold what an auditor needs beside the sentences."""

    since: datetime | None
    until: datetime
    sentences: Sequence[Sentence]
    figures: Figures

    @property
    def holds(self) -> bool:
        """Whether every sentence is true."""
        return all(sentence.holds for sentence in self.sentences)


# The newest run over everything that came so far, and those after it: an older one compared the same rows, and they
# would count twice.
_COUNTED = """
    FROM kino.check_run r
    WHERE "check" = :check AND state = 'complete' AND until > coalesce(:since, '-infinity')
      AND coalesce(since < :until, true)
      AND run_id >= coalesce((
          SELECT max(run_id) FROM kino.check_run f
          WHERE f."check" = :check AND f.state = 'complete' AND f.is_full
            AND NOT EXISTS (SELECT FROM kino.check_run b WHERE b."check" = f."check" AND b.state = 'complete'
                            AND b.run_id < f.run_id AND b.to_xid > f.to_xid)), 0)
"""
_RUNS = sa.text(f"""
    SELECT count(*) AS runs, coalesce(sum(compared), 0) AS compared, coalesce(sum(matched), 0) AS matched,
           coalesce(sum(broken), 0) AS broken,
           coalesce(sum((SELECT sum(CAST(n.value AS bigint)) FROM jsonb_each_text(r.not_comparable) n)), 0)
               AS not_comparable,
           array_agg(run_id ORDER BY run_id) AS run_ids,
           (array_agg(detail ORDER BY run_id DESC))[1] AS detail,
           array_agg(DISTINCT detail ->> 'source') AS sources
    {_COUNTED}
""")  # noqa: S608
_REASONS = sa.text(f"""
    SELECT n.key AS why, sum(CAST(n.value AS bigint)) AS number
    FROM (SELECT not_comparable {_COUNTED}) r CROSS JOIN LATERAL jsonb_each_text(r.not_comparable) n
    GROUP BY n.key ORDER BY 2 DESC, 1
""")  # noqa: S608
_SETTLED = sa.text("""
    SELECT count(*) AS settlements, count(*) FILTER (WHERE s.kind = 'refunded') AS refunded,
           coalesce(sum(c.credits), 0) AS credits,
           coalesce(sum(c.credits) FILTER (WHERE s.kind = 'refunded'), 0) AS credits_refunded,
           array_agg(DISTINCT s.policy_version) AS versions
    FROM kino.settlement s JOIN kino.charge c USING (charge_id)
    WHERE s.settled_at >= coalesce(:since, '-infinity') AND s.settled_at < :until
""")
_BOOKS = sa.text("""
    SELECT count(*) AS transfers,
           coalesce(sum(CASE WHEN from_book IS NULL OR to_book IS NULL OR credits <= 0 THEN 1 ELSE 0 END), 0) AS wrong
    FROM kino.transfer
""")
_WALLET = sa.text("""
    SELECT (SELECT coalesce(sum(CASE WHEN to_book = 'wallet' THEN credits ELSE 0 END
                                - CASE WHEN from_book = 'wallet' THEN credits ELSE 0 END), 0)
            FROM kino.transfer) AS book,
           (SELECT coalesce(sum(remaining), 0) FROM kino.credit_lot) AS lots
""")
# What has no instant, or one in the future, may be as old as the ledger.
_LIVE = sa.text("""
    SELECT count(*) AS live, min(break_id) AS first, coalesce(sum(credits), 0) AS credits,
           count(*) FILTER (WHERE status = 'repaired') AS repaired
    FROM kino.break
    WHERE status IN ('open', 'investigating', 'repaired') AND NOT canary
      AND (happened_at IS NULL OR happened_at < :until OR happened_at > first_seen_at)
""")
_DECIDED = sa.text("""
    SELECT count(*) FILTER (WHERE status = 'accepted') AS accepted,
           count(*) FILTER (WHERE status = 'false_alarm') AS false_alarms,
           count(*) FILTER (WHERE status = 'closed') AS closed
    FROM kino.break
    WHERE NOT canary AND coalesce(happened_at, first_seen_at) < :until
      AND coalesce(happened_at, first_seen_at) >= coalesce(:since, '-infinity')
""")


def prove(
    connection: sa.Connection,
    settings: Settings,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    source: SourceSaid | None,
    copy: CopyComparison | None = None,
) -> Proof:
    """Return what holds between `since` (None: since the first complete run) and `until` (None: the latest possible).

    Only reads. `source` None: none is configured; a source that is away must not be taken for that. `copy` is what the
    ledger's seals were compared with, if somebody keeps some elsewhere.

    Raises BadWindow, which names the instant that can be proven, for a `since` before the first complete run and for
    an `until` that cannot be proven yet.
    """
    coverages = {
        check.name: read_coverage(connection, check.name)
        for check in CHECKS
        if check.name != OPTIONAL or settings.relay_queue is not None
    }
    latest = _latest(connection, coverages)
    first = _first(coverages)
    if since is not None and first is not None and since < first:
        raise BadWindow(
            f"--since {_written(since)} cannot be proven: every check has compared everything since {_written(first)},"
            " and not before (`kino-refunds reconcile run --full` begins at the beginning)"
        )
    since = since or first
    if latest is not None and until is not None and until > latest:
        raise BadWindow(
            f"--until {_written(until)} cannot be proven yet; the latest is {_written(latest)} (no later than every"
            " check, and than the oldest open charge; `kino-refunds reconcile run` brings it forward)"
        )
    if latest is None:
        missing = [name for name, coverage in coverages.items() if coverage is None]
        text = f"Nothing is proven: {', '.join(missing) or 'the ledger'} has no complete run yet."
        return Proof(
            since, read_clock(connection), [Sentence(text, holds=False, command="kino-refunds reconcile run")], {}
        )
    until = until or latest
    if since is not None and since >= until:
        raise BadWindow(f"the window begins at {_written(since)}, and what can be proven ends at {_written(until)}")
    wanted = {"since": since, "until": until}
    figures: Figures = {"build": settings.build, "checks": {}}
    sentences = [
        *_of_source(connection, wanted, figures, source),
        *_of_checks(connection, wanted, figures, coverages),
        *_of_books(connection, figures),
        *_of_breaks(connection, wanted, figures),
        *_of_seals(connection, figures, copy, until=until),
    ]
    return Proof(since, until, sentences, figures)


# Until when everything below a number of transactions was written. A clock that has been set back since stamped later
# transactions with earlier instants: then only what is before those, too.
_COMPARED_BEFORE = sa.text("""
    SELECT least((SELECT sampled_at FROM kino.xid_clock WHERE CAST(CAST(xid AS text) AS bigint) <= :to_xid
                  ORDER BY xid DESC LIMIT 1),
                 (SELECT min(sampled_at) FROM kino.xid_clock WHERE CAST(CAST(xid AS text) AS bigint) > :to_xid))
""")


def _latest(connection: sa.Connection, coverages: dict[str, Coverage | None]) -> datetime | None:
    """Return the end of what can be proven: no later than any check, and than the oldest open charge."""
    verified = read_verified(connection).through
    covered = [coverage for coverage in coverages.values() if coverage is not None]
    if verified is None or len(covered) < len(coverages):
        return None
    compared = connection.execute(
        _COMPARED_BEFORE, {"to_xid": min(coverage.to_xid for coverage in covered)}
    ).scalar_one_or_none()
    return None if compared is None else min(verified, compared, *(coverage.until for coverage in covered))


def _first(coverages: dict[str, Coverage | None]) -> datetime | None:
    """Return since when every check has compared everything; None: since the beginning."""
    begun = [coverage.since for coverage in coverages.values() if coverage is not None and coverage.since is not None]
    return max(begun, default=None)


def _of_source(
    connection: sa.Connection,
    wanted: dict[str, datetime | None],
    figures: Figures,
    source: SourceSaid | None,
) -> Iterator[Sentence]:
    if source is None:
        yield Sentence(
            "No job source is configured: nothing outside the ledger was compared with it.",
            holds=False,
            command="kino-refunds reconcile show matching",
        )
        return
    found = connection.execute(_RUNS, wanted | {"check": "matching"}).one()
    reasons = {row.why: int(row.number) for row in connection.execute(_REASONS, wanted | {"check": "matching"})}
    figures["checks"]["matching"] = {
        "runs": found.run_ids,
        "compared": int(found.compared),
        "matched": int(found.matched),
        "broken": int(found.broken),
        "not_comparable": reasons,
        "detail": found.detail,
    }
    name, complete_through = source.name, source.complete_through
    figures["source"] = {"name": name, "complete_through": complete_through}
    promise = (
        f"complete through {_written(complete_through)}"
        if complete_through is not None
        else "which makes no promise of being complete: what it reports within 24 h is read again"
    )
    reported = int(found.compared) + int(found.not_comparable)
    others = sorted({each or "?" for each in found.sources or []} - {name})
    if others:
        yield Sentence(
            f"Some of these runs asked another source ({', '.join(others)}): run everything again with this one.",
            holds=False,
            command="kino-refunds reconcile run matching --full",
        )
    yield Sentence(
        f"The source {name} ({promise}) reports {reported:,} finished jobs; {int(found.compared):,} compared,"
        f" {int(found.matched):,} matched, {int(found.not_comparable):,} not comparable.",
        holds=found.runs > 0 and not found.not_comparable,
        command="kino-refunds reconcile show matching",
    )
    if found.broken:
        yield Sentence(
            f"{int(found.broken):,} of them differed when they were compared; what became of each is below.", holds=True
        )


def _of_checks(
    connection: sa.Connection,
    wanted: dict[str, datetime | None],
    figures: Figures,
    coverages: dict[str, Coverage | None],
) -> Iterator[Sentence]:
    settled = connection.execute(_SETTLED, wanted).one()
    figures["settlements"] = {
        "count": settled.settlements,
        "refunded": settled.refunded,
        "credits": int(settled.credits),
        "credits_refunded": int(settled.credits_refunded),
        "policy_versions": settled.versions or [],
    }
    for check in CHECKS:
        if check.name == "matching":
            continue
        if check.name not in coverages:
            yield Sentence("The relay is off (KINO_RELAY_QUEUE): what the product was told is not proven.", holds=True)
            continue
        coverage = coverages[check.name]
        found = connection.execute(_RUNS, wanted | {"check": check.name}).one()
        reasons = {row.why: int(row.number) for row in connection.execute(_REASONS, wanted | {"check": check.name})}
        figures["checks"][check.name] = {
            "runs": found.run_ids,
            "compared": int(found.compared),
            "matched": int(found.matched),
            "broken": int(found.broken),
            "not_comparable": reasons,
            "since": coverage and coverage.since,
            "until": coverage and coverage.until,
        }
        yield Sentence(
            f"{check.promise}, {check.name}: {check.ours} against {check.theirs}: {int(found.compared):,} compared,"
            f" {int(found.matched):,} matched, {int(found.not_comparable):,} not comparable.",
            holds=coverage is not None and not found.not_comparable,
            command=f"kino-refunds reconcile show {check.name}",
        )
    versions = ", ".join(settled.versions or []) or "(none was needed)"
    decided = figures["checks"]["decisions"]
    yield Sentence(
        f"Every settlement ({settled.settlements:,}, of them {settled.refunded:,} refunds of"
        f" {int(settled.credits_refunded):,} credits) follows policy {versions}.",
        holds=not decided["not_comparable"],
        command="kino-refunds reconcile show decisions",
    )


def _of_books(connection: sa.Connection, figures: Figures) -> Iterator[Sentence]:
    books = connection.execute(_BOOKS).one()
    wallet = connection.execute(_WALLET).one()
    figures["books"] = {"transfers": books.transfers, "wallet": int(wallet.book), "lots": int(wallet.lots)}
    yield Sentence(
        f"Books sum to zero: each of {books.transfers:,} transfers names the book that gives and the one that gets, and"
        f" the lots hold what the wallet book says, {int(wallet.lots):,} credits.",
        holds=not books.wrong and wallet.book == wallet.lots,
        command="kino-refunds reconcile run integrity --full",
    )


def _of_breaks(connection: sa.Connection, wanted: dict[str, datetime | None], figures: Figures) -> Iterator[Sentence]:
    live = connection.execute(_LIVE, {"until": wanted["until"]}).one()
    decided = connection.execute(_DECIDED, wanted).one()
    figures["breaks"] = {
        "live": live.live,
        "accepted": decided.accepted,
        "false_alarms": decided.false_alarms,
        "closed": decided.closed,
    }
    if live.live:
        yield Sentence(
            f"Live breaks from before the end: {live.live:,}, about {int(live.credits):,} credits;"
            f" {live.repaired:,} repaired, and the next run of their check closes those.",
            holds=False,
            command="kino-refunds breaks list",
        )
    else:
        yield Sentence(
            f"No live break from before the end; {decided.closed:,} were closed, {decided.accepted:,} accepted by"
            f" people, {decided.false_alarms:,} false alarms.",
            holds=True,
        )


def _of_seals(
    connection: sa.Connection, figures: Figures, copy: CopyComparison | None, *, until: datetime
) -> Iterator[Sentence]:
    """Say the newest seal: against a superuser only a copy of it, kept elsewhere, proves anything."""
    newest = newest_seal(connection)
    if newest is None:
        yield Sentence("No history is sealed yet.", holds=False, command="kino-refunds reconcile run seals")
        return
    figures["seal"] = {"newest": seal_text(newest), "as_of": newest.as_of, "rows": newest.rows}
    yield Sentence(
        f"Seal {seal_text(newest)} stands for everything before {_written(newest.as_of)}; keep a copy of it elsewhere.",
        holds=newest.as_of >= until,
        command="kino-refunds reconcile run seals",
    )
    if copy is None:
        return
    figures["copy"] = {
        "seals": [{"seal": f"{each.seal_id}:{each.digest}", "state": each.state} for each in copy.seals],
        "computed_again": copy.verified,
    }
    wrong = [each for each in copy.seals if each.state is not CopyState.SAME]
    found = "; ".join(
        [*(f"seal {each.seal_id}: {each.state}" for each in wrong), *(each.detail for each in copy.breaks)]
    )
    yield Sentence(
        f"The copy names {len(copy.seals):,} seals; {copy.verified:,} were computed again, and history is what it was"
        " when they were copied."
        if copy.is_same
        else f"History is not what it was when the copy was made: {found or 'by a format that is not known'}.",
        holds=copy.is_same,
        command="kino-refunds reconcile run seals --full",
    )


def _written(instant: datetime) -> str:
    return instant.isoformat(timespec="seconds").replace("+00:00", "Z")
