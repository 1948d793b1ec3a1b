"""The load: keep-alive clients in a process of their own; prints the successful requests per second."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path


async def client(port: int, path: str, until: float) -> int:
    """Ask for ``path`` again and again until the given time; returns how many answers were 200."""
    request = f"GET {path} HTTP/1.1\r\nHost: benchmark\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = 0
    try:
        while time.perf_counter() < until:
            writer.write(request)
            async with asyncio.timeout(until - time.perf_counter() + 0.001):
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, rest = head.lower().partition(b"content-length: ")
                await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
            answered += head.startswith(b"HTTP/1.1 200")
    except TimeoutError:
        pass  # the time is up
    finally:
        writer.close()
    return answered


async def slow_reader(port: int, path: str) -> None:
    """Ask for a large body and take it at about 60 kB/s, over and over."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n\r\n".encode())
        while await reader.read(3000):  # noqa: ASYNC110  # the pace is what is wanted
            await asyncio.sleep(0.05)
        writer.close()


async def run(arguments: argparse.Namespace) -> float:
    """Requests per second of the fast clients."""
    slow = [asyncio.create_task(slow_reader(arguments.port, "/large")) for _ in range(arguments.slow)]
    if slow:
        await asyncio.sleep(1)  # until all of them are reading
    until = time.perf_counter() + arguments.seconds
    clients = [client(arguments.port, arguments.path, until) for _ in range(arguments.clients)]
    answered = sum(await asyncio.gather(*clients))
    for task in slow:
        task.cancel()
    return answered / float(arguments.seconds)


def main() -> None:
    """Run for the given time and print the rate."""
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--clients", type=int, default=8)  # fewer than a pool keeps open, so that none is opened anew
    parser.add_argument("--slow", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    print(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
