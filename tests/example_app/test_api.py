"""The endpoints do what they say to Chatwoot, for who has the token, and their errors are problems."""

from __future__ import annotations

import logging

import httpx
import pytest

from example_app.events import WEBHOOK_EXAMPLE
from example_app.fakes.faults import Fault
from example_app.main import create_app
from fastapi_chatdify_db import DatabaseSettings, InvalidSettings, db
from fastapi_chatdify_db.engines import Engines
from tests.example_app.conftest import WEBHOOK_SECRET, Configure, Outside
from tests.serving import serve

ACTIONS = [
    ("send-chatwoot-message?conversation_id=7&message=Hello", None),
    ("update-labels/7", ["vip"]),
    ("update-custom-attributes/7", {"region": "Berlin"}),
    ("toggle-priority/7", {"priority": "high"}),
    ("assign-team/7", {"team": "support"}),
    ("toggle-status/7", {"status": "open"}),
]


@pytest.fixture
async def outside(outside: Outside) -> Outside:
    """The fake APIs, with conversation 7."""
    outside.chatwoot.conversation(7)
    return outside


async def post(client: httpx.AsyncClient, path: str, body: object = None) -> httpx.Response:
    """POST to the API."""
    return await client.post(f"/api/v1/{path}", json=body)


async def test_message_is_posted(client: httpx.AsyncClient, outside: Outside) -> None:
    """A message goes to the customer, a private one is a note; markup and emoji stay as they are."""
    text = "<b>Hello</b> 🎉"
    parameters: dict[str, str | int | bool] = {"conversation_id": 7, "message": text}
    response = await client.post("/api/v1/send-chatwoot-message", params=parameters)
    assert response.json() == {"status": "success", "message": "Message sent successfully"}
    await client.post("/api/v1/send-chatwoot-message", params=parameters | {"is_private": True})
    conversation = outside.chatwoot.conversation(7)
    assert (conversation.answers(), conversation.notes()) == ([text], [text])


async def test_message_that_chatwoot_may_have_stored(client: httpx.AsyncClient, outside: Outside) -> None:
    """Chatwoot's 422 does not say that it refused a message, so neither do we."""
    outside.chatwoot.faults.add(Fault("POST", "/messages", 422, too_late=True))
    response = await post(client, "send-chatwoot-message?conversation_id=7&message=Hello")
    assert outside.chatwoot.conversation(7).answers() == ["Hello"]
    assert response.status_code == 502
    assert response.json()["detail"] == "Whether Chatwoot did it is not known; look before you repeat it."


async def test_labels_and_attributes_and_priority(client: httpx.AsyncClient, outside: Outside) -> None:
    """Each is replaced in Chatwoot; nothing to set is a success that sends nothing."""
    outside.chatwoot.conversation(7).custom_attributes = {"order": "A-17"}
    response = await post(client, "update-labels/7", ["vip", "parcel"])
    assert response.json() == {"status": "success", "conversation_id": 7, "labels": {"payload": ["vip", "parcel"]}}
    done = {"status": "success", "conversation_id": 7}
    attributes = {"region": "Berlin"}
    response = await post(client, "update-custom-attributes/7", attributes)
    assert response.json() == done | {"custom_attributes": {"custom_attributes": attributes}}
    response = await post(client, "toggle-priority/7", {"priority": "high"})
    assert response.json() == done | {"priority": None}  # Chatwoot's answer is empty
    for path, body in (("update-custom-attributes", {}), ("toggle-priority", {"priority": None})):
        assert (await post(client, f"{path}/7", body)).json()["status"] == "success"
    assert (await post(client, "toggle-priority/7", {"priority": "none"})).json()["priority"] == "None"
    conversation = outside.chatwoot.conversation(7)
    assert conversation.labels == ["vip", "parcel"]
    assert conversation.custom_attributes == {"region": "Berlin"}
    assert conversation.priority == "high"


async def test_status_tells_the_one_before(client: httpx.AsyncClient, outside: Outside) -> None:
    """The present status is read, then changed."""
    answer = (await post(client, "toggle-status/7", {"status": "snoozed"})).json()
    assert answer["previous_status"] == "pending"
    assert outside.chatwoot.conversation(7).status == "snoozed"


