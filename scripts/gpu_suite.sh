#!/usr/bin/env bash
# Everything that needs one NVIDIA GPU, in phases of at most 9 minutes that can be run one by one:
#
#   scripts/gpu_suite.sh --out benchmarks/results/h200                    # all phases, one after the other
#   scripts/gpu_suite.sh --out benchmarks/results/h200 tests train7b      # some of them
#   scripts/gpu_suite.sh --device cpu --tiny --out /tmp/dry-run           # the same commands, small, where there is no GPU
#
# Phases, the most telling first: smoke (does everything start: training of the shipped judge in audit mode, stopped and
# resumed, then audited), tests (marked gpu; the kernel tests on the real compiler; offsets past 2^31), logprob7b
# (linear_logprob beside its peers at 7B), train7b (steps of Qwen2-7B's geometry with activation checkpointing), train and
# train-pair (conj beside TRL, Qwen2-1.5B's geometry), logprob (the other sizes), block (norm, RoPE, SwiGLU, gathers).
# Each writes NAME.txt (and NAME.json, NAME.png) to --out as it goes; the last line says which failed.
#
# On a lent machine without a network, what it lacks travels as wheels in .wheels (git ignores it), made elsewhere:
#   pip download -d .wheels --no-deps --only-binary=:all: --python-version 3.12 trl datasets dill multiprocess json-repair
# and --out "$OUT" brings the results back.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda out="" tiny="" phases=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --device) device="$2"; shift ;;
        --out) out="$2"; shift ;;
        --tiny) tiny=1 ;;
        smoke | tests | logprob | logprob7b | block | train | train-pair | train7b) phases+=("$1") ;;
        *) echo "error: $1: no such option or phase; see $0 --help" >&2; exit 2 ;;
    esac
    shift
done
[ -n "$out" ] || { echo "error: --out: expected a folder for the results, found none" >&2; exit 2; }
[ ${#phases[@]} -gt 0 ] || phases=(smoke tests logprob7b train7b train train-pair logprob block)
mkdir -p "$out"
out="$(cd "$out" && pwd)"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if [ -d .wheels ]; then "$PYTHON" -m pip install -q --no-index --no-deps .wheels/*.whl; fi

dtype=bf16 small=()
if [ "$device" = cpu ]; then dtype=fp32; fi
if [ -n "$tiny" ]; then small=(--tiny); fi

tests() {
    local files=(tests/test_gpu.py tests/test_kernels.py tests/test_logprob.py)
    if [ "$device" = cpu ]; then "$PYTHON" -m pytest -m "not slow" -k "gpu or logprob" "${files[@]}"
    else "$PYTHON" -m pytest -rA -m "" "${files[@]}" tests/test_kernel_report.py tests/test_qwen2.py; fi
}
bench_kernels() { # bench_kernels PHASE OPTION…
    local name="$1"; shift
    "$PYTHON" scripts/bench_kernels.py --device "$device" --dtype "$dtype" "${small[@]}" "$@" \
        --json "$out/$name.json" --plot "$out/$name.png"
}
logprob7b() { bench_kernels logprob7b --only linear_logprob $([ -n "$tiny" ] || echo --models 7B); }
logprob() { bench_kernels logprob --only linear_logprob selected_logprob $([ -n "$tiny" ] || echo --models 0.5B 1.5B 72B); }
block() { bench_kernels block --only add_rms_norm rope swiglu gather_rows; }
bench_train() { # bench_train PHASE GEOMETRY OPTION…: prompts and judgments as long as Con-J's
    local name="$1" size=(--geometry "$2" --prompts 12 --prompt-tokens 600 2400 --judgment-tokens 100 400 --pairs-per-step 24)
    shift 2
    if [ -n "$tiny" ]; then size=(--geometry 1M --prompts 4 --pairs-per-prompt 2 --pairs-per-step 4 --batch-sizes 4); fi
    "$PYTHON" scripts/bench_train.py --device "$device" --dtype "$dtype" "${size[@]}" --steps 2 --rounds 1 "$@" \
        --json "$out/$name.json"
}
train() { bench_train train qwen2-1.5b --share prompt $([ -n "$tiny" ] || echo --batch-sizes 2 4); }
train-pair() { bench_train train-pair qwen2-1.5b --share pair --settings default; }
train7b() { # conj alone: TRL's defaults, two fp32 models and AdamW's state, do not fit one GPU
    bench_train train7b qwen2-7b --share prompt --peer none --activation-checkpointing --max-tokens-per-pack 8192
}
smoke() {
    local folder; folder="$(mktemp -d)"
    "$PYTHON" - "$folder" <<'PYTHON' || return 1
import random, sys
from pathlib import Path
from conj.data.files import read_jsonl, write_jsonl
from conj.data.prompts import judge_messages, judgment_text
rng, rows = random.Random(0), []
for i, row in enumerate(read_jsonl(Path("demo/train.jsonl"))):
    label = rng.choice((1, 2))
    answers = (row["chosen"], row["rejected"]) if label == 1 else (row["rejected"], row["chosen"])
    chosen, rejected = ([{"role": "assistant", "content": judgment_text(row["chosen"], v)}] for v in (label, 3 - label))
    rows.append({"id": f"{i:04}", "prompt": judge_messages(row["prompt"], *answers), "chosen": chosen, "rejected": rejected,
                 "label": label, "pair_type": "repeated", "split": "eval" if i % 10 == 0 else "train"})
write_jsonl(Path(sys.argv[1]) / "pairs.jsonl", rows)
PYTHON
    local common=(--run "$folder" --model demo/base --dtype "$dtype") steps=()
    if [ -n "$tiny" ]; then steps=(--max-steps 4); fi
    local dpo=("$PYTHON" -m conj.train.dpo "${common[@]}" --learning-rate 5e-5 --num-train-epochs 2 --eval-every 10 --save-every 2 --audit-mode "${steps[@]}")
    "$PYTHON" -m conj.train.reference "${common[@]}" && "${dpo[@]}" && rm -r "$folder"/model* &&
        rm -r "$(ls -d "$folder"/checkpoints/step-* | tail -1)" && "${dpo[@]}" &&
        "$PYTHON" -m conj.train.audit --run "$folder" --replay 2 --reference &&
        cp "$folder/metrics.jsonl" "$out/smoke.jsonl" && head -1 "$out/smoke.jsonl" && tail -1 "$out/smoke.jsonl"
}

failed=()
for phase in "${phases[@]}"; do
    echo "== $phase"
    started=$SECONDS
    "$phase" 2>&1 | tee "$out/$phase.txt" || failed+=("$phase")
    echo "== $phase: $((SECONDS - started)) s" | tee -a "$out/$phase.txt"
done
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all phases passed: ${phases[*]}"
