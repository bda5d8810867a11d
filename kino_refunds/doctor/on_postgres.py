"""Postgres: whether a worker can settle here, durably, and may do only what a worker may."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from kino_refunds.db.clock import is_real_clock
from kino_refunds.db.engine import SessionLimits, create_engine
from kino_refunds.db.functions import (
    MAY_CALL,
    NOT_OF_THE_LEDGER,
    WRITTEN_BY_FUNCTIONS,
    digest_of_functions,
    is_open_to_older_builds,
    writers_beside_functions,
)
from kino_refunds.db.migrate import current_revision, functions_of_head, head_revision, is_known_revision
from kino_refunds.doctor.findings import Finding, expect
from kino_refunds.doctor.on_work import check_work
from kino_refunds.doctor.on_workers import check_workers
from kino_refunds.settings import LOT_GRACE_DAYS, Settings, redacted

POSTGRES_MIN: Final = 15_00_00
SKEW_MAX: Final = timedelta(seconds=5)
"""NTP keeps hosts within milliseconds, so this means no NTP. At 30 s presumed timeouts and expiry are withheld."""
LIMITS: Final = SessionLimits(
    statement_timeout_ms=5_000, transaction_timeout_ms=15_000, tcp_user_timeout_ms=5_000, lock_timeout_ms=500
)
"""Each check takes milliseconds; a server that does not answer must become a finding within seconds."""

ROLES: Final = frozenset({"kino_owner", "kino_ledger", "kino_worker", "kino_product", "kino_oncall", "kino_read"})
APPEND_ONLY: Final = frozenset(
    {
        "account_status_change",
        "charge",
        "charge_line",
        "settlement",
        "correction",
        "transfer",
        "lot_change",
        "inbox_event",
    }
)
_KEPT = frozenset({"pending_event", "overdue_ask", "intake_worker", "schedule_slot"})
_ADDED = frozenset({"xid_clock", "seal"})
_UPSERTED = frozenset({"dead_letter", "break", "relay_cursor", "check_run"})
_NOTED = frozenset({"waiting_message"})
_ONE_ROW = frozenset({"intake_state", "verified_through"})
_ONLY_READ = frozenset(WRITTEN_BY_FUNCTIONS) | {"charge_status", "account_balance", "alembic_version"}
WORKER_RIGHTS: Final = {
    "SELECT": APPEND_ONLY | _KEPT | _UPSERTED | _NOTED | _ONE_ROW | _ADDED | _ONLY_READ,
    # The ledger's tables are written by its functions.
    "INSERT": {"inbox_event"} | _KEPT | _UPSERTED | _NOTED | _ADDED,
    "UPDATE": _KEPT | _UPSERTED | _ONE_ROW,
    "UPDATE every column": _KEPT | _UPSERTED | _ONE_ROW,
    "DELETE": _KEPT | _NOTED,
    "TRUNCATE": frozenset[str](),
    "TRIGGER": frozenset[str](),
    "EXECUTE": frozenset(name for name, roles in MAY_CALL.items() if "kino_worker" in roles),
}
"""What the migrations grant to kino_worker, by right; tables that this build does not know are not checked."""


def check_postgres(url: str, settings: Settings) -> Iterator[Finding]:
    """Connect as a worker does and look at the server, the role, the schema, and who works on it."""
    engine = create_engine(url, limits=LIMITS, application_name="kino-doctor", pooled=False)
    try:
        # Each statement is a transaction of its own: a refused one must not fail the others.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            server = connection.execute(_SERVER).one()
            yield from _server(server, url)
            yield from _roles(connection, server)
            if not server.may_look:
                return
            lacks = _needed_rights() - _held_rights(connection) if server.has_ledger else set()
            yield from _schema(connection)
            found = current_revision(connection)
            # The queries below would fail on an older schema; a newer one has everything that this build reads.
            whole = found is not None and (found == head_revision() or not is_known_revision(found))
            if whole and not lacks:
                yield expect(
                    "ledger clock",
                    is_real_clock(connection),
                    "kino.clock() is Postgres' own" if is_real_clock(connection) else "kino.clock() is a test's",
                    "run `kino-refunds migrate` as kino_owner, which restores it; then find out who changed it",
                )
                yield from _lot_grace(connection)
                yield from check_workers(connection, settings)
                yield from check_work(connection, settings)
    finally:
        engine.dispose()


def _lot_grace(connection: sa.Connection) -> Iterator[Finding]:
    days = connection.exec_driver_sql("SELECT lot_grace_days FROM kino.ledger_setting").scalar_one()
    said = os.environ.get(LOT_GRACE_DAYS, "").strip()
    yield expect(
        "lot grace",
        said in {"", str(days)},
        f"{days} days" + (f" in the ledger; {LOT_GRACE_DAYS}, which is not read, says {said}" if said else ""),
        f"`kino-refunds migrate --lot-grace-days N` as kino_owner writes the right number; then unset {LOT_GRACE_DAYS}",
    )


_SERVER = sa.text("""
    SELECT current_setting('server_version') AS version,
           CAST(current_setting('server_version_num') AS integer) AS version_num,
           clock_timestamp() AS now,
           pg_is_in_recovery() AS standby,
           current_setting('transaction_read_only') = 'on' AS read_only,
           current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('full_page_writes') AS full_page_writes,
           current_setting('session_replication_role') AS replication_role,
           r.rolname AS role,
           CASE WHEN r.rolsuper THEN 'is a superuser'
                WHEN pg_has_role(r.oid, n.nspowner, 'MEMBER') THEN 'owns the ledger'
                WHEN has_schema_privilege(n.oid, 'CREATE') THEN 'may create tables in the ledger'
                WHEN r.rolcreaterole THEN 'may create roles'
                WHEN r.rolreplication THEN 'may replicate the server'
                WHEN r.rolcreatedb THEN 'may create databases' END AS role_is_too_strong,
           v.oid IS NOT NULL AS has_ledger,
           v.oid IS NULL OR has_schema_privilege(n.oid, 'USAGE') AS may_look
    FROM pg_roles r
    LEFT JOIN pg_namespace n ON n.nspname = 'kino'
    LEFT JOIN pg_class v ON v.relnamespace = n.oid AND v.relname = 'alembic_version'
    WHERE r.rolname = current_user
