"""Judgments over HTTP: nothing lost, nothing twice, whatever the server does. The server is faked except where marked."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, judge_messages, judgment_text, make_run

from conj import InputError
from conj.data.files import read_jsonl
from conj.data.judges import load_judge
from conj.data.manifest import read_manifest
from conj.data.preprocess import PreprocessOptions, load_prompts, preprocess
from conj.data.verdicts import parse_strict
from conj.model.folder import check_model
from conj.sample.engines.completion import Completion, Decoding, Request
from conj.sample.engines.fleet import FleetOptions, complete_by_engines
from conj.sample.engines.http import EXTRA, EndpointOptions, complete_by_http
from conj.sample.engines.vllm import ENVIRONMENT
from conj.sample.hinted import HintedOptions, sample_hinted
from conj.sample.repeated import RepeatedOptions, sample_repeated
from conj.sample.rows import outcomes
from conj.sample.stage import Task, append_samples, object_form

JUDGE = load_judge("gpt-4o")
DECODING = Decoding(max_new_tokens=7, seed=3)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")


class Server(ThreadingHTTPServer):
    """Answers as `behave(number of the request, its body)` says: a status with headers, and what more an error says, or the
    text of an answer, or None: drop the connection. Counts what it was sent, and what it answered with 200."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, behave: Callable[[int, dict], tuple[int, dict] | None], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.bodies, self.keys, self.times = behave, [], [], []
        self.answered, self.lock = Counter(), threading.Lock()
        threading.Thread(target=functools.partial(self.serve_forever, 0.02), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_) -> None:
        pass  # connections that tests cut

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
        behaviour = server.behave(number, body)
        if behaviour is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, headers, *more = behaviour
        if status == 200:
            content = plain_answer(*more) if more else answer(body)
        else:
            content = {"error": {"message": f"status {status}"} | dict(*more)}
        data = json.dumps(content).encode()
        if status == 200:
            with server.lock:
                server.answered[body["messages"][-1]["content"]] += 1
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


def plain_answer(text) -> dict | str:
    """A completion with this text; what is no text is the whole answer."""
    if not isinstance(text, str):
        return text[0]
    return completion(text, 100, 10, finish_reason="stop")


def completion(text: str, read: int, written: int, **more) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, **more}
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def answer(body: dict) -> dict:
    """A judgment that only this prompt gets; tokens are words, and one is a word with its digit."""
    number = int(body["messages"][-1]["content"].rpartition("回答2：")[2])
    text = judgment_text(f"理由{number}", 1 + number % 2)
    tokens = [text[:-2], text[-2:]]
    shares = {tokens[1]: 0.75, f"{2 - number % 2}}}": 0.25}
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in shares.items()]
    listed = {"logprob": math.log(0.75), "top_logprobs": top}
    logprobs = {"content": [{"token": token, "bytes": list(token.encode()), **listed} for token in tokens]}
    return completion(
        text, 100 + number, number, finish_reason="length" if number == 2 else "stop",
        logprobs=logprobs if body.get("logprobs") else None,
    )  # fmt: skip


@contextlib.contextmanager
def serving(behave: Callable[[int, dict], tuple[int, dict] | None], port: int = 0) -> Iterator[Server]:
    server = Server(behave, port)
    try:
        yield server
    finally:
        server.stop()


def well(number: int, body: dict) -> tuple[int, dict]:
    return 200, {}


def make_requests(count: int = 12) -> list[Request]:
    asked = [judge_messages("q", "a", str(i)) for i in range(count)]
    return [Request(key={"id": f"p{i}", "order": 1}, prompt_ids=[], messages=m) for i, m in enumerate(asked)]


def row_of(request: Request, completion: Completion) -> dict:
    verdict = parse_strict(completion.text)
    return {"text": completion.text, "verdict": verdict.value, "rung": verdict.rung}


