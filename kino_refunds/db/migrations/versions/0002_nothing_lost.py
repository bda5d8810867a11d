"""What recovery, the schedule and the relay need beside the first migration."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UP = """
-- The relay reads refunds in the order of their transactions, from its cursor on.
CREATE INDEX settlement_relay ON kino.settlement (xid, charge_id) WHERE kind = 'refunded';
CREATE INDEX correction_relay ON kino.correction (xid, charge_id);
GRANT DELETE ON kino.schedule_slot TO kino_worker;
"""

DOWN = """
REVOKE DELETE ON kino.schedule_slot FROM kino_worker;
DROP INDEX kino.correction_relay;
DROP INDEX kino.settlement_relay;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
