"""Prompts to judgments with vLLM: the only module that imports it, and only when an engine starts.

Everything that can be wrong with a model folder, an option or a prompt is checked before that, in seconds. Prompts go
in as token ids, so what a user wrote cannot become a control token. Every request has its own seed, made from its
name: what is sampled for it depends neither on the batch it runs in nor on what was sampled before, up to the rounding
of the matrix kernels (none seen in float32 on a CPU). Rows are appended as they finish; a stage that is killed goes
on where it stopped and ends with the same file.

Refused: remote code, weights other than safetensors, prompts that do not fit the context (left out, counted, never cut).
"""

import bisect
import contextlib
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from conj import InputError
from conj.data.files import (
    INDEX,
    brief,
    dump_line,
    first_line,
    indexed_files,
    open_weights,
    read_model_json,
    recover_jsonl,
    write_jsonl,
)
from conj.data.options import option, require, require_each
from conj.data.prompts import VERDICT_KEY, JudgeTokenizer

DEFAULT_MAX_MODEL_LEN = 8192
CPU_KV_CACHE_BYTES = 2**30
NUM_TOP_LOGPROBS = 20  # the most that vLLM and the OpenAI API give
BESIDE_NAME = " \t\r\n▁\"'`*()[]{}<>:：,，.。;；"  # what one token may hold beside an answer's name
# Where the card's judgment states its verdict (a regular expression, whose last match counts), and how it names the answers.
CARD_VERDICT = (VERDICT_KEY + r'["\']?\s*[:：]\s*["\']?(?:回答)?([12])', "1", "2")
# vLLM reads these when it is imported. In-process, its scheduler is deterministic; threads that are bound to cores, or
# that spin while they wait, lose a factor of ten as soon as another process wants a core (measured on 2 cores).
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    model: Path = option(help="model folder, Hugging Face layout", affects_result=False)
    max_new_tokens: int = option(512, help="longest judgment, tokens")
    max_model_len: int | None = option(
        None, help="longest prompt + judgment, tokens; by default the model's, up to 8192"
    )
    max_num_seqs: int = option(256, help="number of judgments written at the same time", affects_result=False)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", help="auto: what the installed vLLM is built for; another is refused", affects_result=False
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="auto: float32 on a CPU, else bfloat16"
    )
    tensor_parallel_size: int = option(
        1, help="number of GPUs that share each layer of the model", affects_result=False
    )
    pipeline_parallel_size: int = option(1, help="number of stages that the layers are dealt to", affects_result=False)
    data_parallel_size: int = option(
        1, help="number of copies of the model; more than one only behind vLLM's own server", affects_result=False
    )
    gpu_memory_utilization: float = option(
        0.9, help="share of a GPU's memory that vLLM takes, above 0 up to 1", affects_result=False
    )

    def __post_init__(self):
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        require_each(self, ("max_new_tokens", "max_num_seqs", *sizes), lambda value: value >= 1, "1 or more")
        require(  # vLLM says of its own offline class: not supported for single-process usage and may hang
            self.data_parallel_size == 1,
            f"--data-parallel-size {self.data_parallel_size}: vLLM has no copies within one process; start them with "
            f"`vllm serve {self.model} --data-parallel-size {self.data_parallel_size}` and judge through that server "
            '(a judge with backend = "openai")',
        )
        require_each(self, ("gpu_memory_utilization",), lambda value: 0 < value <= 1, "above 0 up to 1")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen. The defaults are greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    repetition_penalty: float = 1.0
    seed: int = 0
    verdict_probability: bool = False  # asks for the likeliest tokens, and fills Completion.p_first
    verdict_place: tuple[str, str, str] = CARD_VERDICT  # where and how a judgment names the better answer


