"""huey, at its best: the blocking pop of its RedisHuey, no periodic tasks to look for, and not its threads
but greenlets (`pip install gevent`). Its documentation has all three."""

from huey import RedisHuey

from peers import peer

huey = RedisHuey("bench", url=peer.REDIS_URL)
add = huey.task()(peer.add)
stamp = huey.task()(peer.stamp)
WORKER = "-m huey.bin.huey_consumer peers.huey.huey --workers 10 --no-periodic --quiet --worker-type greenlet"


def submit(count: int) -> None:
    for number in range(count):
        add(number, 1)


if __name__ == "__main__":
    peer.main(
        package="huey",
        worker=WORKER,
        finished=("HLEN", "huey.results.bench"),
        submit=submit,
        send_stamp=lambda: stamp(peer.time.time()),
        jobs=5000,
    )
