"""Create the dialogue, its messages, the received webhooks and the durable tasks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_DURABLE_TASK_INDEXES = [
    ("ix_durable_task_ring_at", ["ring_at"], "status = 'pending'"),
    ("ix_durable_task_ordering_key", ["ordering_key", "seq"], "status = 'pending' AND ordering_key IS NOT NULL"),
    ("ix_durable_task_failed", ["finished_at"], "status = 'failed'"),
    ("ix_durable_task_finished_at", ["finished_at"], "status IN ('done', 'cancelled')"),
]


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
    op.create_table(
        "durable_task",
        sa.Column("id", sa.Text(), nullable=False, comment="Celery's task id"),
        sa.Column(
            "seq",
            sa.BigInteger(),
            sa.Identity(),
            nullable=False,
            comment="the order of rows with one ordering_key",
        ),
        sa.Column("name", sa.Text(), nullable=False, comment="the task's registered name"),
        sa.Column("arguments", sa.Text(), nullable=False, comment="args and kwargs, in kombu's JSON"),
        sa.Column("options", sa.Text(), nullable=False, comment="of apply_async, likewise"),
        sa.Column(
            "status",
            sa.Text(),
            server_default="pending",
            nullable=False,
            comment="pending, done, failed or cancelled",
        ),
        sa.Column("ordering_key", sa.Text(), nullable=True, comment="rows of one key run in order, one at a time"),
        sa.Column(
            "retries", sa.Integer(), server_default=sa.text("0"), nullable=False, comment="Celery's count of retries"
        ),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False, comment="not to start before"),
        sa.Column(
            "ring_at", sa.DateTime(timezone=True), nullable=False, comment="when a relay is to send a message, next"
        ),
        sa.Column(
            "rings",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="messages sent since it became due",
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True, comment="not to start after"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True, comment="of the last attempt"),
        sa.PrimaryKeyConstraint("id"),
    )
    for name, columns, rows in _DURABLE_TASK_INDEXES:
        op.create_index(name, "durable_task", columns, unique=False, postgresql_where=sa.text(rows))


def downgrade() -> None:
    op.drop_table("durable_task")
    op.drop_index(op.f("ix_message_dialogue_id"), table_name="message")
    op.drop_table("message")
    op.drop_index(op.f("ix_webhook_delivery_received_at"), table_name="webhook_delivery")
    op.drop_table("webhook_delivery")
    op.drop_index(op.f("ix_dialogue_dify_conversation_id"), table_name="dialogue")
    op.drop_table("dialogue")
