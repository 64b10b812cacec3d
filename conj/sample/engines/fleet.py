"""Prompts to judgments with one engine in this process, or with several in processes of their own.

This process hands out the prompts, all judgments of one together, and writes what comes back: which engine does what, how
many there are and what is lost on the way leaves no trace in the file. An engine always has twice as many judgments at hand
as it writes at the same time, or its share of what is left. What a lost engine had goes to the others, and it is started
again, MAX_RESTARTS times in a run; then the run goes on with fewer. A prompt that was with MAX_LOSSES lost engines, alone
with the last of them, ends the run by its name.
"""

import concurrent.futures
import functools
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from tqdm import tqdm

from conj import InputError
from conj.data.files import brief
from conj.data.options import brief_line, option, require_each
from conj.model.folder import JudgeModel
from conj.sample.engines import vllm
from conj.sample.engines.completion import Completions, Decoding, Request
from conj.sample.engines.ray_cluster import num_engines_here, running_ray
from conj.sample.engines.vllm import EngineOptions
from conj.sample.engines.worker import Handle, started_vllm

MAX_RESTARTS = 3  # of engines, in a run
MAX_LOSSES = 3  # of engines, with the same prompt
CALLS = 2  # under way at an engine: it never waits for this process
SECONDS_TO_LOOK = 5.0  # between looks at what the cluster has, while an engine starts
# What an endpoint has for itself.
ENGINES_ALONE = (
    "device", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "num_engines", "ray_address", "max_num_seqs",
    "max_num_batched_tokens", "gpu_memory_utilization",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FleetOptions(EngineOptions):
    num_engines: int | None = option(
        None,
        help="number of engines, each with the whole model; by default as many as the GPUs hold, 1 on a CPU. More than one "
        "need Ray",
        affects_result=False,
    )
    ray_address: str | None = option(
        None,
        help="HOST:PORT of a Ray cluster that runs, on whose machines the engines start; auto: the one of this machine. By "
        "default Ray is started here, if there is more than one engine",
        affects_result=False,
    )

    def __post_init__(self):
        super().__post_init__()
        require_each(self, ("num_engines",), lambda value: value >= 1, "1 or more")


def complete_by_engines(
    requests: Iterable[Request], count: int, model: JudgeModel, options: FleetOptions, decoding: Decoding
) -> Completions:
    """Each request with its completion, as it finishes; `count`: how many they are at most. One engine runs in this process.

    Raises InputError for engines that cannot start, when all are lost, and for a prompt that ends engines."""
    if options.ray_address is None and (options.num_engines or num_engines_here(options)) == 1:
        yield from vllm.complete_by_vllm(requests, model, options, decoding)
        return
    with running_ray(options) as cluster:
        start = functools.partial(started_vllm, model, options, decoding, cluster.environment)
        launch = functools.partial(cluster.launch, start)
        yield from complete_by_fleet(requests, count, launch, cluster.num_engines, cluster.num_places)


@dataclass(kw_only=True, eq=False)
class Unit:
    """What is left to do of one prompt."""

    requests: dict[str, Request]  # by name
    num_losses: int = 0  # of engines that had it


@dataclass(kw_only=True, eq=False)
class Engine:
    number: int
    handle: Handle
    starting: Future
    num_seqs: int | None = None  # not before it has started
    calls: deque[Future] = field(default_factory=deque)
    asked: dict[str, Unit] = field(default_factory=dict)  # what it has at hand, by name
    alone: bool = False  # with a unit that may have ended two engines


def complete_by_fleet(
    requests: Iterable[Request], count: int, launch: Callable[[], Handle], num_engines: int,
    num_places: Callable[[], int],
) -> Completions:  # fmt: skip
    """Each request with its completion, as it finishes, by `num_engines` workers that `launch` makes. Requests of one prompt
    (`id`) stand together. `num_places`: how many workers there is room for at this moment."""
    fleet = Fleet(requests, count, launch, num_engines, num_places)
    try:
        while True:
            for engine in fleet.engines:
                fleet.hand_out(engine)
            if fleet.is_done():
                return
            fleet.wait()
            for engine in list(fleet.engines):
                yield from fleet.finished(engine)
    finally:
        for engine in fleet.engines:
            engine.handle.kill()


class Fleet:
    """The engines, and what is left to do."""

    def __init__(self, requests, count, launch, num_engines, num_places):
        by_prompt = itertools.groupby(requests, key=lambda request: request.key["id"])
        self.units = (Unit(requests={request.name: request for request in group}) for _, group in by_prompt)
        self.num_left = count  # to be handed out, at most
        self.again, self.suspects = deque(), deque()  # units of lost engines; those that were so twice
        self.launch, self.num_engines, self.num_places = launch, num_engines, num_places
        self.num_restarts, self.looked = 0, time.monotonic()
        self.ever_started = self.ever_finished = False
        self.engines = [self.new_engine(number) for number in range(1, num_engines + 1)]

    def new_engine(self, number: int) -> Engine:
        handle = self.launch()
        return Engine(number=number, handle=handle, starting=handle.start())

    def hand_out(self, engine: Engine) -> None:
        """Gives an engine what it has room for, and keeps calls under way as long as it has something to do."""
        if engine.num_seqs is None or len(engine.calls) == CALLS:
            return
        batch = []
        engine.alone = engine.alone and bool(engine.asked)
        if self.suspects and engine is next(e for e in self.engines if e.num_seqs is not None):
            if not engine.asked:  # one at a time and nothing beside it: it shows who it is
                engine.alone = True
                batch += self.give(engine, self.suspects.popleft())
        elif not engine.alone:
            room = self.room(engine)
            while len(engine.asked) < room and (unit := self.next_unit()):
                batch += self.give(engine, unit)
        if batch:
            engine.calls.append(engine.handle.step(batch))
        while engine.asked and len(engine.calls) < CALLS:
            engine.calls.append(engine.handle.step([]))

    def room(self, engine: Engine) -> int:
        """How many judgments it may have at hand."""
        waiting = sum(len(unit.requests) for unit in (*self.again, *self.suspects))
        left = self.num_left + waiting + sum(len(e.asked) for e in self.engines)
        return min(2 * engine.num_seqs, -(-left // len(self.engines)))

    def next_unit(self) -> Unit | None:
        if self.again:
            return self.again.popleft()
        if (unit := next(self.units, None)) is None:
            self.num_left = 0
        else:
            self.num_left -= len(unit.requests)
        return unit

    def give(self, engine: Engine, unit: Unit) -> list[Request]:
        engine.asked |= dict.fromkeys(unit.requests, unit)
        return list(unit.requests.values())

    def is_done(self) -> bool:
        """Whether nothing is left. Asked when every engine that is up has what it can take."""
        if self.again or self.suspects or any(engine.asked for engine in self.engines):
            return False
        if (unit := self.next_unit()) is not None:  # no engine is up yet
            self.again.append(unit)
        return unit is None

    def wait(self) -> None:
        """Until an engine has finished something, has started or is lost."""
        if not self.engines:
            raise InputError(
                f"all engines are lost, the last by: {self.cause}; {KEPT}" if self.ever_started else self.cause
            )
        futures = [engine.calls[0] if engine.calls else engine.starting for engine in self.engines
                   if engine.calls or engine.num_seqs is None]  # fmt: skip
        assert futures  # else an engine is idle beside work
        concurrent.futures.wait(futures, SECONDS_TO_LOOK, concurrent.futures.FIRST_COMPLETED)
        starting = [engine for engine in self.engines if engine.num_seqs is None and not engine.starting.done()]
        if starting and time.monotonic() - self.looked > SECONDS_TO_LOOK:
            self.looked = time.monotonic()
            if self.num_places() < len(self.engines):  # a machine was lost, and is known to be by now
                self.lose(starting[-1], InputError("there is no machine for it any more"))

    def finished(self, engine: Engine) -> Completions:
        """What an engine has finished; it may be lost on the way."""
        while True:
            try:
                if engine.num_seqs is None and engine.starting.done():
                    engine.num_seqs, self.ever_started = engine.starting.result(), True
                if not engine.calls or not engine.calls[0].done():
                    return
                found = engine.calls.popleft().result()
            except Exception as e:  # of its own, or of what carries it: none of it is a reason to lose the others
                return self.lose(engine, e)
            self.ever_finished = self.ever_finished or bool(found)
            for name, completion in found:
                yield engine.asked.pop(name).requests.pop(name), completion

    def lose(self, engine: Engine, error: Exception) -> None:
        """Takes back what an engine had, and starts it again if it may. Raises InputError for a prompt that ends engines."""
        engine.handle.kill()
        self.engines.remove(engine)
        self.cause = cause_of(error)
        units = list(dict.fromkeys(engine.asked.values()))
        for unit in units:
            unit.num_losses += 1
            if unit.num_losses == MAX_LOSSES and not self.ever_finished:  # no one prompt's fault
                raise InputError(f"engines end before their first judgment, the last by: {self.cause}")
            if unit.num_losses == MAX_LOSSES:
                [id] = {request.key["id"] for request in unit.requests.values()}
                raise InputError(
                    f"prompt {brief(id)}: {MAX_LOSSES} engines were lost with it, the last with nothing else at hand: "
                    f"{self.cause}; {KEPT}; without this prompt it can end"
                )
        self.suspects.extend(unit for unit in units if unit.num_losses == MAX_LOSSES - 1)
        self.again.extendleft(unit for unit in reversed(units) if unit.num_losses < MAX_LOSSES - 1)
        # What is wrong with a model or a machine at the start stays wrong.
        restart = not isinstance(error, InputError) and self.num_restarts < MAX_RESTARTS
        restart = restart and self.num_places() > len(self.engines)
        what = f"is lost, with {len(units)} prompts at hand" if engine.num_seqs is not None else "does not start"
        then = f"{len(self.engines)} go on"
        if restart:
            self.num_restarts += 1
            self.engines.append(self.new_engine(engine.number))
            then = f"it is started again ({self.num_restarts} of {MAX_RESTARTS} restarts)"
        tqdm.write(f"engine {engine.number} of {self.num_engines} {what}: {self.cause}; {then}", file=sys.stderr)


KEPT = "what is done is kept: the same command goes on from there"


def cause_of(error: Exception) -> str:
    """An engine's end in a line: what it raised, or how its process ended."""
    error = getattr(error, "cause", None) or error  # Ray's, of what a worker raised
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    text = text.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    return brief_line(text, 300)
