"""README.md and docs/, as they stand: commands show what the text says, and what the text names is there.

A ```console block has commands behind `$ `, which may go on in the next line, each with what it shows below.
There `…` stands for anything, and a line may be broken at any space; ids, times, durations and processes may
be others, and each port that the texts name is a free one here. A ```python block whose first line is
`# name.py` is written to that file. All commands of a text run in one shell, in a copy of the service.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any, NamedTuple

import pytest

from conftest import MODULE, PATIENCE_SECONDS, Program, eventually, free_port, missing
from jobqueue import Settings

ROOT = MODULE.parent
README = (ROOT / "README.md").read_text()
TEXTS = [("README.md", "curl"), ("docs/tour.md", "redis-cli"), ("docs/deployment.md", "jq")]  # and a program
SETTINGS = {each.name.upper() for each in dataclasses.fields(Settings)}
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has nginx
PORTS = re.compile(r"\b(808\d|6399|9000)\b")
LOOKS = re.compile(r"(?!.* (-d|-X) )(curl|cat|cli) ", re.DOTALL)
READY = re.compile("listening on|Ready to accept connections")
MASKS = {
    r"[\da-f]{8}-[\da-f]{4}-[\da-f]{4}-[\da-f]{4}-[\da-f]{12}": "<id>",
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d{3}Z": "<time>",
    r'"worker": "[^"]+:\d+"': '"worker": "<instance>"',
    r'"[^"]+:\d+/[\da-f]{12}:[ab]:\d+"': '"<fencing token>"',
    r"\b\d+\.\d+ ?s\b": "<duration>",
    r"\s+": " ",
}


class Step(NamedTuple):
    """A command of a text, and what it shows."""

    line: int
    command: str
    shown: str = ""


def blocks(text: str, languages: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks in these languages: the number of the first line, and the lines."""
    for found in re.finditer(rf"^```(?:{languages})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start(1)].count("\n") + 1, found[1]


def steps(text: str) -> list[Step]:
    """Each command of a text, in order, and the writing of each file."""
    found, is_open = list[Step](), False  # whether the command goes on in the next line
    for first, block in blocks(text, "python|console"):
        if name := re.match(r"# (\w+\.py)\n", block):
            found.append(Step(first, f"cat >{name[1]} <<'EOF'\n{block}EOF"))
        for number, line in enumerate([] if name else block.splitlines(), first):
            if is_open:
                found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line}")
            elif line.startswith("$ "):
                found.append(Step(number, line[2:]))
            else:
                found[-1] = found[-1]._replace(shown=f"{found[-1].shown}\n{line}")
                continue
            is_open = line.endswith("\\") or found[-1].command.count("'") % 2 == 1
    return found


def is_as_shown(shown: str, seen: str) -> bool:
    for pattern, word in MASKS.items():
        shown, seen = re.sub(pattern, word, shown), re.sub(pattern, word, seen)
    pattern = ".*".join(map(re.escape, shown.strip().split("…")))
    return re.fullmatch(pattern, seen.strip(), re.DOTALL) is not None


