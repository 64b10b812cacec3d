"""The report says what the scores say, and nothing in a text can become part of the page."""

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import judgment_text

from conj.data.files import write_jsonl
from conj.data.manifest import write_sealed
from conj.sample.evaluation.aggregation import PUBLISHED
from conj.sample.evaluation.figures import Judged, score_all
from conj.sample.evaluation.report import write_report

EVIL = '<script>alert(1)</script></script><img src=x onerror="alert(2)">{{ 7 * 7 }}"\'|`$\\frac{$ \ud800'
EVIL_SHOWN = EVIL.replace("\ud800", "\ufffd")
EVIL_JUDGE = "<script>alert(3)</script>$\\frac{$</script><img src=x onerror=alert(4)>"


def make_prompt(number: int, benchmark: str = "", subset: str = "", **more) -> dict:
    texts = {"question": f"question {number}", "answer_1": "the first answer", "answer_2": "b", "label": 1}
    return {"id": f"{number:03}", "source": "data", "benchmark": benchmark, "subset": subset, **texts, **more}


def make_judgment(prompt: dict, order: int, choice: int | None, **more) -> dict:
    verdict = 3 - choice if order == 2 and choice else choice
    text = "no verdict" if choice is None else judgment_text(f"reason of order {order}", verdict)
    made = {"text": text, "rung": "none" if choice is None else "json", "finish_reason": "stop"}
    made |= {"id": prompt["id"], "order": order, "sample": 0, "choice": choice, "verdict": verdict}
    return made | {"label": prompt["label"], **more}


def both_orders(prompts: list[dict], choose) -> list[dict]:
    """Judgments of a judge that takes `choose(prompt, order)`, an answer in the order of the data."""
    return [make_judgment(prompt, order, choose(prompt, order)) for prompt in prompts for order in (1, 2)]


def right(prompt: dict, order: int) -> int:
    return prompt["label"]


def first(prompt: dict, order: int) -> int:
    return order


def report_on(run: Path, prompts: list[dict], judgments: dict[str, list[dict]], **changes) -> str:
    """Scores and reports; returns the page."""
    judged = {name: Judged(prompts=prompts, rows=rows) for name, rows in judgments.items()}
    run.mkdir(exist_ok=True)
    write_report(run, score_all(judged, 100, 0) | {"counts": {"read": 7}} | changes, prompts, judgments)
    return (run / "report.html").read_text("utf-8")


def unpack(page: str) -> tuple[dict, list[dict]]:
    """What the page's browser reads: names, and all questions."""
    blocks = re.findall(r'<script type="application/gzip;base64">([^<]*)</script>', page)
    head, *questions = [json.loads(gzip.decompress(base64.b64decode(block))) for block in blocks]
    return head, [question for block in questions for question in block]


def pictures_of(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)]


