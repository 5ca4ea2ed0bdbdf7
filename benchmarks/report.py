"""What is made of the results: tables, JSON, one chart, and whether the figures aimed at were reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import systems
from figures import Results

TITLES = {
    "drain": "Drain: jobs/s, ten at the same time, the queue filled first",
    "workers": "Drain of this service by number of workers",
    "submit": "Submission: jobs/s, no worker running",
    "latency": "From submission to the start of the job, idle",
    "post": "Round trip of one POST, idle",
    "posts": "POST beside a bare view, in turns; and what is submitted and completed meanwhile",
    "read": "Reading one job",
    "list": "Reading all jobs",
    "beside": "POST while a list is being read",
    "idle": "Idle",
    "start": "Start and stop",
    "memory": "Redis memory per job",
    "growth": "Drain as work grows",
    "instances": "Several instances",
    "fleet": "What many instances cost one Redis, in its own processor time",
}
ONE_PROCESS, SEVERAL = "one process", "several processes"


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def cell(values: Sequence[float]) -> str:
    """The median, and the least and the most of all rounds."""
    text = number(statistics.median(values))
    return f"{text} ({number(min(values))} … {number(max(values))})" if len(values) > 1 else text


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure_table(results: Results, figure: str) -> str:
    """The table of a figure: its rows and columns as they were added."""
    found = {key[1:]: values for key, values in results.values.items() if key[0] == figure}
    columns = list(dict.fromkeys((column, unit) for _, column, unit in found))
    if figure == "workers":
        columns.sort(key=lambda column: int(column[0].split()[0]))
    units = {unit for _, unit in columns}
    head = [", ".join(units) if len(units) == 1 else ""]
    head += [column if len(units) == 1 else f"{column}, {unit}" for column, unit in columns]
    rows = [head]
    for row in sorted(dict.fromkeys(row for row, _, _ in found), key=lambda row: "jobqueue" not in row):
        cells = [found.get((row, column, unit), []) for column, unit in columns]
        rows.append([row, *(cell(values) if values else "-" for values in cells)])
    return table(rows)


def as_text(results: Results, measured: Iterable[systems.System], machine: dict[str, Any], took: str) -> str:
    """The whole report, in Markdown."""
    parts = [
        f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"Redis {machine['redis']}, Node {machine['node'] or 'absent'}; {took}.\n"
        f"Other programs used {machine['busy_before']:.0%} of the processors before it, and "
        f"{machine['busy_after']:.0%} after it.\n"
        "The median of all rounds, in brackets the least and the most.",
        systems_table(measured),
    ]
    for figure, title in TITLES.items():
        if any(key[0] == figure for key in results.values):
            text = fleet_text(results) if figure == "fleet" else figure_table(results, figure)
            parts.append(f"## {title}\n\n{text}")
    if results.failures:
        parts.append("## Not measured\n\n" + "\n".join(f"- {what}: {why}" for what, why in results.failures))
    parts.append(f"## What was to be reached\n\n{targets_table(targets(results))}")
    return "\n\n".join(parts) + "\n"


def fleet_text(results: Results) -> str:
    """The table of the fleet, whose rows have their aims beside them, and what one Redis carries."""
    lines = [f"- {note}" for note in results.notes]
    return "\n\n".join([targets_table(fleet_targets(results)), *(["\n".join(lines)] if lines else [])])


def targets_table(aims: Sequence[Target]) -> str:
    rows = [["figure", "aim", "measured", "reached"]]
    rows += [[aim.name, aim.aim, aim.measured, aim.verdict] for aim in aims if aim.measured]
    left = [aim.name for aim in aims if not aim.measured]
    return table(rows) + (f"\n\nNot measured in this run: {'; '.join(left)}." if left else "")


def systems_table(measured: Iterable[systems.System]) -> str:
    rows = [["system", "version", ONE_PROCESS, SEVERAL]]
    for system in measured:
        labels = {setting.several: setting.label for setting in system.settings}
        rows.append([system.name, system.version, labels.get(False, "-"), labels.get(True, "-")])
    return table(rows)


# ── Targets ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at."""

    name: str
    aim: str
    measured: str  # empty if it was not
    verdict: str


