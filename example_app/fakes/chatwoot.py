"""A Chatwoot on a socket: conversations, teams, and signed webhooks about what happens in them."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from example_app.api.security import sign
from example_app.fakes.faults import Faults

BOT = {"id": 1, "type": "agent_bot", "name": "Chatdify"}
CUSTOMER = {"id": 12, "name": "Customer"}


@dataclass
class ChatwootConversation:
    """A conversation, as an agent sees it."""

    id: int
    status: str = "pending"
    messages: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    custom_attributes: dict[str, Any] = field(default_factory=dict)
    priority: str | None = None
    team_id: int | None = None

    def answers(self) -> list[str]:
        """What the bot has told the customer."""
        return [m["content"] for m in self.messages if m["message_type"] == "outgoing" and not m["private"]]

    def notes(self) -> list[str]:
        """The bot's private notes."""
        return [m["content"] for m in self.messages if m["private"]]

    def described(self) -> dict[str, Any]:
        """As Chatwoot describes it in webhooks."""
        return {
            "id": self.id,
            "inbox_id": 1,
            "status": self.status,
            "meta": {"sender": CUSTOMER | {"type": "contact"}, "assignee": None, "assignee_type": None, "team": None},
            "labels": self.labels,
            "custom_attributes": self.custom_attributes,
        }


