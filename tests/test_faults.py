"""The promises under faults: processes, Redis, networks, clocks and handlers, broken as they break for users.

Leases are short by setting. Nothing here sleeps to wait: it looks until it sees. A longer soak is

    SOAK_ROUNDS=1000 .venv/bin/python -m pytest tests/test_faults.py -k random
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import operator
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from conftest import (
    MODULE,
    PATIENCE_SECONDS,
    PREFIX,
    SETS,
    Bench,
    Program,
    RedisServer,
    eventually,
    free_port,
    missing,
)

Start = Callable[..., Program]
OwnRedis = Callable[..., RedisServer]
FAULTY = Path(__file__).with_name("faulty.py")
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "4"))
APPEND = {"job_type": "append", "payload": {"value": 1}}
SHORT = {"job_type": "long", "payload": {"seconds": 0.2}}
GATE = {"job_type": "gate", "payload": {"name": "a"}}


class Lab:
    """A Redis, and programs with the handlers of faulty.py and short leases; `books`: where those write."""

    def __init__(self, start: Start, server: RedisServer, books: RedisServer | None = None) -> None:
        self.server, self.books, self._start = server, books or server, start
        self.client: Any = server.client

    def start(self, *flags: str, url: str = "", **settings: str) -> Program:
        settings |= {"REDIS_URL": url or self.server.url, "DIRECT_URL": self.books.url}
        beside = {"PYTHONPATH": str(MODULE.parent)}
        return self._start("--lease-seconds", "2", *flags, module=FAULTY, **settings | beside)

    def status_of(self, job_id: str) -> Any:
        return self.client.hget(f"{PREFIX}job:{job_id}", "status")

    def runs(self, job_id: str) -> None:
        eventually(partial(self.status_of, job_id), "it is run", lambda status: status == "processing")

    def names(self, what: str, count: int = 0) -> list[str]:
        """The names that `arrived` or `left`, once there are so many."""
        client: Any = self.books.client
        return list(eventually(lambda: client.lrange(what, 0, -1), what, lambda found: len(found) >= count))

    def keeps_leases(self, ids: list[str]) -> None:
        """Each of these jobs is being run, and goes on to be for more than a lease."""
        ends = [self.client.zscore(PREFIX + "leases", job_id) + 3000 for job_id in ids]
        for job_id, end in zip(ids, ends, strict=True):
            score = partial(self.client.zscore, PREFIX + "leases", job_id)
            eventually(score, "its lease is renewed", partial(operator.lt, end))


@pytest.fixture
def lab(start: Start, redis_server: RedisServer) -> Lab:
    return Lab(start, redis_server)


def submit_all(program: Program, jobs: list[dict[str, Any]]) -> list[str]:
    """Submit jobs in one array, with no retries unless they say so; their ids."""
    status, answer = program.call("POST", "/job", [{"max_retries": 0} | job for job in jobs])
    assert status == 202, answer
    return [job["id"] for job in answer]


def submit(program: Program, job_type: str, payload: dict[str, Any] | None = None, **options: Any) -> str:
    return submit_all(program, [{"job_type": job_type, "payload": payload or {}} | options])[0]


def outcome(program: Program, job_id: str) -> tuple[str, int]:
    """Status and attempts of a job, once it is finished."""
    job = program.ended(job_id)
    return job["status"], job["attempts"]


def throughout(seconds: float, look: Callable[[], bool], what: str) -> None:
    """It is so at every look, for so many seconds."""
    until = time.monotonic() + seconds

    def over() -> bool:
        assert look(), f"it did not stay so: {what}"
        return time.monotonic() > until

    eventually(over)


def stops(*programs: Program, number: int = signal.SIGTERM) -> None:
    """A signal ends each with status 0 and without a traceback, and long before any other limit would."""
    begun = time.monotonic()
    for program in programs:
        program.process.send_signal(number)
    for program in programs:
        assert program.process.wait(PATIENCE_SECONDS) == 0, program.log
        assert "Traceback" not in program.log, program.log
    assert time.monotonic() - begun < 30, programs[0].log


def check(client: Any, ids: set[str] | None = None) -> dict[str, dict[str, str]]:
    """Every job is whole, and where its status says, once; the jobs, by id. `ids` must be among them."""
    bench = Bench(cast(Any, None), client)
    jobs = {job_id: bench.job(job_id) for place in bench.places().values() for job_id in place}
    for job_id, job in jobs.items():
        assert {"job_type", "payload", "max_retries", "timeout", "created_at", "number"} <= job.keys(), job_id
        assert int(job["attempts"]) <= int(job["max_retries"]) + 1, job
    assert ids is None or ids <= jobs.keys(), f"lost: {(ids or set()) - jobs.keys()}"
    return jobs


def all_completed(client: Any, ids: set[str] | None = None) -> dict[str, dict[str, str]]:
    """Wait until nothing is left to do; then every job is completed, and `ids` are among them."""

    def left() -> list[int]:
        pipe = client.pipeline()  # one look: a job may go back to a place that was looked at
        pipe.llen(PREFIX + "queue")
        for name in ("delayed", "pending", "processing"):
            pipe.zcard(PREFIX + name)
        return list(pipe.execute())

    eventually(left, "all jobs are done", lambda counts: not any(counts))
    jobs = check(client, ids)
    assert not (failed := [job for job in jobs.values() if job["status"] == "failed"]), failed
    return jobs


class Load(threading.Thread):
    """Submits `append` jobs to the last program, and remembers which were answered 202."""

    def __init__(self, programs: list[Program], pause: float = 0.002) -> None:
        super().__init__(daemon=True)
        self.programs, self.pause = programs, pause
        self.accepted: set[str] = set()
        self.refused: Counter[int] = Counter()
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        for value in itertools.count():
            if self.done.wait(self.pause):
                return
            body = {"job_type": "append", "payload": {"value": value}, "max_retries": 100}
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                status, answer = self.programs[-1].call("POST", "/job", body)
                if status == 202:
                    self.accepted.add(answer["id"])
                else:
                    self.refused[status] += 1

    def go_on(self, count: int) -> None:
        """Wait until so many more were accepted."""
        enough = len(self.accepted) + count
        eventually(lambda: len(self.accepted), f"{count} more jobs are accepted", lambda have: have >= enough)

    def finish(self) -> set[str]:
        self.done.set()
        self.join()
        assert self.accepted
        return self.accepted


# ── Processes that die or freeze ────────────────────────────────────────────────────────────────


def test_a_job_of_a_killed_process_is_run_by_another_one_or_at_the_next_start(lab: Lab) -> None:
    first, api = lab.start(), lab.start("--workers", "0")
    job_id = api.submit("gate", name="a")
    lab.names("arrived", 1)
    second = lab.start()
    first.kill()
    lab.names("arrived", 2)
    gone = f"{job_id}: its worker is gone"
    eventually(lambda: second.logged(gone) or api.logged(gone), "it is said")
    second.kill()
    api.kill()
    lab.client.set("open:a", 1)
    third = lab.start()
    job = third.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 3, str(third.process.pid))
    check(lab.client)


@pytest.mark.parametrize("by", ["kills", "shutdowns"])
def test_kills_and_shutdowns_at_random_moments_lose_nothing(lab: Lab, by: str) -> None:
    programs = [lab.start()]
    load = Load(programs)
    for _ in range(ROUNDS):
        load.go_on(random.randrange(40))
        if by == "kills":
            programs[-1].kill()
        else:
            stops(programs[-1], number=random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
        programs.append(lab.start())
    jobs = all_completed(lab.client, load.finish())
    if by == "shutdowns":  # which count no attempt
        assert {job["attempts"] for job in jobs.values()} == {"1"}
        assert set(Counter(lab.names("appended")).values()) == {1}
    stops(programs[-1])


def test_a_job_that_kills_its_process_fails_in_the_end_and_the_queue_goes_on(lab: Lab) -> None:
    programs = [lab.start()]
    job_id = submit(programs[0], "suicide", max_retries=1, delay=0.1)  # not before the answer

    def given_up() -> bool:
        if programs[-1].process.poll() is not None:
            programs.append(lab.start())
        return bool(lab.status_of(job_id) == "failed")

    eventually(given_up)
    assert len(programs) == 3  # two that the job killed, and the one that gave it up
    job = programs[-1].job(job_id)
    assert (job["attempts"], "worker died" in job["error"]) == (2, True)
    assert outcome(programs[-1], programs[-1].submit("append", value=1)) == ("completed", 1)


def test_a_process_frozen_past_its_lease_can_change_nothing(lab: Lab) -> None:
    frozen = lab.start()
    job_id = frozen.submit("gate", name="a")
    lab.names("arrived", 1)
    frozen.process.send_signal(signal.SIGSTOP)
    other = lab.start("--lease-seconds", "30")  # which a pause of the machine does not end
    lab.names("arrived", 2)
    frozen.process.send_signal(signal.SIGCONT)
    eventually(lambda: frozen.logged(f"{job_id}: .*cancelled.* its lease was lost"), "it is told")
    assert lab.names("left") == ["a"]  # the frozen one's `finally` ran, the other still runs
    lab.client.set("open:a", 1)
    job = other.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 2, str(other.process.pid))
    check(lab.client)


def test_a_handler_that_blocks_the_event_loop_loses_its_job(lab: Lab) -> None:
    blocked, api = lab.start(), lab.start("--workers", "0")
    job_id = api.submit("block", how="until it is run again")
    lab.runs(job_id)
    assert lab.start().ended(job_id)["result"] == "again"
    eventually(lambda: blocked.logged(f"{job_id}: report refused"), "the late report is refused")
    assert check(lab.client)[job_id]["attempts"] == "2"


def test_instances_that_share_a_port_run_each_job_exactly_once(lab: Lab) -> None:
    shared = ("--port", str(free_port()), "--reuse-port", "1", "--lease-seconds", "15")
    instances, ids = [lab.start(*shared) for _ in range(4)], set[str]()
    for begin in range(0, 4000, 500):
        jobs = [{"job_type": "append", "payload": {"value": n}} for n in range(begin, begin + 500)]
        ids |= set(submit_all(instances[0], jobs))
    all_completed(lab.client, ids)
    assert Counter(map(int, lab.names("appended"))) == Counter(range(4000))
    assert all(len(program.lines) > 100 for program in instances), "some instance had nothing to do"
    instances.pop().kill()  # the others go on at that port

    def is_served() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):  # what the killed one had accepted
            return bool(instances[0].call("GET", "/jobs?limit=1")[0] == 200)
        return False

    eventually(is_served, "it is served again")
    stops(*instances)


# ── Redis that dies, freezes, forgets or is full ────────────────────────────────────────────────

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def test_redis_killed_under_load_loses_nothing_that_was_answered(start: Start, own_redis: OwnRedis) -> None:
    lab = Lab(start, own_redis(*DURABLE))
    program = lab.start()
    load = Load([program])
    for _ in range(3):
        load.go_on(100)
        lab.server.kill()
        lab.server.start()
    all_completed(lab.client, load.finish())
    stops(program)


def test_a_list_that_redis_cuts_short_is_seen_to_be_incomplete(start: Start, own_redis: OwnRedis) -> None:
    lab = Lab(start, own_redis())
    program = lab.start("--workers", "0")
    for _ in range(20):
        submit_all(program, [APPEND] * 1000)
    with socket.socket() as connection, http.client.HTTPResponse(connection) as response:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", program.port))
        connection.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        response.begin()
        lab.server.kill()
        eventually(lambda: program.logged("Redis is away"))
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert program.call("GET", "/jobs")[0] == 503
    stops(program)


@pytest.mark.parametrize("fault", ["gone", "frozen"])
def test_jobs_outlast_a_redis_that_is_away_for_longer_than_their_lease(
    start: Start, own_redis: OwnRedis, fault: str
) -> None:
    lab = Lab(start, own_redis(*DURABLE))
    program, other = lab.start(), lab.start()  # the other one would run them again
    ends_meanwhile, ends_later = program.submit("long", seconds=2), program.submit("long", seconds=8)
    lab.runs(ends_meanwhile)
    lab.runs(ends_later)
    lab.server.kill() if fault == "gone" else lab.server.send_signal(signal.SIGSTOP)

    def is_refused() -> bool:
        status, answer = program.call("POST", "/job", APPEND)
        return status == 503 and "Redis cannot serve this now" in answer["error"]

    throughout(5, is_refused, "a POST is refused with the reason")
    lab.server.start() if fault == "gone" else lab.server.send_signal(signal.SIGCONT)
    assert outcome(program, ends_meanwhile) == ("completed", 1)
    assert outcome(program, program.submit("append", value=2)) == ("completed", 1)
    assert outcome(program, ends_later) == ("completed", 1)
    for each in (program, other):
        said = [line.split()[5] for line in each.lines if " Redis is " in line]
        assert said == ["away:", "back"], each.log
    all_completed(lab.client)
    stops(program, other)


def test_redis_emptied_under_load_is_no_crash(lab: Lab) -> None:
    program = lab.start()
    load = Load([program])
    for _ in range(10):
        load.go_on(20)
        lab.client.flushall()
    load.finish()
    assert outcome(program, program.submit("append", value=1)) == ("completed", 1)
    stops(program)


def test_a_key_of_the_wrong_type_is_a_clear_error_and_no_crash(lab: Lab) -> None:
    program, client = lab.start(), lab.client
    for key in ("queue", "number", *SETS):
        client.delete(PREFIX + key)
        client.execute_command("RPUSH" if key == "number" else "SET", PREFIX + key, "something else's")

        def is_refused() -> bool:
            answers = [program.call("POST", "/job", APPEND), program.call("GET", "/jobs?limit=1")]
            return any(status == 503 and "WRONGTYPE" in answer["error"] for status, answer in answers)

        if key in ("delayed", "leases", "finished"):  # which a submission and a list do not need
            job_id = program.submit("append", value=1)
            client.delete(PREFIX + key)
        else:
            eventually(is_refused, f"{key} is named")
            client.delete(PREFIX + key)
            job_id = program.submit("append", value=1)
        assert outcome(program, job_id) == ("completed", 1), key
    assert program.logged("Redis refused: .*WRONGTYPE")
    stops(program)


# ── A network between the program and Redis ─────────────────────────────────────────────────────


class Proxy:
    """Carries connections to Redis, and does to them what `fault` says, at random."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.fault = ""
        self.faults = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self.listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for source, sink, replies in ((inside, outside, False), (outside, inside, True)):
                threading.Thread(target=self._carry, args=(source, sink, replies), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65_536):
                strikes = replies if self.fault in ("swallow", "cut") else not replies
                fault = self.fault if strikes and random.random() < 0.05 else ""
                self.faults += bool(fault)
                if fault == "swallow":
                    continue  # the command was carried out, its reply never comes
                if fault == "cut":
                    sink.sendall(data[: len(data) // 2])
                    break
                if fault == "drop":
                    break  # the command never arrives
                if fault == "delay":
                    time.sleep(random.random() * 0.3)
                if fault == "late":
                    time.sleep(5)  # longer than the client waits: carried out after it gave up
                sink.sendall(data)
            for end in (source, sink):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("fault", ["cut", "drop", "delay", "swallow", "late"])
def test_a_bad_network_loses_no_job_and_repeats_none(lab: Lab, fault: str) -> None:
    proxy = Proxy(lab.server.port)
    program = lab.start("--lease-seconds", "20", url=proxy.url)
    proxy.fault = fault
    load = Load([program], pause=0)
    enough = 2 if fault in ("swallow", "late") else 20
    eventually(lambda: proxy.faults, f"times of {fault}", lambda count: count >= enough)
    load.go_on(3)  # in spite of them
    proxy.fault = ""
    load.go_on(3)
    jobs = all_completed(lab.client, load.finish())
    assert {job["attempts"] for job in jobs.values()} == {"1"}
    assert set(Counter(lab.names("appended")).values()) == {1}
    stops(program)
    proxy.listener.close()


def test_a_connection_closed_while_idle_is_opened_again(lab: Lab) -> None:
    program = lab.start()
    for _ in range(5):
        lab.client.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: program.call("POST", "/job", APPEND), "accepted", lambda answer: answer[0] == 202)
    all_completed(lab.client)
    stops(program)


# ── Clocks ──────────────────────────────────────────────────────────────────────────────────────


def fake_time(**how: str) -> dict[str, str]:
    """What moves the wall clock of a process, and no other clock."""
    libraries = sorted(Path("/usr").glob("lib*/**/faketime/libfaketime.so.1"))
    if not libraries:
        missing("faketime")
    # libc's own malloc comes before the one of redis-server, whose start would ask for the time too early.
    return {"LD_PRELOAD": f"libc_malloc_debug.so.0 {libraries[0]}", "DONT_FAKE_MONOTONIC": "1"} | how


def test_when_the_clock_of_redis_jumps_no_running_job_fails_or_is_repeated(
    start: Start, own_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with monkeypatch.context() as patch:
        for name, value in fake_time(FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1").items():
            patch.setenv(name, value)
        lab = Lab(start, own_redis())
    lease = ("--lease-seconds", "15")
    programs = [lab.start(*lease), lab.start(*lease)]  # one would run again what the other one runs
    once, often = submit_all(programs[0], [GATE, GATE | {"max_retries": 3}])
    lab.names("arrived", 2)

    def jump(to: str) -> None:
        before = lab.client.time()[0]
        clock.write_text(to)
        eventually(lambda: abs(lab.client.time()[0] - before) > 3000, "its clock jumps")
        throughout(1.2, lambda: lab.status_of(once) == "processing", f"it runs after {to}")
        now = lab.client.time()[0] * 1000
        for job_id in (once, often):
            lease = partial(lab.client.zscore, PREFIX + "leases", job_id)
            eventually(lease, "it is renewed", lambda end: now <= end <= now + 30_000)

    for to in ("+3600", "+7200", "+0"):
        jump(to)
    lab.client.set("open:a", 1)
    assert [outcome(programs[0], job_id) for job_id in (once, often)] == [("completed", 1)] * 2
    assert outcome(programs[0], programs[0].submit("append", value=1)) == ("completed", 1)
    assert lab.names("arrived") == ["a", "a"]
    check(lab.client)
    stops(*programs)


def test_instances_with_wrong_clocks_neither_steal_nor_starve(lab: Lab) -> None:
    right = lab.start("--workers", "1")
    for wrong_by in ("+3600", "-3600"):
        lab.start("--workers", "5", **fake_time(FAKETIME=wrong_by))
    held = submit_all(right, [GATE] * 11)
    lab.names("arrived", 11)  # one on the right instance, five on each of the others
    lab.keeps_leases(held)
    lab.client.set("open:a", 1)
    assert [outcome(right, job_id) for job_id in held] == [("completed", 1)] * 11
    check(lab.client)


# ── Shutdown ────────────────────────────────────────────────────────────────────────────────────

GRACE = ("--shutdown-grace-seconds", "1")


def test_two_signals_within_a_second_are_one_and_later_ones_however_many_end_the_grace(lab: Lab) -> None:
    program = lab.start("--workers", "1", "--shutdown-grace-seconds", "600")
    job_id = program.submit("gate", name="a")
    lab.names("arrived", 1)
    behind = program.submit("append", value=1)
    program.process.send_signal(signal.SIGTERM)
    program.process.send_signal(signal.SIGINT)  # two of one kind might be one to the kernel already
    throughout(1.5, lambda: lab.status_of(job_id) == "processing", "it has its grace")
    assert program.process.poll() is None
    assert program.log.count(": stopping;") == 1

    def ended() -> bool:
        program.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return program.process.wait(0.001) is not None
        return False

    eventually(ended)
    stops(program)
    assert lab.client.lrange(PREFIX + "queue", 0, -1) == [behind, job_id]
    assert check(lab.client)[job_id]["attempts"] == "0"


def test_a_ctrl_c_that_kills_the_children_of_handlers_fails_no_job_but_an_unrecoverable_one(lab: Lab) -> None:
    program = lab.start()
    cases = [("Trio", 0), ("Trio", 3), ("a thread", 0), ("a thread", 3), ("no use", 3)]
    ids = [submit(program, "child", {"how": how}, max_retries=retries) for how, retries in cases]
    lab.names("arrived", len(cases))
    eventually(lambda: children(program), "all children run", lambda count: count == len(cases))
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.process.wait(PATIENCE_SECONDS) == 0, program.log
    jobs = check(lab.client)
    ends = [(jobs[job_id]["status"], jobs[job_id]["attempts"]) for job_id in ids]
    assert ends == [("pending", "0")] * 4 + [("failed", "1")]
    assert {*lab.client.lrange(PREFIX + "queue", 0, -1)} == {*ids[:4]}


def children(program: Program) -> int:
    """How many processes this one has started, in any of its threads."""
    files = Path(f"/proc/{program.process.pid}/task").glob("*/children")
    return sum(len(file.read_text().split()) for file in files)


def test_sighup_stops_the_program_unless_it_was_ignored_at_the_start(lab: Lab) -> None:
    program, before = lab.start(), signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as a program under nohup
    try:
        stays = lab.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    stays.process.send_signal(signal.SIGHUP)
    stops(program, number=signal.SIGHUP)
    assert outcome(stays, stays.submit("append", value=1)) == ("completed", 1)
    assert "SIGHUP" not in stays.log
    stops(stays)


@pytest.mark.parametrize(
    ("job_type", "payload", "grace", "signals"),
    [
        ("block", {"how": "computes"}, "1", "one"),
        ("block", {"how": "sleeps"}, "600", "several"),
        ("occupy", {"name": "a"}, "1", "one"),
    ],
)
def test_a_process_ends_after_the_grace_whatever_holds_it_and_its_job_is_run_by_the_next(
    lab: Lab, job_type: str, payload: Any, grace: str, signals: str
) -> None:
    program = lab.start("--shutdown-grace-seconds", grace, EXIT_SECONDS="1")
    job_id = submit(program, job_type, payload, max_retries=3, delay=0.2)  # not before the answer
    lab.runs(job_id)
    eventually(lambda: lab.client.exists("begun", "arrived"), "its handler has begun")
    program.process.send_signal(signal.SIGTERM)

    def ended() -> bool:
        if signals == "several":
            program.process.send_signal(signal.SIGTERM)
        return program.process.poll() is not None

    eventually(ended)
    assert program.process.wait() == 0
    assert check(lab.client)[job_id]["status"] == "processing"  # until its lease ends
    lab.client.set("open:a", 1)
    assert outcome(lab.start(), job_id) == ("completed", 2)
    check(lab.client)


def test_a_shutdown_does_not_wait_for_a_redis_that_is_away(start: Start, own_redis: OwnRedis) -> None:
    labs = [Lab(start, own_redis()) for _ in range(2)]
    nowhere = f"redis://127.0.0.1:{free_port()}"
    programs = [labs[0].start(*GRACE), labs[1].start(*GRACE), labs[0].start(url=nowhere)]
    for lab, program in zip(labs, programs, strict=False):
        lab.runs(program.submit("long", seconds=600))  # not `gate`, which itself waits for Redis
    labs[0].server.send_signal(signal.SIGKILL)
    labs[1].server.send_signal(signal.SIGSTOP)
    eventually(lambda: programs[-1].logged("Redis is away"))
    stops(*programs)


def test_a_bug_during_a_shutdown_ends_the_program_with_a_traceback_and_status_1(lab: Lab) -> None:
    options = ("--workers", "1", "--shutdown-grace-seconds", "600")
    programs = [lab.start(*options, BUGGY="1") for _ in range(3)]
    for job_type in ("gate", "occupy", "shield"):
        submit(programs[0], job_type, {"name": "a"})
    lab.names("arrived", 3)
    for program in programs:
        program.process.send_signal(signal.SIGTERM)
        eventually(partial(program.logged, "SIGTERM"))
    lab.client.set("bug", 1)  # the next sweep steps on it
    for program in programs:
        assert program.process.wait(30) == 1
        eventually(partial(program.logged, r"Traceback(.|\n)*ZeroDivisionError: a bug"))


# ── Handlers that misbehave ─────────────────────────────────────────────────────────────────────

IN_A_TASK_ALONE = ["Closed, which cannot be shown"]  # Trio itself asks a thread's error for its traceback


def test_whatever_a_handler_raises_is_one_failed_attempt_and_harms_no_other_job(lab: Lab) -> None:
    program = lab.start("--workers", "2")
    beside = submit(program, "gate", {"name": "a"})
    lab.names("arrived", 1)  # so one worker is left for all the others
    patterns = [*program.ended(submit(program, "raised"))["result"], "Cancelled"]
    cases = [("raise-async", what) for what in patterns] + [("raise-def", "CancelledError")]
    cases += [("raise-def", what) for what in patterns if what not in IN_A_TASK_ALONE]
    ids = submit_all(program, [{"job_type": how, "payload": {"what": what}} for how, what in cases])
    behind = submit_all(program, [APPEND] * 3)
    for (how, what), job_id in zip(cases, ids, strict=True):
        job = program.ended(job_id)
        assert (job["status"], job["attempts"]) == ("failed", 1), (how, what)
        assert re.search(what, job["error"]), (how, what, job["error"])
        assert len(json.dumps(job)) < 100_000, (how, what)
    assert [outcome(program, job_id) for job_id in behind] == [("completed", 1)] * 3
    lab.client.set("open:a", 1)
    assert outcome(program, beside) == ("completed", 1)
    stops(program)
    check(lab.client)
    assert "forged" in program.log
    assert not [line for line in program.lines if not re.match(r"\d{4}-\d\d-\d\d [^\x00-\x09\x1b]*\n", line)]
    assert max(map(len, program.lines)) < 100_000


def test_a_scope_that_a_handler_leaves_behind_fails_its_attempt_and_cancels_no_other(lab: Lab) -> None:
    program = lab.start("--workers", "1", *GRACE)
    for what in ("scope", "scope with a deadline", "cancelled scope", "shielded scope"):
        leaving = {"job_type": "leave", "payload": {"what": what}}
        first, *behind = submit_all(program, [leaving, SHORT, APPEND])
        assert [outcome(program, job_id) for job_id in behind] == [("completed", 1)] * 2, what
        job = program.ended(first)
        assert (job["status"], job["attempts"], "scope" in job["error"].lower()) == ("failed", 1, True), what
    last = submit(program, "gate", {"name": "a"})
    lab.names("arrived", 1)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PATIENCE_SECONDS) == 0, program.log
    assert lab.client.lrange(PREFIX + "queue", 0, -1) == [last], program.log  # the grace could cancel it
    check(lab.client)


@pytest.mark.parametrize("holds", ["nothing", "scope"])
def test_an_async_generator_that_is_half_read_is_closed_and_harms_no_other_job(lab: Lab, holds: str) -> None:
    program = lab.start("--workers", "1", "--job-timeout-seconds", "0.3")
    for end in ("break", "return", "raise", "sleep", "cycle"):
        lab.client.delete("closed")
        job = program.ended(submit(program, "abandon", {"holds": holds, "end": end}))
        assert job["attempts"] == 1, end
        if (holds, end) != ("scope", "cycle"):  # the collector closes that scope in the right task, by chance
            is_well = holds == "nothing" and end not in ("raise", "sleep")
            assert job["status"] == ("completed" if is_well else "failed"), (end, job)
        assert outcome(program, submit(program, "append", {"value": 1})) == ("completed", 1), end
        assert lab.names("closed", 1) == [holds], end
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PATIENCE_SECONDS) == 0, program.log


def test_a_handler_that_breaks_trio_may_end_its_process_with_a_traceback_and_no_job_is_lost(lab: Lab) -> None:
    options = ("--workers", "2", "--job-timeout-seconds", "0.3")
    api, programs = lab.start("--workers", "0"), [lab.start(*options)]
    beside = submit(api, "gate", {"name": "a"}, max_retries=9, timeout=60)
    lab.names("arrived", 1)
    breaking: list[tuple[str, dict[str, str]]] = [
        ("break-trio", {}),
        ("leave", {"what": "nursery"}),
        ("abandon", {"holds": "nursery", "end": "break"}),
    ]
    for job_type, payload in breaking:
        job_id = submit(api, job_type, payload)

        def is_failed(job_id: str = job_id) -> bool:
            if (status := programs[-1].process.poll()) is not None:
                eventually(partial(programs[-1].logged, "Traceback"), "it is said")
                assert status == 1
                programs.append(lab.start(*options))
            return bool(lab.status_of(job_id) == "failed")  # it had one attempt

        eventually(is_failed, f"{job_type} {payload}")
    assert "KeyError: 'a bug'" in programs[0].log
    lab.client.set("open:a", 1)
    assert api.ended(beside)["status"] == "completed"
    check(lab.client)


def test_what_a_handler_forks_ends_at_a_signal_at_once(lab: Lab) -> None:
    program = lab.start()
    assert program.ended(submit(program, "fork"))["result"] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "SIGTERM" not in program.log
    assert outcome(program, program.submit("append", value=1)) == ("completed", 1)
    stops(program)


def test_handlers_that_take_all_of_trios_threads_do_not_keep_redis_away(
    start: Start, own_redis: OwnRedis, redis_server: RedisServer
) -> None:
    lab = Lab(start, own_redis(), books=redis_server)
    program = lab.start(
        url=lab.server.url.replace("127.0.0.1", "localhost")
    )  # a name is looked up in a thread
    job_id = submit(program, "threads", {"count": 50})
    lab.names("arrived", 40)
    lab.client.client_kill_filter(_type="normal", skipme=True)
    eventually(lambda: program.call("GET", f"/job/{job_id}")[0], "Redis is back", lambda code: code == 200)
    assert outcome(program, submit(program, "append", {"value": 1})) == ("completed", 1)
    redis_server.client.set("open:threads", 1)
    assert outcome(program, job_id) == ("completed", 1)


# ── Handlers in threads ─────────────────────────────────────────────────────────────────────────


def test_a_thread_past_its_timeout_ends_if_it_asks_and_else_keeps_its_job_and_its_late_result_counts(
    lab: Lab,
) -> None:
    program = lab.start("--workers", "2", "--retry-delay-seconds", "0.1")
    job_id = submit(program, "occupy", {"name": "a"}, timeout=0.5, max_retries=3)
    lab.names("arrived", 1)
    lab.start()  # would run it, if it could be had
    throughout(3.5, lambda: lab.status_of(job_id) == "processing", "a job keeps its thread's lease")
    lab.client.set("open:a", 1)
    job = program.ended(job_id)
    assert (job["status"], job["attempts"], job["result"]) == ("completed", 1, "late")
    assert lab.names("arrived") == lab.names("left") == ["a"]
    job = program.ended(submit(program, "poll", {"name": "b"}, timeout=0.5, max_retries=1))
    assert (job["status"], job["attempts"], "timed out" in job["error"]) == ("failed", 2, True)
    assert lab.names("arrived") == lab.names("left") == ["a", "b", "b"]
    check(lab.client)


def test_a_deleted_job_fails_at_once_and_its_thread_holds_its_worker_until_it_ends(lab: Lab) -> None:
    program, other = lab.start("--workers", "2"), lab.start("--workers", "0")
    occupying = {"job_type": "occupy", "payload": {"name": "a"}, "max_retries": 3}
    heeds, ignores = submit_all(program, [{"job_type": "poll", "payload": {"name": "b"}}, occupying])
    lab.names("arrived", 2)
    for job_id in (heeds, ignores):
        status, job = other.call("DELETE", f"/job/{job_id}")
        assert (status, job["status"], job["error"]) == (200, "failed", "cancelled")
    assert lab.names("left", 1) == ["b"]
    assert outcome(program, submit(program, "append", {"value": 1})) == ("completed", 1)
    lab.client.set("open:a", 1)
    lab.names("left", 2)
    eventually(lambda: program.log.count("its lease was lost"), "both are told", lambda count: count == 2)
    for job_id in (heeds, ignores):
        job = other.job(job_id)
        assert (job["status"], job["attempts"], job["result"]) == ("failed", 1, None)
    check(lab.client)


# ── Jobs whose keys are damaged ─────────────────────────────────────────────────────────────────

NUMBERS: list[str | None] = ["abc", None, "nan", "-1", ""]
TEXTS: list[str | None] = ["abc", None, ""]
DAMAGE = {field: [*NUMBERS] for field in ("timeout", "max_retries", "attempts", "number")}  # None: it is gone
DAMAGE |= {field: [*TEXTS] for field in ("status", "job_type", "token")} | {"payload": [*TEXTS, "[1]", "NaN"]}
DAMAGE |= {field: [*NUMBERS, "9" * 20, "-1e300"] for field in ("created_at", "due_at")}
LEGIBLE = {"abc", ""}  # job types that nobody handles, but which may be meant
DAMAGES = [(field, value) for field, values in DAMAGE.items() for value in values]


def listed(program: Program, path: str) -> dict[str, Any]:
    """The jobs that GET lists under a path, by id; the answer must be JSON, without NaN."""
    status, answer = program.call("GET", path)
    assert status == 200, answer
    json.dumps(answer, allow_nan=False)
    return {job["id"]: job for job in answer}


def test_a_job_with_a_damaged_field_fails_alone_or_is_run_if_it_waits_is_delayed_or_its_process_died(
    lab: Lab,
) -> None:
    program, damaged = lab.start("--workers", "100"), dict[str, tuple[str, str | None]]()
    sound = dict[str, tuple[str, int]]()
    for job, attempts in ((GATE, 2), (APPEND, 1), (APPEND | {"delay": 4}, 1)):
        free = 100 - len(DAMAGES) if job is GATE else 20  # so all workers are busy
        ids = submit_all(program, [job | {"max_retries": 1}] * (len(DAMAGES) + free))
        damaged |= dict(zip(ids, DAMAGES, strict=False))
        sound |= dict.fromkeys(ids[len(DAMAGES) :], ("completed", attempts))
        lab.names("arrived", 100)
    program.kill()
    for job_id, (field, value) in damaged.items():
        lab.client.hdel(f"{PREFIX}job:{job_id}", field)
        if value is not None:
            lab.client.hset(f"{PREFIX}job:{job_id}", field, value)
    lab.client.set("open:a", 1)
    program = lab.start("--retry-delay-seconds", "0.1")
    assert listed(program, "/jobs").keys() == damaged.keys() | sound.keys()
    assert {job_id: outcome(program, job_id) for job_id in sound} == sound
    for job_id, (field, value) in damaged.items():
        what = f"{field} = {value!r}"
        if field == "job_type" and value in LEGIBLE:
            assert program.job(job_id)["status"] in ("pending", "processing", "failed"), what
            continue
        shown = program.ended(job_id)
        assert shown["status"] == "completed" or field in shown["error"], f"{what}: {shown['error']}"
        assert lab.client.zscore(PREFIX + shown["status"], job_id) is not None, what
        for gone in ("pending", "processing", "leases", "delayed"):
            look = partial(lab.client.zscore, PREFIX + gone, job_id)
            eventually(look, f"{what}: not in {gone}", lambda score: score is None)
    pages = [listed(program, path) for path in ("/jobs", "/jobs?limit=1000")]
    assert all(damaged.keys() <= page.keys() for page in pages)
    failed = {job_id for job_id, job in pages[0].items() if job["status"] == "failed"}
    assert listed(program, "/jobs?status=failed").keys() == failed
    stops(program)
