"""streaq, at its best: asyncio on uvloop, no line in the log for a job, `enqueue_many`, and `--workers`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from streaq import Worker

from peers import peer

worker = Worker(redis_url=peer.REDIS_URL, concurrency=peer.CONCURRENCY, anyio_kwargs={"use_uvloop": True})
WORKER = "-m streaq run peers.streaq:worker"


@worker.task(silent=True)
async def add(a: int, b: int) -> int:
    return peer.add(a, b)


@worker.task(silent=True)
async def stamp(sent: float) -> None:
    peer.stamp(sent)


@asynccontextmanager
async def connect() -> AsyncIterator[None]:
    async with worker:
        yield


async def submit() -> None:
    await add.enqueue(1, 2)


async def one(count: int) -> None:
    for _ in range(count):
        await submit()


async def tasks(count: int) -> None:
    await peer.from_tasks(count, submit)


async def bulk(count: int, size: int) -> None:
    for some in peer.sizes(count, size):
        await worker.enqueue_many([add.enqueue(number, 1) for number in range(some)])


async def send_stamp() -> None:
    await stamp.enqueue(peer.time.time())


if __name__ == "__main__":
    peer.main(
        package="streaq",
        settings=[
            peer.Setting("10 tasks", WORKER),
            peer.Setting("2 processes of 5 tasks", f"{WORKER} --workers 2", several=True, concurrency=5),
        ],
        finished=("ZCARD", "streaq:default:index:results"),
        ways={"one": one, "tasks": tasks, "bulk": bulk},
        send_stamp=send_stamp,
        jobs=3000,
        connect=connect,
    )
