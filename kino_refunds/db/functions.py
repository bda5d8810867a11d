"""Install the ledger's SQL functions and their rights: what each role may call, and what it may write.

The functions are in kino_refunds/ledger/*.sql, beside the Python that calls them. `migrate` installs them after the
last migration, in its transaction. Each belongs to `kino_ledger`. That role may write the ledger's tables, owns none of
them, and cannot log in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import sqlalchemy as sa

FOLDER: Final = Path(__file__).parents[1] / "ledger"
FILES: Final = (
    "unprintable",
    "input",
    "lots",
    "grants",
    "charges",
    "endings",
    "reversals",
    "accounts",
    "purchase_lots",
)

MAY_CALL: Final[Mapping[str, tuple[str, ...]]] = {
    "grant_lots": ("kino_product",),
    "open_charges": ("kino_product",),
    "settle_charges": ("kino_worker",),
    "held_lots": ("kino_worker",),
    "expire_lots": ("kino_worker",),
    "reverse_charges": ("kino_oncall",),
    "set_account_status": ("kino_oncall",),
    "planned_lines": ("kino_worker", "kino_oncall"),
}
"""The functions that a login role may EXECUTE, each with its roles. All others are called by functions only."""

WRITTEN_BY_FUNCTIONS: Final = (
    "account",
    "account_status_change",
    "credit_lot",
    "charge",
    "charge_line",
    "open_charge",
    "settlement",
    "correction",
    "transfer",
    "lot_change",
    "lot_hold",
    "lot_void",
    "ledger_setting",
)
"""The ledger's tables. Of the roles that log in only kino_owner, for migrations, may write them."""

LOGINS: Final = ("kino_worker", "kino_product", "kino_oncall", "kino_read")

CLOSED: Final = f"""
REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON {", ".join(f"kino.{table}" for table in WRITTEN_BY_FUNCTIONS)}
    FROM {", ".join(LOGINS)};
"""
"""The normal state: only the functions write the ledger's tables."""
NO_TRIGGERS: Final = "DROP TRIGGER charge_opens ON kino.charge; DROP TRIGGER charge_ends ON kino.settlement;"

OPEN_TO_OLDER_BUILDS: Final = """
GRANT INSERT ON kino.account, kino.account_status_change, kino.credit_lot, kino.settlement, kino.correction,
                kino.transfer TO kino_worker;
GRANT UPDATE (status, status_reason) ON kino.account TO kino_worker;
GRANT UPDATE (remaining, state, expires_at, extended_from, extended_at) ON kino.credit_lot TO kino_worker;
GRANT INSERT (account_id) ON kino.account TO kino_product;
GRANT INSERT (reference, account_id, class, granted, remaining, priority, expires_at, purchase_id)
    ON kino.credit_lot TO kino_product;
GRANT INSERT (job_id, account_id, credits, deadline_at) ON kino.charge TO kino_product;
GRANT INSERT (charge_id, seq, lot_id, credits) ON kino.charge_line TO kino_product;
GRANT INSERT (kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, actor, event_at)
    ON kino.transfer TO kino_product;
GRANT UPDATE (remaining) ON kino.credit_lot TO kino_product;
CREATE OR REPLACE TRIGGER charge_opens AFTER INSERT ON kino.charge
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'kino_ledger')
    EXECUTE FUNCTION kino.charge_opens();
CREATE OR REPLACE TRIGGER charge_ends AFTER INSERT ON kino.settlement
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'kino_ledger')
    EXECUTE FUNCTION kino.charge_ends();
"""
"""The rights and triggers that builds from before 0006 need, which write the tables themselves: for the time of an
upgrade or a rollback."""

_INSTALLED = sa.text("""
    SELECT CAST(p.oid AS regprocedure) FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = CAST('kino' AS regnamespace) AND p.proname <> ALL (CAST(:others AS text[]))
""")
NOT_OF_THE_LEDGER: Final = ("clock", "this_transaction", "horizon", "refuse_change", "charge_opens", "charge_ends")
"""Functions that migrations create: they belong to kino_owner, and are not part of the digest."""