class FakeChatwoot:
    """One account, which tells the application about every message.

    Parameters:
        api_key: The key that callers need.
        webhook_url: Where to send webhooks.
        webhook_secret: What to sign them with; None is an older Chatwoot, which does not sign.
        admin_key: The key that callers need to read and to set labels; ``api_key`` is then an agent bot's.
    """

    def __init__(
        self, api_key: str, webhook_url: str, webhook_secret: str | None, admin_key: str | None = None
    ) -> None:
        self.conversations: dict[int, ChatwootConversation] = {}
        self.teams = [{"id": 1, "name": "Support"}, {"id": 2, "name": "Sales"}]
        self.faults = Faults()
        self.posted = asyncio.Event()
        self._admin_keys = {admin_key or api_key}
        self._keys = {api_key, admin_key or api_key}
        self.webhook_url = webhook_url
        self._webhook_secret = webhook_secret
        self._ids = itertools.count(time.time_ns() // 1_000_000)  # new ones after a restart
        self._telling: set[asyncio.Task[httpx.Response]] = set()
        self._client = httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=16))
        root = "/api/v1/accounts/1"
        conversation = f"{root}/conversations/{{id:int}}"
        actions = {
            "labels": self._labels,
            "custom_attributes": self._custom_attributes,
            "toggle_priority": self._priority,
            "toggle_status": self._status,
            "assignments": self._assignments,
        }
        routes = [
            Route(f"{root}/conversations", self._list),
            Route(conversation, self._show),
            Route(f"{conversation}/messages", self._messages),
            Route(f"{conversation}/messages", self._post, methods=["POST"]),
            *(Route(f"{conversation}/{name}", action, methods=["POST"]) for name, action in actions.items()),
            Route(f"{root}/teams", self._teams),
        ]
        self.app: ASGIApp = self.faults.wrap(
            self._with_key(Starlette(routes=routes, exception_handlers={KeyError: _no_such}))
        )

    def conversation(self, conversation_id: int) -> ChatwootConversation:
        """A conversation, begun when it is not there."""
        return self.conversations.setdefault(conversation_id, ChatwootConversation(conversation_id))

    async def say(self, conversation_id: int, content: str) -> httpx.Response:
        """The customer writes a message; returns what the application answered to the webhook."""
        message = self._add(self.conversation(conversation_id), content, "incoming", CUSTOMER)
        return await self.tell("message_created", message, conversation_id)

    async def tell(self, event: str, fields: dict[str, Any], conversation_id: int | None) -> httpx.Response:
        """Send a webhook.

        Parameters:
            event: Its name.
            fields: What stands at its top level.
            conversation_id: Which conversation to describe in it, if any.
        """
        payload = {"event": event, "account": {"id": 1}} | fields
        if conversation_id is not None:
            payload |= {"conversation": self.conversation(conversation_id).described()}
        body = json.dumps(payload).encode()
        headers = {"Content-Type": "application/json"}
        if self._webhook_secret is not None:
            timestamp = str(int(time.time()))
            headers |= {
                "X-Chatwoot-Timestamp": timestamp,
                "X-Chatwoot-Signature": sign(self._webhook_secret, timestamp, body),
                "X-Chatwoot-Delivery": str(uuid4()),
            }
        return await self._client.post(self.webhook_url, content=body, headers=headers)

    async def close(self) -> None:
        """Wait for the webhooks under way, and close the connections."""
        await asyncio.gather(*self._telling, return_exceptions=True)
        await self._client.aclose()

    def _add(
        self, conversation: ChatwootConversation, content: str, message_type: str, sender: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        message = {
            "id": next(self._ids),
            "content": content,
            "message_type": message_type,
            "private": False,
            "content_type": "text",
            "content_attributes": {},
            "created_at": int(time.time()),
            "sender": sender,
        } | more
        conversation.messages.append(message)
        return message

    def _tell_later(self, event: str, fields: dict[str, Any], conversation_id: int | None = None) -> None:
        telling = asyncio.create_task(self.tell(event, fields, conversation_id))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def _found(self, request: Request) -> ChatwootConversation:
        return self.conversations[request.path_params["id"]]

    async def _list(self, request: Request) -> Response:
        payload = [conversation.described() for conversation in self.conversations.values()]
        return JSONResponse({"data": {"meta": {"all_count": len(payload)}, "payload": payload}})

    async def _show(self, request: Request) -> Response:
        return JSONResponse(self._found(request).described())

    async def _messages(self, request: Request) -> Response:
        after = int(request.query_params["after"])
        messages = [message for message in self._found(request).messages if message["id"] > after]
        return JSONResponse({"meta": {}, "payload": messages[:100]})

    async def _post(self, request: Request) -> Response:
        conversation = self._found(request)
        body = await request.json()
        attributes = body.get("content_attributes") or {}
        message = self._add(
            conversation, body["content"], "outgoing", BOT, private=body["private"], content_attributes=attributes
        )
        self.posted.set()
        self._tell_later("message_created", message, conversation.id)
        return JSONResponse(message)

    async def _labels(self, request: Request) -> Response:
        conversation = self._found(request)
        conversation.labels = (await request.json())["labels"]
        return JSONResponse({"payload": conversation.labels})

    async def _custom_attributes(self, request: Request) -> Response:
        conversation = self._found(request)
        conversation.custom_attributes = (await request.json())["custom_attributes"]
        return JSONResponse({"custom_attributes": conversation.custom_attributes})

    async def _priority(self, request: Request) -> Response:
        self._found(request).priority = (await request.json())["priority"]
        return Response()  # as the real one: an empty body

    async def _status(self, request: Request) -> Response:
        conversation = self._found(request)
        conversation.status = (await request.json())["status"]
        self._tell_later("conversation_status_changed", conversation.described())
        payload = {"success": True, "conversation_id": conversation.id, "current_status": conversation.status}
        return JSONResponse({"meta": {}, "payload": payload})

    async def _assignments(self, request: Request) -> Response:
        wanted = (await request.json())["team_id"]
        team = next((team for team in self.teams if team["id"] == wanted), None)
        self._found(request).team_id = wanted if team else None
        return JSONResponse(team)

    async def _teams(self, request: Request) -> Response:
        return JSONResponse(self.teams)

    def _with_key(self, app: Starlette) -> ASGIApp:
        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            needs_admin = scope["method"] == "GET" or scope["path"].endswith("/labels")
            keys = self._admin_keys if needs_admin else self._keys
            if dict(scope["headers"]).get(b"api_access_token", b"").decode() not in keys:
                await JSONResponse({"error": "Invalid Access Token"}, 401)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return checked


async def _no_such(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "Resource could not be found"}, 404)
