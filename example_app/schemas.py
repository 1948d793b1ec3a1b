"""What the API takes and answers."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from example_app.settings import Status

_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def _storable(text: str) -> str:
    if _UNSTORABLE.search(text):
        raise ValueError("a NUL character or half of a surrogate pair cannot be stored")
    return text


def _sendable(value: JsonValue) -> JsonValue:
    match value:
        case str():
            _storable(value)
        case float() if not math.isfinite(value):
            raise ValueError("NaN and Infinity are no JSON")  # Python's parser takes them all the same
        case list():
            for item in value:
                _sendable(item)
        case dict():
            for key, item in value.items():
                _storable(key)
                _sendable(item)
    return value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")  # in Python they are
    return value


Text = Annotated[str, AfterValidator(_storable), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"})]
CustomAttributes = dict[Text, Annotated[JsonValue, AfterValidator(_sendable)]]
ID = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, lt=2**63)]
"""Chatwoot's, in a body; its documentation also writes them as strings."""
ConversationID = Annotated[int, Path(ge=1, lt=2**63, description="Chatwoot's display id", examples=[7])]
DifyID = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9._:-]+$", max_length=255, examples=["5c1b6c1a-8b07-4d4c-9ecf-4d9d0c0f7f5b"])
]
Ok = Literal["success"]


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class Sender(BaseModel):
    """Who wrote a message."""

    type: str | None = None


class Assignee(BaseModel):
    """The agent a conversation is assigned to."""

    id: ID


class Meta(BaseModel):
    """Chatwoot's ``meta`` of a conversation."""

    assignee: Assignee | None = None


class Account(BaseModel):
    """The Chatwoot account that tells; a conversation's id is its own."""

    id: ID


class WebhookConversation(BaseModel):
    """A conversation in a webhook."""

    id: ID
    status: Text = "pending"
    meta: Meta = Meta()

    @property
    def assignee_id(self) -> int | None:
        """Who it is assigned to."""
        return self.meta.assignee.id if self.meta.assignee else None


class AccountEvent(BaseModel):
    """What Chatwoot tells, and of which account."""

    account: Account | None = None

    def is_of_another_account(self, account_id: int) -> bool:
        """Whether its conversation is another one than ours of the same number."""
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
        """What Chatwoot, or who posted the message, says of it."""
        return self.content_attributes or {}

    @property
    def is_automatic_reply(self) -> bool:
        """Whether it is an e-mail that no human wrote; to answer it may begin an endless exchange."""
        email = self.attributes.get("email")
        return isinstance(email, dict) and email.get("auto_reply") is True


class ConversationChanged(AccountEvent):
    """Chatwoot's events about a conversation, whose fields stand at the top level or under ``conversation``.

    An agent bot is told of the last two.
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
    "sender": {"id": 12, "type": "contact"},
    "conversation": {"id": 7, "status": "pending", "meta": {"assignee": None}},
}


class WebhookResult(BaseModel):
    """What was done about a webhook."""

    model_config = _example({"status": "processing"})

    status: Literal["processing", "skipped", "success"]
    reason: str | None = None
    dialogue_id: int | None = None


class MessageSent(BaseModel):
    """A message is in the conversation."""

    status: Ok = "success"
    message: str = "Message sent successfully"


class ConversationResult(BaseModel):
    """Something was done about a conversation."""

    status: Ok = "success"
    conversation_id: int


class LabelsResult(ConversationResult):
    """The conversation's labels, as Chatwoot answered."""

    labels: JsonValue


class CustomAttributesResult(ConversationResult):
    """The conversation's custom attributes, as Chatwoot answered."""

    custom_attributes: JsonValue


class PriorityResult(ConversationResult):
    """The conversation's priority, as Chatwoot answered."""

    priority: JsonValue


class TeamResult(ConversationResult):
    """The team that the conversation is assigned to, and what Chatwoot answered."""

    team: str
    team_id: int | None = None
    result: JsonValue = None


class StatusResult(ConversationResult):
    """The status before, and what Chatwoot answered."""

    previous_status: str
    result: JsonValue


class TeamsResult(BaseModel):
    """How many teams there are."""

    status: Ok = "success"
    teams: int
    cache_enabled: bool


class NewPriority(BaseModel):
    """The priority to set; none leaves it alone."""

    model_config = _example({"priority": "high"})

    priority: Literal["urgent", "high", "medium", "low", "none"] | None


class NewTeam(BaseModel):
    """The name of a team, in whatever case; empty or "none" leaves the conversation alone."""

    model_config = _example({"team": "Support"})

    team: Text


class NewStatus(BaseModel):
    """The status to set."""

    model_config = _example({"status": "open"})

    status: Status


class DifyConversation(BaseModel):
    """The Chatwoot conversation behind a Dify conversation."""

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra={"examples": [{"chatwoot_conversation_id": "7", "status": "pending", "assignee_id": None}]},
    )

    chatwoot_conversation_id: str
    status: str
    assignee_id: int | None


class DialogueInfo(BaseModel):
    """A dialogue as it is stored."""

    model_config = ConfigDict(from_attributes=True)

    chatwoot_conversation_id: str
    dify_conversation_id: str | None
    status: str
    created_at: datetime
    updated_at: datetime


class Health(BaseModel):
    """The database answers."""

    status: Literal["healthy"] = "healthy"
    database: Literal["connected"] = "connected"
    timestamp: float


class TestConversation(BaseModel):
    """A private note was posted to try the connection, or there was no conversation to post it to."""

    status: Literal["success", "warning"]
    message: str
    conversation_id: int | None = None
    result: JsonValue = None
    timestamp: float
