"""The ids of Chatwoot's teams by name, kept for a while when the settings say so."""

from __future__ import annotations

import time
from typing import Final

from example_app.clients.chatwoot import Chatwoot, Team
from example_app.settings import get_settings

_SECONDS_PER_HOUR: Final = 3600


class TeamDirectory:
    """Looks teams up by name, in whatever case."""

    def __init__(self) -> None:
        self._teams: list[Team] = []
        self._read_at = float("-inf")

    async def find(self, chatwoot: Chatwoot, name: str) -> Team | None:
        """The team of that name, or None; a name that is not cached is looked for in Chatwoot first.

        Raises:
            UpstreamError: Chatwoot did not answer.
        """
        return (self._is_fresh() and _named(self._teams, name)) or _named(await self.refresh(chatwoot), name)

    async def refresh(self, chatwoot: Chatwoot) -> list[Team]:
        """Read the teams from Chatwoot.

        Raises:
            UpstreamError: Chatwoot did not answer.
        """
        self._teams = await chatwoot.teams()
        self._read_at = time.monotonic()
        return self._teams

    def forget(self) -> None:
        """Have the next ``find`` ask Chatwoot, since a team that was found does not exist (any more)."""
        self._read_at = float("-inf")

    @property
    def names(self) -> list[str]:
        """The teams that Chatwoot listed last."""
        return [team.name for team in self._teams]

    def _is_fresh(self) -> bool:
        settings = get_settings()
        age = time.monotonic() - self._read_at
        return settings.enable_team_cache and age < settings.team_cache_ttl_hours * _SECONDS_PER_HOUR


def _named(teams: list[Team], name: str) -> Team | None:
    return next((team for team in teams if team.name.casefold() == name.casefold()), None)


directory: Final = TeamDirectory()
"""This process's directory."""
