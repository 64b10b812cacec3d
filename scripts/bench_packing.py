"""How fast, full and even are plans of a whole run? Steps and packs of 80,000 prompts x 3 to 5 pairs, with real lengths.

    python scripts/bench_packing.py --json benchmarks/packing.json

Lengths are drawn, with replacement, from UltraFeedback rows in the judge's prompt and from reasons that LLMBar's judges
wrote, in the judgment's JSON, both under Qwen2's tokenizer; with `--lengths con-j`, from the longer texts that Con-J's
data have: prompts of 600 to 3,500 tokens, their logarithms alike likely, and judgments of
100 to 512. Token ids do not matter here. Time is taken to be proportional to tokens, and every turn waits for its fullest
pack. Uncut: every prompt encoded once an epoch, or as often as `share` says.
"""

import json
import math
import random
import statistics
import sys
import time
from array import array
from pathlib import Path

from bench_common import argument_parser

from conj import InputError
from conj.data.judges import judge_prompt, judgment_text, load_judge
from conj.data.manifest import describe_code
from conj.data.packs import group_tokens, plan_packs, plan_steps
from conj.data.preprocess import load_prompts
from conj.data.prompts import question_of
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import TokenizedPairs
from conj.train.flops import idle_share

CARD = load_judge("con-j")
SHAPES = [(24, 1), (8, 8), (24, 4), (24, 8), (48, 8), (96, 8), (192, 8), (192, 64), (384, 64)]  # pairs a step, ranks
COLUMNS = {
    "share": "{share}", "pairs a step": "{pairs_per_step}", "ranks": "{ranks}", "seconds": "{seconds:.1f}",
    "packs a step": "{packs_per_step:.1f}", "fullest / mean": "{fullest_over_mean:.3f}",
    "tokens / uncut": "{tokens_over_uncut:.3f}", "ranks' time, by uncut tokens": "{efficiency:.1%}",
    "prompt length of a step, ±": "{length_spread:.0f}",
}  # fmt: skip


def real_lengths(tokenizer_folder: Path, prompts: list[str], judgments: list[Path]) -> tuple[list[int], list[int]]:
    """Tokens of judge prompts (any preference data) and of judgments (result.json of LLMBar's judges that reason)."""
    tokenizer = JudgeTokenizer.load(tokenizer_folder)
    missing = [str(path) for path in [*prompts, *judgments] if not Path(path).exists()]
    if missing or not judgments:
        named = ", ".join(missing) or "judgments"
        raise InputError(f"{named}: no such file; give --data FOLDER, or the files themselves")
    rows, _ = load_prompts(prompts)
    messages = [judge_prompt(CARD, question_of(row), row["answer_1"], row["answer_2"]) for row in rows]
    judged = [row["results"][0].values() for path in judgments for row in json.loads(path.read_text("utf-8"))]
    texts = [judgment_text(CARD, side["completion"][0], 1) for sides in judged for side in sides]
    return [len(tokenizer.prompt_ids(m)) for m in messages], [len(tokenizer.completion_ids(text)) for text in texts]


def con_j_lengths(rng: random.Random) -> tuple[list[int], list[int]]:
    """Tokens of 10,000 prompts and judgments, drawn."""
    prompts = [round(math.exp(rng.uniform(math.log(600), math.log(3500)))) for _ in range(10_000)]
    return prompts, [rng.randint(100, 512) for _ in range(10_000)]


def draw_pairs(
    rng: random.Random, lengths: tuple[list[int], list[int]], num_prompts: int, fewest: int, most: int
) -> TokenizedPairs:
    """`num_prompts` prompts with `fewest` to `most` pairs each. All ids are 0, and texts of one length are one array."""
    zeros = {n: array("i", bytes(4 * n)) for n in {*lengths[0], *lengths[1]}}
    prompt_of = [prompt for prompt in range(num_prompts) for _ in range(rng.randint(fewest, most))]
    prompts, chosen, rejected = (
        [zeros[n] for n in rng.choices(of, k=count)]
        for of, count in ((lengths[0], num_prompts), (lengths[1], len(prompt_of)), (lengths[1], len(prompt_of)))
    )
    shared = {"ids": list(map(str, prompt_of)), "is_eval": [False] * len(prompt_of), "prompt_of": prompt_of}
    return TokenizedPairs(**shared, prompts=prompts, judgments=list(zip(chosen, rejected)))


