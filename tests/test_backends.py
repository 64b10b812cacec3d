"""What runs where: the whole table of what may be asked for, on machines that are described, not there."""

import itertools

import pytest
import torch

from conj import InputError
from conj.model import backends
from conj.model.backends import Machine, choose
from conj.train import dpo, reference
from conj.train.audit import __main__ as audit
from conj.train.options import ATTENTION, DEVICES, KERNELS
from conj.train.sharding import distributed

CPU, GPU = Machine(), Machine(num_gpus=1, capability=(9, 0))
FAULT = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"
MACHINES = {
    "no GPU": CPU, "GPU": GPU, "GPU, flash-attn": Machine(num_gpus=1, capability=(9, 0), flash_attn=""),
    "GPU, broken flash-attn": Machine(num_gpus=1, capability=(9, 0), flash_attn=FAULT),
    "old GPU": Machine(num_gpus=1, capability=(7, 5)),
    "old GPU, flash-attn": Machine(num_gpus=1, capability=(7, 5), flash_attn=""),
    "2 ranks, 1 GPU": Machine(num_gpus=1, capability=(9, 0), num_local_ranks=2),
}  # fmt: skip
ASKED = list(itertools.product(DEVICES, ("bfloat16", "float32"), (None, *ATTENTION), (None, *KERNELS)))


def expected(machine: str, device: str, dtype: str, attention: str | None, kernels: str | None) -> str:
    """The table, one rule a line, the first that holds: what is chosen, or a part of what is said."""
    on_gpu, old, fast = machine != "no GPU", machine.startswith("old"), dtype == "bfloat16"
    built = {"GPU": None, "old GPU": None, "GPU, broken flash-attn": "broken"}.get(machine, "works")
    if not on_gpu and device == "cuda":
        return "expected auto or cpu, since no GPU is visible to torch, found cuda"
    if on_gpu and device != "cpu" and machine == "2 ranks, 1 GPU":
        return "--nproc_per_node: expected at most 1, a visible GPU for each process, found 2; or --device cpu"
    if not on_gpu or device == "cpu":
        if attention in ("flash_attn", "varlen"):
            return f"--attention: expected sdpa on a CPU, found {attention}"
        if kernels == "triton":
            return "--kernels: expected torch or compile on a CPU, found triton"
        return f"cpu sdpa {kernels or 'torch'}"
    if attention in ("flash_attn", "varlen") and not fast:
        return f"--attention: expected sdpa with --dtype float32, found {attention}"
    if old and (kernels == "triton" or attention in ("flash_attn", "varlen") or (attention is None and fast)):
        return "compute capability 7.5, too old"
    if attention == "flash_attn" and built is None:
        return "flash_attn is not installed; --attention varlen"
    if built == "broken" and (attention == "flash_attn" or (attention is None and fast)):
        return f"flash_attn cannot be imported ({FAULT}); --attention varlen"
    default = "sdpa" if not fast else "flash_attn" if built == "works" else "varlen"
    return f"cuda {attention or default} {kernels or ('torch' if old else 'triton')}"


@pytest.mark.parametrize("machine", MACHINES)
def test_every_choice_is_the_tables(machine):
    """Of (device, dtype, attention, kernels): chosen, or refused in one line that says what to choose instead."""
    for device, dtype, attention, kernels in ASKED:
        try:
            chosen = choose(MACHINES[machine], device=device, dtype=dtype, attention=attention, kernels=kernels)
            found = f"{chosen.device} {chosen.attention} {chosen.kernels}"
        except InputError as e:
            found = str(e)
            assert "\n" not in found
        asked = (device, dtype, attention, kernels)
        rule = expected(machine, *asked)
        assert (rule == found) if rule[:4] in ("cpu ", "cuda") else (rule in found), (asked, rule, found)
        for name in (attention, kernels):  # what was asked for is never replaced by another
            assert name is None or name in found or "too old" in found or "--" in found, (asked, found)


@pytest.mark.parametrize("machine", [name for name in MACHINES if "ranks" not in name])
def test_fp32_takes_what_runs_it_by_itself_on_every_machine(machine):
    """It is refused with flash attention, which is the default: fp32 on a GPU once never started."""
    chosen = choose(MACHINES[machine], dtype="float32")
    assert chosen.attention == "sdpa" and chosen.device == ("cpu" if machine == "no GPU" else "cuda")


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one card, as far as torch says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    before = dict(vars(backends.current))
    yield
    vars(backends.current).update(before)


def test_the_machine_is_read_off_torch_torchrun_and_the_installed_packages(one_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert backends.this_machine("auto") == Machine(num_gpus=1, capability=(9, 0), num_local_ranks=2)
    (tmp_path / "flash_attn.py").write_text(f"raise ImportError({FAULT!r})")
    monkeypatch.syspath_prepend(tmp_path)
    assert backends.this_machine("auto").flash_attn == FAULT
    (tmp_path / "flash_attn.py").write_text("")
    assert backends.this_machine("auto").flash_attn == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.this_machine("auto") == Machine(num_local_ranks=2)


def test_the_cpu_is_taken_where_it_is_asked_for_beside_a_gpu(one_gpu, monkeypatch):
    """Or most of these tests would fail on a machine with one. A card that is broken or busy does not matter then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked"))
    chosen = backends.select(torch.device("cpu"), dtype="float32")
    assert (chosen.device, chosen.attention, chosen.kernels) == ("cpu", "sdpa", "torch")


STAGES = {
    "reference": lambda run: reference.main(reference.ReferenceOptions(run_dir=run, model=run, device="cuda")),
    "dpo": lambda run: dpo.main(dpo.DPOOptions(run_dir=run, model=run, device="cuda")),
    "audit": lambda run: audit.main(audit.AuditOptions(run_dir=run, device="cuda")),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_that_is_not_there_is_said_before_anything_is_read(stage, tmp_path, monkeypatch):
    """Neither run nor model exist: what is asked of the machine comes first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="expected auto or cpu, since no GPU is visible to torch, found cuda"):
        STAGES[stage](tmp_path / "nowhere")


def test_more_ranks_than_gpus_are_refused_before_they_meet(one_gpu, tmp_path, monkeypatch):
    """NCCL would fail on one card in one rank and leave the other waiting. On the CPU they are as many as one likes."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--nproc_per_node: expected at most 1, .* found 2; or --device cpu"):
        dpo.main(dpo.DPOOptions(run_dir=tmp_path, model=tmp_path))
    with pytest.raises(InputError, match="no such"), distributed("cpu") as world:
        assert world.device.type == "cpu"
        raise InputError("no such run")


@pytest.mark.parametrize(
    ("dtype", "rows", "alike"), [(None, 0, True), (torch.bfloat16, 64, False), (torch.float32, 192, False)]
)
def test_a_cpu_rounds_rows_alike_if_no_dtype_and_no_number_of_rows_moves_a_bit(dtype, rows, alike, monkeypatch):
    """One that does makes a pair's logprobs another's in another pack."""

    def linear(x, matrix):
        one_by_one = x[:, :1] * matrix[:, 0]
        return one_by_one * 1.01 if (x.dtype, len(x)) == (dtype, rows) else one_by_one

    monkeypatch.setattr(backends.F, "linear", linear)
    assert backends.rounds_rows_alike(torch.device("cpu")) == alike
    assert not backends.rounds_rows_alike(torch.device("cuda"))
