"""saq, at its best: async jobs, ten at a time, and hiredis."""

from typing import Any

from saq import Queue

from peers import peer

queue = Queue.from_url(peer.REDIS_URL)


async def add(_: Any, *, a: int, b: int) -> int:
    return peer.add(a, b)


async def stamp(_: Any, *, sent: float) -> None:
    peer.stamp(sent)


settings = {"queue": queue, "functions": [add, stamp], "concurrency": 10}


async def submit(count: int) -> None:
    await peer.from_tasks(count, lambda: queue.enqueue("add", a=1, b=2))


if __name__ == "__main__":
    peer.main(
        package="saq",
        worker="-m saq peers.saq.settings --quiet",
        finished=("ZCARD", "saq:default:incomplete"),  # this one counts down
        submit=submit,
        send_stamp=lambda: queue.enqueue("stamp", sent=peer.time.time()),
        jobs=4000,
    )
