"""What only a GPU can show: flash attention over shared prefixes, bits that repeat, a training run. `pytest -m gpu`."""

from importlib.util import find_spec

import pytest
import torch
from conftest import DECODERS, ROOT, random_pairs, write_model
from safetensors.torch import load_file

from conj.data.files import read_jsonl, write_jsonl
from conj.data.packs import plan_packs
from conj.data.tokenizer import JudgeTokenizer
from conj.data.tokens import tokenize_pairs
from conj.model import backends
from conj.model.attention import attention, build_segments
from conj.model.weights import load_model
from conj.train import dpo, reference
from conj.train.batch import collate, to_device
from conj.train.optimizer import gradient_norm
from conj.train.reference import load_pairs
from conj.train.sharding import distributed

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
pytestmark = [pytest.mark.gpu, NO_GPU]
GPU = torch.device("cuda")
FLASH = pytest.mark.parametrize("name", ["varlen", *(["flash_attn"] if find_spec("flash_attn") else [])])
LENGTHS, PREFIX = [300, 40, 77, 512, 1, 90], [None, 0, 0, None, 3, 3]


@pytest.fixture(autouse=True)
def restore_backends():
    before, fill = dict(vars(backends.current)), torch.utils.deterministic.fill_uninitialized_memory
    yield
    vars(backends.current).update(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def attention_and_gradients(name: str, dtype: torch.dtype, deterministic: bool = False) -> list[torch.Tensor]:
    """Output of attention over shared prefixes, and the gradients of q, k and v; 14 query heads on 2 of keys."""
    backends.select(GPU, attention=name, deterministic=deterministic)
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    drawn = (torch.randn(total, heads, 64, generator=generator) for heads in (14, 2, 2))
    inputs = [x.to(GPU, dtype).requires_grad_() for x in drawn]
    upstream = torch.randn(total, 14, 64, generator=generator).to(GPU, dtype)
    output = attention(*inputs, to_device(build_segments(LENGTHS, PREFIX), GPU))
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@FLASH
def test_flash_attention_over_shared_prefixes_equals_segment_by_segment(name):
    """Errors against fp32, ours at most twice those of SDPA in the same bf16: a wrong gather or mask is off by 1."""
    expected = attention_and_gradients("sdpa", torch.float32)
    ours, plain = attention_and_gradients(name, torch.bfloat16), attention_and_gradients("sdpa", torch.bfloat16)
    for e, o, p in zip(expected, ours, plain):
        errors = [((x.float() - e).norm() / e.norm()).item() for x in (o, p)]
        assert errors[0] <= 2 * errors[1], errors


@FLASH
def test_deterministic_backward_gives_the_same_bits_again(name):
    first, *others = (attention_and_gradients(name, torch.bfloat16, deterministic=True) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def packed_logps(model, pairs, share: str, max_tokens: int) -> torch.Tensor:
    logps = torch.zeros(len(pairs), 2)
    with torch.no_grad():
        for pack in plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, share=share):
            batch = to_device(collate(pairs, pack), GPU)
            logps[batch.pair_numbers] = batch.pair_logps(model(*batch.inputs)).cpu()
    return logps


@pytest.mark.parametrize("kernels", ["triton", "compile", "torch"])
def test_packed_equals_separate_on_every_set_of_kernels(kernels, tmp_path):
    """fp32 throughout, on SDPA: what is left between packs and separate sequences is the order of sums."""
    folder = write_model(tmp_path / "model", tied=False)
    pairs = tokenize_pairs(random_pairs(6), JudgeTokenizer.load(folder), 600)
    torch.backends.cuda.matmul.allow_tf32 = False
    backends.select(GPU, attention="sdpa", kernels="torch")
    expected = packed_logps(load_model(folder, device=GPU), pairs, "none", 2000)
    backends.select(GPU, attention="sdpa", kernels=kernels)
    for share in ("none", "pair", "prompt"):
        found = packed_logps(load_model(folder, device=GPU), pairs, share, 9000)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama, llama3", "llama, biases"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_gpu_scores_as_a_cpu_does(kernels, kind, tmp_path):
    """bf16 on flash attention against fp32 on the CPU: within bf16's error, token by token."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    folder = write_model(tmp_path / "model", tied=False, **DECODERS[kind] | sizes)
    pairs = tokenize_pairs(random_pairs(6), JudgeTokenizer.load(folder), 600)
    backends.select(torch.device("cpu"))
    model = load_model(folder)
    expected = torch.zeros(len(pairs), 2)
    for pack in plan_packs(pairs, range(len(pairs)), max_tokens=9000, share="prompt"):
        batch = collate(pairs, pack)
        expected[batch.pair_numbers] = batch.pair_logps(model(*batch.inputs)).detach()
    backends.select(GPU, kernels=kernels)
    found = packed_logps(load_model(folder, dtype=torch.bfloat16, device=GPU), pairs, "prompt", 9000)
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pack_and_the_norm_wait_for_nothing(deterministic, tmp_path):
    """CUDA itself refuses every wait: copies from pageable memory, values read by the host. The step's one read is later."""
    base = ROOT / "demo" / "base"
    write_jsonl(tmp_path / "pairs.jsonl", random_pairs(8))
    options = dpo.DPOOptions(run_dir=tmp_path, model=base, nll_alpha=0.1, deterministic=deterministic)
    pairs, _, usable = load_pairs(tmp_path / "pairs.jsonl", base, 6400)
    packs = plan_packs(pairs, usable, max_tokens=1000, share="prompt")
    with distributed("cuda") as world:
        dpo.select_arithmetic(options, world.device)
        model, _ = dpo.build_policy(options, world)
        for mode in ("default", "error"):  # the first compiles and fills the allocators' caches
            batches = dpo.batches_of(pairs, torch.zeros(len(pairs), 2), [packs], world)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                values = dpo.run_packs(model, pairs, packs, batches, options, world)
                norm = gradient_norm(model, world)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(packs) > 2 and values.isfinite().all() and norm.item() > 0


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_the_shipped_judge_trains_on_one_gpu(cpu_offload, tmp_path):
    """Reference and training as a user runs them: the first margin is that of equal logprobs, and the loss falls."""
    base = ROOT / "demo" / "base"
    write_jsonl(tmp_path / "pairs.jsonl", random_pairs(30))
    common = {"run_dir": tmp_path, "model": base, "max_tokens_per_pack": 2000}
    reference.main(reference.ReferenceOptions(**common))
    dpo.main(
        dpo.DPOOptions(
            **common, learning_rate=1e-4, num_train_epochs=3, pairs_per_step=8, balanced_packs=1, deterministic=True,
            activation_checkpointing="full" if cpu_offload else "selective", cpu_offload=cpu_offload,
        )
    )  # fmt: skip
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    print("margin at step 0:", rows[0]["rewards/margins"])
    assert abs(rows[0]["rewards/margins"]) < 0.05 and rows[-1]["loss"] < 0.6 < rows[0]["loss"]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
