"""The connection level, and bad input: what clients, proxies and strangers send to the program.

Most of it goes to one real program, over raw sockets. After each test that program must still answer others,
have as many descriptors as before, and have logged whole lines alone, none of them a traceback.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import hypercorn.trio
import hypothesis
import pytest
import trio
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

import jobqueue
from conftest import MODULE, Program, bench_in_memory, eventually, free_port, missing, new_job

Start = Callable[..., Program]
SOAK = "SOAK_ROUNDS" in os.environ  # look for what is new, too
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
FEW = """
import resource, jobqueue
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
jobqueue.IDLE_CLIENT_SECONDS = 1.0
jobqueue.main()
"""
HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /jobs?limit=1" + HOST
POST = b"POST /job" + HOST + b"Content-Type: application/json\r\n"
MATH = b'{"job_type": "math", "payload": {"a": 1, "b": 2}}'
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
CHUNK = b"\r\n31\r\n" + MATH + b"\r\n0\r\n\r\n"
CLOSED = rb"(202|400) .*\nconnection: close(?!.*HTTP/1.1)"
CLOSE = b"Connection: close\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(MATH)
SUBMIT = POST + LENGTH + b"\r\n" + MATH
UPGRADE = b"Connection: Upgrade\r\nUpgrade: "
SOCKET = (
    UPGRADE + b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: "
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")  # and empty SETTINGS
PRIORITY = bytes.fromhex("0000050200000000030000000010")
DATA = bytes.fromhex("000005000000000001") + b"hello"


# ── Means ───────────────────────────────────────────────────────────────────────────────────────


def descriptors(program: Program) -> int:
    return len(os.listdir(f"/proc/{program.process.pid}/fd"))


def logged_records_alone(program: Program) -> None:
    assert not [line for line in program.lines if not RECORD.match(line)], program.log
    assert not re.search(r"[^\n -~…]", program.log), ascii(program.log)
    assert not re.search("ERROR|CRITICAL|broke", program.log), program.log


@pytest.fixture(scope="module")
def only_program() -> Iterator[Program]:
    program = Program("--workers", "0")
    yield program
    assert program.stop() == 0


@pytest.fixture
def program(only_program: Program) -> Iterator[Program]:
    """The program in memory, with nobody to run the jobs; whatever is done to it, it serves others."""
    assert only_program.call("GET", "/jobs?limit=1")[0] == 200
    before = descriptors(only_program) if sys.platform == "linux" else 0
    yield only_program
    assert only_program.call("GET", "/jobs?limit=1")[0] == 200
    logged_records_alone(only_program)
    if before:
        eventually(partial(descriptors, only_program), f"{before} descriptors", lambda now: now <= before)


@contextlib.contextmanager
def sent(program: Program, data: bytes) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        connection.settimeout(30)
        connection.connect(("127.0.0.1", program.port))
        connection.sendall(data)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """All that comes up to the end of the connection, which must not be a reset."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(
    port: int, method: str, target: str, body: Any = None, host: str = "127.0.0.1", **headers: str
) -> Answer:
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def stored(program: Program) -> int:
    """How many jobs there are."""
    counts = ask(program.port, "GET", "/jobs?limit=1").headers["Job-Counts"]
    return sum(int(count.partition("=")[2]) for count in counts.split(", "))


# ── Packets that end other servers ──────────────────────────────────────────────────────────────

