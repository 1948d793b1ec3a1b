"""Chatwoot's application API: https://developers.chatwoot.com/api-reference."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, JsonValue, RootModel

from example_app.clients.http import Unanswered, UpstreamAPI, UpstreamError
from example_app.settings import Settings

MARKER: Final = "chatdify"
"""The key in ``content_attributes`` by which a message of ours is recognized."""
_PAGE: Final = 100
"""How many messages Chatwoot lists at once: ``messages_after`` in its ``app/finders/message_finder.rb``."""
_WINDOW: Final = 60.0
"""Seconds that a 429 holds at most: ``throttle('req/ip', ..., period: 1.minute)`` in Chatwoot's
``config/initializers/rack_attack.rb``. Unless it is configured to, Rack::Attack sends no ``Retry-After``."""


class PerhapsRefused(Unanswered):
    """422 to a new message: Chatwoot refused it, for now or for good, or has stored it all the same."""


class Team(BaseModel):
    """A team that a conversation can be assigned to."""

    id: int
    name: str


class Conversation(BaseModel):
    """A conversation, as far as we look at it."""

    id: int
    status: str


class PostedMessage(BaseModel):
    """A message of a conversation, as far as we look at it."""

    id: int
    content_attributes: dict[str, JsonValue] | None = None


class _Conversations(BaseModel):
    payload: list[Conversation]


class _ConversationsPage(BaseModel):
    data: _Conversations


class _Messages(BaseModel):
    payload: list[PostedMessage]


class _Teams(RootModel[list[Team]]):
    pass


class Chatwoot(UpstreamAPI):
    """One account of a Chatwoot; its methods raise ``UpstreamError`` when Chatwoot does not do it.

    Parameters:
        settings: Where it is, and its keys.
    """

    def __init__(self, settings: Settings) -> None:
        base_url = f"{settings.chatwoot_api_url.rstrip('/')}/accounts/{settings.chatwoot_account_id}"
        super().__init__("Chatwoot", base_url, {"api_access_token": settings.chatwoot_api_key or ""}, settings)
        self._as_admin = {"api_access_token": settings.chatwoot_admin_api_key or settings.chatwoot_api_key or ""}

    def failure(self, call: str, status: int, code: str, retry_after: float = 0.0) -> UpstreamError:
        """As of any API, but a 429 holds for a minute, and a 422 to a new message does not say whether it was stored.

        Chatwoot answers 422 to whatever goes wrong with it, even after storing it: see ``rescue StandardError`` in
        Chatwoot's ``app/controllers/api/v1/accounts/conversations/messages_controller.rb``.
        """
        if status == 429:
            retry_after = retry_after or _WINDOW
        error = super().failure(call, status, code, retry_after)
        return PerhapsRefused(*error.args) if status == 422 and call.endswith("/messages") else error

    async def send_message(
        self, conversation_id: int | str, content: str, *, private: bool = False, marker: str = "api"
    ) -> JsonValue:
        """Post a message, or a private note, marked as ours; ``has_message`` finds it again by its own marker.

        Raises:
            Unanswered: It may have been posted or not.
            UpstreamError: It was not posted.
        """
        return await self.call_once(
            "POST",
            f"/conversations/{conversation_id}/messages",
            json={
                "content": content,
                "message_type": "outgoing",
                "private": private,
                "content_attributes": {MARKER: marker},
            },
        )

    async def has_message(self, conversation_id: int | str, marker: str, after: int) -> bool:
        """Whether a message with this marker is in the conversation.

        Parameters:
            conversation_id: The conversation.
            marker: The message's.
            after: The id of a message that came before it.
        """
        path = f"/conversations/{conversation_id}/messages"
        while True:
            # An agent bot's own token may post, and read nothing, or since 4.15 the conversation without its messages.
            answer = await self.call("GET", path, params={"after": after}, headers=self._as_admin)
            messages = self.read(_Messages, answer).payload
            if any((message.content_attributes or {}).get(MARKER) == marker for message in messages):
                return True
            if len(messages) < _PAGE:
                return False
            after = max(message.id for message in messages)

    async def conversations(self) -> list[Conversation]:
        """The first page of the account's conversations."""
        answer = await self.call("GET", "/conversations", headers=self._as_admin)
        return self.read(_ConversationsPage, answer).data.payload

    async def conversation(self, conversation_id: int | str) -> Conversation:
        """One conversation."""
        answer = await self.call("GET", f"/conversations/{conversation_id}", headers=self._as_admin)
        return self.read(Conversation, answer)

    async def teams(self) -> list[Team]:
        """The account's teams."""
        return self.read(_Teams, await self.call("GET", "/teams", headers=self._as_admin)).root

    async def set_labels(self, conversation_id: int, labels: list[str]) -> JsonValue:
        """Replace the conversation's labels."""
        path = f"/conversations/{conversation_id}/labels"
        # Chatwoots from before June 2026 let no agent bot set them.
        return await self.call("POST", path, json={"labels": list(labels)}, headers=self._as_admin)

    async def set_custom_attributes(self, conversation_id: int, attributes: dict[str, JsonValue]) -> JsonValue:
        """Replace the conversation's custom attributes."""
        body: JsonValue = {"custom_attributes": attributes}
        return await self.call("POST", f"/conversations/{conversation_id}/custom_attributes", json=body)

    async def set_priority(self, conversation_id: int, priority: str) -> JsonValue:
        """Set the conversation's priority."""
        return await self.call("POST", f"/conversations/{conversation_id}/toggle_priority", json={"priority": priority})

    async def set_status(self, conversation_id: int | str, status: str) -> JsonValue:
        """Set the conversation's status."""
        return await self.call("POST", f"/conversations/{conversation_id}/toggle_status", json={"status": status})

    async def assign_team(self, conversation_id: int, team_id: int) -> JsonValue:
        """Assign the conversation to a team; None says that there is none of that id, and the conversation has none."""
        return await self.call("POST", f"/conversations/{conversation_id}/assignments", json={"team_id": team_id})