def task_of(requests: list[Request], judge: Callable = row_of, labels: dict[str, int] | None = None) -> Task:
    """Of requests that differ in their id alone, or that every prompt has the same of."""
    by_id = {id: list(group) for id, group in itertools.groupby(requests, lambda request: request.key["id"])}
    prompts = [{"id": id, "label": (labels or {}).get(id, 1)} for id in by_id]
    keys = [{name: value for name, value in r.key.items() if name != "id"} for r in next(iter(by_id.values()))]
    return Task(prompts=lambda: prompts, keys=keys, make_requests=lambda row: by_id[row["id"]], judge=judge)


def judge_all(file: Path, url: str, requests: list[Request], decoding: Decoding = DECODING, **options) -> list[dict]:
    options = EndpointOptions(base_url=url, **{"max_concurrency": 4, "request_timeout": 20.0} | options)
    complete = functools.partial(complete_by_http, model=JUDGE.model, options=options, decoding=decoding)
    append_samples(file, task_of(requests), complete, None, decoding)
    return read_jsonl(file)


@pytest.fixture(autouse=True)
def own_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def undisturbed(tmp_path) -> bytes:
    with serving(well) as server:
        judge_all(tmp_path / "undisturbed.jsonl", server.url, make_requests())
    return (tmp_path / "undisturbed.jsonl").read_bytes()


def test_what_is_asked_and_what_is_kept(tmp_path):
    """The prompt, the decoding and the key go out; text, reason to stop and counts come back, and make the price."""
    requests = make_requests(4)
    with serving(well) as server:
        rows = judge_all(tmp_path / "rows.jsonl", server.url, requests)
        body = min(server.bodies, key=lambda body: body["messages"][-1]["content"])
        assert body == {
            "model": "gpt-4o", "messages": requests[0].messages, "max_tokens": 7, "temperature": 0.0, "top_p": 1.0,
            "seed": body["seed"],
        }  # fmt: skip
        assert len({body["seed"] for body in server.bodies}) == 4
        assert set(server.keys) == {"Bearer secret"}
    assert rows == read_jsonl(tmp_path / "rows.jsonl")
    assert [row["verdict"] for row in rows] == [1, 2, 1, 2]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "length", "stop"]
    assert rows[3].keys() == {
        "id", "order", "text", "verdict", "rung", "finish_reason", "prompt_tokens", "completion_tokens",
    }  # fmt: skip
    prompt_tokens, written = (sum(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens"))
    assert (prompt_tokens, written) == (406, 6)
    assert JUDGE.dollars(prompt_tokens, written) == pytest.approx((406 * 2.5 + 6 * 10) / 1e6)


def test_the_probability_comes_from_the_servers_logprobs(tmp_path):
    """Verdict 1 with .75: the first answer is better with .75; verdict 2 with .75: with .25."""
    decoding = Decoding(max_new_tokens=7, verdict_probability=True, verdict_place=JUDGE.verdict_place)
    with serving(well) as server:
        rows = judge_all(tmp_path / "rows.jsonl", server.url, make_requests(2), decoding)
        assert all((body["logprobs"], body["top_logprobs"]) == (True, 20) for body in server.bodies)
    assert [row["p_first"] for row in rows] == [pytest.approx(0.75), pytest.approx(0.25)]


def test_a_server_that_fails_in_every_way_costs_nothing_but_time(tmp_path, undisturbed):
    """Lost: a row is missing. Twice: a row, or an answer that was paid for, is there again."""
    rng, faults = random.Random(0), [(429, {"Retry-After": "0.1"}), (500, {}), (503, {}), (408, {}), (409, {}), None]

    def fail_often(number: int, body: dict) -> tuple[int, dict] | None:
        return faults[number] if number < len(faults) else rng.choice([(200, {}), (200, {}), faults[0], None])

    with serving(fail_often) as server:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests())
        assert len(server.bodies) > 12 and set(server.answered.values()) == {1} and len(server.answered) == 12
    assert (tmp_path / "rows.jsonl").read_bytes() == undisturbed


def test_a_server_that_asks_to_wait_is_waited_for(tmp_path):
    """Asked again too soon, an endpoint locks its user out."""
    with serving(lambda number, body: (429, {"Retry-After": "1.5"}) if number == 0 else (200, {})) as server:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(1))
        assert server.times[1] - server.times[0] >= 1.5


