"""The README's listings, in their order: each command is run, and must show what stands below it.

    ```console
    $ a command, which may go on in the next line
    what it shows
    ```

In a listing `…` stands for anything; ids, times, durations and processes may be others; and each port that
the README names is a free one here. A ```python block whose first line is `# name.py` is written to that
file. All commands run in one shell, in a copy of the repository. Nothing is timed: a command that only looks
is repeated until it shows what it should, as a person looks again.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import MODULE, PATIENCE_SECONDS, eventually, free_port, missing

README = MODULE.parent / "README.md"
PORTS = re.compile(r"\b(808\d|6399|9000)\b")
LOOKS = re.compile(r"(?!.* (-d|-X) )(curl|cat|cli) ", re.DOTALL)
READY = re.compile("listening on|Ready to accept connections")
MASKS = {
    r"[\da-f]{8}-[\da-f]{4}-[\da-f]{4}-[\da-f]{4}-[\da-f]{12}": "<id>",
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d{3}Z?": "<time>",
    r"\b1\d{12}\b": "<milliseconds>",
    r'"worker": "[^"]+:\d+"': '"worker": "<instance>"',
    r'"[^"]+:\d+/[\da-f]{12}:\d+:\d+"': '"<fencing token>"',
    r"\b\d+\.\d+ ?s\b": "<duration>",
    r"(?m)[ \t\r]+$": "",
}


class Step(NamedTuple):
    """A command of the README and what it shows; or a file, and what is in it."""

    line: int
    command: str  # or the name of a file
    shown: str
    is_file: bool = False


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """The fenced blocks of a Markdown text: the number of the first line, the language, the lines."""
    language, start, lines = "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            yield start, language, lines
            start = 0
        else:
            language, start, lines = line[3:], number + 1, []


def steps(text: str) -> list[Step]:
    """What a reader of a Markdown text does, in order."""
    found: list[Step] = []
    for first, language, lines in blocks(text):
        if language == "python" and (name := re.fullmatch(r"# (\w+\.py)", lines[0])):
            found.append(Step(first, name[1], "\n".join(lines) + "\n", is_file=True))
        if language != "console":
            continue
        assert lines[0].startswith("$ "), f"line {first} of the README is no command"
        is_open = False  # whether the command goes on in the next line
        for number, line in enumerate(lines, first):
            if is_open:
                found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line}")
            elif line.startswith("$ "):
                found.append(Step(number, line[2:], ""))
            else:
                found[-1] = found[-1]._replace(shown=f"{found[-1].shown}{line}\n")
                continue
            command = found[-1].command
            is_open = command.endswith("\\") or command.count("'") % 2 == 1
    return found


def mask(text: str) -> str:
    for pattern, word in MASKS.items():
        text = re.sub(pattern, word, text)
    return text.strip()


def is_as_shown(shown: str, seen: str) -> bool:
    pattern = ".*".join(map(re.escape, mask(shown).split("…")))
    return re.fullmatch(pattern, mask(seen), re.DOTALL) is not None


class Shell:
    """A bash in a folder, for one command after the other. What it started ends with it."""

    END = "that was all, and it runs: "

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environ = {name: text for name, text in os.environ.items() if name not in ("REDIS_URL", "HOST")}
        self.bash = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ | {"CURL_HOME": str(folder)},
        )
        self.running: list[int] = []  # the ids of what runs in the background
        (folder / ".curlrc").write_text("silent\nshow-error\n")  # as on a terminal, without a progress meter

    def run(self, command: str) -> str:
        """What a command shows, once it has ended or is in the background, and serves there."""
        assert self.bash.stdin
        assert self.bash.stdout
        (self.folder / ".step").write_text(command + "\n")
        log = re.search(r">(\S+\.log) &", command)  # of a program that goes on behind the next commands
        if log:
            (self.folder / log[1]).unlink(missing_ok=True)  # or the line of an earlier one would do
        self.bash.stdin.write(b". ./.step </dev/null; echo; echo '%s'$(jobs -p)\n" % self.END.encode())
        self.bash.stdin.flush()
        seen, give_up = b"", time.monotonic() + PATIENCE_SECONDS
        while not (end := re.search(rf"\n{self.END}([\d ]*)\n".encode(), seen)):
            if not select.select([self.bash.stdout], [], [], max(0, give_up - time.monotonic()))[0]:
                pytest.fail(f"{command!r} does not end; so far it said: {seen.decode()}")
            seen += os.read(self.bash.stdout.fileno(), 65_536)
        self.running = [int(number) for number in end[1].split()]
        if log:
            eventually(lambda: self.is_ready(self.folder / log[1]), f"{command} is ready")
        return re.sub(r"(?m)^\S+: line \d+: +\d+ Killed .*\n", "", seen[: end.start()].decode())  # bash's own

    def is_ready(self, log: Path) -> bool:
        return log.exists() and READY.search(log.read_text()) is not None

    def close(self) -> None:
        for process_id in self.running:
            with suppress(ProcessLookupError):  # it was about to end when bash named it
                os.kill(process_id, 9)
        self.bash.kill()
        self.bash.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell in a fresh copy of the repository, whose `.venv` has the Python that runs the tests."""
    for program in ("bash", "curl", "git", "redis-server", "redis-cli"):
        if not shutil.which(program):
            missing(program)
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=MODULE.parent, capture_output=True, text=True)
    if listed.returncode:
        missing("git in a clone of the repository")
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(MODULE.parent / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    made = Shell(tmp_path)
    yield made
    made.close()


def follow(text: str, shell: Shell, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[tuple[Step, str]]:
    """Take the steps of a Markdown text; each with what it showed, the last time that it was repeated."""
    for step in steps(text):
        if step.is_file:
            (shell.folder / step.command).write_text(step.shown)
            continue
        give_up = time.monotonic() + patience_seconds
        seen = shell.run(step.command)
        while not is_as_shown(step.shown, seen) and LOOKS.match(step.command) and time.monotonic() < give_up:
            time.sleep(0.1)
            seen = shell.run(step.command)
        yield step, seen


def with_free_ports(text: str) -> str:
    ports = {port: str(free_port()) for port in sorted(set(PORTS.findall(text)))}
    return PORTS.sub(lambda port: ports[port[0]], text)


def start_command(text: str) -> str:
    """How the README starts the service, after it has installed what that needs."""
    command: str
    [command] = re.findall(r"^    python3 -m venv .* && (\S+ jobqueue\.py)$", text, re.MULTILINE)
    return command


def test_each_listing_of_the_readme_is_what_its_command_shows(shell: Shell) -> None:
    text = with_free_ports(README.read_text())
    [port] = re.findall(r"Then open <http://localhost:(\d+)>", text)
    shell.run(f"PORT={port} {start_command(text)} 2>service.log &")
    for step, seen in follow(text, shell):
        assert is_as_shown(step.shown, seen), (
            f"README.md, line {step.line}\n$ {step.command}\nshould show\n{step.shown}\nand shows\n{seen}"
        )


@pytest.mark.parametrize(
    ("listing", "is_right"),
    [
        ("$ echo 5 jobs\n5 jobs", True),
        ("$ echo 5 jobs\n6 jobs", False),
        ("$ echo 5 jobs", False),
        ("$ echo 5 jobs\n5 jobs\nmore", False),
        ("$ echo 5 \\\n  jobs and more\n5 jobs…", True),
        ("$ echo '5\njobs'\n5\njobs", True),
        ("$ echo 2026-11-25T12:08:13.293Z 0.02 s\n2026-01-01T00:00:00.000Z 13.5 s", True),
        ("$ cat the.log\nstopped", False),
    ],
)
def test_a_listing_that_shows_something_else_is_found(shell: Shell, listing: str, is_right: bool) -> None:
    [(step, seen)] = follow(f"```console\n{listing}\n```", shell, patience_seconds=0.3)
    assert is_as_shown(step.shown, seen) == is_right
