"""The promises under faults: real processes and a real Redis, broken as their users' machines break them.

Leases are short by setting. Nothing here sleeps to wait: it looks until it sees. A longer soak is

    SOAK_ROUNDS=1000 .venv/bin/python -m pytest test_faults.py -k random
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import fakeredis
import hypothesis
import pytest
import redis
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import jobqueue
from conftest import (
    MODULE,
    PATIENCE_SECONDS,
    PREFIX,
    Bench,
    Program,
    RedisServer,
    eventually,
    free_port,
    memory_transport,
    missing,
)
from jobqueue import COMMANDS, AutoPipeline, Claim, NewJob, RedisConnection, Report, Store, Transport

Start = Callable[..., Program]
OwnRedis = Callable[..., RedisServer]
SOAK = "SOAK_ROUNDS" in os.environ  # look for what is new, too
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "30"))
LEASE = ("--lease-seconds", "2")

SERVICE = """
import os, signal, time
import redis, trio
import jobqueue

client = redis.Redis.from_url(os.environ.get("DIRECT_URL") or os.environ["REDIS_URL"])
jobqueue.EXIT_SECONDS = 3.0  # a pause of the machine must not cut a release short
time.time = lambda clock=time.time, skew=float(os.environ.get("SKEW", "0")): clock() + skew

@jobqueue.handler("append")
async def append(value: int) -> int:
    client.rpush("appended", value)
    return value

@jobqueue.handler("suicide")
async def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

@jobqueue.handler("block")
async def block(seconds: float = 60) -> None:
    "Stops the event loop, until it runs a second time elsewhere."
    if client.incr("blocks") > 1:
        return
    give_up = time.monotonic() + seconds
    while client.get("blocks") == b"1" and time.monotonic() < give_up:
        time.sleep(0.05)

@jobqueue.handler("gate")
async def gate(name: str) -> str:
    "Waits until the test lets it go on; who it was is its result."
    client.rpush("arrived", name)
    try:
        while not client.get("open:" + name):
            await trio.sleep(0.02)
    finally:
        client.rpush("left", name)
    return str(os.getpid())

@jobqueue.handler("thread")
def thread(seconds: float) -> None:
    time.sleep(seconds)