# What is sent, and what must be answered, as a pattern; all of it is followed by the end of the input.
PACKETS: dict[str, tuple[bytes, bytes]] = {
    "a web socket, and data behind it": (GET + SOCKET + b"\r\n\x81\x85aaaa\x09\x04\x0d\x0d\x0e", rb"200"),
    "an odd Sec-WebSocket-Protocol": (GET + SOCKET + b"Sec-WebSocket-Protocol: \xff,,\xe9\r\n\r\n", rb"200"),
    "h2c with bad base64": (GET + H2C + b"!\r\n\r\n", rb"200"),
    "h2c as curl offers it": (GET + H2C + b"AAMAAABkAAQCAAAA\r\n\r\n" + GET + b"\r\n", rb"200.*HTTP/1.1 200"),
    "h2c with a body": (POST + LENGTH + H2C + b"AAMA\r\n\r\n" + MATH, rb"202"),
    "HTTP/2": (PREFACE, rb"505"),
    "HTTP/2, and DATA after the answer": (PREFACE + DATA * 3, rb"505"),
    "1,200 PRIORITY frames": (PREFACE + PRIORITY * 1200, rb"505"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), rb"400"),
    "no HTTP at all": (b"HELLO\r\n\r\n", rb"400"),
    "HTTP/0.9": (b"GET /jobs\r\n\r\n", rb"400"),
    "the PROXY protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + GET + b"\r\n", rb"400"),
    "a Host of odd bytes": (b"GET /jobs HTTP/1.1\r\nHost: \xff\r\n\r\n", rb"400"),
    "two Hosts": (GET + b"Host: localhost\r\n\r\n", rb"400"),
    "no Host": (b"GET /jobs HTTP/1.1\r\n\r\n", rb"400"),
    "a bad chunk": (CHUNKED + b"\r\nzz\r\n", rb"400"),
    "a bad chunk behind a request that has no body": (GET + CHUNKED[len(POST) :] + b"\r\nzz\r\n", rb"[24]00"),
    "a chunk with trailers": (CHUNKED + CHUNK[:-2] + b"X: y\r\nHost: z\r\n\r\n", rb"202"),
    "an unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", rb"501"),
    "an absolute target": (b"GET http://localhost/jobs" + HOST + b"\r\n", rb"200"),
    "an absolute target that is none": (b"GET http://[/" + HOST + b"\r\n", rb"400"),
    "no path": (b"GET ?x" + HOST + b"\r\n", rb"400"),
    "an asterisk": (b"OPTIONS *" + HOST + b"\r\n", rb"404"),
    "CONNECT": (b"CONNECT localhost:80" + HOST + b"\r\nhello", rb"400"),
    "a NUL in the target": (b"GET /jobs\0" + HOST + b"\r\n", rb"400"),
    "a NUL in a header": (GET + b"X: \0\r\n\r\n", rb"400"),
    "a huge head": (GET + b"X: " + b"x" * 100_000, rb"431"),
    "a head that never ends": (GET, rb"400"),
    "a body that is cut off": (POST + b"Content-Length: 99\r\n\r\n" + MATH, rb"400"),
    "a line end behind the last body": (POST + LENGTH + CLOSE + MATH + b"\r\n", rb"202"),
    "a length, and chunks": (POST + LENGTH + CHUNKED[len(POST) :] + CHUNK + GET + b"\r\n", CLOSED),
    "chunks, and a length": (CHUNKED + LENGTH + CHUNK + GET + b"\r\n", CLOSED),
    "a request behind the last one": (GET + CLOSE + GET + b"\r\n", rb"200(?!.*HTTP/1.1)"),
    "HTTP/1.0 that would keep the connection": (
        b"GET /jobs HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n",
        rb"200.*connection: close",
    ),
    "pipelined requests": (GET + b"\r\n" + SUBMIT + GET + b"\r\n", rb"200.*HTTP/1.1 202.*HTTP/1.1 200"),
}


INCOMPLETE = ("a head that never ends", "a body that is cut off")


@pytest.mark.parametrize("end", ["waits", "half-closes", "hangs up", "resets"])
@pytest.mark.parametrize("name", PACKETS)
def test_no_packet_ends_more_than_its_own_connection(program: Program, name: str, end: str) -> None:
    data, wanted = PACKETS[name]
    pattern = re.compile(b"HTTP/1.1 " + wanted, re.I | re.S)
    before, answer = stored(program), b""
    with sent(program, data) as connection:
        if end == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == "half-closes":
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
            assert pattern.match(answer), answer
        elif end == "waits" and name not in INCOMPLETE:
            while not pattern.match(answer):
                part = connection.recv(65_536)
                assert part, answer
                answer += part
    assert stored(program) <= before + wanted.count(b"202")  # no bad request submits a job


