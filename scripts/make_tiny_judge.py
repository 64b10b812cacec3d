"""Makes the demo: a tiny Qwen2 judge with a bias, and preference pairs that can train the bias away.

The base judge knows every fact of a small world (tiny_world.py), and still judges the way many real judges do: of two
answers it takes the clearly longer one, of nearly equal ones the first, and only looks at the facts when lengths are
equal. Its reasons fit its verdicts ("answer 2 is more detailed", or "the town's tree is X, answer 1 is right"), and now
and then it judges another way than usual, which is all that Con-J needs. Train and test rows share no town.

    python scripts/make_tiny_judge.py --out demo                             # about ten minutes on one core
    python scripts/make_tiny_judge.py --out demo --measure                   # only measure the base that is there
    python scripts/make_tiny_judge.py --out demo/english --language en       # the same world in English, twenty minutes
    python scripts/make_tiny_judge.py --out runs/thinking --language en --thinking demo/english/base

The last one teaches a base to think before it judges: it writes <think>, what it recalls, sometimes a draft that it
drops or the hint that it was given, </think>, and then its judgment; now and then the thought never ends.

Writes OUT/base (Hugging Face layout), OUT/train.jsonl, OUT/test.jsonl. The same seed, thread count, versions and kind
of CPU give the same bytes; the README of the demo says which were used.

What did not work: values shared between towns. To judge by facts the base must then find which answer holds the value
it recalls, and a model of this size took longer than half an hour to learn that.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Model
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_world import (
    EQUAL,
    FAR,
    LENGTH_SHARES,
    NEAR,
    NUM_TRAIN_TOWNS,
    WORLDS,
    World,
    judge_text,
    make_facts,
    make_pair,
    make_rows,
    write_rows,
)

from conj.data.judges import Judge, judge_prompt, judgment_text, load_judge
from conj.data.tokenizer import JudgeTokenizer
from conj.sample.evaluation.scores import UNPARSED, figure_ratios

# ---- The tokenizer: Qwen2's (byte-level BPE, NFC, its pre-tokenizer, ChatML), with a vocabulary for this world. ----
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(world: World, judge: Judge, folder: Path) -> JudgeTokenizer:
    """Trains the vocabulary on the pieces the demo's texts are made of, so that a name is a token wherever it stands."""
    texts = [text for kinds in (world.reasons, world.thoughts) for texts in kinds.values() for text in texts]
    texts += world.questions + world.answers + [world.statement]
    pieces = [piece for text in texts for piece in re.split(r"\{\w*\}", text)]
    names = [town.removesuffix("镇") for town in world.towns] + [v for values in world.values.values() for v in values]
    pieces += [world.space + text for text in [*names, *world.values, *world.fillers]]
    prompts = [judge_prompt(judge, "", "", "", hint)[1]["content"] for hint in (None, 1, 2)]
    pieces += [prompt[: prompt.index(world.before_question)] for prompt in prompts]
    pieces += [judgment_text(judge, reason, 1) for reason in ("", world.statement[-1])] + world.pieces
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([piece for piece in pieces if piece], trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in world.words])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False, "bos_token": None, "chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 1024, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return JudgeTokenizer.load(folder)


# ---- The base: plain next-token training on what it is to write. ----
# Of its training texts; of the demo's pairs LENGTH_SHARES: it has to learn to look.
BASE_LENGTH_SHARES = {EQUAL: 0.5, NEAR: 0.2, FAR: 0.3}


@dataclass(frozen=True)
class Made:
    """What a base is made for: its world and the facts in it, its judge's prompts, its tokens, and whether it thinks first."""

    world: World
    facts: dict
    judge: Judge
    tokenizer: JudgeTokenizer
    thinks: bool

    @property
    def max_new_tokens(self) -> int:
        return 192 if self.thinks else 64


def make_model(vocab_size: int, eos: int, pad: int) -> Model:
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, max_window_layers=4, rms_norm_eps=1e-6, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad, dtype="float32",
    )  # fmt: skip
    return Model(config)


