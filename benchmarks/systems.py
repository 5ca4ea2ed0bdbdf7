"""The systems that are measured, all behind one interface: this service, and its peers."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import redis
from harness import HERE, MeasurementError, Process

PEERS = ("bullmq", "huey", "saq", "taskiq")
MATH = {"job_type": "math", "payload": {"a": 1, "b": 2}}
ONE_MATH, MATHS = json.dumps(MATH).encode(), json.dumps([MATH] * 1000).encode()
ARRAY = 1000  # jobs in MATHS
SUBMIT_SECONDS = 90.0  # longest time for one submission of many jobs
INSTALL_SECONDS = 600.0
PAUSE_SECONDS = 0.02  # between jobs whose latency is measured: long enough to find all idle


class System:
    """What is measured of every system."""

    name: str
    version: str
    jobs: int  # about what it runs in two seconds

    def submit(self, count: int) -> float:
        """Submit jobs, as fast as it can, to a queue that nobody works on; the seconds it took."""
        raise NotImplementedError

    def working(self, stamps: Path | None = None) -> contextlib.AbstractContextManager[Process]:
        """A process that runs ten jobs at a time, which may still be starting."""
        raise NotImplementedError

    def finished(self) -> int:
        """How many jobs are finished: what this says now, less what it said before."""
        raise NotImplementedError

    def send_stamps(self, count: int, stamps: Path) -> None:
        """Submit jobs one by one that append to a file how long after being sent they were started."""
        raise NotImplementedError


def wait_for_stamps(stamps: Path, count: int) -> None:
    harness.wait_until(lambda: len(stamps.read_text().splitlines()) >= count)


# ── Peers ───────────────────────────────────────────────────────────────────────────────────────


class Peer(System):
    """A system that is a file in `peers/`, and runs in an environment of its own."""

    def __init__(self, name: str, client: redis.Redis, url: str) -> None:
        """Raises MeasurementError if it cannot be had."""
        self.name = name
        program = node() if name == "bullmq" else python()
        self._command = [program, *(["peers/bullmq.mjs"] if name == "bullmq" else ["-m", f"peers.{name}"])]
        self._execute: Any = client.execute_command
        self._env = {"BENCH_REDIS_URL": url}
        told = json.loads(harness.run([*self._command, "describe"], 20, self._env))
        self.version, self.jobs, self._finished = told["version"], told["jobs"], told["finished"]
        self._worker = [*(self._command if name == "bullmq" else [program]), *told["worker"]]

    def submit(self, count: int) -> float:
        return float(harness.run([*self._command, "submit", str(count)], SUBMIT_SECONDS, self._env))

    def working(self, stamps: Path | None = None) -> contextlib.AbstractContextManager[Process]:
        return harness.running(self._worker, {**self._env, "BENCH_STAMPS": str(stamps)})

    def finished(self) -> int:
        return int(self._execute(*self._finished))

    def send_stamps(self, count: int, stamps: Path) -> None:
        with self.working(stamps):
            time.sleep(2)  # nobody can tell when a worker is ready
            harness.run([*self._command, "stamp", str(count)], SUBMIT_SECONDS, self._env)
            wait_for_stamps(stamps, count)


def install(folder: Path, wanted: Path, *commands: list[str]) -> None:
    """Make what peers need from the file that names it, unless that was done before."""
    made_from = folder / f"made-from-{wanted.name}"
    if made_from.exists() and made_from.read_text() == wanted.read_text():
        return
    print(f"installing what {wanted.name} names, this once …", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    for command in commands:
        harness.run(command, INSTALL_SECONDS)
    made_from.write_text(wanted.read_text())


def python() -> str:
    """The interpreter of the environment of the Python peers."""
    venv, wanted = HERE / ".venv", HERE / "requirements.txt"
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(wanted)]
    install(venv, wanted, [sys.executable, "-m", "venv", str(venv)], pip)
    return pip[0]


def node() -> str:
    """The path of node, once the packages are there that BullMQ wants."""
    found, peers = harness.program("node"), HERE / "peers"
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(peers)]
    install(peers / "node_modules", peers / "package.json", [harness.program("npm"), "install", *options])
    return found


# ── The service ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Instance:
    """A running process of the service, or of the bare view."""

    process: Process
    port: int


def wait_for(instances: Sequence[Instance]) -> None:
    """Until all of them listen, also those that share a port."""
    ports = [each.port for each in instances]
    is_ready = lambda: all(harness.listeners(port) == ports.count(port) for port in {*ports})  # noqa: E731
    harness.wait_until(is_ready, instances[-1].process)


class Service(System):
    """This job queue service, run as anybody runs it: a process, flags, and HTTP."""

    def __init__(self, name: str, module: Path, client: redis.Redis, url: str) -> None:
        self.name, self.jobs, self.url = name, 40_000, url
        self._module, self._client = module, client
        self.version = harness.run([sys.executable, str(module), "--version"], 20).strip()

    def _start(self, workers: int, port: int, stamps: Path | None, *flags: str) -> Instance:
        command = [sys.executable, "service.py" if stamps else str(self._module), "--redis-url", self.url]
        command += ["--port", str(port), "--workers", str(workers), "--log-level", "warning", *flags]
        env = {"PYTHONPATH": str(self._module.parent), "BENCH_STAMPS": str(stamps)}
        return Instance(Process(command, env), port)

    @contextlib.contextmanager
    def running(
        self, workers: int, copies: int = 1, shares_port: bool = False, stamps: Path | None = None
    ) -> Iterator[list[Instance]]:
        """Instances that answer. `stamps`: they have the handler of that name, and it writes to this file."""
        instances: list[Instance] = []
        flags, port = (["--reuse-port", "1"] if shares_port else []), harness.free_port()
        try:
            for number in range(copies):
                instances.append(self._start(workers, port, stamps, *flags))
                port = port if shares_port else harness.free_port()
                if number % 4 == 3 or number == copies - 1:  # a few at a time
                    wait_for(instances)
            yield instances
        finally:
            for instance in instances:
                instance.process.kill()

    def submit(self, count: int) -> float:
        """Over REST, in arrays."""
        with self.running(workers=0) as [instance], harness.client(instance.port) as client:
            client.ask(
                "GET", "/jobs?limit=1"
            ).read()  # the connection to Redis is made, the scripts are loaded
            begun = time.perf_counter()
            for _ in range(count // ARRAY):
                client.post(MATHS)
            return time.perf_counter() - begun

    @contextlib.contextmanager
    def working(self, stamps: Path | None = None) -> Iterator[Process]:
        instance = self._start(10, harness.free_port(), stamps)
        try:
            yield instance.process
        finally:
            instance.process.kill()

    def finished(self) -> int:
        return int(self._client.zcard("{jobqueue:3}:completed"))

    def processing(self) -> int:
        return int(self._client.zcard("{jobqueue:3}:processing"))

    def submitted(self) -> int:
        return int(self._client.zcard("{jobqueue:3}:jobs"))

    def send_stamps(self, count: int, stamps: Path) -> None:
        with self.running(10, stamps=stamps) as [instance]:
            self.stamp(instance, count, stamps)

    def stamp(self, entrance: Instance, count: int, stamps: Path) -> None:
        """Send such jobs to an instance, and wait until they have run."""
        with harness.client(entrance.port) as client:
            for _ in range(count):
                client.post(json.dumps({"job_type": "stamp", "payload": {"sent": time.time()}}).encode())
                time.sleep(PAUSE_SECONDS)
        wait_for_stamps(stamps, count)


@contextlib.contextmanager
def bare_view() -> Iterator[Instance]:
    port = harness.free_port()
    with harness.running([sys.executable, "bare.py", str(port)]) as process:
        instance = Instance(process, port)
        wait_for([instance])
        yield instance


def find(name: str, module: Path, beside: Path | None, client: redis.Redis, url: str) -> System:
    """The system of this name; MeasurementError if it cannot be had."""
    if name in PEERS:
        return Peer(name, client, url)
    if name == "beside" and beside is None:
        raise MeasurementError("no --beside was given")
    return Service(name, beside if name == "beside" and beside else module, client, url)
