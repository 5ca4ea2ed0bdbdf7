"""The specification of jobqueue, in the order of the module: read the names down the page."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
import time
import typing
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import fakeredis
import msgspec
import pytest
import redis
import trio
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from trio.testing import MockClock, wait_all_tasks_blocked
from werkzeug.datastructures import Headers

import jobqueue
from conftest import (
    MODULE,
    PREFIX,
    Bench,
    Program,
    RedisServer,
    eventually,
    free_port,
    memory_transport,
    record_calls,
)
from jobqueue import (
    HANDLERS,
    AutoPipeline,
    Claim,
    NewJob,
    Notifier,
    RedisConnection,
    Report,
    Settings,
    Status,
    Store,
    WorkerPool,
)

Register = Callable[[str], Callable[[Any], Any]]
Start = Callable[..., Program]

# ── Settings ────────────────────────────────────────────────────────────────────────────────────


def test_without_flags_or_variables_the_defaults_hold() -> None:
    assert Settings.read([], {}) == Settings()


def test_a_variable_sets_and_a_flag_beats_it() -> None:
    settings = Settings.read(["--port", "9000"], {"PORT": "9001", "WORKERS": "3", "LEASE_SECONDS": "1.5"})
    assert (settings.port, settings.workers, settings.lease_seconds) == (9000, 3, 1.5)


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.read([], {"REDIS_URL": "", "PORT": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("PORT", value) for value in ("x", "-1", "65536", "1.5")],
        *[("WORKERS", value) for value in ("many", "-1")],
        *[("LEASE_SECONDS", value) for value in ("0", "nan", "inf", "1e9")],
        *[("REDIS_URL", value) for value in ("localhost:6379", "http://localhost", "redis://localhost?x=1")],
        *[
            ("SMTP_URL", value)
            for value in (
                "localhost:25",
                "http://x",
                "smtp://",
                "smtp://x:y",
                "smtp://x/y",
                "smtp://x:99999",
                "smtp://[1:2]",
                "smtp://u:p#@x",
            )
        ],
        *[("SMTP_FROM", value) for value in ("me", "a@b\nBcc: c@d")],
        *[("API_TOKEN", value) for value in ("two words", "schlüssel")],
        ("LOG_LEVEL", "loud"),
        *[("PROCESSES", value) for value in ("2", "0", "-1", "257")],  # without a REDIS_URL
    ],
)
def test_a_bad_setting_is_one_clear_line_and_status_2(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.read([], {name: value})
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert name in line


def test_help_lists_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        Settings.read(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in ("REDIS_URL, default: unset", "PORT, default: 8080", "RETENTION_SECONDS, default: 604800"):
        assert name in text


def test_every_setting_is_in_the_readme_and_in_the_compose_file() -> None:
    folder = Path(jobqueue.__file__).parent
    readme, compose = (folder / "README.md").read_text(), (folder / "docker-compose.yml").read_text()
    names = {each.name.upper() for each in dataclasses.fields(Settings)}
    assert {name for name in names if f"`{name}`" not in readme} == set()
    # The image sets these two.
    assert {name for name in names if not re.search(rf"\b{name}\b", compose)} == {"HOST", "PORT"}


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


def test_backoff_doubles_and_jitter_takes_off_up_to_half() -> None:
    assert [jobqueue.backoff(n, 0.5, jitter=lambda: 0) for n in (1, 2, 3)] == [0.5, 1, 2]
    assert [jobqueue.backoff(n, 0.5, jitter=lambda: 1) for n in (1, 2, 3)] == [0.25, 0.5, 1]


def test_backoff_is_capped() -> None:
    assert jobqueue.backoff(101, 3600, jitter=lambda: 0) == jobqueue.BACKOFF_CAP_SECONDS


def test_a_job_is_shown_with_iso_times_and_null_for_what_is_not_known() -> None:
    stored = {"job_type": "math", "payload": '{"a": 1e400}', "error": 'a "b"', "created_at": "1700000000007"}
    text = jobqueue.job_json("x", stored)
    assert '"payload": {"a": 1e400}' in text  # untouched, whatever a parser would make of it
    shown = json.loads(text)
    assert shown["created_at"] == "2023-11-14T22:13:20.007Z"
    assert (shown["id"], shown["error"], shown["result"], shown["finished_at"]) == ("x", 'a "b"', None, None)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def handler() -> Iterator[Register]:
    """The decorator; what it registers is gone after the test."""
    before = dict(HANDLERS)
    yield jobqueue.handler
    HANDLERS.clear()
    HANDLERS.update(before)


def read(job_type: str, payload: Any) -> dict[str, Any]:
    return HANDLERS[job_type].read(payload if isinstance(payload, str) else json.dumps(payload))


@pytest.mark.parametrize(
    ("job_type", "payload", "problem"),
    [
        ("math", {"a": 1}, "payload.b is missing; they are: a, b"),
        ("math", {"a": 1, "b": 2, "c": 3}, "payload.c is not one of the fields; they are: a, b"),
        ("math", {"a": 1, "b": 1.5}, "payload.b: expected int | str, got float"),
        ("math", {"a": 1, "b": True}, "payload.b: expected int | str, got bool"),
        ("math", {"a": None, "b": 1}, "payload.a: expected int | str, got null"),
        ("math", [1, 2], "payload: expected object, got array"),
        ("email", {"to": "x", "subject": "y", "body": ["z"]}, "payload.body: expected str, got array"),
        ("long", {"seconds": "2"}, "payload.seconds: expected float, got str"),
    ],
)
def test_a_payload_that_does_not_fit_the_signature_is_refused_by_name(
    job_type: str, payload: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        read(job_type, payload)


@pytest.mark.parametrize(
    ("job_type", "payload"),
    [("math", {"a": "5", "b": 3}), ("long", {}), ("long", {"seconds": 1}), ("long", {"seconds": 0.5})],
)
def test_a_payload_that_fits_is_accepted(job_type: str, payload: dict[str, Any]) -> None:
    assert payload.items() <= read(job_type, payload).items()


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: list[float]


class Options(typing.TypedDict):
    deep: bool


MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
# An annotation, a JSON text that fits, what the handler gets, one that does not fit, and what is said of it.
TYPES: list[tuple[Any, str, Any, str, str]] = [
    (str, '"a"', "a", "1", "payload.ns: expected str, got int"),
    (int, "9" * 40, int("9" * 40), "1.0", "payload.ns: expected int, got float"),
    (float, "1", 1.0, '"1"', "payload.ns: expected float, got str"),
    (bool, "true", True, "1", "payload.ns: expected bool, got int"),
    (list[int], "[1]", [1], '["x"]', "payload.ns[0]: expected int, got str"),
    (list, '[1, "a"]', [1, "a"], '"notalist"', "payload.ns: expected array, got str"),
    (dict[str, int], '{"a": 1}', {"a": 1}, '{"a": "b"}', "payload.ns[...]: expected int, got str"),
    (tuple[int, str], '[1, "a"]', (1, "a"), "[1]", "payload.ns: expected array of length 2"),
    (set[int], "[1, 1]", {1}, "1", "payload.ns: expected array, got int"),
    (int | None, "null", None, '"a"', "payload.ns: expected int | null, got str"),
    (typing.Literal["a", "b"], '"a"', "a", '"c"', "payload.ns: invalid enum value 'c'; it must be one of: 'a', 'b'"),  # noqa: E501
    (Color, '"red"', Color.RED, '"x"', "payload.ns: invalid enum value 'x'; it must be one of: 'blue', 'red'"),  # noqa: E501
    (list[Color], '["red"]', [Color.RED], '["x"]', "payload.ns[0]: invalid enum value 'x'; it must be one of: 'blue', 'red'"),  # noqa: E501
    (Point, '{"x": 1, "y": [2]}', Point(1, [2.0]), '{"x": 1}', "payload.ns.y is missing"),
    (Options, '{"deep": true}', {"deep": True}, '{"deep": 1}', "payload.ns.deep: expected bool, got int"),
    (datetime, '"2026-01-02T03:04:05Z"', MOMENT, '"2026"', "payload.ns: invalid RFC3339 encoded datetime"),
    (date, '"2026-01-02"', date(2026, 1, 2), '"2026-13-02"', "payload.ns: invalid RFC3339 encoded date"),
    (timedelta, '"PT5S"', timedelta(seconds=5), '"x"', "payload.ns: invalid ISO8601 duration"),
    (uuid.UUID, f'"{uuid.UUID(int=7)}"', uuid.UUID(int=7), '"x"', "payload.ns: invalid UUID"),
    (Decimal, '"1.50"', Decimal("1.50"), '"x"', "payload.ns: invalid decimal string"),
    (bytes, '"eA=="', b"x", '"#"', "payload.ns: invalid base64 encoded string"),
    (typing.Annotated[int, msgspec.Meta(ge=1, le=9)], "9", 9, "10", "payload.ns: expected int <= 9"),
    (typing.Annotated[str, msgspec.Meta(pattern="^a")], '"ab"', "ab", '"b"', "payload.ns: expected str matching regex '^a'"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize("row", TYPES, ids=lambda row: str(row[0]))
def test_a_handler_gets_what_its_signature_says_and_nothing_else(handler: Register, row: Any) -> None:
    annotation, good, value, bad, problem = row

    def take(ns: Any) -> Any:
        return ns

    take.__annotations__["ns"] = annotation
    handler("take")(take)
    assert read("take", f'{{"ns": {good}}}') == {"ns": value}
    assert type(read("take", f'{{"ns": {good}}}')["ns"]) is type(value)
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        read("take", f'{{"ns": {bad}}}')
    shown = json.loads(jobqueue.to_json(value))
    if annotation is not set[int]:
        assert read("take", f'{{"ns": {json.dumps(shown)}}}') == {"ns": value}  # as a result it is JSON, too


class Meters(float):
    """As numpy's float64, another float."""


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (None, None),
        ("null", "null"),
        ([None, {"a": None}], [None, {"a": None}]),
        (Meters(1.5), 1.5),
        ({None: 1, True: 2, 3: Meters(4)}, {"null": 1, "true": 2, "3": 4.0}),
        ((1, {2}), [1, [2]]),
        (10**30, 10**30),
        ([1e300, 1e-7, -0.0], [1e300, 1e-7, -0.0]),
        ('\0\x1f\u2028é😀"\\/', '\0\x1f\u2028é😀"\\/'),
        ([date(2026, 1, 2), None, Color.RED], ["2026-01-02", None, "red"]),
        ({date(2026, 1, 2): 1, Color.RED: None}, {"2026-01-02": 1, "red": None}),
    ],
    ids=repr,
)
def test_a_result_is_json_also_of_what_json_does_not_know(result: Any, shown: Any) -> None:
    text = jobqueue.to_json(result)
    assert json.loads(text) == shown
    assert ", " not in text  # whichever of the two encoders made it


@dataclasses.dataclass
class Picky:
    size: int

    def __post_init__(self) -> None:
        raise LookupError("no such size")


def test_a_type_whose_own_code_raises_is_a_clear_error(handler: Register) -> None:
    @handler("pick")
    def pick(of: Picky) -> None: ...

    with pytest.raises(ValueError, match=r"^payload: LookupError: no such size$"):
        read("pick", {"of": {"size": 1}})


def test_a_parameter_without_annotation_takes_anything_and_defaults_are_real(handler: Register) -> None:
    @handler("mixed")
    def mixed(anything, color: Color = Color.RED, items: list[int] = [1]) -> None: ...  # type: ignore[no-untyped-def] # noqa: B006

    assert read("mixed", {"anything": {"a": [1]}}) == {
        "anything": {"a": [1]},
        "color": Color.RED,
        "items": [1],
    }
    assert HANDLERS["mixed"].schema["properties"]["color"]["default"] == "red"
    read("mixed", {"anything": 1})["items"].append(2)
    assert read("mixed", {"anything": 1})["items"] == [1]


@pytest.mark.parametrize("annotation", [complex, Path, object, Callable[[], int], trio.Event])
def test_an_annotation_that_no_json_can_fill_is_an_error_at_once(handler: Register, annotation: Any) -> None:
    def take(fine: int, odd: Any) -> None: ...

    take.__annotations__["odd"] = annotation
    with pytest.raises(TypeError, match="no JSON can fill 'odd' of the handler of 'take'"):
        handler("take")(take)


async def test_math_adds_numbers_and_strings() -> None:
    assert await HANDLERS["math"]({"a": "5", "b": "3"}) == 8
    assert await HANDLERS["math"]({"a": 10**30, "b": -1}) == 10**30 - 1


async def test_email_takes_one_second_and_long_takes_two(autojump_clock: MockClock) -> None:
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("email", {"to": "a@example.com", "subject": "s", "body": "b"}, 1),
        ("long", {}, 2),
        ("long", {"seconds": 7}, 7),
    ]
    for job_type, payload, seconds in cases:
        begun = trio.current_time()
        await HANDLERS[job_type](payload)
        assert trio.current_time() - begun == seconds


async def test_a_def_handler_runs_in_a_thread(handler: Register) -> None:
    @handler("where")
    def where() -> int:
        return threading.get_ident()

    assert await HANDLERS["where"]({}) != threading.get_ident()


def test_a_handler_must_have_named_parameters_only(handler: Register) -> None:
    with pytest.raises(TypeError, match="named parameters"):
        handler("odd")(lambda *args: None)
    with pytest.raises(TypeError, match="named parameters"):
        handler("odd")(lambda **options: None)


async def test_a_cancelled_def_handler_goes_on_until_its_thread_ends(handler: Register) -> None:
    go_on = threading.Event()

    @handler("stuck")
    def stuck() -> str:
        go_on.wait()
        return "done"

    with trio.move_on_after(0.01) as scope:
        threading.Timer(0.1, go_on.set).start()
        assert await HANDLERS["stuck"]({}) == "done"
    assert scope.cancel_called


async def test_a_def_handler_may_ask_whether_it_is_cancelled(handler: Register) -> None:
    @handler("polite")
    def polite() -> None:
        while True:
            trio.from_thread.check_cancelled()

    with trio.move_on_after(0.01) as scope:
        await HANDLERS["polite"]({})
    assert scope.cancelled_caught


# ── AutoPipeline ────────────────────────────────────────────────────────────────────────────────


async def test_commands_of_all_tasks_share_a_round_trip(nursery: trio.Nursery) -> None:
    batches: list[Any] = []
    pipeline = AutoPipeline(record_calls(batches))
    nursery.start_soon(pipeline.run)
    async with trio.open_nursery() as callers:
        for n in range(50):
            callers.start_soon(pipeline.call, "PING", n)
    assert len(batches) <= 2
    assert sorted(command for batch in batches for command in batch) == [("PING", n) for n in range(50)]


