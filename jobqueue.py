"""A job queue service in one module: a REST API, Trio workers, and Redis to keep the jobs.

A job whose POST was answered with 202 is run at least once, until it is completed or failed, whatever dies
in between. At every instant it is in exactly one of five places:

    POST /job ──► queue ───claim───► processing ──complete──► completed
                  ▲   ▲                │  │  │
              due │   └─release, sweep─┘  │  └──fail, sweep─► failed
                delayed ◄──retry, defer───┘

An instance is one process of this program, and its workers are tasks. A claim lends a job to a worker for the
time of a lease, which the instance's heartbeat renews. The worker completes, fails or retries the job; it
defers one whose type it does not know, and releases, in a shutdown, what it cannot finish. When a lease ends,
a sweep takes the job back. A POST with a delay leads to `delayed`; a DELETE fails what waits or runs.

The keys stand behind the prefix `{jobqueue}:`, whose braces keep them in one slot of a Redis Cluster:
    job:<id>            hash         the job itself: FIELDS, and the fencing token of its last claim
    queue               list         ids ready to run: LPUSH in, RPOP out, so first in, first out
    delayed             sorted set   ids that wait, by the time they are due (in milliseconds, like all times)
    processing          sorted set   ids being run, by the time their lease ends
    started             sorted set   the same ids, by the time they began to run
    withdrawn           set          ids in `queue` whose job was cancelled: a claim skips them
    completed, failed   sorted sets  finished ids, by the time they finished
    history             sorted set   every id, by a number that rises with each submission
    idempotency:<hash>  string       what was answered to a submission with that key, for 24 hours
    claim:<worker>      string       what a worker claimed last: number of the claim, and id, for an hour
    layout              string       the version of these keys
    wake                channel      a hint that the queue stopped being empty

Read from top to bottom, since each part builds on those above it: Settings, Jobs, Handlers, Redis (where Trio
meets it), Store (a Lua script for each transition), Workers, HTTP, and the service, which starts all of it.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import errno
import hashlib
import hmac
import inspect
import itertools
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
import time
import traceback
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from email.message import EmailMessage
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import SplitResult, unquote, urlencode, urlsplit
from weakref import WeakValueDictionary

import h11
import hiredis
import hypercorn
import msgspec
import outcome
import redis
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint, Response, current_app, redirect, render_template, request
from quart_trio import QuartTrio
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import (
    BadRequest,
    Conflict,
    Forbidden,
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
    Unauthorized,
    UnprocessableEntity,
    UnsupportedMediaType,
)
from werkzeug.local import LocalProxy

__version__ = "2.0.0"
PROGRAM = os.path.basename(sys.argv[0]) or "jobqueue.py"  # a fork's own name
LAYOUT = "2"  # of the keys in Redis: raise it when older programs would misread or overlook a key or a status
PREFIX = "{jobqueue}:"  # of all keys
log = logging.getLogger("jobqueue")

# ── Settings ────────────────────────────────────────────────────────────────────────────────────

REDIS_URL = "redis[s]://[user:password@]host[:port][/db], redis[s]+sentinel://[…]host[:port],…/name[/db] or unix:///path"
SMTP_URL = "smtp[s]://[user:password@]host[:port]"
SMTP_PATTERN = r"|smtps?://([^/@?#\s]*@)?(\[[0-9a-f:.]+\]|[^/@?#\s:]+)(:0*[1-9][0-9]*)?"
# Of each text: a pattern, a function that must accept it, and what is said otherwise, without any password.
TEXTS: dict[str, tuple[str, Callable[[str], object], str]] = {
    "log_level": ("(?ai)debug|info|warning|error", str, "debug, info, warning or error, not {!r}"),
    "api_token": ("[!-~]*", str, "visible ASCII characters, without spaces"),
    "smtp_url": (SMTP_PATTERN, lambda url: urlsplit(url).port, f"{SMTP_URL}, percent-encoded"),
    "smtp_from": (r"[^@\x00-\x1f]+@[^@\x00-\x1f]+", str, "an address such as jobs@example.com, not {!r}"),
    "redis_url": ("(?s:.*)", lambda url: url and RedisAddress(url), f"{REDIS_URL}, percent-encoded"),
}


def _setting(default: Any, meaning: str, low: float = 0, high: float = math.inf) -> Any:
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


def _convert(name: str, text: str) -> Any:
    kind = type(getattr(Settings, name))
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name.upper()} must be {wanted}, not {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Read from variables such as PORT, and flags such as --port, which win. ValueError if one is bad."""

    redis_url: str = _setting(
        "", "where jobs are kept: redis[s]://, redis[s]+sentinel:// or unix://; unset: in memory"
    )
    host: str = _setting("127.0.0.1", "the address to listen on")
    port: int = _setting(8080, "the port to listen on; 0: any free one", 0, 65_535)
    workers: int = _setting(10, "jobs run at the same time; 0: only serve the API", 0, 10_000)
    processes: int = _setting(1, "processes, each with so many workers; 0: as many as cores", 0, 256)
    max_retries: int = _setting(3, "attempts after a failed first one, for a job that does not say", 0, 100)
    retry_delay_seconds: float = _setting(0.5, "wait before the first retry; doubles with each", 0, 3600)
    job_timeout_seconds: float = _setting(300.0, "longest attempt, if a job does not say", 0.001, 604_800)
    # At most an hour, since the key claim:<worker> is gone then.
    lease_seconds: float = _setting(15.0, "a worker silent for so long has lost its job", 0.5, 3600)
    shutdown_grace_seconds: float = _setting(20.0, "what running jobs get to finish at shutdown", 0, 86_400)
    retention_seconds: float = _setting(604_800.0, "how long finished jobs are kept; 0: for ever", 0, 1e10)
    keep_jobs: int = _setting(10**6, "finished jobs kept at most, the oldest go first; 0: no limit", 0, 2**40)
    max_body_bytes: int = _setting(2**20, "the largest request body, and the largest result", 1024, 2**30)
    api_token: str = _setting("", "what clients must send as Authorization: Bearer; unset: nothing")
    smtp_url: str = _setting("", "smtp://user:password@host:port or smtps://; unset: e-mail is simulated")
    smtp_from: str = _setting("jobqueue@localhost", "the sender of e-mail")
    log_level: str = _setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if not isinstance(value, str) and not low <= value <= high:
                raise ValueError(f"{f.name.upper()} must be from {low:,} to {high:,}, not {value}")
        for name, (pattern, parse, wanted) in TEXTS.items():
            text = getattr(self, name)
            with suppress(ValueError, TypeError, redis.RedisError):  # whose own texts may show a password
                if re.fullmatch(pattern, text):
                    parse(text)
                    continue
            raise ValueError(f"{name.upper()} must be {wanted.format(text)}")
        if self.processes != 1 and not self.redis_url:
            raise ValueError("PROCESSES must be 1 without a REDIS_URL: each would have a memory of its own")
        if self.processes != 1 and sys.platform == "win32":
            raise ValueError("PROCESSES must be 1 on Windows, which cannot share the port")

    @classmethod
    def read(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
        """The settings that flags and variables ask for; a bad one ends the program with status 2."""
        about = "A job queue service. Each setting is a flag, or the environment variable beside it."
        parser = argparse.ArgumentParser(PROGRAM, "%(prog)s [--help] [--SETTING VALUE ...]", about)
        parser.add_argument("--version", action="version", version=__version__)
        for f in fields(cls):
            default = f"{f.default:.12g}" if isinstance(f.default, float) else f.default or "unset"
            text = f"{f.metadata['meaning']} ({f.name.upper()}, default: {default})"
            flag, variable = f"--{f.name.replace('_', '-')}", environ.get(f.name.upper(), "")
            parser.add_argument(flag, metavar="VALUE", default=variable, help=text)
        texts = {name: text for name, text in vars(parser.parse_args(argv)).items() if text}
        try:
            return cls(**{name: _convert(name, text) for name, text in texts.items()})
        except ValueError as error:
            parser.exit(2, f"{PROGRAM}: {error}\n")


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


class Status(StrEnum):
    """Where a job is in its life. One that waits for a retry or for its delay is pending too."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


BACKOFF_CAP_SECONDS = 300.0
FINISHED = (Status.COMPLETED, Status.FAILED)  # the last of Status; scripts and page take them from here
# What is stored of a job and shown of it, in this order. Most of it is JSON already.
FIELDS = (
    *("job_type", "payload", "status", "attempts", "max_retries", "timeout", "worker", "progress"),
    *("result", "error", "traceback", "created_at", "due_at", "started_at", "finished_at"),
)
_careful_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=msgspec.to_builtins
).encode
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_read_texts = msgspec.json.Decoder(list[str]).decode


class JobRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A job as a client asks for it."""

    job_type: str
    payload: msgspec.Raw  # an object, which is stored as it is
    max_retries: Annotated[int, Meta(ge=0, le=100)] | UnsetType = UNSET
    timeout: Annotated[float, Meta(ge=0.001, le=604_800)] | UnsetType = UNSET  # seconds for one attempt
    delay: Annotated[float, Meta(ge=0, le=366 * 86_400)] = 0  # seconds before the first attempt


class NewJob(NamedTuple):
    """A job as it is submitted."""

    id: str
    job_type: str
    payload: str  # an object, as JSON
    max_retries: int
    timeout: float  # seconds for one attempt
    delay: float  # seconds before the first attempt


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """A job in the hands of a worker."""

    token: str  # the fencing token, which no other claim ever had
    behind: int  # 1 if there are others behind it in the queue, otherwise 0
    id: str
    job_type: str = ""
    payload: str = ""  # an object, as JSON
    attempts: Annotated[int, Meta(ge=0, le=1000)] = 0  # those begun, this one included
    max_retries: Annotated[int, Meta(ge=0, le=1000)] = 0
    timeout: Annotated[float, Meta(ge=0, le=1e9)] = 0  # seconds for one attempt
    status: Literal["pending"] = "pending"  # before this claim
    damage: str = ""  # what is wrong with the job, because somebody else has written to it

    @classmethod
    def read(cls, token: str, values: Sequence[Any]) -> Claim:
        """A claim, from what `claim`, in the script `report`, answered."""
        try:
            return msgspec.convert([token, *values], cls, strict=False)
        except msgspec.ValidationError as error:  # whose path is the index of the field, as in "$[5]"
            index = int(str(error).rpartition("[")[2].partition("]")[0])
            damage = f"its {cls.__struct_fields__[index]} is {values[index - 1] or 'missing'}"
            return cls(token, values[0], values[1], damage=f"the job is damaged: {damage}")


def _json(value: Any) -> str:
    """The JSON of a value: msgspec's, which saves a short job 8 % of its work; json's for what is left."""
    try:
        text = msgspec.json.encode(value).decode()
        if "null" in text:  # for msgspec, NaN is null, too
            text = _careful_json(msgspec.to_builtins(value, str_keys=True))
        return text
    except TypeError:  # from msgspec, of a subclass of float
        return _careful_json(value)


def to_json(value: Any, most_bytes: float = math.inf) -> str:
    """The JSON of a result, also of dates, enums, dataclasses, UUIDs and the like; or ValueError."""
    try:
        text = _json(value)
        size = len(text.encode())  # which refuses half of a surrogate pair
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the result is not JSON: {error}") from None
    if size > most_bytes:
        raise ValueError(f"the result has {size:,} bytes of JSON; MAX_BODY_BYTES is {most_bytes:,}")
    return text


def _show(name: str, value: str | None) -> str:
    """The JSON of a stored value. One that somebody else has damaged is shown as the text that it is."""
    if value is None or (name == "traceback" and not value):
        return "null"
    try:
        if name.endswith("_at"):
            moment = datetime.fromtimestamp(int(value) / 1000, UTC)
            return f'"{moment.isoformat(timespec="milliseconds")[:-6]}Z"'
        if name not in ("job_type", "status", "worker", "error", "traceback"):
            _check_json(value)  # and leave it as it is, however deep, and whatever numbers it holds
            return value
    except (ValueError, OSError, OverflowError, RecursionError):  # all but the first from `fromtimestamp`
        return _json(value)
    return _json(value.partition("/")[0] if name == "worker" else value)  # of a worker, its instance alone


def job_json(job_id: str, stored: Mapping[str, str | None]) -> str:
    """The JSON of a job as it is stored; what is not known yet is null."""
    shown = [f'"{name}": {_show(name, stored.get(name))}' for name in FIELDS]
    return f'{{"id": {_json(job_id)}, {", ".join(shown)}}}'


def backoff(attempt: int, first: float, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait after a failed `attempt` (1, 2, …): `first`, doubled each time, capped, jittered."""
    # "Equal jitter" takes off up to half (AWS Architecture Blog, 2015): what failed together returns apart.
    return min(BACKOFF_CAP_SECONDS, math.ldexp(first, attempt - 1)) * (1 - jitter() / 2)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────

Function = TypeVar("Function", bound=Callable[..., Any])
HANDLERS: dict[str, Handler] = {}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
MISFITS = {"Object missing required": "is missing", "Object contains unknown": "is not one of the fields"}
FORM_FORMATS = {datetime: "date-time", dt.time: "partial-time"}  # msgspec gives them only with a time zone
SMTP_SECONDS = 20.0  # longest wait for an SMTP server
_attempt: ContextVar[Attempt] = ContextVar("_attempt")  # of the handler that runs here, or in this thread


class Unrecoverable(Exception):  # noqa: N818
    """Raised by a handler for a job that no retry can help: it fails at once."""


class Job(NamedTuple):
    """What a handler can know of the job that it runs."""

    id: str
    job_type: str
    attempt: int  # 1 for the first
    max_retries: int


class Attempt(msgspec.Struct, eq=False):
    """One execution of a job's handler, here and now."""

    claim: Claim
    scope: trio.CancelScope  # cancelled at its deadline, when the lease was lost, or by a DELETE
    lost: bool = False  # the job has another token now: a sweep took it back, or a DELETE failed it
    cancelled: bool = False  # a DELETE asks for the end of a thread, which still holds its job
    overstays: int = 0  # ticks since its scope was cancelled
    progress: str = ""  # as JSON, until the next heartbeat takes it
    is_over: bool = False  # whether its handler has ended
    abandoned: list[AsyncGenerator[Any, Any]] = []  # not read to the end, and perhaps with a nursery open


def job() -> Job:
    """The job that this handler runs. Raises LookupError outside of a handler."""
    claim = _attempt.get().claim
    return Job(claim.id, claim.job_type, claim.attempts, claim.max_retries)


def to_unicode(text: str) -> str:
    """A text that can be stored: half of a surrogate pair, which Redis does not take, is escaped."""
    return text.encode(errors="backslashreplace").decode()


def progress(done: float, note: str = "") -> None:
    """Tell how much of this job is done, from 0 to 1, with a note. Outside of a job, do nothing."""
    if attempt := _attempt.get(None):
        attempt.progress = _json({"done": round(float(done), 4), "note": to_unicode(str(note)[:200])})


def explain(error: Exception, root: str, kinds: Mapping[str, Any]) -> str:
    """What is wrong with a JSON object of these fields, and where: `payload.ns[0]: expected int, got str`."""
    if isinstance(error, UnicodeDecodeError):
        return f"{root} is not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, RecursionError):
        return f"{root} is nested too deeply"
    if not isinstance(error, msgspec.MsgspecError):
        return f"{root}: {type(error).__name__}: {error}"
    if not isinstance(error, msgspec.ValidationError):
        return f"{root} is not JSON: {error}"
    what, _, path = str(error).replace("`", "").partition(" - at $")
    misfit, _, name = what.partition(" field ")
    if misfit in MISFITS:
        known = "" if path else f"; they are: {', '.join(kinds) or 'none'}"
        return f"{root}{path}.{name[:80]} {MISFITS[misfit]}{known}"
    parameter = re.match(r"\.(\w+)", path)
    if what.startswith("Invalid enum value") and parameter and parameter[1] in kinds:
        enums = re.findall(r"'enum': \[(.*?)\][,}]", str(msgspec.json.schema(kinds[parameter[1]])))
        what += f"; it must be one of: {' or '.join(enums)}"
    return f"{root}{path}: {what[0].lower()}{what[1:]}"


def _struct_field(job_type: str, each: inspect.Parameter) -> tuple[str, Any, Any]:
    """A parameter as a field of the struct that reads payloads. TypeError if no JSON object can fill it."""
    if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
        raise TypeError(f"the handler of {job_type!r} must have named parameters only")
    kind = Any if each.annotation is each.empty else each.annotation
    try:
        msgspec.json.schema(kind)
    except Exception:  # as NameError, for what is declared elsewhere
        raise TypeError(f"no JSON can fill {each.name!r} of the handler of {job_type!r}: {kind}") from None
    # Each attempt gets a copy: what one handler appends to a list, the next one must not find in it.
    factory: Any = msgspec.NODEFAULT if each.default is each.empty else partial(copy.deepcopy, each.default)
    return each.name, kind, msgspec.field(default_factory=factory)


class Handler:
    """A function that runs one type of job, and its signature: the contract for the payload."""

    def __init__(self, job_type: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.doc = (inspect.getdoc(function) or "").partition("\n")[0]
        self.is_async = inspect.iscoroutinefunction(function)
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        struct_fields = [_struct_field(job_type, each) for each in parameters]
        self._kinds = {name: kind for name, kind, _ in struct_fields}
        struct = msgspec.defstruct(job_type, struct_fields, kw_only=True, forbid_unknown_fields=True)
        self._decode = msgspec.json.Decoder(struct).decode
        [reference], schemas = msgspec.json.schema_components([struct])
        self.schema = schemas.pop(reference["$ref"].rpartition("/")[2]) | {"$defs": schemas}  # of the payload
        for each, shown in zip(parameters, self.schema["properties"].values(), strict=True):  # in forms
            if each.annotation in FORM_FORMATS:
                shown["format"] = FORM_FORMATS[each.annotation]
            with suppress(ValueError):  # there is no default, or it is not JSON
                shown["default"] = json.loads(to_json(each.default))

    def read(self, payload: str) -> dict[str, Any]:
        """The arguments in a payload, of the types in the signature. ValueError names what is wrong."""
        try:
            return msgspec.structs.asdict(self._decode(payload))
        except Exception as error:  # a type of a parameter may have code of its own
            raise ValueError(explain(error, "payload", self._kinds)) from None

    def __call__(self, arguments: Mapping[str, Any]) -> Awaitable[Any]:
        """Run the function: in the task that awaits this if it is `async def`, in a thread if it is `def`."""
        if self.is_async:
            return cast(Awaitable[Any], self.function(**arguments))
        # A thread cannot be interrupted: a cancelled call goes on until the thread ends. The function may ask
        # `trio.from_thread.check_cancelled()`. As many threads as workers run: no limit may hold one back.
        call = partial(self.function, **arguments)
        return trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1))


def handler(job_type: str) -> Callable[[Function], Function]:
    """Make a function the handler of `job_type`: its parameters are the fields of the payload.

        @handler("resize")
        def resize(path: str, width: int = 800) -> str: ...

    A parameter may have any type that msgspec reads from JSON; without one it takes anything. What the
    function returns is the job's result; a raise is a failed attempt. Raises TypeError for a bad signature.
    """

    def register(function: Function) -> Function:
        HANDLERS[job_type] = Handler(job_type, function)
        return function

    return register


@handler("email")
async def email(to: str, subject: str, body: str) -> None:
    """Send an e-mail; simulated, since SMTP_URL is not set: a line in the log, and one second."""
    log.info("simulated e-mail to %r: %r, %d characters", to, subject, len(body))
    await trio.sleep(1)


def _log_in(server: smtplib.SMTP, url: SplitResult, tls: ssl.SSLContext) -> None:
    """Encrypt the connection if the server offers it, and log in if the URL has a user."""
    server.ehlo()
    if server.has_extn("starttls"):
        server.starttls(context=tls)
    if url.username:
        if not isinstance(server.sock, ssl.SSLSocket) and url.hostname not in LOOPBACK:
            raise smtplib.SMTPNotSupportedError("the password would go over an unencrypted connection")
        server.login(unquote(url.username), unquote(url.password or ""))


def send_email_through(url: str, sender: str) -> None:
    """Make the handler of `email` a real one, which sends through the SMTP server at `url`."""
    parts, tls = urlsplit(url), ssl.create_default_context()
    connect: Any = partial(smtplib.SMTP_SSL, context=tls) if parts.scheme == "smtps" else smtplib.SMTP

    @handler("email")
    def email(to: str, subject: str, body: str) -> None:
        """Send an e-mail."""
        message = EmailMessage()  # which refuses a line break in a header
        message["From"], message["To"], message["Subject"] = sender, to, subject
        if any(re.search(r"[\r\n]", str(value)) for value in message.values()):  # encoded
            raise ValueError("a header may not contain linefeed or carriage return characters")
        message.set_content(body)
        with connect(parts.hostname, parts.port or 0, timeout=SMTP_SECONDS) as server:  # 0: the usual port
            _log_in(server, parts, tls)
            try:
                refused = server.send_message(message)
            except smtplib.SMTPRecipientsRefused as error:  # all of them
                if all(code >= 500 for code, _ in error.recipients.values()):
                    raise Unrecoverable(str(error)) from None
                raise
            if refused:  # only some: a retry would send to the others again
                log.warning("the SMTP server refused: %s", ", ".join(refused))


@handler("math")
async def math_(a: int | str, b: int | str) -> int:
    """Add two integers, given as numbers or as strings."""
    return int(a) + int(b)


@handler("long")
async def long(seconds: float = 2) -> None:
    """Take a while, and tell how far it is."""
    for second in range(math.ceil(seconds)):
        progress(second / seconds, f"{second} of {seconds:g} s")
        await trio.sleep(min(1.0, seconds - second))
    progress(1, f"{seconds:g} of {seconds:g} s")


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────
#
# redis-py's asyncio client does not run on Trio, its blocking client would stop the event loop, and a thread
# for each command costs more than the command itself. So redis-py opens the connection, in a thread; then
# hiredis and Trio use its socket. One task owns a connection, and is its transport: while its round trip is
# under way, the commands of all other tasks gather, and the next one carries them all. Two connections let
# Redis work on one batch while Python works on the replies to the other.

Command = tuple[str | int, ...]
Transport = Callable[[Sequence[Command]], Awaitable[list[Any]]]  # carries a batch, returns as many replies
Batch = list[tuple[Command, trio.lowlevel.Task]]  # each command with its caller

CONNECTIONS = 2  # with one, short jobs run 40 % slower; and a third makes the batches too small
REPLY_SECONDS = 2.5  # without a byte, after which a try has failed; after two, in 6 s, a client gets a 503
NOT_YET = object()
pack_command: Callable[[Command], bytes] = cast(Any, hiredis.pack_command)  # whose stub takes one word only
# What a server says that cannot serve for now: a replica, one that starts, a node that lost or gives away the
# slot. ASK is not followed: while a slot moves, a script would find only half of the keys at either end.
WORDS = "READONLY|MASTERDOWN|MOVED|ASK|TRYAGAIN|CLUSTERDOWN|NOREPLICAS|LOADING"
UNFIT = re.compile(rf"(ERR Error running script.* -)?({WORDS})\b")
SENTINEL_URL = re.compile(r"(rediss?)\+sentinel://(.*@)?([^/@?]+)/([^/?]+)(/.*)?")
SENTINEL_OPTIONS = re.compile("username|password|retry|protocol|socket_(connect_)?timeout|ssl_.*")


class RedisAddress:
    """Where a URL leads: to Redis, or to sentinels that know where it is. ValueError if it leads nowhere."""

    def __init__(self, url: str) -> None:
        self._sentinels: list[tuple[str, int]] = []
        if match := SENTINEL_URL.fullmatch(url):
            scheme, credentials, hosts, self._name, path = match.groups("")
            addresses = [urlsplit(f"//{host}") for host in hosts.split(",")]
            self._sentinels = [(each.hostname or "", each.port or 26379) for each in addresses]
            url = f"{scheme}://{credentials}{path}"
        pool = redis.ConnectionPool.from_url(url)
        patience = {"socket_timeout": REPLY_SECONDS, "socket_connect_timeout": REPLY_SECONDS}
        never = Retry(NoBackoff(), 0)  # `Store` says what is sent again
        self._class = pool.connection_class
        self._options = pool.connection_kwargs | patience | {"protocol": 2, "retry": never}
        self._class(**self._options)  # which refuses what it does not know

    def _ask_sentinels(self) -> tuple[str, int]:
        own = {name: value for name, value in self._options.items() if SENTINEL_OPTIONS.fullmatch(name)}
        own["ssl"] = issubclass(self._class, redis.SSLConnection)
        own["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)  # it needs protocol 3
        for credentials in ({}, {"username": None, "password": None}):  # sentinels often have no password
            sentinel = cast(Any, Sentinel)(self._sentinels, sentinel_kwargs=own | credentials)
            with suppress(MasterNotFoundError):
                return cast(tuple[str, int], sentinel.discover_master(self._name))
        raise redis.ConnectionError(f"no sentinel knows a primary {self._name!r}")

    def connect(self, moved: tuple[str, int] | None) -> Any:
        """A connection that redis-py opened; this blocks. `moved` is where to, if Redis said so."""
        options = dict(self._options)
        if moved or self._sentinels:
            options["host"], options["port"] = moved or self._ask_sentinels()
        connection = self._class(**options)
        connection.connect()
        return connection


class RedisConnection:
    """One connection to Redis, which Trio waits for. It connects when first used, and after each loss."""

    def __init__(self, url: str) -> None:
        self._address = RedisAddress(url)
        self._moved: tuple[str, int] | None = None  # where the cluster said that our keys are
        self._connection: Any = None
        self._give_up_at = math.inf  # unless the exchange that is under way makes progress

    async def _connect(self) -> None:
        moved, self._moved = self._moved, None  # after a failure there, the configured address is used again
        connect = self._address.connect
        with trio.fail_at(self._give_up_at):
            # Its own thread: all of those that Trio lends may be taken by handlers.
            self._connection = await trio.to_thread.run_sync(
                connect, moved, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        self._moved = moved
        self._socket: socket.socket = self._connection._sock  # private: redis-py has no other way to it
        self._socket.setblocking(False)
        self._reader = hiredis.Reader(redis.ConnectionError, self._refusal, "utf-8", "replace", NOT_YET)

    def _refusal(self, text: str) -> Exception:
        """The error that is the reply to one command. One that concerns all is raised, out of the reader."""
        if text.startswith("NOSCRIPT"):
            return redis.exceptions.NoScriptError(text)
        if not UNFIT.match(text):
            return redis.ResponseError(text)
        if moved := re.search(r"MOVED \d+ (\S*):(\d+)", text):
            self._moved = moved[1].strip("[]") or self._connection.host, int(moved[2])
        raise redis.ConnectionError(text)

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
                self._give_up_at = trio.current_time() + REPLY_SECONDS
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self) -> None:
        """Feed the reader what comes next; nothing, if that was only a part of a TLS record."""
        await trio.lowlevel.wait_readable(self._socket)
        with suppress(BlockingIOError, ssl.SSLWantReadError):
            data = self._socket.recv(65_536)  # more than a TLS record: nothing stays behind in OpenSSL
            if not data:
                raise redis.ConnectionError("Redis closed the connection")
            self._reader.feed(data)
            self._give_up_at = trio.current_time() + REPLY_SECONDS

    async def message(self) -> Any:
        """The next message of a channel that was subscribed to, however long it takes."""
        while (reply := self._reader.gets()) is NOT_YET:
            await self._receive()
        return reply

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    async def watch(self) -> None:
        """Cut off each exchange that makes no progress. A scope around each would slow short jobs by 5 %."""
        while True:
            await trio.sleep(REPLY_SECONDS / 10)
            if self._connection and trio.current_time() >= self._give_up_at:
                with suppress(OSError):  # it was closed at the other end
                    self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits for it wakes up, and fails

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands and receive their replies; a refusal is a ResponseError among them.

        Raises redis.ConnectionError or TimeoutError; then nobody knows which were carried out.
        """
        replies: list[Any] = []
        self._give_up_at = trio.current_time() + REPLY_SECONDS
        try:
            if self._connection is None:
                await self._connect()
            await self._send(b"".join(map(pack_command, commands)))
            while len(replies) < len(commands):
                await self._receive()
                replies += iter(self._reader.gets, NOT_YET)
            if len(replies) > len(commands) or self._reader.has_data():
                raise redis.ConnectionError("Redis sent more than it was asked for")
        except BaseException as error:  # Cancelled too
            self.hang_up()  # or a late reply would meet the next exchange
            if isinstance(error, Exception) and trio.current_time() >= self._give_up_at:
                raise redis.TimeoutError(f"no progress for {REPLY_SECONDS:g} s") from None
            if isinstance(error, OSError | UnicodeError):  # the latter is what an impossible host name gives
                raise redis.ConnectionError(str(error)) from None
            raise
        self._give_up_at = math.inf  # or the watch would cut off a connection that has nothing to do
        return replies


def memory() -> Transport:
    """Carries commands to a Redis in the memory of this process."""
    import fakeredis  # only here: with a real Redis it is not needed

    client = fakeredis.FakeRedis(decode_responses=True)
    one_by_one = trio.CapacityLimiter(1)

    def exchange(commands: Sequence[Command]) -> list[Any]:
        pipe: Any = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return list(pipe.execute(raise_on_error=False))

    return lambda commands: trio.to_thread.run_sync(exchange, commands, limiter=one_by_one)


class AutoPipeline:
    """Redis for many tasks at once.

    >>> pipeline = AutoPipeline(RedisConnection("redis://localhost").exchange)
    >>> nursery.start_soon(pipeline.run)
    >>> await pipeline.call("INCR", "a")
    1

    Two invariants. A caller sleeps from when its command is queued until it is woken, once, by the transport
    that took the command out of the queue. And while a command is queued, not all transports are parked.
    """

    def __init__(self, *transports: Transport) -> None:
        self._transports = transports
        self._idle = trio.lowlevel.ParkingLot()  # for transports that have nothing to carry
        self._queue: Batch = []
        self._away = False

    def _note(self, error: redis.RedisError | None) -> None:
        if error and not self._away:
            log.warning("Redis is away: %s; waiting for it", error)
        elif self._away and not error:
            log.info("Redis is back")
        self._away = error is not None

    def _take_batch(self) -> Batch:
        """All that is queued; or, if the other transport is idle, half of it, and the other one is woken."""
        share = -(-len(self._queue) // (1 + len(self._idle)))
        batch, self._queue = self._queue[:share], self._queue[share:]
        if self._queue:
            self._idle.unpark()
        return batch

    def _wake(self, batch: Batch, replies: Sequence[Any]) -> None:
        for (_, caller), reply in zip(batch, replies, strict=True):
            trio.lowlevel.reschedule(caller, outcome.Value(reply))

    def _fail(self, batch: Batch, error: redis.RedisError) -> None:
        """Wake the callers of a batch, and of what came meanwhile: that would only time out in its turn."""
        batch, self._queue = batch + self._queue, []
        self._wake(batch, [type(error)(*error.args) for _ in batch])  # one each, as each gets a traceback

    async def _carry(self, transport: Transport) -> None:
        """Carry batch after batch. Whatever a transport does, it ends in `_wake` for the whole batch."""
        while True:
            while not self._queue:  # again, as another transport may have taken what this one was woken for
                await self._idle.park()
            batch = self._take_batch()
            try:
                replies = await transport([command for command, _ in batch])
            except redis.RedisError as error:
                self._note(error)
                self._fail(batch, error)
            except BaseException:  # a bug, or Cancelled: nobody else could wake these callers
                self._fail(batch, redis.ConnectionError("the connection was cut off"))
                raise
            else:
                self._note(None)
                self._wake(batch, replies)

    def is_idle(self) -> bool:
        """Whether the next command would be the first to be sent."""
        return not self._queue

    async def run(self) -> None:
        """Carry the commands. Cancel it only when nobody calls any more."""
        async with trio.open_nursery() as nursery:
            for transport in self._transports:
                nursery.start_soon(self._carry, transport)

    async def call(self, *command: str | int) -> Any:
        """The reply to a command.

        Raises redis.ResponseError if it was refused, and redis.ConnectionError or TimeoutError when it is
        unknown whether it was carried out. It can be cancelled before the command is queued, and not after:
        otherwise a claim could take a job out of the queue for a worker that is already gone.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # which does not wait; nothing below may, up to the end
        self._queue.append((command, trio.lowlevel.current_task()))
        if len(self._queue) == 1:  # otherwise a transport was woken before, or none is idle
            self._idle.unpark()
        reply = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if isinstance(reply, Exception):
            raise reply
        return reply


# ── Store ───────────────────────────────────────────────────────────────────────────────────────
#
# Every transition is one Lua script. Redis runs it alone, but rolls nothing back: an error in the middle, as
# from a missing right, leaves what was written before it. Four rules keep the jobs safe.
# - Add, name, take away. A job is put into its new place, then its status names that place, then it leaves
#   the old one: at every call it is at least where its status says. What an error leaves over is a stray, an
#   entry in a place that the status does not name. Whoever meets it there removes it.
# - The first write takes away. Redis out of memory refuses scripts whose first write may add. Only `submit`,
#   whose client can be told, may be refused: every other script begins by taking away, if only nothing.
# - Everything may be sent twice, since a lost reply tells nothing. A submission brings its ids. A claim has a
#   fencing token, "<worker>:<number>", that no other claim ever had: sent again, it gets the same job. A
#   report with another token than the job's is refused; sent again, it finds the status changed already.
# - The time is Redis's: an instance with a wrong clock must not end the leases of others.

# `now` is a text, like the numbers that every claim sends: Redis is slow to write a number as one.
LUA_CLOCK = "local time = redis.call('TIME') local now = time[1] .. string.format('%03d', time[2] / 1000)"

# FINISHED are places, too, named as their statuses.
LUA_NAMES = "local LAYOUT, FINISHED = '" + LAYOUT + "', {'" + "', '".join(FINISHED) + "'}\n"
LUA_FUNCTIONS = """
local P = KEYS[1]

local function read(id, ...)  -- fields of a job, or of all the names and values in turn
  local job = P .. 'job:' .. id
  local held = ... and redis.pcall('HMGET', job, ...) or redis.pcall('HGETALL', job)
  if held.err and not string.find(held.err, 'WRONGTYPE') then error(held.err, 0) end
  return held.err and {} or held  -- none if it was deleted, or its key is somebody else's
end

local function is_finished(status)
  for _, each in ipairs(FINISHED) do if each == status then return true end end
end

local function is_stray(id, status, place)
  if status == place then return false end
  if status then return status == 'pending' or status == 'processing' or is_finished(status) end
  local fields = redis.pcall('HLEN', P .. 'job:' .. id)
  return type(fields) == 'table' or fields == 0  -- no job; otherwise somebody deleted the status alone
end

local function push(command, id, is_quiet)  -- LPUSH: last in line; RPUSH: first (COMMANDS looks for both)
  if redis.call(command, P .. 'queue', id) > 1 or is_quiet then return end
  -- A hint, which may fail. It says how many hear it, so that only a few instances come for a job.
  redis.pcall('PUBLISH', P .. 'wake', redis.pcall('PUBSUB', 'NUMSUB', P .. 'wake')[2] or 1)
end

local function unlist(id) redis.call('ZREM', P .. 'started', id) end  -- of '': a first write that takes away

local function move(id, place, time, ...)  -- out of `processing`; in this order, as the first two rules say
  unlist(id)
  if place == 'queue' then push('RPUSH', id) else redis.call('ZADD', P .. place, time, id) end
  redis.call('HSET', P .. 'job:' .. id, 'status', ...)
  redis.call('ZREM', P .. 'processing', id)
end

local function finish(id, status, ...)
  for _, other in ipairs(FINISHED) do
    if other ~= status then redis.call('ZREM', P .. other, id) end  -- perhaps a stray
  end
  move(id, status, now, status, 'finished_at', now, ...)
end

local function requeue(id, attempts)  -- first in line; without a token, so that a late report is refused
  move(id, 'queue', nil, 'pending', 'attempts', attempts, 'token', '')
end

local function read_job(id)
  return read(id, 'status', 'token', 'attempts', 'job_type', 'payload', 'max_retries', 'timeout')
end

local function first_in_queue()  -- its id, the job, and whether there are others behind it
  for _ = 1, 1000 do  -- skips at most so many cancelled jobs
    local ids = redis.call('LRANGE', P .. 'queue', '-2', '-1')
    local id = ids[#ids]
    local job = id and read_job(id)
    if not id or not is_stray(id, job[1], 'pending') then return id, job, #ids - 1 end
    redis.call('SREM', P .. 'withdrawn', id)
    redis.call('RPOP', P .. 'queue')
  end
end

local function claim(token, lease)  -- false without a token, or if there is no job
  local worker, number = string.match(token, '^(.*):(%d+)$')
  if not worker then return false end
  local record = P .. 'claim:' .. worker
  local id, job, behind = first_in_queue()
  -- The record lives for an hour, since no lease is longer: after that there is nothing to claim again.
  local before = redis.call('SET', record, number .. ' ' .. (id or ''), 'EX', '3600', 'GET')
  local last, last_id = string.match(before or '', '^(%d+) (.*)')
  local is_again = last and tonumber(last) >= tonumber(number)
  if is_again then  -- its reply was lost; or it comes late, and nobody waits for it any more
    redis.call('SET', record, before, 'EX', '3600')
    id, job, behind = last_id, read_job(last_id), 1
    if last ~= number or job[1] ~= 'processing' or job[2] ~= token then return false end
  end
  if not id then return false end
  local status, _, attempts, job_type, payload, max_retries, timeout = unpack(job)
  if tonumber(attempts) and not is_again then attempts = attempts + 1 end
  redis.call('ZADD', P .. 'processing', now + lease, id)
  redis.call('ZADD', P .. 'started', now, id)
  redis.call('HSET', P .. 'job:' .. id, 'status', 'processing', 'attempts', attempts or '', 'token', token,
    'worker', worker, 'started_at', now)
  if not is_again then redis.call('RPOP', P .. 'queue') end
  -- In the order of Claim's fields, without the first one, its token.
  return {behind, id, job_type, payload, attempts, max_retries, timeout, is_again and 'pending' or status}
end
"""

LUA_COMMON = LUA_NAMES + LUA_FUNCTIONS

SCRIPTS = {
    # → the answer, or the one that was kept under this idempotency key. It stores all jobs or none.
    "submit": """
        local key, answer, is_quiet = unpack(ARGV, 1, 3)  -- then each job: NewJob's fields, in their order
        local kept = key ~= '' and redis.call('GET', P .. 'idempotency:' .. key)
        if kept then return kept end
        local stored, pushed = {}, 0
        local done, problem = pcall(function()
          local number = redis.call('ZREVRANGE', P .. 'history', 0, 0, 'WITHSCORES')[2] or 0
          for i = 4, #ARGV, 6 do
            local id, job_type, payload, max_retries, timeout, delay = unpack(ARGV, i, i + 5)
            local job = P .. 'job:' .. id
            if redis.call('EXISTS', job) == 0 then  -- otherwise this submission came before
              number, stored[#stored + 1] = number + 1, id
              redis.call('HSET', job, 'job_type', job_type, 'payload', payload, 'status', 'pending',
                'attempts', 0, 'max_retries', max_retries, 'timeout', timeout, 'created_at', now)
              redis.call('ZADD', P .. 'history', number, id)
              if delay == '0' then
                push('LPUSH', id, is_quiet == '1')
                pushed = pushed + 1
              else
                redis.call('HSET', job, 'due_at', now + delay)
                redis.call('ZADD', P .. 'delayed', now + delay, id)
              end
            end
          end
          if key ~= '' then redis.call('SET', P .. 'idempotency:' .. key, answer, 'EX', 86400) end
        end)
        if done then return answer end
        redis.call('LTRIM', P .. 'queue', pushed, -1)  -- these are at its head: nobody else pushed meanwhile
        for _, id in ipairs(stored) do
          redis.call('ZREM', P .. 'delayed', id)
          redis.call('ZREM', P .. 'history', id)
          redis.call('DEL', P .. 'job:' .. id)
        end
        error(problem, 0)""",
    # → whether the report was accepted, and a Claim or nothing. Without an id there is no report, without a
    #   token no claim. Report first: an error between the two repeats a job; the other order would lose one.
    "report": """
        -- In the order in which Store.report_and_claim sends them.
        local id, token, transition, text, trace, progress, attempts, delay = unpack(ARGV)
        local next_token, lease = unpack(ARGV, 9)
        local held_by, status, cancel = unpack(id == '' and {} or read(id, 'token', 'status', 'cancel'))
        local accepted, due_at = id == '' or held_by == token, now + delay
        if id == '' or not accepted or status ~= 'processing' then  -- none, or refused, or it came before
          unlist(accepted and id or '')
        elseif transition == 'complete' then
          finish(id, 'completed', 'result', text)
          if attempts ~= '1' then redis.call('HDEL', P .. 'job:' .. id, 'error', 'traceback') end
        elseif transition == 'fail' or cancel then
          finish(id, 'failed', 'error', cancel and 'cancelled' or text, 'traceback', trace)
        elseif transition == 'release' then
          requeue(id, attempts)
        else  -- retry or defer
          move(id, 'delayed', due_at, 'pending', 'attempts', attempts, 'due_at', due_at,
            unpack(transition == 'retry' and {'error', text, 'traceback', trace} or {}))
        end
        if accepted and progress ~= '' then redis.call('HSET', P .. 'job:' .. id, 'progress', progress) end
        return {accepted and 1 or 0, claim(next_token, lease)}""",
    # → now, the tokens that hold no job, and those that a DELETE asks to be cancelled
    "renew": """
        local lease = unpack(ARGV, 1, 1)  -- then the id, the token and the progress of each claim
        local lost, cancelled, lease_end = {}, {}, string.format('%d', now + lease)
        unlist('')
        for i = 2, #ARGV, 3 do
          local id, token, progress = unpack(ARGV, i, i + 2)
          local held_by, status, cancel = unpack(read(id, 'token', 'status', 'cancel'))
          if held_by ~= token or is_stray(id, status, 'processing') then
            lost[#lost + 1] = token
          else
            if lease ~= '0' then redis.call('ZADD', P .. 'processing', lease_end, id) end
            if progress ~= '' then redis.call('HSET', P .. 'job:' .. id, 'progress', progress) end
            if cancel then cancelled[#cancelled + 1] = token end
          end
        end
        return {tonumber(now), lost, cancelled}""",
    # → jobs in the queue; ms until there is more to do, or -1; id, type, attempts, status of ended leases
    "sweep": """
        local most, end_leases_by, retention, keep = unpack(ARGV)
        local ended, more = {}, false
        local function due(place)
          local ids = redis.call('ZRANGEBYSCORE', P .. place, '-inf', now, 'LIMIT', 0, most)
          more = more or #ids == tonumber(most)
          return ids
        end
        local function first(place)
          local id, time = unpack(redis.call('ZRANGE', P .. place, 0, 0, 'WITHSCORES'))
          return {place = place, id = id, time = tonumber(time or math.huge)}
        end
        local function count(text) return tonumber(string.match(text or '', '^%d+$')) end
        unlist('')
        for _, id in ipairs(due('delayed')) do
          if not is_stray(id, read(id, 'status')[1], 'pending') then push('LPUSH', id) end
          redis.call('ZREM', P .. 'delayed', id)
        end
        for _, id in ipairs(tonumber(now) <= tonumber(end_leases_by) and due('processing') or {}) do
          local status, job_type, attempts, max_retries, cancel =
            unpack(read(id, 'status', 'job_type', 'attempts', 'max_retries', 'cancel'))
          if is_stray(id, status, 'processing') then
            unlist(id)
            redis.call('ZREM', P .. 'processing', id)
          else
            local is_last = (count(attempts) or 0) > (count(max_retries) or math.huge)
            local reason = cancel and 'cancelled' or is_last
              and 'the worker died, or was silent for longer than its lease, in each attempt'
            attempts = attempts or ''
            if reason then finish(id, 'failed', 'error', reason, 'token', '') else requeue(id, attempts) end
            ended[#ended + 1] = {id, job_type or '', attempts, reason and 'failed' or 'pending'}
          end
        end
        local too_many = -keep
        for _, place in ipairs(FINISHED) do too_many = too_many + redis.call('ZCARD', P .. place) end
        for i = 1, most do
          local oldest = {time = math.huge}
          for _, place in ipairs(FINISHED) do
            local found = first(place)
            if found.time < oldest.time then oldest = found end
          end
          local id, place = oldest.id, oldest.place
          if not id or i > too_many and oldest.time > now - retention then break end
          more = more or i == tonumber(most)
          if not is_stray(id, read(id, 'status')[1], place) then
            redis.call('ZREM', P .. 'history', id)
            redis.call('DEL', P .. 'job:' .. id)
          end
          redis.call('ZREM', P .. place, id)
        end
        local next_due = first('delayed').time
        redis.pcall('SET', P .. 'layout', LAYOUT, 'NX')  -- in case that Redis lost its data
        local wait = more and 0 or next_due < math.huge and math.max(0, next_due - now) or -1
        return {redis.call('LLEN', P .. 'queue'), wait, ended}""",
    # → the next cursor or '', each job as JSON (names and values in turn, then its id), how many jobs each
    #   status has, in Status's order; and for how long the first in the queue has been due, if there is one
    "page": """
        local status, cursor, limit, bytes, cut = unpack(ARGV)
        limit, bytes, cut = tonumber(limit), tonumber(bytes), tonumber(cut)
        -- The job that was listed last, and its number: its score, or from -1 downwards in the queue.
        local after, number = string.match(cursor, '(.*)%.(.*)')
        local is_in_queue = after and tonumber(number) < 0  -- behind all that are delayed
        local ids, numbers, jobs, size, shown = {}, {}, {}, 0, 0  -- ids beyond `limit`: another page
        local function rank_behind(place)  -- highest score first; where these are equal, by falling ids
          if redis.call('ZSCORE', P .. place, after) == number then
            return redis.call('ZREVRANK', P .. place, after) + 1
          end
          local rank = redis.call('ZCOUNT', P .. place, '(' .. number, '+inf')  -- it is gone, or has moved on
          for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', P .. place, number, number)) do
            if id > after then rank = rank + 1 end
          end
          return rank
        end
        local function add_scored(place)
          local first = after and rank_behind(place) or 0
          local found = redis.call('ZREVRANGE', P .. place, first, first + limit, 'WITHSCORES')
          for i = 1, #found, 2 do ids[#ids + 1], numbers[#ids + 1] = found[i], found[i + 1] end
        end
        local function index_behind(key)  -- what came since has moved it on, but hardly far
          local index = -number - 1
          for i, id in ipairs(redis.call('LRANGE', key, index, index + 200)) do
            if id == after then return index + i end
          end
          local found = redis.call('LPOS', key, after)  -- if not, it was claimed, and so were all behind it
          return found and found + 1 or redis.call('LLEN', key)
        end
        local function add_queued()
          local first = is_in_queue and index_behind(P .. 'queue') or 0
          local found = redis.call('LRANGE', P .. 'queue', first, first + limit)
          for i, id in ipairs(found) do ids[#ids + 1], numbers[#ids + 1] = id, -first - i end
        end
        if status == 'pending' then
          if not is_in_queue then add_scored('delayed') end
          add_queued()
        else
          add_scored(status == '' and 'history' or status == 'processing' and 'started' or status)
        end
        while shown < math.min(#ids, limit) and size < bytes do
          shown = shown + 1
          local job = read(ids[shown])
          for i = 2, cut > 0 and #job or 0, 2 do
            if #job[i] > cut then  -- not in mid-character; with the … no number looks whole
              job[i] = string.gsub(string.sub(job[i], 1, cut), '[\\192-\\255][\\128-\\191]*$', '') .. '…'
            end
          end
          job[#job + 1] = ids[shown]
          jobs[shown] = cjson.encode(job)  -- as one text: Redis takes a third longer for a list
          size = size + #jobs[shown]
        end
        local next = shown < #ids and ids[shown] .. '.' .. numbers[shown] or ''
        local function count(place) return redis.call('ZCARD', P .. place) end
        local waiting = redis.call('LLEN', P .. 'queue') - redis.call('SCARD', P .. 'withdrawn')
        local pending = math.max(0, waiting) + count('delayed')
        local line, since = redis.call('LRANGE', P .. 'queue', -10, -1), nil  -- first in line is the last
        for i = #line, 1, -1 do  -- some may be cancelled
          local job_status, created, due = unpack(read(line[i], 'status', 'created_at', 'due_at'))
          local time = job_status == 'pending' and tonumber(due or created or '')
          since = time and math.max(0, math.min(now, time))  -- perhaps it is damaged
          if since then break end
        end
        local counts = {pending, count('processing')}
        for _, place in ipairs(FINISHED) do counts[#counts + 1] = count(place) end
        return {next, jobs, counts, since and now - since or false}""",
    # → those of the ids whose jobs are finished, or unknown
    "finished": """
        local finished = {}
        for _, id in ipairs(ARGV) do
          local status = redis.pcall('HGET', P .. 'job:' .. id, 'status')
          if type(status) == 'table' then status = read(id, 'status')[1] end  -- an error
          if status ~= 'pending' and status ~= 'processing' then finished[#finished + 1] = id end
        end
        return finished""",
    # → the status that the job had, or nothing. What waits or runs fails; of a thread, its worker is asked.
    "cancel": """
        local id, token = unpack(ARGV)  -- then the job types whose handlers cannot be interrupted
        local status, held_by, job_type = unpack(read(id, 'status', 'token', 'job_type'))
        if held_by == token then return 'pending' end  -- this request came before, and its reply was lost
        if not status or is_finished(status) then return status end
        local threads = {}
        for i = 3, #ARGV do threads[ARGV[i]] = true end
        unlist('')
        if status == 'processing' and threads[job_type] then
          redis.call('HSET', P .. 'job:' .. id, 'cancel', 1)
          return status
        end
        finish(id, 'failed', 'error', 'cancelled', 'token', token)  -- with which a late report is refused
        if status == 'pending' and redis.call('ZREM', P .. 'delayed', id) == 0 then
          redis.call('SADD', P .. 'withdrawn', id)  -- it stays in the queue, until a claim meets it there
        end
        return status""",
}
LUA = LUA_CLOCK + LUA_COMMON + "".join(SCRIPTS.values())
# Each is tried on one key. DEL comes last, since it takes away what the others left there.
COMMANDS = [*sorted({*re.findall(r"(?:call|push)\('([A-Z]+)'", LUA)} - {"DEL"}), "EVALSHA", "DEL"]
RIGHTS = f"~{PREFIX}* &{PREFIX}* +@read +@write +@scripting +@pubsub +@connection +time +info"
NO_LIMIT = 1 << 53  # for Lua, whose numbers are exact up to here


class Report(NamedTuple):
    """What became of an attempt, as its worker tells Redis."""

    claim: Claim
    transition: str  # complete, fail, retry, defer or release
    text: str = ""  # the result as JSON, or the error
    traceback: str = ""  # of the error
    delay: float = 0  # seconds before the next attempt
    progress: str = ""  # as JSON, unless a heartbeat took it


NO_REPORT = Report(Claim(token="", behind=0, id=""), "")


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
    oldest: float | None  # seconds for which the first job in the queue has been due


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)


class Store:
    """The state of all jobs. Each change is one atomic step; when its reply was lost, it can be taken again.

    All raise redis.RedisError: ConnectionError or TimeoutError when Redis is away, ResponseError when it
    refuses. `clock` is Lua that sets `now`, in milliseconds; tests bring their own.
    """

    def __init__(self, pipeline: AutoPipeline, prefix: str = PREFIX, clock: str = LUA_CLOCK) -> None:
        self._pipeline = pipeline
        self.prefix = prefix
        self._texts = {name: "\n".join([clock, LUA_COMMON, lua]) for name, lua in SCRIPTS.items()}
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    def _run(self, name: str, *arguments: str | int) -> Awaitable[Any]:
        return self._twice("EVALSHA", self._hashes[name], 1, self.prefix, *arguments)

    async def _twice(self, *command: str | int) -> Any:
        """The reply to a command, which is sent again if the first reply was lost, or Redis is a new one."""
        was_lost = was_new = False
        while True:
            try:
                return await self._pipeline.call(*command)
            except redis.exceptions.NoScriptError:
                if was_new:
                    raise
                was_new = True
                for text in self._texts.values():  # all, or a submission would wait for its own, but no claim
                    await self._pipeline.call("SCRIPT", "LOAD", text)
            except (redis.ConnectionError, redis.TimeoutError):
                if was_lost:
                    raise
                was_lost = True

    async def submit(
        self, jobs: Sequence[NewJob], key: str = "", fingerprint: str = "", is_quiet: bool = False
    ) -> list[str] | None:
        """Put jobs into the queue, or into `delayed`, all or none; their ids.

        With an idempotency key, the ids that it got in the last 24 hours; None if that was for another
        `fingerprint`, a word without spaces. Other instances are not notified if it `is_quiet`.
        """
        answer = " ".join([fingerprint, *(job.id for job in jobs)])
        fields = [field for job in jobs for field in (*job[:4], str(job.timeout), _milliseconds(job.delay))]
        kept = await self._run("submit", key, answer, int(is_quiet), *fields)
        first_fingerprint, *ids = kept.split(" ")
        return ids if first_fingerprint == fingerprint else None

    async def report_and_claim(
        self, report: Report | None, token: str, lease: float
    ) -> tuple[bool, Claim | None]:
        """Report if there is a report, and claim for `lease` seconds if there is a fencing token.

        A token is "<worker>:<number>", and the numbers of a worker rise: the same one again gets the same
        job, and an older one, which comes late, gets none. The answer: False if the report was refused, as
        the job has another token by now; and the job, if there was one.
        """
        claim, transition, text, trace, delay, progress = report or NO_REPORT
        attempts = claim.attempts - (transition in ("release", "defer"))  # these do not count
        reporting = claim.id, claim.token, transition, text, trace, progress, attempts, _milliseconds(delay)
        accepted, claimed = await self._run("report", *reporting, token, _milliseconds(lease))
        return accepted == 1, Claim.read(token, claimed) if claimed else None

    async def renew(
        self, held: Iterable[tuple[Claim, str]], lease: float
    ) -> tuple[int, list[str], list[str]]:
        """Let the leases of these claims end in `lease` seconds, unless it is 0; and keep their progress.

        Redis's time in milliseconds; the tokens that lost their job; and those that are to be cancelled.
        """
        texts = [text for claim, progress in held for text in (claim.id, claim.token, progress)]
        now, lost, cancelled = await self._run("renew", _milliseconds(lease), *texts)
        return now, lost, cancelled

    async def sweep(
        self, retention: float, keep: int = 0, end_leases_by: int = NO_LIMIT, most: int = 500
    ) -> Sweep:
        """Queue what is due, take back what has no living worker, delete finished jobs: `most` of each.

        Delete those older than `retention` seconds, and the oldest beyond `keep`; 0: no such limit. When
        Redis's time is past `end_leases_by`, in milliseconds, nothing is taken back: this sweep was held up,
        as the renewals of others may have been. If there was more to do, the wait is 0.
        """
        limits = most, end_leases_by, _milliseconds(retention) or NO_LIMIT, keep or NO_LIMIT
        ready, wait, ended = await self._run("sweep", *limits)
        return Sweep(ready, math.inf if wait < 0 else wait / 1000, ended)

    async def cancel(self, job_id: str) -> str | None:
        """Let a job that waits or runs end as failed; the status that it had, None if it is unknown."""
        threads = [job_type for job_type, handler in HANDLERS.items() if not handler.is_async]
        status: str | None = await self._run("cancel", job_id, f"cancel:{uuid.uuid4()}", *threads)
        return status

    async def finished(self, job_ids: Iterable[str]) -> list[str]:
        """Those of the jobs that are finished, or unknown."""
        return list(await self._run("finished", *job_ids))

    async def get(self, job_id: str) -> tuple[str, str] | None:
        """The status of a job and all of it as JSON; None if it is unknown."""
        values = await self._twice("HMGET", f"{self.prefix}job:{job_id}", *FIELDS)
        stored = dict(zip(FIELDS, values, strict=True))
        return (stored["status"] or "", job_json(job_id, stored)) if any(values) else None

    async def page(
        self, status: Status | None, cursor: str, limit: int, most_bytes: int = 1 << 30, cut: int = 0
    ) -> Page:
        """At most `limit` jobs behind the cursor, from the first if it is empty; fewer if they are large.

        Newest first: by submission, or with a `status` by when they began to run, finished, or will be due.
        Values longer than `cut` bytes, unless it is 0, are cut, end in "…", and are shown as texts.
        """
        cursor, jobs, counts, oldest = await self._run("page", status or "", cursor, limit, most_bytes, cut)
        found = list[str]()
        for *names_and_values, job_id in map(_read_texts, jobs):
            stored = dict(zip(names_and_values[::2], names_and_values[1::2], strict=True))
            if any(map(stored.get, FIELDS)) and status in (None, stored.get("status")):  # otherwise a stray
                found.append(job_json(job_id, stored))
        waits = None if oldest is None else oldest / 1000
        return Page(cursor, found, dict(zip(Status, counts, strict=True)), waits)

    def is_idle(self) -> bool:
        """Whether nothing waits to be sent to Redis."""
        return self._pipeline.is_idle()

    async def ping(self) -> None:
        """Ask whether Redis is there."""
        await self._twice("PING")

    async def layout(self) -> str:
        """The version of the keys in Redis, which is this program's if there was none."""
        key = f"{self.prefix}layout"
        if not await self._twice("GET", key):
            await self._twice("SET", key, LAYOUT, "NX")
        return str(await self._twice("GET", key))

    async def eviction_policy(self) -> str:
        """What Redis does when its memory is full, such as "noeviction"; empty if it does not say."""
        found = re.search(r"maxmemory_policy:(\S+)", await self._pipeline.call("INFO", "memory"))
        return found[1] if found else ""

    async def missing_rights(self) -> list[str]:
        """The Redis commands that are needed and this user may not run. Each is tried on a key of no use."""
        words, missing = [f"{self.prefix}rights", "0", "0", "0"], list[str]()
        known = await self._pipeline.call("COMMAND", "INFO", *COMMANDS)
        for name, about in zip(COMMANDS, known, strict=True):
            arity = abs(about[1]) if about else 1  # of a command that was renamed nothing is known
            try:
                await self._pipeline.call(name, *words[: arity - 1])
            except redis.ResponseError as error:  # mostly, that the key is of another type
                if re.match("NOPERM|ERR unknown command", str(error)):
                    missing.append(name)
        return missing


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────

TICK_SECONDS = 0.5  # how often the queue is swept, and the event loop watched
HEARTBEAT_SECONDS = 0.9  # how often an instance asks whether its attempts still hold their jobs
SWEEP_PAUSE_SECONDS = 0.01  # between two sweeps, when jobs fall due one after the other
AGAIN_SECONDS = 0.2  # how long to wait before a call that failed is made again
CALM_SECONDS = REPLY_SECONDS + 1.5  # by then every instance has noticed that Redis is back
UNKNOWN_TYPE_SECONDS = 2.0  # after which another instance may know the type of a job
TRACEBACK_MOST = 8000  # characters that are kept
FEW = 6  # instances, about, that answer a message; if none does (0.2 %), the next sweep finds the job
EXIT_SECONDS = 0.8  # from the end of the grace to the forced exit
NOT_OURS = 78  # from which a parent knows that Redis has keys of another layout (EX_CONFIG in sysexits.h)
QUIET_SECONDS = 10.0  # how long nothing more is said of refusals, after one was logged
SILENCE_SECONDS = 15.0  # without a message, after which the listener subscribes again
OUR_FRAMES = ("run_handler", "to_thread_run_sync", "Error.unwrap")  # above a handler's


class Notifier:
    """Wakes workers when there may be work: a hint, never state, so a worker that wakes up claims again."""

    def __init__(self) -> None:
        self.count = 0
        self.sleepers = trio.lowlevel.ParkingLot()

    def notify(self, jobs: float = math.inf) -> None:
        """Wake as many workers as there are jobs."""
        if jobs:
            self.count += 1
            if self.sleepers:  # or it would cost as much to wake nobody
                self.sleepers.unpark(count=jobs)

    async def wait(self, seen: int) -> None:
        """Wait for the next notification, but not if there was one since `count` was `seen`."""
        if self.count == seen:
            await self.sleepers.park()


class WorkerPool:
    """What the workers of one process share."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.notifier = Notifier()
        self.recovery = Notifier()  # of calls that failed: they are made again once a sweep succeeds
        self.stopping = trio.Event()  # set at shutdown: nothing more is claimed
        self.grace = trio.CancelScope()  # at its deadline `leave_behind` cancels whatever still runs
        self.requests = trio.CancelScope()  # around all that serve HTTP
        self.crashed = False  # whether a task failed: the exit status
        self.instance = f"{socket.gethostname()}:{os.getpid()}/{secrets.token_hex(6)}"
        self.is_ours = False  # whether the keys in Redis are known to be this program's
        self.opened = trio.Event()  # set when they are, or at shutdown
        self.numbers = itertools.count(1)  # of workers, and of claims
        self.attempts: dict[str, Attempt] = {}  # by fencing token
        self.recent_types: set[str] = set()  # of the attempts since the last tick
        self.unknown_types: set[str] = set()  # that were logged already
        self.waiters: WeakValueDictionary[str, trio.Event] = WeakValueDictionary()  # by the id of the job
        self.end_leases_by = 0  # Redis's time, in milliseconds; after it a sweep leaves leases alone
        self.log_refusals_from = -math.inf  # when the next one may be logged, since there may be many

    def open(self) -> None:
        """Let the workers and the sweep begin: the keys in Redis are ours."""
        self.is_ours = True
        self.opened.set()

    def stop(self, grace: float) -> None:
        """Claim nothing more, and cancel in `grace` seconds what still runs then."""
        self.grace.deadline = min(self.grace.deadline, trio.current_time() + grace)
        self.stopping.set()
        self.opened.set()
        self.notifier.notify()
        self.recovery.notify()
        self.answer_waiters(list(self.waiters))

    def answer_waiters(self, job_ids: Iterable[str]) -> None:
        """Wake the requests that wait for one of these jobs to finish."""
        for job_id in job_ids if self.waiters else ():
            if (event := self.waiters.get(job_id)) is not None:
                event.set()

    def refused(self, error: redis.RedisError) -> None:
        """Log what Redis refuses, but not all the time; that it is away is for the pipeline to say."""
        if isinstance(error, redis.ResponseError) and trio.current_time() >= self.log_refusals_from:
            self.log_refusals_from = trio.current_time() + QUIET_SECONDS
            log.error("Redis refused: %s", error)

    async def tell_redis(self, report: Report | None, token: str) -> Claim | None:
        """Report on the last job and claim another, again and again until Redis answers; the job, if any.

        When the pool is stopping, a claim is given up once it fails, a report at the end of the grace.
        """
        lease = self.settings.lease_seconds
        while True:
            seen = self.recovery.count
            try:  # with the same token each time: if a reply was lost, the next one has the same job
                accepted, claim = await self.store.report_and_claim(report, token, lease)
                break
            except redis.RedisError as error:
                self.refused(error)
            if self.stopping.is_set() and (not report or trio.current_time() >= self.grace.deadline):
                if report:
                    log.warning("job %s: its report may be lost; then it runs again", report.claim.id)
                return None
            with trio.move_on_at(self.grace.deadline):
                await self.recovery.wait(seen)  # or thousands of workers would press an ailing Redis
        if report and not accepted:
            log.warning("job %s: report refused: too late, or sent twice", report.claim.id)
        elif report and report.transition in ("complete", "fail"):
            self.answer_waiters([report.claim.id])
        return claim


def leaves(error: BaseException) -> list[BaseException]:
    """An error, or the first few of those in a group. What such a class has redefined is not asked."""
    found = [error]
    for each in found:  # which grows meanwhile: groups may be nested deeper than Python's stack
        if issubclass(type(each), BaseExceptionGroup):
            found += cast(Any, BaseExceptionGroup).exceptions.__get__(each)
    return [each for each in found if not issubclass(type(each), BaseExceptionGroup)][:5]


def describe(error: BaseException) -> str:
    """An error in one line, as `ValueError: no`; or those in a group."""
    try:
        text = "; ".join("".join(traceback.format_exception_only(each)).strip() for each in leaves(error))
    except BaseException:  # an error may have code of its own that shows it, and this may raise anything
        text = f"{type(error).__name__}, which cannot be shown"
    return to_unicode(text[:2000])


def trace(error: BaseException) -> str:
    """Where an error was raised: the handler's own frames, at most 8 kB, from both ends if there is more."""
    try:
        frames = error.__traceback__
        while frames and frames.tb_next and frames.tb_frame.f_code.co_qualname.startswith(OUR_FRAMES):
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:  # a group may be nested deeper than Python's stack, and an error may not be shown
        return ""
    half = TRACEBACK_MOST // 2
    return to_unicode(text if len(text) <= TRACEBACK_MOST else f"{text[:half]}\n…\n{text[-half:]}")


async def run_handler(attempt: Attempt, most_bytes: int) -> Report:
    """What to report of a job, if that depends on its handler alone."""
    claim, handler = attempt.claim, HANDLERS[attempt.claim.job_type]
    try:
        with attempt.scope:  # inside the `try`: to leave it raises, if the handler left a scope open
            try:
                result = await handler(handler.read(claim.payload))
            finally:
                attempt.is_over = True
                while attempt.abandoned:  # here, since what they hold open belongs to this task
                    await attempt.abandoned.pop().aclose()
            return Report(claim, "complete", to_json(result, most_bytes))
    except BaseException as raised:  # here, and nowhere else: a handler may raise anything
        if trio.current_effective_deadline() == -math.inf:  # only a crash cancels a scope around a worker
            raise
        is_final = any(issubclass(type(each), Unrecoverable) for each in leaves(raised))
        return Report(claim, "fail" if is_final else "retry", describe(raised), trace(raised))
    return Report(claim, "retry")  # it was cancelled: `judge` knows why


def judge(pool: WorkerPool, attempt: Attempt, report: Report) -> tuple[Report | None, str, str]:
    """The report to make, none if the lease was lost; how the attempt ended, and why, for the log."""
    if attempt.lost:
        return None, "cancelled", ": on request, or its lease was lost"
    if report.transition == "complete":  # also when it comes late
        return report, "completed", ""
    claim, is_cut_off, error = attempt.claim, attempt.scope.cancel_called, report.text
    if attempt.cancelled:
        return Report(claim, "fail", "cancelled"), "cancelled", ": on request"
    if is_cut_off and trio.current_time() >= pool.grace.deadline:
        return Report(claim, "release"), "released", " by the shutdown"
    if is_cut_off:
        error = f"timed out after {claim.timeout:g} s" + (f"; {error}" if error else "")
    if report.transition == "fail" or claim.attempts > claim.max_retries:
        return report._replace(transition="fail", text=error), "failed for good", f": {error}"
    delay = backoff(claim.attempts, pool.settings.retry_delay_seconds)
    return report._replace(text=error, delay=delay), "failed", f", again in {delay:.1f} s: {error}"


async def run_attempt(pool: WorkerPool, claim: Claim) -> Report | None:
    """Run a job once, and say what to report of it; nothing if its lease was lost meanwhile."""
    begun, name, number = trio.current_time(), claim.job_type, claim.attempts
    attempt = pool.attempts[claim.token] = Attempt(claim, trio.CancelScope(deadline=begun + claim.timeout))
    pool.recent_types.add(name)
    in_context = _attempt.set(attempt)
    log.info("%s, attempt %d of %d", name, number, claim.max_retries + 1)
    ended = await run_handler(attempt, pool.settings.max_body_bytes)
    del pool.attempts[claim.token]
    report, end, why = judge(pool, attempt, ended)
    level, took = logging.INFO if end == "completed" else logging.WARNING, trio.current_time() - begun
    log.log(level, "%s, attempt %d, %s after %.3f s%s", name, number, end, took, why)
    if ended.traceback:
        log.debug("the traceback:\n%s", ended.traceback)
    _attempt.reset(in_context)  # last: all of the above names the job in the log
    return report._replace(progress=attempt.progress) if report and attempt.progress else report


def decline(pool: WorkerPool, claim: Claim) -> Report | None:
    """What to report of a job that is not to be run here and now; None if it is to be run."""
    if claim.damage:
        return Report(claim, "fail", claim.damage)
    if pool.stopping.is_set():  # since it was claimed
        return Report(claim, "release")
    if claim.job_type in HANDLERS:
        return None
    if claim.job_type not in pool.unknown_types:
        pool.unknown_types.add(claim.job_type)
        log.warning("%s: this instance has no handler for it; such jobs are left to others", claim.job_type)
    return Report(claim, "defer", delay=UNKNOWN_TYPE_SECONDS)  # as while a new version is being deployed


def is_unchanged(context: Context) -> bool:
    """Whether this task's variables have the very values of `context`: `==` would be the values' own code."""
    now = copy_context()
    return len(now) == len(context) and all(now.get(name) is value for name, value in context.items())


async def run_jobs(pool: WorkerPool, worker: str) -> None:
    """Claim, run and report, until the pool is stopping, or a handler left something behind in this task."""
    task, clean, report = trio.lowlevel.current_task(), copy_context(), None
    while is_unchanged(clean) and not (pool.stopping.is_set() or task.child_nurseries):
        seen = pool.notifier.count  # before the claim: a job that comes after it ends the wait below
        claim = await pool.tell_redis(report, f"{worker}:{next(pool.numbers)}")
        report = None
        if claim:
            pool.notifier.notify(claim.behind)
            report = decline(pool, claim) or await run_attempt(pool, claim)
        else:
            await pool.notifier.wait(seen)
    if report:
        await pool.tell_redis(report, "")  # without a token, since this task may claim nothing more


async def work(pool: WorkerPool) -> None:
    """A worker, until the pool is stopping.

    A handler can leave something behind in its task, such as a context variable or an open nursery. Then that
    task ends before it meets the next job, and a fresh one goes on. (One for each attempt: half the speed.)
    """
    worker = f"{pool.instance}:{next(pool.numbers)}"
    await pool.opened.wait()
    while not pool.stopping.is_set():
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_jobs, pool, worker)
                [task] = nursery.child_tasks  # at once: it has not begun, so it cannot have ended
        except* RuntimeError:  # from Trio, for a task that ends with an open nursery
            if not task.child_nurseries:
                raise


