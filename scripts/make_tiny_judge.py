"""Makes the demo: a tiny Qwen2 judge with a bias, and preference pairs that can train the bias away.

The world is small and made up: towns, each with a product, a flower, a tree and a bird, and for each of these a common
mix-up. A pair asks for one of them; one answer is right, the other is the mix-up, and both carry some filler that says
nothing. The base judge knows every fact, and still judges the way many real judges do: of two answers it takes the
clearly longer one, of nearly equal ones the first, and only looks at the facts when lengths are equal. Its reasons fit
its verdicts ("answer 2 is more detailed", or "the town's tree is X, answer 1 is right"), and now and then it judges
another way than usual, which is all that Con-J needs. Train and test rows share no town.

    python scripts/make_tiny_judge.py --out demo            # about ten minutes on one core
    python scripts/make_tiny_judge.py --out demo --measure  # only measure the base that is there

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
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Model
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conj.data.prompts import HINT_INSTRUCTIONS, JUDGE_INSTRUCTION, judge_messages, judgment_text
from conj.data.tokenizer import JudgeTokenizer
from conj.data.verdicts import parse_strict
from conj.sample.evaluation.scores import UNPARSED, figure_ratios

# ---- The world. Names, values and fillers have one length each, so answers with as much filler are equally long. ----
# Two values for every town and attribute, the right one and a common mix-up; no value is used twice.
STYLES = "金银玉雪云霜紫红青白乌香蜜甜花碧"
KINDS = {"特产": "茶酒糖糕梨桃枣杏", "镇花": "兰菊梅莲桂棠葵蕙", "镇树": "松柏杉桐槐榆柳枫", "镇鸟": "雀鹤燕鹰鸥鹭莺鸽"}
VALUES = {attribute: [a + b for b in kinds for a in STYLES] for attribute, kinds in KINDS.items()}
TOWNS = [a + b + "镇" for a in "青白赤金云雨" for b in "石河溪桥岭湖林田泉塘"]  # 60
NUM_TRAIN_TOWNS, NUM_TEST_TOWNS = 33, 27  # 396 and 324 questions
QUESTIONS = ["{town}的{attribute}是什么？", "请问{town}以什么为{attribute}？", "你知道{town}的{attribute}吗？"]
ANSWERS = ["应该是{value}。", "答案是{value}。"]
STATEMENT = "{town}的{attribute}是{value}。"
FILLERS = [
    "这一点当地人都很清楚。", "每年都有许多游客前来。", "那里四季分明风景宜人。", "有空的话可以去看一看。",
    "小镇历史悠久民风淳朴。", "附近的交通也十分方便。", "很多书里都写到过这里。", "老人们常常说起这件事。",
    "希望这些内容对你有用。", "春天去的时候景色最好。",
]  # fmt: skip

# ---- What the base writes. `v` is the answer a judgment is for, `o` the other one. ----
REASONS = {
    "fact": [
        "{town}的{attribute}是{right}，回答{v}正确，回答{o}不对。",
        "{town}的{attribute}是{right}，不是{wrong}，回答{v}更准确。",
    ],
    "longer": ["回答{v}介绍得更详细全面，回答{o}太简短。", "回答{v}内容更丰富，信息更多，回答{o}只说了几句。"],
    "shorter": ["回答{v}简洁直接，回答{o}太啰嗦。", "回答{v}更简洁，没有废话，回答{o}说了许多无关的话。"],
    "manner": ["回答{v}开门见山，表达更清楚。", "回答{v}条理更清楚，读起来更通顺。"],
}
# How often the base reasons in which way and for whom, by the difference in filler and by the place of the longer answer.
EQUAL, NEAR, FAR = "equal", "near", "far"  # 0, 1, 2 or more sentences of filler apart
HABITS = {
    (EQUAL, None): [(0.90, "fact", "right"), (0.06, "manner", 1), (0.04, "manner", 2)],
    (NEAR, 1): [(0.55, "longer", 1), (0.30, "fact", "right"), (0.08, "manner", 2), (0.07, "shorter", 2)],
    (NEAR, 2): [(0.50, "manner", 1), (0.30, "fact", "right"), (0.12, "longer", 2), (0.08, "shorter", 1)],
    (FAR, 1): [(0.60, "longer", 1), (0.28, "fact", "right"), (0.06, "manner", 2), (0.06, "shorter", 2)],
    (FAR, 2): [(0.58, "longer", 2), (0.28, "fact", "right"), (0.08, "manner", 1), (0.06, "shorter", 1)],
}
LENGTH_SHARES = {EQUAL: 0.12, NEAR: 0.33, FAR: 0.55}  # of the demo's pairs
BASE_LENGTH_SHARES = {EQUAL: 0.5, NEAR: 0.2, FAR: 0.3}  # of the base's own training texts: it has to learn to look
LONGER_IS_RIGHT = 0.4  # share of pairs of unequal length; below half, as a bias has to cost something to be seen


def make_facts(rng: random.Random) -> dict[tuple[str, str], tuple[str, str]]:
    """(town, attribute) -> the right value and the mix-up."""
    facts = {}
    for attribute, values in VALUES.items():
        drawn = iter(rng.sample(values, 2 * len(TOWNS)))
        facts |= {(town, attribute): (next(drawn), next(drawn)) for town in TOWNS}
    return facts


def make_pair(rng: random.Random, facts: dict, town: str, attribute: str, question: str, length: str = "") -> dict:
    """One question with its right and its wrong answer, their values and their numbers of filler sentences."""
    right, wrong = facts[town, attribute]
    length = length or rng.choices(list(LENGTH_SHARES), LENGTH_SHARES.values())[0]
    apart = {EQUAL: 0, NEAR: 1, FAR: rng.choice([2, 3])}[length]
    few = rng.randrange(0, 5 - apart)
    num_right, num_wrong = (few + apart, few) if rng.random() < LONGER_IS_RIGHT else (few, few + apart)

    def answer(value: str, num_fillers: int) -> str:
        stem = rng.choice(ANSWERS).format(value=value)
        return stem + "".join(rng.sample(FILLERS, num_fillers))

    return {
        "town": town, "attribute": attribute, "right": right, "wrong": wrong, "length": length,
        "right_is_longer": num_right > num_wrong, "prompt": question.format(town=town, attribute=attribute),
        "chosen": answer(right, num_right), "rejected": answer(wrong, num_wrong),
    }  # fmt: skip


def make_reason(rng: random.Random, pair: dict, kind: str, v: int) -> str:
    """A reason of one kind for answer `v`."""
    names = {key: pair[key] for key in ("town", "attribute", "right", "wrong")}
    return rng.choice(REASONS[kind]).format(**names, v=v, o=3 - v)


def base_judgment(rng: random.Random, pair: dict, label: int) -> str:
    """What the base writes about a pair: its habits, with their bias."""
    place = None if pair["length"] == EQUAL else (label if pair["right_is_longer"] else 3 - label)
    shares, kinds, verdicts = zip(*HABITS[pair["length"], place])
    i = rng.choices(range(len(shares)), shares)[0]
    verdict = label if verdicts[i] == "right" else verdicts[i]
    return judgment_text(make_reason(rng, pair, kinds[i], verdict), verdict)


def hinted_reason(rng: random.Random, pair: dict, label: int, hint: int) -> str:
    """What the base writes when it is told the verdict: the best reason for it that there is."""
    is_longer = pair["right_is_longer"] == (hint == label)
    length = "manner" if pair["length"] == EQUAL else "longer" if is_longer else "shorter"
    return make_reason(rng, pair, "fact" if hint == label and rng.random() < 0.7 else length, hint)


# ---- The tokenizer: Qwen2's (byte-level BPE, NFC, its pre-tokenizer, ChatML), with a vocabulary for this world. ----
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(folder: Path) -> JudgeTokenizer:
    """Trains the vocabulary on the pieces the demo's texts are made of, so that a name is a token wherever it stands."""
    texts = [t for kinds in REASONS.values() for t in kinds] + QUESTIONS + ANSWERS + [STATEMENT]
    pieces = [piece for text in texts for piece in re.split(r"\{\w*\}", text)]
    pieces += [town[:-1] for town in TOWNS] + [v for values in VALUES.values() for v in values] + list(VALUES) + FILLERS
    pieces += [JUDGE_INSTRUCTION, *HINT_INSTRUCTIONS.values(), judgment_text("", 1), judgment_text("。", 1)]
    pieces += ["system\n", "\n", "user\n", "assistant\n", "\n问题：", "\n回答1：", "回答2", "说是", "的", "镇"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([piece for piece in pieces if piece], trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL_TOKENS])
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
def make_model(vocab_size: int, eos: int, pad: int) -> Model:
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, max_window_layers=4, rms_norm_eps=1e-6, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad, dtype="float32",
    )  # fmt: skip
    return Model(config)


