"""The figures: how each is measured. One call is one round, and adds one value to each of its rows."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness
import redis
import systems
from harness import MeasurementError, Process
from systems import ONE_MATH, TASKS, Instance, Service, Setting, System, Web

FIRST_RESULT_SECONDS = 20.0  # longest wait for a worker to start and to finish something
DRAIN_SECONDS = 4.0  # longest part of a drain that is measured: a slow system need not finish
POLL_SECONDS = 0.01
PAUSE_SECONDS = 0.02  # between requests whose latency is measured: long enough to find all idle
COLD = 5  # the first latencies do not count: a new process does all for the first time
WAITERS = 800  # clients that wait for the same job
BURST = 1000  # jobs whose finish times make a rate
TURNS = 20  # of such bursts
NOISE = 20  # keys that a worker may make for itself, where results are counted as keys


@dataclass
class Results:
    """All values measured, by figure, row, column and unit, in the order of their first appearance."""

    values: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)  # what was tried, and the reason
    notes: list[str] = field(default_factory=list)  # what one Redis carries, in sentences

    def add(self, figure: str, row: str, column: str, unit: str, value: float) -> None:
        self.values.setdefault((figure, row, column, unit), []).append(value)

    def median(self, figure: str, row: str, column: str) -> float | None:
        for (*key, _), values in self.values.items():
            if key == [figure, row, column]:
                return statistics.median(values)
        return None


@dataclass(frozen=True)
class Bench:
    """What every measurement needs: a Redis of our own, and somewhere to put the results."""

    client: redis.Redis
    results: Results
    service: Service
    bare: Web
    quick: bool

    @property
    def stamps(self) -> int:
        """How many jobs make a latency."""
        return 50 if self.quick else 100

    def empty(self) -> None:
        self.client.flushall()

    def redis_bytes(self) -> int:
        time.sleep(0.1)  # connections that were just closed still have their buffers
        return int(self.client.info("memory")["used_memory"])


# ── All systems ─────────────────────────────────────────────────────────────────────────────────


def drain(
    bench: Bench, system: System, setting: Setting, column: str, figure: str = "drain", row: str = ""
) -> None:
    """Jobs/s: the queue is filled, then the workers are started; from the first results to the last."""
    jobs = system.jobs // (2 if bench.quick else 1)
    bench.empty()
    empty = bench.redis_bytes()
    system.submit(system.ways[-1], jobs)
    waiting = bench.redis_bytes()
    before = system.finished()
    with system.working(setting) as processes:
        rate, complete = watch(lambda: abs(system.finished() - before), jobs, processes)
    # In its first round a system makes Redis keep scripts and buffers, which are not of its jobs.
    is_first = bench.results.median(figure, system.name, column) is None
    bench.results.add(figure, row or system.name, column, "jobs/s", rate)
    if figure == "drain" and not setting.several:
        if system is bench.service:
            bench.results.add("workers", system.name, "10 workers", "jobs/s", rate)
        if complete and not is_first:
            finished = bench.redis_bytes()
            bench.results.add("memory", system.name, "waiting", "bytes/job", (waiting - empty) / jobs)
            bench.results.add("memory", system.name, "finished", "bytes/job", (finished - empty) / jobs)


def watch(finished: Callable[[], int], jobs: int, processes: list[Process]) -> tuple[float, bool]:
    """Jobs/s from the first results to the last, or for four seconds; and whether all jobs were finished."""
    started = time.monotonic()
    first_at, first = math.inf, 0
    while True:
        now, done = time.monotonic(), finished()
        if done > NOISE and not first:
            first_at, first = now, done
        complete = done >= jobs - NOISE
        if complete or now > first_at + DRAIN_SECONDS:
            break
        for process in processes:
            process.check()
        if not first and now > started + FIRST_RESULT_SECONDS:
            raise MeasurementError(f"no result within {FIRST_RESULT_SECONDS:g} s: {processes[0].output()}")
        time.sleep(POLL_SECONDS)
    if done == first:
        raise MeasurementError("it was too fast to be measured")
    time.sleep(0.1 if complete else 0)  # for the last few
    return (done - first) / (now - first_at), complete


def submission(bench: Bench, system: System, way: str) -> None:
    """Jobs/s taken from a client, with no worker running."""
    bench.empty()
    bench.results.add("submit", system.name, way, "jobs/s", system.submission_rate(way, bench.quick))


def latency(bench: Bench, system: System) -> None:
    """From just before a submission to the start of the job, in an idle system."""
    bench.empty()
    with stamps_file() as stamps:
        system.send_stamps(COLD + bench.stamps, stamps)
        add_latencies(bench, "latency", system.name, read_stamps(stamps))


@contextlib.contextmanager
def stamps_file() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="bench-stamps-") as file:
        yield Path(file.name)


def read_stamps(stamps: Path) -> list[float]:
    return [float(line) for line in stamps.read_text().splitlines()][COLD:]


def add_latencies(bench: Bench, figure: str, row: str, seconds: list[float]) -> None:
    seconds = sorted(seconds)
    bench.results.add(figure, row, "p50", "ms", statistics.median(seconds) * 1000)
    bench.results.add(figure, row, "p99", "ms", seconds[int(len(seconds) * 0.99)] * 1000)


# ── This service ────────────────────────────────────────────────────────────────────────────────


def workers(bench: Bench, count: int, log_level: str = "warning") -> None:
    """The drain with so many workers."""
    setting = Setting("", concurrency=count, log_level=log_level)
    column = f"{count} worker{'s' * (count > 1)}"
    row = "jobqueue" if log_level == "warning" else f"jobqueue, LOG_LEVEL={log_level}"
    drain(bench, bench.service, setting, column, figure="workers", row=row)


def busy_submission(bench: Bench) -> None:
    """32 connections, while ten workers of the same process run what they submit."""
    bench.empty()
    with bench.service.running(10) as [instance]:
        rate = harness.hammer([instance.port], ONE_MATH, 32, 1.0, warm_up=0.3).rate
    bench.results.add("submit", "jobqueue, its 10 workers running", TASKS, "jobs/s", rate)


def latencies(bench: Bench) -> None:
    """POST to start in one instance, and the round trip of a POST to the bare view: in turn, all idle."""
    bench.empty()
    trips: list[float] = []
    bare_trips: list[float] = []
    with (
        stamps_file() as stamps,
        bench.service.running(10, stamps=stamps) as [instance],
        bench.bare.running() as bare,
        harness.connect(instance.port) as to_instance,
        harness.connect(bare.port) as to_bare,
    ):
        for _ in range(COLD + bench.stamps):
            bare_trips.append(harness.timed(to_bare, ONE_MATH))
            time.sleep(PAUSE_SECONDS)
            trips.append(harness.timed(to_instance, systems.stamp_job()))
            time.sleep(PAUSE_SECONDS)
        systems.wait_for_stamps(stamps, COLD + bench.stamps)
        add_latencies(bench, "latency", "jobqueue", read_stamps(stamps))
    add_latencies(bench, "post", "jobqueue", trips[COLD:])
    add_latencies(bench, "post", bench.bare.name, bare_trips[COLD:])


def posts(bench: Bench) -> None:
    """POST on 32 connections, of an instance without workers and of the bare view, in short turns."""
    bench.empty()
    with bench.service.running(0) as [instance], bench.bare.running() as bare:
        for turn in range(1 + (5 if bench.quick else 10)):
            ours, limit = (harness.hammer([each.port], ONE_MATH, 32, 0.7).rate for each in (instance, bare))
            if turn:  # the first one warms up
                bench.results.add("posts", "jobqueue", "32 connections", "requests/s", ours)
                bench.results.add("posts", bench.bare.name, "32 connections", "requests/s", limit)
                bench.results.add("posts", "jobqueue", "to the bare view", "x", ours / limit)


def served(bench: Bench, count: int) -> None:
    """POST on 32 connections of processes that share one socket: what they take, and what they get done.

    Without workers, the requests answered. With ten workers each, the jobs submitted and completed, from the
    first POST to the end of the last job.
    """
    seconds = 2.0 if bench.quick else 4.0
    row = "jobqueue" if count == 1 else f"jobqueue, {count} processes"
    for workers in (0, 10):
        bench.empty()
        with bench.service.sharing(workers, count) as instance:
            harness.load(instance.port, ONE_MATH, 32, 1.0)  # warms up
            bench.empty()
            begun = bench.service.now_ms()
            harness.load(instance.port, ONE_MATH, 32, seconds)
            took_ms, taken = bench.service.now_ms() - begun, bench.service.submitted()
            if workers == 0:
                bench.results.add("posts", row, "POST by wrk", "requests/s", taken / took_ms * 1000)
                continue
            wait_finished(bench.service, taken)
            [end] = bench.service.finish_times_ms(-1, -1)
            rate = taken / (end - begun) * 1000
            bench.results.add("posts", row, "submitted and completed", "jobs/s", rate)


def across(bench: Bench) -> None:
    """POST to an instance without workers, start of the job in another one."""
    bench.empty()
    with (
        stamps_file() as stamps,
        bench.service.running(0, stamps=stamps) as [entrance],
        bench.service.running(10, stamps=stamps),
        harness.connect(entrance.port) as connection,
    ):
        for _ in range(COLD + bench.stamps):
            harness.timed(connection, systems.stamp_job())
            time.sleep(PAUSE_SECONDS)
        systems.wait_for_stamps(stamps, COLD + bench.stamps)
        add_latencies(bench, "latency", "jobqueue, across instances", read_stamps(stamps))


def get_job(bench: Bench) -> None:
    """`GET /job/<id>` of a finished job, on one connection and on 32."""
    seconds = 0.5 if bench.quick else 1.5
    bench.empty()
    with bench.service.running(10) as [instance]:
        with harness.connect(instance.port) as connection:
            job = json.loads(harness.exchange(connection, ONE_MATH))
        harness.wait_until(lambda: bench.service.finished() == 1)
        request = harness.get(f"/job/{job['id']}")
        for connections, column in ((1, "1 connection"), (32, "32 connections")):
            load = harness.hammer([instance.port], request, connections, seconds, warm_up=0.2)
            bench.results.add("read", "GET /job/<id>", column, "requests/s", load.rate)


def listing(bench: Bench, jobs: int, beside: bool) -> None:
    """`GET /jobs` of so many stored jobs, by a client that keeps up; and a POST `beside` it."""
    bench.empty()
    bench.service.submit(systems.BULK_1000, jobs)
    row = f"{jobs:,} jobs"
    with bench.service.running(0) as [instance]:
        with harness.connect(instance.port) as connection:
            harness.exchange(connection, harness.get("/jobs?limit=1"))
        instance.process.reset_peak()
        before = instance.process.memory_mb()
        answer = harness.download(instance.port, "/jobs")
        grown = instance.process.peak_memory_mb() - before
        listed = len(json.loads(answer.body))
        if listed != jobs + 1:  # the one that was submitted first
            raise MeasurementError(f"it lists {listed:,} jobs of {jobs + 1:,}")
        bench.results.add("list", row, "whole answer", "s", answer.seconds)
        bench.results.add("list", row, "first byte", "ms", answer.first_byte_seconds * 1000)
        bench.results.add("list", row, "memory grows by", "MB", grown)
        if beside:
            add_latencies(bench, "beside", "no list is read", some_posts(bench, instance))
            with reading_lists(instance.port):
                posts = some_posts(bench, instance)
            add_latencies(bench, "beside", f"a list of {row} is read", posts)


def some_posts(bench: Bench, instance: Instance) -> list[float]:
    """Round trips of a POST, with pauses between them."""
    trips = []
    with harness.connect(instance.port) as connection:
        for _ in range(COLD + bench.stamps):
            trips.append(harness.timed(connection, ONE_MATH))
            time.sleep(PAUSE_SECONDS)
    return trips[COLD:]


@contextlib.contextmanager
def reading_lists(port: int) -> Iterator[None]:
    """Somebody reads `GET /jobs`, again and again."""
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with harness.connect(port) as connection:
                connection.sendall(harness.get("/jobs"))
                tail = b""
                while not tail.endswith(harness.LAST_CHUNK) and not stop.is_set():
                    tail = (tail + harness.receive(connection))[-len(harness.LAST_CHUNK) :]

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def idle(bench: Bench) -> None:
    """Memory and processor time of an instance with ten workers and nothing to do."""
    seconds = 2.0 if bench.quick else 5.0
    bench.empty()
    with bench.service.running(10) as [instance]:
        time.sleep(1)
        add_use(bench, "jobqueue", instance, seconds)


def waiting(bench: Bench) -> None:
    """The same while many clients wait for the end of one job."""
    bench.empty()
    with bench.service.running(10) as [instance], contextlib.ExitStack() as stack:
        with harness.connect(instance.port) as connection:
            later = harness.post("/job", json.dumps(systems.MATH | {"delay": 3600}).encode())
            job_id = json.loads(harness.exchange(connection, later))["id"]
        for _ in range(WAITERS):
            connection = stack.enter_context(harness.connect(instance.port))
            connection.sendall(harness.get(f"/job/{job_id}?wait=30"))
        time.sleep(2)
        add_use(bench, f"jobqueue, {WAITERS} clients wait for a job", instance, seconds=5.0)
        with harness.connect(instance.port) as connection:
            connection.sendall(f"DELETE /job/{job_id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            harness.receive(connection)


def add_use(bench: Bench, row: str, instance: Instance, seconds: float) -> None:
    before = instance.process.cpu_seconds()
    time.sleep(seconds)
    share = (instance.process.cpu_seconds() - before) / seconds * 100
    bench.results.add("idle", row, "memory", "MB", instance.process.memory_mb())
    bench.results.add("idle", row, "processor", "% of a core", share)


def start_up(bench: Bench) -> None:
    """From the start of the process to its first answer that needs Redis; and from SIGTERM to its end."""
    bench.empty()
    begun = time.perf_counter()
    instance = bench.service.start(10)
    try:
        instance.wait()
        with harness.connect(instance.port) as connection:
            harness.exchange(connection, harness.get("/jobs?limit=1"))
            bench.results.add("start", "jobqueue", "start", "s", time.perf_counter() - begun)
            begun = time.perf_counter()
            instance.process.stop()
            took = time.perf_counter() - begun
        bench.results.add("start", "jobqueue", "stop, with a connection open", "s", took)
    finally:
        instance.process.kill()


@dataclass(frozen=True)
class Side:
    """An instance that is stopped unless its rate is being measured, and one that takes jobs for it."""

    service: Service
    entrance: Instance
    worker: Instance

    def fill(self, jobs: int = BURST) -> None:
        request = systems.math_jobs(1000)
        harness.hammer([self.entrance.port], request, 1, count=jobs // 1000)

    def run(self, jobs: int = BURST) -> list[float]:
        """Let so many jobs be run; their finish times, as Redis has them, in ms."""
        done = self.service.finished()
        with self.worker.going():
            wait_finished(self.service, done + jobs)
        return self.service.finish_times_ms(done, done + jobs - 1)


@contextlib.contextmanager
def side(service: Service) -> Iterator[Side]:
    with service.running(0) as [entrance], service.running(10) as [worker], worker.paused():
        yield Side(service, entrance, worker)


def growth(bench: Bench, jobs: int) -> None:
    """The drain rate with so many jobs waiting, and with as many finished ones stored, and with 1,000 in all.

    Two warm instances, each on a database of its own, take turns, so that a machine that gets slower does so
    for both.
    """
    row = f"{jobs:,} jobs"

    def turns(filled: Side, column: str, refill: bool) -> None:
        for turn in range(1 + TURNS):
            small.service.empty()
            small.fill()
            if refill:
                filled.fill()
            few, many = (
                (len(times) - 1) / (times[-1] - times[0]) * 1000 for times in (small.run(), filled.run())
            )
            if turn:  # the first one warms up
                bench.results.add("growth", row, column, "jobs/s", many)
                bench.results.add("growth", row, f"{column}, to 1,000 in all", "x", many / few)

    bench.empty()
    with side(bench.service) as large, side(bench.service.beside()) as small:
        large.fill(jobs)
        turns(large, "waiting", refill=False)
        large.run(jobs - bench.service.finished())
        turns(large, "finished and stored", refill=True)


def wait_finished(service: Service, jobs: int) -> None:
    harness.wait_until(lambda: service.finished() >= jobs, seconds=30 + jobs / 3000, every=0.01)


def instances(bench: Bench, copies: int) -> None:
    """Several instances on one Redis, ten workers each: all paused, the queue filled, and all let go at once.

    And POST on 32 connections, spread over as many instances without workers.
    """
    jobs = 40_000
    bench.empty()
    row = f"{copies} instance" + "s" * (copies > 1)
    with bench.service.running(10, copies) as running:
        with contextlib.ExitStack() as stack:
            for instance in running:
                stack.enter_context(instance.paused())
            bench.service.submit(systems.BULK_1000, jobs)
        wait_finished(bench.service, jobs)
        times = bench.service.finish_times_ms(0, jobs - 1)
    bench.results.add("instances", row, "drain", "jobs/s", (jobs - 1) / (times[-1] - times[0]) * 1000)
    bench.empty()
    with bench.service.running(0, copies) as running:
        ports = [instance.port for instance in running]
        load = harness.hammer(ports, ONE_MATH, 32, 2.0, warm_up=0.5)
    bench.results.add("instances", row, "POST on 32 connections", "jobs/s", load.rate)
