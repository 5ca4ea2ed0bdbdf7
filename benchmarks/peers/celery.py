"""celery, at its best: a large prefetch, as its optimizing guide has it for short tasks, and no talk between
workers; ten threads, or its ten processes."""

from celery import Celery

from peers import peer

app = Celery("bench", broker=peer.REDIS_URL, backend=peer.REDIS_URL)
app.conf.update(worker_prefetch_multiplier=128)
add = app.task(peer.add)
stamp = app.task(peer.stamp)
QUIET = "--without-gossip --without-mingle --without-heartbeat --loglevel ERROR"
WORKER = f"-m celery -A peers.celery worker --concurrency 10 {QUIET} --pool"


def one(count: int) -> None:
    for number in range(count):
        add.delay(number, 1)


if __name__ == "__main__":
    peer.main(
        package="celery",
        settings=[
            peer.Setting("10 threads", f"{WORKER} threads"),
            peer.Setting("10 processes", f"{WORKER} prefork", several=True),
        ],
        finished=("DBSIZE",),  # a result is a key
        ways={"one": one},
        send_stamp=lambda: stamp.delay(peer.time.time()),
        jobs=2000,
    )
