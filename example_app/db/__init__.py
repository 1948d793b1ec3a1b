"""The application's database: ``db``, ``Base`` and the models."""

from __future__ import annotations

from example_app.db.models import Dialogue, Message, MessageState, WebhookDelivery
from example_app.settings import get_settings
from fastapi_chatdify_db import Base, db

db.settings = get_settings  # called at the first use: importing the application reads no setting

__all__ = ["Base", "Dialogue", "Message", "MessageState", "WebhookDelivery", "db"]