async def renew_leases(pool: WorkerPool, lease: float) -> int:
    """Renew all leases, and cancel what lost its own or is to be cancelled; Redis's time, in milliseconds."""
    told = {attempt: attempt.progress for attempt in pool.attempts.values() if not attempt.lost}
    held = [(attempt.claim, progress) for attempt, progress in told.items()]
    now, *tokens = await pool.store.renew(held, lease)
    lost, cancelled = map(set, tokens)  # after an outage, perhaps all of thousands
    for attempt, progress in told.items():  # some of which may have ended meanwhile: that harms nothing
        if attempt.progress == progress:  # otherwise there is more to tell
            attempt.progress = ""
        attempt.lost = attempt.claim.token in lost
        attempt.cancelled = attempt.claim.token in cancelled
        if attempt.lost or attempt.cancelled:
            attempt.scope.cancel()
    return now


async def heartbeat(pool: WorkerPool) -> None:
    """Look after the leases; and allow the sweep to end those of others, while all is calm."""
    calm_at, renew_at, lease = math.inf, -math.inf, pool.settings.lease_seconds
    while True:
        is_time = trio.current_time() >= renew_at
        try:
            now = await renew_leases(pool, lease if is_time else 0)
            renew_at = trio.current_time() + lease / 5 if is_time else renew_at
            calm_at = min(calm_at, trio.current_time() + CALM_SECONDS)
            if trio.current_time() >= calm_at:
                pool.end_leases_by = now + _milliseconds(2 * HEARTBEAT_SECONDS)
        except redis.RedisError as error:
            pool.refused(error)
            calm_at = math.inf  # others were cut off too, and must have time to renew theirs
        await trio.sleep(min(HEARTBEAT_SECONDS, lease / 5))