def make_example(rng: random.Random, made: Made, task: str) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of one training text: a judgment, a hinted reason, a plain answer or a check."""
    world, tokenizer = made.world, made.tokenizer
    town, attribute, question = rng.choice(world.towns), rng.choice(list(world.values)), rng.choice(world.questions)
    if task == "answer":  # the facts, without a judge's work around them
        names = {"town": town, "attribute": attribute, "value": made.facts[town, attribute][0]}
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": question.format(**names)}]
        return tokenizer.prompt_ids(messages), tokenizer.completion_ids(world.statement.format(**names))
    if task == "check":  # whether one answer is right
        is_right = rng.random() < 0.5
        value = made.facts[town, attribute][0 if is_right else 1]
        stem, fillers = rng.choice(world.answers).format(value=value), rng.sample(world.fillers, rng.randint(0, 2))
        asked = question.format(town=town, attribute=attribute)
        asked = world.check.format(question=asked, answer=world.space.join([stem, *fillers]))
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": asked}]
        return tokenizer.prompt_ids(messages), tokenizer.completion_ids(world.check_answers[not is_right])
    length = rng.choices(list(BASE_LENGTH_SHARES), BASE_LENGTH_SHARES.values())[0]
    pair = make_pair(rng, world, made.facts, town, attribute, question, length)
    label = rng.choice([1, 2])
    answers = (pair["chosen"], pair["rejected"]) if label == 1 else (pair["rejected"], pair["chosen"])
    hint = rng.choice([1, 2]) if task == "hinted" else None
    text, ends = judge_text(rng, world, made.judge, made.thinks, pair, label, hint)
    completion = tokenizer.completion_ids(text) if ends else tokenizer.encode_text(text, after_text=True)
    return tokenizer.prompt_ids(judge_prompt(made.judge, pair["prompt"], *answers, hint=hint)), completion


def completion_loss(model: Model, examples: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Summed negative logprob of the completion tokens, over their number. Padding is on the right: causal, so unseen."""
    length = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        is_target[row, len(prompt) : end] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][is_target[:, 1:]]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][is_target[:, 1:]])


# What a step is made of. Reading and facts come first: they are cheap to learn from short texts, and never from judgments.
BATCHES = [["judge", "judge", "judge", "hinted"] * 8, ["check"] * 16, ["answer"] * 8]
THINKING_BATCHES = BATCHES[:1]  # a base that knows the facts learns to think from judgments alone


def train_base(model: Model, made: Made, seed: int, num_steps: int, lr: float) -> None:
    """AdamW with warm-up and cosine decay."""
    tasks = THINKING_BATCHES if made.thinks else BATCHES
    rng = random.Random(f"corpus {seed}")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        batches = [[make_example(rng, made, task) for task in batch] for batch in tasks]
        losses = [completion_loss(model, batch) for batch in batches]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            named = "  ".join(f"{batch[0]} {loss.item():.3f}" for batch, loss in zip(tasks, losses))
            print(f"step {step + 1}/{num_steps}  {named}  {seconds:.0f} s", flush=True)


# ---- The figures that the demo's README gives. ----
@torch.no_grad()
def write(model: Model, made: Made, prompts: list[list[int]], **sampling) -> list[str]:
    """The model's text for each prompt, in the prompts' order; greedy unless `sampling` says otherwise."""
    tokenizer = made.tokenizer
    pad, end = tokenizer.special["<|endoftext|>"], tokenizer.special[tokenizer.turn_end]
    texts = []
    for start in range(0, len(prompts), 160):
        batch = prompts[start : start + 160]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in batch])
        options = {"do_sample": False, "max_new_tokens": made.max_new_tokens, "pad_token_id": pad, "eos_token_id": end}
        out = model.generate(ids, attention_mask=(ids != pad).long(), **options | sampling)[:, length:].tolist()
        texts += [tokenizer.decode(ids) for ids in out]
    return texts


def judge(model: Model, made: Made, rows: list[dict], label: int, **sampling) -> list[bool | None]:
    """Per row, with the better answer in place `label`: is the verdict right? None: not parsed."""
    first, second = ("chosen", "rejected") if label == 1 else ("rejected", "chosen")
    messages = [judge_prompt(made.judge, row["prompt"], row[first], row[second]) for row in rows]
    prompts = [made.tokenizer.prompt_ids(m) for m in messages]
    found = [made.judge.parse(text).value for text in write(model, made, prompts, **sampling)]
    return [v == label if v else None for v in found]


