"""The sides of `bench_train.py`, conj and TRL, with the models and pairs that both take; each imports in its own process."""

import argparse
import random
import time
from pathlib import Path

from bench_common import QWEN2, ROOT
from make_random_model import write_random_model

from conj.train.speed import peak_memory_bytes

SETTINGS = {"beta": 0.1, "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0}
GEOMETRIES = {
    "1M": {"D": 128, "F": 384, "N": 4, "K": 2, "H": 32, "V": 1_536, "L": 4, "tie": True},
    "20M": {"D": 384, "F": 1024, "N": 6, "K": 2, "H": 64, "V": 32_000, "L": 5, "tie": True},
    "large-vocabulary": {"D": 128, "F": 384, "N": 4, "K": 2, "H": 32, "V": 151_936, "L": 4, "tie": True},
} | {f"qwen2-{name.lower()}": size for name, size in QWEN2.items()}


def make_model(folder: Path, dtype: str, geometry: str, device: str) -> dict:
    """In a process of its own: random numbers for 7 B parameters are drawn on the GPU, which gives their memory back."""
    write_random_model(folder, ROOT / "demo" / "base", GEOMETRIES[geometry], dtype=dtype, device=device)
    return {}


def write_pairs(run: Path, args: argparse.Namespace) -> None:
    """pairs.jsonl of random words; lengths in tokens are drawn evenly from the two ranges, end token counted."""
    from conj.data.files import write_jsonl
    from conj.data.judges import judge_prompt, judgment_text, load_judge
    from conj.data.tokenizer import JudgeTokenizer

    rng, judge = random.Random(0), load_judge("con-j")
    tokenizer = JudgeTokenizer.load(ROOT / "demo" / "base")
    words = ["red", "blue", "seven", "town", "river", "天空", "蓝色", "回答", "更好", "特产", "准确"]

    def grown(render, ids_of, fewest: int, most: int):
        """`render(words)` with as many words as its target length in tokens asks for."""
        target, chosen = rng.randint(fewest, most), []
        while len(ids_of(render(chosen))) < target:
            chosen.append(rng.choice(words))
        return render(chosen)

    rows = []
    for i in range(args.prompts):
        prompt = grown(lambda w: judge_prompt(judge, " ".join(w[::3]), " ".join(w[1::3]), " ".join(w[2::3])),
                       tokenizer.prompt_ids, *args.prompt_tokens)  # fmt: skip
        for _ in range(args.pairs_per_prompt):
            row = {"id": f"prompt-{i}", "prompt": prompt, "label": 1, "pair_type": "repeated"}
            for v, side in (1, "chosen"), (2, "rejected"):
                text = grown(
                    lambda w, v=v: judgment_text(judge, " ".join(w), v), tokenizer.completion_ids, *args.judgment_tokens
                )
                row[side] = [{"role": "assistant", "content": text}]
            rows.append(row)
    write_jsonl(run / "pairs.jsonl", rows)


def run_conj(folder: Path, model: Path, share: str, args: argparse.Namespace) -> dict:
    """`train_step` of `conj.train.dpo` on the first steps of its plan, without checkpoints and logs."""
    from safetensors.torch import load_file

    from conj.train import dpo
    from conj.train.sharding import distributed

    options = dpo.DPOOptions(
        run_dir=folder / "run", model=model, share=share, dtype=args.dtype, pairs_per_step=args.pairs_per_step,
        warmup_ratio=0.0, max_tokens_per_pack=args.max_tokens_per_pack, kernels=args.kernels, device=args.device,
        activation_checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload, **SETTINGS,
    )  # fmt: skip
    pairs, _, plans = steps_of(options.run_dir, model, share, args)
    with distributed(args.device) as world:
        dpo.select_arithmetic(options, world.device)
        logps = load_file(options.run_dir / "reference.safetensors")["logps"]
        sharded, optimizer = dpo.build_policy(options, world)
        batches = dpo.batches_of(pairs, logps, plans, world)
        rows = []
        for step, packs in enumerate(plans):
            rate = dpo.learning_rate_at(step, args.steps, options)
            rows.append(dpo.train_step(sharded, optimizer, pairs, packs, batches, rate, options, world))
    columns = {"losses": "loss", "step_seconds": "step_seconds", "tokens": "num_tokens"}
    found = {name: [row[column] for row in rows] for name, column in columns.items()}
    return found | {"pairs_per_step": args.pairs_per_step, "peak_memory_bytes": peak_memory_bytes(args.device)}


def run_reference(folder: Path, model: Path, args: argparse.Namespace) -> dict:
    """Stage 5, once a model; what it costs is reported beside the steps that it saves."""
    from conj.train import reference

    started = time.perf_counter()
    shared = {name: getattr(args, name) for name in ("dtype", "device", "kernels", "max_tokens_per_pack")}
    reference.main(reference.ReferenceOptions(run_dir=folder, model=model, **shared))
    return {"seconds": time.perf_counter() - started}


def steps_of(run: Path, model: Path, share: str, args: argparse.Namespace) -> tuple:
    """The pairs, the pairs of each step, those of a prompt together, and the packs of each step as `share` makes them."""
    from conj.data.packs import plan_packs, plan_steps
    from conj.train.reference import load_pairs

    pairs, _, usable = load_pairs(run / "pairs.jsonl", model, 6400)
    steps = plan_steps(pairs, usable, pairs_per_step=args.pairs_per_step, share="prompt", seed="2021:0")[: args.steps]
    return pairs, steps, [plan_packs(pairs, s, max_tokens=args.max_tokens_per_pack, share=share) for s in steps]


def trl_tokenizer(folder: Path):
    """The folder's tokenizer with a template that ends at the judgment's end token.

    conj trains a judgment up to that token, which is what a sampler writes; the line break that the template puts after
    it is never sampled. TRL takes the completion from the template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shorter = "'<|im_end|>'}}{% if message['role'] != 'assistant' %}{{'\n'}}{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>' + '\n'}}", shorter)
    return tokenizer


def run_trl(folder: Path, model: Path, logits: str, peer: dict, args: argparse.Namespace) -> dict:
    """`DPOTrainer.train()` on the same pairs in the same order, timed step by step.

    `peer` holds what differs from `DPOConfig()`'s defaults for speed; everything else here is output, the optimizer's
    numbers, which are conj's so that losses can be compared, and no max_length, or TRL would cut off judgments."""
    if logits == "judgment-only":
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True  # chooses the positions there; tiles are torch's on a CPU
    batch = peer.get("per_device_train_batch_size", min(8, args.pairs_per_step))
    assert args.pairs_per_step % batch == 0
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from conj.data.files import read_jsonl

    rows = read_jsonl(folder / "run" / "pairs.jsonl")
    _, steps, _ = steps_of(folder / "run", model, "prompt", args)
    times = []

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[-1] = time.perf_counter() - times[-1]

    config = DPOConfig(
        output_dir=str(folder / "trl"), max_steps=args.steps, gradient_accumulation_steps=args.pairs_per_step // batch,
        per_device_train_batch_size=batch, max_length=None, use_cpu=args.device == "cpu", bf16=args.dtype == "bfloat16",
        train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="cosine", **SETTINGS, **{k: v for k, v in peer.items() if k != "per_device_train_batch_size"},
    )  # fmt: skip
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{k: rows[i][k] for k in columns} for step in steps for i in step])
    tokenizer, timer = trl_tokenizer(model), StepTimer()
    trainer = DPOTrainer(str(model), args=config, train_dataset=data, processing_class=tokenizer, callbacks=[timer])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = {"losses": losses, "step_seconds": times, "pairs_per_step": args.pairs_per_step}
    return found | {"peak_memory_bytes": peak_memory_bytes(args.device)}
