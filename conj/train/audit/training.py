"""What a finished training must fulfil: its reference's key, step 0, the order of its data, its exported weights."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open

from conj import InputError
from conj.data.files import read_jsonl
from conj.data.manifest import locate, manifest_path, read_manifest
from conj.data.model_files import JUDGE_FILE, weight_files
from conj.data.options import require
from conj.data.packs import plan_packs
from conj.data.tokens import TOKENS, check_tokens, read_key
from conj.train.audit.chain import Check, check, recorded_base
from conj.train.audit.compare import first_difference
from conj.train.checkpoint import check_checkpoint, list_checkpoints, read_tensors
from conj.train.dpo import select_arithmetic
from conj.train.log import step_order
from conj.train.optimizer import learning_rate_at
from conj.train.options import AuditOptions, DPOOptions
from conj.train.plan import Plan, make_plan
from conj.train.reference import check_reference, is_exact
from conj.train.sharding import World, build_sharded_model


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A trained run as its manifest and its log tell it, and what it was trained on."""

    options: DPOOptions
    num_steps: int
    plan: Plan
    tokens: tuple[str, dict[str, str]]  # sha256 and key of the tokens, made again from the pairs
    log: list[dict]  # rows of metrics.jsonl
    is_here: bool  # made by these versions on such a machine: its bits can be had again


def base_of(options: AuditOptions) -> Path:
    return options.model or Path(recorded_base(options.run_dir)["path"])


def read_run(options: AuditOptions, world: World) -> TrainedRun:
    """Options, plan and log of a finished run. Raises InputError when pairs, reference and base do not fit together."""
    made = read_manifest(options.run_dir / "model")
    elsewhere = dict.fromkeys(Path(entry["path"]).parent for entry in made["inputs"][:2])  # pairs and reference
    try:
        places = {"run_dir": options.run_dir, "from_runs": tuple(elsewhere), "model": base_of(options)}
        # In folders of versions that knew the card's judge alone there is none.
        judge = locate(options.run_dir / "model") / JUDGE_FILE
        trained = DPOOptions(**places, **made["options"], **({"judge": str(judge)} if judge.exists() else {}))
    except TypeError as e:
        path = manifest_path(options.run_dir / "model")
        raise InputError(f"{path}: options of another version of conj: {e}") from None
    select_arithmetic(trained, world.device)
    # Made again, and kept out of what is audited; all ranks have mapped them when the main one deletes them.
    with TemporaryDirectory() as beside:
        folder = world.on_main(lambda: Path(beside))
        plan = make_plan(trained, world, elsewhere=True, folders=[folder])
        tokens = world.on_main(lambda: (check_tokens(folder / TOKENS), read_key(folder / TOKENS)))
        world.any(False)  # waits for all
    columns = {"step": int, "order": str, "num_ranks": int, "rewards/margins": float}
    log = read_jsonl(trained.find("model").with_name("metrics.jsonl"), columns)
    here, there = world.describe(), made["machine"]
    same = here == there and {row["num_ranks"] for row in log} == {world.size}
    is_here = not plan.stale and (here["device"] == there["device"] if trained.audit_mode else same)
    return TrainedRun(options=trained, num_steps=made["num_rows"], plan=plan, tokens=tokens, log=log, is_here=is_here)


def check_run(run: TrainedRun, options: AuditOptions, world: World) -> Iterator[Check]:
    """The tokens, the reference's key, step 0, the order of the data, and the exported weights."""
    places = (folder / TOKENS for folder in (options.run_dir, *run.options.from_runs))
    if path := next((path for path in places if path.exists() and is_taken(path, run.tokens[1])), None):
        name = TOKENS if path.parent == options.run_dir else str(path)
        yield check(f"{name} from the pairs", lambda: compare_tokens(path, run.tokens[0]))
    stale = run.plan.stale
    fields = f"; made elsewhere: another {', '.join(stale)}" if stale else ""
    yield Check("reference key", "holds", f"weights, config, tokenizer, tokens and dtype are those of the base{fields}")

    yield check("step 0", lambda: check_step_0(run, options, world))
    yield check("data order", lambda: check_order(run))
    newest = next(iter(list_checkpoints(run.options.find("model").with_name("checkpoints"))), None)
    if newest is None or check_checkpoint(newest)["step"] != run.num_steps:
        yield Check("exported weights", "unchecked", f"the checkpoint of step {run.num_steps} is not there any more")
    else:
        yield check("exported weights", lambda: check_export(run.options.find("model"), newest))


def is_taken(path: Path, key: dict[str, str]) -> bool:
    """Whether stages take a file for that of this key, the code aside. Beside the pairs may lie tokens of another base."""
    made = read_key(path)
    return all(made.get(name) == key[name] for name in key if name != "code")


def compare_tokens(path: Path, expected: str) -> str:
    require(check_tokens(path) == expected, "its tokens are not those of pairs.jsonl and the base's tokenizer")
    return "the same tokens, made again"


def check_step_0(run: TrainedRun, options: AuditOptions, world: World) -> str:
    """The base model, in packs of the training, gives the stored logprobs: every margin starts at 0, or within rounding of it."""
    exact, sample = run.is_here and is_exact(world), draw_pairs(run, options)
    packs = plan_packs(run.plan.pairs, sample, max_tokens=run.options.max_tokens_per_pack, share=run.options.share)
    model = build_sharded_model(run.options.model, world, run.options.dtype)
    check_reference(model, run.plan.pairs, run.plan.reference, packs, world, run.options.dtype, exact=exact)
    margin = run.log[0]["rewards/margins"]
    require(margin == 0 or not exact, f"metrics.jsonl: step 1: expected a margin of 0, found {margin}")
    return f"{len(sample)} pairs have the stored logprobs {'bit for bit' if exact else 'within rounding'}"


def draw_pairs(run: TrainedRun, options: AuditOptions) -> list[int]:
    usable = run.plan.train + run.plan.held_out
    return sorted(random.Random(options.seed).sample(usable, min(options.num_pairs, len(usable))))


def check_order(run: TrainedRun) -> str:
    """Each step of the log took the pairs that the seed gives it, at the learning rate of the schedule."""
    steps, num = run.plan.steps, len(run.plan.steps)
    require(num == run.num_steps == len(run.log), f"expected {num} steps, found {len(run.log)} in the log")
    for number, (packs, row) in enumerate(zip(steps, run.log), 1):
        rate = learning_rate_at(number - 1, num, run.options)
        expected = {"step": number, "order": step_order(packs), "learning_rate": rate}
        if name := first_difference(expected, row, tuple(expected)):
            found = f"expected {expected[name]} by seed and options, found {row.get(name)}"
            raise InputError(f"metrics.jsonl:{number}: step {number}: {name}: {found}")
    return f"{num} steps follow from seed {run.options.seed}"


def check_export(model: Path, checkpoint: Path) -> str:
    """The weights in model/ are the last checkpoint's, in the model's dtype, bit for bit."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(model)]
        exported = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (an open file, not a dict)
        for key, tensor in read_tensors(checkpoint):
            kind, _, name = key.partition(".")
            if kind == "weight":
                require(name in exported, f"model/: {name} is missing")
                found = exported[name].get_tensor(name)
                require(torch.equal(tensor.to(found.dtype), found), f"model/: {name} is not {checkpoint.name}'s")
    return f"model/ is {checkpoint.name} in {str(found.dtype).removeprefix('torch.')}, bit for bit"
