"""The demo: PostgreSQL out of a wheel, Chatdify's processes, a conversation of five messages, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, chdir, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from example_app.db import db
from example_app.demo.stack import Stack, chatdify
from example_app.demo.story import CONVERSATION, tell
from example_app.settings import Settings
from fastapi_chatdify_db import DatabaseSettings
from fastapi_chatdify_db.embedded import embedded_postgres

_URLS = """
  Dialogues, live     {url}/
  API documentation   {url}/docs
  Health              {url}/api/v1/health

  One more message of the customer:
  curl -X POST '{url}/api/v1/chatwoot-webhook?secret={secret}' -H 'content-type: application/json' -d '{message}'
  What the database has about the conversation:
  curl {url}/api/v1/dialogue-info/{conversation} -H 'Authorization: Bearer {token}'

  Stop: Ctrl-C
"""
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_SETTINGS = {"HTTPX_READ_TIMEOUT": "10", "CELERY_RETRY_COUNTDOWN": "1"}
_MESSAGE = (
    '{"event": "message_created", "id": 1, "content": "One more question", "message_type": "incoming", '
    '"conversation": {"id": 7, "status": "pending"}}'
)


def main() -> None:
    """Run the demo until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        SystemExit: 1, with a line on standard error: the port is taken.
    """
    parser = argparse.ArgumentParser(prog="example_app", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="of the web process; 0 takes a free one")
    port: int = parser.parse_args().port
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError):
        parser.exit(1, f"Port {port} is taken or not yours; a free one: .venv/bin/python -m example_app --port 0\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    for number in _TERMINATING:
        signal.signal(number, _end_as_by_ctrl_c)
    console = Console(highlight=False)
    with (
        suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory() as directory,
        chdir(directory),  # the settings read the .env of the working directory, and so do those of the processes
        _postgres(Path(directory)) as url,
    ):
        console.print(f"[bold]PostgreSQL[/]  {url}", soft_wrap=True)
        asyncio.run(_run(console, Path(directory), url, port))
    console.print("Stopped.")


def _end_as_by_ctrl_c(_: int, __: object) -> None:
    # Once: make, in the same process group, passes its SIGTERM on; a second one would cut short our clean-up.
    for number in _TERMINATING:
        signal.signal(number, signal.SIG_IGN)
    signal.raise_signal(signal.SIGINT)


async def _run(console: Console, directory: Path, database_url: str, port: int) -> None:
    db.settings = DatabaseSettings(database_url=database_url)
    broker_url = Settings().celery_broker_url
    async with chatdify(directory, database_url, broker_url, port, _SETTINGS) as stack:
        console.print(f"[bold]Chatwoot[/]    {stack.chatwoot_url} (fake)")
        console.print(f"[bold]Dify[/]        {stack.dify_url} (fake)")
        async with stack.web(), AsyncExitStack() as workers:
            console.print(f"[bold]Web[/]         {stack.url}\n[bold]Worker[/]      2 processes\n")
            await tell(stack, console, workers)
            _print_urls(console, stack)
            await asyncio.Event().wait()


def _print_urls(console: Console, stack: Stack) -> None:
    urls = _URLS.format(
        url=stack.url,
        secret=stack.secrets.webhook,
        token=stack.secrets.api_token,
        conversation=CONVERSATION,
        message=_MESSAGE,
    )
    console.print(urls, markup=False, soft_wrap=True)


@contextmanager
def _postgres(directory: Path) -> Iterator[str]:
    """The PostgreSQL of DATABASE_URL, or one out of a wheel."""
    given = DatabaseSettings().database_url
    if given is not None:
        yield given
        return
    with embedded_postgres(directory / "postgresql") as url:
        yield url
