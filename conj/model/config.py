"""What a model folder's config.json says of the decoder, in one form, whoever wrote it; without torch.

Three writers, three dialects: transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5
`rope_parameters` and `dtype`, and a folder that 4 read and saved again has both. Where two places of a file differ, its
readers take one or the other: that is refused, and both places are named. What this decoder does not have (a window,
another activation, quantized weights) is refused by `Untrainable`, never ignored: vLLM may still sample with it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from conj import InputError
from conj.data.files import brief
from conj.data.model_files import read_model_json
from conj.data.options import require

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' name: torch's


class Untrainable(InputError):
    """A folder that says what it is, and is nothing that conj trains."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What tells one decoder from the others; the rest is the same in all: pre-norms, rotary positions, grouped queries,
    a gated MLP. A default is that of transformers' configuration class, for a key that the file lacks."""

    model_class: str  # in transformers and vLLM
    source: str
    qkv_bias: bool = False
    optional_biases: bool = False  # `attention_bias` and `mlp_bias` of the config
    qk_norm: bool = False  # an RMS norm over each head of queries and keys
    default_head_dim: int | None = None  # None: hidden size / heads
    default_kv_heads: int | None = None  # None: as many as query heads
    default_window: int | None = None
    window_has_switch: bool = False  # `use_sliding_window`


