"""Calls to an outside HTTP API: what is retried, for how long, and with which error it ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import ClassVar, Final, TypeVar

import httpx
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import from_json
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from example_app.clients.retry_after import seconds
from example_app.settings import Settings

M = TypeVar("M", bound=BaseModel)

TRIES: Final = 3
ANSWER_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of an answer."""
LONGEST_PAUSE: Final = 10.0
"""Seconds that a call waits for ``Retry-After``; if it is told to wait longer, it fails."""

_PLAIN: Final = {"Accept-Encoding": "identity"}
"""httpx would unpack as many layers of compression as the answer names: a kilobyte may become gigabytes."""

_CODE: Final = re.compile("[a-z_]{1,64}")

_backoff: Final = wait_random_exponential(multiplier=0.2, max=5.0)


class UpstreamError(Exception):
    """An outside API did not do what it was asked. Of its answer, the message shows only the error's code.

    Parameters:
        call: What was asked of whom, for the log.
        outcome: What became of it.
        retry_after: Seconds that the API asked to wait.
    """

    may_pass: ClassVar[bool] = False
    never_began: ClassVar[bool] = False

    def __init__(self, call: str, outcome: str, retry_after: float = 0.0) -> None:
        super().__init__(call, outcome, retry_after)  # pickle calls __init__ again with these
        self.retry_after = retry_after

    def __str__(self) -> str:
        call, outcome, _ = self.args
        return f"{call}: {outcome}"


class NotFound(UpstreamError):
    """404: it does not exist, or not for us."""


class Rejected(UpstreamError):
    """The API understood and said no; asking again does not help."""


class Busy(UpstreamError):
    """429: nothing was done, later it may be."""

    may_pass = True
    never_began = True


class Unreachable(UpstreamError):
    """No connection was made, so nothing was done."""

    may_pass = True
    never_began = True


class Unanswered(UpstreamError):
    """A 5xx, a time-out, a broken or senseless answer: it may have been done or not.

    A 503 too: proxies also answer it when the server behind them went away with the request.
    """

    may_pass = True


