"""Create the dialogue, its messages, the received webhooks and the durable tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from celery_ext.durable.table import metadata as durable_tasks

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dialogue",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("chatwoot_conversation_id", sa.Text(), nullable=False),
        sa.Column("dify_conversation_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("assignee_id", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dialogue")),
        sa.UniqueConstraint("chatwoot_conversation_id", name=op.f("uq_dialogue_chatwoot_conversation_id")),
    )
    op.create_index(op.f("ix_dialogue_dify_conversation_id"), "dialogue", ["dify_conversation_id"], unique=False)
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_delivery")),
        sa.UniqueConstraint("delivery_id", name=op.f("uq_webhook_delivery_delivery_id")),
    )
    op.create_index(op.f("ix_webhook_delivery_received_at"), "webhook_delivery", ["received_at"], unique=False)
    op.create_table(
        "message",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("dialogue_id", sa.BigInteger(), nullable=False),
        sa.Column("chatwoot_message_id", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("message_type", sa.Text(), nullable=False),
        sa.Column("conversation_status", sa.Text(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "received",
                "answered",
                "posted",
                "failed",
                "handed_over",
                "undeliverable",
                name="messagestate",
                native_enum=False,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("dify_message_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["dialogue_id"], ["dialogue.id"], name=op.f("fk_message_dialogue_id_dialogue"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_message")),
        sa.UniqueConstraint("chatwoot_message_id", name=op.f("uq_message_chatwoot_message_id")),
    )
    op.create_index(op.f("ix_message_dialogue_id"), "message", ["dialogue_id"], unique=False)
    durable_tasks.create_all(op.get_bind())


def downgrade() -> None:
    durable_tasks.drop_all(op.get_bind())
    op.drop_index(op.f("ix_message_dialogue_id"), table_name="message")
    op.drop_table("message")
    op.drop_index(op.f("ix_webhook_delivery_received_at"), table_name="webhook_delivery")
    op.drop_table("webhook_delivery")
    op.drop_index(op.f("ix_dialogue_dify_conversation_id"), table_name="dialogue")
    op.drop_table("dialogue")
