"""What ranks send each other in a training step, by count: one copy of the model over all ranks, or one a node (HSDP).

    python scripts/count_traffic.py --nodes 8 --ranks-per-node 8 --packs 1 3

`conj.train.speed.step_traffic` counts what a rank sends, and tests/test_traffic.py holds it against FSDP2's own calls.
Out of a node goes, for each ring that spans nodes, what one of its ranks sends: one ring for a copy that spans them, and
for sums between copies one for each rank of a node, which all send their own part.
"""

from bench_common import QWEN2, argument_parser, config_of

from conj.train.speed import step_traffic


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=QWEN2, default="7B", help="geometry")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 3], help="of each rank in a step")
    args = parser.parse_args()
    config, num_ranks = config_of(QWEN2[args.model], QWEN2[args.model]["L"]), args.nodes * args.ranks_per_node
    kinds = ("weights gathered", "gradients reduced", "between copies")
    print(f"Qwen2-{args.model}, {args.nodes} nodes of {args.ranks_per_node} ranks, GB a step\n")
    print(
        "| `--dp-shard-size` | resharded | packs a rank |",
        " | ".join(f"{kind}, a rank" for kind in kinds),
        "| out of a node |",
    )
    print("|---" * 7 + "|")
    for shard in dict.fromkeys((num_ranks, args.ranks_per_node)):
        for num_turns in args.packs:
            for again in (True, False):
                sent = step_traffic(
                    config, num_turns=num_turns, shard_size=shard, num_copies=num_ranks // shard,
                    reshard_after_forward=again,
                )  # fmt: skip
                spans = shard > args.ranks_per_node
                out = sent["gathered"] + sent["reduced"] if spans else args.ranks_per_node * sent["between_copies"]
                figures = [f"{value / 1e9:.1f}" for value in (*sent.values(), out)]
                print(f"| {shard} | {'yes' if again else 'no'} | {num_turns} |", " | ".join(figures), "|")


if __name__ == "__main__":
    main()
