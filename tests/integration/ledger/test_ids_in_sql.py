"""An id is the same in SQL and in Python."""

from __future__ import annotations

import sys
from typing import Final

from hypothesis import example, given
from hypothesis import strategies as st

from kino_refunds.ledger.values import require_id
from tests.conftest import Database
from tests.integration.ledger.items import ON_ONE_DATABASE
from tests.ledger_items import session


def is_id(text: str) -> bool:
    """Ask Python's rule."""
    try:
        require_id("id", text)
    except ValueError:
        return False
    return True


EXACT: Final = sys.version_info[:2] == (3, 11)
"""kino.is_id() knows Unicode as Python 3.11 does; a newer one knows more characters, and never fewer."""
SURROGATES = range(0xD800, 0xE000)


def test_an_id_is_the_same_in_sql_and_in_python(database: Database) -> None:
    """Every code point, alone and between two letters, is an id in SQL exactly where it is one in Python.

    A job with another id could be charged, and its events would be refused.
    """
    query = """
        SELECT c, kino.is_id(chr(c)), kino.is_id('a' || chr(c) || 'b')
        FROM generate_series(1, 1114111) AS c WHERE c NOT BETWEEN 55296 AND 57343
    """
    with session(database, "postgres") as superuser:
        found = superuser.execute(query.encode()).fetchall()

    assert len(found) == 0x10FFFF - len(SURROGATES)
    differs = [
        (hex(c), alone, between)
        for c, alone, between in found
        if (alone, between) != (is_id(chr(c)), is_id(f"a{chr(c)}b"))
        and (EXACT or (alone and not is_id(chr(c))) or (between and not is_id(f"a{chr(c)}b")))
    ]
    assert differs == []


CHARACTERS = st.sampled_from("aZ09~! -\u00e9\u00a0\u3000\u200b\u202e\n\x01\U0001f3ac\u0301") | st.characters(
    exclude_categories=["Cs"], exclude_characters="\x00"
)


@given(text=st.text(CHARACTERS, max_size=6) | st.text(st.sampled_from("a\u00e9 "), min_size=120, max_size=135))
@example("a" * 128)
@example("a" * 129)
@example("\U0001f3ac" * 128)
@example("\U0001f3ac" * 129)
@example("a\n")
@ON_ONE_DATABASE
def test_a_text_is_an_id_in_sql_where_it_is_one_in_python(database: Database, text: str) -> None:
    """Length, ends and every character of a whole text are judged alike by both."""
    with session(database, "postgres") as superuser:
        found = superuser.execute(b"SELECT kino.is_id(%s)", [text]).fetchall()

    assert found == [(is_id(text),)] or (not EXACT and found == [(False,)])