@dataclass(frozen=True, kw_only=True)
class Request:
    """One judgment to be written; `key` names it within its file and is the start of its row."""

    key: dict
    prompt_ids: list[int] = field(default_factory=list)  # none where the prompt goes out as text
    hint: int | None = None  # the verdict that the prompt gives away
    messages: list[dict] | None = None  # the chat messages of a prompt that goes out as text, over HTTP


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str  # control tokens are left out
    token_ids: list[int] | None  # as written, the end token included; over HTTP not known
    finish_reason: str  # stop, length, or what else a server says
    p_first: float | None = None  # probability that the first answer is better, if asked for and there is such a token
    prompt_tokens: int | None = None  # over HTTP, as the server counts them
    completion_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model folder that was checked: vLLM can be started with it."""

    folder: Path
    tokenizer: JudgeTokenizer
    max_model_len: int  # tokens, prompt + judgment
    end_ids: list[int]  # tokens that end a judgment


def check_model(folder: Path, max_model_len: int | None, chat_template: str | None = None) -> JudgeModel:
    """Reads what there is to know about a model without its weights. `chat_template` takes the place of its own.

    Raises InputError for a folder without config, tokenizer, chat template or whole safetensors, a model that needs
    remote code, a tokenizer with more ids than the vocabulary, or a context longer than the model's."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    config = _read_config(folder / "config.json")
    require("auto_map" not in config, f"{folder}/config.json: asks for remote code (auto_map), which is never run")
    tokenizer = JudgeTokenizer.load(folder, chat_template)
    last_id = max([*tokenizer.special.values(), tokenizer.plain.get_vocab_size() - 1])
    vocab_size, context = config["vocab_size"], config["max_position_embeddings"]
    require(
        last_id < vocab_size, f"{folder}: the tokenizer has ids up to {last_id}, the vocabulary {vocab_size} entries"
    )
    _check_weights(folder)
    if max_model_len is None:
        max_model_len = min(context, DEFAULT_MAX_MODEL_LEN)
    require(
        0 < max_model_len <= context, f"--max-model-len: expected 1 to {context} (the model's), found {max_model_len}"
    )
    end_ids = _end_ids(folder, config, tokenizer)
    return JudgeModel(folder=folder, tokenizer=tokenizer, max_model_len=max_model_len, end_ids=end_ids)