class Tags(HTMLParser):
    """The tags of a page, counted, and the names of all attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.number, self.attributes = Counter(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.number[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def table_row(page: str, start: str) -> list[str]:
    """The texts of the cells of the table row whose first cell starts with `start`."""
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL):
        cells = [cell.strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        if cells and re.sub("<[^>]*>", "", cells[0]).startswith(start):
            return cells
    raise AssertionError(f"no row {start}")


@pytest.fixture
def run(tmp_path):
    """A run with curves and a stage, of a base that takes the first answer and a trained judge that is right."""
    run = tmp_path / "run"
    run.mkdir()
    write_jsonl(run / "metrics.jsonl", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "eval/loss": 0.65}])
    made = {"artefact": "prompts.jsonl", "complete": True, "num_rows": 30, "seconds": 1.5, "inputs": [], "options": {}}
    made["counts"] = {"left_out_identical": 17, "overlong_ids": ["not a count"]}
    write_sealed(run / "prompts.jsonl.manifest.json", made)
    prompts = [make_prompt(i, subset="s|1") for i in range(30)]
    report_on(run, prompts, {"base": both_orders(prompts, first), "trained": both_orders(prompts, right)})
    return run


def test_what_was_written_stays_text(tmp_path):
    """A judge reads adversarial answers; whoever reads the report must not run them."""
    prompts = [make_prompt(i, question=EVIL, answer_1=EVIL, subset=EVIL, source=EVIL) for i in range(3)]
    prompts[0] |= {"benchmark": "infinity-preference", "subset": EVIL_SHOWN}  # so that the card's table is there
    rows = both_orders(prompts, right)
    rows = [row | {"text": EVIL, "rung": EVIL, "finish_reason": EVIL} for row in rows]
    page = report_on(tmp_path / "run <script>", prompts, {EVIL_JUDGE: rows}, counts={EVIL: 1})
    own = page.count('<script type="application/gzip;base64">') + 1
    assert page.count("<script") == page.count("</script>") == own == 3
    tags = Tags(page)
    assert {tag: n for tag, n in tags.number.items() if tag in ("img", "script")} == {"img": 2, "script": 3}
    assert {name for name in tags.attributes if name.startswith("on")} == set()
    assert "{{ 7 * 7 }}" in page and EVIL_JUDGE in unescape(page)
    head, questions = unpack(page)
    assert head["judges"] == [EVIL_JUDGE]
    for question in questions:
        assert question["turns"] == [["user", EVIL_SHOWN]] and question["answers"] == [EVIL_SHOWN, "b"]
        assert [row["reason"] for row in question["judged"][0]] == [EVIL_SHOWN] * 2
    for line in (tmp_path / "run <script>" / "report.md").read_text("utf-8").splitlines():
        assert "<" not in line.replace("< 0.", "") and (not line.startswith("|") or line.endswith("|"))


def test_the_page_lets_only_its_own_script_run(run):
    """If a text got through all the same, the policy in the page would stop it."""
    page = (run / "report.html").read_text("utf-8")
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert re.findall("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval|Function", script) == []


def test_the_page_needs_nothing_from_outside(run):
    """A report is read on a train, years later; and it is one file, that can be sent to someone."""
    page = (run / "report.html").read_text("utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {re.sub(r"[,?].*", "", link) for link in links if not re.fullmatch(r"#[a-z]+", link)} == {
        "data:", "data:image/svg+xml;base64", "#judgments",
    }  # fmt: skip
    assert re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", page) == []
    assert {path.name for path in run.iterdir()} == {
        "metrics.jsonl", "prompts.jsonl.manifest.json", "report.json", "report.md", "report.html",
    }  # fmt: skip


def test_the_figures_of_the_json_are_in_every_form_of_the_report(run):
    """A table and a JSON file that disagree: which one is cited?"""
    judges = json.loads((run / "report.json").read_text())["judges"]
    assert (judges["base"]["accuracy"], judges["trained"]["accuracy"]) == (0.5, 1.0)
    markdown, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert "| Accuracy | 50.0 % (50.0 – 50.0) | 100.0 % (100.0 – 100.0) |" in markdown
    assert "| s\\|1 | 30 | 50.0 % (50.0 – 50.0) | 100.0 % (100.0 – 100.0) |" in markdown
    accuracy = ["50.0 %<small>50.0 – 50.0</small>", "100.0 %<small>100.0 – 100.0</small>"]
    assert table_row(page, "Accuracy") == ["Accuracy", *accuracy]
    assert table_row(page, "Takes the first answer")[1].startswith("100.0 %")
    assert table_row(page, "Verdict by rung")[1:] == ["100.0 %", "100.0 %"]
    assert "100.0 – 100.0 · base 50.0 %" in page
    for text in markdown, page:
        assert "17" in text and "not a count" not in text
    assert len(pictures_of(page)) == 3  # figures, biases, and the one curve that metrics.jsonl has


def test_a_comparison_shows_difference_interval_and_p(run):
    """Two judges that differ by less than chance must not be ranked."""
    page = (run / "report.html").read_text()
    _, n, accuracy, p, consistency, unparsed = table_row(page, "trained − base")
    assert (n, p) == ("30", "0.0099") and accuracy == "+50.0<small>+50.0 to +50.0</small>"
    assert consistency.startswith("+100.0<") and unparsed.startswith("+0.0<")
    assert "| trained − base | 30 | +50.0 | +50.0 to +50.0 | 0.0099 |" in (run / "report.md").read_text()
    report = json.loads((run / "report.json").read_text())
    change = report["comparisons"][0] | {"p_value": 3e-7, "accuracy": -0.004}
    tiny = {"judges": report["judges"], "comparisons": [change], "counts": {}}
    write_report(run, tiny, [], {"base": [], "trained": []})
    assert table_row((run / "report.html").read_text(), "trained − base")[2:4] == [
        "−0.4<small>+50.0 to +50.0</small>", "&lt; 0.0001",
    ]  # fmt: skip


def test_the_cards_table_sets_ours_beside_the_published_ones(tmp_path):
    """Published and measured must not be taken for each other, nor a part of a benchmark for the whole."""
    prompts = [make_prompt(i, "infinity-preference") for i in range(10)]
    prompts += [make_prompt(10 + i, "reward-bench", "llmbar-natural") for i in range(4)]
    prompts += [make_prompt(20 + i, "reward-bench", "donotanswer") for i in range(25)]
    judgments = {"ours": both_orders(prompts, lambda p, order: 2 if p["id"] in ("000", "020", "021", "022") else 1)}
    page = report_on(tmp_path / "run", prompts, judgments)
    card = page[page.index('id="card"') : page.index('id="biases"')]
    for name, values in PUBLISHED.items():
        cells = [re.sub("</?b>", "", cell) for cell in table_row(card, name)]
        assert cells == [name, '<span class="tag">published</span>', *(f"{value:.1f} %" for value in values)]
    _, mark, infinity, ultra, pku, chat, chat_hard, safety, reasoning = table_row(card, "ours")
    assert "measured" in mark and {ultra, pku, chat, reasoning} == {"–"}
    assert re.fullmatch(r"<b>90\.0 %</b><small>\d\d\.\d – 100\.0</small>", infinity)
    assert chat_hard == '100.0 % <span class="partial">partial</span><small>100.0 – 100.0</small>'
    assert safety.startswith('88.0 % <span class="partial">partial</span><small>')
    # Bold: ours is the best whole figure of its column; partial ones, higher or equal, leave that to Con-J.
    assert "<b>81.0 %" not in card and "<b>79.6 %</b>" in card and "<b>88.0 %</b>" in card and card.count("<b>") == 7
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert "| Con-J | published | 81.0 % | **73.0 %** | 68.4 % |" in markdown
    measured = r"\| ours \| measured \| \*\*90.0 % .*\*\* \| – \| – \| – \| 100.0 % \(100.0 – 100.0\), partial \| 88.0"
    assert re.search(measured, markdown)


def test_without_a_benchmark_of_the_card_there_is_no_such_table(run):
    """Eight published rows beside nothing would only mislead."""
    for name in ("report.html", "report.md"):
        assert "Prometheus" not in (run / name).read_text()


def test_sections_that_are_partial_say_so_and_those_without_rows_have_no_value(tmp_path):
    """The usual code shows an absent section as 0 and a partial one as the whole."""
    prompts = [make_prompt(i, "llmbar", "natural") for i in range(100)]
    page = report_on(tmp_path / "run", prompts, {"ours": both_orders(prompts, right)})
    page = page[page.index('id="benchmarks"') :]
    assert table_row(page, "Natural")[1:] == ["100", "100.0 %<small>100.0 – 100.0</small>"]
    assert table_row(page, "Adversarial")[1:] == ["0", '– <span class="partial">partial</span>']
    assert table_row(page, "Score")[2] == '– <span class="partial">partial</span>'


def test_the_matrix_of_styles_weighs_domains_as_the_benchmark_does(tmp_path):
    """RM-Bench counts its two halves of safety as one domain, whatever the number of rows."""
    prompts = [make_prompt(i, "rm-bench", "chat/hard/concise-markdown") for i in range(5)]
    prompts += [make_prompt(5 + i, "rm-bench", "safety-refuse/hard/concise-markdown") for i in range(20)]
    judgments = {"ours": both_orders(prompts, lambda p, order: 1 if p["subset"].startswith("chat") else 2)}
    page = report_on(tmp_path / "run", prompts, judgments)
    heat = page[page.index('<table class="heat">') :]
    assert table_row(heat, "concise") == ["concise", "–", "–", "66.7 %"]  # (1 · 1 + ½ · 0) / 1½
    assert table_row(heat, "markdown") == ["markdown", "–", "–", "–"]
    assert 'style="--heat: 67%"' in heat


def test_pandalms_annotators_stand_beside_the_score(tmp_path):
    """Agreement with a majority means little without the annotators' own."""
    prompts = [make_prompt(i, "pandalm", votes=[1, 1, 2 if i else 1]) for i in range(4)]
    judgments = {"ours": [make_judgment(p, 1, 1) for p in prompts]}  # one order, as published judgments are
    page = report_on(tmp_path / "run", prompts, judgments)
    assert table_row(page, "annotator 1") == ["annotator 1", "100.0 %"]
    assert table_row(page, "annotator 3") == ["annotator 3", "25.0 %"]
    assert table_row(page, "Right in both orders")[1:] == ["–"] and "one only, by judges" in page
    head, questions = unpack(page)
    assert head["orders"] == [[1]] and questions[0]["votes"] == [1, 1, 1]


