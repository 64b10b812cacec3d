"""Variable-length attention over packs in which several judgments share one prompt.

A pack is a row of segments. A segment's queries attend, causally, to the keys of its prefix segment (a prompt) and to
its own: the mask is aligned bottom-right, so a judgment sees its whole prompt. With any varlen flash attention that
needs no special kernel, only a gather of keys and values; with grouped-query attention the gather is small.

Backends, one function (`backends.py` chooses): `flash_attn`, `varlen` (torch.nn.attention.varlen: flash attention
inside torch), and `sdpa`, segment by segment, which is the CPU's and the reference for the others. Segment by segment,
a sequence's result does not depend on its neighbours in the pack, bit for bit; one block-diagonal mask over the pack
would not keep that.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from conj.model import backends
from conj.model.ops import Gather, build_gather, gather_rows


@dataclass(frozen=True, kw_only=True)
class Segments:
    """How the T tokens of a pack fall into S segments, and which segment's keys each one sees first."""

    lengths: list[int]  # (S,) tokens of each segment; they sum to T
    prefix: list[int | None]  # (S,) an earlier segment, itself without a prefix, or None
    masks: list[Tensor | None] = field(default_factory=list)  # (S,) bool (length, prefix + length), SDPA only
    # Of the varlen backends only:
    keys: Gather | None = None  # rows of k and v, as many as the k lengths sum to
    cu_seqlens_q: Tensor | None = None  # (S + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (S + 1,) int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


def build_segments(lengths: list[int], prefix: list[int | None]) -> Segments:
    """Segments with what the chosen backend needs, built once a pack, on the CPU, and read by every layer."""
    assert all(p is None or (p < i and prefix[p] is None) for i, p in enumerate(prefix))
    if backends.current.attention == "sdpa":
        masks = [
            None if p is None else torch.ones(n, lengths[p] + n, dtype=torch.bool).tril(lengths[p])
            for n, p in zip(lengths, prefix)
        ]
        return Segments(lengths=lengths, prefix=prefix, masks=masks)
    rows, k_lengths = key_rows(lengths, prefix)
    return Segments(
        lengths=lengths, prefix=prefix, keys=build_gather(rows, sum(lengths)), cu_seqlens_q=_cumulative(lengths),
        cu_seqlens_k=_cumulative(k_lengths), max_seqlen_q=max(lengths), max_seqlen_k=max(k_lengths),
    )  # fmt: skip


def key_rows(lengths: list[int], prefix: list[int | None]) -> tuple[Tensor, list[int]]:
    """Row numbers that lay out `[prefix keys ; own keys]` segment after segment, and how many each segment has."""
    own = torch.arange(sum(lengths)).split(lengths)
    pieces = [own[i] if p is None else torch.cat([own[p], own[i]]) for i, p in enumerate(prefix)]
    return torch.cat(pieces), [len(piece) for piece in pieces]


def _cumulative(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def attention(
    q: Tensor,  # (T, N, H)
    k: Tensor,  # (T, K, H), N a multiple of K
    v: Tensor,  # (T, K, H)
    segments: Segments,
) -> Tensor:  # (T, N, H)
    """Causal attention of each segment over its prefix's keys and its own, scaled by 1/sqrt(H)."""
    if backends.current.attention == "sdpa":
        return _sdpa_by_segment(q, k, v, segments)
    k, v = (gather_rows(x.flatten(1), segments.keys).unflatten(1, x.shape[1:]) for x in (k, v))
    lengths = (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k)
    if backends.current.attention == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *lengths, causal=True, deterministic=backends.current.deterministic)
    return _varlen_attention()(q, k, v, *lengths)


@cache
def _varlen_attention() -> Callable:
    """torch's own, causal. From 2.12 on it asks for grouped heads by name, and may split keys by the pack's longest
    segment, which would change a judgment's bits with its neighbours: one split."""
    from torch.nn.attention.varlen import varlen_attn

    newer = {"enable_gqa": True, "num_splits": 1}
    known = inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, window_size=(-1, 0), **{k: v for k, v in newer.items() if k in known})


def _sdpa_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    # In fp32 on a CPU, rounded once: SDPA's backward there takes about half of the time that it takes in bf16.
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    rows = (x.to(dtype).transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, T, H)
    # split, not slices: its backward is one concatenation, where each slice's would fill T rows of zeros.
    pieces = [x.split(segments.lengths, dim=2) for x in rows]  # (1, heads, length, H)
    gqa = q.shape[1] != k.shape[1]
    outputs = []
    for i, (q_i, k_i, v_i) in enumerate(zip(*pieces)):
        p = segments.prefix[i]
        if p is not None:
            k_i, v_i = torch.cat([pieces[1][p], k_i], dim=2), torch.cat([pieces[2][p], v_i], dim=2)
        outputs.append(
            F.scaled_dot_product_attention(q_i, k_i, v_i, segments.masks[i], is_causal=p is None, enable_gqa=gqa)
        )
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).to(q.dtype)
