"""What Redis, clocks and bad networks do to the workers, on virtual time."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import redis
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import jobqueue
from conftest import PREFIX, Bench, Service, end_of, hold

Patch = pytest.MonkeyPatch


async def test_what_redis_refuses_is_logged_once_in_ten_seconds(
    autojump_clock: MockClock, service: Service
) -> None:
    service.bench.refuses = "MISCONF no writes for now"
    pool = await service.run(workers=3)
    pool.ring()
    await trio.sleep(15)
    assert service.log.text.count("Redis refused: MISCONF") == 2
    service.bench.refuses = ""
    assert end_of(await service.ended(await service.submit())) == ("completed", "1", "3")


async def test_a_handler_that_blocks_the_event_loop_is_named_in_the_log(
    autojump_clock: MockClock, service: Service
) -> None:
    async def blocks(seconds: float) -> None:
        await trio.sleep(0.3)
        autojump_clock.jump(seconds)

    await service.run()
    for seconds in (7.3, 10):  # more than half of a lease
        assert service.log.text == ""
        await service.ended(await service.submit(blocks, payload=f'{{"seconds": {seconds}}}'))
        await trio.sleep(1)
    [(took, name)] = re.findall(r"stood still for (.+) s; handlers that ran: (.+)\n", service.log.text)
    assert (9.5 <= float(took) <= 10, name) == (True, "blocks"), service.log.text


async def the_clock_jumps(bench: Bench, _patch: Patch, seconds: int) -> None:
    async def moved(commands: Any) -> list[Any]:
        bench.client.incrby(PREFIX + "clock", seconds * 1000)
        return await carry(commands)

    carry, bench.transport = bench.transport, moved


async def nothing_happens(_bench: Bench, _patch: Patch) -> None:
    pass


async def redis_is_away(bench: Bench, _patch: Patch) -> None:
    bench.away = True
    await trio.sleep(9)
    bench.away = False


async def a_sweep_comes_late(bench: Bench, patch: Patch) -> None:
    async def late(*arguments: Any) -> Any:
        patch.setattr(bench.store, "sweep", sweep)
        await trio.sleep(5)
        return await sweep(*arguments)

    sweep = bench.store.sweep
    patch.setattr(bench.store, "sweep", late)
    await trio.sleep(5.5)


@pytest.mark.parametrize(
    ("happens", "lease", "ended_at"),
    [
        (nothing_happens, 0.1, 2),  # as others may just have lost Redis, too
        (nothing_happens, 15, 15),
        (redis_is_away, 12, 19 + 6),
        (partial(the_clock_jumps, seconds=3600), 100, 10 + 6),
        (partial(the_clock_jumps, seconds=-3600), 15, math.inf),
        (a_sweep_comes_late, 12, 15 + 6),
    ],
)
async def test_no_lease_is_ended_while_living_instances_may_not_have_renewed_theirs(
    autojump_clock: MockClock,
    service: Service,
    happens: Callable[[Bench, Patch], Awaitable[None]],
    lease: float,
    ended_at: float,
) -> None:
    bench, record = service.bench, [math.inf]
    of_the_dead = await service.submit()
    assert (await bench.store.step("dead", 1, [], 1, lease))[1]
    healthy = await service.submit("long", payload='{"seconds": 40}', max_retries=0)
    pool = await service.run()
    pool.ring()
    for number in range(40):
        if number == 10:
            await happens(bench, service.patch)
        await trio.sleep_until(number + 1)
        if bench.job(of_the_dead)["status"] == "pending":
            record.append(trio.current_time())
    assert ended_at - 0.5 <= min(record) <= ended_at + 1.5
    assert end_of(await service.ended(healthy))[:2] == ("completed", "1")


@pytest.mark.parametrize("grace", [0, 3.1])
async def test_at_the_end_of_the_grace_what_still_runs_is_cancelled_and_released(
    autojump_clock: MockClock, service: Service, grace: float
) -> None:
    async def slow(is_bad: bool = False) -> None:
        try:
            await trio.sleep_forever()
        finally:
            record.append(trio.current_time() - 1)
            if is_bad:
                raise KeyError("while unwinding")

    record: list[float] = []
    await service.run(workers=2)
    ids = [await service.submit(slow, payload=payload) for payload in ("{}", '{"is_bad": true}')]
    waiting = await service.submit()
    await trio.sleep(1)
    assert await service.stop(grace) == pytest.approx(grace, abs=0.1)
    assert record == [pytest.approx(grace)] * 2
    jobs = [service.bench.job(job_id) for job_id in ids]
    assert [(job["attempts"], "error" in job) for job in jobs] == [("0", False)] * 2
    [(place, queue)] = service.bench.places().items()
    assert (place, sorted(queue[:2]), queue[2:]) == ("queue", sorted(ids), [waiting])


async def test_a_job_that_is_claimed_in_the_moment_of_the_stop_is_released_and_not_run(
    autojump_clock: MockClock, service: Service
) -> None:
    calls, may_end = hold(service, "step")
    await service.run()
    job_id = await service.submit()
    await wait_all_tasks_blocked()
    service.pool.stop(trio.current_time() + 20)
    may_end.set()
    assert (len(calls), await service.stop()) == (1, 0)
    assert service.bench.places() == {"queue": [job_id]}
    assert service.bench.job(job_id)["attempts"] == "0"


@pytest.mark.parametrize(
    ("has_report", "away_for", "took", "status"),
    [
        (False, math.inf, 0, "pending"),
        (True, 10, 9, "completed"),
        (True, math.inf, 20, "processing"),  # its lease ends, and it runs again
    ],
)
async def test_at_a_shutdown_with_redis_away_a_report_waits_for_the_grace_and_a_claim_for_nothing(
    autojump_clock: MockClock, service: Service, has_report: bool, away_for: float, took: float, status: str
) -> None:
    async def be_away() -> None:
        service.bench.away = True
        await trio.sleep(away_for)
        service.bench.away = False

    pool = await service.run(workers=2)
    job_id = await service.submit("long", payload='{"seconds": 2.5}', delay=0 if has_report else 60)
    await trio.sleep(2)
    service.nursery.start_soon(be_away)
    pool.ring()  # so one dispatcher waits for Redis
    await trio.sleep(1)
    assert await service.stop() == pytest.approx(took, abs=0.5)
    assert service.bench.job(job_id)["status"] == status
    assert ("its report may be lost" in service.log.text) == (status == "processing")


async def test_an_instance_listens_while_it_has_free_workers_and_hands_on_what_it_cannot_run(
    autojump_clock: MockClock, service: Service
) -> None:
    class Line:  # in place of a connection
        async def exchange(self, commands: Any, patience: float) -> list[Any]:
            assert commands == [("BLPOP", PREFIX + "wake", 5)]
            assert patience > 5
            asked_at.append(trio.current_time())
            act = acts.pop(0)
            await trio.sleep(1)
            return [act() or "the token"]

    def become_busy() -> None:
        pool.free = 0

    def lose() -> None:
        raise redis.ConnectionError("cut")

    asked_at: list[float] = []
    acts: list[Any] = [str, lambda: redis.ResponseError("NOPERM"), lose, become_busy, pool_stops := str]
    pool, line = service.set_up(workers=1), Line()
    with trio.move_on_after(10):
        await jobqueue.listen(pool, line)  # type: ignore[arg-type]
    assert asked_at == pytest.approx([0, 1, 2.2, 3.4])  # and no more, without a free worker
    assert pool.bell.statistics().current_buffer_used == 1
    assert service.bench.client.lrange(PREFIX + "wake", 0, -1) == ["1"]
    assert "Redis refused: NOPERM" in service.log.text
    pool.free = 1
    pool.stop(0)
    await jobqueue.listen(pool, line)  # type: ignore[arg-type]
    assert acts == [pool_stops]
