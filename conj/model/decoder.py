"""The decoder by hand, over packed tokens: one for all architectures, which `config.py` describes.

Dimension letters, here and everywhere: T packed tokens, S segments, P pairs, D hidden, F mlp, N query heads,
K key/value heads, H head size, V vocabulary, L layers. Parameters have the names that `transformers` gives them,
so the weight map is the identity. Sources: `config.ARCHITECTURES`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conj.model import backends
from conj.model.attention import Segments, attention
from conj.model.config import ModelConfig
from conj.model.logprob import linear_logprob
from conj.model.ops import Gather, add_rms_norm, gather_rows, rms_norm, rope, rope_tables, swiglu
from conj.model.recompute import cast, recomputing

# Bytes from forward to backward. On a CPU models are small, and their heads a large part of the work.
KEPT_LOGITS = {"cpu": 192 << 20, "cuda": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Linear(nn.Linear):
    """Computes in its input's dtype, whatever its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.weight, x.dtype), None if self.bias is None else cast(self.bias, x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, cast(self.weight, x.dtype), self.eps)

    def after(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and that sum."""
        return add_rms_norm(x, delta, cast(self.weight, x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.o_bias)
        norms = [RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None for _ in range(2)]
        self.q_norm, self.k_norm = norms

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> (T, N, H), (T, K, H), (T, K, H), rotated by their positions."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = (norm(x.flatten(0, 1)).view_as(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return *rope(q, k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        # or selective (all but what elementwise steps make again), full (a block's input alone)
        self.activation_checkpointing = "none"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        how, casts = self.activation_checkpointing, self.input_layernorm.weight.dtype != x.dtype
        if how == "full" and torch.is_grad_enabled():
            return checkpoint(self._block, x, cos, sin, segments, use_reentrant=False, preserve_rng_state=False)
        # torch.compile chooses by itself what its backward makes again, casts among it.
        recomputes = torch.is_grad_enabled() and backends.current.kernels != "compile"
        with recomputing(activations=how == "selective") if recomputes and (casts or how != "none") else nullcontext():
            return self._block(x, cos, sin, segments)

    def _block(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        before, after = _before_attention, _after_attention
        if backends.current.kernels == "compile":
            before, after = _compiled(before), _compiled(after)
        q, k, v = before(self, x, cos, sin)
        # Not compiled: the segments differ from pack to pack, and each pack would be compiled anew.
        return after(self, x, attention(q, k, v, segments))


def _before_attention(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.self_attn.queries_keys_values(layer.input_layernorm(x), cos, sin)


def _after_attention(layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    normed, x = layer.post_attention_layernorm.after(x, layer.self_attn.o_proj(attended.flatten(-2)))
    return x + layer.mlp(normed)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # one compilation for all layers and all pack lengths


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype | None = None  # of computation; by default the weights'
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, segments: Segments) -> Tensor:
        x = self.embed_tokens(input_ids)  # (T, D)
        x = x.to(self.dtype or x.dtype)
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, segments)
        return self.norm(x)


class Decoder(nn.Module):
    """A decoder for causal language modelling, packed. Built on the meta device and filled by `conj.model.weights`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        # A tied head is no parameter of its own, so that parameters and checkpoint keys match one to one.
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:  # (V, D)
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,  # (T,) int64
        positions: Tensor,  # (T,) int64, from 0 in each sequence; a judgment goes on from its prompt's
        segments: Segments,
        predict: Gather,  # (M,) rows of T: those whose next token is asked for
        targets: Tensor,  # (M,) int64: those next tokens
    ) -> Tensor:  # (M,) fp32 logprobs in nats
        hidden = self.model(input_ids, positions, segments)
        head = cast(self.head_weight, hidden.dtype)
        return linear_logprob(gather_rows(hidden, predict), head, targets, keep_bytes=KEPT_LOGITS[hidden.device.type])

    def logits(self, input_ids: Tensor, positions: Tensor, segments: Segments) -> Tensor:  # (T, V)
        """All logits, for tests and inspection; training never holds them."""
        hidden = self.model(input_ids, positions, segments)
        return F.linear(hidden, cast(self.head_weight, hidden.dtype))
