"""taskiq, at its best: Redis streams, which the documentation of taskiq-redis puts first, uvloop, which it
takes when it is there, messages fetched ahead, and parameters not parsed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from peers import peer

broker = RedisStreamBroker(peer.REDIS_URL).with_result_backend(RedisAsyncResultBackend(peer.REDIS_URL))
WORKER = (
    "-m taskiq worker peers.taskiq:broker --workers 1 --max-async-tasks 10 --max-prefetch 100 --no-parse "
    "--log-level WARNING"
)


@broker.task("add")
async def add(a: int, b: int) -> int:
    return peer.add(a, b)


@broker.task("stamp")
async def stamp(sent: float) -> None:
    peer.stamp(sent)


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    await broker.startup()
    yield
    await broker.shutdown()


async def submit(count: int) -> None:
    await peer.from_tasks(count, lambda: add.kiq(1, 2))


if __name__ == "__main__":
    peer.main(
        package="taskiq",
        worker=WORKER,
        finished=("DBSIZE",),  # a result is a key
        submit=submit,
        send_stamp=lambda: stamp.kiq(peer.time.time()),
        jobs=4000,
        connect=connect,
    )
