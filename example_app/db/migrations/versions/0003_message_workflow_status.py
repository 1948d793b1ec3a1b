"""Remember to what status Dify's workflows set a message's conversation while it is under way."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("message", sa.Column("workflow_status", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("message", "workflow_status")
