"""Dify's service API for chat applications: https://docs.dify.ai/api-reference."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection
from typing import Annotated, Final

import httpx
from pydantic import BaseModel, Field, JsonValue

from example_app.clients.http import (
    NotFound,
    Rejected,
    Unanswered,
    UpstreamAPI,
    UpstreamError,
    as_outside_error,
    pieces,
    plain_code,
    whole,
)
from example_app.settings import Settings

_ASK: Final = "Dify, POST /chat-messages"
_PAUSED: Final = "workflow_paused"
_WAITING_FOR_HUMAN: Final = "waits for a human within the workflow"

ID = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]
"""An id of Dify's; anything else could be neither stored nor asked for."""


class StillAnswering(UpstreamError):
    """Dify has the question, and no answer yet.

    Parameters:
        asked_at: When it got the question, in seconds since 1970.
    """

    may_pass = True

    def __init__(self, call: str, outcome: str, retry_after: float = 0.0, *, asked_at: float = 0.0) -> None:
        super().__init__(call, outcome, retry_after)
        self.asked_at = asked_at


class Paused(UpstreamError):
    """The workflow waits for a human's input, which cannot be given here."""


class Question(BaseModel):
    """What Dify is asked.

    Parameters:
        query: The customer's words.
        user: Whose conversation it is; Dify knows a conversation only together with its user.
        conversation_id: The conversation to go on with; None begins one.
        inputs: The application's variables; Dify keeps those of a conversation's first message.
    """

    query: str
    user: str
    conversation_id: str | None = None
    inputs: dict[str, JsonValue] = {}


class Answer(BaseModel):
    """What Dify answered."""

    conversation_id: ID
    message_id: ID
    answer: str = ""


class _Conversation(BaseModel):
    id: ID


class _Conversations(BaseModel):
    data: list[_Conversation]


class _Message(BaseModel):
    id: ID
    conversation_id: ID
    query: str
    answer: str | None = None
    status: str = "normal"
    created_at: float  # seconds since 1970


class _Messages(BaseModel):
    data: list[_Message]


class _Event(BaseModel):
    event: str
    conversation_id: str | None = None
    message_id: str | None = None
    answer: str | None = None
    status: JsonValue = None
    code: JsonValue = None
    data: JsonValue = None

    @property
    def is_failed_workflow(self) -> bool:
        """Whether the stream of a workflow ends in its failure; Dify sends the event ``error`` only after that end."""
        match self.data:
            case {"status": "failed"}:
                return self.event == "workflow_finished"
        return False