def test_a_server_that_dies_and_comes_back_is_waited_for(tmp_path, undisturbed):
    """Its port refuses connections meanwhile. What was answered before is not asked again."""
    first = Server(lambda number, body: (200, {}) if number < 5 else None)
    back = []

    def restart() -> None:
        while first.answered.total() < 5:
            time.sleep(0.01)
        first.stop()
        time.sleep(1.5)
        back.append(Server(well, first.server_port))

    threading.Thread(target=restart, daemon=True).start()
    judge_all(tmp_path / "rows.jsonl", first.url, make_requests())
    back[0].stop()
    assert (tmp_path / "rows.jsonl").read_bytes() == undisturbed
    assert first.answered.total() == 5 and back[0].answered.total() == 7
    assert not first.answered.keys() & back[0].answered.keys()


def test_when_retries_are_used_up_the_same_command_goes_on(tmp_path, undisturbed):
    """A night's run must not be lost to an outage that is longer than patience."""
    file, requests = tmp_path / "rows.jsonl", make_requests()
    with serving(lambda number, body: (200, {}) if number < 5 else (503, {})) as server:
        outage = "no answer after 1 retries: .*503.*; 5 of the 12 judgments .* goes on"
        with pytest.raises(InputError, match=outage) as e:
            judge_all(file, server.url, requests, max_retries=1)
        assert "\n" not in str(e.value)
        kept = {row["id"] for row in read_jsonl(file)}
        assert len(kept) == 5
    with serving(well) as server:
        judge_all(file, server.url, requests)
        assert server.answered.total() == 7
    assert file.read_bytes() == undisturbed


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refused_request_ends_the_run_at_once(status, tmp_path):
    """A wrong key or model name is not cured by waiting; what was answered before stays."""
    with serving(lambda number, body: (200 if number < 2 else status, {})) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match=f"gpt-4o at {server.url}, id 'p2', order 1: refused: .*{status}"):
            judge_all(tmp_path / "rows.jsonl", server.url, make_requests(), max_concurrency=1)
        assert time.monotonic() - began < 5 and len(server.bodies) == 3
    assert len(read_jsonl(tmp_path / "rows.jsonl")) == 2


@pytest.mark.parametrize(("error", "reason"), [
    ({"code": "context_length_exceeded"}, "context_length"),
    ({"message": "This model's maximum context length is 8192 tokens", "code": 400}, "context_length"),
    ({"code": "content_filter"}, "content_filter"),
])  # fmt: skip
def test_a_prompt_that_the_server_will_not_judge_is_a_judgment_without_a_verdict(error, reason, tmp_path):
    """Too long, or stopped by a filter: every rerun would end at this one prompt, and the other ones never be asked."""
    with serving(lambda number, body: (400, {}, error) if number == 2 else (200, {})) as server:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(), max_concurrency=1)
        assert len(server.bodies) == 12
    rows = read_jsonl(tmp_path / "rows.jsonl")
    refused = [row for row in rows if row["finish_reason"] == reason]
    assert len(rows) == 12 and len(refused) == 1
    assert (refused[0]["text"], refused[0]["verdict"], refused[0]["rung"]) == ("", None, "none")
    assert outcomes(refused[0], 1, "verdict") == ["unparsed", f"refused_{reason}", "rung_none"]


@pytest.mark.parametrize("said", [
    [1], {}, {"choices": 5}, {"choices": [{}]}, {"choices": [{"message": {"content": [{"type": "text"}]}}]},
    {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "1", "completion_tokens": "1"}},
])  # fmt: skip
def test_an_answer_that_is_no_completion_ends_in_one_line(said, tmp_path):
    """Any JSON may come from what listens at an address."""
    with serving(lambda number, body: (200, {}, [said])) as server, pytest.raises(InputError) as e:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(1), max_retries=0)
    assert "gpt-4o: expected a chat completion, found" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("thought", "said", "text"), [
    ({"reasoning_content": "hm"}, "x", "<t>\nhm\n</t>\n\nx"), ({"reasoning": "hm"}, "x", "<t>\nhm\n</t>\n\nx"),
    ({"reasoning": "cut", "reasoning_content": "cut"}, None, "<t>\ncut"), ({"reasoning_content": None}, "x", "x"), ({}, "x", "x"),
])  # fmt: skip
def test_a_thought_that_a_server_gives_apart_is_put_back(thought, said, text, tmp_path):
    """As the model wrote it: an unfinished one stays unfinished, and is no empty answer."""
    said = completion(said, 1, 1, finish_reason="stop")
    said["choices"][0]["message"] |= thought
    decoding = Decoding(max_new_tokens=7, thought=("<t>", "</t>"))
    with serving(lambda number, body: (200, {}, [said])) as server:
        [row] = judge_all(tmp_path / "rows.jsonl", server.url, make_requests(1), decoding)
    assert row["text"] == text


