"""Whatever fits the OpenAPI document, and what does not, is answered as documented and never with a 5xx."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from example_app.fakes.chatwoot import FakeChatwoot
from example_app.fakes.serving import served
from example_app.main import create_app
from fastapi_chatdify_db import db
from tests.example_app.conftest import API_TOKEN, WEBHOOK_SECRET, Configure
from tests.serving import free_socket

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance, content_type_conformance]


@pytest.fixture
def api(configure: Configure) -> Iterator[schemathesis.BaseSchema]:
    """The application and a Chatwoot on another thread's event loop, and the schema that it publishes."""
    ready, stop, urls = threading.Event(), threading.Event(), []

    async def run() -> None:
        chatwoot = FakeChatwoot("chatwoot-key", "http://127.0.0.1:9/nobody-listens", None, "chatwoot-admin-key")
        for number in range(1, 8):
            chatwoot.conversation(number)
        with free_socket() as listener:
            async with served(chatwoot.app) as chatwoot_url:
                configure(CHATWOOT_API_URL=f"{chatwoot_url}/api/v1", ENVIRONMENT="development")
                server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None))
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                while not server.started:
                    await asyncio.sleep(0.01)
                urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
                ready.set()
                await asyncio.to_thread(stop.wait)
                server.should_exit = True
                await serving
            await chatwoot.close()
            await db.drop_tables()
            await db.dispose()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    ready.wait(30)
    yield schemathesis.openapi.from_url(f"{urls[0]}/openapi.json")
    stop.set()
    thread.join()


def test_answers_are_as_documented(api: schemathesis.BaseSchema) -> None:
    """No generated request, to any operation, gets a 5xx or an answer that the document does not have."""
    operations = [result.ok() for result in api.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) >= 14
    for operation in operations:
        strategies = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

        # The same requests in every run, so that no change fails for what another one did.
        @settings(
            max_examples=20,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=one_of(strategies))
        def answers_as_documented(case: schemathesis.Case[Any]) -> None:
            parameters = {"secret": WEBHOOK_SECRET} if case.path.endswith("/chatwoot-webhook") else None
            headers = {"Authorization": f"Bearer {API_TOKEN}"}
            case.call_and_validate(checks=CHECKS, headers=headers, params=parameters)

        answers_as_documented()
