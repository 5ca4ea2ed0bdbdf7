"""rq, at its best: a pool of ten of its SimpleWorkers, which do not fork for every job, and `enqueue_many`.

A worker of rq runs one job at a time, so there is no setting of one process.
"""

from redis import Redis
from rq import Queue

from peers import peer

queue = Queue(connection=Redis.from_url(peer.REDIS_URL))


def one(count: int) -> None:
    for number in range(count):
        queue.enqueue(peer.add, number, 1)


def bulk(count: int, size: int) -> None:
    for some in peer.sizes(count, size):
        queue.enqueue_many([Queue.prepare_data(peer.add, (number, 1)) for number in range(some)])


if __name__ == "__main__":
    peer.main(
        package="rq",
        settings=[
            peer.Setting(
                "10 SimpleWorkers",
                f"-m rq.cli worker-pool -n 10 -w rq.worker.SimpleWorker -q -u {peer.REDIS_URL}",
                several=True,
            )
        ],
        finished=("ZCARD", "rq:finished:default"),
        ways={"one": one, "bulk": bulk},
        send_stamp=lambda: queue.enqueue(peer.stamp, peer.time.time()),
        jobs=1200,
    )
