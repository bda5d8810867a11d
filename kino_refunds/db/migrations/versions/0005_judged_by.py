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

DOWN = """
ALTER TABLE kino.settlement DROP COLUMN account_status, DROP COLUMN ending;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