async def sweep(pool: WorkerPool) -> None:
    """Sweep, twice a second or when a job is due; and look for awaited jobs that other instances finished."""
    limits = pool.settings.retention_seconds, pool.settings.keep_jobs
    await pool.opened.wait()
    if not pool.is_ours:  # the program ends before anybody could look
        return
    while True:
        wait = TICK_SECONDS
        try:
            found = await pool.store.sweep(*limits, pool.end_leases_by)
            pool.recovery.notify()
            wait = min(wait, max(SWEEP_PAUSE_SECONDS, found.wait))
            for ended in found.ended:
                log.warning("job %s: its worker is gone: %s, attempt %s; now it is %s", *ended)
            pool.notifier.notify(found.ready)
            if pool.waiters:
                pool.answer_waiters(await pool.store.finished(list(pool.waiters)))
        except redis.RedisError as error:
            pool.refused(error)
        await trio.sleep(wait)


async def watch_handlers(pool: WorkerPool) -> None:
    """Name handlers that do not end although they are cancelled, and those that may have blocked the loop."""
    while True:
        wake_at, computed = trio.current_time() + TICK_SECONDS, time.process_time()
        await trio.sleep_until(wake_at)
        late = trio.current_time() - wake_at
        if late > pool.settings.lease_seconds / 2:
            # A loop that is blocked computes, unless its handler sleeps. A process that was frozen does not.
            is_idle = time.process_time() - computed < late / 10
            why = ", hardly computing: the process was frozen, or a handler slept" if is_idle else ""
            names = ", ".join(pool.recent_types) or "none"
            log.error("the event loop stood still for %.1f s%s; handlers that ran: %s", late, why, names)
        pool.recent_types = {each.claim.job_type for each in pool.attempts.values()}
        for attempt in pool.attempts.values():
            attempt.overstays += attempt.scope.cancel_called
            if attempt.overstays == 3:
                text = "job %s: %s does not end, although it should: its worker waits for it"
                log.warning(text, attempt.claim.id, attempt.claim.job_type)


