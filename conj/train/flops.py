"""FLOPs of a step and the share of it that ranks wait, by written formulas; without torch, for plans as well as for logs."""

from conj.data.packs import Group, group_tokens
from conj.data.tokens import TokenizedPairs
from conj.model.config import ModelConfig


def step_flops(pairs: TokenizedPairs, packs: list[list[Group]], config: ModelConfig) -> tuple[int, int]:
    """FLOPs of one forward through the blocks, and through the head, elementwise work left out.

    A token takes 2 x (parameters of the blocks' matrices); a query takes 4 x N x H for every key it sees; a predicted
    token takes 2 x D x V. A prompt counts as often as it is encoded: once for all pairs that share it."""
    c = config
    heads_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads_size + 2 * kv_size + 3 * c.intermediate_size)
    blocks = head = 0
    for group in (g for pack in packs for g in pack):
        prompt = len(pairs.prompts[group.prompt])
        judgments = [len(ids) for pair in group.pairs for ids in pairs.judgments[pair]]
        copies = len(judgments) if group.split else 1
        keys_seen = copies * prompt * (prompt + 1) // 2
        keys_seen += sum((n - 1) * prompt + (n - 1) * n // 2 for n in judgments)
        blocks += c.num_hidden_layers * (2 * block * group_tokens(pairs, group) + 4 * heads_size * keys_seen)
        head += 2 * c.hidden_size * c.vocab_size * sum(judgments)
    return blocks, head


def training_flops(
    pairs: TokenizedPairs, packs: list[list[Group]], config: ModelConfig, *, recompute: str, device: str
) -> tuple[int, int]:
    """(executed, needed) FLOPs of a step. Needed is three times the forward; executed adds what is computed again: on a
    GPU the head's forward, and the blocks' with full activation checkpointing."""
    blocks, head = step_flops(pairs, packs, config)
    executed = (4 if recompute == "full" else 3) * blocks + (4 if device == "cuda" else 3) * head
    return executed, 3 * (blocks + head)


def idle_share(pairs: TokenizedPairs, packs: list[list[Group]], num_ranks: int) -> float:
    """Share of the ranks' time in a step that passes in waiting for the fullest pack of each turn, by tokens."""
    tokens = [sum(group_tokens(pairs, group) for group in pack) for pack in packs]
    longest = sum(max(tokens[i : i + num_ranks]) for i in range(0, len(tokens), num_ranks))
    return 1 - sum(tokens) / (num_ranks * longest)
