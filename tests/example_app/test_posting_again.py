"""What Chatwoot did not take, or may have taken, is posted once."""

from __future__ import annotations

import httpx
import pytest
from celery.exceptions import Retry

from example_app.clients import get_chatwoot
from example_app.clients.http import Busy
from example_app.fakes.faults import Fault
from example_app.tasks import handle_dify_response
from tests.example_app.conftest import Configure, Outside
from tests.example_app.stepping import ask, receive, respond, run


@pytest.mark.parametrize("header", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_nobody_waits_for_years(outside: Outside, header: str) -> None:
    """Whoever asks to wait longer than an hour is not believed."""
    outside.chatwoot.conversation(7)
    outside.chatwoot.faults.add(Fault("GET", "", 429, headers={"Retry-After": header}))
    chatwoot = await get_chatwoot()
    with pytest.raises(Busy) as caught:
        await chatwoot.conversation(7)
    assert caught.value.retry_after == 3600


@pytest.mark.parametrize("status", [502, 422])
async def test_post_whose_answer_was_lost_is_not_repeated(outside: Outside, status: int) -> None:
    """Chatwoot took the answer, and a proxy said 502, or itself 422: it is found there, not posted again."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", status, too_late=True))
    assert [await run(respond, message), await run(respond, message)] == ["again", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1


async def test_post_that_was_lost_in_a_long_conversation(outside: Outside, configure: Configure) -> None:
    """It is found among the messages since the customer's, however many there are."""
    configure(HTTPX_READ_TIMEOUT="60")  # for so many messages, the machine may be busy once
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    chatwoot = await get_chatwoot()
    for _ in range(120):
        await chatwoot.send_message(7, "before")
    outside.chatwoot.faults.add(Fault("POST", "/messages", 502, too_late=True))
    assert await run(respond, message) == "again"
    for _ in range(30):
        await chatwoot.send_message(7, "after")
    assert await run(respond, message) == "posted"
    assert outside.chatwoot.conversation(7).answers().count("You said: Hello") == 1


async def test_busy_chatwoot_is_left_alone_for_its_minute(
    outside: Outside, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 429 does not say for how long it holds; neither a task nor a caller of the API is to come back sooner."""
    pauses = []

    def retry(*, exc: Exception, countdown: float) -> Retry:
        pauses.append(countdown)
        return Retry(exc=exc)

    [message] = await receive(outside, "Hello")
    await run(ask, message)
    monkeypatch.setattr(handle_dify_response, "retry", retry)
    outside.chatwoot.faults.add(Fault("GET", "", 429, times=2))
    with pytest.raises(Retry):
        await run(respond, message)
    response = await client.post("/api/v1/refresh-teams")
    assert (pauses, response.status_code, response.headers["Retry-After"]) == ([60], 503, "60")
    assert outside.chatwoot.faults.had == 2  # none was repeated within its call


@pytest.mark.parametrize("status", [500, 422])
async def test_post_that_chatwoot_refused_is_repeated(outside: Outside, status: int) -> None:
    """Chatwoot said 500 or 422 and did nothing: the answer is posted in the second attempt."""
    [message] = await receive(outside, "Hello")
    await run(ask, message)
    outside.chatwoot.faults.add(Fault("POST", "/messages", status))
    assert [await run(respond, message), await run(respond, message)] == ["again", "posted"]
    assert len(outside.chatwoot.conversation(7).answers()) == 1
