"""The specification of jobqueue, in the order of the module: read the names down the page."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import logging
import math
import os
import re
import socket
import threading
import typing
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import msgspec
import pytest
import redis
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import jobqueue
from conftest import PREFIX, Bench, Service, end_of, hold, new_job
from jobqueue import (
    FINISHED,
    HANDLERS,
    AutoPipeline,
    Claim,
    Report,
    Retry,
    Settings,
    Status,
    Store,
    Unrecoverable,
)

Register = Callable[..., Callable[[Any], Any]]
Log = pytest.LogCaptureFixture

# ── Settings ────────────────────────────────────────────────────────────────────────────────────


def test_a_variable_sets_and_a_flag_beats_it() -> None:
    table: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("", {"REDIS_URL": "", "PORT": ""}, {}),  # an empty one counts as unset
        ("", {"PORT": "9001", "LEASE_SECONDS": "2.5"}, {"port": 9001, "lease_seconds": 2.5}),
        ("--port 9000", {"PORT": "9001", "WORKERS": "3"}, {"port": 9000, "workers": 3}),
        ("--reuse-port 1 --redis-url unix:///r", {}, {"reuse_port": 1, "redis_url": "unix:///r"}),
    ]
    urls = {
        "smtp_url": ["smtp://m", "smtps://a%40b:c%2Fd@m.example.com:465", "smtp://[::1]:25", "smtp://a@m:25"],
        "redis_url": ["redis://x", "rediss://u:p%25@x/2?db=3", "unix:///a", "redis+sentinel://:p@a,b:1/x/2"],
    }
    for name, values in urls.items():
        table += [("", {name.upper(): url}, {name: url}) for url in values]
    for flags, variables, expected in table:
        assert Settings.read(flags.split(), variables) == Settings(**expected)


BAD = {
    "PORT": ["x", "-1", "65536", "1.5"],
    "WORKERS": ["many", "-1"],
    "LEASE_SECONDS": ["0", "1.9", "nan", "inf", "1e9"],
    "REDIS_URL": ["localhost:1", "http://:secret@x", "redis://:secret@x?x=1", "redis://:secret@x:y"],
    "REDIS_URL without a name": ["redis+sentinel://:secret@x", "redis+sentinel://:secret@x/"],
    "REDIS_URL of no database": ["redis://x/secret", "redis://x/1/2", "unix://", "redis://:1#secret@x"],
    "SMTP_URL": ["localhost:25", "http://x", "smtp://", "smtp://x:y", "smtp://x/y", "smtp://x:99999"],
    "SMTP_URL odd": ["smtp://[1:2]", "smtp://u:secret#@x", "smtp://x?y", "smtp://x:0", "smtp://x\n"],
    "SMTP_FROM": ["me", "a@b\nBcc: c@d", "a@b\n"],
    "API_TOKEN": ["two secret words", "secret-schlüssel", "secret\n"],
    "LOG_LEVEL": ["loud", "info\n"],
    "REUSE_PORT": ["1", "2"],  # without a REDIS_URL
    "PROCESSES": ["2"],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_one_clear_line_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in BAD[name]:
        with pytest.raises(SystemExit) as end:
            pytest.fail(f"taken: {Settings.read([], {name.split()[0]: value})}")
        [line] = capsys.readouterr().err.splitlines()
        assert (end.value.code, name.split()[0] in line, "secret" in line) == (2, True, False), line
        assert name != "PROCESSES" or "REUSE_PORT=1" in line


def test_a_system_that_cannot_share_a_port_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("socket.SO_REUSEPORT", raising=False)
    with pytest.raises(ValueError, match=r"REUSE_PORT .* system"):
        Settings(reuse_port=1, redis_url="redis://x")


def test_every_setting_is_in_help_readme_and_compose_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.read(["--help"], {})
    text, folder = " ".join(capsys.readouterr().out.split()), Path(jobqueue.__file__).parent
    readme, compose = (folder / "README.md").read_text(), (folder / "docker-compose.yml").read_text()
    names = {each.name.upper() for each in dataclasses.fields(Settings)}
    assert end.value.code == 0
    for default in ("REDIS_URL, default: unset", "PORT, default: 8080", "RETENTION_SECONDS, default: 604800"):
        assert default in text
    assert {name for name in names if f"({name}, default: " not in text} == set()
    assert {name for name in names if f"`{name}`" not in readme} == set()
    # The image sets these two.
    assert {name for name in names if not re.search(rf"\b{name}\b", compose)} == {"HOST", "PORT"}


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


def test_backoff_doubles_up_to_a_cap_and_jitter_takes_off_up_to_half() -> None:
    assert [jobqueue.backoff(n, 0.5, jitter=lambda: 0) for n in (1, 2, 3)] == [0.5, 1, 2]
    assert [jobqueue.backoff(n, 0.5, jitter=lambda: 1) for n in (1, 2, 3)] == [0.25, 0.5, 1]
    assert jobqueue.backoff(101, 3600, jitter=lambda: 0) == 300


def test_a_job_is_shown_with_iso_times_and_null_for_what_is_not_known() -> None:
    stored = {"job_type": "math", "payload": '{"a": 1e400}', "error": 'a "b"', "created_at": "1700000000007"}
    text = jobqueue.job_json("x", stored | {"worker": "host:1/6d0f:a"})
    assert '"payload": {"a": 1e400}' in text  # untouched, whatever a parser would make of it
    job = json.loads(text)
    assert job["created_at"] == "2023-11-14T22:13:20.007Z"
    assert (job["id"], job["error"], job["worker"]) == ("x", 'a "b"', "host:1")
    assert {job[name] for name in ("result", "progress", "status", "finished_at")} == {None}


Color = enum.Enum("Color", {"RED": "red", "BLUE": "blue"})
Meters: Any = type("Meters", (float,), {})  # as numpy's float64, another float
endless: list[Any] = []
endless.append(endless)
RESULTS: list[tuple[Any, Any]] = [
    *[(same, same) for same in (None, "null", [None, {"a": None}], 10**30, [1e300, 1e-7, -0.0])],
    *[('\0\x1f\u2028é😀"\\/', '\0\x1f\u2028é😀"\\/'), (Meters(1.5), 1.5), ((1, {2}), [1, [2]])],
    ({None: 1, True: 2, 3: Meters(4)}, {"null": 1, "true": 2, "3": 4.0}),
    ([date(2026, 1, 2), None, Color.RED], ["2026-01-02", None, "red"]),
    ({date(2026, 1, 2): 1, Color.RED: None}, {"2026-01-02": 1, "red": None}),
]


@pytest.mark.parametrize(("result", "expected"), RESULTS, ids=repr)
def test_a_result_is_json_also_of_what_json_does_not_know(result: Any, expected: Any) -> None:
    text = jobqueue.to_json(result)
    assert (json.loads(text), ", " in text) == (expected, False)


def test_a_result_that_is_not_json_or_too_large_is_a_value_error() -> None:
    for result in ({1: {1 + 2j}}, math.nan, {"a": [math.inf]}, object(), endless, "\ud800"):
        with pytest.raises(ValueError, match=r"the result .* JSON"):
            jobqueue.to_json(result)
    assert jobqueue.to_json("ä" * 4, 10) == '"ääää"'
    with pytest.raises(ValueError, match=r"the result .* 10 bytes.*; MAX_BODY_BYTES is 9"):
        jobqueue.to_json("ä" * 4, 9)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────


def read(job_type: str, payload: Any) -> dict[str, Any]:
    return HANDLERS[job_type].read(payload if isinstance(payload, str) else json.dumps(payload))


async def run(job_type: str, **payload: Any) -> Any:
    return await HANDLERS[job_type].run(json.dumps(payload))


def attempt_of(job_type: str, number: int = 1) -> jobqueue.Attempt:
    """From here on, this test is a handler in an attempt of that number."""
    attempt = jobqueue.Attempt(Claim("i:1", "some-id", job_type, "{}", number, 3, 60.0), trio.CancelScope())
    jobqueue._attempt.set(attempt)
    return attempt


@dataclasses.dataclass
class Point:
    x: int
    y: list[float]

    def __post_init__(self) -> None:
        if self.x < 0:
            raise LookupError("no such point")


class Options(typing.TypedDict):
    deep: bool


# An annotation, a JSON text that fits, what the handler gets, one that does not fit, and what is said of it.
TYPES: list[tuple[Any, str, Any, str, str]] = [
    (str, '"a"', "a", "1", ": expected str, got int"),
    (int, "9" * 40, int("9" * 40), "1.0", ": expected int, got float"),
    (float, "1", 1.0, '"1"', ": expected float, got str"),
    (bool, "true", True, "1", ": expected bool, got int"),
    (list[int], "[1]", [1], '["x"]', "[0]: expected int, got str"),
    (list, '[1, "a"]', [1, "a"], '"x"', ": expected array, got str"),
    (dict[str, int], '{"a": 1}', {"a": 1}, '{"a": "b"}', "[...]: expected int, got str"),
    (tuple[int, str], '[1, "a"]', (1, "a"), "[1]", ": expected array of length 2"),
    (set[int], "[1, 1]", {1}, "1", ": expected array, got int"),
    (int | None, "null", None, '"a"', ": expected int | null, got str"),
    (typing.Literal["a", "b"], '"a"', "a", '"c"', ": invalid enum value 'c'"),
    (list[Color], '["red"]', [Color.RED], '["x"]', "[0]: invalid enum value 'x'"),
    (Point, '{"x": 1, "y": [2]}', Point(1, [2.0]), '{"x": 1}', ".y: missing field"),
    (Options, '{"deep": true}', {"deep": True}, '{"deep": 1}', ".deep: expected bool, got int"),
    (
        datetime,
        '"2026-01-02T00:00:00Z"',
        datetime(2026, 1, 2, tzinfo=UTC),
        '"x"',
        ": invalid RFC3339 encoded datetime",
    ),
    (date, '"2026-01-02"', date(2026, 1, 2), '"2026-13-02"', ": invalid RFC3339 encoded date"),
    (timedelta, '"PT5S"', timedelta(seconds=5), '"x"', ": invalid ISO8601 duration"),
    (uuid.UUID, f'"{uuid.UUID(int=7)}"', uuid.UUID(int=7), '"x"', ": invalid UUID"),
    (Decimal, '"1.50"', Decimal("1.50"), '"x"', ": invalid decimal string"),
    (bytes, '"eA=="', b"x", '"#"', ": invalid base64 encoded string"),
    (typing.Annotated[int, msgspec.Meta(le=9)], "9", 9, "10", ": expected int <= 9"),
    (typing.Annotated[str, msgspec.Meta(min_length=2)], '"ab"', "ab", '"b"', ": expected str of length >= 2"),
]


@pytest.mark.parametrize("row", TYPES, ids=lambda row: str(row[0]))
def test_a_handler_gets_what_its_signature_says_and_nothing_else(handler: Register, row: Any) -> None:
    annotation, good, value, bad, problem = row
    take: Any = lambda ns: ns  # noqa: E731
    take.__annotations__["ns"] = annotation
    handler("take")(take)
    assert read("take", f'{{"ns": {good}}}') == {"ns": value}
    assert type(read("take", f'{{"ns": {good}}}')["ns"]) is type(value)
    with pytest.raises(ValueError, match=f"^payload.ns{re.escape(problem)}$"):
        read("take", f'{{"ns": {bad}}}')
    if annotation is not set[int]:
        assert read("take", f'{{"ns": {jobqueue.to_json(value)}}}') == {"ns": value}  # a result is JSON, too


def test_a_payload_has_all_fields_without_default_and_no_other_ones(handler: Register) -> None:
    @handler("mixed")
    def mixed(anything, *, color: Color = Color.RED, ns: list[int] = [], at: Point | None = None) -> None: ...  # type: ignore[no-untyped-def] # noqa: B006

    payload = {"anything": {"a": [1]}}  # what has no annotation takes anything
    assert read("mixed", payload) == payload | {"color": Color.RED, "ns": [], "at": None}
    read("mixed", payload)["ns"].append(2)
    assert read("mixed", payload)["ns"] == []
    assert HANDLERS["mixed"].schema["properties"]["color"]["default"] == "red"
    for bad, problem in (
        ({}, ".anything: missing field; the fields are: anything, color, ns, at"),
        (payload | {"b": 1}, ".b: unknown field; the fields are: anything, color, ns, at"),
        ([1, 2], ": expected object, got array"),
        (payload | {"at": {"x": -1, "y": []}}, " is not JSON of the right kind: LookupError: no such point"),
        ("{", " is not JSON of the right kind: DecodeError: Input data was truncated"),
        ('{"anything":' + "[" * 100_000 + "]" * 100_000 + "}", " is nested too deeply"),
    ):
        with pytest.raises(ValueError, match=f"^payload{re.escape(problem)}$"):
            read("mixed", bad)


def test_a_signature_that_no_json_object_can_fill_is_an_error_at_once(handler: Register) -> None:
    take: Any = lambda fine, odd: None  # noqa: E731
    for annotation in (complex, Path, object, Callable[[], int], trio.Event):
        take.__annotations__["odd"] = annotation
        with pytest.raises(TypeError):
            handler("take")(take)
    for function in (lambda *args: None, lambda **options: None, lambda a, /: None):
        with pytest.raises(TypeError, match="the handler of 'take' must have named parameters"):
            handler("take")(function)
    assert "take" not in HANDLERS


async def test_a_second_handler_of_one_name_must_say_replace(handler: Register) -> None:
    async def mine() -> str:
        return "mine"

    with pytest.raises(ValueError, match="'math' has a handler already; replace=True replaces it"):
        handler("math")(mine)
    assert await run("math", a="5", b=10**30) == 10**30 + 5
    assert handler("math", replace=True)(mine) is mine
    assert await run("math") == "mine"


@pytest.mark.parametrize("asks", [True, False])
async def test_a_def_handler_runs_in_a_thread_that_ends_if_it_asks(handler: Register, asks: bool) -> None:
    @handler("stuck")
    def stuck() -> list[Any]:
        trio.from_thread.run_sync(scope.cancel)
        jobqueue.progress(0.5)
        if asks:
            trio.from_thread.check_cancelled()
        return [threading.get_ident() != trio_thread, *jobqueue.job()]

    trio_thread, results = threading.get_ident(), list[Any]()
    attempt = attempt_of("stuck", 2)
    with trio.CancelScope() as scope:
        results += await run("stuck")
    assert (results, scope.cancelled_caught) == ([] if asks else [True, "some-id", "stuck", 2, 3], asks)
    assert attempt.progress == '{"done":0.5,"note":""}'


async def test_progress_is_a_share_from_0_to_1_and_a_note_and_outside_of_a_job_nothing() -> None:
    jobqueue.progress(1)
    with pytest.raises(LookupError):
        jobqueue.job()
    attempt = attempt_of("long")
    for done, kept in ((0.12345, 0.1235), (37, 1), (-1, 0), (math.inf, 1)):
        # Half of a surrogate pair, as in the name of a file, is no JSON.
        for note, kept_note in (("x" * 201, "x" * 200), ("caf\udce9", "caf\\udce9")):
            jobqueue.progress(done, note)
            assert json.loads(attempt.progress) == {"done": kept, "note": kept_note}
    with pytest.raises(ValueError, match="NaN"):
        jobqueue.progress(math.nan)


def test_a_retry_has_a_number_of_seconds() -> None:
    for seconds in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="from 0 on"):
            jobqueue.Retry(seconds, "no")
    retry = jobqueue.Retry(2.5, "the server is busy")
    assert (retry.seconds, str(retry)) == (2.5, "the server is busy")


async def test_long_and_simulated_email_take_their_time(autojump_clock: MockClock, caplog: Log) -> None:
    caplog.set_level(logging.INFO)
    mail = {"to": "a@example.com", "subject": "s", "body": "b"}
    table: list[tuple[str, dict[str, Any], float]] = [("email", mail, 1), ("long", {}, 2)]
    for job_type, payload, seconds in [*table, ("long", {"seconds": 2.5}, 2.5), ("long", {"seconds": 0}, 0)]:
        begun, attempt = trio.current_time(), attempt_of(job_type)
        await run(job_type, **payload)
        assert trio.current_time() - begun == seconds
        assert job_type == "email" or json.loads(attempt.progress)["done"] == 1
    assert caplog.messages == ["simulated e-mail to 'a@example.com': 's', 1 characters"]


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


class Line:
    """A transport that answers, when it may, with an error as long as it has some, or the last words."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.batches, self.may_answer = list(errors), list[list[Any]](), trio.Event()

    async def __call__(self, commands: Sequence[jobqueue.Command]) -> list[Any]:
        self.batches.append([command[-1] for command in commands])
        await self.may_answer.wait()
        if self.errors:
            raise self.errors.pop(0)
        return [command[-1] for command in commands]


