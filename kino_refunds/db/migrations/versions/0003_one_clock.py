"""One clock decides, transactions give the order, and what is open stands in a table of its own.

- `kino.clock()` is the one clock of every decision; `kino.this_transaction()` and `kino.horizon()` are the one way to
  a transaction's number and to the number below which every transaction has ended.
- `kino.open_charge` says which charges are open. Before, that was every charge without a settlement behind a mark in
  time: a charge whose `opened_at` lay behind the mark was seen by nobody, for good.
- Triggers keep that table, so that a build of before this migration keeps it too while both run.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# All at once and in the order in which settling and charging reach them. Table by table, as the changes below come, a
# product that has its charge and wants its lot would wait for us while we wait for its charge.
LOCKS = """
LOCK TABLE kino.inbox_event, kino.pending_event, kino.charge, kino.account, kino.settlement, kino.correction,
           kino.charge_line, kino.credit_lot, kino.transfer, kino.break, kino.dead_letter
    IN ACCESS EXCLUSIVE MODE;
"""

# No SET clause and no SECURITY DEFINER: the planner puts such a function's body where it is called.
FUNCTIONS = """
CREATE FUNCTION kino.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE
    AS 'SELECT pg_catalog.clock_timestamp()';
COMMENT ON FUNCTION kino.clock() IS 'the one clock that decides; tests replace it in their own database';

CREATE FUNCTION kino.this_transaction() RETURNS xid8 LANGUAGE sql STABLE PARALLEL UNSAFE
    AS 'SELECT pg_catalog.pg_current_xact_id()';
COMMENT ON FUNCTION kino.this_transaction() IS 'the number of the transaction that asks; rows are stamped with it';

CREATE FUNCTION kino.horizon() RETURNS xid8 LANGUAGE sql STABLE PARALLEL SAFE
    AS 'SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())';
COMMENT ON FUNCTION kino.horizon() IS 'every transaction with a lower number has ended: nothing can still appear there';
"""

CLOCK_DEFAULTS = {
    "account": ("created_at",),
    "account_status_change": ("changed_at",),
    "credit_lot": ("granted_at",),
    "charge": ("opened_at",),
    "settlement": ("settled_at",),
    "correction": ("corrected_at",),
    "transfer": ("created_at",),
    "inbox_event": ("received_at",),
    "pending_event": ("first_seen_at",),
    "dead_letter": ("first_seen_at", "last_seen_at"),
    "break": ("first_seen_at", "last_seen_at"),
    "schedule_slot": ("claimed_at",),
    "intake_state": ("changed_at",),
}
TRANSACTION_DEFAULTS = ("settlement", "correction", "transfer")

TABLES = """
CREATE TABLE kino.open_charge (
    charge_id         bigint PRIMARY KEY,
    account_id        text NOT NULL,
    deadline_at       timestamptz NOT NULL,
    credits           bigint NOT NULL
);
COMMENT ON TABLE kino.open_charge IS 'a charge is open while its row stands here';

CREATE TABLE kino.xid_clock (
    sampled_at        timestamptz NOT NULL DEFAULT kino.clock(),
    xid               xid8 PRIMARY KEY DEFAULT kino.this_transaction()
);
COMMENT ON TABLE kino.xid_clock IS
    'which instant belongs to which transaction number: a sweep adds a row every minute, the instant read first';

COMMENT ON TABLE kino.verified_through IS
    'read by builds of before 0003 only; what is verified is read from xid_clock and open_charge';
"""

# A trigger of the statement, over all its rows at once: a batch of 500 costs it 0.2 ms.
#
# SECURITY DEFINER, so that no role needs the right to write open_charge; search_path with pg_temp last and every name
# written whole, or a temporary table of the caller's would be read in the place of ours. Nobody may EXECUTE them: who
# may could put them on a table of his own and write open_charge through it. Firing needs no such right.
#
# The planner's switches: open_charge is reached by its key only, and a plan made while it was small would go through
# all of it for every batch.
TRIGGERS = """
CREATE FUNCTION kino.charge_opens() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)
    SELECT n.charge_id, n.account_id, n.deadline_at, n.credits FROM new_rows n;
    RETURN NULL;
END
$$;

CREATE FUNCTION kino.charge_ends() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
BEGIN
    DELETE FROM kino.open_charge o USING new_rows n WHERE o.charge_id = n.charge_id;
    RETURN NULL;
END
$$;

REVOKE EXECUTE ON FUNCTION kino.charge_opens(), kino.charge_ends() FROM PUBLIC;

CREATE TRIGGER charge_opens AFTER INSERT ON kino.charge
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION kino.charge_opens();
CREATE TRIGGER charge_ends AFTER INSERT ON kino.settlement
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION kino.charge_ends();
"""

# After the triggers: CREATE TRIGGER keeps every writer away until this migration ends, so no charge falls between.
FILL = """
INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)
SELECT c.charge_id, c.account_id, c.deadline_at, c.credits
FROM kino.charge c WHERE NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id);

CREATE INDEX open_charge_deadline ON kino.open_charge (deadline_at, charge_id);
CREATE INDEX open_charge_account ON kino.open_charge (account_id);
"""

# Clamped to what a bigint holds: more than 1,024 of the largest lots in one account made the sum's cast fail, and
# with it the view, for every account.
BALANCE = """
CREATE OR REPLACE VIEW kino.account_balance AS
SELECT a.account_id,
       least(coalesce((SELECT sum(l.remaining) FROM kino.credit_lot l
                       WHERE l.account_id = a.account_id AND l.state = 'active'
                         AND (l.expires_at IS NULL OR l.expires_at > kino.clock())), 0),
             9223372036854775807)::bigint AS available,
       least(coalesce((SELECT sum(o.credits) FROM kino.open_charge o WHERE o.account_id = a.account_id), 0),
             9223372036854775807)::bigint AS held
FROM kino.account a;
"""

# The product inserts what a charge, a lot, a transfer is, and not when it was nor under which number.
GRANTS = """
REVOKE INSERT ON kino.account, kino.credit_lot, kino.charge, kino.charge_line, kino.transfer FROM kino_product;
GRANT INSERT (account_id) ON kino.account TO kino_product;
GRANT INSERT (reference, account_id, class, granted, remaining, priority, expires_at, purchase_id)
    ON kino.credit_lot TO kino_product;
GRANT INSERT (job_id, account_id, credits, deadline_at) ON kino.charge TO kino_product;
GRANT INSERT (charge_id, seq, lot_id, credits) ON kino.charge_line TO kino_product;
GRANT INSERT (kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, actor, event_at)
    ON kino.transfer TO kino_product;

GRANT SELECT ON kino.open_charge, kino.xid_clock TO kino_worker, kino_product, kino_read;
GRANT INSERT ON kino.xid_clock TO kino_worker;
"""


def upgrade() -> None:
    op.execute(LOCKS)
    op.execute(FUNCTIONS)
    for table, columns in CLOCK_DEFAULTS.items():
        for column in columns:
            op.execute(f"ALTER TABLE kino.{table} ALTER COLUMN {column} SET DEFAULT kino.clock()")
    for table in TRANSACTION_DEFAULTS:
        op.execute(f"ALTER TABLE kino.{table} ALTER COLUMN xid SET DEFAULT kino.this_transaction()")
    op.execute(TABLES)
    op.execute(TRIGGERS)
    op.execute(FILL)
    op.execute(BALANCE)
    op.execute(GRANTS)


def downgrade() -> None:
    message = "what is open would be forgotten, and a charge without an event stay open for good; restore a backup"
    raise NotImplementedError(message)