async def test_dialogue_is_found_by_either_id(client: httpx.AsyncClient) -> None:
    """Both look-ups tell what is stored, and 404 otherwise."""
    webhook = f"/api/v1/chatwoot-webhook?secret={WEBHOOK_SECRET}"
    assert (await client.post(webhook, json=WEBHOOK_EXAMPLE)).status_code == 200
    async with db.async_engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE dialogue SET dify_conversation_id = 'dify-1'")
    info = (await client.get("/api/v1/dialogue-info/7")).json()
    assert {name: info[name] for name in ("chatwoot_conversation_id", "dify_conversation_id", "status")} == {
        "chatwoot_conversation_id": "7",
        "dify_conversation_id": "dify-1",
        "status": "pending",
    }
    found = (await client.get("/api/v1/conversations/dify/dify-1")).json()
    assert found == {"chatwoot_conversation_id": "7", "status": "pending", "assignee_id": None}
    for path in ("dialogue-info/8", "conversations/dify/dify-2"):
        missing = await client.get(f"/api/v1/{path}")
        assert (missing.status_code, missing.headers["Content-Type"]) == (404, "application/problem+json")


async def test_health(client: httpx.AsyncClient, configure: Configure, outside: Outside) -> None:
    """Health asks the database; the test conversation asks Chatwoot, and warns when there is none."""
    health = (await client.get("/api/v1/health")).json()
    assert (health["status"], health["database"]) == ("healthy", "connected")
    tested = (await post(client, "health/test-conversation")).json()
    assert (tested["status"], tested["conversation_id"]) == ("success", 7)
    assert len(outside.chatwoot.conversation(7).notes()) == 1
    outside.chatwoot.conversations.clear()
    assert (await post(client, "health/test-conversation")).json()["status"] == "warning"


@pytest.mark.parametrize(
    "path", [*(path for path, _ in ACTIONS), "refresh-teams", "health/test-conversation"], ids=lambda p: p.split("?")[0]
)
async def test_token_is_needed(client: httpx.AsyncClient, outside: Outside, path: str) -> None:
    """Without the token, or with another one, nothing happens."""
    del client.headers["Authorization"]
    for value in ("", "Bearer guessed", "Basic abc", "Bearer gué"):
        response = await client.post(f"/api/v1/{path}", headers={b"Authorization": value.encode()})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert outside.chatwoot.conversation(7).messages == []