class Dify(UpstreamAPI):
    """One application of a Dify; its methods raise ``UpstreamError`` when Dify does not do it.

    Parameters:
        settings: Where it is, its key and its response mode.
    """

    # The model's provider failed Dify: overloaded, too many requests, unreachable.
    passing_codes = frozenset({"completion_request_error"})

    def __init__(self, settings: Settings) -> None:
        headers = {"Authorization": f"Bearer {settings.dify_api_key or ''}"}
        super().__init__("Dify", settings.dify_api_url.rstrip("/"), headers, settings)
        self._response_mode = settings.dify_response_mode

    async def ask(self, question: Question) -> Answer:
        """Ask, and wait for the whole answer.

        Raises:
            NotFound: Dify does not know the conversation (any more).
            Unanswered: Dify may have answered or not; ``find_answer`` knows.
            UpstreamError: Another of its subclasses: it was not answered.
        """
        body: JsonValue = question.model_dump(exclude_none=True) | {"response_mode": self._response_mode}
        if self._response_mode == "streaming":
            retrying = self._retrying(lambda error: error.never_began)
            return await retrying(self._ask_streaming, body)
        return self._answer(await self.call_once("POST", "/chat-messages", json=body))

    async def find_answer(
        self, query: str, user: str, conversation_id: str, known: Collection[str], since: float
    ) -> Answer | None:
        """The answer to a question that was asked before, when it is not known whether Dify got it.

        Parameters:
            query: What was asked.
            user: By whom.
            conversation_id: Where.
            known: The ids of messages whose answers are known already: the same words may be said twice.
            since: When at the earliest, in seconds since 1970; an older question was another one.

        Raises:
            StillAnswering: The answer is under way, or was when Dify died.
            Paused: There is no answer, only what the workflow said until it paused.
            UpstreamError: Another of its subclasses: Dify did not tell.
        """
        parameters: dict[str, str | int] = {"conversation_id": conversation_id, "user": user, "limit": 20}
        answer = await self.call("GET", "/messages", params=parameters)
        for message in reversed(self.read(_Messages, answer).data):
            if message.status == "error":
                continue  # Dify failed to answer it, so it may be asked again
            if message.query == query and message.id not in known and message.created_at >= since:
                if message.status == "paused":
                    raise Paused("Dify, GET /messages", _WAITING_FOR_HUMAN)
                if not message.answer:
                    raise StillAnswering("Dify, GET /messages", "has no answer yet", asked_at=message.created_at)
                return Answer(conversation_id=message.conversation_id, message_id=message.id, answer=message.answer)
        return None

    async def conversations(self, user: str) -> list[str]:
        """The ids of this user's conversations, the latest first, twenty at most."""
        answer = await self.call("GET", "/conversations", params={"user": user, "limit": 20})
        return [conversation.id for conversation in self.read(_Conversations, answer).data]

    async def delete_conversation(self, conversation_id: str, user: str) -> None:
        """Delete a conversation; one that is not there counts as deleted."""
        try:
            await self.call("DELETE", f"/conversations/{conversation_id}", json={"user": user})
        except NotFound:
            return

    def parse(self, content: bytes | str, call: str) -> JsonValue:
        """An answer's JSON. A text may end in half of a surrogate pair, whose other half is in the next event.

        Raises:
            Unanswered: It is no JSON, or nested too deeply.
        """
        try:
            parsed: JsonValue = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unanswered(call, "answered no JSON") from error
        return parsed

    async def _ask_streaming(self, body: JsonValue) -> Answer:
        try:
            async with self.client.stream("POST", "/chat-messages", json=body) as response:
                if not response.is_success:
                    self.check(response, await whole(response, _ASK))
                return await self._assemble(response)
        except httpx.RequestError as error:
            raise as_outside_error(_ASK, error) from error

    async def _assemble(self, response: httpx.Response) -> Answer:
        """Put a streamed answer together out of its server-sent events."""
        texts: list[str] = []
        async for line in _lines(pieces(response, _ASK)):
            if not line.startswith("data:"):
                continue
            event = self.read(_Event, self.parse(line.removeprefix("data:"), _ASK))
            if event.event == "error":
                status = event.status if isinstance(event.status, int) else 500
                error = self.failure(_ASK, status, plain_code(event.code))
                raise Unanswered(*error.args) if error.never_began else error  # it has begun
            if event.is_failed_workflow:
                raise Rejected(_ASK, "says that the workflow failed")
            if event.event in ("message", "agent_message"):
                texts.append(event.answer or "")
            if event.event == "message_replace":  # by Dify's moderation
                texts = [event.answer or ""]
            if event.event in ("message_end", _PAUSED):
                return self._answer(
                    {
                        "event": event.event,
                        "conversation_id": event.conversation_id,
                        "message_id": event.message_id,
                        "answer": "".join(texts),
                    }
                )
        raise Unanswered(_ASK, "ended before the answer did")

    def _answer(self, content: JsonValue) -> Answer:
        if isinstance(content, dict) and content.get("event") == _PAUSED:
            raise Paused(_ASK, _WAITING_FOR_HUMAN)
        return self.read(Answer, content)


async def _lines(stream: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of an event stream; ``aiter_lines`` would also end one at, say, a U+2028 within a JSON string.

    A CR stays at the end of its line, where to JSON it is white space.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """
    line: list[bytes] = []
    async for piece in stream:
        end, *others = piece.split(b"\n")
        line.append(end)
        for other in others:
            yield b"".join(line).decode("utf-8", "replace")
            line = [other]
    yield b"".join(line).decode("utf-8", "replace")
