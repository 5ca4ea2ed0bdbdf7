"""Every order in which two dispatchers, their clients and the sweeps can act on a few jobs, up to a depth.

The search is breadth first, on the module's own scripts and a Redis in memory. A state is what Redis keeps
and what the dispatchers believe. Only the order of times and of step numbers counts, so each state is met
once. After each edge, Redis must hold what the model of `test_store_machine` says, and each claim must have
an owner. From each state at the end of the search follows a calm end, in which every job must finish.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import fakeredis
import pytest

from conftest import PREFIX
from jobqueue import FINISHED, Claim, NewJob, Report
from test_store_machine import LEASE, SHOWN, Model

DELAY = LEASE / 2  # of a delayed job, and before a retry
WORKERS = 2  # of each dispatcher
JOBS = [  # one without retries, and one that is delayed
    NewJob("0", "math", "{}", max_retries=0, timeout=9, delay=0),
    NewJob("1", "math", "{}", max_retries=1, timeout=9, delay=0),
    NewJob("2", "math", "{}", max_retries=1, timeout=9, delay=DELAY),
]
TWO, THREE = [JOBS[:2]], [[JOBS[0], JOBS[2]], [JOBS[1]]]  # as they are submitted: each list at once
Call = tuple[int, tuple[Report, ...], int]  # a step: its number, the reports, and the room
Move = tuple[Any, ...]


class Dispatcher(NamedTuple):
    """What a dispatcher believes."""

    is_alive: bool = True
    number: int = 1  # of the next step, or of the one that was not answered
    running: tuple[Claim, ...] = ()
    unanswered: Call | None = None  # the step that it must send again
    late: Call | None = None  # a copy of a step that has not reached Redis yet


class World(NamedTuple):
    """A state, and one way that leads there."""

    keys: bytes  # all that Redis keeps, pickled
    model: Model
    dispatchers: dict[str, Dispatcher]
    sent: tuple[int, ...]  # how often each submission was sent
    deletes: dict[str, int]  # how many DELETEs of a job had names of their own
    faults: int = 0
    path: tuple[str, ...] = ()

    def times(self) -> list[int]:
        """When something is to be done: a job is due, or a lease ends."""
        return sorted(job.until for job in self.model.jobs.values() if job.place in ("delayed", "processing"))


class Search:
    """A Redis in memory whose content can be put back, and the edges from each state."""

    def __init__(self, submissions: list[list[NewJob]]) -> None:
        self.server = fakeredis.FakeServer()
        self.database = self.server.dbs[0]
        model = Model(fakeredis.FakeRedis(server=self.server, decode_responses=True))
        self.submissions = submissions
        self.edges = 0
        ids = [job.id for jobs in submissions for job in jobs]
        both = {"a": Dispatcher(), "b": Dispatcher()}
        self.first = World(self.saved(), model, both, (0,) * len(submissions), dict.fromkeys(ids, 0))

    def saved(self) -> bytes:
        return pickle.dumps(dict(self.database))

    def put_back(self, world: World) -> None:
        with self.server.lock:  # as `clear` wants it
            self.database.clear()
        self.database.update(pickle.loads(world.keys))

    def keys(self) -> dict[str, Any]:
        """What plain commands would show; but they would take longer than the scripts."""
        found: dict[str, Any] = {}
        for key, item in self.database.items():
            name, value = key.decode().removeprefix(PREFIX), item.value
            if name.startswith("job:"):
                found[name] = tuple((value.get(field) or b"").decode() for field in SHOWN)
            elif name == "queue":
                found[name] = [each.decode() for each in value]
            elif name != "wake" and not isinstance(value, bytes):
                found[name] = {each.decode(): value[each] for each in value}
        return found

    def moves(self, world: World) -> Iterator[Move]:
        """All that can happen next."""
        for index, times in enumerate(world.sent):
            if times < 2 and (index == 0 or world.sent[index - 1]):
                yield "submit", index
        for name, each in world.dispatchers.items():
            if name == "b" and world.dispatchers["a"] == Dispatcher():
                continue  # they are alike: a begins
            if each.late:
                yield "late copy", name
            if each.is_alive and each.unanswered:
                yield "step again", name
            elif each.is_alive:
                endings = [None, *itertools.product(each.running, ("well", "badly", "released"))]
                yield from itertools.product(["step"], [name], endings, ["answered", "lost", "late"])
            if each.running:
                yield "renew", name
            if all(other.is_alive for other in world.dispatchers.values()):
                yield "death", name
        due = [time <= world.model.now for time in world.times()]
        if any(due):
            yield from (("sweep", True), ("sweep", False))  # the second ends no lease
        if not all(due):
            yield "time", world.times()[due.index(False)]
        if sum(world.deletes.values()) < 2:
            yield from (("delete", job_id, world.deletes[job_id] + 1) for job_id in world.model.jobs)
        for job_id, count in world.deletes.items():
            yield from (("delete", job_id, number) for number in range(1, count + 1))

    def make(self, world: World, move: Move) -> World:
        """The state that a move leads to, once everything has been checked there."""
        self.edges += 1
        path = (*world.path, " ".join(map(str, move)))
        try:
            made = self.changed(world, move)._replace(path=path, faults=world.faults + is_fault(world, move))
            assert self.keys() == made.model.keys()
            for job_id, job in made.model.jobs.items():
                assert job.attempts <= job.max_retries + 1, f"job {job_id} was run too often"
                assert job.place != "processing" or has_owner(job_id, job.token, made), f"who has {job_id}?"
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), "after", *path])) from None
        return made

    def changed(self, world: World, move: Move) -> World:
        kind, name, *more = move
        model = world.model.copy()
        each = world.dispatchers.get(name, Dispatcher())
        call: Call | None = None
        if kind == "submit":
            model.submit(self.submissions[name], "key" if name else "")
            sent = (*world.sent[:name], world.sent[name] + 1, *world.sent[name + 1 :])
            world = world._replace(sent=sent)
        elif kind == "step":
            each = begin_step(each, more[0])
            call = each.unanswered if more[1] != "late" else None
            each = each._replace(late=each.unanswered if more[1] == "late" else each.late)
        elif kind == "step again":
            call = each.unanswered
        elif kind == "late copy":
            call, each = each.late, each._replace(late=None)
        elif kind == "renew":
            each = each._replace(running=tuple(itertools.compress(each.running, model.renew(each.running))))
        elif kind == "death":
            each = each._replace(is_alive=False, running=(), unanswered=None)
        elif kind == "sweep":
            model.sweep(name)
        elif kind == "time":
            model.move_to(name)
        else:
            model.cancel(name, f"cancel:{more[0]}")
            world = world._replace(deletes=world.deletes | {name: max(world.deletes[name], more[0])})
        claims = model.step(name, *call) if call else []
        if call and (kind == "step again" or more[1:] == ["answered"]):
            running = (*each.running, *claims)
            assert len({(claim.id, claim.token) for claim in running}) == len(running), "claimed twice"
            each = each._replace(number=call[0] + 1, running=running, unanswered=None)
        dispatchers = world.dispatchers | ({name: each} if name in world.dispatchers else {})
        return world._replace(model=model, dispatchers=dispatchers)

    def end_calmly(self, world: World, known: set[str]) -> None:
        """The living report; time passes for the dead; a new dispatcher works. Then every job is finished."""
        both = {name: each._replace(late=None) for name, each in world.dispatchers.items()}
        world = world._replace(dispatchers=both | {"c": Dispatcher()}, deletes={}, sent=())
        while (state := normal(world)) not in known:  # whose end is known
            known.add(state)
            if not (move := next(calm_moves(world), None)):
                waiting = [job for job in world.model.jobs.items() if job[1].place not in FINISHED]
                assert not waiting, "\n".join([f"never finished: {waiting}", *world.path])
                break
            assert len(world.path) < 99, "\n".join(["no end", *world.path])
            world = self.make(world, move)


def calm_moves(world: World) -> Iterator[Move]:
    for name, each in world.dispatchers.items():
        if each.unanswered:
            yield "step again", name
        elif each.running:
            yield "step", name, (each.running[0], "well"), "answered"
    if world.model.queue:
        yield "step", "c", None, "answered"
    for time in world.times()[:1]:
        yield ("sweep", True) if time <= world.model.now else ("time", time)


def is_fault(world: World, move: Move) -> bool:
    """Whether a move is one of those of which a path has few."""
    is_second = move[0] == "submit" and world.sent[move[1]] > 0
    return is_second or move[0] in ("death", "delete") or move[3:] in (("lost",), ("late",))


def has_owner(job_id: str, token: str, world: World) -> bool:
    """Whether a dispatcher knows that it holds a job, or will be told, or is dead: then the lease ends."""
    each = world.dispatchers[token[0]]
    number, reports, _ = each.unanswered or (0, (), 0)
    claims = [*each.running, *(report.claim for report in reports)]
    is_known = (job_id, token) in [(claim.id, claim.token) for claim in claims]
    return is_known or token[2:] == str(number) or not each.is_alive


def begin_step(each: Dispatcher, ending: tuple[Claim, str] | None) -> Dispatcher:
    """A dispatcher that has sent a step, with the report of one attempt or without."""
    reports = list[Report]()
    if ending:
        claim, how = ending
        is_last = claim.attempts > claim.max_retries
        bad = Report(claim, "fail", "E") if is_last else Report(claim, "retry", "E", delay=DELAY)
        good = {"well": Report(claim, "complete", "1"), "released": Report(claim, "release")}
        reports.append(good.get(how, bad))
        each = each._replace(running=tuple(other for other in each.running if other != claim))
    return each._replace(unanswered=(each.number, tuple(reports), WORKERS - len(each.running)))


def normal(world: World) -> str:
    """The state as a text, with the ranks of times and of step numbers in place of themselves."""
    model, believed = world.model, []
    for name, each in world.dispatchers.items():
        calls = [call and (f"{name}:{call[0]}", call[1:]) for call in (each.unanswered, each.late)]
        record = [f"{name}:{number} {ids}" for number, ids in [model.records.get(name, (0, ()))]]
        running = sorted(map(repr, each.running))
        believed.append((f"{name}:{each.number}", each.is_alive, running, calls, record))
    jobs = sorted(
        (job_id, job._replace(until=0) if job.place in (*FINISHED, "pending") else job)
        for job_id, job in model.jobs.items()
    )
    text = repr((jobs, model.now, model.queue, believed, world.sent, world.deletes))
    found: dict[str, set[int]] = {}
    pattern = re.compile(r"\b([abc]:|(?=\d{7}))(\d+)")  # a token, or a time
    for name, number in pattern.findall(text):
        found.setdefault(name, set()).add(int(number))
    ranks = {name: {number: rank for rank, number in enumerate(sorted(found[name]))} for name in found}
    return pattern.sub(lambda match: f"{match[1]}{ranks[match[1]][int(match[2])]}", text)


@pytest.mark.parametrize(("submissions", "most_faults", "depth"), [(TWO, 99, 5), (TWO, 2, 6), (THREE, 2, 6)])
def test_every_order_of_events_keeps_every_job(
    submissions: list[list[NewJob]], most_faults: int, depth: int
) -> None:
    search = Search(submissions)
    level, known, ended = [search.first], dict[str, int](), set[str]()
    for _ in range(depth):
        found = []
        for world in level:
            for move in search.moves(world):
                if world.faults + is_fault(world, move) <= most_faults:
                    search.put_back(world)
                    made = search.make(world, move)
                    state = normal(made)
                    if made.faults < known.get(state, 100):  # it is new, or may have more faults from here
                        known[state] = made.faults
                        found.append(made._replace(keys=search.saved()))
        level = found
    edges = search.edges
    for world in level:
        search.put_back(world)
        search.end_calmly(world, ended)
    print(
        f"{len(known):,} states, {edges:,} edges, {len(level):,} calm ends of {search.edges - edges:,} edges"
    )
