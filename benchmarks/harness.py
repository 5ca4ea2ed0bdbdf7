"""What the measurements are made with: processes, a private Redis, an HTTP client, and numbers in /proc.

Nothing here knows of a job queue. All of it is for Linux.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import redis

HERE = Path(__file__).resolve().parent
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
START_SECONDS = 20.0  # longest wait for any process to be ready
STOP_SECONDS = 10.0  # … and to end


class MeasurementError(Exception):
    """A measurement that could not be made, and why."""


# ── Processes ───────────────────────────────────────────────────────────────────────────────────


class Process:
    """A process in a session of its own, whose output goes to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.command = command
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def output(self) -> str:
        """The end of what it wrote."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 300))
        return self._output.read().decode(errors="replace").strip() or "no output"

    def check(self) -> None:
        """Raise MeasurementError if it has ended."""
        status = self._process.poll()
        if status is not None:
            raise MeasurementError(f"{self._name()} ended with status {status}: {self.output()}")

    def signal(self, number: int) -> None:
        """Send a signal to it alone."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it in its own way. Raises MeasurementError unless that works, and with status 0."""
        self.signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"{self._name()} did not stop within {STOP_SECONDS:g} s") from None
        if status:
            raise MeasurementError(f"{self._name()} ended with status {status}: {self.output()}")

    def kill(self) -> None:
        """End it and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def _name(self) -> str:
        return " ".join(Path(part).name for part in self.command[:4])

    # In /proc: what the kernel knows of it.

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def memory_mb(self) -> float:
        """Resident memory now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES / 1e6

    def peak_memory_mb(self) -> float:
        """The most resident memory since it started, or since `reset_peak`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise MeasurementError("the kernel does not tell the peak of memory")

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def running(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """A process that is killed at the end, if it still runs."""
    process = Process(command, env)
    try:
        yield process
    finally:
        process.kill()


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> str:
    """What a command prints; MeasurementError if it takes too long or does not end well."""
    try:
        done = subprocess.run(
            command,
            cwd=HERE,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"took longer than {seconds:g} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise MeasurementError(reason[:300])
    return done.stdout


def busy_share(seconds: float = 1.0) -> float:
    """How much of the processors is in use while we do nothing: by others, or by the host of this machine."""

    def ticks() -> tuple[int, int]:
        first = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, first.split()[1:9])
        return user + nice + system + irq + softirq + steal, idle + iowait

    busy, free = ticks()
    time.sleep(seconds)
    busy_then, free_then = ticks()
    return (busy_then - busy) / max(1, busy_then - busy + free_then - free)


PORTS = iter(random.sample(range(20_000, 30_000), 10_000))  # from where no system takes ports by itself


def free_port() -> int:
    """A port that nobody listens on, and never the same twice."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise MeasurementError("there is no free port")


@contextlib.contextmanager
def private_redis() -> Iterator[tuple[redis.Redis, str]]:
    """A redis-server of our own, which writes nothing to disk: a client of it, and its URL."""
    program = shutil.which("redis-server")
    if not program:
        sys.exit("run.py: there is no redis-server; install Redis")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with running(command) as server:
        client = redis.Redis(port=port, decode_responses=True, socket_timeout=30)
        wait_until(lambda: _answers(client), server)
        yield client, f"redis://127.0.0.1:{port}"


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def wait_until(
    condition: Any, process: Process | None = None, seconds: float = START_SECONDS, every: float = 0.005
) -> None:
    """Wait for a condition; MeasurementError if it takes too long, or if the process ends meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process:
            process.check()
        if time.monotonic() > deadline:
            raise MeasurementError(f"not ready within {seconds:g} s")
        time.sleep(every)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────
#
# A client that costs little beside what it measures: plain sockets, kept alive, one request at a time on
# each, and of an answer only the status and the length are looked at.


def post(path: str, body: bytes) -> bytes:
    """A request, ready to be sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Answer:
    """The bytes of an answer, as they arrive."""

    def __init__(self) -> None:
        self.data = b""
        self.is_last = False  # whether the server closes the connection after it: hypercorn, each 1,000th
        self._length = -1

    def feed(self, data: bytes) -> bool:
        """Whether the answer is complete. Raises MeasurementError for one that is an error."""
        self.data = self.data + data if self.data else data
        if self._length < 0:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = self.data[:end].lower()
            if not head.startswith(b"http/1.1 20"):
                raise MeasurementError(f"HTTP: {self.data[:300].decode(errors='replace')}")
            start = head.find(b"content-length:")
            if start < 0:
                raise MeasurementError("HTTP: an answer without a length")
            self.is_last = b"connection: close" in head
            self._length = end + 4 + int(head[start + 15 :].split(b"\r\n", 1)[0])
        return len(self.data) >= self._length

    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(connection: socket.socket, request: bytes) -> bytes:
    """Send a request; the body of the answer."""
    connection.sendall(request)
    answer = Answer()
    while not answer.feed(receive(connection)):
        pass
    return answer.body()


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(262_144)
    if not data:
        raise MeasurementError("HTTP: the connection was closed")
    return data


