"""The systems that are measured, all behind one interface: this service, the limits, and the peers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import harness
import redis
from harness import HERE, MeasurementError, Process

LIMITS = ("pipeline", "quart-trio", "hypercorn")
PEERS = ("bullmq", "huey", "saq", "taskiq", "streaq", "dramatiq", "rq", "celery", "arq")
FAST_PEERS = ("bullmq", "huey", "dramatiq")  # for a quick run
MATH = {"job_type": "math", "payload": {"a": 1, "b": 2}}
SUBMIT_SECONDS = 90.0  # longest time for one submission of many jobs
INSTALL_SECONDS = 600.0

ONE_MATH = harness.post("/job", json.dumps(MATH).encode())

# How jobs are submitted: by one submitter one after the other, by 32 at once, or many in one call.
ONE, TASKS, BULK_100, BULK_1000 = "one by one", "32 at once", "100 in a call", "1,000 in a call"


@dataclass(frozen=True)
class Setting:
    """A way to run jobs: how many processes, and how many jobs at the same time in each."""

    label: str
    several: bool = False  # whether it is more than one process
    copies: int = 1
    concurrency: int = 10
    worker: list[str] = field(default_factory=list)
    log_level: str = "warning"  # of this service


class System:
    """What is measured of every system; what one cannot do raises MeasurementError."""

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.settings: list[Setting] = []
        self.ways: list[str] = []  # the fastest is the last
        self.stamps = False  # whether it has `send_stamps`
        self.jobs = 0  # about what it runs in two seconds

    def submit(self, way: str, count: int) -> float:
        """Submit jobs to a queue that nobody works on; the seconds it took."""
        raise MeasurementError("it takes no jobs")

    def submission_rate(self, way: str, quick: bool) -> float:
        """Jobs/s that such a submission of about a second has."""
        count = (20_000 if way in (BULK_100, BULK_1000) else min(self.jobs, 4000)) // (2 if quick else 1)
        return count / self.submit(way, count)

    def working(self, setting: Setting) -> contextlib.AbstractContextManager[list[Process]]:
        """Its workers, which may still be starting."""
        raise MeasurementError("it has no workers")

    def finished(self) -> int:
        """How many jobs are finished: what this says now, less what it said before."""
        raise MeasurementError("it has no workers")

    def send_stamps(self, count: int, stamps: Path) -> None:
        """Submit jobs one by one that append to a file how long after being sent they were started."""
        raise MeasurementError("it has no workers")


# ── Peers, and the limit that has the same command line ─────────────────────────────────────────


class Peer(System):
    """A system that is a file in `peers/`, and runs in an environment of its own."""

    def __init__(
        self,
        name: str,
        module: str,
        command: Sequence[str],
        client: redis.Redis,
        url: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`command` runs the module, and `env` is added to its environment. Raises MeasurementError."""
        self.command = [*command, *([module] if module.endswith(".mjs") else ["-m", module])]
        self._worker = self.command if module.endswith(".mjs") else list(command)
        self._execute: Any = client.execute_command
        self._env = {"BENCH_REDIS_URL": url, **(env or {})}
        told = self._ask(20, "describe")
        super().__init__(name, told["version"])
        self.settings = [Setting(**setting) for setting in told["settings"]]
        self.ways = [way for name, way in WAYS if name in told["ways"]]
        self.stamps = told["stamps"]
        self.jobs = told["jobs"]
        self._finished: list[str] = told["finished"]

    def _ask(self, seconds: float, *arguments: str) -> Any:
        return json.loads(harness.run([*self.command, *arguments], seconds, self._env))

    def submit(self, way: str, count: int) -> float:
        words = {ONE: ["one"], TASKS: ["tasks"], BULK_100: ["bulk"], BULK_1000: ["bulk"]}[way]
        size = {BULK_100: ["100"], BULK_1000: ["1000"]}.get(way, [])
        return float(self._ask(SUBMIT_SECONDS, "submit", *words, str(count), *size))

    @contextlib.contextmanager
    def working(self, setting: Setting, stamps: Path | None = None) -> Iterator[list[Process]]:
        env = {**self._env, "BENCH_CONCURRENCY": str(setting.concurrency), "BENCH_STAMPS": str(stamps)}
        with contextlib.ExitStack() as stack:
            copies = [
                stack.enter_context(harness.running([*self._worker, *setting.worker], env))
                for _ in range(setting.copies)
            ]
            yield copies

    def finished(self) -> int:
        return abs(int(self._execute(*self._finished)))

    def send_stamps(self, count: int, stamps: Path) -> None:
        with self.working(self.settings[0], stamps):
            time.sleep(2)  # nobody can tell when a worker is ready
            self._ask(60, "stamp", str(count))
            wait_for_stamps(stamps, count)


