#!/usr/bin/env python3
"""Measure this job queue service beside its limits and its peers, all in one run, on this machine.

    python benchmarks/run.py                                everything, some ten minutes
    python benchmarks/run.py --only drain jobqueue bullmq   some scenarios, or some systems, or both
    python benchmarks/run.py --only drain jobqueue beside --beside ../other/jobqueue.py
    python benchmarks/run.py --quick                        with small counts: to see that all works
    python benchmarks/run.py --publish                      everything, written to results.md and README.md

It starts a Redis of its own, and installs what the peers need (`.venv`, `peers/node_modules`) if need be.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import redis
import systems
from harness import HERE, MeasurementError
from scenarios import SCENARIOS, Bench, Scenario
from systems import System

SYSTEMS = ("jobqueue", *systems.PEERS)
PACKAGES = ("trio", "hypercorn", "quart", "quart-trio", "msgspec", "redis", "hiredis")  # the service's
MARKS = "<!-- results: written by run.py --publish -->\n", "<!-- end of the results -->\n"
Values = dict[str, list[dict[str, float]]]  # by row: each round's values by column; {} where it failed


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


def measure(name: str, bench: Bench, rounds: int, failures: list[str]) -> Values:
    """All rounds of a scenario. In each, all rows take their turn, so that none has a better hour."""
    rows = SCENARIOS[name].rows(bench)
    values: Values = {row: [] for row in rows}
    for number in range(rounds):
        # Back and forth, so that none always comes after the same one.
        for row in list(rows) if number % 2 == 0 else reversed(rows):
            found: dict[str, float] = {}
            try:
                found = rows[row]()
                text = ", ".join(f"{figure(value)} {column}" for column, value in found.items())
            except (MeasurementError, OSError, ValueError, redis.RedisError) as error:
                text = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{name}, {row}: {text}")
            values[row].append(found)
            print(f"{name}, round {number + 1} of {rounds}: {row}: {text}", file=sys.stderr, flush=True)
    return values


def machine(client: redis.Redis, measured: Sequence[System]) -> str:
    """What the figures depend on."""
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    versions += [f"{each.name} {each.version}" for each in measured]
    if any(each.name == "bullmq" for each in measured):
        versions.append(f"Node {harness.run(['node', '--version'], 10).strip()}")
    kernel = os.uname().release
    return (
        f"{os.cpu_count()} cores ({model or platform.machine()}), {memory:.0f} GB, Linux {kernel}.\n"
        f"Python {platform.python_version()}, Redis {client.info('server')['redis_version']}, "
        f"{', '.join(versions)}."
    )


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────


def figure(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def cell(values: Sequence[float]) -> str:
    """The median, and the least and the most of all rounds."""
    text = figure(statistics.median(values)) if values else "-"
    return f"{text} ({figure(min(values))} … {figure(max(values))})" if len(values) > 1 else text


def ratios(scenario: Scenario, values: Values, row: str) -> list[float]:
    """The ratio of each round: the values of one round were measured right after each other."""
    base = scenario.base or "jobqueue"
    pairs = [
        (next(iter(there.values())), next(iter(here.values())))
        for there, here in zip(values.get(base, []), values[row], strict=False)
        if there and here and row != base
    ]
    return [here / there if scenario.base else there / here for there, here in pairs]


def table(scenario: Scenario, values: Values) -> str:
    """Rows, the first of them the head, as a Markdown table whose columns stand below each other."""
    columns = list(dict.fromkeys(column for found in values.values() for each in found for column in each))
    compared = {row: ratios(scenario, values, row) for row in values}
    heads = [f"÷ {scenario.base}" if scenario.base else "jobqueue ÷ this"] if any(compared.values()) else []
    rows = [["", *columns, *heads]]
    for row, found in values.items():
        cells = [cell([each[column] for each in found if column in each]) for column in columns]
        rows.append([row, *cells, *([cell(compared[row])] if heads else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)


def publish(text: str) -> None:
    """Write the results to results.md, and into README.md between its marks."""
    (HERE / "results.md").write_text(f"# Results of the last full run\n\n{text}")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


# ── The command line ────────────────────────────────────────────────────────────────────────────


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this service beside its limits and its peers.")
    names = f"scenarios ({', '.join(SCENARIOS)}) or systems ({', '.join(SYSTEMS)}, beside)"
    choices = [*SCENARIOS, *SYSTEMS, "beside"]
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], choices=choices, help=names)
    parser.add_argument("--rounds", type=int, help="in place of those that each scenario has")
    parser.add_argument("--quick", action="store_true", help="small counts, one round: to see that all works")
    parser.add_argument("--publish", action="store_true", help="write results.md, and README.md's table")
    default = HERE.parent / "jobqueue.py"
    parser.add_argument("--service", type=Path, default=default, help="the jobqueue.py to measure")
    parser.add_argument("--beside", type=Path, help="another jobqueue.py, in turn with it")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run.py: stopped"))
    wanted = [name for name in SCENARIOS if name in arguments.only] or list(SCENARIOS)
    beside = ["beside"] if arguments.beside else []
    names = [name for name in (*SYSTEMS, "beside") if name in arguments.only] or [*SYSTEMS, *beside]
    failures, parts, measured = list[str](), list[str](), list[System]()
    begun, busy = time.monotonic(), harness.busy_share()
    print(f"other programs use {busy:.0%} of the processors", file=sys.stderr)
    with harness.private_redis() as (client, url):
        for name in names:
            try:
                modules = arguments.service.resolve(), arguments.beside and arguments.beside.resolve()
                measured.append(systems.find(name, *modules, client, url))
            except (MeasurementError, OSError, ValueError) as error:
                failures.append(f"{name}: {error}")
        bench = Bench(client, measured, arguments.quick)
        for name in wanted:
            scenario = SCENARIOS[name]
            rounds = arguments.rounds or (1 if arguments.quick else scenario.rounds)
            values = measure(name, bench, rounds, failures)
            parts.append(f"## {scenario.title}\n\n{table(scenario, values)}")
        took, when = time.monotonic() - begun, time.strftime("%B %Y")
        head = (
            f"{machine(client, measured)}\n"
            f"{when}; the run took {took:.0f} s; others used {busy:.0%} of the processors before it.\n"
            "A figure is the median of all rounds, a ratio the median of each round's; in brackets the least "
            "and the most."
        )
    if failures:
        parts.append("## Not measured\n\n" + "\n".join(f"- {failure}" for failure in failures))
    text = "\n\n".join([head, *parts]) + "\n"
    print(text)
    if arguments.publish:
        publish(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("run.py: stopped")
    except MeasurementError as error:
        sys.exit(f"run.py: {error}")
