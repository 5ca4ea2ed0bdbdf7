"""What the tests share: a private Redis server, the store on both kinds of Redis, the program itself."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

import jobqueue
from jobqueue import AutoPipeline, NewJob, Pool, RedisConnection, Settings, Store, Transport

MODULE = Path(jobqueue.__file__)
PREFIX = jobqueue.PREFIX
PATIENCE_SECONDS = float(os.environ.get("PATIENCE_SECONDS", "120"))  # when all is well nothing waits so long


def missing(program: str) -> None:
    """Skip a test for want of a program; fail it where NO_SKIPS is set, as in CI."""
    if os.environ.get("NO_SKIPS"):
        pytest.fail(f"{program} is missing, and NO_SKIPS is set")
    pytest.skip(f"needs the program {program}")


def eventually(look: Callable[[], Any], what: str = "", until: Callable[[Any], Any] = bool) -> Any:
    """Look until there is something to see, and return it."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not until(seen := look()):
        if time.monotonic() > give_up:
            pytest.fail(f"not within {PATIENCE_SECONDS:g} s: {what or look}; seen instead: {seen!r}")
        time.sleep(0.01)
    return seen


@pytest.fixture
def handler() -> Iterator[Callable[..., Any]]:
    """The decorator; what it registers is gone after the test."""
    before = dict(jobqueue.HANDLERS)
    yield jobqueue.handler
    jobqueue.HANDLERS.clear()
    jobqueue.HANDLERS.update(before)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


class RedisServer:
    """A redis-server of our own on a free port of the loopback: it can be killed, frozen, started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        if not shutil.which("redis-server"):
            missing("redis-server")
        self.folder, self.options = folder, options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=30)
        self.start()

    def start(self) -> None:
        fixed = f"--bind 127.0.0.1 --port {self.port} --dir {self.folder} --logfile redis.log --save"
        self.process = subprocess.Popen(["redis-server", *fixed.split(), "", *self.options])
        eventually(self.answers, "redis-server answers")
        assert self.client.info("server")["process_id"] == self.process.pid, "another server has its port"

    def answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.client.ping())
        return False

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_server(session_redis: RedisServer) -> RedisServer:
    """The shared server, emptied."""
    session_redis.client.flushall()
    session_redis.client.script_flush()
    return session_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Makes servers for one test alone, which may do to them what it likes."""
    servers: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """A certificate authority, in `ca.pem`, that programs of this test trust."""
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return made


def memory_transport(client: fakeredis.FakeRedis) -> Transport:
    """As `jobqueue.memory`, but without a thread: so Trio's virtual clock sees who waits for what."""

    async def exchange(commands: Any) -> list[Any]:
        await trio.lowlevel.checkpoint()
        pipe: Any = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return list(pipe.execute(raise_on_error=False))

    return exchange


# ── The store, its clock in the hands of the test ───────────────────────────────────────────────


def new_job(**options: Any) -> NewJob:
    return NewJob(str(uuid.uuid4()), "math", '{"a": 1, "b": 2}', 3, 60.0, 0)._replace(**options)


SETS = ("delayed", "leases", "finished", "jobs", *jobqueue.Status)
KEYS = re.compile(rf"queue|{'|'.join(SETS)}|number|wake|job:.*|idempotency:.*|claim:.*|clock|fail_at")