async def call(nursery: trio.Nursery, pipeline: AutoPipeline, ends: list[Any], *commands: Any) -> None:
    """Call each of them in a task of its own, which adds to a list what the call comes to."""

    async def call_one(command: Any) -> None:
        try:
            ends.append(await pipeline.call(*command))
        except redis.RedisError as error:
            ends.append(f"{error}")

    for command in commands:
        nursery.start_soon(call_one, command)
    await wait_all_tasks_blocked()


async def test_commands_that_come_meanwhile_share_a_round_trip(nursery: trio.Nursery) -> None:
    line, ends = Line(), list[Any]()
    pipeline = AutoPipeline(line)
    nursery.start_soon(pipeline.run)
    await call(nursery, pipeline, ends, ("ECHO", 0))
    with trio.move_on_after(0) as scope:  # who is cancelled leaves, and Redis gets the command all the same
        await pipeline.call("ECHO", 1)
    await call(nursery, pipeline, ends, *(("ECHO", n) for n in range(2, 50)))
    line.may_answer.set()
    await wait_all_tasks_blocked()
    assert (scope.cancelled_caught, sorted(ends)) == (True, [0, *range(2, 50)])
    assert [sorted(batch) for batch in line.batches] == [[0], [*range(1, 50)]]


async def test_while_one_connection_is_busy_the_other_carries_what_comes(nursery: trio.Nursery) -> None:
    stuck, line, ends = Line(), Line(), list[Any]()
    line.may_answer.set()
    pipeline = AutoPipeline(stuck, line)
    nursery.start_soon(pipeline.run)
    for n in range(6):
        await call(nursery, pipeline, ends, ("ECHO", n))
    assert line.batches == [[n] for n in range(6) if [n] not in stuck.batches]
    assert (len(stuck.batches), [[n] for n in ends]) == (1, line.batches)