async def test_every_caller_gets_the_replies_to_his_own_commands(nursery: trio.Nursery) -> None:
    pipeline = AutoPipeline(record_calls([]), record_calls([]))
    nursery.start_soon(pipeline.run)

    async def caller(n: int) -> None:
        assert await pipeline.call("ECHO", n) == ("ECHO", n)

    async with trio.open_nursery() as callers:
        for n in range(30):
            callers.start_soon(caller, n)


async def test_a_command_handed_over_is_awaited_even_when_its_caller_is_cancelled(
    nursery: trio.Nursery,
) -> None:
    record: list[str] = []
    may_reply = trio.Event()

    async def slow(commands: Any) -> list[Any]:
        await may_reply.wait()
        return ["done"]

    async def caller() -> None:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel, scope)
            record.append(await pipeline.call("SET", "a", 1))

    async def cancel(scope: trio.CancelScope) -> None:
        scope.cancel()
        await wait_all_tasks_blocked()
        record.append("cancelled")
        may_reply.set()

    pipeline = AutoPipeline(slow)
    nursery.start_soon(pipeline.run)
    await caller()
    assert record == ["cancelled", "done"]


async def test_a_caller_already_cancelled_sends_nothing(nursery: trio.Nursery) -> None:
    batches: list[Any] = []
    pipeline = AutoPipeline(record_calls(batches))
    nursery.start_soon(pipeline.run)
    with trio.CancelScope() as scope:
        scope.cancel()
        await pipeline.call("SET", "a", 1)
    await wait_all_tasks_blocked()
    assert batches == []


