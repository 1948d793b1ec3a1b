"""Whatever Dify and Chatwoot answer, it costs a bounded time and room, and a human gets the conversation."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from example_app.clients import close_clients, get_chatwoot, get_dify
from example_app.clients.dify import Question
from example_app.clients.http import ANSWER_LIMIT, Busy, NotFound, Rejected, Unanswered, Unreachable, UpstreamError
from example_app.fakes.faults import Fault
from example_app.fakes.serving import served
from tests.example_app.conftest import Configure, Outside, rows
from tests.example_app.stepping import ask, receive, run

Be = Callable[[ASGIApp], Awaitable[None]]

QUESTION = Question(query="Hello", user="customer")


@pytest.fixture
async def both_are(configure: Configure, outside: Outside) -> AsyncIterator[Be]:
    """Let an application be Dify and Chatwoot."""
    async with AsyncExitStack() as servers:

        async def be(app: ASGIApp) -> None:
            url = await servers.enter_async_context(served(app))
            configure(CHATWOOT_API_URL=f"{url}/api/v1", DIFY_API_URL=f"{url}/v1")

        yield be
        await close_clients()


def events(*contents: object) -> bytes:
    """An event stream."""
    return b"".join(f"data: {json.dumps(content)}\n\n".encode() for content in contents)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_endless_answer(both_are: Be, configure: Configure, mode: str, status: int) -> None:
    """An answer is read up to 8 MiB."""
    await both_are(Response(b" " * (ANSWER_LIMIT + 1), status, media_type="application/json"))
    configure(DIFY_RESPONSE_MODE=mode)
    with pytest.raises(Unanswered, match="answered more than 8388608 bytes"):
        await (await get_dify()).ask(QUESTION)
    with pytest.raises(Unanswered, match="answered more than 8388608 bytes"):
        await (await get_chatwoot()).send_message(7, "Hello")


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
@pytest.mark.parametrize(
    ("status", "error"), [(200, Unanswered), (500, Unanswered), (400, Rejected), (404, NotFound), (429, Busy)]
)
async def test_compressed_answer(
    both_are: Be, configure: Configure, mode: str, status: int, error: type[UpstreamError]
) -> None:
    """None is asked for, and none is unpacked: of two layers, a kilobyte would become a gigabyte. A status counts."""
    asked: set[str | None] = set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.add(Request(scope).headers.get("Accept-Encoding"))
        packed = gzip.compress(gzip.compress(b"{}"))
        headers = {"Content-Encoding": "gzip, gzip", "Retry-After": "600"}
        await Response(packed, status, headers, "application/json")(scope, receive, send)

    await both_are(app)
    configure(DIFY_RESPONSE_MODE=mode)
    with pytest.raises(UpstreamError) as dify:
        await (await get_dify()).ask(QUESTION)
    with pytest.raises(UpstreamError) as chatwoot:
        await (await get_chatwoot()).send_message(7, "Hello")
    assert (type(dify.value), type(chatwoot.value)) == (error, error)
    assert dify.value.retry_after == (600 if error is Busy else 0)
    assert asked == {"identity"}


@pytest.mark.parametrize("encoding", ["identity", "", "utf-8", "none"])
async def test_answer_that_is_not_compressed(both_are: Be, encoding: str) -> None:
    """Whatever a server calls it."""
    ids = {"conversation_id": "1", "message_id": "1"}
    await both_are(JSONResponse({"answer": "Hi"} | ids, headers={"Content-Encoding": encoding}))
    assert (await (await get_dify()).ask(QUESTION)).answer == "Hi"


async def test_answer_that_drips(both_are: Be, configure: Configure) -> None:
    """A byte now and then keeps no call waiting for longer than all time-outs together."""

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    await both_are(StreamingResponse(drip()))
    configure(**{f"HTTPX_{wait}_TIMEOUT": "0.2" for wait in ("CONNECT", "READ", "WRITE", "POOL")})
    async with asyncio.timeout(20):
        with pytest.raises(Unanswered, match="took too long"):
            await (await get_chatwoot()).send_message(7, "Hello")


async def test_cookies_are_not_kept(both_are: Be) -> None:
    """What an API sets for one customer's call is not sent with another's."""
    sent: list[str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        sent.append(Request(scope).headers.get("Cookie"))
        await JSONResponse([], headers={"Set-Cookie": f"customer={len(sent)}; Path=/"})(scope, receive, send)

    await both_are(app)
    chatwoot = await get_chatwoot()
    assert [await chatwoot.teams() for _ in range(2)] == [[], []]
    assert sent == [None, None]


@pytest.mark.parametrize(
    "ids",
    [
        {"conversation_id": "a\0b", "message_id": "1"},
        {"conversation_id": "1", "message_id": "a\0b"},
        {"conversation_id": "1" * 256, "message_id": "1"},
        {"conversation_id": "\ud800", "message_id": "1"},
        {"conversation_id": "", "message_id": "1"},
        {"conversation_id": "1", "message_id": "a b"},
    ],
    ids=ascii,
)
async def test_ids_that_are_none(outside: Outside, both_are: Be, ids: dict[str, str]) -> None:
    """An answer whose ids can be neither stored nor asked for is tried again, and handed over in the end."""
    await both_are(Response(json.dumps({"answer": "Hello"} | ids), media_type="application/json"))
    [message] = await receive(outside, "Hello")
    assert [await run(ask, message) for _ in range(4)] == ["again"] * 3 + ["failed"]


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
@pytest.mark.parametrize(
    "content",
    [b'{"answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"answer": }', b"[]"],
    ids=["nested", "broken", "list"],
)
async def test_answer_that_is_none_of_difys(both_are: Be, configure: Configure, mode: str, content: bytes) -> None:
    """It counts as no answer, as one nested too deeply does, whether or not Python's parser gives up over it."""
    await both_are(Response(content if mode == "blocking" else b"data: " + content + b"\n\n"))
    configure(DIFY_RESPONSE_MODE=mode)
    with pytest.raises(Unanswered):
        await (await get_dify()).ask(QUESTION)


