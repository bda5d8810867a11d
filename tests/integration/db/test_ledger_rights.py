"""Who may do what: every right in the catalog against a list, and what the functions are."""

from __future__ import annotations

import re
from typing import Final

from kino_refunds.db.migrate import migrate
from tests.conftest import Database
from tests.integration.db.rights import (
    _OBJECTS,
    FUNCTION,
    OBJECTS,
    columns_of,
    differences,
    functions_listed,
    names,
    rights_held,
    rights_listed,
    rows,
)
from tests.ledger_items import Connection

# --- what the catalog says -------------------------------------------------------------------------------------


def test_the_list_names_everything_in_the_schema(superuser: Connection) -> None:
    """Every table, view, sequence and function stands in the list, so a new one cannot go by unseen."""
    found = set(names(superuser, _OBJECTS.format(function=FUNCTION)))
    listed = {name for group in OBJECTS.values() for name in group.split()}

    wrong = [
        *(f"not in the list: {n}" for n in sorted(found - listed)),
        *(f"gone: {n}" for n in sorted(listed - found)),
    ]
    assert not wrong, "\n".join(wrong)


def test_every_role_holds_the_rights_of_the_list_and_no_others(superuser: Connection) -> None:
    """Each right on a table, column, sequence, function or schema is held by the roles that the list says alone."""
    wrong = differences(rights_held(superuser), rights_listed(columns_of(superuser)))

    assert not wrong, "\n".join(wrong)


def test_closing_the_ledger_after_an_upgrade_leaves_the_same_rights(database: Database, superuser: Connection) -> None:
    """What older builds need while an upgrade lasts is taken back whole by the next `migrate`."""
    migrate(database.url("kino_owner"), beside_older_builds=True)
    opened = differences(rights_held(superuser), rights_listed(columns_of(superuser)))

    migrate(database.url("kino_owner"))

    closed = differences(rights_held(superuser), rights_listed(columns_of(superuser)))
    assert "too much: kino_product UPDATE credit_lot.remaining" in opened
    assert not closed, "\n".join(closed)


def test_no_role_can_pass_a_right_on(superuser: Connection) -> None:
    """Only the owner of an object holds a right with grant option."""
    found = rows(
        superuser,
        """
        SELECT a.grantee::regrole::text, a.privilege_type, o.thing FROM (
            SELECT relname::text AS thing, relacl AS acl, relowner AS owner FROM pg_class
            WHERE relnamespace = 'kino'::regnamespace
            UNION ALL
            SELECT c.relname || '.' || t.attname, t.attacl, c.relowner FROM pg_attribute t
            JOIN pg_class c ON c.oid = t.attrelid WHERE c.relnamespace = 'kino'::regnamespace
            UNION ALL
            SELECT proname, proacl, proowner FROM pg_proc WHERE pronamespace = 'kino'::regnamespace
            UNION ALL
            SELECT nspname, nspacl, nspowner FROM pg_namespace WHERE nspname IN ('kino', 'public')
        ) AS o, aclexplode(o.acl) AS a WHERE a.is_grantable AND a.grantee <> o.owner
        """,
    )

    assert found == []


def test_no_default_right_is_set(superuser: Connection) -> None:
    """A table or function that a later migration makes is open to no role until that migration grants it."""
    assert rows(superuser, "SELECT * FROM pg_default_acl") == []


# --- the functions ---------------------------------------------------------------------------------------------


DEFINERS: Final = functions_listed("function for a login", "trigger function for older builds") | {
    "hold_purchase(text,text,text,text)",
    "release_purchase(text,text,text,text)",
    "void_purchase(text,text,text,text)",
    "unvoid_purchase(text,text,text,text)",
    "keep_lot_change()",
}
TRIGGERS: Final = functions_listed("trigger function for older builds") | {"keep_lot_change()"}


def test_these_functions_run_as_their_owner_and_no_others(superuser: Connection) -> None:
    """A function is SECURITY DEFINER only where it is an entrance to the ledger or keeps a table by a trigger."""
    query = f"SELECT {FUNCTION} FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef"

    assert set(names(superuser, query)) == DEFINERS


