#!/usr/bin/env python3
"""Measure this job queue service beside its limits and its peers, all in one run, on this machine.

    python benchmarks/run.py                    everything, about twenty minutes
    python benchmarks/run.py --quick            what matters most, a bit more than a minute
    python benchmarks/run.py --only drain saq   some figures, or some systems, or both

It starts a Redis of its own, and makes what the peers need (`.venv*`, `peers/node_modules`) if need be.
All systems take their turn in each round, so that a machine that gets slower does so for all of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import figures
import harness
import redis
import report
import systems
from figures import Bench, Results
from harness import HERE, MeasurementError
from systems import Peer, Service, System, Web

QUICK_SECONDS, FULL_SECONDS = 180.0, 1560.0  # no new measurement is begun after so long
SYSTEMS = ("jobqueue", *systems.LIMITS, *systems.PEERS)


@dataclass(frozen=True)
class Step:
    """One measurement of one round."""

    name: str
    seconds: float  # about what it takes
    measure: Callable[[], None]


# ── The plan ────────────────────────────────────────────────────────────────────────────────────


def plan(bench: Bench, measured: list[System], wanted: set[str]) -> Iterator[Step]:
    """All steps, in order: by rounds, in which all systems take their turn; the longest come last."""
    rounds = 2 if bench.quick else 3
    ours = wanted if bench.service in measured else set()
    for number in range(rounds):
        for system in measured:
            yield from drains(bench, system, number) if wanted & {"drain", "memory"} else []
        for count in workers(bench.quick, number) if "workers" in ours else []:
            yield Step(f"drain, {count} workers", 5, partial(figures.workers, bench, count))
        if "workers" in ours and not bench.quick:
            yield Step("drain, LOG_LEVEL=info", 6, partial(figures.workers, bench, 10, "info"))
    for number in range(rounds):
        for system in measured:
            yield from submissions(bench, system, number) if "submit" in wanted else []
    for number in range(rounds):
        for system in measured if "latency" in wanted else []:
            if system.stamps and not bench.quick:
                yield Step(f"latency, {system.name}", 3.5, partial(figures.latency, bench, system))
        if not (bench.quick and number):
            yield from of_the_service(bench, ours)
    if "fleet" in ours and not bench.quick:
        yield Step("a fleet on one Redis", 200, partial(measure_fleet, bench))
    for jobs in (100_000, 1_000_000) if "growth" in ours and not bench.quick else []:
        yield Step(f"growth, {jobs:,} jobs", 20 + jobs / 12_000, partial(figures.growth, bench, jobs))


def measure_fleet(bench: Bench) -> None:
    sys.path.insert(0, str(bench.service.module.parent))  # where the Store is that it calls
    import fleet

    fleet.measure(bench)


def drains(bench: Bench, system: System, number: int) -> Iterator[Step]:
    """Every setting of a system; in a quick run several processes once, and of the Python peers alone."""
    for setting in system.settings:
        column = report.SEVERAL if setting.several else report.ONE_PROCESS
        once = setting.several or system.name in systems.LIMITS
        left_out = setting.several and system.jobs >= bench.service.jobs
        if bench.quick and (left_out or (once and number)):
            continue
        name = f"drain, {system.name}, {setting.label}"
        yield Step(name, 4, partial(figures.drain, bench, system, setting, column))


def workers(quick: bool, number: int) -> list[int]:
    """Beside ten, which the other drains have."""
    return ([] if number else [3]) if quick else [1, 3, 50]


def submissions(bench: Bench, system: System, number: int) -> Iterator[Step]:
    """Every way of a system; in a quick run those that the chart shows, and of this service once all."""
    for way in system.ways:
        in_chart = way in (systems.TASKS, systems.BULK_1000)
        once = not in_chart or system.name in ("pipeline", "hypercorn")
        left_out = not in_chart and system is not bench.service
        if not bench.quick or not (left_out or (once and number)):
            name = f"submit, {system.name}, {way}"
            yield Step(name, 2, partial(figures.submission, bench, system, way))
    if system is bench.service and not bench.quick:
        yield Step("submit, workers running", 2, partial(figures.busy_submission, bench))


def of_the_service(bench: Bench, wanted: set[str]) -> Iterator[Step]:
    """What is measured of this service alone."""
    if "latency" in wanted or "post" in wanted:
        yield Step("latency, jobqueue", 6, partial(figures.latencies, bench))
        yield Step("latency, across instances", 4, partial(figures.across, bench))
    if "posts" in wanted:
        yield Step("POST beside a bare view", 10 if bench.quick else 17, partial(figures.posts, bench))
        for count in (1, 2) if bench.service.can_share() else (1,):
            yield Step(f"submitted and completed, {count} x", 13, partial(figures.served, bench, count))
    if "read" in wanted:
        yield Step("GET /job/<id>", 3, partial(figures.get_job, bench))
    for jobs in (1000, 10_000, 100_000) if "list" in wanted or "beside" in wanted else []:
        step = partial(figures.listing, bench, jobs, beside=jobs == 100_000)
        yield Step(f"GET /jobs, {jobs:,} jobs", 2 + jobs / 10_000, step)
    if "idle" in wanted:
        yield Step("idle", 5, partial(figures.idle, bench))
        if not bench.quick:
            yield Step("clients that wait", 10, partial(figures.waiting, bench))
    if "start" in wanted:
        yield from [Step("start-up", 1, partial(figures.start_up, bench))] * 2
    for copies in (1, 2, 4) if "instances" in wanted and not bench.quick else []:
        yield Step(f"{copies} instances", 4 + 2 * copies, partial(figures.instances, bench, copies))


# ── Carrying it out ─────────────────────────────────────────────────────────────────────────────


class Progress:
    """A bar on a terminal; a line for each step elsewhere."""

    def __init__(self, steps: list[Step]) -> None:
        self._total = sum(step.seconds for step in steps)
        self._done = 0.0
        self._begun = time.monotonic()

    def begin(self, step: Step) -> None:
        share = self._done / self._total
        took = time.monotonic() - self._begun
        left = took / share - took if share > 0.05 else self._total - took
        text = f"{share:4.0%} {step.name}"
        if sys.stderr.isatty():
            bar = "█" * round(share * 30)
            line = f"\r\033[K[{bar:░<30}] {text}, {max(0, left):.0f} s left"
            print(line, end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr)
        self._done += step.seconds

    def end(self) -> None:
        print("\r\033[K" if sys.stderr.isatty() else "100%", end="\n", file=sys.stderr)


def carry_out(steps: list[Step], results: Results, seconds: float) -> None:
    """One step after the other; what fails is noted, and what is too late is left out."""
    progress = Progress(steps)
    deadline = time.monotonic() + seconds
    for step in steps:
        progress.begin(step)
        if time.monotonic() > deadline:
            results.failures.append((step.name, f"the run had taken {seconds:g} s"))
            continue
        try:
            step.measure()
        except (MeasurementError, OSError, ValueError, redis.RedisError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            results.failures.append((step.name, reason[:300]))
    progress.end()


def find_systems(names: list[str], service: Service, client: redis.Redis, results: Results) -> list[System]:
    """The systems of these names. A peer that cannot be had is noted."""
    limits = {"quart-trio": Web("quart-trio", "quart"), "hypercorn": Web("hypercorn", "raw")}
    found: list[System] = []
    for name in names:
        try:
            if name == service.name:
                found.append(service)
            elif name == "pipeline":
                path = {"PYTHONPATH": str(service.module.parent)}
                found.append(Peer(name, "limits.pipeline", [sys.executable], client, service.url, path))
            elif name in limits:
                found.append(limits[name])
            else:
                found.append(systems.find_peer(name, client, service.url))
        except (MeasurementError, OSError, ValueError) as error:
            results.failures.append((name, str(error)))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this service beside its limits and its peers.")
    parser.add_argument("--quick", action="store_true", help="what matters most, a bit more than a minute")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], choices=[*SYSTEMS, *report.TITLES],
        help=f"systems ({', '.join(SYSTEMS)}) or figures ({', '.join(report.TITLES)})",
    )  # fmt: skip
    default = HERE.parent / "jobqueue.py"
    parser.add_argument("--service", type=Path, default=default, help="another jobqueue.py to measure")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run.py: stopped"))
    only = set(arguments.only)
    quick_ones = [name for name in SYSTEMS if name not in systems.PEERS or name in systems.FAST_PEERS]
    names = [name for name in SYSTEMS if name in only] or (quick_ones if arguments.quick else list(SYSTEMS))
    wanted = only & set(report.TITLES) or set(report.TITLES)
    results = Results()
    with harness.private_redis() as (client, url):
        service = Service(arguments.service.resolve(), client, url)
        measured = find_systems(names, service, client, results)
        bench = Bench(client, results, service, Web("quart-trio", "quart"), arguments.quick)
        busy = harness.busy_share()
        if busy > 0.1:
            print(f"other programs use {busy:.0%} of the processors: figures will be off", file=sys.stderr)
        begun = time.monotonic()
        most_seconds = QUICK_SECONDS if arguments.quick else FULL_SECONDS
        carry_out(list(plan(bench, measured, wanted)), results, most_seconds)
        took = f"a {'quick' if arguments.quick else 'full'} run of {time.monotonic() - begun:.0f} s"
        facts = systems.machine(client) | {"busy_before": busy, "busy_after": harness.busy_share()}
    name = "partial" if only else "quick" if arguments.quick else "results"
    text = report.as_text(results, measured, facts, took)
    (HERE / f"{name}.md").write_text(text)
    data = report.as_json(results, measured, facts, took)
    (HERE / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (HERE / f"{name}.svg").write_text(report.as_svg(results, took))
    print(text)
    print(f"Also in {name}.md, {name}.json and {name}.svg in {HERE}.", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("run.py: stopped")
