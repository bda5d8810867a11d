"""Verify seals: compute their digests again from the ledger's rows, and name what was changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.reconciliation.seals.contents import BIGINT_MAX, read_contents, session
from kino_refunds.reconciliation.seals.format import FORMATS
from kino_refunds.reconciliation.seals.stored import FIRST, ROWS_MAX, Seal, read_seals, seal_before
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

    from kino_refunds.reconciliation.seals.contents import Content

SEALS_A_PAGE = 500

_NEWEST_KNOWN = sa.text("""
    SELECT seal_id FROM kino.seal WHERE format = ANY (CAST(:formats AS bigint[])) ORDER BY seal_id DESC LIMIT 1
""")


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


def _verify_some(engine: sa.Engine, first: int, until: int | None) -> Verified:
    with session(engine) as connection:
        previous = seal_before(connection, first)
        stored = [
            seal for seal in read_seals(connection, first, SEALS_A_PAGE + 1) if until is None or seal.seal_id <= until
        ]
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
        self._contents: dict[int, Content] = {}

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
        contents = read_contents(self._connection, line[0].format, [seal.transactions for seal in line])
        self._contents |= {seal.seal_id: content for seal, content in zip(line, contents, strict=True)}

    def content(self, seal: Seal) -> Content | None:
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


def _changed(seal: Seal, now: Content | None, previous: Seal | None) -> Break:
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
