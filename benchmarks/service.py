"""The service with one more handler, `stamp`: it writes down how long ago the job was sent."""

from peers import peer

import jobqueue


@jobqueue.handler("stamp")
async def stamp(sent: float) -> None:
    peer.stamp(sent)


if __name__ == "__main__":
    jobqueue.main()