async def test_a_lost_connection_is_told_to_all_who_wait(nursery: trio.Nursery, caplog: Log) -> None:
    caplog.set_level(logging.INFO)
    line, ends = Line(redis.TimeoutError("gone"), redis.ConnectionError("gone")), list[Any]()
    pipeline = AutoPipeline(line)
    nursery.start_soon(pipeline.run)
    await call(nursery, pipeline, ends, ("ECHO", 1), ("ECHO", 2))
    await call(nursery, pipeline, ends, ("ECHO", 3))  # which need not wait for a time-out of its own
    line.may_answer.set()
    await wait_all_tasks_blocked()
    assert (ends, len(line.batches)) == (["gone"] * 3, 1)
    await call(nursery, pipeline, ends, ("ECHO", 4))
    await call(nursery, pipeline, ends, ("ECHO", 5))
    assert ends[3:] == ["gone", 5]
    assert caplog.messages == ["Redis is away: gone; waiting for it", "Redis is back"]


async def test_a_bug_in_a_transport_is_seen(nursery: trio.Nursery) -> None:
    pipeline = AutoPipeline(line := Line(KeyError("bug")))
    await call(nursery, pipeline, [], ("ECHO", 1))
    line.may_answer.set()
    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        await pipeline.run()


@pytest.mark.parametrize("inside", [False, True])
async def test_a_refusal_is_for_its_caller_alone(bench: Bench, nursery: trio.Nursery, inside: bool) -> None:
    pipeline, ends = AutoPipeline(jobqueue.memory()) if inside else bench.pipeline, list[Any]()
    if inside:
        nursery.start_soon(pipeline.run)
    async with trio.open_nursery() as callers:  # half of a surrogate pair is no UTF-8
        await call(callers, pipeline, ends, ("PING",), ("NONSENSE",), ("ECHO", "ä\udce9"))
    assert (len(ends), sorted(each for each in ends if "unknown" not in each)) == (3, ["PONG", "ä\\udce9"])


async def test_a_lost_command_is_sent_again_to_a_redis_that_knows_no_script(nursery: trio.Nursery) -> None:
    async def transport(commands: Sequence[jobqueue.Command]) -> list[Any]:
        record.append(commands[0][0])
        if len(record) == 1:
            raise redis.ConnectionError("Redis closed the connection")
        return [[1, 0, -1, []] if b"EVAL" in record else redis.exceptions.NoScriptError("NOSCRIPT")]

    pipeline, record = AutoPipeline(transport), list[Any]()
    nursery.start_soon(pipeline.run)
    assert await Store(pipeline).sweep() == (1, 0, math.inf, [])
    assert record == [b"EVALSHA", b"EVALSHA", b"EVAL"]


# ── Store: each test on fakeredis and on a real Redis ───────────────────────────────────────────

LEASE = 15.0
steps = itertools.count(1)  # since the numbers of a dispatcher's steps rise


async def submitted(bench: Bench, count: int = 1, **options: Any) -> list[str]:
    jobs = [new_job(**options) for _ in range(count)]
    assert await bench.store.submit(jobs) == [job.id for job in jobs]
    return [job.id for job in jobs]


async def claims(bench: Bench, room: int = 1, number: int = 0, by: str = "i:a") -> list[Claim]:
    return (await bench.store.step(by, number or next(steps), [], room, LEASE))[1]


async def reported(bench: Bench, transition: Any, *held: Claim, text: str = "3", **more: Any) -> list[bool]:
    reports = [Report(each, transition, text, **more) for each in held]
    return (await bench.store.step("i:a", next(steps), reports, 0, LEASE))[0]


async def finished(bench: Bench, count: int) -> list[str]:
    """Jobs that were completed and failed in turn, one second after the other."""
    ids = await submitted(bench, count)
    for number, claimed in enumerate(await claims(bench, count)):
        bench.move(1)
        await reported(bench, "fail" if number % 2 else "complete", claimed)
    return ids


async def shown(bench: Bench, job_id: str) -> dict[str, Any]:
    return dict(json.loads(await bench.store.get(job_id) or "{}"))


def ids_of(jobs: Iterable[str] | Iterable[Claim]) -> list[str]:
    return [json.loads(each)["id"] if isinstance(each, str) else each.id for each in jobs]


async def test_a_submitted_job_is_pending_in_the_queue_or_delayed(bench: Bench) -> None:
    jobs = [new_job(), new_job(delay=10), new_job(payload='{"a": 1e400}')]
    for _ in range(2):  # also sent again, since its reply was lost
        assert await bench.store.submit(jobs) == [job.id for job in jobs]
    assert bench.places() == {"queue": [jobs[0].id, jobs[2].id], "delayed": [jobs[1].id]}
    job = await shown(bench, jobs[1].id)
    assert (job["status"], job["attempts"], job["timeout"]) == ("pending", 0, 60)
    assert (job["created_at"], job["due_at"]) == ("1970-01-12T13:46:40.000Z", "1970-01-12T13:46:50.000Z")
    assert '{"a": 1e400}' in str(await bench.store.get(jobs[2].id))
    assert [await bench.store.status(each) for each in (jobs[0].id, "x")] == ["pending", None]


async def test_a_submission_that_is_refused_half_way_stores_nothing(bench: Bench) -> None:
    bench.client.set(PREFIX + "delayed", "damaged")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        await bench.store.submit([new_job(), new_job(delay=1)], "a-key", "f")
    left = {key.removeprefix(PREFIX) for key in [*bench.client.keys()]} - {"clock", "number", "delayed"}
    assert left <= {"queue"}  # there it is no job, but an id
    assert await claims(bench, 9) == []


async def test_an_idempotency_key_gets_the_first_answer_again_for_a_day(bench: Bench) -> None:
    first, second = [new_job(), new_job()], [new_job(), new_job()]
    expected = [job.id for job in first]
    assert await bench.store.submit(first, "k", "f") == expected
    assert await bench.store.submit(second, "k", "f") == expected
    assert await bench.store.submit(second, "k", "another") is None
    assert bench.places() == {"queue": expected}
    assert 86_000 < bench.client.ttl(PREFIX + "idempotency:k") <= 86_400
    assert await bench.store.submit(second, "another", "f") == [job.id for job in second]


async def test_a_step_claims_first_in_first_out_as_many_jobs_as_there_is_room_for(bench: Bench) -> None:
    ids = await submitted(bench, 3) + await submitted(bench, 2)
    _, first, left = await bench.store.step("x:a", 7, [], 2, LEASE)
    assert first == [Claim("x:a:7", each, "math", '{"a": 1, "b": 2}', 1, 3, 60.0) for each in ids[:2]]
    assert (bench.places(), left) == ({"queue": ids[2:], "processing": ids[:2]}, 3)
    assert bench.client.zscore(PREFIX + "leases", ids[0]) == (bench.now + LEASE) * 1000
    job = await shown(bench, ids[0])
    assert (job["attempts"], job["worker"], job["started_at"]) == (1, "x:a", job["created_at"])
    bench.client.script_flush()  # as a new Redis
    assert ids_of(await claims(bench, 9)) == ids[2:]
    assert await bench.store.step("i:a", next(steps), [], 9, LEASE) == ([], [], 0)


REPORTS: list[tuple[str, float, str, dict[str, Any]]] = [  # … where the job is then, and what is shown
    ("complete", 0, "completed", {"status": "completed", "result": 3, "error": None, "traceback": None}),
    ("fail", 0, "failed", {"status": "failed", "result": None, "error": "3", "traceback": "T"}),
    ("retry", 0.5, "delayed", {"status": "pending", "error": "3", "traceback": "T", "attempts": 2}),
    ("retry", 0, "delayed", {"status": "pending", "error": "3", "attempts": 2}),
    ("release", 2, "delayed", {"status": "pending", "error": "E", "attempts": 1}),
    ("release", 0, "queue", {"status": "pending", "error": "E", "attempts": 1}),
]


@pytest.mark.parametrize(("transition", "delay", "place", "expected"), REPORTS)
async def test_who_holds_a_job_moves_it_once_and_who_lost_it_is_refused(
    bench: Bench, transition: str, delay: float, place: str, expected: dict[str, Any]
) -> None:
    async def again(stale: Claim, is_accepted: bool) -> None:
        before = bench.places(), bench.job(job_id)
        assert await reported(bench, transition, stale, **more) == [is_accepted]
        assert (bench.places(), bench.job(job_id)) == before

    more: dict[str, Any] = {"traceback": "T", "delay": delay, "progress": '{"done":1}'}
    [job_id] = await submitted(bench)
    [stale] = await claims(bench)
    [waiting] = await submitted(bench)
    bench.move(LEASE)
    await bench.store.sweep()
    await again(stale, False)  # the job is back in the queue
    [current] = await claims(bench)
    bench.client.hset(f"{PREFIX}job:{job_id}", mapping={"error": "E", "traceback": "E"})  # of the first one
    await again(stale, False)  # another one runs it
    bench.move(LEASE * 10)  # a lease that has ended is not lost before a sweep has seen it
    assert await reported(bench, transition, current, **more) == [True]
    job = await shown(bench, job_id)
    assert {name: job[name] for name in expected} == expected
    assert (job["progress"], job["finished_at"] is None) == ({"done": 1}, job["status"] == "pending")
    others = {"queue": [job_id, waiting]} if place == "queue" else {"queue": [waiting], place: [job_id]}
    assert bench.places() == others
    bench.move(1)
    await again(current, True)  # as when the reply to the first one was lost
    await again(stale, False)


async def test_what_is_delayed_is_queued_when_it_is_due_and_not_before(bench: Bench) -> None:
    [job_id] = await submitted(bench, delay=10)
    bench.move(9)
    assert await bench.store.sweep() == (round(bench.now * 1000), 0, 1.0, [])
    bench.move(1)
    assert (await bench.store.sweep())[1:] == (1, math.inf, [])
    await reported(bench, "retry", *await claims(bench), delay=0.5)
    assert (await bench.store.sweep()).wait == 0.5
    bench.move(0.5)
    assert (await bench.store.sweep()).ready == 1
    assert [(each.id, each.attempts) for each in await claims(bench)] == [(job_id, 2)]


