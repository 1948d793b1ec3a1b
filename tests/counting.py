"""How often a client waits for PostgreSQL: a TCP proxy that counts round trips."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from sqlalchemy import URL


class CountingProxy:
    """Stands before a PostgreSQL server; a round trip is that the client sent something and the server answered.

    Parameters:
        server: URL of the server.
    """

    def __init__(self, server: URL) -> None:
        self.round_trips = 0
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = selectors.DefaultSelector()
        self._sockets.register(self._listener, selectors.EVENT_READ)
        self._stopped = False
        self._client_spoke_last: set[socket.socket] = set()  # by the client's socket
        self._port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> URL:
        """The server's database, through the proxy; nothing is negotiated before the session starts."""
        url = self._server.set(host="127.0.0.1", port=self._port).difference_update_query(["host", "port"])
        return url.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})

    def serve(self) -> None:
        """Pass everything on until ``stop`` is called; then end every connection."""
        while not self._stopped:
            for key, _ in self._sockets.select(timeout=0.05):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._pass_on(*key.data)
        for key in list(self._sockets.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._sockets.close()

    def stop(self) -> None:
        """Let ``serve`` return, soon."""
        self._stopped = True

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        directory = self._server.query.get("host")
        if isinstance(directory, str) and directory.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{directory}/.s.PGSQL.{self._server.query.get('port') or self._server.port or 5432}")
        else:
            server = socket.create_connection((self._server.host or "127.0.0.1", self._server.port or 5432))
        self._sockets.register(client, selectors.EVENT_READ, (client, client, server))
        self._sockets.register(server, selectors.EVENT_READ, (client, server, client))

    def _pass_on(self, client: socket.socket, source: socket.socket, target: socket.socket) -> None:
        if source.fileno() < 0:
            return  # the other end's closing, seen in the same turn, closed both
        try:
            data = source.recv(65_536)
            if source is not client:
                self._client_spoke_last.discard(client)
            elif data and client not in self._client_spoke_last:
                self._client_spoke_last.add(client)
                self.round_trips += 1
            target.sendall(data)
        except ConnectionError:  # the process at that end was killed
            data = b""
        if not data:
            for end in (source, target):
                self._sockets.unregister(end)
                end.close()


@contextmanager
def counting_proxy(server: URL) -> Iterator[CountingProxy]:
    """A proxy that serves on a thread of its own."""
    proxy = CountingProxy(server)
    thread = Thread(target=proxy.serve)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
