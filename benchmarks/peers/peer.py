"""What all peers share: the place of their Redis, the two jobs they run, and one command line.

    python -m peers.NAME describe                what to know of it: {"version": …, "settings": […], …}
    python -m peers.NAME submit WAY COUNT        submit so many jobs in one of its ways → seconds
    python -m peers.NAME submit bulk COUNT SIZE  … of so many jobs in one call
    python -m peers.NAME stamp COUNT             submit so many jobs, one by one, that tell when they started

The ways: `one` awaits each submission before the next, `tasks` has 32 submitters at once, and `bulk` uses the
system's own call for many jobs. A system has the ways that its library has.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

REDIS_URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379")
CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "10"))
SUBMITTERS = 32
STAMP_EVERY_SECONDS = 0.02  # rare enough to find an idle worker


class Setting(NamedTuple):
    """A way to run ten jobs at the same time."""

    label: str
    worker: str  # the arguments of Python that start a worker
    several: bool = False  # whether this is more than one process
    copies: int = 1  # how often the worker is started
    concurrency: int = 10  # what CONCURRENCY is in each


def add(a: int, b: int) -> int:
    """The work that every system does."""
    return a + b


def stamp(sent: float) -> None:
    """Write down how long ago this job was sent. Workers may be many processes: the file is appended to."""
    line = f"{time.time() - sent:.6f}\n".encode()
    file = os.open(os.environ["BENCH_STAMPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def sizes(count: int, most: int) -> list[int]:
    """`count`, cut into pieces of at most `most`."""
    return [min(most, count - start) for start in range(0, count, most)]


async def from_tasks(count: int, submit: Callable[[], Awaitable[Any]]) -> None:
    """Submit `count` jobs from 32 tasks at once."""

    async def submitter(share: int) -> None:
        for _ in range(share):
            await submit()

    shares = [len(range(first, count, SUBMITTERS)) for first in range(SUBMITTERS)]
    await asyncio.gather(*map(submitter, shares))


def main(
    package: str,
    settings: Sequence[Setting],
    finished: tuple[str, ...],
    ways: Mapping[str, Callable[..., Any]],
    send_stamp: Callable[[], Any] | None,
    jobs: int,
    connect: Callable[[], Any] | None = None,
) -> None:
    """The command line of a peer.

    `package`: its name as a package. `settings`: its best ones, for one process and several. `finished`: the
    Redis command whose answer moves by one with each finished job. `ways`: functions of a count, `bulk` also
    of a size. `send_stamp`: submits one `stamp`. `jobs`: about what it runs in two seconds. `connect`: an
    async context manager around all that is submitted.
    """
    command, *words = sys.argv[1:]

    async def submit(way: str, *numbers: int) -> float:
        count, *size = numbers
        await called(ways[way], 1, *size)  # the connection is made, the scripts are loaded
        begun = time.perf_counter()
        await called(ways[way], count - 1, *size)
        return (time.perf_counter() - begun) * count / (count - 1)

    async def stamps(count: int) -> None:
        for _ in range(count):
            await called(send_stamp)
            await asyncio.sleep(STAMP_EVERY_SECONDS)

    async def connected(work: Awaitable[Any]) -> Any:
        if connect is None:
            return await work
        async with connect():
            return await work

    match command:
        case "describe":
            told: Any = {
                "version": importlib.metadata.version(package),
                "settings": [s._asdict() | {"worker": shlex.split(s.worker)} for s in settings],
                "finished": finished,
                "ways": list(ways),
                "stamps": send_stamp is not None,
                "jobs": jobs,
            }
        case "submit":
            told = asyncio.run(connected(submit(words[0], *map(int, words[1:]))))
        case "stamp":
            told = asyncio.run(connected(stamps(int(words[0]))))
        case _:
            sys.exit(f"no such command: {command}")
    print(json.dumps(told))


async def called(function: Any, *arguments: Any) -> None:
    """Call a function that is async, or is not."""
    answer = function(*arguments)
    if inspect.isawaitable(answer):
        await answer
