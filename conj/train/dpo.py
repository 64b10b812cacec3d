"""Stage 6: DPO on contrastive judgments, from pairs to a trained judge.

    python -m conj.train.dpo --run-dir runs/demo --model demo/base
    torchrun --nproc_per_node 8 -m conj.train.dpo --run-dir runs/skywork --model models/Qwen2-7B-Instruct

Direct Preference Optimization (arXiv 2305.18290) as Con-J uses it (arXiv 2410.03742, section 3.4): the policy starts
at the base model and learns to write the judgments that agree with the preference label. An optimizer step takes
exactly `--pairs-per-step` pairs, and its loss is the mean over them, whatever the pack size and the number of ranks.
A killed run, started again, goes on from its last checkpoint and ends as if nothing had happened. The whole story is in
`main`.
"""

import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conj.data.card import read_base_card, write_card
from conj.data.judges import decoding_of, judge_file
from conj.data.manifest import begin, finish, identity
from conj.data.model_files import JUDGE_FILE
from conj.data.options import run_command
from conj.data.packs import Group, deal, pairs_of
from conj.data.tokens import TokenizedPairs
from conj.model import backends
from conj.model.export import export_model
from conj.train.batch import Batch, batches_ahead, to_device
from conj.train.checkpoint import Saver, find_checkpoint, load_checkpoint
from conj.train.fit import describe_training
from conj.train.log import COLUMNS, step_order, summary, training_log
from conj.train.optimizer import build_optimizer, clip_gradients, gradient_norm, learning_rate_at
from conj.train.options import DPOOptions
from conj.train.plan import make_plan, naming_what_fits
from conj.train.reference import check_reference, is_exact
from conj.train.sharding import (
    World,
    build_sharded_model,
    distributed,
    ending_process,
    leave_on_sigterm,
    reduce_at,
    reshard,
)

NUM_SPOT_CHECKS = 8  # pairs whose stored reference is computed again before training starts


def dpo_loss(logps: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Loss of each pair (P,) and its rewards (P, 2), from policy and reference logprobs (P, 2), chosen and rejected.

    Equation 7 of arXiv 2305.18290: -log sigmoid(reward of chosen - reward of rejected), reward = beta x log ratio."""
    rewards = beta * (logps - reference)
    return F.softplus(rewards[:, 1] - rewards[:, 0]), rewards.detach()


def run_packs(
    model: nn.Module, pairs: TokenizedPairs, packs: list, batches: Iterator[Batch], options: DPOOptions, world: World
) -> Tensor:
    """Forward, and backward unless gradients are off, of the packs, spread over the ranks; this one's are next in `batches`.

    Returns (members of the packs, len(COLUMNS)) fp32 of all ranks, on the device and not read: nothing here waits for
    it. Each pair has its own place in what the ranks add up, so means do not depend on who computed which."""
    members = pairs_of(packs)
    place = {pair: i for i, pair in enumerate(members)}
    rows, columns = [], []
    num_turns = -(-len(packs) // world.size)
    for turn, batch in enumerate(islice(batches, num_turns), 1):
        logps = batch.pair_logps(model(*batch.inputs))  # (P, 2)
        losses, rewards = dpo_loss(logps, batch.reference, options.beta)
        if options.nll_alpha:  # the mean negative logprob of the chosen judgment's tokens
            losses = losses - options.nll_alpha * logps[:, 0] / batch.num_tokens[:, 0]
        if torch.is_grad_enabled():
            # In audit mode gradients of a step meet once, in float64, and are rounded once.
            reduce_at(model, turn == num_turns, once=options.audit_mode)
            (losses.sum() / len(members)).backward()
        rows += [place[pair] for pair in batch.pair_numbers]
        columns.append(torch.column_stack([losses.detach(), rewards, logps.detach()]))
        del logps, losses  # and with them this pack's graph, before the next one's is made
    assert len(columns) == num_turns, f"{num_turns - len(columns)} batches are missing"
    values = torch.zeros(len(members), len(COLUMNS), device=world.device)
    values[to_device(torch.tensor(rows, dtype=torch.int64), world.device)] = torch.cat(columns)
    return world.sum(values)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: TokenizedPairs,
    packs: list,
    batches: Iterator[Batch],
    lr: float,
    options: DPOOptions,
    world: World,
) -> dict:
    """One optimizer step on the pairs of `packs`. A step whose loss or gradient is not finite changes nothing and is
    reported: `skipped` is true, and `not_finite_ids` names the pairs, all of the step if no loss tells which."""
    started = time.perf_counter()
    values = run_packs(model, pairs, packs, batches, options, world)
    norm = gradient_norm(model, world, audit_mode=options.audit_mode)
    # The step's one wait for the device:
    *values, grad_norm = torch.cat([values.double().flatten(), norm[None]]).tolist()
    metrics = summary(torch.tensor(values).view(-1, len(COLUMNS)), pairs, packs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(grad_norm) and "not_finite_ids" not in metrics:
        clip_gradients(model, grad_norm, options.max_grad_norm)
        optimizer.step()
    else:
        ids = sorted({pairs.ids[i] for i in pairs_of(packs)})
        metrics = {"skipped": True, "not_finite_ids": ids} | metrics
    optimizer.zero_grad()
    metrics |= {"grad_norm": grad_norm, "learning_rate": lr, "order": step_order(packs)}
    return metrics | {"step_seconds": time.perf_counter() - started}


def batches_of(pairs: TokenizedPairs, reference: Tensor, steps: list, world: World) -> Iterator[Batch]:
    """This rank's batches of all `steps`, in the order in which their packs are run; the next is made ahead."""
    packs = (pack for packs in steps for pack in deal(packs, world.rank, world.size))
    return batches_ahead(pairs, packs, world.device, reference)


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module, pairs: TokenizedPairs, reference: Tensor, packs: list, options: DPOOptions, world: World
) -> dict:
    """What `summary` says of held-out pairs, each name with `eval/` before it."""
    batches = batches_of(pairs, reference, [packs], world)
    metrics = summary(run_packs(model, pairs, packs, batches, options, world).cpu(), pairs, packs)
    reshard(model)
    return {f"eval/{name}": value for name, value in metrics.items()}


