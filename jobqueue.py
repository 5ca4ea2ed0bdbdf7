"""A job queue service in one module: a REST API, Trio tasks that run the jobs, and Redis to keep them.

A job whose POST was answered with 202 is attempted until it is completed or failed, whatever dies in between;
so it may run more than once. This is its life, and each arrow is one Lua script:

    POST /job ──► queue ────step────► processing ──step──► completed
                   ▲ ▲                  │  │  │
             sweep │ └─ release, sweep ─┘  │  └─ step, sweep ──► failed
                 delayed ◄───── retry ─────┘

An instance is one process of this program. Its dispatchers call Redis in steps: a step reports the attempts
that have ended, and claims jobs for the workers that are free. A claim lends a job to a dispatcher for the
time of a lease, which the instance renews while the attempt runs. When a lease ends, a sweep of any instance
puts the job back. A POST with a delay leads to `delayed`; a DELETE fails what waits or runs.

The keys stand behind the prefix `{jobqueue:3}:`. The braces keep them in one slot of a Redis Cluster, and the
number, the schema version, keeps apart programs that would misread each other's keys:
    job:<id>            hash         the job: FIELDS, its number, the fencing token of its last claim
    queue               list         ids ready to run: LPUSH in, RPOP out, so first in, first out
    delayed             sorted set   ids by the time at which they are due (in milliseconds, like all times)
    leases              sorted set   ids by the time at which their lease ends
    finished            sorted set   ids by the time at which they finished
    jobs                sorted set   all ids by the number of their submission
    pending, processing, completed, failed
                        sorted sets  the ids of each status, by the same number: what a list shows
    number              string       the number of the last submission
    idempotency:<hash>  string       what was answered to a submission with that key, for 24 hours
    claim:<dispatcher>  string       number and ids of the last claim of a dispatcher, for an hour
    wake                list         at most one token: the idle instance that pops it looks for jobs

Read from top to bottom, since each part builds on those above it: Settings, Jobs, Handlers, Redis (where Trio
meets it), Store (the scripts), Workers, HTTP, and the service, which starts all of it.
"""

from __future__ import annotations

import argparse
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
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.message import EmailMessage
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlencode, urlsplit
from weakref import WeakValueDictionary

import h11
import hiredis
import hypercorn
import msgspec
import redis
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from msgspec import UNSET, Meta, UnsetType
from quart import Blueprint, Response, abort, current_app, redirect, render_template, request
from quart.typing import ResponseReturnValue
from quart_trio import QuartTrio
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.local import LocalProxy

__version__ = "3.0.0"
PROGRAM = os.path.basename(sys.argv[0]) or "jobqueue.py"  # a fork's own name
PREFIX = "{jobqueue:3}:"  # raise the number when an older program would misread the keys
log = logging.getLogger("jobqueue")

# ── Settings ────────────────────────────────────────────────────────────────────────────────────

REDIS_URL = "redis[s]://[user:password@]host[:port][/db], redis[s]+sentinel://host,…/name[/db], unix:///path"
# `\Z`, since `$` also matches before a line end that comes last.
REDIS_PATTERN = (
    r"\A(|(rediss?://[^/#?\s]*|rediss?\+sentinel://[^/#?\s]+/[^/#?\s]+)(/\d*)?(\?[^#\s]*)?"
    r"|unix://[^#\s]*/[^#\s]+)\Z"
)
SMTP_PATTERN = r"\A(|smtps?://([^/@?#\s]*@)?(\[[0-9a-f:.]+\]|[^/@?#\s:]+)(:0*[1-9][0-9]*)?)\Z"
FROM_PATTERN = r"\A[^@\x00-\x1f]+@[^@\x00-\x1f]+\Z"
LOG_PATTERN = r"\A(?i:debug|info|warning|error)\Z"


def _setting(default: Any, meaning: str, *limits: Any, pattern: str | None = None) -> Any:
    limit = Meta(pattern=pattern) if isinstance(default, str) else Meta(ge=limits[0], le=limits[1])
    return field(default=default, metadata={"meaning": meaning, "limit": limit})


