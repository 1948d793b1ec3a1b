"""A conversation is assigned to a team by its name, whatever is cached of the teams."""

from __future__ import annotations

import httpx
import pytest

from example_app.clients import get_chatwoot
from example_app.clients.chatwoot import Team
from example_app.fakes.chatwoot import FakeChatwoot
from example_app.fakes.faults import Fault
from example_app.teams import TeamDirectory
from tests.example_app.conftest import Configure, Outside


@pytest.fixture
async def chatwoot(outside: Outside) -> FakeChatwoot:
    """Chatwoot with conversation 7, and the teams Support and Sales."""
    outside.chatwoot.conversation(7)
    return outside.chatwoot


async def assign(client: httpx.AsyncClient, team: str) -> httpx.Response:
    """Assign conversation 7 to a team."""
    return await client.post("/api/v1/assign-team/7", json={"team": team})


@pytest.mark.parametrize("cache", ["true", "false"])
async def test_team_by_name(
    client: httpx.AsyncClient, chatwoot: FakeChatwoot, configure: Configure, cache: str
) -> None:
    """A team is found in whatever case, also one that is newer than the cache; an unknown one is a 404 that helps."""
    configure(ENABLE_TEAM_CACHE=cache)
    refreshed = (await client.post("/api/v1/refresh-teams")).json()
    assert refreshed == {"status": "success", "teams": 2, "cache_enabled": cache == "true"}
    answer = (await assign(client, "sALES")).json()
    assert (answer["team"], answer["team_id"]) == ("sALES", 2)
    chatwoot.teams.append({"id": 3, "name": "Returns"})
    assert (await assign(client, "Returns")).json()["team_id"] == 3
    assert chatwoot.conversation(7).team_id == 3
    unknown = await assign(client, "Nobody")
    assert (unknown.status_code, "Sales" in unknown.json()["detail"]) == (404, True)
    for nothing in ("", "None"):
        assert (await assign(client, nothing)).json()["team"] == "None"
    assert chatwoot.conversation(7).team_id == 3


async def test_cached_teams_are_not_asked_for_again(
    client: httpx.AsyncClient, chatwoot: FakeChatwoot, configure: Configure
) -> None:
    """With the cache a known team is assigned although Chatwoot does not tell its teams; without, that is a 502."""
    configure(ENABLE_TEAM_CACHE="true")
    await client.post("/api/v1/refresh-teams")
    chatwoot.faults.add(Fault("GET", "/teams", 500, times=100))
    assert (await assign(client, "Sales")).status_code == 200
    for settings in ({"ENABLE_TEAM_CACHE": "false"}, {"ENABLE_TEAM_CACHE": "true", "TEAM_CACHE_TTL_HOURS": "0"}):
        configure(**settings)
        assert (await assign(client, "Sales")).status_code == 502


async def test_first_look_for_a_team(chatwoot: FakeChatwoot, configure: Configure) -> None:
    """Nothing is cached then."""
    configure(ENABLE_TEAM_CACHE="true")
    directory = TeamDirectory()
    assert directory.names == []
    assert await directory.find(await get_chatwoot(), "sales") == Team(id=2, name="Sales")
    assert directory.names == ["Support", "Sales"]


async def test_cached_team_that_was_deleted(
    client: httpx.AsyncClient, chatwoot: FakeChatwoot, configure: Configure
) -> None:
    """It is looked for again, since it may have been made anew; if not, it is a 404, and the team is gone."""
    configure(ENABLE_TEAM_CACHE="true")
    await client.post("/api/v1/refresh-teams")
    chatwoot.teams = [{"id": 3, "name": "Support"}]
    answer = (await assign(client, "Support")).json()
    assert (answer["team_id"], answer["result"], chatwoot.conversation(7).team_id) == (3, chatwoot.teams[0], 3)
    chatwoot.teams.clear()
    assert (await assign(client, "Support")).status_code == 404
    assert chatwoot.conversation(7).team_id is None
