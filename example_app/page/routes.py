"""``GET /``, and ``GET /dialogues``: the part of the page that its script reloads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy import func, select
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from example_app.db import db
from example_app.db.models import Dialogue, Message, MessageState
from example_app.tasks import STEPS

DIALOGUES_SHOWN: Final = 20
MESSAGES_SHOWN: Final = 50
"""The latest of each dialogue."""

HEADERS: Final = {
    # Messages are written by strangers. They are escaped; if one were not, nothing in it would run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_HERE: Final = Path(__file__).parent
_templates: Final = Jinja2Templates(
    env=Environment(loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined)
)

router: Final = APIRouter(include_in_schema=False)


def init_app(app: FastAPI) -> None:
    """Serve the page at ``/``. It asks for no token: for development only."""
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=_HERE / "static"), name="page")


@dataclass(frozen=True)
class Overview:
    """What the page shows.

    Parameters:
        states: How many messages are in each state that occurs, all dialogues taken together.
        dialogues: The latest to change, each with its latest messages, oldest first.
    """

    states: dict[MessageState, int]
    dialogues: list[tuple[Dialogue, list[Message]]]


@router.get("/")
async def page(request: Request) -> Response:
    """The whole page, which shows everything without its script as well."""
    return await _rendered(request, "page.html")


@router.get("/dialogues")
async def dialogues(request: Request) -> Response:
    """The part of the page that changes."""
    return await _rendered(request, "dialogues.html")


async def _rendered(request: Request, template: str) -> Response:
    tasks = {state: task.name.removeprefix("chatdify.") for state, (task, _) in STEPS.items()}
    context = {"overview": await _overview(), "tasks": tasks, "shown": (DIALOGUES_SHOWN, MESSAGES_SHOWN)}
    return _templates.TemplateResponse(request, template, context, headers=HEADERS)


async def _overview() -> Overview:
    counted = await db.session.execute(select(Message.state, func.count()).group_by(Message.state))
    counts = dict(counted.all())
    latest = select(Dialogue).order_by(Dialogue.updated_at.desc(), Dialogue.id.desc()).limit(DIALOGUES_SHOWN)
    found = (await db.session.scalars(latest)).all()
    messages = await _latest_messages([dialogue.id for dialogue in found])
    return Overview(
        states={state: counts[state] for state in MessageState if state in counts},
        dialogues=[(dialogue, messages[dialogue.id]) for dialogue in found],
    )


async def _latest_messages(dialogue_ids: list[int]) -> defaultdict[int, list[Message]]:
    rank = func.row_number().over(partition_by=Message.dialogue_id, order_by=Message.id.desc())
    ranked = select(Message.id, rank.label("rank")).where(Message.dialogue_id.in_(dialogue_ids)).subquery()
    query = select(Message).join(ranked, ranked.c.id == Message.id).where(ranked.c.rank <= MESSAGES_SHOWN)
    messages: defaultdict[int, list[Message]] = defaultdict(list)
    for message in await db.session.scalars(query.order_by(Message.id)):
        messages[message.dialogue_id].append(message)
    return messages
