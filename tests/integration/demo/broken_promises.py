"""Every promise, broken on purpose in a copy of the demo: what is done, and what the referee must find."""

from __future__ import annotations

PAIR = "(SELECT charge_id FROM kino.charge WHERE job_id IN (SELECT job_id FROM kino.inbox_event"
PAIR += " WHERE outcome = 'already_refunded') ORDER BY charge_id LIMIT 1)"
REFUNDED = "(SELECT charge_id FROM kino.settlement WHERE kind = 'refunded' ORDER BY charge_id LIMIT 1)"
CAPTURED = "(SELECT charge_id FROM kino.settlement WHERE reason = 'completed' ORDER BY charge_id LIMIT 1)"
TWIN = (
    "(SELECT charge_id FROM kino.charge WHERE job_id IN"
    " (SELECT job_id FROM kino.dead_letter WHERE reason = 'conflicting_duplicate') ORDER BY charge_id LIMIT 1)"
)

UNCHECKED = "ALTER TABLE kino.settlement DROP CONSTRAINT settlement_cites_its_clause"
"""Rows of before that CHECK need not obey it."""

PLANTED = {
    # P1
    "a charge that is settled twice": (
        "P1",
        (
            "ALTER TABLE kino.settlement DROP CONSTRAINT settlement_pkey;"
            f"INSERT INTO kino.settlement SELECT * FROM kino.settlement WHERE charge_id = {REFUNDED}"
        ),
    ),
    "a charge that is not settled": ("P1", f"DELETE FROM kino.settlement WHERE charge_id = {CAPTURED}"),
    "a charge that nobody asked for": (
        "P1",
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at) VALUES ('ghost', 'customer-01', 0, now())",
    ),
    "a charge of more than was asked for": (
        "P1",
        f"UPDATE kino.charge SET credits = credits + 1 WHERE charge_id = {REFUNDED}",
    ),
    "a refund and a capture": (
        "P1",
        (
            "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits,"
            " reason, actor)"
            " SELECT 'capture', 'held', 'consumed', account_id, lot_id, charge_id, credits, 'x', 'x'"
            f" FROM kino.transfer WHERE kind = 'refund' AND charge_id = {REFUNDED}"
        ),
    ),
    "a deadline that nobody asked for": ("P1", "UPDATE kino.charge SET deadline_at = deadline_at + interval '1 day'"),
    # P2
    "an event that is decided twice": (
        "P2",
        (
            "ALTER TABLE kino.inbox_event DROP CONSTRAINT inbox_event_pkey;"
            "INSERT INTO kino.inbox_event SELECT * FROM kino.inbox_event LIMIT 1"
        ),
    ),
    "an event that decided another job": (
        "P2",
        "UPDATE kino.inbox_event SET job_id = 'demo-00007' WHERE event_id = 'demo-00009-end'",
    ),
    "a conflict that nobody kept": ("P2", "DELETE FROM kino.dead_letter WHERE reason = 'conflicting_duplicate'"),
    "a conflict that was applied": (
        "P2",
        (
            f"{UNCHECKED};UPDATE kino.settlement SET kind ="
            f" CASE kind WHEN 'captured' THEN 'refunded' ELSE 'captured' END WHERE charge_id = {TWIN}"
        ),
    ),
    "the second content of an event": (
        "P2",
        "UPDATE kino.inbox_event SET event_at = event_at + interval '1 second' WHERE event_id = 'demo-00009-end'",
    ),
    # P3
    "a second refund of one job": (
        "P3",
        (
            "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, charge_id, credits,"
            " reason, actor)"
            " SELECT kind, from_book, to_book, account_id, lot_id, charge_id, credits, reason, actor"
            f" FROM kino.transfer WHERE kind = 'refund' AND charge_id = {PAIR}"
        ),
    ),
    "a contradiction that nobody was told of": ("P3", "DELETE FROM kino.break"),
    "a break that nobody can explain": (
        "P3",
        (
            "INSERT INTO kino.break (kind, job_id, credits, detail)"
            f" SELECT 'failed_after_capture', job_id, credits, 'x' FROM kino.charge WHERE charge_id = {CAPTURED}"
        ),
    ),
    "a break that somebody has closed": ("P3", "UPDATE kino.break SET status = 'accepted'"),
    # P4
    "a refund to another lot": (
        "P4",
        (
            "UPDATE kino.transfer SET lot_id = (SELECT max(lot_id) FROM kino.credit_lot l"
            " WHERE l.account_id = transfer.account_id AND l.lot_id <> transfer.lot_id AND l.successor_of IS NULL)"
            f" WHERE kind = 'refund' AND charge_id = {REFUNDED}"
        ),
    ),
    "a refund of more than was taken": (
        "P4",
        (
            "UPDATE kino.credit_lot SET remaining = remaining + 1, granted = granted + 1"
            f" WHERE lot_id IN (SELECT lot_id FROM kino.transfer WHERE kind = 'refund' AND charge_id = {REFUNDED});"
            f"UPDATE kino.transfer SET credits = credits + 1 WHERE kind = 'refund' AND charge_id = {REFUNDED}"
        ),
    ),
    "a successor of another class": (
        "P4",
        "UPDATE kino.credit_lot SET class = 'lifetime' WHERE successor_of IS NOT NULL",
    ),
    "a lot that was granted less": (
        "P4",
        "UPDATE kino.credit_lot SET granted = granted + 1 WHERE reference = 'customer-01-pack'",
    ),
    "money from nothing": (
        "P4",
        (
            "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)"
            " VALUES ('gift', 'customer-01', 'purchased', 9, 9);"
            "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor)"
            " SELECT 'grant', 'issued', 'wallet', account_id, lot_id, 9, 'purchased', 'x' FROM kino.credit_lot"
            " WHERE reference = 'gift'"
        ),
    ),
    "a refund that was taken again": (
        "P4",
        (
            "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor)"
            " SELECT 'void', 'wallet', 'voided', account_id, lot_id, remaining, 'x', 'x' FROM kino.credit_lot"
            " WHERE reference = 'customer-01-pack';"
            "UPDATE kino.credit_lot SET remaining = 0, state = 'voided' WHERE reference = 'customer-01-pack'"
        ),
    ),
    "a lot that nobody froze": (
        "P4",
        "UPDATE kino.credit_lot SET state = 'frozen' WHERE reference = 'customer-01-pack'",
    ),
    "a lot that expires sooner than it was granted for": (
        "P4",
        "UPDATE kino.credit_lot SET expires_at = now() WHERE reference = 'customer-01-month'",
    ),
    "a successor that has expired at birth": (
        "P4",
        "UPDATE kino.credit_lot SET expires_at = granted_at WHERE successor_of IS NOT NULL",
    ),
    # P5
    "a settlement that may be deleted": ("P5", "DROP TRIGGER append_only ON kino.settlement"),
    "a transfer that a superuser may change": ("P5", "DROP TRIGGER append_only ON kino.transfer"),
    "a transfer that a worker may change": (
        "P5",
        "DROP TRIGGER append_only ON kino.transfer; GRANT UPDATE, DELETE, TRUNCATE ON kino.transfer TO kino_worker",
    ),
    "a transfer that was changed": (
        "P5",
        (
            "UPDATE kino.transfer SET reason = 'another' WHERE kind = 'hold' AND transfer_id = (SELECT min(transfer_id)"
            " FROM kino.transfer WHERE kind = 'hold')"
        ),
    ),
    "a transfer that is gone": (
        "P5",
        "DELETE FROM kino.transfer WHERE transfer_id = (SELECT min(transfer_id) FROM kino.transfer)",
    ),
    "a wallet with more than its transfers say": (
        "P5",
        "UPDATE kino.credit_lot SET remaining = remaining - 1 WHERE reference = 'customer-01-pack'",
    ),
    # P6
    "an event that is gone": (
        "P6",
        (
            "DELETE FROM kino.inbox_event WHERE event_id = (SELECT min(event_id) FROM kino.inbox_event"
            " WHERE outcome = 'already_refunded')"
        ),
    ),
    # P7
    "a dead letter with one byte less": (
        "P7",
        "UPDATE kino.dead_letter SET raw = substring(raw FROM 2) WHERE reason = 'bad_json'",
    ),
    "a dead letter that was dropped": ("P7", "DELETE FROM kino.dead_letter WHERE reason = 'too_large'"),
    "a dead letter for another reason": (
        "P7",
        "UPDATE kino.dead_letter SET reason = 'bad_json' WHERE reason = 'bad_base64'",
    ),
    "a dead letter without a word": ("P7", "UPDATE kino.dead_letter SET detail = '' WHERE reason = 'bad_base64'"),
    "a dead letter that was not counted": ("P7", "UPDATE kino.dead_letter SET seen = 0 WHERE reason = 'bad_base64'"),
    "a dead letter that somebody closed": ("P7", "UPDATE kino.dead_letter SET status = 'discarded'"),
    # P8
    "a good event that became a dead letter": (
        "P8",
        (
            "INSERT INTO kino.dead_letter (message_key, raw, queue, reason, detail, group_fingerprint, build)"
            " VALUES ('x', 'x', 'generation.timeout', 'apply_error', 'x', 'x', 'x')"
        ),
    ),
    "an event that still waits": (
        "P8",
        (
            "INSERT INTO kino.pending_event (source, event_id, job_id, fingerprint, event, queue, outcome,"
            " next_attempt_at)"
            " VALUES ('s', 'e', 'j', 'f', '{}', 'generation.timeout', 'busy', now())"
        ),
    ),
    "a neighbour that is not decided": (
        "P8",
        "DELETE FROM kino.inbox_event WHERE event_id IN (SELECT event_id FROM kino.settlement)",
    ),
    # P9
    "a customer who is not refunded": (
        "P9",
        f"UPDATE kino.settlement SET kind = 'captured', reason = 'not_covered' WHERE charge_id = {REFUNDED}",
    ),
    "a refund that nobody is due": (
        "P9",
        (
            "UPDATE kino.settlement SET kind = 'refunded', reason = 'generation_failure', clause = '2.failure'"
            f" WHERE charge_id = {CAPTURED}"
        ),
    ),
    "a terminated account that is refunded": (
        "P9",
        (
            "UPDATE kino.settlement SET kind = 'refunded', reason = 'generation_failure', clause = '2.failure'"
            " WHERE clause = '6.terminated'"
        ),
    ),
    "a verdict before its time": (
        "P9",
        (
            "UPDATE kino.settlement SET event_source = 'kino-reconciler'"
            " WHERE charge_id = (SELECT min(charge_id) FROM kino.settlement)"
        ),
    ),
    # P10
    "an event that says something else": (
        "P10",
        "UPDATE kino.inbox_event SET outcome = 'captured' WHERE outcome = 'refunded'",
    ),
    "an event that settled nothing and says so": (
        "P10",
        "UPDATE kino.inbox_event SET outcome = 'refunded' WHERE outcome = 'already_refunded'",
    ),
    "a settlement in the future": (
        "P10",
        f"UPDATE kino.settlement SET settled_at = settled_at + interval '5 years' WHERE charge_id = {CAPTURED}",
    ),
    "a settlement by an event that nobody knows": (
        "P10",
        f"UPDATE kino.settlement SET event_id = 'unknown' WHERE charge_id = {REFUNDED}",
    ),
    "a settlement by another clause": (
        "P10",
        f"{UNCHECKED};UPDATE kino.settlement SET clause = '2.safety' WHERE charge_id = {CAPTURED}",
    ),
    "a settlement by a policy that never was": (
        "P10",
        f"UPDATE kino.settlement SET policy_version = '2024-01-01' WHERE charge_id = {CAPTURED}",
    ),
    "a settlement at another time": (
        "P10",
        f"UPDATE kino.settlement SET event_time = event_time - interval '1 day' WHERE charge_id = {CAPTURED}",
    ),
    "a transfer by nobody": ("P10", "UPDATE kino.transfer SET actor = '' WHERE kind = 'refund'"),
    "a transfer without a reason": ("P10", "UPDATE kino.transfer SET reason = NULL WHERE kind = 'capture'"),
}