# Not pg_get_functiondef: its layout differs between versions of Postgres. Arguments and result by their types' names.
_DIGEST = sa.text("""
    SELECT encode(sha256(convert_to(coalesce(string_agg(
        concat_ws(E'\\n', p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), l.lanname,
                  p.provolatile, p.prosecdef, p.proconfig, r.rolname, p.prosrc,
                  (SELECT string_agg(concat_ws(' ', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE g.rolname END,
                                               a.privilege_type, a.is_grantable), ',' ORDER BY g.rolname COLLATE "C")
                   FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                   LEFT JOIN pg_roles g ON g.oid = a.grantee)),
        E'\\n\\n' ORDER BY p.proname COLLATE "C", pg_get_function_arguments(p.oid) COLLATE "C"), ''), 'UTF8')), 'hex')
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
    WHERE p.pronamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = 'kino')
      AND p.proname <> ALL (CAST(:others AS text[]))
""")


def digest_of_functions(connection: sa.Connection) -> str:
    """Return the SHA-256, in hex, of the installed functions of the ledger: definition, settings, owner and rights."""
    found: str = connection.execute(_DIGEST, {"others": list(NOT_OF_THE_LEDGER)}).scalar_one()
    return found


_WRITERS = sa.text("""
    SELECT DISTINCT CAST(r.rolname AS text)
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'kino'
    JOIN pg_roles r ON r.rolcanlogin AND NOT r.rolsuper AND NOT pg_has_role(r.oid, c.relowner, 'MEMBER')
    WHERE c.relname = ANY (CAST(:tables AS text[]))
      AND (has_any_column_privilege(r.oid, c.oid, 'INSERT') OR has_any_column_privilege(r.oid, c.oid, 'UPDATE')
           OR has_table_privilege(r.oid, c.oid, 'DELETE, TRUNCATE'))
""")
_HAS_TRIGGER = sa.text("""
    SELECT EXISTS (SELECT FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
                   JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'kino' WHERE t.tgname = :name)
""")


def writers_beside_functions(connection: sa.Connection) -> set[str]:
    """Return the names of roles that log in, do not own the ledger's tables, and may write one of them all the same."""
    return set(connection.execute(_WRITERS, {"tables": list(WRITTEN_BY_FUNCTIONS)}).scalars())


def is_open_to_older_builds(connection: sa.Connection) -> bool:
    """Tell whether builds from before 0006, which write the tables themselves, can still work in this database."""
    found: bool = connection.execute(_HAS_TRIGGER, {"name": "charge_opens"}).scalar_one()
    return found


def install_functions(connection: sa.Connection, digest: str, *, beside_older_builds: bool = False) -> None:
    """Install the functions of this build and revoke the right to write the ledger's tables; connect as kino_owner.

    `digest` is the digest of this build's functions. If it is installed already, nothing is replaced, because replacing
    a trigger locks its table. `beside_older_builds` leaves the tables open to builds from before 0006, until this is
    called again without it.
    """
    is_open = is_open_to_older_builds(connection)
    has_history = connection.execute(_HAS_TRIGGER, {"name": "lot_change"}).scalar_one()
    if digest_of_functions(connection) != digest or not has_history:
        _install(connection)
    if beside_older_builds:
        connection.exec_driver_sql(OPEN_TO_OLDER_BUILDS)
        return
    if is_open:
        connection.exec_driver_sql(NO_TRIGGERS)
    connection.exec_driver_sql(CLOSED)


def _install(connection: sa.Connection) -> None:
    # ALTER FUNCTION … OWNER needs a new owner that may create functions in the schema; the right is revoked below.
    connection.exec_driver_sql("GRANT CREATE ON SCHEMA kino TO kino_ledger")
    for name in FILES:
        _run(connection, (FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
    for function in connection.execute(_INSTALLED, {"others": list(NOT_OF_THE_LEDGER)}).scalars().all():
        name = str(function).removeprefix("kino.").partition("(")[0]
        connection.exec_driver_sql(f"ALTER FUNCTION {function} OWNER TO kino_ledger")
        connection.exec_driver_sql(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC, {', '.join(LOGINS)}")
        if name in MAY_CALL:
            connection.exec_driver_sql(f"GRANT EXECUTE ON FUNCTION {function} TO {', '.join(MAY_CALL[name])}")
    connection.exec_driver_sql("REVOKE CREATE ON SCHEMA kino FROM kino_ledger")


def _run(connection: sa.Connection, statements: str) -> None:
    """Run SQL unchanged: SQLAlchemy must not read a colon in it as a parameter, nor the driver a percent sign."""
    connection.exec_driver_sql(statements, execution_options={"no_parameters": True})