@pytest.mark.parametrize(("path", "body"), ACTIONS, ids=lambda value: str(value).split("?")[0])
async def test_chatwoots_failures_are_problems(
    client: httpx.AsyncClient, outside: Outside, path: str, body: object
) -> None:
    """What Chatwoot refuses or breaks on is a 404, 502 or 503 without a word of Chatwoot's."""
    missing = await post(client, path.replace("7", "8"), body)
    assert (missing.status_code, missing.json()["title"]) == (404, "Not Found")
    for status, answered in ((500, 502), (400, 502), (429, 503), (503, 503)):
        outside.chatwoot.faults.due.clear()
        for method in ("GET", "POST"):
            outside.chatwoot.faults.add(Fault(method, "", status, times=100, headers={"Retry-After": "11"}))
        response = await post(client, path, body)
        assert response.status_code == answered
        assert "told to" not in response.text
        assert response.headers["Content-Type"] == "application/problem+json"
        assert response.headers.get("Retry-After") == ("11" if answered == 503 else None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("update-labels/0", []),
        ("update-labels/9223372036854775808", []),
        ("update-labels/seven", []),
        ("update-labels/7", {"a": 1}),
        ("update-custom-attributes/7", ["a"]),
        ("toggle-priority/7", {"priority": "highest"}),
        ("toggle-status/7", {"status": "closed"}),
        ("assign-team/7", {"team": "a\0b"}),
        ("send-chatwoot-message?conversation_id=7&message=", None),
        ("send-chatwoot-message?conversation_id=7&message=%00", None),
    ],
)
async def test_invalid_requests(client: httpx.AsyncClient, path: str, body: object) -> None:
    """What cannot be used is a 422 that names the part and does not repeat the input."""
    response = await post(client, path, body)
    assert response.status_code == 422
    assert response.json()["invalid"][0]["part"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("update-labels/7", r'["\ud800"]'),
        ("update-labels/7", r'["\u0000"]'),
        ("update-labels/7", "[NaN]"),
        ("update-custom-attributes/7", '{"region": NaN}'),
        ("update-custom-attributes/7", '{"region": [{"name": -Infinity}]}'),
        ("update-custom-attributes/7", '{"region": 1e999}'),
        ("update-custom-attributes/7", r'{"region": [{"name": "\ud800"}]}'),
        ("update-custom-attributes/7", r'{"region": "\u0000"}'),
        ("update-custom-attributes/7", r'{"region": {"\udfff": 1}}'),
        ("update-custom-attributes/7", r'{"\ud800": 1}'),
        ("update-custom-attributes/7", r'{"\u0000": 1}'),
        ("toggle-priority/7", r'{"priority": "\ud800"}'),
        ("toggle-status/7", '{"status": Infinity}'),
        ("assign-team/7", r'{"team": "\ud800"}'),
    ],
)
async def test_what_only_pythons_json_has(client: httpx.AsyncClient, outside: Outside, path: str, body: str) -> None:
    """NaN, infinities, NUL and halves of surrogate pairs are a 422, wherever they stand."""
    response = await client.post(f"/api/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["invalid"][0]["part"].startswith("body.")


async def test_many_errors_in_one_body(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty are named, in the answer and in the log."""
    caplog.set_level("INFO", "chatdify")
    response = await post(client, "update-labels/7", [1] * 10_000)
    assert (response.status_code, len(response.json()["invalid"])) == (422, 20)
    assert [len(record.getMessage()) < 2000 for record in caplog.records if record.name == "chatdify"] == [True]


async def test_unexpected_error_says_nothing(
    client: httpx.AsyncClient, outside: Outside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that nobody foresaw is a 500 without its text, which the log has."""

    async def fail(*_: object) -> None:
        raise ZeroDivisionError("password=hunter2")

    monkeypatch.setattr("example_app.teams.TeamDirectory.refresh", fail)
    response = await post(client, "refresh-teams")
    assert response.status_code == 500
    assert response.json()["title"] == "Internal Server Error"
    assert "hunter2" not in response.text


async def test_database_down_is_unhealthy(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not answer is a 503, as for any other request."""
    gone = DatabaseSettings(database_url="postgresql://127.0.0.1:1/gone")
    with monkeypatch.context() as patch:
        patch.setattr(db, "engines", Engines(lambda: gone))
        response = await client.get("/api/v1/health")
    assert (response.status_code, response.json()["title"]) == (503, "Service Unavailable")


@pytest.mark.parametrize(
    "missing", ["CHATDIFY_API_TOKEN", "CHATWOOT_WEBHOOK_SECRET", "CHATWOOT_API_KEY", "DIFY_API_KEY"]
)
def test_refuses_to_start_with_an_open_door(configure: Configure, missing: str) -> None:
    """Outside development the application does not start without its secrets, and names the missing one."""
    configure(**{missing: None})
    with pytest.raises(InvalidSettings, match=missing):
        create_app()


async def test_doors_without_secrets_are_open_in_development(configure: Configure, outside: Outside) -> None:
    """On one's own machine nothing has to be set."""
    configure(ENVIRONMENT="development", CHATDIFY_API_TOKEN=None, CHATWOOT_WEBHOOK_SECRET=None)
    async with serve(create_app()) as client:
        assert (await post(client, "refresh-teams")).status_code == 200
        assert (await post(client, "chatwoot-webhook", WEBHOOK_EXAMPLE)).status_code == 200


def test_access_log_does_not_say_what_urls_ask(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    """What uvicorn logs about a request has neither the webhook's secret, nor a message to a customer."""
    create_app()
    arguments = ("127.0.0.1:1", "POST", "/api/v1/chatwoot-webhook?x=1&%73ecre%74=hunter2", "1.1", 200)
    access = logging.getLogger("uvicorn.access")
    with caplog.at_level("INFO", "uvicorn.access"):
        access.addHandler(caplog.handler)
        access.info('%s - "%s %s HTTP/%s" %d', *arguments)
        access.removeHandler(caplog.handler)
    assert '"POST /api/v1/chatwoot-webhook?*** HTTP/1.1" 200' in caplog.text
