"""Compare the ledger's seals with a copy that was kept outside of this database."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import BadCopy
from kino_refunds.reconciliation.seals.verify import Verified, verify_seals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kino_refunds.settlement.breaks import Break

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
