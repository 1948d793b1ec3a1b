"""Who may come in: the API's bearer token, the webhook's signature, and how large a body may be."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

from fastapi import HTTPException, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from example_app.settings import get_settings

WEBHOOK: Final = "/chatwoot-webhook"
BODY_LIMIT: Final = 1024 * 1024
"""Bytes."""
WEBHOOK_LIMIT: Final = 8 * 1024 * 1024
"""Bytes. Chatwoot's longest message has 150,000 characters and stands in the payload twice, an e-mail with its HTML as
well, and Rails writes ``<`` in six bytes."""

_CLOSE: Final = {"Connection": "close"}
"""Headers of a refusal that leaves the body unread: else the server would receive the rest, even an endless one."""

bearer: Final = HTTPBearer(auto_error=False, description="CHATDIFY_API_TOKEN")


def require_token(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> None:
    """Refuse callers without the API's token; in development there may be none.

    Raises:
        fastapi.HTTPException: 401.
    """
    token = get_settings().chatdify_api_token
    if token is None:
        return
    given = credentials.credentials if credentials else ""
    if not _equal_in_constant_time(given, token):
        raise HTTPException(401, "A bearer token is needed.", headers=_CLOSE | {"WWW-Authenticate": "Bearer"})


class TokenFirst(APIRoute):
    """A route that asks for the token before anything is done about a body, which FastAPI would parse first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, after the token was checked."""
        handle = super().get_route_handler()

        async def handle_with_token(request: Request) -> Response:
            require_token(await bearer(request))
            return await handle(request)

        return handle_with_token


async def authentic_body(
    request: Request,
    secret: Annotated[str | None, Query(description="For a Chatwoot that does not sign its webhooks")] = None,
) -> bytes:
    """The body of a webhook that Chatwoot sent: signed, or to a URL with the secret. Without either, it is not read.

    Raises:
        fastapi.HTTPException: 401, also for a signature that is older than ``CHATWOOT_WEBHOOK_MAX_AGE``;
            400, when the client has left before the end of the body.
    """
    settings = get_settings()
    key = settings.chatwoot_webhook_secret
    signature = request.headers.get("X-Chatwoot-Signature")
    timestamp = request.headers.get("X-Chatwoot-Timestamp", "")
    if key is None:
        authentic = True
    elif signature is None:
        authentic = _equal_in_constant_time(secret or "", key)
    else:
        fresh = _age(timestamp) <= settings.chatwoot_webhook_max_age
        authentic = fresh and _equal_in_constant_time(signature, sign(key, timestamp, await _body(request)))
    if not authentic:
        raise HTTPException(401, "The webhook's signature or secret is missing, wrong or too old.", headers=_CLOSE)
    return await _body(request)


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """The signature that Chatwoot sends in ``X-Chatwoot-Signature``.

    Parameters:
        secret: The webhook's secret.
        timestamp: Seconds since 1970, as in ``X-Chatwoot-Timestamp``.
        body: The raw body.
    """
    signed = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return f"sha256={signed.hexdigest()}"


class BodyLimit:
    """Refuses bodies beyond ``BODY_LIMIT`` (the webhook: ``WEBHOOK_LIMIT``) with 413, and closes the connection.

    Parameters:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        limit = WEBHOOK_LIMIT if scope.get("path", "").endswith(WEBHOOK) else BODY_LIMIT

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                while message.get("more_body") and received < 2 * limit:
                    # A client that is still sending when the connection is closed does not see the answer.
                    message = await receive()
                    received += len(message.get("body", b""))
                # Raised where the application reads its body, so that its own handler answers.
                raise HTTPException(413, f"The body is larger than {limit} bytes.", headers=_CLOSE)
            return message

        await self._app(scope, receive_limited, send)


class SameOrigin:
    """Refuses, with 403, what a browser posts for another site's page: without secrets, nothing else stops it.

    Their links and pictures may come in: they change nothing, and the browser keeps the answer from the page.

    Parameters:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin = headers.get("Origin")
        if origin is None or origin.partition("://")[2] == headers.get("Host"):
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse("Another site may not ask.", 403, headers=_CLOSE)(scope, receive, send)


async def _body(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise HTTPException(400, "The client left before the end of the body.") from None


def _equal_in_constant_time(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _age(timestamp: str) -> float:
    """Seconds between now and ``timestamp``, in either direction; infinite when it is no time."""
    return abs(time.time() - int(timestamp)) if timestamp.isdecimal() and len(timestamp) < 12 else float("inf")
