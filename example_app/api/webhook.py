"""``POST /chatwoot-webhook``: stores what Chatwoot reports; a task answers it."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header

from example_app import dialogues, tasks
from example_app.api.problems import documented
from example_app.api.security import WEBHOOK, authentic_body
from example_app.db.models import MessageState
from example_app.events import (
    WEBHOOK_EXAMPLE,
    ConversationChanged,
    ConversationDeleted,
    MessageCreated,
    OtherEvent,
    parse,
)
from example_app.logs import logger
from example_app.schemas import WebhookResult
from example_app.settings import get_settings
from example_app.triage import reason_to_skip

router: Final = APIRouter(tags=["webhook"], responses=documented(401, 413, 422, 500))

Body = Annotated[bytes, Depends(authentic_body)]
DeliveryID = Annotated[str | None, Header(alias="X-Chatwoot-Delivery", max_length=255, pattern=r"^[\x20-\x7e]*$")]

# The body is read raw, for its signature; so FastAPI has to be told what it is.
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["event"],
                    "properties": {"event": {"type": "string"}},
                },
                "example": WEBHOOK_EXAMPLE,
            }
        },
    }
}


@router.post(WEBHOOK, openapi_extra=_BODY, response_model_exclude_none=True)
async def chatwoot_webhook(body: Body, delivery_id: DeliveryID = None) -> WebhookResult:
    """Take a webhook; the same delivery or message again does nothing."""
    event = parse(body)
    if isinstance(event, OtherEvent):
        return WebhookResult(status="skipped", reason="unknown event")
    if event.is_of_another_account(get_settings().chatwoot_account_id):
        logger.info("a webhook is skipped: it is of another account than CHATWOOT_ACCOUNT_ID")
        return WebhookResult(status="skipped", reason="another account")
    if delivery_id and not await dialogues.is_new_delivery(delivery_id, event.event):
        return WebhookResult(status="skipped", reason="delivered before")
    if isinstance(event, MessageCreated):
        return await _take_message(event)
    if isinstance(event, ConversationDeleted):
        return await _delete(event)
    return await _take_changes(event)


async def _take_message(event: MessageCreated) -> WebhookResult:
    if reason := reason_to_skip(event, get_settings()):
        return WebhookResult(status="skipped", reason=reason)
    dialogue_id = await dialogues.upsert_dialogue(event.conversation)
    message_id = await dialogues.store_message(dialogue_id, event)
    if message_id is None:
        return WebhookResult(status="skipped", reason="received before")
    tasks.dispatch_step(message_id, MessageState.RECEIVED, str(event.conversation.id))
    return WebhookResult(status="processing")


async def _take_changes(event: ConversationChanged) -> WebhookResult:
    return WebhookResult(status="success", dialogue_id=await dialogues.upsert_dialogue(event.conversation))


async def _delete(event: ConversationDeleted) -> WebhookResult:
    if await dialogues.delete_dialogue(event.conversation):
        tasks.dispatch_deletion(str(event.conversation.id))
    return WebhookResult(status="success")
