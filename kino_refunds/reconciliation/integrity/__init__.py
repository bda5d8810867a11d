"""Integrity: find what no ledger may contain, whatever was asked of it (P1 to P10; the queries are in *.sql)."""

from kino_refunds.reconciliation.integrity.check import KINDS, Touched, again, pages, touched, violations
from kino_refunds.reconciliation.integrity.queries import Entry, KeyScope, Query, all_queries, describe

__all__ = [
    "KINDS",
    "Entry",
    "KeyScope",
    "Query",
    "Touched",
    "again",
    "all_queries",
    "describe",
    "pages",
    "touched",
    "violations",
]
