"""Several engines at work on one file: nothing lost, nothing twice, whatever ends them. Engines are faked, in threads, except
where marked: an engine that is lost raises, as a Ray actor's call does."""

import functools
import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ENV, ROOT, num_lines, succeeds
from kill_common import descendants, is_alive

from conj import InputError
from conj.data.files import read_jsonl
from conj.sample.engines import fleet as fleet_module
from conj.sample.engines import ray_cluster, vllm
from conj.sample.engines.completion import Completion, Decoding, Request
from conj.sample.engines.fleet import MAX_RESTARTS, FleetOptions, complete_by_engines, complete_by_fleet
from conj.sample.engines.ray_cluster import num_engines_here
from conj.sample.engines.worker import Handle, Worker, started_vllm

NUM_SEQS = 8


def make_requests(num_prompts: int, num_samples: int = 4) -> list[Request]:
    keys = itertools.product(range(num_prompts), range(num_samples))
    return [Request(key={"id": f"p{i}", "index": j}, prompt_ids=[i]) for i, j in keys]


class Died(Exception):
    """What Ray raises for an actor whose process is gone."""


class Machine:
    """Starts workers in threads. `fails(number of the worker, request)` may raise; `seconds`: of one judgment."""

    def __init__(self, fails: Callable[[int, Request], None] = lambda *_: None, seconds: float = 0.0):
        self.fails, self.seconds = fails, seconds
        self.num_launched, self.made, self.most_at_hand, self.places = 0, [], Counter(), 99

    def start(self, number: int):
        @contextmanager
        def started() -> Iterator:
            self.fails(number, None)
            yield functools.partial(self.complete, number), NUM_SEQS

        return started

    def complete(self, number: int, requests) -> Iterator[tuple[Request, Completion]]:
        """As vLLM: it takes what there is, and gives what is finished in an order of its own."""
        running = []
        while True:
            while (request := next(requests)) is not None:
                running.append(request)
            self.most_at_hand[number] = max(self.most_at_hand[number], len(running))
            if not running:
                return
            for request in running[:NUM_SEQS]:
                self.fails(number, request)
            time.sleep(self.seconds)
            request = running.pop(min(NUM_SEQS, len(running)) - 1)
            self.made.append((number, request.name))
            yield request, Completion(text=request.name, token_ids=[1], finish_reason="stop")

    def launch(self) -> Handle:
        number = self.num_launched = self.num_launched + 1
        worker, lock, dead = Worker(self.start(number)), threading.Lock(), threading.Event()

        def call(method: Callable, *arguments) -> Future:
            future = Future()

            def work() -> None:
                with lock:  # one call after the other, as in an actor
                    try:
                        if dead.is_set():
                            raise Died("is gone")
                        future.set_result(method(*arguments))
                    except Exception as e:
                        dead.set()
                        future.set_exception(e)

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            return future

        return Handle(
            start=lambda: call(worker.start), step=functools.partial(call, worker.step), kill=dead.set,
        )  # fmt: skip

    def run(self, requests: list[Request], num_engines: int) -> list[str]:
        """The names of what came back, in the order in which it came."""
        num_places = lambda: self.places  # noqa: E731
        completions = complete_by_fleet(iter(requests), len(requests), self.launch, num_engines, num_places)
        return [request.name for request, completion in completions if completion.text == request.name]


def names(requests: list[Request]) -> list[str]:
    return sorted(request.name for request in requests)


@pytest.mark.parametrize("num_engines", [1, 2, 5])
def test_every_request_is_answered_once(num_engines):
    machine, requests = Machine(), make_requests(100)
    assert sorted(machine.run(requests, num_engines)) == names(requests)
    assert len(machine.made) == 400


