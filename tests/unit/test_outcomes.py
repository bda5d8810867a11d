"""The words of an outcome, what becomes of each, and what an exception means for the batch it stopped."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors

from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import LedgerInconsistent, SettledElsewhere, WrongEncoding
from kino_refunds.policy.automatic import Clause, Coverage, Reason
from kino_refunds.settlement.outcomes import (
    BREAKS,
    SETTLING,
    ChargeState,
    Disposition,
    Outcome,
    disposition,
    outcome_of,
    state_after,
)

FINAL = {
    "captured",
    "captured_not_covered",
    "captured_terminated",
    "refunded",
    "already_captured",
    "already_refunded",
    "completed_after_refund",
    "failed_after_capture",
    "duplicate",
}
RETRY = {"charge_not_found", "busy"}
DEAD_LETTER = {"conflicting_duplicate", "account_mismatch"}


def test_the_outcomes_are_the_words_of_the_contract() -> None:
    """Other programs rely on these words, so none appears, disappears or is respelt unnoticed."""
    said = {outcome.value for outcome in Outcome}

    assert said == FINAL | RETRY | DEAD_LETTER


def test_every_outcome_has_one_disposition() -> None:
    """Each outcome is final, tried again, or kept for a person, and none is left undecided."""
    said = {fate: {o.value for o in Outcome if disposition(o) is fate} for fate in Disposition}

    assert said == {
        Disposition.FINAL: FINAL,
        Disposition.RETRY: RETRY,
        Disposition.DEAD_LETTER: DEAD_LETTER,
    }


def test_only_final_outcomes_settle_a_charge_or_break() -> None:
    """A charge is settled, and a break raised, only by an event that is then recorded as decided."""
    deciding = SETTLING | BREAKS

    assert {disposition(outcome) for outcome in deciding} == {Disposition.FINAL}
    assert SETTLING.isdisjoint(BREAKS)


COMPLETED = Coverage(refund=False, reason=Reason.COMPLETED, clause=Clause.CREDITS)
TERMINATED = Coverage(refund=False, reason=Reason.NOT_COVERED, clause=Clause.TERMINATED)
REFUNDS = [
    Coverage(refund=True, reason=Reason.GENERATION_FAILURE, clause=Clause.FAILURE),
    Coverage(refund=True, reason=Reason.TIMEOUT, clause=Clause.TIMEOUT),
    Coverage(refund=True, reason=Reason.CONTENT_POLICY_REJECTION, clause=Clause.SAFETY),
]
MISSES = [
    Coverage(refund=False, reason=Reason.NOT_COVERED, clause=clause)
    for clause in (Clause.FAILURE, Clause.TIMEOUT, Clause.SAFETY)
]
TABLE = [
    (COMPLETED, "captured", "already_captured", "completed_after_refund"),
    (TERMINATED, "captured_terminated", "already_captured", "already_refunded"),
    *((verdict, "refunded", "failed_after_capture", "already_refunded") for verdict in REFUNDS),
    *((verdict, "captured_not_covered", "already_captured", "already_refunded") for verdict in MISSES),
]


@pytest.mark.parametrize(("verdict", "on_open", "on_captured", "on_refunded"), TABLE)
def test_the_table_of_outcomes(verdict: Coverage, on_open: str, on_captured: str, on_refunded: str) -> None:
    """What the policy gives, against where the charge stands, is one word of section 5."""
    said = tuple(outcome_of(verdict, state).value for state in ChargeState)

    assert said == (on_open, on_captured, on_refunded)


def test_a_charge_stands_as_its_settling_outcome_left_it() -> None:
    """Only a refund leaves a charge refunded; each way of capturing leaves it captured."""
    after = {outcome.value: state_after(outcome) for outcome in SETTLING}

    assert after == {
        "refunded": ChargeState.REFUNDED,
        "captured": ChargeState.CAPTURED,
        "captured_not_covered": ChargeState.CAPTURED,
        "captured_terminated": ChargeState.CAPTURED,
    }


def from_server(sqlstate: str, *, ended: bool = False) -> sa.exc.DBAPIError:
    """Build what sqlalchemy raises when Postgres answers with this code, and perhaps ends the session."""
    try:
        cause = errors.lookup(sqlstate)("planted")
    except KeyError:  # younger than the driver's list
        cause = psycopg.OperationalError("planted")
        cause.sqlstate = sqlstate
    return sa.exc.DBAPIError("SELECT 1", {}, cause, connection_invalidated=ended)


KEEP = {
    "08000": "connection exception",
    "08006": "connection failure",
    "25006": "read-only transaction",
    "25P03": "idle-in-transaction time-out",
    "28000": "invalid authorization",
    "28P01": "invalid password",
    "3D000": "no such database",
    "3F000": "no such schema",
    "40001": "serialization failure",
    "40P01": "deadlock",
    "0A000": "cached plan must not change result type",
    "26000": "no such prepared statement",
    "42P05": "prepared statement exists already",
    "42501": "insufficient privilege",
    "42703": "undefined column",
    "42883": "undefined function",
    "42P01": "undefined table",
    "53100": "disk full",
    "53200": "out of memory",
    "53300": "too many connections",
    "57P01": "terminated by an administrator",
    "57P02": "crash shutdown",
    "57P03": "starting up",
    "58030": "I/O error",
}
SPLIT = {"57014": "statement time-out", "25P04": "transaction time-out"}
BISECT = {
    "22003": "number out of range",
    "22021": "bad characters",
    "23001": "append-only table",
    "23502": "not null",
    "23505": "unique violation",
    "23514": "check violation",
    "42601": "syntax error",
    "P0001": "raised by a trigger",
    "XX000": "internal error",
}


@pytest.mark.parametrize("sqlstate", KEEP)
def test_a_fault_of_the_server_keeps_the_batch(sqlstate: str) -> None:
    """What is wrong with Postgres, its schema or our rights is never held against an event."""
    assert classify(from_server(sqlstate)) is Fault.KEEP


@pytest.mark.parametrize("sqlstate", SPLIT)
def test_a_slow_batch_is_split(sqlstate: str) -> None:
    """A batch that takes too long as a whole may be fast enough in parts."""
    assert classify(from_server(sqlstate)) is Fault.SPLIT


def test_a_lock_that_is_held_is_a_fault_of_its_own() -> None:
    """A lock time-out names neither the server nor the event as the culprit: it is waited out."""
    assert classify(from_server("55P03")) is Fault.LOCK


@pytest.mark.parametrize("sqlstate", BISECT)
def test_what_is_not_known_to_be_transient_is_the_event_s(sqlstate: str) -> None:
    """An unknown refusal would come again for ever, so the event that causes it is found and kept."""
    assert classify(from_server(sqlstate)) is Fault.BISECT


def test_a_session_that_ended_keeps_the_batch_unless_it_was_too_slow() -> None:
    """A connection that is gone says nothing of the events, except when the transaction time-out ended it."""
    gone, slow = from_server("P0001", ended=True), from_server("25P04", ended=True)

    said = [classify(gone), classify(slow)]

    assert said == [Fault.KEEP, Fault.SPLIT]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (SettledElsewhere("others were faster"), Fault.SPLIT),
        (WrongEncoding("a database of another encoding"), Fault.KEEP),
        (sa.exc.TimeoutError("the pool is empty"), Fault.KEEP),
        (MemoryError(), Fault.KEEP),
        (psycopg.OperationalError("server closed the connection"), Fault.KEEP),
        (psycopg.InterfaceError("the connection is closed"), Fault.KEEP),
        (psycopg.ProgrammingError("cannot adapt"), Fault.BISECT),
        (psycopg.DataError("a NUL in a string"), Fault.BISECT),
        (LedgerInconsistent("lines and charge differ"), Fault.BISECT),
        (AssertionError("ours"), Fault.BISECT),
        (KeyError("ours"), Fault.BISECT),
        (ValueError("ours"), Fault.BISECT),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else type(value).__name__,
)
def test_an_error_that_no_server_sent(error: Exception, fault: Fault) -> None:
    """A lost connection or a full pool is transient; a mistake of ours belongs to the event that met it."""
    assert classify(error) is fault