async def test_one_step_carries_many_reports_and_a_refused_one_hinders_nothing(bench: Bench) -> None:
    ids = await submitted(bench, 5)
    held = await claims(bench, 3)
    held[1] = msgspec.structs.replace(held[1], token="i:a:0")
    reports = [Report(each, "complete", "1") for each in held]
    accepted, claimed, left = await bench.store.step("i:a", next(steps), reports, 1, LEASE)
    assert (accepted, ids_of(claimed), left) == ([True, False, True], [ids[3]], 1)
    assert bench.places() == {"queue": ids[4:], "processing": ids[1:4:2], "completed": ids[0:3:2]}


async def test_a_step_sent_again_gets_the_same_jobs_and_no_attempt_is_counted(bench: Bench) -> None:
    ids = await submitted(bench, 4)
    first = await claims(bench, 3, number := next(steps))
    await reported(bench, "complete", first[1])
    bench.move(LEASE - 1)
    assert await claims(bench, 9, number) == [first[0], first[2]]  # what is over is over
    assert bench.client.zscore(PREFIX + "leases", ids[0]) == (bench.now + LEASE) * 1000
    bench.move(LEASE)
    await bench.store.sweep()
    assert await claims(bench, 9, number) == []  # their leases were lost
    assert sorted(bench.places()["queue"]) == sorted([ids[0], *ids[2:]])


async def test_a_step_that_comes_late_claims_nothing(bench: Bench) -> None:
    assert await claims(bench, 1, number := next(steps)) == []
    ids = await submitted(bench, 2)
    assert await claims(bench, 2, number) == []  # the first answer holds, though there are jobs by now
    assert ids_of(await claims(bench, 1)) == ids[:1]
    assert await claims(bench, 1, number) == []  # nobody waits for it
    assert bench.places() == {"queue": ids[1:], "processing": ids[:1]}


async def test_what_is_no_waiting_job_is_dropped_and_what_is_there_twice_claimed_once(bench: Bench) -> None:
    cancelled, deleted, running, twice, last = await submitted(bench, 5)
    await bench.store.cancel(cancelled)
    bench.client.delete(f"{PREFIX}job:{deleted}")
    bench.client.hset(f"{PREFIX}job:{running}", "status", "processing")
    bench.client.rpush(PREFIX + "queue", twice, "no-job", twice)
    _, claimed, left = await bench.store.step("i:a", next(steps), [], 7, LEASE)
    assert ([(each.id, each.attempts) for each in claimed], left) == ([(twice, 1)], 1)
    assert ids_of(await claims(bench, 7)) == [last]
    assert bench.keys()["queue"] == []


async def test_a_reply_has_a_limit_of_bytes_but_at_least_one_job(bench: Bench) -> None:
    ids = await submitted(bench, 5, payload=json.dumps({"a": "x" * 1_900_000}))
    page = await bench.store.page(None, "", 9)
    assert (ids_of(page.jobs), page.cursor != "") == (ids[:1:-1], True)
    assert ids_of((await bench.store.page(None, page.cursor, 9, 1)).jobs) == [ids[1]]
    assert ids_of(await claims(bench, 9)) == ids[:3]
    assert ids_of(await claims(bench, 9)) == ids[3:]


async def test_a_renewal_by_id_and_token_moves_the_end_of_a_lease_and_keeps_progress(bench: Bench) -> None:
    held, retaken, done, gone, cancelled = await submitted(bench, 5)
    claimed = await claims(bench, 5)
    bench.client.hset(f"{PREFIX}job:{retaken}", "token", "i:b:9")
    await reported(bench, "complete", claimed[2])
    for job_id in (gone, gone, cancelled):
        await bench.store.cancel(job_id)
    bench.move(10)
    before = {job_id: bench.job(job_id) for job_id in (retaken, done, gone, cancelled)}
    for progress in ('{"done":0.5}', ""):
        answers = await bench.store.renew([(each, progress) for each in claimed], LEASE)
        assert (answers, (await shown(bench, held))["progress"]) == ([True, *[False] * 4], {"done": 0.5})
    assert {job_id: bench.job(job_id) for job_id in before} == before
    bench.move(LEASE - 0.001)
    assert [each[0] for each in (await bench.store.sweep()).ended] == [retaken]


async def test_an_expired_lease_returns_the_job_to_the_front_of_the_queue(bench: Bench) -> None:
    [job_id] = await submitted(bench, max_retries=2)
    for attempt, status in ((1, "pending"), (2, "pending"), (3, "failed")):  # the last one fails it
        [claimed] = await claims(bench)
        assert (claimed.id, claimed.attempts) == (job_id, attempt)
        [waiting] = await submitted(bench)
        bench.move(LEASE - 0.001)
        now = (await bench.store.sweep()).now
        bench.move(0.001)
        assert (await bench.store.sweep(end_leases_by=now)).ended == []  # as where the clock has jumped
        [ended] = (await bench.store.sweep(end_leases_by=now + 1)).ended
        assert ended == [job_id, "math", f"{attempt}", status]
        assert await reported(bench, "complete", claimed) == [False]
        assert bench.places()["queue"] == ([job_id, waiting] if status == "pending" else [waiting])
        await bench.store.cancel(waiting)
    assert "the worker died" in (await shown(bench, job_id))["error"]


async def test_finished_jobs_are_deleted_by_age_and_by_count_and_others_never(bench: Bench) -> None:
    ids = await finished(bench, 5)
    running, waiting = await submitted(bench, 2)
    await claims(bench)
    bench.move(96)  # the first one finished 100 s ago
    for retention, keep, kept in ((100.001, 5, 5), (0, 0, 5), (100, 0, 4), (98, 4, 2), (0, 1, 1)):
        await bench.store.sweep(retention, keep, end_leases_by=0)
        assert [each for each in ids if await bench.store.get(each)] == ids[5 - kept :], (retention, keep)
    places = {"queue": [waiting], "processing": [running], "completed": ids[4:]}
    bench.client.zadd(PREFIX + "finished", {waiting: 1, running: 1, "no-job": 1})
    await bench.store.sweep(97, end_leases_by=0)
    assert bench.places() == places  # what is not finished is only taken out there


async def test_a_sweep_does_bounded_work_and_says_that_there_is_more(bench: Bench) -> None:
    await finished(bench, 5)
    await submitted(bench, 5)
    await claims(bench, 5)
    await submitted(bench, 3, delay=LEASE)
    bench.move(LEASE)
    for sizes in ((4, 0, 2, 3), (7, 0, 2, 1), (8, math.inf, 1, 0)):
        swept = await bench.store.sweep(1, most=2)
        assert (swept.ready, swept.wait, len(swept.ended), len(bench.keys()["finished"])) == sizes
    await finished(bench, 5)
    assert ((await bench.store.sweep(0, 1, most=2)).wait, len(bench.keys()["finished"])) == (0, 3)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_delete_cancels_a_job_and_deletes_a_finished_one(bench: Bench, is_lost: bool) -> None:
    async def lose_first_reply(commands: Sequence[jobqueue.Command]) -> list[Any]:
        replies = await carry(commands)
        if is_lost and isinstance(replies[0], list):  # not one that says that the script is not known
            bench.transport = carry
            raise redis.ConnectionError("the reply was lost")
        return replies

    carry, (running, waiting) = bench.transport, await submitted(bench, 2)
    [delayed], [claimed] = await submitted(bench, delay=9), await claims(bench)
    for job_id in (running, waiting, delayed):
        bench.transport = lose_first_reply
        text, is_cancelled = await bench.store.cancel(job_id) or ("{}", False)
        job = json.loads(text)
        assert (job["id"], job["status"], job["error"], is_cancelled) == (job_id, "failed", "cancelled", True)
        assert job == await shown(bench, job_id)
    bench.transport = carry
    assert bench.places() == {"failed": [running, waiting, delayed]}
    assert (await reported(bench, "complete", claimed), await claims(bench, 9)) == ([False], [])
    job = await shown(bench, waiting)
    text, is_cancelled = await bench.store.cancel(waiting) or ("{}", True)
    assert (json.loads(text), is_cancelled) == (job, False)
    assert (await bench.store.cancel(waiting), bench.places()) == (None, {"failed": [running, delayed]})
    bench.move(9)
    assert (await bench.store.sweep())[1:] == (0, math.inf, [])


async def listed(bench: Bench, status: Status | None, limit: int) -> list[list[str]]:
    pages, cursor = list[list[str]](), ""
    while not pages or cursor:
        jobs, cursor, *_ = await bench.store.page(status, cursor, limit)
        pages.append(ids_of(jobs))
    return pages


async def test_pages_are_newest_first_and_what_comes_or_goes_meanwhile_shifts_none(bench: Bench) -> None:
    ids = await submitted(bench, 7)
    assert await listed(bench, None, 3) == [ids[:3:-1], ids[3:0:-1], ids[0:1]]
    page = await bench.store.page(Status.PENDING, "", 2)
    later = await submitted(bench, 5)
    await claims(bench, 2)
    await bench.store.cancel(ids[4])  # the next one, at the cursor
    rest = await bench.store.page(Status.PENDING, page.cursor, 9)
    assert (ids_of(page.jobs), ids_of(rest.jobs), rest.cursor) == (ids[:4:-1], ids[3:1:-1], "")
    assert await listed(bench, None, 20) == [[*later[::-1], *ids[::-1]]]