def test_an_engine_has_twice_what_it_writes_at_the_same_time_and_the_judgments_of_a_prompt_together():
    """With less at hand it waits for the driver; a prompt that is split is encoded by two engines."""
    machine, requests = Machine(seconds=0.001), make_requests(200)
    machine.run(requests, 2)
    assert 2 * NUM_SEQS <= max(machine.most_at_hand.values()) <= 2 * NUM_SEQS + 3
    engines = {name.partition(",")[0]: set() for _, name in machine.made}
    for number, name in machine.made:
        engines[name.partition(",")[0]].add(number)
    assert {len(numbers) for numbers in engines.values()} == {1}
    assert min(Counter(number for number, _ in machine.made).values()) > 100


def test_few_prompts_are_shared_by_all_engines():
    """The first engine that is up would else take them all."""
    machine = Machine(seconds=0.01)
    machine.run(make_requests(6, 2), 3)
    assert Counter(number for number, _ in machine.made) == {1: 4, 2: 4, 3: 4}


def test_a_lost_engine_costs_nothing_but_what_it_had_begun(capsys):
    """It is started again; what it had given stays, and nothing of it comes twice."""
    fell = []

    def fails(number: int, request: Request | None) -> None:
        if number <= 3 and number not in fell and sum(maker == number for maker, _ in machine.made) >= 10 * number:
            fell.append(number)
            raise Died("Worker exit detail: Worker was killed. Some common causes are known.")

    machine, requests = Machine(fails, seconds=0.001), make_requests(200)
    assert sorted(machine.run(requests, 3)) == names(requests)
    assert sorted(fell) == [1, 2, 3] and machine.num_launched == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "is lost" in line]
    assert (
        len(said) == 3
        and len(machine.made) <= 800 + 3 * 2 * NUM_SEQS * 4
        and "prompts at hand: Worker was killed.; it is started again (1 of 3" in said[0]
    )


def test_when_restarts_are_used_up_fewer_go_on_and_when_all_are_lost_the_cause_is_said(capsys):
    """Endless restarts hide a broken machine; a traceback of Ray's hides the cause."""

    def fails(number: int, request: Request | None) -> None:
        if number != 1 and request is not None:
            raise Died(f"engine {number} fell")

    machine, requests = Machine(fails, seconds=0.002), make_requests(60)
    assert sorted(machine.run(requests, 2)) == names(requests)
    assert machine.num_launched == 2 + MAX_RESTARTS
    assert "1 go on" in capsys.readouterr().err.splitlines()[-1]
    machine = Machine(lambda number, request: len(machine.made) > 20 and fails(number + 1, request), seconds=0.002)
    machine.places = 0
    with pytest.raises(
        InputError, match="^all engines are lost, the last by: Died: engine [23] fell; .* kept: the same"
    ):
        machine.run(make_requests(60), 2)


def test_a_prompt_that_ends_engines_is_named_before_they_are_used_up(capsys):
    """It would else take one engine after the other with it, and the user would look for a broken machine. None is
    blamed for what ran beside it."""

    def fails(number: int, request: Request | None) -> None:
        if request is not None and request.key["id"] == "p37":
            raise Died("segmentation fault")

    for num_engines in (1, 2, 4):
        machine = Machine(fails, seconds=0.0005)
        with pytest.raises(InputError, match="^prompt 'p37': 3 engines were lost with it, the last with nothing else"):
            machine.run(make_requests(100), num_engines)
        assert machine.num_launched <= num_engines + MAX_RESTARTS


def test_a_model_that_no_engine_can_run_is_not_blamed_on_a_prompt(capsys):
    def fails(number: int, request: Request | None) -> None:
        if request is not None:
            raise Died("no such kernel")

    with pytest.raises(
        InputError, match="^engines end before their first judgment, the last by: Died: no such kernel$"
    ):
        Machine(fails).run(make_requests(20), 2)


def test_prompts_that_were_beside_one_that_ends_engines_are_all_answered():
    """It ends two engines, is then alone with a third, and passes: so do those that were in both."""
    fell = []

    def fails(number: int, request: Request | None) -> None:
        if request is not None and request.key["id"] == "p3" and len(fell) < 2:
            fell.append(number)
            raise Died("once more")

    machine, requests = Machine(fails), make_requests(40)
    assert sorted(machine.run(requests, 1)) == names(requests) and len(fell) == 2


