"""Closed generation: a sampling file cut anywhere ends as the undisturbed one, and a sample depends on its name alone.

The engine is faked except where marked; what it writes holds what could be taken for the end of a line."""

import importlib.util
import json
import os
import random
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, judge_messages, judgment_text, make_run
from fake_engine import use_fake_engine

from conj import InputError
from conj.data.files import dump_line, read_jsonl, write_jsonl
from conj.data.preprocess import load_prompts
from conj.model.folder import check_model
from conj.sample import stage
from conj.sample.engines import vllm as engine
from conj.sample.engines.completion import Decoding, Request, request_seed
from conj.sample.engines.vllm import EngineOptions, generate, running_engine
from conj.sample.evaluation.evaluate import EvaluateOptions, evaluate
from conj.sample.hinted import HintedOptions, sample_hinted
from conj.sample.repeated import RepeatedOptions, sample_repeated

STAGES = ("repeated", "hinted", "judgments_base")


def write(prompt: str) -> str:
    """A judgment that only this prompt gets, with characters of one to four bytes and line ends of all kinds."""
    return judgment_text(f'因\u2028\x85\r\n"\U0001f600{zlib.crc32(prompt.encode())}', 1 + len(prompt) % 2)


def run_stage(name: str, run: Path, model: Path, **options) -> None:
    if name == "repeated":
        sample_repeated(RepeatedOptions(run_dir=run, model=model, **{"num_samples": 2} | options))
    elif name == "hinted":
        sample_hinted(HintedOptions(run_dir=run, model=model, **options))
    else:
        data = (str(run / "prompts.jsonl"),)
        evaluate(EvaluateOptions(run_dir=run, model=model, data=data, num_resamples=10, **options))


@pytest.fixture
def recorded(monkeypatch) -> list[tuple]:
    """The arguments of every call of append_samples; the engine is faked."""
    calls, append = [], stage.append_samples

    def record(*arguments):
        calls.append(arguments)
        return append(*arguments)

    monkeypatch.setattr(stage, "append_samples", record)
    use_fake_engine(monkeypatch, write)
    return calls


@pytest.fixture(params=STAGES)
def finished(request, recorded, tied_model, tmp_path) -> tuple[Path, bytes, tuple]:
    """The file of a stage, its bytes, and the arguments of append_samples that made it."""
    artefact = make_run(tmp_path, 2) / f"{request.param}.jsonl"
    run_stage(request.param, tmp_path, tied_model)
    return artefact, artefact.read_bytes(), recorded[0]


# ---- Files ----


class Killed(Exception):
    pass


def write_one(monkeypatch) -> list[Request]:
    """An engine that dies after one judgment; what it was asked for."""
    asked = use_fake_engine(monkeypatch, lambda prompt: write(prompt) if len(asked) == 1 else die())

    def die():
        raise Killed

    return asked


def test_a_file_cut_at_every_byte_and_killed_again_ends_as_the_undisturbed_one(finished, monkeypatch):
    """A row lost, made twice, glued to a torn one or out of order would show in the bytes; a row asked for again, or
    left out, in the requests. Rows stand, as a killed run leaves them, in the order in which they finished."""
    artefact, whole, arguments = finished
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it only matters to a power cut, and takes the time
    rows = whole.splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    killed, task = b"".join(rows), arguments[1]
    names = {(row["id"], *key.values()) for row in task.prompts() for key in task.keys}
    assert killed != whole and len(rows) == len(names) == 4
    for length in range(len(killed) + 1):
        artefact.write_bytes(killed[:length])
        made = killed[:length].count(b"\n")
        if made < 3:
            write_one(monkeypatch)
            with pytest.raises(Killed):
                stage.append_samples(*arguments)
            made += 1
        lines = map(json.loads, artefact.read_bytes().split(b"\n")[:-1])
        there = {tuple(row.values())[: 1 + len(task.keys[0])] for row in lines}
        asked = use_fake_engine(monkeypatch, write)
        stage.append_samples(*arguments)
        assert artefact.read_bytes() == whole, length
        again = [tuple(request.key.values()) for request in asked]
        assert len(there) == made and sorted(again) == sorted(names - there), length


def test_rows_in_another_order_are_kept_and_put_in_order(finished, monkeypatch):
    """Else a resumed run would leave another file than an undisturbed one."""
    artefact, whole, arguments = finished
    artefact.write_bytes(b"".join(whole.splitlines(keepends=True)[::-1]))
    asked = use_fake_engine(monkeypatch, write)
    stage.append_samples(*arguments)
    assert artefact.read_bytes() == whole and not asked


DAMAGE = {  # what stands in the third line instead of row c; the first two are a and b
    "a twice": (lambda a, c: a, "for the second time"),
    "a twice, with another text": (lambda a, c: a | {"text": "another"}, "for the second time"),
    "unknown id": (lambda a, c: c | {"id": "p7"}, "id 'p7'.* is no judgment that was asked for"),
    "id of another kind": (lambda a, c: c | {"id": ["p1"]}, "is no judgment that was asked for"),
    "true for 1": (
        lambda a, c: c | {k: c[k] == 1 for k in ("index", "order") if k in c}, "is no judgment that was asked for",
    ),
    "a column less": (lambda a, c: without(c, "rung"), "missing column rung"),
    "no outcome": (lambda a, c: without(c, "choice" if "choice" in c else "verdict"), "missing column (choice|verdict)"),
}  # fmt: skip


