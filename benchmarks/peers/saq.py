"""saq, at its best: async jobs, hiredis, and `--workers` for several processes."""

from typing import Any

from saq import Queue

from peers import peer

queue = Queue.from_url(peer.REDIS_URL)


async def add(_: Any, *, a: int, b: int) -> int:
    return peer.add(a, b)


async def stamp(_: Any, *, sent: float) -> None:
    peer.stamp(sent)


settings = {"queue": queue, "functions": [add, stamp], "concurrency": peer.CONCURRENCY}
WORKER = "-m saq peers.saq.settings --quiet"


async def one(count: int) -> None:
    for number in range(count):
        await queue.enqueue("add", a=number, b=1)


async def tasks(count: int) -> None:
    await peer.from_tasks(count, lambda: queue.enqueue("add", a=1, b=2))


if __name__ == "__main__":
    peer.main(
        package="saq",
        settings=[
            peer.Setting("10 tasks", WORKER),
            peer.Setting("2 processes of 5 tasks", f"{WORKER} --workers 2", several=True, concurrency=5),
        ],
        finished=("ZCARD", "saq:default:incomplete"),  # this one counts down
        ways={"one": one, "tasks": tasks},
        send_stamp=lambda: queue.enqueue("stamp", sent=peer.time.time()),
        jobs=3500,
    )
