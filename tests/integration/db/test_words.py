"""Words that programs compare are enums here and CHECKs there: both must know the same ones."""

from __future__ import annotations

import re
from enum import StrEnum

import pytest
import sqlalchemy as sa

from kino_refunds.events.envelope import MalformedReason
from kino_refunds.ledger.accounts import AccountStatus, PastStatus
from kino_refunds.ledger.values import CauseKind, LotClass, LotState, SettlementKind
from kino_refunds.policy.automatic import Clause, Reason
from kino_refunds.settlement.breaks import BreakKind, BreakStatus
from kino_refunds.settlement.dead_letters import LetterReason, LetterStatus
from kino_refunds.settlement.outcomes import BREAKS, Disposition, Outcome, disposition

CONNECTS_AS = "kino_owner"

COLUMNS: dict[str, type[StrEnum]] = {
    "account.status": AccountStatus,
    "account_status_change.to_status": AccountStatus,
    "credit_lot.class": LotClass,
    "credit_lot.state": LotState,
    "lot_hold.cause_kind": CauseKind,
    "settlement.kind": SettlementKind,
    "settlement.reason": Reason,
    "settlement.clause": Clause,
    "settlement.account_status": PastStatus,
    "dead_letter.status": LetterStatus,
    "break.status": BreakStatus,
}
_CHECK = sa.text("""
    SELECT pg_get_constraintdef(c.oid) FROM pg_constraint c
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)
    WHERE c.contype = 'c' AND cardinality(c.conkey) = 1
      AND c.conrelid = CAST(:relation AS regclass) AND a.attname = :attribute
""")


@pytest.mark.parametrize("column", COLUMNS)
def test_an_enum_and_its_check_know_the_same_words(connection: sa.Connection, column: str) -> None:
    """A word that only one of them knows could be stored and not read, or decided and not stored."""
    table, _, attribute = column.partition(".")

    found = connection.execute(_CHECK, {"relation": f"kino.{table}", "attribute": attribute}).scalars()
    checks = [set(re.findall(r"'([^']*)'::text", check)) for check in found if "ANY (ARRAY[" in check]

    assert checks == [set(map(str, COLUMNS[column]))]


def test_every_dead_end_has_a_reason_for_its_letter() -> None:
    """Each way in which a message or an event cannot go on is a reason, and there is no reason besides."""
    outcomes = {outcome.value for outcome in Outcome if disposition(outcome) is not Disposition.FINAL}

    assert set(LetterReason) == set(MalformedReason) | outcomes | {"apply_error", "poison_crash"}


def test_every_outcome_that_contradicts_is_a_kind_of_break() -> None:
    """An outcome that raises a break names its kind; the overdue sweep and the checks add their own."""
    assert {outcome.value for outcome in BREAKS} < set(BreakKind)