async def test_hypercorns_own_server_is_ended_by_one_packet() -> None:
    """The reason for the class `Client`: if this fails, hypercorn has mended it, and the class may go."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (event := (await receive())["type"]).startswith("lifespan."):
            await send({"type": event + ".complete"})

    config = hypercorn.Config()
    config.bind, config.errorlog = [f"127.0.0.1:{(port := free_port())}"], None
    with trio.fail_after(30), pytest.RaisesGroup(UnicodeDecodeError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(hypercorn.trio.serve, app, config))
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(PACKETS["an odd Sec-WebSocket-Protocol"][0])
                await trio.sleep_forever()


# ── Answers that must be seen ───────────────────────────────────────────────────────────────────

LARGE = b" " * 5_000_000
EXPECT = b"Expect: 100-continue\r\n"


FRAMINGS = [b"Content-Length: %d\r\n\r\n" % len(LARGE), b"Transfer-Encoding: chunked\r\n\r\n4c4b40\r\n"]


@pytest.mark.parametrize("status", [401, 413])
def test_a_refusal_is_seen_by_a_client_that_first_sends_all_of_a_large_body(
    start: Start, status: int
) -> None:
    program = start(API_TOKEN="secret" if status == 401 else "")
    for framing, expects in itertools.product(FRAMINGS, [b"", EXPECT]):
        with sent(program, POST + expects + framing) as connection:
            for place in range(0, len(LARGE), 50_000):
                connection.sendall(LARGE[place : place + 50_000])
            answers = read_all(connection)
        assert not expects or answers.startswith(b"HTTP/1.1 100 ")
        assert re.search(rb"HTTP/1.1 %d .*{\"error\": " % status, answers, re.S)
    assert program.stop() == 0
    logged_records_alone(program)


NGINX_STORES = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Callable[[Program], int]]:
    """Starts nginx in front of a program: it keeps connections, and passes bodies on at once; its port."""
    nginx, port = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), free_port()
    if not nginx:
        missing("nginx")
    processes: list[subprocess.Popen[bytes]] = []

    def answers() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return ask(port, "GET", "/").status == 302
        return False

    def serve(program: Program) -> int:
        paths = "".join(
            f"{k}_temp_path {tmp_path}/{k};" for k in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        )
        (tmp_path / "nginx.conf").write_text(
            f"""
            daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr crit; events {{}}
            http {{
                access_log off; {paths} client_max_body_size 0; keepalive_requests 100000;
                upstream queue {{ server 127.0.0.1:{program.port}; keepalive 8; keepalive_requests 100000; }}
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        proxy_pass http://queue; proxy_http_version 1.1; proxy_request_buffering off;
                        proxy_set_header Connection ""; proxy_set_header Host localhost;
                    }}
                }}
            }}"""
        )
        command = [str(nginx), "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"]
        processes.append(subprocess.Popen(command))
        eventually(answers, "nginx answers")
        return port

    yield serve
    for process in processes:
        process.kill()
        process.wait()


def test_behind_a_proxy_that_keeps_connections_no_request_and_no_refusal_is_lost(
    program: Program, proxied: Callable[[Program], int]
) -> None:
    """By POSTs, since nginx may send a GET again; by more than one connection to hypercorn may carry."""
    port, before, seen = proxied(program), stored(program), Counter[int]()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for _ in range(1100):
            connection.request("POST", "/job", MATH, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                response.read()
            seen[response.status] += 1
    assert (seen, stored(program)) == ({202: 1100}, before + 1100)
    for body in (LARGE, iter([LARGE])):  # the second one in chunks
        answer = ask(port, "POST", "/job", body, **{"Content-Type": "application/json"})
        assert (answer.status, b"at most 1,048,576 bytes" in answer.body) == (413, True), answer


# ── Patience, by a clock of our own ─────────────────────────────────────────────────────────────


class Service:
    """`serve_http` in this process, over real sockets: its clock stands still unless the test moves it."""

    def __init__(self, pool: jobqueue.Pool, clock: MockClock) -> None:
        self.pool, self.clock, self.port = pool, clock, 0

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await jobqueue.serve_http(self.pool, [listener])

    async def connect(self, data: bytes) -> trio.SocketStream:
        made = trio.socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        await made.connect(("127.0.0.1", self.port))
        stream = trio.SocketStream(made)
        await stream.send_all(data)
        return stream

    async def pass_by(self, seconds: float) -> None:
        """Let time pass once everybody waits for something."""
        await wait_all_tasks_blocked(0.05)
        self.clock.jump(seconds)
        await wait_all_tasks_blocked(0.05)


@pytest.fixture
async def service(mock_clock: MockClock, nursery: trio.Nursery) -> Service:
    bench = bench_in_memory()
    nursery.start_soon(bench.pipeline.run)
    service = Service(jobqueue.Pool(bench.store, jobqueue.Settings()), mock_clock)
    await nursery.start(service.run)
    return service


async def read_to(stream: trio.SocketStream, end: bytes) -> bytes:
    """What comes, up to something, or to the end of the connection."""
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):  # who takes nothing may see a reset
        while not data.endswith(end) and (part := await stream.receive_some(65_536)):
            data += part
    return data


async def fill(pool: jobqueue.Pool, count: int) -> None:
    text = json.dumps({"to": "a@b.example", "subject": "", "body": "x" * 2000})
    await pool.store.submit([new_job(job_type="email", payload=text, delay=3600.0) for _ in range(count)])


async def test_a_connection_is_kept_for_longer_than_a_proxy_does_and_closed_in_the_end(
    mock_clock: MockClock, service: Service
) -> None:
    silent, slow = await service.connect(b""), await service.connect(GET)
    async with await service.connect(GET + b"\r\n") as stream:
        for _ in range(3):
            assert b"200" in await read_to(stream, b"[]\n")
            await service.pass_by(74)
            await stream.send_all(GET + b"\r\n")
        assert b"200" in await read_to(stream, b"[]\n")
        for closed in (silent, slow):  # long ago: no whole head came
            assert await read_to(closed, b"-") == b""
        await service.pass_by(76)
        assert await read_to(stream, b"-") == b""


async def test_who_takes_nothing_of_an_answer_is_cut_off_and_who_takes_it_slowly_gets_all(
    mock_clock: MockClock, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(service.pool, 500)
    request = b"GET /jobs" + HOST + CLOSE
    silent, slow = await service.connect(request), await service.connect(request)
    heads = await service.connect((b"GET /nothing" + HOST + EXPECT + b"\r\n") * 500)  # cut off in a head
    parts = []
    for _ in range(8):
        await service.pass_by(29)
        taken = b""
        while len(taken) < 60_000:  # more than lies in between, or the program would see no progress
            taken += await slow.receive_some(65_536)
        parts.append(taken)
    parts.append(await read_to(slow, b"-"))
    listed = b"".join(parts)
    assert listed.endswith(b"]\n\r\n0\r\n\r\n")
    assert listed.count(b"email") == 500
    for cut_off in (await read_to(silent, b"-"), await read_to(heads, b"-")):
        assert cut_off.startswith(b"HTTP/1.1 ")
        assert len(cut_off) < 200_000
        assert not cut_off.endswith(b"\r\n0\r\n\r\n")  # the client can tell
    assert not [each for each in caplog.records if each.levelname != "INFO"]


async def test_early_answers_and_100_continue_do_not_meet_on_the_way(
    mock_clock: MockClock, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    chance, streams = random.Random(1), []
    for _ in range(6):
        pieces = [b"GET /job/%b" % (b"x" * chance.randint(1, 79)) + HOST + EXPECT for _ in range(200)]
        body = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        streams.append(await service.connect(b"".join(piece + body for piece in pieces)))
    await service.pass_by(1)
    for stream in streams:
        with contextlib.suppress(trio.BrokenResourceError):  # it was closed after an answer that came early
            await stream.send_all(b"Z" + CLOSE)
        answers = await read_to(stream, b"-")
        assert answers.count(b"HTTP/1.1 100") == answers.count(b"HTTP/1.1 404") > 50
    assert not [each for each in caplog.records if each.levelname != "INFO"]


async def test_a_body_that_does_not_come_is_not_awaited_for_ever(
    mock_clock: MockClock, service: Service
) -> None:
    async with await service.connect(POST + LENGTH + b"\r\n" + MATH[:9]) as stream:
        await service.pass_by(61)
        assert b"HTTP/1.1 408" in await read_to(stream, b"-")


async def test_a_shutdown_closes_what_is_idle_at_once_and_answers_what_is_under_way(
    mock_clock: MockClock, service: Service
) -> None:
    (waiting,) = await service.pool.store.submit([new_job(delay=3600.0)]) or []
    await fill(service.pool, 500)
    takes_nothing = await service.connect(b"GET /jobs" + HOST + b"\r\n")
    idle, begun = await service.connect(GET + b"\r\n"), await service.connect(GET)
    assert b"200" in await read_to(idle, b"]\n")
    waits = await service.connect(b"GET /job/" + waiting.encode() + b"?wait=30" + HOST + b"\r\n")
    posts = await service.connect(POST + LENGTH + b"\r\n")
    stays = await service.connect(POST + LENGTH + b"\r\n")
    await wait_all_tasks_blocked(0.05)
    service.pool.stop(trio.current_time() + 20)
    assert await read_to(idle, b"-") == await read_to(begun, b"-") == b""  # no time has passed
    assert re.match(b'(?s)HTTP/1.1 200 .*"pending"', await read_to(waits, b"-"))
    await posts.send_all(MATH)
    assert re.match(b"HTTP/1.1 202 ", await read_to(posts, b"-"))
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", service.port)
    await service.pass_by(2.9)
    assert service.pool.stopping.is_set()
    await service.pass_by(0.2)
    assert await read_to(stays, b"-") == b""
    assert not (await read_to(takes_nothing, b"-")).endswith(b"\r\n0\r\n\r\n")


# ── Bad input, by the hundred ───────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["math", "email"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
JOB = JSON | st.fixed_dictionaries(
    {
        "job_type": st.sampled_from(["math", "email", "long", "?"]) | JSON,
        "payload": JSON | st.fixed_dictionaries({"a": JSON, "b": JSON}),
    },
    optional={"delay": JSON, "timeout": JSON, "max_retries": JSON, "extra": JSON},
)
BODY = st.binary() | (JOB | st.lists(JOB, max_size=3)).map(json.dumps).map(str.encode)
TEXT = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=40).map(str.strip)
MANY = hypothesis.settings(
    max_examples=50 * ROUNDS,
    deadline=None,
    suppress_health_check=[*hypothesis.HealthCheck],
    derandomize=not SOAK,
)


@MANY
@hypothesis.given(body=BODY, kind=st.just("application/json") | TEXT)
def test_any_body_is_accepted_whole_or_refused_whole(program: Program, body: bytes, kind: str) -> None:
    before = stored(program)
    answer = ask(program.port, "POST", "/job", body, **{"Content-Type": kind})
    said = json.loads(answer.body)
    if answer.status == 202:
        assert stored(program) == before + (len(said) if isinstance(said, list) else 1)
    else:
        assert (answer.status in (400, 413, 415), list(said)) == (True, ["error"])
        assert stored(program) == before


@MANY
@hypothesis.given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]),
    path=st.sampled_from(["/job/", "/jobs?limit=", "/jobs?status=", "/jobs?limit=1&cursor=", "/jobs?", "/"]),
    rest=st.text(max_size=40),
    header=TEXT,
)
def test_any_address_is_answered_without_an_error_of_the_server(
    program: Program, method: str, path: str, rest: str, header: str
) -> None:
    target = path + quote(rest.encode("utf-8", "surrogatepass"), safe="&=/?")
    assert ask(program.port, method, target, b"", Accept=header, **{"X-Anything": header}).status < 500


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What a client may send: packets as above, pieces of them exchanged, a few bytes changed."""
    packets = [packet[:2000] for packet, _ in PACKETS.values()]
    lines = draw(st.lists(st.sampled_from(packets), min_size=1, max_size=4))
    data = b"\r\n".join(line for packet in lines for line in packet.split(b"\r\n")[draw(st.integers(0, 3)) :])
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 3)) :]
    return data


