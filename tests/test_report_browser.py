"""The page's browser of judgments, in a real one: opened from disk, filtered, searched, linked, with texts that attack it."""

import base64
import json
import shutil
import time

import pytest
from test_report import EVIL, EVIL_SHOWN, both_orders, make_prompt, report_on

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--window-size=1280,900"]
NUM_QUESTIONS = 45
WRONG, TURNED, UNPARSED, MISSING = {3, 4, 44}, {10, 11}, {20}, {30}  # of judge `ours`
THEIRS_WRONG = {5}


def make_run(run):
    """45 questions: those above, and one whose every text attacks the page."""
    prompts = []
    for i in range(NUM_QUESTIONS):
        subset = "chat/hard/concise-markdown" if i % 3 else "code/easy/markdown-concise"
        where = ("rm-bench", subset) if i < 15 else ("llmbar", "natural")
        prompts.append(make_prompt(i, *where, label=1 + i % 2, answer_2=f"b{i}"))
    prompts[7] |= {"question": EVIL, "answer_1": EVIL, "answer_2": EVIL, "subset": EVIL}
    prompts[8]["messages"] = [{"role": "user", "content": "Straße?"}, {"role": "assistant", "content": "<b>bold</b>"}]

    def choose(prompt: dict, order: int) -> int | None:
        number = int(prompt["id"])
        if number in UNPARSED and order == 2:
            return None
        return 3 - prompt["label"] if number in WRONG or (number in TURNED and order == 2) else prompt["label"]

    ours = [row for row in both_orders(prompts, choose) if int(row["id"]) not in MISSING]
    ours[0]["text"] = ours[0]["text"].replace("reason", "理由充分，ÜBER 50% (a+b)? \\\\d")
    for row in ours[14:16]:
        row |= {"text": EVIL, "rung": EVIL, "finish_reason": EVIL}
    theirs = both_orders(prompts, lambda p, order: 3 - p["label"] if int(p["id"]) in THEIRS_WRONG else p["label"])
    report_on(run, prompts, {"ours": ours, "<b>theirs": theirs})
    return run / "report.html"


class Page:
    """A tab of headless Chromium that has a report open."""

    def __init__(self, driver, path):
        self.driver, self.url = driver, path.as_uri()

    def open(self, hash: str = "", width: int = 1280, ready: bool = True) -> "Page":
        self.driver.get("about:blank")
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url + hash)
        if ready:
            self.wait(lambda: self.js("return document.getElementById('results').ariaBusy") == "false")
        return self

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the page says {self.count()!r}"
            time.sleep(0.02)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def count(self) -> str:
        return self.js("return document.getElementById('count').textContent")

    def choose(self, **values: str) -> "Page":
        """Types into the search box or chooses from a list, and waits until the page has followed."""
        for name, value in values.items():
            script = "const e = document.getElementById('filters').elements[arguments[0]]; e.value = arguments[1];"
            script += "e.dispatchEvent(new Event('input', {bubbles: true})); return e.value"
            assert self.js(script, name, value) == value, f"{name} cannot be {value}"
        time.sleep(0.35)
        return self

    def ids_here(self) -> list[int]:
        return self.js("return [...document.querySelectorAll('#results .facts a')].map((a) => Number(a.textContent))")

    def ids(self) -> list[int]:
        """The questions of all pages of what matches."""
        found = self.ids_here()
        while self.js("const b = document.querySelector('.next'); return !b.parentElement.hidden && !b.disabled"):
            self.find(".next").click()
            found += self.ids_here()
        return found

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(driver, tmp_path_factory):
    return Page(driver, make_run(tmp_path_factory.mktemp("report") / "run"))


def test_it_opens_from_disk_without_a_complaint_or_a_request(report, tmp_path):
    """No server, no network: also where there is none."""
    report.open()
    assert report.count() == "45 of 45 questions"
    assert report.complaints() == []
    assert {url.partition(":")[0] for url in report.requests()} <= {"file", "data"}
    # The control: a page that asks for something is caught.
    (tmp_path / "asks.html").write_text('<p id="count"></p><img src="http://127.0.0.1:9/x.png">')
    asks = Page(report.driver, tmp_path / "asks.html").open(ready=False)
    assert "http://127.0.0.1:9/x.png" in asks.requests() and asks.complaints() != []


