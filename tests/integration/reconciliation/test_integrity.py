"""The check `integrity`: its queries run, and find nothing in a ledger that is in order."""

from __future__ import annotations

from kino_refunds.reconciliation.integrity import all_queries, violations
from tests.scenario import Scene, make_event


def test_smoke(scene: Scene) -> None:
    scene.charged("a")
    scene.charged("b")
    scene.settle(make_event("timeout", "a"))
    scene.settle(make_event("completed", "b"))
    scene.settle(make_event("timeout", "b"))
    with scene.superuser.begin() as connection:
        for query in all_queries():
            assert connection.exec_driver_sql(query.of_everything).fetchall() == [], query.name
        assert violations(connection) == []