class Bench:
    """A store, a plain client to look behind it, and its clock."""

    CLOCK = "local now = redis.call('GET', KEYS[1] .. 'clock')"

    def __init__(self, transport: Transport, client: Any) -> None:
        self.transport = transport
        self.client = client
        self.pipeline = AutoPipeline(self._carry)
        self.store = Store(self.pipeline, clock=self.CLOCK)
        self.follow_trio = False
        self.away = False  # whether Redis cannot be reached
        self.refuses = ""  # what it says to every command
        self.now = 1_000_000.0
        self.move(0)

    async def _carry(self, commands: Any) -> list[Any]:
        if self.away:
            raise redis.ConnectionError("away")
        if self.refuses:
            return [redis.ResponseError(self.refuses) for _ in commands]
        if self.follow_trio:
            self.client.set(PREFIX + "clock", int((1_000_000 + trio.current_time()) * 1000))
        return await self.transport(commands)

    def move(self, seconds: float) -> None:
        """Let time pass for Redis."""
        self.now += seconds
        self.client.set(PREFIX + "clock", round(self.now * 1000))

    def keys(self) -> dict[str, list[str]]:
        """The ids in each list and sorted set, the first one first, also those that a script left there."""
        for key in self.client.keys(PREFIX + "*"):
            assert KEYS.fullmatch(key.removeprefix(PREFIX)), f"{key}: is it a place? Then look here, too"
        sets = {name: self.client.zrange(PREFIX + name, 0, -1) for name in SETS}
        return {"queue": self.client.lrange(PREFIX + "queue", 0, -1)[::-1]} | sets

    def places(self) -> dict[str, list[str]]:
        """Where each job is, the first one first, empty places left out. All keys must agree on that."""
        keys, ids = self.keys(), [key.rpartition(":")[2] for key in self.client.keys(PREFIX + "job:*")]
        status = {job_id: self.job(job_id)["status"] for job_id in ids}
        number = {job_id: float(self.job(job_id)["number"]) for job_id in ids}
        found = {name: keys[name] for name in ("queue", "delayed", "processing", *jobqueue.FINISHED)}
        found["queue"] = [each for each in keys["queue"] if status.get(each) == "pending"]  # or cancelled
        seen = {each for place in found.values() for each in place}
        assert sum(map(len, found.values())) == len(seen), f"a job is in two places: {keys}"
        assert seen == set(ids), f"a job is nowhere, or is none: {keys}, {ids}"
        for name in jobqueue.Status:
            scores = dict(self.client.zrange(PREFIX + name, 0, -1, withscores=True))
            assert scores == {each: number[each] for each in ids if status[each] == name}, f"{name}: {keys}"
        assert dict(self.client.zrange(PREFIX + "jobs", 0, -1, withscores=True)) == number
        assert set(keys["leases"]) == set(keys["processing"]), keys
        assert set(keys["finished"]) == {*keys["completed"], *keys["failed"]}, keys
        return {place: ids for place, ids in found.items() if ids}

    def job(self, job_id: str) -> dict[str, str]:
        return dict(self.client.hgetall(f"{PREFIX}job:{job_id}"))


def bench_in_memory() -> Bench:
    client = fakeredis.FakeRedis(decode_responses=True, encoding_errors="replace")
    return Bench(memory_transport(client), client)