def targets(results: Results) -> list[Target]:
    """Every aim, with what was measured in this run."""
    median = results.median

    def best_row(figure: str, column: str, rows: Iterable[str]) -> float | None:
        return max((rate for row in rows if (rate := median(figure, row, column))), default=None)

    ten, bullmq = median("drain", "jobqueue", ONE_PROCESS), median("drain", "bullmq", ONE_PROCESS)
    python = best_row("drain", ONE_PROCESS, (name for name in systems.PEERS if name != "bullmq"))
    one, two = (median("posts", row, "POST by wrk") for row in ("jobqueue", "jobqueue, 2 processes"))
    three = median("workers", "jobqueue", "3 workers")
    across = median("latency", "jobqueue, across instances", "p50")
    start, one_post = median("latency", "jobqueue", "p50"), median("post", "quart-trio", "p50")
    growth = median("growth", "1,000,000 jobs", "waiting, to 1,000 in all")
    lists = [median("list", "10,000 jobs", "whole answer"), median("list", "100,000 jobs", "whole answer")]
    first_byte = best_row("list", "first byte", ["10,000 jobs", "100,000 jobs"])
    grows = best_row("list", "memory grows by", ["10,000 jobs", "100,000 jobs"])
    return [
        at_least("drain, 10 workers, to BullMQ", ratio(ten, bullmq), 1.5, "x"),
        at_least("… to the best Python peer in one process", ratio(ten, python), 10, "x"),
        at_least("drain, 3 workers, to BullMQ with 10", ratio(three, bullmq), 0.8, "x"),
        at_least(
            "POST, 32 connections, to the bare Quart-Trio view",
            median("posts", "jobqueue", "to the bare view"),
            0.95,
            "x",
        ),
        at_least("POST, 32 connections, two processes to one", ratio(two, one), 1.7, "x"),
        at_least("POST of 1,000 jobs", median("submit", "jobqueue", systems.BULK_1000), 30_000, " jobs/s"),
        at_most("POST to start, p50, to one bare POST", ratio(start, one_post), 1.5, "x"),
        at_most("POST to start across instances, p50", across, 5, " ms"),
        at_most("GET /jobs, 10,000 jobs", lists[0], 0.3, " s"),
        at_most("GET /jobs, 100,000 jobs", lists[1], 3, " s"),
        at_most("GET /jobs, first byte", first_byte, 50, " ms"),
        at_most("GET /jobs, memory grows by", grows, 20, " MB"),
        at_least("drain, 1,000,000 waiting to 1,000", growth, 0.9, "x"),
        at_most("Redis memory of a finished job", median("memory", "jobqueue", "finished"), 800, " bytes"),
    ]


def fleet_targets(results: Results) -> list[Target]:
    """What the fleet was measured to cost, and what it may cost."""
    rows = [
        (what, unit)
        for figure, what, column, unit in results.values
        if (figure, column) == ("fleet", "wanted")
    ]
    found = (
        (what, unit, results.median("fleet", what, "measured"), results.median("fleet", what, "wanted"))
        for what, unit in rows
    )
    return [
        at_most(what, measured, wanted, unit) for what, unit, measured, wanted in found if wanted is not None
    ]


def ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value and to else None


def at_least(name: str, value: float | None, aim: float, unit: str) -> Target:
    return target(name, "≥", value, aim, unit, value is not None and value >= aim)


def at_most(name: str, value: float | None, aim: float, unit: str) -> Target:
    return target(name, "≤", value, aim, unit, value is not None and value <= aim)


def target(name: str, sign: str, value: float | None, aim: float, unit: str, reached: bool) -> Target:
    if value is None:
        return Target(name, f"{sign} {number(aim)}{unit}", "", "not measured")
    return Target(name, f"{sign} {number(aim)}{unit}", f"{number(value)}{unit}", "yes" if reached else "NO")


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────


def as_json(
    results: Results, measured: Iterable[systems.System], machine: dict[str, Any], took: str
) -> dict[str, Any]:
    """All that is in the report, and every single value."""
    return {
        "machine": machine,
        "run": took,
        "systems": {
            system.name: {
                "version": system.version,
                "settings": {s.label: {"command": s.worker, "copies": s.copies} for s in system.settings},
            }
            for system in measured
        },
        "results": [
            {
                "figure": figure,
                "row": row,
                "column": column,
                "unit": unit,
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "values": values,
            }
            for (figure, row, column, unit), values in results.values.items()
        ],
        "not_measured": [{"what": what, "why": why} for what, why in results.failures],
        "targets": [asdict(target) for target in targets(results) + fleet_targets(results)],
    }


# ── Chart ───────────────────────────────────────────────────────────────────────────────────────

