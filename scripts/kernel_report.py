"""What every Triton kernel needs of a GPU, compiled for several of them on a machine that has none.

    python scripts/kernel_report.py
    python scripts/kernel_report.py --json kernels.json

At the sizes of Qwen2-7B in bf16. A kernel's launcher is called on meta tensors, which have shapes and no memory, and
its launch is recorded instead of run: signature, constants, alignment and num_warps are those of training, written down
nowhere else. Prints a Markdown table; exits 1 if a kernel spills registers to memory.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from bench_common import QWEN2, ROOT, argument_parser, write_rows
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import blockwise_logprob
from conj.model import kernels, logprob_kernels

CAPABILITIES = (80, 90, 100)  # A100; H100 and H200; B200
T, D, F, N, K, H, V = 4096, *(QWEN2["7B"][letter] for letter in "DFNKHV")
COLUMNS = 8192  # of a block of logits
FIELDS = ("kernel", "variant", "architecture", "registers", "spill_stores", "spill_loads", "shared_bytes", "num_warps")


@contextmanager
def recorded_launches() -> Iterator[list]:
    """Collects (kernel, arguments by name, options) of each launch, and runs none of them."""
    launches, run = [], JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        launches.append((kernel, arguments, {k: v for k, v in kwargs.items() if k not in arguments}))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def call_all_launchers() -> None:
    """Every launcher once, with the sizes of training; those with an optional argument with and without it."""

    def meta(dtype: torch.dtype) -> Callable:
        return lambda *shape: torch.empty(shape, dtype=dtype, device="meta")

    bf16, fp32, int64 = map(meta, (torch.bfloat16, torch.float32, torch.int64))
    x, logits = bf16(T, D), bf16(T, COLUMNS)
    logprob_kernels.logprob_update(logits, int64(T), COLUMNS, fp32(T), fp32(T), fp32(T))
    logprob_kernels.logprob_grad(logits, int64(T), COLUMNS, fp32(T), fp32(T), logits)
    for optional in (None, x):
        kernels.add_rms_norm_forward(x, optional, bf16(D), 1e-6)
        kernels.add_rms_norm_backward(x, optional, x, bf16(D), fp32(T))
    for inverse in (False, True):
        kernels.rope(bf16(T, N, H), bf16(T, K, H), bf16(T, H), bf16(T, H), inverse)
    kernels.swiglu_forward(bf16(T, F), bf16(T, F))
    kernels.swiglu_backward(bf16(T, F), bf16(T, F), bf16(T, F))
    kernels.sum_rows(bf16(2 * T, K * H), int64(T + 1), int64(2 * T))
    blockwise_logprob.linear_logprob_blockwise_forward(x, bf16(V, D), int64(T))
    blockwise_logprob.linear_logprob_blockwise_backward(x, bf16(V, D), int64(T), fp32(T), fp32(T))


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """What Triton would compile for this launch: types, constants, and which arguments 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        # None and the integer 1 are compiled in, as a launch does.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def measure(kernel: JITFunction, arguments: dict, options: dict, capability: int) -> dict:
    """One row of the report. Triton keeps no log of ptxas, so its PTX is assembled again for one."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        architecture = sm_arch_from_capability(capability)
        line = [get_ptxas(capability).path, "-v", "--gpu-name", architecture, str(path), "-o", f"{folder}/kernel.cubin"]
        log = subprocess.run(line, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, log)[1])

    numbers = (number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads"))
    variant = ", ".join(f"{name}={value}" for name, value in arguments.items() if value is None or type(value) is bool)
    shared_bytes, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    return dict(zip(FIELDS, (kernel.__name__, variant, architecture, *numbers, shared_bytes, num_warps)))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    with recorded_launches() as launches:
        call_all_launchers()
    rows = [measure(*launch, capability) for launch in launches for capability in CAPABILITIES]
    for cells in (FIELDS, ["---"] * len(FIELDS), *(row.values() for row in rows)):
        print("|", " | ".join(map(str, cells)), "|")
    write_rows(args.json, rows)
    if spilling := sorted({row["kernel"] for row in rows if row["spill_stores"] or row["spill_loads"]}):
        sys.exit(f"error: registers spill in {', '.join(spilling)}")


if __name__ == "__main__":
    main()