async def test_pages_of_a_status_are_in_the_same_order_and_counted(bench: Bench) -> None:
    ids = await finished(bench, 4) + await submitted(bench, 5)
    held = await claims(bench, 2)
    await bench.store.renew([(held[0], "")], 2 * LEASE)  # which must not matter
    delayed = await submitted(bench, 2, delay=60)
    assert await listed(bench, Status.FAILED, 1) == [[ids[3]], [ids[1]]]
    assert await listed(bench, Status.COMPLETED, 5) == [[ids[2], ids[0]]]
    assert await listed(bench, Status.PROCESSING, 1) == [[ids[5]], [ids[4]]]
    assert await listed(bench, Status.PENDING, 4) == [[*delayed[::-1], *ids[:6:-1]], [ids[6]]]
    counts = {"pending": 5, "processing": 2, "completed": 2, "failed": 2}
    assert (await bench.store.page(Status.FAILED, "", 1)).counts == counts


async def test_a_page_tells_for_how_long_the_first_in_the_queue_has_been_due(bench: Bench) -> None:
    async def oldest() -> float | None:
        return (await bench.store.page(Status.FAILED, "", 1)).oldest

    await submitted(bench, 1, delay=60)
    bench.move(10)
    assert await oldest() is None
    [older] = await submitted(bench)
    bench.move(1)
    [newer] = await submitted(bench)
    bench.move(1.5)
    assert await oldest() == 2.5
    bench.client.hset(f"{PREFIX}job:{newer}", "created_at", "-1e300")  # by another program
    await bench.store.cancel(older)
    assert await oldest() == bench.now
    await claims(bench, 2)
    assert await oldest() is None
    bench.move(50)  # which is 2.5 s after the delay
    await bench.store.sweep(end_leases_by=0)
    assert await oldest() == 2.5


DAMAGE: dict[str, list[str | None]] = {  # what each field is set to; None: it is deleted
    "attempts": ["abc", None, "nan", "inf", "-1", "", "5000"],
    "max_retries": ["abc", None, "nan", "-1", "", "5000"],
    "timeout": ["abc", None, "nan", "-1", "", "inf"],
    "status": ["abc", None, ""],
}
DAMAGE |= {"job_type": [None], "payload": [None]}


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_damaged_job_fails_alone_and_names_the_field(bench: Bench, name: str) -> None:
    ids = await submitted(bench, 2 * len(DAMAGE[name]))
    for job_id, value in zip(ids[::2], DAMAGE[name], strict=True):
        bench.client.hdel(f"{PREFIX}job:{job_id}", name)
        if value is not None:
            bench.client.hset(f"{PREFIX}job:{job_id}", name, value)
    claimed = await claims(bench, len(ids))
    assert (ids_of(claimed), {each.damage for each in claimed[1::2]}) == (ids, {""})
    for each, value in zip(claimed[::2], DAMAGE[name], strict=True):
        assert f"the job is damaged: its {name} is " in each.damage, value
        assert await reported(bench, "fail", each, text=each.damage) == [True]
    assert await listed(bench, Status.FAILED, 9) == [ids[::2][::-1]]
    assert bench.places() == {"processing": ids[1::2], "failed": ids[::2]}


async def test_one_idle_instance_is_woken_by_who_has_jobs_that_it_cannot_run(bench: Bench) -> None:
    def tokens() -> int:
        return sum(bench.client.rpop(PREFIX + "wake") is not None for _ in range(3))

    await bench.store.submit([new_job()])
    assert tokens() == 0
    for _ in range(2):
        await bench.store.submit([new_job()], asks_others=True)
        await bench.store.wake()
    assert tokens() == 1
    await claims(bench, 1)  # two are left
    assert tokens() == 1
    await claims(bench, 2)
    assert tokens() == 0


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_is_run_and_its_result_kept(autojump_clock: MockClock, service: Service) -> None:
    pool = await service.run()
    job = await service.ended(await service.submit("math", payload='{"a": "5", "b": 3}'))
    assert end_of(job) == ("completed", "1", "8")
    assert job["worker"].startswith(f"{socket.gethostname()}:{os.getpid()}/")
    assert (pool.running, pool.reports, pool.free) == (set(), [], 1)


async def test_a_dispatcher_claims_several_jobs_in_one_step_and_reports_what_ended_in_the_same(
    autojump_clock: MockClock, service: Service
) -> None:
    pool, (calls, may_end) = await service.run(keeps_house=False, workers=10), hold(service, "step")
    may_end.set()
    jobs = [new_job(id=f"{n}", job_type="long", payload='{"seconds": 1}') for n in range(14)]
    await pool.store.submit(jobs)
    pool.ring()
    await trio.sleep(3)
    steps = [(len(reports), len(claims)) for _, _, reports, _, _, (_, claims, _) in calls]
    assert [each for each in steps if each != (0, 0)] == [(0, 5), (0, 5), (10, 4), (4, 0)]
    assert service.bench.places() == {"completed": [job.id for job in jobs]}


async def test_one_post_costs_one_step_and_its_end_another(
    autojump_clock: MockClock, service: Service
) -> None:
    await service.run(keeps_house=False, workers=10)
    steps, may_end = hold(service, "step")
    may_end.set()
    for count in range(3):
        await service.submit()
        await wait_all_tasks_blocked()
        assert len(steps) == 2 * count + 2
    assert len(service.bench.places()["completed"]) == 3


async def test_a_ring_while_both_dispatchers_are_in_a_step_is_not_lost(
    autojump_clock: MockClock, service: Service
) -> None:
    pool, (calls, may_end) = await service.run(keeps_house=False, workers=2), hold(service, "step")
    for _ in "ab":
        pool.ring()
        await wait_all_tasks_blocked()
    assert len({name for name, *_ in calls}) == 2
    job_id = await service.submit()
    may_end.set()
    await wait_all_tasks_blocked()
    assert service.bench.places() == {"completed": [job_id]}


async def test_an_attempt_is_a_fresh_task_so_a_context_variable_does_not_reach_the_next_job(
    autojump_clock: MockClock, service: Service
) -> None:
    name = ContextVar("name", default="clean")

    async def sets() -> str:
        seen = name.get()
        name.set("dirty")
        return seen

    await service.run()
    for _ in range(3):
        assert (await service.ended(await service.submit(sets)))["result"] == '"clean"'


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class GoneError(Unrecoverable):
    pass


async def unwind_badly() -> None:
    try:
        async with trio.open_nursery() as children:
            children.start_soon(trio.sleep_forever)
    finally:
        raise KeyError("while unwinding")


async def leave_a_scope_open() -> None:
    async def scopes() -> Any:
        with trio.move_on_after(1):
            yield 1
            yield 2

    LEFT_OPEN.append(scopes())
    await anext(LEFT_OPEN[-1])


async def stay_too_long() -> str:
    with trio.CancelScope(shield=True):  # as a thread, which cannot be interrupted
        await trio.sleep(180)
    return "late"


async def ask_for_another_time() -> None:
    raise Retry(math.nan)


def nested(error: Exception, depth: int) -> Exception:
    for _ in range(depth):
        error = ExceptionGroup("nested", [error])
    return error


LEFT_OPEN: list[Any] = []
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("outcome", "status", "attempts", "shown"),
    [
        (KeyError("why"), "failed", "2", "KeyError: 'why'"),
        (SystemExit("no such option"), "failed", "2", "SystemExit: no such option"),
        (KeyboardInterrupt(), "failed", "2", "KeyboardInterrupt"),
        (GeneratorExit(), "failed", "2", "GeneratorExit"),
        (MuteError(), "failed", "2", "MuteError"),
        (ValueError("\ud800"), "failed", "2", r"ValueError: \ud800"),
        (ExceptionGroup("a", [ValueError("x"), OSError("y")]), "failed", "2", "ValueError: x; OSError: y"),
        pytest.param(nested(OSError("deep"), 3000), "failed", "2", "OSError: deep", id="a deep group"),
        (Unrecoverable("no such user"), "failed", "1", "Unrecoverable: no such user"),
        (ExceptionGroup("a", [OSError(), GoneError("b")]), "failed", "1", "GoneError: b"),
        (Retry(5, "too busy"), "failed", "2", "Retry: too busy"),
        (ask_for_another_time, "failed", "2", "ValueError: Retry needs a number of seconds"),
        (trio.sleep_forever, "failed", "2", "timed out after 60 s"),
        (unwind_badly, "failed", "2", "timed out after 60 s; KeyError: 'while unwinding'"),
        (leave_a_scope_open, "failed", "2", "scope"),
        (stay_too_long, "completed", "1", '"late"'),
        *((bad, "failed", "2", "JSON") for bad in ({1: {1 + 2j}}, [math.nan], object(), ENDLESS, "\ud800")),
        pytest.param("x" * 2**20, "failed", "2", "MAX_BODY_BYTES", id="a result of 1 MB"),
    ],
)
async def test_whatever_a_handler_raises_returns_or_leaves_behind_ends_its_own_attempt_alone(
    autojump_clock: MockClock, service: Service, outcome: Any, status: str, attempts: str, shown: str
) -> None:
    service.log.set_level(logging.CRITICAL, "jobqueue")  # xdist cannot carry half a surrogate pair

    async def odd() -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return await outcome() if callable(outcome) else outcome

    pool = await service.run(lease_seconds=2)
    job = await service.ended(await service.submit(odd, max_retries=1))
    assert end_of(job)[:2] == (status, attempts)
    assert shown in end_of(job)[2]
    await trio.sleep(5)
    for _ in range(2):
        assert end_of(await service.ended(await service.submit())) == ("completed", "1", "3")
    assert (pool.running, pool.reports, pool.free) == (set(), [], 1)


