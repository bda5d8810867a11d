"""What reconciliation writes: runs of checks, the life of a break, seals; and an order to read the ledger's rows in.

- `check_run`: a row for each run of a check, with its four numbers and the place where the next page begins.
- `break` gains a subject beside a job, the digest of its two sides, when it happened, and the states of its life.
- `seal`: digests over closed ranges of transactions, each chained to the one before.
- An index by transaction number over each table of the ledger: without it, what is new since the last run could be
  found only by reading all of it.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

LEDGER_FUNCTIONS = "d23121810cd2dd8628937e14a680dc4a952f4f1db3fafaca05f7aa99cb029050"
"""The digest of the functions that belong to this revision."""

# In the order of 0003: who charges must not wait for us while we wait for it.
LOCKS = """
LOCK TABLE kino.charge, kino.account, kino.settlement, kino.correction, kino.credit_lot, kino.transfer, kino.break
    IN ACCESS EXCLUSIVE MODE;
"""

RUNS = """
CREATE TABLE kino.check_run (
    run_id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    "check"           text NOT NULL,
    since             timestamptz,
    until             timestamptz,
    from_xid          xid8 NOT NULL DEFAULT '0',
    to_xid            xid8 NOT NULL DEFAULT '0',
    is_full           boolean NOT NULL DEFAULT false,
    state             text NOT NULL DEFAULT 'running'
                      CHECK (state IN ('running', 'complete', 'not_comparable', 'stopped')),
    cursor            jsonb NOT NULL DEFAULT '{}',
    compared          bigint NOT NULL DEFAULT 0 CHECK (compared >= 0),
    matched           bigint NOT NULL DEFAULT 0 CHECK (matched >= 0),
    broken            bigint NOT NULL DEFAULT 0 CHECK (broken >= 0),
    not_comparable    jsonb NOT NULL DEFAULT '{}',
    detail            jsonb NOT NULL DEFAULT '{}',
    build             text NOT NULL,
    actor             text NOT NULL,
    started_at        timestamptz NOT NULL DEFAULT kino.clock(),
    finished_at       timestamptz,
    CHECK (matched + broken = compared)
);
COMMENT ON COLUMN kino.check_run.since IS 'what it compared begins here, for people; null: at the beginning';
COMMENT ON COLUMN kino.check_run.until IS 'what it compared ends here; null: nothing was compared yet';
COMMENT ON COLUMN kino.check_run.from_xid IS 'the same in numbers of transactions, which decide; 0: at the beginning';
COMMENT ON COLUMN kino.check_run.cursor IS 'where the next page begins: a run that was killed goes on there';
COMMENT ON COLUMN kino.check_run.not_comparable IS 'how many could not be compared, by the reason';
CREATE UNIQUE INDEX check_run_running ON kino.check_run ("check") WHERE state = 'running';
CREATE INDEX check_run_of ON kino.check_run ("check", run_id);
"""

# A break about a job has no subject: the job is. The index of before stays for builds of before, which insert by it;
# one that lists breaks shows None for the job of a kind that it does not know.
BREAKS = """
-- squawk-ignore ban-drop-not-null
ALTER TABLE kino.break ALTER COLUMN job_id DROP NOT NULL;
ALTER TABLE kino.break
    ADD COLUMN subject text,
    ADD COLUMN sides text NOT NULL DEFAULT '',
    ADD COLUMN happened_at timestamptz,
    ADD COLUMN ending text,
    ADD COLUMN assignee text,
    ADD COLUMN notes jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN canary boolean NOT NULL DEFAULT false,
    ADD COLUMN run_id bigint,
    ADD COLUMN closed_at timestamptz;
COMMENT ON COLUMN kino.break.subject IS 'what disagrees, if that is not a job: lot:7, account:a, charge:12, seal:3';
COMMENT ON COLUMN kino.break.sides IS
    'a digest of the two sides: a difference that a person accepted opens again only when this changes';
COMMENT ON COLUMN kino.break.happened_at IS
    'when the two sides came apart; first_seen_at less this is the time to detect';
COMMENT ON COLUMN kino.break.ending IS
    'how the job ended by the side that is not the ledger, as in settlement.ending; null: not about an ending';
COMMENT ON COLUMN kino.break.run_id IS 'the run that found it, or that saw it last; null: an event did';
-- squawk-ignore ban-drop-constraint
ALTER TABLE kino.break DROP CONSTRAINT break_status_check;
ALTER TABLE kino.break ADD CONSTRAINT break_status_check
    CHECK (status IN ('open', 'investigating', 'repaired', 'closed', 'accepted', 'false_alarm')) NOT VALID;
ALTER TABLE kino.break ADD CONSTRAINT break_is_about_something
    CHECK (job_id IS NOT NULL OR subject IS NOT NULL) NOT VALID;
CREATE UNIQUE INDEX break_live ON kino.break (kind, coalesce(subject, 'job:' || job_id))
    WHERE status IN ('open', 'investigating', 'repaired');
CREATE INDEX break_charge ON kino.break (charge_id);
CREATE INDEX break_decided ON kino.break (kind, coalesce(subject, 'job:' || job_id))
    WHERE status IN ('accepted', 'false_alarm');
