"""The ledger, the inbox, and the rows of what could not be decided yet.

Postgres is the truth, so what must hold is stated here and not only in Python: one settlement a charge,
one decision an event, lots between zero and what was granted, and facts that nobody changes.

Rows written once per event carry no foreign keys (they double the cost of a row, the design measured) and no index
whose column or predicate changes when a charge settles; the integrity queries (reconciliation/integrity/) cover
what the keys would have.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = """
CREATE TABLE kino.account (
    account_id        text PRIMARY KEY,
    status            text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'terminated')),
    status_reason     text,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE kino.account_status_change (
    change_id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id        text NOT NULL REFERENCES kino.account,
    from_status       text NOT NULL,
    to_status         text NOT NULL CHECK (to_status IN ('active', 'suspended', 'terminated')),
    reason            text NOT NULL,
    actor             text NOT NULL,
    changed_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX account_status_change_account ON kino.account_status_change (account_id, change_id);

-- `remaining` is the one number that changes while jobs settle: no index holds it, so its updates stay HOT.
CREATE TABLE kino.credit_lot (
    lot_id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    reference         text NOT NULL UNIQUE,
    account_id        text NOT NULL,
    class             text NOT NULL
                      CHECK (class IN ('promotional', 'courtesy', 'subscription', 'purchased', 'lifetime')),
    granted           bigint NOT NULL CHECK (granted > 0),
    remaining         bigint NOT NULL CHECK (remaining BETWEEN 0 AND granted),
    priority          integer NOT NULL DEFAULT 100,
    granted_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at        timestamptz,
    extended_from     timestamptz,
    extended_at       timestamptz,
    purchase_id       text,
    successor_of      bigint,
    state             text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'frozen', 'expired', 'voided')),
    CHECK (extended_from IS NULL OR expires_at IS NOT NULL),
    CHECK ((extended_from IS NULL) = (extended_at IS NULL))
) WITH (fillfactor = 70);
COMMENT ON COLUMN kino.credit_lot.extended_from IS
    'expires_at as it was granted, when unfreezing has moved it; null otherwise';
CREATE INDEX credit_lot_account ON kino.credit_lot (account_id);
CREATE INDEX credit_lot_purchase ON kino.credit_lot (purchase_id) WHERE purchase_id IS NOT NULL;
CREATE INDEX credit_lot_expiry ON kino.credit_lot (expires_at) WHERE state = 'active' AND expires_at IS NOT NULL;

