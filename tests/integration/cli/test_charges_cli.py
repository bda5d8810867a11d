"""`charges`: open one by hand as the product does, and list what is open with its credits, age and lateness."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.clock import clock_at
from tests.command_line import Run
from tests.conftest import Database
from tests.scenario import Scene, make_event

EPOCH = datetime(2040, 1, 1, tzinfo=UTC)


@pytest.fixture
def stopped(scene: Scene) -> Iterator[None]:
    """The ledger's clock stands at the beginning of 2040; the host's goes on."""
    with clock_at(scene.worker, EPOCH):
        yield


def opened(scene: Scene) -> list[Any]:
    return scene.rows("SELECT job_id, account_id, credits, deadline_at FROM kino.charge ORDER BY charge_id")


# --- open


@pytest.mark.usefixtures("stopped")
def test_a_charge_is_opened_as_by_the_product(run: Run, scene: Scene) -> None:
    """Credits are held for the job until a quarter of an hour from now; the same charge again changes nothing."""
    lot = scene.grant("acme", 100)

    first = run("charges", "open", "job-1", "acme", "8", "--json")
    again = run("charges", "open", "job-1", "acme", "8", "--json")
    table = run("charges", "open", "job-1", "acme", "8")

    assert (first.code, first.err) == (0, "")
    assert first.json == {
        "charge_id": first.json["charge_id"],
        "job_id": "job-1",
        "account_id": "acme",
        "credits": 8,
        "deadline_at": "2040-01-01T00:15:00+00:00",
        "opened_at": "2040-01-01T00:00:00+00:00",
        "lines": [[lot.lot_id, 8]],
    }
    assert again == first
    assert (table.code, f"8 from lot {lot.lot_id}" in table.out, "2040-01-01 00:15:00Z" in table.out) == (0, True, True)
    assert scene.balance("acme").held == 8


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("deadline", "understood"),
    [
        ("0", "2040-01-01T00:00:00+00:00"),
        ("90", "2040-01-01T01:30:00+00:00"),
        ("2040-01-01T03:00:00+02:00", "2040-01-01T01:00:00+00:00"),
    ],
)
def test_a_deadline_is_minutes_or_an_instant(run: Run, scene: Scene, deadline: str, understood: str) -> None:
    """Minutes count by the ledger's clock, and what was understood is shown."""
    scene.grant("acme", 100)

    said = run("charges", "open", "job-1", "acme", "0", "--deadline", deadline, "--json")

    assert (said.code, said.json["deadline_at"]) == (0, understood)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("deadline", "says"),
    [
        ("", "'' is not a time; for example 2026-"),
        ("-1", "'-1' is not a time; for example 2026-"),
        ("1.5", "'1.5' is not a time; for example 2026-"),
        ("525601", "--deadline is at most 525,600 minutes, not 525601"),
        ("9" * 50, "--deadline is at most 525,600 minutes, not 999"),
        ("2040-01-02", "'2040-01-02' is a day, not an instant; in UTC it ends at 2040-01-03T00:00:00Z"),
        ("2040-01-02T00:00:00", "'2040-01-02T00:00:00' has no offset; type 2040-01-02T00:00:00Z for UTC"),
        ("2039-12-31T23:59:59Z", "--deadline 2039-12-31T23:59:59Z lies in the past (it is 2040-01-01T00:00:00Z)"),
    ],
)
def test_a_deadline_that_cannot_be_meant_opens_nothing(run: Run, scene: Scene, deadline: str, says: str) -> None:
    """A job that is overdue at once would be refunded by the next sweep: that has to be said."""
    scene.grant("acme", 100)

    said = run("charges", "open", "job-1", "acme", "8", f"--deadline={deadline}")

    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err
    assert opened(scene) == []


def test_a_deadline_in_the_past_can_be_meant(run: Run, scene: Scene) -> None:
    """The ledger allows it, and who tries out the overdue sweep wants it."""
    scene.grant("acme", 100)

    said = run("charges", "open", "job-1", "acme", "8", "--deadline", "2001-01-01T00:00:00Z", "--although-past")

    assert (said.code, said.err) == (0, "")
    assert [row.deadline_at.year for row in opened(scene)] == [2001]


def test_what_the_ledger_refuses_is_a_finding(run: Run, scene: Scene) -> None:
    """Too few credits, another charge for the job, a settled job: one line each, and nothing moves."""
    scene.grant("acme", 10)
    scene.open("open", "acme", 5)
    scene.open("settled", "acme", 1)
    scene.settle(make_event("completed", "settled"))
    before = scene.everything()

    said = [
        run("charges", "open", "job-1", "acme", "8"),
        run("charges", "open", "open", "acme", "6"),
        run("charges", "open", "settled", "acme", "1"),
        run("charges", "open", "job-1", "nobody", "0"),
    ]

    assert [(each.code, each.out, each.err.count("\n")) for each in said] == [(1, "", 1)] * 4
    assert scene.everything() == before


@pytest.mark.parametrize("command", ["charges open job-1 acme 8", "grant acme 5 --reference order-2"])
def test_a_login_without_the_right_reads_which_setting_to_give(
    run: Run, scene: Scene, database: Database, command: str
) -> None:
    """Who has only a login that reads is told the setting by its name, and no server is blamed."""
    scene.grant("acme")
    before = scene.everything()
    reader = database.url("kino_read")

    without = run(*command.split(), KINO_DATABASE_URL=reader, KINO_PRODUCT_DATABASE_URL=None)
    wrong = run(*command.split(), KINO_PRODUCT_DATABASE_URL=reader)

    needs = "the product's work needs KINO_PRODUCT_DATABASE_URL, a login of kino_product\n"
    for said, name in ((without, "KINO_DATABASE_URL"), (wrong, "KINO_PRODUCT_DATABASE_URL")):
        assert (said.code, said.out, said.err.count("\n")) == (3, "", 1)
        assert "permission denied" in said.err
        assert f"(see {name}); {needs}" in said.err
    assert scene.everything() == before