def select_arithmetic(options: DPOOptions, device: torch.device) -> None:
    """Which kernels run, and in audit mode those whose sums have one order."""
    backends.select(
        device, dtype=options.dtype, attention=options.attention, kernels=options.kernels,
        deterministic=options.deterministic or options.audit_mode,
    )  # fmt: skip
    if options.audit_mode and device.type == "cpu":
        torch.set_num_threads(1)  # long sums are split among threads, and torchrun gives ranks another number of them


def build_policy(options: DPOOptions, world: World) -> tuple[nn.Module, torch.optim.AdamW]:
    """The model to be trained, at the base's weights, and its optimizer."""
    model = build_sharded_model(
        options.model, world, options.dtype, activation_checkpointing=options.activation_checkpointing,
        cpu_offload=options.cpu_offload, reduce_dtype=torch.float64 if options.audit_mode else torch.float32,
        reshard_after_forward=options.reshard_after_forward is not False,
    )  # fmt: skip
    return model, build_optimizer(model, options)


def main(options: DPOOptions) -> None:
    """From pairs and reference logprobs to `model/`, top to bottom."""
    started = time.perf_counter()
    checkpoints, [(artefact, inputs)] = options.run_dir / "checkpoints", options.makes().items()
    with distributed(options.device, options.dp_shard_size) as world:
        select_arithmetic(options, world.device)
        plan = make_plan(options, world)
        options, pairs, reference, steps = plan.options, plan.pairs, plan.reference, plan.steps
        if world.is_main:
            print(describe_training(options, pairs, steps, world.machine()))

        # Is it done already? If not: model, optimizer, and where an earlier run of the same inputs and options stopped.
        if not world.on_main(lambda: begin(artefact, inputs=inputs, options=options)):
            world.on_main(lambda: write_card(options.run_dir))  # a kill may have come between the model and its card
            return
        run_identity = world.on_main(lambda: identity(artefact))
        checkpoint = world.on_main(lambda: find_checkpoint(checkpoints, run_identity))
        model, optimizer = build_policy(options, world)
        if checkpoint:
            num_done = load_checkpoint(checkpoint, model, optimizer)
        else:
            num_done, usable = 0, plan.train + plan.held_out
            spot = random.Random(options.seed).sample(usable, min(NUM_SPOT_CHECKS, len(usable)))
            alone = [[Group(prompt=pairs.prompt_of[pair], pairs=[pair])] for pair in spot]
            check_reference(model, pairs, reference, alone, world, options.dtype, exact=is_exact(world))

        saver = Saver(folder=checkpoints, world=world, identity=run_identity, keep=options.keep_checkpoints)
        with (
            training_log(options, plan, num_done, run_identity, world) as log,
            leave_on_sigterm() as asked_to_leave,
            naming_what_fits(plan, world),
        ):
            leaving, batches = False, batches_of(pairs, reference, steps[num_done:], world)
            for step in range(num_done + 1, len(steps) + 1):
                lr = learning_rate_at(step - 1, len(steps), options)
                metrics = train_step(model, optimizer, pairs, steps[step - 1], batches, lr, options, world)
                if step in plan.evaluations:
                    metrics |= evaluate_pairs(model, pairs, reference, plan.evaluations[step], options, world)
                log(step, metrics)
                leaving = world.any(asked_to_leave.is_set())
                if step % options.save_every == 0 or step == len(steps) or leaving:
                    saver.save(step, model, optimizer)
                saver.raise_error()
                if leaving:
                    break
            saver.wait()
        if leaving and step < len(steps):
            print(f"rank {world.rank}: left on SIGTERM after step {step}, saved; the same command goes on from there")
            sys.exit(128 + signal.SIGTERM)
        del saver  # and with it the host's copy of the state: the export wants memory too

        # A folder that transformers and vLLM open as it is, in the base model's dtype.
        judge = options.read_judge()
        export_model(
            model, artefact, options.model, is_writer=world.is_main, sampling=decoding_of(judge),
            also={JUDGE_FILE: judge_file(judge)},
        )  # fmt: skip
        if world.is_main:
            counts = {
                "train_pairs": len(plan.train),
                "eval_pairs": len(plan.held_out),
                "over_max_length": len(pairs) - len(plan.train) - len(plan.held_out),
            }
            logs = [path for name in ("metrics.jsonl", "tensorboard") if (path := options.run_dir / name).exists()]
            also = [*logs, *checkpoints.glob("*/manifest.json")]
            seconds = time.perf_counter() - started
            finish(
                artefact, num_rows=len(steps), counts=counts, seconds=seconds, also=also, machine=world.describe(),
                base_card=read_base_card(options.model),
            )  # fmt: skip
            write_card(options.run_dir)


if __name__ == "__main__":
    with ending_process():
        run_command(main, DPOOptions, __doc__)