""")


def _server(server: Any, url: str) -> Iterator[Finding]:
    yield expect(
        "postgres version",
        server.version_num >= POSTGRES_MIN,
        f"{server.version} at {redacted(url)}",
        "Postgres 15 or newer is needed",
    )
    yield expect(
        "postgres writable",
        not server.read_only,
        "a standby" if server.standby else "read-only" if server.read_only else "yes",
        "workers keep their batches until then; let the URL lead to the primary (target_session_attrs=read-write)",
    )
    yield expect(
        "durability",
        server.fsync == "on" and server.synchronous_commit != "off" and server.full_page_writes == "on",
        f"fsync {server.fsync}, synchronous_commit {server.synchronous_commit},"
        f" full_page_writes {server.full_page_writes}",
        "set fsync and full_page_writes on, synchronous_commit not off: a COMMIT that is lost is a lost refund",
    )
    yield expect(
        "triggers",
        server.replication_role != "replica",
        f"session_replication_role is {server.replication_role}",
        "set it back to origin for this role and database: without triggers no sweep sees that a charge is open",
    )
    skew = abs(server.now - datetime.now(UTC))
    yield expect(
        "postgres clock",
        skew < SKEW_MAX,
        f"{skew.total_seconds():,.3f} s from this host's",
        "set both by NTP: Postgres' clock decides, and 30 s apart presumed timeouts and expiry are withheld",
    )


def _roles(connection: sa.Connection, server: Any) -> Iterator[Finding]:
    missing = ROLES - set(connection.execute(_ROLES, {"roles": list(ROLES)}).scalars())
    yield expect(
        "roles",
        not missing,
        f"missing: {', '.join(sorted(missing))}" if missing else "all exist",
        "a superuser runs kino_refunds/db/roles.sql in this database",
    )
    if server.role_is_too_strong is not None:
        yield Finding(
            "rights",
            "fail",
            f"connected as {server.role}, which {server.role_is_too_strong}",
            "connect workers as kino_worker: a worker must not be able to change tables that are append-only",
        )
    elif server.has_ledger:
        yield _rights(connection, server)


_ROLES = sa.text("SELECT CAST(rolname AS text) FROM pg_roles WHERE rolname = ANY(:roles)")


def _rights(connection: sa.Connection, server: Any) -> Finding:
    advice = "connect as kino_worker (KINO_DATABASE_URL); its rights are granted by `kino-refunds migrate`"
    if not server.may_look:
        return Finding("rights", "fail", f"{server.role} may not look into the ledger", advice)
    held, needed = _held_rights(connection), _needed_rights()
    if missing := needed - held:
        return Finding("rights", "fail", f"{server.role} may not {_listed(missing)}", advice)
    return expect(
        "rights",
        held == needed,
        f"{server.role} may do what a worker does, and no more"
        if held == needed
        else f"{server.role} may also {_listed(held - needed)}",
        "revoke that, as kino_owner: a worker must not be able to change tables that are append-only",
    )


def _held_rights(connection: sa.Connection) -> set[tuple[str, str]]:
    held = {
        (right, row["table"])
        for row in connection.execute(_RIGHTS).mappings()
        for right in WORKER_RIGHTS.keys() - {"EXECUTE"}
        if row[right] and row["table"] in WORKER_RIGHTS["SELECT"]
    }
    may_call = connection.execute(_MAY_CALL, {"others": list(NOT_OF_THE_LEDGER)}).scalars()
    return held | {("EXECUTE", name) for name in may_call}


def _needed_rights() -> set[tuple[str, str]]:
    return {(right, table) for right, tables in WORKER_RIGHTS.items() for table in tables}


_SHOWN = 3


def _listed(rights: set[tuple[str, str]]) -> str:
    # "every column" is named only if some columns are allowed.
    named = [
        f"{right} on {table}"
        for right, table in sorted(rights)
        if right != "UPDATE every column" or ("UPDATE", table) not in rights
    ]
    rest = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return ", ".join(named[:_SHOWN]) + rest


_RIGHTS = sa.text("""
    SELECT CAST(relname AS text) AS table,
           has_table_privilege(oid, 'SELECT') AS "SELECT",
           has_any_column_privilege(oid, 'INSERT') AS "INSERT",
           has_any_column_privilege(oid, 'UPDATE') AS "UPDATE",
           has_table_privilege(oid, 'UPDATE') AS "UPDATE every column",
           has_table_privilege(oid, 'DELETE') AS "DELETE",
           has_table_privilege(oid, 'TRUNCATE') AS "TRUNCATE",
           has_table_privilege(oid, 'TRIGGER') AS "TRIGGER"
    FROM pg_class
    WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'kino') AND relkind IN ('r', 'p', 'v')
