#!/usr/bin/env python3
"""Measure what many instances on one Redis cost it, and compute up to how many it carries.

    python benchmarks/fleet.py            everything, about four minutes
    python benchmarks/fleet.py --quick    100,000 waiting jobs instead of a million, about a minute

What counts is Redis's own processor time: it has one thread, which all instances share. Where real processes
would be too many, one process makes the calls of n instances, each alone on one connection, by the module's
own Store. Real fleets of 6 and 24 processes show that the computed figures are true.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import harness
import report
import trio
from figures import Bench, Results
from systems import ONE_MATH, Instance, Service, Web

sys.path.append(str(harness.HERE.parent))  # behind what the caller chose: run.py measures other modules, too
import jobqueue

T = TypeVar("T")
Held = list[tuple[jobqueue.Claim, str]]  # the claims of one instance, and what progress each has to tell

WORKERS = 100  # of an instance
MANY, SOME = 100, 24  # instances
TICKS = 2  # a second, in which an instance renews its leases and sweeps
STORM_SWEEPS = 100  # a second and instance, when jobs fall due one after the other
STORM_JOBS = 1000  # that fall due in a second
CHUNK = 200  # jobs that `GET /jobs` without a limit reads at a time
FULL_SHARE = 0.8  # of Redis's thread: beyond it, calls queue for long
SETTINGS = jobqueue.Settings()
LEASE = SETTINGS.lease_seconds


# ── Redis's own time ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fleet:
    """What every measurement needs, and what the last lines are computed from."""

    bench: Bench
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many jobs wait where many do."""
        return 100_000 if self.bench.quick else 1_000_000

    def cpu_seconds(self) -> float:
        """Processor time that Redis used so far."""
        used = self.bench.client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def calls(self) -> int:
        """Commands that Redis got so far from clients or scripts that matter here, refused ones included."""
        stats = self.bench.client.info("commandstats")
        found = [stats.get(f"cmdstat_{name}", {}) for name in ("evalsha", "publish")]
        return sum(each.get("calls", 0) + each.get("rejected_calls", 0) for each in found)

    async def cost(self, step: Callable[[], Awaitable[object]]) -> float:
        """Processor time, in seconds, that Redis needs for a step."""
        before = self.cpu_seconds()
        await step()
        return self.cpu_seconds() - before

    def share(self, seconds: float) -> float:
        """The part of its one thread, in percent, that Redis uses in the next seconds."""
        begun, before = time.monotonic(), self.cpu_seconds()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - begun) * 100

    def add(self, what: str, measured: float, unit: str, wanted: float) -> None:
        self.bench.results.add("fleet", what, "measured", unit, measured)
        self.bench.results.add("fleet", what, "wanted", unit, wanted)

    def with_store(self, step: Callable[[jobqueue.Store], Awaitable[T]]) -> T:
        """Do what is done by calls of the Store, on a connection of its own."""

        async def run() -> T:
            pipeline = jobqueue.AutoPipeline(jobqueue.RedisConnection(self.bench.service.url).exchange)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipeline.run)
                result = await step(jobqueue.Store(pipeline))
                nursery.cancel_scope.cancel()
            return result

        return trio.run(run)


NUMBERS = itertools.count(1)  # of jobs and claims


def new_job(job_type: str = "math", payload: str = '{"a": 1, "b": 2}', delay: float = 0) -> jobqueue.NewJob:
    job_id = f"00000000-0000-4000-8000-{next(NUMBERS):012x}"
    return jobqueue.NewJob(job_id, job_type, payload, 3, 7200.0, delay)


def long_job() -> jobqueue.NewJob:
    return new_job("long", '{"seconds": 3600}')


async def submit(store: jobqueue.Store, jobs: Sequence[jobqueue.NewJob]) -> None:
    for start in range(0, len(jobs), 1000):
        await store.submit(jobs[start : start + 1000])