@dataclass(frozen=True)
class Load:
    """What came of many requests."""

    seconds: float
    latencies: list[float]  # in seconds, in the order of the answers

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


class Lane:
    """One connection, and the request that is under way on it."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port = port
        self.connection = connect(port)
        self._request = request
        self.ask()

    def ask(self) -> None:
        self.answer = Answer()
        self.asked = time.perf_counter()
        self.connection.sendall(self._request)


def hammer(
    ports: Sequence[int],
    request: bytes,
    connections: int,
    seconds: float = 3600,
    count: int = sys.maxsize,
    warm_up: float = 0.0,
) -> Load:
    """Send a request on many connections, each as soon as the last one is answered.

    For so many seconds or requests, after a warm-up that does not count.
    """
    latencies: list[float] = []
    lanes: dict[int, Lane] = {}
    with select.epoll() as poller, contextlib.ExitStack() as stack:

        def open_lane(lane: Lane) -> None:
            stack.callback(lane.connection.close)
            lanes[lane.connection.fileno()] = lane
            poller.register(lane.connection, select.EPOLLIN)

        begun = now = time.perf_counter()
        for number in range(min(connections, count)):
            open_lane(Lane(ports[number % len(ports)], request))
        left = count - len(lanes)
        while lanes and now < begun + warm_up + seconds:
            for descriptor, _ in poller.poll(30) or refuse("HTTP: no answer within 30 s"):
                lane = lanes[descriptor]
                if not lane.answer.feed(receive(lane.connection)):
                    continue
                now = time.perf_counter()
                if now >= begun + warm_up:
                    latencies.append(now - lane.asked)
                if left > 0 and not lane.answer.is_last:
                    lane.ask()
                else:
                    poller.unregister(descriptor)
                    del lanes[descriptor]
                    lane.connection.close()
                    if left > 0:
                        open_lane(Lane(lane.port, request))
                left -= 1
    return Load(now - begun - warm_up, latencies)


WRK_SCRIPT = """
wrk.method, wrk.body = "POST", [==[{body}]==]
wrk.headers["Content-Type"] = "application/json"
"""


def load(port: int, request: bytes, connections: int, seconds: float) -> None:
    """POST a request again and again, by `wrk` if it is there, which costs the processors least."""
    program = shutil.which("wrk")
    if not program:
        hammer([port], request, connections, seconds)
        return
    head, _, body = request.decode().partition("\r\n\r\n")
    url = f"http://127.0.0.1:{port}{head.split()[1]}"
    with tempfile.NamedTemporaryFile("w", prefix="bench-wrk-", suffix=".lua") as script:
        script.write(WRK_SCRIPT.replace("{body}", body))
        script.flush()
        command = [program, "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", "-s", script.name, url]
        output = run(command, seconds + 30)
    if "Non-2xx" in output or "requests in" not in output:
        raise MeasurementError(f"HTTP: {output.splitlines()[-1]}")


def refuse(reason: str) -> NoReturn:
    raise MeasurementError(reason)


def timed(connection: socket.socket, request: bytes) -> float:
    """The round trip of one request, in seconds."""
    begun = time.perf_counter()
    exchange(connection, request)
    return time.perf_counter() - begun


LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Download:
    """What came of a streamed answer."""

    first_byte_seconds: float  # until the first byte of the body
    seconds: float
    body: bytes


def download(port: int, path: str) -> Download:
    """Read an answer whose length is not told before: chunks (RFC 9112, section 7.1)."""
    with connect(port) as connection:
        begun = time.perf_counter()
        connection.sendall(get(path))
        pieces, first = [], 0.0
        seen = b""
        while not seen.endswith(LAST_CHUNK):
            data = receive(connection)
            pieces.append(data)
            seen = (seen + data)[-7:] if first else seen + data
            if not first and seen.partition(b"\r\n\r\n")[2]:
                first = time.perf_counter() - begun
        took = time.perf_counter() - begun
    head, _, chunked = b"".join(pieces).partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise MeasurementError(f"HTTP: {head[:300].decode(errors='replace')}")
    return Download(first, took, _joined(chunked))


def _joined(chunked: bytes) -> bytes:
    pieces: list[bytes] = []
    start = 0
    while True:
        end = chunked.index(b"\r\n", start)
        size = int(chunked[start:end], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(chunked[end + 2 : end + 2 + size])
        start = end + 2 + size + 2
