"""How fast, full and even are plans of a whole run? Steps and packs of 80,000 prompts x 5 pairs, with real lengths.

    python scripts/bench_packing.py --json benchmarks/packing.json

Lengths are drawn, with replacement, from UltraFeedback rows in the judge's prompt and from reasons that LLMBar's judges
wrote, in the judgment's JSON, both under Qwen2's tokenizer. Token ids do not matter here. Time is taken to be
proportional to tokens: `balance lost` is the share of time in which ranks wait for the fullest one, a mean over full
steps of 1 - mean rank / fullest rank. As packs are dealt largest first, rank 0 is the fullest in every round.
"""

import json
import random
import sys
import time
from array import array
from pathlib import Path

from bench_common import argument_parser

from conj import InputError
from conj.data.manifest import describe_code
from conj.data.packs import deal, group_tokens, plan_packs, plan_steps
from conj.data.preprocess import load_prompts, question_of
from conj.data.prompts import judge_messages, judgment_text
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import TokenizedPairs

SHAPES = [(24, 1), (24, 8), (25, 8), (192, 8), (384, 64)]  # pairs a step, ranks
COLUMNS = {
    "share": "{share}", "pairs a step": "{pairs_per_step}", "ranks": "{ranks}", "seconds": "{seconds:.1f}",
    "packs a step": "{packs_per_step:.2f}", "fill of longest": "{fill_of_longest:.2%}",
    "fill of budget": "{fill_of_budget:.2%}", "balance lost": "{balance_lost:.2%}",
    "tokens / uncut": "{tokens_over_uncut:.3f}", "fullest rank x ranks / uncut": "{fullest_rank_over_uncut:.3f}",
}  # fmt: skip


def real_lengths(tokenizer_folder: Path, prompts: list[str], judgments: list[Path]) -> tuple[list[int], list[int]]:
    """Tokens of judge prompts (any preference data) and of judgments (result.json of LLMBar's judges that reason)."""
    tokenizer = JudgeTokenizer.load(tokenizer_folder)
    missing = [str(path) for path in [*prompts, *judgments] if not Path(path).exists()]
    if missing or not judgments:
        named = ", ".join(missing) or "judgments"
        raise InputError(f"{named}: no such file; give --data FOLDER, or the files themselves")
    rows, _ = load_prompts(prompts)
    messages = [judge_messages(question_of(row), row["answer_1"], row["answer_2"]) for row in rows]
    judged = [row["results"][0].values() for path in judgments for row in json.loads(path.read_text("utf-8"))]
    texts = [judgment_text(side["completion"][0], 1) for sides in judged for side in sides]
    return [len(tokenizer.prompt_ids(m)) for m in messages], [len(tokenizer.completion_ids(text)) for text in texts]


def draw_pairs(rng: random.Random, lengths: tuple[list[int], list[int]], num_prompts: int, k: int) -> TokenizedPairs:
    """`num_prompts` prompts with `k` pairs each. All ids are 0, and texts of one length are one array."""
    zeros = {n: array("i", bytes(4 * n)) for n in {*lengths[0], *lengths[1]}}
    prompts, chosen, rejected = (
        [zeros[n] for n in rng.choices(of, k=count)]
        for of, count in ((lengths[0], num_prompts), (lengths[1], num_prompts * k), (lengths[1], num_prompts * k))
    )
    prompt_of = [prompt for prompt in range(num_prompts) for _ in range(k)]
    shared = {"ids": list(map(str, prompt_of)), "is_eval": [False] * len(prompt_of), "prompt_of": prompt_of}
    return TokenizedPairs(**shared, prompts=prompts, judgments=list(zip(chosen, rejected)))


def pack_tokens(pairs: TokenizedPairs, packs: list) -> list[int]:
    return [sum(group_tokens(pairs, group) for group in pack) for pack in packs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure_steps(pairs: TokenizedPairs, share: str, pairs_per_step: int, ranks: int, max_tokens: int) -> dict:
    """One epoch of steps, with packs for `ranks` ranks."""
    start = time.perf_counter()
    steps = plan_steps(pairs, list(range(len(pairs))), pairs_per_step=pairs_per_step, share=share, seed="0")
    plan = [plan_packs(pairs, step, max_tokens=max_tokens, share=share, multiple=ranks) for step in steps]
    seconds = time.perf_counter() - start
    # Figures are of full steps. A prompt is encoded at least once in each step (share="prompt") that has pairs of it.
    full = [i for i, step in enumerate(steps) if len(step) == pairs_per_step] or [0]
    loads = [pack_tokens(pairs, plan[i]) for i in full]
    shares = [[sum(load or 0 for load in deal(step, rank, ranks)) for rank in range(ranks)] for step in loads]
    whole = [plan_packs(pairs, steps[i], max_tokens=2**40, share=share) for i in full]
    tokens, uncut = sum(map(sum, loads)), sum(sum(pack_tokens(pairs, packs)) for packs in whole)
    return {
        "share": share, "pairs_per_step": pairs_per_step, "ranks": ranks, "seconds": seconds,
        "packs_per_step": mean([len(step) for step in loads]),
        "fill_of_longest": mean([sum(step) / len(step) / max(step) for step in loads]),
        "fill_of_budget": tokens / sum(map(len, loads)) / max_tokens,
        "balance_lost": mean([1 - mean(step) / max(step) for step in shares]), "tokens_over_uncut": tokens / uncut,
        "fullest_rank_over_uncut": sum(map(max, shares)) * ranks / uncut,
    }  # fmt: skip


def measure_whole(pairs: TokenizedPairs, max_tokens: int) -> dict:
    """One plan of all pairs: stage 5, the reference logprobs."""
    start = time.perf_counter()
    packs = plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, share="prompt")
    seconds = time.perf_counter() - start
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
    parser.add_argument("--pairs-per-prompt", type=int, default=5, help="pairs of each")
    parser.add_argument("--max-tokens-per-pack", type=int, default=16384, help="tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lengths")
    parser.add_argument("--json", type=Path, help="file to write the rows to, with versions and commit")
    args = parser.parse_args()
    lengths = real_lengths(
        args.tokenizer or args.data / "qwen2-tokenizer",
        args.prompts or [str(args.data / "ultrafeedback" / "train_clean.jsonl")],
        args.judgments or sorted(args.data.glob("llmbar_judge_outputs/*/*_CoT/result.json")),
    )
    pairs = draw_pairs(random.Random(args.seed), lengths, args.num_prompts, args.pairs_per_prompt)
    print(
        f"{args.num_prompts} prompts x {args.pairs_per_prompt} pairs, drawn from {len(lengths[0])} prompts "
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
        settings = {name: value for name, value in vars(args).items() if isinstance(value, int)}
        args.json.write_text(json.dumps({"settings": settings, "code": describe_code(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