class Shell:
    """A bash in a folder, for one command after the other. What it started ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environ = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environ |= {"CURL_HOME": str(folder), "PATH": PATH}
        options: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": STDOUT, "text": True, "process_group": 0}
        self.bash: Any = Popen(["bash"], cwd=folder, env=environ, **options)
        (folder / ".curlrc").write_text("silent\nshow-error\n")  # as on a terminal, without a progress meter

    def run(self, command: str) -> str:
        """What a command shows, once it has ended or is in the background, and serves there."""
        (self.folder / ".step").write_text(command + "\n")
        log = re.search(r">(\S+\.log) &", command)  # of a program that goes on behind the next commands
        if log:
            (self.folder / log[1]).write_text("")  # or the line of an earlier one would do
        self.bash.stdin.write(". ./.step </dev/null; echo; echo THE-END\n")
        self.bash.stdin.flush()
        (watchdog := threading.Timer(PATIENCE_SECONDS, self.end)).start()
        seen = "".join(itertools.takewhile(lambda line: line != "THE-END\n", self.bash.stdout))
        watchdog.cancel()
        assert self.bash.poll() is None, f"{command!r} does not end; so far it said: {seen}"
        if log:
            eventually(lambda: READY.search((self.folder / log[1]).read_text()), f"{command} is ready")
        return re.sub(r"(?m)^\S+: line \d+: +\d+ Killed .*\n", "", seen)  # bash says so by itself

    def take(self, step: Step) -> str:
        """What the command of a step shows; one that only looks is repeated until it shows what it should."""
        if not LOOKS.match(step.command):
            return self.run(step.command)
        run, until = partial(self.run, step.command), partial(is_as_shown, step.shown)
        return str(eventually(run, f"line {step.line} shows{step.shown}", until))

    def end(self) -> None:
        if self.bash.poll() is None:
            os.killpg(self.bash.pid, signal.SIGKILL)
            self.bash.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a copy of the service, whose `.venv` is that of the tests."""
    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    for name in ("jobqueue.py", "conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    made = Shell(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize(("name", "program"), TEXTS)
def test_each_command_of_a_text_shows_what_stands_below_it(shell: Shell, name: str, program: str) -> None:
    if not shutil.which(program):
        missing(program)
    text = (ROOT / name).read_text()
    ports = {port: str(free_port()) for port in {"8080", *PORTS.findall(text)}}
    if name != "docs/tour.md":  # which starts its programs by itself
        [command] = re.findall(r"^    python3 -m venv .* && (\S+ jobqueue\.py)$", README, re.MULTILINE)
        shell.run(f"PORT={ports['8080']} {command} 2>service.log &")
    for step in steps(PORTS.sub(lambda port: ports[port[0]], text)):
        seen, place = shell.take(step), f"{name}, line {step.line}: {step.command}"
        assert is_as_shown(step.shown, seen), f"{place} should show{step.shown}\nand shows\n{seen}"


def test_a_listing_that_shows_something_else_is_found() -> None:
    [step] = steps("```console\n$ look \\\n  '\n$ it'\n5 jobs … 2026-11-25T12:08:13.293Z\n0.02 s\n```\n")
    right = "5 jobs and more 2026-01-01T00:00:00.000Z 13.5 s"
    assert (step.command, is_as_shown(step.shown, f"{right}\n")) == ("look \\\n  '\n$ it'", True)
    for wrong in ("", right.replace("5", "6", 1), right.replace("Z", ""), f"so {right}", f"{right} or more"):
        assert not is_as_shown(step.shown, wrong)


def test_the_lines_for_nginx_serve_the_queue(shell: Shell, start: Callable[..., Program]) -> None:
    if not shutil.which("nginx", path=PATH):
        missing("nginx")
    program, port = start(API_TOKEN="secret"), free_port()
    [(_, lines)] = blocks(README, "nginx")
    lines = lines.replace(":8080", f":{program.port}").replace("listen 80", f"listen {port}")
    paths = "".join(f"{each}_temp_path t;" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (shell.folder / "conf").write_text(f"pid pid; events {{}} http {{ access_log off; {paths} {lines} }}")
    shell.run("nginx -p . -c conf -e stderr -g 'daemon off; master_process off;' 2>nginx.txt &")
    curl = f"curl localhost:{port}/jobs -H 'Host: queue.example.com' -H 'Authorization: Bearer secret'"
    assert shell.take(Step(0, curl, "[]")).strip() == "[]"


def test_each_link_leads_to_a_file_and_a_heading_that_are_there() -> None:
    wrong = []
    for text in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text.read_text()):
            name, _, anchor = target.partition("#")
            led_to = (text.parent / name).resolve() if name else text
            headings = re.findall(r"^#+ (.*)$", led_to.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            if not led_to.exists() or (anchor and anchor not in anchors):
                wrong.append(f"{text.name}: {target}")
    assert wrong == []


def test_each_setting_is_in_the_table_of_the_readme_and_in_the_compose_file() -> None:
    rows = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \|", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == SETTINGS
    compose = set(re.findall(r"\b[A-Z_]+\b", (ROOT / "docker-compose.yml").read_text()))
    assert SETTINGS - compose == {"HOST", "PORT"}  # which the image sets


def test_each_row_of_the_table_of_faults_names_tests_that_are_there() -> None:
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    there = set(re.findall(r"def (test_\w+)\(", "".join(each.read_text() for each in files)))
    rows = re.findall(r"^\| (?!fault |---|\*\*)(.*) \|$", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    named = {row: set(re.findall(r"`(test_\w+)`", row)) for row in rows}
    assert rows
    assert [f"{row}: {tests - there}" for row, tests in named.items() if not tests or tests - there] == []
