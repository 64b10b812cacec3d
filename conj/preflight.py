"""Before a run: everything that a later stage would refuse, while nothing is spent yet.

    conj check mine.toml

`conj run` does the same before its first stage. The cheap part comes first: settings, data, config, headers and tokenizer
of each model, the devices. Then what takes time: every weight is read once, and the disk is asked for the room that
checkpoints take.
"""

import dataclasses
import functools
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from conj import InputError
from conj.data import manifest
from conj.data.benchmarks import locate_data
from conj.data.files import sha256_file
from conj.data.hub import name_of
from conj.data.identity import hash_judge
from conj.data.judged import JudgedRunOptions
from conj.data.judges import load_judge
from conj.data.options import require, run_command
from conj.data.preprocess import as_mapping
from conj.data.progress import progress
from conj.data.readers import check_first_row
from conj.model.folder import DecoderFolder, JudgeModel, check_finite, check_model
from conj.sample.engines.http import check_endpoint
from conj.sample.engines.vllm import check_engine
from conj.sample.evaluation.evaluate import find_models, is_of_runs, judge_of
from conj.sample.stage import SamplingOptions
from conj.settings import Run, check_file_options, resolve
from conj.train.memory import disk_bytes
from conj.train.options import DPOOptions, check_machine, choose_shard_size

ON_ALL_RANKS = ("reference", "dpo")  # under torchrun
SAME_IN_TRAINING = ("dtype", "attention", "kernels", "model")  # a stored reference is of one forward pass
SAME_IN_A_SWEEP = ("data", "subsets", "limit", "seed", "num_resamples")  # of the evaluation: the runs are compared


def at_hand(run: Run) -> Run:
    """The run with a model's folder for its name on the hub, and with the commits of data sets of the hub: one for all
    stages, and for all later starts."""
    return dataclasses.replace(run, options={stage: options.at_hand() for stage, options in run.options.items()})


def check(runs: list[Run]) -> dict[Path, JudgeModel]:
    """Raises InputError for data, model folders and devices that cannot be used, and for stages that do not fit together,
    before hours go into what comes before them. Returns the models."""
    stages = [(stage, options) for run in runs for stage, options in run.options.items()]
    for folder in (run.folder for run in runs):
        there = existing(folder)
        require(there.is_dir() and os.access(there, os.W_OK), f"{folder}: expected a folder that can be written")
    nodes, count = runs[0].nodes, runs[0].nodes.get("nnodes", 1)
    require(
        count == 1 or "launcher" in nodes,
        f"--nnodes {count}: expected a --launcher that starts a command on each node, found none",
    )
    for name in SAME_IN_A_SWEEP:
        found = {str(getattr(options, name)): None for stage, options in stages if stage == "evaluate"}
        require(
            len(found) < 2, f"[evaluate] {name}: expected the same in all runs of a sweep, found {', '.join(found)}"
        )
    for run in (run for run in runs if run.options.keys() >= set(ON_ALL_RANKS)):
        for name in SAME_IN_TRAINING:
            first, second = (str(getattr(run.options[stage], name)) for stage in ON_ALL_RANKS)
            require(first == second, f"[dpo] {name}: expected {first}, as in [reference], found {second}")
    for run in runs:
        check_one_judge(run)
    named = [
        (name, getattr(options, "columns", None), of == "exclude")
        for _, options in stages
        for of in ("data", "exclude")
        for name in getattr(options, of, ())
    ]
    for name, columns, is_excluded in dict.fromkeys(named):
        data, benchmark = locate_data(name)
        columns = None if is_excluded and benchmark else as_mapping(columns)
        check_first_row(data, columns, where_they_fit=is_excluded)
    models, read = {}, functools.cache(check_model)
    for stage, options in stages:
        if asks_endpoint(stage, options):
            check_endpoint(options)
        if getattr(options, "model", None) is not None:
            # Training takes what fits the model; a sampler that is asked for more refuses.
            if stage == "evaluate":  # a judge may bring a template and a length of its own
                [model, *_] = find_models(options, judge_of(options)).values()
            else:
                model = read(options.model, None if stage in ON_ALL_RANKS else options.max_length)
            models[options.model] = model
            if stage in ON_ALL_RANKS:
                require(model.untrainable is None, f"[{stage}] cannot be trained: {model.untrainable}")
            else:
                check_engine(model, options)
            if isinstance(options, SamplingOptions):
                options.opens_thought(model)
    if trained := [(stage, options) for stage, options in stages if stage in ON_ALL_RANKS]:
        for stage, options in trained:
            try:
                choose_shard_size(options.dp_shard_size, runs[0].num_ranks, runs[0].num_processes)
            except InputError as e:
                raise InputError(f"[{stage}] {e}") from None
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(check_machine, trained, runs[0].num_processes, runs[0].num_ranks).result()
    return models


def check_one_judge(run: Run) -> None:
    """Raises InputError for stages with another judge than the first one's: they refuse what it made, when it is made."""
    judged = {
        stage: options.read_judge() for stage, options in run.options.items() if isinstance(options, JudgedRunOptions)
    }
    evaluation = run.options.get("evaluate")
    if "dpo" in judged and evaluation is not None and not evaluation.judgments and not evaluation.name:
        asked = load_judge(evaluation.judge, evaluation.judge_text)
        judged |= {"evaluate": asked} if is_of_runs(asked) else {}
    for stage, judge in judged.items():
        first, expected = next(iter(judged.items()))
        advice = "; a --evaluate.name asks the model by another one" if stage == "evaluate" else ""
        require(
            hash_judge(judge) == hash_judge(expected),
            f"[{stage}] judge: expected {expected.name}, as in [{first}], found {judge.name}{advice}",
        )


