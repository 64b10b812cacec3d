"""The trained model's card says what the run folder says, its snippets run, and the hub gets both."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import assert_one_line_error, judge_messages
from fake_hub import fake_hub

from conj import InputError
from conj.data.card import CARD, front_matter, read_base_card, render_card, write_card
from conj.data.identity import describe_input, describe_made
from conj.data.judges import judge_file, judge_prompt, judgment_text, load_judge
from conj.data.manifest import hash_input, manifest_path, read_manifest, write_sealed
from conj.data.markdown import percent, percent_interval
from conj.train.audit.chain import check_card

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0", "left-pad": "1.3"}
BASE = {"path": "cache/base", "sha256": "b" * 64, "repo": "Qwen/Qwen2-7B-Instruct", "revision": "f2826a00"}
DATA = {"path": "Skywork/Skywork-Reward-Preference-80K-v0.1", "sha256": None, "revision": "5f5e5c8"}
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "ranks": 8, "threads": 4}


def made(run: Path, name: str, inputs: list, sha256: str | None = None, **changes) -> None:
    """A manifest beside an artefact that need not be there."""
    content = {"artefact": name, "complete": True, "inputs": inputs, "options": {}, "versions": VERSIONS, "num_rows": 9}
    content |= {"git": {"commit": "c" * 40, "dirty": False}, "counts": {}, "seconds": 5.0}
    content |= ({"sha256": sha256} if sha256 else describe_made(run / name)) | changes
    write_sealed(manifest_path(run / name), content)


def entry(run: Path, name: str) -> dict:
    """As an input of a later stage: of a model, which holds more, the files that decide results."""
    if name == "model":
        return describe_input(run / name)
    return {"path": str(run / name), "sha256": read_manifest(run / name)["sha256"]}


def trained_run(run: Path, **changes) -> Path:
    """A run folder whose manifests say that a model was trained on data of the hub."""
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    (run / "model" / "LICENSE.txt").write_text("of the base")
    made(run, "prompts.jsonl", [DATA, {"path": "train", "sha256": None}], "1" * 64, options={"seed": 7, "limit": None})
    made(
        run,
        "repeated.jsonl",
        [entry(run, "prompts.jsonl"), BASE],
        "2" * 64,
        seconds=9000.0,
        options={"max_new_tokens": 300},
    )
    made(run, "pairs.jsonl", [entry(run, "repeated.jsonl")], "3" * 64, options={"pair_types": ["repeated"]})
    made(run, "reference.safetensors", [entry(run, "pairs.jsonl"), BASE], "4" * 64, machine=MACHINE)
    made(
        run, "model", [entry(run, name) for name in ("pairs.jsonl", "reference.safetensors")] + [BASE],
        **{"options": {"beta": 0.25, "max_length": 6400}, "num_rows": 123, "seconds": 7200.0, "machine": MACHINE,
           "counts": {"train_pairs": 2952, "eval_pairs": 48, "over_max_length": 5},
           "base_card": {"license": "apache-2.0", "language": ["en"]}} | changes,
    )  # fmt: skip
    return run


def figures(n: int, **values: float) -> dict:
    return {"n": n} | {
        k: v for name, value in values.items() for k, v in ((name, value), (f"{name}_ci95", [value / 2, value]))
    }


def evaluated_run(run: Path, **changes) -> Path:
    """And that it was evaluated beside its base and another judge, on two benchmarks."""
    trained_run(run, **changes)
    judges = {}
    for judge, model in (
        ("base", BASE),
        ("trained", entry(run, "model")),
        ("gpt-4o", {"path": "judge gpt-4o 1", "sha256": None}),
    ):
        data = [{"path": "demo/chat.jsonl", "sha256": "d" * 64}, {"path": "judge con-j 5", "sha256": None}]
        made(run, f"judgments_{judge}.jsonl", [*data, model], "5" * 64)
        judges[judge] = {"benchmarks": {}}
        for i, (name, n) in enumerate((("chat", 311), ("evil|<b>", 42))):
            value = (len(judge) + i) / 20 - 0.0123
            of = figures(n, accuracy=value, consistency=value / 3, unparsed=value / 7)
            judges[judge]["benchmarks"][name] = of | {
                "title": name,
                "partial": i == 1,
                "score": {"value": value / 2, "ci95": None, "partial": False},
            }
    (run / "report.json").write_text(json.dumps({"judges": judges}))
    return run


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


# ---- What it says ----


def test_the_card_states_the_figures_of_the_report_as_a_reader_sees_them(tmp_path):
    run = evaluated_run(tmp_path / "run")
    shown = section(render_card(run), "Figures")
    judges = json.loads((run / "report.json").read_text())["judges"]
    rows = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[0:3] for row in rows] == [
        ["| chat", "311", "base"], ["| chat", "311", "trained"],
        ["| evil\\|&lt;b&gt;", "42", "base"], ["| evil\\|&lt;b&gt;", "42", "trained"],
    ]  # fmt: skip
    for row, (judge, name) in zip(
        rows, [(j, n) for n in ("chat", "evil|<b>") for j in ("base", "trained")], strict=True
    ):
        of = judges[judge]["benchmarks"][name]
        for figure in ("accuracy", "consistency", "unparsed"):
            assert f"{percent(of[figure])} ({percent_interval(of[f'{figure}_ci95'])})" in row, (figure, row)
        assert percent(of["score"]["value"]) in row and ("partial" in row) == of["partial"]
    assert "gpt-4o" not in shown and "d" * 64 in shown


def test_figures_of_another_model_are_not_this_models(tmp_path):
    """Judgments of a model that was deleted and trained anew, say: only what was made by these weights counts."""
    run = evaluated_run(tmp_path / "run")
    other = entry(run, "model") | {"files": {"config.json": "0" * 64}}
    made(run, "judgments_trained.jsonl", [other], "5" * 64)
    assert "not evaluated yet" in section(render_card(run), "Figures")


def test_without_report_attacks_or_audit_the_card_says_so(tmp_path):
    text = render_card(trained_run(tmp_path / "run"))
    assert "This model is not evaluated yet." in section(text, "Figures")
    assert "has not been measured" in section(text, "Limits")
    assert section(text, "Audit").strip() == "Not audited."


def test_the_card_says_how_the_model_was_trained(tmp_path):
    """Base, data, pairs, steps, commit, versions, hardware, hours, and every setting, as a file that TOML reads."""
    text = section(render_card(evaluated_run(tmp_path / "run")), "How it was trained")
    for said in (
        f"| base model | Qwen/Qwen2-7B-Instruct, revision `f2826a00`, sha256 `{'b' * 64}` |",
        "| preference data | Skywork/Skywork-Reward-Preference-80K-v0.1, split train, revision `5f5e5c8` |",
        "| pairs trained on | 2952 |", "| pairs held out | 48 |", "| pairs left out, over 6400 tokens | 5 |",
        "| optimizer steps | 123 |", f"| conj, commit | `{'c' * 40}` |", "| torch | 2.13.0 |", "| vllm | 0.32.0 |",
        "| dpo | 123 | 2.0 h | NVIDIA H100 80GB HBM3, ranks: 8, threads each: 4 |", "| repeated | 9 | 2.5 h | – |",
        "| evaluate, trained | 9 | 5 s | – |",
    ):  # fmt: skip
        assert said in text, said
    assert "left-pad" not in text
    settings = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    assert settings["dpo"] == {"beta": 0.25, "max_length": 6400} and settings["preprocess"] == {"seed": 7}
    assert settings["repeated"] == {"max_new_tokens": 300} and settings["pairs"] == {"pair_types": ["repeated"]}


def test_the_card_says_whose_judgments_trained_the_model(tmp_path):
    """The base's own, or those of another model, here or behind an endpoint: `[repeated]` and `[hinted]` may differ."""
    run = trained_run(tmp_path / "run")
    assert "The base model judged\npreference pairs many times" in render_card(run)
    prompts = entry(run, "prompts.jsonl")
    made(run, "repeated.jsonl", [prompts, {"path": "endpoint model large|<b>", "sha256": None}], "2" * 64)
    made(run, "hinted.jsonl", [prompts, {"path": "cache/other", "sha256": "a" * 64}], "6" * 64)
    given = [entry(run, "repeated.jsonl"), entry(run, "hinted.jsonl")]
    made(run, "pairs.jsonl", given, "3" * 64)
    text = render_card(run)
    assert "large\\|&lt;b&gt;, behind an endpoint, and other judged\npreference" in text
    assert "The base model judged" not in text


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    text = render_card(trained_run(tmp_path / "run"))
    data = ModelCard(text).data.to_dict()
    assert data == head(text)
    assert data["base_model"] == "Qwen/Qwen2-7B-Instruct" and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["datasets"] == ["Skywork/Skywork-Reward-Preference-80K-v0.1"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"


def test_a_local_base_without_a_licence_is_said_to_have_none(tmp_path):
    local = {"path": "somewhere/secret/base", "sha256": "b" * 64}
    run = trained_run(tmp_path / "run", base_card={})
    manifest = read_manifest(run / "model")
    write_sealed(manifest_path(run / "model"), manifest | {"inputs": [*manifest["inputs"][:-1], local]})
    text = render_card(run)
    assert "Licence: none is stated here" in text and "license" not in head(text)
    assert "base_model" not in head(text) and "| base model | base, " in text
    assert "secret" not in text and str(tmp_path) not in text


BASE_CARDS = {
    "license": ("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n# x\n",
                {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}),
    "languages": ("---\r\nlicense: mit\r\nlanguage:\r\n- en\r\n- zh\r\n---\r\n", {"license": "mit", "language": ["en", "zh"]}),
    "one language": ("---\nlanguage: zh\n---\n", {"language": ["zh"]}),
    "norway": ("---\nlanguage: [no, en]\nlicense: [mit]\n---\n", {"language": ["en"]}),
    "none": ("# A model\n\n---\nlicense: mit\n---\n", {}),
    "malformed": ("---\nlicense: [\n---\n", {}),
    "not a mapping": ("---\n- license\n---\n", {}),
    "deep": ("---\na: " + "[" * 9000 + "\n---\n", {}),
    "no text": (b"---\nlicense: \xff\n---\n", {}),
}  # fmt: skip


@pytest.mark.parametrize("what", BASE_CARDS)
def test_the_licence_is_read_from_the_bases_card_or_not_at_all(what, tmp_path):
    """A card is for people; what cannot be read in it ends no training."""
    content, expected = BASE_CARDS[what]
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_base_card(tmp_path) == expected
    assert read_base_card(tmp_path / "nowhere") == {}


def test_a_licence_beside_the_base_is_linked_on_the_hub():
    base = {"name": "a/b", "repo": "a/b", "stated": {"license": "other", "license_link": "LICENSE"}}
    assert front_matter({}, base)["license_link"] == "https://huggingface.co/a/b/blob/main/LICENSE"
    assert "license_link" not in front_matter({}, base | {"repo": None})
    elsewhere = {"license": "other", "license_link": "https://example.org/licence"}
    assert front_matter({}, base | {"stated": elsewhere})["license_link"] == "https://example.org/licence"


def test_attacks_and_audit_are_shown_where_they_are_of_this_model(tmp_path):
    run = trained_run(tmp_path / "run")
    (run / "attacks.json").write_text(
        json.dumps({"n": 40, "attacks": {"null_empty": figures(40, flip_rate=0.125) | {"attacked": 31}}})
    )
    sha256 = read_manifest(run / "model")["sha256"]
    checks = [("model", "holds"), (f"{tmp_path}/other/pairs.jsonl", "unchecked"), ("metrics.jsonl", "BROKEN")]
    checks = [{"name": name, "outcome": outcome, "found": "…"} for name, outcome in checks]
    for of, is_shown in ((sha256, True), ("0" * 64, False)):
        other = {} if is_shown else {"files": {"config.json": of}}
        made(run, "attacks.jsonl", [entry(run, "model") | other], "6" * 64)
        (run / "audit.json").write_text(
            json.dumps({"model": of, "made": "2026-01-02T03:04:05+00:00", "checks": checks})
        )
        text = render_card(run)
        assert ("| null_empty | 31 | 12.5 % (6.2 – 12.5) |" in text) == is_shown
        audit = section(text, "Audit")
        assert (
            "on 2026-01-02T03:04:05+00:00: **broken**" in audit and "| unchecked | other/pairs.jsonl |" in audit
        ) == is_shown
        assert is_shown or audit.strip() == "Not audited."
    assert str(tmp_path) not in render_card(run)


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(tmp_path):
    run = evaluated_run(tmp_path / "run")
    text = render_card(run)
    assert render_card(run) == text == render_card(Path(shutil.copytree(run, tmp_path / "deep" / "elsewhere")))


def test_a_run_that_builds_on_another_says_what_that_was_made_of(tmp_path):
    """Only training took place here; prompts and pairs stand in the run that `--from` named."""
    first = trained_run(tmp_path / "first")
    run = trained_run(tmp_path / "second")
    for name in ("prompts.jsonl", "repeated.jsonl", "pairs.jsonl"):
        manifest_path(run / name).unlink()
    inputs = [
        {"path": f"gone/first/{Path(e['path']).name}", "sha256": e["sha256"]}
        for e in read_manifest(run / "model")["inputs"][:2]
    ]
    made(
        run, "model", [*inputs, BASE], **{k: read_manifest(run / "model")[k] for k in ("options", "counts", "num_rows")}
    )
    text = render_card(run)
    assert "Skywork/Skywork-Reward-Preference-80K-v0.1, split train" in text and "Not recorded" not in text
    write_card(run)
    manifest_path(first / "pairs.jsonl").unlink()
    assert "stand in another run: pairs.jsonl" in render_card(run)
    assert check_card(run)[0].outcome == "unchecked"


def test_unfinished_training_has_no_card(tmp_path):
    run = trained_run(tmp_path / "run", complete=False)
    with pytest.raises(InputError, match="training is not complete"):
        render_card(run)
    write_card(run)
    assert not (run / CARD).exists()


def test_a_model_that_was_taken_from_another_run_is_left_alone(tmp_path):
    run = trained_run(tmp_path / "run", taken_from="../other")
    write_card(run)
    assert not (run / CARD).exists() and check_card(run) == []


# ---- The model's hash, and the audit ----


def test_the_card_is_no_part_of_the_models_hash(tmp_path):
    """It is written anew with each report. Any other file counts, and so does a README of a folder of data."""
    run = trained_run(tmp_path / "run")
    before = hash_input(run / "model")
    write_card(run)
    assert hash_input(run / "model") == before == read_manifest(run / "model")["sha256"]
    for name in ("model/sub/README.md", "model/readme.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
        assert hash_input(run / "model") != before
        (run / name).unlink()
    (run / "model" / "config.json").unlink()
    before = hash_input(run / "model")
    (run / CARD).write_text("another")
    assert hash_input(run / "model") != before


def test_an_edited_figure_is_found_and_named_by_the_audit(tmp_path):
    run = evaluated_run(tmp_path / "run")
    assert check_card(run)[0].outcome == "unchecked"  # there is none yet
    write_card(run)
    assert check_card(run)[0].outcome == "holds"
    text = (run / CARD).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| chat | 311 | trained"))
    figure = re.search(r"[\d.]+ %", line)[0]
    (run / CARD).write_text(text.replace(line, line.replace(figure, "99.9 %")))
    [check] = check_card(run)
    number = text.splitlines().index(line) + 1
    assert (
        check.name == CARD
        and check.outcome == "BROKEN"
        and f"line {number}: expected '| chat | 311 | trained" in check.found
    )
    write_card(run)
    assert check_card(run)[0].outcome == "holds"


def test_a_card_with_the_audits_result_and_one_from_before_both_hold(tmp_path):
    run = trained_run(tmp_path / "run")
    write_card(run)
    before = (run / CARD).read_bytes()
    checks = [{"name": "model", "outcome": "holds", "found": ""}]
    (run / "audit.json").write_text(json.dumps({"model": read_manifest(run / "model")["sha256"], "checks": checks}))
    assert check_card(run)[0].outcome == "holds"
    write_card(run)
    assert (run / CARD).read_bytes() != before and check_card(run)[0].outcome == "holds"
    (run / "audit.json").unlink()  # the card says that there was one
    assert check_card(run)[0].outcome == "BROKEN"


@pytest.mark.parametrize("name", ["report.json", "audit.json", "attacks.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"judges": 1, "checks": 1, "n": 1}', "[" * 100_000])
def test_a_file_that_cannot_be_read_is_one_line(name, content, tmp_path):
    run = evaluated_run(tmp_path / "run")
    made(run, "attacks.jsonl", [entry(run, "model")], "6" * 64)
    (run / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: "):
        render_card(run)
    assert [check.outcome for check in check_card(run)] == ["unchecked"]


def test_an_audit_without_names_is_one_line(tmp_path):
    run = trained_run(tmp_path / "run")
    for check in (1, {}, {"name": 1, "outcome": "holds"}, {"name": "model", "outcome": "fine"}):
        (run / "audit.json").write_text(
            json.dumps({"model": read_manifest(run / "model")["sha256"], "checks": [check]})
        )
        with pytest.raises(InputError, match="expected checks with name and outcome"):
            render_card(run)


# ---- The snippets ----


def test_the_snippets_ask_what_every_stage_asks(tmp_path):
    """Their messages, taken from the code as it stands there, are those of `judge_prompt`, to the byte."""
    for code in snippets(render_card(trained_run(tmp_path / "run"))):
        names = {}
        exec(code[code.index("question =") : code.index("]\n", code.index("messages")) + 2], names)
        assert names["messages"] == judge_messages(names["question"], names["answer_1"], names["answer_2"])
        assert "300" in code  # as long as it was sampled


PATTERN = (
    "user = 'Q {question}. A {answer_1} B {answer_2}'\nverdict_pattern = 'better:\\s*(A|\"B\"|neither)'\n"
    "verdicts = { A = 1, '\"B\"' = 2, neither = 0 }\njudgment = '{reason} better: {verdict}'"
)


@pytest.mark.parametrize("name", ["con-j", "english", "english-thinking", "pattern"])
def test_the_snippets_ask_and_read_as_the_folders_judge(name, tmp_path, capsys):
    """A card with the card's prompt beside a model of another one would have it judge what it was not trained on."""
    (tmp_path / "pattern.toml").write_text(PATTERN)
    judge = load_judge(name if name != "pattern" else str(tmp_path / "pattern.toml"))
    run = trained_run(tmp_path / "run")
    (run / "model" / "judge.toml").write_text(judge_file(judge))
    page = render_card(run)
    assert ("Decoding is greedy" in page) == (judge.temperature == 0) == ("do_sample=False" in page)
    assert ("temperature=0.6, top_p=0.95, top_k=20, max_tokens=" in page) == (name == "english-thinking")
    for code in snippets(page):
        names = {}
        exec(code[code.index("question =") : code.index("]\n", code.index("messages")) + 2], names)
        assert names["messages"] == judge_prompt(judge, names["question"], names["answer_1"], names["answer_2"])
        draft, given = judgment_text(judge, "draft", 1), judgment_text(judge, "r", 2)
        stated = 'verdict: "B"' if name == "pattern" else "better answer: 2"
        for text, expected in (
            (f"<think>{draft}</think>\n{given}", stated),
            ("<think>on and on", ": none; the judgment"),
        ):
            reading = textwrap.dedent(code[code.index("print(text)") - 4 * ("    print(text)" in code) :])
            exec(code.partition("\n")[0] + "\n" + reading, {"text": text})
            assert expected in capsys.readouterr().out.splitlines()[-1]


def test_the_snippets_load_the_repository_after_a_push(tmp_path):
    run = trained_run(tmp_path / "run")
    assert all('\nfolder = "."\n' in code for code in snippets(render_card(run)))
    assert all('\nfolder = "me/my-judge"\n' in code for code in snippets(render_card(run, name="me/my-judge")))
    of_branch, by_vllm = snippets(render_card(run, name="me/my-judge", revision="beta"))
    assert of_branch.count('from_pretrained(folder, revision="beta"') == 2
    assert 'LLM(model=folder, revision="beta", tokenizer_revision="beta")' in by_vllm


# ---- The hub ----


def push(
    run: Path, hub, tmp_path: Path, *arguments: str, repo_id: str = "me/my-judge", **changes
) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "conj", "push", "--run-dir", str(run), "--repo-id", repo_id, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=hub.env(tmp_path / "home", **changes), timeout=120)


@pytest.mark.parametrize("large", [(), (".safetensors",)])
def test_a_push_is_one_commit_of_the_model_and_its_card(large, tmp_path):
    run = evaluated_run(tmp_path / "run")
    write_card(run)
    (run / "model" / ".hidden").write_text("x")
    with fake_hub(large) as hub:
        done = push(run, hub, tmp_path, "--private")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.url}/me/my-judge: ") and hub.commits == ["main"]
        assert json.loads(hub.requests[0][1])["visibility"] == "private"
        files = hub.files["me/my-judge"]["main"]
        assert files == {
            ".gitattributes": b"", "config.json": b"{}", "LICENSE.txt": b"of the base", "model.safetensors": b"weights",
            "README.md": render_card(run, name="me/my-judge").encode(),
        }  # fmt: skip
        assert bool(hub.blobs) == bool(large)


def test_a_second_push_to_a_branch_takes_away_weights_that_are_no_more(tmp_path):
    run = trained_run(tmp_path / "run")
    with fake_hub() as hub:
        old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
        hub.files["me/my-judge"] = {"main": dict(old)}
        done = push(run, hub, tmp_path, "--revision", "beta")
        assert done.returncode == 0, done.stderr
        assert hub.files["me/my-judge"]["main"] == old and hub.commits == ["beta"]
        assert (
            hub.files["me/my-judge"]["beta"]["README.md"]
            == render_card(run, name="me/my-judge", revision="beta").encode()
        )
        assert set(hub.files["me/my-judge"]["beta"]) == {
            "notes.md",
            "README.md",
            "LICENSE.txt",
            "config.json",
            "model.safetensors",
        }


def test_what_cannot_be_pushed_is_one_line(tmp_path):
    run = trained_run(tmp_path / "run")
    with fake_hub() as hub:
        assert_one_line_error(push(run, hub, tmp_path, token=None), "me/my-judge: not logged in", "hf auth login")
        assert_one_line_error(push(run, hub, tmp_path, token="hf_wrong"), "not logged in")
        assert_one_line_error(push(run, hub, tmp_path, token="hf_reader"), "no right to write there")
        assert_one_line_error(push(run, hub, tmp_path, repo_id="a/b/c"), "--repo-id: expected USER/NAME, found 'a/b/c'")
        assert_one_line_error(push(tmp_path / "nowhere", hub, tmp_path), "nowhere: no such run folder")
        (run / "model" / "model.safetensors").write_bytes(b"Weights")
        assert_one_line_error(push(run, hub, tmp_path), "was changed after training")
        unfinished = trained_run(tmp_path / "unfinished", complete=False)
        assert_one_line_error(push(unfinished, hub, tmp_path), "training is not complete")
        taken = trained_run(tmp_path / "taken", taken_from="../other")
        assert_one_line_error(push(taken, hub, tmp_path), "lies in another run; give --run-dir")
        assert not hub.commits
    assert_one_line_error(push(trained_run(tmp_path / "again"), hub, tmp_path), "the hub cannot be used")