def test_the_rate_is_kept_with_retries_counted(tmp_path):
    """600 a minute are one every .1 s, however many threads ask."""
    with serving(lambda number, body: (200, {}) if number % 3 else (429, {"Retry-After": "0.01"})) as server:
        began = time.monotonic()  # of ours: when the first request arrives, a busy machine decides
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(8), requests_per_minute=600.0)
    assert len(server.times) > 8
    assert max(server.times) - began >= (len(server.times) - 1) * 0.1


def test_no_more_requests_are_under_way_than_asked_for(tmp_path):
    """A small server falls over, and an endpoint counts them."""
    under_way, counts = [], []

    def slow(number: int, body: dict) -> tuple[int, dict]:
        under_way.append(number)
        counts.append(len(under_way))
        time.sleep(0.05)
        under_way.remove(number)
        return 200, {}

    with serving(slow) as server:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(), max_concurrency=3)
    assert max(counts) == 3


def test_keys_and_texts_that_no_encoding_holds(tmp_path, monkeypatch):
    """Without a key, a server of one's own is asked all the same; OpenAI's is not. Lone surrogates are in real data."""
    monkeypatch.delenv("OPENAI_API_KEY")
    requests = [Request(key={"id": "p"}, prompt_ids=[], messages=judge_messages("\ud83d", "a", "1"))]
    with serving(well) as server:
        [row] = judge_all(tmp_path / "rows.jsonl", server.url, requests)
        assert row["verdict"] == 2 and "问题：\ufffd" in server.bodies[0]["messages"][1]["content"]
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        judge_all(tmp_path / "none.jsonl", None, requests)


def test_a_stage_needs_no_model_beside_an_endpoint_but_one_by_whose_tokens_long_reasons_are_cut(tmp_path):
    """The judge that writes is elsewhere, and larger than this machine; a reason of any length is not for training."""
    run = make_run(tmp_path, 3)
    with serving(lambda number, body: (200, {}, "回答2更好。它说")) as server:
        given = {"run_dir": run, "api_model": "large", "base_url": server.url}
        sample_repeated(RepeatedOptions(num_samples=2, **given))
        with pytest.raises(InputError, match="--max-new-tokens: expected at most 400, found 512, or a --model"):
            HintedOptions(**given)
        sample_hinted(HintedOptions(max_new_tokens=400, **given))
        assert {body["model"] for body in server.bodies} == {"large"} and len(server.bodies) == 12
        assert not {"top_k", "repetition_penalty"} & {name for body in server.bodies for name in body}
    made = read_manifest(run / "repeated.jsonl")
    assert made["inputs"][1] == {"path": "endpoint model large", "sha256": None} and made["options"]["top_k"] is None
    rows = read_jsonl(run / "hinted.jsonl")
    assert [row["text"] for row in rows[:2]] == [judgment_text("回答2更好。它说", hint) for hint in (1, 2)]
    assert rows[0].keys() > {"prompt_tokens", "completion_tokens"} and len(rows) == 6