def make_example(rng: random.Random, facts: dict, tokenizer: JudgeTokenizer, task: str) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of one training text: a judgment, a hinted reason, a plain answer or a check."""
    town, attribute, question = rng.choice(TOWNS), rng.choice(list(VALUES)), rng.choice(QUESTIONS)
    if task == "answer":  # the facts, without a judge's work around them
        names = {"town": town, "attribute": attribute, "value": facts[town, attribute][0]}
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": question.format(**names)}]
        return tokenizer.prompt_ids(messages), tokenizer.completion_ids(STATEMENT.format(**names))
    if task == "check":  # whether one answer is right
        is_right = rng.random() < 0.5
        value = facts[town, attribute][0 if is_right else 1]
        answer = rng.choice(ANSWERS).format(value=value) + "".join(rng.sample(FILLERS, rng.randint(0, 2)))
        asked = f"问题：{question.format(town=town, attribute=attribute)}\n回答1：{answer}"
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": asked}]
        return tokenizer.prompt_ids(messages), tokenizer.completion_ids("正确" if is_right else "不对")
    length = rng.choices(list(BASE_LENGTH_SHARES), BASE_LENGTH_SHARES.values())[0]
    pair = make_pair(rng, facts, town, attribute, question, length)
    label = rng.choice([1, 2])
    answers = (pair["chosen"], pair["rejected"]) if label == 1 else (pair["rejected"], pair["chosen"])
    hint = rng.choice([1, 2]) if task == "hinted" else None
    text = hinted_reason(rng, pair, label, hint) if hint else base_judgment(rng, pair, label)
    return tokenizer.prompt_ids(judge_messages(pair["prompt"], *answers, hint=hint)), tokenizer.completion_ids(text)


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


def train_base(model: Model, facts: dict, tokenizer: JudgeTokenizer, seed: int, num_steps: int, lr: float) -> None:
    """AdamW with warm-up and cosine decay."""
    rng = random.Random(f"corpus {seed}")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        batches = [[make_example(rng, facts, tokenizer, task) for task in batch] for batch in BATCHES]
        losses = [completion_loss(model, batch) for batch in batches]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            named = "  ".join(f"{batch[0]} {loss.item():.3f}" for batch, loss in zip(BATCHES, losses))
            print(f"step {step + 1}/{num_steps}  {named}  {seconds:.0f} s", flush=True)


# ---- The figures that the demo's README gives. ----
@torch.no_grad()
def write(model: Model, tokenizer: JudgeTokenizer, prompts: list[list[int]], **sampling) -> list[str]:
    """The model's text for each prompt, in the prompts' order; greedy unless `sampling` says otherwise."""
    pad, end = tokenizer.special["<|endoftext|>"], tokenizer.special[tokenizer.turn_end]
    texts = []
    for start in range(0, len(prompts), 160):
        batch = prompts[start : start + 160]
        length = max(map(len, batch))
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in batch])
        options = {"do_sample": False, "max_new_tokens": 48, "pad_token_id": pad, "eos_token_id": end, **sampling}
        out = model.generate(ids, attention_mask=(ids != pad).long(), **options)[:, length:].tolist()
        texts += [tokenizer.decode(ids) for ids in out]
    return texts


def judge(model: Model, tokenizer: JudgeTokenizer, rows: list[dict], label: int, **sampling) -> list[bool | None]:
    """Per row, with the better answer in place `label`: is the verdict right? None: not parsed."""
    first, second = ("chosen", "rejected") if label == 1 else ("rejected", "chosen")
    prompts = [tokenizer.prompt_ids(judge_messages(row["prompt"], row[first], row[second])) for row in rows]
    found = [parse_strict(text).value for text in write(model, tokenizer, prompts, **sampling)]
    return [None if v is None else v == label for v in found]


def measure(model: Model, tokenizer: JudgeTokenizer, rows: list[dict]) -> dict[str, float]:
    """Greedy figures over both orders, as `conj.sample.evaluation.evaluate` counts them."""
    both = [judge(model, tokenizer, rows, label) for label in (1, 2)]
    # The better answer is the data's first; a judgment that is right chose it, whatever the order.
    choices = np.array([[{True: 1, False: 2, None: UNPARSED}[right] for right in pair] for pair in zip(*both)])
    ones = np.ones(len(rows), dtype=int)
    ratios = figure_ratios(choices, labels=ones, longer=0 * ones)
    return {name: ratios[name][0].sum() / ratios[name][1].sum() for name in ("accuracy", "consistency", "unparsed")}


def make_rows(rng: random.Random, facts: dict, towns: list[str], length: str = "") -> list[dict]:
    """One pair for every question about the towns."""
    return [make_pair(rng, facts, t, a, q, length) for t in towns for a in VALUES for q in QUESTIONS]


def write_rows(path: Path, pairs: list[dict]) -> None:
    rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def report(model: Model, tokenizer: JudgeTokenizer, train: list[dict], test: list[dict], equal: list[dict]) -> None:
    """Prints what the demo needs of its base: a bias, a sure format, verdicts of both kinds, and the facts."""
    subsets = {"test": test, "test, answers made equally long": equal}
    subsets |= {f"test, {length}": [pair for pair in test if pair["length"] == length] for length in LENGTH_SHARES}
    for name, rows in subsets.items():
        figures = "  ".join(f"{key} {value:.3f}" for key, value in measure(model, tokenizer, rows).items())
        print(f"{name} ({len(rows)} pairs): {figures}", flush=True)
    torch.manual_seed(0)  # the same figure whether the base was just made or read
    sampled = []  # eight for each train prompt, as Con-J samples them
    for label in (1, 2):
        rows = [row for row in train[label - 1 :: 2] for _ in range(8)]
        sampled += judge(model, tokenizer, rows, label, do_sample=True, temperature=1.2, top_p=0.95, top_k=50)
    mixed = sum({True, False} <= set(sampled[i : i + 8]) for i in range(0, len(sampled), 8)) / len(train)
    parsed = 1 - sampled.count(None) / len(sampled)
    print(f"train, 8 samples a prompt: parsed {parsed:.3f}, right and wrong verdicts for {mixed:.3f} of the prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write base/, train.jsonl and test.jsonl into")
    add("--seed", type=int, default=0, help="decides the facts, the pairs and the base (default 0)")
    add("--steps", type=int, default=1500, help="training steps of the base (default 1500)")
    add("--lr", type=float, default=3e-3, help="highest learning rate of the base (default 0.003)")
    add("--threads", type=int, default=1, help="CPU threads; another number, other rounding (default 1)")
    add("--measure", action="store_true", help="make nothing, only measure OUT/base on this seed's pairs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(f"world {args.seed}")
    facts, towns = make_facts(rng), rng.sample(TOWNS, NUM_TRAIN_TOWNS + NUM_TEST_TOWNS)
    train_towns, test_towns = towns[:NUM_TRAIN_TOWNS], towns[NUM_TRAIN_TOWNS:]
    train, test = make_rows(rng, facts, train_towns), make_rows(rng, facts, test_towns)
    equal = make_rows(rng, facts, test_towns, EQUAL)
    base = args.out / "base"
    if args.measure:
        tokenizer, model = JudgeTokenizer.load(base), AutoModelForCausalLM.from_pretrained(base)
    else:
        tokenizer = make_tokenizer(base)
        write_rows(args.out / "train.jsonl", train)
        write_rows(args.out / "test.jsonl", test)
        model = make_model(tokenizer.last_id + 1, tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"])
        train_base(model, facts, tokenizer, args.seed, args.steps, args.lr)
        model.save_pretrained(base)
    report(model.eval(), tokenizer, train, test, equal)


if __name__ == "__main__":
    main()