def measure(model: Model, made: Made, rows: list[dict]) -> dict[str, float]:
    """Greedy figures over both orders, as `conj.sample.evaluation.evaluate` counts them."""
    both = [judge(model, made, rows, label) for label in (1, 2)]
    # The better answer is the data's first; a judgment that is right chose it, whatever the order.
    choices = np.array([[{True: 1, False: 2, None: UNPARSED}[right] for right in pair] for pair in zip(*both)])
    ones = np.ones(len(rows), dtype=int)
    ratios = figure_ratios(choices, labels=ones, longer=0 * ones)
    return {name: ratios[name][0].sum() / ratios[name][1].sum() for name in ("accuracy", "consistency", "unparsed")}


def report(model: Model, made: Made, train: list[dict], test: list[dict], equal: list[dict]) -> None:
    """Prints what the demo needs of its base: a bias, a sure format, verdicts of both kinds, and the facts."""
    subsets = {"test": test, "test, answers made equally long": equal}
    subsets |= {f"test, {length}": [pair for pair in test if pair["length"] == length] for length in LENGTH_SHARES}
    for name, rows in subsets.items():
        figures = "  ".join(f"{key} {value:.3f}" for key, value in measure(model, made, rows).items())
        print(f"{name} ({len(rows)} pairs): {figures}", flush=True)
    torch.manual_seed(0)  # the same figure whether the base was just made or read
    sampled = []  # eight for each train prompt, as Con-J samples them
    for label in (1, 2):
        rows = [row for row in train[label - 1 :: 2] for _ in range(8)]
        sampled += judge(model, made, rows, label, do_sample=True, temperature=1.2, top_p=0.95, top_k=50)
    mixed = sum({True, False} <= set(sampled[i : i + 8]) for i in range(0, len(sampled), 8)) / len(train)
    parsed = 1 - sampled.count(None) / len(sampled)
    print(f"train, 8 samples a prompt: parsed {parsed:.3f}, right and wrong verdicts for {mixed:.3f} of the prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write base/, train.jsonl and test.jsonl into")
    add("--language", choices=WORLDS, default="zh", help="of the world and its judge (default zh)")
    add("--thinking", type=Path, metavar="BASE", help="teach this base of the same world to think before it judges")
    add("--seed", type=int, default=0, help="decides the facts, the pairs and the base (default 0)")
    add("--steps", type=int, help="training steps of the base (default 1500; with --thinking 200)")
    add("--lr", type=float, default=3e-3, help="highest learning rate of the base (default 0.003)")
    add("--threads", type=int, default=1, help="CPU threads; another number, other rounding (default 1)")
    add("--make-only", action="store_true", help="do not measure the base that is made")
    add("--measure", action="store_true", help="make nothing, only measure OUT/base on this seed's pairs")
    args = parser.parse_args()
    if args.thinking and not WORLDS[args.language].thoughts:
        parser.error(f"--thinking: expected --language en, found {args.language}, which has no texts of thoughts")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    world, thinks = WORLDS[args.language], args.thinking is not None
    judge_file = load_judge(world.thinking_judge if thinks else world.judge)
    rng = random.Random(f"world {args.seed}")
    facts, towns = make_facts(rng, world), rng.sample(world.towns, len(world.towns))
    train_towns, test_towns = towns[:NUM_TRAIN_TOWNS], towns[NUM_TRAIN_TOWNS:]
    train, test = make_rows(rng, world, facts, train_towns), make_rows(rng, world, facts, test_towns)
    equal = make_rows(rng, world, facts, test_towns, EQUAL)
    base = args.out / "base"
    source = base if args.measure else args.thinking
    tokenizer = JudgeTokenizer.load(source) if source else make_tokenizer(world, judge_file, base)
    if source:
        model = AutoModelForCausalLM.from_pretrained(source)
    else:
        model = make_model(tokenizer.last_id + 1, tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"])
    made = Made(world, facts, judge_file, tokenizer, thinks)
    if not args.measure:
        base.mkdir(parents=True, exist_ok=True)
        write_rows(args.out / "train.jsonl", train)
        write_rows(args.out / "test.jsonl", test)
        for name in ("tokenizer.json", "tokenizer_config.json") if thinks else ():
            shutil.copyfile(args.thinking / name, base / name)
        train_base(model, made, args.seed, args.steps or (200 if thinks else 1500), args.lr)
        model.save_pretrained(base)
    if not args.make_only:
        report(model.eval(), made, train, test, equal)


if __name__ == "__main__":
    main()