def without(row: dict, column: str) -> dict:
    return {k: v for k, v in row.items() if k != column}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_row_twice_or_of_no_request_is_refused_by_its_line(finished, damage):
    """Taken in or dropped without a word, it would hide that two runs wrote to one file, or that a row was lost. The
    file stays as it is, and goes on once the line is deleted."""
    (artefact, whole, arguments), (change, message) = finished, DAMAGE[damage]
    a, b, c, _ = read_jsonl(artefact)
    write_jsonl(artefact, [a, b, change(a, c)])
    damaged = artefact.read_bytes()
    with pytest.raises(InputError, match=f"{artefact.name}:3: .*{message}"):
        stage.append_samples(*arguments)
    assert artefact.read_bytes() == damaged
    artefact.write_bytes(b"".join(damaged.splitlines(keepends=True)[:2]))
    stage.append_samples(*arguments)
    assert artefact.read_bytes() == whole


def test_a_line_damaged_inside_the_file_is_refused_by_its_line(finished):
    """Only a torn end is a kill's; taken for one, the rows after it would be lost."""
    artefact, whole, arguments = finished
    first, second, rest = whole.split(b"\n", 2)
    artefact.write_bytes(b"\n".join([first, second[:-5], rest]))
    with pytest.raises(InputError, match=f"{artefact.name}:2: expected a JSON object"):
        stage.append_samples(*arguments)


# ---- Seeds ----


def test_a_seed_depends_on_the_runs_seed_and_the_rows_key_alone(recorded, tied_model, tmp_path, monkeypatch):
    """A seed from the position would change with the order of the prompts, with n, with what was made before a kill;
    one without the kind would be that of a repeated and a hinted judgment alike."""

    generated, made = engine.generate, {}  # the seed of every request, by its row's key

    def generate(live, requests, model, decoding):
        for request, completion in generated(live, requests, model, decoding):
            made[dump_line(request.key)] = request_seed(decoding.seed, request.key)
            yield request, completion

    monkeypatch.setattr(engine, "generate", generate)

    def seeds(folder: str, num_prompts: int = 3, **options) -> dict[str, int]:
        made.clear()
        run = make_run(tmp_path / folder, num_prompts)
        write_jsonl(run / "prompts.jsonl", read_jsonl(run / "prompts.jsonl")[:: options.pop("step", 1)])
        for name in STAGES[:2]:
            run_stage(name, run, tied_model, **options if name == "repeated" else {"seed": options.get("seed", 2021)})
        return dict(made)

    plain = seeds("plain")
    kinds = [json.loads(key)["kind"] for key in plain]
    assert [kinds.count(kind) for kind in ("repeated", "hint", "hint_reversed")] == [6, 3, 3]
    assert len(set(plain.values())) == len(plain) == 12
    reordered = seeds("other", num_prompts=5, step=-1, num_samples=4)
    assert len(reordered) == 30 and plain.items() <= reordered.items()
    assert not set(seeds("seed", seed=7).values()) & set(plain.values())


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (scripts/setup.sh)")
def test_a_real_judgment_is_the_same_alone_in_a_large_batch_and_in_another_order():
    """The shipped judge on its own questions, greedy and sampled: a resumed run, which asks for what is left in other
    company, would else write other judgments. Another seed writes others: it does sample."""
    folder = ROOT / "demo" / "base"
    model = check_model(folder, None)
    prompts, _ = load_prompts([str(ROOT / "demo" / "test.jsonl")], limit=48)
    requests = [
        Request(key={"id": row["id"], "kind": "repeated", "index": index}, prompt_ids=ids)
        for row in prompts
        for ids in [model.tokenizer.prompt_ids(judge_messages(row["question"], row["answer_1"], row["answer_2"]))]
        for index in range(2)
    ]
    shuffled = random.Random(0).sample(requests, len(requests))
    warm = {"temperature": 1.2, "top_p": 0.95, "top_k": 50}

    with running_engine(model, EngineOptions(model=folder, max_num_seqs=64)) as live:

        def sample(asked: list[Request], **decoding) -> dict[tuple, list[int]]:
            completions = generate(live, asked, model, Decoding(max_new_tokens=64, **decoding))
            return {tuple(request.key.values()): completion.token_ids for request, completion in completions}

        for decoding in {}, warm:
            together = sample(requests, **decoding)
            assert len(together) == 96
            assert sample(shuffled, **decoding) == together
            left = sample(shuffled[:37], **decoding)  # what a kill left
            alone = {key: ids for request in requests[:8] for key, ids in sample([request], **decoding).items()}
            assert left.items() <= together.items() and alone.items() <= together.items()
        first, second = ({id: ids for (id, _, i), ids in together.items() if i == index} for index in (0, 1))
        assert sum(first[id] != second[id] for id in first) > 24
        assert sample(requests, **warm, seed=1) != together
