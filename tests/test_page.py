"""The live page as a person has it: served by the program itself, in Chromium, and once in Firefox."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

import jobqueue
from conftest import Program, eventually, free_port, missing

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-dev-shm-usage --hide-scrollbars --window-size=1300,900"
)
PAGE_JOBS = 20  # as in the page
Start = Callable[..., Program]
Visit = Callable[..., "Page"]


class Page:
    """Chromium at the page of a program. Elements are named by CSS selectors, rows by the ids of jobs."""

    def __init__(self, browser: webdriver.Chrome, origin: str) -> None:
        self.browser, self.origin = browser, origin

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        """The element, once it is there and to be seen."""
        found: list[WebElement] = eventually(
            lambda: [e for e in self.browser.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()],
            selector,
        )
        return found[0]

    def text(self, selector: str) -> str:
        """What there is to read in an element; empty if it is not there, or not to be seen."""
        look = "const e = document.querySelector(arguments[0]); return e?.checkVisibility() && e.innerText"
        return str(self.run(look, selector) or "").strip()

    def shows(self, text: str, selector: str = "body") -> None:
        eventually(lambda: text in self.text(selector), f"{selector} shows {text!r}")

    def ids(self) -> list[str]:
        return list(self.run("return [...document.querySelectorAll('#jobs > li')].map(li => li.id)"))

    def lists(self, job_ids: list[str]) -> None:
        eventually(lambda: self.ids() == job_ids, f"the list is {job_ids}")

    def top(self, job_id: str) -> float:
        """Where a row begins, in pixels below the top edge of the screen."""
        look = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
        return float(self.run(look, job_id))

    def point_at(self, selector: str) -> ActionChains:
        ActionChains(self.browser, duration=0).move_to_element(self.one(selector)).perform()
        return ActionChains(self.browser, duration=0)

    def point_away(self) -> None:
        """Move the pointer out of the list, which holds still under it."""
        self.point_at("h1")

    def click(self, selector: str) -> None:
        """Click, once buttons take the next click, half a second after the last one."""
        eventually(lambda: self.run("return performance.now() - clickedAt > 500"), "buttons take clicks")
        self.one(selector).click()

    def open_row(self, job_id: str) -> None:
        self.click(f"{row(job_id)} summary")
        self.point_away()

    def open_form(self, job_type: str) -> str:
        """Open the form of a job type, unless it is the first one; its selector."""
        self.one(f"details:has(> form[data-job-type={job_type}]) > summary").click()
        return f"form[data-job-type={job_type}]"

    def emulate(self, width: int = 0, scheme: str = "") -> None:
        """A screen of another width, 0 for its own; a reader who likes it light or dark."""
        size = {"width": width, "height": 900 if width else 0, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wishes = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wishes)

    def complaints(self) -> list[str]:
        """What the browser found wrong since the last look: failed scripts, what the policy forbids."""
        log: list[dict[str, Any]] = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        messages = [str(entry["message"]) for entry in log]
        return [m for m in messages if "Content Security Policy" in m or "Uncaught" in m]


def row(job_id: str, part: str = "") -> str:
    """The selector of a row, or of what is in it."""
    return f"[id='{job_id}']" + (f" [data-is={part}]" if part else "")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for all: every program has a port of its own, and so an origin with nothing kept."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        missing("chromium, or chromedriver")
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def visit(chromium: webdriver.Chrome) -> Iterator[Visit]:
    """Opens the page of a program. Whatever a test does there, no script fails, and the policy holds."""
    pages: list[Page] = []

    def open_page(program: Program, path: str = "/jobs", port: int = 0) -> Page:
        pages.append(Page(chromium, f"http://127.0.0.1:{port or program.port}"))
        pages[-1].complaints()  # those of before
        chromium.get(pages[-1].origin + path)
        pages[-1].point_away()
        return pages[-1]

    yield open_page
    found = [page.complaints() for page in pages]
    for page in pages:
        page.emulate()
    chromium.get("about:blank")  # before the program ends, which this page would notice
    assert found == [[] for _ in pages]


class Proxy(ThreadingHTTPServer):
    """Serves a program under the path /queue, writes POSTs down, and loses the answers to some of them."""

    daemon_threads = True

    def __init__(self, program: Program) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.target, self.losses = program.port, 0
        self.posts: list[tuple[str, bytes]] = []  # Idempotency-Key and body
        threading.Thread(target=self.serve_forever, daemon=True).start()


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.closing(HTTPConnection("127.0.0.1", self.server.target)) as connection:
            connection.request(self.command, self.path.removeprefix("/queue"), body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
        if self.command == "POST":
            self.server.posts.append((self.headers["Idempotency-Key"], body))
            if len(self.server.posts) <= self.server.losses:
                self.close_connection = True
                return
        self.send_response_only(response.status)
        for name, value in {**dict(response.headers), "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = forward  # noqa: N815

    def log_message(self, *_: Any) -> None: ...


def many(program: Program, job_type: str, count: int, **payload: Any) -> list[str]:
    """Submit equal jobs at once; their ids, newest first, as they are listed."""
    jobs = [{"job_type": job_type, "payload": payload}] * count
    status, answer = program.call("POST", "/job", jobs)
    assert status == 202, answer
    return [job["id"] for job in reversed(answer)]


def listed(program: Program, query: str = "") -> list[dict[str, Any]]:
    return list(program.call("GET", f"/jobs{query}")[1])


def test_a_row_tells_what_became_of_its_job_and_more_when_opened(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0", "--workers", "2")
    attack = '<img src=x onerror="document.title=1"></script><script>document.title=1</script>'
    good, bad = program.submit("math", a=2**64, b=1), program.submit("math", a=attack, b=2)
    program.ended(good), program.ended(bad)
    running = program.submit("long", seconds=1000)
    delayed = {"job_type": "math", "payload": {"a": 1, "b": 2}, "delay": 10_000}
    waiting = program.call("POST", "/job", delayed)[1]["id"]
    page = visit(program, "/")  # which leads to the page
    page.lists([waiting, running, bad, good])
    page.shows("of 1000 s", row(running, "outcome"))
    error = f"ValueError: invalid literal for int() with base 10: '{attack}'"
    for job_id, expected in {
        good: {"job_type": "math", "status": "completed", "outcome": str(2**64 + 1), "tries": "1 of 1"},
        bad: {"job_type": "math", "status": "failed", "outcome": error, "tries": "1 of 1"},
        running: {"job_type": "long", "status": "processing", "tries": "1 of 1"},
        waiting: {"status": "pending", "outcome": '{"a":1,"b":2}', "took": "due in 2 h", "tries": ""},
    }.items():
        assert {part: page.text(row(job_id, part)) for part in expected} == expected
    assert page.one(row(running, "bar")).get_attribute("value") is not None
    assert [page.text(row(job_id, "took"))[-1:] for job_id in (good, bad, running)] == ["s"] * 3

    for job_id in (good, bad, running, waiting):
        page.open_row(job_id)
        page.shows(job_id, row(job_id, "id"))
    job = program.job(bad)
    assert page.text(row(bad, "traceback")) == job["traceback"].strip()
    assert page.text(row(bad, "worker")) == job["worker"]
    assert page.text(row(good, "payload")) == f'{{\n  "a": {2**64},\n  "b": 1\n}}'
    assert page.text(row(good, "error")) == page.text(row(good, "traceback")) == ""
    assert page.text(row(running, "progress")).startswith("0 % ")
    assert page.text(row(running, "timeout")) == "300 s"
    shown = {name for name in job if page.text(row(bad, name))}
    assert shown == {name for name, value in job.items() if value is not None} - {"max_retries"}
    assert page.run("return document.querySelectorAll('script, img').length") == 1
    page.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", attack)
    assert any("inline event handler" in complaint for complaint in eventually(page.complaints))


def test_it_is_alive_counts_and_draws(start: Start, visit: Visit) -> None:
    program = start("--workers", "1")
    page = visit(program)
    page.shows("No jobs.", "#none")
    filters = "nav[aria-label^=Filter]"
    assert page.text(filters).split()[1:10:2] == ["0"] * 5
    running, waiting = program.submit("long", seconds=1000), program.submit("math", a=1, b=2)
    page.lists([waiting, running])
    page.shows("processing", row(running))
    page.shows("The oldest waits", "#oldest")
    eventually(lambda: page.text("figure [data-status=processing] b") == "1", "the chart says that one runs")
    program.call("DELETE", f"/job/{running}")
    page.shows("completed", row(waiting))
    page.shows("cancelled", row(running))
    assert page.text(filters).split()[1:10:2] == ["2", "0", "0", "1", "1"]
    points = "return document.querySelector('polyline[data-status=completed]').getAttribute('points')"
    eventually(lambda: len({xy.split(",")[1] for xy in page.run(points).split()}) > 1, "the line moved")


def test_filters_and_older_pages_are_addresses_under_any_path(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 2 * PAGE_JOBS + 5, a=1, b=2)
    page = visit(program, "/queue/jobs", port=Proxy(program).server_port)
    page.lists(jobs[:PAGE_JOBS])
    page.click(row(jobs[7], "cancel"))
    page.shows("failed", row(jobs[7], "status"))
    page.click("[data-filter=failed]")
    page.lists([jobs[7]])
    assert page.browser.current_url == f"{page.origin}/queue/jobs?status=failed"
    assert page.one("[aria-current=page]").text.startswith("Failed")
    page.click("[data-filter=pending]")
    pending = [job_id for job_id in jobs if job_id != jobs[7]]
    page.lists(pending[:PAGE_JOBS])
    for first in (PAGE_JOBS, 2 * PAGE_JOBS):
        page.click("#older")
        page.lists(pending[first : first + PAGE_JOBS])
    assert page.text("#older") == ""
    page.browser.back()
    page.lists(pending[PAGE_JOBS : 2 * PAGE_JOBS])


def test_a_job_has_an_address_wherever_it_is_listed(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", PAGE_JOBS + 5, a=1, b=2)
    page = visit(program, f"/jobs?status=failed#{jobs[-1]}")
    page.shows(jobs[-1], row(jobs[-1], "id"))
    page.run("location.href = arguments[0]", f"jobs#{jobs[3]}")
    page.shows(jobs[3], row(jobs[3], "id"))
    assert page.ids() == jobs[:PAGE_JOBS]
    new = many(program, "math", PAGE_JOBS + 1, a=3, b=4)
    page.shows("Show 20 or more new", "#news")
    page.click("#news")
    page.lists([*new[:PAGE_JOBS], jobs[3]])  # what is read stays
    page.run("location.hash = 'nobody'")
    page.shows("there is no job 'nobody'", "#said")


def test_large_jobs_are_shown_in_short_and_whole_when_opened(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = [program.submit("math", a="x" * 1_000_000, b=n) for n in range(12)][::-1]
    page = visit(program)
    page.shows("pending", row(jobs[0]))
    assert 0 < len(page.ids()) < 12, "an answer has some 4 MB"
    assert page.run("return document.querySelector('#jobs').textContent.length") < 10_000
    page.open_row(jobs[0])
    length = f'return document.querySelector("{row(jobs[0], "payload")}").textContent.length'
    eventually(lambda: page.run(length) > 1_000_000, "all of it")


# ── That it holds still ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("by", ["pointer", "open row", "keyboard", "selection", "pause"])
def test_the_list_holds_still_while_somebody_is_at_it(start: Start, visit: Visit, by: str) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 12, a=1, b=2)
    page = visit(program, "/jobs?status=pending")
    page.lists(old)
    aimed_at, cancelled, summary = old[5], old[3], f"{row(old[5])} summary"
    select = "getSelection().selectAllChildren(document.querySelector(arguments[0]))"
    unselect, blur = "getSelection().removeAllRanges()", "document.activeElement.blur()"
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "pointer": (lambda: page.point_at(summary), page.point_away),
        "open row": (lambda: page.open_row(aimed_at), lambda: page.open_row(aimed_at)),
        "keyboard": (lambda: page.one(summary).send_keys(Keys.TAB), lambda: page.run(blur)),
        "selection": (lambda: page.run(select, summary), lambda: page.run(unselect)),
        "pause": (lambda: page.click("#pause"), lambda: page.click("#pause")),
    }
    begin, end = ways[by]
    begin()
    top = page.top(aimed_at)
    new = many(program, "math", 3, a=3, b=4)
    program.call("DELETE", f"/job/{cancelled}")
    page.shows("Show 3 new", "#news")
    if by == "pause":
        page.shows("Paused", "#state")
    else:
        page.shows("failed", row(cancelled, "status"))  # though it has left the filter
    assert page.ids() == old
    assert page.top(aimed_at) == pytest.approx(top, abs=1)
    end()
    page.lists([*new, *(job_id for job_id in old if job_id != cancelled)])
    eventually(lambda: not page.text("#news"), "nothing is held back")


def test_what_is_aimed_at_stays_when_an_open_row_above_it_grows(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    below, above = many(program, "long", 1, seconds=1000), many(program, "long", 1, seconds=1001)
    many(program, "math", 15, a=1, b=2)
    page = visit(program)
    page.open_row(above[0])
    page.shows("of 1001 s", row(above[0], "progress"))
    page.point_at(f"{row(below[0])} summary")
    top = page.top(below[0])
    program.call("DELETE", f"/job/{above[0]}")
    page.shows("cancelled", row(above[0], "error"))
    assert page.top(below[0]) == pytest.approx(top, abs=1)


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_a_double_click_on_cancel_cancels_one_job_and_deletes_none(
    start: Start, visit: Visit, status: str
) -> None:
    program = start("--workers", "0" if status == "pending" else "10")
    jobs = many(program, "long", 8, seconds=1000)
    page = visit(program, f"/jobs?status={status}")
    page.lists(jobs)
    page.point_at(row(jobs[3], "cancel")).double_click().perform()
    page.shows("long: cancelled", "#said")
    page.shows("failed", row(jobs[3], "status"))
    page.run("for (const button of document.querySelectorAll('.cancel')) button.click()")  # at once again
    page.point_away()
    page.lists([job_id for job_id in jobs if job_id != jobs[3]])
    assert [job["id"] for job in listed(program, "?status=failed")] == [jobs[3]]
    page.click("#pause")
    page.shows("Paused", "#state")
    program.call("DELETE", f"/job/{jobs[5]}")
    page.click(row(jobs[5], "cancel"))  # which must not delete it
    page.shows("long: it is failed already", "#said")
    assert program.job(jobs[5])["error"] == "cancelled"


# ── What it does ────────────────────────────────────────────────────────────────────────────────


def test_a_finished_job_is_submitted_again_as_it_was_and_deleted(start: Start, visit: Visit) -> None:
    program = start()
    asked = {"job_type": "math", "payload": {"a": 2**64, "b": "3"}, "timeout": 7.5, "max_retries": 1}
    first = program.call("POST", "/job", asked)[1]["id"]
    program.ended(first)
    page = visit(program)
    page.open_row(first)
    page.click(row(first, "again"))
    page.shows("math: submitted again", "#said")
    eventually(lambda: len(listed(program)) == 2)
    second = next(job["id"] for job in listed(program) if job["id"] != first)
    assert {name: program.job(second)[name] for name in asked} == asked
    page.click(row(first, "remove"))
    page.shows("math: deleted", "#said")
    assert page.ids() == [first], "no other row comes under the pointer"
    page.point_away()
    page.lists([second])
    assert program.call("GET", f"/job/{first}")[0] == 404


def test_retry_all_asks_once_doubles_nothing_and_deletes_what_it_retried(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    large, good = "x" * 200_000, many(program, "math", 1, a=1, b=2)
    jobs = [{"job_type": "math", "payload": {"a": large if n % 3 else "1", "b": n}} for n in range(9)]
    old = {job["id"] for job in program.call("POST", "/job", jobs[:4])[1]}
    old |= {job["id"] for job in program.call("POST", "/job", jobs[4:])[1]}
    for job_id in old:
        program.call("DELETE", f"/job/{job_id}")
    proxy = Proxy(program)
    proxy.losses = 4
    page = visit(program, "/queue/jobs", port=proxy.server_port)
    page.click("#retry")
    page.shows("Retry 9 failed jobs?", "#question")
    page.click("#question button:not([value])")
    assert proxy.posts == []
    page.click("#retry")
    page.click("#question [value=yes]")
    page.shows("9 submitted again", "#said")
    pending = listed(program, "?status=pending")
    assert sorted(job["payload"]["b"] for job in pending if job["id"] not in good) == list(range(9))
    assert not old & {job["id"] for job in listed(program)}
    assert max(len(body) for _, body in proxy.posts) < 500_000
    bodies = {body for _, body in proxy.posts}
    assert len(bodies) < 9, "several jobs in an array"
    assert len(proxy.posts) == len(bodies) + proxy.losses, "each was sent once, or again because of a loss"
    assert len({key for key, _ in proxy.posts}) == len(bodies), "each with a key of its own, that is kept"
    eventually(lambda: not page.text("#retry"), "nothing is left to retry")


def test_what_cannot_be_retried_stays_and_the_reason_is_said(start: Start, visit: Visit) -> None:
    program = start("--workers", "0", "--max-body-bytes", "1024")
    text = '{"job_type": "math", "payload": {"a": "LONG", "b": 2}}'
    fits = text.replace("LONG", "x" * (1028 - len(text))).encode()  # but not with its timeout beside it
    stays = program.call("POST", "/job", fits)[1]["id"]
    for job_id in (stays, *many(program, "math", 5, a=1, b=2)):
        program.call("DELETE", f"/job/{job_id}")
    page = visit(program)
    page.click("#retry")
    page.click("#question [value=yes]")
    page.shows("5 submitted again, 1 not: ", "#said")
    assert [job["id"] for job in listed(program, "?status=failed")] == [stays]
    assert len(listed(program, "?status=pending")) == 5


FORK = '''
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal
import jobqueue
from msgspec import Meta
class Color(Enum):
    RED = "red"
    BLUE = "blue"

@jobqueue.handler("every-kind")
def every_kind(
    dataset: str, whole: int, maybe: int | None, nothing: str | None, no: bool, perhaps: bool | None,
    widths: list[int], free, color: Color, size: Literal[1, "any"], few: Annotated[int, Meta(ge=1, le=9)],
    above: Annotated[float, Meta(gt=1)], day: date, level: int = 3, on: bool = True, note: str = "a <b>",
    paint: Color = Color.RED, most: tuple[int, ...] = (1,), left: str | None = None,
) -> Any:
    """Take every kind of parameter."""
    return {name: type(value).__name__ for name, value in locals().items()}
jobqueue.main()
'''


def test_a_handler_has_a_form_from_its_schema(start: Start, visit: Visit, tmp_path: Path) -> None:
    module = tmp_path / "fork.py"
    module.write_text(FORK)
    program = start(module=module, PYTHONPATH=str(Path(jobqueue.__file__).parent))
    page = visit(program)
    form = page.open_form("every-kind")
    page.shows("Take every kind of parameter.", form)

    def field(name: str) -> WebElement:
        return page.one(f"{form} [data-field={name}]")

    def options(name: str) -> tuple[list[str], str]:
        select = Select(field(name))
        return [option.text for option in select.options], select.first_selected_option.text

    kinds = {name: field(name).get_attribute("type") for name in ("dataset", "whole", "no", "widths")}
    assert list(kinds.values()) == ["text", "number", "checkbox", "textarea"]
    assert options("color") == (["blue", "red"], "blue")
    assert options("paint") == (["", "blue", "red"], "red")
    assert options("size") == (["1", "any"], "1")
    assert options("perhaps") == (["", "True", "False"], "")
    limits = {name: [field(name).get_dom_attribute(a) for a in ("min", "max")] for name in ("few", "above")}
    assert limits == {"few": ["1", "9"], "above": ["1", None]}
    defaults = {name: field(name).get_property("value") for name in ("level", "note", "most", "left")}
    assert defaults == {"level": "3", "note": "a <b>", "most": "[1]", "left": ""}
    assert field("on").is_selected()

    typed = {"dataset": "5", "whole": 2**53 + 1, "widths": '["x"]', "free": "[1", "few": "10", "above": "1.5"}
    for name, text in (typed | {"day": "2026-02-30"}).items():
        field(name).send_keys(str(text))
    Select(field("color")).select_by_visible_text("red")
    Select(field("paint")).select_by_visible_text("")
    # In turn what is refused: by the browser, by the page, twice by the service; and why.
    errors = {"few": "", "free": "this is not JSON", "widths": "payload.widths[0]", "day": "payload.day"}
    for name, text in {"few": 9, "free": '{"x": 1.5}', "widths": "[1, 2]", "day": "2026-02-03"}.items():
        page.click(f"{form} button")
        page.shows(errors[name], f"{form} div:has(> label [data-field={name}]) > output")
        assert page.run("return document.activeElement.dataset.field") == name
        field(name).clear()
        field(name).send_keys(str(text))
    assert listed(program) == []
    page.click(f"{form} button")
    page.shows("every-kind: submitted", "#said")
    [job] = listed(program)
    sent = {"dataset": "5", "whole": 2**53 + 1, "maybe": None, "nothing": None, "no": False, "perhaps": None}
    sent |= {"widths": [1, 2], "free": {"x": 1.5}, "color": "red", "size": 1, "few": 9, "above": 1.5}
    sent |= {"day": "2026-02-03", "level": 3, "note": "a <b>", "most": [1], "on": True}
    assert job["payload"] == sent
    assert program.ended(job["id"])["result"]["paint"] == "Color"


def test_the_token_is_asked_for_once(start: Start, visit: Visit) -> None:
    program = start("--workers", "0", API_TOKEN="secret")
    page = visit(program, "/jobs#nobody")
    page.one("#token input").send_keys("wrong", Keys.ENTER)
    page.shows("The last one was refused.", "#token")
    page.one("#token input").send_keys("secret")
    page.click("#token button")
    page.shows("there is no job 'nobody'", "#said")
    page.shows("No jobs.", "#none")
    page.browser.refresh()
    page.shows("No jobs.", "#none")  # without a question
    page.click(f"{page.open_form('long')} button")
    page.shows("long: submitted", "#said")


def test_a_service_that_is_away_is_said_once_and_is_back_by_itself(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    page.lists([job_id])
    watch = "window.heard = []; new MutationObserver(() => heard.push(state.textContent)).observe(state, "
    page.run(watch + "{ childList: true, subtree: true })")
    program.kill()
    page.shows("The service does not answer.", "#state")
    assert page.ids() == [job_id]
    page.run("return refresh().catch(() => refresh()).catch(() => 0)")  # twice more
    start("--workers", "0", "--port", str(program.port))
    page.shows("Live", "#state")
    page.shows("No jobs.", "#none")
    assert page.run("return heard") == ["The service does not answer.", "Live"]


def test_the_page_is_used_with_the_keyboard_alone(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 3, a=1, b=2)
    page = visit(program)
    page.lists(jobs)
    page.run("document.querySelector('#pause').focus()")

    def press(key: str, until: str, seen: str) -> None:
        """Press a key, several times if need be."""
        look = f"return document.activeElement.{until}"
        while page.run(look) != seen:
            ActionChains(page.browser, duration=0).send_keys(key).perform()

    press(Keys.TAB, "closest('li')?.id", jobs[0])
    press(Keys.ENTER, "closest('details').open.toString()", "true")
    page.shows(jobs[0], row(jobs[0], "id"))
    press(Keys.TAB, "dataset.is", "cancel")
    page.one(row(jobs[0], "cancel")).send_keys(Keys.SPACE)
    page.shows("failed", row(jobs[0], "status"))
    has_focus = f'return document.activeElement.matches("{row(jobs[0])} summary")'
    eventually(lambda: page.run(has_focus), "the keyboard keeps its place")


def test_nothing_leaks(start: Start, visit: Visit) -> None:
    program = start("--keep-jobs", "50")
    page = visit(program)
    refresh = "(async () => { for (let n = 0; n < 20; n++) await refresh(); })().then(arguments[0])"

    def live_on() -> tuple[int, int]:
        """The elements and the bytes, after as many refreshes as in minutes, while jobs come and go."""
        for _ in range(5):
            many(program, "math", 30, a="1" * 4000, b=2)
            page.browser.execute_async_script(refresh)
        page.run("samples.length = 1")
        page.browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        heap = page.browser.execute_cdp_cmd("Runtime.getHeapUsage", {})
        return page.run("return rows.size + document.querySelectorAll('*').length"), heap["usedSize"]

    live_on()
    (nodes, used), _, (nodes_later, used_later) = live_on(), live_on(), live_on()
    assert nodes_later == nodes
    assert used_later - used < 300_000


# ── For every reader ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which AXE says where to find."""
    if "AXE" not in os.environ:
        missing("axe-core, whose path is in AXE")
    return Path(os.environ["AXE"]).read_text()