@pytest.mark.parametrize(
    ("error", "text", "waits"),
    [
        (KeyError("why"), "KeyError: 'why'", [(5, 10), (10, 20), (20, 40)]),
        (Retry(30, "451 later"), "jobqueue.Retry: 451 later", [(30, 30)] * 3),
        (ExceptionGroup("a", [OSError(), Retry(7)]), "OSError; jobqueue.Retry", [(7, 7)] * 3),
    ],
)
async def test_a_job_that_always_fails_is_run_max_retries_times_more_as_retry_or_the_backoff_says(
    autojump_clock: MockClock, service: Service, error: Exception, text: str, waits: list[tuple[float, float]]
) -> None:
    async def bad() -> None:
        starts.append(trio.current_time())
        raise error

    starts: list[float] = []
    await service.run(retry_delay_seconds=10)
    assert end_of(await service.ended(await service.submit(bad))) == ("failed", "4", text)
    for (before, after), (shortest, longest) in zip(pairwise(starts), waits, strict=True):
        assert shortest - 0.001 <= after - before <= longest + 0.03


@pytest.mark.parametrize("seconds", [0.1, 0.999, 1, 1.3, 59])
async def test_an_attempt_is_cancelled_at_its_timeout(
    autojump_clock: MockClock, service: Service, seconds: float
) -> None:
    async def slow() -> None:
        begun = trio.current_time()
        try:
            await trio.sleep_forever()
        finally:
            record.append(trio.current_time() - begun)

    record: list[float] = []
    await service.run()
    job = await service.ended(await service.submit(slow, max_retries=1, timeout=seconds))
    assert job["error"] == f"timed out after {seconds:g} s"
    assert record == [pytest.approx(seconds)] * 2


@pytest.mark.parametrize("in_thread", [False, True])
async def test_the_traceback_of_the_last_attempt_is_kept_until_the_job_completes(
    autojump_clock: MockClock, service: Service, in_thread: bool
) -> None:
    def dig(depth: int) -> None:
        if depth:
            dig(depth - 1)
        raise ValueError("at the bottom" * 1000)

    async def digs() -> None:
        if jobqueue.job().attempt < 2:
            await trio.to_thread.run_sync(dig, 3) if in_thread else dig(3)

    await service.run()
    job_id = await service.submit(digs)
    kept = await service.field(job_id, "traceback")
    assert "in digs" in kept.splitlines()[1]  # the handler's own frames come first
    assert "in dig\n" in kept
    assert len(kept) < 8100
    assert service.bench.job(job_id)["error"].startswith("ValueError: at the bottom")
    job = await service.ended(job_id)
    assert end_of(job) == ("completed", "2", "null")
    assert not job.keys() & {"error", "traceback"}


async def test_progress_is_kept_by_the_next_renewal_and_by_the_report(
    autojump_clock: MockClock, service: Service
) -> None:
    async def pages() -> str:
        jobqueue.progress(0.1, "page 1")
        while not calls:  # noqa: ASYNC110
            await trio.sleep(0.05)
        jobqueue.progress(0.2, "page 2")  # while a renewal is under way: the next one keeps it
        may_end.set()
        await trio.sleep(3)
        jobqueue.progress(7, "caf\udce9")
        return f"{jobqueue.job()}"

    def progress() -> Any:
        return json.loads(service.bench.job(job_id).get("progress", "null"))

    calls, may_end = hold(service, "renew")
    await service.run()
    job_id = await service.submit(pages)
    await may_end.wait()
    assert progress() == {"done": 0.1, "note": "page 1"}
    await trio.sleep(1.1)
    assert progress() == {"done": 0.2, "note": "page 2"}
    result = (await service.ended(job_id))["result"]
    assert progress() == {"done": 1, "note": "caf\\udce9"}
    assert json.loads(result) == str(jobqueue.Job(job_id, "pages", 1, 3))


async def test_in_a_thread_progress_and_job_are_those_of_its_job(service: Service) -> None:
    def thread() -> list[Any]:
        jobqueue.progress(0.5)
        return list(jobqueue.job())

    await service.run()
    job_id = await service.submit(thread)
    job = await service.ended(job_id)
    assert json.loads(job["result"]) == [job_id, "thread", 1, 3]
    assert json.loads(job["progress"])["done"] == 0.5


async def test_a_type_that_this_instance_does_not_know_is_left_to_others_for_two_seconds_each_time(
    autojump_clock: MockClock, service: Service
) -> None:
    await service.run()
    ids, due_at = [await service.submit("other", max_retries=0) for _ in range(3)], set[int]()
    for _ in range(80):
        await trio.sleep(0.1)
        due_at |= {int(service.bench.job(job_id)["due_at"]) for job_id in ids}
    assert len(due_at) >= 4
    assert all(2000 <= after - before <= 2050 for before, after in pairwise(sorted(due_at)))
    assert service.bench.places() == {"delayed": sorted(ids)}
    assert {service.bench.job(job_id)["attempts"] for job_id in ids} == {"0"}
    assert service.log.text.count("no handler") == 1


async def test_a_delayed_job_is_run_when_it_is_due(autojump_clock: MockClock, service: Service) -> None:
    await service.run()
    job_id = await service.submit(delay=1.23)
    await trio.sleep(1.229)
    assert service.bench.job(job_id)["status"] == "pending"
    await trio.sleep(0.02)
    assert service.bench.job(job_id)["status"] == "completed"


async def test_an_attempt_whose_job_has_another_token_is_cancelled_and_reports_nothing(
    autojump_clock: MockClock, service: Service
) -> None:
    async def slow() -> None:
        try:
            await trio.sleep(20)
        finally:
            raise Unrecoverable("a bad clean-up")

    pool = await service.run()
    job_id = await service.submit(slow)
    await trio.sleep(1)
    service.bench.client.hset(f"{PREFIX}job:{job_id}", "token", "another:1")
    await trio.sleep(1.1)
    job = service.bench.job(job_id)
    assert (job["status"], job["token"], "error" in job, pool.free) == ("processing", "another:1", False, 1)
    assert "its lease was lost" in service.log.text
    assert "refused" not in service.log.text


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "report refused: it comes too late"), (3, "its lease was lost")]
)
async def test_an_attempt_that_lost_its_lease_and_its_successor_on_this_instance_are_told_apart(
    autojump_clock: MockClock, service: Service, seconds: float, said: str
) -> None:
    async def twice() -> int:
        if jobqueue.job().attempt == 2:
            await trio.sleep(8)
            return 2
        with trio.CancelScope(shield=True):  # as a thread, which cannot be interrupted
            await may_end.wait()
        return 1

    may_end = trio.Event()
    service.log.set_level(logging.INFO)
    pool = await service.run(workers=2)
    job_id = await service.submit(twice)
    await trio.sleep(3.2)
    service.bench.client.zadd(PREFIX + "leases", {job_id: 0})  # as if it had not been renewed
    await pool.store.sweep()
    pool.ring()
    await wait_all_tasks_blocked()
    assert service.bench.job(job_id)["attempts"] == "2"
    await trio.sleep(seconds)  # in which it is renewed, or not
    may_end.set()
    await trio.sleep(1)
    assert said in service.log.text
    assert end_of(await service.ended(job_id)) == ("completed", "2", "2")


async def test_stopping_lets_what_runs_finish_and_claims_nothing_more(
    autojump_clock: MockClock, service: Service
) -> None:
    pool = await service.run(workers=2)
    running = [await service.submit("long", payload='{"seconds": 5}') for _ in range(2)]
    waiting = await service.submit()
    await trio.sleep(1)
    pool.stop(trio.current_time() + 20)
    assert await service.stop() == pytest.approx(4, abs=0.1)
    assert service.bench.places() == {"queue": [waiting], "completed": running}


@pytest.mark.parametrize("workers", [0, 1, 10])
async def test_idle_dispatchers_end_at_once_each_ringing_for_the_other(
    autojump_clock: MockClock, service: Service, workers: int
) -> None:
    await service.run(keeps_house=False, workers=workers)
    with trio.fail_after(30):
        assert await service.stop() == 0


async def succeed() -> str:
    return "fine"


@pytest.mark.parametrize(
    ("outcome", "place", "attempts", "delay"),
    [
        (ValueError("killed by SIGINT"), "queue", "0", 0),
        (SystemExit(1), "queue", "0", 0),
        (Retry(30), "delayed", "0", 30),
        (ExceptionGroup("a", [OSError(), Retry(30)]), "delayed", "0", 30),
        (Unrecoverable("no such user"), "failed", "1", 0),
        (ExceptionGroup("a", [OSError(), Unrecoverable("no such user")]), "failed", "1", 0),
        (succeed, "completed", "1", 0),
        (trio.sleep_forever, "delayed", "1", 0.5),  # it times out: that counts
    ],
)
async def test_what_raises_after_the_stop_is_released_and_not_counted_unless_it_is_unrecoverable(
    autojump_clock: MockClock, service: Service, outcome: Any, place: str, attempts: str, delay: float
) -> None:
    async def stopped() -> Any:
        await service.pool.stopping.wait()
        if isinstance(outcome, BaseException):
            raise outcome
        return await outcome()

    await service.run()
    job_id = await service.submit(stopped, timeout=5, max_retries=1)
    await trio.sleep(1)
    await service.stop()
    job, now = service.bench.job(job_id), service.bench.now + trio.current_time()
    assert (service.bench.places(), job["attempts"]) == ({place: [job_id]}, attempts)
    assert delay / 2 - 0.02 <= int(job.get("due_at", now * 1000)) / 1000 - now <= delay + 0.02
    assert delay < 30 or int(job["due_at"]) / 1000 - now > 29.9


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────

