"""The report says what the scores say, and nothing in a text can become part of the page."""

import json
import re

import pytest

from conj.data.files import write_jsonl
from conj.data.manifest import write_sealed
from conj.data.prompts import judgment_text
from conj.sample.evaluate import score_judges
from conj.sample.report import write_report

EVIL = '<script>alert(1)</script>{{ 7 * 7 }}" onload="x \ud800'


@pytest.fixture
def run(tmp_path):
    """A run with curves and a stage, its four report files written, of a base that takes the first answer."""
    prompts = [
        {
            "id": f"{i:02}",
            "question": f"question {i} {EVIL}",
            "answer_1": EVIL,
            "answer_2": "b",
            "label": 1,
            "subset": "s|1",
        }
        for i in range(30)
    ]
    judgments = {"base": {}, "trained": {}}
    for row in prompts:
        for order in (1, 2):
            for name, verdict in ("base", 1), ("trained", order):
                choice = verdict if order == 1 else 3 - verdict
                text = judgment_text(f"reason of {name}, order {order} {EVIL}", verdict)
                judgments[name][row["id"], order] = {"text": text, "choice": choice, "verdict": verdict}
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "eval_loss": 0.65}])
    manifest = {
        "artefact": "prompts.jsonl",
        "complete": True,
        "num_rows": 30,
        "seconds": 1.5,
        "inputs": [],
        "options": {},
    }
    manifest |= {"counts": {"left_out_identical": 17, "overlong_ids": ["not a count"]}}
    write_sealed(tmp_path / "prompts.jsonl.manifest.json", manifest)
    write_report(tmp_path, score_judges(prompts, judgments, 100, 0), prompts, judgments, max_shown=20)
    return tmp_path


def test_what_was_written_stays_text(run):
    """A judge reads adversarial answers; whoever reads the report must not run them."""
    for name in ("report.html", "judgments.html"):
        page = (run / name).read_text("utf-8")
        assert "<script" not in page and "49" not in re.findall(r"question \d+ .{0,80}", page)
    page = (run / "judgments.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}&#34; onload=&#34;x \ufffd" in page


def test_the_pages_need_nothing_from_outside(run):
    """A report is read on a train, years later."""
    for name in ("report.html", "judgments.html"):
        page = (run / name).read_text("utf-8")
        links = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)|@import", page)
        assert {link.partition(",")[0] for link in links} <= {
            "data:image/svg+xml;base64",
            "report.html",
            "judgments.html",
        }


def test_the_figures_of_the_json_are_in_every_form_of_the_report(run):
    """A table and a JSON file that disagree: which one is cited?"""
    scores = json.loads((run / "report.json").read_text())
    assert (scores["base"]["accuracy"], scores["trained"]["accuracy"]) == (0.5, 1.0)
    markdown, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert "| Accuracy | 50.0 % (50.0 – 50.0) | 100.0 % (100.0 – 100.0) |" in markdown
    assert "| s\\|1 | 30 | 50.0 % | 100.0 % |" in markdown
    for text in markdown, page:
        assert "17" in text and "not a count" not in text
    assert page.count("data:image/svg+xml") == 3


def test_each_judgment_shows_its_reason_and_what_is_wrong_with_it(run):
    """The page is for finding out why a judge errs."""
    page = (run / "judgments.html").read_text("utf-8")
    articles = page.split("<article")[1:]
    assert len(articles) == 20 and "20 of 30 questions" in page
    for article in articles:
        base, trained = article[article.index('class="two judges"') :].split("<h3>trained")
        assert "not the same in both orders" in base and "not the same" not in trained
        assert "answer 1, right" in base and "answer 2, wrong" in base and trained.count("answer 1, right") == 2
        for order in (1, 2):
            assert f"reason of base, order {order}" in base and f"reason of trained, order {order}" in trained


def test_the_same_figures_give_the_same_bytes(run):
    """Else a report cannot be compared with the one that was published."""
    first = {path.name: path.read_bytes() for path in run.iterdir()}
    scores = json.loads(first["report.json"])
    write_report(run, scores, [], {"base": {}, "trained": {}}, max_shown=20)
    assert (run / "report.html").read_bytes() == first["report.html"]