LOOKS = [(400, "light"), (400, "dark"), (1300, "light"), (1300, "dark")]
RUN_AXE = """; axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] })
    .then(({ violations }) => violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html.slice(0, 200))}`))
    .then(arguments[0])"""


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_axe_finds_nothing(start: Start, visit: Visit, axe: str, width: int, scheme: str) -> None:
    """And nothing scrolls sideways."""
    program = start("--workers", "2", "--max-retries", "0", API_TOKEN="secret")
    page = visit(program)
    page.emulate(width, scheme)
    page.browser.refresh()

    def check(what: str) -> None:
        page.point_away()
        assert (what, page.browser.execute_async_script(axe + RUN_AXE)) == (what, [])
        assert (what, page.run("return document.documentElement.scrollWidth")) == (what, width)

    page.one("#token")
    check("the token")
    page.one("#token input").send_keys("secret", Keys.ENTER)
    page.shows("No jobs.", "#none")
    check("idle")
    math, long = {"a": "one " * 3000, "b": 2}, {"job_type": "long", "payload": {"seconds": 1000}}
    jobs = [{"job_type": "math", "payload": payload} for payload in (math, math | {"a": 1})] + [long] * 4
    answer = program.call("POST", "/job", jobs, Authorization="Bearer secret")[1]
    for status in ("pending", "processing", "completed", "failed"):
        page.one(f"#jobs [data-status={status}]")
    check("busy")
    for job_id in (answer[0]["id"], answer[2]["id"]):
        page.open_row(job_id)
        page.shows(job_id, row(job_id, "id"))
    page.click("#pause")
    check("open rows, paused")
    page.click("#retry")
    check("the question")


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Commands Firefox by its own protocol, Marionette: messages of a length, a colon, and JSON."""
    program, port = shutil.which("firefox") or shutil.which("firefox-esr"), free_port()
    if not program:
        missing("firefox")
    (tmp_path / "user.js").write_text(f'user_pref("marionette.port", {port});')
    options = ["--headless", "--no-remote", "--marionette", "--profile", str(tmp_path)]

    def connect() -> Any:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=100).makefile("rwb")
        return None

    def read() -> Any:
        return json.loads(stream.read(int(b"".join(iter(lambda: stream.read(1), b":")))))

    def command(name: str, **parameters: Any) -> Any:
        text = json.dumps([0, 1, f"WebDriver:{name}", parameters])
        stream.write(f"{len(text)}:{text}".encode())
        stream.flush()
        _, _, error, answer = read()
        assert not error, error
        return answer and answer.get("value")

    with subprocess.Popen(
        [str(program), *options], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as process:
        stream = eventually(connect, "Firefox listens")
        read()  # it greets
        command("NewSession", capabilities={})
        yield command
        process.terminate()


def test_in_firefox_too(start: Start, firefox: Callable[..., Any], axe: str) -> None:
    program = start("--max-retries", "0")
    bad = program.submit("math", a="one", b=2**64)
    program.ended(bad)

    def shows(text: str, selector: str) -> None:
        look = "return document.querySelector(arguments[0])?.innerText ?? ''"
        eventually(lambda: text in firefox("ExecuteScript", script=look, args=[selector]), text)

    firefox("Navigate", url=f"http://127.0.0.1:{program.port}/jobs#{bad}")
    shows("Traceback", row(bad, "traceback"))
    shows(str(2**64), row(bad, "payload"))
    assert firefox("ExecuteAsyncScript", script=axe + RUN_AXE, args=[]) == []
    firefox("ExecuteScript", script="document.querySelector('[data-job-type=long] button').click()", args=[])
    shows("long: submitted", "#said")
    shows("long", "#jobs > li")