def end_process(pool: WorkerPool, seconds: float) -> None:
    """End this process in so many seconds, whatever holds it then; the jobs are safe, since leases end."""
    timer = threading.Timer(seconds, lambda: os._exit(pool.crashed))
    timer.daemon = True
    timer.start()


async def leave_behind(pool: WorkerPool) -> None:
    """When the grace is over, cancel what still runs, and release what does not end: threads, above all.

    Their workers never end, so neither does `serve`: `end_process` does that.
    """
    with pool.grace:
        await trio.sleep_forever()  # a second signal moves the deadline
    pool.requests.cancel()
    for attempt in pool.attempts.values():
        attempt.scope.cancel()
    await trio.sleep(EXIT_SECONDS / 4)  # for what does end
    for claim in [attempt.claim for attempt in pool.attempts.values()]:
        log.warning("job %s: %s is left behind, and the job released", claim.id, claim.job_type)
        with suppress(redis.RedisError):
            await pool.store.report_and_claim(Report(claim, "release"), "", 0)


async def listen(connection: RedisConnection, pool: WorkerPool) -> None:
    """Notify a worker when any instance puts something into the empty queue."""
    while True:
        try:
            with trio.fail_after(REPLY_SECONDS):
                [reply] = await connection.exchange([("SUBSCRIBE", f"{pool.store.prefix}wake")])
            if isinstance(reply, redis.ResponseError):
                pool.refused(reply)  # nothing depends on it: there is the sweep
            # Subscribe again after a silence: perhaps a firewall forgot the connection, and nobody says so.
            with trio.move_on_after(SILENCE_SECONDS) as silence:
                while True:
                    heard_by = str((await connection.message())[-1])
                    silence.deadline = trio.current_time() + SILENCE_SECONDS
                    instances = int(heard_by) if re.fullmatch(r"[0-9]{1,9}", heard_by) else 1
                    if random.random() * instances < FEW:
                        pool.notifier.notify(1)
        except (redis.RedisError, OSError, trio.TooSlowError):
            connection.hang_up()
            await trio.sleep(AGAIN_SECONDS)