def test_an_engine_that_cannot_start_is_not_started_again_and_its_reason_is_the_error(capsys):
    """A model that does not fit does not fit the second time either."""

    def fails(number: int, request: Request | None) -> None:
        if request is None and number != 2:
            raise InputError("m: vLLM cannot start with this model: no memory")

    machine, requests = Machine(fails), make_requests(20)
    assert sorted(machine.run(requests, 3)) == names(requests) and machine.num_launched == 3
    assert "engine 1 of 3 does not start: m: vLLM cannot start" in capsys.readouterr().err
    with pytest.raises(InputError, match="^m: vLLM cannot start with this model: no memory$"):
        Machine(lambda number, request: fails(1, request)).run(requests, 2)


def test_a_lost_machine_takes_no_engine_that_would_wait_for_it(monkeypatch, capsys):
    """A cluster that lost a node keeps a new actor waiting for ever: the run would never end, or never say why."""
    monkeypatch.setattr(fleet_module, "SECONDS_TO_LOOK", 0.05)
    machine, launch = Machine(seconds=0.001), Machine.launch

    def launch_once(self: Machine) -> Handle:
        handle = launch(self)
        return handle if self.num_launched < 2 else Handle(start=Future, step=handle.step, kill=handle.kill)

    monkeypatch.setattr(Machine, "launch", launch_once)  # the second one never starts
    machine.places, requests = 1, make_requests(200)
    assert sorted(machine.run(requests, 2)) == names(requests)
    assert "engine 2 of 2 does not start: there is no machine for it" in capsys.readouterr().err


def test_prompts_are_made_as_engines_ask_for_them():
    """All token ids of a large run take more memory than a machine has."""
    made, machine = [], Machine()

    def requests() -> Iterator[Request]:
        for request in make_requests(500):
            made.append(request)
            yield request

    completions = complete_by_fleet(requests(), 2000, machine.launch, 2, lambda: 2)
    next(completions)
    assert len(made) < 100
    completions.close()


# ---- How many, and where ----


@pytest.mark.parametrize(("gpus", "options", "number"), [
    (0, {}, 1), (8, {}, 8), (8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 2),
    (2, {"tensor_parallel_size": 4}, 1), (8, {"device": "cpu"}, 1),
])  # fmt: skip
def test_all_gpus_are_used_and_a_cpu_has_one_engine(gpus, options, number, monkeypatch, tied_model):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert num_engines_here(FleetOptions(model=tied_model, **options)) == number


def test_one_engine_needs_no_ray_and_more_say_how_to_get_it(monkeypatch, tied_model):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(vllm, "complete_by_vllm", lambda requests, *_: ((request, None) for request in requests))
    given = {"model": None, "decoding": Decoding(max_new_tokens=1)}
    requests = make_requests(1)
    one = complete_by_engines(requests, 4, options=FleetOptions(model=tied_model), **given)
    assert len(list(one)) == 4
    with pytest.raises(InputError, match=r"several engines need Ray, .*pip install 'ray\[default\]'"):
        next(complete_by_engines(requests, 4, options=FleetOptions(model=tied_model, num_engines=2), **given))


def test_what_outlives_ray_is_ended_and_a_zombie_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ray_cluster, "SECONDS_TO_END", 60)  # no return before it is gone
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    process = psutil.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    before = time.monotonic()
    ray_cluster.end([psutil.Process(process.pid)])  # a zombie at its end: nobody has waited for it
    assert time.monotonic() - before < 30
    assert process.status() == psutil.STATUS_ZOMBIE and process.wait() == -signal.SIGKILL
    ray_cluster.end([process])  # nor one that is gone


