"""What a settlement was decided from, beside the event: how the job ended, and the account's status then.

Every settlement can so be judged again from what it stores. Null in rows of before: they cannot.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE kino.settlement
    ADD COLUMN ending text,
    ADD COLUMN account_status text CHECK (account_status IN (
        'active', 'suspended', 'terminated', 'terminated_for_violation'));
COMMENT ON COLUMN kino.settlement.ending IS
    'what the event said of the job''s end, in short; null: settled before 0005';
COMMENT ON COLUMN kino.settlement.account_status IS
    'the account''s status at the event''s time, by which clause 6 was judged; null: settled before 0005';
"""

# The product may insert what its raw right allows: an instant that Python cannot read ended every overdue sweep.
INSTANTS = """
ALTER TABLE kino.charge ADD CONSTRAINT deadline_is_an_instant
    CHECK (deadline_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-31 23:59:59.999999+00') NOT VALID;
ALTER TABLE kino.credit_lot ADD CONSTRAINT expiry_is_an_instant
    CHECK (expires_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-31 23:59:59.999999+00') NOT VALID;
"""

# A default session_replication_role of `replica`, which some tools leave behind, switches ordinary triggers off.
ALWAYS = {
    "charge": ("append_only", "charge_opens"),
    "settlement": ("append_only", "charge_ends"),
    **dict.fromkeys(
        ("account_status_change", "charge_line", "correction", "transfer", "inbox_event"), ("append_only",)
    ),
}


def upgrade() -> None:
    op.execute(UP)
    op.execute(INSTANTS)
    for table, triggers in ALWAYS.items():
        for trigger in triggers:
            op.execute(f"ALTER TABLE kino.{table} ENABLE ALWAYS TRIGGER {trigger}")


def downgrade() -> None:
    message = "what settlements were judged by would be forgotten; restore a backup instead"
    raise NotImplementedError(message)
