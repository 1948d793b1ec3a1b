"""The load: keep-alive clients in a process of their own; prints how many were answered 200, and the seconds."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path


async def client(port: int, paths: Iterator[str], until: float) -> tuple[int, int]:
    """Ask for the next of the paths until the given time; returns how many answers were 200, and how many not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = refused = 0
    try:
        while time.perf_counter() < until:
            writer.write(f"GET {next(paths)} HTTP/1.1\r\nHost: benchmark\r\n\r\n".encode())
            async with asyncio.timeout(until - time.perf_counter() + 0.001):
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, rest = head.lower().partition(b"content-length: ")
                await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
            good = head.startswith(b"HTTP/1.1 200")
            answered, refused = answered + good, refused + (not good)
    except TimeoutError:
        pass  # the time is up
    finally:
        writer.close()
    return answered, refused


async def slow_reader(port: int, path: str) -> None:
    """Ask for a large body and take it at about 60 kB/s, over and over."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n\r\n".encode())
        while await reader.read(3000):  # noqa: ASYNC110  # the pace is what is wanted
            await asyncio.sleep(0.05)
        writer.close()


async def run(arguments: argparse.Namespace) -> tuple[int, int]:
    """How many requests of the fast clients were answered 200, and how many were not."""
    slow = [asyncio.create_task(slow_reader(arguments.port, "/large")) for _ in range(arguments.slow)]
    if slow:
        await asyncio.sleep(1)  # until all of them are reading
    until = time.perf_counter() + arguments.seconds
    paths = itertools.cycle(arguments.paths)
    clients = [client(arguments.port, paths, until) for _ in range(arguments.clients)]
    counts = await asyncio.gather(*clients)
    for task in slow:
        task.cancel()
    return sum(answered for answered, _ in counts), sum(refused for _, refused in counts)


def main() -> None:
    """Run for the given time and report."""
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("paths", nargs="+")
    for option in ("--clients", "--slow", "--seconds"):
        parser.add_argument(option, type=int, required=True)
    arguments = parser.parse_args()
    answered, refused = asyncio.run(run(arguments))
    print("answered", answered, "refused", refused, "seconds", arguments.seconds)


if __name__ == "__main__":
    main()
