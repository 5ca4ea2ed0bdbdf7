"""An error at every call of every script. Redis rolls nothing back, so the order of the calls must see to it.

A missing right is an error at every call of one command. A Redis out of memory refuses scripts that begin by
adding something.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import fakeredis
import pytest
import redis

from conftest import PREFIX, Bench, RedisServer, new_job
from jobqueue import FINISHED, Claim, Report, Status, Store
from test_store_machine import PlainPipeline, run

INJECTION = """
local real, calls, fail_at = redis, 0, redis.call('GET', KEYS[1] .. 'fail_at')
local function fails(command)
  calls = calls + 1
  if not fail_at then real.call('RPUSH', 'calls', command) end
  return tostring(calls) == fail_at or command == fail_at
end
local redis = {
  call = function(...) if fails(...) then error('injected', 0) end return real.call(...) end,
  pcall = function(...) if fails(...) then return {err = 'injected'} end return real.pcall(...) end,
}
"""
STATES = {  # for each script, what leads to a state that it serves, and behind the bar what is then done
    "claim": "submit 3 | step 1 2",
    "claim behind a cancelled one": "submit 3; cancel 0 | step 1 3",
    "claim a job that stands twice": "submit 2; stale queue 0 | step 1 3",
    "claim again": "submit 3 0; step 1 2 | step 1 2",
    "claim again what was taken back": "submit 2; step 1 2; move 10; sweep | step 1 2",
    "claim too late": "submit 2; step 2 1 | step 1 1",
    "complete": "submit 3; step 1 2 | step 2 1 complete:0",
    "complete after a retry": "submit 1; step 1 1; step 2 0 retry:0; sweep; step 3 1 | step 4 0 complete:0",
    "fail": "submit 3; step 1 2 | step 2 1 fail:0",
    "retry": "submit 3; step 1 2 | step 2 1 retry:0:1",
    "release": "submit 3; step 1 2 | step 2 1 release:0",
    "release for a while": "submit 3; step 1 2 | step 2 1 release:0:2",
    "report again": "submit 3; step 1 2; step 2 0 complete:0 | step 2 0 complete:0",
    "report too late": "submit 3; step 1 2; move 10; sweep | step 2 0 complete:0 fail:1",
    "renew": "submit 3; step 1 3; step 2 0 release:1 | renew",
    "sweep what is due": "submit 2 3 10; move 10 | sweep",
    "sweep a lease that ended": "submit 2 0; step 1 2; move 10 | sweep",
    "sweep": "submit 3 3 10; submit 2; step 1 2; cancel 1; stale delayed 1; stale leases 1; move 10 | sweep",
    "sweep what is old": "submit 4; step 1 3; step 2 0 complete:0 fail:1; move 9; stale finished 3 | sweep 1",
    "sweep what is too much": "submit 4; step 1 3; step 2 0 complete:0 fail:1; stale finished 3 | sweep 0 1",
    "cancel what waits": "submit 2 | cancel 0",
    "cancel what is delayed": "submit 2 3 60 | cancel 0",
    "cancel what runs": "submit 2; step 1 1 | cancel 0",
    "delete": "submit 2; step 1 1; step 2 0 complete:0 | cancel 0",
    "cancel again": "submit 2; cancel 0 | cancel 0",
    "page": "submit 3; step 1 1 | page",
    "wake": "submit 1 | wake",
}


class Lab(Bench):
    """The store, at a Redis that is empty; and the words of the states."""

    def __init__(self, client: Any) -> None:
        client.flushdb()
        super().__init__(cast(Any, None), client)
        self.store = Store(cast(Any, PlainPipeline(client)), clock=INJECTION + Bench.CLOCK)
        client.set(PREFIX + "fail_at", 0)
        self.ids: list[str] = []
        self.claims: dict[str, Claim] = {}  # the last one of each job

    def do(self, words: str) -> None:
        for each in words.split(";"):
            name, *numbers = each.split()
            getattr(self, f"do_{name}")(*numbers)

    def do_submit(self, count: str, max_retries: str = "3", delay: str = "0") -> None:
        new = [new_job(max_retries=int(max_retries), delay=int(delay)) for _ in range(int(count))]
        self.ids += run(self.store.submit(new))

    def do_step(self, number: str, room: str, *reports: str) -> None:
        told = list[Report]()
        for each in reports:
            transition, index, *delay = each.split(":")
            claim = self.claims[self.ids[int(index)]]
            told.append(Report(claim, cast(Any, transition), "3", "T", float(*delay), "[1]"))
        _, claims, _ = run(self.store.step("i", int(number), told, int(room), 10))
        assert len({claim.id for claim in claims}) == len(claims), "claimed twice"
        self.claims |= {claim.id: claim for claim in claims}

    def do_renew(self) -> None:
        run(self.store.renew([(claim, "[0.5]") for claim in self.claims.values()], 10))

    def do_sweep(self, retention: str = "0", keep: str = "0") -> None:
        run(self.store.sweep(int(retention), int(keep)))

    def do_cancel(self, index: str) -> None:
        run(self.store._run("cancel", self.ids[int(index)], "cancel:1"))  # sent again, it has the same name

    def do_move(self, seconds: str) -> None:
        self.move(int(seconds))

    def do_stale(self, place: str, index: str) -> None:
        """Put a job where it is not, as a script that was cut off."""
        job_id = self.ids[int(index)]
        add: Any = self.client.lpush if place == "queue" else self.client.zadd
        add(PREFIX + place, job_id if place == "queue" else {job_id: 0})

    def do_page(self) -> None:
        run(self.store.page(Status.PENDING, "", 2))

    def do_wake(self) -> None:
        run(self.store.wake())

    def fails(self, act: Any, fail_at: str) -> bool:
        """Act with an error at that call of the script, or at that command; whether it was refused."""
        self.client.set(PREFIX + "fail_at", fail_at)
        refused = ""
        try:
            act()
        except redis.ResponseError as error:
            refused = str(error)
        self.client.set(PREFIX + "fail_at", 0)
        assert "injected" in (refused or "injected")
        return bool(refused)

    def jobs(self) -> dict[str, dict[str, str]]:
        ids = [key.rpartition(":")[2] for key in self.client.keys(PREFIX + "job:*")]
        return {job_id: self.job(job_id) for job_id in ids}

    def each_claim_is_known(self) -> None:
        """A dispatcher whose step was carried out, at last, was told of all that it holds."""
        held = {job_id: job["token"] for job_id, job in self.jobs().items() if job["status"] == "processing"}
        assert held.items() <= {(job_id, claim.token) for job_id, claim in self.claims.items()}

    def none_is_in_no_place(self) -> None:
        keys = self.keys()
        places = {*keys["queue"], *keys["delayed"], *keys["leases"]}
        nowhere = {job_id: job for job_id, job in self.jobs().items() if job_id not in places}
        assert {job["status"] for job in nowhere.values()} <= {*FINISHED}, f"in no place: {nowhere}, {keys}"

    def let_all_finish(self) -> dict[str, int]:
        """Sweep and work until nothing is left to do; how often each job was run."""
        runs: dict[str, int] = {}
        reports, dispatcher = list[Report](), f"at {self.now}"
        for number in range(1, 20):
            self.move(60)
            run(self.store.sweep())
            _, claims, _ = run(self.store.step(dispatcher, number, reports, 10, 1000))
            reports = [Report(each, "complete", "3") for each in claims]
            runs |= {each.id: runs.get(each.id, 0) + 1 for each in claims}
            keys = self.keys()
            if not (reports or keys["queue"] or keys["delayed"] or keys["leases"]):
                return runs
        raise AssertionError(f"no end: {keys}")


@pytest.fixture(params=["memory", "redis"])
def client(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return fakeredis.FakeRedis(decode_responses=True)
    return request.getfixturevalue("redis_server").client


def failures(lab: Lab, act: Any) -> list[str]:
    """Each call that the script makes in this state, by its number; and each command, for all its calls."""
    lab.client.delete("calls", PREFIX + "fail_at")
    act()
    calls = lab.client.lrange("calls", 0, -1)
    return [*map(str, range(1, len(calls) + 1)), *sorted(set(calls))]


@pytest.mark.parametrize("again", [True, False], ids=["again", "once"])
@pytest.mark.parametrize("state", STATES)
def test_an_error_at_any_call_of_a_script_loses_no_job(client: Any, state: str, again: bool) -> None:
    way, words = STATES[state].split(" | ")
    lab = Lab(client)
    lab.do(way)
    for fail_at in failures(lab, partial(lab.do, words)):
        lab = Lab(client)
        lab.do(way)
        before = lab.jobs()
        lab.fails(partial(lab.do, words), fail_at)
        lab.none_is_in_no_place()
        if again:
            lab.do(words)
            lab.none_is_in_no_place()
            lab.each_claim_is_known()
        runs = lab.let_all_finish()
        after, failure = lab.jobs(), f"an error at {fail_at}"
        gone = before.keys() - after.keys()
        assert {before[job_id]["status"] for job_id in gone} <= {*FINISHED}, failure
        assert {job["status"] for job in after.values()} <= {*FINISHED}, failure
        for job_id, job in before.items():
            if job["status"] in FINISHED:
                assert after.get(job_id, job) == job, failure
                assert job_id not in runs, failure
            else:
                assert job_id in lab.keys()[after[job_id]["status"]], failure
        if again and not gone:
            lab.places()
        lab.move(1000)
        run(lab.store.sweep(retention=1))
        assert not any(lab.keys().values()), failure
        assert not lab.jobs(), failure


@pytest.mark.parametrize("key", ["", "a-key"])
def test_a_submission_that_an_error_cut_off_is_never_run_and_can_be_sent_again(client: Any, key: str) -> None:
    new = [new_job(), new_job(delay=5), new_job()]
    ids, refused = [job.id for job in new], set[str]()

    def act() -> None:
        assert run(lab.store.submit(new, key, "print", asks_others=True)) == ids

    lab = Lab(client)
    lab.do("submit 1")
    for fail_at in failures(lab, act):
        lab, failure = Lab(client), f"an error at {fail_at}"
        lab.do("submit 1")
        before = lab.jobs()
        if lab.fails(act, fail_at):
            refused.add(fail_at)
            left = {job_id for name in ("jobs", *Status) for job_id in lab.keys()[name]}
            assert (lab.jobs(), left) == (before, {*before}), failure
            assert not client.keys(PREFIX + "idempotency:*"), failure
            assert not lab.let_all_finish().keys() & {*ids}, f"refused, and run: {failure}"
        act()
        runs = lab.let_all_finish()
        assert {job_id: runs[job_id] for job_id in ids} == dict.fromkeys(ids, 1), failure
    assert {"HSET", "ZADD", "LPUSH", "INCRBY", *(["SET"] if key else [])} <= refused


def test_redis_out_of_memory_carries_out_every_script_but_submit_which_it_refuses_whole(
    redis_server: RedisServer,
) -> None:
    for state, (way, words) in ((state, each.split(" | ")) for state, each in STATES.items()):
        lab = Lab(redis_server.client)
        lab.do(way)
        keys = lab.keys()
        lab.client.config_set("maxmemory", 1)
        try:
            for new in ([new_job()], [new_job(delay=5), new_job()]):
                with pytest.raises(redis.ResponseError, match="maxmemory"):
                    run(lab.store.submit(new, "key", "print"))
            assert lab.keys() == keys, state
            assert not lab.client.keys(PREFIX + "idempotency:*"), state
            lab.do(words)  # which is not refused
        finally:
            lab.client.config_set("maxmemory", 0)
        lab.let_all_finish()
        lab.places()
