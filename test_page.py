"""The live page as a person has it: served by the program itself, in Chromium, and at the end in Firefox."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from conftest import MODULE, PATIENCE_SECONDS, Program, RedisServer, eventually, free_port, missing

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)


YES = "#question [type=submit]"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for all: every program has a port of its own, and so an origin with nothing kept."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            missing(program)
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield browser
    browser.quit()


def read_log(browser: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    """What the browser wrote into a log since it was last read."""
    entries: list[dict[str, Any]] = browser.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


class Reader:
    """What a test reads of a page, in whatever browser it is."""

    def run(self, script: str, *arguments: Any) -> Any:
        raise NotImplementedError

    def text(self, selector: str) -> str:
        raise NotImplementedError

    def shows(self, text: str, selector: str = "body") -> None:
        """Wait for a text."""
        eventually(lambda: text in self.text(selector), f"{selector} shows {text!r}")

    def top(self, job_id: str) -> float:
        """Where a row begins, in pixels below the top edge of the screen."""
        top: float = self.run(
            "return document.getElementById(arguments[0]).getBoundingClientRect().top", job_id
        )
        return top

    def ids(self) -> list[str]:
        """The ids of the jobs listed, from the top."""
        listed: list[str] = self.run("return [...document.querySelectorAll('tbody')].map(body => body.id)")
        return listed


class Page(Reader):
    """A browser at the page of a program. Elements are named by CSS selectors."""

    def __init__(
        self, browser: webdriver.Chrome, program: Program, path: str = "/jobs", port: int = 0
    ) -> None:
        self.browser, self.program = browser, program
        self.host = f"127.0.0.1:{port or program.port}"  # another port is a proxy's
        self.origin = f"http://{self.host}"
        self.open(path)

    def open(self, path: str) -> None:
        self.browser.get(self.origin + path)
        self.point_away()

    def point_away(self) -> None:
        """Move the pointer out of the list, which would hold still under it."""
        actions = ActionBuilder(self.browser, duration=0)
        actions.pointer_action.move_to_location(1, 1)  # type: ignore[no-untyped-call]
        actions.perform()

    def point_at(self, selector: str) -> webdriver.ActionChains:
        """Move the pointer to an element; what it does there is up to the caller."""
        chain = webdriver.ActionChains(self.browser, duration=0)
        chain.move_to_element(self.one(selector)).perform()
        return webdriver.ActionChains(self.browser, duration=0)

    def rests(self, selector: str) -> None:
        """Wait until a button takes the next click, half a second after the last one."""
        eventually(lambda: not self.one(selector).get_attribute("aria-busy"), f"{selector} rests")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The element, once it is there and to be seen."""
        found: WebElement = eventually(
            lambda: next((e for e in self.all(selector) if e.is_displayed()), None), selector
        )
        return found

    def text(self, selector: str) -> str:
        """What there is to read in an element; empty if it is not there."""
        look = "const e = document.querySelector(arguments[0]); return e?.checkVisibility() && e.innerText"
        return str(self.run(look, selector) or "")

    def has_at_the_top(self, job_id: str) -> bool:
        """Whether the list begins with this job, and that is to be seen."""
        return self.ids()[:1] == [job_id] and 0 <= self.top(job_id) < 300

    def row(self, job_id: str) -> str:
        return f"[id='{job_id}']"

    def open_details(self, job_id: str) -> None:
        self.one(f"{self.row(job_id)} .toggle").click()
        self.point_away()

    def detail(self, job_id: str, name: str) -> str:
        return self.text(f"{self.row(job_id)} .detail [data-is={name}]")

    def say_yes(self) -> None:
        """Answer the question before many calls; it takes no answer within half a second."""
        script = (
            "document.querySelector(arguments[0]).click();"
            "return document.querySelector('#no').textContent !== 'No'"
        )
        eventually(lambda: self.run(script, YES), "the question is answered")

    def counts(self) -> dict[str, int]:
        """The number in each filter."""
        texts = {e.get_attribute("data-filter") or "all": e.text for e in self.all("[data-filter]")}
        return {status: int(text.split()[-1]) for status, text in texts.items()}

    def fill_and_submit(self, job_type: str, **fields: str) -> str:
        """Send the form of a job type; the id of the job, once it stands at the top."""
        before = self.ids()[:1]
        form = f"form[data-job-type={job_type}]"
        if not self.one(f"details:has(> {form})").get_attribute("open"):
            self.one(f"details:has(> {form}) > summary").click()
        for name, text in fields.items():
            field = self.one(f"{form} [data-field={name}]")
            field.clear()
            field.send_keys(text)
        self.rests(f"{form} [type=submit]")
        self.one(f"{form} [type=submit]").click()
        return str(
            eventually(lambda: self.ids()[:1] != before and self.ids()[0], "the new job is at the top")
        )

    def accessibility(self) -> list[tuple[str, str]]:
        """The role and the name of everything that a screen reader is told of."""
        nodes = self.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]

    def emulate(self, width: int = 0, height: int = 0, timezone: str = "", **features: str) -> None:
        """A screen of another size, 0 for its own; a reader elsewhere, with other wishes."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": bool(width)}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": timezone})
        wishes = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wishes})

    def complaints(self) -> list[str]:
        """What the browser found wrong since the last look: failed scripts, what the policy forbids."""
        messages = [entry["message"] for entry in read_log(self.browser, "browser")]
        return [m for m in messages if "Content Security Policy" in m or "Uncaught" in m]

    def hosts(self) -> set[str]:
        """Whom the page sent requests since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in read_log(self.browser, "performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        own = ("data:", "chrome:", "chrome-untrusted:")  # also of its first, empty tab
        return {urlsplit(url).netloc for url in urls if not url.startswith(own)}


Visit = Callable[..., Page]


@pytest.fixture
def visit(chromium: webdriver.Chrome) -> Iterator[Visit]:
    """Opens the page of a program. Whatever a test does there, no script fails and no other host is asked."""
    pages: list[Page] = []

    def open_page(program: Program, path: str = "/jobs", port: int = 0) -> Page:
        for log in ("browser", "performance"):
            read_log(chromium, log)
        pages.append(Page(chromium, program, path, port))
        return pages[-1]

    yield open_page
    found = [(page.complaints(), page.hosts()) for page in pages]
    for page in pages:
        page.emulate()
    chromium.get("about:blank")  # before the program ends, which this page would complain about
    assert found == [([], {page.host}) for page in pages]


Start = Callable[..., Program]


def many(program: Program, job_type: str, count: int, **payload: Any) -> list[str]:
    """Submit equal jobs at once; their ids, newest first, as they are listed."""
    jobs = [{"job_type": job_type, "payload": payload}] * count
    status, answer = program.call("POST", "/job", jobs)
    assert status == 202, answer
    return [job["id"] for job in reversed(answer)]


# ── What it shows ───────────────────────────────────────────────────────────────────────────────


def test_slash_leads_to_the_page_and_clients_still_get_json(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program, "/")
    assert page.browser.current_url == f"{page.origin}/jobs"
    assert page.browser.title == "Job queue"
    assert program.call("GET", "/jobs", Accept="*/*") == (200, [])


def test_the_document_is_named_and_every_control_has_a_name(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    job_id = program.submit("math", a=1, b=2)
    page = visit(program)
    page.shows("pending", page.row(job_id))
    assert page.run("return document.documentElement.lang") == "en"
    assert [heading.text for heading in page.all("h1")] == ["Job queue"]
    page.run("for (const kind of document.querySelectorAll('.kind')) { kind.name = ''; kind.open = true; }")
    page.run("for (const more of document.querySelectorAll('.more')) more.open = true;")
    inputs = page.all("main input")
    labels = [page.run("return arguments[0].labels[0].innerText", field).split()[0] for field in inputs]
    options = ["delay", "timeout", "max_retries"]
    assert labels == [
        "to",
        "subject",
        "body",
        *options,
        "a",
        "b",
        *options,
        "seconds",
        *options,
        "Show",
        "Open",
    ]
    told = page.accessibility()
    controls = {"button", "link", "textbox", "spinbutton", "DisclosureTriangle", "form", "navigation"}
    assert controls <= {role for role, _ in told}
    assert [role for role, name in told if role in controls and not name] == []
    assert ("table", "Jobs, newest first") in told
    assert ("button", f"Cancel math {job_id}") in told
    assert ("status", "") in told  # where it will say what happened


def test_an_empty_queue_says_so(start: Start, visit: Visit) -> None:
    page = visit(start())
    page.shows("No jobs yet", "#none")
    page.shows("Live", "#live")
    assert page.counts() == {"all": 0, "pending": 0, "processing": 0, "completed": 0, "failed": 0}


def test_the_page_shows_a_job_after_it_ran(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    good, bad = program.submit("math", a=1, b=2), program.submit("math", a="one", b=2)
    program.ended(good)
    program.ended(bad)
    page = visit(program)
    page.shows("3", f"{page.row(good)} .outcome")
    assert page.ids() == [bad, good]
    cells = [cell.text for cell in page.all(f"{page.row(good)} .line > *")]
    assert cells[:4] == ["math", "completed", "3", "1 of 1"]
    assert cells[4].endswith(" s")
    assert cells[5].endswith("s")  # ms, or s on a machine that pauses
    assert page.text(f"{page.row(bad)} .status") == "failed"
    assert page.text(f"{page.row(bad)} .outcome").startswith("ValueError: invalid literal for int()")
    assert page.one(f"{page.row(good)} time").get_attribute("title") == program.job(good)["created_at"]


def test_a_job_that_waits_says_until_when_and_why(start: Start, visit: Visit) -> None:
    program = start("--retry-delay-seconds", "1000")
    job_id = program.submit("math", a="one", b=2)
    page = visit(program)
    page.shows("runs in", f"{page.row(job_id)} .outcome")
    page.shows("ValueError", f"{page.row(job_id)} .outcome")
    assert page.text(f"{page.row(job_id)} .status") == "pending"
    page.open_details(job_id)
    assert page.detail(job_id, "due_at")


def test_details_show_payload_result_and_times(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("math", a=2**64, b="3")
    job = program.ended(job_id)
    page = visit(program)
    page.open_details(job_id)
    assert page.detail(job_id, "payload") == '{\n  "a": 18446744073709551616,\n  "b": "3"\n}'
    assert page.detail(job_id, "result") == "18446744073709551619"
    assert page.detail(job_id, "id") == job_id
    assert page.detail(job_id, "timeout") == "300 s"
    for name in ("created_at", "started_at", "finished_at"):
        assert page.one(f"{page.row(job_id)} .detail [data-is={name}]").get_attribute("title") == job[name]
    assert page.detail(job_id, "error") == page.detail(job_id, "due_at") == ""
    page.open_details(job_id)
    assert page.detail(job_id, "payload") == ""


def test_details_show_the_progress_the_worker_and_the_traceback(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    bad, long = program.submit("math", a="one", b=2), program.submit("long", seconds=1000)
    program.ended(bad)
    page = visit(program)
    page.open_details(bad)
    page.open_details(long)
    page.shows("of 1000 s", f"{page.row(long)} [data-is=progress]")
    assert page.detail(long, "progress").startswith("0 %, ")
    assert page.detail(long, "worker") == program.job(long)["worker"]
    assert page.detail(bad, "traceback") == program.job(bad)["traceback"]
    assert page.detail(bad, "progress") == page.detail(long, "traceback") == ""


# ── That it is alive ────────────────────────────────────────────────────────────────────────────


def test_the_page_updates_by_itself(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program)
    page.shows("No jobs yet", "#none")
    job_id = program.submit("long", seconds=1000)
    page.shows("processing", page.row(job_id))
    program.call("DELETE", f"/job/{job_id}")
    page.shows("failed", page.row(job_id))
    assert page.counts() == {"all": 1, "pending": 0, "processing": 0, "completed": 0, "failed": 1}


def test_an_update_leaves_the_readers_place_alone(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 30, a=1, b=2)
    read = old[20]
    page = visit(program)
    page.open_details(read)
    page.run("document.getElementById(arguments[0]).scrollIntoView({ block: 'center' })", read)
    page.run("getSelection().selectAllChildren(arguments[0])", page.one(f"{page.row(read)} pre"))

    def place() -> tuple[float, bool, str]:
        row = "const row = document.getElementById(arguments[0]); return"
        top: float = page.run(f"{row} row.getBoundingClientRect().top", read)
        has_focus = bool(page.run(f"{row} row.contains(document.activeElement)", read))
        return top, has_focus, str(page.run("return getSelection().toString()"))

    top, *rest = place()
    assert rest == [True, '{\n  "a": 1,\n  "b": 2\n}']
    new = many(program, "math", 5, a=3, b=4)
    eventually(lambda: page.ids() == new + old, "the new jobs are at the top")
    assert place() == (pytest.approx(top, abs=1), *rest)
    assert page.detail(read, "payload")


def test_what_is_being_read_stays_though_it_left_the_page_or_the_filter(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program, "/jobs?status=pending")
    page.open_details(job_id)
    new = many(program, "math", 50, a=3, b=4)
    eventually(lambda: page.ids() == [*new, job_id], "the new page, and the job that is read")
    program.call("DELETE", f"/job/{job_id}")
    page.shows("failed", page.row(job_id))
    assert page.detail(job_id, "error") == "cancelled"
    page.one("[data-filter=completed]").click()
    page.shows("No completed jobs.", "#none")
    assert page.ids() == []


def test_the_page_says_that_redis_is_away_and_goes_on_when_it_is_back(
    start: Start, visit: Visit, own_redis: Callable[..., RedisServer]
) -> None:
    server = own_redis("--appendonly", "yes")
    program = start(REDIS_URL=server.url)
    job_id = program.submit("math", a=1, b=2)
    page = visit(program)
    page.shows("completed", page.row(job_id))
    server.kill()
    page.shows("Redis cannot serve this now", "#live")
    page.shows("Redis cannot serve this now", "#said")
    assert page.ids() == [job_id]
    server.start()
    page.shows("Live", "#live")
    job_id = program.submit("math", a=3, b=4)
    page.shows("7", f"{page.row(job_id)} .outcome")


# ── That it holds still ─────────────────────────────────────────────────────────────────────────


def test_no_row_moves_under_the_pointer_and_the_page_says_what_it_holds_back(
    start: Start, visit: Visit
) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 5, a=1, b=2)
    page = visit(program)
    page.shows("pending", page.row(old[2]))
    page.point_at(page.row(old[2]))
    new = many(program, "math", 3, a=3, b=4)
    program.call("DELETE", f"/job/{old[2]}")
    page.shows("failed", page.row(old[2]))
    assert page.ids() == old
    page.shows("3 new", "#live")
    page.point_away()
    eventually(lambda: page.ids() == new + old, "the new jobs are at the top")
    page.shows("Live", "#live")
    assert "new" not in page.text("#live")


def test_under_the_pointer_a_job_that_left_the_filter_stays_and_is_shown_as_it_is(
    start: Start, visit: Visit
) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 5, a=1, b=2)
    page = visit(program, "/jobs?status=pending")
    page.shows("pending", page.row(jobs[0]))
    page.point_at(page.row(jobs[3]))
    for job_id in jobs[:3]:
        program.call("DELETE", f"/job/{job_id}")
        page.shows("failed", page.row(job_id))
    assert page.ids() == jobs
    page.point_away()
    eventually(lambda: page.ids() == jobs[3:], "they are gone")


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_two_clicks_on_cancel_at_one_place_cancel_one_job(start: Start, visit: Visit, status: str) -> None:
    program = start("--workers", "0" if status == "pending" else "10")
    jobs = many(program, "long", 8, seconds=1000)
    page = visit(program, f"/jobs?status={status}")
    eventually(lambda: set(page.ids()) == set(jobs))
    aimed_at = page.ids()[3]
    here = page.point_at(f"{page.row(aimed_at)} [data-is=cancel]")
    here.click().perform()
    page.shows("cancelled", "#said")
    eventually(lambda: page.text(f"{page.row(aimed_at)} .status") in ("failed", ""), "it is shown")
    here.click().perform()
    page.run("return new Promise(requestAnimationFrame)")
    page.point_away()
    eventually(lambda: not page.all("[aria-busy=true]"), "what was clicked is done")
    others = {program.job(job_id)["status"] for job_id in jobs if job_id != aimed_at}
    assert others == {status}
    assert program.job(aimed_at)["error"] == "cancelled"


def test_a_second_click_within_half_a_second_does_nothing(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    first, second = many(program, "math", 2, a=1, b=2)
    page = visit(program)
    buttons = [page.one(f"{page.row(job_id)} [data-is=cancel]") for job_id in (first, second)]
    page.run("for (const button of arguments[0]) button.click()", buttons)
    page.shows("failed", page.row(first))
    eventually(lambda: not page.all("[aria-busy=true]"), "what was clicked is done")
    assert program.job(second)["status"] == "pending"
    assert page.text(f"{page.row(first)} [data-is=said]") == "cancelled"
    page.one(f"{page.row(second)} [data-is=cancel]").click()
    page.shows("failed", page.row(second))


def test_a_row_says_why_a_click_did_nothing(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    button = page.one(f"{page.row(job_id)} [data-is=cancel]")
    page.one("#pause").click()
    page.shows("Paused", "#live")
    program.call("DELETE", f"/job/{job_id}")
    button.click()
    page.shows("the job is failed already", page.row(job_id))


def test_the_row_that_is_read_keeps_its_index_when_it_leaves_the_filter(start: Start, visit: Visit) -> None:
    program = start("--workers", "10")
    many(program, "long", 10, seconds=1000)
    page = visit(program, "/jobs?status=processing")
    eventually(lambda: len(page.ids()) == 10)
    before = page.ids()
    page.open_details(before[5])
    top = page.top(before[5])
    program.call("DELETE", f"/job/{before[5]}")
    page.shows("failed", page.row(before[5]))
    program.call("DELETE", f"/job/{before[8]}")
    eventually(lambda: before[8] not in page.ids(), "the list moves on")
    assert page.ids() == [job_id for job_id in before if job_id != before[8]]
    assert page.top(before[5]) == pytest.approx(top, abs=1)


@pytest.mark.parametrize("new_jobs", [3, 60])
def test_the_row_that_is_read_keeps_its_place_on_the_screen_at_the_very_top(
    start: Start, visit: Visit, new_jobs: int
) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 20, a=1, b=2)
    page = visit(program)
    page.open_details(old[2])
    top = page.top(old[2])
    assert page.run("return scrollY") == 0
    new = many(program, "math", new_jobs, a=3, b=4)
    eventually(lambda: page.ids()[0] == new[0], "the new jobs are at the top")
    assert page.top(old[2]) == pytest.approx(top, abs=1)


def test_the_row_that_is_read_keeps_its_place_when_those_above_it_leave(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 20, a=1, b=2)
    page = visit(program, "/jobs?status=pending")
    page.open_details(jobs[4])
    top = page.top(jobs[4])
    for job_id in (*jobs[:4], *jobs[5:]):
        program.call("DELETE", f"/job/{job_id}")
    eventually(lambda: page.ids() == [jobs[4]], "it is alone")
    assert page.top(jobs[4]) == pytest.approx(top, abs=1)
    page.open_details(jobs[4])
    eventually(lambda: page.top(jobs[4]) < top, "once it is closed, the gap closes too")


def test_a_pause_stops_the_list_and_counts_what_is_new(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 3, a=1, b=2)
    page = visit(program)
    eventually(lambda: page.ids() == old)
    page.one("#pause").click()
    page.shows("Paused", "#live")
    new = many(program, "math", 12, a=3, b=4)
    page.shows("Paused, 12 new", "#live")
    new = many(program, "math", 100, a=3, b=4) + new
    page.shows("Paused, 112 new", "#live")
    assert page.ids() == old
    assert page.counts()["all"] == 3
    assert page.text("#pause") == "Continue"
    page.one("#pause").click()
    eventually(lambda: page.ids() == new[:50], "it goes on")
    assert page.text("#pause") == "Pause"


def test_older_shows_the_top_of_the_next_page(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 120, a=1, b=2)
    page = visit(program)
    for first in (jobs[50], jobs[100]):
        eventually(lambda: page.text("#older"), "there is a next page")
        page.one("#older").click()
        eventually(partial(page.has_at_the_top, first), "the next page begins at its top")


# ── Filter, pages ───────────────────────────────────────────────────────────────────────────────


def test_a_filter_shows_one_status_and_the_counts_of_all(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    good, bad = program.submit("math", a=1, b=2), program.submit("math", a="one", b=2)
    program.ended(good)
    program.ended(bad)
    page = visit(program)
    eventually(lambda: page.ids() == [bad, good])
    page.one("[data-filter=failed]").click()
    eventually(lambda: page.ids() == [bad])
    assert page.counts() == {"all": 2, "pending": 0, "processing": 0, "completed": 1, "failed": 1}
    assert [e.text for e in page.all("[aria-current=page]")] == ["Failed 1"]
    assert page.browser.current_url == f"{page.origin}/jobs?status=failed"
    page.browser.refresh()
    eventually(lambda: page.ids() == [bad])
    page.browser.back()
    eventually(lambda: page.ids() == [bad, good])


def test_older_pages_are_reached_keep_the_filter_and_do_not_jump(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 120, a=1, b=2)
    page = visit(program, "/jobs?status=pending")
    eventually(lambda: page.ids() == jobs[:50])
    page.one("#older").click()
    eventually(lambda: page.ids() == jobs[50:100])
    many(program, "math", 5, a=3, b=4)
    eventually(lambda: page.counts()["all"] == 125)
    assert page.ids() == jobs[50:100]
    page.one("#older").click()
    eventually(lambda: page.ids() == jobs[100:])
    assert page.text("#older") == ""
    page.one("#newest").click()
    eventually(lambda: page.ids()[5:] == jobs[:45])
    assert page.browser.current_url == f"{page.origin}/jobs?status=pending"
    assert page.text("#newest") == ""


# ── What a person can do ────────────────────────────────────────────────────────────────────────


def test_a_running_job_is_cancelled_by_its_button(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("long", seconds=1000)
    page = visit(program)
    page.shows("processing", page.row(job_id))
    page.one(f"{page.row(job_id)} [data-is=cancel]").click()
    page.shows("long: cancelled", "#said")
    page.shows("failed", page.row(job_id))
    assert program.job(job_id)["error"] == "cancelled"
    assert page.text(f"{page.row(job_id)} [data-is=cancel]") == ""


def test_a_job_is_submitted_again_with_the_same_payload(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("math", a=2**64, b=1)
    program.ended(job_id)
    page = visit(program)
    page.open_details(job_id)
    page.one(f"{page.row(job_id)} [data-is=again]").click()
    page.shows("submitted again as", f"{page.row(job_id)} [data-is=said]")
    page.point_away()
    new, old = eventually(lambda: len(page.ids()) == 2 and page.ids())
    assert old == job_id
    assert program.ended(new)["payload"] == {"a": 2**64, "b": 1}
    page.shows("math: completed. 18446744073709551617", "#said")


def test_the_form_of_each_handler_submits(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program, "/jobs?status=failed")
    page.shows("No failed jobs", "#none")
    email = page.fill_and_submit("email", to="ada@example.org", subject="Hello", body="Hi")
    math = page.fill_and_submit("math", a="40", b="2")
    long = page.fill_and_submit("long", seconds=".25")
    usual = page.fill_and_submit("long", seconds="")
    assert program.job(email)["payload"] == {"to": "ada@example.org", "subject": "Hello", "body": "Hi"}
    assert program.job(math)["payload"] == {"a": "40", "b": "2"}
    assert program.job(long)["payload"] == {"seconds": 0.25}
    assert program.job(usual)["payload"] == {}
    assert page.one("[data-field=seconds]").get_attribute("placeholder") == "2"
    page.shows("42", f"{page.row(math)} .outcome")
    assert page.browser.current_url == f"{page.origin}/jobs"


FORK = '''
from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import jobqueue
from msgspec import Meta

class Color(Enum):
    RED = "red"
    BLUE = "blue"

@dataclass
class Size:
    width: int
    height: int = 3

@jobqueue.handler("every-kind")
def every_kind(
    dataset: str, whole: int, real: float, either: int | str, maybe: int | None, nothing: str | None,
    no: bool, yes: bool, perhaps: bool | None, items: list[int | str], table: dict[str, int], free,
    color: Color, shade: Color | None, size: Literal[1, 2**60 + 1, "any"],
    few: Annotated[int, Meta(ge=1, le=9)], above: Annotated[int, Meta(gt=1)],
    code: Annotated[str, Meta(min_length=2, max_length=4, pattern="b")],
    day: date, moment: Annotated[datetime, Meta(tz=True)], clock: Annotated[time, Meta(tz=False)],
    local: Annotated[time, Meta(tz=True)], key: UUID, ns: list[int], box: Size, when: date | int,
    level: int = 3, on: bool = True, note: str = "none", paint: Color = Color.RED,
    tint: Color | None = Color.RED, hue: Color | None = None, until: date = date(2030, 1, 2),
    most: Size = Size(1),
) -> Any:
    """Take every kind of parameter."""
    return {name: type(value).__name__ for name, value in locals().items()}

jobqueue.main()
'''


def test_a_handler_of_a_fork_has_a_form_for_every_kind_of_parameter(
    start: Start, visit: Visit, tmp_path: Path
) -> None:
    module = tmp_path / "fork.py"
    module.write_text(FORK)
    program = start(module=module, PYTHONPATH=str(MODULE.parent))
    page = visit(program)
    page.emulate(timezone="Asia/Kolkata")
    page.one("details:has(> form[data-job-type=every-kind]) > summary").click()
    assert page.text("form[data-job-type=every-kind] p") == "Take every kind of parameter."

    def field(name: str) -> WebElement:
        return page.one(f"form[data-job-type=every-kind] [data-field={name}]")

    def attributes(name: str, *wanted: str) -> list[str | None]:
        return [field(name).get_dom_attribute(each) for each in wanted]

    def choices(name: str) -> tuple[list[str], str]:
        """What there is to choose, and what is chosen."""
        select = Select(field(name))
        return [option.text for option in select.options], select.first_selected_option.text

    def hint(name: str) -> str:
        return page.text(f"label:has(> [data-field={name}]) small")

    assert choices("color") == (["blue", "red"], "blue")
    assert choices("size") == (["1", str(2**60 + 1), "any"], "1")
    assert choices("perhaps") == (["", "true", "false"], "")
    assert choices("shade") == choices("hue") == (["", "blue", "red"], "")
    assert choices("paint") == choices("tint") == (["", "blue", "red"], "red")
    assert attributes("few", "type", "min", "max", "step") == ["number", "1", "9", "1"]
    assert attributes("above", "min", "max") == ["2", None]
    assert attributes("real", "type", "step") == ["number", "any"]
    assert attributes("code", "minlength", "maxlength", "pattern") == ["2", "4", ".*(?:b).*"]
    assert field("items").tag_name == field("free").tag_name == field("box").tag_name == "textarea"
    inputs = {"day": "date", "moment": "datetime-local", "clock": "time", "key": "text"}
    assert {name: attributes(name, "type")[0] for name in inputs} == inputs
    usual = {"level": "3", "note": "none", "most": '{"height": 3, "width": 1}'}
    assert {name: attributes(name, "placeholder")[0] for name in usual} == usual
    hints = {
        "dataset": "",
        "either": "int | str",
        "maybe": "int | None",
        "table": "dict[str, int]",
        "clock": "time",
        "free": "anything",
        "box": "{width, height}",
        "level": "int, optional",
        "until": "date, optional, by default 2030-01-02",
    }
    assert {name: hint(name) for name in hints} == hints

    texts = {"dataset": "5", "either": "6", "code": "abc", "key": "12345678-1234-5678-1234-567812345678"}
    numbers = {"whole": 2**53 + 1, "real": "1.50", "maybe": 7, "few": 9, "above": 2}
    jsons = {"table": {"a": 1}, "free": "x", "ns": [1, 2], "box": {"width": 5}, "when": "2026-02-03"}
    typed = texts | numbers | {name: json.dumps(value) for name, value in jsons.items()}
    for name, text in {**typed, "items": "[1,"}.items():
        field(name).send_keys(str(text))
    # How a date is typed depends on the country.
    times = {"day": "2026-02-03", "moment": "2026-02-03T04:05", "clock": "04:05", "local": "04:05:06"}
    for name, text in times.items():
        page.run("arguments[0].value = arguments[1]", field(name), text)
    field("yes").click()
    Select(field("color")).select_by_visible_text("red")
    Select(field("size")).select_by_visible_text(str(2**60 + 1))
    Select(field("tint")).select_by_visible_text("")
    page.one("form[data-job-type=every-kind] [type=submit]").click()
    page.shows("payload.items must be JSON: list[int | str]", "form[data-job-type=every-kind] output")

    job = program.ended(page.fill_and_submit("every-kind", items='[1, "2"]'))
    sent = {"items": [1, "2"], "no": False, "yes": True, "on": True, "real": 1.5}
    sent |= {"nothing": None, "perhaps": None, "shade": None, "tint": None}
    sent |= {"color": "red", "size": 2**60 + 1, "paint": "red", "day": "2026-02-03", "clock": "04:05:00"}
    sent |= {"moment": "2026-02-02T22:35:00.000Z", "local": "22:35:06.000Z"}
    assert job["payload"] == texts | numbers | jsons | sent
    kinds = {"color": "Color", "moment": "datetime", "key": "UUID", "box": "Size", "hue": "NoneType"}
    assert {name: job["result"][name] for name in kinds} == kinds


def test_what_is_refused_is_said_beside_the_form(start: Start, visit: Visit) -> None:
    page = visit(start("--max-body-bytes", "1024"))
    page.shows("Live", "#live")
    for name, text in {"to": "ada@example.org", "subject": "long", "body": "x" * 1000}.items():
        page.one(f"[data-field={name}]").send_keys(text)
    page.one("form[data-job-type=email] [type=submit]").click()
    page.shows("the body must be at most 1,024 bytes", "form[data-job-type=email] output")
    assert page.ids() == []
    page.one("[data-field=body]").clear()
    page.fill_and_submit("email", body="short")
    assert page.text("form[data-job-type=email] output") == ""


def test_the_page_is_used_with_the_keyboard_alone(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("long", seconds=1000)
    page = visit(program)
    page.shows("processing", page.row(job_id))
    page.one("#cancel-all").send_keys(Keys.TAB)
    press = webdriver.ActionChains(page.browser)
    press.send_keys(Keys.ENTER).perform()
    eventually(lambda: page.detail(job_id, "payload"), "Enter opens the details")
    press.send_keys(Keys.TAB).send_keys(Keys.SPACE).perform()
    page.shows("failed", page.row(job_id))
    eventually(
        lambda: page.run("return document.activeElement.className") == "toggle", "the focus stays in the row"
    )


# ── That it sends what is meant, once ───────────────────────────────────────────────────────────


def test_a_job_is_submitted_again_with_its_timeout_and_retries(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    job = {"job_type": "math", "payload": {"a": 1, "b": 2}, "timeout": 7.5, "max_retries": 42}
    _, answer = program.call("POST", "/job", job)
    page = visit(program)
    page.open_details(answer["id"])
    page.one(f"{page.row(answer['id'])} [data-is=again]").click()
    page.shows("submitted again", "#said")
    page.point_away()
    new = eventually(lambda: len(page.ids()) == 2 and page.ids())[0]
    assert {name: program.job(new)[name] for name in job} == job


class LosingProxy:
    """Passes requests on, and loses the reply to the first POST that comes on a connection in use."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            for n in itertools.count():
                ready, _, _ = select.select([client, server], [], [])
                data = ready[0].recv(1 << 20)
                if not data:
                    return
                if ready[0] is server:
                    client.sendall(data)
                    continue
                server.sendall(data)
                if n and not self.lost and data.startswith(b"POST"):
                    while b"202" not in server.recv(1 << 20):  # not merely "100 Continue"
                        pass
                    self.lost += 1
                    return

    def close(self) -> None:
        self._listener.close()


def test_a_submission_whose_reply_was_lost_and_which_the_browser_repeats_is_one_job(
    start: Start, visit: Visit
) -> None:
    program = start("--workers", "0")
    proxy = LosingProxy(program.port)
    page = visit(program, port=proxy.port)
    page.shows("No jobs yet", "#none")
    page.fill_and_submit("math", a="1", b="2")
    eventually(lambda: proxy.lost, "a reply was lost")
    eventually(lambda: page.counts()["all"] == 1)
    assert len(program.call("GET", "/jobs")[1]) == 1
    proxy.close()


def test_a_double_click_on_submit_makes_one_job(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    page = visit(program)
    page.one("details:has(> form[data-job-type=long]) > summary").click()
    button = "form[data-job-type=long] [type=submit]"
    page.point_at(button).click().perform()
    page.shows("long: submitted", "#said")
    page.run("arguments[0].click()", page.one(button))
    page.rests(button)
    assert len(program.call("GET", "/jobs")[1]) == 1


def test_delay_timeout_and_retries_can_be_submitted_too(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program)
    page.one("details:has(> form[data-job-type=long]) > summary").click()
    assert page.text("form[data-job-type=long] [data-option=delay]") == ""
    page.one("form[data-job-type=long] .more > summary").click()
    for name, text in {"delay": "500", "timeout": ".5", "max_retries": "7"}.items():
        page.one(f"form[data-job-type=long] [data-option={name}]").send_keys(text)
    job = program.job(page.fill_and_submit("long"))
    assert (job["timeout"], job["max_retries"], job["status"]) == (0.5, 7, "pending")
    assert job["due_at"]


# ── Addresses, troubles ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def serve_under_path(tmp_path: Path) -> Iterator[Callable[[Program], int]]:
    """Starts nginx in front of a program, as the README has it; its port."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not nginx:
        missing("nginx")
    processes: list[subprocess.Popen[bytes]] = []

    def serve(program: Program) -> int:
        port = free_port()
        (tmp_path / "nginx.conf").write_text(
            f"""
            daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr;
            events {{}}
            http {{
                access_log off;
                client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;
                fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;
                server {{
                    listen 127.0.0.1:{port};
                    location /queue/ {{ proxy_pass http://127.0.0.1:{program.port}/; }}
                }}
            }}"""
        )
        command = [str(nginx), "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"]
        processes.append(subprocess.Popen(command))

        def answers() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                return bool(fetch(port, "GET", "/queue/")[0])
            return False

        eventually(answers, "nginx answers")
        return port

    yield serve
    for process in processes:
        process.kill()
        process.wait()


def test_behind_a_proxy_that_strips_a_path_every_address_keeps_it(
    start: Start, visit: Visit, serve_under_path: Callable[[Program], int]
) -> None:
    program = start()
    port = serve_under_path(program)
    for path, leads_to in {"/queue/": "/queue/jobs", "/queue": "/queue/"}.items():
        status, headers, _ = fetch(port, "GET", path)
        assert (status // 100, urlsplit(urljoin(path, headers["Location"])).path) == (3, leads_to)
    body = json.dumps([{"job_type": "math", "payload": {"a": 1, "b": 2}}] * 60).encode()
    assert fetch(port, "POST", "/queue/job", body)[0] == 202
    _, headers, text = fetch(port, "POST", "/queue/job", b'{"job_type": "math", "payload": {"a": 3, "b": 4}}')
    address = urljoin("/queue/job", headers["Location"])
    assert fetch(port, "GET", address)[0] == 200
    job_id = json.loads(text)["id"]
    _, headers, _ = fetch(port, "GET", "/queue/jobs?limit=50")
    following = urljoin("/queue/jobs", headers["Link"][1:].partition(">")[0])
    assert len(json.loads(fetch(port, "GET", following)[2])) == 11
    page = visit(program, "/queue/", port=port)
    page.shows("7", f"{page.row(job_id)} .outcome")
    assert page.browser.current_url == f"{page.origin}/queue/jobs"
    page.one("#older").click()
    eventually(lambda: len(page.ids()) == 11, "the second page")
    page.one("[data-filter=completed]").click()
    assert page.browser.current_url == f"{page.origin}/queue/jobs?status=completed"
    eventually(lambda: len(page.ids()) == 50, "the completed ones")
    page.fill_and_submit("math", a="40", b="2")
    assert page.browser.current_url == f"{page.origin}/queue/jobs"


def fetch(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Message, str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def test_a_job_has_an_address_that_opens_it_wherever_it_is_listed(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = many(program, "math", 60, a=1, b=2)
    page = visit(program, f"/jobs?status=failed#{jobs[-1]}")
    eventually(lambda: page.detail(jobs[-1], "payload"), "it is open, though it is not listed")
    assert page.detail(jobs[-1], "id") == jobs[-1]
    page.one("[data-filter='']").click()
    eventually(lambda: page.ids() == jobs[:50], "the address without it")
    page.one("#find input").send_keys(f" {jobs[-2]} ", Keys.ENTER)
    eventually(lambda: page.detail(jobs[-2], "payload"), "it is open")
    assert page.browser.current_url == f"{page.origin}/jobs#{jobs[-2]}"
    assert page.ids() == [jobs[-2], *jobs[:50]]
    new = many(program, "math", 1, a=1, b=2)
    eventually(lambda: page.ids() == [jobs[-2], *new, *jobs[:49]], "it stays at the top")
    page.open_details(jobs[-2])
    page.run("document.activeElement.blur()")
    eventually(lambda: page.ids() == new + jobs[:49], "closed and left, it is gone")
    assert page.browser.current_url == f"{page.origin}/jobs"


@pytest.mark.parametrize("unknown", ["nothing", "00000000-0000-0000-0000-000000000000", "<b>%"])
def test_an_address_of_no_job_says_so(start: Start, visit: Visit, unknown: str) -> None:
    page = visit(start(), f"/jobs#{unknown}")
    page.shows("there is no job", "#found")
    page.one("#find input").send_keys(unknown, Keys.ENTER)
    page.shows("there is no job", "#found")
    page.shows("Live", "#live")


def test_an_unknown_status_is_said_and_not_asked_for_again(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program, "/jobs?status=done")
    page.shows("status must be one of", "#none")
    page.browser.execute_async_script("setTimeout(arguments[0], 2500)")
    asked = (
        "return performance.getEntriesByType('resource').filter((e) => e.name.includes('status=done')).length"
    )
    assert page.run(asked) == 1
    page.one("[data-filter='']").click()
    page.shows("No jobs yet", "#none")


def test_a_filter_chosen_while_the_service_is_away_shows_no_old_rows(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("math", a=1, b=2)
    page = visit(program)
    page.shows("completed", page.row(job_id))
    program.kill()
    page.shows("The service does not answer", "#live")
    assert page.ids() == [job_id]
    page.one("[data-filter=failed]").click()
    page.shows("The service does not answer", "#none")
    assert page.ids() == []
    assert page.text("[aria-current=page]").startswith("Failed")
    start("--port", str(program.port))
    page.shows("No failed jobs.", "#none")


def test_a_form_takes_back_that_the_service_does_not_answer(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program)
    page.shows("Live", "#live")
    program.kill()
    page.one("details:has(> form[data-job-type=long]) > summary").click()
    page.one("form[data-job-type=long] [type=submit]").click()
    page.shows("The service does not answer", "form[data-job-type=long] output")
    start("--port", str(program.port))
    page.shows("The service answers again", "form[data-job-type=long] output")
    page.shows("Live", "#live")
    page.fill_and_submit("long")
    assert page.text("form[data-job-type=long] output") == ""


def test_a_row_takes_back_that_the_service_does_not_answer(
    start: Start, visit: Visit, own_redis: Callable[..., RedisServer]
) -> None:
    server = own_redis("--appendonly", "yes")
    program = start("--workers", "0", REDIS_URL=server.url)
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    page.shows("pending", page.row(job_id))
    server.kill()
    page.one(f"{page.row(job_id)} [data-is=cancel]").click()
    page.shows("Redis cannot serve this now", f"{page.row(job_id)} [data-is=said]")
    server.start()
    page.shows("The service answers again", f"{page.row(job_id)} [data-is=said]")
    page.one(f"{page.row(job_id)} [data-is=cancel]").click()
    page.shows("cancelled", f"{page.row(job_id)} [data-is=said]")


def test_behind_the_token_dialog_nothing_says_that_the_service_is_away(start: Start, visit: Visit) -> None:
    program = start()
    page = visit(program)
    page.shows("Live", "#live")
    program.kill()
    page.shows("The service does not answer", "#live")
    start("--port", str(program.port), API_TOKEN="secret")
    page.shows("This queue asks for a token", "dialog")
    assert "does not answer" not in page.text("body")
    assert page.text("#live") == "Waiting for the token"


def test_a_token_with_a_space_is_refused_with_the_reason(start: Start, visit: Visit) -> None:
    page = visit(start(API_TOKEN="secret"))
    field = page.one("dialog input")
    field.send_keys("se cret", Keys.ENTER)
    page.shows("no spaces", "dialog")
    field.clear()
    field.send_keys(" secret ", Keys.ENTER)  # as it comes from a clipboard
    page.shows("No jobs yet", "#none")


def test_the_same_filter_three_times_is_one_step_back(start: Start, visit: Visit) -> None:
    page = visit(start())
    page.shows("No jobs yet", "#none")
    for _ in range(3):
        page.one("[data-filter=failed]").click()
        page.shows("No failed jobs.", "#none")
    page.browser.back()
    page.shows("No jobs yet", "#none")


def test_a_list_of_large_jobs_is_small_and_an_open_one_is_whole(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    text = "ä" * 90_000
    jobs = [many(program, "email", 1, to="a@example.org", subject="x", body=text)[0] for _ in range(30)][::-1]
    page = visit(program)
    eventually(lambda: page.ids() == jobs)
    asked = "return Math.max(...performance.getEntriesByType('resource').map((e) => e.transferSize))"
    assert page.run(asked) < 50_000
    page.open_details(jobs[3])
    eventually(lambda: text in page.detail(jobs[3], "payload"), "all of it")
    assert page.run(f'return document.querySelector("{page.row(jobs[3])} pre").tabIndex') == 0
    page.one(f"{page.row(jobs[3])} [data-is=again]").click()
    page.shows("submitted again as", "#said")
    page.point_away()
    new = eventually(lambda: len(page.ids()) == 31 and page.ids()[0])
    assert program.job(new)["payload"]["body"] == text


# ── What matters ────────────────────────────────────────────────────────────────────────────────


def test_a_row_shows_the_payload_until_there_is_a_result(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    jobs = [many(program, "email", 1, to=f"{n}@example.org", subject="x", body="y")[0] for n in range(2)]
    page = visit(program)
    for n, job_id in enumerate(jobs):
        page.shows(f'{{"to":"{n}@example.org"', f"{page.row(job_id)} .outcome")


def test_a_row_shows_the_progress_as_a_bar_with_its_note(start: Start, visit: Visit) -> None:
    program = start()
    job_id = program.submit("long", seconds=20)
    page = visit(program)
    page.shows("of 20 s", f"{page.row(job_id)} .outcome")
    bar = page.one(f"{page.row(job_id)} progress")
    eventually(lambda: 0 < float(bar.get_property("value")) < 1, "it moves")  # type: ignore[arg-type]
    assert ("progressbar", "Progress") in [(role.lower(), name) for role, name in page.accessibility()]


def test_the_chart_tells_its_figures_in_words(start: Start, visit: Visit) -> None:
    program = start("--workers", "1", "--max-retries", "0")
    page = visit(program)
    page.shows("No jobs yet", "#none")
    many(program, "math", 20, a=1, b=2)
    program.ended(program.submit("math", a="one", b=2))
    many(program, "long", 4, seconds=1000)
    page.shows("pending 3", "#chart")
    page.shows("processing 1", "#chart")
    page.shows("The oldest waits", "#oldest")
    words = [name for role, name in page.accessibility() if "in the last" in name]
    assert re.fullmatch(r"Finished a second, .*: completed .* now, at most [\d.]+; failed .*", words[0])
    assert "at most 0;" not in words[0]
    assert re.fullmatch(r"Jobs now, in the .*: pending 3 now, at most .*; processing 1 now, .*", words[1])
    assert all(len(line.get_attribute("points") or "") > 10 for line in page.all("polyline"))


def test_all_that_is_listed_is_cancelled_after_a_question(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    emails = many(program, "email", 3, to="a@example.org", subject="x", body="y")
    maths = many(program, "math", 4, a=1, b=2)
    page = visit(program)
    eventually(lambda: len(page.ids()) == 7)
    Select(page.one("#type")).select_by_visible_text("math")
    page.one("#cancel-all").click()
    assert page.text("#asked") == "Cancel 4 jobs?"
    page.one("#no").click()
    assert page.counts()["failed"] == 0
    page.one("#cancel-all").click()
    page.say_yes()
    page.shows("4 jobs cancelled", "#consequence")
    page.one("#no").click()
    assert {program.job(job_id)["status"] for job_id in maths} == {"failed"}
    assert {program.job(job_id)["status"] for job_id in emails} == {"pending"}
    eventually(lambda: not page.one("#cancel-all").is_enabled(), "there is nothing more to cancel")


def test_a_double_click_on_cancel_all_does_not_answer_the_question(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    page.shows("pending", page.row(job_id))
    page.run("for (const each of arguments[0]) document.querySelector(each).click()", ["#cancel-all", YES])
    assert page.text("#asked") == "Cancel 1 job?"
    assert page.text("#no") == "No"
    page.one("#no").click()
    assert program.job(job_id)["status"] == "pending"


def test_all_failed_ones_that_are_listed_are_retried_after_a_question(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0", "--workers", "1")
    done = program.submit("math", a=1, b=2)
    bad = [program.submit("math", a=f"x{n}", b=2) for n in range(3)]
    program.ended(bad[-1])
    page = visit(program)
    page.shows("failed", page.row(bad[-1]))
    page.one("#retry-all").click()
    assert page.text("#asked") == "Retry 3 jobs?"
    page.say_yes()
    page.shows("3 jobs submitted again", "#consequence")
    page.one("#no").click()
    eventually(lambda: len(page.ids()) == 7, "as new jobs")
    payloads = [job["payload"] for job in program.call("GET", "/jobs")[1]]
    assert sorted(map(str, payloads)) == sorted(
        [str({"a": 1, "b": 2}), *(str({"a": f"x{n}", "b": 2}) for n in range(3) for _ in range(2))]
    )
    assert program.job(done)["status"] == "completed"


def test_what_is_shown_can_be_narrowed_by_type_and_text(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [email] = many(program, "email", 1, to="ada@example.org", subject="x", body="y")
    [math] = many(program, "math", 1, a="ada", b=2)
    page = visit(program)
    eventually(lambda: len(page.ids()) == 2)

    def shown() -> list[str]:
        return [body.get_attribute("id") or "" for body in page.all("tbody") if body.is_displayed()]

    page.one("#text").send_keys("ADA")
    assert shown() == [math, email]
    Select(page.one("#type")).select_by_visible_text("email")
    assert shown() == [email]
    page.one("#text").send_keys(" is not there")
    page.shows("None of the 2 jobs on this page has that type and text.", "#none")
    [new] = many(program, "email", 1, to="ada is not there", subject="x", body="y")
    eventually(lambda: shown() == [new], "what is new is narrowed, too")


# ── Whom it trusts ──────────────────────────────────────────────────────────────────────────────

ATTACKS = ("<script>document.title = 'owned'</script>", "<img src=data:, onerror=document.title=1>")


@pytest.mark.parametrize("attack", ATTACKS)
def test_markup_in_a_job_is_text_and_does_nothing(start: Start, visit: Visit, attack: str) -> None:
    program = start("--max-retries", "0")
    job_id = program.submit("math", a=attack, b=1)
    program.ended(job_id)
    page = visit(program)
    page.shows(attack, f"{page.row(job_id)} .outcome")
    page.open_details(job_id)
    assert json.loads(page.detail(job_id, "payload")) == {"a": attack, "b": 1}
    assert attack in page.detail(job_id, "error")
    page.one(f"{page.row(job_id)} [data-is=again]").click()
    page.shows(attack, "#said")
    assert page.browser.title == "Job queue"
    assert (len(page.all("script")), page.all("img")) == (1, [])


def test_the_policy_stops_a_script_that_got_into_the_page_all_the_same(start: Start, visit: Visit) -> None:
    page = visit(start())
    page.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", ATTACKS[1])
    [complaint] = eventually(page.complaints)
    assert "inline event handler" in complaint
    assert page.browser.title == "Job queue"


def test_the_page_asks_for_a_token_once_and_keeps_it_for_the_tab(start: Start, visit: Visit) -> None:
    page = visit(start(API_TOKEN="secret"))
    field = page.one("dialog input")
    field.send_keys("wrong", Keys.ENTER)
    page.shows("The last one was refused.", "dialog")
    field.send_keys("secret", Keys.ENTER)
    page.shows("No jobs yet", "#none")
    assert page.text("dialog") == ""
    page.browser.refresh()
    page.shows("No jobs yet", "#none")
    assert page.text("dialog") == ""
    page.fill_and_submit("math", a="1", b="2")
    page.shows("math: completed. 3", "#said")


# ── For every reader ────────────────────────────────────────────────────────────────────────────


def test_on_a_phone_rows_are_cards_and_nothing_scrolls_sideways(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    job_id = program.submit("math", a="x" * 300, b=1)
    program.ended(job_id)
    page = visit(program)
    page.emulate(360, 740)
    page.browser.refresh()
    page.shows("ValueError", page.row(job_id))
    page.open_details(job_id)
    page.one("#new > summary").click()
    assert page.run("return document.documentElement.scrollWidth") == 360
    assert page.run("return getComputedStyle(document.querySelector('.line')).display") == "grid"
    roles = {role for role, _ in page.accessibility()}
    assert {"table", "row", "rowheader", "cell"} <= roles


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(start: Start, visit: Visit, scheme: str) -> None:
    """4.5 to 1 at least: WCAG 2.2, 1.4.3."""
    program = start("--max-retries", "0", "--workers", "1")
    for payload in ({"a": 1, "b": 2}, {"a": "one", "b": 2}):
        program.ended(program.submit("math", **payload))
    program.submit("long", seconds=1000)
    program.submit("long", seconds=1000)
    page = visit(program)
    page.emulate(prefers_color_scheme=scheme)
    for status in ("pending", "processing", "completed", "failed"):
        page.shows(status, f"tbody[data-status={status}]")
    page.open_details(page.ids()[0])
    assert page.run(CONTRAST) == []
    assert page.run("return getComputedStyle(document.body).backgroundColor") == BACKGROUND[scheme]


def test_forced_colours_leave_the_current_filter_to_be_seen(start: Start, visit: Visit) -> None:
    page = visit(start())
    page.shows("Live", "#live")
    page.emulate(forced_colors="active")
    color = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    assert page.run(color, "[aria-current=page]") != page.run(color, "[data-filter=failed]")


def test_no_figure_of_a_row_takes_a_second_line(start: Start, visit: Visit) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    cells = "arguments[0].querySelectorAll('.line > :not(.outcome):not(th)')"
    row = page.one(page.row(job_id))
    program.kill()  # so that nothing writes over the figures
    for width in (320, 640, 960, 1000, 1280, 1920):
        page.emulate(width, 900)
        before = row.rect["height"]
        page.run(
            f"for (const cell of {cells}) if (cell.querySelector('[data-is=took], [data-is=age]')) "
            "cell.firstElementChild.textContent = '12 min 13 s'",
            row,
        )
        assert row.rect["height"] == before, width
        page.run(f"for (const time of {cells}) time.firstElementChild.textContent = ''", row)


def test_an_error_has_room_at_every_width(start: Start, visit: Visit) -> None:
    program = start("--max-retries", "0")
    job_id = program.submit("math", a="one", b=2)
    program.ended(job_id)
    page = visit(program)
    for width in (320, 500, 832, 840, 961, 1000, 1152, 1160, 1280, 1920):
        page.emulate(width, 900)
        page.browser.refresh()
        page.shows("ValueError", page.row(job_id))
        assert page.one(f"{page.row(job_id)} .outcome").rect["width"] >= 240, width
        assert page.run("return document.documentElement.scrollWidth") <= width


def test_the_message_below_takes_no_clicks_and_the_mark_before_a_name_is_not_read_out(
    start: Start, visit: Visit
) -> None:
    program = start("--workers", "0")
    [job_id] = many(program, "math", 1, a=1, b=2)
    page = visit(program)
    page.shows("pending", page.row(job_id))
    page.run("document.querySelector('#said').textContent = ''")
    hit = "const { x, y, width, height } = document.querySelector('#said').getBoundingClientRect();"
    assert page.run(f"{hit} return document.elementFromPoint(x + width / 2, y + height / 2)?.id") != "said"
    assert not [
        name for _, name in page.accessibility() if "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}" in name
    ]


def test_without_javascript_the_page_says_what_it_needs(start: Start, visit: Visit) -> None:
    page = visit(start())
    page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.browser.refresh()
        text = page.one("body").text
    finally:
        page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert text == "Job queue\nThis page needs JavaScript. The API does not: curl …/jobs"


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which AXE says where to find."""
    path = os.environ.get("AXE")
    if not path and shutil.which("npm"):
        missing("axe-core, whose path is in AXE: see .ci/run")
    if not path:
        pytest.skip("needs axe-core, and there is no npm here to get it")
    return Path(path).read_text()


AXE_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN_AXE = "; const [rules, done] = arguments; axe.run({runOnly: rules}).then(done)"
LOOKS = [(width, scheme) for width in (320, 1280) for scheme in ("light", "dark")]


def run_axe(page: Page, axe: str) -> list[tuple[str, list[str]]]:
    """The rules that the page breaks, and the elements that do."""
    found = page.browser.execute_async_script(axe + RUN_AXE, AXE_RULES)
    return [
        (broken["id"], [node["html"][:120] for node in broken["nodes"]]) for broken in found["violations"]
    ]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_axe_finds_nothing(start: Start, visit: Visit, axe: str, width: int, scheme: str) -> None:
    program = start("--workers", "2", "--max-retries", "0")
    page = visit(program)

    def check(what: str) -> None:
        page.point_away()
        assert (what, run_axe(page, axe)) == (what, [])

    page.emulate(width, 900, prefers_color_scheme=scheme)
    page.shows("No jobs yet", "#none")
    check("the empty page")
    many(program, "math", 180, a=1, b=2)
    bad = many(program, "math", 10, a="one " * 3000, b=2)
    running, *_ = many(program, "long", 10, seconds=1000)
    many(program, "email", 5, to="a@example.org", subject="x", body="y")
    program.ended(bad[0])
    page.shows("failed", page.row(bad[0]))
    eventually(lambda: page.all("tbody[data-status=processing]"), "some run")
    check("200 jobs")
    page.open_details(bad[0])
    page.open_details(page.all("tbody[data-status=processing]")[0].get_attribute("id") or running)
    page.shows("Traceback", page.row(bad[0]))
    check("open rows")
    page.one("#cancel-all").click()
    check("the question")
    page.one("#no").click()
    page.one("#pause").click()
    page.shows("Paused", "#live")
    check("the paused page")
    page.one("#pause").click()
    page.open("/jobs?status=done")
    page.shows("status must be one of", "#none")
    check("an error")


def test_axe_finds_nothing_in_the_dialog_that_asks_for_a_token(start: Start, visit: Visit, axe: str) -> None:
    page = visit(start(API_TOKEN="secret"))
    page.one("#token input").send_keys("se cret", Keys.ENTER)
    page.shows("no spaces", "#token")
    assert run_axe(page, axe) == []


BACKGROUND = {"light": "rgb(247, 247, 245)", "dark": "rgb(19, 20, 22)"}
CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const luminance = (...colors) => { // of colours painted over each other
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
    (level) => level / 255 <= 0.04045 ? level / 255 / 12.92 : ((level / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const texts = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
  const hidden = element.closest("script, noscript, template, thead th:last-child");
  if (!texts.length || hidden || !element.checkVisibility({ opacityProperty: true })) continue;
  const behind = [];
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
  const { color } = getComputedStyle(element);
  const [low, high] = [luminance(...behind), luminance(...behind, color)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < 4.5) poor.push(`${element.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
}
return poor;
"""


# ── In Firefox ──────────────────────────────────────────────────────────────────────────────────


class Firefox(Reader):
    """Firefox, driven by its own protocol, Marionette: Debian has no geckodriver to speak WebDriver with it.

    A message is its length, a colon, and JSON (Firefox Source Docs, *Marionette*, "Protocol").
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        wishes = {"marionette.port": port, "network.captive-portal-service.enabled": False}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in wishes.items()]
        (folder / "user.js").write_text("\n".join(lines))
        self._process = subprocess.Popen(
            ["firefox", "--headless", "--no-remote", "--marionette", "--profile", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._socket: socket.socket = eventually(lambda: self._connect(port), "Firefox listens")
        self._stream = self._socket.makefile("rb")
        self._read()  # it greets
        self._number = 0
        self.command("NewSession", capabilities={})

    def _connect(self, port: int) -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        return None

    def _read(self) -> Any:
        length = b"".join(iter(lambda: self._stream.read(1), b":"))
        return json.loads(self._stream.read(int(length)))

    def command(self, name: str, **parameters: Any) -> Any:
        self._number += 1
        text = json.dumps([0, self._number, f"WebDriver:{name}", parameters])
        self._socket.sendall(f"{len(text)}:{text}".encode())
        _, _, error, answer = self._read()
        assert not error, error
        return answer

    def run(self, script: str, *arguments: Any) -> Any:
        return self.command("ExecuteScript", script=script, args=arguments)["value"]

    def axe(self, axe: str) -> list[str]:
        found = self.command("ExecuteAsyncScript", script=axe + RUN_AXE, args=[AXE_RULES])["value"]
        return [broken["id"] for broken in found["violations"]]

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def point(self, x: float, y: float, clicks: int = 0) -> None:
        actions = [{"type": "pointerMove", "x": int(x), "y": int(y), "duration": 0}]
        actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] * clicks
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self.command("PerformActions", actions=[{**mouse, "actions": actions}])

    def click(self, selector: str, clicks: int = 1) -> None:
        middle = (
            "const { x, y, width, height } = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [x + width / 2, y + height / 2]"
        )
        x, y = self.run(middle, selector)
        self.point(x, y, clicks)

    def quit(self) -> None:
        self._stream.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait()


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    if not shutil.which("firefox"):
        missing("firefox")
    browser = Firefox(tmp_path_factory.mktemp("firefox"))
    yield browser
    browser.quit()


def test_in_firefox_too_the_list_holds_still(start: Start, firefox: Firefox) -> None:
    program = start("--workers", "0")
    old = many(program, "math", 20, a=1, b=2)
    firefox.command("Navigate", url=f"http://127.0.0.1:{program.port}/")
    eventually(lambda: firefox.ids() == old)
    firefox.click(f"[id='{old[2]}'] .toggle")
    top = firefox.top(old[2])
    firefox.point(1, 1)
    new = many(program, "math", 60, a=3, b=4)
    eventually(lambda: firefox.ids() == [*new[:50], old[2]], "the new jobs, and the one that is read")
    assert firefox.top(old[2]) == pytest.approx(top, abs=1)
    firefox.command("Navigate", url=f"http://127.0.0.1:{program.port}/jobs?status=pending")
    eventually(lambda: firefox.ids() == new[:50])
    firefox.click(f"[id='{new[3]}'] [data-is=cancel]", clicks=2)
    firefox.shows("cancelled", f"[id='{new[3]}'] [data-is=said]")
    many(program, "math", 3, a=3, b=4)
    firefox.shows("3 new", "#live")
    assert firefox.ids() == new[:50]
    assert [job["id"] for job in program.call("GET", "/jobs?status=failed")[1]] == [new[3]]


def test_in_firefox_too_a_job_is_submitted_found_and_open_to_every_reader(
    start: Start, firefox: Firefox, axe: str
) -> None:
    program = start("--max-retries", "0")
    bad = program.submit("math", a="one", b=2**64)
    program.ended(bad)
    firefox.command("Navigate", url=f"http://127.0.0.1:{program.port}/jobs#{bad}")
    firefox.shows("Traceback", f"[id='{bad}']")
    assert str(2**64) in firefox.text(f"[id='{bad}'] [data-is=payload]")
    firefox.run("document.querySelector('details:has(> form[data-job-type=long])').open = true")
    firefox.click("form[data-job-type=long] [type=submit]")
    firefox.shows("long: completed", "#said")
    assert firefox.axe(axe) == []