def test_a_worker_s_login_opens_no_charges(run: Run, scene: Scene) -> None:
    """The worker settles what the product has charged, and can charge nobody."""
    scene.grant("acme")

    said = run("charges", "open", "job-1", "acme", "8", KINO_PRODUCT_DATABASE_URL=None)

    assert (said.code, "KINO_PRODUCT_DATABASE_URL" in said.err) == (3, True)
    assert opened(scene) == []


def test_a_product_s_server_that_is_away_is_named_by_its_setting(run: Run) -> None:
    """The address that does not answer is that of the product's login, and no other is blamed."""
    away = run("charges", "open", "j", "a", "1", KINO_PRODUCT_DATABASE_URL="postgresql://p:hunter2@127.0.0.1:1/kino")
    unreadable = run("charges", "open", "j", "a", "1", KINO_PRODUCT_DATABASE_URL="db:hunter2@localhost")

    assert (away.code, away.err.startswith("error: Postgres (KINO_PRODUCT_DATABASE_URL): ")) == (3, True)
    assert (unreadable.code, unreadable.err.startswith("error: KINO_PRODUCT_DATABASE_URL ")) == (2, True)
    assert "hunter2" not in away.err + unreadable.err


# --- list


def test_open_charges_are_listed_with_credits_age_and_lateness(run: Run, scene: Scene) -> None:
    """A charge is overdue once its deadline and the grace have passed; a settled one is not open."""
    scene.grant("acme", 100)
    for job_id, deadline in (("on time", "5"), ("in grace", "0"), ("late", "0"), ("done", "5")):
        assert run("charges", "open", job_id, "acme", "8", "--deadline", deadline).code == 0
    scene.settle(make_event("completed", "done"))
    scene.as_superuser(
        "UPDATE kino.open_charge o SET deadline_at = kino.clock() - interval '61 seconds'"
        " FROM kino.charge c WHERE c.charge_id = o.charge_id AND c.job_id = 'late'"
    )

    listed = run("charges", "list", "--open", "--json")
    patient = run("charges", "list", "--open", "--json", KINO_OVERDUE_GRACE_S="3600")
    table = run("charges", "list", "--open")

    items = listed.json["items"]
    assert (listed.code, listed.json["next"]) == (0, None)
    assert items[0].keys() == {
        "number", "job_id", "account_id", "credits", "status", "opened_at", "deadline_at", "age_s", "overdue",
    }  # fmt: skip
    assert [(each["job_id"], each["credits"], each["status"], each["overdue"]) for each in items] == [
        ("on time", 8, "open", False),
        ("in grace", 8, "open", False),
        ("late", 8, "open", True),
    ]
    assert all(0 <= each["age_s"] < 600 for each in items)
    assert [each["overdue"] for each in patient.json["items"]] == [False] * 3
    assert [line.split()[-1] for line in table.out.splitlines() if "open" in line] == ["no", "no", "yes"]


def test_age_is_by_the_ledger_s_clock(run: Run, scene: Scene) -> None:
    """A host whose clock is wrong shows the same age."""
    scene.grant("acme")
    charge = scene.open("job-1", "acme")

    with clock_at(scene.worker, charge.opened_at + timedelta(hours=3)):
        (item,) = run("charges", "list", "--open", "--json").json["items"]

    assert item["age_s"] == 3 * 3600
    assert datetime.fromisoformat(item["opened_at"]) == charge.opened_at


def test_all_charges_are_listed_with_what_became_of_them(run: Run, scene: Scene) -> None:
    """Without --open settled charges are there too, and none of them is overdue."""
    charges = {job_id: scene.charged(job_id) for job_id in ("open", "captured", "refunded", "corrected")}
    scene.settle(
        make_event("completed", "captured"), make_event("timeout", "refunded"), make_event("failed user", "corrected")
    )
    scene.correct(charges["corrected"])

    everything = run("charges", "list", "--json").json["items"]
    one = run("charges", "list", "--account", "acct of captured", "--json").json["items"]

    assert [(each["job_id"], each["status"], each["overdue"]) for each in everything] == [
        ("open", "open", False),
        ("captured", "captured", False),
        ("refunded", "refunded", False),
        ("corrected", "refunded", False),
    ]
    assert [each["job_id"] for each in one] == ["captured"]


@pytest.mark.parametrize("which", [[], ["--open"]])
def test_no_page_of_charges_leaves_one_out(run: Run, scene: Scene, which: list[str]) -> None:
    """Paging shows each charge once; the last page says that there is no next."""
    for number in range(5):
        scene.charged(f"job-{number}")

    found: list[str] = []
    after: int | None = 0
    while after is not None:
        page = run("charges", "list", *which, "--limit", "2", "--after", str(after), "--json").json
        found += [each["job_id"] for each in page["items"]]
        after = page["next"]
    shown = run("charges", "list", *which, "--limit", "2")

    assert found == [f"job-{number}" for number in range(5)]
    assert shown.out.splitlines()[-1].startswith("more: --after ")


def test_an_empty_list_says_so(run: Run, scene: Scene) -> None:
    """Nothing open is a sentence for people and an empty page for programs."""
    scene.charged()
    scene.settle(make_event("completed"))

    assert run("charges", "list", "--open").out == "no open charges\n"
    assert run("charges", "list", "--open", "--json").json == {"items": [], "next": None}
    assert run("charges", "list", "--after", "99").out == "no more charges\n"
