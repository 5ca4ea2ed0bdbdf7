"""The program as a whole: processes, signals, the log, the command line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import typing
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import jobqueue
from conftest import MODULE, PREFIX, Program, RedisServer, eventually

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


def test_sighup_that_is_ignored_at_the_start_as_under_nohup_stays_ignored(start: Start) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a program inherits
    try:
        program = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    program.process.send_signal(signal.SIGHUP)
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop(signal.SIGTERM) == 0
    assert "SIGHUP" not in program.log


@pytest.mark.parametrize("is_ended_early", [False, True])
def test_two_signals_within_a_second_are_one_and_a_later_one_ends_the_grace(
    start: Start, redis_server: RedisServer, is_ended_early: bool
) -> None:
    program = start("--workers", "1", REDIS_URL=redis_server.url)
    running = program.submit("long", seconds=60 if is_ended_early else 0.7)
    waiting = program.submit("math", a=1, b=2)
    eventually(lambda: program.job(running)["status"] == "processing")
    for _ in range(2):  # as supervisors do
        program.process.send_signal(signal.SIGTERM)
        eventually(lambda: program.logged("SIGTERM: stopping"))

    def has_ended() -> bool:
        if is_ended_early:
            program.process.send_signal(signal.SIGINT)  # again and again, so also after a second
        return program.process.poll() is not None

    eventually(has_ended, "the end")
    assert program.stop() == 0
    hashes = [redis_server.client.hgetall(f"{PREFIX}job:{job_id}") for job_id in (running, waiting)]
    states = [(job["status"], job["attempts"]) for job in hashes]
    assert states == [("pending", "0") if is_ended_early else ("completed", "1"), ("pending", "0")]
    assert program.log.count("SIGTERM: stopping") == 1


def test_shutdown_does_not_wait_for_idle_connections(start: Start) -> None:
    program = start("--shutdown-grace-seconds", "600")
    with socket.create_connection(("127.0.0.1", program.port)) as idle:
        idle.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(10_000).startswith(b"HTTP/1.1 200")
        assert program.stop() == 0


def test_odd_requests_are_answered_in_http_1_and_harm_nobody(start: Start) -> None:
    program = start()
    for request_, status in [
        (b"GET /jobs HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
         b"HTTP2-Settings: abc\r\n\r\n", b"200"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"505"),
        (b"GET ?x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /jobs HTTP/1.1\r\nHost: \xff\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
         b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n\r\n\x81\x00", b"404"),
    ]:  # fmt: skip
        with socket.create_connection(("127.0.0.1", program.port), timeout=30) as connection:
            connection.sendall(request_)
            received = b""
            while b"\r\n\r\n" not in received and (data := connection.recv(65_536)):
                received += data
        assert received[:12] == b"HTTP/1.1 " + status, request_
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0


def test_it_waits_for_redis_with_one_line_that_hides_the_password_and_never_uses_memory(
    start: Start, own_redis: Callable[..., RedisServer]
) -> None:
    server = own_redis()
    server.kill()
    program = start(REDIS_URL=server.url.replace("//", "//:secret@"))
    eventually(lambda: program.logged("Redis is away"))
    for _ in range(20):  # each makes it try again
        assert program.call("GET", "/jobs")[0] == 503
    assert len([line for line in program.lines if "Redis" in line]) == 1
    server.start()
    server.client.config_set("requirepass", "secret")
    eventually(lambda: program.logged("Redis is back"))
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0
    assert "secret" not in program.log


def test_a_submission_wakes_another_instance_if_nobody_is_free_here(
    start: Start, redis_server: RedisServer
) -> None:
    api = start("--workers", "0", REDIS_URL=redis_server.url)
    worker = start("--workers", "2", REDIS_URL=redis_server.url)
    job_id = api.submit("math", a=20, b=22)
    assert api.ended(job_id)["result"] == 42
    eventually(lambda: job_id in worker.log)
    assert job_id not in api.log


def test_reuse_port_lets_two_instances_listen_on_one_port_which_else_is_one_clear_line(
    start: Start, redis_server: RedisServer
) -> None:
    shared = {"REUSE_PORT": "1", "REDIS_URL": redis_server.url}
    first = start(**shared)
    second = start("--port", str(first.port), **shared)
    assert second.port == first.port
    job_id = first.submit("math", a=1, b=2)
    assert first.stop() == 0
    assert second.ended(job_id)["result"] == 3
    status, said = run_to_end(MODULE, "--port", second.port)
    assert (status, said.count("\n"), f"port {second.port}" in said) == (1, 1, True), said
    assert second.stop() == 0


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
    assert not start("--host", "0.0.0.0", API_TOKEN="secret").logged("WARNING")


def test_a_fork_can_be_imported_and_help_and_errors_are_clear_lines_that_name_its_file(fork: Path) -> None:
    for command, status, text in [
        (["-c", f"import sys; sys.path.append({str(fork.parent)!r}); import my_queue; my_queue.resize('a')"],
         1, "name 'pool' is not defined"),
        ([fork, "--help"], 0, "usage: my_queue.py [--help] [--SETTING VALUE ...]"),
        ([fork, "--port", "x"], 2, "my_queue.py: PORT"),
        ([fork, "--processes", "4"], 2, "REUSE_PORT=1\n"),
        ([MODULE, "--version"], 0, f"{jobqueue.__version__}\n"),
    ]:  # fmt: skip
        got, said = run_to_end(*typing.cast(list[Any], command))
        assert (got, text in said) == (status, True), said
        assert status != 2 or said.count("\n") == 1
    status, said = run_to_end(MODULE, PROCESSES="4")
    assert (status, said.count("\n"), "REUSE_PORT=1" in said) == (2, 1, True), said
