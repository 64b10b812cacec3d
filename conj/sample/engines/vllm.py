"""Prompts to judgments with vLLM: the only module that imports it, and only when an engine starts.

Everything that can be wrong with a model folder, an option or a prompt is checked before that, in seconds. Prompts go
in as token ids, so what a user wrote cannot become a control token. Every request has its own seed, made from its
name: what is sampled for it depends neither on the batch it runs in nor on what was sampled before, up to the rounding
of the matrix kernels (none seen in float32 on a CPU).
"""

import contextlib
import gc
import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conj import InputError
from conj.data.options import brief_line, option, require, require_each
from conj.model.folder import DEFAULT_MAX_LENGTH, JudgeModel
from conj.sample.engines.completion import (
    NUM_TOP_LOGPROBS,
    Completion,
    Completions,
    Decoding,
    ObjectForm,
    Request,
    first_probability,
    request_seed,
)

CPU_KV_CACHE_BYTES = 2**30
# vLLM reads these when it is imported. In-process, its scheduler is deterministic; threads that are bound to cores, or
# that spin while they wait, lose a factor of ten as soon as another process wants a core (measured on 2 cores).
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    model: Path = option(
        help="a Hugging Face folder, or ORG/NAME on the hub, with @REVISION or without", affects_result=False
    )
    max_new_tokens: int | None = option(None, help="longest judgment, tokens; by default the judge's")
    max_length: int | None = option(None, help="longest prompt + judgment, tokens; by default the model's, up to 8192")
    max_num_seqs: int | None = option(
        None,
        help="number of judgments written at the same time; by default vLLM's for the device",
        affects_result=False,
    )
    max_num_batched_tokens: int | None = option(
        None, help="most tokens of prompts and judgments a step; by default vLLM's for the device", affects_result=False
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", help="auto: what the installed vLLM is built for; another is refused", affects_result=False
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="auto: float32 on a CPU, or bfloat16"
    )
    tensor_parallel_size: int = option(1, help="number of GPUs that share each layer", affects_result=False)
    pipeline_parallel_size: int = option(1, help="number of stages that the layers are dealt to", affects_result=False)
    gpu_memory_utilization: float = option(
        0.9, help="share of a GPU's memory that vLLM takes, above 0 up to 1", affects_result=False
    )

    def __post_init__(self):
        counts = ("max_new_tokens", "max_num_seqs", "max_num_batched_tokens")
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        require_each(self, (*counts, *sizes), lambda value: value >= 1, "1 or more")
        require_each(self, ("gpu_memory_utilization",), lambda value: 0 < value <= 1, "above 0 up to 1")

    @property
    def num_gpus(self) -> int:
        """That one engine takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def check_engine(model: JudgeModel, options: EngineOptions) -> None:
    """Raises InputError for a model that cannot be spread as the options say, or has no room for a judgment."""
    size = options.tensor_parallel_size
    for what, heads in zip(("attention", "key and value"), model.num_heads or ()):
        require(
            heads % size == 0 or (what != "attention" and size % heads == 0),
            f"--tensor-parallel-size: expected a divisor of the model's {heads} {what} heads, found {size}",
        )
    require(
        options.max_new_tokens is None or options.max_new_tokens < model.max_length,
        f"--max-new-tokens: expected fewer than the {model.max_length} tokens of prompt and judgment, found "
        f"{options.max_new_tokens}",
    )


@contextlib.contextmanager
def running_engine(model: JudgeModel, options: EngineOptions, structured: bool = False) -> Iterator:
    """A vLLM engine, shut down in the end so that another model can take its place. `structured`: it can be asked for
    judgments of a given form, for which alone vLLM has to know the tokenizer.

    Raises InputError when vLLM is not installed, or not for `options.device`."""
    check_engine(model, options)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            from vllm import EngineArgs, LLMEngine
            from vllm.distributed import cleanup_dist_env_and_memory
            from vllm.platforms import current_platform
            from vllm.usage.usage_lib import UsageContext
    except ImportError as e:
        raise InputError(f"sampling needs vLLM, which cannot be imported ({e}); scripts/setup.sh installs it") from None
    built_for = current_platform.device_type  # empty: built for GPUs, and sees none
    require(bool(built_for), "--device: the vLLM that is installed is built for GPUs, and finds none")
    fits = f"expected auto or {built_for}, which the vLLM that is installed is built for"
    require(options.device in ("auto", built_for), f"--device: {fits}, found {options.device}")
    arguments = {
        "model": str(model.folder), "skip_tokenizer_init": not structured, "dtype": options.dtype,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        "max_model_len": model.max_length, "max_num_seqs": options.max_num_seqs, "enable_prefix_caching": True,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "tensor_parallel_size": options.tensor_parallel_size, "disable_log_stats": True, "use_tqdm_on_load": False,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }  # fmt: skip
    if options.num_gpus > 1:
        arguments["distributed_executor_backend"] = "mp"  # within a Ray actor it would be Ray
    if options.dtype == "auto":
        arguments["dtype"] = "float32" if current_platform.is_cpu() else "bfloat16"
    if current_platform.is_cpu():
        arguments |= {
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "enforce_eager": True,  # compiling costs 45 s and gains nothing on a small model
            # A seeded request crashes vLLM's CPU sampler when its prompt is prefilled in chunks.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": options.max_num_batched_tokens or max(model.max_length, DEFAULT_MAX_LENGTH),
        }
    try:
        with warnings.catch_warnings(action="ignore"):
            # As its class for offline use: what fills a GPU, not what answers soon.
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments), UsageContext.LLM_CLASS)
    except Exception as e:  # weights that do not fit the config, too little memory: vLLM's errors share no class
        raise InputError(f"{model.folder}: vLLM cannot start with this model: {brief_line(str(e))}") from None
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def complete_by_vllm(
    requests: Iterable[Request], model: JudgeModel, options: EngineOptions, decoding: Decoding
) -> Completions:
    """Each request with its completion, as it finishes, by an engine that lives as long as the generator."""
    with running_engine(model, options, structured=decoding.object_form is not None) as engine:
        yield from generate(engine, requests, model, decoding)


def generate(engine, requests: Iterable[Request | None], model: JudgeModel, decoding: Decoding) -> Completions:
    """Each request with its completion, as it finishes. Where a None stands, there are no more for the moment; the
    generator ends when nothing is left to do."""
    requests, running = enumerate(requests), {}
    while True:
        # Twice as many as run at the same time: the engine always has a next one, and its queue stays short.
        room = 2 * engine.vllm_config.scheduler_config.max_num_seqs - len(running)
        for number, request in itertools.islice(requests, room):
            if request is None:
                break
            running[str(number)] = request
            prompt = {"prompt_token_ids": request.prompt_ids}
            engine.add_request(str(number), prompt, _sampling_params(request, model, decoding))
        if not running:
            return
        for output in engine.step():
            if output.finished:
                request = running.pop(output.request_id)
                yield request, _completion(output.outputs[0], request, model, decoding)


def _sampling_params(request: Request, model: JudgeModel, decoding: Decoding):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structure = None
    if decoding.object_form is not None:
        structure = StructuredOutputsParams(regex=judgment_regex(decoding.object_form, decoding.needs_reason))
    return SamplingParams(
        structured_outputs=structure,
        temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k or 0,
        repetition_penalty=decoding.repetition_penalty or 1.0, max_tokens=decoding.max_new_tokens,
        seed=request_seed(decoding.seed, request.key), stop_token_ids=model.end_ids, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, logprobs=NUM_TOP_LOGPROBS if decoding.verdict_probability else None,
    )  # fmt: skip


def judgment_regex(form: ObjectForm, needs_reason: bool = False) -> str:
    """All judgments as `judgment_text` writes them, with a reason, which begins as those for its verdict do, or, unless it is
    needed, without. A JSON schema would leave the white space open, which a model may fill until its tokens are used up; a least
    length of the reason would be counted at each token of the vocabulary, which takes more time than the model does (seen,
    vLLM 0.32 on a CPU)."""

    def quoted(text: str) -> str:
        # Not re.escape, which escapes spaces and more that other readers of regular expressions take for a mistake.
        return re.sub(r"[\\.^$*+?()\[\]{}|]", r"\\\g<0>", json.dumps(text, ensure_ascii=False))

    text = r'([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})' + ("+" if needs_reason else "*")
    reason, verdict = quoted(form.reason_key), quoted(form.verdict_key)
    verdicts = {form.reason_starts[0]: 1, form.reason_starts[1]: 2} if form.reason_starts[0] else {"": "[12]"}
    given = [f'{reason}: {quoted(start)[:-1]}{text}", {verdict}: {value}' for start, value in verdicts.items()]
    without = [] if needs_reason else [f"{verdict}: [12]"]
    return rf"\{{({'|'.join(given + without)})\}}"


def _completion(output, request: Request, model: JudgeModel, decoding: Decoding) -> Completion:
    token_ids, decode, p_first = list(output.token_ids), model.tokenizer.decode, None
    text = model.tokenizer.decode_after(request.begun, token_ids)
    if decoding.verdict_probability:

        def length(count: int) -> int:  # a character of which the last token holds only a part is decoded as U+FFFD
            return len(decode(token_ids[:count]).rstrip("\ufffd"))

        def top(i: int) -> list[tuple[str, float]]:  # the token that was written comes first
            return [(decode([id]), listed.logprob) for id, listed in output.logprobs[i].items()]

        p_first = first_probability(text, decoding.verdict_place, len(token_ids), length, top)
    return Completion(text=text, token_ids=token_ids, finish_reason=output.finish_reason, p_first=p_first)