@pytest.mark.parametrize(
    "content",
    [r'["\ud800"]', r'{"\udfff": 1}', "[" * 300 + "]" * 300, "[" * 100_000 + "]" * 100_000, "[NaN]", "\ufeff[", "["],
    ids=lambda content: str(content)[:10].encode("ascii", "backslashreplace").decode(),
)
async def test_answers_that_cannot_be_passed_on(client: httpx.AsyncClient, both_are: Be, content: str) -> None:
    """Chatwoot's answer to a caller of the API is passed on, or is a 502 that says what is not known."""
    await both_are(Response(content, media_type="application/json"))
    response = await client.post("/api/v1/update-labels/7", json=["vip"])
    assert (response.status_code, response.json()["detail"]) == (
        502,
        "Whether Chatwoot did it is not known; look before you repeat it.",
    )


@pytest.mark.parametrize(
    ("halves", "answer"),
    [(("Hi \ud83d", "\ude00!"), "Hi 😀!"), (("Hi \ud83d", "!"), "Hi \ufffd!"), (("Hi", "\0!"), "Hi!")],
    ids=["pair", "half", "NUL"],
)
async def test_emoji_in_two_events(
    outside: Outside, both_are: Be, configure: Configure, halves: tuple[str, str], answer: str
) -> None:
    """A pair of surrogates that was cut in two is one character again; a half alone is replaced."""
    ids = {"conversation_id": "1", "message_id": "1"}
    pieces = [{"event": "message", "answer": half} | ids for half in halves]
    await both_are(Response(events(*pieces, {"event": "message_end"} | ids), media_type="text/event-stream"))
    configure(DIFY_RESPONSE_MODE="streaming")
    [message] = await receive(outside, "Hello")
    assert await run(ask, message) == "answered"
    assert await rows("SELECT answer FROM message") == [(answer,)]


@pytest.mark.parametrize("data", [{"status": "succeeded"}, {"status": "partial-succeeded"}, {}, None], ids=str)
async def test_workflow_that_finishes_before_its_message(both_are: Be, configure: Configure, data: object) -> None:
    """Unless it has failed, its answer is one."""
    ids = {"conversation_id": "1", "message_id": "1"}
    finished = {"event": "workflow_finished", "data": data}
    await both_are(
        Response(events({"event": "message", "answer": "Hi"} | ids, finished, {"event": "message_end"} | ids))
    )
    configure(DIFY_RESPONSE_MODE="streaming")
    assert (await (await get_dify()).ask(QUESTION)).answer == "Hi"


