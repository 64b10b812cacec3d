"""The hand-written decoder against `transformers`, and packs with shared prefixes against separate sequences."""

import dataclasses
import json
import random
from itertools import accumulate

import pytest
import torch
from conftest import DATA, DECODERS, random_pairs, write_model
from count_step import LiveBytes
from torch import nn
from transformers import AutoModelForCausalLM

from conj.data.packs import Group, group_tokens, plan_packs
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.model import attention as attention_module
from conj.model import backends
from conj.model.attention import attention, build_segments, key_rows
from conj.model.config import Rope, parameter_shapes, read_config
from conj.model.weights import load_model
from conj.train.batch import collate


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=[(kind, tied) for kind in DECODERS for tied in (True, False)], ids=str)
def any_model(request, tmp_path_factory):
    """A model folder of every kind of decoder, with tied embeddings and with a head of its own."""
    kind, tied = request.param
    return write_model(tmp_path_factory.mktemp("decoder") / "model", tied=tied, **DECODERS[kind])


def some_ids(folder) -> torch.Tensor:
    rows = json.loads((DATA / "llmbar" / "adver_neighbor.json").read_text("utf-8"))[:4]
    text = "\n".join(row["input"] + row["output_1"] + row["output_2"] for row in rows)
    return torch.tensor(
        JudgeTokenizer.load(folder).encode_text(text)[: min(700, read_config(folder).max_position_embeddings)]
    )


def both_logits(folder, model=None) -> tuple[torch.Tensor, torch.Tensor]:
    """conj's and transformers' logits of a text; `model` takes the place of conj's."""
    ids = some_ids(folder)
    found = (model or load_model(folder)).logits(ids, torch.arange(len(ids)), build_segments([len(ids)], [None]))
    return found, AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0]


def test_logits_equal_transformers(any_model):
    """Breaks on any slip in RoPE, GQA, norms, biases or the head."""
    assert relative_error(*both_logits(any_model)) < 1e-5


def test_gradients_equal_transformers(any_model):
    """Of every parameter, under weights that differ from logit to logit."""
    ids, ours = some_ids(any_model)[:120], load_model(any_model)
    theirs = AutoModelForCausalLM.from_pretrained(any_model)
    logits = [ours.logits(ids, torch.arange(len(ids)), build_segments([len(ids)], [None])), theirs(ids[None]).logits[0]]
    upstream = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(2))
    for made in logits:
        (made * upstream).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in found) < 1e-4


def test_the_shapes_of_a_config_are_those_of_its_model(any_model):
    """A folder is checked by the first, without torch, and filled into the second."""
    found = {name: tuple(parameter.shape) for name, parameter in load_model(any_model).named_parameters()}
    assert parameter_shapes(read_config(any_model)) == found


def other_rope(model) -> None:
    rope = model.config.rope
    wrong = dataclasses.replace(rope, theta=rope.theta / 10) if rope.kind == "default" else Rope(theta=rope.theta)
    model.model.config = dataclasses.replace(model.config, rope=wrong)