def test_votes_and_calibration_are_drawn_where_there_are_any(tmp_path):
    """Empty axes look like a measurement."""
    prompts = [make_prompt(i) for i in range(20)]
    asked = [(i, order, sample) for i in range(20) for order in (1, 2) for sample in range(3)]
    rows = [
        make_judgment(prompts[i], order, 1 if (i + sample) % 3 else 2, sample=sample, p_first=0.6 + 0.01 * i)
        for i, order, sample in asked
    ]
    page = report_on(tmp_path / "run", prompts, {"ours": rows})
    assert "Accuracy of a majority vote" in page and "Share of right verdicts, by confidence" in page
    assert any("samples that vote" in svg for svg in pictures_of(page))
    assert any("calibrated" in svg and "as given" in svg for svg in pictures_of(page))
    plain = report_on(tmp_path / "plain", prompts, {"ours": both_orders(prompts, right)})
    assert "majority vote" not in plain and "confidence" not in plain and len(pictures_of(plain)) == 2


def test_pictures_hold_any_name_and_follow_the_colour_scheme(tmp_path):
    """A name with two dollars is no formula; a control character would break the whole picture."""
    prompts = [make_prompt(0)]
    names = ["$\\frac{$", "裁判\x00<b>&", "a" * 300]
    page = report_on(tmp_path / "run", prompts, {name: both_orders(prompts, right) for name in names})
    svg, *others = pictures_of(page)
    for picture in (svg, *others):
        texts = {element.text for element in ElementTree.fromstring(picture).iter() if element.tag.endswith("text")}
        assert {"$\\frac{$", "裁判\ufffd<b>&"} < texts and max(map(len, texts)) < 60
        assert "@media(prefers-color-scheme:dark)" in picture
        assert re.findall(r"(?:fill|stroke): #(?!000000|ffffff)", picture.partition("</defs>")[2]) == []


