"""Prompts to judgments over HTTP: any server that speaks the OpenAI chat API, vLLM's own among them.

The `openai` package retries what may pass (lost connections, time-outs, 408, 409, 429 and 5xx), waiting longer each
time, or as long as the server asks, up to two minutes. Completions are given out as they finish: what was answered is in
the file before anything else can fail, and the same command goes on from there; what was under way then is asked again.
The API key is OPENAI_API_KEY, as everywhere.

A prompt that is too long for the server, or that its filter stops, is a judgment without a verdict, and is counted.

The API has no words for top-k and repetition penalty: where they are asked for they go out as vLLM's extra parameters, which
its server and others know; one that does not says so and ends the run.

What a server gives apart as the model's thought is put back before its text, between the judge's marks.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from conj import InputError
from conj.data.files import brief, first_line, replace_surrogates
from conj.data.options import option, require, require_each
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

THOUGHT = ("reasoning_content", "reasoning")  # where servers put what a model thought, apart from its text
EXTRA = ("top_k", "repetition_penalty")  # names of Decoding and of vLLM's server


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    base_url: str | None = option(
        None, help="address of the server, as in http://localhost:8000/v1; OpenAI's if not given", affects_result=False
    )
    max_concurrency: int = option(16, help="number of requests under way at the same time", affects_result=False)
    requests_per_minute: float | None = option(
        None, help="most requests a minute, retries counted, above 0; no limit if not given", affects_result=False
    )
    max_retries: int = option(
        20, help="times a request is sent again, in the end every 8 seconds", affects_result=False
    )
    request_timeout: float = option(600.0, help="longest wait for an answer, seconds", affects_result=False)

    def __post_init__(self):
        require_each(self, ("max_concurrency",), lambda value: value >= 1, "1 or more")
        require_each(self, ("max_retries",), lambda value: value >= 0, "0 or more")
        require_each(self, ("requests_per_minute", "request_timeout"), lambda value: value > 0, "above 0")


def complete_by_http(
    requests: Iterable[Request], count: int, model: str, options: EndpointOptions, decoding: Decoding
) -> Completions:
    """Each request with its completion, as it finishes; `count`: how many they are at most.

    Raises InputError when one is refused, or its retries are used up; not before all that is there was given out."""
    requests, lock, finished, stop = iter(requests), threading.Lock(), queue.SimpleQueue(), threading.Event()
    num_threads = min(options.max_concurrency, count)

    def work() -> None:
        request = None
        try:
            while not stop.is_set():
                with lock:  # they are made as they are asked for
                    request = next(requests, None)
                if request is None:
                    break
                finished.put((request, _complete(client, request, model, decoding)))
        except Exception as e:
            stop.set()
            finished.put((request, e))
        finally:
            finished.put(None)

    with _client(options) as client, contextlib.ExitStack() as leaving:
        leaving.callback(stop.set)
        # Daemons: one that waits for its next try would else hold up the end of the program.
        for _ in range(num_threads):
            threading.Thread(target=work, daemon=True).start()
        num_done, failed = 0, None
        while num_threads and not (failed and finished.empty()):
            found = finished.get()
            if found is None:
                num_threads -= 1
            elif isinstance(found[1], Completion):
                num_done += 1
                yield found
            else:
                failed = failed or found
        if failed:
            raise _input_error(*failed, num_done, count, model, options)


def check_endpoint(options: EndpointOptions) -> None:
    """Raises InputError for what the first request would find: no client, no key, no address. None is sent: a server may
    be started between stages."""
    _client(options).close()


def _client(options: EndpointOptions):
    try:
        import openai
    except ImportError as e:
        raise InputError(f"an endpoint needs the package openai, which cannot be imported ({e})") from None
    key = os.environ.get("OPENAI_API_KEY") or ("none" if options.base_url else None)
    require(key is not None, "OPENAI_API_KEY: expected the key of the API in the environment, found none")
    require(key.isascii(), "OPENAI_API_KEY: expected a key of ASCII characters")
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [_limit_rate(options.requests_per_minute)]})
    try:
        return openai.OpenAI(
            api_key=key, base_url=options.base_url, max_retries=options.max_retries, timeout=options.request_timeout,
            http_client=http_client,
        )  # fmt: skip
    except Exception as e:  # an address that is none
        raise InputError(f"--base-url: expected an address, found {brief(options.base_url)}: {first_line(e)}") from None


def _limit_rate(requests_per_minute: float | None):
    """A hook that every request, retries among them, waits in until it is its turn."""
    lock, turn = threading.Lock(), [time.monotonic()]

    def wait(_) -> None:
        if requests_per_minute is not None:
            with lock:
                mine = max(turn[0], time.monotonic())
                turn[0] = mine + 60 / requests_per_minute
            time.sleep(max(0.0, mine - time.monotonic()))

    return wait


def _complete(client, request: Request, model: str, decoding: Decoding) -> Completion:
    extra = {name: value for name in EXTRA if (value := getattr(decoding, name)) is not None}
    asked = {"logprobs": True, "top_logprobs": NUM_TOP_LOGPROBS} if decoding.verdict_probability else {}
    if decoding.object_form is not None:
        asked["response_format"] = _response_format(decoding.object_form)
    messages = [message | {"content": replace_surrogates(message["content"])} for message in request.messages]
    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, temperature=decoding.temperature, top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens, seed=request_seed(decoding.seed, request.key), **asked,
            extra_body=extra,
        )  # fmt: skip
    except ValueError as e:  # not JSON
        raise InputError(f"{model}: expected a chat completion, found no JSON: {first_line(e)}") from None
    except Exception as e:
        if reason := _why_refused(e):
            return Completion(text="", token_ids=None, finish_reason=reason)
        raise
    try:
        return _read(reply, decoding)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # any JSON may come from a server
        raise InputError(f"{model}: expected a chat completion, found {brief(reply)}") from None


def _response_format(form: ObjectForm) -> dict:
    schema = {
        "type": "object", "required": [form.reason_key, form.verdict_key], "additionalProperties": False,
        "properties": {form.reason_key: {"type": "string"}, form.verdict_key: {"type": "integer", "enum": [1, 2]}},
    }  # fmt: skip
    return {"type": "json_schema", "json_schema": {"name": "judgment", "strict": True, "schema": schema}}


def _read(reply, decoding: Decoding) -> Completion:
    choice, usage, p_first = reply.choices[0], reply.usage, None
    message, (start, end) = choice.message, decoding.thought
    text, thought = message.content or "", next(filter(None, (getattr(message, name, None) for name in THOUGHT)), "")
    counts = [usage and usage.prompt_tokens, usage and usage.completion_tokens]
    if (
        not isinstance(text, str)
        or not isinstance(thought, str)
        or not all(count is None or type(count) is int for count in counts)
    ):
        raise TypeError
    if choice.logprobs is not None and choice.logprobs.content:
        p_first = _first_probability(text, choice.logprobs.content, decoding)
    if thought:  # without a text behind it, it is unfinished
        text = f"{start}\n{thought}\n{end}\n\n{text}" if text else f"{start}\n{thought}"
    return Completion(
        text=text, token_ids=None, finish_reason=choice.finish_reason or "unknown", p_first=p_first,
        prompt_tokens=counts[0], completion_tokens=counts[1],
    )  # fmt: skip


def _why_refused(error: Exception) -> str | None:
    """Why a server will not judge this one prompt, as a finish_reason: another try would end the same, and the other
    prompts have nothing to do with it. None for all other errors."""
    if getattr(error, "status_code", None) != 400:
        return None
    code = getattr(error, "code", None)
    if code == "context_length_exceeded" or "maximum context length" in str(error):  # vLLM's server has no code for it
        return "context_length"
    return code if code == "content_filter" else None


def _first_probability(text: str, tokens: list, decoding: Decoding) -> float | None:
    written = [bytes(t.bytes) if t.bytes is not None else t.token.encode() for t in tokens]

    def length(count: int) -> int:
        return len(b"".join(written[:count]).decode(errors="ignore"))

    def top(i: int) -> list[tuple[str, float]]:
        others = [(t.token, t.logprob) for t in tokens[i].top_logprobs if t.token != tokens[i].token]
        return [(tokens[i].token, tokens[i].logprob), *others]

    return first_probability(text, decoding.verdict_place, len(tokens), length, top)


def _input_error(
    request: Request | None, error, done: int, asked: int, model: str, options: EndpointOptions
) -> Exception:
    """What to tell the user; a mistake of ours is passed on as it is."""
    import openai

    if request is None or not isinstance(error, openai.APIError):
        return error
    judgment = ", ".join(f"{column} {brief(value)}" for column, value in request.key.items())
    where = f"{model} at {options.base_url or 'the OpenAI API'}, {judgment}"
    status = getattr(error, "status_code", None)
    if status is not None and status < 500 and status not in (408, 409, 429):
        return InputError(f"{where}: refused: {first_line(error)}")
    return InputError(
        f"{where}: no answer after {options.max_retries} retries: {first_line(error)}; {done} of the {asked} "
        "judgments asked for are done and kept: the same command goes on from there"
    )
