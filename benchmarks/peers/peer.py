"""What the Python peers share: the place of their Redis, the two jobs that they run, and one command line.

python -m peers.NAME describe        what to know of it: {"version": …, "worker": […], …}
python -m peers.NAME submit COUNT    submit so many jobs, as fast as its library can → seconds
python -m peers.NAME stamp COUNT     submit so many jobs, one by one, that tell when they started
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

REDIS_URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379")
SUBMITTERS = 32
STAMP_EVERY_SECONDS = 0.02  # rare enough to find an idle worker


def add(a: int, b: int) -> int:
    """The work that every system does."""
    return a + b


def stamp(sent: float) -> None:
    """Write down how long ago this job was sent."""
    with open(os.environ["BENCH_STAMPS"], "a") as file:
        file.write(f"{time.time() - sent:.6f}\n")


async def from_tasks(count: int, submit: Callable[[], Awaitable[Any]]) -> None:
    """Submit `count` jobs from 32 tasks at once."""

    async def submitter(share: int) -> None:
        for _ in range(share):
            await submit()

    shares = [len(range(first, count, SUBMITTERS)) for first in range(SUBMITTERS)]
    await asyncio.gather(*map(submitter, shares))


async def called(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that is async, or is not."""
    answer = function(*arguments)
    if inspect.isawaitable(answer):
        await answer


def main(
    package: str,
    worker: str,
    finished: tuple[str, ...],
    submit: Callable[[int], Any],
    send_stamp: Callable[[], Any],
    jobs: int,
    connect: Callable[[], Any] | None = None,
) -> None:
    """The command line of a peer.

    `worker`: the arguments of Python that start a worker. `finished`: the Redis command whose answer moves by
    one with each finished job. `jobs`: about what it runs in two seconds. `connect`: an async context manager
    around all that is submitted.
    """

    async def run(command: str, count: int) -> float:
        await called(submit, 1) if command == "submit" else None  # the connection is made
        begun = time.perf_counter()
        if command == "submit":
            await called(submit, count - 1)
        else:
            for _ in range(count):
                await called(send_stamp)
                await asyncio.sleep(STAMP_EVERY_SECONDS)
        return time.perf_counter() - begun

    async def connected(command: str, count: int) -> float:
        if connect is None:
            return await run(command, count)
        async with connect():
            return await run(command, count)

    if sys.argv[1:] == ["describe"]:
        version = importlib.metadata.version(package)
        print(json.dumps({"version": version, "worker": worker.split(), "finished": finished, "jobs": jobs}))
    else:
        print(asyncio.run(connected(sys.argv[1], int(sys.argv[2]))))
