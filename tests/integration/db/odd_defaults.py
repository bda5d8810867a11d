"""Defaults that an administrator may set, and values at the edge of what a session carries."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

EMOJI = "\U0001f3ac"
LATEST = datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
"""In Asia/Tokyo it is the year 10000."""
EARLIEST = datetime(1, 1, 1, tzinfo=UTC)

DEFAULTS: Sequence[tuple[str, str]] = (
    ("DateStyle", "SQL, DMY"),
    ("DateStyle", "German"),
    ("DateStyle", "Postgres, MDY"),
    ("IntervalStyle", "iso_8601"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "Asia/Tokyo"),
    ("TimeZone", "America/New_York"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "EUC_JP"),
    ("client_encoding", "SQL_ASCII"),
    ("bytea_output", "escape"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_deferrable", "on"),
    ("default_transaction_read_only", "on"),
    ("search_path", "nowhere"),
    ("search_path", "shadow, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("array_nulls", "off"),
    ("extra_float_digits", "-15"),
    ("plan_cache_mode", "force_generic_plan"),
    ("plan_cache_mode", "force_custom_plan"),
    ("statement_timeout", "1s"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "1s"),
    ("transaction_timeout", "1s"),
    ("idle_session_timeout", "50ms"),
)
