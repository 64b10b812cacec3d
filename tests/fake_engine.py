"""A stand-in for vLLM: what it writes is a function of the prompt's text."""

import contextlib
from collections.abc import Callable

import pytest

from conj.sample import judge
from conj.sample.engines import vllm as engine
from conj.sample.engines.completion import Completion, Request


def use_fake_engine(monkeypatch: pytest.MonkeyPatch, write: Callable[[str], str]) -> list[Request]:
    """From now on `write(prompt)` is what models write. Returns the list of requests that will have been made."""
    requests = []

    def generate(_, asked, model, decoding):
        for request in asked:
            requests.append(request)
            text = write(model.tokenizer.plain.decode(request.prompt_ids, skip_special_tokens=False))
            yield request, Completion(text=text, token_ids=model.tokenizer.completion_ids(text), finish_reason="stop")

    for module in engine, judge:
        monkeypatch.setattr(module, "generate", generate)
        monkeypatch.setattr(module, "running_engine", lambda *_, **__: contextlib.nullcontext())
    return requests
