"""What the tests share: a private Redis server, the store on both kinds of Redis, the program itself."""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import trio
import trio.testing
import trustme

import jobqueue
from jobqueue import AutoPipeline, Command, RedisConnection, Store, Transport

MODULE = Path(jobqueue.__file__)
PREFIX = "{jobqueue}:"
PATIENCE_SECONDS = float(os.environ.get("PATIENCE_SECONDS", "120"))  # when all is well nothing waits so long


def missing(program: str) -> None:
    """Skip a test for want of a program; fail it where NO_SKIPS is set, as in CI."""
    if os.environ.get("NO_SKIPS"):
        pytest.fail(f"{program} is missing, and NO_SKIPS is set")
    pytest.skip(f"needs the program {program}")


def eventually(look: Callable[[], Any], what: str = "") -> Any:
    """Look until there is something to see, and return it."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (seen := look()):
        if time.monotonic() > give_up:
            pytest.fail(f"not within {PATIENCE_SECONDS:g} s: {what or look}; seen instead: {seen!r}")
        time.sleep(0.01)
    return seen


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


class RedisServer:
    """A redis-server of our own on a free port of the loopback: it can be killed, frozen, started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=30)
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        self.process = subprocess.Popen(
            [*command, "--save", "", *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self.answers, "redis-server answers")

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
    if not shutil.which("redis-server"):
        missing("redis-server")
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
    if not shutil.which("redis-server"):
        missing("redis-server")
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


KEYS = f"""(?x) queue|delayed|processing|{"|".join(jobqueue.FINISHED)}  # the places, and what is none
    |started|withdrawn|history|job:.*|idempotency:.*|claim:.*|layout|rights|clock|fail_at"""


class Bench:
    """A store, a plain client to look behind it, and its clock."""

    CLOCK = "local now = tonumber(redis.call('GET', KEYS[1] .. 'clock'))"

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
        self.client.set(PREFIX + "clock", int(self.now * 1000))

    def places(self) -> dict[str, list[str]]:
        """Where every job is: the ids in each place, empty ones left out, first one first."""
        for key in self.client.keys(PREFIX + "*"):
            assert re.fullmatch(KEYS, key.removeprefix(PREFIX)), f"{key}: is it a place? Then look here, too"
        withdrawn = self.client.smembers(PREFIX + "withdrawn")
        queue = self.client.lrange(PREFIX + "queue", 0, -1)[::-1]
        found = {"queue": [job_id for job_id in queue if job_id not in withdrawn]}
        for place in ("delayed", "processing", *jobqueue.FINISHED):
            found[place] = self.client.zrange(PREFIX + place, 0, -1)
        return {place: ids for place, ids in found.items() if ids}

    def job(self, job_id: str) -> dict[str, str]:
        fields: dict[str, str] = self.client.hgetall(f"{PREFIX}job:{job_id}")
        return fields


@pytest.fixture(params=["memory", "redis"])
async def bench(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Bench:
    """The store, on each kind of Redis in turn."""
    if request.param == "memory":
        client = fakeredis.FakeRedis(decode_responses=True)
        made = Bench(memory_transport(client), client)
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        made = Bench(RedisConnection(server.url).exchange, server.client)
    nursery.start_soon(made.pipeline.run)
    return made


@pytest.fixture
async def memory_bench(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Bench:
    """The store in memory, where Redis's clock is Trio's, and Trio's is virtual."""
    client = fakeredis.FakeRedis(decode_responses=True)
    made = Bench(memory_transport(client), client)
    made.follow_trio = True
    nursery.start_soon(made.pipeline.run)
    return made


def record_calls(record: list[list[Command]]) -> Transport:
    """A transport that writes down its batches, and answers each command with itself."""

    async def exchange(commands: Any) -> list[Any]:
        record.append(list(commands))
        await trio.lowlevel.checkpoint()
        return list(commands)

    return exchange


# ── The program, as a process ───────────────────────────────────────────────────────────────────


class Unfinished(dict[str, Any]):
    """A job that is not what is waited for, and shown if it never is."""

    def __bool__(self) -> bool:
        return False


class Program:
    """`python jobqueue.py` on a free port, its log, and a client for it."""

    def __init__(self, *flags: str, module: Path = MODULE, **settings: str) -> None:
        environ = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "PORT", "HOST")}
        self.process = subprocess.Popen(
            [sys.executable, str(module), "--port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=environ | settings,
            cwd=MODULE.parent,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(eventually(lambda: self.logged(r"listening on http://\S+:(\d+)"), "it listens"))

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

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

        def look() -> dict[str, Any]:
            job = self.job(job_id)
            return job if job["status"] in jobqueue.FINISHED else Unfinished(job)

        return dict(eventually(look, "a finished job"))

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