def no_query_norm(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = nn.Identity()


def swapped_biases(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias, layer.self_attn.v_proj.bias = (
            layer.self_attn.v_proj.bias,
            layer.self_attn.k_proj.bias,
        )


def no_output_bias(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None


SLIPS = [(other_rope, kind) for kind in DECODERS] + [(no_query_norm, "qwen3"), (swapped_biases, "qwen2")]
SLIPS += [(swapped_biases, "llama, biases"), (no_output_bias, "llama, biases")]


@pytest.mark.parametrize(("slip", "kind"), SLIPS)
def test_a_slip_in_what_tells_architectures_apart_is_seen(slip, kind, tmp_path):
    """Negative control: the comparison with transformers sees a wrong rope, a missing norm, a swapped bias."""
    folder = write_model(tmp_path / "model", **DECODERS[kind])
    model = load_model(folder)
    assert relative_error(*both_logits(folder, model)) < 1e-5
    slip(model)
    assert relative_error(*both_logits(folder, model)) > 1e-3


def test_rope_theta_of_the_config_is_used(tmp_path):
    """A default theta in place of the config's changes every position but the first."""
    ids, positions, segments = torch.arange(50) + 7, torch.arange(50), build_segments([50], [None])
    logits = {}
    for theta in (1e4, 1e6):
        folder = write_model(tmp_path / str(theta), rope_parameters={"rope_type": "default", "rope_theta": theta})
        logits[theta] = load_model(folder).logits(ids, positions, segments)
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0]
        assert relative_error(logits[theta], expected) < 1e-5
    assert relative_error(logits[1e4], logits[1e6]) > 1e-3


@pytest.fixture(scope="module")
def pairs(untied_model):
    return tokenize_pairs(random_pairs(6), JudgeTokenizer.load(untied_model), 600)


def separate_logps(model, pairs) -> torch.Tensor:  # (N, 2)
    """Each judgment as its own sequence behind its own prompt, all logits, one log-softmax: no packing, no sharing."""
    rows = []
    for prompt, judgments in zip((pairs.prompts[p] for p in pairs.prompt_of), pairs.judgments):
        for judgment in judgments:
            ids = torch.tensor([*prompt, *judgment])
            logits = model.logits(ids, torch.arange(len(ids)), build_segments([len(ids)], [None]))
            rows.append(logits.float().log_softmax(-1)[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(rows).view(-1, 2)


def packed_logps(model, pairs, share: str, max_tokens: int = 3000) -> torch.Tensor:
    logps = torch.zeros(len(pairs), 2)
    for pack in plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, share=share):
        batch = collate(pairs, pack)
        logps = logps.index_copy(0, torch.tensor(batch.pair_numbers), batch.pair_logps(model(*batch.inputs)))
    return logps


def gradients(model, logps) -> dict[str, torch.Tensor]:
    """Gradients under signed weights that differ from judgment to judgment: equal ones could hide a mix-up."""
    upstream = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((logps * upstream).sum(), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found))


def packed_error(model, pairs, share: str) -> tuple[float, float]:
    """Largest relative error of logprobs, and of any parameter's gradient, packed against separate."""
    expected, found = separate_logps(model, pairs), packed_logps(model, pairs, share)
    expected_gradients, found_gradients = gradients(model, expected), gradients(model, found)
    worst = max(relative_error(found_gradients[name], g) for name, g in expected_gradients.items())
    return ((found - expected).abs() / expected.abs()).max().item(), worst


@pytest.mark.parametrize("share", ["none", "pair", "prompt"])
def test_packed_equals_separate(share, untied_model, pairs):
    """A wrong position, mask, prefix, target or sum in a shared pack changes logprobs or gradients."""
    logps_error, gradient_error = packed_error(load_model(untied_model), pairs, share)
    assert logps_error < 1e-5
    assert gradient_error < 1e-4


def test_packed_equals_separate_in_every_architecture(any_model, pairs):
    logps_error, gradient_error = packed_error(load_model(any_model), pairs, "prompt")
    assert logps_error < 1e-5
    assert gradient_error < 1e-4


@pytest.mark.parametrize("leak", ["future", "prefix"])
def test_packed_equals_separate_fails_on_a_leaking_mask(leak, untied_model, pairs, monkeypatch):
    """Negative control: the check above sees a mask that lets judgments look ahead, or at another prompt."""
    right = attention_module.build_segments

    def leaking(lengths, prefix):
        segments = right(lengths, prefix)
        if leak == "prefix":
            return right(lengths, [p if p is None else 0 for p in prefix])
        segments.masks[:] = [mask if mask is None else torch.ones_like(mask) for mask in segments.masks]
        return segments

    monkeypatch.setattr("conj.train.batch.build_segments", leaking)
    logps_error, gradient_error = packed_error(load_model(untied_model), pairs, "prompt")
    assert logps_error > 10 * 1e-5
    assert gradient_error > 10 * 1e-4


def random_packs(pairs, seed: int) -> list[list[Group]]:
    """Packs as no planner makes them: any split of prompts into groups, any order of groups and of pairs in them, pairs
    left out, and others there twice, as filling."""
    rng = random.Random(seed)
    members = [*range(len(pairs)), *rng.choices(range(len(pairs)), k=rng.randint(0, 5))]
    rng.shuffle(members)
    groups: list[Group] = []
    for pair in members:
        prompt = pairs.prompt_of[pair]
        open_groups = [g for g in groups if g.prompt == prompt and pair not in g.pairs]
        if open_groups and rng.random() < 0.7:
            rng.choice(open_groups).pairs.append(pair)
        else:
            groups.append(Group(prompt=prompt, pairs=[pair], split=rng.random() < 0.3))
    rng.shuffle(groups)
    cuts = sorted(rng.sample(range(1, len(groups)), min(3, len(groups) - 1)))
    return [groups[start:end] for start, end in zip([0, *cuts], [*cuts, len(groups)])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pairs_logprob_is_bitwise_independent_of_its_pack(dtype, untied_model, pairs):
    """The reference is computed in other packs than the policy: step 0 is exact only if this holds. Alone, in packs of
    the planner, and in random ones."""
    model = load_model(untied_model, dtype)
    alone = [[Group(prompt=pairs.prompt_of[pair], pairs=[pair])] for pair in range(len(pairs))]
    how = [{"share": share, "max_tokens": n} for share in ("none", "pair", "prompt") for n in (700, 1500, 9000)]
    planned = [plan_packs(pairs, range(len(pairs)), **options) for options in how]
    with torch.no_grad():
        expected = torch.cat([logps_of(model, pairs, [pack])[0][1] for pack in alone])
        for packs in [*planned, *(random_packs(pairs, seed) for seed in range(10))]:
            for numbers, logps in logps_of(model, pairs, packs):
                assert torch.equal(logps, expected[numbers])


def logps_of(model, pairs, packs) -> list[tuple[list[int], torch.Tensor]]:
    """Of each pack: its pair numbers and their logprobs, (P, 2)."""
    batches = [collate(pairs, pack) for pack in packs]
    return [(batch.pair_numbers, batch.pair_logps(model(*batch.inputs))) for batch in batches]


def with_checkpointing(model, how: str):
    for layer in model.model.layers:
        layer.activation_checkpointing = how
    return model


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(how, untied_model, pairs):
    model = load_model(untied_model)
    kept = gradients(model, packed_logps(model, pairs, "prompt"))
    recomputed = gradients(with_checkpointing(model, how), packed_logps(model, pairs, "prompt"))
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_graph_that_is_dropped_leaves_nothing(how, untied_model, pairs):
    """Out of memory in a forward, then another try: what the first one kept must go without a backward."""
    model = with_checkpointing(load_model(untied_model), how)
    model.model.dtype = torch.bfloat16
    with LiveBytes() as live:
        logps = packed_logps(model, pairs, "prompt")
        kept = live.live
        del logps
        assert live.live < 0.01 * kept


def test_masters_in_fp32_compute_as_weights_in_bf16_do(untied_model, pairs):
    """One rank has no FSDP2 that casts its weights: blocks do it themselves, and again in backward."""
    halves, masters = load_model(untied_model, torch.bfloat16), load_model(untied_model)
    masters.model.dtype = torch.bfloat16
    expected, found = (packed_logps(model, pairs, "prompt") for model in (halves, masters))
    assert torch.equal(found, expected)
    expected, found = gradients(halves, expected), gradients(masters, found)
    found.pop("model.embed_tokens.weight")  # summed over equal tokens in fp32
    assert all(torch.equal(found[name], expected[name].float()) for name in found)


def kept_bytes(model, pairs, how: str) -> int:
    """Bytes that one forward of all pairs leaves for its backward."""
    with_checkpointing(model, how)
    with LiveBytes() as live:
        logps = packed_logps(model, pairs, "none", 100_000)
    return live.live - logps.untyped_storage().nbytes()


def test_selective_recomputation_keeps_no_result_of_an_elementwise_step(untied_model, pairs):
    """Of each block, in fp32 with torch's kernels: two norms before and after their weights, silu and SwiGLU's product."""
    model, config = load_model(untied_model), read_config(untied_model)
    none, selective, full = (kept_bytes(model, pairs, how) for how in ("none", "selective", "full"))
    tokens = sum(group_tokens(pairs, Group(prompt=p, pairs=[i], split=True)) for i, p in enumerate(pairs.prompt_of))
    remade = config.num_hidden_layers * tokens * (4 * config.hidden_size + 2 * config.intermediate_size) * 4
    assert none - selective == remade > 0.3 * none > 0
    assert full < 0.5 * selective


def test_compiled_blocks_cast_fp32_masters_inside_one_graph(untied_model, pairs, monkeypatch):
    """One rank in bf16: as near to fp32 as eager blocks are, and no cast breaks the graph."""
    model = load_model(untied_model)
    truth = gradients(model, packed_logps(model, pairs, "prompt"))
    model.model.dtype = torch.bfloat16
    eager = gradients(model, packed_logps(model, pairs, "prompt"))
    monkeypatch.setattr(backends.current, "kernels", "compile")
    torch._dynamo.utils.counters.clear()
    compiled = gradients(model, packed_logps(model, pairs, "prompt"))
    errors = [sum(relative_error(found[name], g) for name, g in truth.items()) for found in (compiled, eager)]
    assert errors[0] <= 1.2 * errors[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_blocks_equal_eager_ones_in_packs_of_any_length(untied_model, pairs, monkeypatch):
    """`--kernels compile`: logprobs and gradients, and a pair's bits the same in every pack; compiled once for all."""
    model = load_model(untied_model)
    expected = packed_logps(model, pairs, "prompt")
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(backends.current, "kernels", "compile")
    torch._dynamo.utils.counters.clear()
    found = packed_logps(model, pairs, "prompt")
    assert ((found - expected).abs() / expected.abs()).max() < 1e-5
    found_gradients = gradients(model, found)
    assert max(relative_error(found_gradients[name], g) for name, g in expected_gradients.items()) < 1e-4
    with torch.no_grad():
        others = [packed_logps(model, pairs, share, n) for share in ("none", "pair") for n in (700, 1500)]
    assert all(torch.equal(other, others[0]) for other in others[1:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_gathered_keys_of_the_varlen_backends_equal_segment_by_segment():
    """The GPU backends read keys through `key_rows`; here a plain softmax stands in for their kernel."""
    lengths, prefix = [5, 3, 4, 6, 2], [None, 0, 0, None, 3]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2))
    index, k_lengths = key_rows(lengths, prefix)
    cu_q, cu_k = ([0, *accumulate(n)] for n in (lengths, k_lengths))
    outputs = []
    for i in range(len(lengths)):
        rows, queries = index[cu_k[i] : cu_k[i + 1]], q[cu_q[i] : cu_q[i + 1]]
        keys, values = (x[rows].repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", queries, keys) / 8**0.5
        visible = torch.ones(len(queries), len(keys)).tril(len(keys) - len(queries)).bool()
        outputs.append(torch.einsum("nqk,knh->qnh", scores.masked_fill(~visible, -torch.inf).softmax(-1), values))
    found = attention(q, k, v, build_segments(lengths, prefix))
    torch.testing.assert_close(found, torch.cat(outputs), rtol=1e-5, atol=1e-5)
    assert k_lengths == [5, 8, 9, 6, 8]


def test_attention_in_bf16_on_a_cpu_is_that_in_fp32_rounded_once():
    """Outputs and gradients: SDPA's own backward in bf16 takes twice as long there."""
    segments, generator = build_segments([50, 30, 40], [None, 0, 0]), torch.Generator().manual_seed(0)
    *inputs, upstream = (torch.randn(120, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        found = attention(*leaves, segments)
        assert found.dtype == dtype
        found.backward(upstream.to(dtype))
        results.append([x.bfloat16() for x in (found, *(leaf.grad for leaf in leaves))])
    assert all(torch.equal(in_bf16, in_fp32) for in_bf16, in_fp32 in zip(*results))


def test_the_empty_pack_has_a_graph_and_zero_gradients(untied_model, pairs):
    """A rank without a pack still takes part in every collective of forward and backward."""
    model, batch = load_model(untied_model), collate(pairs, None)
    logps = batch.pair_logps(model(*batch.inputs))
    logps.sum().backward()
    assert logps.shape == (0, 2)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_groups_are_not_changed_by_collate(pairs):
    group = Group(prompt=0, pairs=[0])
    collate(pairs, [group])
    assert group == Group(prompt=0, pairs=[0])
