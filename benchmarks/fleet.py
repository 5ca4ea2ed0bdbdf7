#!/usr/bin/env python3
"""Measure what many instances on one Redis cost it, and compute up to how many it carries.

    python benchmarks/fleet.py            everything, some four minutes
    python benchmarks/fleet.py --quick    100,000 waiting jobs instead of a million, about a minute

What counts is Redis's own processor time: it has one thread, which all instances share. Where real processes
would be too many, this one makes the calls of n instances by the module's own Store, on one connection. Real
fleets of 6 and 24 processes stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import harness
import redis
import report
import trio
from figures import Bench, Results
from systems import ONE_MATH, Instance, Service, Web

sys.path.append(str(harness.HERE.parent))  # behind what the caller chose: run.py measures other modules, too
import jobqueue
from jobqueue import Status, Store

MANY, SOME = 100, 24  # instances
WORKERS = 100  # of each
TICKS = 2  # a second: the sweeps of an instance
STORM_SWEEPS = 100  # a second and instance, when jobs fall due one after the other
STORM_JOBS = 1000  # that fall due in a second
CHUNK = 200  # jobs that `GET /jobs` without a limit reads at a time
FULL_SHARE = 0.8  # of Redis's thread: beyond it, calls queue for long
PROGRESS = '{"done": 0.5, "note": "1800 of 3600 s"}'
SETTINGS = jobqueue.Settings()
LEASE = 600.0  # seconds: no lease of a computed instance ends while something is measured
NUMBERS = itertools.count(1)  # of jobs and claims


# ── Redis's own time ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fleet:
    """What every measurement needs, and what the last lines are computed from."""

    bench: Bench
    costs: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, measured: float, unit: str, wanted: float) -> None:
        self.bench.results.add("fleet", what, "measured", unit, measured)
        self.bench.results.add("fleet", what, "wanted", unit, wanted)

    def simulate(self, step: Callable[[Fleet, Store], Awaitable[None]]) -> None:
        """Do what is done by calls of a Store, on one connection. Raises MeasurementError if that fails."""

        async def run() -> None:
            pipeline = jobqueue.AutoPipeline(jobqueue.RedisConnection(self.bench.service.url).exchange)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipeline.run)
                store = Store(pipeline)
                await store.finished([""])  # after which Redis knows the scripts
                await step(self, store)
                nursery.cancel_scope.cancel()

        try:
            trio.run(run)
        except ExceptionGroup as group:
            error: Exception = group
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            raise harness.MeasurementError(f"{type(error).__name__}: {error}") from group

    def cpu_seconds(self) -> float:
        """Processor time that Redis used so far."""
        used = self.bench.client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def share(self, seconds: float) -> float:
        """How much of its thread, in percent, Redis uses in the next seconds."""
        begun, before = time.monotonic(), self.cpu_seconds()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - begun) * 100

    async def cost(
        self, calls: Callable[[], Iterable[Awaitable[object]]], at_once: int = 1, rounds: int = 3
    ) -> float:
        """Processor time, in seconds, that Redis needs for some calls: the least of some rounds.

        Whatever else the machine does makes a round dearer, and nothing makes one cheaper.
        """
        least = math.inf

        async def carry(left: Iterator[Awaitable[object]]) -> None:
            for call in left:
                await call

        for _ in range(rounds):
            before, left = self.cpu_seconds(), iter(calls())
            async with trio.open_nursery() as nursery:
                for _ in range(at_once):
                    nursery.start_soon(carry, left)
            least = min(least, self.cpu_seconds() - before)
        return least

    def packet_cost(self) -> float:
        """What a call costs Redis because it comes alone on its connection, while others come on theirs.

        Calls that are made at once share a packet here, so this is added to those of many instances. Where
        calls are made one by one, each is dearer by some 30 µs, as in a real fleet: Redis slept before.
        """
        port, times = urlsplit(self.bench.service.url).port or 0, 100
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(harness.connect(port)) for _ in range(MANY)]
            before = self.cpu_seconds()
            for _ in range(times):
                for each in connections:
                    each.sendall(b"PING\r\n")
                for each in connections:
                    harness.receive(each)
            return (self.cpu_seconds() - before) / times / MANY

    def calls(self) -> int:
        """Scripts and messages that Redis was asked for so far, refused ones included."""
        stats = self.bench.client.info("commandstats")
        found = [stats.get(f"cmdstat_{name}", {}) for name in ("evalsha", "publish")]
        return sum(each.get("calls", 0) + each.get("rejected_calls", 0) for each in found)

    def calls_within(self, seconds: float) -> int:
        before = self.calls()
        time.sleep(seconds)
        return self.calls() - before


def new_job(job_type: str = "math", payload: str = '{"a": 1, "b": 2}', delay: float = 0) -> jobqueue.NewJob:
    job_id = f"00000000-0000-4000-8000-{next(NUMBERS):012x}"
    return jobqueue.NewJob(job_id, job_type, payload, 3, 7200.0, delay)


async def submit_long(store: Store, jobs: int) -> None:
    for _ in range(jobs // WORKERS):
        await store.submit([new_job("long", '{"seconds": 3600}') for _ in range(WORKERS)])


async def submit_due(store: Store, jobs: int) -> None:
    """Jobs that fall due one after the other, from a second from now on."""
    for start in range(0, jobs, STORM_JOBS):
        few = range(start, min(jobs, start + STORM_JOBS))
        await store.submit([new_job(delay=1 + number / STORM_JOBS) for number in few])


async def sweep(store: Store, keep: int = SETTINGS.keep_jobs) -> None:
    await store.sweep(SETTINGS.retention_seconds, keep)


# ── Computed: the calls of n instances ──────────────────────────────────────────────────────────


async def busy(fleet: Fleet, store: Store, instances: int, wanted: float) -> list[jobqueue.Claim]:
    """All workers run jobs that have new progress at each heartbeat; each fourth one renews the leases."""
    await submit_long(store, instances * WORKERS)
    held: list[list[jobqueue.Claim]] = [[] for _ in range(instances)]
    for instance, worker in itertools.product(range(instances), range(WORKERS)):
        _, claim = await store.report_and_claim(None, f"host:{instance}/fleet:{worker}:1", LEASE)
        if not claim:
            raise harness.MeasurementError("there are fewer jobs than workers")
        held[instance].append(claim)

    heartbeats = (LEASE, 0, 0, 0)

    def renewals() -> Iterator[Awaitable[object]]:
        for lease, claims in itertools.product(heartbeats, held):
            yield store.renew([(claim, PROGRESS) for claim in claims], lease)

    renewing = await fleet.cost(renewals)
    sweeping = await fleet.cost(lambda: (sweep(store) for _ in range(2 * instances)))
    share = (renewing / len(heartbeats) / jobqueue.HEARTBEAT_SECONDS + sweeping / 2 * TICKS) * 100
    fleet.costs[f"{instances} busy"] = share
    fleet.add(f"heartbeats, {instances} instances x {WORKERS} workers, all busy", share, " %", wanted)
    return list(itertools.chain(*held))


async def some_busy(fleet: Fleet, store: Store) -> None:
    await busy(fleet, store, SOME, wanted=4)


async def many_busy(fleet: Fleet, store: Store) -> None:
    """Heartbeats; a retry storm, in which each instance sweeps as often as it ever does; and readers."""
    running = await busy(fleet, store, MANY, wanted=15)
    sweeps = MANY * STORM_SWEEPS
    in_vain = await fleet.cost(lambda: (sweep(store) for _ in range(sweeps)), at_once=MANY)
    fleet.costs["sweep"] = in_vain / sweeps + fleet.costs["packet"]
    await submit_due(store, STORM_JOBS)
    await trio.sleep(2.1)
    queueing = await fleet.cost(lambda: (sweep(store) for _ in range(3)), rounds=1)
    share = (queueing + sweeps * fleet.costs["sweep"]) * 100
    fleet.add(f"retry storm, {MANY} instances, {STORM_JOBS:,} jobs due a second", share, " %", 50)

    for name, read in (("a page", store.page), ("the whole list", partial(read_all, store))):
        plain = await fleet.cost(lambda: [read(None, "", CHUNK)])  # noqa: B023
        cost = await fleet.cost(lambda: [read(Status.PROCESSING, "", CHUNK)])  # noqa: B023
        what = f"?status=processing, {len(running):,} running: {name}"
        fleet.add(what, cost * 1000, " ms", 1.5 * plain * 1000)
    waiters, ticks = [claim.id for claim in running[:1000]], 20
    waiting = await fleet.cost(lambda: (store.finished(waiters) for _ in range(ticks)))
    fleet.add("?wait=, a waiter and tick", waiting / ticks / len(waiters) * 1e6, " µs", 2)


async def read_all(store: Store, status: Status | None, cursor: str, limit: int) -> None:
    while cursor := (await store.page(status, cursor, limit)).cursor:
        pass


async def many_waiting(fleet: Fleet, store: Store) -> None:
    """A long queue: read as a whole, and some of its jobs deleted, from all over it."""
    empty, ids = fleet.bench.redis_bytes(), list[str]()
    for _ in range(100 if fleet.bench.quick else 1000):
        ids += await store.submit([new_job() for _ in range(1000)]) or []
    fleet.costs["bytes"] = (fleet.bench.redis_bytes() - empty) / len(ids)
    some = ids[500 :: len(ids) // 40]
    reading = await fleet.cost(lambda: [read_all(store, Status.PENDING, "", CHUNK)], rounds=1)
    deleting = await fleet.cost(lambda: (store.cancel(job_id) for job_id in some), rounds=1)
    fleet.add(f"?status=pending, {len(ids):,} waiting: the whole list", reading, " s", 5 * len(ids) / 1e6)
    fleet.add(f"DELETE, {len(ids):,} waiting", deleting / len(some) * 1000, " ms", 1)


async def short_jobs(fleet: Fleet, store: Store) -> None:
    """What a short job costs Redis: it is submitted alone, run by one of ten workers, and deleted."""
    jobs = 5000

    async def work(worker: int) -> None:
        done = None
        for number in NUMBERS:
            _, claim = await store.report_and_claim(done, f"host:1/fleet:{worker}:{number}", LEASE)
            if not claim:
                return
            done = jobqueue.Report(claim, "complete", "3")

    async def add(name: str, calls: Callable[[], Iterable[Awaitable[object]]], at_once: int) -> None:
        cost = await fleet.cost(calls, at_once, rounds=1) / jobs
        fleet.costs[name] = min(cost, fleet.costs.get(name, math.inf))

    for _ in range(3):
        await add("submit", lambda: (store.submit([new_job()]) for _ in range(jobs)), at_once=32)
        await add("run", lambda: map(work, range(10)), at_once=10)
        await add("delete", lambda: (sweep(store, keep=1) for _ in range(jobs // 500)), at_once=1)


async def wake_ups(fleet: Fleet, store: Store) -> None:
    """POST to a real instance whose workers are free, while many others, which are idle, listen."""
    posts, messages = 20, 0

    async def listen(number: int) -> None:
        nonlocal messages
        connection = jobqueue.RedisConnection(fleet.bench.service.url)
        try:
            await connection.exchange([("SUBSCRIBE", f"{store.prefix}wake")])
            while True:
                await connection.message()
                messages += 1
                await store.report_and_claim(None, f"host:{number}/fleet:1:{next(NUMBERS)}", LEASE)
        finally:
            connection.hang_up()

    async def post() -> None:
        harness.exchange(to_instance, ONE_MATH)
        await trio.sleep(0.05)

    with fleet.bench.service.running(10) as [instance], harness.connect(instance.port) as to_instance:
        harness.exchange(to_instance, ONE_MATH)
        await trio.sleep(1)  # until the instance is at rest: a message must not meet a subscription
        async with trio.open_nursery() as listeners:
            for number in range(MANY):
                listeners.start_soon(listen, number)
            await trio.sleep(1)
            cost = await fleet.cost(lambda: (post() for _ in range(posts)), rounds=1)
            listeners.cancel_scope.cancel()
    cost = (cost + messages * fleet.costs["packet"]) / posts
    fleet.add(f"one POST, {MANY} idle instances: messages", messages / posts, "", 0)
    fleet.add(f"one POST, {MANY} idle instances: Redis's time", cost * 1000, " ms", 0.3)


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
        time.sleep(1)  # until all have found Redis, and are at rest
        yield started


def real(fleet: Fleet, count: int, wanted: float, in_storm: float) -> None:
    """A fleet that is idle, then has all its workers busy, and then meets a retry storm beside."""
    seconds, jobs = 3.0 if fleet.bench.quick else 8.0, count * WORKERS
    named = f"{count} real processes x {WORKERS} workers"
    with processes(fleet.bench.service, count):
        clients = fleet.bench.client.info("clients")["connected_clients"]
        fleet.costs["connections"] = (clients - 1) / count
        if count == SOME:
            wake_real(fleet, named)
        fleet.simulate(lambda _, store: submit_long(store, jobs))
        harness.wait_until(lambda: fleet.bench.client.zcard("{jobqueue}:processing") == jobs, seconds=30)
        time.sleep(2)  # for the last of them to settle
        fleet.add(f"{named}, all busy", fleet.share(seconds), " %", wanted)
        fleet.simulate(lambda _, store: submit_due(store, round(STORM_JOBS * (seconds + 1))))
        time.sleep(1)
        fleet.add(f"{named}, all busy, and a retry storm", fleet.share(seconds), " %", in_storm)


def wake_real(fleet: Fleet, named: str) -> None:
    """Calls for one POST to an instance that has no worker, while all others are idle: few come in vain."""
    posts, pause = 20, 0.1
    with fleet.bench.service.running(0) as [entrance], harness.connect(entrance.port) as connection:
        harness.exchange(connection, ONE_MATH)
        time.sleep(1)
        at_rest, before = fleet.calls_within(posts * pause), fleet.calls()
        for _ in range(posts):
            harness.exchange(connection, ONE_MATH)
            time.sleep(pause)
        calls = (fleet.calls() - before - at_rest) / posts
    fleet.add(f"{named}, all idle: calls for one POST elsewhere", calls, "", 10)


def refusals(fleet: Fleet, what: str, refuse: str, allow: str) -> None:
    """Calls a second of one instance whose idle workers were woken while Redis refuses them."""
    execute = cast(Any, fleet.bench.client.execute_command)
    with processes(fleet.bench.service, 1):
        execute(*refuse.split())
        try:
            for _ in range(2 * WORKERS):
                execute("PUBLISH", "{jobqueue}:wake", "")
            time.sleep(1)
            rate = fleet.calls_within(2) / 2
        finally:
            execute(*allow.split())
    fleet.add(f"Redis {what}, one instance of {WORKERS} idle workers: calls a second", rate, "", 10)


# ── One Redis carries … ─────────────────────────────────────────────────────────────────────────


def carries(fleet: Fleet) -> list[str]:
    """Up to where one Redis goes, on paper, by what was measured."""
    costs, full = fleet.costs, FULL_SHARE * 100
    # The share of n instances is a·n + b·n²: b is 0 where one costs the same however many there are.
    some, many = costs[f"{SOME} busy"] / SOME, costs[f"{MANY} busy"] / MANY
    b = max(1e-9, (many - some) / (MANY - SOME))
    a = many - b * MANY
    most_clients = int(fleet.bench.client.config_get("maxclients")["maxclients"] or 0)
    limits = {
        "the heartbeats": (math.sqrt(a * a + 4 * b * full) - a) / (2 * b),
        "the sweeps of a retry storm": FULL_SHARE / (STORM_SWEEPS * costs["sweep"]),
        f"its {most_clients:,} connections (`maxclients`)": most_clients / costs["connections"],
    }
    (first, instances), *rest = sorted(limits.items(), key=lambda item: item[1])
    others = ", ".join(f"{name} at {limit:,.0f}" for name, limit in rest)
    submit, run, delete = (costs[name] * 1e6 for name in ("submit", "run", "delete"))
    jobs = full * 1e4 / (submit + run + delete)
    one, most_waiting = costs["bytes"], 1e3 / costs["bytes"]
    return [
        f"One Redis carries {instances:,.0f} instances, {instances * WORKERS:,.0f} busy workers, with "
        f"{full:.0f} % of its thread in use. First, {first} give way; then {others}.",
        f"One Redis carries {jobs:,.0f} short jobs a second at {full:.0f} % of its thread: {submit:.0f} µs "
        f"to submit one, {run:.0f} to claim and report it, {delete:.0f} to delete it later.",
        f"One Redis carries {most_waiting:.1f} million waiting jobs in a gigabyte, {one:.0f} bytes each.",
    ]


# ── All of it ───────────────────────────────────────────────────────────────────────────────────


def measure(bench: Bench) -> None:
    """The whole table, and the last lines, into the results."""
    fleet = Fleet(bench)
    fleet.costs["packet"] = fleet.packet_cost()
    right, writes = "ACL SETUSER default {}evalsha", "CONFIG SET min-replicas-to-write {}"
    steps: dict[str, Callable[[], None]] = {
        "some instances": partial(fleet.simulate, some_busy),
        "many instances": partial(fleet.simulate, many_busy),
        "short jobs": partial(fleet.simulate, short_jobs),
        "wake-ups": partial(fleet.simulate, wake_ups),
        "no right": partial(refusals, fleet, "refuses scripts", right.format("-"), right.format("+")),
        "no writes": partial(refusals, fleet, "takes no writes", writes.format(1), writes.format(0)),
        "6 processes": partial(real, fleet, 6, wanted=1, in_storm=10),
        f"{SOME} processes": partial(real, fleet, SOME, wanted=4, in_storm=25),
        "a long queue": partial(fleet.simulate, many_waiting),
    }
    failures = bench.results.failures
    for name, step in steps.items():
        try:
            bench.empty()
            step()
        except (harness.MeasurementError, OSError, redis.RedisError) as error:
            failures.append((f"fleet: {name}", str(error)))
    if not any(name.startswith("fleet") for name, _ in failures):
        bench.results.notes += carries(fleet)
    bench.empty()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what many instances cost one Redis.")
    parser.add_argument("--quick", action="store_true", help="100,000 waiting jobs instead of a million")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("fleet.py: stopped"))
    results = Results()
    with harness.private_redis() as (client, url):
        service = Service(Path(jobqueue.__file__).resolve(), client, url)
        measure(Bench(client, results, service, Web("quart-trio", "quart"), arguments.quick))
    print(report.fleet_text(results))
    for name, reason in results.failures:
        print(f"not measured: {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fleet.py: stopped")