def test_a_function_that_runs_as_its_owner_is_closed_to_the_caller(superuser: Connection) -> None:
    """Each SECURITY DEFINER function has one search_path and the ledger's role as owner, and PUBLIC may not call it."""
    found = rows(
        superuser,
        f"""
        SELECT {FUNCTION}, proowner::regrole::text, has_function_privilege('public', p.oid, 'EXECUTE'),
               array(SELECT c FROM unnest(proconfig) AS c WHERE c LIKE 'search_path=%')
        FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef
        """,
    )

    of_older_builds = functions_listed("trigger function for older builds")
    assert sorted(found) == [
        (
            function,
            "kino_owner" if function in of_older_builds else "kino_ledger",
            False,
            ["search_path=pg_catalog, pg_temp"],
        )
        for function in sorted(DEFINERS)
    ]


def test_a_function_that_reads_or_writes_instants_as_text_pins_their_style(superuser: Connection) -> None:
    """Every function that is called from outside reads and writes instants the same in every session.

    A trigger's function hands instants on as they are.
    """
    query = f"""
        SELECT {FUNCTION} FROM pg_proc p WHERE pronamespace = 'kino'::regnamespace AND prosecdef
        AND proconfig @> ARRAY['DateStyle=ISO, MDY', 'TimeZone=UTC']
    """

    assert set(names(superuser, query)) == DEFINERS - TRIGGERS


def test_no_login_may_call_a_part_of_the_ledger(superuser: Connection) -> None:
    """A function without a search_path of its own runs inside the ledger's functions only; no login may call it."""
    query = f"""
        SELECT r.rolname || ' ' || {FUNCTION} FROM pg_proc p CROSS JOIN pg_roles r
        WHERE p.pronamespace = 'kino'::regnamespace AND NOT p.prosecdef
          AND {FUNCTION} <> ALL (%(open_to_all)s) AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
          AND r.rolcanlogin AND NOT r.rolsuper AND r.rolname <> 'kino_owner'
    """

    found = rows(superuser, query, {"open_to_all": sorted(functions_listed("function for every role"))})

    assert found == []


def test_a_function_for_every_role_names_the_schema_of_what_it_calls(superuser: Connection) -> None:
    """A function that runs with the caller's search_path calls Postgres' own functions by their schema."""
    query = """
        SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'kino'::regnamespace AND NOT prosecdef
        AND has_function_privilege('public', oid, 'EXECUTE')
    """

    found = {name: re.findall(r"[\w.]+(?=\()", body) for name, body in rows(superuser, query)}

    assert {name: [call for call in calls if not call.startswith("pg_catalog.")] for name, calls in found.items()} == {
        "clock": [],
        "this_transaction": [],
        "horizon": [],
        "refuse_change": [],
    }


def test_no_login_is_or_becomes_the_ledger(superuser: Connection) -> None:
    """kino_ledger cannot log in, has no power of its own, and no login but kino_owner may become it or kino_owner."""
    attributes = rows(
        superuser,
        """
        SELECT rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls
        FROM pg_roles WHERE rolname = 'kino_ledger'
        """,
    )
    members = rows(
        superuser,
        """
        SELECT r.rolname, o.rolname FROM pg_roles r CROSS JOIN pg_roles o
        WHERE NOT r.rolsuper AND r.rolname !~ '^pg_' AND r.oid <> o.oid AND o.rolname <> 'pg_database_owner'
          AND pg_has_role(r.oid, o.oid, 'MEMBER')
        """,
    )

    assert attributes == [(False,) * 6]
    assert members == [("kino_owner", "kino_ledger")]


def test_the_ledger_owns_its_functions_and_nothing_else(superuser: Connection) -> None:
    """kino_ledger owns no table, so a statement that runs as it cannot alter or drop one, or disable its triggers."""
    query = """
        SELECT DISTINCT d.classid::regclass::text FROM pg_shdepend d
        WHERE d.refobjid = 'kino_ledger'::regrole AND d.deptype = 'o'
    """

    assert names(superuser, query) == ["pg_proc"]
