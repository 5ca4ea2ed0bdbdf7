"""A job queue service in one module: a REST API, Trio workers, and Redis to keep the jobs.

The promise
    A job whose POST was answered with 202 is run to its end, whatever dies in between. It is run at
    least once, and at every instant it is in exactly one of five places:

        POST /job ──► queue ───claim───► processing ──complete──► completed
                      ▲   ▲                │  │  │
                  due │   └─release, sweep─┘  │  └──fail, sweep─► failed
                    delayed ◄─────retry───────┘

    A shutdown releases what it cannot finish. The sweep takes back what was left by a worker that died,
    once its lease ended. A POST with a delay leads to `delayed`; a cancel fails what waits or runs.

The keys, all behind the prefix `{jobqueue}:` (the braces keep them in one slot of a Redis Cluster)
    job:<id>           hash         the job itself: FIELDS, and the token of its last claim
    queue              list         ids ready to run: LPUSH in, RPOP out, so first in, first out
    delayed            sorted set   ids that wait, by the time they are due (in milliseconds, like all times)
    processing         sorted set   ids being run, by the time their lease ends
    completed, failed  sorted sets  finished ids, by the time they finished
    history            sorted set   every id, by a number above all others in it: the order of submission
    idempotency:<hash> string       what was answered to a submission with that key, for 24 hours
    wake               channel      a message whenever the queue stops being empty

To read it
    From top to bottom; each part uses only parts above it. Settings and Jobs are the words of the
    language, Handlers the work itself. AutoPipeline is where Trio meets Redis. Store has one small Lua
    script for each transition. Workers claim, run and report. HTTP is the three endpoints; and `serve`,
    at the end, is the tree of nurseries that starts it all and stops it in the right order.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import inspect
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import smtplib
import socket
import ssl
import sys
import threading
import traceback
import types
import typing
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from email.message import EmailMessage
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlencode, urlsplit
from weakref import WeakValueDictionary

import hiredis
import hypercorn
import hypercorn.trio
import hypercorn.trio.run
import outcome as result_of
import redis
import trio
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import Response, has_request_context, redirect, render_template, request
from quart.asgi import ASGIHTTPConnection
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug import exceptions as http
from werkzeug.datastructures import WWWAuthenticate

log = logging.getLogger("jobqueue")
current_job: ContextVar[str] = ContextVar("current_job", default="")  # the id of the job that a task runs

# ── Settings ────────────────────────────────────────────────────────────────────────────────────


def _setting(default: Any, meaning: str, low: float = 0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


SMTP_URL = r"smtps?://([^/@?#\s]*@)?(\[[0-9a-f:.]+\]|[^/@?#\s:]+)(:[0-9]+)?"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting is an environment variable, `PORT`, and a flag that beats it, `--port`.

    Raises ValueError, naming the setting, when a value is out of range.
    """

    redis_url: str = _setting("", "where jobs are kept: redis://, rediss:// or unix://; unset: in memory")
    host: str = _setting("127.0.0.1", "the address to listen on")
    port: int = _setting(8080, "the port to listen on; 0: any free one", 0, 65_535)
    workers: int = _setting(10, "jobs run at the same time; 0: only serve the API", 0, 10_000)
    max_retries: int = _setting(3, "runs after a failed first one, for a job that does not say", 0, 100)
    retry_delay_seconds: float = _setting(0.5, "wait before the first retry; doubles with each", 0, 3600)
    job_timeout_seconds: float = _setting(300.0, "longest run, for a job that does not say", 0.001, 604_800)
    lease_seconds: float = _setting(15.0, "a worker silent for so long has lost its job", 0.5, 3600)
    shutdown_grace_seconds: float = _setting(20.0, "what running jobs get to finish at shutdown", 0, 86_400)
    retention_seconds: float = _setting(604_800.0, "how long finished jobs are kept; 0: for ever", 0, 1e10)
    max_body_bytes: int = _setting(1_048_576, "the largest request body", 1024, 1 << 30)
    api_token: str = _setting("", "what clients must send as Authorization: Bearer; unset: nothing")
    smtp_url: str = _setting("", "smtp://user:password@host:port or smtps://; unset: e-mail is simulated")
    smtp_from: str = _setting("jobqueue@localhost", "the sender of e-mail")
    log_level: str = _setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if not isinstance(value, str) and not low <= value <= high:
                raise ValueError(f"{f.name.upper()} must be from {low:,} to {high:,}, not {value}")
        if self.log_level.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError(f"LOG_LEVEL must be debug, info, warning or error, not {self.log_level!r}")
        if not re.fullmatch("[!-~]*", self.api_token):
            raise ValueError("API_TOKEN must be visible ASCII characters, without spaces")
        if self.smtp_url and not re.fullmatch(SMTP_URL, self.smtp_url):
            raise ValueError("SMTP_URL must be smtp[s]://[user:password@]host[:port], percent-encoded")
        if not re.fullmatch(r"[^@\x00-\x1f]+@[^@\x00-\x1f]+", self.smtp_from):
            raise ValueError(f"SMTP_FROM must be an address such as jobs@example.com, not {self.smtp_from!r}")
        with _naming("SMTP_URL"):
            urlsplit(self.smtp_url).port  # noqa: B018
        if self.redis_url:
            with _naming("REDIS_URL"):
                pool = redis.ConnectionPool.from_url(self.redis_url)
                pool.connection_class(**pool.connection_kwargs)

    @classmethod
    def read(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
        """The settings that flags and variables ask for; a bad one ends the program with status 2."""
        parser = argparse.ArgumentParser(
            prog="jobqueue.py",
            usage="%(prog)s [--help] [--SETTING VALUE ...]",
            description="A job queue service. Each setting is a flag, or the environment variable beside it.",
        )
        for f in fields(cls):
            default = f"{f.default:.12g}" if isinstance(f.default, float) else f.default or "unset"
            text = f"{f.metadata['meaning']} ({f.name.upper()}, default: {default})"
            flag, variable = f"--{f.name.replace('_', '-')}", environ.get(f.name.upper(), "")
            parser.add_argument(flag, metavar="VALUE", default=variable, help=text)
        texts = {name: text for name, text in vars(parser.parse_args(argv)).items() if text}
        try:
            kinds = {f.name: type(f.default) for f in fields(cls)}
            return cls(**{name: _convert(name.upper(), kinds[name], text) for name, text in texts.items()})
        except ValueError as error:
            parser.exit(2, f"jobqueue.py: {error}\n")


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ValueError(f"{setting}: {error}") from None


def _convert(name: str, kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, not {text!r}") from None


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


class Status(StrEnum):
    """Where a job is in its life. One that waits for a retry or for its delay is pending too."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


ENDED = {Status.COMPLETED, Status.FAILED}


class NewJob(NamedTuple):
    """A job as it is submitted."""

    id: str
    job_type: str
    payload: str  # an object, as JSON
    max_retries: int
    timeout: float  # seconds for one run
    delay: float  # seconds before the first run


class Claim(NamedTuple):
    """A job in the hands of a worker."""

    token: str  # the name of this claim, which no other ever had
    behind: int  # jobs that were left in the queue
    id: str
    job_type: str
    payload: str  # an object, as JSON
    attempts: int  # runs begun, this one included
    max_retries: int
    timeout: float  # seconds for one run


def _json_time(milliseconds: str) -> str:
    moment = datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    return f'"{moment.isoformat(timespec="milliseconds")[:-6]}Z"'


_encode = json.encoder.encode_basestring  # of a text
_decode = json.JSONDecoder().raw_decode  # the quick way, for what was encoded here
# What JSONEncoder.encode makes anew for each value, which takes longer than to use it: its arguments are
# markers, default, encoder, indent, separators, sort_keys, skipkeys and allow_nan.
_parts = cast(Any, json.encoder).c_make_encoder(
    None, json.JSONEncoder().default, _encode, None, ": ", ", ", False, False, False
)


def to_json(value: Any) -> str:
    """The JSON of a value.

    Raises TypeError if it has what JSON has not, ValueError if it has a number that is not finite, or half a
    surrogate pair, and RecursionError if it is nested too deeply, or in itself.
    """
    text = "".join(_parts(value, 0))
    text.encode()
    return text


# What is stored of a job and shown of it, in this order, and how each is written in JSON. Payload and
# result are JSON already: they pass through untouched, however deep they are and whatever numbers they hold.
FIELDS: dict[str, Callable[[str], str]] = {
    "job_type": _encode,
    "payload": str,
    "status": _encode,
    "attempts": str,
    "max_retries": str,
    "timeout": str,
    "result": str,
    "error": _encode,
    "created_at": _json_time,
    "due_at": _json_time,
    "started_at": _json_time,
    "finished_at": _json_time,
}


def job_json(job_id: str, values: Iterable[str | None]) -> str:
    """The JSON of a job, from its stored values in the order of FIELDS; what is not known yet is null."""
    shown = (
        f'"{name}": {"null" if value is None else write(value)}'
        for (name, write), value in zip(FIELDS.items(), values, strict=True)
    )
    return f'{{"id": "{job_id}", {", ".join(shown)}}}'


BACKOFF_CAP_SECONDS = 300.0


def backoff(attempt: int, first: float, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait after a failed `attempt` (1, 2, …) before the next: `first`, doubled each time, capped.

    Up to half of it is taken off at random, so that jobs which failed together do not return together
    ("equal jitter", AWS Architecture Blog, *Exponential Backoff And Jitter*, 2015).
    """
    return min(BACKOFF_CAP_SECONDS, math.ldexp(first, attempt - 1)) * (1 - jitter() / 2)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────

JSON_TYPES = {str, int, float, bool, list, dict, types.NoneType}


class Parameter(NamedTuple):
    """A field of a payload, as the signature of a handler has it."""

    annotation: str  # as it is written there, or empty
    kinds: set[type]  # of the values that fit; empty: all
    required: bool
    default: str  # as JSON, or empty


@dataclass(frozen=True)
class Handler:
    """A function that runs one type of job, and its signature: the contract for the payload."""

    function: Callable[..., Any]
    doc: str
    parameters: Mapping[str, Parameter]
    is_async: bool

    def check(self, payload: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the parameter, unless `payload` fits the signature."""
        known = ", ".join(self.parameters) or "none"
        for name in payload:
            if name not in self.parameters:
                raise ValueError(f"payload.{name} is not a parameter; they are: {known}")
        for name, parameter in self.parameters.items():
            if name not in payload:
                if parameter.required:
                    raise ValueError(f"payload.{name} is missing; the parameters are: {known}")
            elif parameter.kinds and type(payload[name]) not in parameter.kinds:
                given = json.dumps(payload[name])[:80]
                raise ValueError(f"payload.{name} must be {parameter.annotation}, not {given}")

    async def __call__(self, payload: Mapping[str, Any]) -> Any:
        """Run the function: in this task if it is `async def`, in a thread if it is `def`.

        A thread cannot be interrupted: when this call is cancelled, the thread is abandoned.
        """
        if self.is_async:
            return await self.function(**payload)
        call = partial(self.function, **payload)
        # Its own limiter: abandoned threads must not use up those that others wait for.
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))


def _parameter(parameter: inspect.Parameter) -> Parameter:
    annotation, default, empty = parameter.annotation, parameter.default, parameter.empty
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(annotation)) if is_union else {annotation}
    if float in kinds:
        kinds.add(int)
    return Parameter(
        "" if annotation is empty else inspect.formatannotation(annotation),
        kinds if kinds <= JSON_TYPES else set(),  # what JSON cannot tell, such as `Path`, always fits
        default is empty,
        "" if default is empty else json.dumps(default, default=str),
    )


HANDLERS: dict[str, Handler] = {}
SMTP_SECONDS = 20.0  # longest wait for an SMTP server


Function = TypeVar("Function", bound=Callable[..., Any])


def handler(job_type: str) -> Callable[[Function], Function]:
    """Make a function the handler of `job_type`: its parameters are the fields of the payload.

        @handler("resize")
        def resize(path: str, width: int = 800) -> str: ...

    What it returns, which must be JSON, is the job's result; a raise is a failed attempt.
    """

    def register(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True).parameters
        if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in signature.values()):
            raise TypeError(f"the handler of {job_type!r} must have named parameters only")
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        parameters = {name: _parameter(p) for name, p in signature.items()}
        HANDLERS[job_type] = Handler(function, doc, parameters, inspect.iscoroutinefunction(function))
        return function

    return register


@handler("email")
async def email(to: str, subject: str, body: str) -> None:
    """Send an e-mail; simulated, since SMTP_URL is not set: a line in the log, and one second."""
    log.info("simulated e-mail to %r: %r, %d characters", to, subject, len(body))
    await trio.sleep(1)


def send_email_through(url: str, sender: str) -> None:
    """Make the handler of `email` a real one, which sends through the SMTP server at `url`."""
    server_url = urlsplit(url)
    tls = ssl.create_default_context()

    @handler("email")
    def email(to: str, subject: str, body: str) -> None:
        """Send an e-mail."""
        message = EmailMessage()  # which refuses a line break in a header
        message["From"], message["To"], message["Subject"] = sender, to, subject
        message.set_content(body)
        host, port = server_url.hostname or "", server_url.port or 0  # 0: the usual one
        with (
            smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=tls)
            if server_url.scheme == "smtps"
            else smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
        ) as server:
            server.ehlo()
            if server.has_extn("starttls"):
                server.starttls(context=tls)
            if server_url.username:
                server.login(unquote(server_url.username), unquote(server_url.password or ""))
            if refused := server.send_message(message):  # only some: a retry would send to the others again
                log.warning("the SMTP server refused: %s", ", ".join(refused))


@handler("math")
async def math_(a: int | str, b: int | str) -> int:
    """Add two integers, given as numbers or as strings."""
    return int(a) + int(b)


@handler("long")
async def long(seconds: float = 2) -> None:
    """Take a while."""
    await trio.sleep(seconds)


# ── AutoPipeline ────────────────────────────────────────────────────────────────────────────────
#
# redis-py's asyncio client does not run on Trio, and its blocking client would stop the event loop. The
# naive answer, a thread for each command, costs more than the command itself. So redis-py opens the
# connection, in a thread; then the socket is Trio's. And one task owns it, a carrier: while its round trip
# is under way the commands of all other tasks gather, and the next one carries them all. Under load the
# batches grow by themselves. There are two carriers, so that one batch is in Redis while the replies to
# the other are worked on: whoever finds both idle takes half, and leaves the rest to the other.
#
# A command that was handed over is never abandoned: its caller cannot be cancelled before the reply is
# there. Otherwise a claim could take a job out of the queue for a worker that is already gone.

Command = tuple[str | int, ...]
Carrier = Callable[[Sequence[Command]], Awaitable[list[Any]]]

CONNECTIONS = 2  # each with its carrier; a third makes the batches too small
REPLY_SECONDS = 4.0  # longest wait for Redis, connecting included; so the API answers 503 within 6 s
NOT_YET = object()
CUT_OFF = redis.ConnectionError("it was cut off")


class RedisConnection:
    """A connection to Redis on which Trio does the waiting. It connects when first used, and again.

    `watch` looks after it, in a task of its own: a cancel scope for each exchange would cost a seventh of
    all time.
    """

    def __init__(self, url: str) -> None:
        pool = redis.ConnectionPool.from_url(url)
        timeouts = {"socket_timeout": REPLY_SECONDS, "socket_connect_timeout": REPLY_SECONDS}
        never = Retry(NoBackoff(), 0)  # who may try again is not for the connection to say
        options = pool.connection_kwargs | timeouts | {"protocol": 2, "retry": never}  # not those of the URL
        self._new_connection = partial(pool.connection_class, **options)
        self._connection: Any = None
        self._deadline = math.inf  # of the exchange under way

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands and receive their replies; a refusal is a ResponseError among them.

        Raises redis.ConnectionError or TimeoutError; then nobody knows which were carried out.
        """
        replies: list[Any] = []
        self._deadline = trio.current_time() + REPLY_SECONDS
        try:
            if self._connection is None:
                await self._connect()
            await self._send(b"".join([hiredis.pack_command(cast(Any, command)) for command in commands]))
            while len(replies) < len(commands):
                if (reply := self._reader.gets()) is NOT_YET:
                    await self._receive()
                else:
                    replies.append(reply)
        except (trio.TooSlowError, trio.ClosedResourceError):
            raise redis.TimeoutError(f"no reply within {REPLY_SECONDS:g} s") from None
        except (OSError, UnicodeError) as error:  # which is what an impossible host name gives
            raise redis.ConnectionError(str(error)) from None
        finally:
            self._deadline = math.inf
            if len(replies) < len(commands):
                self._hang_up()
        return replies

    async def watch(self) -> None:
        """End each exchange whose time is up; between exchanges, hang up once Redis has."""
        while True:
            await trio.sleep(REPLY_SECONDS / 16)
            if self._connection is not None and self._deadline <= trio.current_time():
                trio.lowlevel.notify_closing(self._socket)  # a ClosedResourceError for who waits for it
            elif self._connection is not None and self._deadline == math.inf and self._is_cut_off():
                self._hang_up()

    def _is_cut_off(self) -> bool:
        try:  # what comes unasked is the end, or that of TLS
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        return True

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    async def message(self) -> Any:
        """The next message of a channel, however long it takes."""
        while (reply := self._reader.gets()) is NOT_YET:
            await self._receive()
        return reply

    async def _receive(self) -> None:
        data = None
        while data is None:
            await trio.lowlevel.wait_readable(self._socket)
            with suppress(BlockingIOError, ssl.SSLWantReadError):
                data = self._socket.recv(65_536)  # more than a TLS record: nothing stays behind in OpenSSL
        if not data:
            raise redis.ConnectionError("Redis closed the connection")
        self._reader.feed(data)

    async def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self._socket)

    async def _connect(self) -> None:
        """TLS, names, passwords and databases are redis-py's business."""
        connection: Any = self._new_connection()
        with trio.fail_at(self._deadline):
            await trio.to_thread.run_sync(connection.connect, abandon_on_cancel=True)
        self._socket: socket.socket = connection._sock
        self._socket.setblocking(False)
        self._reader = hiredis.Reader(redis.ConnectionError, _refusal, "utf-8", "replace", NOT_YET)
        self._connection = connection


def _refusal(text: str) -> Exception:
    kind = redis.exceptions.NoScriptError if text.startswith("NOSCRIPT") else redis.ResponseError
    return kind(text)


def memory() -> Carrier:
    """Carries commands to a Redis in the memory of this process."""
    import fakeredis  # only here: with a real Redis it is not needed

    client = fakeredis.FakeRedis(decode_responses=True)

    def exchange(commands: Sequence[Command]) -> list[Any]:
        pipe: Any
        with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return list(pipe.execute(raise_on_error=False))

    one_by_one = trio.CapacityLimiter(1)
    return lambda commands: trio.to_thread.run_sync(exchange, commands, limiter=one_by_one)


class AutoPipeline:
    """Redis for many tasks at once.

    >>> pipeline = AutoPipeline(RedisConnection("redis://localhost").exchange)
    >>> nursery.start_soon(pipeline.run)
    >>> await pipeline.call("INCR", "a")
    1
    """

    def __init__(self, *carriers: Carrier) -> None:
        self._carriers = carriers
        self._idle: list[trio.lowlevel.Task] = []  # those of the carriers
        self._commands: list[Command] = []
        self._callers: list[trio.lowlevel.Task] = []  # of those commands
        self._away = False

    async def call(self, *command: str | int) -> Any:
        """The reply to a command.

        Raises redis.ResponseError if it was refused, and redis.ConnectionError or TimeoutError when it is
        unknown whether it was carried out.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._commands.append(command)
        self._callers.append(trio.lowlevel.current_task())
        if len(self._commands) == 1:
            self._wake_carrier()
        reply = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def run(self) -> None:
        """Carry the commands. Cancel it only when nobody calls any more."""
        async with trio.open_nursery() as nursery:
            for carrier in self._carriers:
                nursery.start_soon(self._carry, carrier)

    def _wake_carrier(self) -> None:
        if self._commands and self._idle:
            trio.lowlevel.reschedule(self._idle.pop())

    async def _carry(self, carrier: Carrier) -> None:
        while True:
            while not self._commands:
                self._idle.append(trio.lowlevel.current_task())
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            share = -(-len(self._commands) // (1 + len(self._idle)))
            commands, self._commands = self._commands[:share], self._commands[share:]
            callers, self._callers = self._callers[:share], self._callers[share:]
            self._wake_carrier()  # for the rest, if there is any
            lost: redis.RedisError | None = CUT_OFF
            try:
                replies, lost = await carrier(commands), None
            except redis.RedisError as error:
                lost = error
            finally:  # after a bug too, nobody may wait for ever
                if lost:
                    # What came meanwhile shares the fate: it must not wait for another time-out.
                    callers, self._callers, self._commands = callers + self._callers, [], []
                    replies = [type(lost)(*lost.args) for _ in callers]
                for caller, reply in zip(callers, replies, strict=True):
                    trio.lowlevel.reschedule(caller, result_of.Value(reply))
            self._note(lost)

    def _note(self, error: redis.RedisError | None) -> None:
        if error and not self._away:
            log.warning("Redis is away: %s; waiting for it", error)
        elif self._away and not error:
            log.info("Redis is back")
        self._away = error is not None


# ── Store ───────────────────────────────────────────────────────────────────────────────────────
#
# Every transition is one Lua script, so it happens whole or not at all, and first checks the place that
# the job leaves. Three rules hold for all of them.
#
# The time is Redis's, never the caller's: an instance with a wrong clock must not end others' leases.
#
# A claim has a token, "<instance>:<number>", that no other claim ever had. Reports carry it. One with
# another token than the job's is refused; one that was sent twice, because its reply was lost, finds the
# token but no longer the status, and changes nothing. A claim whose reply was lost is different: nobody
# knows of it. So an instance tells with its `extend` which tokens it knows, and gets its others released.
#
# The first write of a script takes away. Redis without memory refuses scripts whose first write may add:
# that shall meet `submit`, whose client can be told, and never a report.

LUA_CLOCK = "local time = redis.call('TIME') local now = time[1] * 1000 + math.floor(time[2] / 1000)"

LUA_COMMON = """
local P = KEYS[1]

local function push(command, id)  -- LPUSH: last in line; RPUSH: first
  if redis.call(command, P .. 'queue', id) == 1 then redis.call('PUBLISH', P .. 'wake', '') end
end

local function take_back(id, attempts)  -- from a worker, whose late report will find no token
  redis.call('HDEL', P .. 'job:' .. id, 'token')
  redis.call('HSET', P .. 'job:' .. id, 'status', 'pending', 'attempts', attempts)
  push('RPUSH', id)
end

local function finish(id, status, field, value)
  redis.call('HSET', P .. 'job:' .. id, 'status', status, field, value, 'finished_at', now)
  redis.call('ZADD', P .. status, now, id)
end

local function claim(token, lease)  -- a Claim; false without a token, or when the queue is empty
  local id = token ~= '' and redis.call('RPOP', P .. 'queue')
  while id do
    local job = P .. 'job:' .. id
    local held = redis.call('HMGET', job, 'job_type', 'payload', 'attempts', 'max_retries', 'timeout')
    if held[1] then
      held[3] = held[3] + 1
      redis.call('HSET', job, 'status', 'processing', 'attempts', held[3], 'token', token, 'started_at', now)
      redis.call('ZADD', P .. 'processing', now + lease, id)
      return {redis.call('LLEN', P .. 'queue'), id, unpack(held)}
    end
    id = redis.call('RPOP', P .. 'queue')  -- somebody deleted the job
  end
  return false
end

-- Report, then claim: a crash in between repeats a job, the other order would lose one.
local function report(change)  -- ARGV: id, token, next token or '', lease in ms, …
  local id, accepted = ARGV[1], 0
  local job = P .. 'job:' .. id
  local held = redis.call('HMGET', job, 'token', 'status', 'attempts', 'error')
  if held[1] == ARGV[2] then
    accepted = 1
    if held[2] == 'processing' then  -- otherwise this very report came before
      redis.call('ZREM', P .. 'processing', id)
      change(id, job, held)
    end
  end
  return {accepted, claim(ARGV[3], ARGV[4])}
end
"""

SCRIPTS = {
    # key or '', what to keep for it, (id, job type, payload, retries, timeout, delay in ms) … → what is kept.
    # Sent again, it changes nothing.
    "submit": """
        local key = P .. 'idempotency:' .. ARGV[1]
        local kept = ARGV[1] ~= '' and redis.call('GET', key)
        if kept then return kept end
        local last = redis.call('ZREVRANGE', P .. 'history', 0, 0, 'WITHSCORES')
        local number = tonumber(last[2] or 0)
        for i = 3, #ARGV, 6 do
          local id, delay = ARGV[i], tonumber(ARGV[i + 5])
          local job = P .. 'job:' .. id
          if redis.call('EXISTS', job) == 0 then
            number = number + 1
            redis.call('HSET', job, 'job_type', ARGV[i + 1], 'payload', ARGV[i + 2], 'status', 'pending',
              'attempts', 0, 'max_retries', ARGV[i + 3], 'timeout', ARGV[i + 4], 'created_at', now)
            redis.call('ZADD', P .. 'history', number, id)
            if delay > 0 then
              redis.call('HSET', job, 'due_at', now + delay)
              redis.call('ZADD', P .. 'delayed', now + delay, id)
            else
              push('LPUSH', id)
            end
          end
        end
        if ARGV[1] ~= '' then redis.call('SET', key, ARGV[2], 'EX', 86400) end
        return ARGV[2]""",
    # token, lease in ms → a Claim or nothing
    "claim": "return claim(ARGV[1], ARGV[2])",
    # Reports, → whether it was accepted, and the next Claim or nothing. ARGV[5]: the result
    "complete": """
        return report(function(id, job, held)
          if held[4] then redis.call('HDEL', job, 'error') end
          finish(id, 'completed', 'result', ARGV[5])
        end)""",
    # … the error
    "fail": "return report(function(id) finish(id, 'failed', 'error', ARGV[5]) end)",
    # … the error, delay in ms
    "retry": """
        return report(function(id, job)
          redis.call('HSET', job, 'status', 'pending', 'error', ARGV[5], 'due_at', now + ARGV[6])
          redis.call('ZADD', P .. 'delayed', now + ARGV[6], id)
        end)""",
    # … nothing more: to the front of the queue, and the attempt does not count
    "release": "return report(function(id, _, held) take_back(id, held[3] - 1) end)",
    # instance, number of its latest claim, lease in ms, token … → now, and those that hold no job
    "extend": """
        local known, lost = {}, {}
        for i = 4, #ARGV do known[ARGV[i]] = true end
        for _, id in ipairs(redis.call('ZRANGE', P .. 'processing', 0, -1)) do
          local held = redis.call('HMGET', P .. 'job:' .. id, 'token', 'attempts')
          local instance, number = string.match(held[1] or '', '^(.*):(%d+)$')
          if known[held[1]] then
            known[held[1]] = nil
            redis.call('ZREM', P .. 'processing', id)
            redis.call('ZADD', P .. 'processing', now + ARGV[3], id)
          elseif instance == ARGV[1] and tonumber(number) <= tonumber(ARGV[2]) then
            redis.call('ZREM', P .. 'processing', id)
            take_back(id, held[2] - 1)
          end
        end
        for token in pairs(known) do lost[#lost + 1] = token end
        return {now, lost}""",
    # most jobs to move, until when to end leases, retention in ms → how many are ready to run, ms until
    # there is more to do (-1: not known of), and the jobs whose lease ended: id, type, attempts, new status
    "sweep": """
        local most, ended, more = tonumber(ARGV[1]), {}, false
        local function due(place, time)
          local ids = redis.call('ZRANGEBYSCORE', P .. place, '-inf', time, 'LIMIT', 0, most)
          more = more or #ids == most
          for _, id in ipairs(ids) do redis.call('ZREM', P .. place, id) end
          return ids
        end
        for _, id in ipairs(due('delayed', now)) do push('LPUSH', id) end
        for _, id in ipairs(now <= tonumber(ARGV[2]) and due('processing', now) or {}) do
          local job = P .. 'job:' .. id
          local held = redis.call('HMGET', job, 'attempts', 'max_retries', 'job_type')
          if held[1] and tonumber(held[1]) <= tonumber(held[2]) then
            take_back(id, held[1])
            ended[#ended + 1] = {id, held[3], held[1], 'pending'}
          elseif held[1] then
            redis.call('HDEL', job, 'token')
            finish(id, 'failed', 'error',
              'the worker died, or was silent for longer than its lease, in each attempt')
            ended[#ended + 1] = {id, held[3], held[1], 'failed'}
          end
        end
        for _, place in ipairs(tonumber(ARGV[3]) > 0 and {'completed', 'failed'} or {}) do
          for _, id in ipairs(due(place, now - ARGV[3])) do
            redis.call('ZREM', P .. 'history', id)
            redis.call('DEL', P .. 'job:' .. id)
          end
        end
        local next_due = redis.call('ZRANGE', P .. 'delayed', 0, 0, 'WITHSCORES')[2]
        local wait = more and 0 or next_due and math.max(0, next_due - now) or -1
        return {redis.call('LLEN', P .. 'queue'), wait, ended}""",
    # status or '' for all, cursor or '', limit, field … → next cursor or '', ids, their fields, counts
    "page": """
        local status, cursor, limit = ARGV[1], ARGV[2], ARGV[3] + 1  -- one more, which tells of the next page
        local ids, next_cursor = {}, ''
        local function behind_cursor(place)  -- of a sorted set; nothing when the cursor is not in it
          local rank = cursor == '' and -1 or redis.call('ZREVRANK', P .. place, cursor)
          return rank and redis.call('ZREVRANGE', P .. place, rank + 1, rank + limit)
        end
        if status == '' then
          local newest = cursor == '' and '+inf' or '(' .. cursor
          ids = redis.call('ZREVRANGEBYSCORE', P .. 'history', newest, '-inf', 'LIMIT', 0, limit)
        elseif status == 'pending' then  -- the delayed ones, then the queue
          local delayed = behind_cursor('delayed')
          local first = delayed and 0 or (redis.call('LPOS', P .. 'queue', cursor) or -2) + 1
          ids = delayed or {}
          if #ids < limit and first >= 0 then
            for _, id in ipairs(redis.call('LRANGE', P .. 'queue', first, first + limit - #ids - 1)) do
              ids[#ids + 1] = id
            end
          end
        elseif status == 'processing' then  -- by their start: there, each `extend` changes the order
          local function start(id)
            return (redis.call('HGET', P .. 'job:' .. id, 'started_at') or '') .. id
          end
          local last, starts = cursor == '' and '~' or start(cursor), {}
          for _, id in ipairs(redis.call('ZRANGE', P .. 'processing', 0, -1)) do
            starts[id] = start(id)
            if starts[id] < last then ids[#ids + 1] = id end
          end
          table.sort(ids, function(a, b) return starts[a] > starts[b] end)
          for i = #ids, limit + 1, -1 do ids[i] = nil end
        else
          ids = behind_cursor(status) or {}
        end
        if #ids == limit then
          ids[limit] = nil
          next_cursor = ids[limit - 1]
          if status == '' then next_cursor = redis.call('ZSCORE', P .. 'history', next_cursor) end
        end
        local jobs = {}
        for i, id in ipairs(ids) do jobs[i] = redis.call('HMGET', P .. 'job:' .. id, unpack(ARGV, 4)) end
        local counts = {redis.call('LLEN', P .. 'queue') + redis.call('ZCARD', P .. 'delayed')}
        for _, place in ipairs({'processing', 'completed', 'failed'}) do
          counts[#counts + 1] = redis.call('ZCARD', P .. place)
        end
        return {next_cursor, ids, jobs, counts}""",
    # id … → those of the jobs that have ended, or are unknown
    "ended": """
        local ended = {}
        for _, id in ipairs(ARGV) do
          local status = redis.call('HGET', P .. 'job:' .. id, 'status')
          if status ~= 'pending' and status ~= 'processing' then ended[#ended + 1] = id end
        end
        return ended""",
    # id → the status that it had; nothing for an unknown job. What waits or runs fails; its worker will see.
    "cancel": """
        local job = P .. 'job:' .. ARGV[1]
        local status = redis.call('HGET', job, 'status')
        if status == 'pending' or status == 'processing' then
          for _, place in ipairs({'processing', 'delayed'}) do redis.call('ZREM', P .. place, ARGV[1]) end
          if status == 'pending' then redis.call('LREM', P .. 'queue', -1, ARGV[1]) end
          redis.call('HDEL', job, 'token')
          finish(ARGV[1], 'failed', 'error', 'cancelled')
        end
        return status""",
}


class Outcome(NamedTuple):
    """What became of a claim: the transition to make, and what its script wants beside id and token."""

    claim: Claim
    transition: str  # complete, retry, fail or release
    arguments: tuple[str | int, ...] = ()


class Sweep(NamedTuple):
    """What a sweep found."""

    ready: int  # jobs in the queue
    wait: float  # seconds until a job is due, infinite when none is delayed
    ended: list[list[str]]  # id, type, attempts and new status of the jobs whose lease had ended


class Page(NamedTuple):
    """A part of a list of jobs."""

    cursor: str  # of the next page; empty on the last
    jobs: list[str]  # as JSON
    counts: dict[Status, int]  # of all jobs that are stored


class Store:
    """The state of all jobs. Every method is one atomic step; when its reply was lost, take it again.

    All raise redis.RedisError: ConnectionError or TimeoutError when Redis is away, ResponseError when it
    refuses. `clock` is Lua that sets `now`, in milliseconds; tests bring their own.
    """

    def __init__(self, pipeline: AutoPipeline, prefix: str = "{jobqueue}:", clock: str = LUA_CLOCK) -> None:
        self._pipeline = pipeline
        self.prefix = prefix
        self._texts = {name: "\n".join([clock, LUA_COMMON, lua]) for name, lua in SCRIPTS.items()}
        self._calls = {
            name: ("EVALSHA", hashlib.sha1(text.encode()).hexdigest(), 1, prefix)
            for name, text in self._texts.items()
        }

    async def _run(self, name: str, *arguments: str | int) -> Any:
        try:
            return await self._pipeline.call(*self._calls[name], *arguments)
        except redis.exceptions.NoScriptError:  # a new Redis, which did nothing
            for text in self._texts.values():
                await self._pipeline.call("SCRIPT", "LOAD", text)
            return await self._pipeline.call(*self._calls[name], *arguments)

    async def submit(self, jobs: Sequence[NewJob], key: str = "", request: str = "") -> list[str] | None:
        """Put jobs into the queue, or into `delayed`, all or none; their ids.

        With an idempotency key, the ids that the same request got under it in the last 24 hours; None if it
        was another request. `request` is what tells requests apart, a word without spaces.
        """
        ids = [job.id for job in jobs]
        arguments: list[str | int] = [key, " ".join([request, *ids]) if key else ""]
        for job in jobs:
            arguments += [*job[:4], str(job.timeout), _milliseconds(job.delay)]
        kept = await self._run("submit", *arguments)
        if not key:
            return ids
        first_request, *first_ids = kept.split(" ")
        return first_ids if first_request == request else None

    async def report_and_claim(
        self, outcome: Outcome | None, token: str, lease: float
    ) -> tuple[bool, Claim | None]:
        """Report if there is an outcome, and claim for `lease` seconds if there is a token.

        The answer: False if the report was refused, since its lease was lost; and the job, if there was one.
        """
        ms = _milliseconds(lease)
        if outcome:
            claim, transition, arguments = outcome
            accepted, claimed = await self._run(transition, claim.id, claim.token, token, ms, *arguments)
        else:
            accepted, claimed = 1, await self._run("claim", token, ms)
        return accepted == 1, _claim(token, claimed) if claimed else None

    async def extend(
        self, instance: str, latest: int, tokens: Iterable[str], lease: float
    ) -> tuple[int, list[str]]:
        """Let the leases of these tokens end `lease` seconds from now.

        The answer: Redis's time, in milliseconds, and those of the tokens that hold no job.
        Jobs that `instance` claimed up to its claim number `latest`, with a token not among these, are
        released: the reply to that claim was lost.
        """
        now, lost = await self._run("extend", instance, latest, _milliseconds(lease), *tokens)
        return now, lost

    async def sweep(self, retention: float, end_leases_by: int = 1 << 53, most: int = 500) -> Sweep:
        """Queue what is due, take back what has no living worker, delete what is older than `retention`.

        Each at `most` so many times; if there was more, the wait is 0. With `retention` 0 nothing is deleted.
        When Redis's time is past `end_leases_by`, in milliseconds, nothing is taken back: a sweep that was
        held up, as those of others who would extend their leases were, must not do that.
        """
        arguments = (most, end_leases_by, _milliseconds(retention))
        ready, wait, ended = await self._run("sweep", *arguments)
        return Sweep(ready, math.inf if wait < 0 else wait / 1000, ended)

    async def cancel(self, job_id: str) -> Status | None:
        """Let a job that waits or runs end as failed; the status that it had, None if it is unknown."""
        status = await self._run("cancel", job_id)
        return Status(status) if status else None

    async def ended(self, job_ids: Iterable[str]) -> list[str]:
        """Those of the jobs that have ended, or are unknown."""
        return list(await self._run("ended", *job_ids))

    async def get(self, job_id: str) -> tuple[Status, str] | None:
        """The status of a job and all of it as JSON; None if it is unknown."""
        values = await self._pipeline.call("HMGET", f"{self.prefix}job:{job_id}", "status", *FIELDS)
        return (Status(values[0]), job_json(job_id, values[1:])) if values[0] else None

    async def page(self, status: Status | None, cursor: str, limit: int) -> Page:
        """At most `limit` jobs behind the cursor, or from the newest on if it is empty.

        They are ordered newest first: by submission, or with a `status` by when they began to run, ended, or
        will be due.
        """
        following, ids, jobs, counts = await self._run("page", status or "", cursor, limit, *FIELDS)
        rows = zip(ids, jobs, strict=True)
        found = [job_json(id_, values) for id_, values in rows if values[0] is not None]
        return Page(following, found, dict(zip(Status, counts, strict=True)))


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _claim(token: str, reply: list[Any]) -> Claim:
    behind, job_id, job_type, payload, attempts, max_retries, timeout = reply
    return Claim(token, behind, job_id, job_type, payload, int(attempts), int(max_retries), float(timeout))


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────

TICK_SECONDS = 0.5  # how often leases are extended and the queue is swept
CALM_SECONDS = 1.0  # after Redis was away, all instances get so long to extend before leases may end
AGAIN_SECONDS = 0.2  # how long to wait before a call that failed is made again
QUIET_SECONDS = 10.0  # how long nothing more is said of refusals, after one was logged


class Bell:
    """Wakes workers when there may be work. It is a hint, never state: who is woken looks for himself."""

    def __init__(self) -> None:
        self.rings = 0
        self._sleepers = trio.lowlevel.ParkingLot()

    def ring(self, jobs: float = math.inf) -> None:
        """Wake as many workers as there are jobs."""
        if jobs:
            self.rings += 1
            if self._sleepers:
                self._sleepers.unpark(count=jobs)

    async def wait(self, rings: int) -> None:
        """Wait for the next ring, but not if there was one since `rings` was read."""
        if self.rings == rings:
            await self._sleepers.park()


@dataclass(slots=True)
class Run:
    """A job being run here."""

    claim: Claim
    scope: trio.CancelScope  # to cancel it by
    begun: float  # on Trio's clock, like the deadline
    deadline: float
    result: str | None = None  # as JSON
    error: str = ""


class Crew:
    """What the workers of one process share, and the steps of their work: next, begin, end."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.bell = Bell()
        self.stopping = trio.Event()  # set at shutdown: nothing more is claimed
        self.deadline = math.inf  # when whatever still runs is cancelled, on Trio's clock
        self.requests = trio.CancelScope()  # around all that serve HTTP
        self.instance = secrets.token_hex(6)
        self.claims = 0
        self.tokens: set[str] = set()  # on their way to Redis, or in use there
        self.runs: dict[str, Run] = {}  # by token; who is no longer in here has lost his lease
        self.ran: set[str] = set()  # types of the jobs that ended in the last tick
        self.ends: WeakValueDictionary[str, trio.Event] = WeakValueDictionary()  # by job id: of the awaited
        self.quiet_until = -math.inf  # about refusals

    def stop(self, grace: float) -> None:
        """Claim nothing more, and cancel in `grace` seconds what still runs then."""
        self.deadline = trio.current_time() + grace
        self.requests.deadline = self.deadline
        for run in self.runs.values():
            run.scope.deadline = run.deadline = min(run.deadline, self.deadline)
        self.stopping.set()
        self.bell.ring()
        self.announce(list(self.ends))

    def announce(self, job_ids: Iterable[str]) -> None:
        """Wake who waits for the end of these jobs."""
        for job_id in job_ids:
            if job_id in self.ends:
                self.ends[job_id].set()

    def refused(self, error: redis.RedisError) -> None:
        """Log what Redis refuses, but not all the time; that it is away is for the pipeline to say."""
        if isinstance(error, redis.ResponseError) and trio.current_time() >= self.quiet_until:
            self.quiet_until = trio.current_time() + QUIET_SECONDS
            log.error("Redis refused: %s", error)

    async def next(self, outcome: Outcome | None) -> Claim | None:
        """Report what became of the last job, until Redis has it, and claim another; None when stopping."""
        lease = self.settings.lease_seconds
        while outcome or not self.stopping.is_set():
            rings = self.bell.rings
            token = "" if self.stopping.is_set() else self._new_token()
            try:
                accepted, claim = await self.store.report_and_claim(outcome, token, lease)
            except redis.RedisError as error:
                self.refused(error)
                self.tokens.discard(token)  # should it hold a job, `extend` will have that released
                if trio.current_time() >= self.deadline:
                    if outcome:
                        log.warning("job %s: if it was not reported, it runs again", outcome.claim.id)
                    return None
                await trio.sleep(AGAIN_SECONDS)
                continue
            if outcome:
                self.tokens.discard(outcome.claim.token)
                if not accepted:
                    log.warning("job %s: report refused: too late, or sent twice", outcome.claim.id)
                elif self.ends and outcome.transition in ("complete", "fail"):
                    self.announce([outcome.claim.id])
                outcome = None
            if claim:
                self.bell.ring(claim.behind)
                return claim
            self.tokens.discard(token)
            if token:
                await self.bell.wait(rings)
        return None

    def _new_token(self) -> str:
        self.claims += 1
        token = f"{self.instance}:{self.claims}"
        self.tokens.add(token)
        return token

    def begin(self, claim: Claim, scope: trio.CancelScope) -> Run:
        """Take note of a run in this scope: now its lease is extended, and its time is limited."""
        now = trio.current_time()
        run = Run(claim, scope, now, deadline=min(now + claim.timeout, self.deadline))
        if run.deadline < now + 2 * TICK_SECONDS:  # too soon to leave it to keep_time
            scope.deadline = run.deadline
        self.runs[claim.token] = run
        current_job.set(claim.id)
        log.info("%s, attempt %d of %d", claim.job_type, claim.attempts, claim.max_retries + 1)
        return run

    def end(self, run: Run) -> Outcome | None:
        """What becomes of the job now; None if its lease was lost meanwhile."""
        claim, scope, error = run.claim, run.scope, run.error
        if scope.deadline < math.inf:
            scope.deadline = math.inf
        self.ran.add(claim.job_type)
        took = trio.current_time() - run.begun
        outcome, level = None, logging.WARNING
        if self.runs.pop(claim.token, None) is None:
            self.tokens.discard(claim.token)
            end, why = "cancelled", ": on request, or its lease was lost"
        elif run.result is not None:
            outcome, level = Outcome(claim, "complete", (run.result,)), logging.INFO
            end, why = "completed", ""
        elif scope.cancel_called and trio.current_time() >= self.deadline:
            outcome = Outcome(claim, "release")
            end, why = "released", " by the shutdown"
        else:
            if scope.cancel_called:
                error = f"timed out after {claim.timeout:g} s"
            if claim.attempts > claim.max_retries:
                outcome = Outcome(claim, "fail", (error,))
                end, why = "failed for good", f": {error}"
            else:
                delay = backoff(claim.attempts, self.settings.retry_delay_seconds)
                outcome = Outcome(claim, "retry", (error, _milliseconds(delay)))
                end, why = "failed", f", again in {delay:.1f} s: {error}"
        log.log(level, "%s, attempt %d, %s after %.3f s%s", claim.job_type, claim.attempts, end, took, why)
        current_job.set("")
        return outcome


async def run_handler(run: Run) -> None:
    """Run a job once. An Exception or SystemExit is a failed attempt; the caller sees to its cancellation."""
    job_type = run.claim.job_type
    try:
        if job_type not in HANDLERS:
            raise LookupError(f"there is no handler for {job_type!r} here")
        payload, _ = _decode(run.claim.payload)
        run.result = to_json(await HANDLERS[job_type](payload))
    except* (Exception, SystemExit) as raised:  # here, and nowhere else: a handler may raise anything
        log.debug("the traceback", exc_info=raised)
        run.error = _describe(raised)


def _describe(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]  # a nursery wraps what its tasks raise
    text = "".join(traceback.format_exception_only(error)).strip()
    return text[:2000].encode(errors="backslashreplace").decode()


async def work(crew: Crew) -> None:
    """A worker: claim, run, report, until the crew is stopping.

    To enter and leave a cancel scope takes a quarter as long as a small job. So one serves for many jobs,
    until it is cancelled.
    """
    outcome = None
    while True:
        with trio.CancelScope() as scope:
            while not scope.cancel_called:
                claim = await crew.next(outcome)
                if claim is None:
                    return
                run = crew.begin(claim, scope)
                await run_handler(run)
                outcome = crew.end(run)
        if scope.cancelled_caught:
            outcome = crew.end(run)


async def upkeep(crew: Crew) -> None:
    """Twice a second, extend the leases of what runs here, sweep, and look for the ends of awaited jobs."""
    lease_seconds = crew.settings.lease_seconds
    pause = min(TICK_SECONDS, lease_seconds / 4)
    calm_at = math.inf
    while True:
        runs, wait = dict(crew.runs), pause
        try:
            now, lost = await crew.store.extend(crew.instance, crew.claims, crew.tokens, lease_seconds)
            end_leases_by = now + _milliseconds(CALM_SECONDS) if trio.current_time() >= calm_at else 0
            found = await crew.store.sweep(crew.settings.retention_seconds, end_leases_by)
            ended = await crew.store.ended(list(crew.ends)) if crew.ends else []
        except redis.RedisError as error:
            crew.refused(error)
            calm_at = math.inf  # others were cut off too: do not end their leases before they can extend them
        else:
            calm_at = min(calm_at, trio.current_time() + CALM_SECONDS)
            for token in runs.keys() & lost:
                if crew.runs.pop(token, None):
                    runs[token].scope.cancel()
            for ended_job in found.ended:
                log.warning("job %s: its worker is gone: %s, attempt %s; now it is %s", *ended_job)
            crew.announce(ended)
            crew.bell.ring(found.ready)
            wait = min(pause, found.wait)
        await trio.sleep(wait)


async def keep_time(crew: Crew) -> None:
    """Twice a second, set the deadlines of the runs: most are over by then, and setting one is not cheap.

    And whenever the event loop stood still for half a lease, name the handlers that may have blocked it.
    """
    while True:
        for run in crew.runs.values():
            run.scope.deadline = run.deadline
        crew.ran.clear()
        wake_at = trio.current_time() + TICK_SECONDS
        await trio.sleep_until(wake_at)
        late = trio.current_time() - wake_at
        if late > crew.settings.lease_seconds / 2:
            names = ", ".join(crew.ran | {run.claim.job_type for run in crew.runs.values()})
            log.error("the event loop stood still for %.1f s; handlers that ran: %s", late, names or "none")


async def listen(connection: RedisConnection, crew: Crew) -> None:
    """Ring the bell when any instance puts something into the empty queue."""
    while True:
        try:
            [reply] = await connection.exchange([("SUBSCRIBE", f"{crew.store.prefix}wake")])
            while not isinstance(reply, redis.ResponseError):
                reply = await connection.message()
                crew.bell.ring(1)
            crew.refused(reply)
        except (redis.RedisError, OSError):
            pass
        await trio.sleep(AGAIN_SECONDS)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────

AMOUNTS: dict[str, tuple[str, tuple[type, ...], float, float]] = {
    "max_retries": ("a whole number", (int,), 0, 100),
    "timeout": ("a number", (int, float), 0.001, 7 * 86_400),  # seconds
    "delay": ("a number", (int, float), 0, 366 * 86_400),  # seconds
}
JOB_FIELDS = ("job_type", "payload", *AMOUNTS)
PAGE_MOST = 1000  # jobs, with ?limit=
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
BEARER = WWWAuthenticate("bearer", {"realm": "jobqueue"})
CHUNK = 200  # jobs fetched at a time for a list without a limit
WAIT_MOST = 30  # seconds, with ?wait=


def parse_json(body: bytes) -> Any:
    """What a JSON text says. Stricter than Python's parser: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise http.BadRequest(f"the body is not JSON: it has {constant}")

    try:
        return json.loads(body.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise http.BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise http.BadRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise http.BadRequest("the body is nested too deeply") from None
    except ValueError:  # sys.get_int_max_str_digits()
        raise http.BadRequest("the body has an integer of too many digits: at most 4,300") from None


def _amount(name: str, value: Any) -> Any:
    kind, kinds, low, high = AMOUNTS[name]
    if type(value) not in kinds or not low <= value <= high:
        raise http.BadRequest(f"{name} must be {kind} from {low:g} to {high:,}")
    return value


def parse_job(body: Any, settings: Settings) -> NewJob:
    """The job that a JSON value asks for; or http.BadRequest, which names the field that is wrong."""
    if not isinstance(body, dict):
        raise http.BadRequest("a job must be an object, with the fields job_type and payload")
    for name in body:
        if name not in JOB_FIELDS:
            raise http.BadRequest(f"{name[:80]!r} is not a field of a job; they are: {', '.join(JOB_FIELDS)}")
    job_type, payload = body.get("job_type"), body.get("payload")
    if not isinstance(job_type, str) or job_type not in HANDLERS:
        raise http.BadRequest(f"job_type must be one of: {', '.join(HANDLERS)}")
    if not isinstance(payload, dict):
        raise http.BadRequest("payload must be an object")
    try:
        text = to_json(payload)
    except (ValueError, RecursionError) as error:
        raise http.BadRequest(f"payload cannot be kept: {error}") from None
    try:
        HANDLERS[job_type].check(payload)
    except ValueError as error:
        raise http.BadRequest(str(error)) from None
    defaults = {"max_retries": settings.max_retries, "timeout": settings.job_timeout_seconds, "delay": 0}
    amounts = [_amount(name, body.get(name, default)) for name, default in defaults.items()]
    return NewJob(str(uuid.uuid4()), job_type, text, *amounts)


def parse_jobs(body: Any, settings: Settings) -> list[NewJob]:
    """The one job, or the array of jobs, that a JSON value asks for; or http.BadRequest."""
    if not isinstance(body, list):
        return [parse_job(body, settings)]
    if not body:
        raise http.BadRequest("an array must have at least one job")
    jobs = []
    for index, item in enumerate(body):
        try:
            jobs.append(parse_job(item, settings))
        except http.BadRequest as error:
            raise http.BadRequest(f"job {index} of the array: {error.description}") from None
    return jobs


def parse_key(headers: Sequence[str], body: Any) -> tuple[str, str]:
    """Hashes of an Idempotency-Key, empty if there is none, and of what the request asks for.

    The key is a quoted string, as in draft-ietf-httpapi-idempotency-key-header, or the same without quotes.
    """
    if not headers:
        return "", ""
    header = ", ".join(headers)  # one, or it will not match
    if not re.fullmatch(r'"([ !#-\[\]-~]|\\["\\]){1,255}"|[!#-~]{1,255}', header):
        raise http.BadRequest("Idempotency-Key must be one of up to 255 ASCII characters, quoted for spaces")
    texts = (header[1:-1] if header[0] == '"' else header, json.dumps(body, sort_keys=True))
    key, fingerprint = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return key, fingerprint


def parse_query(query: Mapping[str, str]) -> tuple[Status | None, str, int | None]:
    """The status, cursor and limit that `GET /jobs` asks for; or http.BadRequest."""
    for name in query:
        if name not in ("status", "limit", "cursor"):
            raise http.BadRequest(f"{name[:80]!r} is no parameter; they are: status, limit, cursor")
    status, cursor, limit = query.get("status"), query.get("cursor", ""), query.get("limit")
    if status is not None and status not in list(Status):
        raise http.BadRequest(f"status must be one of: {', '.join(Status)}")
    if cursor and not re.fullmatch(r"[0-9a-f-]{36}" if status else r"[0-9]{1,15}", cursor):
        raise http.BadRequest(
            "cursor must be one from a Link header, with the status that was asked for there"
        )
    if limit is not None and not (re.fullmatch(r"[0-9]{1,4}", limit) and 1 <= int(limit) <= PAGE_MOST):
        raise http.BadRequest(f"limit must be a whole number from 1 to {PAGE_MOST}")
    return Status(status) if status else None, cursor, int(limit) if limit else None


def parse_wait(query: Mapping[str, str]) -> float:
    """The seconds that `GET /job/<id>` is to wait; or http.BadRequest."""
    text = query.get("wait", "0")
    number = re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", text)
    if query.keys() - {"wait"} or not number or float(text) > WAIT_MOST:
        raise http.BadRequest(f"the only parameter is wait, a number of seconds from 0 to {WAIT_MOST}")
    return float(text)


class HTTPConnection(TrioASGIHTTPConnection):
    """One request; its view is cancelled when the client goes away.

    quart-trio takes the end of its own answer for the client going away, and so cancels hypercorn just
    before that marks the connection as idle: it then neither times out, nor closes at shutdown.
    """

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        answered = False

        async def send_to_client(message: ASGISendEvent) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message["more_body"]
            await send(message)

        async def receive_body() -> None:
            await ASGIHTTPConnection.handle_messages(self, request, receive)
            if not answered:
                nursery.cancel_scope.cancel()

        try:
            request = self._create_request_from_scope(send)
        except (IndexError, ValueError):  # as for `GET ?x`
            await self._send_response(send, answer('{"error": "that is no address"}\n', 400))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_body)
            response = await self.app.handle_request(request)
            with suppress(redis.RedisError):  # in mid-list: the client sees that it is cut off
                await self._send_response(send_to_client, response)
            nursery.cancel_scope.cancel()


def answer(
    body: str | AsyncIterator[str], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(body, status, headers, content_type="application/json")


def create_app(crew: Crew) -> QuartTrio:
    """The REST API, and the page that shows it to people."""
    store, settings = crew.store, crew.settings
    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = HTTPConnection
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes

    own_name = re.compile(rf"([\w-]+|[\d.]+|\[[\da-f:.]+\]|{re.escape(settings.host)})(:\d+)?", re.I | re.A)

    @app.before_request
    async def guard() -> None:
        """Ask for the token; without one, serve only who asks for an address, HOST, or a name without a dot.

        So no other web site gets through a visitor's browser: it could send neither application/json nor
        DELETE, and read nothing, without this server's consent (CORS); and to pass for this server it would
        have to give its own name another address (DNS rebinding), which the Host header betrays.
        """
        if settings.api_token:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(token.strip().encode(), settings.api_token.encode())
            if not (scheme.lower() == "bearer" and right) and not wants_page():
                raise http.Unauthorized(
                    "send the header Authorization: Bearer, with the API token", www_authenticate=BEARER
                )
        elif not own_name.fullmatch(name := request.headers.get("Host", "")):
            raise http.Forbidden(f"{name[:80]!r} is not a name of this server; to use another, set API_TOKEN")

    def wants_page() -> bool:
        best = request.accept_mimetypes.best_match(["application/json", "text/html"])
        return request.method == "GET" and request.path in ("/", "/jobs") and best == "text/html"

    @app.post("/job")
    async def submit() -> Response:
        if request.query_string:
            raise http.BadRequest("POST /job has no parameters; a job's are fields of the body")
        if request.mimetype != "application/json":
            raise http.UnsupportedMediaType("the Content-Type must be application/json")
        body = parse_json(cast(bytes, await request.get_data()))
        jobs = parse_jobs(body, settings)
        key, fingerprint = parse_key(request.headers.getlist("Idempotency-Key"), body)
        crew.bell.ring(len(jobs))  # now, so that the claims are close behind; if they get ahead, `wake` comes
        ids = await store.submit(jobs, key, fingerprint)
        if ids is None:
            raise http.UnprocessableEntity("this Idempotency-Key was used for another request")
        if isinstance(body, list):
            return answer(json.dumps([{"id": job_id} for job_id in ids]) + "\n", 202)
        return answer(f'{{"id": "{ids[0]}"}}\n', 202, {"Location": f"/job/{ids[0]}"})

    @app.get("/job/<job_id>")
    async def show(job_id: str) -> Response:
        wait = parse_wait(request.args)
        ended = crew.ends.setdefault(job_id, trio.Event())
        found = await store.get(job_id)
        if wait and found and found[0] not in ENDED and not crew.stopping.is_set():
            with trio.move_on_after(wait):
                await ended.wait()
            found = await store.get(job_id)
        if found is None:
            raise http.NotFound(f"there is no job {job_id[:80]!r}, or no more")
        return answer(found[1] + "\n")

    @app.delete("/job/<job_id>")
    async def cancel(job_id: str) -> Response:
        parse_wait(request.args)  # refuse it before anything is done
        status = await store.cancel(job_id)
        if status in ENDED:
            raise http.Conflict(f"the job is {status} already")
        if status:
            log.info("job %s: cancelled on request, it was %s", job_id, status)
            crew.announce([job_id])
        return await show(job_id)

    @app.get("/")
    async def home() -> Any:
        return redirect("/jobs")

    @app.get("/jobs")
    async def index() -> Response:
        if wants_page():
            return await live_page()
        status, cursor, limit = parse_query(request.args)
        page = await store.page(status, cursor, limit or CHUNK)
        headers = {"Vary": "Accept", "Cache-Control": "no-store"}
        if limit is None:
            return answer(stream(status, page), headers=headers)
        headers["Job-Counts"] = ", ".join(f"{name}={count}" for name, count in page.counts.items())
        if page.cursor:
            query = ({"status": status} if status else {}) | {"limit": limit, "cursor": page.cursor}
            headers["Link"] = f'</jobs?{urlencode(query)}>; rel="next"'
        return answer("[" + ",\n".join(page.jobs) + "]\n", headers=headers)

    async def stream(status: Status | None, page: Page) -> AsyncIterator[str]:
        yield "[" + ",\n".join(page.jobs)
        while page.cursor:
            page = await store.page(status, page.cursor, CHUNK)
            yield "".join(",\n" + job for job in page.jobs)
        yield "]\n"

    async def live_page() -> Response:
        """The page: it holds no jobs, its script asks for them. And it can load nothing from elsewhere."""
        nonce = secrets.token_urlsafe(16)
        text = await render_template("jobs.html", nonce=nonce, handlers=HANDLERS)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Vary": "Accept", "Cache-Control": "no-store"}
        return Response(text, 200, headers, content_type="text/html; charset=utf-8")

    @app.errorhandler(http.HTTPException)
    async def refuse(error: http.HTTPException) -> Response:
        text = error.description
        if isinstance(error, http.NotFound) and has_request_context() and request.routing_exception:
            text = f"there is nothing at {request.path[:80]}; try POST /job, GET /job/<id> or GET /jobs"
        elif isinstance(error, http.MethodNotAllowed):
            text = f"{request.method} is not possible here, only: {', '.join(error.valid_methods or ())}"
        elif isinstance(error, http.RequestEntityTooLarge):
            text = f"the body must be at most {settings.max_body_bytes:,} bytes"
        headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
        return answer(json.dumps({"error": text}) + "\n", error.code or 500, headers)

    @app.errorhandler(redis.RedisError)
    async def unavailable(error: redis.RedisError) -> Response:
        crew.refused(error)
        text = f"Redis cannot serve this now: {error}"
        return answer(json.dumps({"error": text}) + "\n", 503, {"Retry-After": "1"})

    return app


# ── The service ─────────────────────────────────────────────────────────────────────────────────

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 1024  # connections that wait to be accepted
EXIT_SECONDS = 0.8  # after the end of the grace, until the process ends in any case


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Run the service until SIGINT or SIGTERM, and then in this order:

    1. accept nothing more; the requests under way are answered;
    2. idle workers leave, busy ones finish their job and report it, their leases still being extended;
    3. when the grace is over, or at a second signal, what still runs is cancelled and released;
    4. the last commands reach Redis.
    """
    url = settings.redis_url
    connections = [RedisConnection(url) for _ in range(CONNECTIONS)] if url else []
    carriers: list[Carrier] = [connection.exchange for connection in connections] or [memory()]
    pipeline = AutoPipeline(*carriers)
    crew = Crew(Store(pipeline), settings)
    app = create_app(crew)
    async with trio.open_nursery() as talking:
        talking.start_soon(pipeline.run)
        for connection in connections:
            talking.start_soon(connection.watch)
        async with trio.open_nursery() as tending:
            await tending.start(stop_on_signal, crew)
            tending.start_soon(upkeep, crew)
            tending.start_soon(keep_time, crew)
            if url:
                tending.start_soon(listen, RedisConnection(url), crew)
            async with trio.open_nursery() as working:
                working.start_soon(end_after_a_crash, crew)
                address = format_address(listener)  # it listens already: connections queue up
                log.info("listening on %s with %d workers; %s", address, settings.workers, where(url))
                working.start_soon(serve_http, app, listener, crew)
                for _ in range(settings.workers):
                    working.start_soon(work, crew)
            tending.cancel_scope.cancel()
        talking.cancel_scope.cancel()
    log.info("stopped")


def where(url: str) -> str:
    """Where the jobs are kept, without a password."""
    if not url:
        return "jobs are kept in memory, and vanish at exit: set REDIS_URL to keep them"
    parts = urlsplit(url)
    return f"jobs are kept in {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def format_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(TCPServer):
    """One connection. What hypercorn cannot cope with, mostly odd HTTP/2, ends it alone, not the service."""

    async def run(self) -> None:
        try:
            await super().run()
        except* Exception as errors:
            log.warning("a connection broke: %s", _describe(errors))
            log.debug("the traceback", exc_info=errors)


async def serve_http(app: QuartTrio, listener: socket.socket, crew: Crew) -> None:
    """Serve until the crew is stopping; then answer what is under way, until the crew's deadline."""
    config = hypercorn.Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.graceful_timeout = math.inf
    config.backlog = BACKLOG
    hypercorn.trio.run.TCPServer = Connection  # type: ignore[attr-defined]
    with crew.requests:
        await hypercorn.trio.serve(app, config, shutdown_trigger=crew.stopping.wait)


async def stop_on_signal(crew: Crew, *, task_status: trio.TaskStatus[None]) -> None:
    """Stop the crew at the first signal, and without any grace at the second."""
    grace = crew.settings.shutdown_grace_seconds
    with trio.open_signal_receiver(*SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        task_status.started()
        async for number in signals:
            log.info("%s: stopping; what runs has %g s to finish", signal.Signals(number).name, grace)
            crew.stop(grace)
            end_process(0, grace + EXIT_SECONDS)
            grace = 0


async def end_after_a_crash(crew: Crew) -> None:
    """When a task failed its nursery cancels this one too; then let nothing hold up the end."""
    try:
        await crew.stopping.wait()
    finally:
        if not crew.stopping.is_set():
            log.critical("a task failed; its traceback follows when all has been unwound")
            end_process(1, REPLY_SECONDS + EXIT_SECONDS)


def end_process(status: int, seconds: float) -> None:
    """End this process in so many seconds, if it did not by itself.

    A client that reads nothing of a large answer holds hypercorn, which shields what it sends; a handler
    that blocks the event loop holds everything. What they hold is safe: leases end.
    """
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


def set_up_logging(level: str) -> None:
    """Log to stderr; what is said while a job runs, by its handler too, names the job.

    Caller, thread and process are not looked up, since no line shows them: it would cost a third more
    (Logging HOWTO, "Optimization").
    """
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False

    def complete(record: logging.LogRecord) -> bool:
        job_id = current_job.get()
        record.job = f"job {job_id}: " if job_id else ""
        record.time = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        return True

    handler = logging.StreamHandler()
    handler.addFilter(complete)
    form = "%(time)s %(levelname)-7s %(job)s%(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler])
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)


def main() -> None:
    """Read the settings, listen, serve. Signals wait until there is somebody to heed them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = Settings.read(sys.argv[1:], os.environ)
    set_up_logging(settings.log_level)
    if settings.smtp_url:
        send_email_through(settings.smtp_url, settings.smtp_from)
    if settings.host not in LOOPBACK and not settings.api_token:
        log.warning("anybody who reaches %s may use this queue: set API_TOKEN", settings.host)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        address = (settings.host.strip("[]"), settings.port)
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        sys.exit(f"jobqueue.py: cannot listen on {settings.host}, port {settings.port}: {error.strerror}")
    trio.run(serve, settings, listener)


if __name__ == "__main__":
    main()