def asks_endpoint(stage: str, options) -> bool:
    """Whether judgments come from an endpoint and not from an engine here."""
    if stage == "evaluate":
        return not options.judgments and judge_of(options).backend == "openai"
    return getattr(options, "api_model", None) is not None


def survey(runs: list[Run]) -> dict[Path, str]:
    """What is the case of each file that the stages make: `complete`, `unfinished`, `to do`, `taken from` another run, or
    `stale` and why. Nothing is written. Raises InputError for what a stage reads, is not there and no stage here makes."""
    found, made_by, hash_once = {}, {}, functools.cache(sha256_file)
    for run in runs:
        keys, places = {}, {}  # of the run's files, by name: by what settings they are made; where they lie, if they do
        for options in run.options.values():
            for artefact, inputs in options.makes().items():
                base = getattr(options, "model", None)
                for path in (p for p in inputs if isinstance(p, Path) and p.name not in places):
                    require(path.exists(), f"{path}: no such file; make it by its stage first")
                inputs = [places.get(p.name, p) if isinstance(p, Path) and p != base else p for p in inputs]
                made_of = [keys.get(p.name, str(p)) if isinstance(p, Path) else p for p in inputs]
                key = keys[artefact.name] = repr((artefact.name, manifest.describe_options(options), made_of))
                first = made_by.setdefault(key, run)
                state, place = _state(options, artefact, inputs, hash_once)
                if state == "to do" and first is not run:
                    state = f"taken from {first.folder}"
                found[artefact], places[artefact.name] = state, place
    return found


def _state(options, artefact: Path, inputs: list, hash_file: Callable) -> tuple[str, Path]:
    """The case of one file, and where it lies; where it is still to be made, a path at which nothing is."""
    nowhere = artefact.with_name(f"{artefact.name} to be made")
    try:
        if awaited := [path for path in inputs if isinstance(path, Path) and not path.exists()]:
            made = manifest.read_manifest(artefact)
            if artefact.exists() and made is not None:
                raise InputError(
                    f"{artefact}: was made from another {awaited[0].name} than will be made now; delete it"
                )
            return "to do", nowhere
        now = manifest.describe(inputs, options, hash_file)
        state = manifest.state(artefact, now)
        if state == "to do" and (there := manifest.find_complete(artefact.name, now, options)):
            return f"taken from {there.parent}", there
        return state, manifest.locate(artefact) if state == "complete" else nowhere
    except InputError as e:
        return f"stale: {e}", artefact


def check_costly(runs: list[Run], models: dict[Path, JudgeModel], found: dict[Path, str]) -> None:
    """Raises InputError for what is stale, for a weight that is NaN or infinite, and for a disk too small for the
    checkpoints: of what is still to be made, as `found` says of the artefacts."""
    for state in found.values():
        require(not state.startswith("stale: "), state.removeprefix("stale: "))
    for run in runs:
        options = run.options.get("dpo")
        if options is not None and found[run.folder / "model"] in ("to do", "unfinished"):
            check_disk(run.folder, options, models[options.model].decoder)
    left = {"to do", "unfinished"}
    bases = {options.model: None for run in runs for stage, options in run.options.items()
             if stage in ON_ALL_RANKS and left & {found[artefact] for artefact in options.makes()}}  # fmt: skip
    for model in bases:
        tensors = models[model].decoder.tensors.items()
        check_finite(progress(tensors, desc=f"reading {model.name}", unit=" tensors"))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_disk(folder: Path, options: DPOOptions, base: DecoderFolder) -> None:
    """Raises InputError for a disk that has no room for training's checkpoints and model."""
    checkpoints = disk_bytes(base.config, options.keep_checkpoints)["checkpoints"]
    exported = sum(tensor.stop - tensor.start for tensor in base.tensors.values())  # as it is stored
    kept = options.keep_checkpoints + 1
    there = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    needed = checkpoints + exported - there
    free = shutil.disk_usage(existing(folder)).free
    require(
        needed <= free,
        f"{folder}: expected room for {needed / 1e9:.1f} GB ({kept} checkpoints of {checkpoints / kept / 1e9:.1f} "
        f"GB, and the model), found {free / 1e9:.1f} GB; fewer --dpo.keep-checkpoints take less",
    )


def describe(model: JudgeModel) -> str:
    """What was read of a model folder, for who wants to see it."""
    tokenizer = model.tokenizer
    names = {number: name for name, number in tokenizer.special.items()}
    lines = {
        "context": f"{model.max_length} tokens are used",
        "end of a judgment": ", ".join(f"{names.get(i, '')} {i}".strip() for i in model.end_ids),
        "control tokens": len(tokenizer.special),
    }
    if model.decoder is not None:
        config, rope = model.decoder.config, model.decoder.config.rope
        stretched = (
            "" if rope.kind == "default" else f", {rope.kind}, {rope.factor:g} times {rope.original_context} tokens"
        )
        lines |= {
            "architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"{config.num_attention_heads} heads of {config.head_dim} and {config.num_key_value_heads} for keys and values",
            "rope": f"theta {rope.theta:g}{stretched}",
            "embeddings": f"{config.vocab_size}, {'tied' if config.tie_word_embeddings else 'and a head of their own'}",
            "weights": model.decoder.dtype,
        }
    else:
        lines["cannot be trained"] = model.untrainable
    return "\n".join([name_of(model.folder), *(f"  {name:18} {value}" for name, value in lines.items())])


def main(given) -> None:
    runs = [at_hand(run) for run in resolve(given)]
    models = check(runs)
    check_costly(runs, models, survey(runs))
    print("\n".join(map(describe, models.values())))
    print("nothing that a stage would refuse was found")


if __name__ == "__main__":
    run_command(main, check_file_options(), __doc__)
