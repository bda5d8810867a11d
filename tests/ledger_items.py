"""Items of the ledger's functions as a caller writes them in JSON, and the sessions that call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from tests.conftest import Database

Connection = psycopg.Connection[Any]
Item = dict[str, Any]

DEADLINE = "2030-01-01T00:00:00Z"


@contextmanager
def session(database: Database, role: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """Open a session of a role's own, with nothing pinned; it commits at its end, or after each statement."""
    with psycopg.connect(database.url(role).replace("+psycopg", ""), autocommit=autocommit) as connection:
        yield connection


def a_settlement(charge_id: int, **terms: Any) -> Item:
    return {
        "charge_id": charge_id,
        "kind": "refunded",
        "reason": "timeout",
        "clause": "2.timeout",
        "policy_version": "v",
        "ending": "timeout.no_result",
        "account_status": "active",
        "event_source": "s",
        "event_id": f"event {charge_id}",
        "event_time": "2026-01-01T00:00:00Z",
        **terms,
    }


def a_reversal(charge_id: int, **terms: Any) -> Item:
    return {
        "charge_id": charge_id,
        "reason": "timeout",
        "clause": "2.timeout",
        "policy_version": "v",
        "reference": "ticket-1",
        "actor": "ann",
        **terms,
    }


def a_grant(reference: str, **terms: Any) -> Item:
    return {"reference": reference, "account_id": "ada", "credits": 10, "class": "purchased", **terms}


def a_charge(job_id: str, **terms: Any) -> Item:
    return {"job_id": job_id, "account_id": "ada", "credits": 10, "deadline_at": DEADLINE, **terms}


def a_status(account_id: str, **terms: Any) -> Item:
    return {"account_id": account_id, "status": "suspended", "reason": "asked for", "actor": "ann", **terms}
