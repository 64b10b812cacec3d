"""A pack of groups as tensors: what the model reads, and where each pair's logprobs lie in what it gives.

Packs are made one ahead, by a thread, and go to the device from pinned memory: no copy waits for the work before it.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from conj.data.packs import Group
from conj.data.tokens import TokenizedPairs
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
    num_tokens: Tensor  # (P, 2) fp32: the same
    pair_numbers: list[int]  # (P,)
    reference: Tensor | None = None  # (P, 2) fp32 stored logprobs

    @property
    def inputs(self) -> tuple:
        return self.input_ids, self.positions, self.segments, self.predict, self.targets

    def pair_logps(self, logprobs: Tensor) -> Tensor:  # (M,) -> (P, 2) fp32: sums in nats, chosen and rejected
        """Sums judgment by judgment: a sum does not depend on what else is in the pack."""
        if not self.lengths:
            return logprobs.view(0, 2)  # keeps the graph: an empty pack still takes part in every collective
        return torch.stack([piece.sum() for piece in logprobs.split(self.lengths)]).view(-1, 2)


def batches_ahead(
    pairs: TokenizedPairs,
    packs: Iterable[list[Group] | None],
    device: torch.device,
    reference: Tensor | None = None,  # (N, 2) fp32, of all pairs
) -> Iterator[Batch]:
    """Each pack's tensors on the device. While one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        coming: Future | None = None
        for pack in packs:
            made = coming
            coming = thread.submit(collate, pairs, pack, reference)
            if made:
                yield to_device(made.result(), device)
        if coming:
            yield to_device(coming.result(), device)


def to_device(value, device: torch.device):
    """The tensors of a dataclass, or of one inside it, copied without a wait."""
    if isinstance(value, Tensor) and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    if is_dataclass(value):
        return replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)})
    return value


def collate(pairs: TokenizedPairs, pack: list[Group] | None, reference: Tensor | None = None) -> Batch:
    """A pack's tensors, on the CPU. None gives the empty pack: one token, nothing predicted."""
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

    return Batch(
        input_ids=torch.tensor(ids), positions=torch.tensor(positions), segments=build_segments(lengths, prefix),
        predict=build_gather(torch.tensor(predict, dtype=torch.int64), len(ids)),
        targets=torch.tensor(targets, dtype=torch.int64), lengths=judgment_lengths,
        num_tokens=torch.tensor(judgment_lengths, dtype=torch.float32).view(-1, 2), pair_numbers=numbers,
        reference=None if reference is None else reference[numbers],
    )  # fmt: skip