CREATE TABLE kino.charge (
    charge_id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id            text NOT NULL UNIQUE,
    account_id        text NOT NULL,
    credits           bigint NOT NULL CHECK (credits >= 0),
    deadline_at       timestamptz NOT NULL,
    opened_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX charge_opened ON kino.charge (opened_at, charge_id);
CREATE INDEX charge_account_opened ON kino.charge (account_id, opened_at);

CREATE TABLE kino.charge_line (
    charge_id         bigint NOT NULL,
    seq               smallint NOT NULL,
    lot_id            bigint NOT NULL,
    credits           bigint NOT NULL CHECK (credits > 0),
    PRIMARY KEY (charge_id, seq)
);

CREATE TABLE kino.settlement (
    charge_id         bigint PRIMARY KEY,
    kind              text NOT NULL CHECK (kind IN ('captured', 'refunded')),
    reason            text NOT NULL CHECK (reason IN ('completed', 'not_covered', 'generation_failure', 'timeout',
                                                      'content_policy_rejection')),
    clause            text NOT NULL CHECK (clause IN ('1', '2.failure', '2.timeout', '2.safety', '6.terminated')),
    policy_version    text NOT NULL,
    event_source      text NOT NULL,
    event_id          text NOT NULL,
    event_time        timestamptz NOT NULL,
    settled_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid               xid8 NOT NULL DEFAULT pg_current_xact_id()
);

CREATE TABLE kino.correction (
    charge_id         bigint PRIMARY KEY,
    reason            text NOT NULL,
    clause            text NOT NULL,
    policy_version    text NOT NULL,
    actor             text NOT NULL,
    reference         text NOT NULL,
    corrected_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid               xid8 NOT NULL DEFAULT pg_current_xact_id()
);

CREATE TABLE kino.transfer (
    transfer_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind              text NOT NULL CHECK ((kind, from_book, to_book) IN (
                          ('grant', 'issued', 'wallet'), ('hold', 'wallet', 'held'),
                          ('capture', 'held', 'consumed'), ('refund', 'held', 'wallet'),
                          ('expire', 'wallet', 'expired'), ('void', 'wallet', 'voided'),
                          ('unvoid', 'voided', 'wallet'), ('reversal', 'consumed', 'wallet'))),
    from_book         text NOT NULL,
    to_book           text NOT NULL,
    account_id        text NOT NULL,
    lot_id            bigint NOT NULL,
    to_lot_id         bigint,
    charge_id         bigint,
    credits           bigint NOT NULL CHECK (credits > 0),
    reason            text,
    actor             text NOT NULL,
    event_at          timestamptz,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid               xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX transfer_account ON kino.transfer (account_id, xid, transfer_id);
CREATE INDEX transfer_charge ON kino.transfer (charge_id) WHERE charge_id IS NOT NULL;

CREATE TABLE kino.inbox_event (
    source            text NOT NULL,
    event_id          text NOT NULL,
    job_id            text NOT NULL,
    fingerprint       text NOT NULL,
    outcome           text NOT NULL,
    event_at          timestamptz NOT NULL,
    received_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (source, event_id)
);
CREATE INDEX inbox_event_job ON kino.inbox_event (job_id);

CREATE TABLE kino.pending_event (
    source            text NOT NULL,
    event_id          text NOT NULL,
    job_id            text NOT NULL,
    fingerprint       text NOT NULL,
    event             jsonb NOT NULL,
    queue             text NOT NULL,
    outcome           text NOT NULL,
    attempts          integer NOT NULL DEFAULT 0,
    history           jsonb NOT NULL DEFAULT '[]',
    first_seen_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_attempt_at   timestamptz NOT NULL,
    leased_until      timestamptz,
    PRIMARY KEY (source, event_id)
);
CREATE INDEX pending_event_due ON kino.pending_event (next_attempt_at);
CREATE INDEX pending_event_job ON kino.pending_event (job_id);

CREATE TABLE kino.dead_letter (
    dead_letter_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_key       bytea NOT NULL UNIQUE,
    raw               bytea NOT NULL,
    queue             text NOT NULL,
    reason            text NOT NULL,
    detail            text NOT NULL,
    group_fingerprint text NOT NULL,
    exception         text,
    source            text,
    event_id          text,
    job_id            text,
    attempts          integer NOT NULL DEFAULT 0,
    history           jsonb NOT NULL DEFAULT '[]',
    seen              bigint NOT NULL DEFAULT 1,
    first_seen_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    build             text NOT NULL,
    status            text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'replayed', 'discarded')),
    status_actor      text,
    status_at         timestamptz,
    notes             jsonb NOT NULL DEFAULT '[]'
);
COMMENT ON COLUMN kino.dead_letter.message_key IS
    'the same message again finds this row: a digest of the event and its fingerprint, or of the bytes';
CREATE INDEX dead_letter_open_job ON kino.dead_letter (job_id) WHERE status = 'open';
CREATE INDEX dead_letter_open_group ON kino.dead_letter (group_fingerprint, dead_letter_id) WHERE status = 'open';

CREATE TABLE kino.break (
    break_id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind              text NOT NULL,
    job_id            text NOT NULL,
    charge_id         bigint,
    credits           bigint NOT NULL,
    detail            text NOT NULL,
    seen              bigint NOT NULL DEFAULT 1,
    first_seen_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    status            text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'repaired', 'accepted')),
    status_actor      text,
    status_note       text,
    status_at         timestamptz
);
CREATE UNIQUE INDEX break_open ON kino.break (kind, job_id) WHERE status = 'open';
CREATE INDEX break_job ON kino.break (job_id);

CREATE TABLE kino.overdue_ask (
    charge_id         bigint PRIMARY KEY,
    asks              integer NOT NULL,
    last_answer       text NOT NULL,
    first_asked_at    timestamptz NOT NULL,
    last_asked_at     timestamptz NOT NULL
);

CREATE TABLE kino.schedule_slot (
    name              text NOT NULL,
    slot_at           timestamptz NOT NULL,
    claimed_by        text NOT NULL,
    claimed_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at       timestamptz,
    result            jsonb,
    PRIMARY KEY (name, slot_at)
);

CREATE TABLE kino.intake_worker (
    worker_id         uuid PRIMARY KEY,
    host              text NOT NULL,
    pid               integer NOT NULL,
    build             text NOT NULL,
    started_at        timestamptz NOT NULL,
    seen_at           timestamptz NOT NULL,
    stopped_at        timestamptz,
    counts            jsonb NOT NULL DEFAULT '{}'
);

