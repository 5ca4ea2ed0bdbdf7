"""E-mail and the connection to Redis, with servers that these tests start."""

from __future__ import annotations

import contextlib
import email.policy
import email.utils
import json
import smtplib
import ssl
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis
import trio
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from trio.testing import MockClock

import jobqueue
from conftest import PREFIX, Bench, RedisServer, eventually, free_port, new_job
from jobqueue import HANDLERS, Claim, RedisConnection

Register = Callable[..., Callable[[Any], Any]]
OwnRedis = Callable[..., RedisServer]
Log = pytest.LogCaptureFixture

# ── E-mail ──────────────────────────────────────────────────────────────────────────────────────


class Mailbox:
    """An SMTP server: what it received, and what it answers to a command, or of a recipient, if not yes."""

    def __init__(self, **options: Any) -> None:
        self.messages, self.answers, port = list[Any](), dict[str, str](), free_port()
        self.server = Controller(self, "127.0.0.1", port, authenticator=self.log_in, **options)
        self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def handle_MAIL(self, _s: Any, _x: Any, envelope: Any, address: str, _o: Any) -> str:  # noqa: N802
        envelope.mail_from = address
        return self.answers.get("MAIL", "250 OK")

    async def handle_RCPT(self, _s: Any, _x: Any, envelope: Any, address: str, _o: Any) -> str:  # noqa: N802
        answer = self.answers.get("RCPT", self.answers.get(address, "250 OK"))
        envelope.rcpt_tos += [address] if answer == "250 OK" else []
        return answer

    async def handle_DATA(self, _s: Any, _x: Any, envelope: Any) -> str:  # noqa: N802
        self.messages += [envelope] if "DATA" not in self.answers else []
        return self.answers.get("DATA", "250 OK")

    def log_in(self, _s: Any, _x: Any, _e: Any, _m: str, sent: Any) -> AuthResult:
        is_right = (sent.login, sent.password) == (b"me@example.com", b"p:ss/word")
        message = self.answers.get("AUTH")
        return AuthResult(success=is_right and not message, handled=False, message=message)

    def use(self, scheme: str = "smtp", password: str = "p%3Ass%2Fword") -> None:
        url = f"{scheme}://me%40example.com:{password}@{self.address}"
        jobqueue.send_email_through(url, "The queue <queue@example.com>")


@pytest.fixture
def mailbox(handler: Register) -> Iterator[Mailbox]:
    box = Mailbox(auth_require_tls=False)
    box.use()
    yield box
    box.server.stop()


async def send_email(number: int = 1, **fields: Any) -> None:
    claim = Claim("i:1", "some-id", "email", "{}", number, 3, 60.0)
    jobqueue._attempt.set(jobqueue.Attempt(claim, trio.CancelScope()))
    payload = {"to": "user@example.com", "subject": "Hellö", "body": "Welcome!\n"} | fields
    await HANDLERS["email"].run(json.dumps(payload))


async def test_each_attempt_sends_the_same_email_with_the_headers_of_rfc_5322(mailbox: Mailbox) -> None:
    begun = datetime.now(UTC).replace(microsecond=0)
    for number in (1, 2):
        await send_email(number)
    for envelope in mailbox.messages:
        assert (envelope.mail_from, envelope.rcpt_tos) == ("queue@example.com", ["user@example.com"])
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert (message["Subject"], message["From"]) == ("Hellö", "The queue <queue@example.com>")
        assert message.get_content() == "Welcome!\r\n"
        assert message["Message-ID"] == "<some-id@example.com>"
        assert begun <= email.utils.parsedate_to_datetime(message["Date"]) <= datetime.now(UTC)
    assert len(mailbox.messages) == 2


@pytest.mark.parametrize("at", ["AUTH", "MAIL", "RCPT", "DATA"])
async def test_a_5xx_is_final_and_a_4xx_is_tried_again_after_1_2_and_4_minutes(
    mailbox: Mailbox, at: str
) -> None:
    mailbox.answers[at] = "550 never"
    with pytest.raises(jobqueue.Unrecoverable, match="never"):
        await send_email()
    mailbox.answers[at] = "451 greylisted"
    waits = []
    for number in (1, 2, 3):
        with pytest.raises(jobqueue.Retry, match="greylisted") as raised:
            await send_email(number)
        waits.append(raised.value.seconds)
    assert (waits, mailbox.messages) == ([60, 120, 240], [])


