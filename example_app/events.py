"""Chatwoot's webhooks: their payloads, as far as we look at them, and how a body is read."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError
from pydantic_core import from_json

from example_app.schemas import Text


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")  # to Python they are
    return value


ID = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, lt=2**63)]
"""Chatwoot's id of something; its documentation also writes ids as strings."""


class Sender(BaseModel):
    """Who wrote a message; a customer has no type."""

    type: str | None = None


class Assignee(BaseModel):
    """The agent or agent bot that a conversation is assigned to; Chatwoot numbers each kind by itself."""

    id: ID
    type: str | None = None


class Meta(BaseModel):
    """Chatwoot's ``meta`` of a conversation."""

    assignee: Assignee | None = None
    assignee_type: str | None = None


class Account(BaseModel):
    """The Chatwoot account that sends the webhook; conversations are numbered within it."""

    id: ID


class WebhookConversation(BaseModel):
    """A conversation in a webhook."""

    id: ID
    status: Text = "pending"
    meta: Meta = Meta()

    @property
    def assignee_id(self) -> int | None:
        """The agent it is assigned to; None also when that is an agent bot."""
        assignee = self.meta.assignee
        if assignee is None or assignee.type == "agent_bot" or self.meta.assignee_type == "AgentBot":
            return None
        return assignee.id


class AccountEvent(BaseModel):
    """What Chatwoot's webhooks have in common: the account."""

    account: Account | None = None

    def is_of_another_account(self, account_id: int) -> bool:
        """Whether its conversation belongs to another account: ours may have one of the same number."""
        return self.account is not None and self.account.id != account_id


class MessageCreated(AccountEvent):
    """Chatwoot's ``message_created``."""

    event: Literal["message_created"]
    id: ID
    content: Text | None = None
    message_type: str
    private: bool = False
    content_type: str | None = None
    content_attributes: dict[str, JsonValue] | None = None
    sender: Sender | None = None
    conversation: WebhookConversation

    @property
    def attributes(self) -> dict[str, JsonValue]:
        """What Chatwoot, or whoever posted the message, says about it."""
        return self.content_attributes or {}

    @property
    def is_automatic_reply(self) -> bool:
        """Whether it is an e-mail that no human wrote; answering it may begin an endless exchange."""
        email = self.attributes.get("email")
        return isinstance(email, dict) and email.get("auto_reply") is True

    @property
    def is_unsupported(self) -> bool:
        """Whether the customer sent what Chatwoot cannot show, so that ``content`` is Chatwoot's own text."""
        return self.attributes.get("is_unsupported") is True


class ConversationChanged(AccountEvent):
    """Chatwoot's events about a conversation, whose fields stand at the top level or under ``conversation``.

    An agent bot is told of the last four.
    """

    event: Literal[
        "conversation_created",
        "conversation_updated",
        "conversation_status_changed",
        "conversation_opened",
        "conversation_resolved",
    ]
    conversation: WebhookConversation


class ConversationDeleted(AccountEvent):
    """A conversation is gone; today's Chatwoot does not say so."""

    event: Literal["conversation_deleted"]
    conversation: WebhookConversation


class OtherEvent(BaseModel):
    """An event that is acknowledged and ignored."""

    event: Annotated[Text, Field(max_length=255)]


WebhookEvent = MessageCreated | ConversationChanged | ConversationDeleted | OtherEvent

WEBHOOK_EXAMPLE: Final = {
    "event": "message_created",
    "id": 1041,
    "content": "Where is my parcel?",
    "message_type": "incoming",
    "private": False,
    "sender": {"id": 12, "name": "Ana"},
    "conversation": {"id": 7, "status": "pending", "meta": {"assignee": None}},
}

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