jobqueue.main()
"""


@pytest.fixture
def service(start: Start, tmp_path: Path) -> Start:
    """Starts the program with the handlers above, and short leases."""
    module = tmp_path / "service.py"
    module.write_text(SERVICE)

    def launch(url: str, *flags: str, **settings: str) -> Program:
        environ = {"REDIS_URL": url, "PYTHONPATH": str(Path(__file__).parent)} | settings
        return start(*LEASE, *flags, module=module, **environ)

    return launch


SNAPSHOT = """
local function read(command, place, ...) return redis.call(command, KEYS[1] .. place, ...) end
local jobs = {}
for i, id in ipairs(read('ZRANGE', 'history', 0, -1)) do jobs[i] = {id, read('HGETALL', 'job:' .. id)} end
local queue = {}
for _, id in ipairs(read('LRANGE', 'queue', 0, -1)) do
  if read('SISMEMBER', 'withdrawn', id) == 0 then queue[#queue + 1] = id end  -- not cancelled
end
return {jobs, #redis.call('KEYS', KEYS[1] .. 'job:*'),
  queue, read('ZRANGE', 'delayed', 0, -1), read('ZRANGE', 'processing', 0, -1),
  read('ZRANGE', 'completed', 0, -1), read('ZRANGE', 'failed', 0, -1)}
"""


def check(client: Any, ids: set[str] | None = None) -> dict[str, dict[str, str]]:
    """Every job is whole and in exactly one place, which its status names; the jobs, by id."""
    rows, count, *members = client.eval(SNAPSHOT, 1, PREFIX)
    jobs = {job_id: dict(zip(values[::2], values[1::2], strict=True)) for job_id, values in rows}
    places = Counter(itertools.chain(*members))
    assert max(places.values(), default=1) == 1, [job for job, count in places.items() if count > 1]
    assert set(places) == jobs.keys()
    assert len(jobs) == count
    for status, place in zip(
        ["pending", "pending", "processing", "completed", "failed"], members, strict=True
    ):
        assert {jobs[job_id]["status"] for job_id in place} <= {status}
    for job_id, job in jobs.items():
        assert {"job_type", "payload", "max_retries", "timeout", "created_at"} <= job.keys(), job_id
        assert int(job["attempts"]) <= int(job["max_retries"]) + 1
    if ids is not None:
        assert ids <= jobs.keys(), f"lost: {ids - jobs.keys()}"
    return jobs


def all_completed(client: Any, ids: set[str]) -> dict[str, dict[str, str]]:
    """Wait until nothing is left to do; then every job is completed, and `ids` are among them."""

    def ended() -> dict[str, dict[str, str]] | None:
        pipe = client.pipeline()  # one look: a job may go back to a place that was looked at
        pipe.llen(PREFIX + "queue")
        pipe.zcard(PREFIX + "delayed")
        pipe.zcard(PREFIX + "processing")
        if any(pipe.execute()):
            return None
        jobs = check(client, ids)
        return jobs if {job["status"] for job in jobs.values()} <= {*jobqueue.FINISHED} else None

    jobs: dict[str, dict[str, str]] = eventually(ended, "all jobs are done")
    assert not (failed := [job for job in jobs.values() if job["status"] == "failed"]), failed
    return jobs


class Client(threading.Thread):
    """Submits `append` jobs one after the other, and remembers which were answered 202."""

    def __init__(self, port: Callable[[], int], pause: float = 0.002) -> None:
        super().__init__(daemon=True)
        self.port, self.pause = port, pause
        self.accepted: set[str] = set()
        self.refused: Counter[int] = Counter()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        for value in itertools.count():
            if self.done.wait(self.pause):
                return
            body = {"job_type": "append", "payload": {"value": value}, "max_retries": 100}
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                status, answer = post(self.port(), body)
                if status == 202:
                    self.accepted.add(answer["id"])
                else:
                    self.refused[status] += 1

    def go_on(self, count: int) -> None:
        """Wait until so many more were accepted."""
        enough = len(self.accepted) + count
        eventually(lambda: len(self.accepted) >= enough, f"{count} more jobs are accepted")

    def finish(self) -> set[str]:
        self.done.set()
        self.join()
        assert self.accepted
        return self.accepted


def post(port: int, body: Any, timeout: float = 30) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", "/job", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def arrived(client: Any, count: int) -> list[str]:
    """The names at the gate, once there are so many."""
    return list(eventually(lambda: (names := client.lrange("arrived", 0, -1))[count - 1 :] and names))


# ── Processes that die or freeze ────────────────────────────────────────────────────────────────


def test_a_job_of_a_killed_process_is_run_by_another_one(service: Start, redis_server: RedisServer) -> None:
    client = redis_server.client
    first, second = service(redis_server.url), service(redis_server.url, "--workers", "0")
    job_id = second.submit("gate", name="a")
    arrived(client, 1)
    third = service(redis_server.url)
    first.kill()
    killed = time.monotonic()
    arrived(client, 2)
    assert time.monotonic() - killed < 30
    client.set("open:a", 1)
    job = second.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 2, str(third.process.pid))
    gone = f"{job_id}: its worker is gone"
    eventually(lambda: third.logged(gone) or second.logged(gone))
    check(client)


def test_a_job_of_a_killed_process_is_run_at_the_next_start(
    service: Start, redis_server: RedisServer
) -> None:
    first = service(redis_server.url)
    job_id = first.submit("gate", name="a")
    arrived(redis_server.client, 1)
    first.kill()
    redis_server.client.set("open:a", 1)
    job = service(redis_server.url).ended(job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2)


def test_kills_at_random_moments_lose_nothing(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url)
    submitting = Client(lambda: program.port)
    for _ in range(ROUNDS):
        submitting.go_on(random.randrange(40))
        program.kill()
        program = service(redis_server.url)
    accepted = submitting.finish()
    all_completed(redis_server.client, accepted)
    assert program.stop() == 0


def test_a_job_that_kills_its_process_fails_in_the_end_and_the_queue_goes_on(
    service: Start, redis_server: RedisServer
) -> None:
    program = service(redis_server.url)
    new = {"job_type": "suicide", "payload": {}, "max_retries": 2, "delay": 0.1}  # not before the answer
    job_id = program.call("POST", "/job", new)[1]["id"]
    starts = 1
    while status_of(redis_server, job_id) != "failed":
        if program.process.poll() is not None:
            program = service(redis_server.url)
            starts += 1
        time.sleep(0.01)
    assert starts == 4  # three that the job killed, and the one that gave it up
    job = program.job(job_id)
    assert (job["attempts"], "worker died" in job["error"]) == (3, True)
    assert program.ended(program.submit("append", value=1))["status"] == "completed"


def status_of(server: RedisServer, job_id: str) -> str:
    return str(server.client.hget(f"{PREFIX}job:{job_id}", "status"))


def test_a_process_frozen_past_its_lease_can_change_nothing(
    service: Start, redis_server: RedisServer
) -> None:
    client = redis_server.client
    frozen = service(redis_server.url)
    job_id = frozen.submit("gate", name="a")
    arrived(client, 1)
    frozen.process.send_signal(signal.SIGSTOP)
    other = service(redis_server.url)
    arrived(client, 2)
    frozen.process.send_signal(signal.SIGCONT)
    eventually(lambda: frozen.logged(f"{job_id}: .* on request, or its lease was lost"))
    eventually(
        lambda: frozen.logged("the event loop stood still for .*: the process was frozen, or a handler slept")
    )
    assert client.lrange("left", 0, -1) == ["a"]  # the frozen one's `finally` ran, the other still runs
    client.set("open:a", 1)
    job = other.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 2, str(other.process.pid))
    check(client)


def test_a_handler_that_blocks_the_event_loop_loses_its_job_and_is_named(
    service: Start, redis_server: RedisServer
) -> None:
    blocked, api = service(redis_server.url), service(redis_server.url, "--workers", "0")
    job_id = api.submit("block")
    eventually(lambda: status_of(redis_server, job_id) == "processing")
    other = service(redis_server.url)
    assert other.ended(job_id)["attempts"] == 2
    eventually(lambda: blocked.logged(r"the event loop stood still for \d.* block"))
    eventually(lambda: blocked.logged(f"{job_id}: report refused: too late, or sent twice"))
    assert check(redis_server.client)[job_id]["attempts"] == "2"


# ── Redis that dies, freezes, forgets or is full ────────────────────────────────────────────────

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def test_redis_killed_under_load_loses_nothing_that_was_answered(service: Start, own_redis: OwnRedis) -> None:
    server = own_redis(*DURABLE)
    program = service(server.url)
    submitting = Client(lambda: program.port)
    for _ in range(3):
        submitting.go_on(100)
        server.kill()
        server.start()
    accepted = submitting.finish()
    all_completed(server.client, accepted)
    assert program.stop() == 0


def test_a_list_that_redis_cuts_short_is_seen_to_be_incomplete(service: Start, own_redis: OwnRedis) -> None:
    server = own_redis()
    program = service(server.url, "--workers", "0")
    for _ in range(20):
        post(program.port, [{"job_type": "append", "payload": {"value": n}} for n in range(1000)])
    request = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with sent(program, request, buffer=4096) as connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        server.kill()
        eventually(lambda: program.logged("Redis is away"))
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert program.call("GET", "/jobs")[0] == 503
    assert "Traceback" not in program.log


@pytest.mark.parametrize("fault", ["gone", "frozen"])
def test_redis_away_for_ten_seconds(service: Start, own_redis: OwnRedis, fault: str) -> None:
    server = own_redis(*DURABLE)
    program = service(server.url)
    running, longer = program.submit("long", seconds=4), program.submit("long", seconds=14)
    eventually(lambda: status_of(server, longer) == "processing")
    server.kill() if fault == "gone" else server.send_signal(signal.SIGSTOP)
    away = time.monotonic()
    while time.monotonic() - away < 10:
        asked = time.monotonic()
        status, answer = post(program.port, {"job_type": "append", "payload": {"value": 1}})
        assert status == 503, answer
        assert "Redis cannot serve this now" in answer["error"]
        assert time.monotonic() - asked < 6
    server.start() if fault == "gone" else server.send_signal(signal.SIGCONT)
    back = time.monotonic()
    assert program.ended(running)["attempts"] == 1
    again = program.submit("append", value=2)
    program.ended(again)
    assert time.monotonic() - back < 20  # 2 s on a quiet machine
    assert program.ended(longer)["attempts"] == 1
    assert len([line for line in program.lines if "Redis is away" in line]) == 1
    all_completed(server.client, {running, again, longer})
    assert program.stop() == 0


def keeps_its_lease(server: RedisServer, ids: list[str]) -> None:
    """Each of these jobs is being run, and goes on to be for three leases."""
    client: Any = server.client
    ends = {job_id: client.zscore(PREFIX + "processing", job_id) for job_id in ids}
    for job_id, end in ends.items():
        eventually(partial(lease_ends_after, client, job_id, end + 3000), "its lease is extended")


def lease_ends_after(client: Any, job_id: str, milliseconds: float) -> bool:
    return bool(client.zscore(PREFIX + "processing", job_id) > milliseconds)


def test_redis_out_of_memory_is_503_and_running_jobs_still_end(service: Start, own_redis: OwnRedis) -> None:
    server = own_redis()
    program = service(server.url)
    running = program.submit("gate", name="a")
    arrived(server.client, 1)
    for n in range(20):  # something that waits, and something that is delayed
        new = {"job_type": "append", "payload": {"value": n}, "delay": 2, "max_retries": 100}
        program.call("POST", "/job", new)
    server.client.config_set("maxmemory", "1mb")
    status, answer = post(program.port, {"job_type": "append", "payload": {"value": 1}})
    assert status == 503
    assert "maxmemory" in answer["error"]
    eventually(lambda: program.logged("Redis refused"))
    keeps_its_lease(server, [running])
    server.client.config_set("maxmemory", "0")
    server.client.set("open:a", 1)
    assert program.ended(running)["attempts"] == 1
    assert program.ended(program.submit("append", value=1))["status"] == "completed"
    all_completed(server.client, {running})


def test_redis_emptied_under_load_is_no_crash(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url)
    submitting = Client(lambda: program.port)
    for _ in range(10):
        submitting.go_on(20)
        redis_server.client.flushall()
    submitting.finish()
    assert program.ended(program.submit("append", value=1))["status"] == "completed"
    assert program.stop() == 0


@pytest.mark.parametrize("place", ["queue", "delayed", "processing", "completed", "failed", "history"])
def test_a_key_of_the_wrong_type_is_a_clear_error_and_no_crash(
    service: Start, redis_server: RedisServer, place: str
) -> None:
    redis_server.client.set(PREFIX + place, "something else's")
    program = service(redis_server.url)
    eventually(lambda: program.call("GET", "/jobs?limit=1")[0] == 503)
    _, answer = program.call("GET", "/jobs?limit=1")
    assert "WRONGTYPE" in answer["error"]
    redis_server.client.delete(PREFIX + place)
    assert program.ended(program.submit("append", value=1))["status"] == "completed"
    assert program.stop() == 0


APP = ("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all")


def as_app(server: RedisServer) -> str:
    return server.url.replace("//", "//app:pw@")


@pytest.mark.parametrize("right", ["-publish", "-zadd", "-set", "-evalsha", "resetchannels", "resetkeys"])
def test_a_missing_right_is_named_once_at_the_start_with_those_to_give(
    start: Start, own_redis: OwnRedis, right: str
) -> None:
    server = own_redis()
    client: Any = server.client
    client.execute_command(*APP, right)
    program = start(REDIS_URL=as_app(server))
    lacks = {"resetchannels": "publish", "resetkeys": "permissions"}.get(right, right[1:])
    needed = re.escape("~{jobqueue}:* &{jobqueue}:* +@read +@write +@scripting")
    eventually(lambda: program.logged(f"(?i)ERROR .*{lacks}.* the rights that are needed: {needed}"))
    time.sleep(0.3)
    assert program.log.count("the rights that are needed") == 1
    if right in ("-publish", "resetchannels"):  # only hints are lost
        assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0


def test_a_redis_that_refused_at_first_is_looked_at_when_it_no_longer_does(
    start: Start, own_redis: OwnRedis
) -> None:
    server = own_redis()
    client: Any = server.client
    client.execute_command(*APP, "-set")
    client.config_set("maxmemory-policy", "allkeys-lru")
    program = start(REDIS_URL=as_app(server))
    eventually(lambda: program.logged("ERROR .*Redis refused: .* the rights that are needed"))
    client.execute_command("ACL", "SETUSER", "app", "+set", "-zadd")
    eventually(lambda: program.logged("ERROR .*the Redis user may not run ZADD; the rights that are needed"))
    eventually(lambda: program.logged("WARNING Redis may evict jobs: its maxmemory-policy is allkeys-lru"))
    assert program.stop() == 0


def test_the_rights_that_are_named_are_enough(start: Start, own_redis: OwnRedis) -> None:
    server = own_redis()
    client: Any = server.client
    client.execute_command("ACL", "SETUSER", "app", "on", ">pw", *jobqueue.RIGHTS.split())
    program = start(REDIS_URL=as_app(server))
    waiting = program.call("POST", "/job", {"job_type": "long", "payload": {}, "delay": 60})[1]["id"]
    assert program.call("DELETE", f"/job/{waiting}")[0] == 200
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.ended(program.submit("math", a=1, b="x"))["status"] == "failed"
    assert program.call("GET", "/jobs")[0] == 200
    assert program.stop() == 0
    assert "ERROR" not in program.log


def test_any_right_may_be_taken_away_for_a_while_and_no_job_is_lost(
    service: Start, redis_server: RedisServer
) -> None:
    client: Any = redis_server.client
    client.execute_command(*APP)
    program = service(as_app(redis_server), "--lease-seconds", "20", DIRECT_URL=redis_server.url)
    accepted: set[str] = set()
    for right in [*COMMANDS, "evalsha", "hmget"]:
        append = {"job_type": "append", "payload": {"value": 1}, "max_retries": 9}
        due = [append | {"delay": 0.2}] * 20
        running = [{"job_type": "long", "payload": {"seconds": 0.2}, "max_retries": 9} for _ in range(3)]
        accepted |= {job["id"] for job in program.call("POST", "/job", due + running)[1]}
        client.execute_command("ACL", "SETUSER", "app", f"-{right}")
        for _ in range(6):
            status, answer = post(program.port, [append, running[0]])
            accepted |= {job["id"] for job in answer} if status == 202 else set()
            time.sleep(0.1)  # while it is refused, and tries again
        client.execute_command("ACL", "SETUSER", "app", f"+{right}")
    jobs = all_completed(client, accepted)
    assert jobs.keys() == accepted, "what was refused left something"
    client.execute_command("ACL", "DELUSER", "app")


@pytest.mark.parametrize("skew", ["3600", "-3600"])
def test_an_instance_with_a_wrong_clock_neither_steals_nor_starves(
    service: Start, redis_server: RedisServer, skew: str
) -> None:
    client = redis_server.client
    lease = ("--lease-seconds", "10")
    right = service(redis_server.url, "--workers", "1", *lease)
    wrong = service(redis_server.url, *lease, SKEW=skew)
    held = [right.submit("gate", name=f"g{n}") for n in range(11)]
    arrived(client, 11)  # one on the right instance, ten on the wrong one: both hold and extend
    keeps_its_lease(redis_server, held)
    for n in range(11):
        client.set(f"open:g{n}", 1)
    assert [right.ended(job_id)["attempts"] for job_id in held] == [1] * 11
    assert wrong.ended(wrong.submit("append", value=1))["status"] == "completed"


def test_four_instances_run_each_of_20000_jobs_exactly_once(
    service: Start, redis_server: RedisServer
) -> None:
    instances = [service(redis_server.url, "--lease-seconds", "15") for _ in range(4)]
    ids: set[str] = set()
    for begin in range(0, 20_000, 1000):
        body = [{"job_type": "append", "payload": {"value": n}} for n in range(begin, begin + 1000)]
        status, answer = post(instances[begin // 1000 % 4].port, body)
        assert status == 202
        ids |= {job["id"] for job in answer}
    all_completed(redis_server.client, ids)
    assert Counter(map(int, redis_server.client.lrange("appended", 0, -1))) == Counter(range(20_000))
    assert all(len(program.lines) > 100 for program in instances), "some instance had nothing to do"


# ── A network between the program and Redis ─────────────────────────────────────────────────────


class Proxy:
    """Carries connections to Redis, and does to them what `fault` says, at random."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.fault = ""
        self.faults = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self.listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for source, sink, replies in ((inside, outside, False), (outside, inside, True)):
                threading.Thread(target=self._carry, args=(source, sink, replies), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65_536):
                strikes = replies if self.fault in ("swallow", "cut") else not replies
                fault = self.fault if strikes and random.random() < 0.05 else ""
                self.faults += bool(fault)
                if fault == "swallow":
                    continue  # the command was carried out, its reply never comes
                if fault == "cut":
                    sink.sendall(data[: len(data) // 2])
                    break
                if fault == "drop":
                    break  # the command never arrives
                if fault == "delay":
                    time.sleep(random.random() * 0.3)
                if fault == "late":
                    time.sleep(5)  # longer than the client waits: carried out after it gave up
                sink.sendall(data)
            for end in (source, sink):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    made = Proxy(redis_server.port)
    yield made
    made.listener.close()


@pytest.mark.parametrize("fault", ["cut", "drop", "delay", "swallow", "late"])
def test_a_bad_network_loses_no_job_and_repeats_none(
    service: Start, redis_server: RedisServer, proxy: Proxy, fault: str
) -> None:
    program = service(proxy.url, "--lease-seconds", "20", DIRECT_URL=redis_server.url)
    proxy.fault = fault
    submitting = Client(lambda: program.port, pause=0)
    eventually(lambda: proxy.faults >= (3 if fault in ("swallow", "late") else 30), f"times of {fault}")
    submitting.go_on(3)  # in spite of them
    proxy.fault = ""
    submitting.go_on(3)
    accepted = submitting.finish()
    jobs = all_completed(redis_server.client, accepted)
    assert {job["attempts"] for job in jobs.values()} == {"1"}
    times = Counter(map(int, redis_server.client.lrange("appended", 0, -1)))
    assert set(times.values()) == {1}
    assert program.stop() == 0


def test_a_connection_closed_while_idle_is_opened_again(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url)
    for _ in range(5):
        redis_server.client.client_kill_filter(_type="normal", skipme=True)
        redis_server.client.client_kill_filter(_type="pubsub", skipme=True)
        eventually(lambda: post(program.port, {"job_type": "append", "payload": {"value": 1}})[0] == 202)
    all_completed(redis_server.client, set())
    assert program.stop() == 0


# ── Shutdown ────────────────────────────────────────────────────────────────────────────────────

GRACE = 2
GET = b"GET /jobs?limit=1 HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /job HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


def stops(program: Program, within: float, signals: int = 1) -> None:
    """It ends with status 0 and no traceback, within so many seconds and what a busy machine may add."""
    for _ in range(signals - 1):
        program.process.send_signal(signal.SIGTERM)
        eventually(lambda: program.logged("SIGTERM"))
    begun = time.monotonic()
    assert program.stop(signal.SIGTERM) == 0
    assert time.monotonic() - begun < within + 5


@pytest.fixture
def graceful(service: Start) -> Start:
    def launch(url: str, *flags: str) -> Program:
        return service(url, "--shutdown-grace-seconds", str(GRACE), *flags)

    return launch


@contextlib.contextmanager
def sent(program: Program, data: bytes, buffer: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", program.port))
        connection.sendall(data)
        yield connection


def children(program: Program) -> set[int]:
    """The processes that serve for this one."""
    path = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
    return set(map(int, path.read_text().split()))


def serving(program: Program, count: int) -> set[int]:
    """So many processes that serve for this one, once they are there."""
    found: set[int] = eventually(
        lambda: len(children(program)) == count and children(program), f"{count} processes"
    )
    return found


def test_several_processes_share_a_port_and_one_that_dies_is_started_again(
    service: Start, redis_server: RedisServer
) -> None:
    program = service(redis_server.url, "--processes", "3", "--workers", "2")
    victim = min(serving(program, 3))
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(children(program) - {victim}) == 3, "another process")
    assert program.logged(f"process {victim} is gone, with status -9")
    ids = [program.submit("append", value=n) for n in range(50)]
    workers = {program.ended(job_id)["worker"] for job_id in ids}
    assert {int(worker.rpartition(":")[2]) for worker in workers} <= children(program)
    assert program.stop() == 0
    assert program.log.count("stopped") == 3


def test_the_processes_finish_their_jobs_at_a_ctrl_c_in_the_terminal(
    service: Start, redis_server: RedisServer
) -> None:
    program = service(redis_server.url, "--processes", "2", "--workers", "1")
    ids = [program.submit("long", seconds=2) for _ in range(2)]
    for job_id in ids:
        eventually(partial(lambda job_id: program.job(job_id)["status"] == "processing", job_id), "it runs")
    assert program.stop(signal.SIGINT) == 0
    check(redis_server.client, set(ids))
    assert {redis_server.client.hget(f"{PREFIX}job:{job_id}", "status") for job_id in ids} == {"completed"}


def test_the_processes_end_with_the_one_that_started_them(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url, "--processes", "2")
    served_by = serving(program, 2)
    program.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in served_by), "they end")


def test_the_worst_status_of_the_processes_is_that_of_the_program(
    service: Start, redis_server: RedisServer
) -> None:
    program = service(redis_server.url, "--processes", "2", "--shutdown-grace-seconds", "600")
    served_by = serving(program, 2)
    os.kill(min(served_by), signal.SIGSTOP)  # it cannot heed the signal that is passed on
    program.process.send_signal(signal.SIGTERM)
    eventually(lambda: children(program) == {min(served_by)}, "the other one ends")
    os.kill(min(served_by), signal.SIGKILL)
    assert program.process.wait(PATIENCE_SECONDS) not in (0, None)


def test_processes_that_find_another_layout_are_not_started_again(
    service: Start, redis_server: RedisServer
) -> None:
    program = service(redis_server.url)
    eventually(lambda: redis_server.client.get(PREFIX + "layout") == jobqueue.LAYOUT)
    assert program.stop() == 0
    redis_server.client.set(PREFIX + "layout", "99")
    program = service(redis_server.url, "--processes", "2")
    assert program.process.wait(PATIENCE_SECONDS) == 1
    assert program.log.count("CRITICAL Redis has jobs of another version") <= 2


def test_jobs_that_end_their_process_at_once_do_not_end_the_others(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    asked = misbehaving(redis_server.url, "--workers", "0")  # which itself runs none of them
    ids = [submit(asked, "exit") for _ in range(4)] + [submit(asked, "append", {"value": 1})]
    program = misbehaving(redis_server.url, "--processes", "2", "--workers", "1", "--lease-seconds", "1")
    assert [asked.ended(job_id)["status"] for job_id in ids] == ["failed"] * 4 + ["completed"]
    assert program.log.count("is gone, with status 1") == 4
    assert program.stop() == 0


@pytest.mark.parametrize("how", ["frozen", "in C code"])
def test_a_process_that_heeds_no_signal_is_killed_after_the_grace(
    misbehaving: Start, redis_server: RedisServer, how: str
) -> None:
    program = misbehaving(redis_server.url, "--processes", "2", "--shutdown-grace-seconds", "0.5")
    served_by = serving(program, 2)
    if how == "frozen":
        os.kill(min(served_by), signal.SIGSTOP)
    else:
        submit(program, "regex")
        eventually(lambda: redis_server.client.get("begun"), "it is run")
    program.process.send_signal(signal.SIGTERM)
    try:
        assert program.process.wait(PATIENCE_SECONDS) == signal.SIGKILL
    finally:
        for process_id in served_by:  # or one would compute on after a failure
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)


def test_shutdown_with_a_half_sent_request(graceful: Start, redis_server: RedisServer) -> None:
    program = graceful(redis_server.url)
    head = POST + b"99\r\n\r\n{"
    with sent(program, head), sent(program, b"GET /jobs HT"):
        program.call("GET", "/jobs")
        stops(program, GRACE + 1)


def test_shutdown_with_a_client_that_reads_nothing_of_a_large_answer(
    graceful: Start, redis_server: RedisServer
) -> None:
    program = graceful(redis_server.url, "--workers", "0")
    for _ in range(20):
        post(program.port, [{"job_type": "append", "payload": {"value": n}} for n in range(1000)])
    with sent(program, b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n", buffer=4096) as connection:
        assert connection.recv(1) == b"H"
        stops(program, GRACE + 1)


def test_shutdown_lets_ten_running_jobs_finish(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url)
    ids = {program.submit("long", seconds=2) for _ in range(10)}
    eventually(lambda: program.log.count("attempt 1 of 4") == 10, "all are run")
    stops(program, 3)
    jobs = check(redis_server.client, ids)
    assert {(job["status"], job["attempts"]) for job in jobs.values()} == {("completed", "1")}


def test_shutdown_releases_a_job_longer_than_the_grace(graceful: Start, redis_server: RedisServer) -> None:
    program = graceful(redis_server.url, "--workers", "1")
    job_id, behind = program.submit("gate", name="a"), program.submit("append", value=1)
    arrived(redis_server.client, 1)
    stops(program, GRACE + 1)
    assert redis_server.client.lrange("left", 0, -1) == ["a"]
    assert redis_server.client.lrange(PREFIX + "queue", 0, -1) == [behind, job_id]
    assert check(redis_server.client)[job_id]["attempts"] == "0"


def test_shutdown_leaves_a_thread_that_does_not_end(graceful: Start, redis_server: RedisServer) -> None:
    program = graceful(redis_server.url)
    job_id = program.submit("thread", seconds=600)
    eventually(lambda: status_of(redis_server, job_id) == "processing")
    stops(program, GRACE + 1)
    assert check(redis_server.client)[job_id]["status"] == "pending"


def test_shutdown_while_a_handler_blocks_the_event_loop(graceful: Start, redis_server: RedisServer) -> None:
    program, api = graceful(redis_server.url), graceful(redis_server.url, "--workers", "0")
    job_id = api.submit("block", seconds=3)
    eventually(lambda: status_of(redis_server, job_id) == "processing")
    stops(program, 3 + GRACE + 1)


def test_a_second_signal_ends_the_grace(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url, "--shutdown-grace-seconds", "600")
    job_id = program.submit("gate", name="a")
    arrived(redis_server.client, 1)
    stops(program, 1, signals=2)
    assert redis_server.client.lrange(PREFIX + "queue", 0, -1) == [job_id]


def test_shutdown_while_waiting_for_redis_at_start(graceful: Start) -> None:
    program = graceful(f"redis://127.0.0.1:{free_port()}")
    eventually(lambda: program.logged("Redis is away"))
    stops(program, 1)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_shutdown_with_redis_away(graceful: Start, own_redis: OwnRedis, fault: int) -> None:
    server = own_redis()
    program = graceful(server.url)
    job_id = program.submit("long", seconds=600)  # not `gate`, which itself waits for Redis
    eventually(lambda: status_of(server, job_id) == "processing")
    server.send_signal(fault)
    stops(program, GRACE + 1)


def test_shutdowns_at_random_moments_lose_nothing_and_count_nothing(
    graceful: Start, redis_server: RedisServer
) -> None:
    program = graceful(redis_server.url)
    submitting = Client(lambda: program.port)
    for _ in range(ROUNDS):
        submitting.go_on(random.randrange(40))
        assert program.stop(random.choice([signal.SIGINT, signal.SIGTERM])) == 0
        program = graceful(redis_server.url)
    accepted = submitting.finish()
    jobs = all_completed(redis_server.client, accepted)
    assert {job["attempts"] for job in jobs.values()} == {"1"}
    assert set(Counter(redis_server.client.lrange("appended", 0, -1)).values()) == {1}
    assert program.stop() == 0


# ── Handlers that misbehave ─────────────────────────────────────────────────────────────────────

MISBEHAVING = r"""
import asyncio, contextlib, contextvars, decimal, gc, logging, multiprocessing, re, sys

log = logging.getLogger("of.a.handler")
colour = contextvars.ContextVar("colour", default="none")

class Own(BaseException):
    pass

class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")

class Forger(Exception):
    pass

class Masked(Exception):
    __class__ = property(lambda self: sys.exit("its class"))

class Closed(Exception):
    def __getattribute__(self, name):
        raise SystemExit(name)

class Sealed(ExceptionGroup):
    exceptions = property(lambda self: sys.exit("its exceptions"))

def deep():
    error = ValueError("at the bottom")
    for _ in range(5000):
        error = ExceptionGroup("deep", [error])
    return error

async def stray():
    "A Cancelled that has left the scope which it belongs to."
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            return cancelled

async def cancelled_in_asyncio():
    raise asyncio.CancelledError

RAISED = {
    "asyncio cancelled": asyncio.CancelledError,
    "generator exit": GeneratorExit,
    "keyboard interrupt": KeyboardInterrupt,
    "system exit": SystemExit,
    "system exit 0": lambda: SystemExit(0),
    "stop iteration": StopIteration,
    "stop async iteration": StopAsyncIteration,
    "own BaseException": Own,
    "group": lambda: BaseExceptionGroup("all", [Own(), BaseExceptionGroup("in", [KeyError(), SystemExit()])]),
    "deep group": deep,
    "no str": Unspeakable,
    "no class": Masked,
    "no exceptions": lambda: Sealed("sealed", [KeyError()]),
    "long": lambda: ValueError("x" * 10_000_000),
    "half a surrogate pair": lambda: ValueError("\ud800"),
    "forger": lambda: Forger("a\r\n\x1b[2J2000-01-01 00:00:00.000 INFO    forged\nforged\x00"),
}

@jobqueue.handler("raise-closed")
async def raise_closed() -> None:
    raise Closed  # a thread's error is asked for its traceback by Trio

@jobqueue.handler("raise-async")
async def raise_async(what: str) -> None:
    if what == "stray cancelled":
        raise await stray()
    raise RAISED[what]()

@jobqueue.handler("raise-def")
def raise_def(what: str) -> None:
    if what == "stray cancelled":
        raise trio.from_thread.run(stray)
    if what == "asyncio run":
        asyncio.run(cancelled_in_asyncio())
    raise RAISED[what]()

async def impatient():
    with trio.move_on_after(0.05):
        yield 1
        await trio.sleep_forever()

async def pages(holds: str):
    "What is to be read to the end; until then it holds something open."
    scope = trio.fail_after(60) if holds == "scope" else contextlib.nullcontext()
    async with trio.open_nursery() if holds == "nursery" else contextlib.nullcontext() as nursery:
        if nursery:
            nursery.start_soon(trio.sleep_forever)
        with scope:
            try:
                yield 1
                yield 2
            finally:
                client.rpush("closed", holds)

@jobqueue.handler("abandon")
async def abandon(holds: str, end: str) -> int:
    "Reads one of two pages."
    if end == "cycle":
        circle = [pages(holds)]
        circle.append(circle)
        await circle[0].__anext__()
        del circle
        gc.collect()
    else:
        async for number in pages(holds):
            if end == "raise":
                raise ValueError("its own")
            if end == "sleep":
                await trio.sleep_forever()
            if end == "return":
                return number
            break
    await trio.sleep(0.05)
    return 1

@jobqueue.handler("break-trio")
async def break_trio() -> None:
    async def bug():
        raise KeyError("a bug")
    trio.lowlevel.spawn_system_task(bug)
    await trio.sleep(0.1)

class Array:
    "As one of numpy, whose == is no truth."
    def __eq__(self, other):
        raise ValueError("the truth value of an array is ambiguous")

shape = contextvars.ContextVar("shape")
shape.set(Array())
seen = contextvars.ContextVar("seen")
seen.set([])

@jobqueue.handler("reshape")
async def reshape() -> list:
    found = list(seen.get())
    shape.set(Array())
    seen.set([])  # equal to the other, and not the same
    seen.get().append("mine")
    return found

@jobqueue.handler("fork")
def fork() -> int:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    return child.exitcode

@jobqueue.handler("exit")
async def exit_at_once() -> None:
    os._exit(1)

@jobqueue.handler("threads")
async def threads(count: int) -> None:
    "Takes all threads that Trio lends, until the test lets them go on."
    def wait():
        client.incr("waiting")
        while not client.get("open:threads"):
            time.sleep(0.05)
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(trio.to_thread.run_sync, wait)

@jobqueue.handler("regex")
def regex() -> None:
    "C code that holds all of Python, for a very long time."
    client.incr("begun")
    re.match("(a*)*b", "a" * 60)

@jobqueue.handler("leave")
async def leave(what: str) -> int:
    "Leaves something open behind."
    if what == "generator":
        async for x in impatient():
            return x
    if what == "nursery" or what == "nursery with children":
        manager = trio.open_nursery()
        nursery = await manager.__aenter__()
        if what == "nursery with children":
            nursery.start_soon(trio.sleep_forever)
        return 1
    scope = trio.CancelScope(shield=what == "shielded scope").__enter__()
    if what == "cancelled scope":
        scope.cancel()
    if what == "scope with a deadline":
        scope.deadline = trio.current_time() + 0.05
    return 1

@jobqueue.handler("round")
async def round_roughly() -> str:
    decimal.getcontext().prec = 4
    return str(decimal.Decimal(1) / decimal.Decimal(3))

@jobqueue.handler("third")
async def third() -> str:
    return str(decimal.Decimal(1) / decimal.Decimal(3))

@jobqueue.handler("colour-async")
async def colour_async(new: str | None = None) -> list:
    "The colour that was found; and those that a child and a thread of this job see."
    found = [colour.get()]
    if new is not None:
        colour.set(new)

    async def child():
        await trio.sleep(0)
        log.warning("in a child")
        found.append(colour.get())

    def thread():
        log.warning("in a thread")
        found.append(colour.get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
    await trio.to_thread.run_sync(thread)
    return found

@jobqueue.handler("colour-def")
def colour_def(new: str | None = None) -> list:
    "The same in a thread, which calls back into Trio."
    found = [colour.get()]
    if new is not None:
        colour.set(new)

    async def back():
        log.warning("in a child")
        return colour.get()

    log.warning("in a thread")
    return found + [trio.from_thread.run(back), colour.get()]

@jobqueue.handler("occupy")
def occupy(name: str) -> str:
    "A thread that heeds nothing until the test lets it go on."
    client.rpush("spans", "begin")
    while not client.get("open:" + name):
        time.sleep(0.02)
    client.rpush("spans", "end")
    return "late"

@jobqueue.handler("poll")
def poll() -> None:
    "A thread that asks whether it is wanted still."
    client.rpush("spans", "begin")
    try:
        while True:
            trio.from_thread.check_cancelled()
            time.sleep(0.02)
    finally:
        client.rpush("spans", "end")

@jobqueue.handler("spin")
async def spin() -> str:
    if client.incr("begun") > 1:
        return "again"
    while True:
        pass

@jobqueue.handler("sleep-on")
async def sleep_on() -> str:
    if client.incr("begun") > 1:
        return "again"
    time.sleep(600)

@jobqueue.handler("shield")
async def shield(name: str) -> None:
    "Heeds no cancellation."
    client.rpush("arrived", name)
    with trio.CancelScope(shield=True):
        await trio.sleep(60)

@jobqueue.handler("large")
async def large(letter: str, count: int) -> str:
    return letter * count

@jobqueue.handler("fresh")
async def fresh() -> None:
    await trio.sleep(0.01)

async def sweep(self, *arguments, right=jobqueue.Store.sweep, **more):
    "A service task steps on this, when the test wants it."
    if client.exists("bug"):
        raise ZeroDivisionError("a bug")
    return await right(self, *arguments, **more)

if os.environ.get("BUGGY"):
    jobqueue.Store.sweep = sweep
"""


@pytest.fixture
def misbehaving(start: Start, tmp_path: Path) -> Start:
    """Starts the program with handlers that misbehave, beside the decent ones, and short leases."""
    module = tmp_path / "misbehaving.py"
    module.write_text(SERVICE.replace("jobqueue.main()\n", MISBEHAVING + "jobqueue.main()\n"))

    def launch(url: str, *flags: str, **settings: str) -> Program:
        environ = {"REDIS_URL": url, "PYTHONPATH": str(Path(__file__).parent)} | settings
        return start(*LEASE, *flags, module=module, **environ)

    return launch


def submit(program: Program, job_type: str, payload: dict[str, Any] | None = None, **options: Any) -> str:
    """Submit a job, with no retries unless `options` say so; its id."""
    new = {"job_type": job_type, "payload": payload or {}, "max_retries": 0} | options
    status, answer = program.call("POST", "/job", new)
    assert status == 202, answer
    return str(answer["id"])


def throughout(seconds: float, look: Callable[[], bool], what: str = "") -> None:
    """It is so at every look, for so many seconds."""
    until = time.monotonic() + seconds

    def over() -> bool:
        assert look(), f"it did not stay so: {what or look}"
        return time.monotonic() > until

    eventually(over)


def ends(program: Program, within: float) -> None:
    """A SIGTERM ends it in time, with status 0; the log may hold tracebacks that a handler has earned."""
    begun = time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PATIENCE_SECONDS) == 0, program.log
    assert time.monotonic() - begun < within + 5


RAISED = {
    "asyncio cancelled": ["CancelledError"],
    "generator exit": ["GeneratorExit"],
    "keyboard interrupt": ["KeyboardInterrupt"],
    "system exit": ["SystemExit"],
    "system exit 0": ["SystemExit"],
    "stop iteration": ["StopIteration"],
    "stop async iteration": ["StopAsyncIteration"],
    "own BaseException": ["Own"],
    "group": ["Own", "KeyError", "SystemExit"],
    "deep group": [],  # its name, or what is at the bottom: see the test
    "no str": ["Unspeakable"],
    "no class": ["Masked"],
    "no exceptions": ["KeyError"],
    "long": ["ValueError", "xxx"],
    "half a surrogate pair": ["ValueError"],
    "forger": ["Forger", "forged"],
    "stray cancelled": ["Cancelled"],
}
RAISES = [(how, what) for how in ("raise-async", "raise-def") for what in RAISED]


@pytest.mark.parametrize(("how", "what"), [*RAISES, ("raise-def", "asyncio run")])
def test_whatever_a_handler_raises_is_one_failed_attempt_and_harms_no_other_job(
    misbehaving: Start, redis_server: RedisServer, how: str, what: str
) -> None:
    client = redis_server.client
    program = misbehaving(redis_server.url, "--workers", "2")
    beside = submit(program, "gate", {"name": "a"})
    arrived(client, 1)  # so one worker is left for all the others
    raising = submit(program, how, {"what": what})
    behind = [submit(program, "append", {"value": n}) for n in range(3)]
    job = program.ended(raising)
    assert (job["status"], job["attempts"]) == ("failed", 1)
    for word in RAISED.get(what, ["CancelledError"]):
        assert word in job["error"]
    if what == "deep group":
        assert "ExceptionGroup" in job["error"] or "at the bottom" in job["error"]
    assert len(json.dumps(job)) < 100_000
    for job_id in behind:
        assert program.ended(job_id)["status"] == "completed"
    client.set("open:a", 1)
    job = program.ended(beside)
    assert (job["status"], job["attempts"]) == ("completed", 1)
    stops(program, 1)
    assert max(map(len, program.lines)) < 100_000
    check(client)


def test_what_a_handler_raises_cannot_forge_a_line_of_the_log(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url)
    program.ended(submit(program, "raise-async", {"what": "forger"}))
    stops(program, 1)
    assert "forged" in program.log
    assert "\x1b" not in program.log
    assert "\x00" not in program.log
    assert not [line for line in program.lines if line.startswith(("forged", "2000-01-01", "\x1b"))]


@pytest.mark.parametrize(
    "what",
    [
        "generator",
        "nursery",
        "nursery with children",
        "scope",
        "scope with a deadline",
        "cancelled scope",
        "shielded scope",
    ],
)
def test_a_cancel_scope_that_a_handler_leaves_behind_fails_its_attempt_and_cancels_no_other(
    misbehaving: Start, redis_server: RedisServer, what: str
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1", "--shutdown-grace-seconds", "1")
    leaving = submit(program, "leave", {"what": what})
    behind = [submit(program, "long", {"seconds": 0.5}), submit(program, "append", {"value": 1})]
    jobs = [program.ended(job_id) for job_id in behind]
    assert [(job["status"], job["attempts"]) for job in jobs] == [("completed", 1)] * 2, jobs
    job = program.ended(leaving)
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert "scope" in job["error"].lower() or "nursery" in job["error"].lower()
    last = submit(program, "gate", {"name": "a"})
    arrived(redis_server.client, 1)
    ends(program, 1)
    assert redis_server.client.lrange(PREFIX + "queue", 0, -1) == [last]  # the grace could cancel it
    check(redis_server.client)


@pytest.mark.parametrize("end", ["break", "return", "raise", "sleep", "cycle"])
@pytest.mark.parametrize("holds", ["nothing", "scope", "nursery"])
def test_an_async_generator_that_is_not_read_to_the_end_is_closed_and_harms_no_other_job(
    misbehaving: Start, redis_server: RedisServer, holds: str, end: str
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1", "--job-timeout-seconds", "0.3")
    job = program.ended(submit(program, "abandon", {"holds": holds, "end": end}))
    assert job["attempts"] == 1
    if (holds, end) != ("scope", "cycle"):  # the collector closes that scope in the right task, by chance
        is_well = holds == "nothing" and end not in ("raise", "sleep")
        assert job["status"] == ("completed" if is_well else "failed"), job
    assert program.ended(submit(program, "append", {"value": 1}))["status"] == "completed"
    eventually(lambda: redis_server.client.lrange("closed", 0, -1) == [holds], "it is closed")
    ends(program, 1)


def test_an_error_that_shows_nothing_of_itself_is_a_failed_attempt(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1")
    job = program.ended(submit(program, "raise-closed"))
    assert (job["status"], job["attempts"], job["error"]) == ("failed", 1, "Closed, which cannot be shown")
    assert program.ended(submit(program, "append", {"value": 1}))["status"] == "completed"


def test_a_handler_that_breaks_trio_ends_its_process_with_a_traceback_and_is_run_again(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--lease-seconds", "1")
    job_id = submit(program, "break-trio")
    assert program.process.wait(PATIENCE_SECONDS) == 1
    assert "CRITICAL Trio failed" in program.log
    assert "KeyError: 'a bug'" in program.log
    program = misbehaving(redis_server.url, "--lease-seconds", "1", "--workers", "0")
    assert program.ended(job_id)["status"] == "failed"  # it had one attempt
    stops(program, 1)


def test_the_values_of_context_variables_are_not_compared_by_their_own_code(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1")
    for _ in range(3):
        assert program.ended(submit(program, "reshape"))["result"] == []
    stops(program, 1)


def test_what_a_handler_forks_ends_at_a_signal_as_ever(misbehaving: Start, redis_server: RedisServer) -> None:
    program = misbehaving(redis_server.url)
    assert program.ended(submit(program, "fork"))["result"] == -signal.SIGTERM
    stops(program, 1)


def test_handlers_that_take_all_threads_do_not_keep_redis_away(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program, client = misbehaving(redis_server.url), redis_server.client
    job_id = submit(program, "threads", {"count": 50})
    eventually(lambda: client.get("waiting") == "40", "all that Trio lends are taken")
    client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: program.call("GET", f"/job/{job_id}")[0] == 200, "Redis is back")
    submit(program, "append", {"value": 1})
    client.set("open:threads", 1)
    assert program.ended(job_id)["status"] == "completed"


def test_a_decimal_precision_that_a_job_sets_is_not_that_of_the_next_one(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1")
    assert program.ended(submit(program, "round"))["result"] == "0.3333"
    assert program.ended(submit(program, "third"))["result"] == "0." + "3" * 28


@pytest.mark.parametrize("next_type", ["colour-async", "colour-def"])
@pytest.mark.parametrize("job_type", ["colour-async", "colour-def"])
def test_a_context_variable_that_a_job_sets_holds_in_its_children_and_threads_and_ends_with_it(
    misbehaving: Start, redis_server: RedisServer, job_type: str, next_type: str
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1")
    first, second = submit(program, job_type, {"new": "red"}), submit(program, next_type)
    assert program.ended(first)["result"] == ["none", "red", "red"]
    assert program.ended(second)["result"] == ["none", "none", "none"]


@pytest.mark.parametrize("job_type", ["colour-async", "colour-def"])
def test_what_children_and_threads_of_a_job_log_names_the_job(
    misbehaving: Start, redis_server: RedisServer, job_type: str
) -> None:
    program = misbehaving(redis_server.url, "--workers", "1")
    ids = [submit(program, job_type), submit(program, job_type)]
    lines = [f"job {job_id}: in a {where}\n" for job_id in ids for where in ("child", "thread")]
    eventually(lambda: all(line in program.log for line in lines))
    stops(program, 1)


# ── Handlers in threads ─────────────────────────────────────────────────────────────────────────


def spans(server: RedisServer) -> list[str]:
    """What began and ended, in turn."""
    client: Any = server.client
    return list(client.lrange("spans", 0, -1))


def test_a_thread_past_its_timeout_keeps_its_job_is_named_and_its_late_result_counts(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--workers", "2")
    job_id = submit(program, "occupy", {"name": "a"}, timeout=0.5, max_retries=3)
    eventually(lambda: spans(redis_server))
    misbehaving(redis_server.url, "--workers", "2")  # would run it, if it could be had
    throughout(6, lambda: status_of(redis_server, job_id) == "processing", "a job keeps its thread's lease")
    assert spans(redis_server) == ["begin"]

    def named() -> bool:
        return any(" WARNING " in line and job_id in line and "occupy" in line for line in program.lines)

    eventually(named)
    beside = submit(program, "append", {"value": 1})
    assert program.ended(beside)["attempts"] == 1
    redis_server.client.set("open:a", 1)
    job = program.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 1, "late")
    assert spans(redis_server) == ["begin", "end"]
    check(redis_server.client)


def test_a_thread_that_asks_whether_it_is_cancelled_ends_at_its_timeout_and_is_run_again(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--retry-delay-seconds", "0.1")
    job = program.ended(submit(program, "poll", timeout=0.5, max_retries=1))
    assert (job["status"], job["attempts"], "timed out" in job["error"]) == ("failed", 2, True)
    assert spans(redis_server) == ["begin", "end"] * 2
    stops(program, 1)


def test_a_deleted_job_stays_with_a_thread_that_heeds_nothing(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url, "--workers", "2")
    misbehaving(redis_server.url, "--workers", "2")  # would run it, if it could be had
    job_id = submit(program, "occupy", {"name": "a"}, max_retries=3)
    eventually(lambda: spans(redis_server))
    assert program.call("DELETE", f"/job/{job_id}")[0] == 200
    throughout(4, lambda: status_of(redis_server, job_id) == "processing", "a job keeps its thread")
    redis_server.client.set("open:a", 1)
    job = program.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 1, "late")
    assert spans(redis_server) == ["begin", "end"]
    check(redis_server.client)


@pytest.mark.parametrize("by", ["the instance that runs it", "another instance"])
def test_a_deleted_job_in_a_thread_that_asks_is_cancelled_and_not_run_again(
    misbehaving: Start, redis_server: RedisServer, by: str
) -> None:
    program, other = misbehaving(redis_server.url), misbehaving(redis_server.url, "--workers", "0")
    job_id = submit(program, "poll", max_retries=3)
    eventually(lambda: spans(redis_server))
    deleting = other if by == "another instance" else program
    status, answer = deleting.call("DELETE", f"/job/{job_id}")
    assert (status, answer["id"]) == (200, job_id)
    ended_before = "end" in spans(redis_server)
    assert answer["status"] == "processing" or ended_before
    job = deleting.ended(job_id)
    assert (job["status"], job["attempts"], job["error"]) == ("failed", 1, "cancelled")
    assert spans(redis_server) == ["begin", "end"]
    check(redis_server.client)


@pytest.mark.parametrize("timeout", [0.5, 600])
def test_the_end_of_the_grace_leaves_a_thread_behind_and_does_not_count_its_attempt(
    misbehaving: Start, redis_server: RedisServer, timeout: float
) -> None:
    program = misbehaving(redis_server.url, "--shutdown-grace-seconds", "1")
    job_id = submit(program, "occupy", {"name": "a"}, timeout=timeout)
    eventually(lambda: spans(redis_server))
    if timeout < 1:
        throughout(1.5, lambda: status_of(redis_server, job_id) == "processing", "past its timeout")
    stops(program, 1)
    job = check(redis_server.client)[job_id]
    assert (job["status"], job["attempts"]) == ("pending", "0")


# ── Signals, whatever a handler does ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("grace", "signals"), [("1", "one"), ("600", "several")])
@pytest.mark.parametrize("job_type", ["spin", "sleep-on"])
def test_sigterm_ends_a_process_whose_event_loop_is_blocked_and_its_job_is_run_by_the_next(
    misbehaving: Start, redis_server: RedisServer, job_type: str, grace: str, signals: str
) -> None:
    program = misbehaving(redis_server.url, "--shutdown-grace-seconds", grace)
    job_id = submit(program, job_type, max_retries=3, delay=0.2)  # not before the answer
    eventually(lambda: redis_server.client.get("begun"))
    begun = time.monotonic()
    program.process.send_signal(signal.SIGTERM)

    def ended() -> bool:
        if signals == "several":  # two that come at once may be taken for one
            program.process.send_signal(signal.SIGTERM)
        return program.process.poll() is not None

    eventually(ended, "it ends")
    assert program.process.wait(PATIENCE_SECONDS) == 0
    assert time.monotonic() - begun < 1 + 10
    job = misbehaving(redis_server.url).ended(job_id)
    assert (job["status"], job["result"]) == ("completed", "again")
    check(redis_server.client)


@pytest.mark.parametrize("job_type", ["gate", "occupy", "shield"])
def test_a_bug_during_a_shutdown_ends_the_program_with_a_traceback_and_another_status_than_0(
    misbehaving: Start, redis_server: RedisServer, job_type: str
) -> None:
    client = redis_server.client
    program = misbehaving(redis_server.url, "--shutdown-grace-seconds", "60", BUGGY="1")
    submit(program, job_type, {"name": "a"})
    eventually(lambda: client.lrange("arrived", 0, -1) or client.lrange("spans", 0, -1))
    program.process.send_signal(signal.SIGTERM)
    eventually(lambda: program.logged("SIGTERM"))
    begun = time.monotonic()
    client.set("bug", 1)  # the next sweep steps on it
    assert program.process.wait(PATIENCE_SECONDS) not in (0, -signal.SIGTERM)
    assert time.monotonic() - begun < 30
    eventually(lambda: program.logged("ZeroDivisionError: a bug"))
    assert "Traceback" in program.log


def test_signals_that_do_not_cease_end_the_program_as_one_does(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    for n in range(10):
        program = misbehaving(redis_server.url)
        job_id = submit(program, "gate", {"name": "a"})
        arrived(redis_server.client, n + 1)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while program.process.poll() is None:
            assert time.monotonic() < give_up
            program.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(0.001)
        assert program.stop(signal.SIGTERM) == 0
        assert redis_server.client.lrange(PREFIX + "queue", 0, -1) == [job_id]
        redis_server.client.delete(PREFIX + "queue", PREFIX + "history", f"{PREFIX}job:{job_id}")


# ── Results too large, and types that are new ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("letter", "count", "size"),
    [("x", 3_000_000, "3,?000,?002"), ("ü", 700_000, "1,?400,?002|4,?200,?002")],
)
def test_a_result_larger_than_a_body_may_be_is_a_failed_attempt(
    misbehaving: Start, redis_server: RedisServer, letter: str, count: int, size: str
) -> None:
    program = misbehaving(redis_server.url)
    beside = submit(program, "gate", {"name": "a"})
    arrived(redis_server.client, 1)
    job = program.ended(submit(program, "large", {"letter": letter, "count": count}))
    assert (job["status"], job["attempts"], job["result"]) == ("failed", 1, None)
    assert re.search(size, job["error"])
    assert re.search(r"1,?048,?576", job["error"])
    redis_server.client.set("open:a", 1)
    job = program.ended(beside)
    assert (job["status"], job["attempts"]) == ("completed", 1)
    stops(program, 1)
    assert "Redis is away" not in program.log


def test_a_result_just_as_large_as_a_body_may_be_is_kept(
    misbehaving: Start, redis_server: RedisServer
) -> None:
    program = misbehaving(redis_server.url)
    job = program.ended(submit(program, "large", {"letter": "x", "count": 1_048_574}))
    assert job["status"] == "completed", job["error"]
    assert len(job["result"]) == 1_048_574


def test_jobs_of_a_type_that_an_old_instance_does_not_know_wait_for_a_new_one(
    service: Start, misbehaving: Start, redis_server: RedisServer
) -> None:
    client = redis_server.client
    new = misbehaving(redis_server.url, "--workers", "2")
    for name in ("a", "b"):
        submit(new, "gate", {"name": name})
    arrived(client, 2)  # the new one is busy
    old = service(redis_server.url)
    ids = [submit(new, "fresh") for _ in range(20)]
    eventually(lambda: old.logged("fresh"), "the old one has tried")
    client.set("open:a", 1)
    client.set("open:b", 1)
    jobs = [new.ended(job_id) for job_id in ids]
    assert {(job["status"], job["attempts"], job["error"]) for job in jobs} == {("completed", 1, None)}
    assert old.ended(submit(old, "append", {"value": 1}))["status"] == "completed"
    stops(old, 1)
    assert len([line for line in old.lines if "fresh" in line]) == 1
    check(client)


# ── Jobs whose keys are damaged ─────────────────────────────────────────────────────────────────

PLACES = ("queue", "delayed", "processing", "completed", "failed")
NUMBERS: list[str | None] = ["abc", None, "nan", "-1", ""]
DAMAGE: dict[str, list[str | None]] = {  # what each field is set to; None: the field is deleted
    "timeout": NUMBERS,
    "max_retries": NUMBERS,
    "attempts": NUMBERS,
    "status": ["abc", None, ""],
    "job_type": ["abc", None, ""],
    "payload": ["abc", None, "", "[1]", "NaN"],
    "created_at": [*NUMBERS, "9" * 20, "-1e300"],
    "due_at": [*NUMBERS, "9" * 20],
}
LEGIBLE = {"abc", ""}  # job types that nobody handles, but which may be meant


def damage(client: Any, job_id: str, field: str, value: str | None) -> None:
    if value is None:
        client.hdel(f"{PREFIX}job:{job_id}", field)
    else:
        client.hset(f"{PREFIX}job:{job_id}", field, value)


def place_of(client: Any, job_id: str, *wanted: str) -> str:
    """The one place where the job is, in one look; empty if it is none of the wanted ones."""
    pipe = client.pipeline()
    pipe.lrange(PREFIX + "queue", 0, -1)
    for place in PLACES[1:]:
        pipe.zrange(PREFIX + place, 0, -1)
    found = [place for place, ids in zip(PLACES, pipe.execute(), strict=True) if job_id in ids]
    assert len(found) == 1, f"{job_id} is in {found}"
    return found[0] if not wanted or found[0] in wanted else ""


def listed(program: Program, path: str) -> dict[str, Any]:
    """The jobs that GET lists under a path, by id; the answer must be JSON, without NaN."""
    status, answer = program.call("GET", path)
    assert status == 200, answer
    json.dumps(answer, allow_nan=False)
    return {job["id"]: job for job in answer}


def legible(program: Program, ids: Iterable[str]) -> None:
    """Every job is shown, alone and among the others."""
    jobs = listed(program, "/jobs")
    paged = listed(program, "/jobs?limit=1000")
    for job_id in ids:
        assert job_id in jobs
        assert job_id in paged
        json.dumps(program.job(job_id), allow_nan=False)


def bears(program: Program, client: Any, damaged: dict[str, tuple[str, str | None]]) -> None:
    """Every damaged job ends where it can, one that fails names the damaged field, and all can be read."""
    for job_id, (field, value) in damaged.items():
        what = f"{field} = {value!r}"
        if field == "job_type" and value in LEGIBLE:
            eventually(partial(place_of, client, job_id, "queue", "delayed", "failed"), what)
            continue
        place = eventually(partial(place_of, client, job_id, "completed", "failed"), what)
        job = program.job(job_id)
        assert job["status"] == place, what
        assert place == "completed" or field in job["error"], f"{what}: {job['error']}"
    legible(program, damaged)
    failed = listed(program, "/jobs?status=failed")
    for job_id in damaged:
        assert (job_id in failed) == (place_of(client, job_id) == "failed")


@pytest.mark.parametrize("field", DAMAGE)
def test_a_waiting_job_with_a_damaged_field_fails_alone_or_is_run(
    misbehaving: Start, redis_server: RedisServer, field: str
) -> None:
    client = redis_server.client
    api = misbehaving(redis_server.url, "--workers", "0")
    sound: list[str] = []
    damaged: dict[str, tuple[str, str | None]] = {}
    for value in DAMAGE[field]:
        for delay in (0, 1):
            job_id = submit(api, "append", {"value": len(damaged)}, delay=delay, max_retries=1)
            damage(client, job_id, field, value)
            damaged[job_id] = field, value
            sound.append(submit(api, "append", {"value": 100 + len(sound)}, delay=delay))
    legible(api, [*sound, *damaged])
    program = misbehaving(redis_server.url, "--workers", "2", "--retry-delay-seconds", "0.1")
    for job_id in sound:
        job = program.ended(job_id)
        assert (job["status"], job["attempts"]) == ("completed", 1)
    bears(program, client, damaged)
    assert max(Counter(client.lrange("appended", 0, -1)).values()) == 1
    stops(api, 1)
    stops(program, 1)


@pytest.mark.parametrize("field", DAMAGE)
def test_a_job_of_a_killed_process_with_a_damaged_field_fails_alone_or_is_run(
    misbehaving: Start, redis_server: RedisServer, field: str
) -> None:
    client = redis_server.client
    program = misbehaving(redis_server.url, "--workers", "20")
    sound: list[str] = []
    damaged: dict[str, tuple[str, str | None]] = {}
    for value in DAMAGE[field]:
        damaged[submit(program, "gate", {"name": "a"}, max_retries=1)] = field, value
        sound.append(submit(program, "gate", {"name": "a"}, max_retries=1))
    arrived(client, len(sound) + len(damaged))
    program.kill()
    for job_id, (_, value) in damaged.items():
        damage(client, job_id, field, value)
    client.set("open:a", 1)
    program = misbehaving(redis_server.url, "--retry-delay-seconds", "0.1")
    for job_id in sound:
        job = program.ended(job_id)
        assert (job["status"], job["attempts"]) == ("completed", 2)
    bears(program, client, damaged)
    stops(program, 1)


@pytest.mark.parametrize("state", ["queue", "delayed", "processing"])
def test_a_job_whose_key_is_of_another_type_harms_no_other(
    misbehaving: Start, redis_server: RedisServer, state: str
) -> None:
    client = redis_server.client
    delay = 1 if state == "delayed" else 0
    workers = "20" if state == "processing" else "0"
    first = misbehaving(redis_server.url, "--workers", workers)
    ids = [submit(first, "gate", {"name": "a"}, delay=delay, max_retries=1) for _ in range(5)]
    if state == "processing":
        arrived(client, 5)
    first.kill()
    for job_id in (ids.pop(0), ids.pop(2)):
        client.delete(f"{PREFIX}job:{job_id}")
        client.set(f"{PREFIX}job:{job_id}", "a string")
    client.set("open:a", 1)
    program = misbehaving(redis_server.url, "--workers", "2")
    for job_id in ids:
        job = program.ended(job_id)
        assert (job["status"], job["attempts"]) == ("completed", 2 if state == "processing" else 1)
        assert place_of(client, job_id) == "completed"
    assert program.ended(submit(program, "append", {"value": 1}))["status"] == "completed"
    assert ids[0] in listed(program, "/jobs")
    assert ids[0] not in listed(program, "/jobs?status=failed")
    stops(program, 1)


# ── Failover: the primary moves, and the service with it ────────────────────────────────────────
#
# What a primary accepts after its replica was cut off, Redis itself loses. So a test knows three loads:
# `before`, which the replica has; `across`, which may be lost but must get clean answers; and `after`.

SECRET = "s3cret"
Pair = tuple[RedisServer, RedisServer]  # a primary and its replica


@pytest.fixture
def pair(own_redis: OwnRedis) -> Pair:
    """A primary and its replica."""
    quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
    primary = own_redis(*quick, "--dbfilename", "primary.rdb")
    replica = own_redis(*quick, "--dbfilename", "replica.rdb")
    replica.client.replicaof("127.0.0.1", str(primary.port))
    eventually(lambda: replica.client.info("replication")["master_link_status"] == "up", "it is in sync")
    return primary, replica


def tell(server: RedisServer, *command: str | int) -> Any:
    """For the commands that redis-py has no typed method for."""
    client: Any = server.client
    return client.execute_command(*command)


def is_primary(server: RedisServer) -> bool:
    return bool(server.client.info("replication")["role"] == "master")


def is_left(server: RedisServer) -> bool:
    """Nobody talks to this server any more, except other servers, this test and who listens to a channel."""
    if not server.answers():
        return True
    me = str(server.client.client_id())
    others = [peer for peer in server.client.client_list(_type="normal") if peer["id"] != me]
    return all(peer["name"].startswith("sentinel-") for peer in others)


def goes_on_after(switch: Callable[[], None], program: Program, pair: Pair) -> None:
    """By itself, and with every job that the replica had or the new primary accepted."""
    primary, replica = pair
    before = Client(lambda: program.port)
    before.go_on(100)
    accepted = before.finish()
    primary.client.set("mark", "after what was accepted")
    assert primary.client.wait(1, 30_000) == 1
    across = Client(lambda: program.port)
    across.go_on(1)
    switch()
    after = Client(lambda: program.port)
    after.go_on(100)
    eventually(lambda: is_left(primary), "the service has left the old primary")
    across.finish()
    assert across.refused.keys() <= {503}
    accepted |= after.finish()
    assert after.refused.keys() <= {503}
    all_completed(replica.client, accepted)
    last = program.submit("append", value=-1)
    status, jobs = program.call("GET", "/jobs?limit=1")
    assert (status, [job["id"] for job in jobs]) == (200, [last])
    program.ended(last)
    assert status_of(replica, last) == "completed"
    stops(program, within=1)


def test_when_the_address_moves_to_a_promoted_replica_the_service_follows(
    service: Start, redis_server: RedisServer, pair: Pair
) -> None:
    primary, replica = pair
    address = Proxy(primary.port)
    program = service(address.url, DIRECT_URL=redis_server.url)

    def switch() -> None:
        address.target = replica.port  # for who connects anew: the old primary lives, and its connections
        replica.client.replicaof("NO", "ONE")
        primary.client.replicaof("127.0.0.1", str(replica.port))

    with address.listener:
        goes_on_after(switch, program, pair)


class Sentinel(RedisServer):
    """A redis-sentinel of our own."""

    def __init__(self, folder: Path, password: str, *settings: str) -> None:
        self.password = password
        super().__init__(folder, *settings, *([f"requirepass {password}"] if password else []))

    def start(self) -> None:
        settings = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", *self.options]
        file = self.folder / f"sentinel-{self.port}.conf"
        file.write_text("\n".join(settings))
        self.client = redis.Redis(port=self.port, password=self.password or None, decode_responses=True)
        self.process = subprocess.Popen(["redis-sentinel", str(file)], stdout=subprocess.DEVNULL)
        eventually(self.answers, "redis-sentinel answers")

    def knows_all(self) -> bool:
        """It has met the other two, and the replica of the primary."""
        primary: Any = self.client.sentinel_master("mymaster")
        replicas: Any = self.client.sentinel_slaves("mymaster")
        links = [replica["master-link-status"] for replica in replicas]
        return bool(primary["num-other-sentinels"] == 2 and links == ["ok"])


Sentinels = Callable[..., list[Sentinel]]


@pytest.fixture
def sentinels(tmp_path: Path, pair: Pair) -> Iterator[Sentinels]:
    """Starts three that watch the pair: two of them decide, a second after the primary fell silent."""
    if not shutil.which("redis-sentinel"):
        missing("redis-sentinel")
    started: list[Sentinel] = []

    def start(password: str = "", data_password: str = "") -> list[Sentinel]:
        settings = [
            f"sentinel monitor mymaster 127.0.0.1 {pair[0].port} 2",
            "sentinel down-after-milliseconds mymaster 1000",
            "sentinel failover-timeout mymaster 3000",
            *([f"sentinel auth-pass mymaster {data_password}"] if data_password else []),
        ]
        for _ in range(3):
            sentinel = Sentinel(tmp_path, password, *settings)
            started.append(sentinel)
            with contextlib.suppress(redis.ResponseError):  # Redis 7 lets them hurry; else it takes 10 s more
                tell(sentinel, "SENTINEL DEBUG", "INFO-PERIOD", 500, "PUBLISH-PERIOD", 500)
        eventually(lambda: all(sentinel.knows_all() for sentinel in started), "the sentinels know each other")
        return started

    yield start
    for sentinel in started:
        sentinel.kill()


def sentinel_url(sentinels: list[Sentinel], password: str = "") -> str:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return f"redis+sentinel://{f':{password}@' if password else ''}{hosts}/mymaster/0"


def fail_over(sentinel: Sentinel, pair: Pair) -> None:
    """Have the two change places; the old primary lives, and accepts writes until it is told."""
    primary, replica = pair
    tell(sentinel, "SENTINEL FAILOVER", "mymaster")
    eventually(lambda: is_primary(replica), "the replica is promoted")
    eventually(lambda: not is_primary(primary), "the old primary follows it")


def test_when_sentinels_move_the_primary_the_service_follows(
    service: Start, redis_server: RedisServer, pair: Pair, sentinels: Sentinels
) -> None:
    watching = sentinels()
    program = service(sentinel_url(watching), DIRECT_URL=redis_server.url)
    goes_on_after(lambda: fail_over(watching[0], pair), program, pair)


def test_when_the_primary_is_killed_the_service_follows_the_sentinels(
    service: Start, redis_server: RedisServer, pair: Pair, sentinels: Sentinels
) -> None:
    primary, replica = pair
    program = service(sentinel_url(sentinels()), DIRECT_URL=redis_server.url)

    def switch() -> None:
        primary.kill()
        eventually(lambda: is_primary(replica), "the replica is promoted")

    goes_on_after(switch, program, pair)


def test_when_one_sentinel_is_gone_the_service_asks_the_next(
    service: Start, redis_server: RedisServer, pair: Pair, sentinels: Sentinels
) -> None:
    first, *others = watching = sentinels()
    first.kill()
    program = service(sentinel_url(watching), DIRECT_URL=redis_server.url)
    goes_on_after(lambda: fail_over(others[0], pair), program, pair)


@pytest.mark.parametrize("password", [SECRET, ""], ids=["of all", "of the data servers alone"])
def test_the_password_of_a_sentinel_address_opens_the_primary(
    service: Start,
    redis_server: RedisServer,
    pair: Pair,
    sentinels: Sentinels,
    password: str,
) -> None:
    for server in pair:
        server.client.config_set("masterauth", SECRET)
    for server in pair:
        server.client.config_set("requirepass", SECRET)
        server.client = redis.Redis(port=server.port, password=SECRET, decode_responses=True)
    watching = sentinels(password, SECRET)
    program = service(sentinel_url(watching, SECRET), DIRECT_URL=redis_server.url)
    goes_on_after(lambda: fail_over(watching[0], pair), program, pair)
    assert SECRET not in program.log


# ── Redis Cluster: the one slot of the queue, and its move ──────────────────────────────────────

SLOTS = 16_384


@pytest.fixture
def cluster(own_redis: OwnRedis) -> list[RedisServer]:
    """Three nodes that share the slots, without replicas."""
    nodes, buses = [], [free_port() for _ in range(3)]
    for n, bus in enumerate(buses):
        files = ("--cluster-config-file", f"node{n}.conf", "--dbfilename", f"node{n}.rdb")
        nodes.append(own_redis("--cluster-enabled", "yes", "--cluster-port", str(bus), *files))
        tell(nodes[n], "CLUSTER SET-CONFIG-EPOCH", n + 1)
        slots = [slot for slot in range(SLOTS) if slot * 3 // SLOTS == n]
        tell(nodes[n], "CLUSTER ADDSLOTS", *slots)
        tell(nodes[0], "CLUSTER MEET", "127.0.0.1", nodes[n].port, bus)
    for node in nodes:
        eventually(partial(is_joined, node), "the cluster has formed")
    return nodes


def is_joined(node: RedisServer) -> bool:
    about: Any = tell(node, "CLUSTER INFO")
    return (about["cluster_state"], about["cluster_known_nodes"]) == ("ok", "3")


def move_slot(
    slot: int, source: RedisServer, target: RedisServer, nodes: list[RedisServer], halfway: Callable[[], None]
) -> None:
    """Move one key after the other, as `redis-cli --cluster reshard` does, with a stop halfway."""
    source_id, target_id = (tell(node, "CLUSTER MYID") for node in (source, target))
    tell(target, "CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    tell(source, "CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    half = keys_in(source, slot) // 2
    while keys := tell(source, "CLUSTER GETKEYSINSLOT", slot, 1):
        tell(source, "MIGRATE", "127.0.0.1", target.port, keys[0], 0, 5000)
        if keys_in(target, slot) == half:
            halfway()
            assert keys_in(target, slot) == half, "a script ran where half of the keys are"
    for node in [target, source, *nodes]:
        tell(node, "CLUSTER SETSLOT", slot, "NODE", target_id)


def keys_in(node: RedisServer, slot: int) -> int:
    return int(tell(node, "CLUSTER COUNTKEYSINSLOT", slot))


def is_well(program: Program) -> bool:
    status, _ = program.call("GET", "/jobs?limit=1")
    return bool(status == 200)


def test_any_node_of_a_cluster_leads_to_the_one_that_has_the_slot(
    service: Start, redis_server: RedisServer, cluster: list[RedisServer]
) -> None:
    slot: int = tell(cluster[0], "CLUSTER KEYSLOT", PREFIX)
    owner = cluster[slot * 3 // SLOTS]
    for node in cluster:
        program = service(node.url, DIRECT_URL=redis_server.url)
        submitting = Client(partial(int, program.port))
        submitting.go_on(20)
        all_completed(owner.client, submitting.finish())
        eventually(partial(is_well, program), "it lists the jobs")
        stops(program, within=1)


def test_a_slot_that_moves_under_load_takes_every_accepted_job_along(
    service: Start, redis_server: RedisServer, cluster: list[RedisServer]
) -> None:
    slot: int = tell(cluster[0], "CLUSTER KEYSLOT", PREFIX)
    owner = slot * 3 // SLOTS
    source, target = cluster[owner], cluster[owner - 1]
    program = service(source.url, DIRECT_URL=redis_server.url)
    submitting = Client(lambda: program.port)
    submitting.go_on(100)

    def tried() -> int:
        return len(submitting.accepted) + submitting.refused.total()

    def halfway() -> None:
        enough = tried() + 3
        eventually(lambda: tried() >= enough, "some requests met the slot on its way")

    move_slot(slot, source, target, cluster, halfway)
    submitting.go_on(100)
    accepted = submitting.finish()
    assert submitting.refused.keys() <= {503}
    all_completed(target.client, accepted)
    assert keys_in(source, slot) == 0
    eventually(partial(is_well, program), "it lists the jobs")
    stops(program, within=1)


# ── A Redis that is there, and will not ─────────────────────────────────────────────────────────


def test_a_redis_that_is_loading_is_away_until_it_has_loaded(service: Start, own_redis: OwnRedis) -> None:
    server = own_redis()
    program = service(server.url)
    submitting = Client(lambda: program.port)
    submitting.go_on(300)
    accepted = submitting.finish()
    all_completed(server.client, accepted)
    server.client.save()
    server.kill()
    eventually(lambda: program.logged("Redis is away"))
    server.options = ("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    starting = threading.Thread(target=server.start, daemon=True)  # loads 300 keys, 10 ms each
    starting.start()
    job = {"job_type": "append", "payload": {"value": 1}}
    eventually(lambda: "loading" in str(post(program.port, job)).lower(), "503, and why")
    assert not program.logged("Redis is back")
    starting.join()
    eventually(lambda: program.logged("Redis is back"))
    assert program.ended(program.submit("append", value=1))["status"] == "completed"
    all_completed(server.client, accepted)
    stops(program, within=1)
    said = [line for line in program.lines if "Redis is" in line]
    assert ["away" in line for line in said] == [True, False], said


def test_a_primary_that_lacks_replicas_is_503_with_the_reason_until_it_has_them(
    service: Start, redis_server: RedisServer, own_redis: OwnRedis
) -> None:
    server = own_redis()
    program = service(server.url, DIRECT_URL=redis_server.url)
    running = program.submit("gate", name="a")
    arrived(redis_server.client, 1)
    server.client.config_set("min-replicas-to-write", "1")
    job = {"job_type": "append", "payload": {"value": 1}}
    status, answer = post(program.port, job)
    assert status == 503
    assert "Not enough good replicas" in answer["error"]
    redis_server.client.set("open:a", 1)
    eventually(lambda: redis_server.client.llen("left"))  # its report must wait
    server.client.config_set("min-replicas-to-write", "0")
    eventually(lambda: post(program.port, job)[0] == 202, "jobs are accepted again")
    assert program.ended(running)["attempts"] == 1
    all_completed(server.client, {running})
    stops(program, within=1)


# ── The connection level ────────────────────────────────────────────────────────────────────────

LOWERED = """
import os
import trio
import jobqueue

if "SILENT_CLIENT_SECONDS" in os.environ:
    jobqueue.SILENT_CLIENT_SECONDS = float(os.environ["SILENT_CLIENT_SECONDS"])
if "DESCRIPTORS" in os.environ:
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["DESCRIPTORS"]),) * 2)

@jobqueue.handler("tasks")
async def tasks() -> int:
    "How many tasks there are."
    found = [trio.lowlevel.current_root_task()]
    for task in found:
        found += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return len(found)

jobqueue.main()
"""
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")  # and empty SETTINGS
CLOSE = b"Connection: close\r\n\r\n"
MATH = b'{"job_type": "math", "payload": {"a": 1, "b": 2}}'
on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")


@pytest.fixture
def lowered(start: Start, tmp_path: Path) -> Start:
    """Starts the program with limits that can be reached, and a handler that counts its tasks."""
    module = tmp_path / "lowered.py"
    module.write_text(LOWERED)

    def launch(*flags: str, **settings: str) -> Program:
        flags = "--shutdown-grace-seconds", str(GRACE), *flags
        return start(*flags, module=module, PYTHONPATH=str(MODULE.parent), **settings)

    return launch


@pytest.fixture
def memory(start: Start) -> Iterator[Program]:
    """The program in memory; whatever was done to it, it must still answer, and have logged records alone."""
    program = start()
    yield program
    assert program.call("GET", "/jobs?limit=1")[0] == 200
    assert program.stop() == 0
    logged_records_alone(program)


def logged_records_alone(program: Program) -> None:
    assert not [line for line in program.lines if not RECORD.match(line)], program.log
    assert not re.search(r"[^\n -~…]", program.log), ascii(program.log)


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(30)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> str:
        """What is wrong, as the JSON of the answer says."""
        assert self.headers["Content-Type"] == "application/json"
        answer = json.loads(self.body)
        assert list(answer) == ["error"]
        return str(answer["error"])


def read_answer(connection: socket.socket) -> Answer:
    """The next answer that comes on a connection, which may stay open."""
    connection.settimeout(30)
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return Answer(response.status, response.headers, response.read())


def ask(program: Program, method: str, target: str, body: bytes | None = None, **headers: str) -> Answer:
    """As `Program.call`, for whatever is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def descriptors(program: Program) -> int:
    return len(os.listdir(f"/proc/{program.process.pid}/fd"))


def megabytes(program: Program, field: str = "VmRSS") -> float:
    """The memory that the process uses, or, as VmHWM, that it ever used."""
    lines = Path(f"/proc/{program.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field + ":"))


def count_tasks(program: Program) -> int:
    return int(program.ended(program.submit("tasks"))["result"])


def fill(program: Program, count: int) -> None:
    """Submit so many jobs of about 1 kB each, due in an hour."""
    job = {"job_type": "email", "payload": {"to": "a@b.example", "subject": "", "body": "x" * 900}}
    for _ in range(count // 500):
        assert post(program.port, [job | {"delay": 3600}] * 500)[0] == 202


def test_headers_that_never_end_are_cut_off(memory: Program) -> None:
    with sent(memory, GET) as connection:
        assert read_all(connection) == b""  # after the 5 s that an idle connection gets


def test_huge_headers_are_refused(memory: Program) -> None:
    with sent(memory, GET + b"X: " + b"x" * 100_000) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_refused(memory: Program) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01",
        b"HELLO\r\n\r\n",
        b"\r\n" * 50 + b"\0",
    ):
        with sent(memory, data) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection)[:12] in (b"", b"HTTP/1.1 400")


def test_pipelined_requests_are_answered_in_order(memory: Program) -> None:
    ids = [memory.submit("math", a=n, b=n) for n in range(5)]
    requests = [f"GET /job/{job_id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for job_id in ids]
    requests[-1] = requests[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with sent(memory, b"".join(requests)) as connection:
        answer = read_all(connection).decode()
    assert [answer.index(job_id) for job_id in ids] == sorted(answer.index(job_id) for job_id in ids)


@on_linux
def test_clients_that_pipeline_requests_and_close_leave_no_descriptor(lowered: Start) -> None:
    program = lowered()
    program.call("GET", "/jobs?limit=1")
    before = descriptors(program)
    for count in range(200):
        with sent(program, (GET + b"\r\n") * (2 + count % 9)):
            pass
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    eventually(lambda: descriptors(program) <= before, "the descriptors are given back")
    stops(program, GRACE + 1)


def test_the_beginning_of_http2_is_refused(memory: Program) -> None:
    for data in (PREFACE, PREFACE[:18], PREFACE[:24], PREFACE + GET + CLOSE):
        with sent(memory, data) as connection:
            assert read_all(connection)[:12] in (b"", b"HTTP/1.1 505", b"HTTP/1.1 400")


def test_an_offer_to_go_on_in_http2_is_answered_in_http11(memory: Program) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n"
    with sent(memory, GET + offer + b"\r\n") as connection:  # as curl --http2
        assert read_answer(connection)[::2] == (200, b"[]\n")
        connection.sendall(GET + b"\r\n")
        assert read_answer(connection)[::2] == (200, b"[]\n")
    with sent(memory, POST + str(len(MATH)).encode() + b"\r\n" + offer + b"\r\n" + MATH) as connection:
        assert read_answer(connection).status == 202


@pytest.mark.parametrize("space", [b"%20", b" "])
def test_a_web_socket_is_answered_as_plain_http_and_forges_no_line_of_the_log(
    memory: Program, space: bytes
) -> None:
    target = b"/job/x%0a2026-01-01 CRITICAL forged%1b[31m%0d%c2%85%e2%80%a8".replace(b" ", space)
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://elsewhere.example\r\n\r\n"
    )
    with sent(memory, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n" + upgrade) as connection:
        assert read_answer(connection).status == (404 if space == b"%20" else 400)
    for path in (b"/jobs?limit=1", b"/", b"/job", b"/nothing"):
        with sent(memory, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + upgrade) as connection:
            assert read_answer(connection).status in (200, 302, 404, 405)


def test_idle_connections_that_begin_http2_leave_room_for_others(lowered: Start) -> None:
    program = lowered(DESCRIPTORS="256")
    with contextlib.ExitStack() as stack:
        for _ in range(300):  # more than there are descriptors
            stack.enter_context(sent(program, PREFACE))
        assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    stops(program, GRACE + 1)


@on_linux
def test_clients_that_take_nothing_of_a_large_list_cost_little_memory_and_are_cut_off(
    lowered: Start, redis_server: RedisServer
) -> None:
    program = lowered("--workers", "0", REDIS_URL=redis_server.url, SILENT_CLIENT_SECONDS="1")
    fill(program, 20_000)
    before, used = descriptors(program), megabytes(program)
    with contextlib.ExitStack() as stack:
        request = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n"
        clients = [stack.enter_context(sent(program, request, buffer=4096)) for _ in range(50)]
        for client in clients:
            assert client.recv(1) == b"H"
        eventually(lambda: descriptors(program) <= before, "they are cut off")
        for client in clients:
            assert not read_all(client).endswith(b"\r\n0\r\n\r\n")  # it can tell that the list is cut off
    assert megabytes(program, "VmHWM") - used < 150
    stops(program, GRACE + 1)


def test_a_client_that_takes_a_large_list_slowly_gets_all_of_it(
    lowered: Start, redis_server: RedisServer
) -> None:
    program = lowered("--workers", "0", REDIS_URL=redis_server.url, SILENT_CLIENT_SECONDS="1")
    fill(program, 15_000)
    request = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n" + CLOSE
    with sent(program, request, buffer=65_536) as connection:
        parts = []
        for _ in range(60):  # for longer than it may take nothing
            parts.append(connection.recv(65_536))
            time.sleep(0.05)  # this is what makes it slow
        parts.append(read_all(connection))
    assert b"".join(parts).endswith(b"]\n\r\n0\r\n\r\n")
    stops(program, GRACE + 1)


@on_linux
def test_more_clients_than_descriptors_take_none_that_redis_needs(
    lowered: Start, redis_server: RedisServer
) -> None:
    other = lowered("--workers", "0", REDIS_URL=redis_server.url)  # to submit through
    program = lowered(REDIS_URL=redis_server.url, DESCRIPTORS="200")
    waiting, _ = later = [post(other.port, job)[1]["id"] for job in [json.loads(MATH) | {"delay": 3600}] * 2]
    before = descriptors(program)
    wait = f"GET /job/{waiting}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for data in [wait] * 200 + [b"GET"] * 200:  # clients that stay as long as this takes, and idle ones
            stack.enter_context(sent(program, data))
        eventually(lambda: descriptors(program) >= before + 50, "clients are served")
        for _ in range(3):
            for kind in ("normal", "pubsub"):
                redis_server.client.client_kill_filter(_type=kind, skipme=True)
            for _ in range(20):
                eventually(lambda: post(other.port, json.loads(MATH))[0] == 202)  # cut off, too
            eventually(lambda: not redis_server.client.llen(PREFIX + "queue"), "jobs are run")
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    eventually(lambda: descriptors(program) <= before + 3, "the clients are gone")  # 3: connections to Redis
    stops(program, GRACE + 1)
    jobs = check(redis_server.client, set(later)).values()
    assert Counter((job["status"], job["attempts"]) for job in jobs) == {
        ("pending", "0"): len(later),
        ("completed", "1"): 3 * 20 + 1,
    }
    assert "open files" not in program.log


@on_linux
def test_as_many_clients_as_there_is_room_for_are_answered_at_once(lowered: Start) -> None:
    program = lowered(DESCRIPTORS="136")  # of which 100 and two a worker are kept: room for 16
    waiting = post(program.port, json.loads(MATH) | {"delay": 3600})[1]["id"]
    wait = f"GET /job/{waiting}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(15):
            stack.enter_context(sent(program, wait))
        assert program.call("GET", f"/job/{waiting}")[0] == 200
    stops(program, GRACE + 1)


def test_a_truncated_body_submits_nothing(memory: Program) -> None:
    head = POST + b"99\r\n\r\n"
    with sent(memory, head + MATH) as connection:
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
    assert memory.call("GET", "/jobs") == (200, [])


def test_a_body_far_over_the_limit_is_refused_before_it_is_read(memory: Program) -> None:
    head = POST + b"9999999999\r\n\r\n"
    with sent(memory, head) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_500_idle_connections_hinder_nobody(memory: Program) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(sent(memory, b"GET"))
        assert memory.ended(memory.submit("math", a=1, b=2))["result"] == 3


CHUNKED = POST.replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n")
SUBMIT = POST + str(len(MATH)).encode() + b"\r\n\r\n" + MATH
LIST = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: "
RUDE: list[Callable[[random.Random], Sequence[bytes]]] = [  # what a client sends, piece by piece
    lambda chance: [SUBMIT[: chance.randrange(len(SUBMIT))]],  # half a request
    lambda chance: [GET[: chance.randrange(len(GET))]],
    lambda chance: [(GET + b"\r\n") * chance.randrange(2, 40)],  # pipelines
    lambda chance: [SUBMIT * chance.randrange(2, 10), LIST],
    lambda chance: [chance.choice([GET + b"\r\n", SUBMIT]) for _ in range(5)],
    lambda chance: [SUBMIT],
    lambda chance: [LIST * chance.randrange(1, 4)],
    lambda chance: [b"GET /job/x?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    lambda chance: [b"HEAD /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3],
    lambda chance: [GET + UPGRADE + b"websocket\r\nSec-WebSocket-Version: 13\r\n\r\n", chance.randbytes(50)],
    lambda chance: [GET + UPGRADE + b"h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", PREFACE],
    lambda chance: [PREFACE[: chance.randrange(1, 40)], chance.randbytes(chance.randrange(100))],
    lambda chance: [chance.randbytes(chance.randrange(1, 3000))],  # garbage
    lambda chance: [GET + b"\r\n", chance.randbytes(99)],
    lambda chance: [bytes([one]) for one in GET[: chance.randrange(len(GET))]],  # a slow head
    lambda chance: [GET + b"X: " + b"x" * chance.randrange(100_000)],  # a huge one
    lambda chance: [GET + b"X: y\r\n" * chance.randrange(20_000)],
    lambda chance: [CHUNKED + b"\r\n" + b"31\r\n" + MATH[: chance.randrange(len(MATH))]],  # bodies cut off
    lambda chance: [CHUNKED + b"\r\n", chance.randbytes(50)],
    lambda chance: [CHUNKED + b"Content-Length: 5\r\n\r\n31\r\n" + MATH + b"\r\n0\r\n\r\n", GET + b"\r\n"],
    lambda chance: [CHUNKED + b"Expect: 100-continue\r\n\r\n"],
    lambda chance: [POST + b"9999999\r\n\r\n", *[b"x" * 65_536] * chance.randrange(30)],
]


def read_for(connection: socket.socket, seconds: float) -> None:
    connection.settimeout(seconds)
    for _ in range(1000):
        if not connection.recv(65_536):
            break


def leave(connection: socket.socket, chance: random.Random) -> None:
    """End a connection in some way; the caller closes it."""
    reset = struct.pack("ii", 1, 0)
    match chance.randrange(6):
        case 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        case 1:
            read_for(connection, chance.random() / 5)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        case 2:
            connection.shutdown(socket.SHUT_WR)
            read_for(connection, 1)
        case 3:
            read_for(connection, chance.random() / 2)
        case 4:
            time.sleep(1.5 * chance.random())  # takes nothing, perhaps for longer than a client may


def be_rude(port: int, seed: int) -> None:
    """One connection: what is sent on it, and how it ends, follow from the seed."""
    chance = random.Random(seed)
    with contextlib.suppress(OSError), socket.socket() as connection:  # the program may close it first
        connection.settimeout(5)
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        for piece in chance.choice(RUDE)(chance):
            connection.sendall(piece)
            if chance.random() < 0.1:
                time.sleep(0.01)
        leave(connection, chance)


@on_linux
def test_a_thousand_rude_clients_at_random_leave_nothing_behind(lowered: Start) -> None:
    seed, count = random.randrange(1 << 30) if SOAK else 1, max(1000, ROUNDS * 30)
    program = lowered(SILENT_CLIENT_SECONDS="1")
    fill(program, 3000)
    with ThreadPoolExecutor(20) as crowd:  # once, to know what a program in use has
        for number in range(100):
            crowd.submit(be_rude, program.port, seed - number - 1)
    eventually(lambda: count_tasks(program) < 50, "they are gone")
    tasks, files, used = count_tasks(program), descriptors(program), megabytes(program)
    with ThreadPoolExecutor(20) as crowd:
        for number in range(count):
            crowd.submit(be_rude, program.port, seed + number)
    eventually(lambda: count_tasks(program) <= tasks, f"no task is left, with seed {seed}")
    eventually(lambda: descriptors(program) <= files, f"no descriptor is left, with seed {seed}")
    assert megabytes(program) - used < 60
    stops(program, GRACE + 1)
    logged_records_alone(program)


# ── Bad input, by the thousand ──────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["math", "email"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
PAYLOAD = JSON | st.fixed_dictionaries({"a": JSON, "b": JSON})
JOB = JSON | st.fixed_dictionaries(
    {"job_type": st.sampled_from(["math", "email", "long", "?"]) | JSON, "payload": PAYLOAD},
    optional={"delay": JSON, "timeout": JSON, "max_retries": JSON, "extra": JSON},
)
BODY = (
    st.binary()
    | JOB.map(json.dumps).map(str.encode)
    | st.lists(JOB, max_size=3).map(json.dumps).map(str.encode)
)
TEXT = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=40)  # as in a header
MANY = hypothesis.settings(
    max_examples=max(1000, ROUNDS * 30),
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=not SOAK,
)


@pytest.fixture(scope="module")
def fuzzed(session_redis: RedisServer) -> Iterator[Program]:
    """One program for all made-up requests, with nobody to run what they submit."""
    program = Program("--workers", "0", REDIS_URL=session_redis.url + "/1")
    yield program
    assert program.stop() == 0
    assert "ERROR" not in program.log
    logged_records_alone(program)


def exchange(
    program: Program, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def stored(program: Program) -> int:
    """How many jobs there are."""
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/jobs?limit=1")
        counts = connection.getresponse().headers["Job-Counts"]
    return sum(int(count.partition("=")[2]) for count in counts.split(", "))


@MANY
@hypothesis.given(body=BODY, content_type=st.just("application/json") | TEXT)
def test_any_body_is_accepted_whole_or_refused_whole(fuzzed: Program, body: bytes, content_type: str) -> None:
    before = stored(fuzzed)
    status, text = exchange(fuzzed, "POST", "/job", body, {"Content-Type": content_type.strip()})
    answer = json.loads(text)
    if status == 202:
        ids = [job["id"] for job in (answer if isinstance(answer, list) else [answer])]
        assert stored(fuzzed) == before + len(ids)
        for job_id in ids:
            assert exchange(fuzzed, "GET", f"/job/{job_id}", b"", {})[0] == 200
    else:
        assert status in (400, 413, 415)
        assert list(answer) == ["error"]
        assert stored(fuzzed) == before


@MANY
@hypothesis.given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]),
    path=st.sampled_from(["/job/", "/jobs?limit=", "/jobs?status=", "/jobs?limit=1&cursor=", "/jobs?", "/"]),
    rest=st.text(max_size=40),
    header=TEXT,
)
def test_any_address_is_answered_without_an_error_of_the_server(
    fuzzed: Program, method: str, path: str, rest: str, header: str
) -> None:
    target = path + quote(rest.encode("utf-8", "surrogatepass"), safe="&=/?")
    status, _ = exchange(
        fuzzed, method, target, b"", {"Accept": header.strip(), "X-Anything": header.strip()}
    )
    assert status < 500


STRANGE = st.binary(max_size=30)
NO_NAMES = [  # as the Host of a request
    *(b"....", b"a..b", b".a", b"a" * 64, b"a" * 300, b"a." * 150, b"a b", b"a\tb", b"\xff\xe9\x80"),
    *("bücher".encode(), b"[::1", b"::1]", b"[]", b"[::1]x", b"a:b:c", b"localhost:99999999"),
    *(b"user@localhost", b"localhost/x", b"localhost?x", b"localhost#x", b"a,b", b"%"),
]
METHODS = b"GET GET POST POST HEAD DELETE OPTIONS PUT TRACE CONNECT PRI get".split()
TARGETS = rb"""
    / /job /jobs /jobs?limit=1 /job/x /job/x?wait=0 /jobs/ // * /nothing /job/%0a%1b%00 /job/%ff%fe /%
    /%2e%2e/ ? # /jobs?limit=%ff /jobs?%00 /\ http://localhost/jobs http://[/ http://[::1]:99999999/ https://
    localhost:80 //[ /;a@b:
""".split()
HEADERS = b"""Content-Length: 0
Content-Length: 49
Content-Length: -1
Content-Length: 1, 2
Transfer-Encoding: chunked
Transfer-Encoding: gzip
Transfer-Encoding: identity
Expect: 100-continue
Content-Type: application/json
Content-Type: application/json; charset=\xff
Content-Type: ;
Content-Encoding: br
Connection: close
Connection: Upgrade
Upgrade: websocket
Upgrade: h2c
HTTP2-Settings: AAMA
Sec-WebSocket-Version: 13
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
Accept: text/html
Accept: ;q=x
Accept: */*;q=
Authorization: Basic =
Authorization: Bearer
Idempotency-Key: "a"
Idempotency-Key: \xe9
Cookie: =; ;=
Range: bytes=9-1
If-Match: "
If-Modified-Since: -1
Forwarded: for=_
X-Forwarded-For: x
X-Folded: a\r\n b
:""".split(b"\n")
LAST = b"0\r\n\r\n"
BODIES = [b"", b"", MATH, b"31\r\n" + MATH + b"\r\n" + LAST, LAST, b"0\r\nX: y\r\n\r\n", b"zz\r\n", b"["]


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What a client may send: requests made of fragments, with a few bytes changed."""

    def one_of(fragments: Sequence[bytes]) -> bytes:
        return draw(st.sampled_from(fragments) | STRANGE)

    data = b""
    for _ in range(draw(st.integers(1, 3))):
        version = draw(st.sampled_from([b"HTTP/1.1"] * 9 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]))
        lines = [b" ".join([one_of(METHODS), one_of(TARGETS), version])]
        if draw(st.integers(0, 9)):
            lines.append(b"Host: " + draw(st.just(b"localhost") | st.sampled_from(NO_NAMES) | STRANGE))
        lines += [one_of(HEADERS) for _ in range(draw(st.integers(0, 5)))]
        data += b"\r\n".join([*lines, b"", one_of(BODIES)])
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 3)) :]
    return data


@MANY
@hypothesis.given(data=conversations())
def test_any_bytes_are_answered_without_an_error_of_the_server(fuzzed: Program, data: bytes) -> None:
    with sent(fuzzed, data) as connection:
        select.select([connection], [], [], 0.05)  # an answer begins at once, or the request is not complete
        with contextlib.suppress(OSError):  # it may be closed
            connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer[:9] in (b"", b"HTTP/1.1 ")
    assert set(re.findall(rb"(?m)^HTTP/1.1 (5\d\d)", answer)) <= {b"501", b"505"}, answer


def test_a_host_that_can_be_no_name_is_a_clear_error(memory: Program) -> None:
    for host in NO_NAMES:
        for line in (b"GET /jobs?limit=1", b"GET /job/x", b"GET /", b"POST /job", b"OPTIONS /jobs"):
            with sent(memory, line + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + CLOSE) as connection:
                answer = read_answer(connection)
            assert answer.status == 400, (line, host)
            assert "host" in answer.error.lower()


def test_a_host_that_is_another_one_is_refused(memory: Program) -> None:
    for host in (b"", b"-", b"xn--a", b"a.", b"elsewhere.example", b"elsewhere.example:80"):
        with sent(memory, b"GET /jobs HTTP/1.1\r\nHost: " + host + b"\r\n" + CLOSE) as connection:
            answer = read_answer(connection)
        if answer.status != 200 or b"." in host:  # a name without a dot is this machine's
            assert answer.status in (400, 403), host
            assert answer.error


def test_after_two_lengths_of_one_body_the_connection_is_closed(memory: Program) -> None:
    lengths = [b"Transfer-Encoding: chunked\r\n", b"Content-Length: 49\r\n"]
    start = b"POST /job HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(MATH), MATH)
    for head in (start + b"".join(lengths), start + b"".join(lengths[::-1])):
        with sent(memory, head + b"\r\n" + body + GET + b"\r\n") as connection:
            answer = read_all(connection)  # up to the end
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert head[:12] in (b"HTTP/1.1 202", b"HTTP/1.1 400")
        assert b"\r\nconnection: close" in head.lower()
        assert b"HTTP/1.1" not in rest  # what may be a smuggled request is not answered


def test_a_body_in_a_content_encoding_is_refused(memory: Program) -> None:
    for encoding in ("gzip", "br", "GZIP", "identity, gzip"):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        packed = ask(memory, "POST", "/job", gzip.compress(MATH), **headers)
        assert packed.status == 415
        assert "Content-Encoding" in packed.error
    assert memory.call("GET", "/jobs") == (200, [])


def test_a_parameter_given_twice_is_an_error_and_does_nothing(memory: Program) -> None:
    job_id = post(memory.port, json.loads(MATH) | {"delay": 3600})[1]["id"]
    for method, target in (
        ("GET", "/jobs?limit=1&limit=2"),
        ("GET", "/jobs?limit=1&limit=1"),
        ("GET", "/jobs?status=failed&limit=1&status=completed"),
        ("GET", f"/job/{job_id}?wait=1&wait=2"),
        ("DELETE", f"/job/{job_id}?wait=1&wait=2"),
    ):
        answer = ask(memory, method, target)
        assert answer.status == 400, target
        assert re.search("limit|status|wait", answer.error)
    assert memory.job(job_id)["status"] == "pending"


def test_head_is_answered_as_get_without_a_body(memory: Program) -> None:
    job_id = memory.submit("math", a=1, b=2)
    memory.ended(job_id)
    for target in ("/jobs?limit=1", "/jobs", f"/job/{job_id}", "/", "/job/x", "/jobs?limit=x"):
        heads = []
        for method in ("GET", "HEAD"):
            request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n".encode() + CLOSE
            with sent(memory, request) as connection:
                head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert bool(body) == (method == "GET")
            heads.append([line for line in head.split(b"\r\n") if not line.lower().startswith(b"date:")])
        assert heads[0] == heads[1]


def test_every_answer_forbids_guessing_its_type_and_html_has_a_strict_policy(memory: Program) -> None:
    job_id = memory.submit("long", seconds=600)
    json_type = "application/json"
    answers = {
        (method, target, status): ask(memory, method, target, body, **headers)
        for method, target, body, headers, status in (
            ("GET", "/jobs", None, {}, 200),
            ("GET", "/jobs?limit=1", None, {}, 200),
            ("GET", "/jobs", None, {"Accept": "text/html"}, 200),
            ("GET", "/", None, {"Accept": "text/html"}, 302),
            ("HEAD", "/", None, {}, 302),
            ("POST", "/job", MATH, {"Content-Type": json_type}, 202),
            ("POST", "/job", b"{", {"Content-Type": json_type}, 400),
            ("POST", "/job", MATH, {"Content-Type": "text/html"}, 415),
            ("POST", "/job", b" " * 2_000_000, {"Content-Type": json_type}, 413),
            ("GET", "/jobs", None, {"Host": "a..b", "Accept": "text/html"}, 400),
            ("GET", "/jobs", None, {"Host": "elsewhere.example", "Accept": "text/html"}, 403),
            ("GET", "/job/<script>".replace("<", "%3c"), None, {"Accept": "text/html"}, 404),
            ("GET", "/nothing", None, {"Accept": "text/html"}, 404),
            ("GET", "/jobs/", None, {"Accept": "text/html"}, 404),
            ("GET", "/job/", None, {"Accept": "text/html"}, 404),
            ("PUT", "/jobs", None, {"Accept": "text/html"}, 405),
            ("OPTIONS", "/jobs", None, {}, 200),
            ("OPTIONS", "/", None, {"Accept": "text/html"}, 200),
            ("DELETE", f"/job/{job_id}", None, {}, 200),
        )
    }
    for (method, target, status), answer in answers.items():
        assert answer.status == status, (method, target)
        assert answer.headers["X-Content-Type-Options"] == "nosniff", (method, target)
        if answer.headers.get_content_type() == "text/html":
            policy = answer.headers.get_all("Content-Security-Policy", [])
            assert len(policy) == 1, (method, target)
            assert "default-src 'none'" in policy[0]
            assert "frame-ancestors 'none'" in policy[0]


def test_a_redis_url_that_cannot_be_read_shows_nothing_of_its_password() -> None:
    urls = [
        "redis://:geheim/x@host",
        "redis://:geheim@host:port",
        "redis+sentinel://:geheim@",
        "redis+sentinel://:geheim@host:26379",
        "http://:geheim@host",
        ":geheim@host",
    ]
    environ = {name: value for name, value in os.environ.items() if name not in ("PORT", "HOST")}
    processes = [
        subprocess.Popen(
            [sys.executable, MODULE, "--port", "0"],
            env=environ | {"REDIS_URL": url},
            cwd=MODULE.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for url in urls
    ]
    try:
        for url, process in zip(urls, processes, strict=True):
            _, text = process.communicate(timeout=60)
            assert (process.returncode, text.count("\n")) == (2, 1), (url, text)
            assert "REDIS_URL" in text
            assert "geheim" not in text
    finally:
        for process in processes:
            process.kill()


def test_a_password_in_a_redis_url_is_not_logged(start: Start) -> None:
    port = free_port()
    urls = f"redis://:geheim@127.0.0.1:{port}/0", f"redis://127.0.0.1:{port}/0?password=geheim"
    for program in [start(REDIS_URL=url) for url in urls]:
        eventually(partial(program.logged, "Redis is away"))
        stops(program, 1)
        assert "geheim" not in program.log


# ── Where it listens ────────────────────────────────────────────────────────────────────────────


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["localhost", "::"])
def test_a_host_that_means_ipv4_and_ipv6_is_answered_on_both_at_one_port(start: Start, host: str) -> None:
    if host == "::" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    program = start(HOST=host)
    for address in ("127.0.0.1", "::1") if has_ipv6() else ("127.0.0.1",):
        connection = http.client.HTTPConnection(address, program.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/jobs")
            assert connection.getresponse().status == 200
    stops(program, 1)


# ── The store as a state machine ────────────────────────────────────────────────────────────────


class Model(NamedTuple):
    """What the store should say of a job."""

    place: str
    attempts: int
    max_retries: int
    token: str = ""  # of the claim that holds it, or last reported it
    until: int = 0  # in ms: when it is due, its lease ends, or it finished


class StoreMachine(RuleBasedStateMachine):
    """Every transition in every order, by several owners, with the clock moved at will."""

    LEASE = 10_000
    RETENTION = 60_000
    KEEP = 4

    def transport(self) -> tuple[Transport, Any]:
        client = fakeredis.FakeRedis(decode_responses=True)
        return memory_transport(client), client

    @initialize()
    def begin(self) -> None:
        self.carry, self.client = self.transport()
        self.client.flushall()
        self.now, self.claims = 1_000_000, Counter[str]()
        self.jobs: dict[str, Model] = {}
        self.claimed: list[Claim] = []  # every claim that was ever made
        self.tokens: set[str] = set()
        self.move(0)

    def do(self, method: Callable[..., Any], *arguments: Any) -> Any:
        async def main() -> Any:
            async with trio.open_nursery() as nursery:
                pipeline = AutoPipeline(self.carry)
                nursery.start_soon(pipeline.run)
                answer = await method(Store(pipeline, clock=Bench.CLOCK), *arguments)
                nursery.cancel_scope.cancel()
                return answer

        return trio.run(main)

    @rule(seconds=st.integers(0, 40))
    def move(self, seconds: int) -> None:
        self.now += seconds * 1000
        self.client.set(PREFIX + "clock", self.now)

    @rule(delays=st.lists(st.sampled_from([0, 0, 5]), min_size=1, max_size=3), max_retries=st.integers(0, 2))
    def submit(self, delays: list[int], max_retries: int) -> None:
        new = [self.new_job(max_retries, delay) for delay in delays]
        for _ in range(2):  # the second time it changes nothing
            self.do(Store.submit, new)
        for job in new:
            until = self.now + int(job.delay * 1000)
            self.jobs[job.id] = Model("delayed" if job.delay else "queue", 0, max_retries, "", until)

    def new_job(self, max_retries: int, delay: float) -> NewJob:
        self.claims["job"] += 1
        return NewJob(str(uuid.UUID(int=self.claims["job"])), "math", "{}", max_retries, 9.0, delay)

    @rule(owner=st.sampled_from("abc"), again=st.booleans())
    def claim(self, owner: str, again: bool) -> None:
        """Claim a job; said again, as after a lost reply, the claim gets the same job again."""
        self.claims[owner] += not (again and self.claims[owner])
        token = f"{owner}:{self.claims[owner]}"
        held = [
            job for job, model in self.jobs.items() if (model.token, model.place) == (token, "processing")
        ]
        is_new = token not in self.tokens
        self.tokens.add(token)
        _, claim = self.do(Store.report_and_claim, None, token, self.LEASE / 1000)
        is_work = is_new and any(job.place == "queue" for job in self.jobs.values())
        assert (claim is None) == (not held and not is_work)
        if claim:
            job = self.jobs[claim.id]
            assert (claim.id in held) if held else (job.place == "queue")
            assert claim.attempts == job.attempts + (not held)
            until = self.now + self.LEASE
            self.jobs[claim.id] = Model("processing", claim.attempts, job.max_retries, token, until)
            self.claimed.append(claim)

    @rule(data=st.data(), transition=st.sampled_from(["complete", "fail", "retry", "defer", "release"]))
    def report(self, data: st.DataObject, transition: str) -> None:
        """Report on any claim ever made: current, stale, or reported already."""
        if not self.claimed:
            return
        claim = data.draw(st.sampled_from(self.claimed))
        report = Report(claim, transition, "1", "", 3)  # a result or an error, and a delay
        accepted, _ = self.do(Store.report_and_claim, report, "", 0.0)
        job = self.jobs.get(claim.id)
        assert accepted == (job is not None and job.token == claim.token)
        if job and accepted and job.place == "processing":
            place = {"complete": "completed", "fail": "failed", "release": "queue"}.get(transition, "delayed")
            self.jobs[claim.id] = job._replace(
                place=place,
                attempts=job.attempts - (transition in ("release", "defer")),
                token="" if transition == "release" else job.token,
                until=self.now + (3000 if place == "delayed" else 0),
            )

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """Renew any claims ever made; those that are still held get a new lease, the others are told."""
        claims = data.draw(st.lists(st.sampled_from(self.claimed))) if self.claimed else []
        now, lost, cancelled = self.do(Store.renew, [(claim, "") for claim in claims], self.LEASE / 1000)
        held = {(job_id, job.token) for job_id, job in self.jobs.items() if job.place == "processing"}
        assert (now, cancelled) == (self.now, [])
        assert lost == [claim.token for claim in claims if (claim.id, claim.token) not in held]
        for claim in claims:
            if (claim.id, claim.token) in held:
                self.jobs[claim.id] = self.jobs[claim.id]._replace(until=self.now + self.LEASE)

    @rule(end_leases=st.booleans())
    def sweep(self, end_leases: bool) -> None:
        self.do(Store.sweep, self.RETENTION / 1000, self.KEEP, self.now - (not end_leases))
        for job_id, job in list(self.jobs.items()):
            if job.place == "delayed" and job.until <= self.now:
                self.jobs[job_id] = job._replace(place="queue")
            elif job.place == "processing" and job.until <= self.now and end_leases:
                place = "failed" if job.attempts > job.max_retries else "queue"
                self.jobs[job_id] = job._replace(place=place, token="", until=self.now)
        finished = sorted(
            (job.until, job.place, job_id)
            for job_id, job in self.jobs.items()
            if job.place in ("completed", "failed")
        )
        for index, (until, _, job_id) in enumerate(finished):
            if index < len(finished) - self.KEEP or until <= self.now - self.RETENTION:
                del self.jobs[job_id]

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.do(Store.cancel, job_id)
        if self.jobs[job_id].place not in ("completed", "failed"):
            self.jobs[job_id] = self.jobs[job_id]._replace(place="failed", token="cancel", until=self.now)

    @invariant()
    def every_job_is_where_it_should_be(self) -> None:
        if not hasattr(self, "jobs"):
            return
        jobs = check(self.client)
        assert jobs.keys() == self.jobs.keys()
        for place in ("delayed", "processing", "completed", "failed"):
            expected = {job_id: job.until for job_id, job in self.jobs.items() if job.place == place}
            assert dict(self.client.zrange(PREFIX + place, 0, -1, withscores=True)) == expected
        self.check_lists()
        for job_id, model in self.jobs.items():
            assert int(jobs[job_id]["attempts"]) == model.attempts <= model.max_retries + 1
            assert re.sub("cancel:.*", "cancel", jobs[job_id].get("token", "")) == model.token

    def check_lists(self) -> None:
        """Each status lists its jobs, once each, in pages of two; and counts them, whatever was cancelled."""
        places = {"queue": "pending", "delayed": "pending"}
        status_of = {job_id: places.get(job.place, job.place) for job_id, job in self.jobs.items()}
        for status in jobqueue.Status:
            cursor, found = "", list[str]()
            while True:
                cursor, page, counts, _ = self.do(Store.page, status, cursor, 2)
                found += [json.loads(job)["id"] for job in page]
                if not cursor:
                    break
            expected = [job_id for job_id, each in status_of.items() if each == status]
            assert sorted(found) == sorted(expected)
            assert counts[status] == len(expected)


FEW = hypothesis.settings(
    max_examples=max(40, ROUNDS),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=not SOAK,
)


def test_the_store_is_a_state_machine_in_memory() -> None:
    run_state_machine_as_test(StoreMachine, settings=FEW)


def test_the_store_is_a_state_machine_on_redis(redis_server: RedisServer) -> None:
    class OnRedis(StoreMachine):
        def transport(self) -> tuple[Transport, Any]:
            return RedisConnection(redis_server.url).exchange, redis_server.client

    run_state_machine_as_test(OnRedis, settings=FEW)
