"""What is stored: ``Base`` and the models."""

from __future__ import annotations

from example_app.db.models import Dialogue, Message, MessageState, WebhookDelivery
from fastapi_chatdify_db import Base

__all__ = ["Base", "Dialogue", "Message", "MessageState", "WebhookDelivery"]
