"""arq, at its best: a short `poll_delay`, since it polls, and with the default of 0.5 s mostly sleeps."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

from peers import peer

pool: ArqRedis
WORKER = "-m arq peers.arq.WorkerSettings"


async def add(_: Any, a: int, b: int) -> int:
    return peer.add(a, b)


async def stamp(_: Any, sent: float) -> None:
    peer.stamp(sent)


class WorkerSettings:
    functions = (add, stamp)
    redis_settings = RedisSettings.from_dsn(peer.REDIS_URL)
    max_jobs = peer.CONCURRENCY
    poll_delay = 0.005
    log_results = False


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    global pool
    pool = await create_pool(WorkerSettings.redis_settings)
    yield
    await pool.aclose()


async def one(count: int) -> None:
    for number in range(count):
        await pool.enqueue_job("add", number, 1)


async def tasks(count: int) -> None:
    await peer.from_tasks(count, lambda: pool.enqueue_job("add", 1, 2))


if __name__ == "__main__":
    peer.main(
        package="arq",
        settings=[
            peer.Setting("10 tasks", WORKER),
            peer.Setting("2 processes of 5 tasks", WORKER, several=True, copies=2, concurrency=5),
        ],
        finished=("ZCARD", "arq:queue"),  # this one counts down
        ways={"one": one, "tasks": tasks},
        send_stamp=lambda: pool.enqueue_job("stamp", peer.time.time()),
        jobs=2500,
        connect=connect,
    )
