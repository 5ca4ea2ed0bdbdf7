"""The Redis limit: the service's own Lua in redis-py pipelines, on one connection, with no service around it.

It has the command line of the peers, and one more: `python -m limits.pipeline work`. What the scripts take
and return stands beside them in `jobqueue.SCRIPTS`; when that changes, this must.
"""

from __future__ import annotations

import json
import sys
import uuid
from typing import Any

import redis
from peers import peer

import jobqueue

PREFIX = "{jobqueue}:"
LEASE_MS = 15_000
NO_REPORT = ["", "", "", "", "", "", 0, 0]
client = redis.Redis.from_url(peer.REDIS_URL, decode_responses=True)


def script(name: str) -> Any:
    return client.register_script(
        "\n".join([jobqueue.LUA_CLOCK, jobqueue.LUA_COMMON, jobqueue.SCRIPTS[name]])
    )


def math_jobs(count: int) -> list[str | int]:
    """The arguments of `submit`: no idempotency key, nothing to keep, no message; then the jobs."""
    arguments: list[str | int] = ["", "", 1]
    for _ in range(count):
        arguments += [str(uuid.uuid4()), "math", '{"a": 1, "b": 2}', 3, "300.0", 0]
    return arguments


def one(count: int) -> None:
    submit = script("submit")
    for _ in range(count):
        submit([PREFIX], math_jobs(1))


def tasks(count: int) -> None:
    """As many to a round trip as 32 submitters would have under way."""
    submit = script("submit")
    for some in peer.sizes(count, peer.SUBMITTERS):
        pipe = client.pipeline(transaction=False)
        for _ in range(some):
            submit([PREFIX], math_jobs(1), pipe)
        pipe.execute()


def bulk(count: int, size: int) -> None:
    submit = script("submit")
    for some in peer.sizes(count, size):
        submit([PREFIX], math_jobs(some))


def work() -> None:
    """Ten jobs in hand. A round trip reports them and claims the next ten; in between they are run."""
    report = script("report")
    held: list[tuple[str, list[Any]]] = []  # token, claim
    number = 0
    while True:
        pipe = client.pipeline(transaction=False)
        tokens = []
        for slot in range(peer.CONCURRENCY):
            number += 1
            tokens.append(f"limit/{slot}:{number}")
            reported = NO_REPORT
            if slot < len(held):
                token, (_, job_id, _, payload, attempts, *_) = held[slot]
                result = json.dumps(peer.add(**json.loads(payload)))
                reported = [job_id, token, "complete", result, "", "", attempts, 0]
            report([PREFIX], [*reported, tokens[slot], LEASE_MS], pipe)
        claims: list[Any] = [claim for _, claim in pipe.execute()]
        held = [(token, job) for token, job in zip(tokens, claims, strict=True) if job]


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    peer.main(
        package="redis",
        settings=[peer.Setting("10 jobs to a round trip", "-m limits.pipeline work")],
        finished=("ZCARD", f"{PREFIX}completed"),
        ways={"one": one, "tasks": tasks, "bulk": bulk},
        send_stamp=None,
        jobs=40_000,
    )
