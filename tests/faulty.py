"""The service of test_faults.py and test_failover.py: its handlers say what they do, and misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import redis
import trio

import jobqueue
from jobqueue import handler

client: Any = redis.Redis.from_url(os.environ.get("DIRECT_URL") or os.environ["REDIS_URL"])
# Three by default, since a pause of the machine must not cut a release short.
jobqueue.EXIT_SECONDS = float(os.environ.get("EXIT_SECONDS", "3"))

# ── Decent ones ─────────────────────────────────────────────────────────────────────────────────


@handler("append")
async def append(value: int) -> int:
    client.rpush("appended", value)
    return value


@handler("gate")
async def gate(name: str) -> str:
    "Waits until the test lets it go on; the process that ran it is its result."
    client.rpush("arrived", name)
    try:
        while not client.get("open:" + name):  # noqa: ASYNC110
            await trio.sleep(0.02)
    finally:
        client.rpush("left", name)
    return str(os.getpid())


@handler("child")
async def wait_for_child(how: str) -> None:
    "A process of its own, which a Ctrl+C in the terminal reaches, too."
    client.rpush("arrived", how)
    if how == "a thread":
        await trio.to_thread.run_sync(lambda: subprocess.run(["sleep", "30"], check=True))
    with contextlib.suppress(*[subprocess.CalledProcessError] if how == "no use" else []):
        await trio.run_process(["sleep", "30"])
    raise jobqueue.Unrecoverable(how)


# ── What a handler raises ───────────────────────────────────────────────────────────────────────


def exits(*_arguments: Any) -> NoReturn:
    sys.exit("by a method of the error")


def error(name: str, base: type[BaseException] = Exception, **members: Any) -> Callable[..., BaseException]:
    return type(name, (base,), members)


Own = error("Own", BaseException)
Sealed = error("Sealed", ExceptionGroup, exceptions=property(exits))
# By a pattern that the error of the job must have; more of them are in test_jobqueue.py.
RAISED: dict[str, Callable[[], BaseException]] = {
    "asyncio.*CancelledError$": asyncio.CancelledError,
    "SystemExit: 0": lambda: SystemExit(0),
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "Own$": Own,
    "Own.*KeyError.*Exit": lambda: BaseExceptionGroup(
        "", [Own(), BaseExceptionGroup("", [KeyError(), SystemExit()])]
    ),
    "Masked": error("Masked", __class__=property(exits)),
    "Sealed|KeyError": lambda: Sealed("sealed", [KeyError()]),
    "Closed, which cannot be shown": error("Closed", __getattribute__=exits),
    "Falsy": error("Falsy", __bool__=exits),
    "ValueError: xxx": lambda: ValueError("x" * 10_000_000),
    "forged": lambda: ValueError("a\r\n\x1b[2J2000-01-01 00:00:00.000 INFO    forged\nforged\x00"),
}


async def stray() -> Any:
    "A Cancelled that has left the scope which it belongs to."
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            return cancelled


@handler("raised")
async def list_raised() -> list[str]:
    return list(RAISED)


@handler("raise-async")
async def raise_async(what: str) -> None:
    raise await stray() if what == "Cancelled" else RAISED[what]()


@handler("raise-def")
def raise_def(what: str) -> None:
    async def cancelled_in_asyncio() -> None:
        raise asyncio.CancelledError

    if what == "CancelledError":
        asyncio.run(cancelled_in_asyncio())
    raise trio.from_thread.run(stray) if what == "Cancelled" else RAISED[what]()


# ── What a handler leaves behind ────────────────────────────────────────────────────────────────


async def pages(holds: str) -> AsyncIterator[int]:
    "What is to be read to the end; until then it holds something open."
    nothing: Any = contextlib.nullcontext()
    async with trio.open_nursery() if holds == "nursery" else nothing as nursery:
        if nursery:
            nursery.start_soon(trio.sleep_forever)
        with trio.fail_after(60) if holds == "scope" else nothing:
            try:
                yield 1
                yield 2
            finally:
                client.rpush("closed", holds)


@handler("leave")
async def leave(what: str) -> None:
    "Leaves a scope open behind."
    if what == "nursery":
        (await trio.open_nursery().__aenter__()).start_soon(trio.sleep_forever)
        return
    scope = trio.CancelScope(shield=what == "shielded scope").__enter__()
    if what == "cancelled scope":
        scope.cancel()
    if what == "scope with a deadline":
        scope.deadline = trio.current_time() + 0.05


@handler("abandon")
async def abandon(holds: str, end: str) -> int:
    "Reads one of two pages."
    if end == "cycle":
        circle: list[Any] = [pages(holds)]
        circle.append(circle)
        await circle[0].__anext__()
        del circle
        gc.collect()
    else:
        async for number in pages(holds):
            if end == "raise":
                raise ValueError("its own")
            if end == "sleep":
                await trio.sleep_forever()
            if end == "return":
                return number
            break
    await trio.sleep(0.05)
    return 1


# ── What a handler does to its process ──────────────────────────────────────────────────────────


@handler("suicide")
async def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@handler("break-trio")
async def break_trio() -> None:
    async def bug() -> None:
        raise KeyError("a bug")

    trio.lowlevel.spawn_system_task(bug)
    await trio.sleep(0.1)


@handler("fork")
def fork() -> int | None:
    def say_and_sleep() -> None:
        ready.set()
        time.sleep(600)

    context = multiprocessing.get_context("fork")
    ready = context.Event()  # Python forgets a signal that comes while it sets up a fork
    child = context.Process(target=say_and_sleep)
    child.start()
    ready.wait()
    child.terminate()
    child.join()
    return child.exitcode


@handler("threads")
async def threads(count: int) -> None:
    "Takes threads of Trio's until the test lets them go on."
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(trio.to_thread.run_sync, occupy, "threads")


@handler("block")
async def block(how: str) -> str:
    "Stops the event loop for ever, unless it is run again."
    if client.incr("begun") > 1:
        return "again"
    while how == "computes":
        pass
    while how == "until it is run again" and client.get("begun") == b"1":
        time.sleep(0.05)  # noqa: ASYNC251
    if how == "sleeps":
        time.sleep(600)  # noqa: ASYNC251
    return "late"


@handler("shield")
async def shield(name: str) -> None:
    "Heeds no cancellation."
    client.rpush("arrived", name)
    with trio.CancelScope(shield=True):
        await trio.sleep(60)


@handler("occupy")
def occupy(name: str) -> str:
    "A thread that heeds nothing until the test lets it go on."
    client.rpush("arrived", name)
    while not client.get("open:" + name):
        time.sleep(0.02)
    client.rpush("left", name)
    return "late"


@handler("poll")
def poll(name: str) -> None:
    "A thread that asks whether it is wanted still."
    client.rpush("arrived", name)
    try:
        while True:
            trio.from_thread.check_cancelled()
            time.sleep(0.02)
    finally:
        client.rpush("left", name)


if os.environ.get("BUGGY"):
    sweep = jobqueue.Store.sweep

    async def buggy_sweep(*arguments: Any, **options: Any) -> Any:
        "A task of the service steps on this, when the test wants it."
        if client.exists("bug"):
            raise ZeroDivisionError("a bug")
        return await sweep(*arguments, **options)

    jobqueue.Store.sweep = buggy_sweep  # type: ignore[method-assign]


if __name__ == "__main__":
    os.setpgrp()  # as a terminal does with what it starts: a Ctrl+C reaches this and its children
    jobqueue.main()
