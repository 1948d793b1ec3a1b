"""Who is refused costs little: what need not be read is not, and a connection that would send it is closed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from example_app.main import create_app
from tests.example_app.conftest import WEBHOOK_SECRET, Configure, signed
from tests.serving import serve

PATH = "/api/v1/chatwoot-webhook"


@asynccontextmanager
async def begun(
    client: httpx.AsyncClient, headers: Mapping[str, str], length: int, path: str = PATH
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A POST whose headers are sent, and of whose body nothing yet."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    lines = [f"{name}: {value}" for name, value in {"Host": "localhost", "Content-Length": length, **headers}.items()]
    writer.write("\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode())
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Chatwoot-Signature": "sha256=0"},
        signed(b"", "1"),
        signed(b"", "soon"),
    ],
    ids=["none", "without time", "old", "no time"],
)
async def test_what_headers_refuse_is_not_read(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    """Without a signature of now, or the secret, a body is not waited for."""
    async with asyncio.timeout(10), begun(client, headers, length=1000) as (reader, _):
        answer = await reader.read()  # to its end: the server has closed the connection
    assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("endpoint", ["update-labels/7", "update-custom-attributes/7", "toggle-status/7"])
async def test_body_without_a_token_is_not_read(client: httpx.AsyncClient, endpoint: str) -> None:
    """Nor is it parsed, which of a megabyte takes half a second, in which nobody else is answered."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer wrong"}
    async with asyncio.timeout(10), begun(client, headers, 1000, f"/api/v1/{endpoint}") as (reader, _):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_document_names_what_needs_the_token(client: httpx.AsyncClient) -> None:
    """Swagger UI sends it along with what the document says needs it."""
    document = (await client.get("/openapi.json")).json()
    open_to_all = {PATH, "/api/v1/health", "/health/live", "/health/ready"}
    for path, operations in document["paths"].items():
        security = [operation.get("security") for operation in operations.values()]
        assert security == [None if path in open_to_all else [{"HTTPBearer": []}]] * len(security), path


async def test_endless_body_is_cut_off(client: httpx.AsyncClient) -> None:
    """Behind the limit a body is not received any more."""
    sent, piece = 0, b" " * 2**16
    async with begun(client, {}, length=2**40, path=f"{PATH}?secret={WEBHOOK_SECRET}") as (_, writer):
        with suppress(ConnectionError):
            while sent < 2**26:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
    assert 2**23 < sent < 2**26


async def test_client_that_leaves_during_the_upload(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs a line in the log, and no traceback."""
    caplog.set_level("INFO", "chatdify")
    async with begun(client, signed(b"", str(int(time.time()))), length=1000) as (_, writer):
        writer.write(b"{")
        await writer.drain()
    async with asyncio.timeout(10):
        while not (told := [record for record in caplog.records if record.name in ("chatdify", "uvicorn.error")]):
            await asyncio.sleep(0.01)
    assert [(record.levelname, record.getMessage().split(" (")[0]) for record in told] == [
        ("INFO", f"POST '{PATH}' answered 400")
    ]


async def test_no_redirect_to_whatever_host(client: httpx.AsyncClient) -> None:
    """A path with a slash too many does not exist."""
    response = await client.get("/api/v1/health/", headers={"Host": "attacker.example"})
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("tunnel.example", 200),
        ("attacker.example", 400),
        ("localhost.attacker.example", 400),
    ],
)
async def test_names_in_development(configure: Configure, tables: None, host: str, status: int) -> None:
    """Where doors may be open, a site whose name leads to this machine is no way in."""
    configure(ENVIRONMENT="development", API_BASE_URL="https://tunnel.example/api/v1")
    async with serve(create_app()) as client:
        assert (await client.get("/api/v1/health", headers={"Host": host})).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://localhost:9000", 403),
        ("https://attacker.example", 403),
        ("https://attacker.example/localhost:8000", 403),
        ("http://[", 403),
        ("null", 403),
    ],
)
async def test_pages_of_others_in_development(configure: Configure, tables: None, origin: str, status: int) -> None:
    """Where doors may be open, the browser of whoever visits another site is no way in."""
    configure(ENVIRONMENT="development")
    async with serve(create_app()) as client:
        url, headers = f"{PATH}?secret={WEBHOOK_SECRET}", {"Host": "localhost:8000", "Origin": origin}
        assert (await client.post(url, content=b'{"event": "other"}', headers=headers)).status_code == status


@pytest.mark.parametrize("chunked", [True, False])
async def test_ten_megabytes_are_refused(client: httpx.AsyncClient, chunked: bool) -> None:
    """A body beyond the limit gets 413, with a length announced or without."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b" " * 65536

    body = chunks() if chunked else b" " * 10 * 2**20
    response = await client.post(PATH, content=body, headers=signed(b"", str(int(time.time()))))
    assert response.status_code == 413
    assert response.json()["status"] == 413
    assert response.headers["Connection"] == "close"


async def test_long_message_in_a_large_payload(client: httpx.AsyncClient) -> None:
    """Chatwoot's longest message, twice in its payload and with every character escaped, is taken."""
    text = r"\u003c" * 150_000
    body = json.dumps({"event": "contact_updated"})[:-1] + f', "content": "{text}", "again": "{text}"}}'
    timestamp = str(int(time.time()))
    headers = signed(body.encode(), timestamp) | {"Content-Type": "application/json"}
    assert (await client.post(PATH, content=body.encode(), headers=headers)).status_code == 200


async def test_two_megabytes_are_refused_elsewhere(client: httpx.AsyncClient) -> None:
    """Only the webhook's bodies are as large as that."""
    response = await client.post("/api/v1/update-labels/7", content=b" " * 2 * 2**20)
    assert response.status_code == 413
