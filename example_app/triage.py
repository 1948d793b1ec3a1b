"""Whether the bot is to answer a message. No I/O."""

from __future__ import annotations

from example_app.clients.chatwoot import MARKER
from example_app.events import MessageCreated
from example_app.settings import Settings


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