def _checked(f: Field[Any], value: Any) -> Any:
    """The value of a setting, of its type and within its limits; or ValueError, which shows no password."""
    try:
        value = msgspec.convert(value, Annotated[type(f.default), f.metadata["limit"]], strict=False)
        if f.name.endswith("_url") and value:
            RedisConnection(value) if f.name == "redis_url" else urlsplit(value).port
        return value
    except msgspec.ValidationError as error:
        reason = str(error)
    except (ValueError, TypeError, OSError, redis.RedisError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be read"
    raise ValueError(f"{f.name.upper()} ({f.metadata['meaning']}): {reason}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Read from variables such as PORT, and flags such as --port, which win. ValueError if one is bad."""

    redis_url: str = _setting("", f"{REDIS_URL}; unset: in memory", pattern=REDIS_PATTERN)
    host: str = _setting("127.0.0.1", "the address to listen on")
    port: int = _setting(8080, "the port to listen on; 0: any free one", 0, 65_535)
    reuse_port: int = _setting(0, "1: other instances may listen on the same port", 0, 1)
    workers: int = _setting(10, "jobs run at the same time; 0: only serve the API", 0, 10_000)
    max_retries: int = _setting(3, "attempts after a failed first one, for a job that does not say", 0, 100)
    retry_delay_seconds: float = _setting(0.5, "wait before the first retry; doubles with each", 0, 3600)
    job_timeout_seconds: float = _setting(300.0, "longest attempt, if a job does not say", 0.001, 604_800)
    # At least two renewals long; at most an hour, since the key claim:<dispatcher> is gone then.
    lease_seconds: float = _setting(15.0, "an instance silent for so long has lost its jobs", 2, 3600)
    shutdown_grace_seconds: float = _setting(20.0, "what running jobs get to finish at shutdown", 0, 86_400)
    retention_seconds: float = _setting(604_800.0, "how long finished jobs are kept; 0: for ever", 0, 1e10)
    keep_jobs: int = _setting(10**6, "finished jobs kept at most, the oldest go first; 0: no limit", 0, 2**40)
    max_body_bytes: int = _setting(2**20, "the largest request body, and the largest result", 1024, 2**30)
    api_token: str = _setting("", "what clients send as Authorization: Bearer", pattern=r"\A[!-~]*\Z")
    smtp_url: str = _setting(
        "", "smtp[s]://[user:password@]host[:port]; unset: simulated", pattern=SMTP_PATTERN
    )
    smtp_from: str = _setting("jobqueue@localhost", "the sender of e-mail", pattern=FROM_PATTERN)
    log_level: str = _setting("info", "debug, info, warning or error", pattern=LOG_PATTERN)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        if self.reuse_port and not (self.redis_url and hasattr(socket, "SO_REUSEPORT")):
            raise ValueError("REUSE_PORT needs a REDIS_URL to share, and a system that has SO_REUSEPORT")

    @classmethod
    def read(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
        """The settings that flags and variables ask for; a bad one ends the program with status 2."""
        about = "A job queue service. Each setting is a flag, or the environment variable beside it."
        parser = argparse.ArgumentParser(PROGRAM, "%(prog)s [--help] [--SETTING VALUE ...]", about)
        parser.add_argument("--version", action="version", version=__version__)
        parser.add_argument("--processes", default=environ.get("PROCESSES"), help=argparse.SUPPRESS)
        for f in fields(cls):
            default = str(f.default).removesuffix(".0") or "unset"
            text = f"{f.metadata['meaning']} ({f.name.upper()}, default: {default})"
            flag, variable = f"--{f.name.replace('_', '-')}", environ.get(f.name.upper(), "")
            parser.add_argument(flag, metavar="VALUE", default=variable, help=text)
        given = {name: text for name, text in vars(parser.parse_args(argv)).items() if text}
        try:
            if given.pop("processes", None):
                raise ValueError("PROCESSES is gone: start several instances on one port with REUSE_PORT=1")
            return cls(**given)
        except ValueError as error:
            parser.exit(2, f"{PROGRAM}: {error}\n")


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────


class Status(StrEnum):
    """Where a job is in its life. One that waits for a retry or for its delay is pending, too."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


FINISHED = (Status.COMPLETED, Status.FAILED)
# What is stored of a job and shown of it, in this order. Most of it is JSON already; TEXT_FIELDS are texts.
FIELDS = (
    *("job_type", "payload", "status", "attempts", "max_retries", "timeout", "worker", "progress"),
    *("result", "error", "traceback", "created_at", "due_at", "started_at", "finished_at"),
)
TEXT_FIELDS = ("job_type", "status", "worker", "error", "traceback")
BACKOFF_CAP_SECONDS = 300.0
_check_json = msgspec.json.Decoder(msgspec.Raw).decode


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
    """A job that is lent to a dispatcher. The script `step` returns all but its `token` and `damage`."""

    token: str  # the fencing token: no other claim of this job ever had it
    id: str
    job_type: str = ""
    payload: str = ""  # an object, as JSON
    attempts: Annotated[int, Meta(ge=0, le=1000)] = 0  # those begun, this one included
    max_retries: Annotated[int, Meta(ge=0, le=1000)] = 0
    timeout: Annotated[float, Meta(ge=0, le=1e9)] = 0  # seconds for one attempt
    status: Literal["pending"] = "pending"  # before this claim
    damage: str = ""  # what is wrong with the job, because another program has written to it

    @classmethod
    def read(cls, token: str, values: Sequence[Any]) -> Claim:
        try:
            return msgspec.convert([token, *values], cls, strict=False)
        except msgspec.ValidationError as error:  # whose path is the index of the field, as in "$[4]"
            index = int(str(error).rpartition("[")[2].partition("]")[0])
            wrong = f"its {cls.__struct_fields__[index]} is {values[index - 1] or 'missing'}"
            return cls(token, values[0], damage=f"the job is damaged: {wrong}")


def to_json(value: Any, most_bytes: float = math.inf) -> str:
    """The JSON of a result, also of dates, enums, dataclasses, UUIDs and the like; or ValueError."""
    try:
        plain, default = value, partial(msgspec.to_builtins, str_keys=True)
        with suppress(TypeError):  # of what only json knows: subclasses of float, such as numpy's; a key None
            plain = default(value)
        text = json.dumps(plain, default=default, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if (size := len(text.encode())) > most_bytes:  # which refuses half of a surrogate pair
            raise ValueError(f"it has {size:,} bytes; MAX_BODY_BYTES is {most_bytes:,}")
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the result cannot be kept as JSON: {error}") from None


def _show(name: str, value: str | None) -> str:
    """The JSON of a stored value. What another program has damaged is shown as the text that it is."""
    if not value:
        return "null"
    with suppress(ValueError, OSError, OverflowError, RecursionError):
        if name.endswith("_at"):
            moment = datetime.fromtimestamp(int(value) / 1000, UTC)
            return f'"{moment.isoformat(timespec="milliseconds")[:-6]}Z"'
        if name not in TEXT_FIELDS:
            _check_json(value)
            return value  # as it is, whatever numbers it holds
    if name == "worker":
        value = value.partition("/")[0]  # of a dispatcher's name, the instance alone
    return msgspec.json.encode(value).decode()


def job_json(job_id: str, stored: Mapping[str, str | None]) -> str:
    """The JSON of a job as it is stored; what is not known yet is null."""
    shown = [f'"{name}": {_show(name, stored.get(name))}' for name in FIELDS]
    return f'{{"id": {_show("error", job_id)}, {", ".join(shown)}}}'


def backoff(attempt: int, first: float, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait after a failed `attempt` (1, 2, …): `first`, doubled each time, capped, jittered."""
    # "Equal jitter" takes off up to half (AWS Architecture Blog, 2015): what failed together returns apart.
    return min(BACKOFF_CAP_SECONDS, math.ldexp(first, attempt - 1)) * (1 - jitter() / 2)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────

Function = TypeVar("Function", bound=Callable[..., Any])
HANDLERS: dict[str, Handler] = {}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
SMTP_SECONDS = 20.0  # longest wait for an SMTP server
GREYLIST_SECONDS = 60.0  # wait before the first retry of an e-mail; doubles with each
_attempt: ContextVar[Attempt] = ContextVar("_attempt")  # of the handler that runs here, or in this thread


class Unrecoverable(Exception):  # noqa: N818
    """Raised by a handler for a job that no retry can help: it fails at once."""


class Retry(Exception):  # noqa: N818
    """Raised by a handler that knows when to try again, as after a 429; but `max_retries` ends the job."""

    seconds = 0.0

    def __init__(self, seconds: float, why: str = "") -> None:
        if not 0 <= seconds < math.inf:
            raise ValueError(f"Retry needs a number of seconds from 0 on, not {seconds}")
        super().__init__(why)
        self.seconds = seconds


class Job(NamedTuple):
    """What a handler can know of the job that it runs. The first `attempt` is 1."""

    id: str
    job_type: str
    attempt: int
    max_retries: int


class Attempt(msgspec.Struct, eq=False):
    """One execution of a job's handler, here and now."""

    claim: Claim
    scope: trio.CancelScope  # cancelled at its deadline, when the job is lost, or at the end of the grace
    is_lost: bool = False  # whether the job has another token now: a sweep or a DELETE took it away
    progress: str = ""  # as JSON, until the next renewal takes it


def job() -> Job:
    """The job that this handler runs. Raises LookupError outside of a handler."""
    claim = _attempt.get().claim
    return Job(claim.id, claim.job_type, claim.attempts, claim.max_retries)


def progress(done: float, note: str = "") -> None:
    """Tell how much of this job is done, clamped to 0 … 1. ValueError for NaN. Outside of a job: nothing."""
    if math.isnan(done):
        raise ValueError("progress must be a number from 0 to 1, not NaN")
    if attempt := _attempt.get(None):
        text = str(note)[:200].encode(errors="backslashreplace").decode()  # half a surrogate pair is no JSON
        attempt.progress = to_json({"done": round(min(1.0, max(0.0, float(done))), 4), "note": text})


def explain(error: Exception, root: str, known: Iterable[str]) -> str:
    """What is wrong with JSON whose fields are `known`, and where: `payload.ns[0]: expected int, got str`."""
    if isinstance(error, RecursionError):
        return f"{root} is nested too deeply"
    if not isinstance(error, msgspec.ValidationError):
        return f"{root} is not JSON of the right kind: {type(error).__name__}: {error}"
    reason, _, path = str(error).replace("`", "").partition(" - at $")
    if match := re.search(r"(missing|unknown).* field (.*)", reason):
        path, reason = f"{path}.{match[2][:80]}", f"{match[1]} field"
        reason += f"; the fields are: {', '.join(known) or 'none'}" if path.count(".") < 2 else ""
    return f"{root}{path}: {reason[0].lower()}{reason[1:]}"


class Handler:
    """A function that runs one type of job, and its signature: the contract for the payload."""

    def __init__(self, job_type: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.doc = (inspect.getdoc(function) or "").partition("\n")[0]
        struct_fields = list[tuple[Any, ...]]()
        for each in inspect.signature(function, eval_str=True).parameters.values():
            if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
                raise TypeError(f"the handler of {job_type!r} must have named parameters only")
            kind = Any if each.annotation is each.empty else each.annotation
            struct_fields.append((each.name, kind, *([] if each.default is each.empty else [each.default])))
        struct = msgspec.defstruct(job_type, struct_fields, kw_only=True, forbid_unknown_fields=True)
        try:
            self._decode = msgspec.json.Decoder(struct).decode
            [reference], schemas = msgspec.json.schema_components([struct])
        except NameError as error:  # from a class that is declared elsewhere
            raise TypeError(f"the handler of {job_type!r} cannot be filled from JSON: {error}") from None
        self.schema = schemas.pop(reference["$ref"].rpartition("/")[2]) | {"$defs": schemas}  # of the payload

    def read(self, payload: str) -> dict[str, Any]:
        """The arguments in a payload, of the types in the signature. ValueError names what is wrong."""
        try:
            return msgspec.structs.asdict(self._decode(payload))
        except Exception as error:  # a type of a parameter may have code of its own
            raise ValueError(explain(error, "payload", self.schema["properties"])) from None

    def run(self, payload: str) -> Awaitable[Any]:
        """Call the function: in the task that awaits this if it is `async def`, in a thread if it is `def`.

        A thread cannot be interrupted, but it may ask `trio.from_thread.check_cancelled()`.
        """
        if inspect.iscoroutinefunction(self.function):
            return cast(Awaitable[Any], self.function(**self.read(payload)))
        call = partial(self.function, **self.read(payload))
        return trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1))


def handler(job_type: str, *, replace: bool = False) -> Callable[[Function], Function]:
    """Make a function the handler of `job_type`: its parameters are the fields of the payload.

        @handler("resize")
        def resize(path: str, width: int = 800) -> str: ...

    A parameter may have any type that msgspec reads from JSON; without one it takes anything. What the
    function returns is the job's result; a raise is a failed attempt. Raises TypeError for a bad signature,
    and ValueError if the job type has a handler already, unless that is to be replaced.
    """
    if job_type in HANDLERS and not replace:
        raise ValueError(f"{job_type!r} has a handler already; replace=True replaces it")

    def register(function: Function) -> Function:
        HANDLERS[job_type] = Handler(job_type, function)
        return function

    return register


@handler("email")
async def simulate_email(to: str, subject: str, body: str) -> None:
    """Send an e-mail; simulated, since SMTP_URL is not set: a line in the log, and one second."""
    log.info("simulated e-mail to %r: %r, %d characters", to, subject, len(body))
    await trio.sleep(1)


def _refusal_of(error: smtplib.SMTPException) -> Exception:
    """5xx is final (RFC 5321, 4.2.1). 4xx, as of a greylist (RFC 6647), is not, but wants minutes."""
    refused = getattr(error, "recipients", {}).values()  # if all recipients are refused, each has its code
    codes = [code for code, _ in refused] or [getattr(error, "smtp_code", 0)]
    if min(codes) >= 500:
        return Unrecoverable(str(error))
    if min(codes) >= 400:
        return Retry(math.ldexp(GREYLIST_SECONDS, min(job().attempt - 1, 6)), str(error))
    return error


def send_email_through(url: str, sender: str) -> None:
    """Make the handler of `email` a real one, which sends through the SMTP server at `url`."""
    parts, tls = urlsplit(url), ssl.create_default_context()
    connect: Any = partial(smtplib.SMTP_SSL, context=tls) if parts.scheme == "smtps" else smtplib.SMTP

    @handler("email", replace=True)
    def send_email(to: str, subject: str, body: str) -> None:
        """Send an e-mail."""
        message = EmailMessage()  # which refuses a line break in a header, but not an encoded one
        message["From"], message["To"], message["Subject"] = sender, to, subject
        if any(re.search(r"[\r\n]", str(value)) for value in message.values()):
            raise ValueError("a header may not contain linefeed or carriage return characters")
        # Large providers ask for these two. The id is the job's, so that it is the same in each attempt.
        message["Date"], message["Message-ID"] = (
            datetime.now(UTC),
            f"<{job().id}@{sender.rpartition('@')[2].strip('<> ')}>",
        )
        message.set_content(body)
        try:
            with closing(connect(parts.hostname, parts.port or 0, timeout=SMTP_SECONDS)) as server:
                server.ehlo()
                if server.has_extn("starttls"):
                    server.starttls(context=tls)
                if parts.username:
                    if not isinstance(server.sock, ssl.SSLSocket) and parts.hostname not in LOOPBACK:
                        raise smtplib.SMTPNotSupportedError("the password would go unencrypted")
                    server.login(unquote(parts.username), unquote(parts.password or ""))
                refused = server.send_message(message)
                with suppress(smtplib.SMTPException, OSError):  # the message was taken, whatever is said now
                    server.quit()
        except smtplib.SMTPException as error:
            raise _refusal_of(error) from None
        if refused:  # only some: a retry would send to the others again
            log.warning("the SMTP server refused: %s", ", ".join(refused))


@handler("math")
async def add(a: int | str, b: int | str) -> int:
    """Add two integers, given as numbers or as strings."""
    return int(a) + int(b)


@handler("long")
async def take_long(seconds: float = 2) -> None:
    """Take a while, and tell how far it is."""
    for second in range(math.ceil(seconds)):
        progress(second / seconds, f"{second} of {seconds:g} s")
        await trio.sleep(min(1.0, seconds - second))
    progress(1, f"{seconds:g} of {seconds:g} s")


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────
#
# redis-py's asyncio client does not run on Trio, its blocking client would stop the event loop, and a thread
# for each command costs more than the command itself. So Trio opens a stream to Redis, hiredis writes and
# reads the protocol on it, and redis-py reads the URL. A connection carries one batch of commands at a time.
# While that is under way, the commands of all other tasks gather, and the next batch carries them all. There
# are two connections, so that Redis works on one batch while Python works on the replies to the other.

Command = tuple[str | int | bytes, ...]
Transport = Callable[[Sequence[Command]], Awaitable[list[Any]]]  # carries a batch, returns as many replies

CONNECTIONS = 2
REPLY_SECONDS = 2.5  # without any progress, after which a try has failed; each command has two
SEND_BYTES = 65_536  # that are sent in one piece: each piece is progress
NOT_YET = object()
pack_command: Callable[[Command], bytes] = cast(Any, hiredis.pack_command)  # whose stub takes one word only
# What a server says that cannot serve for now: a replica, one that starts, a node that lost or gives away the
# slot. ASK is not followed: while a slot moves, a script would find only half of the keys at either end.
WORDS = "READONLY|MASTERDOWN|MOVED|ASK|TRYAGAIN|CLUSTERDOWN|NOREPLICAS|LOADING|ERR max number of clients"
UNFIT = re.compile(rf"(ERR Error running script.* -)?({WORDS})\b")
SENTINEL_URL = re.compile(r"(rediss?://)([^/]*@)?([^/@?]+)/([^/?]+)([^?]*)(.*)")


def _refusal(text: str) -> redis.RedisError:
    """The error that is the reply to one command; a ConnectionError if this server will carry out none."""
    if text.startswith("NOSCRIPT"):
        return redis.exceptions.NoScriptError(text)
    return redis.ConnectionError(text) if UNFIT.match(text) else redis.ResponseError(text)


class RedisConnection:
    """One connection to Redis, for one task at a time. It connects when first used, and after each loss."""

    def __init__(self, url: str) -> None:
        self._sentinels = list[RedisConnection]()  # if they know the address; the one to ask next comes first
        if match := SENTINEL_URL.fullmatch(url.replace("+sentinel", "", 1)) if "+sentinel:" in url else None:
            scheme, login, hosts, self._primary, path, query = match.groups("")
            for host in hosts.split(","):
                address = host if re.search(r":\d+$", host) else f"{host}:26379"
                # Sentinels often have no password of their own, and refuse one that they do not have.
                self._sentinels += [
                    RedisConnection(f"{scheme}{each}{address}{query}") for each in {"", login}
                ]
            url = f"{scheme}{login}{path}{query}"
        pool = redis.ConnectionPool.from_url(url)
        self._options = pool.connection_kwargs
        wanted = pool.connection_class(**self._options)  # which refuses options that it does not know
        self._tls: ssl.SSLContext | None = None
        if isinstance(wanted, redis.SSLConnection):
            files = {"cafile": wanted.ca_certs, "capath": wanted.ca_path, "cadata": wanted.ca_data}
            self._tls = ssl.create_default_context(**files)
            self._tls.check_hostname, self._tls.verify_mode = wanted.check_hostname, wanted.cert_reqs
            if wanted.certfile:
                self._tls.load_cert_chain(wanted.certfile, wanted.keyfile, wanted.certificate_password)
        self._moved: tuple[str, int] | None = None  # where a cluster said that our keys are
        self._stream: trio.abc.Stream | None = None

    async def _ask_sentinels(self) -> tuple[str, int]:
        for sentinel in list(self._sentinels):
            self._sentinels.append(self._sentinels.pop(0))  # if it hangs, the next try begins with another
            with suppress(redis.RedisError):
                [reply] = await sentinel.exchange([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._primary)])
                await sentinel.hang_up()
                if isinstance(reply, list):
                    return reply[0], int(reply[1])
        raise redis.ConnectionError(f"no sentinel knows a primary {self._primary!r}")

    async def _open(self) -> trio.abc.Stream:
        if "path" in self._options:
            return await trio.open_unix_socket(self._options["path"])
        configured = self._options.get("host", "localhost"), self._options.get("port", 6379)
        host, port = self._moved or (await self._ask_sentinels() if self._sentinels else configured)
        self._moved = None  # if that place fails, the configured address is asked again
        host = host or configured[0]  # MOVED without a host means the same one
        stream = await trio.open_tcp_stream(host, port)
        return trio.SSLStream(stream, self._tls, server_hostname=host) if self._tls else stream

    async def _talk(self, commands: Sequence[Command], patience: float) -> list[Any]:
        """Send commands and read as many replies; each piece sent or read begins the patience anew."""
        stream, replies = cast(trio.abc.Stream, self._stream), list[Any]()
        data = b"".join(map(pack_command, commands))
        reader = hiredis.Reader(redis.ConnectionError, _refusal, "utf-8", "replace", NOT_YET)
        with trio.fail_after(patience) as limit:
            for start in range(0, len(data), SEND_BYTES):
                await stream.send_all(data[start : start + SEND_BYTES])
                limit.deadline = trio.current_time() + patience
            while len(replies) < len(commands):
                received = await stream.receive_some()
                if not received:
                    raise redis.ConnectionError("Redis closed the connection")
                reader.feed(bytes(received))
                replies += iter(reader.gets, NOT_YET)
                limit.deadline = trio.current_time() + patience
        return replies

    async def hang_up(self) -> None:
        """Close the connection; the next exchange opens another one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)

    async def exchange(self, commands: Sequence[Command], patience: float = REPLY_SECONDS) -> list[Any]:
        """Send commands and receive their replies; a refusal is a ResponseError among them.

        Raises redis.ConnectionError, or TimeoutError after `patience` seconds without progress; then it is
        unknown which of the commands were carried out.
        """
        is_whole = False
        try:
            if self._stream is None:
                with trio.fail_after(patience):
                    self._stream = await self._open()
                user, password, number = map(self._options.get, ("username", "password", "db"))
                login = [("AUTH", *filter(None, [user]), password or "")] if user or password else []
                for reply in await self._talk(login + ([("SELECT", number)] if number else []), patience):
                    if isinstance(reply, redis.RedisError):
                        raise redis.ConnectionError(str(reply))
            replies = await self._talk(commands, patience)
            for reply in replies:
                if isinstance(reply, redis.ConnectionError):
                    if moved := re.search(r"MOVED \d+ (\S*):(\d+)", str(reply)):
                        self._moved = moved[1].strip("[]"), int(moved[2])
                    raise reply
            is_whole = True
            return replies
        except trio.TooSlowError:
            raise redis.TimeoutError(f"no progress for {patience:g} s") from None
        except (OSError, ValueError, trio.BrokenResourceError) as error:  # ValueError: of an odd host name
            raise redis.ConnectionError(str(error.__cause__ or error)) from None
        finally:
            if not is_whole:
                await self.hang_up()  # or a late reply would meet the next exchange


def memory() -> Transport:
    """Carries commands to a Redis in the memory of this process."""
    import fakeredis  # only here: with a real Redis it is not needed

    client = fakeredis.FakeRedis(decode_responses=True, encoding_errors="replace")

    def exchange(commands: Sequence[Command]) -> list[Any]:
        pipe: Any = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return list(pipe.execute(raise_on_error=False))

    one_by_one = trio.CapacityLimiter(1)
    return lambda commands: trio.to_thread.run_sync(exchange, commands, limiter=one_by_one)


@dataclass(eq=False)
class Call:
    """A command on its way to Redis, and then its reply."""

    command: Command
    reply: Any = None
    is_done: trio.Event = field(default_factory=trio.Event)


class AutoPipeline:
    """Redis for many tasks at once: `run` carries, over its transports, what they `call`."""

    def __init__(self, *transports: Transport) -> None:
        self._transports = transports
        self._put, self._take = trio.open_memory_channel[Call](math.inf)
        self._is_away = False

    def _note(self, error: redis.RedisError | None) -> None:
        if error and not self._is_away:
            log.warning("Redis is away: %s; waiting for it", error)
        elif self._is_away and not error:
            log.info("Redis is back")
        self._is_away = error is not None

    def _waiting(self) -> list[Call]:
        return [self._take.receive_nowait() for _ in range(self._take.statistics().current_buffer_used)]

    async def _carry(self, transport: Transport) -> None:
        while True:
            calls = [await self._take.receive(), *self._waiting()]
            try:
                replies = await transport([call.command for call in calls])
                self._note(None)
            except redis.RedisError as error:
                self._note(error)
                calls += self._waiting()  # what came meanwhile would only time out in its turn
                replies = [type(error)(*error.args) for _ in calls]  # one each, as each gets a traceback
            for call, reply in zip(calls, replies, strict=True):
                call.reply = reply
                call.is_done.set()

    async def run(self) -> None:
        """Carry the commands. Cancel it only when nobody calls any more."""
        async with trio.open_nursery() as nursery:
            for transport in self._transports:
                nursery.start_soon(self._carry, transport)

    async def call(self, *command: str | int) -> Any:
        """The reply to a command. If the caller is cancelled meanwhile, the command is sent all the same.

        Raises redis.ResponseError if it was refused, and redis.ConnectionError or TimeoutError when it is
        unknown whether it was carried out.
        """
        encode = partial(str.encode, errors="backslashreplace")  # half a surrogate pair is no UTF-8
        call = Call(tuple(encode(each) if isinstance(each, str) else each for each in command))
        self._put.send_nowait(call)
        await call.is_done.wait()
        if isinstance(call.reply, Exception):
            raise call.reply
        return call.reply


# ── Store ───────────────────────────────────────────────────────────────────────────────────────
#
# Every transition is one Lua script. Redis runs it alone, but rolls nothing back: an error in the middle, as
# from a missing right, leaves what was written before it. Four rules keep the jobs safe.
# - Add first, take away last. A script puts a job into its new place, then changes its status, then takes it
#   out of the old place. If it stops half-way, the job is in both places, never in none. Whichever script
#   meets an id in `queue`, `delayed` or `leases` whose status says otherwise takes it out there, and does
#   nothing else. Only `submit` can be undone as a whole, and is: its client is told that it failed.
# - The first write takes away. Redis out of memory refuses a script whose first write adds. So every script
#   but `submit` begins with a write that takes something away, even if there is nothing to be taken.
# - Everything may be sent twice, since a lost reply tells nothing. A submission brings its ids. A step has a
#   number, and gets the same jobs when it is sent again. A report carries the fencing token of its claim,
#   "<dispatcher>:<step>": with an old one it is refused, and sent again it finds the status changed already.
# - The time is Redis's: an instance with a wrong clock must not end the leases of others.

# `now` is a text: Redis is slow to write a number as one.
LUA_CLOCK = "local time = redis.call('TIME') local now = time[1] .. string.format('%03d', time[2] / 1000)"

LUA_COMMON = """
local P = KEYS[1]
local STATUSES = {pending = 1, processing = 1, completed = 1, failed = 1}

local function write_first() redis.call('ZREM', P .. 'leases', '') end  -- takes nothing away: see the rules

local function read(id, ...)  -- these fields of a job, or all names and values in turn
  local job = P .. 'job:' .. id
  local held = ... and redis.pcall('HMGET', job, ...) or redis.pcall('HGETALL', job)
  if held.err and not string.find(held.err, 'WRONGTYPE') then error(held.err, 0) end
  return held.err and {} or held  -- none if the key is gone, or of another type
end

local function count(text) return tonumber(string.match(text or '', '^%d+$')) end  -- nil if it is damaged

-- Whether the job is gone, or its status says otherwise: then nothing more may be done with this id here.
local function has_left(id, status, expected)
  local left = status ~= expected and STATUSES[status] == 1
  if not status then  -- a damaged status says nothing, and none says so if there is no job
    local fields = redis.pcall('HLEN', P .. 'job:' .. id)
    left = type(fields) == 'table' or fields == 0
  end
  if left then redis.call('ZREM', P .. expected, id) end  -- where a script that was cut off may have left it
  return left
end

local function move(id, number, from, to, ...)  -- to another status; `...` are other fields to be set
  redis.call('ZADD', P .. to, string.match(number or '', '^%d+$') or 0, id)
  redis.call('HSET', P .. 'job:' .. id, 'status', to, ...)
  redis.call('ZREM', P .. from, id)
  if to ~= 'processing' then redis.call('ZREM', P .. 'leases', id) end
end

local function finish(id, number, from, to, ...)
  redis.call('ZADD', P .. 'finished', now, id)
  move(id, number, from, to, 'finished_at', now, ...)
end

local function requeue(id, number, ...)  -- first in line
  redis.call('RPUSH', P .. 'queue', id)
  move(id, number, 'processing', 'pending', ...)
end

local function delete(id)  -- but in `queue` or `delayed`, where it is taken out when it is met
  for _, list in ipairs({'jobs', 'pending', 'processing', 'completed', 'failed'}) do
    redis.call('ZREM', P .. list, id)
  end
  redis.call('DEL', P .. 'job:' .. id)
  redis.call('ZREM', P .. 'finished', id)
end

local function wake()  -- one idle instance; a hint, which may fail
  if redis.pcall('EXISTS', P .. 'wake') == 0 then redis.pcall('LPUSH', P .. 'wake', 1) end
end
"""

SCRIPTS = {
    # → the answer, or the one that was kept under this idempotency key. It stores all jobs or none.
    "submit": """
        local key, answer, asks_others = unpack(ARGV, 1, 3)  -- then each job: NewJob's fields, in their order
        local kept = key ~= '' and redis.call('GET', P .. 'idempotency:' .. key)
        if kept then return kept end
        for i = 4, #ARGV, 6 do  -- this came before, and its reply was lost
          if redis.call('EXISTS', P .. 'job:' .. ARGV[i]) == 1 then return answer end
        end
        local done, problem = pcall(function()
          local number = redis.call('INCRBY', P .. 'number', (#ARGV - 3) / 6) - (#ARGV - 3) / 6
          for i = 4, #ARGV, 6 do
            local id, job_type, payload, max_retries, timeout, delay = unpack(ARGV, i, i + 5)
            local job = P .. 'job:' .. id
            number = number + 1
            redis.call('HSET', job, 'job_type', job_type, 'payload', payload, 'max_retries', max_retries,
              'timeout', timeout, 'status', 'pending', 'attempts', 0, 'created_at', now, 'number', number)
            redis.call('ZADD', P .. 'jobs', number, id)
            redis.call('ZADD', P .. 'pending', number, id)
            if delay == '0' then
              redis.call('LPUSH', P .. 'queue', id)
            else
              redis.call('HSET', job, 'due_at', now + delay)
              redis.call('ZADD', P .. 'delayed', now + delay, id)
            end
          end
          if key ~= '' then redis.call('SET', P .. 'idempotency:' .. key, answer, 'EX', 86400) end
        end)
        if not done then
          for i = 4, #ARGV, 6 do delete(ARGV[i]) end
          error(problem, 0)
        end
        if asks_others == '1' then wake() end
        return answer""",
    # → whether each report was accepted; the claims, in the order of Claim's fields; how many jobs are left
    "step": """
        local dispatcher, number, room, lease, most_bytes = unpack(ARGV, 1, 5)
        local token, record = dispatcher .. ':' .. number, P .. 'claim:' .. dispatcher
        local accepted, claims = {}, {}

        local function report(id, held_by, transition, text, trace, progress, attempts, delay)
          local current, status, rank = unpack(read(id, 'token', 'status', 'number'))
          if current ~= held_by then return 0 end
          if has_left(id, status, 'processing') then return 1 end  -- this report came before
          local job, due_at = P .. 'job:' .. id, now + delay
          if progress ~= '' then redis.call('HSET', job, 'progress', progress) end
          if transition == 'complete' then
            finish(id, rank, 'processing', 'completed', 'result', text)
            if attempts ~= '1' then redis.call('HDEL', job, 'error', 'traceback') end
          elseif transition == 'fail' then
            finish(id, rank, 'processing', 'failed', 'error', text, 'traceback', trace)
          elseif delay == '0' and transition == 'release' then
            requeue(id, rank, 'attempts', attempts)
          else
            redis.call('ZADD', P .. 'delayed', due_at, id)
            move(id, rank, 'processing', 'pending', 'attempts', attempts, 'due_at', due_at,
              unpack(transition == 'retry' and {'error', text, 'traceback', trace} or {}))
          end
          return 1
        end

        local function claim(id, is_recorded)  -- is_recorded: by this very step, when it came before
          local job_type, payload, attempts, max_retries, timeout, status, held_by, rank =
            unpack(read(id, 'job_type', 'payload', 'attempts', 'max_retries', 'timeout', 'status',
              'token', 'number'))
          local is_again = status == 'processing' and held_by == token
          if not is_again and (is_recorded or has_left(id, status, 'pending')) then return 0 end
          if not is_again then attempts = count(attempts) and attempts + 1 or attempts or '' end
          redis.call('ZADD', P .. 'leases', now + lease, id)
          move(id, rank, 'pending', 'processing', 'attempts', attempts, 'token', token, 'worker', dispatcher,
            'started_at', now)
          claims[#claims + 1] =
            {id, job_type, payload, attempts, max_retries, timeout, is_again and 'pending' or status}
          return #(payload or '')
        end

        write_first()
        for i = 6, #ARGV, 8 do accepted[#accepted + 1] = report(unpack(ARGV, i, i + 7)) end
        if room == '0' then return {accepted, claims, redis.call('LLEN', P .. 'queue')} end
        local last, last_ids = string.match(redis.call('GET', record) or '', '^(%d+)(.*)')
        if last == number then  -- this step came before, and its reply was lost
          for id in string.gmatch(last_ids, '%S+') do claim(id, true) end
        elseif tonumber(last or 0) < tonumber(number) then  -- otherwise it comes late: nobody waits for it
          local ids, size, met, seen = redis.call('LRANGE', P .. 'queue', -room, -1), 0, 0, {}
          while met < #ids and size < tonumber(most_bytes) do
            local id = ids[#ids - met]
            if not seen[id] then size = size + claim(id, false) end
            met, seen[id] = met + 1, true
          end
          local taken = {number}
          for _, each in ipairs(claims) do taken[#taken + 1] = each[1] end
          -- For an hour, since no lease is longer: after that there is nothing to claim again.
          redis.call('SET', record, table.concat(taken, ' '), 'EX', 3600)
          if met > 0 then redis.call('RPOP', P .. 'queue', met) end  -- last, as the rules say
        end
        local left = redis.call('LLEN', P .. 'queue')
        if left > 0 and #claims > 0 then wake() end
        return {accepted, claims, left}""",
    # → for each claim, whether it still holds its job
    "renew": """
        local lease, held = ARGV[1], {}  -- then the id, the token and the progress of each claim
        write_first()
        for i = 2, #ARGV, 3 do
          local id, token, progress = unpack(ARGV, i, i + 2)
          local held_by, status = unpack(read(id, 'token', 'status'))
          local is_held = held_by == token and not has_left(id, status, 'processing')
          if is_held then redis.call('ZADD', P .. 'leases', now + lease, id) end
          if is_held and progress ~= '' then redis.call('HSET', P .. 'job:' .. id, 'progress', progress) end
          held[#held + 1] = is_held and 1 or 0
        end
        return held""",
    # → now; jobs in the queue; ms until there is more to do, or -1; what ended: see Sweep
    "sweep": """
        local most, end_leases_by, retention, keep = unpack(ARGV)
        local ended, is_full = {}, false
        local function due(name, by)
          local ids = redis.call('ZRANGEBYSCORE', P .. name, '-inf', by, 'LIMIT', 0, most)
          is_full = is_full or #ids == tonumber(most)
          return ids
        end
        write_first()
        for _, id in ipairs(due('delayed', now)) do
          if not has_left(id, read(id, 'status')[1], 'pending') then redis.call('LPUSH', P .. 'queue', id) end
          redis.call('ZREM', P .. 'delayed', id)
        end
        for _, id in ipairs(tonumber(now) <= tonumber(end_leases_by) and due('leases', now) or {}) do
          local status, number, job_type, attempts, max_retries =
            unpack(read(id, 'status', 'number', 'job_type', 'attempts', 'max_retries'))
          if has_left(id, status, 'processing') then
            redis.call('ZREM', P .. 'leases', id)
          else
            local is_last = (count(attempts) or 0) > (count(max_retries) or math.huge)
            if is_last then
              finish(id, number, 'processing', 'failed', 'token', '', 'error',
                'the worker died, or was silent for longer than its lease, in each attempt')
            else
              requeue(id, number, 'token', '')  -- without a token a late report is refused
            end
            ended[#ended + 1] = {id, job_type or '', attempts or '', is_last and 'failed' or 'pending'}
          end
        end
        local excess = math.min(most, redis.call('ZCARD', P .. 'finished') - keep)
        local old = due('finished', now - retention)  -- both begin with the oldest
        if excess > #old then old = redis.call('ZRANGE', P .. 'finished', 0, excess - 1) end
        is_full = is_full or #old == tonumber(most)
        for _, id in ipairs(old) do
          local status = read(id, 'status')[1]
          local runs = status == 'pending' or status == 'processing'
          if runs then redis.call('ZREM', P .. 'finished', id) else delete(id) end
        end
        local next_due = redis.call('ZRANGE', P .. 'delayed', 0, 0, 'WITHSCORES')[2]
        local wait = is_full and 0 or next_due and math.max(0, next_due - now) or -1
        return {tonumber(now), redis.call('LLEN', P .. 'queue'), wait, ended}""",
    # → the job after it was cancelled, or before it was deleted, as names and values in turn; whether it was
    #   cancelled. `token` is the request's own name: sent again, it must not delete what it has cancelled.
    "cancel": """
        local id, token = unpack(ARGV)
        local status, held_by, number = unpack(read(id, 'status', 'token', 'number'))
        write_first()
        local is_cancelled = held_by == token
        if not is_cancelled and (status == 'processing' or not has_left(id, status, 'pending')) then
          finish(id, number, status == 'processing' and status or 'pending', 'failed',
            'error', 'cancelled', 'token', token)  -- so a late report is refused
          redis.call('ZREM', P .. 'delayed', id)
          is_cancelled = true
        end
        local job = read(id)
        if not is_cancelled and #job > 0 then delete(id) end
        return {job, is_cancelled and 1 or 0}""",
    # → each job: its id, names and values in turn; the next cursor or ''; how many jobs each status has, in
    #   Status's order; and for how many ms the first in the queue has been due, if there is one
    "page": """
        local list, cursor, limit, most_bytes = unpack(ARGV)
        local below = cursor == '' and '+inf' or '(' .. cursor
        local ids =
          redis.call('ZREVRANGEBYSCORE', P .. list, below, '-inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
        local jobs, size, shown = {}, 0, 0
        while shown < math.min(#ids / 2, limit) and size < tonumber(most_bytes) do
          shown = shown + 1
          local job = read(ids[2 * shown - 1])
          for i = 2, #job, 2 do size = size + #job[i] + 20 end
          jobs[shown] = {ids[2 * shown - 1], job}
        end
        local counts, age = {}, false
        for _, status in ipairs({'pending', 'processing', 'completed', 'failed'}) do
          counts[#counts + 1] = redis.call('ZCARD', P .. status)
        end
        local line = redis.call('LRANGE', P .. 'queue', -10, -1)  -- the first in line is the last here
        for i = #line, 1, -1 do  -- some may be cancelled
          local status, created, due = unpack(read(line[i], 'status', 'created_at', 'due_at'))
          local since = status == 'pending' and tonumber(due or created or '')
          age = age or since and math.max(0, now - math.max(0, since))
        end
        return {jobs, shown < #ids / 2 and ids[2 * shown] or '', counts, age}""",
    "wake": "wake()",
}
NO_LIMIT = 1 << 53  # for Lua, whose numbers are exact up to here
REPLY_BYTES = 4_000_000  # of payloads, after which a reply has no further job


class Report(NamedTuple):
    """What became of an attempt."""

    claim: Claim
    transition: Literal["complete", "fail", "retry", "release"]
    text: str = ""  # the result as JSON, or the error
    traceback: str = ""  # of the error
    delay: float = 0  # seconds before the next attempt, after `retry` or `release`
    progress: str = ""  # as JSON, unless a renewal took it


class Sweep(NamedTuple):
    """What a sweep found."""

    now: int  # Redis's time, in milliseconds
    ready: int  # jobs in the queue
    wait: float  # seconds until a job is due, infinite when none is delayed
    ended: list[list[str]]  # id, type, attempts and new status of the jobs whose lease had ended


class Page(NamedTuple):
    """A part of a list of jobs."""

    jobs: list[str]  # as JSON
    cursor: str  # of the next page; empty on the last
    counts: dict[Status, int]  # of all jobs that are stored
    oldest: float | None  # seconds for which the first job in the queue has been due


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


class Store:
    """The state of all jobs. Each change is one atomic script, which can be sent again if its reply was lost.

    All raise redis.RedisError: ConnectionError or TimeoutError when Redis is away, ResponseError when it
    refuses. `clock` is Lua that sets `now`, in milliseconds; tests bring their own.
    """

    def __init__(self, pipeline: AutoPipeline, prefix: str = PREFIX, clock: str = LUA_CLOCK) -> None:
        self._pipeline = pipeline
        self.prefix = prefix
        self._texts = {name: "\n".join([clock, LUA_COMMON, lua]) for name, lua in SCRIPTS.items()}
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    async def _twice(self, *command: str | int) -> Any:
        """The reply to a command, which is sent again if the first reply was lost."""
        try:
            return await self._pipeline.call(*command)
        except (redis.ConnectionError, redis.TimeoutError):
            return await self._pipeline.call(*command)

    async def _run(self, name: str, *arguments: str | int) -> Any:
        try:
            return await self._twice("EVALSHA", self._hashes[name], 1, self.prefix, *arguments)
        except redis.exceptions.NoScriptError:  # this Redis is a new one: EVAL makes it know the script
            return await self._twice("EVAL", self._texts[name], 1, self.prefix, *arguments)

    async def submit(
        self, jobs: Sequence[NewJob], key: str = "", fingerprint: str = "", asks_others: bool = False
    ) -> list[str] | None:
        """Put jobs into the queue, or into `delayed`, all or none; their ids.

        With a `key`, the ids that it got in the last 24 hours, or None if that was for another `fingerprint`,
        a word without spaces. If it `asks_others`, an idle instance is woken.
        """
        answer = " ".join([fingerprint, *(job.id for job in jobs)])
        fields = [field for job in jobs for field in (*job[:4], str(job.timeout), _ms(job.delay))]
        kept = await self._run("submit", key, answer, int(asks_others), *fields)
        first_fingerprint, *ids = kept.split(" ")
        return ids if first_fingerprint == fingerprint else None

    async def step(
        self, dispatcher: str, number: int, reports: Sequence[Report], room: int, lease: float
    ) -> tuple[list[bool], list[Claim], int]:
        """Report, and then claim up to `room` jobs for `lease` seconds.

        The numbers of a dispatcher's steps rise: the same one again gets the same jobs, an older one none.
        Returns whether each report was accepted, which it is not if the job has another token by now; the
        claims; and how many jobs are left in the queue.
        """
        told = list[str | int]()
        for claim, transition, text, trace, delay, progress in reports:
            attempts = claim.attempts - (transition == "release")  # which does not count
            told += (claim.id, claim.token, transition, text, trace, progress, attempts, _ms(delay))
        limits = room, _ms(lease), REPLY_BYTES
        accepted, claims, left = await self._run("step", dispatcher, number, *limits, *told)
        token = f"{dispatcher}:{number}"
        return [each == 1 for each in accepted], [Claim.read(token, each) for each in claims], left

    async def renew(self, held: Iterable[tuple[Claim, str]], lease: float) -> list[bool]:
        """Extend the leases of these claims to `lease` seconds, keep their progress; whether each is held."""
        texts = [text for claim, progress in held for text in (claim.id, claim.token, progress)]
        return [each == 1 for each in await self._run("renew", _ms(lease), *texts)]

    async def sweep(
        self, retention: float = 0, keep: int = 0, end_leases_by: float = NO_LIMIT, most: int = 500
    ) -> Sweep:
        """Queue what is due, take back what has no living owner, delete what is finished: `most` of each.

        Deleted is what is older than `retention` seconds, and the oldest beyond `keep`; 0: no such limit.
        When Redis's time is past `end_leases_by`, in milliseconds, nothing is taken back.
        """
        limits = most, math.floor(end_leases_by), _ms(retention) or NO_LIMIT, keep or NO_LIMIT
        now, ready, wait, ended = await self._run("sweep", *limits)
        return Sweep(now, ready, math.inf if wait < 0 else wait / 1000, ended)

    async def cancel(self, job_id: str) -> tuple[str, bool] | None:
        """Fail a job that waits or runs, or delete a finished one: its JSON, and whether it was cancelled."""
        held, is_cancelled = await self._run("cancel", job_id, f"cancel:{uuid.uuid4()}")
        stored = dict(zip(held[::2], held[1::2], strict=True))
        return (job_json(job_id, stored), is_cancelled == 1) if stored else None

    async def get(self, job_id: str) -> str | None:
        """A job as JSON; None if it is unknown."""
        values = await self._twice("HMGET", f"{self.prefix}job:{job_id}", *FIELDS)
        stored = dict(zip(FIELDS, values, strict=True))
        return job_json(job_id, stored) if any(values) else None

    async def status(self, job_id: str) -> str | None:
        """The status of a job; None if it is unknown."""
        return cast(str | None, await self._twice("HGET", f"{self.prefix}job:{job_id}", "status"))

    async def page(
        self, status: Status | None, cursor: str, limit: int, most_bytes: int = REPLY_BYTES
    ) -> Page:
        """Jobs behind the cursor, newest first, from the first if it is empty; fewer if they are large."""
        jobs, cursor, counts, oldest = await self._run("page", status or "jobs", cursor, limit, most_bytes)
        found = list[str]()
        for job_id, held in jobs:
            stored = dict(zip(held[::2], held[1::2], strict=True))
            if stored and status in (None, stored.get("status")):  # or a script was cut off half-way
                found.append(job_json(job_id, stored))
        waits = None if oldest is None else oldest / 1000
        return Page(found, cursor, dict(zip(Status, counts, strict=True)), waits)

    async def wake(self) -> None:
        """Wake one idle instance."""
        await self._run("wake")

    async def woken(self, connection: RedisConnection, seconds: float) -> bool:
        """Wait on a connection of its own until an instance is to be woken, and whether this one is."""
        command = "BLPOP", f"{self.prefix}wake", math.ceil(seconds)
        [reply] = await connection.exchange([command], seconds + REPLY_SECONDS)
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply is not None


# ── Workers ─────────────────────────────────────────────────────────────────────────────────────
#
# All state is the pool's: how many workers are free, what runs, what is to be reported, and one bell. Two
# dispatchers use it, so that Redis works for one while Python works for the other. Each attempt is a task of
# its own, so whatever a handler leaves behind there ends with it. Three invariants:
# - A worker is free, or reserved by a step that is under way, or busy with one attempt.
# - Whoever leaves work for a dispatcher rings, and a ring is kept until one of them waits for it. If no
#   worker is free then, the end of an attempt leaves a report, and with it the next step.
# - A dispatcher that ends rings for the other one, which may have nothing more to wait for.

DISPATCHERS = ("a", "b")
RENEW_SECONDS = 0.9  # how often leases are renewed; none is shorter than two of these
TICK_SECONDS = 0.5  # how often the queue is swept, and the event loop watched
SWEEP_PAUSE_SECONDS = 0.01  # between two sweeps, when jobs fall due one after the other
AGAIN_SECONDS = 0.2  # how long to wait before a call that failed is made again
START_SECONDS = 2.0  # after a start, in which no lease is ended: others may just have lost Redis, too
RENEWED_SECONDS = 6.0  # by then every living instance has renewed, after Redis was away or its clock jumped
CLOCK_SLACK_SECONDS = 1.0  # by which Redis's clock may be ahead of where it is expected
UNKNOWN_TYPE_SECONDS = 2.0  # after which another instance may know the type of a job
LISTEN_SECONDS = 5.0  # after which a listener asks again, in case that its connection is dead
REFUSAL_SECONDS = 10.0  # after one refusal was logged, before another one is
TRACEBACK_MOST = 8000  # characters that are kept, half of them from either end
SERVICE_FRAMES = ("run_handler", "to_thread_run_sync", "Error.unwrap")  # above a handler's, in a traceback


class Pool:
    """What the tasks of one instance share."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.instance = f"{socket.gethostname()}:{os.getpid()}/{secrets.token_hex(6)}"
        self.free = settings.workers
        self.running: set[Attempt] = set()
        self.reports: list[Report] = []
        self._ring, self.bell = trio.open_memory_channel[None](1)
        self.stopping = trio.Event()  # set at shutdown: nothing more is claimed
        self.grace = trio.CancelScope()  # at its deadline `end_grace` cancels what still runs
        self.recent_types: set[str] = set()  # of the attempts since the last tick
        self.unknown_types: set[str] = set()  # that were logged already
        self.waiters: WeakValueDictionary[str, trio.Event] = WeakValueDictionary()  # by the id of the job
        self.log_refusals_from = -math.inf  # when the next one may be logged, since there may be many

    def ring(self) -> None:
        """Let a dispatcher look at the pool and at the queue: now, or after its step."""
        with suppress(trio.WouldBlock):  # it was rung already
            self._ring.send_nowait(None)

    def can_claim(self) -> bool:
        return self.free > 0 and not self.stopping.is_set()

    def stop(self, grace_ends_at: float) -> None:
        """Claim nothing more, and cancel at that time what still runs then."""
        self.grace.deadline = min(self.grace.deadline, grace_ends_at)
        self.stopping.set()
        self.ring()
        self.answer_waiters(*self.waiters)

    def answer_waiters(self, *job_ids: str) -> None:
        """Wake the requests that wait for these jobs to finish."""
        for job_id in job_ids:
            if (event := self.waiters.get(job_id)) is not None:
                event.set()

    def refused(self, error: redis.RedisError) -> None:
        """Log what Redis refuses, but not all the time; that it is away is for the pipeline to say."""
        if isinstance(error, redis.ResponseError) and trio.current_time() >= self.log_refusals_from:
            self.log_refusals_from = trio.current_time() + REFUSAL_SECONDS
            log.error("Redis refused: %s", error)


def describe(error: BaseException) -> tuple[str, str, list[BaseException]]:
    """An error in one line, as `ValueError: no`; its traceback; and its first few parts, if it is a group."""
    parts, text, frames = [error], f"{type(error).__name__}, which cannot be shown", ""
    with suppress(BaseException):  # an error may have code of its own that shows it, which may raise anything
        for each in parts:  # which grows meanwhile: groups may be nested deeper than Python's stack
            parts += cast(Any, each).exceptions if issubclass(type(each), BaseExceptionGroup) else ()
        parts = [each for each in parts if not issubclass(type(each), BaseExceptionGroup)][:5]
        text = "; ".join("".join(traceback.format_exception_only(each)).strip() for each in parts)[:2000]
        begin = error.__traceback__
        while begin and begin.tb_next and begin.tb_frame.f_code.co_qualname.startswith(SERVICE_FRAMES):
            begin = begin.tb_next
        frames = "".join(traceback.format_exception(type(error), error, begin))
    half = TRACEBACK_MOST // 2
    return text, frames if len(frames) <= TRACEBACK_MOST else f"{frames[:half]}\n…\n{frames[-half:]}", parts


async def run_handler(attempt: Attempt, most_bytes: int) -> tuple[str | None, BaseException | None]:
    """The result of a job's handler as JSON, or what it raised, or neither if it was cancelled."""
    claim = attempt.claim
    try:
        with attempt.scope:  # inside the `try`: to leave it raises, if the handler left a scope open
            return to_json(await HANDLERS[claim.job_type].run(claim.payload), most_bytes), None
    except BaseException as raised:  # here, and nowhere else: a handler may raise anything
        if trio.current_effective_deadline() == -math.inf:  # only a crash cancels what is around an attempt
            raise
        return None, raised
    return None, None


def judge(
    pool: Pool, attempt: Attempt, result: str | None, error: BaseException | None
) -> tuple[Report | None, str]:
    """The report to make, none if the job is lost; and how the attempt ended, for the log."""
    claim, is_cut_off = attempt.claim, attempt.scope.cancel_called
    if attempt.is_lost:
        return None, "cancelled: on request, or its lease was lost"
    if result is not None:  # also when it comes late
        return Report(claim, "complete", result), "completed"
    if is_cut_off and pool.grace.cancel_called:
        return Report(claim, "release"), "released by the shutdown"
    text, frames, parts = ("", "", []) if error is None else describe(error)
    is_final = any(issubclass(type(each), Unrecoverable) for each in parts)
    asked = next((cast(Retry, each).seconds for each in parts if issubclass(type(each), Retry)), None)
    if is_cut_off:
        text = f"timed out after {claim.timeout:g} s" + (f"; {text}" if text else "")
    elif pool.stopping.is_set() and not is_final:
        # Ctrl+C and systemd reach a handler's children, too: the attempt may have failed by that alone.
        return Report(claim, "release", delay=asked or 0), f"released by the shutdown: {text}"
    if is_final or claim.attempts > claim.max_retries:
        return Report(claim, "fail", text, frames), f"failed for good: {text}"
    delay = backoff(claim.attempts, pool.settings.retry_delay_seconds) if asked is None else asked
    return Report(claim, "retry", text, frames, delay), f"failed, again in {delay:.1f} s: {text}"


async def attempt_job(pool: Pool, claim: Claim) -> Report | None:
    """Run a job once, and say what to report of it; nothing if it was lost meanwhile."""
    begun, name, number = trio.current_time(), claim.job_type, claim.attempts
    attempt = Attempt(claim, trio.CancelScope(deadline=begun + claim.timeout))
    _attempt.set(attempt)  # for this task and its children: what they log names the job
    pool.running.add(attempt)
    pool.recent_types.add(name)
    log.info("%s, attempt %d of %d", name, number, claim.max_retries + 1)
    result, error = await run_handler(attempt, pool.settings.max_body_bytes)
    pool.running.remove(attempt)
    report, end = judge(pool, attempt, result, error)
    level = logging.WARNING if result is None else logging.INFO
    log.log(level, "%s, attempt %d, after %.3f s: %s", name, number, trio.current_time() - begun, end)
    return report._replace(progress=attempt.progress) if report and attempt.progress else report


async def occupy_worker(pool: Pool, claim: Claim) -> None:
    """Attempt a job if it can be run here, and leave the report to a dispatcher; the worker is free again."""
    if claim.damage:
        report: Report | None = Report(claim, "fail", claim.damage)
    elif pool.stopping.is_set():  # since it was claimed
        report = Report(claim, "release")
    elif claim.job_type in HANDLERS:
        report = await attempt_job(pool, claim)
    else:  # another instance may know it, as while a new version is being deployed
        if claim.job_type not in pool.unknown_types:
            pool.unknown_types.add(claim.job_type)
            log.warning("%s: this instance has no handler for it; others may have one", claim.job_type)
        report = Report(claim, "release", delay=UNKNOWN_TYPE_SECONDS)
    if report:
        pool.reports.append(report)
    pool.free += 1
    pool.ring()


async def step(
    pool: Pool, name: str, number: int, reports: list[Report], room: int
) -> tuple[list[Claim], int]:
    """Report and claim, again and again until Redis answers; the claims, and how many jobs are left.

    When the pool is stopping, a claim is given up once it fails, and a report at the end of the grace.
    """
    lease = pool.settings.lease_seconds
    while True:
        try:  # with the same number each time: if a reply was lost, the next one has the same jobs
            accepted, claims, left = await pool.store.step(name, number, reports, room, lease)
            break
        except redis.RedisError as error:
            pool.refused(error)
        if pool.stopping.is_set() and (not reports or pool.grace.cancel_called):
            for report in reports:
                log.warning("job %s: its report may be lost; then it runs again", report.claim.id)
            return [], 0
        await trio.sleep(AGAIN_SECONDS)
    for report, is_accepted in zip(reports, accepted, strict=True):
        if not is_accepted:
            log.warning("job %s: report refused: it comes too late", report.claim.id)
        elif report.transition in ("complete", "fail"):
            pool.answer_waiters(report.claim.id)
    return claims, left


async def dispatch(pool: Pool, name: str, attempts: trio.Nursery) -> None:
    """Claim jobs, start an attempt of each, and report those that have ended, until the pool is done."""
    may_claim = False  # whether there may be jobs in the queue
    for number in itertools.count(1):
        while not (pool.reports or (may_claim and pool.can_claim())):
            if pool.stopping.is_set() and pool.free == pool.settings.workers:
                pool.ring()  # for the other dispatcher
                return
            await pool.bell.receive()
            may_claim = True
        reports, pool.reports = pool.reports, []
        # At most half of the workers, so that there is something for the other dispatcher, too.
        room = min(pool.free, max(1, pool.settings.workers // 2)) if pool.can_claim() else 0
        pool.free -= room
        claims, left = await step(pool, name, number, reports, room)
        pool.free += room - len(claims)
        may_claim = left > 0
        for claim in claims:
            attempts.start_soon(occupy_worker, pool, claim)


async def renew_leases(pool: Pool) -> None:
    """Renew the leases of what runs, keep its progress, and cancel what has lost its job."""
    told = {attempt: attempt.progress for attempt in pool.running if not attempt.is_lost}
    held = [(attempt.claim, progress) for attempt, progress in told.items()]
    answers = await pool.store.renew(held, pool.settings.lease_seconds) if held else []
    for (attempt, progress), is_held in zip(told.items(), answers, strict=True):
        if attempt.progress == progress:  # otherwise there is more to tell
            attempt.progress = ""
        if not is_held and attempt in pool.running:  # otherwise it ended meanwhile, and was reported
            attempt.is_lost = True
            attempt.scope.cancel()


async def keep_house(pool: Pool) -> None:
    """Renew every second, and then sweep, twice a second or when a job is due.

    A sweep ends leases only if Redis's clock is where this instance expects it. Otherwise the command came
    late, the machine slept or somebody set the clock; or Redis was away. Then no lease is ended for
    RENEWED_SECONDS, in which every living instance renews its own.
    """
    renew_at, end_leases_from = -math.inf, trio.current_time() + START_SECONDS
    redis_time, told_at, limits = NO_LIMIT, 0.0, (pool.settings.retention_seconds, pool.settings.keep_jobs)
    while True:
        wake_at = trio.current_time() + TICK_SECONDS
        try:
            if trio.current_time() >= renew_at:
                renew_at = trio.current_time() + RENEW_SECONDS
                await renew_leases(pool)
            expected = redis_time + 1000 * (trio.current_time() - told_at + CLOCK_SLACK_SECONDS)
            found = await pool.store.sweep(*limits, expected if trio.current_time() >= end_leases_from else 0)
            if found.now > expected:
                end_leases_from = trio.current_time() + RENEWED_SECONDS
            redis_time, told_at = found.now, trio.current_time()
            wake_at = min(wake_at, told_at + max(SWEEP_PAUSE_SECONDS, found.wait))
            for ended in found.ended:
                log.warning("job %s: its worker is gone: %s, attempt %s; now it is %s", *ended)
            if found.ready:
                pool.ring()
        except redis.RedisError as error:
            pool.refused(error)
            end_leases_from = trio.current_time() + RENEWED_SECONDS
        wake_at = max(wake_at, trio.current_time())
        await trio.sleep_until(wake_at)
        if (late := trio.current_time() - wake_at) > pool.settings.lease_seconds / 2:
            names = ", ".join(pool.recent_types) or "none"
            log.error("the event loop stood still for %.1f s; handlers that ran: %s", late, names)
        pool.recent_types = {each.claim.job_type for each in pool.running}


async def end_grace(pool: Pool) -> None:
    """Cancel, at the end of the grace, what still runs then."""
    with pool.grace:
        await trio.sleep_forever()  # a second signal moves the deadline
    for attempt in pool.running:
        attempt.scope.cancel()


async def listen(pool: Pool, connection: RedisConnection) -> None:
    """Come when another instance has jobs that it cannot run, while there are free workers here."""
    while not pool.stopping.is_set():
        try:
            if not pool.can_claim():
                await trio.sleep(TICK_SECONDS)
            elif await pool.store.woken(connection, LISTEN_SECONDS):
                if pool.can_claim():
                    pool.ring()
                else:  # this instance has become busy meanwhile: it hands the token on
                    await pool.store.wake()
        except redis.RedisError as error:
            pool.refused(error)
            await trio.sleep(AGAIN_SECONDS)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────

CHUNK, CHUNK_BYTES = 200, 250_000  # jobs, and bytes of them, that are fetched at a time without ?limit=
LOOK_AGAIN_SECONDS = 0.5  # how often a ?wait= looks, since the job may end at another instance
HOST = re.compile(r"([\w-]{1,63}\.)*[\w-]{1,63}\.?(:\d{1,5})?|\[[\da-f:.]{2,45}\](:\d{1,5})?|", re.I | re.A)
JSON = {"Content-Type": "application/json"}
LIST_HEADERS = {"Vary": "Accept", "Cache-Control": "no-store"}
BEARER = WWWAuthenticate("bearer", {"realm": "jobqueue"})

read_jobs = msgspec.json.Decoder(JobRequest | list[JobRequest]).decode
api = Blueprint("api", __name__)
current_pool = cast(Pool, LocalProxy(lambda: current_app.config["POOL"]))  # of the app that serves this


class Query(msgspec.Struct):
    """The parameters that there are in addresses."""

    status: Annotated[str, Meta(pattern=rf"\A({'|'.join(Status)})\Z")] = ""
    cursor: Annotated[str, Meta(pattern=r"\A[0-9]{0,16}\Z")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 0
    wait: Annotated[float, Meta(ge=0, le=30)] = 0  # seconds


def parse_jobs(body: bytes, settings: Settings) -> Iterator[NewJob]:
    """The jobs that a body asks for, one or an array of them; or a 400 that names the wrong field."""
    try:
        body.decode()  # since msgspec does not look into a payload, which is kept as it is
        asked = read_jobs(body)
    except (ValueError, RecursionError) as error:
        problem = explain(error, "the body", JobRequest.__struct_fields__)
        problem = re.sub(r"^the body\[(\d+)\](\.|: )", r"job \1 of the array: ", problem)
        abort(400, problem.removeprefix("the body."))
    if not asked:
        abort(400, "an array must have at least one job")
    for number, each in enumerate(asked if isinstance(asked, list) else [asked]):
        where = f"job {number} of the array: " if isinstance(asked, list) else ""
        if each.job_type not in HANDLERS:
            abort(400, f"{where}job_type must be one of: {', '.join(HANDLERS)}")
        payload = bytes(each.payload).decode()
        try:
            HANDLERS[each.job_type].read(payload)
        except ValueError as error:
            abort(400, f"{where}{error}")
        max_retries = settings.max_retries if each.max_retries is UNSET else each.max_retries
        timeout = settings.job_timeout_seconds if each.timeout is UNSET else each.timeout
        yield NewJob(str(uuid.uuid4()), each.job_type, payload, max_retries, timeout, each.delay)


def parse_key(headers: Sequence[str], body: bytes) -> tuple[str, str]:
    """Hashes of an Idempotency-Key, empty if there is none, and of the body that came with it.

    The key is a quoted string, as in draft-ietf-httpapi-idempotency-key-header, or the same without quotes.
    """
    if not headers:
        return "", ""
    header = ", ".join(headers)  # one, or it will not match
    if not re.fullmatch(r'"([ !#-\[\]-~]|\\["\\]){1,255}"|[!#-~]{1,255}', header):
        abort(400, "Idempotency-Key must be one of up to 255 ASCII characters, quoted for spaces")
    key = header.removeprefix('"').removesuffix('"')
    return hashlib.sha256(key.encode()).hexdigest(), hashlib.sha256(body).hexdigest()


def parse_query(*known: str) -> Query:
    """The parameters of this request: each is known, given once, and within its limits; or a 400."""
    for name, values in request.args.lists():
        if name not in known or len(values) > 1:
            allowed = ", ".join(known) or "none"
            abort(400, f"{name[:80]!r} is no parameter here, or came twice; they are: {allowed}")
    try:
        return msgspec.convert(request.args.to_dict(), Query, strict=False)
    except msgspec.ValidationError as error:
        return abort(400, explain(error, "", ()).removeprefix("."))


def wants_html() -> bool:
    """Whether this request asks for the list of jobs as a page for people, not as JSON."""
    best = request.accept_mimetypes.best_match(["application/json", "text/html"])
    return request.method in ("GET", "HEAD") and request.path == "/jobs" and best == "text/html"


async def html_page() -> ResponseReturnValue:
    """The page: it holds no jobs, its script asks for them. Its policy forbids it to load anything else."""
    nonce = secrets.token_urlsafe(16)
    known = {"handlers": HANDLERS, "statuses": [*Status], "finished": FINISHED}
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = await render_template("jobs.html", nonce=nonce, **known)
    return text, LIST_HEADERS | {"Content-Security-Policy": policy}


def problem_with(path: str, host: str) -> str:
    """Why Quart cannot route a request; empty if it can."""
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
        abort(400, problem)
    if request.path == "/":
        return
    if settings.api_token:
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        is_right = hmac.compare_digest(sent.strip().encode(), settings.api_token.encode())
        if not (scheme.lower() == "bearer" and is_right) and not wants_html():
            abort(401, "send the header Authorization: Bearer, with the API token", www_authenticate=BEARER)
        return
    own_name = rf"([\w-]+|[\d.]+|\[[\da-f:.]+\]|{re.escape(settings.host)})(:\d+)?"
    name = request.headers.get("Host", "localhost")  # HTTP/1.0 has none; a browser always sends one
    if not re.fullmatch(own_name, name, re.I | re.A):
        abort(403, f"{name[:80]!r} is not a name of this server; API_TOKEN allows any name")


@api.after_app_request
async def add_headers(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype == "text/html":  # the page has a policy of its own
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    if "Transfer-Encoding" in request.headers and "Content-Length" in request.headers:
        response.headers["Connection"] = "close"  # perhaps a smuggled request (RFC 9112, 6.1)
    return response


@api.app_errorhandler(HTTPException)
async def refuse(error: HTTPException) -> ResponseReturnValue:
    text = error.description
    if error.code == 404 and request.routing_exception:
        text = f"there is nothing at {request.path[:80]}; try POST /job, GET /job/<id> or GET /jobs"
    elif isinstance(error, MethodNotAllowed):
        text = f"{request.method} is not possible here, only: {', '.join(error.valid_methods or ())}"
    elif error.code == 413:
        text = f"the body must be at most {current_pool.settings.max_body_bytes:,} bytes"
    return json.dumps({"error": text}) + "\n", error.code or 500, dict(error.get_headers()) | JSON


@api.app_errorhandler(redis.RedisError)
async def unavailable(error: redis.RedisError) -> ResponseReturnValue:
    current_pool.refused(error)
    text = f"Redis cannot serve this now: {error}"
    return json.dumps({"error": text}) + "\n", 503, JSON | {"Retry-After": "1"}


@api.post("/job")
async def submit() -> ResponseReturnValue:
    pool = current_pool
    parse_query()
    if request.mimetype != "application/json":
        abort(415, "the Content-Type must be application/json")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        abort(415, "the body must have no Content-Encoding")
    body = cast(bytes, await request.get_data())
    jobs = list(parse_jobs(body, pool.settings))
    key, fingerprint = parse_key(request.headers.getlist("Idempotency-Key"), body)
    ids = await pool.store.submit(jobs, key, fingerprint, asks_others=not pool.can_claim())
    pool.ring()
    if ids is None:
        abort(422, "this Idempotency-Key was used for another request")
    if body.lstrip().startswith(b"["):
        return json.dumps([{"id": job_id} for job_id in ids]) + "\n", 202, JSON
    return f'{{"id": "{ids[0]}"}}\n', 202, JSON | {"Location": f"job/{ids[0]}"}


async def wait_until_finished(pool: Pool, job_id: str, seconds: float) -> None:
    """Return when the job is finished or unknown, after so many seconds, or at a shutdown."""
    with trio.move_on_after(seconds):
        # Made before the look, or the end may be missed; kept here, since the pool's reference is weak.
        is_finished = pool.waiters.setdefault(job_id, trio.Event())
        while not pool.stopping.is_set() and await pool.store.status(job_id) not in (None, *FINISHED):
            with trio.move_on_after(LOOK_AGAIN_SECONDS):
                await is_finished.wait()
                return


def job_response(job_id: str, text: str | None) -> ResponseReturnValue:
    if text is None:
        abort(404, f"there is no job {job_id[:80]!r}, or no more")
    return text + "\n", JSON


@api.get("/job/<job_id>")
async def show(job_id: str) -> ResponseReturnValue:
    if wait := parse_query("wait").wait:
        await wait_until_finished(current_pool, job_id, wait)
    return job_response(job_id, await current_pool.store.get(job_id))


@api.delete("/job/<job_id>")
async def cancel(job_id: str) -> ResponseReturnValue:
    parse_query()
    text, is_cancelled = await current_pool.store.cancel(job_id) or (None, False)
    if text:
        log.info("job %s: %s on request", job_id, "cancelled" if is_cancelled else "deleted")
        current_pool.answer_waiters(job_id)
    return job_response(job_id, text)


@api.get("/")
async def home() -> ResponseReturnValue:
    """Leads to the page; and tells a probe, which needs no token, whether Redis is there."""
    await current_pool.store.status("")
    return redirect("jobs")


async def stream(fetch: Callable[..., Awaitable[Page]], page: Page) -> AsyncIterator[str]:
    """A list of jobs, from its first page on, in constant memory."""
    before = "["
    while True:
        if page.jobs:  # otherwise all of this part are gone
            yield before + ",\n".join(page.jobs)
            before = ",\n"
        if not page.cursor:
            break
        page = await fetch(page.cursor, CHUNK, CHUNK_BYTES)
    yield "[]\n" if before == "[" else "]\n"


@api.get("/jobs")
async def list_jobs() -> ResponseReturnValue:
    if wants_html():
        return await html_page()
    query = parse_query("status", "limit", "cursor")
    fetch = partial(current_pool.store.page, Status(query.status) if query.status else None)
    if not query.limit:
        first = await fetch(query.cursor, CHUNK, CHUNK_BYTES)  # before the answer begins: it may be a 503
        return Response(stream(fetch, first), headers=LIST_HEADERS | JSON)
    page = await fetch(query.cursor, query.limit)
    counts = ", ".join(f"{name}={count}" for name, count in page.counts.items())
    headers = LIST_HEADERS | JSON | {"Job-Counts": counts}
    if page.oldest is not None:
        headers["Job-Oldest-Seconds"] = f"{page.oldest:.3f}"
    if page.cursor:
        following = urlencode(request.args.to_dict() | {"cursor": page.cursor})
        headers["Link"] = f'<jobs?{following}>; rel="next"'
    return "[" + ",\n".join(page.jobs) + "]\n", headers


def create_app(pool: Pool) -> QuartTrio:
    """The REST API, and the page that shows it to people."""
    app = QuartTrio(__name__, static_folder=None)
    app.config |= {"MAX_CONTENT_LENGTH": pool.settings.max_body_bytes, "POOL": pool}
    app.config["RESPONSE_TIMEOUT"] = None  # a list takes its time; `Client` ends what nobody reads
    app.register_blueprint(api)
    return app


IDLE_CLIENT_SECONDS = 75.0  # between two requests: longer than a proxy keeps a connection, which is 60 s
SILENT_CLIENT_SECONDS = 30.0  # how long a client may take nothing of its answer
LINGER_SECONDS = 1.0  # in which the rest of a refused request is read, since a reset would hide the answer
LAST_REQUESTS_SECONDS = 3.0  # what requests under way get at a shutdown


class OnlyHTTP11(h11.Connection):
    """What hypercorn reads of a connection: HTTP/1.1, whatever else the client offers to speak."""

    def next_event(self) -> Any:
        if self.their_state is h11.MUST_CLOSE and self.trailing_data[0]:
            return h11.PAUSED  # a line end behind the body: h11 would answer 400 to a job that is accepted
        event = super().next_event()
        if isinstance(event, h11.Request):
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("only HTTP/1.1 is spoken here", 505)
            kept = [header for header in event.headers if header[0] != b"upgrade"]
            return replace(event, headers=cast(Any, kept))
        return event


class Client:
    """One connection of a client: hypercorn reads its requests, and writes the answers.

    hypercorn's own server cannot be had: one connection that breaks, as by a packet that it cannot read, ends
    `hypercorn.trio.serve` as a whole (issue 225 there). So this uses inner names of hypercorn and h11, and
    what breaks ends its own connection only. It ends, too, when the client takes nothing of an answer for
    SILENT_CLIENT_SECONDS, or sends no complete request head for IDLE_CLIENT_SECONDS.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._turn = trio.Lock()  # to send: the reading task says "100 Continue" while an answer may begin
        self._scope = trio.CancelScope()  # around all that the connection does
        # Around the reading of requests; it is cancelled by its deadline, which is finite while none is under
        # way, by `_send` after the last answer, or by a shutdown.
        self.reading = trio.CancelScope(deadline=trio.current_time() + IDLE_CLIENT_SECONDS)
        self._is_answered = False  # whether the last answer was sent, perhaps to a request still being sent

    async def run(self, make_protocol: Callable[..., H11Protocol]) -> None:
        """Serve the client until either side closes the connection."""
        try:
            with self._scope:
                async with TaskGroup() as tasks:
                    ends = self._stream.socket.getpeername()[:2], self._stream.socket.getsockname()[:2]
                    protocol = make_protocol(tasks, ConnectionState(cast(Any, {})), False, *ends, self._send)
                    protocol.connection = OnlyHTTP11(h11.SERVER, hypercorn.Config.h11_max_incomplete_size)
                    with self.reading:
                        async for data in self._stream:
                            await protocol.handle(RawData(bytes(data)))
                        await protocol.handle(RawData(b""))  # half-closed: the last request is answered
                    if self._is_answered:
                        await self._stream.send_eof()
                        with trio.move_on_after(LINGER_SECONDS):
                            async for _ in self._stream:
                                pass
                    if self.reading.cancel_called:
                        self._scope.cancel()
        except* (OSError, trio.BrokenResourceError, h11.LocalProtocolError):
            pass  # it went away, or was cut off in the midst of an answer, which hypercorn cannot end
        except* Exception as errors:
            log.warning("a connection broke: %s", describe(errors)[0])
            log.debug("the traceback", exc_info=errors)

    async def _send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self.reading.deadline = trio.current_time() + IDLE_CLIENT_SECONDS if event.idle else math.inf
        elif not isinstance(event, RawData):  # Closed, after the last answer
            self._is_answered = True
            self.reading.cancel()
        else:
            data = memoryview(event.data)
            try:
                async with self._turn:
                    while data:
                        self._scope.deadline = trio.current_time() + SILENT_CLIENT_SECONDS
                        data = data[await self._stream.socket.send(data) :]
                    self._scope.deadline = math.inf
            except OSError:
                self._scope.cancel()  # nobody takes the answer: what makes it ends, too


async def serve_http(pool: Pool, listeners: list[trio.SocketListener]) -> None:
    """Serve until the pool is stopping; then answer what is under way."""
    config, context, clients = hypercorn.Config(), WorkerContext(None), set[Client]()
    config.errorlog, config.include_server_header = logging.getLogger("hypercorn.error"), False
    make_protocol = partial(H11Protocol, ASGIWrapper(partial(protect, create_app(pool))), config, context)

    async def serve_client(stream: trio.SocketStream) -> None:
        client = Client(stream)
        clients.add(client)
        await client.run(make_protocol)
        clients.remove(client)

    async with trio.open_nursery() as serving:
        async with trio.open_nursery() as accepting:
            serve_all = partial(trio.serve_listeners, serve_client, listeners, handler_nursery=serving)
            accepting.start_soon(serve_all)
            await pool.stopping.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        for client in clients:
            if client.reading.deadline < math.inf:  # it is idle; the others are closed after their answer
                client.reading.cancel()
        serving.cancel_scope.deadline = trio.current_time() + LAST_REQUESTS_SECONDS


# ── The service ─────────────────────────────────────────────────────────────────────────────────

BACKLOG = 1024  # connections that wait to be accepted
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALS_ARE_ONE_SECONDS = 1.0  # in which several signals count as one, since supervisors send two
EXIT_SECONDS = 1.0  # from the end of the grace to the forced exit
CONTROL = {n: ascii(chr(n))[1:-1] for n in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
SECRETS = r"(?s)(?<=//)[^/]*@|[?#].*"  # of a URL: who logs in, and any options
Resources = AbstractAsyncContextManager[object] | None


def end_process(seconds: float, status: int) -> None:
    """End this process in so many seconds, whatever holds it then; the jobs are safe, since leases end."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


async def crash_on_bug(task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a task of the service. A bug in it ends the process; it is logged first, since that takes time."""
    try:
        await task(*arguments)
    except* Exception as errors:
        log.critical("a task of the service failed", exc_info=errors)
        end_process(REPLY_SECONDS + EXIT_SECONDS, 1)  # a thread of a handler may hold up the end
        raise SystemExit(1) from None


def stop_on_signals(pool: Pool) -> None:
    """Stop the pool at the first signal, and without any more grace at one that comes a second later.

    A plain signal handler: it runs even while a job's handler blocks the event loop. So it only does what may
    be done between any two instructions, and the rest is the event loop's, once that goes on. Both the grace
    and the forced exit count from here.
    """
    call_soon, process, signals = trio.lowlevel.current_trio_token().run_sync_soon, os.getpid(), list[float]()

    def on_signal(number: int, _frame: object) -> None:
        if os.getpid() != process:  # this is a fork of a handler's, as multiprocessing makes them
            os._exit(128 + number)
        with suppress(RuntimeError):  # Trio has ended
            now, grace = trio.current_time(), 0.0 if signals else pool.settings.shutdown_grace_seconds
            if signals and now < signals[0] + SIGNALS_ARE_ONE_SECONDS:
                return
            signals.append(now)
            text = "%s: stopping; running jobs have %g s to finish"
            call_soon(log.info, text, signal.Signals(number).name, grace)
            call_soon(pool.stop, now + grace)
            end_process(grace + EXIT_SECONDS, 0)  # last, since there may be no thread left for its timer

    for number in SIGNALS:
        if number in SIGNALS[:2] or signal.getsignal(number) != signal.SIG_IGN:  # which nohup makes of SIGHUP
            signal.signal(number, on_signal)


async def serve(settings: Settings, sockets: Sequence[socket.socket], resources: Resources = None) -> None:
    """Run the service until SIGINT, SIGTERM or SIGHUP, and then in this order:

    1. accept nothing more; the requests under way are answered;
    2. attempts finish and are reported, their leases still being renewed;
    3. when the grace is over, or at a second signal, what still runs is cancelled and released (but a thread
       cannot be cancelled: its job comes back when its lease ends);
    4. when all reports have been answered or given up, the connections to Redis are closed.
    """
    url, run = settings.redis_url, crash_on_bug
    transports = [RedisConnection(url).exchange for _ in range(CONNECTIONS)] if url else [memory()]
    pipeline = AutoPipeline(*transports)
    pool = Pool(Store(pipeline), settings)
    kept = re.sub(SECRETS, "", url) or "memory, and vanish at exit: set REDIS_URL to keep them"
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in sockets]
    names = [each.socket.getsockname()[:2] for each in listeners]
    places = " and ".join(f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in names)
    # Handlers that take all of Trio's threads must not keep the service from looking up Redis's address.
    trio.to_thread.current_default_thread_limiter().total_tokens = math.inf
    async with trio.open_nursery() as connections:
        connections.start_soon(run, pipeline.run)
        async with trio.open_nursery() as background:
            stop_on_signals(pool)
            background.start_soon(run, keep_house, pool)
            background.start_soon(run, end_grace, pool)
            if url:
                background.start_soon(run, listen, pool, RedisConnection(url))
            async with resources or nullcontext(), trio.open_nursery() as work:
                log.info(
                    "listening on %s with %d workers; jobs are kept in %s", places, settings.workers, kept
                )
                work.start_soon(run, serve_http, pool, listeners)
                for name in DISPATCHERS if settings.workers else ():
                    work.start_soon(run, dispatch, pool, f"{pool.instance}:{name}", work)
                try:
                    await pool.stopping.wait()
                except trio.Cancelled:  # by a failure outside of `crash_on_bug`: a handler broke its task
                    end_process(REPLY_SECONDS + EXIT_SECONDS, 1)
                    raise
            background.cancel_scope.cancel()
        connections.cancel_scope.cancel()
    log.info("stopped")
    for number in SIGNALS:  # one that comes while Python ends would change the exit status
        signal.signal(number, signal.SIG_IGN)


class OneLine(logging.Formatter):
    """Each entry is one line that names its job. It cannot look like another line, or command a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        time = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "milliseconds")[:-6]
        attempt = _attempt.get(None)
        text = f"job {attempt.claim.id}: {record.message}" if attempt else record.message
        return f"{time}Z {record.levelname:7} {text if text.isprintable() else text.translate(CONTROL)}"

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + line.translate(CONTROL) for line in lines)


def set_up_process(log_level: str) -> None:
    """Log to stderr, and allow as many connections as the system lets this process have."""
    # What no line shows is not looked up: it would cost a third more (Logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(OneLine())
    logging.basicConfig(level=log_level.upper(), handlers=[to_stderr])
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)
    # Out of descriptors it tries again ten times a second: a line is enough, without a traceback.
    logging.getLogger("trio.serve_listeners").addFilter(
        lambda record: vars(record).update(exc_info=None) or True
    )
    if sys.platform != "win32":
        import resource

        with suppress(ValueError, OSError):  # macOS refuses what it calls infinite
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def open_sockets(settings: Settings) -> list[socket.socket]:
    """Sockets that listen: on IPv4 and IPv6 where HOST means both. If none can be had, the program ends."""
    sockets, host, port = list[socket.socket](), settings.host.strip("[]"), settings.port
    names = {"localhost": ("127.0.0.1", "::1"), "::": ("0.0.0.0", "::")}.get(host, (host,))
    for name in names:
        family, shares = socket.AF_INET6 if ":" in name else socket.AF_INET, bool(settings.reuse_port)
        try:
            made = socket.create_server((name, port), family=family, backlog=BACKLOG, reuse_port=shares)
            port = made.getsockname()[1]  # the same for both, also when any would do
            sockets.append(made)
        except OSError as error:
            has_none = not sockets and name == names[-1]  # otherwise the host has one family alone
            if error.errno == errno.EADDRINUSE or has_none:
                sys.exit(f"{PROGRAM}: cannot listen on {host}, port {port}: {error.strerror}")
    return sockets


def main(resources: Resources = None) -> None:
    """Read the settings, listen, serve. What handlers share, `resources`, is entered before the first job."""
    settings = Settings.read(sys.argv[1:], os.environ)
    set_up_process(settings.log_level)
    if settings.smtp_url:
        send_email_through(settings.smtp_url, settings.smtp_from)
    if settings.host not in LOOPBACK and not settings.api_token:
        log.warning("anybody who reaches %s may use this queue: set API_TOKEN", settings.host)
    sockets = open_sockets(settings)
    try:
        trio.run(serve, settings, sockets, resources)
    except* SystemExit:  # from `crash_on_bug`
        sys.exit(1)
    except* trio.TrioInternalError:
        log.critical("Trio failed", exc_info=True)
        os._exit(1)  # at once: tasks that Trio left in the middle would hold up the end of the process


if __name__ == "__main__":
    main()
