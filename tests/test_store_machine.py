"""The store beside a model of it: everything in any order, twice, lost or late, with the clock moved at will.

After each step, all keys must be what the model says. A longer soak, which looks for what is new, too, is

    SOAK_ROUNDS=1000 python -m pytest tests/test_store_machine.py
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple, cast

import fakeredis
import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from conftest import PREFIX, Bench, RedisServer
from jobqueue import FINISHED, NO_LIMIT, Claim, NewJob, Report, Status, Store

LEASE, RETENTION, KEEP = 10, 60, 4


class PlainPipeline:
    """Stands for the pipeline: each command is carried out at once."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def call(self, *command: str | int) -> Any:
        return self.client.execute_command(*command)


def run(call: Awaitable[Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        cast(Any, call).send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


class Expected(NamedTuple):
    """What the store should say of a job."""

    place: str  # its status, or `delayed` while it is pending and not in the queue
    attempts: int
    max_retries: int
    number: int
    until: int = 0  # in ms: when it is due, its lease ends, or it finished
    token: str = ""  # of the claim that holds it, or last reported it

    @property
    def status(self) -> str:
        return "pending" if self.place == "delayed" else self.place


class Model:
    """Does everything twice: here, in plain Python, and in the store, which must answer the same."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.store = Store(cast(Any, PlainPipeline(client)), clock=Bench.CLOCK)
        self.now = self.number = 0
        self.jobs: dict[str, Expected] = {}
        self.queue: list[str] = []  # the first in line is the first; some may be cancelled, or deleted
        self.records: dict[str, tuple[int, tuple[str, ...]]] = {}  # of each dispatcher's last claim
        self.kept: set[str] = set()  # the idempotency keys
        self.move_to(1_000_000)

    def copy(self) -> Model:
        made = copy.copy(self)
        made.jobs, made.queue, made.records = dict(self.jobs), list(self.queue), dict(self.records)
        made.kept = set(self.kept)
        return made

    def put(self, job_id: str, **changes: Any) -> None:
        self.jobs[job_id] = self.jobs[job_id]._replace(**changes)

    def move_to(self, now: int) -> None:
        self.now = now
        self.client.set(PREFIX + "clock", now)

    def submit(self, new: Sequence[NewJob], key: str) -> None:
        """A submission changes nothing while its key is kept, or one of its jobs."""
        if key not in self.kept and not any(job.id in self.jobs for job in new):
            self.kept |= {key} - {""}
            for job in new:
                self.number += 1
                place, until = ("delayed", self.now + int(job.delay * 1000)) if job.delay else ("pending", 0)
                self.jobs[job.id] = Expected(place, 0, job.max_retries, self.number, until)
                self.queue += [] if job.delay else [job.id]
        assert run(self.store.submit(new, key, "print")) == [job.id for job in new]

    def step(self, dispatcher: str, number: int, reports: Sequence[Report], room: int) -> list[Claim]:
        accepted = [self.report(report) for report in reports]
        ids = self.claim(dispatcher, number, room) if room else ()
        got_accepted, claims, left = run(self.store.step(dispatcher, number, reports, room, LEASE))
        expected = [(f"{dispatcher}:{number}", job_id, self.jobs[job_id].attempts, "") for job_id in ids]
        assert [(claim.token, claim.id, claim.attempts, claim.damage) for claim in claims] == expected
        assert (got_accepted, left) == (accepted, len(self.queue))
        return cast(list[Claim], claims)

    def report(self, report: Report) -> bool:
        claim, transition, delay = report.claim, report.transition, int(report.delay * 1000)
        job = self.jobs.get(claim.id)
        if not job or job.token != claim.token:
            return False
        if job.place == "processing":  # otherwise it came before
            place = {"complete": "completed", "fail": "failed"}.get(transition, "delayed")
            if transition == "release" and not delay:
                place = "pending"
                self.queue.insert(0, claim.id)
            until = self.now + (delay if place == "delayed" else 0)
            attempts = claim.attempts - (transition == "release")
            self.put(claim.id, place=place, until=until, attempts=attempts)
        return True

    def claim(self, dispatcher: str, number: int, room: int) -> tuple[str, ...]:
        last, ids = self.records.get(dispatcher, (0, ()))
        token = f"{dispatcher}:{number}"
        if last > number:
            return ()  # it comes late
        if last == number:
            ids = tuple(each for each in ids if self.holds(each, token))
        else:
            taken, self.queue = self.queue[:room], self.queue[room:]
            waiting = {job_id for job_id, job in self.jobs.items() if job.place == "pending"}
            ids = tuple(each for each in dict.fromkeys(taken) if each in waiting)
            self.records[dispatcher] = number, ids
        for each in ids:
            attempts = self.jobs[each].attempts + (last < number)
            until = self.now + LEASE * 1000
            self.put(each, place="processing", attempts=attempts, until=until, token=token)
        return ids

    def holds(self, job_id: str, token: str) -> bool:
        job = self.jobs.get(job_id)
        return job is not None and (job.place, job.token) == ("processing", token)

    def renew(self, claims: Sequence[Claim]) -> list[bool]:
        """Those that are still held get a new lease, the others are told."""
        held = [self.holds(claim.id, claim.token) for claim in claims]
        for claim, is_held in zip(claims, held, strict=True):
            if is_held:
                self.put(claim.id, until=self.now + LEASE * 1000)
        assert run(self.store.renew([(claim, "[0.5]") for claim in claims], LEASE)) == held
        return held

    def sweep(self, end_leases: bool, retention: int = 0, keep: int = 0) -> None:
        ended = []
        for until, job_id in sorted((job.until, job_id) for job_id, job in self.jobs.items()):
            job = self.jobs[job_id]
            if job.place == "delayed" and until <= self.now:
                self.put(job_id, place="pending")
                self.queue.append(job_id)
            elif job.place == "processing" and until <= self.now and end_leases:
                is_last = job.attempts > job.max_retries
                self.put(job_id, place="failed" if is_last else "pending", token="", until=self.now)
                self.queue[:0] = [] if is_last else [job_id]
                ended.append([job_id, "math", str(job.attempts), self.jobs[job_id].place])
        done = sorted((job.until, job_id) for job_id, job in self.jobs.items() if job.place in FINISHED)
        old = [each for each in done if retention and each[0] <= self.now - retention * 1000]
        for _, job_id in (keep and done[:-keep]) or old:
            del self.jobs[job_id]
        found = run(self.store.sweep(retention, keep, NO_LIMIT if end_leases else self.now - 1))
        assert (found.now, found.ready, found.ended) == (self.now, len(self.queue), ended)

    def cancel(self, job_id: str, token: str) -> None:
        """What waits or runs fails; what is finished is deleted, but not by the DELETE that cancelled it."""
        job = self.jobs.get(job_id)
        if job and job.place not in FINISHED:
            self.put(job_id, place="failed", token=token, until=self.now)
        elif job and job.token != token:
            del self.jobs[job_id]
        stored, is_cancelled = run(self.store._run("cancel", job_id, token))
        assert (bool(stored), is_cancelled) == (job is not None, job is not None and job_id in self.jobs)

    def keys(self) -> dict[str, Any]:
        """What the keys should hold, without those that are empty."""
        found: dict[str, Any] = {"queue": self.queue[::-1]} if self.queue else {}
        by_time = {
            "delayed": "delayed",
            "processing": "leases",
            "completed": "finished",
            "failed": "finished",
        }
        for job_id, job in self.jobs.items():
            found[f"job:{job_id}"] = job.status, str(job.attempts), str(job.number), job.token
            for name, score in (
                ("jobs", job.number),
                (job.status, job.number),
                (by_time.get(job.place), job.until),
            ):
                if name:
                    found.setdefault(name, {})[job_id] = score
        return found


SHOWN = ("status", "attempts", "number", "token")


class StoreMachine(RuleBasedStateMachine):
    """Every transition in every order, by several owners."""

    def connect(self) -> Any:
        return fakeredis.FakeRedis(decode_responses=True)

    @initialize()
    def begin(self) -> None:
        self.client = self.connect()
        self.client.flushall()
        self.model = Model(self.client)
        self.counts = Counter[str]()  # of submissions, steps and DELETEs
        self.submissions: list[tuple[list[NewJob], str]] = []
        self.steps: list[tuple[str, int, list[Report], int]] = []
        self.claims: list[Claim] = []  # every claim that was ever made
        self.cancels: list[tuple[str, str]] = []

    @rule(seconds=st.integers(0, 40))
    def move(self, seconds: int) -> None:
        self.model.move_to(self.model.now + seconds * 1000)

    @rule(
        delays=st.lists(st.sampled_from([0, 0, 5]), min_size=1, max_size=3),
        max_retries=st.integers(0, 2),
        has_key=st.booleans(),
    )
    def submit(self, delays: list[int], max_retries: int, has_key: bool) -> None:
        self.counts["submissions"] += 1
        name = str(self.counts["submissions"])
        new = [NewJob(f"{name}.{n}", "math", "{}", max_retries, 9.0, delay) for n, delay in enumerate(delays)]
        self.submissions.append((new, name if has_key else ""))
        self.model.submit(*self.submissions[-1])

    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        if self.submissions:
            new, key = data.draw(st.sampled_from(self.submissions))
            self.model.submit(new, key)
            assert not key or run(self.model.store.submit(new, key, "another")) is None

    @rule(
        data=st.data(),
        owner=st.sampled_from("abc"),
        room=st.integers(0, 3),
        is_sent=st.sampled_from([1, 1, 0]),
    )
    def step(self, data: st.DataObject, owner: str, room: int, is_sent: int) -> None:
        """A new step, with reports on any claims ever made; it may be lost on its way, and come late."""
        claims = data.draw(st.lists(st.sampled_from(self.claims[-6:]), max_size=2)) if self.claims else []
        transitions, delays = (
            st.sampled_from(["complete", "fail", "retry", "release"]),
            st.sampled_from([0, 3]),
        )
        reports = [
            Report(claim, cast(Any, data.draw(transitions)), "1", "", data.draw(delays)) for claim in claims
        ]
        self.counts[owner] += 1
        self.steps.append((owner, self.counts[owner], reports, room))
        if is_sent:
            self.claims += self.model.step(*self.steps[-1])

    @rule(data=st.data())
    def step_again(self, data: st.DataObject) -> None:
        """Any step again: its reply was lost, or the command comes late."""
        if self.steps:
            claims = self.model.step(*data.draw(st.sampled_from(self.steps[-6:])))
            self.claims += [claim for claim in claims if claim not in self.claims]

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        self.model.renew(data.draw(st.lists(st.sampled_from(self.claims))) if self.claims else [])

    @rule(end_leases=st.booleans())
    def sweep(self, end_leases: bool) -> None:
        self.model.sweep(end_leases, RETENTION, KEEP)

    @rule(data=st.data(), again=st.booleans())
    def cancel(self, data: st.DataObject, again: bool) -> None:
        if self.model.jobs and not again:
            self.counts["cancels"] += 1
            job_id = data.draw(st.sampled_from(sorted(self.model.jobs)))
            self.cancels.append((job_id, f"cancel:{self.counts['cancels']}"))
        if self.cancels:
            self.model.cancel(*(data.draw(st.sampled_from(self.cancels)) if again else self.cancels[-1]))

    @invariant()
    def every_key_is_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        found: dict[str, Any] = {}
        for key in self.client.keys(PREFIX + "*"):
            name, kind = key.removeprefix(PREFIX), self.client.type(key)
            if kind == "zset":
                found[name] = dict(self.client.zrange(key, 0, -1, withscores=True))
            elif kind == "hash":
                fields = self.client.hgetall(key)
                found[name] = tuple(fields.get(field, "") for field in SHOWN)
            elif name == "queue":
                found[name] = self.client.lrange(key, 0, -1)
        assert found == self.model.keys()
        assert all(job.attempts <= job.max_retries + 1 for job in self.model.jobs.values())

    @rule(status=st.sampled_from([None, *Status]))
    def look(self, status: Status | None) -> None:
        """A list has its jobs, newest first, once each, in pages of two; and counts all."""
        jobs, cursor, found = self.model.jobs, "", list[str]()
        while True:
            page = run(self.model.store.page(status, cursor, 2))
            found += [json.loads(job)["id"] for job in page.jobs]
            assert page.counts == {each: sum(job.status == each for job in jobs.values()) for each in Status}
            if not (cursor := page.cursor):
                break
        expected = [job_id for job_id, job in jobs.items() if status in (None, job.status)]
        assert found == sorted(expected, key=lambda job_id: -jobs[job_id].number)


SETTINGS = hypothesis.settings(
    max_examples=int(os.environ.get("SOAK_ROUNDS", "150")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize="SOAK_ROUNDS" not in os.environ,
)


def test_the_store_is_a_state_machine_in_memory() -> None:
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


def test_the_store_is_a_state_machine_on_redis(redis_server: RedisServer) -> None:
    class OnRedis(StoreMachine):
        def connect(self) -> Any:
            return redis_server.client

    run_state_machine_as_test(OnRedis, settings=SETTINGS)