async def open_pool(pool: WorkerPool) -> None:
    """Let the pool work, if the keys in Redis are this program's; otherwise end the process."""
    if not pool.is_ours and (layout := await pool.store.layout()) != LAYOUT:
        log.critical("Redis has jobs of another version: layout %s, and this program's is %s", layout, LAYOUT)
        # At once: nobody may go on and write to keys that are not ours.
        os._exit(1 if pool.settings.processes == 1 else NOT_OURS)
    pool.open()


async def warn_of_redis(pool: WorkerPool) -> None:
    """Say what will not go well with this Redis."""
    if missing := await pool.store.missing_rights():
        log.error("the Redis user may not run %s; the rights that are needed: %s", ", ".join(missing), RIGHTS)
    if (policy := await pool.store.eviction_policy()) not in ("noeviction", ""):
        log.warning("Redis may evict jobs: its maxmemory-policy is %s, and should be noeviction", policy)


async def inspect_redis(pool: WorkerPool) -> None:
    """Open the pool once Redis is there, and look then at what will not go well with it."""
    was_refused = False
    while True:
        try:
            await open_pool(pool)
            if pool.settings.redis_url:  # the one in memory has neither rights nor a policy
                await warn_of_redis(pool)
            return
        except redis.ResponseError as error:
            if not was_refused:
                log.error("Redis refused: %s; the rights that are needed: %s", error, RIGHTS)
            if pool.is_ours:  # so this was only a question that Redis does not answer
                return
            was_refused = True
        except redis.RedisError:
            pass  # the pipeline says that Redis is away
        await trio.sleep(AGAIN_SECONDS)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────