""")


_MAY_CALL = sa.text("""
    SELECT DISTINCT CAST(proname AS text) FROM pg_proc
    WHERE pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = 'kino')
      AND proname <> ALL (CAST(:others AS text[])) AND has_function_privilege(oid, 'EXECUTE')
""")


def _schema(connection: sa.Connection) -> Iterator[Finding]:
    found, head = current_revision(connection), head_revision()
    if found is None:
        yield Finding(
            "migrations", "fail", "the database has no ledger yet", "run `kino-refunds migrate` as kino_owner"
        )
        return
    if is_known_revision(found):
        advice = "run `kino-refunds migrate` as kino_owner; until then workers keep what needs the new schema"
        yield expect("migrations", found == head, f"the schema is at {found}, this build is at {head}", advice)
    else:
        # Migrations only add: two builds beside each other are an upgrade that is not finished.
        advice = "fine during an upgrade; then replace this build, which is older than the schema"
        yield Finding("migrations", "warn", f"the schema is at {found}, which this build does not know", advice)
    open_to_change = APPEND_ONLY - set(connection.execute(_TRIGGERS).scalars())
    yield expect(
        "append-only",
        not open_to_change,
        f"the trigger is off or gone: {', '.join(sorted(open_to_change))}" if open_to_change else "triggers are on",
        "as kino_owner: ALTER TABLE … ENABLE TRIGGER append_only; then find out who switched it off, and why",
    )
    if found == head:
        are_ours = digest_of_functions(connection) == functions_of_head()
        yield expect(
            "ledger functions",
            are_ours,
            "as this build installs them"
            if are_ours
            else "not as this build installs them: text, owner or rights differ",
            "run `kino-refunds migrate` as kino_owner, which restores them; then find out who changed them",
        )
        yield _open_to_older_builds(connection)


def _open_to_older_builds(connection: sa.Connection) -> Finding:
    writers = writers_beside_functions(connection)
    if not is_open_to_older_builds(connection):
        # The rights of the connected role are checked under `rights`.
        writers -= {connection.exec_driver_sql("SELECT current_user").scalar_one()}
    return expect(
        "ledger closed",
        not writers,
        f"{', '.join(sorted(writers))} may write the ledger's tables without its functions"
        if writers
        else "its tables are written by its functions only",
        "when the last build older than 0006 has stopped, run `kino-refunds migrate` as kino_owner, which closes them"
        " to our roles; revoke the right of any other role",
    )


_TRIGGERS = sa.text("""
    SELECT CAST(c.relname AS text)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'kino' AND t.tgname = 'append_only' AND t.tgenabled IN ('O', 'A')
""")
