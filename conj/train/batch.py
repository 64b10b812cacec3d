"""A pack of groups as tensors: what the model reads, and where each pair's logprobs lie in what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conj.data.packs import Group, TokenizedPairs
from conj.model.attention import Segments, build_segments
from conj.model.ops import Gather, build_gather


@dataclass(frozen=True, kw_only=True)
class Batch:
    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    segments: Segments
    predict: Gather  # (M,) rows of T
    targets: Tensor  # (M,) int64
    lengths: list[int]  # (2P,) tokens of chosen, rejected, chosen, …; they sum to M
    pair_numbers: list[int]  # (P,)

    @property
    def inputs(self) -> tuple:
        return self.input_ids, self.positions, self.segments, self.predict, self.targets

    def pair_logps(self, logprobs: Tensor) -> Tensor:  # (M,) -> (P, 2) fp32: sums in nats, chosen and rejected
        """Sums judgment by judgment: a sum does not depend on what else is in the pack."""
        if not self.lengths:
            return logprobs.view(0, 2)  # keeps the graph: an empty pack still takes part in every collective
        return torch.stack([piece.sum() for piece in logprobs.split(self.lengths)]).view(-1, 2)


def collate(pairs: TokenizedPairs, pack: list[Group] | None, device: torch.device) -> Batch:
    """A pack's tensors. None gives the empty pack: one token, nothing predicted."""
    ids, positions, lengths, prefix, predict, targets, judgment_lengths, numbers = [], [], [], [], [], [], [], []

    def add_segment(tokens: Sequence[int], first_position: int, prefix_segment: int | None) -> None:
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        lengths.append(len(tokens))
        prefix.append(prefix_segment)

    for group in pack or []:
        prompt = pairs.prompts[group.prompt]
        for j, judgment in enumerate(judgment for pair in group.pairs for judgment in pairs.judgments[pair]):
            if j == 0 or group.split:
                add_segment(prompt, 0, None)
                prompt_segment, prompt_end = len(lengths) - 1, len(ids) - 1
            # The prompt's last token predicts the first token, each token the next; the last one is not read.
            predict += [prompt_end, *range(len(ids), len(ids) + len(judgment) - 1)]
            targets.extend(judgment)
            judgment_lengths.append(len(judgment))
            if len(judgment) > 1:
                add_segment(judgment[:-1], len(prompt), prompt_segment)
        numbers += group.pairs
    if not ids:
        add_segment([0], 0, None)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    return Batch(
        input_ids=tensor(ids),
        positions=tensor(positions),
        segments=build_segments(lengths, prefix, device),
        predict=build_gather(torch.tensor(predict, dtype=torch.int64), len(ids), device),
        targets=tensor(targets),
        lengths=judgment_lengths,
        pair_numbers=numbers,
    )