WAYS = [("one", ONE), ("tasks", TASKS), ("bulk", BULK_100), ("bulk", BULK_1000)]


def wait_for_stamps(stamps: Path, count: int) -> None:
    harness.wait_until(lambda: stamps.exists() and len(stamps.read_text().splitlines()) >= count)


# ── The service ─────────────────────────────────────────────────────────────────────────────────


class Service(System):
    """This job queue service, run as anybody runs it: a process, flags, and HTTP."""

    def __init__(self, module: Path, client: redis.Redis, url: str) -> None:
        super().__init__("jobqueue", "this")
        self.ways = [ONE, TASKS, BULK_100, BULK_1000]
        self.jobs = 40_000
        self.module = module
        self._client = client
        self.url = url
        self.settings = [
            Setting("10 workers"),
            Setting("2 instances of 5 workers", several=True, copies=2, concurrency=5),
        ]

    def beside(self) -> Service:
        """The same on another database of the same Redis."""
        url = f"{self.url}/1"
        client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=30)
        return Service(self.module, client, url)

    def start(
        self, workers: int, stamps: Path | None = None, log_level: str = "warning", processes: int = 1
    ) -> Instance:
        """An instance that answers. `stamps`: have the handler of that name, and where it writes to."""
        port = harness.free_port()
        command = [sys.executable, "service.py" if stamps else str(self.module)]
        command += ["--redis-url", self.url, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", str(workers), "--log-level", log_level]
        command += ["--processes", str(processes)] if processes > 1 else []
        env = {"PYTHONPATH": str(self.module.parent), "BENCH_STAMPS": str(stamps)}
        return Instance(Process(command, env), port)

    @contextlib.contextmanager
    def _started(
        self, workers: int, copies: int, stamps: Path | None = None, log_level: str = "warning"
    ) -> Iterator[list[Instance]]:
        instances: list[Instance] = []
        try:
            for _ in range(copies):
                instances.append(self.start(workers, stamps, log_level))
            yield instances
            for instance in instances:
                instance.wait()
                instance.process.stop()
        finally:
            for instance in instances:
                instance.process.kill()

    @contextlib.contextmanager
    def running(self, workers: int, copies: int = 1, stamps: Path | None = None) -> Iterator[list[Instance]]:
        """Instances that answer. Raises MeasurementError unless they stop as they should."""
        with self._started(workers, copies, stamps) as instances:
            for instance in instances:
                instance.wait()
            yield instances

    def can_share(self) -> bool:
        """Whether it can start several processes that share one socket."""
        return "--processes" in harness.run([sys.executable, str(self.module), "--help"], 20)

    @contextlib.contextmanager
    def sharing(self, workers: int, processes: int) -> Iterator[Instance]:
        """So many processes on one socket, with so many workers each."""
        instance = self.start(workers, processes=processes)
        try:
            instance.wait()
            yield instance
            instance.process.stop()
        finally:
            instance.process.kill()

    def submit(self, way: str, count: int) -> float:
        """By HTTP. One job more is submitted before, so that all is loaded."""
        with self.running(workers=0) as [instance]:
            harness.hammer([instance.port], ONE_MATH, 1, count=1)
            size = {BULK_100: 100, BULK_1000: 1000}.get(way, 1)
            return harness.hammer([instance.port], math_jobs(size), 1, count=count // size).seconds

    def submission_rate(self, way: str, quick: bool) -> float:
        with self.running(workers=0) as [instance]:
            return http_rate(instance.port, way, quick)

    @contextlib.contextmanager
    def working(self, setting: Setting) -> Iterator[list[Process]]:
        with self._started(setting.concurrency, setting.copies, log_level=setting.log_level) as instances:
            yield [instance.process for instance in instances]

    def finished(self) -> int:
        return int(self._client.zcard("{jobqueue}:completed"))

    def submitted(self) -> int:
        return int(self._client.zcard("{jobqueue}:history"))

    def now_ms(self) -> float:
        """The time as Redis has it."""
        seconds, microseconds = cast(Any, self._client.time())
        return float(seconds * 1000 + microseconds / 1000)

    def empty(self) -> None:
        self._client.flushdb()

    def finish_times_ms(self, start: int, stop: int) -> list[float]:
        """When finished jobs number `start` to `stop` had been finished, as Redis has it."""
        found: Any = self._client.zrange("{jobqueue}:completed", start, stop, withscores=True)
        return [score for _, score in found]


@dataclass(frozen=True)
class Instance:
    """A running process of the service, or of a bare web application."""

    process: Process
    port: int

    def wait(self) -> None:
        """Until it listens."""
        harness.wait_until(lambda: listens(self.port), self.process)

    def paused(self) -> AbstractContextManager[None]:
        """Stopped in its tracks, so that a queue can be filled before it sees any of it."""
        return self._between(signal.SIGSTOP, signal.SIGCONT)

    def going(self) -> AbstractContextManager[None]:
        """For a while not paused."""
        return self._between(signal.SIGCONT, signal.SIGSTOP)

    @contextlib.contextmanager
    def _between(self, first: int, last: int) -> Iterator[None]:
        self.process.signal(first)
        try:
            yield
        finally:
            self.process.signal(last)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def math_jobs(size: int) -> bytes:
    """A request that submits so many jobs."""
    return harness.post("/job", json.dumps([MATH] * size if size > 1 else MATH).encode())


def http_rate(port: int, way: str, quick: bool) -> float:
    """Jobs/s taken by a server that is warm: on 32 connections, or else on one."""
    size = {BULK_100: 100, BULK_1000: 1000}.get(way, 1)
    connections = 32 if way == TASKS else 1
    seconds = 0.8 if quick else 1.5
    return size * harness.hammer([port], math_jobs(size), connections, seconds, warm_up=seconds / 2).rate


def stamp_job() -> bytes:
    """A request that submits a job which tells when it was started."""
    job = {"job_type": "stamp", "payload": {"sent": time.time()}}
    return harness.post("/job", json.dumps(job).encode())


# ── The bare web applications ───────────────────────────────────────────────────────────────────


class Web(System):
    """A limit: a web application that takes the same requests and does nothing with them."""

    def __init__(self, name: str, app: str) -> None:
        super().__init__(name, "limit")
        self.ways = [ONE, TASKS]
        self._app = app

    @contextlib.contextmanager
    def running(self) -> Iterator[Instance]:
        port = harness.free_port()
        with harness.running([sys.executable, "-m", "limits.web", self._app, str(port)]) as process:
            instance = Instance(process, port)
            instance.wait()
            yield instance

    def submission_rate(self, way: str, quick: bool) -> float:
        with self.running() as instance:
            return http_rate(instance.port, way, quick)


# ── Environments ────────────────────────────────────────────────────────────────────────────────


def python_for(peer: str) -> str:
    """The interpreter of a peer's virtual environment, which is made if it is not there.

    All share one, except who wants another release of redis-py: that one has its own requirements file.
    """
    own = HERE / f"requirements-{peer}.txt"
    requirements = own if own.exists() else HERE / "requirements.txt"
    venv = HERE / requirements.stem.replace("requirements", ".venv")
    made_from = venv / "made-from.txt"
    if not made_from.exists() or made_from.read_text() != requirements.read_text():
        print(f"making {venv.name} from {requirements.name}, this once …", file=sys.stderr)
        shutil.rmtree(venv, ignore_errors=True)
        harness.run([sys.executable, "-m", "venv", str(venv)], INSTALL_SECONDS)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        harness.run([*pip, "--disable-pip-version-check", "-r", str(requirements)], INSTALL_SECONDS)
        made_from.write_text(requirements.read_text())
    return str(venv / "bin" / "python")


def node() -> str:
    """The path of node, with the packages that BullMQ wants; MeasurementError if there is none."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if not found:
        raise MeasurementError("there is no node")
    wanted = (HERE / "peers" / "package.json").read_text()
    modules = HERE / "peers" / "node_modules"
    made_from = modules / "made-from.json"
    if not made_from.exists() or made_from.read_text() != wanted:
        if not npm:
            raise MeasurementError("there is no npm")
        print("installing BullMQ, this once …", file=sys.stderr)
        shutil.rmtree(modules, ignore_errors=True)
        install = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        harness.run([*install, "--prefix", str(HERE / "peers")], INSTALL_SECONDS)
        made_from.write_text(wanted)
    return found


def find_peer(name: str, client: redis.Redis, url: str) -> Peer:
    if name == "bullmq":
        return Peer(name, "peers/bullmq.mjs", [node()], client, url)
    return Peer(name, f"peers.{name}", [python_for(name)], client, url)


def machine(client: redis.Redis) -> dict[str, Any]:
    """What the figures depend on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = shutil.which("node")
    return {
        "cores": os.cpu_count(),
        "processor": model[0].partition(":")[2].strip() if model else "unknown",
        "memory_gb": round(memory / 1e9),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "redis": client.info("server")["redis_version"],
        "node": harness.run([found, "--version"], 10).strip() if found else None,
    }