def test_pages_of_twenty(report):
    """All questions are reached, each once."""
    report.open()
    assert report.ids_here() == list(range(20)) and not report.find(".previous").is_enabled()
    assert report.find(".place").text == "Page 1 of 3"
    assert report.ids() == list(range(45))
    assert report.find(".place").text == "Page 3 of 3" and not report.find(".next").is_enabled()
    report.find(".previous").click()
    assert report.ids_here() == list(range(20, 40)) and "page=2" in report.driver.current_url


@pytest.mark.parametrize(("choice", "expected"), [
    ({"show": "wrong"}, WRONG | TURNED | THEIRS_WRONG), ({"show": "wrong", "judge": "ours"}, WRONG | TURNED),
    ({"show": "wrong", "judge": "<b>theirs"}, THEIRS_WRONG), ({"show": "inconsistent"}, TURNED),
    ({"show": "unparsed"}, UNPARSED | MISSING), ({"show": "unparsed", "judge": "<b>theirs"}, set()),
    ({"benchmark": "rm-bench"}, set(range(15))),
    ({"benchmark": "rm-bench", "subset": "code/easy/markdown-concise"}, {0, 3, 6, 9, 12}),
    ({"subset": EVIL_SHOWN}, {7}), ({"benchmark": "llmbar", "show": "wrong", "judge": "ours"}, {44}),
])  # fmt: skip
def test_each_filter_shows_exactly_its_questions(report, choice, expected):
    """What the page counts is what the report counts."""
    report.open().choose(**choice)
    assert report.ids() == sorted(expected)
    assert report.count() == (f"{len(expected)} of 45 questions" if expected else "None of 45 questions")


@pytest.mark.parametrize(("query", "expected"), [
    ("QUESTION 1", [1, *range(10, 20)]),  # of the question, in any case
    ("B31", [31]),  # of an answer
    ("理由充分", [0]), ("über", [0]),  # of a reason
    ("STRAßE?", [8]), ("strasse", []),  # of a turn of a conversation
    ("50% (a+b)? \\d", [0]), (".", []),  # what a pattern means elsewhere is text
    ("017", [17]),  # an id
    ("<script>alert(1)", [7]), ("nowhere", []),
])  # fmt: skip
def test_search_finds_texts_as_they_are(report, query, expected):
    """A search that misses what stands there sends its reader to grep."""
    report.open().choose(q=query)
    assert report.ids() == expected
    if expected:
        script = "return [...document.querySelectorAll('#results mark')].map((m) => m.textContent.toLowerCase())"
        marked = report.js(script)
        assert set(marked) <= {query.lower()} and (marked or query == "017")


def test_search_looks_only_into_what_is_shown(report):
    """A word of another judge's reason would be nowhere on the page."""
    assert report.open().choose(q="理由充分", judge="<b>theirs").ids() == []
    assert report.choose(judge="ours").ids() == [0]


def test_both_orders_stand_side_by_side_with_what_each_judge_said(report):
    """The page is for finding out why a judge errs."""
    report.open("#judgments?q=010")
    article = report.find("#results article")
    columns = article.find_elements("css selector", ".judge:first-of-type .two > div")
    lefts, tops = {c.location["x"] for c in columns}, {c.location["y"] for c in columns}
    assert (len(columns), len(lefts), len(tops)) == (2, 2, 1)
    first, second = (column.text for column in columns)
    assert "Answer 1 shown first" in first and "answer 1, right" in first and "reason of order 1" in first
    assert "Answer 2 shown first" in second and "answer 2, wrong" in second and "wrote 1 · rung json" in second
    judges = [heading.text for heading in article.find_elements("css selector", "h4")]
    assert judges == ["ours not the same in both orders", "<b>theirs"]
    assert "✓ better by the label" in article.find_element("css selector", ".answer.better").text
    assert article.find_element("css selector", ".answer.better").text.startswith("Answer 1")
    report.open("#judgments?q=030")
    assert report.find("#results").text.count("No judgment: the prompt did not fit the context.") == 2
    report.open("#judgments?q=008")
    assert [t.text for t in report.driver.find_elements("css selector", ".turn .text")] == ["Straße?", "<b>bold</b>"]