def test_a_machine_with_other_versions_is_refused(tied_model):
    """The manifest says one version of vLLM; judgments of another are not what it describes."""
    environment = ray_cluster.Environment(versions={"conj": "0.0.0"}, num_threads=None)
    with pytest.raises(InputError, match="expected conj 0.0.0, as where the run was started, found"):
        started_vllm(None, FleetOptions(model=tied_model), Decoding(max_new_tokens=1), environment).__enter__()


# ---- Ray and vLLM ----

needs_engines = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "vllm")), reason="needs Ray and vLLM"
)


def workers_of(process: subprocess.Popen) -> list[int]:
    """Processes of engines below a command."""
    found = []
    for pid in descendants(process.pid):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(pid)
        except OSError:  # it has just ended
            pass
    return found


@pytest.fixture
def started() -> Iterator[Callable[[Path, int], subprocess.Popen]]:
    """Starts stage 2 in a run folder with a number of engines."""
    processes = []

    def start(run: Path, num_engines: int) -> subprocess.Popen:
        few = ["--max-new-tokens", "48", "--max-num-seqs", "8", "--num-samples", "4", "--num-engines", num_engines]
        line = [sys.executable, "-m", "conj", "repeated", "--run-dir", run, "--model", ROOT / "demo" / "base", *few]
        log = open(run / "log", "ab")
        # A shell's background jobs ignore Ctrl-C, and what they start does too.
        interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        options = {"env": ENV, "cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": interruptible}
        processes.append(subprocess.Popen(list(map(str, line)), **options))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def wait_for(holds: Callable[[], bool], process: subprocess.Popen, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not holds() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None and holds()


@pytest.fixture
def prompts(tmp_path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        data = ["--data", ROOT / "demo" / "train.jsonl", "--limit", "60"]
        succeeds("conj", "preprocess", "--run-dir", tmp_path / name, *data)
        return tmp_path / name

    return make


@pytest.mark.vllm
@needs_engines
def test_two_engines_one_killed_end_with_the_file_of_one(prompts, started):
    """The same bytes, nothing twice, and no process left."""
    one, two = prompts("one"), prompts("two")
    assert started(one, 1).wait() == 0, (one / "log").read_text()
    process, artefact = started(two, 2), two / "repeated.jsonl"
    wait_for(lambda: num_lines(artefact) >= 20, process)
    below = descendants(process.pid)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert process.wait() == 0, (two / "log").read_text()
    assert artefact.read_bytes() == (one / "repeated.jsonl").read_bytes() and num_lines(artefact) == 240
    said = (two / "log").read_text()
    assert len(re.findall(r"engine [12] of 2 (is lost|does not start).*it is started again", said)) == 1
    assert not [pid for pid in below if is_alive(pid)]


@pytest.mark.vllm
@pytest.mark.slow
@needs_engines
def test_a_driver_that_is_ended_in_any_way_leaves_no_engine_and_any_number_goes_on(prompts, started):
    """Three engines, then two, then one: SIGKILL, SIGTERM and Ctrl-C between them."""
    whole, run = prompts("whole"), prompts("run")
    assert started(whole, 1).wait() == 0
    artefact = run / "repeated.jsonl"
    for number, (sent, code) in ((3, (signal.SIGKILL, -9)), (2, (signal.SIGTERM, 143)), (2, (signal.SIGINT, 130))):
        process, before = started(run, number), num_lines(artefact)
        wait_for(lambda before=before: num_lines(artefact) >= before + 30, process)
        below = workers_of(process)
        process.send_signal(sent)
        assert process.wait() == code and len(below) == number
        end = time.monotonic() + (20 if sent == signal.SIGKILL else 0)  # then nobody is left who could wait for them
        while any(map(is_alive, below)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [pid for pid in below if is_alive(pid)]
    assert started(run, 1).wait() == 0
    assert artefact.read_bytes() == (whole / "repeated.jsonl").read_bytes()
    assert len({(row["id"], row["index"]) for row in read_jsonl(artefact)}) == num_lines(artefact) == 240