def test_what_the_api_has_no_words_for_goes_out_only_where_it_is_asked_for(tmp_path):
    """Left out without a word, it would be another decoding than the manifest says; sent unasked, OpenAI's own endpoint
    refuses every request."""
    warm = Decoding(max_new_tokens=1, temperature=1.0, top_k=50, repetition_penalty=1.0)
    for decoding, sent in (warm, {"top_k": 50, "repetition_penalty": 1.0}), (Decoding(max_new_tokens=1), {}):
        with serving(well) as server:
            judge_all(tmp_path / f"{len(sent)}.jsonl", server.url, make_requests(1), decoding)
        assert {name: server.bodies[0][name] for name in EXTRA if name in server.bodies[0]} == sent


def test_an_endpoint_is_asked_for_a_judgment_by_its_schema(tmp_path):
    """Its server may think before; what it gives as its text is the object."""
    decoding = Decoding(max_new_tokens=1, object_form=object_form(load_judge("english"), True))
    with serving(well) as server:
        judge_all(tmp_path / "rows.jsonl", server.url, make_requests(1), decoding)
        [body] = {json.dumps(body["response_format"]) for body in server.bodies}
    asked = json.loads(body)["json_schema"]
    assert asked["strict"] and asked["schema"]["additionalProperties"] is False
    assert list(asked["schema"]["properties"]) == asked["schema"]["required"] == ["reason", "better_answer"]
    assert asked["schema"]["properties"]["better_answer"]["enum"] == [1, 2]
    with serving(well) as server:
        judge_all(tmp_path / "free.jsonl", server.url, make_requests(1), Decoding(max_new_tokens=1))
        assert not any("response_format" in body for body in server.bodies)


@pytest.mark.parametrize(("changes", "message"), [
    ({"max_concurrency": 0}, "--max-concurrency: expected 1 or more"),
    ({"max_retries": -1}, "--max-retries: expected 0 or more"),
    ({"requests_per_minute": 0.0}, "--requests-per-minute: expected above 0"),
    ({"request_timeout": 0.0}, "--request-timeout: expected above 0"),
])  # fmt: skip
def test_options_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        EndpointOptions(**changes)


# ---- The real server ----

BASE = ROOT / "demo" / "base"


def start_vllm(port: int, log: Path) -> subprocess.Popen:
    """vLLM's own server with the shipped judge, set as vllm.py sets the engine on a CPU."""
    arguments = ["--model", BASE, "--port", port, "--host", "127.0.0.1", "--generation-config", "vllm"]
    arguments += ["--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", 8, "--enforce-eager"]
    arguments += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", 8192, "--kv-cache-memory-bytes", 2**30]
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)]
    # A session of its own: its engine is another process, and dies with it.
    env, output = os.environ | ENVIRONMENT, open(log, "ab")
    return subprocess.Popen(line, env=env, start_new_session=True, stdout=output, stderr=subprocess.STDOUT)


