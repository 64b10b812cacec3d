"""How fast stages are: rates that are given, those of a run's own files, or of a few rows taken through the stages."""

import dataclasses
import statistics
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conj import InputError
from conj.data import manifest
from conj.data.files import read_jsonl, stream_jsonl
from conj.data.options import require
from conj.run import command_line
from conj.settings import STAGES, Run


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one GPU; None where nothing is known."""

    train_flops: float | None  # a second
    sample_tokens: float | None  # a second
    source: str


def find_rates(given, run_dir: Path, num_gpus: int) -> Rates:
    """Rates as given, else those of the run's finished or begun stages."""
    train, sample, source = given.train_tflops, given.sample_tokens_per_second, "as given"
    found = rates_of(run_dir, num_gpus)
    if (train is None and found[0]) or (sample is None and found[1]):
        source = f"as given, else of {run_dir}" if train or sample else f"of {run_dir}"
    return Rates(train_flops=train * 1e12 if train else found[0], sample_tokens=sample or found[1], source=source)


def rates_of(run_dir: Path, num_gpus: int) -> tuple[float | None, float | None]:
    """FLOP/s and written tokens a second of each GPU in what a run folder holds: the median step but for the first, and stage
    2 from the start of its engine to its end."""
    train = sample = None
    with suppress(InputError, OSError):
        rows = read_jsonl(run_dir / "metrics.jsonl", {"flops_per_second": float, "num_ranks": int})[1:]
        train = statistics.median(row["flops_per_second"] / row["num_ranks"] for row in rows) if rows else None
    with suppress(InputError, OSError):
        made = manifest.read_manifest(run_dir / "repeated.jsonl") or {"complete": False}
        if made["complete"] and (num_made := made["counts"].get("judgments_made")):
            rows = stream_jsonl(run_dir / "repeated.jsonl", {"token_ids": list})  # none of an endpoint's
            mean = statistics.fmean(len(row["token_ids"]) for _, row in rows)
            sample = mean * num_made / made["seconds"] / num_gpus
    return train, sample


def probe(run: Run, num_rows: int) -> tuple[float | None, float | None]:
    """Takes the first rows of the data through stages 1 to 6 in a folder of its own, four steps at most, and gives their rates
    of each GPU. The start of the engine counts: few rows say less than a run will do. Raises InputError where a stage is left
    out, or fails."""
    left_out = ", ".join(stage for stage in STAGES[:-1] if stage not in run.options)
    require(not left_out, f"--probe: expected stages 1 to 6, found settings without {left_out}")
    with tempfile.TemporaryDirectory(prefix="conj-probe-") as folder:
        for stage in STAGES[:-1]:
            changes = {"run_dir": Path(folder), "from_runs": ()}
            changes |= {"limit": num_rows} if stage == "preprocess" else {"max_steps": 4} if stage == "dpo" else {}
            line = command_line(stage, dataclasses.replace(run.options[stage], **changes), run.num_processes)
            print(f"probe: {stage}", flush=True)
            if subprocess.run(line, stdout=subprocess.DEVNULL).returncode:
                raise InputError(f"--probe {num_rows}: stage {stage} failed on the first rows")
        return rates_of(Path(folder), run.num_processes)