SMALL_BYTES = 1000  # a body that reaches Redis in one piece, if no other command is sent before it
CHUNK = 200  # jobs that are fetched at a time without ?limit=
PAGE_BYTES, CHUNK_BYTES = 4_000_000, 250_000  # with ?limit= and without; the job that goes beyond is the last
CURSOR = r"|[0-9a-f-]{36}\.-?[0-9]{1,16}"
# What the value of a parameter must match, and how that is said.
PARAMETERS = {
    "status": ("|".join(Status), f"one of: {', '.join(Status)}"),
    "cursor": (CURSOR, "one from a Link header, with the status that was asked for there"),
    "limit": ("0{0,9}([1-9][0-9]{0,2}|1000)", "a whole number from 1 to 1000"),
    "cut": ("0{0,9}([1-9][0-9]{2,3}|10000)", "a whole number from 100 to 10000"),  # bytes of a field
    "wait": (r"[0-2]?[0-9](\.[0-9]+)?|30(\.0+)?", "a number of seconds from 0 to 30"),
}
HOST = re.compile(r"([\w-]{1,63}\.)*[\w-]{1,63}\.?(:\d{1,5})?|\[[\da-f:.]{2,45}\](:\d{1,5})?|", re.I | re.A)
LIST_HEADERS = {"Vary": "Accept", "Cache-Control": "no-store"}
BEARER = WWWAuthenticate("bearer", {"realm": "jobqueue"})

