"""A Dify on a socket: conversations that belong to users, blocking and streaming answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from example_app.fakes.faults import Faults


@dataclass
class DifyMessage:
    """A question and its answer."""

    query: str
    answer: str = ""
    status: str = "normal"
    id: str = field(default_factory=lambda: str(uuid4()))
    created_at: float = field(default_factory=lambda: int(time.time()))


@dataclass
class DifyConversation:
    """A conversation of one user."""

    user: str
    inputs: dict[str, object]
    id: str = field(default_factory=lambda: str(uuid4()))
    messages: list[DifyMessage] = field(default_factory=list)


class FakeDify:
    """The service API of one chat application, whose answer repeats what was asked.

    Parameters:
        api_key: The bearer token that callers need.
    """

    def __init__(self, api_key: str) -> None:
        self.conversations: dict[str, DifyConversation] = {}
        self.forgotten: list[DifyConversation] = []
        self.faults = Faults()
        self.asked = asyncio.Event()
        self.answering = asyncio.Event()
        self.answering.set()
        self.delay = 0.0
        self.replaced: str | None = None
        """What Dify's moderation puts in place of every streamed answer."""
        self.last_event: dict[str, object] | None = None
        """The event in place of an answer, or of a stream's end."""
        self._api_key = api_key
        routes = [
            Route("/v1/chat-messages", self._chat, methods=["POST"]),
            Route("/v1/messages", self._messages),
            Route("/v1/conversations", self._list),
            Route("/v1/conversations/{id}", self._delete, methods=["DELETE"]),
        ]
        self.app: ASGIApp = self.faults.wrap(Starlette(routes=routes))

    def of_user(self, user: str) -> list[DifyConversation]:
        """A user's conversations, in the order in which they began."""
        return [conversation for conversation in self.conversations.values() if conversation.user == user]

    def forget(self, conversation_id: str) -> None:
        """Forget a conversation, as when its application is published again."""
        self.forgotten.append(self.conversations.pop(conversation_id))

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        if not self._allowed(request):
            return _error(401, "unauthorized")
        if not {"query", "inputs", "user"} <= body.keys() or not body["query"]:
            return _error(400, "invalid_param")
        conversation = self._find(body.get("conversation_id"), body["user"])
        if conversation is None and body.get("conversation_id"):
            return _error(404, "not_found")
        if conversation is None:
            conversation = DifyConversation(body["user"], body["inputs"])
            self.conversations[conversation.id] = conversation
        message = DifyMessage(body["query"])
        conversation.messages.append(message)
        self.asked.set()
        await asyncio.sleep(self.delay)
        await self.answering.wait()
        message.answer = f"You said: {message.query}"
        if body.get("response_mode") == "streaming":
            return StreamingResponse(self._events(conversation, message), media_type="text/event-stream")
        if self.last_event is not None:
            return JSONResponse(self.last_event | {"conversation_id": conversation.id, "message_id": message.id})
        return JSONResponse(
            {
                "event": "message",
                "task_id": str(uuid4()),
                "id": message.id,
                "message_id": message.id,
                "conversation_id": conversation.id,
                "mode": "chat",
                "answer": message.answer,
                "metadata": {"usage": {"total_tokens": 1}, "retriever_resources": []},
                "created_at": message.created_at,
            }
        )

    async def _messages(self, request: Request) -> Response:
        parameters = request.query_params
        conversation = self._find(parameters.get("conversation_id"), parameters.get("user", ""))
        if not self._allowed(request) or conversation is None:
            return _error(404, "not_found")
        data = [vars(message) | {"conversation_id": conversation.id} for message in conversation.messages]
        return JSONResponse({"data": data[-int(parameters.get("limit", 20)) :], "has_more": False})

    async def _list(self, request: Request) -> Response:
        if not self._allowed(request):
            return _error(401, "unauthorized")
        found = self.of_user(request.query_params.get("user", ""))
        return JSONResponse({"data": [{"id": conversation.id} for conversation in reversed(found)], "has_more": False})

    async def _delete(self, request: Request) -> Response:
        body = await request.json()
        conversation = self._find(request.path_params["id"], body.get("user", ""))
        if not self._allowed(request) or conversation is None:
            return _error(404, "not_found")
        del self.conversations[conversation.id]
        return Response(status_code=204)

    async def _events(self, conversation: DifyConversation, message: DifyMessage) -> AsyncIterator[str]:
        def event(**content: object) -> str:
            content |= {"conversation_id": conversation.id, "message_id": message.id}
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        yield "event: ping\n\n"
        half = len(message.answer) // 2
        for piece in (message.answer[:half], message.answer[half:]):
            yield event(event="agent_message", answer=piece)
        if self.replaced is not None:
            yield event(event="message_replace", answer=self.replaced)
        yield event(**self.last_event or {"event": "message_end"})

    def _allowed(self, request: Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self._api_key}"

    def _find(self, conversation_id: str | None, user: str) -> DifyConversation | None:
        conversation = self.conversations.get(conversation_id or "")
        return conversation if conversation is not None and conversation.user == user else None


def _error(status: int, code: str) -> JSONResponse:
    return JSONResponse({"code": code, "message": code, "status": status}, status)
