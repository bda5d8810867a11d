"""The registry of checks: what each compares, what it finds, and who repairs and closes that (design, part B).

The commands, the schedule and the documentation are made from this list.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

from kino_refunds.errors import BadWindow
from kino_refunds.reconciliation import (
    account_status,
    corrected,
    decisions,
    integrity,
    settled,
    told,
)
from kino_refunds.settlement.breaks import BreakKind

if TYPE_CHECKING:
    import sqlalchemy as sa

    from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, Window
    from kino_refunds.settlement.breaks import Break


class MakeWindow(Protocol):
    """How a check that does not go by transactions alone chooses its window."""

    def __call__(
        self,
        connection: sa.Connection,
        scope: Scope,
        *,
        wanted_since: datetime | None,
        wanted_until: datetime | None,
    ) -> tuple[Window, str | None]:
        """Return the window, and in words why it cannot be compared, if so. `scope.window` is by transactions."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check. `finds` are the kinds of break that it opens, `closes` those that its next run closes."""

    name: str
    promise: str
    ours: str
    theirs: str
    finds: tuple[str, ...]
    closes: tuple[str, ...]
    grace: str
    """How old a difference is before it counts, in words."""
    repair: str
    """What a person does, in words."""
    pages: Callable[[Scope, Mapping[str, Any]], Generator[Page]]
    again: Callable[[Scope, Sequence[LiveBreak]], dict[int, Break | None]]
    window: MakeWindow | None = None
    asks_source: bool = False
    """Whether the other side is the job source."""


def _later(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a module that is loaded when it is first called: `status` needs the registry, not a log."""

    def call(*given: Any, **named: Any) -> Any:
        return getattr(import_module(f"{__package__}.{module}"), function)(*given, **named)

    return call


_MATCHING = (
    BreakKind.MISSING_EVENT,
    BreakKind.FAILED_BUT_CAPTURED,
    BreakKind.COMPLETED_BUT_REFUNDED,
    BreakKind.NOT_COVERED_BUT_REFUNDED,
    BreakKind.ACCOUNT_DIFFERS,
    BreakKind.CREDITS_DIFFER,
    BreakKind.UNCHARGED_JOB,
    BreakKind.ORPHAN_CHARGE,
    BreakKind.LATE,
)
CHECKS: Final[tuple[Check, ...]] = (
    Check(
        name="settled",
        promise="P9",
        ours="open charges",
        theirs="the clock",
        finds=(BreakKind.OPEN_PAST_DEADLINE,),
        closes=(BreakKind.OPEN_PAST_DEADLINE, BreakKind.RUNNING_PAST_CAP),
        grace="deadline, overdue grace and 5 minutes",
        repair="`kino-refunds charges ask --job JOB`, or the letter or retry that the break names",
        pages=settled.pages,
        again=settled.again,
    ),
    Check(
        name="matching",
        promise="P9",
        ours="charges and settlements",
        theirs="the job source's finished jobs, both ways",
        finds=_MATCHING,
        closes=_MATCHING,
        grace="KINO_CHECK_GRACE_S, and what the source promises (else KINO_MATCHING_DELAY_MIN)",
        repair="`kino-refunds breaks repair NUMBER` for `missing_event` and `failed_but_captured`; accept the others",
        pages=_later("matching", "pages"),
        again=_later("matching", "again"),
        window=_later("matching_window", "window"),
        asks_source=True,
    ),
    Check(
        name="decisions",
        promise="P10",
        ours="settlements",
        theirs="the policy, judged again from what each settlement stores",
        finds=(BreakKind.DECISION_DIFFERS,),
        closes=(BreakKind.DECISION_DIFFERS,),
        grace="none",
        repair="find which is wrong, the policy file or the settlement; `breaks repair` where a customer is owed",
        pages=decisions.pages,
        again=decisions.again,
    ),
    Check(
        name="account_status",
        promise="P10",
        ours="the account status that each settlement was judged by",
        theirs="the account's history",
        finds=(BreakKind.ACCOUNT_STATUS_DIFFERS,),
        closes=(BreakKind.ACCOUNT_STATUS_DIFFERS,),
        grace="10 minutes around the event's time",
        repair="`kino-refunds breaks repair NUMBER --reference CASE` where the customer is owed",
        pages=account_status.pages,
        again=account_status.again,
    ),
    Check(
        name="integrity",
        promise="P1-P10",
        ours="the ledger's rows",
        theirs="one another, by one query for each thing that cannot be",
        finds=tuple(sorted(integrity.KINDS)),
        closes=tuple(sorted(integrity.KINDS)),
        grace="none; instants 5 minutes",
        repair="the break's own advice; none by command: such a row is a fault of the ledger or of a superuser",
        pages=integrity.pages,
        again=integrity.again,
    ),
    Check(
        name="relay",
        promise="P10",
        ours="refunds and corrections",
        theirs="what the product was told",
        finds=(BreakKind.UNTOLD_REFUND,),
        closes=(BreakKind.UNTOLD_REFUND,),
        grace="KINO_CHECK_GRACE_S",
        repair="start the relay's sweep again (`kino-refunds schedule`), or rewind the relay",
        pages=told.pages,
        again=told.again,
        window=told.window,
    ),
    Check(
        name="corrected",
        promise="P4",
        ours="corrections",
        theirs="their transfers",
        finds=(BreakKind.CORRECTION_DIFFERS,),
        closes=(
            BreakKind.CORRECTION_DIFFERS,
            BreakKind.FAILED_AFTER_CAPTURE,
            BreakKind.FAILED_BUT_CAPTURED,
            BreakKind.WRONGFUL_TERMINATION,
        ),
        grace="none",
        repair="none by command: a correction whose credits did not move is a fault of the ledger; call its owner",
        pages=corrected.pages,
        again=corrected.again,
    ),
    Check(
        name="seals",
        promise="P5",
        ours="sealed history",
        theirs="what was sealed",
        finds=(BreakKind.HISTORY_CHANGED,),
        closes=(BreakKind.HISTORY_CHANGED,),
        grace="none",
        repair="none: keep the database as it is, and compare the range that the break names with a backup",
        pages=_later("seals", "pages"),
        again=_later("seals", "again"),
    ),
)
"""Every check, in the order in which they run: what is settled first, then whether it is right, then what was told."""


def check_named(name: str) -> Check:
    """Return the check with this name; raises BadWindow, which names those that there are."""
    for check in CHECKS:
        if check.name == name:
            return check
    raise BadWindow(f"there is no check {name!r}; there are {', '.join(each.name for each in CHECKS)}")