@MANY
@hypothesis.given(data=conversations())
def test_any_bytes_are_answered_without_an_error_of_the_server(program: Program, data: bytes) -> None:
    with sent(program, data) as connection, contextlib.suppress(ConnectionError):  # it may be closed
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
        assert answer[:9] in (b"", b"HTTP/1.1 ")
        assert set(re.findall(rb"(?m)^HTTP/1.1 (5\d\d)", answer)) <= {b"501", b"505"}, answer


NO_NAMES = [b"....", b"a..b", b".a", b"a" * 64, b"a." * 150, b"a b", b"\xff\xe9\x80", "bücher".encode(), b"%"]
NO_NAMES += [b"[::1", b"::1]", b"[]", b"[::1]x", b"a:b:c", b"localhost:99999999", b"a,b"]  # as a Host
NO_NAMES += [b"user@localhost", b"localhost/x"]


def test_a_host_that_is_no_name_or_another_one_is_a_clear_error(program: Program) -> None:
    for host in (*NO_NAMES, b"elsewhere.example:80", b"a.b"):
        for line in (b"GET /jobs?limit=1", b"GET /job/x", b"POST /job", b"OPTIONS /jobs"):
            with sent(program, line + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + CLOSE) as connection:
                head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert int(head[9:12]) == (400 if host in NO_NAMES else 403), (line, host)
            assert re.search("name", json.loads(body)["error"]), body


@pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
def test_more_clients_than_descriptors_wait_and_no_traceback_is_logged(start: Start, tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW)
    program = start(module=tmp_path / "few.py", PYTHONPATH=str(MODULE.parent))
    program.ended(program.submit("math", a=1, b=2))  # the store in memory has opened what it needs
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(sent(program, b"GET"))
        assert program.ended(program.submit("math", a=1, b=2))["result"] == 3
    assert program.stop() == 0  # without a traceback
    assert program.logged("EMFILE"), program.log


@pytest.mark.parametrize("host", ["localhost", "::"])
def test_a_host_that_means_ipv4_and_ipv6_is_answered_on_both_at_one_port(start: Start, host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    program = start(HOST=host, API_TOKEN="x")
    assert not program.logged("WARNING")  # as without a token
    for address in ("127.0.0.1", "::1"):
        assert ask(program.port, "GET", "/jobs", host=address, Authorization="Bearer x").status == 200
