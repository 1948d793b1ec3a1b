"""Parses Chatwoot's webhooks and decides whether the bot is to answer. No I/O."""

from __future__ import annotations

from typing import Final, get_args

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json

from example_app.clients.chatwoot import MARKER
from example_app.events import ConversationChanged, ConversationDeleted, MessageCreated, OtherEvent, WebhookEvent
from example_app.settings import Settings

_MODELS: Final[dict[str, type[WebhookEvent]]] = {
    event: model
    for model in (MessageCreated, ConversationChanged, ConversationDeleted)
    for event in get_args(model.model_fields["event"].annotation)
}


def parse(body: bytes) -> WebhookEvent:
    """Read a webhook's body.

    Raises:
        fastapi.exceptions.RequestValidationError: It is no JSON, or lacks what its event has.
    """
    try:
        payload = from_json(body)
        event = payload.get("event") if isinstance(payload, dict) else None
        model = _MODELS.get(event, OtherEvent) if isinstance(event, str) else OtherEvent
        if model in (ConversationChanged, ConversationDeleted):
            conversation = payload.get("conversation") or payload
            payload = {"account": _account_of(conversation)} | payload | {"conversation": conversation}
        return model.model_validate(payload)
    except ValidationError as error:
        errors = error.errors(include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None
    except ValueError:
        raise RequestValidationError([{"loc": ("body",), "msg": "not JSON", "type": "json_invalid"}]) from None


def _account_of(conversation: object) -> dict[str, int] | None:
    """The account, which events about a conversation name only in its latest message."""
    match conversation:
        case {"messages": [{"account_id": int(account_id)}, *_]}:
            return {"id": account_id}
    return None


def reason_to_skip(event: MessageCreated, settings: Settings) -> str | None:
    """Why the bot does not answer a message, or None."""
    content = (event.content or "").strip()
    own = tuple(filter(None, (settings.bot_error_message_internal, settings.bot_conversation_opened_message_external)))
    if event.sender is not None and event.sender.type == "agent_bot":
        return "agent_bot message"
    if MARKER in event.attributes or (event.message_type != "incoming" and content.startswith(own)):
        return "the bot's own message"
    if event.is_automatic_reply:
        return "automatic reply"
    if event.is_unsupported:
        return "unsupported message"
    if event.content_type == "voice_call":
        return "call"
    if event.private:
        return "private note"
    if event.message_type not in settings.allowed_message_types:
        return "not a message of an allowed type"
    if not content:
        return "empty message"
    if event.conversation.status not in settings.allowed_conversation_statuses:
        return "conversation has another status"
    return None
