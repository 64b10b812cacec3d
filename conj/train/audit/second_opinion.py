"""What `transformers` makes of a run's logprobs, and whether rounding explains the difference.

Numbers that were rounded on the way are never equal, and how far they part depends on the model: a constant either calls
sound runs broken or finds nothing. So the rounding is measured. `transformers` computes the same tokens twice on the
weights in the run's dtype: precisely (fp32 for bf16, fp64 for fp32), which is the truth, and in the run's own dtype,
whose error is what rounding does to this model. Two things are then asked of the errors of a run.

Are they as small? Their rms is at most ALLOWED times that of transformers in the same dtype.

Have they no direction? Rounding errors point up as often as down; a wrong weight moves all tokens as the derivative by
that weight says. Of each norm's scale (a branch of a layer that came out too large or too small looks like it) this gives
one sum over prompts, sum_c x_c, with x_c = derivative of sum_t w_t logp_t and w_t the error of token t; its size is
|sum_c x_c| / sqrt(sum_c x_c^2), of the norm where that is largest. Had the errors of each prompt come out with the other
sign, which is as likely, it would be another one: FLIPS times signs are drawn, and a run is called broken if its size is
among the largest FALSE_ALARM of these. So fewer than one sound run in 1 / FALSE_ALARM is, whatever the sizes of errors
are and however those within a prompt go together (Fisher's randomization test). Any w_t that is odd in the errors keeps
that. To see small shifts, w_t leaves out what errors share with those of transformers, is scaled by 1 - p (a sure token
hardly moves, for either reason) and is clipped, since a few tokens err by far more than the rest.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from conj.data.chat_template import fixed_date
from conj.data.files import stream_jsonl
from conj.data.packs import deal, plan_packs
from conj.data.progress import progress
from conj.data.tokens import PAIR_COLUMNS, TokenizedPairs
from conj.model.decoder import DTYPES
from conj.train.batch import batches_ahead
from conj.train.dpo import DPOOptions, dpo_loss
from conj.train.plan import Plan
from conj.train.sharding import World, build_sharded_model, reshard

PRECISE = {"bfloat16": torch.float32, "float32": torch.float64}
ALLOWED = {"bfloat16": 2.0, "float32": 8.0}  # fp32's error depends on the order of sums, which is the library's
FLIPS, FALSE_ALARM = 100_000, 1e-4
SUREST = 1e-3  # 1 - p below which a token counts no more
CLIP = 2.0  # times the median


def second_opinion(options: DPOOptions, plan: Plan, sample: list[int], world: World) -> Iterator[tuple[str, bool, str]]:
    """Name of a check, whether it holds, and what was found, of the pairs `sample` of a finished run: ids by the official
    chat template, then logprobs and losses of whole sequences, one by one."""
    ids = _official_ids(options, plan.pairs, sample)
    # Text that holds control tokens is text to conj and control to the official template: no fault of the run.
    others, sample = len(sample) - len(ids), list(ids)
    yield "ids by transformers", bool(sample), f"{len(sample)} pairs the same, {others} others"
    if not sample:
        return
    judgments = [sides for pair in sample for sides in ids[pair]]
    packs = plan_packs(plan.pairs, sample, max_tokens=options.max_tokens_per_pack, share=options.share)

    def logps(folder: Path) -> tuple[list[Tensor], list[Tensor], list[Tensor], nn.Module]:
        """By conj, by transformers in the same dtype and precisely, and that last model."""
        ours = token_logps(build_sharded_model(folder, world, options.dtype), plan.pairs, packs, sample, world)
        same = transformers_logps(load_transformers(folder, options.dtype, precise=False), judgments, folder.name)
        precise = load_transformers(folder, options.dtype, precise=True)
        return ours, same, transformers_logps(precise, judgments, f"{folder.name}, precisely"), precise

    def compare(found: Tensor, same_dtype: Tensor, truth: Tensor, unit: str) -> tuple[bool, str]:
        ours, theirs = ((x - truth).double().square().mean().sqrt().item() for x in (found, same_dtype))
        times = ALLOWED[options.dtype]
        said = f"rms error {ours:.1e} nats a {unit}, that of transformers in {options.dtype} {theirs:.1e}"
        return ours <= times * theirs, f"{said}, allowed {times:g} times that ({len(sample)} pairs)"

    *base, precise = logps(options.model)
    stored = plan.reference[sample].flatten()
    base[0] = [_with_sum(*values) for values in zip(base[0], stored, base[2])]
    holds, found = compare(*map(torch.cat, base), "token")
    prompts = [plan.pairs.prompt_of[pair] for pair in sample for _ in range(2)]
    norm, size, most = trend(precise, judgments, prompts, *base)
    del precise
    yield "reference by transformers", holds and size <= most, f"{found}; along {norm} {size:.1f}, allowed {most:.1f}"

    trained = logps(options.find("model"))[:3]
    policy, reference = ([torch.stack([t.sum() for t in x]).view(-1, 2) for x in by] for by in (trained, base))
    losses = (dpo_loss(p, r, options.beta)[0] for p, r in zip(policy, reference))
    yield "loss by transformers", *compare(*losses, "pair")


def _official_ids(options: DPOOptions, pairs: TokenizedPairs, sample: list[int]) -> dict[int, list[tuple]]:
    """Prompt and judgment, chosen and rejected, by the official chat template: of the pairs of which they are conj's."""
    from transformers import AutoTokenizer  # seconds to import

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    wanted, same = set(sample), {}
    lines = stream_jsonl(options.find("pairs.jsonl"), PAIR_COLUMNS)
    rows = {number - 1: row for number, row in lines if number - 1 in wanted}

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end = _official_end(tokenizer, rows[sample[0]]["prompt"]) if sample else None
    for pair in sample:
        prompt = _official_text(tokenizer, rows[pair]["prompt"], add_generation_prompt=True)
        judgments = [rows[pair][side][0]["content"] for side in ("chosen", "rejected")]
        official = [(encode(prompt), [*encode(judgment), end]) for judgment in judgments]
        if official == [([*pairs.prompts[pairs.prompt_of[pair]]], [*judgment]) for judgment in pairs.judgments[pair]]:
            same[pair] = official
    return same


