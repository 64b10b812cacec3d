"""Engines as Ray actors, on this machine or on a cluster: the only module that imports Ray, and only where it is asked for.

Ray is started here for one command and ends with it, also where that is killed; of a cluster that runs already only the
actors are ours. An actor takes the GPUs of one engine, on one machine: what is shared by several GPUs is vLLM's own affair.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from conj import InputError
from conj.data.options import brief_line, require
from conj.sample.engines.vllm import EngineOptions
from conj.sample.engines.worker import Environment, Handle, Started, Worker, versions_here

OBJECT_STORE_BYTES = 256 * 2**20
SECONDS_TO_END = 10.0  # of killed processes; one that waits for a GPU's driver or a disk may take longer
# Ray reads these when it is imported, or starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # else a process for each core, which nothing uses
    "RAY_DEDUP_LOGS_SKIP_REGEX": "|",  # it prints pages about each lost process: all of them are skipped
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    num_engines: int
    num_places: Callable[[], int]  # for engines, on the machines that are there at this moment
    launch: Callable[[Callable[[], Started]], Handle]
    environment: Environment


def num_gpus_here(options: EngineOptions) -> int:
    """GPUs that this process sees; none where a CPU is asked for."""
    if options.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def num_engines_here(options: EngineOptions) -> int:
    """As many as this machine's GPUs hold, and one on a CPU."""
    return max(1, num_gpus_here(options) // options.num_gpus)


@contextlib.contextmanager
def running_ray(options) -> Iterator[Cluster]:
    """Ray, started here or reached by `options.ray_address`. On leaving it is gone, or left, whatever happened; SIGTERM
    leaves with 143.

    Raises InputError when Ray is not installed or not reached, or has no room for as many engines."""
    os.environ |= ENVIRONMENT
    try:
        import ray
    except ImportError as e:
        advice = "pip install 'ray[default]', or take --num-engines 1"
        raise InputError(f"several engines need Ray, which cannot be imported ({e}); {advice}") from None
    here = {"address": "local", "num_gpus": num_gpus_here(options), "include_dashboard": False,
            "num_cpus": max(os.cpu_count(), options.num_engines or 0), "object_store_memory": OBJECT_STORE_BYTES}  # fmt: skip
    where = here if options.ray_address is None else {"address": options.ray_address}
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    started_before = psutil.Process().children(recursive=True)
    try:
        try:
            start_ray(ray, where)
        except Exception as e:  # nothing listens there, another version, no shared memory: Ray's errors share no class
            asked = f"--ray-address {options.ray_address}" if options.ray_address else "Ray on this machine"
            raise InputError(f"{asked}: cannot be used: {brief_line(str(e))}") from None
        if in_main:  # Ray has put its own in place, which leaves with 15
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        yield describe_cluster(ray, options)
    finally:
        below = psutil.Process().children(recursive=True)
        ray.shutdown()
        end([process for process in below if process not in started_before])
        if in_main:
            signal.signal(signal.SIGTERM, before)


def end(processes: list[psutil.Process]) -> None:
    """Kills what is left of them and waits until they are gone: engines that outlive this command would hold GPU memory
    which the next one wants. Ray itself waits for none but its own daemons."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + SECONDS_TO_END
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)


def is_running(process: psutil.Process) -> bool:
    """A zombie is not: it holds nothing, and where process 1 does not reap, as in some containers, it stays for ever."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_ray(ray, where: dict) -> None:
    """Twice if it must be here: it gives its own processes 30 seconds, and a busy machine may take longer."""
    settings = where | {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        ray.init(**settings)
    except Exception:
        if where["address"] != "local":
            raise
        ray.shutdown()
        ray.init(**settings)


def describe_cluster(ray, options) -> Cluster:
    """What a cluster that was reached offers to engines. Raises InputError where that is less than is asked for."""

    def places(kind: str, each: int) -> int:
        return sum(int(node["Resources"].get(kind, 0)) // each for node in ray.nodes() if node["Alive"])

    on_gpus = options.device != "cpu" and places("GPU", 1) > 0
    kind, each = ("GPU", options.num_gpus) if on_gpus else ("CPU", 1)
    num_places = places(kind, each)
    num_engines = options.num_engines or (num_places if on_gpus else 1)
    require(
        1 <= num_engines <= num_places,
        f"--num-engines: expected at most {num_places}, found {max(num_engines, 1)}: each takes {each} {kind} of one machine",
    )
    resources = {"num_gpus": each, "num_cpus": 0} if on_gpus else {"num_cpus": 1}
    actor_class = ray.remote(**resources)(Worker)

    def launch(start: Callable[[], Started]) -> Handle:
        actor = actor_class.remote(start)
        return Handle(
            start=lambda: actor.start.remote().future(),
            step=lambda requests: actor.step.remote(requests).future(),
            kill=lambda: ray.kill(actor),
        )

    num_threads = None
    if not on_gpus:
        import torch

        num_threads = torch.get_num_threads()
    environment = Environment(versions=versions_here(), num_threads=num_threads)
    return Cluster(
        num_engines=num_engines, num_places=lambda: places(kind, each), launch=launch, environment=environment
    )  # fmt: skip