class UpstreamAPI:
    """One API, over connections that are kept.

    Parameters:
        name: What logs and errors call it.
        base_url: Prefix of every path.
        headers: Sent with every request.
        settings: For its time-outs.
    """

    passing_codes: ClassVar[frozenset[str]] = frozenset()
    """Codes of errors that may pass although their status says otherwise."""

    def __init__(self, name: str, base_url: str, headers: dict[str, str], settings: Settings) -> None:
        waits = {
            "connect": settings.httpx_connect_timeout,
            "read": settings.httpx_read_timeout,
            "write": settings.httpx_write_timeout,
            "pool": settings.httpx_pool_timeout,
        }
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # the client serves all customers
        self.name = name
        self.client = httpx.AsyncClient(
            base_url=base_url, headers=headers | _PLAIN, timeout=httpx.Timeout(**waits), cookies=no_cookies
        )
        # An endless answer, a byte now and then, stays within each of these time-outs.
        self._time_limit = sum(waits.values())

    async def call(
        self,
        method: str,
        path: str,
        *,
        json: JsonValue = None,
        params: dict[str, str | int] | None = None,
        headers: dict[str, str] | None = None,
    ) -> JsonValue:
        """Make a call that may be made twice; retried whenever the failure may pass.

        Raises:
            UpstreamError: One of its subclasses, when the last try failed.
        """
        retrying = self._retrying(lambda error: error.may_pass)
        return await retrying(self._try, method, path, json=json, params=params, headers=headers)

    async def call_once(self, method: str, path: str, *, json: JsonValue = None) -> JsonValue:
        """Make a call that must not be made twice; retried only when nothing was done.

        Raises:
            Unanswered: It may have been done or not; the caller finds out before asking again.
            UpstreamError: Another of its subclasses: it was not done.
        """
        retrying = self._retrying(lambda error: error.never_began)
        return await retrying(self._try, method, path, json=json)

    def check(self, response: httpx.Response, content: bytes) -> None:
        """Turn a status that tells of a failure into its error.

        Parameters:
            response: What was answered.
            content: Its body.

        Raises:
            UpstreamError: One of its subclasses.
        """
        if response.is_success:
            return
        call = f"{self.name}, {response.request.method} {response.request.url.path}"
        status, code = response.status_code, error_code(content)
        if status == 404 and not response.headers.get("Content-Type", "").startswith("application/json"):
            # It comes from a proxy whose server is away, not from the API.
            raise Unanswered(call, f"answered 404 {code}".rstrip())
        raise self.failure(call, status, code, seconds(response.headers.get("Retry-After")))

    def failure(self, call: str, status: int, code: str, retry_after: float = 0.0) -> UpstreamError:
        """The error for a status that tells of a failure.

        Parameters:
            call: What was asked of whom, for the log.
            status: The HTTP status.
            code: The error's code, or nothing.
            retry_after: Seconds that the API asked to wait.
        """
        kinds = {404: NotFound, 429: Busy}
        passes = status >= 500 or code in self.passing_codes
        kind = kinds.get(status, Unanswered if passes else Rejected)
        return kind(call, f"answered {status} {code}".rstrip(), retry_after if status in (429, 503) else 0.0)

    def parse(self, content: bytes | str, call: str) -> JsonValue:
        """An answer's JSON, if it can be passed on: no half of a surrogate pair, not nested too deeply.

        Parameters:
            content: JSON.
            call: What was asked of whom, for the log.

        Raises:
            Unanswered: It is something else.
        """
        try:
            parsed: JsonValue = from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise Unanswered(call, "answered no JSON") from error
        return parsed

    def read(self, model: type[M], content: JsonValue) -> M:
        """An answer's JSON as a model.

        Raises:
            Unanswered: It is something else.
        """
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise Unanswered(self.name, f"answered no {model.__name__.lstrip('_')}") from error

    async def _try(
        self,
        method: str,
        path: str,
        *,
        json: JsonValue = None,
        params: dict[str, str | int] | None = None,
        headers: dict[str, str] | None = None,
    ) -> JsonValue:
        call = f"{self.name}, {method} {path}"
        try:
            async with (
                asyncio.timeout(self._time_limit),
                self.client.stream(method, path, json=json, params=params, headers=headers) as response,
            ):
                content = await whole(response, call)
        except TimeoutError as error:
            raise Unanswered(call, "took too long") from error
        except httpx.RequestError as error:
            raise as_outside_error(call, error) from error
        self.check(response, content)
        return self.parse(content, call) if content.strip() else None

    def _retrying(self, predicate: Callable[[UpstreamError], bool]) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(
                lambda error: (
                    isinstance(error, UpstreamError) and predicate(error) and error.retry_after <= LONGEST_PAUSE
                )
            ),
            stop=stop_after_attempt(TRIES),
            wait=_pause,
            reraise=True,
        )


async def pieces(response: httpx.Response, call: str) -> AsyncIterator[bytes]:
    """An answer's body as it comes.

    Raises:
        Unanswered: It is larger than ``ANSWER_LIMIT``.
    """
    size = 0
    async for piece in response.aiter_raw():  # one that is compressed all the same is no JSON
        size += len(piece)
        if size > ANSWER_LIMIT:
            raise Unanswered(call, f"answered more than {ANSWER_LIMIT} bytes")
        yield piece


async def whole(response: httpx.Response, call: str) -> bytes:
    """An answer's body.

    Raises:
        Unanswered: It is larger than ``ANSWER_LIMIT``.
    """
    return b"".join([piece async for piece in pieces(response, call)])


def error_code(content: bytes) -> str:
    """The code in an error's JSON, which names its kind and nothing of ours; empty when there is none."""
    try:
        error = from_json(content, allow_inf_nan=False)
    except ValueError:
        return ""
    return plain_code(error.get("code")) if isinstance(error, dict) else ""


def plain_code(code: object) -> str:
    """``code`` if it is a plain word, else the empty string: it goes into the log."""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def as_outside_error(call: str, error: httpx.RequestError) -> UpstreamError:
    """The error for what httpx raised: ``Unreachable`` if no request was sent, else ``Unanswered``."""
    not_sent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
    return (Unreachable if not_sent else Unanswered)(call, type(error).__name__)


def _pause(state: RetryCallState) -> float:
    error = state.outcome and state.outcome.exception()
    asked = error.retry_after if isinstance(error, UpstreamError) else 0.0
    return asked + _backoff(state)
