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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import PREFIX, Program, RedisServer, eventually

Start = Callable[..., Program]
OwnRedis = Callable[..., RedisServer]
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "30"))
LEASE = ("--lease-seconds", "1")

SERVICE = """
import os, signal, time
import redis, trio
import jobqueue

client = redis.Redis.from_url(os.environ.get("DIRECT_URL") or os.environ["REDIS_URL"])
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


def check(client: Any, ids: set[str] | None = None) -> dict[str, dict[str, str]]:
    """Every job is whole and in exactly one place, which its status names; the jobs, by id."""
    pipe = client.pipeline()
    pipe.lrange(PREFIX + "queue", 0, -1)
    for place in ("delayed", "processing", "completed", "failed", "history"):
        pipe.zrange(PREFIX + place, 0, -1)
    queue, delayed, processing, completed, failed, history = pipe.execute()
    places = Counter([*queue, *delayed, *processing, *completed, *failed])
    assert max(places.values(), default=1) == 1, [job for job, count in places.items() if count > 1]
    assert set(places) == set(history)
    jobs = {job_id: client.hgetall(f"{PREFIX}job:{job_id}") for job_id in history}
    assert len(client.keys(PREFIX + "job:*")) == len(history)
    for status, members in [
        ("pending", [*queue, *delayed]),
        ("processing", processing),
        ("completed", completed),
        ("failed", failed),
    ]:
        assert {jobs[job_id]["status"] for job_id in members} <= {status}
    for job_id, job in jobs.items():
        assert {"job_type", "payload", "max_retries", "timeout", "created_at"} <= job.keys(), job_id
        assert int(job["attempts"]) <= int(job["max_retries"]) + 1
    if ids is not None:
        assert ids <= jobs.keys(), f"lost: {ids - jobs.keys()}"
    return jobs


def all_completed(client: Any, ids: set[str]) -> None:
    """Wait until nothing is left to do; then every job is completed, and `ids` are among them."""

    def idle() -> bool:
        return not any(
            [
                client.llen(PREFIX + "queue"),
                client.zcard(PREFIX + "delayed"),
                client.zcard(PREFIX + "processing"),
            ]
        )

    eventually(idle, "all jobs are done")
    jobs = check(client, ids)
    assert {job["status"] for job in jobs.values()} <= {"completed"}, [
        job for job in jobs.values() if job["status"] != "completed"
    ]


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
    assert third.logged(f"{job_id}: its worker is gone") or second.logged(f"{job_id}: its worker is gone")
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
    job_id = program.call("POST", "/job", {"job_type": "suicide", "payload": {}, "max_retries": 2})[1]["id"]
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
    eventually(lambda: frozen.logged(f"{job_id}: (cancelled|reported).* its lease was lost"))
    assert client.lrange("left", 0, -1) == ["a"]  # the frozen one's `finally` ran, the other still runs
    client.set("open:a", 1)
    job = other.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 2, str(other.process.pid))
    check(client)


def test_a_handler_that_blocks_the_event_loop_loses_its_job_and_is_named(
    service: Start, redis_server: RedisServer
) -> None:
    blocked = service(redis_server.url)
    job_id = blocked.submit("block")
    eventually(lambda: status_of(redis_server, job_id) == "processing")
    other = service(redis_server.url)
    assert other.ended(job_id)["attempts"] == 2
    eventually(lambda: blocked.logged(r"the event loop stood still for \d.* block"))
    eventually(lambda: blocked.logged(f"{job_id}: .*its lease was lost"))
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
    jobs = check(server.client)
    assert {job["status"] for job in jobs.values()} == {"completed"}
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
        program.call("POST", "/job", {"job_type": "append", "payload": {"value": n}, "delay": 2})
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
    right, wrong = service(redis_server.url, "--workers", "1"), service(redis_server.url, SKEW=skew)
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
                fault = self.fault if random.random() < 0.05 else ""
                self.faults += bool(fault)
                if fault == "swallow" and replies:
                    continue  # the command was carried out, its reply never comes
                if fault == "cut" and replies:
                    sink.sendall(data[: len(data) // 2])
                    break
                if fault == "drop" and not replies:
                    break  # the command never arrives
                if fault == "delay":
                    time.sleep(random.random() * 0.3)
                if fault == "late" and not replies:
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
    eventually(lambda: proxy.faults >= (5 if fault in ("swallow", "late") else 60))
    proxy.fault = ""
    accepted = submitting.finish()
    all_completed(redis_server.client, accepted)
    jobs = check(redis_server.client, accepted)
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
    head = b"POST /job HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with sent(program, head), sent(program, b"GET /jobs HT"):
        program.call("GET", "/jobs")
        stops(program, GRACE + 1)


def test_shutdown_with_a_client_that_reads_nothing_of_a_large_answer(
    graceful: Start, redis_server: RedisServer
) -> None:
    program = graceful(redis_server.url, "--workers", "0")
    for _ in range(20):
        post(program.port, [{"job_type": "append", "payload": {"value": n}} for n in range(1000)])
    with sent(program, b"GET /jobs HTTP/1.1\r\nHost: x\r\n\r\n", buffer=4096) as connection:
        assert connection.recv(1) == b"H"
        stops(program, GRACE + 1)


def test_shutdown_lets_ten_running_jobs_finish(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url)
    ids = {program.submit("long", seconds=2) for _ in range(10)}
    eventually(lambda: redis_server.client.zcard(PREFIX + "processing") == 10)
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
    program = graceful(redis_server.url)
    job_id = program.submit("block", seconds=3)
    eventually(lambda: status_of(redis_server, job_id) == "processing")
    stops(program, 3 + GRACE + 1)


def test_a_second_signal_ends_the_grace(service: Start, redis_server: RedisServer) -> None:
    program = service(redis_server.url, "--shutdown-grace-seconds", "600")
    job_id = program.submit("gate", name="a")
    arrived(redis_server.client, 1)
    stops(program, 1, signals=2)
    assert redis_server.client.lrange(PREFIX + "queue", 0, -1) == [job_id]


def test_shutdown_while_waiting_for_redis_at_start(graceful: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = graceful(f"redis://127.0.0.1:{port}")
    eventually(lambda: program.logged("Redis is away"))
    stops(program, 1)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_shutdown_with_redis_away(graceful: Start, own_redis: OwnRedis, fault: int) -> None:
    server = own_redis()
    program = graceful(server.url)
    program.submit("gate", name="a")
    arrived(server.client, 1)
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
    all_completed(redis_server.client, accepted)
    assert {job["attempts"] for job in check(redis_server.client).values()} == {"1"}
    assert set(Counter(redis_server.client.lrange("appended", 0, -1)).values()) == {1}
    assert program.stop() == 0