async def side_by_side(count: int, step: Callable[[int], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(step, number)


# ── Computed: the calls of n instances, made by one process ─────────────────────────────────────


async def occupy(store: jobqueue.Store, instances: int) -> list[Held]:
    """Let all workers of so many instances have a job; what each instance holds."""
    await submit(store, [long_job() for _ in range(instances * WORKERS)])
    held: list[Held] = [[] for _ in range(instances)]

    async def claim(instance: int) -> None:
        for worker in range(WORKERS):
            _, claimed = await store.report_and_claim(None, f"host:{instance}/fleet:{worker}:1", 600)
            if not claimed:
                raise harness.MeasurementError("there were fewer jobs than workers")
            held[instance].append((claimed, ""))

    await side_by_side(instances, claim)
    return held


def heartbeats(fleet: Fleet, instances: int, wanted: float) -> None:
    """All workers are busy with jobs that tell their progress once a second, so at each second tick."""

    async def measure(store: jobqueue.Store) -> None:
        held = await occupy(store, instances)

        async def renew() -> None:
            for progress in ("", '{"done": 0.5, "note": "1800 of 3600 s"}') * 2:
                for claims in held:
                    await store.renew([(claim, progress) for claim, _ in claims], LEASE)

        async def sweep() -> None:
            for _ in range(4 * instances):
                await store.sweep(SETTINGS.retention_seconds, SETTINGS.keep_jobs)

        renewing, sweeping = await fleet.cost(renew), await fleet.cost(sweep)
        share = (renewing + sweeping) / 4 * TICKS * 100
        fleet.costs[f"heartbeats of {instances}"] = share
        fleet.costs["sweep"] = sweeping / 4 / instances
        fleet.add(f"heartbeats, {instances} instances x {WORKERS} workers, all busy", share, " %", wanted)
        if instances == MANY:
            await storm(fleet, store)
            await read_running(fleet, store, held)

    fleet.bench.empty()
    fleet.with_store(measure)


async def storm(fleet: Fleet, store: jobqueue.Store) -> None:
    """Jobs fall due one after the other, so each instance sweeps as often as it ever does."""
    sweeps = 0

    async def sweep() -> None:
        nonlocal sweeps
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            await store.sweep(SETTINGS.retention_seconds, SETTINGS.keep_jobs)
            sweeps += 1

    await submit(store, [new_job(delay=1 + number / STORM_JOBS) for number in range(STORM_JOBS)])
    whole = await fleet.cost(sweep)
    a_job = max(0.0, whole - sweeps * fleet.costs["sweep"]) / STORM_JOBS
    share = (MANY * STORM_SWEEPS * fleet.costs["sweep"] + STORM_JOBS * a_job) * 100
    fleet.add(f"retry storm, {MANY} instances, {STORM_JOBS:,} jobs due a second", share, " %", 50)


async def read_running(fleet: Fleet, store: jobqueue.Store, held: list[Held]) -> None:
    """A page of what runs, and all pages, beside those of a list that needs no order of its own."""
    running, some = f"?status=processing, {MANY * WORKERS:,} running", 10

    async def first(status: jobqueue.Status | None) -> None:
        for _ in range(some):
            await store.page(status, "", CHUNK)

    plain_page = await fleet.cost(lambda: first(None)) / some
    page = await fleet.cost(lambda: first(jobqueue.Status.PROCESSING)) / some
    fleet.add(f"{running}: a page", page * 1000, " ms", 1.5 * plain_page * 1000)
    plain = await fleet.cost(lambda: read_all(store, None))
    whole = await fleet.cost(lambda: read_all(store, jobqueue.Status.PROCESSING))
    fleet.add(f"{running}: the whole list", whole * 1000, " ms", 1.5 * plain * 1000)

    waiters, ticks = [claim.id for claims in held[:10] for claim, _ in claims], 20

    async def ask() -> None:
        for _ in range(ticks):
            await store.finished(waiters)

    a_waiter = await fleet.cost(ask) / ticks / len(waiters)
    fleet.add("?wait=, a waiter and tick", a_waiter * 1e6, " µs", 2)


async def read_all(store: jobqueue.Store, status: jobqueue.Status | None) -> int:
    cursor, jobs = "", 0
    while True:
        page = await store.page(status, cursor, CHUNK)
        cursor, jobs = page.cursor, jobs + len(page.jobs)
        if not cursor:
            return jobs


def waiting(fleet: Fleet) -> None:
    """A long queue: read as a whole, and some of its jobs deleted, from all over it."""

    async def measure(store: jobqueue.Store) -> None:
        before, ids = fleet.bench.redis_bytes(), []
        for _ in range(fleet.waiting // 1000):
            ids += await store.submit([new_job() for _ in range(1000)]) or []
        fleet.costs["bytes"] = (fleet.bench.redis_bytes() - before) / len(ids)
        some = ids[500 :: len(ids) // 40]

        async def delete() -> None:
            for job_id in some:
                await store.cancel(job_id)

        where = f"{len(ids):,} waiting"
        listing = await fleet.cost(lambda: read_all(store, jobqueue.Status.PENDING))
        fleet.add(f"?status=pending, the whole list, {where}", listing, " s", 5 * len(ids) / 1e6)
        fleet.add(f"DELETE, {where}", await fleet.cost(delete) / len(some) * 1000, " ms", 1)

    fleet.bench.empty()
    fleet.with_store(measure)
    fleet.bench.empty()


def life_of_a_job(fleet: Fleet) -> None:
    """What Redis needs for a short job, which is submitted alone, run by one of ten workers, and deleted."""
    jobs = 5000 if fleet.bench.quick else 20_000

    async def measure(store: jobqueue.Store) -> None:
        async def submit_some(_: int) -> None:
            for _ in range(jobs // 32):
                await store.submit([new_job()])

        async def run_all(worker: int) -> None:
            done: jobqueue.Report | None = None
            while True:
                token = f"host:1/life:{worker}:{next(NUMBERS)}"
                _, claim = await store.report_and_claim(done, token, LEASE)
                if not claim:
                    return
                done = jobqueue.Report(claim, "complete", "3")

        async def delete_all() -> None:
            while (await store.sweep(SETTINGS.retention_seconds, keep=1)).wait == 0:
                pass

        for name, step in (
            ("submit", lambda: side_by_side(32, submit_some)),
            ("run", lambda: side_by_side(10, run_all)),
            ("delete", delete_all),
        ):
            fleet.costs[name] = await fleet.cost(step) / (jobs // 32 * 32)

    fleet.bench.empty()
    fleet.with_store(measure)


def wake_ups(fleet: Fleet) -> None:
    """One POST to a real instance whose workers are free, while many others, which are idle, listen."""
    posts, url = 20, fleet.bench.service.url

    async def measure(store: jobqueue.Store) -> None:
        messages, one_by_one = (
            0,
            trio.Lock(),
        )  # each claim comes from another instance, so none share a packet

        async def listen(number: int) -> None:
            nonlocal messages
            connection = jobqueue.RedisConnection(url)
            await connection.exchange([("SUBSCRIBE", f"{store.prefix}wake")])
            ready.release()
            while True:
                await connection.message()
                messages += 1
                async with one_by_one:
                    await store.report_and_claim(None, f"host:{number}/idle:1:{next(NUMBERS)}", LEASE)

        async def post_all() -> None:
            for _ in range(posts):
                harness.exchange(to_instance, ONE_MATH)
                await trio.sleep(0.05)

        ready = trio.Semaphore(0)
        async with trio.open_nursery() as listeners:
            for number in range(MANY):
                listeners.start_soon(listen, number)
                await ready.acquire()
            cost = await fleet.cost(post_all)
            listeners.cancel_scope.cancel()
        fleet.add(f"one POST, {MANY} idle instances: messages", messages / posts, "", 0)
        fleet.add(f"one POST, {MANY} idle instances: Redis's time", cost / posts * 1000, " ms", 0.3)

    fleet.bench.empty()
    with fleet.bench.service.running(10) as [instance], harness.connect(instance.port) as to_instance:
        harness.exchange(to_instance, ONE_MATH)  # by which all is loaded
        fleet.with_store(measure)


# ── Real processes ──────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def processes(service: Service, count: int) -> Iterator[list[Instance]]:
    """Instances that answer, started a few at a time, and killed: nobody waits for what they run."""
    started: list[Instance] = []
    with contextlib.ExitStack() as stack:
        while len(started) < count:
            few = [service.start(WORKERS) for _ in range(min(4, count - len(started)))]
            for instance in few:
                stack.callback(instance.process.kill)
            for instance in few:
                instance.wait()
            started += few
        yield started


def real(fleet: Fleet, count: int, wanted: float) -> None:
    """A fleet that is idle, then has all its workers busy, and then meets a retry storm beside."""
    seconds = 3.0 if fleet.bench.quick else 8.0
    fleet.bench.empty()
    fleet.with_store(lambda store: store.ping())
    named = f"{count} real processes x {WORKERS} workers"
    with processes(fleet.bench.service, count) as started:
        clients = fleet.bench.client.info("clients")["connected_clients"] - 1
        fleet.costs["connections"] = clients / count
        wake_real(fleet, named, count)
        fleet.with_store(lambda store: submit(store, [long_job() for _ in range(count * WORKERS)]))
        harness.wait_until(lambda: busy_workers(started[0]) == count * WORKERS, seconds=30, every=0.2)
        time.sleep(2)  # for the last of them to settle
        busy = fleet.share(seconds)
        fleet.add(f"{named}, all busy", busy, " %", wanted)
        due = range(round((seconds + 2) * STORM_JOBS))
        delayed = [new_job(delay=1 + number / STORM_JOBS) for number in due]
        fleet.with_store(lambda store: submit(store, delayed))
        time.sleep(1)
        fleet.add(f"{named}, all busy, and a retry storm", fleet.share(seconds), " %", 3 * wanted)
    fleet.bench.empty()


def busy_workers(instance: Instance) -> int:
    """How many jobs are running, by the header of a list."""
    with harness.connect(instance.port) as connection:
        connection.sendall(harness.get("/jobs?limit=1"))
        head = harness.receive(connection).decode().lower()
    found = head.partition("job-counts:")[2].partition("processing=")[2]
    return int("".join(itertools.takewhile(str.isdigit, found)))


def wake_real(fleet: Fleet, named: str, count: int) -> None:
    """Calls for one POST to an instance that has no worker, while all others are idle: few come in vain."""
    posts, pause = 20, 0.1
    with fleet.bench.service.running(0) as [entrance], harness.connect(entrance.port) as connection:
        harness.exchange(connection, ONE_MATH)
        time.sleep(1)
        before = fleet.calls()
        time.sleep(posts * pause)
        at_rest = fleet.calls() - before
        before = fleet.calls()
        for _ in range(posts):
            harness.exchange(connection, ONE_MATH)
            time.sleep(pause)
        calls = (fleet.calls() - before - at_rest) / posts
    fleet.add(f"{named}, all idle: calls for one POST elsewhere", calls, "", 10)


def refusals(fleet: Fleet) -> None:
    """Calls a second of one instance whose idle workers were woken by mistake while Redis refuses all."""
    client = cast(Any, fleet.bench.client)
    fleet.bench.empty()
    with processes(fleet.bench.service, 1):
        time.sleep(1)
        client.execute_command("ACL", "SETUSER", "default", "-evalsha")
        try:
            for _ in range(2 * WORKERS):
                client.publish("{jobqueue}:wake", "")
            time.sleep(1)
            before = fleet.calls()
            time.sleep(2)
            rate = (fleet.calls() - before) / 2
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+evalsha")
    fleet.add(f"Redis refuses, {WORKERS} idle workers of one instance: calls a second", rate, "", 10)


# ── One Redis carries … ─────────────────────────────────────────────────────────────────────────


def carries(fleet: Fleet) -> list[str]:
    """Up to where one Redis goes, on paper, by what was measured."""
    costs, full = fleet.costs, FULL_SHARE * 100
    some, many = costs[f"heartbeats of {SOME}"], costs[f"heartbeats of {MANY}"]
    # The share of n instances is a·n + b·n²: b is 0 when each of them costs the same however many there are.
    b = max(0.0, (many / MANY - some / SOME) / (MANY - SOME))
    a = many / MANY - b * MANY
    busy = (math.sqrt(a * a + 4 * b * full) - a) / (2 * b) if b > 1e-9 else full / a
    most_clients = int(fleet.bench.client.config_get("maxclients")["maxclients"] or 0)
    limits = {
        "the heartbeats of their workers, all busy": busy,
        "the sweeps of a retry storm": FULL_SHARE / (STORM_SWEEPS * costs["sweep"]),
        f"its {most_clients:,} connections (`maxclients`)": most_clients / costs["connections"],
    }
    first = min(limits, key=lambda name: limits[name])
    others = "; ".join(
        f"{name}, at {limits[name]:,.0f}" for name in sorted(limits, key=lambda n: limits[n])[1:]
    )
    steps = [costs[name] * 1e6 for name in ("submit", "run", "delete")]
    return [
        f"One Redis carries {limits[first]:,.0f} instances of {WORKERS} workers, {limits[first] * WORKERS:,.0f} "
        f"workers in all, with {full:.0f} % of its thread in use. First, {first} give way; then {others}.",
        f"One Redis carries {FULL_SHARE / sum(steps) * 1e6:,.0f} short jobs a second, each submitted alone, run "
        f"and deleted: {steps[0]:.0f} + {steps[1]:.0f} + {steps[2]:.0f} µs of its thread, which gives way first.",
        f"One Redis carries {1e9 / costs['bytes'] / 1e6:.1f} million waiting jobs in a gigabyte: "
        f"{costs['bytes']:.0f} bytes each. Its memory gives way first.",
    ]


# ── All of it ───────────────────────────────────────────────────────────────────────────────────


def measure(bench: Bench) -> None:
    """The whole table, into the results."""
    fleet = Fleet(bench)
    heartbeats(fleet, SOME, wanted=4)
    heartbeats(fleet, MANY, wanted=15)
    life_of_a_job(fleet)
    wake_ups(fleet)
    refusals(fleet)
    real(fleet, 6, wanted=1)
    real(fleet, SOME, wanted=4)
    waiting(fleet)
    bench.results.notes += carries(fleet)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what many instances cost one Redis.")
    parser.add_argument("--quick", action="store_true", help="100,000 waiting jobs instead of a million")
    parser.add_argument("--json", action="store_true", help="print every value as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("fleet.py: stopped"))
    results = Results()
    with harness.private_redis() as (client, url):
        service = Service(Path(jobqueue.__file__).resolve(), client, url)
        measure(Bench(client, results, service, Web("quart-trio", "quart"), arguments.quick))
    rows = [[what, column, unit, *values] for (_, what, column, unit), values in results.values.items()]
    print(json.dumps(rows, indent=1) if arguments.json else report.fleet_text(results))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fleet.py: stopped")