def test_every_judgment_is_in_the_page_with_what_is_known_of_it(tmp_path):
    """A sample of them cannot show where a judge errs."""
    prompts = [make_prompt(i, id=f"{i:04}") for i in range(1500)]
    del prompts[7]["question"]
    prompts[7]["messages"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<b>"}]
    rows = both_orders(prompts[1:], right)  # the first did not fit
    rows[0] |= {"text": judgment_text("see", 3), "rung": "none"}
    rows[3] |= {"finish_reason": "length", "p_first": 0.25}
    page = report_on(tmp_path / "run", prompts[::-1], {"ours": rows[::-1]})
    head, questions = unpack(page)
    assert (head["num_questions"], [q["id"] for q in questions]) == (1500, [p["id"] for p in prompts])
    assert questions[7]["turns"] == [["user", "hi"], ["assistant", "<b>"]]
    assert questions[0]["judged"] == [[]]
    (one, two), (_, last) = questions[1]["judged"][0], questions[2]["judged"][0]
    assert one["reason"] == rows[0]["text"] and (one["order"], one["rung"]) == (1, "none")
    assert two["reason"] == "reason of order 2" and (two["choice"], two["verdict"], two["order"]) == (1, 2, 2)
    assert (last["finish_reason"], last["p_first"], two["p_first"]) == ("length", 0.25, None)


def test_a_judge_is_not_blamed_for_questions_of_which_it_was_not_asked(tmp_path):
    """Published judgments come in files, each of its own benchmark."""
    prompts = [make_prompt(0, "llmbar", "natural"), make_prompt(1, "llmbar", "adver_manual")]
    rows = {"one": both_orders(prompts[:1], right), "two": both_orders(prompts, right)}
    judged = {"one": Judged(prompts=prompts[:1], rows=rows["one"]), "two": Judged(prompts=prompts, rows=rows["two"])}
    (tmp_path / "run").mkdir()
    write_report(tmp_path / "run", score_all(judged, 100, 0) | {"counts": {}}, prompts, rows)
    _, questions = unpack((tmp_path / "run" / "report.html").read_text())
    assert [[len(rows or "") for rows in q["judged"]] for q in questions] == [[2, 2], [0, 2]]
    assert questions[1]["judged"][0] is None


def test_the_same_figures_give_the_same_bytes(run):
    """Else a report cannot be compared with the one that was published."""
    prompts = [make_prompt(i, subset="s|1") for i in range(30)]
    judgments = {"base": both_orders(prompts, first), "trained": both_orders(prompts, right)}
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    report_on(run, prompts, {name: rows[::-1] for name, rows in judgments.items()})
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    judgments["base"][0]["choice"] = 2
    report_on(run, prompts, judgments)
    assert (run / "report.html").read_bytes() != before["report.html"]


def test_seconds_are_shown_and_leave_report_json_the_same(tmp_path):
    """Two runs of the same judgments give the same report.json; how long they took stands in the pages."""
    prompts = [make_prompt(0)]
    rows = {"base": [make_judgment(prompts[0], 1, 1, token_ids=[1])]}
    content = score_all({"base": Judged(prompts=prompts, rows=rows["base"])}, 20, 0) | {"counts": {}}
    for name, seconds in ("slow", {"base": 7.25}), ("fast", {"base": 0.125}):
        write_report(tmp_path / name, content, prompts, rows, seconds)
    assert "7.25" in (tmp_path / "slow" / "report.md").read_text("utf-8")
    assert (tmp_path / "slow" / "report.json").read_bytes() == (tmp_path / "fast" / "report.json").read_bytes()