def _read_config(path: Path) -> dict:
    config = read_model_json(path)
    for name in ("vocab_size", "max_position_embeddings"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{path}: expected {name} to be a number from 1 up, found {brief(config.get(name))}")
    return config


def _end_ids(folder: Path, config: dict, tokenizer: JudgeTokenizer) -> list[int]:
    """Tokens that end a judgment: the tokenizer's, and those that the model's configuration names."""
    generation = (
        read_model_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    )
    found = {tokenizer.special[tokenizer.eos]}
    for eos in (config.get("eos_token_id"), generation.get("eos_token_id")):
        found |= {i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int}
    if outside := [i for i in sorted(found) if not 0 <= i < config["vocab_size"]]:
        raise InputError(f"{folder}: eos_token_id: expected ids of the vocabulary, found {brief(outside)}")
    return sorted(found)


def _check_weights(folder: Path) -> None:
    """vLLM reads every file that ends in .safetensors, or those that the index names."""
    files = sorted(folder.glob("*.safetensors"))
    require(bool(files), f"{folder}: not a model folder: no *.safetensors")
    if (folder / INDEX).exists():
        indexed_files(folder / INDEX)
    for file in files:
        with open_weights(file, "numpy"):
            pass  # the header, and that the file is as long as the header says


def split_overlong(requests: list[Request], model: JudgeModel, max_new_tokens: int) -> tuple[list[Request], list[str]]:
    """Requests that fit the context with room for a whole judgment, and the ids of prompts that do not.

    A prompt of which one request does not fit is left out whole. Raises InputError when none fits."""
    longest = model.max_model_len - max_new_tokens
    overlong = dict.fromkeys(r.key["id"] for r in requests if len(r.prompt_ids) > longest)
    fitting = [r for r in requests if r.key["id"] not in overlong]
    if not fitting:
        shortest = min(len(r.prompt_ids) for r in requests)
        raise InputError(
            f"--max-model-len {model.max_model_len}: every prompt is too long; the shortest has {shortest} tokens, "
            f"and {max_new_tokens} are kept for the judgment"
        )
    return fitting, list(overlong)


def append_samples(
    artefact: Path,
    requests: list[Request],
    complete: Callable[[list[Request]], Generator[tuple[Request, Completion]]],
    judge: Callable[[Request, Completion], dict],
    outcome: str,
    verdict_probability: bool = False,
) -> list[dict]:
    """Makes the rows of `artefact` that are not there yet, and returns all of them.

    A row is the request's key, what `judge` makes of the completion (`outcome` among it), and what the model wrote: its
    token ids, or how many a server counted, and with `verdict_probability` also `p_first`. `complete` (complete_by_vllm or
    conj.sample.endpoint.complete_by_http, the rest bound) gives each request with its completion, as it finishes. Rows are
    appended in that order; the whole file is put into the order of the requests at the end, so that a run that was killed
    and one that was not leave the same bytes. Raises InputError for a malformed file, a row of no request, and one that
    stands there twice."""
    done = _rows_made(artefact, requests, outcome)
    left = [r for r in requests if _name(r.key) not in done]
    if left:
        with contextlib.closing(complete(left)) as completions, open(artefact, "a", encoding="utf-8") as file:
            for request, completion in tqdm(
                completions, desc=artefact.name, total=len(requests), initial=len(done), unit=" judgments"
            ):
                row = {
                    **request.key,
                    **judge(request, completion),
                    "finish_reason": completion.finish_reason,
                    **{column: getattr(completion, column) for column in _cost_columns(request)},
                }
                if verdict_probability:
                    row["p_first"] = completion.p_first if row[outcome] else None
                file.write(dump_line(row))
                file.flush()
                done[_name(request.key)] = row
    rows = [done[_name(r.key)] for r in requests]
    write_jsonl(artefact, rows)
    return rows


def _cost_columns(request: Request) -> dict[str, type]:
    """What a row says about the tokens that were written: columns of Completion, with their type."""
    if request.messages is None:
        return {"token_ids": list}
    return {"prompt_tokens": object, "completion_tokens": object}  # not every server counts


def _name(key: dict) -> str:
    return json.dumps(list(key.values()))  # not a tuple: there true and 1 are one name, and a list is none


def _rows_made(artefact: Path, requests: list[Request], outcome: str) -> dict[str, dict]:
    """The rows that an earlier, killed run made, by request."""
    written = {"text": str, "verdict": object, outcome: object, "rung": str, "finish_reason": str}
    written |= _cost_columns(requests[0])
    asked, done = {_name(r.key) for r in requests}, {}
    for number, row in enumerate(recover_jsonl(artefact, dict.fromkeys(requests[0].key, object) | written), 1):
        name = _name(key := {column: row[column] for column in requests[0].key})
        if name not in asked or name in done:
            found = ", ".join(f"{column} {brief(value)}" for column, value in key.items())
            wrong = "stands here for the second time" if name in asked else "is no judgment that was asked for"
            raise InputError(f"{artefact}:{number}: {found} {wrong}; delete the line")
        done[name] = row
    return done


@contextlib.contextmanager
def running_engine(model: JudgeModel, options: EngineOptions) -> Iterator:
    """A vLLM engine, shut down in the end so that another model can take its place.

    Raises InputError when vLLM is not installed, or not for `options.device`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            from vllm import EngineArgs, LLMEngine
            from vllm.distributed import cleanup_dist_env_and_memory
            from vllm.platforms import current_platform
    except ImportError as e:
        raise InputError(f"sampling needs vLLM, which cannot be imported ({e}); scripts/setup.sh installs it") from None
    built_for = current_platform.device_type  # empty: built for GPUs, and sees none
    require(bool(built_for), "--device: the vLLM that is installed is built for GPUs, and finds none")
    if options.device not in ("auto", built_for):
        raise InputError(
            f"--device: expected auto or {built_for}, which the vLLM that is installed is built for, found {options.device}"
        )
    arguments = {
        "model": str(model.folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        "dtype": options.dtype,
        "max_model_len": model.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if options.dtype == "auto":
        arguments["dtype"] = "float32" if current_platform.is_cpu() else "bfloat16"
    if current_platform.is_cpu():
        arguments |= {
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "enforce_eager": True,  # compiling costs 45 s and gains nothing on a small model
            # A seeded request crashes vLLM's CPU sampler when its prompt is prefilled in chunks.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(model.max_model_len, DEFAULT_MAX_MODEL_LEN),
        }
    try:
        with warnings.catch_warnings(action="ignore"):
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    except Exception as e:  # weights that do not fit the config, too little memory: vLLM's errors share no class
        raise InputError(f"{model.folder}: vLLM cannot start with this model: {first_line(e)}") from None
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def complete_by_vllm(
    requests: Iterable[Request], model: JudgeModel, options: EngineOptions, decoding: Decoding
) -> Generator[tuple[Request, Completion]]:
    """Each request with its completion, as it finishes, by an engine that lives as long as the generator."""
    with running_engine(model, options) as engine:
        yield from generate(engine, requests, model, decoding)


def generate(
    engine, requests: Iterable[Request], model: JudgeModel, decoding: Decoding
) -> Iterator[tuple[Request, Completion]]:
    """Each request with its completion, as it finishes."""
    requests, running = enumerate(requests), {}
    while True:
        # Twice as many as run at the same time: the engine always has a next one, and its queue stays short.
        room = 2 * engine.vllm_config.scheduler_config.max_num_seqs - len(running)
        for number, request in itertools.islice(requests, room):
            running[str(number)] = request
            prompt = {"prompt_token_ids": request.prompt_ids}
            engine.add_request(str(number), prompt, _sampling_params(request, model, decoding))
        if not running:
            return
        for output in engine.step():
            if output.finished:
                yield running.pop(output.request_id), _completion(output.outputs[0], model, decoding)


def _sampling_params(request: Request, model: JudgeModel, decoding: Decoding):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        repetition_penalty=decoding.repetition_penalty,
        max_tokens=decoding.max_new_tokens,
        seed=request_seed(decoding.seed, request.key),
        stop_token_ids=model.end_ids,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        logprobs=NUM_TOP_LOGPROBS if decoding.verdict_probability else None,
    )


def _completion(output, model: JudgeModel, decoding: Decoding) -> Completion:
    token_ids, decode, p_first = list(output.token_ids), model.tokenizer.decode, None
    text = decode(token_ids)
    if decoding.verdict_probability:

        def length(count: int) -> int:  # a character of which the last token holds only a part is decoded as U+FFFD
            return len(decode(token_ids[:count]).rstrip("\ufffd"))

        def top(i: int) -> list[tuple[str, float]]:  # the token that was written comes first
            return [(decode([id]), listed.logprob) for id, listed in output.logprobs[i].items()]

        p_first = first_probability(text, decoding.verdict_place, len(token_ids), length, top)
    return Completion(text=text, token_ids=token_ids, finish_reason=output.finish_reason, p_first=p_first)


def first_probability(
    text: str,
    place: tuple[str, str, str],
    num_tokens: int,
    length: Callable[[int], int],
    top: Callable[[int], list[tuple[str, float]]],
) -> float | None:
    """The probability that a judge gives to the answer shown first: p(1) / (p(1) + p(2)) at the token that names the
    better one in the last match of `place`, given all that it wrote before. None if no token does just that.

    `length(k)`: how many characters the first k tokens make. `top(i)`: text and logprob of token i and of the likeliest
    tokens in its place. Of an answer that none of these names, it is only known that it is no likelier than the last."""
    pattern, *names = place
    names = [name.casefold() for name in names]
    stated = [match[1] and (match.start(1), match[1].casefold()) for match in re.finditer(pattern, text)]
    if not stated or not stated[-1]:
        return None
    start, words = stated[-1]
    within = max(words.rfind(name) for name in names)
    token = bisect.bisect_right(range(num_tokens + 1), start + within, key=length) - 1
    if within < 0 or token == num_tokens:
        return None
    named = [(written.strip(BESIDE_NAME).casefold(), math.exp(logprob)) for written, logprob in top(token)]
    if named[0][0] not in names:
        return None
    bound = sorted((p for _, p in named), reverse=True)[:NUM_TOP_LOGPROBS][-1]
    first, second = (sum(p for written, p in named if written == name) or bound for name in names)
    return first / (first + second)


def request_seed(seed: int, key: dict) -> int:
    """The seed of one request, 63 bits: a hash of the stage's seed and the request's key."""
    digest = hashlib.sha256(json.dumps([seed, *key.values()]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
