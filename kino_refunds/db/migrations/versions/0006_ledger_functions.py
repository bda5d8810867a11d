"""What the ledger's functions need: a setting, the history of lots, causes of holds and voids, numbers of transactions.

The functions themselves stand in kino_refunds/ledger/*.sql. `migrate` installs them, and the rights with them, when the
last migration has run (db/functions.py); LEDGER_FUNCTIONS is what they must come to at this revision.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

LEDGER_FUNCTIONS = "b40064c106c04a17d72bc9b98f73477ebb78622d35ae6af2fab286e48626ae5a"
"""The digest of the functions that belong to this revision: other functions need another migration, or a build of
before would put its own in their place."""

# In the order of 0003: who charges must not wait for us while we wait for it.
LOCKS = """
LOCK TABLE kino.charge, kino.account, kino.settlement, kino.open_charge, kino.charge_line, kino.credit_lot,
           kino.transfer IN ACCESS EXCLUSIVE MODE;
"""

SETTING = """
CREATE TABLE kino.ledger_setting (
    singleton         boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    lot_grace_days    integer NOT NULL DEFAULT 7 CHECK (lot_grace_days BETWEEN 0 AND 365)
);
COMMENT ON COLUMN kino.ledger_setting.lot_grace_days IS
    'what a refund returns can be spent for at least this long; `kino-refunds migrate --lot-grace-days` writes it';
INSERT INTO kino.ledger_setting DEFAULT VALUES;
"""

# Without a default first: with one that is not a constant Postgres would write every row anew. Null: of before.
NUMBERS = """
ALTER TABLE kino.{table} ADD COLUMN xid xid8;
ALTER TABLE kino.{table} ALTER COLUMN xid SET DEFAULT kino.this_transaction();
COMMENT ON COLUMN kino.{table}.xid IS 'the transaction that wrote it; null: before 0006, not sealed';
"""
NUMBERED = ("charge", "account_status_change")

HISTORY = """
CREATE TABLE kino.lot_change (
    change_id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lot_id            bigint NOT NULL,
    account_id        text NOT NULL,
    from_state        text NOT NULL,
    to_state          text NOT NULL,
    from_expires_at   timestamptz,
    to_expires_at     timestamptz,
    changed_at        timestamptz NOT NULL DEFAULT kino.clock(),
    xid               xid8 DEFAULT kino.this_transaction()
);
COMMENT ON TABLE kino.lot_change IS 'every change of a lot''s state and expiry: past balances are read from here';
CREATE INDEX lot_change_lot ON kino.lot_change (lot_id, change_id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON kino.lot_change
    FOR EACH STATEMENT EXECUTE FUNCTION kino.refuse_change();
"""

CAUSES = """
CREATE TABLE kino.{table} (
    lot_id            bigint NOT NULL,
    cause_kind        text NOT NULL CHECK (cause_kind IN ('dispute', 'payout', 'request')),
    cause_id          text NOT NULL,
    since             timestamptz NOT NULL DEFAULT kino.clock(),
    actor             text NOT NULL,
    until             timestamptz,
    until_actor       text
);
COMMENT ON TABLE kino.{table} IS 'a lot is {state} while a row of its stands open here';
CREATE UNIQUE INDEX {table}_open ON kino.{table} (lot_id, cause_kind, cause_id) WHERE until IS NULL;
INSERT INTO kino.{table} (lot_id, cause_kind, cause_id, actor)
SELECT lot_id, 'request', 'before 0006', 'migration' FROM kino.credit_lot WHERE state = '{state}';
"""
CAUSED = {"lot_hold": "frozen", "lot_void": "voided"}

LOTS = """
ALTER TABLE kino.transfer ADD COLUMN cause_kind text, ADD COLUMN cause_id text;
COMMENT ON COLUMN kino.transfer.cause_kind IS 'what voided these credits or brought them back; null: another kind';
ALTER TABLE kino.credit_lot ADD COLUMN root_expires_at timestamptz;
COMMENT ON COLUMN kino.credit_lot.root_expires_at IS
    'of a successor: when the lot at the beginning of its line expired; its line ends 30 days later';
COMMENT ON COLUMN kino.credit_lot.extended_from IS 'read by builds of before 0006 only; see lot_change';
COMMENT ON COLUMN kino.credit_lot.extended_at IS 'read by builds of before 0006 only; see lot_change';

-- What is known of an extension of before: from what to what, and when.
INSERT INTO kino.lot_change (lot_id, account_id, from_state, to_state, from_expires_at, to_expires_at, changed_at, xid)
SELECT lot_id, account_id, 'frozen', 'active', extended_from, expires_at, extended_at, NULL
FROM kino.credit_lot WHERE extended_at IS NOT NULL ORDER BY extended_at;

WITH RECURSIVE line (lot_id, root_expires_at) AS (
    SELECT s.lot_id, l.expires_at FROM kino.credit_lot s JOIN kino.credit_lot l ON l.lot_id = s.successor_of
    WHERE l.successor_of IS NULL
    UNION ALL
    SELECT s.lot_id, line.root_expires_at FROM line JOIN kino.credit_lot s ON s.successor_of = line.lot_id
)
UPDATE kino.credit_lot l SET root_expires_at = line.root_expires_at FROM line WHERE line.lot_id = l.lot_id;
"""

# Read by builds of before 0003 only, for what is open; each charge paid for it.
UNREAD = "DROP INDEX kino.charge_opened"

READERS = """
GRANT USAGE ON SCHEMA kino TO kino_ledger, kino_oncall;
GRANT SELECT ON kino.ledger_setting, kino.lot_change, kino.lot_hold, kino.lot_void
    TO kino_worker, kino_product, kino_read;
GRANT SELECT ON kino.account, kino.account_status_change, kino.credit_lot, kino.charge, kino.charge_line,
                kino.open_charge, kino.settlement, kino.correction, kino.transfer, kino.inbox_event, kino.break,
                kino.xid_clock, kino.ledger_setting, kino.lot_change, kino.lot_hold, kino.lot_void,
                kino.charge_status, kino.account_balance TO kino_oncall;
"""

LEDGER = """
GRANT SELECT ON kino.account, kino.account_status_change, kino.credit_lot, kino.charge, kino.charge_line,
                kino.open_charge, kino.settlement, kino.correction, kino.transfer, kino.lot_change, kino.lot_hold,
                kino.lot_void, kino.ledger_setting TO kino_ledger;
GRANT INSERT ON kino.account, kino.account_status_change, kino.credit_lot, kino.charge, kino.charge_line,
                kino.open_charge, kino.settlement, kino.correction, kino.transfer, kino.lot_change, kino.lot_hold,
                kino.lot_void TO kino_ledger;
GRANT UPDATE (status, status_reason) ON kino.account TO kino_ledger;
GRANT UPDATE (remaining, state, expires_at) ON kino.credit_lot TO kino_ledger;
GRANT UPDATE (until, until_actor) ON kino.lot_hold, kino.lot_void TO kino_ledger;
GRANT DELETE ON kino.open_charge TO kino_ledger;
"""


def upgrade() -> None:
    op.execute(LOCKS)
    op.execute(SETTING)
    for table in NUMBERED:
        op.execute(NUMBERS.format(table=table))
    op.execute(HISTORY)
    for table, state in CAUSED.items():
        op.execute(CAUSES.format(table=table, state=state))
    op.execute(LOTS)
    op.execute(UNREAD)
    op.execute(READERS)
    op.execute(LEDGER)


def downgrade() -> None:
    message = "holds, voids and past balances would lose their history; restore a backup instead"
    raise NotImplementedError(message)
