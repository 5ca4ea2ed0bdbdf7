"""A primary that moves, behind a proxy, under sentinels, in a cluster."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from conftest import PREFIX, Program, RedisServer, eventually, free_port, missing
from test_faults import Lab, Load, OwnRedis, Proxy, Start, all_completed, stops

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
    before = Load([program])
    before.go_on(100)
    accepted = before.finish()
    primary.client.set("mark", "after what was accepted")
    assert primary.client.wait(1, 30_000) == 1
    across = Load([program])
    across.go_on(1)
    switch()
    after = Load([program])
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


@pytest.mark.parametrize(
    ("how", "password", "data_password"),
    [("killed", "", ""), ("asked, and a sentinel is gone", "", SECRET), ("asked", SECRET, SECRET)],
)
def test_when_sentinels_move_the_primary_the_service_follows(
    lab: Lab, pair: Pair, sentinels: Sentinels, how: str, password: str, data_password: str
) -> None:
    primary, replica = pair
    for server in pair[::-1] if data_password else ():
        server.client.config_set("masterauth", SECRET)
        server.client.config_set("requirepass", SECRET)
        server.client = redis.Redis(port=server.port, password=SECRET, decode_responses=True)
    watching = sentinels(password, data_password)
    if how == "asked, and a sentinel is gone":
        watching[0].kill()
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in watching)
    login = f":{ENCODED}@" if data_password else ""
    program = lab.start(url=f"redis+sentinel://{login}{hosts}/mymaster/0")

    def switch() -> None:
        """The two change places; unless it is killed, the old primary accepts writes until it is told."""
        primary.kill() if how == "killed" else tell(watching[-1], "SENTINEL FAILOVER", "mymaster")
        eventually(lambda: is_primary(replica), "the replica is promoted")
        eventually(lambda: how == "killed" or not is_primary(primary), "the old primary follows it")

    goes_on_after(switch, program, pair)
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


def test_each_node_leads_to_the_slot_and_its_move_under_load_takes_every_accepted_job_along(
    lab: Lab, cluster: list[RedisServer]
) -> None:
    slot: int = tell(cluster[0], "CLUSTER KEYSLOT", PREFIX)
    owner = slot * 3 // SLOTS
    source, target = cluster[owner], cluster[owner - 1]
    programs = [lab.start(url=node.url) for node in (*cluster[:owner], *cluster[owner + 1 :], source)]
    for each in programs:
        load = Load([each])
        load.go_on(20)
        all_completed(source.client, load.finish())
    load = Load(programs)
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
    for program in programs:
        look = partial(program.call, "GET", "/jobs?limit=1")
        eventually(look, "it lists", lambda answer: answer[0] == 200)
    stops(*programs)