read_jobs = msgspec.json.Decoder(JobRequest | list[JobRequest]).decode
api = Blueprint("api", __name__)
# The pool of the app that serves this request.
current_pool = cast(WorkerPool, LocalProxy(lambda: current_app.config["POOL"]))


def parse_job(asked: JobRequest, settings: Settings, where: str = "") -> NewJob:
    """The job that is asked for; or BadRequest, which says `where`, and names the wrong field."""
    if asked.job_type not in HANDLERS:
        raise BadRequest(f"{where}job_type must be one of: {', '.join(HANDLERS)}")
    payload = bytes(asked.payload).decode()
    try:
        HANDLERS[asked.job_type].read(payload)
    except ValueError as error:
        raise BadRequest(f"{where}{error}") from None
    max_retries = settings.max_retries if asked.max_retries is UNSET else asked.max_retries
    timeout = settings.job_timeout_seconds if asked.timeout is UNSET else asked.timeout
    return NewJob(str(uuid.uuid4()), asked.job_type, payload, max_retries, timeout, asked.delay)


def parse_jobs(body: bytes, settings: Settings) -> list[NewJob]:
    """The jobs that a body asks for, one or an array of them; or BadRequest."""
    try:
        body.decode()  # since msgspec does not look into a payload, which is kept as it is
        asked = read_jobs(body)
    except (ValueError, RecursionError) as error:
        problem = explain(error, "the body", JobRequest.__annotations__)
        problem = re.sub(r"^the body\[(\d+)\](\.|: )", r"job \1 of the array: ", problem)
        raise BadRequest(problem.removeprefix("the body.")) from None
    if not asked:
        raise BadRequest("an array must have at least one job")
    if not isinstance(asked, list):
        return [parse_job(asked, settings)]
    return [parse_job(each, settings, f"job {n} of the array: ") for n, each in enumerate(asked)]


def parse_key(headers: Sequence[str], body: bytes) -> tuple[str, str]:
    """Hashes of an Idempotency-Key, empty if there is none, and of what the request asks for.

    The key is a quoted string, as in draft-ietf-httpapi-idempotency-key-header, or the same without quotes.
    """
    if not headers:
        return "", ""
    header = ", ".join(headers)  # one, or it will not match
    if not re.fullmatch(r'"([ !#-\[\]-~]|\\["\\]){1,255}"|[!#-~]{1,255}', header):
        raise BadRequest("Idempotency-Key must be one of up to 255 ASCII characters, quoted for spaces")
    try:
        asked = json.dumps(msgspec.json.decode(body), sort_keys=True)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    texts = header.removeprefix('"').removesuffix('"'), asked
    key, fingerprint = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return key, fingerprint


def parse_query(*known: str) -> dict[str, str]:
    """The parameters of this request: each is known, comes once, and matches its pattern; or BadRequest."""
    for name, values in request.args.lists():
        if name not in known or len(values) > 1:
            raise BadRequest(f"{name[:80]!r} is no parameter, or came twice; they are: {', '.join(known)}")
        pattern, wanted = PARAMETERS[name]
        if not re.fullmatch(pattern, values[0]):
            raise BadRequest(f"{name} must be {wanted}")
    return request.args.to_dict()


def json_response(text: str | AsyncIterator[str], status: int = 200, headers: Any = None) -> Response:
    return Response(text, status, headers, content_type="application/json")


def wants_html() -> bool:
    """Whether this request asks for the list of jobs as a page for people, not as JSON."""
    best = request.accept_mimetypes.best_match(["application/json", "text/html"])
    return request.method in ("GET", "HEAD") and request.path == "/jobs" and best == "text/html"


async def html_page() -> Response:
    """The page: it holds no jobs, its script asks for them. Its policy forbids it to load anything else."""
    nonce = secrets.token_urlsafe(16)
    known = {"handlers": HANDLERS, "statuses": [*Status], "finished": FINISHED}
    text = await render_template("jobs.html", nonce=nonce, **known)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = LIST_HEADERS | {"Content-Security-Policy": policy}
    return Response(text, 200, headers, content_type="text/html; charset=utf-8")


def problem_with(path: str, host: str) -> str:
    """Why a request has no address; empty if it has one."""
    with suppress(ValueError):  # from urlsplit
        if path.startswith("/") or path == "*" or urlsplit(path).netloc:
            return "" if HOST.fullmatch(host) and len(host) < 256 else f"{host[:80]!a} is no host name"
    return "that is no address"


