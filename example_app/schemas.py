"""The bodies of the API's requests and responses."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

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


Text = Annotated[str, AfterValidator(_storable), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"})]
CustomAttributes = dict[Text, Annotated[JsonValue, AfterValidator(_sendable)]]
ConversationID = Annotated[int, Path(ge=1, lt=2**63, description="Chatwoot's display id", examples=[7])]
DifyID = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9._:-]+$", max_length=255, examples=["5c1b6c1a-8b07-4d4c-9ecf-4d9d0c0f7f5b"])
]
Ok = Literal["success"]


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


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