-- One row each, by a key that has one value.
CREATE TABLE kino.intake_state (
    singleton         boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    paused            boolean NOT NULL,
    reason            text,
    actor             text,
    changed_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO kino.intake_state (paused) VALUES (false);

CREATE TABLE kino.verified_through (
    singleton         boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    opened_at         timestamptz NOT NULL
);
COMMENT ON COLUMN kino.verified_through.opened_at IS 'every charge opened before this instant is settled';
INSERT INTO kino.verified_through (opened_at) VALUES ('1970-01-01T00:00:00Z');

CREATE TABLE kino.relay_cursor (
    singleton         boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    xid               xid8 NOT NULL,
    charge_id         bigint NOT NULL
);
"""

FACTS = (
    "account_status_change",
    "charge",
    "charge_line",
    "settlement",
    "correction",
    "transfer",
    "inbox_event",
)

REFUSAL = """
CREATE FUNCTION kino.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on kino.%: this table is append-only; a mistake is mended by a new row', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;
"""

VIEWS = """
CREATE VIEW kino.charge_status AS
SELECT c.job_id,
       c.account_id,
       c.credits,
       CASE WHEN k.charge_id IS NOT NULL OR s.kind = 'refunded' THEN c.credits ELSE 0 END AS refunded,
       CASE WHEN k.charge_id IS NOT NULL THEN 'refunded' ELSE coalesce(s.kind, 'open') END AS status,
       coalesce(k.reason, s.reason) AS reason,
       coalesce(k.clause, s.clause) AS clause,
       coalesce(k.policy_version, s.policy_version) AS policy_version,
       coalesce(k.corrected_at, s.settled_at) AS settled_at
FROM kino.charge c
LEFT JOIN kino.settlement s USING (charge_id)
LEFT JOIN kino.correction k USING (charge_id);

CREATE VIEW kino.account_balance AS
SELECT a.account_id,
       coalesce((SELECT sum(l.remaining) FROM kino.credit_lot l
                 WHERE l.account_id = a.account_id AND l.state = 'active'
                   AND (l.expires_at IS NULL OR l.expires_at > clock_timestamp())), 0)::bigint AS available,
       coalesce((SELECT sum(c.credits) FROM kino.charge c
                 WHERE c.account_id = a.account_id
                   AND c.opened_at >= (SELECT v.opened_at FROM kino.verified_through v)
                   AND NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id)),
                0)::bigint AS held
FROM kino.account a;
"""

GRANTS = """
REVOKE ALL ON SCHEMA kino FROM PUBLIC;
GRANT USAGE ON SCHEMA kino TO kino_worker, kino_product, kino_read;

GRANT SELECT ON ALL TABLES IN SCHEMA kino TO kino_worker;
GRANT INSERT ON kino.account, kino.account_status_change, kino.credit_lot, kino.settlement, kino.correction,
                kino.transfer, kino.inbox_event TO kino_worker;
GRANT UPDATE (status, status_reason) ON kino.account TO kino_worker;
GRANT UPDATE (remaining, state, expires_at, extended_from, extended_at) ON kino.credit_lot TO kino_worker;
GRANT INSERT, UPDATE, DELETE ON kino.pending_event, kino.overdue_ask, kino.intake_worker TO kino_worker;
GRANT INSERT, UPDATE ON kino.dead_letter, kino.break, kino.schedule_slot, kino.relay_cursor TO kino_worker;
GRANT UPDATE ON kino.intake_state, kino.verified_through TO kino_worker;

GRANT SELECT ON kino.account, kino.credit_lot, kino.charge, kino.charge_line, kino.settlement, kino.correction,
                kino.transfer, kino.verified_through, kino.charge_status, kino.account_balance TO kino_product;
GRANT INSERT ON kino.account, kino.credit_lot, kino.charge, kino.charge_line, kino.transfer TO kino_product;
GRANT UPDATE (remaining) ON kino.credit_lot TO kino_product;

GRANT SELECT ON kino.account, kino.account_status_change, kino.credit_lot, kino.charge, kino.charge_line,
                kino.settlement, kino.correction, kino.transfer, kino.inbox_event, kino.break,
                kino.verified_through, kino.charge_status, kino.account_balance TO kino_read;
"""


def upgrade() -> None:
    """Create everything in schema `kino` (which `migrate` has made)."""
    op.execute(SCHEMA)
    op.execute(REFUSAL)
    for table in FACTS:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON kino.{table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION kino.refuse_change()"
        )
    op.execute(VIEWS)
    op.execute(GRANTS)


def downgrade() -> None:
    """Refuse: the first migration holds the money; dropping it is a restore, not a downgrade."""
    message = "the ledger is not dropped by a downgrade; restore a backup instead"
    raise NotImplementedError(message)