ARCHITECTURES = {
    "qwen2": Architecture(  # and Qwen2.5
        model_class="Qwen2ForCausalLM", source="arXiv 2407.10671", qkv_bias=True, default_kv_heads=32,
        default_window=4096, window_has_switch=True,
    ),
    "qwen3": Architecture(
        model_class="Qwen3ForCausalLM", source="arXiv 2505.09388", qk_norm=True, default_head_dim=128,
        default_kv_heads=32, default_window=4096, window_has_switch=True,
    ),
    "llama": Architecture(model_class="LlamaForCausalLM", source="arXiv 2407.21783", optional_biases=True),
    "mistral": Architecture(
        model_class="MistralForCausalLM", source="arXiv 2310.06825", default_kv_heads=8, default_window=4096
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864): its base, and how it is stretched to a longer context."""

    theta: float
    kind: str = "default"  # or yarn (arXiv 2309.00071), llama3 (Llama 3.1's own)
    factor: float = 1.0
    original_context: int = 0  # tokens, before it was stretched
    beta_fast: float = 32.0  # yarn: rotations in the original context from which a frequency is left as it is
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by the factor
    attention_factor: float = 1.0  # yarn: scales queries and keys
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and features of a decoder. The letters are those of `decoder.py`."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_position_embeddings: int  # tokens; what YaRN could reach beyond it, vLLM refuses
    model_type: str = "qwen2"
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it is


def read_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face model folder.

    Raises InputError when it is missing or malformed, contradicts itself, or asks for remote code, and Untrainable for
    what this decoder does not have."""
    path = Path(folder) / "config.json"
    raw = read_model_json(path)
    require(raw.get("auto_map") is None, f"{path}: auto_map: expected no remote code, which is never run, found some")
    rope, stated_theta = _rope_parameters(raw, path)
    _check_dtype(raw, path)
    architecture = _architecture(raw, path)
    _refuse_features(raw, architecture, path)

    heads, hidden = _number(raw, "num_attention_heads", path), _number(raw, "hidden_size", path)
    head_dim = architecture.default_head_dim or hidden // heads
    head_dim = head_dim if raw.get("head_dim") is None else _number(raw, "head_dim", path)
    default_kv_heads = None if "num_key_value_heads" in raw else architecture.default_kv_heads  # null means the heads
    kv_heads = _number(raw, "num_key_value_heads", path, default_kv_heads or heads)
    require(
        head_dim >= 2 and head_dim % 2 == 0 and heads * head_dim < 10**9,
        f"{path}: expected heads of an even size, below 1e9 in all, found {heads} of {head_dim}",
    )
    require(
        heads % kv_heads == 0,
        f"{path}: num_attention_heads: expected a multiple of num_key_value_heads ({kv_heads}), found {heads}",
    )
    tied = raw.get("tie_word_embeddings", False)
    require(type(tied) is bool, f"{path}: tie_word_embeddings: expected a bool, found {brief(tied)}")
    context = _number(raw, "max_position_embeddings", path)
    optional = {name: architecture.optional_biases and raw.get(name, False) for name in ("attention_bias", "mlp_bias")}
    return ModelConfig(
        vocab_size=_number(raw, "vocab_size", path), hidden_size=hidden,
        intermediate_size=_number(raw, "intermediate_size", path),
        num_hidden_layers=_number(raw, "num_hidden_layers", path, most=1001), num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=float(_number(raw, "rms_norm_eps", path, most=1e9)),
        rope=_rope(rope, stated_theta, context, path), tie_word_embeddings=tied, max_position_embeddings=context,
        model_type=raw["model_type"], qkv_bias=architecture.qkv_bias or optional["attention_bias"],
        o_bias=optional["attention_bias"], mlp_bias=optional["mlp_bias"], qk_norm=architecture.qk_norm, raw=raw,
    )  # fmt: skip


def _number(raw: dict, name: str, where: Path | str, default: object = None, most: float = 10**9) -> int | float:
    """A number above 0 and below `most`; whole where `most` is whole."""
    value = default if raw.get(name) is None else raw[name]
    kinds = (int, float) if isinstance(most, float) else (int,)  # not isinstance: true is no number
    require(value is not None, f"{where}: missing {name!r}")
    kind = "a number" if float in kinds else "a whole number"
    require(
        type(value) in kinds and 0 < value < most,
        f"{where}: {name}: expected {kind} above 0 and below {most:g}, found {brief(value)}",
    )
    return value


def _architecture(raw: dict, path: Path) -> Architecture:
    kind, classes = raw.get("model_type"), raw.get("architectures")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        found = brief(kind) if kind is not None else "none"
        raise Untrainable(f"{path}: model_type: expected one of {', '.join(ARCHITECTURES)}, found {found}")
    expected = [ARCHITECTURES[kind].model_class]
    require(
        classes == expected,
        f"{path}: architectures: expected {expected}, as model_type {kind!r} says, found {brief(classes)}; vLLM goes by "
        "architectures, transformers by model_type",
    )
    return ARCHITECTURES[kind]


def _refuse_features(raw: dict, architecture: Architecture, path: Path) -> None:
    """Raises Untrainable for a feature that the decoder does not have."""
    for name in ("quantization_config", "compression_config"):  # vLLM reads the second where the first is missing
        if raw.get(name) is not None:
            why = "quantized weights are not trained; if these are not, delete it: it makes others misread them"
            raise Untrainable(f"{path}: {name}: expected none, found {brief(raw[name])}; {why}")
    supported = {"hidden_act": ("silu",), "partial_rotary_factor": (1, None), "dual_chunk_attention_config": (None,)}
    if not architecture.optional_biases:
        supported |= {"attention_bias": (False,), "mlp_bias": (False,)}
    for name, values in supported.items():
        if raw.get(name, values[0]) not in values:
            raise Untrainable(f"{path}: {name}: expected {values[0]!r}, found {brief(raw[name])}")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        value = raw.get(name, False)
        require(type(value) is bool, f"{path}: {name}: expected a bool, found {brief(value)}")
    layer_types = raw.get("layer_types")
    window = raw.get("sliding_window", architecture.default_window)
    switch = "use_sliding_window" if architecture.window_has_switch else "sliding_window"
    is_on = raw.get(switch, False) if architecture.window_has_switch else architecture.default_window is not None
    if is_on and window is not None and not _reaches(window, raw.get("max_position_embeddings")):
        found = brief(window) if "sliding_window" in raw else f"{window}, transformers' where the key is missing"
        raise Untrainable(f"{path}: {switch}: expected attention to the whole text, found a window of {found}")
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise Untrainable(f"{path}: layer_types: expected full_attention in all layers, found {brief(layer_types)}")
    num_layers = _number(raw, "num_hidden_layers", path, most=1001)
    require(
        len(layer_types) == num_layers,
        f"{path}: layer_types: expected {num_layers}, as num_hidden_layers says, found {len(layer_types)}",
    )


def _reaches(window: object, context: object) -> bool:
    return type(window) is int and type(context) is int and window >= context


def _check_dtype(raw: dict, path: Path) -> None:
    """Raises InputError where the two places of a dtype differ, and Untrainable for one that is no float of torch's: with
    it no reader but this one opens the folder."""
    stated = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    _require_agreement(stated, path)
    for name, value in stated.items():
        if value not in list(STORED_DTYPES.values()):  # a list: what stands in the file may have no hash
            raise Untrainable(
                f"{path}: {name}: expected one of {', '.join(STORED_DTYPES.values())}, found {brief(value)}"
            )


def _require_agreement(stated: dict[str, object], path: Path) -> None:
    for name, value in list(stated.items())[1:]:
        first, expected = next(iter(stated.items()))
        require(
            value == expected,
            f"{path}: {brief(name)[1:-1]}: expected {brief(expected)}, as {brief(first)[1:-1]} says, found {brief(value)}; "
            "readers take one or the other",
        )


def _rope_parameters(raw: dict, path: Path) -> tuple[dict, object]:
    """The rope's parameters, from whichever place states them, and its theta; None where no place does."""
    places = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name) not in (None, {})}
    for name, stated in places.items():
        require(isinstance(stated, dict), f"{path}: {name}: expected a JSON object, found {brief(stated)}")
        for key in ("rope_type", "type", "rope_theta"):  # null is not missing: readers take it for the value
            if key in stated and stated[key] in (None, ""):
                raise InputError(f"{path}: {name}.{key}: expected a value, or no such key, found {brief(stated[key])}")
        kinds = {f"{name}.{key}": stated[key] for key in ("rope_type", "type") if stated.get(key) is not None}
        _require_agreement(kinds, path)
    theta = {f"{name}.rope_theta": p["rope_theta"] for name, p in places.items() if p.get("rope_theta") is not None}
    theta |= {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    _require_agreement(theta, path)
    length = "original_max_position_embeddings"  # transformers 5 takes the config's own for that of the rope
    lengths = {f"{name}.{length}": p[length] for name, p in places.items() if p.get(length) is not None}
    _require_agreement(lengths | ({} if raw.get(length) is None else {length: raw[length]}), path)
    normal = {name: _normal(stated) for name, stated in places.items()}
    for key in sorted({key for stated in normal.values() for key in stated}):
        _require_agreement({f"{name}.{key}": stated.get(key) for name, stated in normal.items()}, path)
    return next(iter(normal.values()), {}), next(iter(theta.values()), None)


def _normal(stated: dict) -> dict:
    kind = stated.get("rope_type") or stated.get("type") or "default"
    rest = {key: value for key, value in stated.items() if value is not None}
    return {key: v for key, v in rest.items() if key not in ("rope_type", "type", "rope_theta")} | {"rope_type": kind}


YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def _rope(stated: dict, theta: object, context: int, path: Path) -> Rope:
    where, kind = f"{path}: rope", stated.get("rope_type", "default")
    theta = float(_number({"rope_theta": theta}, "rope_theta", path, 10_000.0, most=1e12))
    known = {"default": (), "yarn": YARN, "llama3": LLAMA3}
    neutral = {"partial_rotary_factor": 1, "truncate": True}  # the only values that every reader knows
    if not isinstance(kind, str) or kind not in known:
        raise Untrainable(f"{path}: rope_type: expected one of {', '.join(known)}, found {brief(kind)}")
    for name in sorted(stated.keys() - {"rope_type", *known[kind]}):
        if stated[name] != neutral.get(name):
            raise Untrainable(
                f"{where} of type {kind}: {brief(name)[1:-1]}: expected no such parameter, found {brief(stated[name])}"
            )
    if kind == "default":
        return Rope(theta=theta)
    factor = float(_number(stated, "factor", where, most=1e6))
    # Readers disagree on what a missing original length is: it may be the length before or after it was stretched.
    common = {"theta": theta, "kind": kind, "factor": factor}
    common["original_context"] = _number(stated, "original_max_position_embeddings", where)
    if kind == "llama3":
        low, high = (float(_number(stated, name, where, most=1e6)) for name in LLAMA3[2:])
        require(low < high, f"{where}: high_freq_factor: expected more than low_freq_factor ({low:g}), found {high:g}")
        return Rope(**common, low_freq_factor=low, high_freq_factor=high)
    ratio = context / common["original_context"]
    require(
        ratio in (1, factor),
        f"{path}: max_position_embeddings: expected {common['original_context']} or, stretched, "
        f"{factor * common['original_context']:g}, as rope's factor says, found {context}; readers take one or the other",
    )
    attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # arXiv 2309.00071, equation 22
    return Rope(
        **common, beta_fast=float(_number(stated, "beta_fast", where, 32.0, most=1e6)),
        beta_slow=float(_number(stated, "beta_slow", where, 1.0, most=1e6)),
        attention_factor=float(_number(stated, "attention_factor", where, attention_factor, most=1e6)),
    )  # fmt: skip


def rope_of(rope: Rope) -> dict:
    """The rope's parameters as transformers 5 writes them; 4 reads all but `rope_theta` as `rope_scaling`."""
    stated = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        stated |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_context}
    if rope.kind == "llama3":
        stated |= {name: getattr(rope, name) for name in LLAMA3[2:]}
    if rope.kind == "yarn":
        stated |= {name: getattr(rope, name) for name in YARN[2:]}
    return stated


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the decoder's parameters, as transformers names them. A tied head is none of its own."""
    c = config
    q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = {  # name: rows, columns, whether there is a bias
        "self_attn.q_proj": (q_size, c.hidden_size, c.qkv_bias), "self_attn.k_proj": (kv_size, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (kv_size, c.hidden_size, c.qkv_bias), "self_attn.o_proj": (c.hidden_size, q_size, c.o_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }  # fmt: skip
    layer = {}
    for name, (rows, columns, has_bias) in matrices.items():
        layer |= {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if has_bias else {})
    norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
    norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim} if c.qk_norm else {}
    layer |= {f"{name}.weight": (size,) for name, size in norms.items()}
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size), "model.norm.weight": (c.hidden_size,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(c.num_hidden_layers) for name, shape in layer.items()}
    return shapes if c.tie_word_embeddings else shapes | {"lm_head.weight": (c.vocab_size, c.hidden_size)}