async def test_who_is_refused_beside_others_is_logged_and_not_tried_again(
    mailbox: Mailbox, caplog: Log
) -> None:
    mailbox.answers["nobody@example.com"] = "451 busy"
    await send_email(to="user@example.com, nobody@example.com")
    assert mailbox.messages[0].rcpt_tos == ["user@example.com"]
    assert "the SMTP server refused: nobody@example.com" in caplog.text
    mailbox.answers["user@example.com"] = "550 no such mailbox"
    with pytest.raises(jobqueue.Retry):  # nobody has it, and one may have it later
        await send_email(to="user@example.com, nobody@example.com")
    jobqueue.send_email_through(f"smtp://127.0.0.1:{free_port()}", "queue@example.com")
    with pytest.raises(ConnectionRefusedError):  # as any other failure
        await send_email()


@pytest.mark.parametrize("field", ["to", "subject"])
async def test_no_header_can_be_smuggled_into_an_email(mailbox: Mailbox, field: str) -> None:
    for word in (
        "=?utf-8?q?x=0D=0ABcc:_nobody=40example.com?=",
        "=?utf-8?b?eA0KQmNjOiBub2JvZHlAZXhhbXBsZS5jb20=?=",
    ):
        with contextlib.suppress(ValueError):
            await send_email(1, **{field: word if field == "subject" else f"{word} <user@example.com>"})
    for envelope in mailbox.messages:  # what arrives, if anything does
        assert b"\nbcc" not in envelope.content.partition(b"\r\n\r\n")[0].lower()
        assert envelope.rcpt_tos == ["user@example.com"]
    mailbox.messages.clear()
    with pytest.raises(ValueError, match="linefeed"):
        await send_email(1, **{field: "a@example.com\nBcc: nobody@example.com"})
    assert mailbox.messages == []


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
async def test_email_and_password_go_over_tls_and_to_nobody_else(
    handler: Register, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, mailbox: Mailbox, scheme: str
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    starttls: dict[str, Any] = {"tls_context": tls, "require_starttls": True, "auth_required": True}
    box = Mailbox(**starttls) if scheme == "smtp" else Mailbox(ssl_context=tls, auth_require_tls=False)
    box.use(scheme)
    await send_email()
    box.use(scheme, "wrong")
    with pytest.raises(jobqueue.Unrecoverable, match="535"):
        await send_email()
    monkeypatch.delenv("SSL_CERT_FILE")
    box.use(scheme)
    with pytest.raises(ssl.SSLCertVerificationError):
        await send_email()
    box.server.stop()
    assert len(box.messages) == 1
    monkeypatch.setattr(jobqueue, "LOOPBACK", ())  # as if it were another machine
    mailbox.use()
    with pytest.raises(smtplib.SMTPNotSupportedError, match="unencrypted"):
        await send_email()
    assert mailbox.messages == []


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


async def fake_redis(nursery: trio.Nursery, record: list[str], **answers: Sequence[str | float]) -> str:
    """Where somebody listens who answers a command with these pieces, a number being a pause, or with OK."""

    async def serve(stream: trio.SocketStream) -> None:
        reader = hiredis.Reader(encoding="utf-8")
        record.append("connected")
        async for data in stream:
            reader.feed(bytes(data))
            for command in iter(reader.gets, False):
                record.append(" ".join(command))
                for piece in answers.get(command[0], ["+OK\r\n"]):
                    if isinstance(piece, str):
                        await stream.send_all(piece.encode())
                    else:
                        await trio.sleep(piece)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    return "127.0.0.1:{}".format(*listener.socket.getsockname()[1:])


async def test_a_reply_may_take_long_while_it_comes(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    autojump_clock.autojump_threshold = 0.02  # in which the kernel delivers a packet
    answers: dict[str, Any] = {"GET": ["$4\r\nab", 2.0, "cd", 2.0, "\r\n"], "ECHO": ["+a", 3.0, "\r\n"]}
    record = list[str]()
    connection = RedisConnection(f"redis://{await fake_redis(nursery, record, **answers)}")
    assert await connection.exchange([("PING",), ("GET", "a")]) == ["OK", "abcd"]
    with pytest.raises(redis.TimeoutError, match=r"no progress for 2.5 s"):
        await connection.exchange([("ECHO",)])
    assert await connection.exchange([("GET", "a")], 2.1) == ["abcd"]  # and not what comes late
    assert record == ["connected", "PING", "GET a", "ECHO", "connected", "GET a"]


@pytest.mark.parametrize("word", ["READONLY", "MASTERDOWN", "CLUSTERDOWN", "LOADING", "NOREPLICAS", "MOVED"])
async def test_a_server_that_cannot_serve_for_now_is_left(nursery: trio.Nursery, word: str) -> None:
    here, there = list[str](), list[str]()
    elsewhere = await fake_redis(nursery, there)
    text = f"-MOVED 7 {elsewhere}\r\n" if word == "MOVED" else f"-{word} not here\r\n"
    address = await fake_redis(nursery, here, GET=["-ERR no\r\n"], SHA=["-NOSCRIPT\r\n"], SET=[text])
    connection = RedisConnection(f"redis://{address}")
    errors = await connection.exchange([("GET", "a"), ("SHA",)])  # these refusals are replies
    assert [type(error) for error in errors] == [redis.ResponseError, redis.exceptions.NoScriptError]
    with pytest.raises(redis.ConnectionError, match=word):
        await connection.exchange([("PING",), ("SET", "a")])
    assert await connection.exchange([("PING",)]) == ["OK"]
    assert here[:5] == ["connected", "GET a", "SHA", "PING", "SET a"]
    assert (here[5:], there) == (
        ([], ["connected", "PING"]) if word == "MOVED" else (["connected", "PING"], [])
    )


async def test_a_sentinel_says_where_the_primary_is_and_one_that_hangs_is_asked_last_the_next_time(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    autojump_clock.autojump_threshold = 0.02
    record, dead = list[str](), f"127.0.0.1:{free_port()}"
    port = (await fake_redis(nursery, record)).rpartition(":")[2]
    reply = f"*2\r\n$9\r\n127.0.0.1\r\n${len(port)}\r\n{port}\r\n"
    hangs, knows = [await fake_redis(nursery, record, SENTINEL=each) for each in ([9.0], [reply])]
    connection = RedisConnection(f"redis+sentinel://:pw@{dead},{knows}/main/2")
    assert await connection.exchange([("PING",)]) == ["OK"]
    assert "SENTINEL GET-MASTER-ADDR-BY-NAME main" in record
    assert record[-4:] == ["connected", "AUTH pw", "SELECT 2", "PING"]
    connection = RedisConnection(f"redis+sentinel://{hangs},{knows}/main")
    with pytest.raises(redis.TimeoutError):
        await connection.exchange([("PING",)])
    assert await connection.exchange([("PING",)]) == ["OK"]
    with pytest.raises(redis.ConnectionError, match="no sentinel knows a primary 'main'"):
        await RedisConnection(f"redis+sentinel://{dead}/main").exchange([("PING",)])


async def test_a_url_says_where_redis_is_and_who_logs_in(own_redis: OwnRedis, tmp_path: Path) -> None:
    server = own_redis("--unixsocket", f"{tmp_path}/r")
    server.client.acl_setuser("ann", enabled=True, nopass=True, categories=["+@all"])
    server.client.acl_setuser("b@b", enabled=True, passwords=["+p:%/ü"], categories=["+@all"])
    server.client.config_set("requirepass", "secret")
    at = f"127.0.0.1:{server.port}"
    for url, user, database in (
        *[(f"redis://:secret@{at}", "default", 0), (f"redis://ann@{at}/3", "ann", 3)],
        (f"redis://b%40b:p%3A%25%2F%C3%BC@{at}", "b@b", 0),
        (f"redis://b%40b@{at}?password=p%3A%25%2F%C3%BC", "b@b", 0),
        (f"unix://:secret@{tmp_path}/r?db=1", "default", 1),
    ):
        [info] = await RedisConnection(url).exchange([("CLIENT", "INFO")])
        assert (f" db={database} " in info, f" user={user} " in info) == (True, True), f"{url}: {info}"
    for url, problem in (
        *[(f"redis://:guess@{at}", "invalid username"), (f"redis://ann@{at}/99", "DB index is out of range")],
        (f"redis://{at}?password=guess", "invalid username"),
        *[(f"unix://{tmp_path}/none", "No such file"), (f"redis://127.0.0.1:{free_port()}", "failed")],
        ("redis://redis..example", "."),
    ):
        connection = RedisConnection(url)
        for _ in range(2):
            with pytest.raises(redis.ConnectionError, match=problem):
                await connection.exchange([("PING",)])


@pytest.mark.parametrize("is_tls", [False, True])
async def test_large_texts_arrive_whole_and_tls_trusts_nobody_else(
    own_redis: OwnRedis, authority: trustme.CA, tmp_path: Path, is_tls: bool
) -> None:
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "r.pem")
    port, files = free_port(), "--tls-cert-file r.pem --tls-key-file r.pem --tls-ca-cert-file ca.pem"
    server = own_redis(*f"--tls-port {port} --tls-auth-clients no {files}".split())
    url = f"rediss://127.0.0.1:{port}" if is_tls else server.url
    connection, text = RedisConnection(url), "ä" * 3_000_000
    count = server.client.info("stats")["total_connections_received"]
    for _ in range(3):
        replies = await connection.exchange([("SET", "a", text), ("GET", "a"), ("PING",)])
        assert (replies[0], replies[1] == text, replies[2]) == ("OK", True, "PONG")
    assert server.client.info("stats")["total_connections_received"] == count + 1
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    for options in (f"{tmp_path}/ca.pem", f"{tmp_path}/other.pem&ssl_cert_reqs=none") if is_tls else ():
        assert await RedisConnection(f"{url}?ssl_ca_certs={options}").exchange([("PING",)]) == ["PONG"]
    if is_tls:
        with pytest.raises(redis.ConnectionError, match="certificate"):
            await RedisConnection(f"{url}?ssl_ca_certs={tmp_path}/other.pem").exchange([("PING",)])


@pytest.mark.parametrize("bench", ["redis"], indirect=True)
async def test_of_those_who_wait_to_be_woken_one_comes(bench: Bench, redis_server: RedisServer) -> None:
    async def listen() -> None:
        woken.append(await bench.store.woken(RedisConnection(redis_server.url), 60))
        nursery.cancel_scope.cancel()

    woken = list[bool]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        nursery.start_soon(listen)
        blocked = lambda: redis_server.client.info("clients")["blocked_clients"] == 2  # noqa: E731
        await trio.to_thread.run_sync(eventually, blocked)
        await bench.store.wake()
    assert (woken, bench.client.llen(PREFIX + "wake")) == ([True], 0)


@pytest.mark.parametrize("bench", ["redis"], indirect=True)
async def test_a_job_whose_key_is_of_another_type_drops_out_alone(bench: Bench) -> None:
    """Fakeredis does not tell the types of keys apart everywhere, so this needs a real one."""
    jobs = [new_job(id=f"{n}", delay=9 if n > 3 else 0) for n in range(6)]  # two each: run, queued, delayed
    await bench.store.submit(jobs)
    _, [_, claim], _ = await bench.store.step("i:a", 1, [], 2, 15)
    for n in (0, 2, 4):
        bench.client.delete(f"{PREFIX}job:{n}")
        bench.client.set(f"{PREFIX}job:{n}", "a string")
    page = await bench.store.page(None, "", 9)
    assert [json.loads(each)["id"] for each in page.jobs] == ["5", "3", "1"]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        await bench.store.get("2")
    assert await bench.store.cancel("2") is None
    bench.move(15)
    assert [job_id for job_id, *_ in (await bench.store.sweep()).ended] == [claim.id]
    _, claims, left = await bench.store.step("i:a", 2, [], 9, 15)
    assert ([each.id for each in claims], left) == (["1", "3", "5"], 0)
    left_over = {name: bench.keys()[name] for name in ("queue", "delayed", "leases")}
    assert left_over == {"queue": [], "delayed": [], "leases": ["1", "3", "5"]}