PANELS = [
    ("Drain", "jobs/s, ten jobs at the same time", "drain", (ONE_PROCESS, SEVERAL)),
    ("Submission in bulk", "jobs/s, 1,000 in a call", "submit", (systems.BULK_1000,)),
    ("Submission one by one", "jobs/s, 32 clients at once", "submit", (systems.TASKS,)),
]
NAMES_WIDTH, PANEL_WIDTH, BAR_WIDTH, ROW_HEIGHT, TOP = 120, 250, 170, 34, 62

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 14px } .note { fill: #57606a }
.one { fill: #8c959f } .several { fill: #d0d7de }
.ours.one { fill: #0969da } .ours.several { fill: #80b8f5 } .ours-name { font-weight: 600 }
.spread { stroke: #24292f } .axis { stroke: #d0d7de } .rule { stroke: #d0d7de; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #8d96a0 }
  .one { fill: #768390 } .several { fill: #444c56 }
  .ours.one { fill: #4493f8 } .ours.several { fill: #1f4f8f }
  .spread { stroke: #e6edf3 } .axis, .rule { stroke: #444c56 }
}
"""


def as_svg(results: Results, took: str) -> str:
    """One chart with three panels; a row for each system, the fastest to drain on top, the limits below."""
    names = list(dict.fromkeys(row for figure, row, *_ in results.values if figure in ("drain", "submit")))
    names = [name for name in names if "," not in name]  # not the variants

    def place(name: str) -> tuple[bool, float]:
        speed = max(results.median("drain", name, column) or 0 for column in (ONE_PROCESS, SEVERAL))
        return name in systems.LIMITS, -speed

    names.sort(key=place)
    bottom = TOP + ROW_HEIGHT * len(names)
    width = NAMES_WIDTH + PANEL_WIDTH * len(PANELS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" width="{width}" '
        f'height="{bottom + 44}" role="img"><title>jobqueue, its peers, and the limits</title>',
        f"<style>{STYLE}</style>",
    ]
    for index, name in enumerate(names):
        y = TOP + ROW_HEIGHT * index
        css = ' class="ours-name"' if name == "jobqueue" else ""
        lines.append(
            f'<text x="{NAMES_WIDTH - 10}" y="{y + 20}" text-anchor="end"{css}>{escape(name)}</text>'
        )
    limits = [index for index, name in enumerate(names) if name in systems.LIMITS]
    if limits and limits[0]:
        y = TOP + ROW_HEIGHT * limits[0] - 1
        lines.append(f'<line x1="0" y1="{y}" x2="{width}" y2="{y}" class="rule"/>')
        lines.append(f'<text x="0" y="{y + 14}" class="note">limits</text>')
    for index, (title, note, figure, columns) in enumerate(PANELS):
        x = NAMES_WIDTH + PANEL_WIDTH * index
        lines.append(f'<text x="{x}" y="24" class="title">{title}</text>')
        lines.append(f'<text x="{x}" y="42" class="note">{note}</text>')
        lines += panel(results, names, x, figure, columns)
    lines += legend(bottom + 26, took)
    return "\n".join([*lines, "</svg>"]) + "\n"


def legend(y: int, took: str) -> list[str]:
    text = f"several processes; medians, with the least and the most of {took}"
    return [
        f'<rect x="{NAMES_WIDTH}" y="{y - 10}" width="10" height="10" class="one"/>',
        f'<text x="{NAMES_WIDTH + 16}" y="{y}" class="note">one process</text>',
        f'<rect x="{NAMES_WIDTH + 110}" y="{y - 10}" width="10" height="10" class="several"/>',
        f'<text x="{NAMES_WIDTH + 126}" y="{y}" class="note">{escape(text)}</text>',
    ]


def panel(results: Results, names: list[str], x: int, figure: str, columns: Sequence[str]) -> list[str]:
    """The bars of one panel, all to one scale, each with its median as a number."""
    found = {
        (row, column): values
        for (fig, row, column, _), values in results.values.items()
        if fig == figure and column in columns and row in names
    }
    most = max((max(values) for values in found.values()), default=1)
    bottom = TOP + ROW_HEIGHT * len(names)
    lines = [f'<line x1="{x}" y1="{TOP - 4}" x2="{x}" y2="{bottom}" class="axis"/>']
    for (row, column), values in found.items():
        thickness = (ROW_HEIGHT - 8) / len(columns)
        y = TOP + 4 + ROW_HEIGHT * names.index(row) + thickness * columns.index(column)
        lines += bar(values, most, x, y, thickness, ours=row == "jobqueue", several=column == SEVERAL)
    return lines


def bar(
    values: Sequence[float], most: float, x: int, y: float, thickness: float, ours: bool, several: bool
) -> list[str]:
    low, middle, high = (
        BAR_WIDTH * value / most for value in (min(values), statistics.median(values), max(values))
    )
    css = ("ours " if ours else "") + ("several" if several else "one")
    center = y + thickness / 2
    return [
        f'<rect x="{x}" y="{y:.1f}" width="{middle:.1f}" height="{thickness - 1:.1f}" class="{css}"/>',
        f'<line x1="{x + low:.1f}" y1="{center:.1f}" x2="{x + high:.1f}" y2="{center:.1f}" class="spread"/>',
        f'<text x="{x + high + 5:.1f}" y="{center + 4:.1f}">{statistics.median(values):,.0f}</text>',
    ]
