"""A primary that moves, behind a proxy, under sentinels, in a cluster; one that will not; and addresses."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from conftest import MODULE, PREFIX, Program, RedisServer, eventually, free_port, missing
from test_faults import (
    APPEND,
    Lab,
    Load,
    OwnRedis,
    Proxy,
    Start,
    all_completed,
    outcome,
    post,
    stops,
    submit_all,
)

SECRET = "s3cr:t/@%"  # as it stands in a URL, which has it percent-encoded:
ENCODED = "s3cr%3At%2F%40%25"
Pair = tuple[RedisServer, RedisServer]  # a primary and its replica


@pytest.fixture
def lab(start: Start, redis_server: RedisServer) -> Lab:
    """With a Redis for what the handlers write; each test brings another one for the queue."""
    return Lab(start, redis_server)


def tell(server: RedisServer, *command: str | int) -> Any:
    """For the commands that redis-py has no typed method for."""
    client: Any = server.client
    return client.execute_command(*command)


# ── Failover ────────────────────────────────────────────────────────────────────────────────────
#
# What a primary accepts after its replica was cut off, Redis itself loses. So a test knows three loads:
# `before`, which the replica has; `across`, which may be lost but must get clean answers; and `after`.


@pytest.fixture
def pair(own_redis: OwnRedis) -> Pair:
    quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
    primary, replica = (own_redis(*quick, "--dbfilename", f"{name}.rdb") for name in ("primary", "replica"))
    replica.client.replicaof("127.0.0.1", str(primary.port))
    eventually(lambda: replica.client.info("replication")["master_link_status"] == "up", "it is in sync")
    return primary, replica


def is_primary(server: RedisServer) -> bool:
    return bool(server.client.info("replication")["role"] == "master")


def is_left(server: RedisServer) -> bool:
    """Nobody talks to this server any more, except other servers and this test."""
    if not server.answers():
        return True
    me = str(server.client.client_id())
    others = [peer for peer in server.client.client_list(_type="normal") if peer["id"] != me]
    return all(peer["name"].startswith("sentinel-") for peer in others)


def goes_on_after(switch: Callable[[], None], program: Program, pair: Pair) -> None:
    """By itself, and with every job that the replica had or the new primary accepted."""
    primary, replica = pair
    before = Load(lambda: program.port)
    before.go_on(100)
    accepted = before.finish()
    primary.client.set("mark", "after what was accepted")
    assert primary.client.wait(1, 30_000) == 1
    across = Load(lambda: program.port)
    across.go_on(1)
    switch()
    after = Load(lambda: program.port)
    after.go_on(100)
    eventually(lambda: is_left(primary), "the service has left the old primary")
    across.finish()
    accepted |= after.finish()
    assert {*across.refused, *after.refused} <= {503}
    all_completed(replica.client, accepted)
    last = program.submit("append", value=-1)
    status, jobs = program.call("GET", "/jobs?limit=1")
    assert (status, [job["id"] for job in jobs]) == (200, [last])
    program.ended(last)
    assert replica.client.hget(f"{PREFIX}job:{last}", "status") == "completed"
    stops(program)


def test_when_the_address_moves_to_a_promoted_replica_the_service_follows(lab: Lab, pair: Pair) -> None:
    primary, replica = pair
    address = Proxy(primary.port)
    program = lab.start(url=address.url)

    def switch() -> None:
        address.target = replica.port  # for who connects anew: the old primary lives, and its connections
        replica.client.replicaof("NO", "ONE")
        primary.client.replicaof("127.0.0.1", str(replica.port))

    with address.listener:
        goes_on_after(switch, program, pair)


class Sentinel(RedisServer):
    """A redis-sentinel of our own."""

    def __init__(self, folder: Path, password: str, *settings: str) -> None:
        self.password = password
        super().__init__(folder, *settings, *([f"requirepass {password}"] if password else []))

    def start(self) -> None:
        settings = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", *self.options]
        file = self.folder / f"sentinel-{self.port}.conf"
        file.write_text("\n".join(settings))
        self.client = redis.Redis(port=self.port, password=self.password or None, decode_responses=True)
        self.process = subprocess.Popen(["redis-sentinel", str(file)], stdout=subprocess.DEVNULL)
        eventually(self.answers, "redis-sentinel answers")
        with contextlib.suppress(redis.ResponseError):  # Redis 7 lets them hurry; else it takes 10 s more
            tell(self, "SENTINEL DEBUG", "INFO-PERIOD", 500, "PUBLISH-PERIOD", 500)

    def knows_all(self) -> bool:
        """It has met the other two, and the replica of the primary."""
        primary: Any = self.client.sentinel_master("mymaster")
        replicas: Any = self.client.sentinel_slaves("mymaster")
        links = [replica["master-link-status"] for replica in replicas]
        return bool(primary["num-other-sentinels"] == 2 and links == ["ok"])


Sentinels = Callable[..., list[Sentinel]]


@pytest.fixture
def sentinels(tmp_path: Path, pair: Pair) -> Iterator[Sentinels]:
    """Starts three that watch the pair: two of them decide, a second after the primary fell silent."""
    if not shutil.which("redis-sentinel"):
        missing("redis-sentinel")
    started: list[Sentinel] = []

    def start(password: str = "", data_password: str = "") -> list[Sentinel]:
        settings = [
            f"sentinel monitor mymaster 127.0.0.1 {pair[0].port} 2",
            "sentinel down-after-milliseconds mymaster 1000",
            "sentinel failover-timeout mymaster 3000",
            *([f"sentinel auth-pass mymaster {data_password}"] if data_password else []),
        ]
        for _ in range(3):
            started.append(Sentinel(tmp_path, password, *settings))
        eventually(lambda: all(sentinel.knows_all() for sentinel in started), "the sentinels know each other")
        return started

    yield start
    for sentinel in started:
        sentinel.kill()


def sentinel_url(sentinels: list[Sentinel], login: str = "") -> str:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return f"redis+sentinel://{login}{hosts}/mymaster/0"


def fail_over(sentinel: Sentinel, pair: Pair) -> None:
    """Have the two change places; the old primary lives, and accepts writes until it is told."""
    primary, replica = pair
    tell(sentinel, "SENTINEL FAILOVER", "mymaster")
    eventually(lambda: is_primary(replica), "the replica is promoted")
    eventually(lambda: not is_primary(primary), "the old primary follows it")


@pytest.mark.parametrize("how", ["asked to", "killed", "one sentinel is gone"])
def test_when_sentinels_move_the_primary_the_service_follows(
    lab: Lab, pair: Pair, sentinels: Sentinels, how: str
) -> None:
    primary, replica = pair
    watching = sentinels()
    if how == "one sentinel is gone":
        watching[0].kill()
    program = lab.start(url=sentinel_url(watching))

    def switch() -> None:
        if how == "killed":
            primary.kill()
            eventually(lambda: is_primary(replica), "the replica is promoted")
        else:
            fail_over(watching[-1], pair)

    goes_on_after(switch, program, pair)


@pytest.mark.parametrize("password", [SECRET, ""], ids=["of all", "of the data servers alone"])
def test_the_password_of_a_sentinel_address_opens_the_primary(
    lab: Lab, pair: Pair, sentinels: Sentinels, password: str
) -> None:
    for server in pair:
        server.client.config_set("masterauth", SECRET)
    for server in pair:
        server.client.config_set("requirepass", SECRET)
        server.client = redis.Redis(port=server.port, password=SECRET, decode_responses=True)
    watching = sentinels(password, SECRET)
    program = lab.start(url=sentinel_url(watching, f":{ENCODED}@"))
    goes_on_after(lambda: fail_over(watching[0], pair), program, pair)
    assert SECRET not in program.log
    assert ENCODED not in program.log


# ── Redis Cluster: the one slot of the queue, and its move ──────────────────────────────────────

SLOTS = 16_384


@pytest.fixture
def cluster(own_redis: OwnRedis) -> list[RedisServer]:
    """Three nodes that share the slots, without replicas."""
    nodes, buses = [], [free_port() for _ in range(3)]
    for n, bus in enumerate(buses):
        files = ("--cluster-config-file", f"node{n}.conf", "--dbfilename", f"node{n}.rdb")
        nodes.append(own_redis("--cluster-enabled", "yes", "--cluster-port", str(bus), *files))
        tell(nodes[n], "CLUSTER SET-CONFIG-EPOCH", n + 1)
        tell(nodes[n], "CLUSTER ADDSLOTS", *[slot for slot in range(SLOTS) if slot * 3 // SLOTS == n])
        tell(nodes[0], "CLUSTER MEET", "127.0.0.1", nodes[n].port, bus)
    for node in nodes:
        eventually(partial(has_joined, node), "the cluster has formed")
    return nodes


def has_joined(node: RedisServer) -> bool:
    about: Any = tell(node, "CLUSTER INFO")
    return (about["cluster_state"], about["cluster_known_nodes"]) == ("ok", "3")


def move_slot(
    slot: int, source: RedisServer, target: RedisServer, nodes: list[RedisServer], halfway: Callable[[], None]
) -> None:
    """Move one key after the other, as `redis-cli --cluster reshard` does, with a stop halfway."""
    source_id, target_id = (tell(node, "CLUSTER MYID") for node in (source, target))
    tell(target, "CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    tell(source, "CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    half = keys_in(source, slot) // 2
    while keys := tell(source, "CLUSTER GETKEYSINSLOT", slot, 1):
        tell(source, "MIGRATE", "127.0.0.1", target.port, keys[0], 0, 5000)
        if keys_in(target, slot) == half:
            halfway()
            assert keys_in(target, slot) == half, "a script ran where half of the keys are"
    for node in [target, source, *nodes]:
        tell(node, "CLUSTER SETSLOT", slot, "NODE", target_id)


def keys_in(node: RedisServer, slot: int) -> int:
    return int(tell(node, "CLUSTER COUNTKEYSINSLOT", slot))


def lists_its_jobs(program: Program) -> None:
    eventually(lambda: program.call("GET", "/jobs?limit=1"), "it lists", lambda answer: answer[0] == 200)


def test_any_node_of_a_cluster_leads_to_the_one_that_has_the_slot(
    lab: Lab, cluster: list[RedisServer]
) -> None:
    slot: int = tell(cluster[0], "CLUSTER KEYSLOT", PREFIX)
    for node in cluster:
        program = lab.start(url=node.url)
        load = Load(partial(int, program.port))
        load.go_on(20)
        all_completed(cluster[slot * 3 // SLOTS].client, load.finish())
        lists_its_jobs(program)
        stops(program)


def test_a_slot_that_moves_under_load_takes_every_accepted_job_along(
    lab: Lab, cluster: list[RedisServer]
) -> None:
    slot: int = tell(cluster[0], "CLUSTER KEYSLOT", PREFIX)
    owner = slot * 3 // SLOTS
    source, target = cluster[owner], cluster[owner - 1]
    program = lab.start(url=source.url)
    load = Load(lambda: program.port)
    load.go_on(100)

    def tried() -> int:
        return len(load.accepted) + load.refused.total()

    def halfway() -> None:
        enough = tried() + 3
        eventually(tried, "some requests met the slot on its way", lambda count: count >= enough)

    move_slot(slot, source, target, cluster, halfway)
    load.go_on(100)
    accepted = load.finish()
    assert load.refused.keys() <= {503}
    all_completed(target.client, accepted)
    assert keys_in(source, slot) == 0
    lists_its_jobs(program)
    stops(program)


# ── A Redis that is there, and will not ─────────────────────────────────────────────────────────


def test_a_redis_that_is_loading_is_away_until_it_has_loaded(start: Start, own_redis: OwnRedis) -> None:
    server = own_redis()
    program = Lab(start, server).start()
    accepted = {*submit_all(program, [APPEND] * 150)}
    all_completed(server.client, accepted)
    server.client.save()
    server.kill()
    eventually(lambda: program.logged("Redis is away"))
    server.options = ("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    starting = threading.Thread(target=server.start, daemon=True)  # loads 150 keys, 10 ms each
    starting.start()
    eventually(
        lambda: str(post(program.port, APPEND)), "503, and why", lambda text: "loading" in text.lower()
    )
    assert not program.logged("Redis is back")
    starting.join()
    eventually(lambda: program.logged("Redis is back"))
    assert outcome(program, program.submit("append", value=1)) == ("completed", 1)
    all_completed(server.client, accepted)
    stops(program)
    assert [line.split()[5] for line in program.lines if " Redis is " in line] == ["away:", "back"], (
        program.log
    )


def test_a_primary_that_lacks_replicas_is_503_with_the_reason_until_it_has_them(
    lab: Lab, own_redis: OwnRedis
) -> None:
    server = own_redis()
    program = lab.start(url=server.url)
    running = program.submit("gate", name="a")
    lab.names("arrived", 1)
    server.client.config_set("min-replicas-to-write", "1")
    status, answer = post(program.port, APPEND)
    assert (status, "Not enough good replicas" in answer["error"]) == (503, True)
    lab.client.set("open:a", 1)
    lab.names("left", 1)  # its report must wait
    server.client.config_set("min-replicas-to-write", "0")
    eventually(lambda: post(program.port, APPEND), "jobs are accepted", lambda found: found[0] == 202)
    assert outcome(program, running) == ("completed", 1)
    all_completed(server.client, {running})
    stops(program)


# ── Addresses ───────────────────────────────────────────────────────────────────────────────────


def test_who_logs_in_and_where_stands_in_the_address(
    start: Start, own_redis: OwnRedis, tmp_path: Path
) -> None:
    server = own_redis("--unixsocket", str(tmp_path / "socket"))
    tell(server, "ACL", "SETUSER", "app", "on", f">{SECRET}", "~{jobqueue:3}:*", "+@all")
    tell(server, "ACL", "SETUSER", "free", "on", "nopass", "~*", "+@all")
    tell(server, "CONFIG", "SET", "requirepass", SECRET)
    server.client = redis.Redis(port=server.port, username="app", password=SECRET, decode_responses=True)
    for url in (
        f"redis://:{ENCODED}@127.0.0.1:{server.port}/1",
        f"redis://app:{ENCODED}@127.0.0.1:{server.port}",
        f"redis://app@127.0.0.1:{server.port}?password={ENCODED}",
        f"redis://free@127.0.0.1:{server.port}/2",
        f"unix://:{ENCODED}@{tmp_path}/socket?db=3",
    ):
        program = start(REDIS_URL=url)
        assert program.ended(program.submit("math", a=1, b=2))["result"] == 3, url
        stops(program)
        assert SECRET not in program.log
        assert ENCODED not in program.log


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (":{0}@127.0.0.1:{1}", "AUTH"),
        ("127.0.0.1:{1}?password={0}", "AUTH"),
        ("127.0.0.1:{1}/99", "DB index"),
    ],
)
def test_why_an_address_leads_nowhere_is_logged_and_answered_without_the_password(
    start: Start, redis_server: RedisServer, where: str, said: str
) -> None:
    program = start(REDIS_URL="redis://" + where.format(ENCODED, redis_server.port))
    eventually(lambda: program.logged(f"Redis is away: .*{said}"), f"{said} is said")
    status, answer = program.call("GET", "/jobs")
    assert (status, bool(re.search(said, answer["error"]))) == (503, True), answer
    stops(program)
    assert SECRET not in program.log
    assert ENCODED not in program.log


@pytest.mark.parametrize(
    "url",
    ["redis://:{}/x@host", "redis://:{}@host:port", "redis+sentinel://:{}@", "http://:{}@host", ":{}@host"],
)
def test_an_address_that_cannot_be_read_is_an_error_in_one_line_without_the_password(url: str) -> None:
    command = [sys.executable, str(MODULE), "--port", "0", "--redis-url", url.format("geheim")]
    ended = subprocess.run(
        command, cwd=MODULE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "REDIS_URL" in ended.stderr
    assert "geheim" not in ended.stderr
