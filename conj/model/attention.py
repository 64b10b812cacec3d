"""Variable-length attention over packs in which several judgments share one prompt.

A pack is a row of segments. A segment's queries attend, causally, to the keys of its prefix segment (a prompt) and to
its own: the mask is aligned bottom-right, so a judgment sees its whole prompt. With any varlen flash attention that
needs no special kernel, only a gather of keys and values; with grouped-query attention the gather is small.

Backends, one function: `flash_attn` if installed, else `torch.nn.attention.varlen` (flash attention inside torch),
else SDPA segment by segment (CPU, and the reference for the others). Segment by segment, a sequence's result does not
depend on its neighbours in the pack, bit for bit; one block-diagonal mask over the pack would not keep that.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Segments:
    """How the T tokens of a pack fall into S segments, and which segment's keys each one sees first."""

    lengths: list[int]  # (S,) tokens of each segment; they sum to T
    prefix: list[int | None]  # (S,) an earlier segment, itself without a prefix, or None
    masks: list[Tensor | None] = field(default_factory=list)  # (S,) bool (length, prefix + length), SDPA only
    key_index: Tensor | None = None  # (sum of k lengths,) int64 rows of k and v, varlen backends only
    cu_seqlens_q: Tensor | None = None  # (S + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (S + 1,) int32
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


@cache
def backend_name(device: torch.device) -> str:
    """Which kernel `attention` runs on this device."""
    if device.type == "cpu":
        return "sdpa"
    return "flash_attn" if find_spec("flash_attn") else "torch varlen"


def build_segments(lengths: list[int], prefix: list[int | None], device: torch.device) -> Segments:
    """Segments with what the device's backend needs, built once a pack and read by every layer."""
    assert all(p is None or (p < i and prefix[p] is None) for i, p in enumerate(prefix))
    if device.type == "cpu":
        masks = [
            None if p is None else torch.ones(n, lengths[p] + n, dtype=torch.bool).tril(lengths[p])
            for n, p in zip(lengths, prefix)
        ]
        return Segments(lengths=lengths, prefix=prefix, masks=masks)
    return Segments(lengths=lengths, prefix=prefix, **gather_index(lengths, prefix, device))


def gather_index(lengths: list[int], prefix: list[int | None], device: torch.device) -> dict:
    """Row numbers that lay out `[prefix keys ; own keys]` segment after segment, with both cumulative lengths."""
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    rows, k_lengths = [], []
    for i, p in enumerate(prefix):
        own = torch.arange(starts[i], starts[i + 1])
        rows.append(own if p is None else torch.cat([torch.arange(starts[p], starts[p + 1]), own]))
        k_lengths.append(len(rows[-1]))
    return {
        "key_index": torch.cat(rows).to(device),
        "cu_seqlens_q": torch.tensor(starts, dtype=torch.int32, device=device),
        "cu_seqlens_k": F.pad(torch.tensor(k_lengths).cumsum(0), (1, 0)).to(device, torch.int32),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(k_lengths),
    }


def attention(
    q: Tensor,  # (T, N, H)
    k: Tensor,  # (T, K, H), N a multiple of K
    v: Tensor,  # (T, K, H)
    segments: Segments,
) -> Tensor:  # (T, N, H)
    """Causal attention of each segment over its prefix's keys and its own, scaled by 1/sqrt(H)."""
    if q.device.type == "cpu":
        return _sdpa_by_segment(q, k, v, segments)
    k, v = k[segments.key_index], v[segments.key_index]
    lengths = (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k)
    if backend_name(q.device) == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *lengths, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    # split, not slices: its backward is one concatenation, where each slice's would fill T rows of zeros.
    pieces = [x.transpose(0, 1).unsqueeze(0).split(segments.lengths, dim=2) for x in (q, k, v)]  # (1, heads, length, H)
    gqa = q.shape[1] != k.shape[1]
    outputs = []
    for i, (q_i, k_i, v_i) in enumerate(zip(*pieces)):
        p = segments.prefix[i]
        if p is not None:
            k_i, v_i = torch.cat([pieces[1][p], k_i], dim=2), torch.cat([pieces[2][p], v_i], dim=2)
        outputs.append(
            F.scaled_dot_product_attention(
                q_i, k_i, v_i, attn_mask=segments.masks[i], is_causal=p is None, enable_gqa=gqa
            )
        )
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)