def test_what_attacks_the_page_stays_text(report):
    """The texts are those of judges that read adversarial answers."""
    report.open("#judgments?q=007")
    assert report.ids_here() == [7]
    texts = report.js("return [...document.querySelectorAll('#results .text')].map((t) => t.textContent)")
    assert texts[:5] == [EVIL_SHOWN] * 5
    elements = report.js("return [...document.querySelectorAll('#judgments *')].map((e) => e.tagName)")
    assert {"SCRIPT", "IMG", "IFRAME", "SVG"}.isdisjoint(elements) and "ARTICLE" in elements
    assert report.complaints() == []  # the policy had nothing to refuse


def test_a_filtered_view_can_be_linked(report):
    """Someone is sent a link, and sees what was meant."""
    report.open().choose(q="question", benchmark="rm-bench", subset="chat/hard/concise-markdown", judge="<b>theirs")
    link, ids, count = report.driver.current_url, report.ids_here(), report.count()
    assert ids == [1, 2, 4, 5, 10, 11, 13, 14]
    report.open(link[len(report.url) :])
    assert (report.ids_here(), report.count()) == (ids, count)
    values = report.js("return Object.fromEntries(new FormData(document.getElementById('filters')))")
    assert values == {
        "q": "question", "show": "all", "judge": "<b>theirs", "benchmark": "rm-bench",
        "subset": "chat/hard/concise-markdown",
    }  # fmt: skip
    report.js("location.hash = '#judgments?show=wrong&judge=ours&page=99'")
    report.wait(lambda: report.ids_here() == sorted(WRONG | TURNED))
    report.open("#judgments?judge=nobody&show=nothing&subset=none&page=2")  # a link to another report
    assert report.ids_here() == list(range(20, 40))


def test_the_tables_lead_to_the_judgments(report):
    """A subset with a low figure is one click from its judgments."""
    report.open()
    report.js("document.querySelector('#judgments').scrollIntoView()")
    for start, expected in ("code/easy", [0, 3, 6, 9, 12]), ("<script>", [7]):
        links = report.driver.find_elements("css selector", "td a, th a")
        report.js("arguments[0].click()", next(a for a in links if a.text.startswith(start)))
        report.wait(lambda expected=expected: report.ids_here() == expected)


def test_it_can_be_used_from_the_keyboard(report):
    """Hundreds of judgments are read this way."""
    report.open()
    keys = webdriver.ActionChains(report.driver)
    keys.send_keys("/").perform()
    assert report.js("return document.activeElement.id") == "q"
    keys.send_keys("question 1/").perform()
    report.wait(lambda: report.count() == "None of 45 questions")  # typed, not caught as a shortcut
    report.open()
    keys.send_keys("\ue014").perform()  # arrow right
    assert report.ids_here() == list(range(20, 40))
    keys.send_keys("\ue012").perform()
    assert report.ids_here() == list(range(20))
    unnamed = "return [...document.querySelectorAll('#filters input, #filters select')].filter((e) => !e.labels.length).length"
    assert report.js(unnamed) == 0


def test_nothing_is_wider_than_a_phone(report):
    """Wide tables scroll within their cards; the page does not."""
    report.open(width=390)
    assert report.js("return document.documentElement.scrollWidth") == 390
    wide = "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 391 && !e.closest('.scroll')).length"
    assert report.js(wide) == 0


def test_without_scripts_the_figures_are_there_and_the_page_says_what_is_not(report):
    """Mail clients and careful readers switch scripts off."""
    report.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        report.open(ready=False)
        shown = report.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        assert len(base64.b64decode(shown["data"])) > 10_000
        assert "needs JavaScript" in report.find("noscript").text and "Accuracy" in report.find("table").text
        assert not report.find("#filters").is_displayed()
    finally:
        report.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