GOOD: dict[str, Any] = {"job_type": "math", "payload": {"a": "5", "b": "3"}}
EMAIL = {"job_type": "email", "payload": {"to": "user@example.com", "subject": "Hello", "body": "Welcome!"}}


@pytest.mark.parametrize("job", [EMAIL, GOOD, {"job_type": "long", "payload": {}}])
async def test_a_job_is_accepted_with_its_id_and_its_address(service: Service, job: dict[str, Any]) -> None:
    status, answer = await service.call("POST", "/job", job, Content_Type="application/json; charset=utf-8")
    assert (status, list(answer)) == (202, ["id"])
    assert service.headers["Location"] == f"job/{uuid.UUID(answer['id'])}"
    status, shown = await service.call("GET", urljoin("/job", service.headers["Location"]))
    assert status == 200
    assert (shown["id"], shown["status"], shown["payload"]) == (answer["id"], "pending", job["payload"])


async def test_delay_timeout_and_max_retries_are_taken_as_given(service: Service) -> None:
    job_id = await service.post(GOOD | {"delay": 1.5, "timeout": 0.5, "max_retries": 0})
    _, shown = await service.call("GET", f"/job/{job_id}")
    assert (shown["timeout"], shown["max_retries"], shown["due_at"] > shown["created_at"]) == (0.5, 0, True)
    assert service.bench.places() == {"delayed": [job_id]}


async def test_an_array_submits_all_in_order(service: Service) -> None:
    _, answer = await service.call("POST", "/job", [GOOD, EMAIL, GOOD])
    assert service.bench.places() == {"queue": [job["id"] for job in answer]}


FIELDS = "the fields are: job_type, payload, max_retries, timeout, delay"
NAMES = ("payload", "delay", "timeout", "max_retries")
BAD_BODIES: tuple[Any, ...] = (-1, True, "1", None, [], 1e300, 10**30)
MATH = b'{"job_type": "math", "payload": {"a": %b, "b": 1}}'


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        *((bad, "the body is not JSON") for bad in (b"", b"{", MATH % b"NaN", MATH % b"-Infinity")),
        (b'"text"', "the body: expected object | array, got str"),
        (b"null", "the body: expected object | array, got null"),
        (b"\xff", "invalid start byte"),
        (MATH % b'"\xff"', "invalid start byte"),
        (MATH % b"1e999", "payload.a: number out of range"),
        (MATH % (b"9" * 10_000), "payload.a: integer value out of range"),
        (MATH % rb'"\ud800"', "not JSON"),
        (b'{"job_type": "math", "payload": {}, "delay": 1e999}', "delay: number out of range"),
        (b"[" * 100_000, "job 0 of the array: expected object, got array"),
        (MATH % (b'{"a":' * 20_000 + b"1" + b"}" * 20_000), "is nested too deeply"),
        ({"payload": {}}, f"job_type: missing field; {FIELDS}"),
        ({"job_type": "math"}, f"payload: missing field; {FIELDS}"),
        (GOOD | {"priority": 1}, f"priority: unknown field; {FIELDS}"),
        (GOOD | {"job_type": 1}, "job_type: expected str, got int"),
        (GOOD | {"job_type": "nope"}, "job_type must be one of: email, math, long"),
        (GOOD | {"payload": {"a": 1}}, "payload.b: missing field; the fields are: a, b"),
        (GOOD | {"payload": {"a": 1, "b": 2, "c": 3}}, "payload.c: unknown field; the fields are: a, b"),
        (GOOD | {"payload": {"a": 1, "b": {}}}, "payload.b: expected int | str, got object"),
        *((GOOD | {name: bad}, f"{name}: ") for name in NAMES for bad in BAD_BODIES),
        (GOOD | {"max_retries": 1.0}, "max_retries: expected int, got float"),
        (GOOD | {"timeout": 0}, "timeout: expected float >= 0.001"),
        ([], "an array must have at least one job"),
        ([GOOD, GOOD | {"payload": {"a": 1}}], "job 1 of the array: payload.b: "),
        ([GOOD, 7], "job 1 of the array: expected object, got int"),
        ([GOOD, {}], "job 1 of the array: job_type: "),
    ],
)  # fmt: skip
async def test_a_bad_body_is_a_400_that_names_the_field_and_says_what_is_allowed_and_stores_nothing(
    service: Service, body: Any, problem: str
) -> None:
    service.set_up(max_body_bytes=200_000)
    status, answer = await service.call("POST", "/job", body)
    assert (status, list(answer)) == (400, ["error"])
    assert problem in answer["error"]
    assert not problem.startswith("job") or answer["error"].startswith(problem)
    assert service.bench.places() == {}


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ({"Content_Type": "text/plain"}, 415, "the Content-Type must be application/json"),
        ({"Content_Type": "multipart/form-data"}, 415, "the Content-Type must be application/json"),
        ({"Content_Length": "2000000"}, 413, "the body must be at most 1,048,576 bytes"),
        ({"Content_Encoding": "gzip"}, 415, "the body must have no Content-Encoding"),
        *(({"Idempotency_Key": bad}, 400, "Idempotency-Key must be one of up to 255 ASCII characters")
          for bad in ("", '""', '"half', "with space", '"a"b"', "x" * 256, "ä", "a, b")),
    ],
)  # fmt: skip
async def test_a_bad_header_of_a_post_is_named_and_nothing_stored(
    service: Service, headers: dict[str, str], status: int, problem: str
) -> None:
    got, answer = await service.call("POST", "/job", GOOD, **headers)
    assert (got, answer["error"][: len(problem)]) == (status, problem)
    assert service.bench.places() == {}


@pytest.mark.parametrize(
    ("method", "path", "status", "problem"),
    [
        *(("GET", path, 404, "there is nothing at /") for path in ("/job/", "/static/x", "/job/..%2f..")),
        ("POST", "/nowhere", 404, "there is nothing at /nowhere; try POST /job, GET /job/<id> or GET /jobs"),
        *((method, f"/job/{bad}", 404, "there is no job '")
          for method in ("GET", "DELETE") for bad in ("x", "%F0%9F%92%A9", "%ed%a0%80", uuid.UUID(int=0))),
        *((method, "/job", 405, "POST") for method in ("GET", "PUT")),
        *((method, "/jobs", 405, "GET") for method in ("POST", "DELETE")),
        ("PATCH", "/job/x", 405, "PATCH is not possible here, only: "),
        *(("GET", f"/jobs?limit={bad}", 400, "limit")
          for bad in (0, 1001, "0" * 5000 + "1", -1, "x", "", "%D9%A1")),
        *(("GET", f"/job/x?wait={bad}", 400, "wait")
          for bad in ("", -1, 31, "30.1", "x", "nan", "%D9%A3")),
        *(("GET", f"/jobs?status={bad}", 400, "pending|processing|completed|failed")
          for bad in ("done", "")),
        *(("GET", f"/jobs?cursor={bad}", 400, "cursor") for bad in ("x", -1)),
        ("GET", "/jobs?state=failed", 400, "came twice; they are: status, limit, cursor"),
        ("GET", "/jobs?limit=1&limit=2", 400, "'limit' is no parameter here, or came twice"),
        ("DELETE", "/job/x?now=1", 400, "'now'"),
        ("POST", "/job?wait=5", 400, "'wait' is no parameter"),
    ],
)  # fmt: skip
async def test_a_bad_address_method_or_query_is_refused_in_json_that_says_what_is_possible(
    service: Service, method: str, path: str, status: int, problem: str
) -> None:
    got, answer = await service.call(method, path)
    assert (got, list(answer)) == (status, ["error"])
    assert problem in answer["error"]
    assert (status == 405) == ("Allow" in service.headers)


@pytest.mark.parametrize("count", [0, 1, 200, 201, 400])
async def test_all_jobs_are_listed_newest_first(service: Service, count: int) -> None:
    _, ids = await service.call("POST", "/job", [GOOD] * count) if count else (0, [])
    status, jobs = await service.call("GET", "/jobs")
    assert (status, [job["id"] for job in jobs]) == (200, [job["id"] for job in ids][::-1])


@pytest.mark.parametrize("query", ["", "status=pending&", "status=failed&"])
async def test_links_lead_through_all_pages_beside_the_counts(service: Service, query: str) -> None:
    _, answer = await service.call("POST", "/job", [GOOD] * 9)
    ids = [job["id"] for job in answer][::-1]
    for job_id in ids[7:]:
        await service.call("DELETE", f"/job/{job_id}")
    path, seen = f"/jobs?{query}limit=3", list[str]()
    while path:
        _, jobs = await service.call("GET", path)
        assert len(jobs) <= 3
        assert service.headers["Job-Counts"] == "pending=7, processing=0, completed=0, failed=2"
        seen += [job["id"] for job in jobs]
        found = re.fullmatch('<(.+)>; rel="next"', service.headers.get("Link", ""))
        path = found[1] and urljoin(path, found[1]) if found else ""
    assert seen == {"": ids, "status=pending&": ids[:7], "status=failed&": ids[7:]}[query]


async def test_a_list_is_streamed_a_part_at_a_time_however_long_it_takes(
    autojump_clock: MockClock, service: Service
) -> None:
    async def slow(*arguments: Any) -> jobqueue.Page:
        await trio.sleep(40)
        parts.append(await page(*arguments))
        return parts[-1]

    page, parts = service.bench.store.page, list[jobqueue.Page]()
    service.patch.setattr(service.bench.store, "page", slow)
    _, ids = await service.call("POST", "/job", [GOOD] * 401)
    for each in ids[1:-1]:  # so that two parts have one job each, and one has none
        service.bench.client.hset(f"{PREFIX}job:{each['id']}", "status", "failed")  # as if cut off half-way
    _, jobs = await service.call("GET", "/jobs?status=pending")
    assert [job["id"] for job in jobs] == [ids[-1]["id"], ids[0]["id"]]
    assert ([len(part.jobs) for part in parts], trio.current_time()) == ([1, 0, 1], 120)