@pytest.fixture(params=["memory", "redis"])
async def bench(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Bench:
    """The store, on each kind of Redis in turn."""
    made = bench_in_memory()
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        made = Bench(RedisConnection(server.url).exchange, server.client)
    nursery.start_soon(made.pipeline.run)
    return made


@pytest.fixture
async def memory_bench(autojump_clock: MockClock, nursery: trio.Nursery) -> Bench:
    """The store in memory, where Redis's clock is Trio's, and Trio's is virtual."""
    made = bench_in_memory()
    made.follow_trio = True
    nursery.start_soon(made.pipeline.run)
    return made


# ── An instance without sockets, on virtual time ────────────────────────────────────────────────


class Service:
    """An instance without sockets: its pool, a client of its API, and a test's functions as handlers."""

    def __init__(
        self,
        bench: Bench,
        nursery: trio.Nursery,
        handler: Any,
        log: pytest.LogCaptureFixture,
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.bench, self.nursery, self.handler, self.log, self.patch = bench, nursery, handler, log, patch
        self._is_done = trio.Event()
        self.set_up()

    def beside(self) -> Service:
        """Another instance."""
        return Service(self.bench, self.nursery, self.handler, self.log, self.patch)

    def set_up(self, **settings: Any) -> Pool:
        self.pool = Pool(self.bench.store, Settings(**settings))
        self.client: Any = jobqueue.create_app(self.pool).test_client()
        return self.pool

    async def _work(self) -> None:
        async with trio.open_nursery() as attempts:
            for name in "ab":
                attempts.start_soon(jobqueue.dispatch, self.pool, f"{self.pool.instance}:{name}", attempts)
        self._is_done.set()

    async def run(self, keeps_house: bool = True, **settings: Any) -> Pool:
        """Start what `serve` starts, but HTTP, with one worker."""
        self.set_up(**{"workers": 1} | settings)
        for task in (jobqueue.keep_house, jobqueue.end_grace) if keeps_house else ():
            self.nursery.start_soon(task, self.pool)
        self.nursery.start_soon(self._work)
        await wait_all_tasks_blocked()
        return self.pool

    async def stop(self, grace: float = 20) -> float:
        """Stop it; how many seconds it took."""
        begun = trio.current_time()
        self.pool.stop(begun + grace)
        await self._is_done.wait()
        return trio.current_time() - begun

    async def submit(self, work: str | Callable[..., Any] = "math", **options: Any) -> str:
        """Submit a job, of a type or for a handler that is made of a function, and ring, as a POST does."""
        if callable(work):
            self.handler(work.__name__, replace=True)(work)
            options, work = {"payload": "{}"} | options, work.__name__
        job = new_job(job_type=work, **options)
        await self.bench.store.submit([job])
        self.pool.ring()
        return job.id

    async def field(self, job_id: str, name: str) -> str:
        """What a field of a job holds, once it does."""
        look = self.bench.job
        return str(await until(lambda: look(job_id).get(name), lambda: look(job_id)))

    async def ended(self, job_id: str) -> dict[str, str]:
        """The job, once it is finished."""
        await until(
            lambda: self.bench.job(job_id)["status"] in jobqueue.FINISHED, lambda: self.bench.job(job_id)
        )
        return self.bench.job(job_id)

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status, and what the JSON of the answer says. Its headers are kept."""
        sent: dict[str, str] = {} if body is None else {"Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        response = await self.client.open(path, method=method, data=data, headers=sent)
        self.headers = response.headers
        return response.status_code, json.loads(await response.get_data())

    async def post(self, body: Any) -> str:
        """Submit by the API a job that must be accepted; its id."""
        status, answer = await self.call("POST", "/job", body)
        assert status == 202, answer
        return str(answer["id"])


@pytest.fixture
async def service(
    memory_bench: Bench,
    nursery: trio.Nursery,
    handler: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Service:
    return Service(memory_bench, nursery, handler, caplog, monkeypatch)


async def until(look: Callable[[], Any], shown: Callable[[], Any] = str) -> Any:
    """What there is to see, once there is, on virtual time."""
    for _ in range(20_000):
        if seen := look():
            return seen
        await trio.sleep(0.05)
    pytest.fail(f"it never came; seen instead: {shown()!r}")


def end_of(job: dict[str, str]) -> tuple[str, str, str]:
    return job["status"], job["attempts"], job.get("result") or job["error"]


def hold(service: Service, name: str) -> tuple[list[Any], trio.Event]:
    """Hold up the answers of a method of the store; its calls, and the event that lets them go on."""
    method, calls, may_end = getattr(service.bench.store, name), list[Any](), trio.Event()

    async def held(*arguments: Any) -> Any:
        answer = await method(*arguments)
        calls.append((*arguments, answer))
        await may_end.wait()
        return answer

    service.patch.setattr(service.bench.store, name, held)
    return calls, may_end


# ── The program, as a process ───────────────────────────────────────────────────────────────────


class Program:
    """`python jobqueue.py` on a free port, its log, and a client for it."""

    def __init__(self, *flags: str, module: Path = MODULE, **settings: str) -> None:
        ours = {each.name.upper() for each in dataclasses.fields(jobqueue.Settings)}
        environ = {name: value for name, value in os.environ.items() if name not in ours}
        command = [sys.executable, str(module), "--port", "0", *flags]
        pipe: Any = {"stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environ | settings, cwd=MODULE.parent, **pipe)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self.lines.extend, args=[self.process.stderr], daemon=True)
        self._reader.start()
        listens = r"listening on http://\S+:(\d+)"
        eventually(lambda: self.logged(listens) or self.process.poll() is not None, "it listens")
        assert self.logged(listens), self.log
        self.port = int(self.logged(listens))

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def logged(self, pattern: str) -> str:
        """What a pattern, or its first group, matches in the log; empty if nothing does."""
        found = re.search(pattern, self.log)
        return found[found.lastindex or 0] if found else ""

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status, and what the JSON of the answer says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if content is not None:
            headers = {"Content-Type": "application/json"} | headers
        with contextlib.closing(connection):
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def submit(self, job_type: str, **payload: Any) -> str:
        """Submit a job that must be accepted; its id."""
        status, answer = self.call("POST", "/job", {"job_type": job_type, "payload": payload})
        assert status == 202, answer
        return str(answer["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        status, answer = self.call("GET", f"/job/{job_id}")
        assert status == 200, answer
        return dict(answer)

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job, once it is finished."""
        look, ends = partial(self.job, job_id), ("completed", "failed")
        return dict(eventually(look, "a finished job", lambda job: job["status"] in ends))

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal, wait for the end, and return the exit status. There must be no traceback."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join()
        assert "Traceback" not in self.log, self.log
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Starts programs, and kills those that the test left running."""
    programs: list[Program] = []

    def launch(*flags: str, module: Path = MODULE, **settings: str) -> Program:
        programs.append(Program(*flags, module=module, **settings))
        return programs[-1]

    yield launch
    for program in programs:
        program.kill()
