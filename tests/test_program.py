"""The program as a whole: processes, signals, the log, the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import jobqueue
from conftest import MODULE, Program, RedisServer, eventually

Start = Callable[..., Program]

FORK = """
import contextlib, os
import jobqueue

@contextlib.asynccontextmanager
async def resources():
    global pool
    pool = "a pool"
    jobqueue.log.info("resources entered")
    yield
    jobqueue.log.info("resources left")

@jobqueue.handler("resize")
def resize(path: str, width: int = 800) -> str:
    jobqueue.log.info("two\\nlines \\x1b[31m")
    return f"{path} {width} {pool}"

if __name__ == "__main__":
    jobqueue.main(resources())
"""
BROKEN = """
import sys, jobqueue
async def broken(*_):
    raise ZeroDivisionError("a bug")
setattr(jobqueue, sys.argv.pop(1), broken)
jobqueue.main()
"""
BESIDE = {"PYTHONPATH": str(MODULE.parent)}


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    (tmp_path / "my_queue.py").write_text(FORK)
    return tmp_path / "my_queue.py"


def run_to_end(*command: object, **settings: str) -> tuple[int, str]:
    """The status of a Python program that ends by itself, and what it said."""
    words, environ = [sys.executable, *map(str, command)], os.environ | BESIDE | settings
    run = subprocess.run(words, env=environ, cwd=MODULE.parent, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("kind", "number"), [("memory", signal.SIGINT), ("redis", signal.SIGTERM), ("redis", signal.SIGHUP)]
)
def test_the_program_runs_jobs_and_stops_cleanly(
    start: Start, request: pytest.FixtureRequest, kind: str, number: int
) -> None:
    url = request.getfixturevalue("redis_server").url if kind == "redis" else ""
    program = start(REDIS_URL=url)
    assert program.logged("memory, and vanish" if kind == "memory" else f"kept in {url}")
    job_id = program.submit("math", a="5", b="3")
    job = program.ended(job_id)
    assert (job["status"], job["result"], job["attempts"]) == ("completed", 8, 1)
    assert [job["id"] for job in program.call("GET", "/jobs")[1]] == [job_id]
    assert program.stop(number) == 0
    assert program.lines[-1].endswith("stopped\n")


def test_it_waits_for_redis_with_one_line_that_hides_the_password_and_never_uses_memory(
    start: Start, own_redis: Callable[..., RedisServer]
) -> None:
    servers = [own_redis(), own_redis()]
    servers[0].kill()
    servers[1].client.config_set("requirepass", "another")
    programs = [start(REDIS_URL=server.url.replace("//", "//:secret@")) for server in servers]
    for program, why in zip(programs, ("connect", "invalid username"), strict=True):
        eventually(partial(program.logged, f"Redis is away: .*{why}"), why)
        for _ in range(20):  # each makes it try again
            assert program.call("GET", "/jobs")[0] == 503
        assert len([line for line in program.lines if "Redis" in line]) == 1
    servers[0].start()
    for program, server in zip(programs, servers, strict=True):
        server.client.config_set("requirepass", "secret")
        eventually(partial(program.logged, "Redis is back"))
        assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
        assert program.stop() == 0
        assert "secret" not in program.log


def test_a_port_that_is_taken_is_one_clear_line_and_status_1(start: Start) -> None:
    program = start()
    status, said = run_to_end(MODULE, "--port", program.port)
    assert (status, said.count("\n"), f"port {program.port}" in said) == (1, 1, True), said


@pytest.mark.parametrize("task", ["keep_house", "dispatch", "end_grace", "serve_http"])
def test_a_bug_in_a_task_ends_the_program_with_a_traceback_and_status_1(task: str) -> None:
    status, said = run_to_end("-c", BROKEN, task, PORT="0")
    assert (status, "ZeroDivisionError: a bug" in said, "Traceback" in said) == (1, True, True), said


def test_the_log_is_in_utc_one_line_an_entry_and_names_the_job_and_resources_outlast_it(
    start: Start, fork: Path
) -> None:
    begun = datetime.now(UTC) - timedelta(seconds=1)
    program = start(module=fork, TZ="XYZ-9", **BESIDE)
    job_id = program.submit("resize", path="a.png")
    assert program.ended(job_id)["result"] == "a.png 800 a pool"
    last = program.submit("long", seconds=0.5)
    eventually(lambda: program.logged(f"job {last}: long"))
    assert program.stop() == 0
    ours = ("resize, attempt 1 of 4\n", "two\\nlines \\x1b[31m\n", "resize, attempt 1,")
    order = ["entered", "listening", *(f"job {job_id}: {text}" for text in ours)]
    order += [f"job {last}: long, attempt 1,", "left", "stopped"]
    places = [program.log.find(text) for text in order]
    assert (sorted(places), min(places) >= 0) == (places, True), program.log
    for line in program.lines:
        found = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z) [A-Z]{4,8} +\S.*\n", line)
        assert found, line
        assert begun <= datetime.fromisoformat(found[1]) <= datetime.now(UTC)


def test_a_foreign_address_without_a_token_is_one_warning(start: Start) -> None:
    assert start("--host", "0.0.0.0").logged("WARNING anybody who reaches 0.0.0.0 may use")


def test_a_fork_can_be_imported_and_help_and_errors_are_clear_lines_that_name_its_file(fork: Path) -> None:
    for command, status, text in [
        (["-c", f"import sys; sys.path.append({str(fork.parent)!r}); import my_queue; my_queue.resize('a')"],
         1, "name 'pool' is not defined"),
        ([fork, "--help"], 0, "usage: my_queue.py [--help] [--SETTING VALUE ...]"),
        ([fork, "--redis-url", "redis://:geheim/x@host"], 2, "my_queue.py: REDIS_URL"),
        ([MODULE, "--version"], 0, f"{jobqueue.__version__}\n"),
    ]:  # fmt: skip
        got, said = run_to_end(*typing.cast(list[Any], command))
        assert (got, text in said, "geheim" in said) == (status, True, False), said
        assert status != 2 or said.count("\n") == 1
