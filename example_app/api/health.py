"""``/health``: whether the database answers, and whether Chatwoot takes a message."""

from __future__ import annotations

import time
from typing import Annotated, Final

from fastapi import APIRouter, Depends
from sqlalchemy import text

from example_app.api.problems import documented
from example_app.api.security import require_token
from example_app.clients import get_chatwoot
from example_app.clients.chatwoot import Chatwoot
from example_app.db import db
from example_app.schemas import Health, TestConversation

router: Final = APIRouter(prefix="/health", tags=["health"])


@router.get("", responses=documented(503))
async def health() -> Health:
    """Whether the database answers."""
    await db.session.execute(text("SELECT 1"))  # the middleware answers 503 where there is no connection
    return Health(timestamp=time.time())


@router.post(
    "/test-conversation", dependencies=[Depends(require_token)], responses=documented(400, 401, 404, 413, 502, 503)
)
async def test_conversation(chatwoot: Annotated[Chatwoot, Depends(get_chatwoot)]) -> TestConversation:
    """Post a private note into the first conversation that Chatwoot lists."""
    conversations = await chatwoot.conversations()
    now = time.time()
    if not conversations:
        return TestConversation(status="warning", message="No existing conversations found to test with", timestamp=now)
    [first, *_] = conversations
    result = await chatwoot.send_message(first.id, f"Health check: test message, {now:.0f}", private=True)
    return TestConversation(
        status="success",
        message="Test message sent to existing conversation",
        conversation_id=first.id,
        result=result,
        timestamp=now,
    )
