"""The page of development shows dialogues and messages live, and markup in them as text."""

from __future__ import annotations

import html
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from playwright.async_api import Page, async_playwright, expect

from example_app.main import create_app
from tests.example_app.conftest import API_TOKEN, Configure, write
from tests.serving import serve

MARKUP = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
CHROMIUM = shutil.which("chromium")

expect.set_options(timeout=30_000)  # milliseconds; where much else runs, a browser takes its time

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="the page in a browser needs chromium: apt-get update && apt-get install -y chromium"
)


@pytest.fixture
async def client(configure: Configure, tables: None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in development, on a socket."""
    configure(ENVIRONMENT="development", CHATDIFY_API_TOKEN=None, CHATWOOT_WEBHOOK_SECRET=None)
    async with serve(create_app()) as client:
        yield client


async def say(client: httpx.AsyncClient, message: int, content: str, status: str = "pending") -> None:
    """Chatwoot tells of a customer's message in conversation 7."""
    event = {
        "event": "message_created",
        "id": message,
        "content": content,
        "message_type": "incoming",
        "conversation": {"id": 7, "status": status},
    }
    response = await client.post("/api/v1/chatwoot-webhook", json=event)
    assert response.json() == {"status": "processing"}


@asynccontextmanager
async def opened(client: httpx.AsyncClient) -> AsyncIterator[tuple[Page, list[str]]]:
    """The page in Chromium, and what its console complains of."""
    complaints: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await page.goto(str(client.base_url))
        try:
            yield page, complaints
        finally:
            await browser.close()


@pytest.mark.parametrize("path", ["/", "/dialogues"])
async def test_markup_is_shown_as_text(client: httpx.AsyncClient, path: str) -> None:
    """What a customer or Dify writes is escaped, and nothing in the page could run if it were not."""
    await say(client, 1, MARKUP)
    await write(f"UPDATE message SET answer = '<b>{path}</b>'")
    response = await client.get(path)
    assert response.status_code == 200
    assert "<img src=x" not in response.text
    assert "window.ran = 1" in response.text
    assert MARKUP in html.unescape(response.text)
    assert html.escape(f"<b>{path}</b>") in response.text
    policy = response.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(policy)
    assert "unsafe" not in response.headers["content-security-policy"]


async def test_state_is_shown(client: httpx.AsyncClient) -> None:
    """A message's state, its task, its dialogue's status and Dify's conversation are there, and change."""
    assert "No dialogues yet" in (await client.get("/")).text
    await say(client, 41, "Hello", status="open")
    shown = (await client.get("/dialogues")).text
    for expected in ("Conversation 7", "Hello", "#41", 'data-state="received"', "process_message_with_dify", ">open<"):
        assert expected in shown
    await write("UPDATE message SET state = 'posted', answer = 'Good morning'")
    await write("UPDATE dialogue SET dify_conversation_id = 'dify-42'")
    shown = (await client.get("/dialogues")).text
    for expected in ("Good morning", 'data-state="posted"', "dify-42"):
        assert expected in shown
    assert "received" not in shown


async def test_only_so_many_are_shown(client: httpx.AsyncClient) -> None:
    """The dialogues that something happened in last are shown, and of each the latest messages."""
    await write(
        "INSERT INTO dialogue (chatwoot_conversation_id, updated_at)"
        " SELECT 1000 + n, now() - n * interval '1 minute' FROM generate_series(1, 25) n"
    )
    await write(
        "INSERT INTO message (dialogue_id, chatwoot_message_id, content, message_type, conversation_status, state,"
        " attempts) SELECT id, n, 'said ' || n || '.', 'incoming', 'open', 'posted', 0"
        " FROM dialogue, generate_series(1, 60) n WHERE chatwoot_conversation_id = '1003'"
    )
    shown = (await client.get("/")).text
    assert shown.count("<article") == 20
    assert shown.index("Conversation 1001<") < shown.index("Conversation 1003<") < shown.index("Conversation 1020<")
    assert shown.count('id="message-') == 50
    assert shown.index("said 11.") < shown.index("said 60.")


@pytest.mark.parametrize("path", ["/", "/dialogues", "/page/page.js"])
async def test_outside_development_there_is_no_page(configure: Configure, tables: None, path: str) -> None:
    """Where strangers may come by, the page is a 404, with the API's token too."""
    configure(ENVIRONMENT="production")
    async with serve(create_app()) as client:
        assert (await client.get(path, headers={"Authorization": f"Bearer {API_TOKEN}"})).status_code == 404


@needs_chromium
async def test_browser_shows_a_new_message_by_itself(client: httpx.AsyncClient) -> None:
    """A message and its answer appear without a reload; markup in them stays text, and the console quiet."""
    async with opened(client) as (page, complaints):
        await expect(page.get_by_text("No dialogues yet")).to_be_visible()
        await expect(page.get_by_role("status")).to_have_text("Live")
        await page.evaluate("window.sameDocument = true")
        await say(client, 1, MARKUP)
        conversation = page.get_by_role("article", name="Conversation 7")
        await expect(conversation.get_by_role("listitem")).to_contain_text(MARKUP)
        await expect(conversation.get_by_role("listitem")).to_contain_text("received")
        await write(f"UPDATE message SET state = 'posted', answer = '{MARKUP.replace(chr(39), '')}'")
        await expect(conversation.get_by_role("listitem")).to_contain_text("posted")
        assert await page.locator("#dialogues :is(script, img)").count() == 0
        assert await page.evaluate("[window.sameDocument, window.ran]") == [True, None]
        assert complaints == []


@needs_chromium
async def test_browser_runs_nothing_that_got_into_the_page(client: httpx.AsyncClient) -> None:
    """Markup that would have come through unescaped is stopped by the page's policy."""
    async with opened(client) as (page, complaints):
        await page.evaluate(
            "markup => document.body.append(document.createRange().createContextualFragment(markup))", MARKUP
        )
        await expect(page.locator("body > img")).to_be_attached()
        await page.wait_for_function("() => document.querySelector('body > img').complete")
        assert await page.evaluate("window.ran") is None
        assert any("Content Security Policy" in complaint for complaint in complaints)


@needs_chromium
async def test_browser_says_when_the_connection_is_lost(client: httpx.AsyncClient) -> None:
    """Without the server the page keeps what it shows and says so, and goes on once the server is back."""
    await say(client, 1, "Hello")
    async with opened(client) as (page, _):
        await expect(page.get_by_role("status")).to_have_text("Live")
        await page.context.set_offline(True)
        await expect(page.get_by_role("status")).to_contain_text("No connection")
        await expect(page.get_by_text("Hello")).to_be_visible()
        await page.context.set_offline(False)
        await expect(page.get_by_role("status")).to_have_text("Live")


@needs_chromium
async def test_browser_fits_the_page_into_its_width(client: httpx.AsyncClient) -> None:
    """Nothing, not even a long word, makes the page wider than the window of a phone or a desk."""
    await say(client, 1, "o" * 500)
    async with opened(client) as (page, _):
        await expect(page.get_by_text("ooo")).to_be_visible()
        for width in (320, 390, 1280):
            await page.set_viewport_size({"width": width, "height": 800})
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