"""

SEALS = """
CREATE TABLE kino.seal (
    seal_id           bigint PRIMARY KEY CHECK (seal_id > 0),
    format            bigint NOT NULL,
    from_xid          xid8 NOT NULL UNIQUE,
    to_xid            xid8 NOT NULL UNIQUE,
    previous_to_xid   xid8 REFERENCES kino.seal (to_xid),
    as_of             timestamptz NOT NULL,
    rows              bigint NOT NULL CHECK (rows >= 0),
    credits           numeric NOT NULL,
    previous_digest   bytea NOT NULL CHECK (octet_length(previous_digest) = 32),
    digest            bytea NOT NULL CHECK (octet_length(digest) = 32),
    sealed_at         timestamptz NOT NULL DEFAULT kino.clock(),
    CHECK (from_xid < to_xid),
    CHECK (from_xid = previous_to_xid OR previous_to_xid IS NULL AND seal_id = 1 AND from_xid = '0')
);
COMMENT ON TABLE kino.seal IS 'each row seals the ledger''s rows of the transactions from from_xid to before to_xid';
COMMENT ON COLUMN kino.seal.as_of IS 'a sample of the clock at to_xid: every transaction of before had ended';
COMMENT ON COLUMN kino.seal.digest IS 'SHA-256 over the digest before it, the range and its rows (format)';
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON kino.seal
    FOR EACH STATEMENT EXECUTE FUNCTION kino.refuse_change();
"""

# Ranges of blocks and not single rows: a row that is written while jobs settle costs nothing here. xid8 has no operator
# class for it, so it is read as the number that it is.
BY_TRANSACTION = """
CREATE INDEX {table}_xid ON kino.{table} USING brin (CAST(CAST(xid AS text) AS bigint))
    WITH (pages_per_range = 32, autosummarize = on);
"""
LARGE = ("charge", "settlement", "transfer")
FEW = "CREATE INDEX {table}_xid ON kino.{table} (xid);"
SMALL = ("correction", "lot_change", "account_status_change")

# A check asks for the transfers of some lots. Only kinds that no job writes are in these indexes, and refunds into a
# successor: an index over every transfer would cost each charge and each settlement.
BY_LOT = """
CREATE INDEX transfer_of_lot ON kino.transfer (lot_id) WHERE kind IN ('grant', 'expire', 'void', 'unvoid');
CREATE INDEX transfer_to_lot ON kino.transfer (to_lot_id) WHERE to_lot_id IS NOT NULL;
"""

# What the ledger's functions write anyway, as a rule of the table: rows of before are not read for it.
CHECKS = """
ALTER TABLE kino.settlement ADD CONSTRAINT settlement_cites_its_clause CHECK (
    kind = 'captured' AND reason = 'completed' AND clause = '1'
    OR kind = 'captured' AND reason = 'not_covered' AND clause IN ('2.failure', '2.timeout', '2.safety')
    OR kind = 'captured' AND reason = 'not_covered' AND clause = '6.terminated'
       AND coalesce(account_status, 'terminated_for_violation') = 'terminated_for_violation'
    OR kind = 'refunded' AND (reason, clause) IN (('generation_failure', '2.failure'), ('timeout', '2.timeout'),
                                                  ('content_policy_rejection', '2.safety'))
) NOT VALID;
ALTER TABLE kino.correction ADD CONSTRAINT correction_cites_its_clause CHECK (
    (reason, clause) IN (('generation_failure', '2.failure'), ('timeout', '2.timeout'),
                         ('content_policy_rejection', '2.safety'))
) NOT VALID;
ALTER TABLE kino.transfer ADD CONSTRAINT transfer_names_its_charge CHECK (
    charge_id IS NOT NULL OR kind NOT IN ('hold', 'capture', 'refund', 'reversal')) NOT VALID;
ALTER TABLE kino.transfer ADD CONSTRAINT transfer_names_no_charge CHECK (
    charge_id IS NULL OR kind NOT IN ('grant', 'unvoid')) NOT VALID;
ALTER TABLE kino.transfer ADD CONSTRAINT transfer_goes_onward CHECK (
    to_lot_id IS NULL OR kind IN ('refund', 'reversal')) NOT VALID;
ALTER TABLE kino.credit_lot ADD CONSTRAINT credit_lot_expired_is_empty CHECK (
    state <> 'expired' OR remaining = 0) NOT VALID;
"""

# Readers may read what proofs and reports need, and only the worker's login writes.
RIGHTS = """
GRANT SELECT ON kino.check_run, kino.seal TO kino_worker, kino_oncall, kino_read;
GRANT SELECT ON kino.relay_cursor TO kino_oncall, kino_read;
GRANT SELECT ON kino.pending_event, kino.dead_letter, kino.overdue_ask, kino.schedule_slot, kino.intake_state,
                kino.intake_worker TO kino_oncall;
GRANT INSERT, UPDATE ON kino.check_run TO kino_worker;
GRANT INSERT ON kino.seal TO kino_worker;
"""


def upgrade() -> None:
    op.execute(LOCKS)
    op.execute(RUNS)
    op.execute(BREAKS)
    op.execute(SEALS)
    for table in LARGE:
        op.execute(BY_TRANSACTION.format(table=table))
    for table in SMALL:
        op.execute(FEW.format(table=table))
    op.execute(BY_LOT)
    op.execute(CHECKS)
    op.execute(RIGHTS)


def downgrade() -> None:
    message = "breaks that no build of before knows would be lost, and with them why credits moved; restore a backup"
    raise NotImplementedError(message)
