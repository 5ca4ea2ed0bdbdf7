"""The scenarios: one table each. A row's function is one measurement, and gives one value for each column."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import redis
import systems
from harness import MeasurementError
from systems import ONE_MATH, Instance, Service, System

FIRST_RESULT_SECONDS = 20.0  # longest wait for a worker to start and to finish something
DRAIN_SECONDS = 4.0  # longest part of a drain that is measured: a slow system need not finish
NOISE = 20  # keys that a worker may make for itself, where results are counted as keys
COLD = 5  # the first latencies do not count: a new process does all for the first time
BARE = "bare Quart-Trio view"
INSTANCES, WORKERS = 24, 100  # of the fleet
LONG = {"job_type": "long", "payload": {"seconds": 3600}, "timeout": 7200}

Measurement = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    client: redis.Redis
    systems: list[System]
    is_quick: bool  # with small counts: to see that it works, not to publish

    @property
    def services(self) -> list[Service]:
        return [each for each in self.systems if isinstance(each, Service)]

    def some(self, number: int, least: int = 1) -> int:
        """So many jobs, or seconds, or less of them in a quick run."""
        return max(least, number // 10) if self.is_quick else number

    def empty(self) -> None:
        self.client.flushall()

    def redis_bytes(self) -> int:
        """What Redis holds, but for its scripts and the buffers of its clients."""
        time.sleep(0.3)  # until it has noticed which connections were closed
        info = self.client.info("memory")
        return int(info["used_memory"] - info["mem_clients_normal"] - info["used_memory_scripts"])


@dataclass(frozen=True)
class Scenario:
    """A table: what is measured, of which rows, how often, and what its last column compares."""

    title: str
    rounds: int
    rows: Callable[[Bench], dict[str, Measurement]]
    base: str = ""  # the row by which the others are divided; empty: jobqueue is divided by each


# ── drain ───────────────────────────────────────────────────────────────────────────────────────


def drain(bench: Bench, system: System) -> dict[str, float]:
    """The queue is filled, then the worker is started; from the first results to the last."""
    jobs = bench.some(system.jobs, 2000)
    bench.empty()
    system.submit(jobs)
    with system.working() as process:
        return {"jobs/s": watch(system, jobs, process)}


def watch(system: System, jobs: int, process: harness.Process) -> float:
    """Jobs/s from the first results to the last, or for some seconds."""
    started, before = time.monotonic(), system.finished()
    first_at, first = 0.0, 0
    while True:
        now, done = time.monotonic(), abs(system.finished() - before)
        if done > NOISE and not first:
            first_at, first = now, done
        if first and (done >= jobs - NOISE or now > first_at + DRAIN_SECONDS):
            break
        process.check()
        if not first and now > started + FIRST_RESULT_SECONDS:
            raise MeasurementError(f"no result within {FIRST_RESULT_SECONDS:g} s")
        time.sleep(0.01)
    if done == first:
        raise MeasurementError("it was too fast to be measured")
    return (done - first) / (now - first_at)


# ── latency ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def stamps_file() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="bench-stamps-") as file:
        yield Path(file.name)


def percentiles(stamps: Path) -> dict[str, float]:
    times = sorted(1000 * float(line) for line in stamps.read_text().splitlines()[COLD:])
    return {"p50, ms": statistics.median(times), "p99, ms": times[int(len(times) * 0.99)]}


def latency(bench: Bench, system: System) -> dict[str, float]:
    """From just before a submission to the start of the job, in an idle system."""
    bench.empty()
    with stamps_file() as stamps:
        system.send_stamps(COLD + bench.some(100, 20), stamps)
        return percentiles(stamps)


def latency_across(bench: Bench, service: Service) -> dict[str, float]:
    """POST to an instance without workers, start of the job in another one."""
    bench.empty()
    with (
        stamps_file() as stamps,
        service.running(0, stamps=stamps) as [entrance],
        service.running(10, stamps=stamps),
    ):
        service.stamp(entrance, COLD + bench.some(100, 20), stamps)
        return percentiles(stamps)


def latency_rows(bench: Bench) -> dict[str, Measurement]:
    rows = {each.name: partial(latency, bench, each) for each in bench.systems}
    across = {
        f"{each.name}, to another instance": partial(latency_across, bench, each) for each in bench.services
    }
    return {**rows, **across}


# ── post ────────────────────────────────────────────────────────────────────────────────────────


def wrk(bench: Bench, instance: Instance) -> float:
    harness.wrk(instance.port, ONE_MATH, 1)  # warms up
    bench.empty()
    return harness.wrk(instance.port, ONE_MATH, 1 if bench.is_quick else 3)


def post_bare(bench: Bench) -> dict[str, float]:
    with systems.bare_view() as instance:
        return {"POST/s": wrk(bench, instance)}


def post(bench: Bench, service: Service, workers: int, copies: int) -> dict[str, float]:
    """And how much of what was submitted is still to be done when the load ends."""
    bench.empty()
    with service.running(workers, copies, shares_port=copies > 1) as [instance, *_]:
        rate = wrk(bench, instance)
        done, submitted = service.finished(), service.submitted()
    left = {"not done yet, %": max(0.0, 100 - 100 * done / submitted)} if workers else {}
    return {"POST/s": rate, **left}


def post_rows(bench: Bench) -> dict[str, Measurement]:
    rows: dict[str, Measurement] = {BARE: partial(post_bare, bench)}
    for each in bench.services:
        rows[f"{each.name}, no workers"] = partial(post, bench, each, 0, 1)
        rows[f"{each.name}, 10 workers running"] = partial(post, bench, each, 10, 1)
        rows[f"{each.name}, 2 x 5 workers on one port"] = partial(post, bench, each, 5, 2)
    return rows


# ── arrays, lists ───────────────────────────────────────────────────────────────────────────────


def arrays(bench: Bench, system: System) -> dict[str, float]:
    bench.empty()
    jobs = bench.some(50_000)
    return {"jobs/s": jobs / system.submit(jobs)}


def array_rows(bench: Bench) -> dict[str, Measurement]:
    """The peers whose library takes many jobs in a call."""
    return {
        each.name + ("" if each in bench.services else ", addBulk without HTTP"): partial(arrays, bench, each)
        for each in bench.systems
        if each in bench.services or each.name == "bullmq"
    }


def lists(bench: Bench, service: Service, jobs: int) -> dict[str, float]:
    """`GET /jobs`, by a client that keeps up."""
    bench.empty()
    service.submit(jobs)
    with service.running(0) as [instance], harness.client(instance.port) as client:
        client.ask("GET", "/jobs?limit=1").read()
        instance.process.reset_peak()
        before = instance.process.memory_mb()
        body, first, whole = client.download("/jobs")
        grown = instance.process.peak_memory_mb() - before
    if (listed := len(json.loads(body))) != jobs:
        raise MeasurementError(f"it lists {listed:,} jobs of {jobs:,}")
    return {"first byte, ms": first * 1000, "whole, ms": whole * 1000, "memory grows by, MB": grown}


def list_rows(bench: Bench) -> dict[str, Measurement]:
    sizes = [bench.some(jobs) for jobs in (10_000, 100_000)]
    return {
        f"{each.name}, {jobs:,} jobs": partial(lists, bench, each, jobs)
        for each in bench.services
        for jobs in sizes
    }


# ── fleet ───────────────────────────────────────────────────────────────────────────────────────


def fleet(bench: Bench, service: Service) -> dict[str, float]:
    """Real processes, all idle, and then with all workers busy, whose jobs tell new progress each second."""
    copies, seconds = bench.some(INSTANCES), bench.some(10, 3)
    bench.empty()
    with service.running(WORKERS, copies) as instances:
        time.sleep(2)  # until all have found Redis, and are at rest
        idle = redis_share(bench, seconds)
        with harness.client(instances[0].port) as client:
            client.post(json.dumps([LONG] * copies * WORKERS).encode())
        harness.wait_until(lambda: service.processing() == copies * WORKERS)
        time.sleep(3)  # until the last of them have settled
        return {"all idle, % of a core": idle, "all busy, % of a core": redis_share(bench, seconds)}


def redis_share(bench: Bench, seconds: float) -> float:
    """How much of a processor, in percent, Redis uses in the next seconds."""

    def used() -> float:
        info = bench.client.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    begun, before = time.monotonic(), used()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - begun) * 100


def fleet_rows(bench: Bench) -> dict[str, Measurement]:
    named = f"{bench.some(INSTANCES)} x {WORKERS} workers"
    return {f"{each.name}, {named}": partial(fleet, bench, each) for each in bench.services}


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def memory(bench: Bench, system: System) -> dict[str, float]:
    """What a job takes in Redis, and what the worker's processes have taken when it has run some."""
    jobs = bench.some(min(system.jobs, 10_000), 1000)
    for count in (
        1000,
        jobs,
    ):  # the first ones make Redis keep scripts and buffers, too
        bench.empty()
        empty = bench.redis_bytes()
        system.submit(count)
        waiting = bench.redis_bytes()
        with system.working() as process:
            watch(system, count, process)
            time.sleep(0.3)  # for the last few
            resident = process.memory_mb()
        finished = bench.redis_bytes()
    return {
        "finished job, bytes": (finished - empty) / jobs,
        "waiting job, bytes": (waiting - empty) / jobs,
        "resident, MB": resident,
    }


def each_system(measure: Callable[[Bench, System], dict[str, float]], bench: Bench) -> dict[str, Measurement]:
    return {system.name: partial(measure, bench, system) for system in bench.systems}


SCENARIOS = {
    "drain": Scenario("Drain: ten jobs at a time, one process", 5, partial(each_system, drain)),
    "latency": Scenario("From submission to the start of the job, idle", 3, latency_rows),
    "post": Scenario("POST of one job, `wrk -t1 -c32`", 5, post_rows, base=BARE),
    "arrays": Scenario("Submission of 1,000 jobs in a call", 5, array_rows),
    "lists": Scenario("`GET /jobs`", 3, list_rows),
    "fleet": Scenario("What many instances cost Redis", 2, fleet_rows),
    "memory": Scenario("Memory", 2, partial(each_system, memory)),
}
