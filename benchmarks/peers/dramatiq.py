"""dramatiq, at its best: ten threads, or two processes of five. Results are kept as its guide shows."""

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from peers import peer

broker = RedisBroker(url=peer.REDIS_URL)
broker.add_middleware(Results(backend=RedisBackend(url=peer.REDIS_URL), store_results=True))
dramatiq.set_broker(broker)
add = dramatiq.actor(peer.add)
stamp = dramatiq.actor(peer.stamp)
WORKER = "-m dramatiq peers.dramatiq"


def one(count: int) -> None:
    for number in range(count):
        add.send(number, 1)


if __name__ == "__main__":
    peer.main(
        package="dramatiq",
        settings=[
            peer.Setting("10 threads", f"{WORKER} --processes 1 --threads 10"),
            peer.Setting("2 processes of 5 threads", f"{WORKER} --processes 2 --threads 5", several=True),
        ],
        finished=("DBSIZE",),  # a result is a key
        ways={"one": one},
        send_stamp=lambda: stamp.send(peer.time.time()),
        jobs=3500,
    )
