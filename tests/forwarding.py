"""A way to the database that is not there before it is opened, and may fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sqlalchemy import make_url

from tests.serving import free_socket


class Forwarder:
    """A port that leads to the real database, once it is opened."""

    def __init__(self, database_url: str, host: str = "127.0.0.1") -> None:
        self._target = make_url(database_url)
        self._host = host
        with free_socket() as listener:
            self.port: int = listener.getsockname()[1]
        url = self._target.difference_update_query(["host", "port"]).set(host=host, port=self.port)
        self.url = url.render_as_string(hide_password=False)
        self._forwarded: list[asyncio.Task[None]] = []
        self._silent = False
        self.swallowed = asyncio.Event()
        """Set when the silence has met somebody."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self._accept, self._host, self.port):
            try:
                yield
            finally:
                if self.swallowed.is_set():
                    self._end_all()
                await asyncio.gather(*self._forwarded, return_exceptions=True)

    def fall_silent(self) -> None:
        """From now on accept everything, new connections too, and pass nothing on, not even an end."""
        self._silent = True

    def speak_again(self) -> None:
        """Serve those who connect from now on; what has met the silence is over."""
        self._end_all()
        self._silent = False

    def _end_all(self) -> None:
        for each in self._forwarded:
            each.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._forwarded.append(asyncio.create_task(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, downstream = await self._connect()
            try:
                await asyncio.gather(self._copy(reader, downstream), self._copy(upstream, writer))
            finally:
                downstream.close()
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if directory := self._target.query.get("host"):
            socket = f"{directory}/.s.PGSQL.{self._target.port or 5432}"
            return await asyncio.open_unix_connection(socket)
        host = self._target.host or "localhost"
        return await asyncio.open_connection(host, self._target.port or 5432)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._silent:
                    self.swallowed.set()
                else:
                    writer.write(data)
            if not self._silent:
                writer.close()
                await writer.wait_closed()
