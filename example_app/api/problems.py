"""Errors as ``application/problem+json`` (RFC 9457), which never show an exception's text."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse

from example_app.api.security import WEBHOOK
from example_app.clients.http import Busy, NotFound, Unanswered, UpstreamError
from example_app.logs import logger

_PARTS_SHOWN: Final = 20


class InvalidPart(BaseModel):
    """A part of a request that cannot be used."""

    part: str
    reason: str


class Problem(BaseModel):
    """What went wrong, for programs (``status``) and for people (``title``, ``detail``)."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"title": "Not Found", "status": 404, "detail": "There is no such dialogue."}]}
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    invalid: list[InvalidPart] | None = None


class ProblemResponse(JSONResponse):
    """A problem as a response."""

    media_type = "application/problem+json"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses=`` of a router whose endpoints answer these statuses with problems."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    # Naming the model under "model" would document it as application/json.
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {ProblemResponse.media_type: schema}}
        for status in statuses
    }


def init_app(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem."""
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(UpstreamError, _outside_error)
    app.add_exception_handler(Exception, _unexpected)


def _http_error(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, StarletteHTTPException)
    status = error.status_code
    if status == 503 and request.url.path.endswith(WEBHOOK):
        status = 500  # Chatwoot sends an agent bot's webhook again after a 429 or a 500 only
    _log_answer(request, status)
    return _problem(status, error.detail, headers=dict(error.headers or {}))


def _invalid_request(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    # Without the input: it may be anything, a secret as well.
    parts = [InvalidPart(part=".".join(map(str, e["loc"])), reason=e["msg"]) for e in error.errors()[:_PARTS_SHOWN]]
    _log_answer(request, 422, *(f"{each.part}: {each.reason}" for each in parts))
    return _problem(422, "The request cannot be used; see 'invalid'.", invalid=parts)


def _outside_error(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, UpstreamError)
    logger.warning("%s", error)
    if isinstance(error, NotFound):
        return _problem(404, "Chatwoot does not have it.")
    if isinstance(error, Busy) or error.retry_after:
        return _problem(
            503, "Chatwoot is busy, try again.", headers={"Retry-After": str(round(error.retry_after) or 1)}
        )
    if isinstance(error, Unanswered):
        return _problem(502, "Whether Chatwoot did it is not known; look before you repeat it.")
    return _problem(502, "Chatwoot did not do it.")


def _unexpected(_: Request, __: Exception) -> ProblemResponse:
    return _problem(500, "Something went wrong here; it is in the log.")


def _log_answer(request: Request, status: int, *reasons: str) -> None:
    # Chatwoot shows nobody the answers to its webhooks: a wrong secret can only be found out here.
    logger.info("%s %a answered %d %a", request.method, request.url.path, status, reasons)


def _problem(
    status: int, detail: str, *, invalid: list[InvalidPart] | None = None, headers: dict[str, str] | None = None
) -> ProblemResponse:
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, invalid=invalid)
    return ProblemResponse(problem.model_dump(exclude_none=True), status_code=status, headers=headers)
