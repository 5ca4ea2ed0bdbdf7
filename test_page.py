"""The live page as a person has it: served by the program itself, in Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from conftest import MODULE, Program, RedisServer, eventually, missing

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)


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


class Page:
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
        actions.pointer_action.move_to_location(1, 1)
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

    def shows(self, text: str, selector: str = "body") -> None:
        """Wait for a text."""
        eventually(lambda: text in self.text(selector), f"{selector} shows {text!r}")

    def ids(self) -> list[str]:
        """The ids of the jobs listed, from the top."""
        listed: list[str] = self.run("return [...document.querySelectorAll('tbody')].map(body => body.id)")
        return listed

    def row(self, job_id: str) -> str:
        return f"[id='{job_id}']"

    def open_details(self, job_id: str) -> None:
        self.one(f"{self.row(job_id)} .toggle").click()
        self.point_away()

    def detail(self, job_id: str, name: str) -> str:
        return self.text(f"{self.row(job_id)} .detail [data-is={name}]")

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
    assert labels == ["to", "subject", "body", *options, "a", "b", *options, "seconds", *options, "Show", "Open"]
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