def _official_text(tokenizer, messages: list[dict], **settings) -> str:
    """The filled template, on the date that conj gives to templates that ask for one. Without an empty system message
    where the template refuses that."""

    def fill(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=fixed_date, **settings)

    try:
        return fill(messages)
    except TemplateError:
        return fill([message for message in messages if message != {"role": "system", "content": ""}])


def _official_end(tokenizer, prompt: list[dict]) -> int:
    """The first added token that the official template puts after an assistant's text; eos_token if it puts none."""
    text = "a judgment of nobody"
    try:
        after = _official_text(tokenizer, [*prompt, {"role": "assistant", "content": text}]).partition(text)[2]
    except TemplateError:
        after = ""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return next(
        (i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in added), tokenizer.eos_token_id
    )


def _with_sum(logps: Tensor, total: Tensor, truth: Tensor) -> Tensor:
    """A judgment's logprobs, made to sum to the stored total: unsure tokens carry what they did not."""
    share = 1 - truth.exp() + torch.finfo(truth.dtype).tiny
    return logps + (total - logps.sum()) * share / share.sum()


@torch.no_grad()
def token_logps(model: nn.Module, pairs: TokenizedPairs, packs: list, sample: list[int], world: World) -> list[Tensor]:
    """Logprobs of each token of the judgments of `sample`, chosen and rejected in turn, by conj's model. Collective."""
    lengths = [len(judgment) for pair in sample for judgment in pairs.judgments[pair]]
    found = torch.zeros(sum(lengths))
    views, place = found.split(lengths), {pair: i for i, pair in enumerate(sample)}
    for batch in batches_ahead(pairs, deal(packs, world.rank, world.size), world.device):
        pieces = model(*batch.inputs).cpu().split(batch.lengths)
        for i, pair in enumerate(batch.pair_numbers):
            for side in (0, 1):
                views[2 * place[pair] + side].copy_(pieces[2 * i + side])
    reshard(model)
    return list(world.sum(found).split(lengths))


def load_transformers(folder: Path, dtype: str, *, precise: bool) -> nn.Module:
    """The model with its weights in `dtype`, computing in it or precisely."""
    from transformers import AutoModelForCausalLM  # seconds to import

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().requires_grad_(False)
    return model.to(PRECISE[dtype]) if precise else model


def transformers_logps(model: nn.Module, ids: list[tuple[list[int], list[int]]], what: str) -> list[Tensor]:
    """Logprobs of each token of the judgments, of (prompt, judgment) one by one."""
    with torch.no_grad():
        return [_logps(model, *sequence) for sequence in progress(ids, desc=f"transformers: {what}", unit="judgment")]


def _logps(model: nn.Module, prompt: list[int], judgment: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + judgment]), logits_to_keep=len(judgment) + 1).logits[0, :-1]
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return logits.log_softmax(-1).gather(1, torch.tensor(judgment)[:, None])[:, 0]


def trend(
    model: nn.Module,  # of transformers, precise
    ids: list[tuple[list[int], list[int]]],
    prompts: list[int],  # which prompt each judgment belongs to
    found: list[Tensor],
    same_dtype: list[Tensor],
    truth: list[Tensor],
) -> tuple[str, float, float]:
    """The norm along whose scale the errors of `found` go most, how far, and how far is allowed; see above."""
    norms = {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    weights = _weights(*(torch.cat(logps).to(truth[0].dtype) for logps in (found, same_dtype, truth)))
    totals = {prompt: torch.zeros(len(norms), dtype=torch.double) for prompt in prompts}
    for norm in norms.values():
        norm.requires_grad_(True)
    lengths = [len(judgment) for _, judgment in ids]
    turns = zip(prompts, ids, weights.split(lengths))
    for prompt, sequence, w in progress(turns, desc="transformers: trend", unit="judgment", total=len(ids)):
        gradients = torch.autograd.grad((_logps(model, *sequence) * w).sum(), list(norms.values()))
        totals[prompt] += torch.stack([(g * p).sum().double() for g, p in zip(gradients, norms.values())]).detach()
    x = torch.stack(list(totals.values()))  # (prompts, norms)
    x = (x / x.square().sum(0).sqrt()).nan_to_num()
    generator, flipped = torch.Generator().manual_seed(0), []
    for _ in range(FLIPS // 1000):
        signs = torch.randint(2, (1000, len(x)), generator=generator).double() * 2 - 1
        flipped.append((signs @ x).abs().amax(1))
    sizes, strongest = x.sum(0).abs(), int(x.sum(0).abs().argmax())
    most = torch.cat(flipped).topk(round(FLIPS * FALSE_ALARM)).values[-1].item()
    return list(norms)[strongest], sizes[strongest].item(), most


def _weights(found: Tensor, same_dtype: Tensor, truth: Tensor) -> Tensor:
    """(T,): w_t of the module's docstring."""
    scale = (1 - truth.exp()).clamp(min=SUREST)
    errors, known = (found - truth) / scale, (same_dtype - truth) / scale
    errors = errors - known * ((known * errors).sum() / known.square().sum()).nan_to_num()
    limit = CLIP * errors[errors != 0].abs().median().nan_to_num()
    return errors.clamp(-limit, limit) / scale