async def test_events_that_say_nothing(both_are: Be, configure: Configure) -> None:
    """A piece without words adds none, and moderation may leave none."""
    ids = {"conversation_id": "1", "message_id": "1"}
    said = [{"event": "message", "answer": "Hi"}, {"event": "message_replace"}]
    said += [{"event": "message"}, {"event": "message", "answer": "Ho"}, {"event": "message_end"} | ids]
    await both_are(Response(events(*said)))
    configure(DIFY_RESPONSE_MODE="streaming")
    assert (await (await get_dify()).ask(QUESTION)).answer == "Ho"


@pytest.mark.parametrize("breaks", [True, False], ids=["breaks", "ends"])
async def test_stream_without_an_end(both_are: Be, configure: Configure, breaks: bool) -> None:
    """Half an answer is none, and the question is not asked again at once: Dify has it."""
    asked = []

    async def half() -> AsyncIterator[bytes]:
        asked.append(1)
        yield events({"event": "message", "answer": "Hi", "conversation_id": "1", "message_id": "1"})
        if breaks:
            raise ConnectionResetError

    await both_are(StreamingResponse(half()))
    configure(DIFY_RESPONSE_MODE="streaming")
    with pytest.raises(Unanswered):
        await (await get_dify()).ask(QUESTION)
    assert asked == [1]


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
async def test_dify_that_is_away(outside: Outside, configure: Configure, mode: str) -> None:
    """Nothing was asked then, which is known."""
    configure(DIFY_RESPONSE_MODE=mode, DIFY_API_URL="http://127.0.0.1:9/v1")
    with pytest.raises(Unreachable):
        await (await get_dify()).ask(QUESTION)


@pytest.mark.parametrize("mode", ["blocking", "streaming"])
@pytest.mark.parametrize(("status", "error"), [(400, Rejected), (500, Unanswered)])
async def test_error_page(
    both_are: Be, configure: Configure, mode: str, status: int, error: type[UpstreamError]
) -> None:
    """An error whose body is no JSON is known by its status, and nothing of the body is told."""
    await both_are(Response("<h1>Sorry</h1>", status, media_type="text/html"))
    configure(DIFY_RESPONSE_MODE=mode)
    with pytest.raises(error) as caught:
        await (await get_dify()).ask(QUESTION)
    assert str(caught.value) == f"Dify, POST /v1/chat-messages: answered {status}"


@pytest.mark.parametrize("header", ["soon", "-1", "", "Wed, 99 Oct 2015 07:28:00 GMT"])
async def test_retry_after_that_is_none(outside: Outside, header: str) -> None:
    """It counts as if it were missing."""
    outside.dify.faults.add(Fault("GET", "/conversations", 429, times=3, headers={"Retry-After": header}))
    with pytest.raises(Busy) as caught:
        await (await get_dify()).conversations("customer")
    assert (caught.value.retry_after, outside.dify.faults.had) == (0.0, 3)


async def test_retry_after_that_is_a_date(outside: Outside) -> None:
    """The pause lasts until then."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=1000), usegmt=True)
    outside.dify.faults.add(Fault("GET", "/conversations", 429, headers={"Retry-After": date}))
    with pytest.raises(Busy) as caught:
        await (await get_dify()).conversations("customer")
    assert 900 < caught.value.retry_after <= 1000


async def test_question_that_begins_a_conversation(both_are: Be) -> None:
    """It names none."""
    asked: list[tuple[str, object]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        asked.append((request.url.path, await request.json()))
        await JSONResponse({"conversation_id": "1", "message_id": "2"})(scope, receive, send)

    await both_are(app)
    await (await get_dify()).ask(QUESTION)
    body = {"query": "Hello", "user": "customer", "inputs": {}, "response_mode": "blocking"}
    assert asked == [("/v1/chat-messages", body)]


async def test_lines_in_pieces(both_are: Be, configure: Configure) -> None:
    """A stream may be cut anywhere, also within a character, and have CR LF at its lines' ends."""
    ids = {"conversation_id": "1", "message_id": "1"}
    said = json.dumps({"event": "message", "answer": "Hi 😀!"} | ids, ensure_ascii=False)
    content = f"data: {said}\r\n\r\n".encode() + events({"event": "message_end"} | ids).rstrip()

    async def bytewise() -> AsyncIterator[bytes]:
        for byte in content:
            yield bytes([byte])

    await both_are(StreamingResponse(bytewise()))
    configure(DIFY_RESPONSE_MODE="streaming")
    assert (await (await get_dify()).ask(QUESTION)).answer == "Hi 😀!"