async def test_the_age_of_the_oldest_job_in_the_queue_stands_beside_the_counts(
    autojump_clock: MockClock, service: Service
) -> None:
    await service.call("GET", "/jobs?limit=1")
    assert "Job-Oldest-Seconds" not in service.headers
    await service.post(GOOD)
    await trio.sleep(1.5)
    await service.call("GET", "/jobs?limit=1")
    assert service.headers["Job-Oldest-Seconds"] == "1.500"


async def test_redis_away_or_refusing_is_503_with_the_reason_and_retry_after(service: Service) -> None:
    for service.bench.away, service.bench.refuses in [(True, ""), (False, "OOM no memory")]:
        reason = "away" if service.bench.away else "OOM no memory"
        for path in ("/jobs", "/jobs?limit=1", "/job/x", "/job/x?wait=1", "DELETE /job/x", "POST /job", "/"):
            method = path.partition(" /")[0] if " " in path else "GET"
            answer = await service.call(method, path.split()[-1], GOOD if method == "POST" else None)
            assert answer == (503, {"error": f"Redis cannot serve this now: {reason}"})
            assert service.headers["Retry-After"] == "1"


async def test_a_bug_is_500_in_json_and_a_traceback_in_the_log(service: Service) -> None:
    def broken(body: bytes, settings: Settings) -> Any:
        raise ZeroDivisionError("secret detail")

    service.patch.setattr(jobqueue, "parse_jobs", broken)
    status, answer = await service.call("POST", "/job", GOOD)
    assert (status, list(answer), "secret" in str(answer)) == (500, ["error"], False)
    assert "ZeroDivisionError: secret detail" in service.log.text
    assert "Traceback" in service.log.text


@pytest.mark.parametrize("key", ["a-key", '"a-key"', '"with space"', r'"with \" and \\"'])
@pytest.mark.parametrize("body", [GOOD, [GOOD, GOOD]])
async def test_the_same_body_with_the_same_key_is_submitted_once_for_a_day(
    service: Service, key: str, body: Any
) -> None:
    answers, raw = list[Any](), json.dumps(body).encode()

    async def submit(content: bytes, key: str) -> None:
        answers.append(await service.call("POST", "/job", content, Idempotency_Key=key))

    async with trio.open_nursery() as both:  # at the same instant
        both.start_soon(submit, raw, key)
        both.start_soon(submit, raw, key)
    assert answers[0] == answers[1]
    assert len(service.bench.places()["queue"]) == (2 if body is not GOOD else 1)
    [kept] = service.bench.client.keys(PREFIX + "idempotency:*")
    assert 86_390 < service.bench.client.ttl(kept) <= 86_400
    await submit(raw + b" ", key)  # the fingerprint is the raw body
    assert answers[2] == (422, {"error": "this Idempotency-Key was used for another request"})
    await submit(raw + b" ", "another")
    assert (answers[3][0], answers[3] == answers[0]) == (202, False)


@pytest.mark.parametrize(
    ("ends", "at", "status"),
    [("here", 3.25, "completed"), ("elsewhere", 4, "completed"), ("delete", 2.2, "failed"),
     ("stop", 2.2, "pending"), ("nothing", 7.5, "pending")],
)  # fmt: skip
async def test_a_wait_ends_when_the_job_does_or_the_time_is_up_and_looks_but_twice_a_second(
    autojump_clock: MockClock, service: Service, ends: str, at: float, status: str
) -> None:
    async def look(job_id: str) -> str | None:
        looks.append(trio.current_time())
        return await see(job_id)

    async def wait(seconds: float) -> None:
        _, job = await service.call("GET", f"/job/{job_id}?wait={seconds}")
        answers.append((job["status"], trio.current_time()))

    see, looks, answers = service.bench.store.status, list[float](), list[tuple[str, float]]()
    service.patch.setattr(service.bench.store, "status", look)
    runs = ends in ("here", "elsewhere")
    if runs:  # with a failed attempt first, whose report wakes nobody
        await (service if ends == "here" else service.beside()).run()

    async def first_fails() -> None:
        await trio.sleep(1)
        if jobqueue.job().attempt == 1:
            raise Retry(1.25)

    service.handler("fails")(first_fails)
    job_id = await service.post({"job_type": "fails", "payload": {}, "delay": 0 if runs else 60})
    gone = trio.CancelScope(deadline=1.3)
    async with trio.open_nursery() as waiting:
        waiting.start_soon(wait, 1.1)
        for _ in range(10):
            waiting.start_soon(wait, 7.5)
        with gone:
            await wait(7.5)
        await trio.sleep_until(2.2)
        if ends == "delete":
            await service.call("DELETE", f"/job/{job_id}")
        elif ends == "stop":
            service.pool.stop(trio.current_time() + 20)
    assert (answers[0][0] in FINISHED, answers[0][1]) == (False, 1.1)
    assert {answer[0] for answer in answers[1:]} == {status}
    assert [answer[1] for answer in answers[1:]] == [pytest.approx(at, abs=0.06)] * 10
    assert len(looks) <= 3 + 11 * (2 * at + 2)
    assert (gone.cancelled_caught, len(service.pool.waiters)) == (True, 0)


@pytest.mark.parametrize(("workers", "wakes"), [(0, 1), (1, 0)])
async def test_a_post_asks_other_instances_only_if_nobody_is_free_here(
    service: Service, workers: int, wakes: int
) -> None:
    pool = service.set_up(workers=workers)
    await service.post(GOOD)
    assert service.bench.client.llen(PREFIX + "wake") == wakes
    assert pool.bell.statistics().current_buffer_used == 1  # also for a worker that is free in a moment


@pytest.mark.parametrize("delay", [0, 60])
async def test_delete_ends_a_waiting_job_as_failed_and_deletes_a_finished_one(
    service: Service, delay: float
) -> None:
    address = f"/job/{await service.post(GOOD | {'delay': delay})}"
    assert (await service.call("DELETE", f"{address}?now=1"))[0] == 400
    assert (await service.call("GET", address))[1]["status"] == "pending"
    status, job = await service.call("DELETE", address)
    assert (status, job["status"], job["error"]) == (200, "failed", "cancelled")
    assert await service.call("GET", address) == (200, job)
    assert await service.call("DELETE", address) == (200, job)
    for method in ("GET", "DELETE"):
        assert (await service.call(method, address))[0] == 404
    assert service.bench.places() == {}


async def test_delete_of_a_running_job_ends_it_at_once_and_cancels_its_handler_by_the_next_renewal(
    autojump_clock: MockClock, service: Service
) -> None:
    async def slow() -> None:
        try:
            await trio.sleep_forever()
        finally:
            record.append(trio.current_time())

    record: list[float] = []
    pool = await service.run()
    job_id = await service.submit(slow)
    await trio.sleep(3.3)
    status, job = await service.call("DELETE", f"/job/{job_id}")
    assert (status, job["status"], job["error"], job["attempts"]) == (200, "failed", "cancelled", 1)
    await trio.sleep(2)
    assert record == [pytest.approx(3.8, abs=0.5)]
    assert (await service.call("GET", f"/job/{job_id}"), pool.free) == ((200, job), 1)
    assert "timed out" not in service.log.text


async def test_a_browser_gets_the_page_which_may_load_nothing_and_others_get_json(service: Service) -> None:
    for accept, kind in [("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"), ("", "application/json"),
                         ("*/*", "application/json"), ("application/json", "application/json")]:  # fmt: skip
        response = await service.client.get("/jobs", headers={"Accept": accept})
        assert (accept, response.mimetype) == (accept, kind)
        if kind == "text/html":
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'nonce-")
            assert "unsafe" not in policy
            assert "math" in await response.get_data(as_text=True)
    assert (await service.client.get("/")).headers["Location"] == "jobs"


async def test_without_the_token_all_is_401_but_the_page_and_the_probe(service: Service) -> None:
    service.set_up(api_token="token")
    for given in ("", "Bearer", "Bearer wrong", "Basic token", "Bearer tokens", "Bearer ä"):
        for method, path in [("GET", "/jobs"), ("POST", "/job"), ("GET", "/job/x"), ("DELETE", "/job/x")]:
            status, answer = await service.call(method, path, GOOD, Authorization=given)
            assert (status, answer["error"][:36]) == (401, "send the header Authorization: Beare")
            assert service.headers["WWW-Authenticate"].startswith("Bearer")
    for given in ("Bearer token", "bearer token"):
        assert await service.call("GET", "/jobs", Authorization=given) == (200, [])
    assert (await service.client.get("/jobs", headers={"Accept": "text/html"})).status_code == 200
    assert (await service.client.get("/")).status_code == 302


@pytest.mark.parametrize("listens_at", ["127.0.0.1", "0.0.0.0", "queue.lan"])
async def test_without_a_token_no_name_is_served_that_others_may_lead_here(
    service: Service, listens_at: str
) -> None:
    ours = "localhost:8080", "LOCALHOST", "127.0.0.1", "[::1]:9000", "api:8080"
    evil = "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example"
    wanted = dict.fromkeys(ours, 200) | dict.fromkeys(evil, 403)
    wanted["queue.lan:8080"] = 200 if listens_at == "queue.lan" else 403
    service.set_up(host=listens_at)
    assert {host: (await service.call("GET", "/jobs", Host=host))[0] for host in wanted} == wanted
