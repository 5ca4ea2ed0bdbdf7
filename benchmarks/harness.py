"""What the measurements are made with: processes, a private Redis, HTTP, and numbers in /proc.

Nothing here knows of a job queue. All of it is for Linux.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import redis

HERE = Path(__file__).resolve().parent
START_SECONDS = 20.0  # longest wait for any process to be ready


class MeasurementError(Exception):
    """A measurement that could not be made, and why."""


def wait_until(
    condition: Callable[[], object], process: Process | None = None, seconds: float = START_SECONDS
) -> None:
    """Wait for a condition; MeasurementError if it takes too long, or if the process ends meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process:
            process.check()
        if time.monotonic() > deadline:
            raise MeasurementError(f"not ready within {seconds:g} s")
        time.sleep(0.005)


# ── Processes ───────────────────────────────────────────────────────────────────────────────────


class Process:
    """A process in a session of its own, whose output goes to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._name = " ".join(Path(part).name for part in command[:4])
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

    def check(self) -> None:
        """Raise MeasurementError if it has ended."""
        status = self._process.poll()
        if status is not None:
            self._output.seek(0)
            text = self._output.read().decode(errors="replace").strip()[-300:]
            raise MeasurementError(f"{self._name} ended with status {status}: {text or 'no output'}")

    def kill(self) -> None:
        """End it and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def memory_mb(self) -> float:
        """The resident memory of it and of all that it started."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                fields = stat.read_text().rpartition(")")[2].split()
                total += int(fields[21]) if int(fields[3]) == self.pid else 0  # pages, if the session is ours
        return total * os.sysconf("SC_PAGE_SIZE") / 1e6

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_memory_mb(self) -> float:
        """The most resident memory since `reset_peak`, without that of what it started."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) * 1024 / 1e6 if found else 0.0


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
    environ = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, timeout=seconds, text=True)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"{command[0]} took longer than {seconds:g} s") from None
    if done.returncode:
        raise MeasurementError((done.stderr.strip() or done.stdout.strip() or "no output")[-300:])
    return done.stdout


def program(name: str) -> str:
    """The path of a program; MeasurementError if it is not installed."""
    found = shutil.which(name)
    if not found:
        raise MeasurementError(f"there is no {name}")
    return found


def busy_share(seconds: float = 1.0) -> float:
    """How much of the processors is in use while we do nothing: by others, or by the host of this machine."""

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, iowait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
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


def listeners(port: int) -> int:
    """How many sockets listen on a port of IPv4."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)  # 0A: it listens


@contextlib.contextmanager
def private_redis() -> Iterator[tuple[redis.Redis, str]]:
    """A redis-server of our own, which writes nothing to disk: a client of it, and its URL."""
    port = free_port()
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with running(command) as server:
        wait_until(lambda: listeners(port), server)
        client = redis.Redis(port=port, decode_responses=True, socket_timeout=30)
        yield client, f"redis://127.0.0.1:{port}"


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────


class Client:
    """One connection, kept alive, with one request at a time."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        """An answer whose body is still to be read; MeasurementError if it is an error."""
        headers = {"Content-Type": "application/json"} if body else {}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        if answer.status >= 300:
            raise MeasurementError(f"{method} {path}: {answer.status} {answer.read().decode()}")
        return answer

    def post(self, body: bytes) -> None:
        self.ask("POST", "/job", body).read()

    def download(self, path: str) -> tuple[bytes, float, float]:
        """A body, and the seconds until its first byte and until its last."""
        begun = time.perf_counter()
        answer = self.ask("GET", path)
        first = answer.read(1)
        first_at = time.perf_counter()
        rest = answer.read()
        return first + rest, first_at - begun, time.perf_counter() - begun


@contextlib.contextmanager
def client(port: int) -> Iterator[Client]:
    made = Client(port)
    try:
        yield made
    finally:
        made._connection.close()


WRK_SCRIPT = """
wrk.method, wrk.body = "POST", [==[{body}]==]
wrk.headers["Content-Type"] = "application/json"
"""


def wrk(port: int, body: bytes, seconds: int) -> float:
    """POSTs answered in a second: `wrk` on 32 connections, which costs the processors least."""
    with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".lua") as script:
        script.write(WRK_SCRIPT.replace("{body}", body.decode()))
        script.flush()
        command = [program("wrk"), "-t1", "-c32", f"-d{seconds}s", "-s", script.name]
        output = run([*command, f"http://127.0.0.1:{port}/job"], seconds + 30)
    found = re.search(r"Requests/sec:\s+([\d.]+)", output)
    if "Non-2xx" in output or not found:
        raise MeasurementError(f"wrk: {' '.join(output.split())[-300:]}")
    return float(found[1])