async def test_a_lost_connection_goes_to_every_caller_and_the_next_call_tries_again(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def breaks_once(commands: Any) -> list[Any]:
        nonlocal tries
        tries += 1
        await wait_all_tasks_blocked()
        if tries == 1:
            raise redis.ConnectionError("gone")
        return list(commands)

    pipeline = AutoPipeline(breaks_once)
    nursery.start_soon(pipeline.run)
    failed: list[int] = []

    async def caller(n: int) -> None:
        try:
            await pipeline.call("PING", n)
        except redis.ConnectionError:
            failed.append(n)

    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as callers:
            for n in range(3):
                callers.start_soon(caller, n)
        assert sorted(failed) == [0, 1, 2]
        assert await pipeline.call("PING") == ("PING",)
    assert [r.message for r in caplog.records] == ["Redis is away: gone; waiting for it", "Redis is back"]


async def test_calls_that_come_while_a_connection_is_being_lost_do_not_wait_for_another_time_out(
    nursery: trio.Nursery,
) -> None:
    may_fail, tries = trio.Event(), list[Any]()

    async def breaks(commands: Any) -> list[Any]:
        tries.append(commands)
        await may_fail.wait()
        raise redis.TimeoutError("no reply")

    pipeline = AutoPipeline(breaks)
    nursery.start_soon(pipeline.run)

    async def caller(n: int) -> None:
        with pytest.raises(redis.TimeoutError):
            await pipeline.call("PING", n)

    async with trio.open_nursery() as callers:
        callers.start_soon(caller, 1)
        await wait_all_tasks_blocked()
        callers.start_soon(caller, 2)
        await wait_all_tasks_blocked()
        may_fail.set()
    assert tries == [[("PING", 1)]]


async def test_a_refusal_goes_to_its_own_caller_alone(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    pipeline = AutoPipeline(RedisConnection(redis_server.url).exchange)
    nursery.start_soon(pipeline.run)
    record: list[Any] = []

    async def caller(*command: str) -> None:
        try:
            record.append(await pipeline.call(*command))
        except redis.ResponseError as error:
            record.append(str(error).partition(" ")[0])

    async with trio.open_nursery() as callers:
        for command in [("PING",), ("NONSENSE",), ("PING",)]:
            callers.start_soon(caller, *command)
    assert sorted(record) == ["ERR", "PONG", "PONG"]


async def test_a_reply_larger_than_any_buffer_arrives_whole(redis_server: RedisServer) -> None:
    connection = RedisConnection(redis_server.url)
    text = "ä" * 3_000_000
    assert await connection.exchange([("SET", "a", text), ("GET", "a")]) == ["OK", text]


async def test_redis_frozen_is_a_timeout_and_then_a_new_connection(
    own_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    server = own_redis()
    connection = RedisConnection(server.url)
    assert await connection.exchange([("SET", "a", 1)]) == ["OK"]
    monkeypatch.setattr(jobqueue, "REPLY_SECONDS", 0.05)
    nursery.start_soon(connection.watch)
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(redis.TimeoutError):
        await connection.exchange([("GET", "a")])
    monkeypatch.undo()
    server.send_signal(signal.SIGCONT)
    assert await connection.exchange([("GET", "a")]) == ["1"]
    nursery.cancel_scope.cancel()


async def test_a_call_after_a_restart_of_redis_succeeds(
    own_redis: Callable[..., RedisServer], nursery: trio.Nursery
) -> None:
    server = own_redis()
    pipeline = AutoPipeline(*(RedisConnection(server.url).exchange for _ in range(2)))
    nursery.start_soon(pipeline.run)
    store = Store(pipeline)
    async with trio.open_nursery() as both:  # so that both connections are open
        both.start_soon(store.ping)
        both.start_soon(store.ping)
    server.kill()
    server.start()
    await store.ping()


async def test_a_host_that_cannot_be_is_a_connection_error() -> None:
    with pytest.raises(redis.ConnectionError):
        await RedisConnection("redis://redis..example").exchange([("PING",)])


async def test_a_command_whose_connection_was_lost_is_sent_to_the_new_redis_that_knows_no_script(
    nursery: trio.Nursery,
) -> None:
    async def transport(commands: Sequence[jobqueue.Command]) -> list[Any]:
        [command] = commands
        record.append(str(command[0]))
        if len(record) == 1:
            raise redis.ConnectionError("Redis closed the connection")
        if "SCRIPT" not in record:
            return [redis.exceptions.NoScriptError("NOSCRIPT")]
        return [[]]

    record = list[str]()
    pipeline = AutoPipeline(transport)
    nursery.start_soon(pipeline.run)
    assert await Store(pipeline).finished(["x"]) == []
    assert record == ["EVALSHA", "EVALSHA", *["SCRIPT"] * len(jobqueue.SCRIPTS), "EVALSHA"]
    nursery.cancel_scope.cancel()


async def test_what_one_transport_leaves_the_other_takes(nursery: trio.Nursery) -> None:
    async def transport(commands: Any) -> list[Any]:
        batches.append(len(commands))
        if len(batches) == 1:
            await trio.sleep_forever()
        return list(commands)

    async def caller() -> None:
        with suppress(redis.ConnectionError):  # at the end, for those who still wait
            await pipeline.call("PING")
            record.append("answered")

    record, batches = list[str](), list[int]()
    pipeline = AutoPipeline(transport, transport)
    nursery.start_soon(pipeline.run)
    await wait_all_tasks_blocked()
    for _ in range(4):
        nursery.start_soon(caller)
    await wait_all_tasks_blocked()
    assert (len(record), batches) == (2, [2, 2])
    nursery.cancel_scope.cancel()


async def test_a_bug_in_a_transport_is_seen_and_leaves_nobody_waiting() -> None:
    async def broken(_commands: Any) -> list[Any]:
        await wait_all_tasks_blocked()
        raise KeyError("bug")

    async def caller() -> None:
        with pytest.raises(redis.ConnectionError):
            await pipeline.call("PING")
        record.append("told")

    pipeline, record = AutoPipeline(broken), list[str]()
    with pytest.RaisesGroup(KeyError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pipeline.run)
            for _ in range(3):
                nursery.start_soon(caller)
    assert record == ["told"] * 3


async def test_a_wrong_password_is_a_connection_error_that_says_so(
    own_redis: Callable[..., RedisServer],
) -> None:
    server = own_redis()
    server.client.config_set("requirepass", "secret")
    right = RedisConnection(f"redis://:secret@127.0.0.1:{server.port}/1")
    assert await right.exchange([("PING",)]) == ["PONG"]
    wrong = RedisConnection(f"redis://:guess@127.0.0.1:{server.port}")
    with pytest.raises(redis.ConnectionError, match="invalid username-password"):
        await wrong.exchange([("PING",)])
    server.client.connection_pool.connection_kwargs["password"] = "secret"


async def test_redis_is_spoken_to_over_tls_if_its_certificate_is_trusted(
    own_redis: Callable[..., RedisServer],
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "redis.pem")
    port = free_port()
    options = f"--tls-port {port} --tls-auth-clients no --tls-ca-cert-file {tmp_path / 'ca.pem'}"
    own_redis(
        *options.split(), *f"--tls-cert-file {tmp_path}/redis.pem --tls-key-file {tmp_path}/redis.pem".split()
    )
    url = f"rediss://127.0.0.1:{port}?ssl_ca_certs="
    connection = RedisConnection(url + str(tmp_path / "ca.pem"))
    text = "ä" * 3_000_000
    opened = set()
    for _ in range(3):
        replies = await connection.exchange([("SET", "a", text), ("GET", "a"), ("PING",)])
        assert replies == ["OK", text, "PONG"]
        opened.add(connection._connection)
    assert len(opened) == 1
    monkeypatch.delenv("SSL_CERT_FILE")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(redis.ConnectionError, match="certificate"):
        await RedisConnection(url + str(tmp_path / "other.pem")).exchange([("PING",)])


# ── Store: each test on fakeredis and on a real Redis ───────────────────────────────────────────

LEASE = 15.0


def new_job(
    delay: float = 0, max_retries: int = 3, payload: str = '{"a": 1, "b": 2}', timeout: float = 60.0
) -> NewJob:
    return NewJob(str(uuid.uuid4()), "math", payload, max_retries, timeout, delay)


async def submitted(bench: Bench, count: int = 1, **options: Any) -> list[str]:
    jobs = [new_job(**options) for _ in range(count)]
    await bench.store.submit(jobs)
    return [job.id for job in jobs]


async def claim(bench: Bench, token: str) -> Claim:
    _, claimed = await bench.store.report_and_claim(None, token, LEASE)
    assert claimed
    return claimed


async def report(bench: Bench, claimed: Claim, transition: str, text: str = "", delay: float = 0) -> bool:
    accepted, _ = await bench.store.report_and_claim(Report(claimed, transition, text, "", delay), "", LEASE)
    return accepted


REPORTS = [("complete", "3"), ("fail", "E"), ("retry", "E", 0.5), ("release",)]


async def test_a_submitted_job_is_pending_in_the_queue_and_in_the_history(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    assert bench.places() == {"queue": [job_id]}
    shown = await shown_job(bench, job_id)
    assert (shown["status"], shown["attempts"], shown["payload"]) == ("pending", 0, {"a": 1, "b": 2})
    page = await bench.store.page(None, "", 10)
    assert (page.cursor, [json.loads(job) for job in page.jobs]) == ("", [shown])


async def test_jobs_are_claimed_first_in_first_out(bench: Bench) -> None:
    ids = await submitted(bench, 3)
    ids += await submitted(bench, 2)
    assert [(await claim(bench, f"i:{n}")).id for n in range(5)] == ids


async def test_a_submission_sent_twice_changes_nothing(bench: Bench) -> None:
    job = new_job()
    await bench.store.submit([job])
    claimed = await claim(bench, "i:1")
    before = bench.job(job.id)
    await bench.store.submit([job])
    assert bench.job(job.id) == before
    assert bench.places() == {"processing": [claimed.id]}
    assert bench.client.zcard("{jobqueue}:history") == 1


async def test_a_claim_moves_the_job_to_processing_and_counts_an_attempt(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    claimed = await claim(bench, "i:1")
    assert claimed == Claim("i:1", 0, job_id, "math", '{"a": 1, "b": 2}', 1, 3, 60.0)
    assert bench.places() == {"processing": [job_id]}
    assert bench.client.zscore("{jobqueue}:processing", job_id) == (bench.now + LEASE) * 1000
    assert bench.job(job_id)["status"] == "processing"


async def test_an_empty_queue_gives_no_claim(bench: Bench) -> None:
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)


async def test_a_queued_id_whose_job_was_deleted_is_passed_over(bench: Bench) -> None:
    gone, job_id = await submitted(bench, 2)
    bench.client.delete(f"{{jobqueue}}:job:{gone}")
    assert (await claim(bench, "i:1")).id == job_id


async def test_a_completed_job_keeps_its_result(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    assert await report(bench, await claim(bench, "i:1"), "complete", "3")
    assert bench.places() == {"completed": [job_id]}
    shown = await shown_job(bench, job_id)
    assert (shown["status"], shown["result"], shown["error"]) == ("completed", 3, None)
    assert shown["finished_at"] is not None


async def test_a_failed_job_keeps_its_error(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    assert await report(bench, await claim(bench, "i:1"), "fail", "E: bad")
    assert bench.places() == {"failed": [job_id]}
    shown = await shown_job(bench, job_id)
    assert (shown["status"], shown["result"], shown["error"]) == ("failed", None, "E: bad")


async def test_a_retry_waits_in_delayed_until_it_is_due(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    assert await report(bench, await claim(bench, "i:1"), "retry", "E", 0.5)
    assert bench.places() == {"delayed": [job_id]}
    assert bench.job(job_id)["status"] == "pending"
    assert (await bench.store.sweep(0)).wait == 0.5
    bench.move(0.5)
    assert (await bench.store.sweep(0)).ready == 1
    assert (await claim(bench, "i:2")).attempts == 2


async def test_the_error_of_an_earlier_attempt_is_gone_when_the_job_completes(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    await report(bench, await claim(bench, "i:1"), "retry", "E", 0)
    assert bench.job(job_id)["error"] == "E"
    await bench.store.sweep(0)
    await report(bench, await claim(bench, "i:2"), "complete", "3")
    assert (await shown_job(bench, job_id))["error"] is None


async def test_a_released_job_goes_to_the_front_and_its_attempt_does_not_count(bench: Bench) -> None:
    first, second = await submitted(bench, 2)
    assert await report(bench, await claim(bench, "i:1"), "release")
    assert bench.places() == {"queue": [first, second]}
    assert (await claim(bench, "i:2")).attempts == 1


@pytest.mark.parametrize("first", REPORTS)
async def test_a_report_sent_twice_changes_nothing_the_second_time(
    bench: Bench, first: tuple[Any, ...]
) -> None:
    [job_id] = await submitted(bench)
    claimed = await claim(bench, "i:1")
    assert await report(bench, claimed, *first)
    places, job = bench.places(), bench.job(job_id)
    bench.move(1)
    # A release takes the token away, since the job may be claimed again at once: it is refused when resent.
    assert await report(bench, claimed, *first) == (first != ("release",))
    assert (bench.places(), bench.job(job_id)) == (places, job)


@pytest.mark.parametrize("late", REPORTS)
async def test_a_report_after_the_lease_was_lost_is_refused(bench: Bench, late: tuple[Any, ...]) -> None:
    [job_id] = await submitted(bench)
    stale = await claim(bench, "i:1")
    bench.move(LEASE)
    await bench.store.sweep(0)
    assert not await report(bench, stale, *late)  # back in the queue
    current = await claim(bench, "j:1")
    before = bench.job(job_id)
    assert not await report(bench, stale, *late)  # run by another
    assert bench.job(job_id) == before
    assert await report(bench, current, "complete", "3")
    assert not await report(bench, stale, *late)  # finished by another
    assert bench.places() == {"completed": [job_id]}


async def test_a_report_after_the_lease_ended_but_before_a_sweep_is_accepted(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    claimed = await claim(bench, "i:1")
    bench.move(LEASE * 10)
    assert await report(bench, claimed, "complete", "3")
    assert bench.places() == {"completed": [job_id]}


async def test_report_and_claim_share_a_round_trip(bench: Bench) -> None:
    first, second = await submitted(bench, 2)
    claimed = await claim(bench, "i:1")
    accepted, following = await bench.store.report_and_claim(Report(claimed, "complete", "3"), "i:2", LEASE)
    assert accepted
    assert following is not None
    assert following.id == second
    assert bench.places() == {"processing": [second], "completed": [first]}


async def test_a_refused_report_still_claims(bench: Bench) -> None:
    first, second = await submitted(bench, 2)
    stale = msgspec.structs.replace(await claim(bench, "i:1"), token="i:99")
    accepted, following = await bench.store.report_and_claim(Report(stale, "complete", "3"), "i:2", LEASE)
    assert not accepted
    assert following is not None
    assert following.id == second
    assert bench.places() == {"processing": sorted([first, second])}


async def test_a_renewed_lease_ends_later(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    claimed = await claim(bench, "i:1")
    bench.move(10)
    assert (await bench.store.renew([(claimed, "")], LEASE))[1:] == ([], [])
    bench.move(10)
    assert (await bench.store.sweep(0)).ended == []
    bench.move(5)
    assert (await bench.store.sweep(0)).ended == [[job_id, "math", "1", "pending"]]


async def test_a_renewal_tells_which_tokens_hold_no_job(bench: Bench) -> None:
    await submitted(bench, 3)
    claims = [await claim(bench, f"i:{n}") for n in range(3)]
    bench.client.hset(f"{{jobqueue}}:job:{claims[1].id}", "token", "j:1")
    await report(bench, claims[2], "complete", "3")
    assert (await bench.store.renew([(claimed, "") for claimed in claims], LEASE))[1:] == (["i:1", "i:2"], [])


async def test_a_claim_sent_again_gets_the_same_job_and_a_new_lease(bench: Bench) -> None:
    first, second = await submitted(bench, 2)
    claimed = await claim(bench, "i:1")
    bench.move(LEASE - 1)
    assert await claim(bench, "i:1") == claimed
    assert bench.client.zscore("{jobqueue}:processing", first) == (bench.now + LEASE) * 1000
    assert bench.places() == {"queue": [second], "processing": [first]}
    await report(bench, claimed, "complete", "3")
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)  # that one is over
    assert (await claim(bench, "i:2")).id == second


async def test_a_claim_that_arrives_late_takes_nothing(bench: Bench) -> None:
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)
    await submitted(bench, 2)
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)
    await claim(bench, "i:2")
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)
    assert len(bench.places()["queue"]) == 1


async def test_a_claim_sent_again_after_its_lease_ended_gets_nothing(bench: Bench) -> None:
    [first] = await submitted(bench)
    await claim(bench, "i:1")
    bench.move(LEASE)
    await bench.store.sweep(0)
    assert await bench.store.report_and_claim(None, "i:1", LEASE) == (True, None)
    assert (await claim(bench, "j:1")).id == first


async def test_an_ended_lease_returns_the_job_to_the_front_of_the_queue(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    await claim(bench, "i:1")
    [waiting] = await submitted(bench)
    bench.move(LEASE - 0.001)
    assert (await bench.store.sweep(0)).ended == []
    bench.move(0.001)
    assert (await bench.store.sweep(0)).ended == [[job_id, "math", "1", "pending"]]
    assert bench.places() == {"queue": [job_id, waiting]}
    assert (await claim(bench, "i:2")).attempts == 2


async def test_a_job_whose_lease_ends_in_every_attempt_fails(bench: Bench) -> None:
    [job_id] = await submitted(bench, max_retries=2)
    for n in range(3):
        assert (await claim(bench, f"i:{n}")).attempts == n + 1
        bench.move(LEASE)
        [(_, _, _, status)] = (await bench.store.sweep(0)).ended
    assert status == Status.FAILED
    assert bench.places() == {"failed": [job_id]}
    assert "worker died" in bench.job(job_id)["error"]


async def test_a_thread_whose_job_was_cancelled_is_not_run_again_when_its_lease_ends(
    bench: Bench, handler: Register
) -> None:
    @handler("math")
    def math(a: int, b: int) -> None: ...

    [job_id] = await submitted(bench)
    await claim(bench, "i:1")
    assert await bench.store.cancel(job_id) == "processing"
    bench.move(LEASE)
    assert (await bench.store.sweep(0)).ended == [[job_id, "math", "1", "failed"]]
    assert bench.places() == {"failed": [job_id]}
    assert (bench.job(job_id)["status"], bench.job(job_id)["error"]) == ("failed", "cancelled")


async def test_a_sweep_that_was_held_up_leaves_leases_alone(bench: Bench) -> None:
    await submitted(bench)
    await claim(bench, "i:1")
    now, _, _ = await bench.store.renew([], LEASE)
    bench.move(LEASE)
    assert (await bench.store.sweep(0, end_leases_by=now + 1000)).ended == []
    assert len((await bench.store.sweep(0, end_leases_by=now + round(1000 * LEASE))).ended) == 1


async def test_a_delayed_job_is_queued_when_it_is_due_and_not_before(bench: Bench) -> None:
    [job_id] = await submitted(bench, delay=10)
    assert bench.places() == {"delayed": [job_id]}
    assert bench.job(job_id)["status"] == "pending"
    bench.move(9)
    assert await bench.store.sweep(0) == (0, 1.0, [])
    bench.move(1)
    assert await bench.store.sweep(0) == (1, math.inf, [])
    assert bench.places() == {"queue": [job_id]}


async def test_finished_jobs_are_deleted_after_the_retention_and_others_never(bench: Bench) -> None:
    done, failed, running, waiting = await submitted(bench, 4)
    await report(bench, await claim(bench, "i:1"), "complete", "3")
    await report(bench, await claim(bench, "i:2"), "fail", "E")
    await claim(bench, "i:3")
    bench.move(99)
    await bench.store.sweep(100, end_leases_by=0)
    assert len(bench.places()) == 4
    bench.move(1)
    await bench.store.sweep(0, end_leases_by=0)
    assert len(bench.places()) == 4
    await bench.store.sweep(100, end_leases_by=0)
    assert bench.places() == {"queue": [waiting], "processing": [running]}
    assert await bench.store.get(done) is None
    assert await bench.store.get(failed) is None
    assert bench.client.zrange("{jobqueue}:history", 0, -1) == [running, waiting]


@pytest.mark.parametrize("status", sorted(jobqueue.FINISHED))
async def test_a_job_of_each_finished_status_is_left_alone_until_it_is_deleted(
    bench: Bench, status: str
) -> None:
    [job_id] = await submitted(bench)
    await claim(bench, "i:1")
    bench.client.delete("{jobqueue}:processing", "{jobqueue}:started")
    bench.client.hset(f"{{jobqueue}}:job:{job_id}", "status", status)
    bench.client.zadd(f"{{jobqueue}}:{status}", {job_id: 1_000_000_000})
    before = bench.places(), bench.job(job_id)
    assert await bench.store.cancel(job_id) == status
    await report(bench, Claim("x:1", 0, job_id), "complete", "3")
    await bench.store.sweep(100, keep=1)
    assert (bench.places(), bench.job(job_id)) == before
    assert await bench.store.finished([job_id]) == [job_id]
    page = await bench.store.page(Status(status), "", 10)
    assert (len(page.jobs), page.counts[Status(status)]) == (1, 1)
    bench.move(101)
    await bench.store.sweep(100)
    assert (bench.places(), bench.job(job_id)) == ({}, {})


async def test_a_sweep_does_bounded_work_and_says_that_there_is_more(bench: Bench) -> None:
    await submitted(bench, 5, delay=1)
    bench.move(1)
    assert (await bench.store.sweep(0, most=2))[:2] == (2, 0)
    assert (await bench.store.sweep(0, most=2))[:2] == (4, 0)
    assert (await bench.store.sweep(0, most=2))[:2] == (5, math.inf)


async def shown_job(bench: Bench, job_id: str) -> dict[str, Any]:
    found = await bench.store.get(job_id)
    assert found
    return dict(json.loads(found[1]))


async def listed(bench: Bench, status: Status | None, limit: int) -> list[list[str]]:
    pages, cursor = [], ""
    while True:
        cursor, jobs, *_ = await bench.store.page(status, cursor, limit)
        pages.append([json.loads(job)["id"] for job in jobs])
        if not cursor:
            return pages


async def test_pages_are_newest_first_and_cover_every_job_once(bench: Bench) -> None:
    ids = await submitted(bench, 7)
    assert await listed(bench, None, 3) == [ids[:3:-1], ids[3:0:-1], ids[0:1]]


async def test_jobs_that_come_while_one_reads_do_not_shift_the_pages(bench: Bench) -> None:
    ids = await submitted(bench, 4)
    cursor, jobs, *_ = await bench.store.page(None, "", 2)
    await submitted(bench, 5)
    _, more, *_ = await bench.store.page(None, cursor, 2)
    assert [json.loads(job)["id"] for job in jobs + more] == ids[::-1]


async def test_pages_by_status_are_the_places_of_that_status(bench: Bench) -> None:
    ids, running = await submitted(bench, 9), list[Claim]()
    for n in range(6):
        claimed = await claim(bench, f"i:{n}")
        running = [*running, claimed][-2:]
        if n < 4:
            await report(bench, claimed, "complete" if n % 2 else "fail", "0")
        bench.move(1)
    await bench.store.renew([(running[0], "")], 2 * LEASE)  # which must not matter
    delayed = await submitted(bench, 2, delay=60)
    assert await listed(bench, Status.FAILED, 1) == [[ids[2]], [ids[0]]]
    assert await listed(bench, Status.COMPLETED, 5) == [[ids[3], ids[1]]]
    assert await listed(bench, Status.PROCESSING, 1) == [[ids[5]], [ids[4]]]
    pending = [job_id for page in await listed(bench, Status.PENDING, 2) for job_id in page]
    assert set(pending[:2]) == set(delayed)
    assert pending[2:] == ids[:5:-1]


# Counts what the calls of a script answer; the jobs themselves are read by `pcall`.
COUNTING = """
local real = redis
local redis = {pcall = real.pcall, call = function(...)
  local reply = real.call(...)
  if type(reply) == 'table' then real.call('INCRBY', KEYS[1] .. 'seen', #reply) end
  return reply
end}
"""


async def test_a_page_of_jobs_of_the_same_moment_reads_no_more_of_them_than_it_has(bench: Bench) -> None:
    ids = sorted(await submitted(bench, 50, delay=60))[::-1]
    assert await listed(bench, Status.PENDING, 7) == [ids[n : n + 7] for n in range(0, 50, 7)]
    bench.store = Store(bench.pipeline, clock=COUNTING + Bench.CLOCK)
    first = await bench.store.page(Status.PENDING, "", 3)
    before = int(bench.client.get(PREFIX + "seen"))
    await bench.store.page(Status.PENDING, first.cursor, 3)
    assert int(bench.client.get(PREFIX + "seen")) - before < 20


async def test_a_page_tells_for_how_long_the_first_in_the_queue_has_been_due(bench: Bench) -> None:
    assert (await bench.store.page(None, "", 1)).oldest is None
    await submitted(bench, 1, delay=60)
    bench.move(10)
    assert (await bench.store.page(None, "", 1)).oldest is None
    await submitted(bench, 2)
    bench.move(2.5)
    assert (await bench.store.page(Status.FAILED, "", 1)).oldest == 2.5
    [older, newer] = [json.loads(job)["id"] for job in (await bench.store.page(None, "", 2)).jobs][::-1]
    bench.client.hset(f"{PREFIX}job:{newer}", "created_at", "-1e300")  # by somebody else
    await bench.store.cancel(older)
    assert (await bench.store.page(None, "", 1)).oldest == bench.now
    await bench.store.cancel(newer)
    assert (await bench.store.page(None, "", 1)).oldest is None
    await submitted(bench, 2)
    for n in range(2):
        await report(bench, await claim(bench, f"i:{n}"), "complete", "0")
    bench.move(50)  # which is 2.5 s after the delay
    await bench.store.sweep(0)
    assert (await bench.store.page(None, "", 1)).oldest == 2.5


async def test_a_page_cuts_long_values_and_never_a_character_or_a_number(bench: Bench) -> None:
    [job_id] = await submitted(bench)
    cut = {"payload": '{"a":"' + "ä" * 200 + '"}', "result": "1" * 200, "error": "x" * 100, "attempts": "0"}
    bench.client.hset(f"{PREFIX}job:{job_id}", mapping=cut)
    [text] = (await bench.store.page(None, "", 1, cut=101)).jobs
    job = json.loads(text)
    assert (job["result"], job["error"], job["attempts"]) == ("1" * 101 + "…", "x" * 100, 0)
    assert re.fullmatch('{"a":"ä{46,47}…', job["payload"])
    assert len((await bench.store.page(None, "", 1)).jobs[0]) > 500


async def test_a_cursor_that_left_its_place_ends_the_list(bench: Bench) -> None:
    ids = await submitted(bench, 4)
    cursor, *_ = await bench.store.page(Status.PENDING, "", 2)
    for n in range(4):
        await claim(bench, f"i:{n}")
    assert cursor.startswith(ids[2])
    assert (await bench.store.page(Status.PENDING, cursor, 2))[:2] == ("", [])


async def test_a_cursor_that_left_its_place_goes_on_behind_it_among_jobs_of_the_same_moment(
    bench: Bench,
) -> None:
    ids = sorted(await submitted(bench, 5))[::-1]
    claims = {claimed.id: claimed for claimed in [await claim(bench, f"i:{n}") for n in range(5)]}
    cursor, *_ = await bench.store.page(Status.PROCESSING, "", 2)
    await report(bench, claims[ids[1]], "complete", "0")
    _, jobs, *_ = await bench.store.page(Status.PROCESSING, cursor, 9)
    assert [json.loads(job)["id"] for job in jobs] == ids[2:]


@pytest.mark.parametrize("more", [3, 700])
async def test_a_list_of_waiting_jobs_goes_on_where_it_was_however_many_came_since(
    bench: Bench, more: int
) -> None:
    ids = await submitted(bench, 5)
    cursor, *_ = await bench.store.page(Status.PENDING, "", 2)
    await submitted(bench, more)
    _, jobs, *_ = await bench.store.page(Status.PENDING, cursor, 9)
    assert [json.loads(job)["id"] for job in jobs] == ids[2::-1]


async def test_cancelled_jobs_stay_in_the_queue_uncounted_and_unlisted_until_a_claim_meets_them(
    bench: Bench,
) -> None:
    ids = await submitted(bench, 4)
    for job_id in ids[:2]:
        assert await bench.store.cancel(job_id) == "pending"
    assert bench.client.llen("{jobqueue}:queue") == 4  # a search would cost more the longer it is
    _, jobs, counts, _ = await bench.store.page(Status.PENDING, "", 9)
    assert [json.loads(job)["id"] for job in jobs] == ids[:1:-1]
    assert counts == {"pending": 2, "processing": 0, "completed": 0, "failed": 2}
    assert (await claim(bench, "i:1")).id == ids[2]
    assert (await bench.store.page(None, "", 9))[2][Status.PENDING] == 1
    assert bench.client.scard("{jobqueue}:withdrawn") == 0


@pytest.mark.parametrize("transition", ["retry", "defer", "release", "fail", "complete"])
async def test_a_thread_whose_job_was_cancelled_is_not_run_again_whatever_it_reports(
    bench: Bench, handler: Register, transition: str
) -> None:
    @handler("math")
    def math(a: int, b: int) -> None: ...

    await submitted(bench)
    claimed = await claim(bench, "i:1")
    assert await bench.store.cancel(claimed.id) == "processing"
    await report(bench, claimed, transition, "3")
    job = bench.job(claimed.id)
    expected = ("completed", None) if transition == "complete" else ("failed", "cancelled")
    assert (job["status"], job.get("error")) == expected


@pytest.mark.parametrize("field", ["attempts", "max_retries"])
async def test_a_number_that_no_job_can_have_is_damage(bench: Bench, field: str) -> None:
    [job_id] = await submitted(bench)
    bench.client.hset(f"{{jobqueue}}:job:{job_id}", field, 5000)
    assert f"its {field} is 500" in (await claim(bench, "i:1")).damage


def test_the_layout_number_stands_for_these_keys_and_statuses() -> None:
    """Older programs may misread others: then raise the number, say so in the CHANGELOG, and mend this."""
    assert jobqueue.LAYOUT == "2"
    assert [*Status] == ["pending", "processing", "completed", "failed"]
    keys = "claim: delayed history idempotency: job: layout processing queue started wake withdrawn"
    assert sorted({*re.findall(r"P \.\. '([a-z:]+)'", jobqueue.LUA)}) == keys.split()


async def test_a_redis_that_lost_its_data_gets_its_layout_again(bench: Bench) -> None:
    bench.client.flushall()
    bench.move(0)
    await bench.store.sweep(0)
    assert bench.client.get(PREFIX + "layout") == jobqueue.LAYOUT
    bench.client.set(PREFIX + "layout", "99")
    await bench.store.sweep(0)
    assert bench.client.get(PREFIX + "layout") == "99"


async def test_the_layout_is_read_from_a_redis_that_has_no_room(
    own_redis: Callable[..., RedisServer], nursery: trio.Nursery
) -> None:
    server = own_redis()
    server.client.set("{jobqueue}:layout", "1")
    server.client.config_set("maxmemory", 1)
    pipeline = AutoPipeline(RedisConnection(server.url).exchange)
    nursery.start_soon(pipeline.run)
    assert await Store(pipeline).layout() == "1"
    nursery.cancel_scope.cancel()


async def test_scripts_survive_a_redis_that_forgot_them(bench: Bench) -> None:
    await submitted(bench)
    bench.client.script_flush()
    await claim(bench, "i:1")


# An error at every call of every script. Redis rolls nothing back, so the order of the calls must see to it.

INJECTION = """
local real, calls, fail_at = redis, 0, tonumber(redis.call('GET', KEYS[1] .. 'fail_at') or 0)
local redis = {pcall = real.pcall, call = function(...)
  calls = calls + 1
  if calls == fail_at then error('injected', 0) end
  return real.call(...)
end}
"""


async def ready_to_claim(bench: Bench) -> Callable[[], Any]:
    await submitted(bench, 2)
    return lambda: bench.store.report_and_claim(None, "i:1", LEASE)


async def ready_to_claim_behind_a_cancelled_one(bench: Bench) -> Callable[[], Any]:
    cancelled, *_ = await submitted(bench, 3)
    await bench.store.cancel(cancelled)
    return lambda: bench.store.report_and_claim(None, "i:1", LEASE)


async def a_claim_said_again(bench: Bench) -> Callable[[], Any]:
    await submitted(bench, 2)
    await claim(bench, "i:1")
    return lambda: bench.store.report_and_claim(None, "i:1", LEASE)


def a_report(*arguments: Any) -> Callable[[Bench], Any]:
    async def ready_to_report(bench: Bench) -> Callable[[], Any]:
        await submitted(bench, 2)
        claimed = await claim(bench, "i:1")
        return lambda: bench.store.report_and_claim(Report(claimed, *arguments), "i:2", LEASE)

    ready_to_report.__name__ = arguments[0]
    return ready_to_report


async def ready_to_renew(bench: Bench) -> Callable[[], Any]:
    await submitted(bench, 3)
    claims = [await claim(bench, f"{n}:1") for n in range(3)]
    await report(bench, claims[1], "release")
    return lambda: bench.store.renew([(claimed, "") for claimed in claims], LEASE)


async def ready_to_sweep(bench: Bench) -> Callable[[], Any]:
    """Three are due, the leases of two ended, one of them in the last attempt, and two are to be deleted."""
    await submitted(bench, 2)
    for number, transition in enumerate(("complete", "fail")):
        await report(bench, await claim(bench, f"i:{number}"), transition, "1")
    bench.move(100)
    await submitted(bench, 1)
    await submitted(bench, 1, max_retries=0)
    await claim(bench, "i:2")
    await claim(bench, "i:3")
    await submitted(bench, 3, delay=LEASE)
    bench.move(LEASE)
    return lambda: bench.store.sweep(100)


async def too_many_finished(bench: Bench) -> Callable[[], Any]:
    await submitted(bench, 4)
    for number, transition in enumerate(("complete", "fail", "complete")):
        await report(bench, await claim(bench, f"i:{number}"), transition, "1")
        bench.move(1)
    return lambda: bench.store.sweep(0, keep=1)


def a_cancel(delay: float, claimed: bool) -> Callable[[Bench], Any]:
    async def ready_to_cancel(bench: Bench) -> Callable[[], Any]:
        [job_id] = await submitted(bench, delay=delay)
        await submitted(bench)
        if claimed:
            await claim(bench, "i:1")
        return lambda: bench.store.cancel(job_id)

    ready_to_cancel.__name__ = f"cancel_{delay}_{claimed}"
    return ready_to_cancel


STATES: list[Callable[[Bench], Any]] = [
    ready_to_claim,
    ready_to_claim_behind_a_cancelled_one,
    a_claim_said_again,
    *[
        a_report(*each)
        for each in (("complete", "3"), ("fail", "E"), ("retry", "E", 1), ("defer", "", 1), ("release",))
    ],
    ready_to_renew,
    ready_to_sweep,
    too_many_finished,
    *[a_cancel(*each) for each in ((0, False), (60, False), (0, True))],
]


async def goes_wrong_at(bench: Bench, number: int, act: Callable[[], Any]) -> bool:
    """Act with an error at that call of the script; whether there was such a call."""
    bench.client.set(PREFIX + "fail_at", number)
    try:
        await act()
    except redis.ResponseError:
        return True
    finally:
        bench.client.set(PREFIX + "fail_at", 0)
    return False


async def let_all_finish(bench: Bench) -> None:
    """Sweep and work until nothing is left to do."""
    for number in range(20):
        bench.move(60)
        await bench.store.sweep(0)
        _, claimed = await bench.store.report_and_claim(None, f"last:{number}", LEASE)
        if claimed:
            await report(bench, claimed, "complete", "3")


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_an_error_at_any_call_of_a_script_loses_no_job(
    bench: Bench, state: Callable[[Bench], Any], again: bool
) -> None:
    bench.store = Store(bench.pipeline, clock=INJECTION + Bench.CLOCK)
    for number in itertools.count(1):
        bench.client.flushdb()
        bench.move(0)
        act = await state(bench)
        before = {job_id for ids in bench.places().values() for job_id in ids}
        went_wrong = await goes_wrong_at(bench, number, act)
        if again:
            await act()
        await let_all_finish(bench)
        kept = {job_id for job_id in before if bench.job(job_id)}
        assert kept == before or (state in (ready_to_sweep, too_many_finished) and len(before - kept) <= 2)
        assert {bench.job(job_id)["status"] for job_id in kept} <= {"completed", "failed"}, number
        if state in (ready_to_sweep, too_many_finished):  # the next one deletes what an error left over
            await act()
            kept = {job_id for job_id in before if bench.job(job_id)}
        places = bench.places()
        assert places.keys() <= {"completed", "failed"}, f"an error at call {number}"
        assert not bench.client.exists(PREFIX + "withdrawn"), f"an error at call {number}"
        for place, ids in places.items():
            assert {bench.job(job_id)["status"] for job_id in ids} == {place}, f"an error at call {number}"
        finished = [job_id for ids in places.values() for job_id in ids]
        assert sorted(kept) == sorted(finished) == sorted(bench.client.zrange(PREFIX + "history", 0, -1))
        if not went_wrong:
            assert number > 3
            return


@pytest.mark.parametrize("key", ["", "a-key"])
async def test_an_error_at_any_call_of_a_submission_leaves_nothing(bench: Bench, key: str) -> None:
    bench.store = Store(bench.pipeline, clock=INJECTION + Bench.CLOCK)
    [waiting] = await submitted(bench)
    bench.client.set(PREFIX + "fail_at", 0)
    before = sorted(bench.client.keys("*"))
    for number in itertools.count(1):
        jobs = [new_job(), new_job(delay=60), new_job()]
        if not await goes_wrong_at(bench, number, partial(bench.store.submit, jobs, key, "x" if key else "")):
            assert number > 12
            assert bench.places() == {"queue": [waiting, jobs[0].id, jobs[2].id], "delayed": [jobs[1].id]}
            return
        assert sorted(bench.client.keys("*")) == before
        assert bench.places() == {"queue": [waiting]}
        assert bench.client.zrange(PREFIX + "history", 0, -1) == [waiting]


async def test_filling_the_empty_queue_is_published_once(
    redis_server: RedisServer, nursery: trio.Nursery
) -> None:
    bench = Bench(RedisConnection(redis_server.url).exchange, redis_server.client)
    nursery.start_soon(bench.pipeline.run)
    channel: Any = redis_server.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    channel.subscribe("{jobqueue}:wake")
    channel.get_message(timeout=5)
    await submitted(bench, 3)
    await submitted(bench, 1)
    assert channel.get_message(timeout=5)
    assert channel.get_message(timeout=0.05) is None
    channel.close()


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_bell_wakes_as_many_as_there_are_jobs(nursery: trio.Nursery) -> None:
    notifier, woken = Notifier(), list[int]()

    async def sleeper(n: int) -> None:
        await notifier.wait(notifier.count)
        woken.append(n)

    for n in range(5):
        nursery.start_soon(sleeper, n)
    await wait_all_tasks_blocked()
    notifier.notify(2)
    await wait_all_tasks_blocked()
    assert len(woken) == 2
    notifier.notify()
    await wait_all_tasks_blocked()
    assert len(woken) == 5


async def test_a_notification_before_the_wait_is_not_missed() -> None:
    notifier = Notifier()
    seen = notifier.count
    notifier.notify()
    await notifier.wait(seen)


async def run_pool(bench: Bench, nursery: trio.Nursery, workers: int = 1, **settings: Any) -> WorkerPool:
    pool = WorkerPool(bench.store, Settings(**settings))
    pool.open()
    for _ in range(workers):
        nursery.start_soon(jobqueue.work, pool)
    nursery.start_soon(jobqueue.heartbeat, pool)
    nursery.start_soon(jobqueue.sweep, pool)
    nursery.start_soon(jobqueue.watch_handlers, pool)
    nursery.start_soon(jobqueue.leave_behind, pool)
    await wait_all_tasks_blocked()
    return pool


async def finished(bench: Bench, job_id: str) -> dict[str, str]:
    """The job once it has ended, on virtual time."""
    for _ in range(10_000):
        if bench.job(job_id)["status"] in jobqueue.FINISHED:
            return bench.job(job_id)
        await trio.sleep(0.05)
    raise AssertionError(bench.job(job_id))


async def submit_typed(
    bench: Bench, pool: WorkerPool, job_type: str, payload: str = "{}", **options: Any
) -> str:
    job = new_job(payload=payload, **options)._replace(job_type=job_type)
    await bench.store.submit([job])
    pool.notifier.notify(1)
    return job.id


async def test_a_job_is_run_and_its_result_kept(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    pool = await run_pool(memory_bench, nursery)
    job_id = await submit_typed(memory_bench, pool, "math", '{"a": "5", "b": 3}')
    assert (await finished(memory_bench, job_id))["result"] == "8"
    assert pool.attempts == {}


@pytest.mark.parametrize(
    ("computed", "why"),
    [(10.0, ""), (0.0, ", hardly computing: the process was frozen, or a handler slept")],
)
async def test_a_loop_that_stood_still_without_computing_was_perhaps_frozen(
    computed: float,
    why: str,
    autojump_clock: MockClock,
    memory_bench: Bench,
    nursery: trio.Nursery,
    handler: Register,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @handler("still")
    async def still() -> None:
        autojump_clock.jump(10)
        monkeypatch.setattr(time, "process_time", lambda: before + computed)

    before = time.process_time()
    monkeypatch.setattr(time, "process_time", lambda: before)
    pool = await run_pool(memory_bench, nursery)
    await finished(memory_bench, await submit_typed(memory_bench, pool, "still"))
    await trio.sleep(jobqueue.TICK_SECONDS)
    assert re.search(rf"stood still for \d+\.\d s{why}; handlers that ran: still\n", caplog.text)


async def test_a_job_that_always_fails_is_run_once_and_then_max_retries_times(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    starts: list[float] = []

    @handler("bad")
    async def bad() -> None:
        starts.append(trio.current_time())
        raise KeyError("why")

    pool = await run_pool(memory_bench, nursery, retry_delay_seconds=10)
    job_id = await submit_typed(memory_bench, pool, "bad")
    job = await finished(memory_bench, job_id)
    assert (job["status"], job["error"], job["attempts"]) == ("failed", "KeyError: 'why'", "4")
    waits = [b - a for a, b in itertools.pairwise(starts)]
    for wait, longest in zip(waits, (10, 20, 40), strict=True):
        assert longest / 2 - 0.001 <= wait <= longest + jobqueue.TICK_SECONDS + 0.01


async def test_a_job_that_fails_once_completes_in_its_second_attempt(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    attempts: list[int] = []

    @handler("flaky")
    async def flaky() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise ExceptionGroup("a nursery", [ValueError("not yet")])
        return "ok"

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "flaky"))
    assert (job["status"], job["result"], job["attempts"]) == ("completed", '"ok"', "2")


@pytest.mark.parametrize("seconds", [0.1, 0.999, 1, 1.3, 60])
async def test_a_run_longer_than_its_timeout_is_cancelled_and_is_a_failed_attempt(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register, seconds: float
) -> None:
    record: list[float] = []

    @handler("slow")
    async def slow() -> None:
        begun = trio.current_time()
        try:
            await trio.sleep(3600)
        finally:
            record.append(trio.current_time() - begun)

    pool = await run_pool(memory_bench, nursery)
    job_id = await submit_typed(memory_bench, pool, "slow", max_retries=0, timeout=seconds)
    job = await finished(memory_bench, job_id)
    assert (job["status"], job["error"]) == ("failed", f"timed out after {seconds:g} s")
    assert record == [pytest.approx(seconds)]


async def test_after_a_cancelled_run_the_worker_goes_on_and_after_others_it_has_no_deadline(
    autojump_clock: MockClock,
    memory_bench: Bench,
    nursery: trio.Nursery,
    handler: Register,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @handler("nap")
    async def nap(seconds: float) -> float:
        await trio.sleep(seconds)
        return seconds

    @handler("stubborn")
    async def stubborn() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)
        return "done"

    pool = await run_pool(memory_bench, nursery)
    for job_type, payload, status in [
        ("nap", '{"seconds": 4}', "completed"),
        ("nap", '{"seconds": 6}', "failed"),
        ("stubborn", "{}", "completed"),
        ("nap", '{"seconds": 0.1}', "completed"),
        ("nap", '{"seconds": 6}', "failed"),
        ("nap", '{"seconds": 4}', "completed"),
    ]:
        options = {"max_retries": 0, "timeout": 5}
        job = await finished(
            memory_bench, await submit_typed(memory_bench, pool, job_type, payload, **options)
        )
        assert (job["status"], "error" in job) == (status, status == "failed")
        await trio.sleep(20)
    assert caplog.text.count("cancelled") == 0


async def test_a_handler_that_exits_ends_its_attempt_and_not_the_service(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    @handler("leave")
    async def leave() -> None:
        sys.exit("no such option")

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "leave", max_retries=0))
    assert job["error"] == "SystemExit: no such option"


async def test_an_error_that_cannot_be_shown_is_a_failed_attempt_all_the_same(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @handler("mute")
    async def mute() -> None:
        raise MuteError

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "mute", max_retries=0))
    assert "MuteError" in job["error"]


async def test_what_redis_refuses_the_workers_is_logged_but_not_all_the_time(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    memory_bench.refuses = "READONLY of a replica"
    pool = await run_pool(memory_bench, nursery, workers=3)
    await trio.sleep(15)
    assert caplog.text.count("Redis refused: READONLY") == 2
    memory_bench.refuses = ""
    job_id = await submit_typed(memory_bench, pool, "math", '{"a": 1, "b": 1}')
    assert (await finished(memory_bench, job_id))["result"] == "2"


async def test_redis_is_looked_at_also_when_a_post_came_first(
    memory_bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one(_: Store) -> list[str]:
        return ["ZADD"]

    monkeypatch.setattr(Store, "missing_rights", one)
    pool = WorkerPool(memory_bench.store, Settings(redis_url="redis://localhost"))
    await jobqueue.open_pool(pool)
    await jobqueue.inspect_redis(pool)
    assert "may not run ZADD" in caplog.text


async def test_nothing_is_swept_at_a_shutdown_that_comes_before_the_layout_is_known(
    memory_bench: Bench,
) -> None:
    pool = WorkerPool(memory_bench.store, Settings())
    pool.stop(grace=20)
    with trio.fail_after(10):
        await jobqueue.sweep(pool)


async def test_who_may_not_listen_for_work_is_told_so(
    own_redis: Callable[..., RedisServer], nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_redis()
    server.client.acl_setuser("default", enabled=True, nopass=True, reset_channels=True)
    connection = RedisConnection(server.url)
    pool = WorkerPool(Store(AutoPipeline(connection.exchange)), Settings())
    nursery.start_soon(jobqueue.listen, connection, pool)
    await trio.to_thread.run_sync(eventually, lambda: "Redis refused" in caplog.text)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("hearing", ["", "6", "600", "9" * 400])
async def test_of_many_instances_that_hear_of_a_job_only_a_few_come_for_it(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, hearing: str
) -> None:
    class Heard:
        async def exchange(self, _: Any) -> list[Any]:
            return [["subscribe", "wake", 1]]

        async def message(self) -> Any:
            if not messages:
                await trio.sleep_forever()
            return messages.pop()

    messages = [["message", "wake", hearing] for _ in range(1000)]
    dice = random.Random(1)
    monkeypatch.setattr(random, "random", dice.random)
    pool = WorkerPool(Store(AutoPipeline()), Settings())
    nursery.start_soon(jobqueue.listen, typing.cast(Any, Heard()), pool)
    await wait_all_tasks_blocked()
    assert pool.notifier.count == (pytest.approx(10, abs=5) if hearing == "600" else 1000)
    nursery.cancel_scope.cancel()


async def test_after_a_silence_a_listener_subscribes_again_to_see_whether_redis_is_there(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    class Silent:
        async def exchange(self, _: Any) -> list[Any]:
            subscribed_at.append(trio.current_time())
            return [["subscribe", "wake", 1]]

        async def message(self) -> Any:
            await trio.sleep(10 if len(subscribed_at) == 1 and trio.current_time() < 20 else math.inf)
            return ["message", "wake", "1"]

    subscribed_at: list[float] = []
    pool = WorkerPool(Store(AutoPipeline()), Settings())
    nursery.start_soon(jobqueue.listen, typing.cast(Any, Silent()), pool)
    await trio.sleep(40)
    assert subscribed_at == [0, 20 + jobqueue.SILENCE_SECONDS]  # each message puts it off
    assert pool.notifier.count == 2
    nursery.cancel_scope.cancel()


async def test_what_a_handler_raises_beside_its_cancellation_stops_no_worker(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    @handler("untidy")
    async def untidy() -> None:
        async def child() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("while unwinding")

        async with trio.open_nursery() as children:
            children.start_soon(child)
            children.start_soon(trio.sleep_forever)

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "untidy", max_retries=0))
    assert (job["status"], job["error"]) == ("failed", "timed out after 60 s; KeyError: 'while unwinding'")
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "math", '{"a": 1, "b": 1}'))
    assert job["result"] == "2"


async def test_a_worker_that_finds_more_jobs_wakes_as_many_others(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    present = 0

    @handler("meet")
    async def meet() -> None:
        nonlocal present
        present += 1
        await trio.sleep(0.1)

    pool = await run_pool(memory_bench, nursery, workers=5)
    jobs = [new_job(payload="{}")._replace(job_type="meet") for _ in range(4)]
    await memory_bench.store.submit(jobs)
    pool.notifier.notify(1)
    await trio.sleep(0.05)
    assert present == 4


async def test_an_unrecoverable_error_fails_the_job_at_once(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    @handler("hopeless")
    async def hopeless() -> None:
        raise jobqueue.Unrecoverable("no such user")

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "hopeless"))
    assert (job["status"], job["attempts"]) == ("failed", "1")
    assert job["error"].endswith("Unrecoverable: no such user")


@pytest.mark.parametrize("in_thread", [False, True])
async def test_the_traceback_of_the_last_attempt_is_kept_until_the_job_completes(
    memory_bench: Bench, autojump_clock: MockClock, nursery: trio.Nursery, handler: Register, in_thread: bool
) -> None:
    attempts: list[int] = []

    def dig(depth: int) -> None:
        if depth:
            dig(depth - 1)
        raise ValueError("at the bottom" * 1000)

    @handler("digs")
    async def digs() -> None:
        attempts.append(1)
        if len(attempts) < 2:
            await trio.to_thread.run_sync(dig, 3) if in_thread else dig(3)

    pool = await run_pool(memory_bench, nursery)
    job_id = await submit_typed(memory_bench, pool, "digs")
    while "traceback" not in memory_bench.job(job_id):  # noqa: ASYNC110
        await trio.sleep(0.01)
    kept = memory_bench.job(job_id)["traceback"]
    assert "in digs" in kept.splitlines()[1]  # the handler's own frames come first
    assert "in dig\n" in kept
    assert len(kept) < 8100
    assert (await shown_job(memory_bench, job_id))["traceback"] == kept
    await finished(memory_bench, job_id)
    assert (await shown_job(memory_bench, job_id))["traceback"] is None


async def test_progress_is_kept_by_the_next_heartbeat_and_fenced(
    memory_bench: Bench, autojump_clock: MockClock, nursery: trio.Nursery, handler: Register
) -> None:
    @handler("pages")
    async def pages() -> str:
        jobqueue.progress(0.4, "page 4 of 10")
        await trio.sleep(2)
        return f"{jobqueue.job()}"

    pool = await run_pool(memory_bench, nursery)
    job_id = await submit_typed(memory_bench, pool, "pages")
    await trio.sleep(1)
    shown = await shown_job(memory_bench, job_id)
    assert shown["progress"] == {"done": 0.4, "note": "page 4 of 10"}
    assert shown["worker"] == f"{socket.gethostname()}:{os.getpid()}"
    [attempt] = pool.attempts.values()
    stale = msgspec.structs.replace(attempt.claim, token="x:1")
    assert (await memory_bench.store.renew([(stale, '{"done": 1}')], LEASE))[1] == ["x:1"]
    assert (await shown_job(memory_bench, job_id))["progress"] == shown["progress"]
    expected = jobqueue.Job(job_id, "pages", 1, 3)
    assert json.loads((await finished(memory_bench, job_id))["result"]) == str(expected)


async def test_a_note_that_is_no_unicode_harms_neither_its_job_nor_another(
    handler: Register, bench: Bench, nursery: trio.Nursery
) -> None:
    @handler("note")
    async def note() -> None:
        jobqueue.progress(0.5, "caf\udce9")

    pool = await run_pool(bench, nursery)
    ids = [
        await submit_typed(bench, pool, "note"),
        await submit_typed(bench, pool, "math", '{"a": 1, "b": 1}'),
    ]
    for job_id in ids:
        assert (await finished(bench, job_id))["status"] == "completed"
    assert json.loads(bench.job(ids[0])["progress"])["note"] == "caf\\udce9"
    nursery.cancel_scope.cancel()


async def test_progress_and_job_in_a_thread_are_those_of_its_job(handler: Register, bench: Bench) -> None:
    @handler("thread")
    def thread() -> list[Any]:
        jobqueue.progress(0.5)
        return list(jobqueue.job())

    [job_id] = await submitted(bench)
    claimed = msgspec.structs.replace(await claim(bench, "i:1"), job_type="thread", payload="{}")
    reported = await jobqueue.run_attempt(WorkerPool(bench.store, Settings()), claimed)
    assert reported
    assert json.loads(reported.text) == [job_id, "thread", 1, 3]


def test_outside_of_a_job_progress_does_nothing_and_job_is_an_error() -> None:
    jobqueue.progress(1)
    with pytest.raises(LookupError):
        jobqueue.job()


endless: list[Any] = []
endless.append(endless)


@pytest.mark.parametrize("result", [{1: {1 + 2j}}, math.nan, {"a": [math.inf]}, object(), endless, "\ud800"])
async def test_a_result_that_is_not_json_is_a_failed_attempt(
    autojump_clock: MockClock,
    memory_bench: Bench,
    nursery: trio.Nursery,
    handler: Register,
    result: Any,
) -> None:
    @handler("odd")
    async def odd() -> Any:
        return result

    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "odd", max_retries=0))
    assert job["status"] == "failed"
    assert "JSON" in job["error"]


async def test_a_type_that_this_instance_does_not_know_is_left_to_others(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    pool = await run_pool(memory_bench, nursery)
    ids = [await submit_typed(memory_bench, pool, "other", max_retries=0) for _ in range(3)]
    await trio.sleep(60)
    assert [memory_bench.job(job_id)["attempts"] for job_id in ids] == ["0"] * 3
    assert memory_bench.places() == {"delayed": sorted(ids)}
    assert caplog.text.count("no handler") == 1


async def test_a_long_job_keeps_its_lease(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    pool = await run_pool(memory_bench, nursery, lease_seconds=1)
    job_id = await submit_typed(memory_bench, pool, "long", '{"seconds": 30}')
    assert (await finished(memory_bench, job_id))["attempts"] == "1"


async def test_who_loses_his_lease_is_cancelled_and_reports_nothing(
    autojump_clock: MockClock,
    memory_bench: Bench,
    nursery: trio.Nursery,
    handler: Register,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record: list[str] = []

    @handler("slow")
    async def slow() -> None:
        try:
            await trio.sleep(20)
        except trio.Cancelled:
            record.append("cancelled")
            raise ValueError("a bad clean-up") from None

    pool = await run_pool(memory_bench, nursery)
    job_id = await submit_typed(memory_bench, pool, "slow")
    await trio.sleep(1)
    memory_bench.client.hset(f"{{jobqueue}}:job:{job_id}", "token", "another:1")
    await trio.sleep(1)
    assert record == ["cancelled"]
    assert memory_bench.places() == {"processing": [job_id]}
    assert memory_bench.job(job_id)["token"] == "another:1"
    assert "its lease was lost" in caplog.text


async def test_workers_whom_redis_refuses_wait_for_a_sweep_that_succeeds(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    carry, calls, is_refusing = memory_bench.transport, list[str](), True

    async def refuse(commands: Any) -> list[Any]:
        calls.extend(str(command[1]) for command in commands)
        refusals = [redis.ResponseError("MISCONF no writes for now") for _ in commands]
        return refusals if is_refusing else await carry(commands)

    memory_bench.transport = refuse
    await run_pool(memory_bench, nursery, workers=100)
    await trio.sleep(60)
    claims = calls.count(memory_bench.store._hashes["report"])
    assert claims == 100  # one of each worker, in a minute
    is_refusing = False
    job_id = (await memory_bench.store.submit([new_job()]) or [""])[0]
    assert (await finished(memory_bench, job_id))["status"] == "completed"
    assert calls.count(memory_bench.store._hashes["report"]) > claims


def lose_replies(bench: Bench, times: int, is_meant: Callable[[list[Any], list[Any]], bool]) -> list[Any]:
    """Lose the replies of so many exchanges, of commands that were carried out; those that were lost."""
    carry, lost = bench.transport, list[Any]()

    async def lossy(commands: Any) -> list[Any]:
        replies = await carry(commands)
        if len(lost) < times and is_meant(list(commands), replies):
            lost.append(replies)
            raise redis.ConnectionError("cut")
        return replies

    bench.transport = lossy
    return lost


def has_claim(_commands: list[Any], replies: list[Any]) -> bool:
    return any("'math'" in str(reply) for reply in replies)


def has_report(commands: list[Any], _replies: list[Any]) -> bool:
    return any("complete" in command for command in commands)


async def test_a_claim_whose_reply_was_lost_is_run_all_the_same_and_counts_once(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    lost = lose_replies(memory_bench, 1, has_claim)
    pool = await run_pool(memory_bench, nursery, max_retries=0)
    job_id = await submit_typed(memory_bench, pool, "math", '{"a": 1, "b": 2}', max_retries=0)
    job = await finished(memory_bench, job_id)
    assert lost
    assert (job["status"], job["attempts"]) == ("completed", "1")


async def test_a_claim_whose_replies_are_lost_again_and_again_counts_once(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    lost = lose_replies(memory_bench, 7, has_claim)
    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "math", '{"a": 1, "b": 2}'))
    assert (len(lost), job["status"], job["attempts"]) == (7, "completed", "1")


async def test_a_report_whose_reply_was_lost_is_sent_again(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    lost = lose_replies(memory_bench, 3, has_report)
    pool = await run_pool(memory_bench, nursery)
    job = await finished(memory_bench, await submit_typed(memory_bench, pool, "math", '{"a": 1, "b": 2}'))
    await trio.sleep(2)
    assert len(lost) == 3
    assert (job["status"], job["attempts"]) == ("completed", "1")
    assert len(memory_bench.client.zrange("{jobqueue}:completed", 0, -1)) == 1


async def test_stopping_lets_busy_workers_finish_and_claims_nothing_more(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as workers:
        pool = await run_pool(memory_bench, nursery, workers=0)
        for _ in range(2):
            workers.start_soon(jobqueue.work, pool)
        running = [await submit_typed(memory_bench, pool, "long", '{"seconds": 5}') for _ in range(2)]
        waiting = await submit_typed(memory_bench, pool, "long")
        await trio.sleep(1)
        pool.stop(grace=20)
        pool.stop(grace=20)
    assert trio.current_time() < 6
    assert memory_bench.places() == {"queue": [waiting], "completed": sorted(running)}


@pytest.mark.parametrize("grace", [0, 3.1])
async def test_at_the_end_of_the_grace_a_run_is_cancelled_and_released(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register, grace: float
) -> None:
    record: list[float] = []

    @handler("slow")
    async def slow() -> None:
        try:
            await trio.sleep(1000)
        finally:
            record.append(trio.current_time() - stopped_at)

    async with trio.open_nursery() as workers:
        pool = await run_pool(memory_bench, nursery, workers=0)
        workers.start_soon(jobqueue.work, pool)
        job_id = await submit_typed(memory_bench, pool, "slow")
        waiting = await submit_typed(memory_bench, pool, "math")
        await trio.sleep(1)
        stopped_at = trio.current_time()
        pool.stop(grace)
    assert record == [pytest.approx(grace)]
    assert memory_bench.places() == {"queue": [job_id, waiting]}
    assert memory_bench.job(job_id)["attempts"] == "0"


async def test_idle_workers_leave_at_once(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as workers:
        pool = await run_pool(memory_bench, nursery, workers=0)
        for _ in range(10):
            workers.start_soon(jobqueue.work, pool)
        await wait_all_tasks_blocked()
        pool.stop(grace=20)
    assert trio.current_time() < 1


async def test_other_instances_may_renew_their_leases_first_when_redis_is_back(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery
) -> None:
    await run_pool(memory_bench, nursery, workers=0, lease_seconds=2)
    [job_id] = await submitted(memory_bench)
    _, claimed = await memory_bench.store.report_and_claim(None, "other:1", 2)
    assert claimed
    await trio.sleep(1.5)
    memory_bench.away = True
    await trio.sleep(10)
    memory_bench.away = False
    await trio.sleep(0.7)
    assert (await memory_bench.store.renew([(claimed, "")], 60))[1] == []
    await trio.sleep(3)
    assert memory_bench.places() == {"processing": [job_id]}


async def test_leases_are_not_ended_just_after_redis_was_away(
    autojump_clock: MockClock, memory_bench: Bench, nursery: trio.Nursery, handler: Register
) -> None:
    pool = await run_pool(memory_bench, nursery, lease_seconds=2)
    job_id = await submit_typed(memory_bench, pool, "long", '{"seconds": 30}')
    await trio.sleep(5)
    memory_bench.away = True
    await trio.sleep(10)
    memory_bench.away = False
    assert (await finished(memory_bench, job_id))["attempts"] == "1"


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────

GOOD: dict[str, Any] = {"job_type": "math", "payload": {"a": "5", "b": "3"}}


class Api:
    """The REST API without a server around it, and without workers behind it."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        self.bench = bench
        self.pool = WorkerPool(bench.store, settings)
        self.pool.open()
        self.client: Any = jobqueue.create_app(self.pool).test_client()

    async def post(self, body: Any, content_type: str = "application/json") -> tuple[int, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await self.client.post("/job", data=content, headers={"Content-Type": content_type})
        return response.status_code, json.loads(await response.get_data())

    async def get(self, path: str, method: str = "GET") -> tuple[int, Any]:
        response = await self.client.open(path, method=method)
        self.headers = response.headers
        return response.status_code, json.loads(await response.get_data())


@pytest.fixture
async def api(nursery: trio.Nursery) -> Api:
    client = fakeredis.FakeRedis(decode_responses=True)
    bench = Bench(memory_transport(client), client)
    nursery.start_soon(bench.pipeline.run)
    return Api(bench, Settings(max_body_bytes=200_000))


@pytest.mark.parametrize(
    "job",
    [
        {"job_type": "email", "payload": {"to": "user@example.com", "subject": "Hello", "body": "Welcome!"}},
        {"job_type": "math", "payload": {"a": "5", "b": "3"}},
        {"job_type": "long", "payload": {}},
    ],
)
async def test_a_job_is_accepted_with_its_id_and_its_address(api: Api, job: dict[str, Any]) -> None:
    response = await api.client.post("/job", json=job)
    answer = json.loads(await response.get_data())
    assert response.status_code == 202
    assert response.headers["Location"] == f"job/{uuid.UUID(answer['id'])}"
    assert answer.keys() == {"id"}
    status, shown = await api.get(urljoin("/job", response.headers["Location"]))
    assert status == 200
    assert (shown["id"], shown["status"], shown["payload"]) == (answer["id"], "pending", job["payload"])


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("is_stopping", [False, True])
async def test_nothing_is_written_to_keys_of_another_layout(
    api: Api, method: str, is_stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(status: int) -> None:
        ended.append(status)
        raise RuntimeError

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", end)
    [job_id] = await submitted(api.bench)
    api.bench.client.set("{jobqueue}:layout", "99")
    api.pool.is_ours, api.pool.opened = False, trio.Event()
    if is_stopping:  # and a request comes in the same moment
        api.pool.stop(1)
    await api.client.open("/job" if method == "POST" else f"/job/{job_id}", method=method, json=GOOD)
    assert ended == [1]
    assert api.bench.places() == {"queue": [job_id]}
    assert (await api.get(f"/job/{job_id}"))[1]["status"] == "pending"


async def test_a_list_may_take_longer_than_a_minute(
    autojump_clock: MockClock, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*arguments: Any, **options: Any) -> jobqueue.Page:
        await trio.sleep(40)
        return await page(*arguments, **options)

    page = api.bench.store.page
    await submitted(api.bench, 401)
    monkeypatch.setattr(api.bench.store, "page", slow)
    with trio.fail_after(1000):
        assert len((await api.get("/jobs"))[1]) == 401
    assert trio.current_time() > 100


async def test_the_first_job_in_memory_need_not_wait_for_a_sweep(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery
) -> None:
    for task in (jobqueue.work, jobqueue.heartbeat):
        nursery.start_soon(task, api.pool)
    await trio.sleep(0.1)
    _, answer = await api.post(GOOD)
    await wait_all_tasks_blocked()
    assert (await api.get(f"/job/{answer['id']}"))[1]["status"] == "completed"
    assert trio.current_time() < 0.5


@pytest.mark.parametrize(
    ("size", "is_idle", "order"),
    [(10, True, [1, "submit", 0]), (2000, True, [0, "submit", 1]), (10, False, [0, "submit", 1])],
)
async def test_a_claim_follows_a_small_submission_at_once_if_it_cannot_overtake_it(
    api: Api, monkeypatch: pytest.MonkeyPatch, size: int, is_idle: bool, order: list[Any]
) -> None:
    store, record = api.pool.store, list[Any]()
    submit = store.submit

    async def recorded(*arguments: Any) -> Any:
        record.append("submit")
        return await submit(*arguments)

    monkeypatch.setattr(store, "submit", recorded)
    monkeypatch.setattr(store, "is_idle", lambda: is_idle)
    monkeypatch.setattr(api.pool.notifier, "notify", record.append)
    await api.post({"job_type": "math", "payload": {"a": 1, "b": "1" * size}})
    assert record == order


async def test_delay_timeout_and_max_retries_are_taken_as_given(api: Api) -> None:
    status, answer = await api.post(GOOD | {"delay": 1.5, "timeout": 0.5, "max_retries": 0})
    assert status == 202
    _, shown = await api.get(f"/job/{answer['id']}")
    assert (shown["timeout"], shown["max_retries"]) == (0.5, 0)
    assert api.bench.places() == {"delayed": [answer["id"]]}
    assert shown["due_at"] > shown["created_at"]


async def test_an_array_submits_all_in_order(api: Api) -> None:
    status, answer = await api.post([GOOD, GOOD | {"payload": {"a": 1, "b": 1}}, GOOD])
    assert status == 202
    assert api.bench.places() == {"queue": [job["id"] for job in answer]}


def amounts(name: str) -> list[Any]:
    bad: tuple[Any, ...] = (-1, True, "1", None, [], 1e300, 10**30)
    return [pytest.param(GOOD | {name: value}, name, id=f"{name}={value!r}") for value in bad]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'"text"', "the body: expected object | array, got str"),
        (b"1", "expected object | array, got int"),
        (b"null", "expected object | array, got null"),
        (b"\xff", "not UTF-8"),
        (b'{"job_type": "math", "payload": {"a": NaN, "b": 1}}', "not JSON"),
        (b'{"job_type": "math", "payload": {"a": Infinity, "b": 1}}', "not JSON"),
        (b'{"job_type": "math", "payload": {"a": 1, "b": 1}, "delay": -Infinity}', "not JSON"),
        (b'{"job_type": "math", "payload": {"a": 1, "b": 1}, "timeout": 1e999}', "timeout"),
        (b'{"job_type": "math", "payload": {"a": 1e999, "b": 1}}', "payload.a: number out of range"),
        (b'{"job_type": "math", "payload": {"a": "\\ud800", "b": 1}}', "not JSON"),
        (b'{"job_type": "\\ud800", "payload": {}}', "surrogate"),
        (b'{"\\ud800": 1}', "not JSON"),
        (b"[" * 100_000, "expected object, got array"),
        (b'{"job_type": "math", "payload": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001, "nested too deeply"),
        (
            b'{"job_type": "math", "payload": {"a": ' + b"9" * 10_000 + b', "b": 1}}',
            "payload.a: integer value out of range",
        ),
        ({"payload": {}}, "job_type is missing; they are: job_type, payload, max_retries, timeout, delay"),
        (GOOD | {"job_type": "nope"}, "job_type must be one of: email, math, long"),
        (GOOD | {"job_type": 1}, "job_type"),
        (GOOD | {"job_type": ["math"]}, "job_type"),
        ({"job_type": "math"}, "payload is missing"),
        (GOOD | {"payload": []}, "payload: expected object, got array"),
        (GOOD | {"payload": None}, "payload: expected object, got null"),
        (GOOD | {"payload": {"a": 1}}, "payload.b is missing"),
        (GOOD | {"payload": {"a": 1, "b": 2, "c": 3}}, "payload.c is not one of the fields; they are: a, b"),
        (GOOD | {"payload": {"a": 1, "b": {}}}, "payload.b: expected int | str, got object"),
        (GOOD | {"priority": 1}, "priority is not one of the fields; they are: job_type, payload"),
        (GOOD | {"max_retries": 1.0}, "max_retries: expected int, got float"),
        (GOOD | {"timeout": 0}, "timeout: expected float >= 0.001"),
        *amounts("delay"),
        *amounts("timeout"),
        *amounts("max_retries"),
        ([], "at least one job"),
        ([GOOD, GOOD | {"payload": {"a": 1}}], "job 1 of the array: payload.b is missing"),
        ([GOOD, 7], "job 1 of the array: expected object, got int"),
        ([[GOOD]], "job 0 of the array: expected object, got array"),
    ],
)
async def test_a_bad_body_is_a_400_that_says_what_is_wrong_and_stores_nothing(
    api: Api, body: Any, problem: str
) -> None:
    status, answer = await api.post(body)
    assert (status, list(answer)) == (400, ["error"])
    assert problem in answer["error"]
    assert api.bench.client.keys("{jobqueue}:*") == ["{jobqueue}:clock"]


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_another_content_type_is_415(api: Api, content_type: str) -> None:
    status, answer = await api.post(GOOD, content_type)
    assert (status, answer) == (415, {"error": "the Content-Type must be application/json"})


async def test_a_charset_behind_the_content_type_is_fine(api: Api) -> None:
    assert (await api.post(GOOD, "application/json; charset=utf-8"))[0] == 202


async def test_a_body_over_the_limit_is_413(api: Api) -> None:
    status, answer = await api.post(b" " * 200_001)
    assert (status, answer) == (413, {"error": "the body must be at most 200,000 bytes"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/job/", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/job/not-an-id", 404),
        ("GET", "/job/%F0%9F%92%A9", 404),
        ("GET", "/job/%ed%a0%80", 404),
        ("GET", "/job/..%2f..", 404),
        ("GET", f"/job/{uuid.UUID(int=0)}", 404),
        ("GET", "/job", 405),
        ("PUT", "/job", 405),
        ("POST", "/jobs", 405),
        ("PATCH", "/job/x", 405),
        ("GET", "/jobs?limit=0", 400),
        ("GET", "/jobs?limit=1001", 400),
        ("GET", f"/jobs?limit={'0' * 5000}1", 400),
        ("GET", f"/jobs?cut={'0' * 5000}100", 400),
        ("GET", f"/job/x?wait=0.{'0' * 5000}", 404),
        ("GET", "/jobs?limit=-1", 400),
        ("GET", "/jobs?limit=x", 400),
        ("GET", "/jobs?limit=", 400),
        ("GET", "/jobs?cut=99", 400),
        ("GET", "/jobs?cut=10001", 400),
        ("GET", "/jobs?cut=", 400),
        ("GET", "/jobs?limit=%D9%A1", 400),
        ("GET", "/jobs?status=done", 400),
        ("GET", "/jobs?status=", 400),
        ("GET", "/jobs?cursor=x", 400),
        ("GET", "/jobs?cursor=-1", 400),
        ("GET", "/jobs?status=failed&cursor=7", 400),
        ("GET", "/jobs?state=failed", 400),
        ("POST", "/job?wait=5", 400),
        ("GET", "/static/x", 404),
    ],
)
async def test_a_bad_address_method_or_query_is_refused_in_json(
    api: Api, method: str, path: str, status: int
) -> None:
    got, answer = await api.get(path, method)
    assert (got, list(answer)) == (status, ["error"])


async def test_405_says_which_methods_there_are(api: Api) -> None:
    _, answer = await api.get("/jobs", "DELETE")
    assert "GET" in answer["error"]
    assert "GET" in api.headers["Allow"]


async def test_no_jobs_is_an_empty_array(api: Api) -> None:
    assert await api.get("/jobs") == (200, [])
    assert await api.get("/jobs?status=failed&limit=5") == (200, [])
    assert "Link" not in api.headers


@pytest.mark.parametrize("count", [1, jobqueue.CHUNK, jobqueue.CHUNK + 1, 2 * jobqueue.CHUNK])
async def test_all_jobs_are_listed_newest_first(api: Api, count: int) -> None:
    _, ids = await api.post([GOOD] * count)
    status, jobs = await api.get("/jobs")
    assert status == 200
    assert [job["id"] for job in jobs] == [job["id"] for job in ids][::-1]


@pytest.mark.parametrize("left", [0, 3])
async def test_a_list_is_json_also_where_all_jobs_of_its_first_parts_were_cancelled(
    api: Api, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr(jobqueue, "CHUNK", 2)
    _, ids = await api.post([GOOD] * 8)
    for each in ids[left:]:
        await api.get(f"/job/{each['id']}", "DELETE")
    _, jobs = await api.get("/jobs?status=pending")
    assert [job["id"] for job in jobs] == [job["id"] for job in ids[:left]][::-1]


@pytest.mark.parametrize("query", ["", "status=pending&"])
async def test_links_lead_through_all_pages(api: Api, query: str) -> None:
    _, ids = await api.post([GOOD] * 7)
    path, seen = f"/jobs?{query}limit=3", []
    while path:
        _, jobs = await api.get(path)
        assert len(jobs) <= 3
        seen += [job["id"] for job in jobs]
        link = api.headers.get("Link", "")
        assert not link or link.endswith('>; rel="next"')
        path = link and urljoin(path, link[1:].partition(">")[0])
    assert seen == [job["id"] for job in ids][::-1]


async def test_a_list_can_be_asked_for_in_short_and_its_link_says_so_too(api: Api) -> None:
    long = {"job_type": "email", "payload": {"to": "a@b.c", "subject": "x", "body": "y" * 90_000}}
    await api.post([long] * 2)
    _, jobs = await api.get("/jobs?limit=1&cut=100")
    assert jobs[0]["payload"].endswith("yyy…")
    assert len(json.dumps(jobs)) < 1000
    assert "cut=100" in api.headers["Link"]
    _, jobs = await api.get("/jobs?cut=100")
    assert [len(job["payload"]) for job in jobs] == [101, 101]


async def test_the_age_of_the_oldest_job_in_the_queue_stands_beside_the_counts(api: Api) -> None:
    await api.get("/jobs?limit=1")
    assert "Job-Oldest-Seconds" not in api.headers
    await api.post(GOOD)
    api.bench.move(1.5)
    await api.get("/jobs?limit=1")
    assert api.headers["Job-Oldest-Seconds"] == "1.500"


async def test_redis_away_is_503_with_retry_after(api: Api) -> None:
    async def away(commands: Any) -> list[Any]:
        raise redis.ConnectionError("connection refused")

    api.bench.transport = away
    for path in ("/jobs", "/jobs?limit=1", "/job/x"):
        assert (await api.get(path))[0] == 503
    assert api.headers["Retry-After"] == "1"
    assert await api.post(GOOD) == (503, {"error": "Redis cannot serve this now: connection refused"})


async def test_a_bug_is_500_in_json_and_a_traceback_in_the_log(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(body: bytes, settings: Settings) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(jobqueue, "parse_jobs", broken)
    status, answer = await api.post(GOOD)
    assert (status, list(answer)) == (500, ["error"])
    assert "secret" not in answer["error"]
    assert "ZeroDivisionError: secret detail" in caplog.text


async def post_once(api: Api, key: str, body: Any) -> tuple[int, Any]:
    response = await api.client.post("/job", json=body, headers={"Idempotency-Key": key})
    return response.status_code, json.loads(await response.get_data())


async def test_the_same_request_with_the_same_key_gets_the_same_answer_and_one_job(api: Api) -> None:
    first = await post_once(api, '"a-key"', GOOD)
    again = await post_once(api, "a-key", dict(reversed(GOOD.items())))
    assert first == again
    assert first[0] == 202
    assert len(api.bench.places()["queue"]) == 1


async def test_another_request_with_the_same_key_is_422_and_another_key_another_job(api: Api) -> None:
    await post_once(api, "a", GOOD)
    status, answer = await post_once(api, "a", GOOD | {"delay": 1})
    assert (status, list(answer)) == (422, ["error"])
    assert (await post_once(api, "b", GOOD))[0] == 202
    assert len(api.bench.places()["queue"]) == 2


async def test_an_array_is_submitted_once_too(api: Api) -> None:
    assert await post_once(api, "a", [GOOD, GOOD]) == await post_once(api, "a", [GOOD, GOOD])
    assert len(api.bench.places()["queue"]) == 2


async def test_two_with_the_same_key_at_the_same_instant_make_one_job(api: Api) -> None:
    answers: list[Any] = []

    async def submit() -> None:
        answers.append(await post_once(api, "a", GOOD))

    async with trio.open_nursery() as both:
        both.start_soon(submit)
        both.start_soon(submit)
    assert answers[0] == answers[1]
    assert len(api.bench.places()["queue"]) == 1


async def test_a_key_is_kept_for_24_hours(api: Api) -> None:
    await post_once(api, "a", GOOD)
    [key] = api.bench.client.keys("{jobqueue}:idempotency:*")
    assert 86_390 < api.bench.client.ttl(key) <= 86_400


@pytest.mark.parametrize("key", ["", '""', '"half', "with space", '"a"b"', "x" * 256, "ä"])
async def test_a_bad_key_is_400_and_stores_nothing(api: Api, key: str) -> None:
    status, answer = await post_once(api, key, GOOD)
    assert status == 400
    assert "Idempotency-Key" in answer["error"]
    assert api.bench.places() == {}


@pytest.mark.parametrize("key", ['"with space"', r'"with \" and \\"'])
async def test_a_quoted_key_may_have_spaces_and_escapes(api: Api, key: str) -> None:
    first, again = await post_once(api, key, GOOD), await post_once(api, key, GOOD)
    assert first == again
    assert first[0] == 202


async def test_two_keys_are_400(api: Api) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    response = await api.client.post("/job", json=GOOD, headers=Headers(headers))
    assert response.status_code == 400


@pytest.mark.parametrize("wait", ["", "-1", "31", "x", "nan", "1e1", "%D9%A3"])
async def test_a_bad_wait_is_400(api: Api, wait: str) -> None:
    _, answer = await api.post(GOOD)
    assert (await api.get(f"/job/{answer['id']}?wait={wait}"))[0] == 400


async def test_a_wait_ends_when_the_time_is_up_with_the_job_as_it_is(
    autojump_clock: MockClock, api: Api
) -> None:
    _, answer = await api.post(GOOD)
    begun = trio.current_time()
    status, job = await api.get(f"/job/{answer['id']}?wait=7.5")
    assert (status, job["status"], trio.current_time() - begun) == (200, "pending", 7.5)
    assert len(api.pool.waiters) == 0


async def test_a_wait_ends_at_once_when_the_job_ends_here(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery
) -> None:
    _, answer = await api.post({"job_type": "long", "payload": {"seconds": 3.25}})
    nursery.start_soon(jobqueue.work, api.pool)
    _, job = await api.get(f"/job/{answer['id']}?wait=30")
    assert (job["status"], trio.current_time()) == ("completed", 3.25)


async def test_a_wait_sees_within_half_a_second_a_job_that_ends_elsewhere(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery
) -> None:
    other = WorkerPool(api.bench.store, Settings())
    other.open()
    _, answer = await api.post({"job_type": "long", "payload": {"seconds": 3.25}})
    nursery.start_soon(jobqueue.work, other)
    nursery.start_soon(jobqueue.sweep, api.pool)
    _, job = await api.get(f"/job/{answer['id']}?wait=30")
    assert job["status"] == "completed"
    assert 3.25 <= trio.current_time() <= 3.75


async def test_a_shutdown_answers_those_who_wait(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery
) -> None:
    _, answer = await api.post(GOOD)

    async def stop() -> None:
        await trio.sleep(2.2)
        api.pool.stop(grace=20)

    nursery.start_soon(stop)
    status, job = await api.get(f"/job/{answer['id']}?wait=30")
    assert (status, job["status"], trio.current_time()) == (200, "pending", 2.2)


async def test_a_job_that_a_free_worker_here_will_run_is_announced_to_nobody_else(
    api: Api, nursery: trio.Nursery, redis_server: RedisServer
) -> None:
    listener: Any = redis_server.client.pubsub()  # type: ignore[no-untyped-call]
    listener.subscribe("{jobqueue}:wake")
    pipeline = AutoPipeline(RedisConnection(redis_server.url).exchange)
    nursery.start_soon(pipeline.run)
    pool = WorkerPool(Store(pipeline), Settings())
    pool.open()
    client = jobqueue.create_app(pool).test_client()

    async def announced() -> bool:
        """Whether a job that is submitted now is: after it comes a message of ours."""
        response = await client.post("/job", json=GOOD | {"job_type": "long", "payload": {"seconds": 0}})
        assert response.status_code == 202
        redis_server.client.publish("{jobqueue}:wake", "ours")
        count = 0
        while (listener.get_message(ignore_subscribe_messages=True, timeout=5) or {}).get("data") != "ours":
            count += 1
        return count > 0

    assert await announced()
    nursery.start_soon(jobqueue.work, pool)
    await wait_all_tasks_blocked(0.2)
    assert not await announced()
    nursery.cancel_scope.cancel()


async def test_cancelling_a_waiting_job_ends_it_as_failed(api: Api) -> None:
    for delay in (0, 60):
        _, answer = await api.post(GOOD | {"delay": delay})
        status, job = await api.get(f"/job/{answer['id']}", "DELETE")
        assert (status, job["status"], job["error"]) == (200, "failed", "cancelled")
    assert list(api.bench.places()) == ["failed"]


async def test_a_wait_ends_at_once_when_the_job_is_cancelled_here(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery
) -> None:
    _, answer = await api.post(GOOD | {"delay": 60})

    async def cancel() -> None:
        await trio.sleep(2.2)
        await api.get(f"/job/{answer['id']}", "DELETE")

    nursery.start_soon(cancel)
    _, job = await api.get(f"/job/{answer['id']}?wait=30")
    assert (job["error"], trio.current_time()) == ("cancelled", 2.2)


async def test_a_cancel_that_is_refused_cancels_nothing(api: Api) -> None:
    _, answer = await api.post(GOOD)
    assert (await api.get(f"/job/{answer['id']}?now=1", "DELETE"))[0] == 400
    assert (await api.get(f"/job/{answer['id']}"))[1]["status"] == "pending"


def test_smtp_urls_of_all_kinds_are_taken() -> None:
    for url in (
        "smtp://mail",
        "smtps://a%40b:c%2Fd@mail.example.com:465",
        "smtp://[::1]:25",
        "smtp://a@mail:25",
    ):
        assert Settings(smtp_url=url).smtp_url == url


async def test_cancelling_a_running_job_cancels_its_handler_within_a_second(
    autojump_clock: MockClock, api: Api, nursery: trio.Nursery, handler: Register
) -> None:
    record: list[float] = []

    @handler("slow")
    async def slow() -> None:
        try:
            await trio.sleep(1000)
        finally:
            record.append(trio.current_time())

    other = WorkerPool(api.bench.store, Settings())
    other.open()
    nursery.start_soon(jobqueue.work, other)
    nursery.start_soon(jobqueue.heartbeat, other)
    _, answer = await api.post({"job_type": "slow", "payload": {}})
    await trio.sleep(3.3)
    assert (await api.get(f"/job/{answer['id']}", "DELETE"))[0] == 200
    await trio.sleep(1)
    assert record == [pytest.approx(3.5, abs=0.5)]
    _, job = await api.get(f"/job/{answer['id']}")
    assert (job["status"], job["error"], job["attempts"]) == ("failed", "cancelled", 1)


async def test_cancelling_a_finished_job_is_409_and_an_unknown_one_404(api: Api) -> None:
    _, answer = await api.post(GOOD)
    await api.get(f"/job/{answer['id']}", "DELETE")
    assert (await api.get(f"/job/{answer['id']}", "DELETE"))[0] == 409
    assert (await api.get("/job/x", "DELETE"))[0] == 404


async def test_a_browser_gets_the_page_and_others_json(api: Api) -> None:
    for accept, kind in [
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("", "application/json"),
    ]:
        response = await api.client.get("/jobs", headers={"Accept": accept})
        assert response.mimetype == kind
    assert (await api.client.get("/")).headers["Location"] == "jobs"


async def test_the_page_may_load_nothing_from_elsewhere(api: Api) -> None:
    response = await api.client.get("/jobs", headers={"Accept": "text/html"})
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert "math" in await response.get_data(as_text=True)


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Basic token", "Bearer tokens", "Bearer ä"])
async def test_without_the_token_everything_is_401(api: Api, given: str) -> None:
    guarded = Api(api.bench, Settings(api_token="token"))
    for method, path in [
        ("GET", "/jobs"),
        ("POST", "/job"),
        ("GET", "/job/x"),
        ("DELETE", "/job/x"),
    ]:
        response = await guarded.client.open(path, method=method, headers={"Authorization": given})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_probe_needs_no_token_and_asks_redis(api: Api) -> None:
    guarded = Api(api.bench, Settings(api_token="token"))
    response = await guarded.client.get("/")
    assert (response.status_code, response.headers["Location"]) == (302, "jobs")
    api.bench.away = True
    assert (await guarded.client.get("/")).status_code == 503


async def test_with_the_token_all_is_as_ever_and_the_page_may_ask_for_it(api: Api) -> None:
    guarded = Api(api.bench, Settings(api_token="token"))
    for given in ("Bearer token", "bearer token"):
        assert (await guarded.client.get("/jobs", headers={"Authorization": given})).status_code == 200
    assert (await guarded.client.get("/jobs", headers={"Accept": "text/html"})).status_code == 200


@pytest.mark.parametrize("listens_at", ["127.0.0.1", "0.0.0.0", "queue.lan"])
async def test_without_a_token_no_name_is_served_that_others_may_lead_here(api: Api, listens_at: str) -> None:
    there = Api(api.bench, Settings(host=listens_at))
    for host, status in [
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:9000", 200),
        ("api:8080", 200),
        ("queue.lan:8080", 200 if listens_at == "queue.lan" else 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ]:
        response = await there.client.get("/jobs", headers={"Host": host})
        assert (host, response.status_code) == (host, status)


# ── E-mail, with a local SMTP server ────────────────────────────────────────────────────────────


class Mailbox:
    """What an SMTP server received; it refuses the address of nobody."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def handle_RCPT(self, _s: Any, _x: Any, envelope: Any, address: str, _o: Any) -> str:  # noqa: N802
        if address.startswith("nobody@"):
            return "550 no such mailbox"
        if address.startswith("busy@"):
            return "450 try again later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _s: Any, _x: Any, envelope: Any) -> str:  # noqa: N802
        self.messages.append(envelope)
        return "250 OK"


@pytest.fixture
def smtp_server() -> Iterator[Callable[..., tuple[Mailbox, str]]]:
    """Starts an SMTP server: what it receives, and its address."""
    servers: list[Controller] = []

    def start(**options: Any) -> tuple[Mailbox, str]:
        box, port = Mailbox(), free_port()
        servers.append(Controller(box, hostname="127.0.0.1", port=port, **options))
        servers[-1].start()
        return box, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def mailbox(handler: Register, smtp_server: Callable[..., tuple[Mailbox, str]]) -> Mailbox:
    box, address = smtp_server()
    jobqueue.send_email_through(f"smtp://{address}", "queue@example.com")
    return box


EMAIL = {"to": "user@example.com", "subject": "Hellö", "body": "Welcome!\n"}


async def test_email_is_sent_through_the_smtp_server(mailbox: Mailbox) -> None:
    await HANDLERS["email"](EMAIL)
    [envelope] = mailbox.messages
    assert (envelope.mail_from, envelope.rcpt_tos) == ("queue@example.com", ["user@example.com"])
    assert b"Welcome!" in envelope.content


@pytest.mark.parametrize("field", ["to", "subject"])
async def test_email_with_a_line_break_in_a_header_is_refused(mailbox: Mailbox, field: str) -> None:
    with pytest.raises(ValueError, match="linefeed"):
        await HANDLERS["email"](EMAIL | {field: "a@example.com\nBcc: b@example.com"})
    assert mailbox.messages == []


@pytest.mark.parametrize("field", ["to", "subject"])
@pytest.mark.parametrize(
    "encoding", ["q?x=0D=0ABcc:_nobody=40example.com", "b?eA0KQmNjOiBub2JvZHlAZXhhbXBsZS5jb20="]
)
async def test_a_header_cannot_be_smuggled_into_an_email_in_an_encoded_word(
    mailbox: Mailbox, field: str, encoding: str
) -> None:
    word = f"=?utf-8?{encoding}?="
    payload = EMAIL | {field: word if field == "subject" else f"{word} <user@example.com>"}
    with suppress(ValueError):
        await HANDLERS["email"](payload)
    for envelope in mailbox.messages:  # what arrives, if anything does
        head = envelope.content.partition(b"\r\n\r\n")[0].lower()
        assert b"\nbcc" not in head
        assert envelope.rcpt_tos == ["user@example.com"]


async def test_a_password_is_not_sent_over_an_unencrypted_connection_to_another_machine(
    handler: Register, smtp_server: Callable[..., tuple[Mailbox, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    box, address = smtp_server()
    monkeypatch.setattr(jobqueue, "LOOPBACK", ())
    jobqueue.send_email_through(f"smtp://me:secret@{address}", "queue@example.com")
    with pytest.raises(smtplib.SMTPNotSupportedError, match="unencrypted"):
        await HANDLERS["email"](EMAIL)
    assert box.messages == []


@pytest.mark.parametrize(
    ("user", "error"), [("nobody", jobqueue.Unrecoverable), ("busy", smtplib.SMTPException)]
)
async def test_an_address_refused_for_good_is_unrecoverable_and_a_busy_server_is_not(
    mailbox: Mailbox, user: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await HANDLERS["email"](EMAIL | {"to": f"{user}@example.com"})


async def test_a_refusal_of_the_smtp_server_is_the_error_of_the_job(
    mailbox: Mailbox, bench: Bench, nursery: trio.Nursery
) -> None:
    pool = WorkerPool(bench.store, Settings())
    pool.open()
    nursery.start_soon(jobqueue.work, pool)
    payload = json.dumps(EMAIL | {"to": "nobody@example.com"})
    job_id = await submit_typed(bench, pool, "email", payload, max_retries=0)
    await pool.waiters.setdefault(job_id, trio.Event()).wait()
    assert "no such mailbox" in bench.job(job_id)["error"]


async def test_a_refusal_of_one_of_two_recipients_is_logged(
    mailbox: Mailbox, caplog: pytest.LogCaptureFixture
) -> None:
    await HANDLERS["email"](EMAIL | {"to": "user@example.com, nobody@example.com"})
    assert mailbox.messages[0].rcpt_tos == ["user@example.com"]
    assert "the SMTP server refused: nobody@example.com" in caplog.text


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
async def test_email_goes_over_tls_with_user_and_password_and_to_nobody_else(
    handler: Register,
    smtp_server: Callable[..., tuple[Mailbox, str]],
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    def authenticate(_s: Any, _x: Any, _e: Any, _m: str, data: Any) -> AuthResult:
        right = (data.login, data.password) == (b"me@example.com", b"p:ss/word")
        return AuthResult(success=right, handled=False)

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    options: dict[str, Any] = {"tls_context": tls, "require_starttls": True, "auth_required": True}
    if scheme == "smtps":
        options = {"ssl_context": tls, "auth_require_tls": False}
    box, address = smtp_server(authenticator=authenticate, **options)
    jobqueue.send_email_through(f"{scheme}://me%40example.com:p%3Ass%2Fword@{address}", "queue@example.com")
    await HANDLERS["email"](EMAIL)
    assert len(box.messages) == 1
    jobqueue.send_email_through(f"{scheme}://me%40example.com:wrong@{address}", "queue@example.com")
    with pytest.raises(smtplib.SMTPAuthenticationError):
        await HANDLERS["email"](EMAIL)
    monkeypatch.delenv("SSL_CERT_FILE")
    jobqueue.send_email_through(f"{scheme}://me%40example.com:p%3Ass%2Fword@{address}", "queue@example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        await HANDLERS["email"](EMAIL)
    assert len(box.messages) == 1


# ── The program as a whole ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["memory", "redis"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /jobs HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
         b"HTTP2-Settings: abc\r\n\r\n", b"HTTP/1.1 200"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"HTTP/1.1 505"),
        (b"GET ?x HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
         b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n\r\n", b"HTTP/1.1 404"),
    ],
)  # fmt: skip
def test_an_odd_request_is_answered_in_http_1(start: Start, request_: bytes, status: bytes) -> None:
    program = start()
    with socket.create_connection(("127.0.0.1", program.port), timeout=30) as connection:
        connection.sendall(request_)
        received = b""
        while b"\r\n\r\n" not in received and (data := connection.recv(65_536)):
            received += data
    assert received.startswith(status)
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0


@pytest.mark.parametrize("grace", ["0", "20"])
def test_a_signal_during_the_start_is_heeded_after_it(grace: str) -> None:
    code = """if True:
        import os, signal, jobqueue
        jobqueue.EXIT_SECONDS = 20  # it is to end by itself
        set_up, pid = jobqueue.set_up_logging, os.getpid()
        jobqueue.set_up_logging = lambda level: (set_up(level), os.kill(pid, signal.SIGTERM))
        jobqueue.main()"""
    command = [sys.executable, "-c", code, "--port", "0", "--shutdown-grace-seconds", grace]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=MODULE.parent)
    assert (run.returncode, "Traceback" in run.stderr) == (0, False)
    assert run.stderr.endswith("stopped\n")


def test_a_running_job_is_finished_at_shutdown_and_a_waiting_one_is_kept(
    start: Start, redis_server: RedisServer
) -> None:
    program = start("--workers", "1", REDIS_URL=redis_server.url)
    running, waiting = program.submit("long", seconds=0.7), program.submit("math", a=1, b=2)
    eventually(lambda: program.job(running)["status"] != "pending")
    assert program.stop() == 0
    again = start(REDIS_URL=redis_server.url)
    assert again.job(running)["status"] == "completed"
    assert again.ended(waiting)["result"] == 3


def test_a_second_signal_releases_what_still_runs(start: Start, redis_server: RedisServer) -> None:
    program = start(REDIS_URL=redis_server.url)
    running = program.submit("long", seconds=60)
    eventually(lambda: program.job(running)["status"] == "processing")
    program.process.send_signal(signal.SIGINT)
    eventually(lambda: program.logged("SIGINT"))
    assert program.stop() == 0
    client = redis_server.client
    assert client.lrange("{jobqueue}:queue", 0, -1) == [running]
    assert client.hget(f"{{jobqueue}}:job:{running}", "attempts") == "0"


def test_idle_shutdown_does_not_wait_for_keep_alive_connections(start: Start) -> None:
    program = start("--shutdown-grace-seconds", "60")
    with socket.create_connection(("127.0.0.1", program.port)) as idle:
        idle.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(10_000).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - begun < 30  # the grace is 60


def test_it_waits_for_redis_with_one_line_and_never_uses_memory(
    start: Start, own_redis: Callable[..., RedisServer]
) -> None:
    server = own_redis()
    server.kill()
    program = start(REDIS_URL=server.url)
    eventually(lambda: program.logged("Redis is away"))
    for _ in range(20):  # each makes it try again
        assert program.call("POST", "/job", GOOD)[0] == 503
    assert len([line for line in program.lines if "Redis" in line]) == 1
    server.start()
    eventually(lambda: program.logged("Redis is back"))
    assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0


def test_jobs_are_run_by_whoever_is_free_and_a_submission_wakes_other_instances(
    start: Start, redis_server: RedisServer
) -> None:
    api = start("--workers", "0", REDIS_URL=redis_server.url)
    worker = start("--workers", "2", REDIS_URL=redis_server.url)
    job_id = api.submit("math", a=20, b=22)
    assert api.ended(job_id)["result"] == 42
    eventually(lambda: job_id in worker.log)
    assert job_id not in api.log


def test_a_port_in_use_is_one_clear_line(start: Start) -> None:
    program = start()
    command = [sys.executable, str(jobqueue.__file__), "--port", str(program.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"port {program.port}" in second.stderr


def test_the_log_names_the_job_of_every_line_that_is_said_while_it_runs(start: Start) -> None:
    program = start()
    job_id = program.submit("email", to="a@example.com", subject="s", body="b")
    program.ended(job_id)
    eventually(lambda: program.logged(f"job {job_id}: email, attempt 1, completed"))
    assert program.logged(f"job {job_id}: email, attempt 1 of 4")
    assert program.logged(f"job {job_id}: simulated e-mail to 'a@example.com'")


def test_a_foreign_address_without_a_token_is_one_warning(start: Start) -> None:
    assert start("--host", "0.0.0.0").logged("WARNING anybody who reaches 0.0.0.0 may use")
    assert not start("--host", "0.0.0.0", API_TOKEN="secret").logged("WARNING")


def test_a_bug_in_a_task_ends_the_program_with_a_traceback_and_status_1(tmp_path: Path) -> None:
    module = tmp_path / "broken.py"
    module.write_text(
        "import jobqueue\n"
        "async def upkeep(pool):\n"
        "    raise ZeroDivisionError('a bug')\n"
        "jobqueue.heartbeat = upkeep\n"
        "jobqueue.main()\n"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(jobqueue.__file__).parent), "PORT": "0"}
    run = subprocess.run([sys.executable, module], env=environ, capture_output=True, text=True, timeout=30)
    assert run.returncode == 1
    assert "ZeroDivisionError: a bug" in run.stderr


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
    return f"{path} {width} {pool}"

if __name__ == "__main__":
    jobqueue.main(resources())
"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    (tmp_path / "my_queue.py").write_text(FORK)
    return tmp_path / "my_queue.py"


BESIDE = {"PYTHONPATH": str(MODULE.parent)}


def test_resources_are_there_before_the_first_job_and_until_after_the_last(start: Start, fork: Path) -> None:
    program = start(module=fork, **BESIDE)
    job_id = program.submit("resize", path="a.png")
    assert program.ended(job_id)["result"] == "a.png 800 a pool"
    assert program.stop() == 0
    order = [program.log.index(text) for text in ("entered", "listening", "completed", "left", "stopped")]
    assert order == sorted(order)


def test_a_fork_can_be_imported_and_help_and_errors_name_its_file(fork: Path) -> None:
    environ = os.environ | BESIDE
    for flags, status, text in [
        (["-c", "import my_queue; print(my_queue.resize('a'))"], 1, "name 'pool' is not defined"),
        ([str(fork), "--help"], 0, "usage: my_queue.py"),
        ([str(fork), "--port", "x"], 2, "my_queue.py: PORT must be a whole number"),
        ([str(fork), "--version"], 0, jobqueue.__version__),
    ]:
        command = [sys.executable, *flags]
        run = subprocess.run(command, env=environ, cwd=fork.parent, capture_output=True, text=True)
        assert (run.returncode, text in run.stdout + run.stderr) == (status, True), run


def test_a_redis_with_another_layout_is_refused_by_one_clear_line(
    start: Start, redis_server: RedisServer
) -> None:
    assert start(REDIS_URL=redis_server.url).call("GET", "/jobs?limit=1")[0] == 200
    eventually(lambda: redis_server.client.get(PREFIX + "layout") == jobqueue.LAYOUT)
    redis_server.client.set(PREFIX + "layout", "99")
    program = start(REDIS_URL=redis_server.url)
    assert program.process.wait(30) == 1
    eventually(lambda: program.logged("CRITICAL Redis has jobs of another version: layout 99"))
    assert "Traceback" not in program.log


def test_passwords_do_not_reach_the_log(start: Start) -> None:
    program = start(REDIS_URL="redis://:secret@127.0.0.1:1/0")
    assert program.logged("redis://127.0.0.1:1/0")
    assert program.stop() == 0
    assert "secret" not in program.log
