"""The promises under faults: real processes and a real Redis, broken as their users' machines break them.

Leases are short by setting. Nothing here sleeps to wait: it looks until it sees. A longer soak is

    SOAK_ROUNDS=1000 .venv/bin/python -m pytest test_faults.py -k random
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import fakeredis
import hypothesis
import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from conftest import PREFIX, Bench, Program, RedisServer, eventually, free_port, memory_carrier
from jobqueue import AutoPipeline, Carrier, Claim, NewJob, Outcome, RedisConnection, Store

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
return {jobs, #redis.call('KEYS', KEYS[1] .. 'job:*'),
  read('LRANGE', 'queue', 0, -1), read('ZRANGE', 'delayed', 0, -1), read('ZRANGE', 'processing', 0, -1),
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
        return jobs if {job["status"] for job in jobs.values()} <= {"completed", "failed"} else None

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
    eventually(lambda: not redis_server.client.llen(PREFIX + "queue"), "all are claimed")
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


# ── The connection level ────────────────────────────────────────────────────────────────────────


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(30)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def memory(start: Start) -> Iterator[Program]:
    """The program in memory; whatever was done to it, it must still answer, and have logged no traceback."""
    program = start()
    yield program
    assert program.call("GET", "/jobs?limit=1")[0] == 200
    assert program.stop() == 0


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


def test_a_truncated_body_submits_nothing(memory: Program) -> None:
    body = b'{"job_type": "math", "payload": {"a": 1, "b": 2}}'
    head = POST + b"99\r\n\r\n"
    with sent(memory, head + body) as connection:
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

    def carrier(self) -> tuple[Carrier, Any]:
        client = fakeredis.FakeRedis(decode_responses=True)
        return memory_carrier(client), client

    @initialize()
    def begin(self) -> None:
        self.carry, self.client = self.carrier()
        self.client.flushall()
        self.now, self.claims = 1_000_000, Counter[str]()
        self.jobs: dict[str, Model] = {}
        self.known: list[Claim] = []  # every claim whose owner knows of it
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

    @rule(owner=st.sampled_from("abc"), known=st.booleans())
    def claim(self, owner: str, known: bool) -> None:
        """Claim a job; the reply may be lost, and then the owner does not know of it."""
        self.claims[owner] += 1
        token = f"{owner}:{self.claims[owner]}"
        _, claim = self.do(Store.report_and_claim, None, token, self.LEASE / 1000)
        assert (claim is None) == (not any(job.place == "queue" for job in self.jobs.values()))
        if claim:
            job = self.jobs[claim.id]
            assert job.place == "queue"
            assert claim.attempts == job.attempts + 1
            self.jobs[claim.id] = Model(
                "processing", claim.attempts, job.max_retries, token, self.now + self.LEASE
            )
            if known:
                self.known.append(claim)

    @rule(data=st.data(), transition=st.sampled_from(["complete", "fail", "retry", "release"]))
    def report(self, data: st.DataObject, transition: str) -> None:
        """Report on any claim ever made: current, stale, or reported already."""
        if not self.known:
            return
        claim = data.draw(st.sampled_from(self.known))
        arguments: tuple[str | int, ...] = ("1", 3000)  # a result or an error, and a delay
        accepted, _ = self.do(Store.report_and_claim, Outcome(claim, transition, arguments), "", 0.0)
        job = self.jobs.get(claim.id)
        assert accepted == (job is not None and job.token == claim.token)
        if job and accepted and job.place == "processing":
            place = {"complete": "completed", "fail": "failed", "retry": "delayed", "release": "queue"}[
                transition
            ]
            self.jobs[claim.id] = job._replace(
                place=place,
                attempts=job.attempts - (transition == "release"),
                token="" if transition == "release" else job.token,
                until=self.now + (3000 if transition == "retry" else 0),
            )

    @rule(owner=st.sampled_from("abc"))
    def extend(self, owner: str) -> None:
        """An owner names all that he knows; what he does not know of is taken from him."""
        known = [claim.token for claim in self.known if claim.token.startswith(owner)]
        now, lost = self.do(Store.extend, owner, self.claims[owner], known, self.LEASE / 1000)
        holding = {job.token for job in self.jobs.values() if job.place == "processing"}
        assert (now, sorted(lost)) == (self.now, sorted(set(known) - holding))
        for job_id, job in self.jobs.items():
            if job.place == "processing" and job.token.startswith(owner):
                if job.token in known:
                    self.jobs[job_id] = job._replace(until=self.now + self.LEASE)
                else:
                    self.jobs[job_id] = job._replace(place="queue", attempts=job.attempts - 1, token="")

    @rule(end_leases=st.booleans())
    def sweep(self, end_leases: bool) -> None:
        self.do(Store.sweep, self.RETENTION / 1000, self.now - (not end_leases))
        for job_id, job in list(self.jobs.items()):
            if job.place == "delayed" and job.until <= self.now:
                self.jobs[job_id] = job._replace(place="queue")
            elif job.place == "processing" and job.until <= self.now and end_leases:
                place = "failed" if job.attempts > job.max_retries else "queue"
                self.jobs[job_id] = job._replace(place=place, token="", until=self.now)
            elif job.place in ("completed", "failed") and job.until <= self.now - self.RETENTION:
                del self.jobs[job_id]

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.jobs:
            return
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.do(Store.cancel, job_id)
        if self.jobs[job_id].place not in ("completed", "failed"):
            self.jobs[job_id] = self.jobs[job_id]._replace(place="failed", token="", until=self.now)

    @invariant()
    def every_job_is_where_it_should_be(self) -> None:
        if not hasattr(self, "jobs"):
            return
        jobs = check(self.client)
        assert jobs.keys() == self.jobs.keys()
        for place in ("delayed", "processing", "completed", "failed"):
            expected = {job_id: job.until for job_id, job in self.jobs.items() if job.place == place}
            assert dict(self.client.zrange(PREFIX + place, 0, -1, withscores=True)) == expected
        for job_id, model in self.jobs.items():
            assert int(jobs[job_id]["attempts"]) == model.attempts <= model.max_retries + 1
            assert jobs[job_id].get("token", "") == model.token


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
        def carrier(self) -> tuple[Carrier, Any]:
            return RedisConnection(redis_server.url).exchange, redis_server.client

    run_state_machine_as_test(OnRedis, settings=FEW)