async def protect(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """ASGI middleware: what Quart cannot cope with does not reach it, and does not come out of it."""

    async def receive_request() -> Any:
        message = await receive()
        # hypercorn says so after each answer, too; Quart would then cancel it before the end is sent.
        if message["type"] == "http.disconnect":  # so `Client` alone cancels what nobody waits for
            await trio.sleep_forever()
        return message

    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    if problem := problem_with(scope["path"], host):  # `check_caller` says so to the client
        scope = {**scope, "path": "/", "headers": [], "problem": problem}
    try:
        await app(scope, receive_request, send)
    except* redis.RedisError:
        pass  # in mid-list: the client sees that the answer is cut off, since it has no end


@api.before_app_request
async def check_caller() -> None:
    """Ask for the API token; if none is set, the Host must be an address, HOST, or a name without a dot.

    So no other web site gets through a visitor's browser: it could send neither application/json nor
    DELETE, and read nothing, without this server's consent (CORS); and to pass for this server it would
    have to give its own name another address (DNS rebinding), which the Host header betrays.
    """
    settings = current_pool.settings
    if problem := request.scope.get("problem"):  # from `protect`
        raise BadRequest(str(problem))
    if request.path == "/":
        return
    if settings.api_token:
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(sent.strip().encode(), settings.api_token.encode())
        if not (scheme.lower() == "bearer" and is_right) and not wants_html():
            text = "send the header Authorization: Bearer, with the API token"
            raise Unauthorized(text, www_authenticate=BEARER)
        return
    own_name = rf"([\w-]+|[\d.]+|\[[\da-f:.]+\]|{re.escape(settings.host)})(:\d+)?"
    if not re.fullmatch(own_name, name := request.headers.get("Host", ""), re.I | re.A):
        raise Forbidden(f"{name[:80]!r} is not a name of this server; API_TOKEN allows any name")


@api.after_app_request
async def add_headers(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "text/html":  # the page has a policy of its own
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    if "Transfer-Encoding" in request.headers and "Content-Length" in request.headers:
        response.headers["Connection"] = "close"  # perhaps a smuggled request (RFC 9112, 6.1)
    return response


@api.app_errorhandler(HTTPException)
async def refuse(error: HTTPException) -> Response:
    text = error.description
    if isinstance(error, NotFound) and request.routing_exception:
        text = f"there is nothing at {request.path[:80]}; try POST /job, GET /job/<id> or GET /jobs"
    elif isinstance(error, MethodNotAllowed):
        text = f"{request.method} is not possible here, only: {', '.join(error.valid_methods or ())}"
    elif isinstance(error, RequestEntityTooLarge):
        text = f"the body must be at most {current_pool.settings.max_body_bytes:,} bytes"
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    return json_response(json.dumps({"error": text}) + "\n", error.code or 500, headers)


@api.app_errorhandler(redis.RedisError)
async def unavailable(error: redis.RedisError) -> Response:
    current_pool.refused(error)
    text = f"Redis cannot serve this now: {error}"
    return json_response(json.dumps({"error": text}) + "\n", 503, {"Retry-After": "1"})


@api.post("/job")
async def submit() -> Response:
    if request.query_string:
        raise BadRequest("POST /job has no parameters; a job's are fields of the body")
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("the Content-Type must be application/json")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise UnsupportedMediaType("the body must have no Content-Encoding")
    await open_pool(current_pool)
    body = cast(bytes, await request.get_data())
    jobs = parse_jobs(body, current_pool.settings)
    key, fingerprint = parse_key(request.headers.getlist("Idempotency-Key"), body)
    is_quiet = len(jobs) <= len(current_pool.notifier.sleepers)  # there are workers enough here
    # A worker that wakes up now sends its claim right behind a small submission, and a job starts a fifth
    # earlier: `notify` only schedules it, and `submit` does not wait before its command is queued. But on the
    # other connection a claim would overtake a large one, and one behind other commands.
    woken = len(jobs) if len(body) < SMALL_BYTES and current_pool.store.is_idle() else 0
    current_pool.notifier.notify(woken)
    ids = await current_pool.store.submit(jobs, key, fingerprint, is_quiet)
    current_pool.notifier.notify(len(jobs) - woken)
    if ids is None:
        raise UnprocessableEntity("this Idempotency-Key was used for another request")
    if body.lstrip().startswith(b"["):
        return json_response(json.dumps([{"id": job_id} for job_id in ids]) + "\n", 202)
    return json_response(f'{{"id": "{ids[0]}"}}\n', 202, {"Location": f"job/{ids[0]}"})


@api.get("/job/<job_id>")
async def show(job_id: str) -> Response:
    wait = float(parse_query("wait").get("wait", 0))
    # Made before the look, or the end may be missed; and kept here, since the pool's reference is weak.
    is_finished = current_pool.waiters.setdefault(job_id, trio.Event())
    found = await current_pool.store.get(job_id)
    if wait and found and found[0] not in FINISHED and not current_pool.stopping.is_set():
        with trio.move_on_after(wait):
            await is_finished.wait()
        found = await current_pool.store.get(job_id)
    if found is None:
        raise NotFound(f"there is no job {job_id[:80]!r}, or no more")
    return json_response(found[1] + "\n")


@api.delete("/job/<job_id>")
async def cancel(job_id: str) -> Response:
    parse_query("wait")  # refuse it before anything is done
    await open_pool(current_pool)
    status = await current_pool.store.cancel(job_id)
    if status in FINISHED:
        raise Conflict(f"the job is {status} already")
    if status:
        log.info("job %s: cancelled on request, it was %s", job_id, status)
        finished = await current_pool.store.finished([job_id])  # not yet, if a thread runs it
        current_pool.answer_waiters(finished)
    return await show(job_id)


@api.get("/")
async def home() -> Any:
    """Leads to the page; and tells a probe, which needs no token, whether Redis is there."""
    await current_pool.store.ping()
    return redirect("jobs")


async def stream(fetch: Callable[..., Awaitable[Page]], page: Page) -> AsyncIterator[str]:
    """A list of jobs, from its first page on, in constant memory."""
    before = "["
    while True:
        if page.jobs:  # otherwise all of this part were cancelled
            yield before + ",\n".join(page.jobs)
            before = ",\n"
        if not page.cursor:
            break
        page = await fetch(page.cursor, CHUNK, CHUNK_BYTES)
    yield "[]\n" if before == "[" else "]\n"


@api.get("/jobs")
async def list_jobs() -> Response:
    if wants_html():
        return await html_page()
    query = parse_query("status", "limit", "cursor", "cut")
    status, cursor = Status(query["status"]) if "status" in query else None, query.get("cursor", "")
    fetch = partial(current_pool.store.page, status, cut=int(query.get("cut", 0)))
    if "limit" not in query:
        first = await fetch(cursor, CHUNK, CHUNK_BYTES)  # before the answer begins: it may still be a 503
        return json_response(stream(fetch, first), headers=LIST_HEADERS)
    page = await fetch(cursor, int(query["limit"]), PAGE_BYTES)
    counts = ", ".join(f"{name}={count}" for name, count in page.counts.items())
    headers = LIST_HEADERS | {"Job-Counts": counts}
    if page.oldest is not None:
        headers["Job-Oldest-Seconds"] = f"{page.oldest:.3f}"
    if page.cursor:
        headers["Link"] = f'<jobs?{urlencode(query | {"cursor": page.cursor})}>; rel="next"'
    return json_response("[" + ",\n".join(page.jobs) + "]\n", headers=headers)


def create_app(pool: WorkerPool) -> QuartTrio:
    """The REST API, and the page that shows it to people."""
    app = QuartTrio(__name__, static_folder=None)
    app.config |= {"MAX_CONTENT_LENGTH": pool.settings.max_body_bytes, "POOL": pool}
    app.config["RESPONSE_TIMEOUT"] = None  # a list takes its time; `Client` ends what nobody reads
    app.register_blueprint(api)
    return app


# ── The service ─────────────────────────────────────────────────────────────────────────────────

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 1024  # connections that wait to be accepted
RESERVED_DESCRIPTORS = 100  # those that clients cannot take: Redis must be reached whatever they do
IDLE_CLIENT_SECONDS = 5.0  # how long a connection may wait for a request, or for the rest of its head
SILENT_CLIENT_SECONDS = 30.0  # how long a client may take nothing of its answer
CONTROL = {n: ascii(chr(n))[1:-1] for n in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
SECRETS = r"(?s)(?<=//)[^/]*@|[?#].*"  # of a URL: who logs in, and any options
Resources = AbstractAsyncContextManager[object] | None


class OnlyHTTP11(h11.Connection):
    """What hypercorn reads of a connection: HTTP/1.1, whatever else the client offers to speak."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("only HTTP/1.1 is spoken here", 505)
            kept = [header for header in event.headers if header[0] != b"upgrade"]
            if len(kept) < len(event.headers):
                return replace(event, headers=cast(Any, kept))
        return event


class Client:
    """One connection of a client: hypercorn reads its requests, and writes the answers.

    It ends when the client goes away, takes nothing of an answer for SILENT_CLIENT_SECONDS, or sends no
    complete request head for IDLE_CLIENT_SECONDS. What hypercorn cannot cope with ends it alone.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._scope = trio.CancelScope()  # around all that the connection does
        # Around the reading of requests. Its deadline is finite while none is under way, and only then.
        self._reading = trio.CancelScope(deadline=trio.current_time() + IDLE_CLIENT_SECONDS)

    async def run(self, make_protocol: Callable[..., H11Protocol]) -> None:
        """Serve the client until either side closes the connection."""
        try:
            with self._scope:
                async with self._stream, TaskGroup() as tasks:
                    ends = self._stream.socket.getpeername()[:2], self._stream.socket.getsockname()[:2]
                    state = ConnectionState(cast(Any, {}))
                    await self._read(make_protocol(tasks, state, False, *ends, self._send))
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away
        except* Exception as errors:
            log.warning("a connection broke: %s", describe(errors))
            log.debug("the traceback", exc_info=errors)

    def close_if_idle(self) -> None:
        """Close the connection now if no request is under way; otherwise hypercorn does so after it."""
        if self._reading.deadline < math.inf:
            self._reading.cancel()

    async def _read(self, protocol: H11Protocol) -> None:
        protocol.connection = OnlyHTTP11(h11.SERVER, protocol.config.h11_max_incomplete_size)
        with self._reading:
            while data := await self._stream.receive_some(65_536):
                await protocol.handle(RawData(bytes(data)))
        self._scope.cancel()  # without its client, a request ends

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            data = memoryview(event.data)
            try:
                while data:
                    self._scope.deadline = trio.current_time() + SILENT_CLIENT_SECONDS
                    data = data[await self._stream.socket.send(data) :]
                self._scope.deadline = math.inf
            except (OSError, trio.ClosedResourceError):
                self._scope.cancel()  # nobody takes the answer: what makes it ends, too
        elif isinstance(event, Updated):
            self._reading.deadline = trio.current_time() + IDLE_CLIENT_SECONDS if event.idle else math.inf
        else:  # Closed, after the last answer
            self._reading.cancel()


def most_clients(workers: int) -> int:
    """How many connections of clients there may be: as many as there are descriptors, but for a reserve."""
    if sys.platform == "win32":
        return 10_000  # there is no such limit
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, most - RESERVED_DESCRIPTORS - 2 * workers)


async def accept(listener: trio.SocketListener, room: trio.Semaphore) -> trio.SocketStream:
    """The next connection, once there may be one more: until then it waits in the backlog."""
    await room.acquire()
    while True:
        try:
            return await listener.accept()
        except OSError as error:
            log.warning("a connection could not be accepted: %s", error)
            await trio.sleep(AGAIN_SECONDS)


async def serve_http(pool: WorkerPool, listeners: Sequence[socket.socket]) -> None:
    """Serve until the pool is stopping; then answer what is under way, until its deadline."""
    config, context, clients = hypercorn.Config(), WorkerContext(None), set[Client]()
    config.errorlog, config.include_server_header = logging.getLogger("hypercorn.error"), False
    make_protocol = partial(H11Protocol, ASGIWrapper(partial(protect, create_app(pool))), config, context)
    room = trio.Semaphore(most_clients(pool.settings.workers))

    async def serve_client(stream: trio.SocketStream) -> None:
        client = Client(stream)
        clients.add(client)
        await client.run(make_protocol)  # which raises nothing, so the place is always given back
        clients.remove(client)
        room.release()

    async def serve_listener(listener: socket.socket) -> None:
        async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepts:
            while True:
                serving.start_soon(serve_client, await accept(accepts, room))

    with pool.requests:
        async with trio.open_nursery() as serving:
            async with trio.open_nursery() as accepting:
                for each in listeners:
                    accepting.start_soon(serve_listener, each)
                await pool.stopping.wait()
                accepting.cancel_scope.cancel()
            await context.terminated.set()
            for client in clients:
                client.close_if_idle()


def keep_abandoned_generators() -> None:
    """Let an attempt close the async generators that its handler does not read to the end.

    Trio closes them in a task of its own, and fails if one holds a nursery of another task open.
    """
    of_trio = cast(Callable[[Any], None], sys.get_asyncgen_hooks().finalizer)

    def finalize(generator: AsyncGenerator[Any, Any]) -> None:
        attempt = _attempt.get(None)
        if attempt is None or not trio.lowlevel.current_task().child_nurseries:
            of_trio(generator)
        elif not attempt.is_over:  # otherwise the nursery was left behind, and ends with its task
            attempt.abandoned.append(generator)

    sys.set_asyncgen_hooks(finalizer=finalize)


def keep_signals_from_forks() -> None:
    """Let what a handler forks, as multiprocessing does, heed signals as any program does."""
    if sys.platform == "win32":
        return
    mask = signal.pthread_sigmask

    def in_child() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        mask(signal.SIG_UNBLOCK, SIGNALS)

    hold, let_go = partial(mask, signal.SIG_BLOCK, SIGNALS), partial(mask, signal.SIG_UNBLOCK, SIGNALS)
    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=in_child)


async def crash_on_bug(pool: WorkerPool, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a task of the service. A bug in it ends the process; it is logged first, since that takes time."""
    try:
        await task(*arguments)
    except* Exception as errors:
        pool.crashed = True
        log.critical("a task of the service failed", exc_info=errors)
        end_process(pool, REPLY_SECONDS + EXIT_SECONDS)
        raise


def graces(settings: Settings) -> Iterator[float]:
    """The seconds that each signal, in its turn, gives to running jobs: the second ends the grace."""
    return itertools.chain([settings.shutdown_grace_seconds], itertools.repeat(0.0))


def stop_on_signals(pool: WorkerPool) -> None:
    """Stop the pool at the first signal, and without any grace at the second.

    A plain signal handler: it runs even while a job's handler blocks the event loop. So it only does what may
    be done between any two instructions; the rest is the event loop's, once that goes on.
    """
    call_soon = trio.lowlevel.current_trio_token().run_sync_soon
    each_grace = graces(pool.settings)
    text = "%s: stopping; what runs has %g s to finish"

    def on_signal(number: int, _frame: object) -> None:
        grace = next(each_grace)
        end_process(pool, grace + EXIT_SECONDS)
        with suppress(trio.RunFinishedError):
            call_soon(log.info, text, signal.Signals(number).name, grace)
            call_soon(pool.stop, grace)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which `main` holds back


def announce(settings: Settings, listeners: Sequence[socket.socket]) -> None:
    """Say where the service listens (its sockets do already), and where it keeps the jobs."""
    names = [each.getsockname()[:2] for each in listeners]
    urls = [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in names]
    store = re.sub(SECRETS, "", settings.redis_url)
    kept = store or "memory, and vanish at exit: set REDIS_URL to keep them"
    text = "listening on %s with %d workers; jobs are kept in %s"
    log.info(text, " and ".join(urls), settings.workers, kept)


async def serve(settings: Settings, listeners: Sequence[socket.socket], resources: Resources = None) -> None:
    """Run the service until SIGINT or SIGTERM, and then in this order:

    1. accept nothing more; the requests under way are answered;
    2. idle workers leave, busy ones finish their job and report it, their leases still being renewed;
    3. when the grace is over, or at a second signal, what still runs is cancelled and released;
    4. the last commands reach Redis.
    """
    url = settings.redis_url
    redis_connections = [RedisConnection(url) for _ in range(CONNECTIONS)] if url else []
    transports: list[Transport] = [each.exchange for each in redis_connections] or [memory()]
    pipeline = AutoPipeline(*transports)
    pool = WorkerPool(Store(pipeline), settings)
    run = partial(crash_on_bug, pool)
    async with trio.open_nursery() as connections:
        for task in (pipeline.run, *[each.watch for each in redis_connections]):
            connections.start_soon(run, task)
        async with trio.open_nursery() as background:
            stop_on_signals(pool)
            keep_signals_from_forks()
            keep_abandoned_generators()
            for pool_task in (inspect_redis, heartbeat, sweep, watch_handlers, leave_behind):
                background.start_soon(run, pool_task, pool)
            if url:
                background.start_soon(run, listen, RedisConnection(url), pool)  # no watch: it may be silent
            async with resources or nullcontext(), trio.open_nursery() as workers:
                announce(settings, listeners)
                workers.start_soon(run, serve_http, pool, listeners)
                for _ in range(settings.workers):
                    workers.start_soon(run, work, pool)
            background.cancel_scope.cancel()
        connections.cancel_scope.cancel()
    log.info("stopped")
    for number in SIGNALS:  # or one that comes while Trio ends would make it warn of its own pipe
        signal.signal(number, signal.SIG_IGN)


class OneLine(logging.Formatter):
    """Each entry is one line, and names the job whose handler said it.

    Nothing that is logged, wherever it comes from, can look like another line, or command a terminal.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        time = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        attempt = _attempt.get(None)
        job = f"job {attempt.claim.id}: " if attempt else ""
        return f"{time} {record.levelname:7} {(job + record.message).translate(CONTROL)}"

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + line.translate(CONTROL) for line in lines)


def set_up_logging(level: str) -> None:
    """Log to stderr. Caller, thread and process are not looked up, since no line shows them.

    They would cost a third more (Logging HOWTO, "Optimization").
    """
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(OneLine())
    logging.basicConfig(level=level.upper(), handlers=[to_stderr])
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen: on IPv4 and IPv6 where `host` means both. If none can be had, the program ends."""
    listeners: list[socket.socket] = []
    names = {"localhost": ("127.0.0.1", "::1"), "::": ("0.0.0.0", "::")}.get(host, (host,))
    for name in names:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        try:
            listeners.append(socket.create_server((name, port), family=family, backlog=BACKLOG))
            port = listeners[-1].getsockname()[1]  # the same for both, also when any would do
        except OSError as error:
            has_none = not listeners and name == names[-1]  # otherwise the host has one family alone
            if error.errno == errno.EADDRINUSE or has_none:
                sys.exit(f"{PROGRAM}: cannot listen on {host}, port {port}: {error.strerror}")
    return listeners


def stop_with_parent(parent: int) -> None:
    """Stop this process once its parent is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(TICK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def fork_processes(settings: Settings, listeners: Sequence[socket.socket]) -> None:
    """Return in PROCESSES child processes, and never in this one, which looks after them.

    It passes signals on, starts again what dies, and ends with the worst of the exit statuses. It kills what
    does not end in time. If Redis has keys of another layout, no process is started again, and all end.
    """
    if sys.platform == "win32":
        return  # never: Settings refuses it
    count = settings.processes or os.cpu_count() or 1
    children, parent, worst, each_grace = set[int](), os.getpid(), 0, graces(settings)

    def send(number: int) -> None:
        for pid in children:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    def pass_on(number: int, _frame: object = None) -> None:
        nonlocal count
        count = 0  # none is to be started again
        for each in listeners:
            each.close()  # or clients would wait in a backlog that nobody empties
        send(number)
        signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))  # for what C code may hold up
        signal.setitimer(signal.ITIMER_REAL, next(each_grace) + 3 * EXIT_SECONDS)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    while children or count:
        while len(children) < count:
            if (child := os.fork()) == 0:
                os.setpgrp()  # a Ctrl+C is for the parent to pass on: to get it twice would end the grace
                threading.Thread(target=stop_with_parent, args=(parent,), daemon=True).start()
                return
            children.add(child)
        # Signals come only here: each must meet all children, so none may come while one is being forked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        child, waited = os.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        status = os.waitstatus_to_exitcode(waited)  # negative: of the signal that killed it
        if child not in children:  # the first process of a container is given those that lost their parent
            continue
        children.remove(child)
        if status == NOT_OURS:
            pass_on(signal.SIGTERM)
            status = 1
        if count:
            log.error("process %d is gone, with status %d: another one starts", child, status)
            time.sleep(AGAIN_SECONDS)
        else:
            worst = max(worst, abs(status))
    sys.exit(worst)


def main(resources: Resources = None) -> None:
    """Read the settings, listen, serve. Signals are held until `serve` handles them, but not on Windows.

    `resources` is what handlers share, such as a pool of connections: it is entered before the first job, and
    left after the last.
    """
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = Settings.read(sys.argv[1:], os.environ)
    set_up_logging(settings.log_level)
    if settings.smtp_url:
        send_email_through(settings.smtp_url, settings.smtp_from)
    if settings.host not in LOOPBACK and not settings.api_token:
        log.warning("anybody who reaches %s may use this queue: set API_TOKEN", settings.host)
    listeners = open_listeners(settings.host.strip("[]"), settings.port)
    if settings.processes != 1:
        fork_processes(settings, listeners)
    try:
        trio.run(serve, settings, listeners, resources)
    except trio.TrioInternalError:
        log.critical("Trio failed", exc_info=True)
        os._exit(1)  # at once: tasks that Trio left in the middle would hold up the end of the process


if __name__ == "__main__":
    main()