def pack_tokens(pairs: TokenizedPairs, packs: list) -> list[int]:
    return [sum(group_tokens(pairs, group) for group in pack) for pack in packs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure_steps(pairs: TokenizedPairs, share: str, pairs_per_step: int, ranks: int, max_tokens: int) -> dict:
    """One epoch of steps, with packs for `ranks` ranks."""
    start, how = time.process_time(), {"share": share, "multiple": ranks}
    steps = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=pairs_per_step, seed="0", **how)
    plan = [plan_packs(pairs, step, max_tokens=max_tokens, **how) for step in steps]
    seconds = time.process_time() - start
    full = [i for i, step in enumerate(steps) if len(step) == pairs_per_step] or [0]
    waits = [idle_share(pairs, plan[i], ranks) for i in full]
    tokens = [sum(pack_tokens(pairs, packs)) for packs in plan]
    longest = sum(total / (1 - idle_share(pairs, packs, ranks)) for total, packs in zip(tokens, plan))
    copies = {"prompt": range(len(pairs.prompts)), "pair": pairs.prompt_of, "none": 2 * pairs.prompt_of}[share]
    uncut = sum(pairs.prompt_tokens[prompt] for prompt in copies) + sum(pairs.judgment_tokens)
    lengths = [mean([pairs.prompt_tokens[pairs.prompt_of[pair]] for pair in steps[i]]) for i in full]
    return {
        "share": share, "pairs_per_step": pairs_per_step, "ranks": ranks, "seconds": seconds,
        "packs_per_step": mean([len(plan[i]) for i in full]), "fullest_over_mean": mean([1 / (1 - w) for w in waits]),
        "tokens_over_uncut": sum(tokens) / uncut, "efficiency": uncut / longest,
        "length_spread": statistics.pstdev(lengths),
    }  # fmt: skip


def measure_whole(pairs: TokenizedPairs, max_tokens: int) -> dict:
    """One plan of all pairs: stage 5, the reference logprobs."""
    start = time.process_time()
    packs = plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, share="prompt")
    seconds = time.process_time() - start
    fill = sum(pack_tokens(pairs, packs)) / len(packs) / max_tokens
    return {"whole": True, "seconds": seconds, "packs": len(packs), "fill_of_budget": fill}


def main() -> None:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=data, help="folder that holds the three below under their names")
    parser.add_argument("--tokenizer", type=Path, help="folder; DATA/qwen2-tokenizer if not given")
    parser.add_argument("--prompts", nargs="+", help="preference data; DATA/ultrafeedback/… if not given")
    parser.add_argument("--judgments", nargs="+", type=Path, help="LLMBar result.json; DATA/…/*_CoT/… if not given")
    parser.add_argument("--num-prompts", type=int, default=80_000, help="prompts drawn")
    parser.add_argument("--pairs-per-prompt", nargs=2, type=int, default=[3, 5], help="fewest and most pairs of each")
    parser.add_argument("--lengths", choices=("data", "con-j"), default="data", help="whose lengths")
    parser.add_argument("--max-tokens-per-pack", type=int, default=16384, help="tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lengths")
    parser.add_argument("--json", type=Path, help="file to write the rows to, with versions and commit")
    args = parser.parse_args()
    rng, (fewest, most) = random.Random(args.seed), args.pairs_per_prompt
    if args.lengths == "con-j":
        lengths = con_j_lengths(rng)
    else:
        lengths = real_lengths(
            args.tokenizer or args.data / "qwen2-tokenizer",
            args.prompts or [str(args.data / "ultrafeedback" / "train_clean.jsonl")],
            args.judgments or sorted(args.data.glob("llmbar_judge_outputs/*/*_CoT/result.json")),
        )
    pairs = draw_pairs(rng, lengths, args.num_prompts, fewest, most)
    print(
        f"{args.num_prompts} prompts x {fewest} to {most} pairs, drawn from {len(lengths[0])} prompts "
        f"(mean {mean(lengths[0]):.0f} tokens, most {max(lengths[0])}) and {len(lengths[1])} judgments "
        f"(mean {mean(lengths[1]):.0f}, most {max(lengths[1])}); packs of {args.max_tokens_per_pack} tokens"
    )
    rows = [measure_whole(pairs, args.max_tokens_per_pack)]
    print("All data, `--share prompt`: {packs} packs, {fill_of_budget:.2%} full, {seconds:.1f} s.\n".format(**rows[0]))
    print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|")
    for share in ("prompt", "pair", "none"):
        for pairs_per_step, ranks in SHAPES:
            row = measure_steps(pairs, share, pairs_per_step, ranks, args.max_tokens_per_pack)
            rows.append(row)
            print("|", " | ".join(COLUMNS.values()).format(**row), "|", flush=True)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if isinstance(value, int | list | str)}
        args.json.write_text(json.dumps({"settings": settings, "code": describe_code(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