def kill(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(server: subprocess.Popen, port: int, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (scripts/setup.sh)"
)


@pytest.fixture
def vllm_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_stages_by_vllms_server_write_the_rows_of_those_in_process(tmp_path, vllm_port):
    """Sampled, with the recipe's decoding: another template, seed, top-k or penalty on the way would write other texts.
    Only what is known of the tokens differs."""
    data, log = ROOT / "demo" / "train.jsonl", tmp_path / "server.log"
    preprocess(PreprocessOptions(run_dir=tmp_path / "here", data=(str(data),), limit=24))
    shutil.copytree(tmp_path / "here", tmp_path / "served")
    few = {"max_new_tokens": 48, "model": BASE}
    server = start_vllm(vllm_port, log)
    try:
        wait_until_ready(server, vllm_port, log)
        endpoint = {"api_model": str(BASE), "base_url": f"http://127.0.0.1:{vllm_port}/v1", "repetition_penalty": 1.0}
        served = few | endpoint | {"run_dir": tmp_path / "served"}
        sample_repeated(RepeatedOptions(num_samples=4, top_k=50, **served))
        sample_hinted(HintedOptions(top_k=0, **served))
    finally:
        kill(server)
    sample_repeated(RepeatedOptions(num_samples=4, run_dir=tmp_path / "here", **few))
    sample_hinted(HintedOptions(run_dir=tmp_path / "here", **few))
    for name in ("repeated.jsonl", "hinted.jsonl"):
        here, there = (read_jsonl(tmp_path / folder / name) for folder in ("here", "served"))
        for row, other in zip(here, there, strict=True):
            ids, counted = row.pop("token_ids"), [other.pop("completion_tokens"), other.pop("prompt_tokens")]
            assert row == other and counted[0] == len(ids)
        print(f"{name}: {len(here)} rows, {len({row['text'] for row in here})} texts, equal")
    made = read_manifest(tmp_path / "served" / "repeated.jsonl")
    assert made["inputs"][1]["path"] == f"endpoint model {BASE}" and made["options"]["top_k"] == 50


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_vllms_server_gives_the_offline_verdicts_and_may_be_killed(tmp_path, vllm_port):
    """The same judge behind HTTP and in the process writes the same judgments, with the same probabilities, also when
    the server is killed in the middle and started again on its port: nothing lost, nothing twice."""
    port = vllm_port
    log, file, model = tmp_path / "server.log", tmp_path / "http.jsonl", check_model(BASE, None)
    (tmp_path / "served.toml").write_text(f'prompt = "con-j"\nbackend = "openai"\nmodel = "{BASE}"\n')
    judge = load_judge(str(tmp_path / "served.toml"))
    decoding = Decoding(max_new_tokens=64, verdict_probability=True, verdict_place=judge.verdict_place)
    over_http, offline = [], []
    for row in load_prompts([str(ROOT / "demo" / "test.jsonl")], limit=20)[0]:
        for order, names in (1, ("answer_1", "answer_2")), (2, ("answer_2", "answer_1")):
            key, messages = {"id": row["id"], "order": order}, judge_messages(row["question"], *(row[n] for n in names))
            over_http.append(Request(key=key, prompt_ids=[], messages=messages))
            offline.append(Request(key=key, prompt_ids=model.tokenizer.prompt_ids(messages)))
    servers, killed_at = [start_vllm(port, log)], []

    def kill_and_restart() -> None:
        while not file.exists() or file.read_bytes().count(b"\n") < 10:
            time.sleep(0.005)
        kill(servers[0])
        killed_at.append(file.read_bytes().count(b"\n"))
        servers.append(start_vllm(port, log))

    try:
        wait_until_ready(servers[0], port, log)
        killer = threading.Thread(target=kill_and_restart, daemon=True)
        killer.start()
        options = EndpointOptions(base_url=f"http://127.0.0.1:{port}/v1", max_concurrency=2, max_retries=40)
        complete = functools.partial(complete_by_http, model=judge.model, options=options, decoding=decoding)
        began = time.monotonic()
        append_samples(file, task_of(over_http), complete, None, decoding)
        rows = read_jsonl(file)
        print(f"killed with {killed_at} of {len(rows)} rows in the file, done after {time.monotonic() - began:.0f} s")
        killer.join()
    finally:
        for server in servers:
            kill(server)
    assert 10 <= killed_at[0] < len(over_http) == len(rows)
    options = FleetOptions(model=BASE, max_num_seqs=8)
    complete = functools.partial(complete_by_engines, model=model, options=options, decoding=decoding)
    file = tmp_path / "offline.jsonl"
    append_samples(file, task_of(offline), complete, model, decoding)
    expected = read_jsonl(file)
    verdicts = Counter(row["verdict"] for row in expected)
    shown = [f"{row['p_first']:.2g}" for row in expected if row["p_first"] is not None][:8]
    print(f"offline: verdicts {dict(verdicts)}; the first answer is better with {', '.join(shown)} …")
    assert verdicts[1] >= 5 and verdicts[2] >= 5
    for row, other in zip(rows, expected):
        for column in ("id", "order", "text", "verdict", "rung", "finish_reason"):
            assert row[column] == other[column], column
        assert row["p_first"] == pytest.approx(other["p_first"], abs=1e-3)
        assert row["completion_tokens"] == len(other["token_ids"])
    assert [row["prompt_tokens"] for row in rows] == [len(request.prompt_ids) for request in offline]
    for row in expected:  # greedy: the likelier one was written
        assert row["verdict"] is None or (row["p_first"] > 0.5) == (row["verdict"] == 1)
