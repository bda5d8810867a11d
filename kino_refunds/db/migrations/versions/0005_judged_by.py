"""What a settlement was decided from, beside the event: how the job ended, and the account's status then.

Every settlement can so be judged again from what it stores. Null in rows of before: they cannot.

And instants that the product chooses lie in the calendar that Python can read: Postgres also has infinity and the years
before 1 and after 9999, and one such deadline ended every overdue sweep, for everybody.
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

# In the order of 0003: who charges must not wait for us while we wait for it.
LOCKS = "LOCK TABLE kino.charge, kino.settlement, kino.credit_lot, kino.transfer IN ACCESS EXCLUSIVE MODE"

INSTANTS = {"charge": "deadline_at", "credit_lot": "expires_at", "transfer": "event_at"}
# Rows of before are not read for it: the largest tables would be locked for as long.
INSTANT = """
ALTER TABLE kino.{table} ADD CONSTRAINT {column}_in_the_calendar
    CHECK ({column} BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00') NOT VALID;
"""


def upgrade() -> None:
    op.execute(LOCKS)
    op.execute(UP)
    for table, column in INSTANTS.items():
        op.execute(INSTANT.format(table=table, column=column))


def downgrade() -> None:
    message = "what settlements were judged by would be forgotten; restore a backup instead"
    raise NotImplementedError(message)
