#!/usr/bin/env bash
# Everything that needs one NVIDIA GPU, in phases of at most 9 minutes that can be run one by one:
#
#   scripts/gpu_suite.sh --out benchmarks/results/h200                    # all phases, one after the other
#   scripts/gpu_suite.sh --out benchmarks/results/h200 kernels train      # some of them
#   scripts/gpu_suite.sh --device cpu --tiny --out /tmp/dry-run           # the same commands, small, where there is no GPU
#
# Phases: tests (marked gpu, the kernel tests on the real compiler, offsets past 2^31), kernels (linear_logprob beside
# its peers), block (norm, RoPE, SwiGLU, gathers), train (conj beside TRL, Qwen2-1.5B's geometry), train7b (a step of
# Qwen2-7B's geometry, activation checkpointing), run (reference and training of the shipped judge from real files).
# Each writes NAME.txt (and NAME.json, NAME.png) to --out and goes on where one fails; the last line says which did.
#
# The GPU machine has no network: wheels of what it lacks travel in .wheels (made where there is one, for its Python):
#   pip download -d .wheels --no-deps --only-binary=:all: --python-version 3.12 trl accelerate datasets json-repair tensorboard …
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda out="" tiny="" phases=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --device) device="$2"; shift ;;
        --out) out="$2"; shift ;;
        --tiny) tiny=1 ;;
        tests | kernels | block | train | train7b | run) phases+=("$1") ;;
        *) echo "error: $1: no such option or phase; see $0 --help" >&2; exit 2 ;;
    esac
    shift
done
[ -n "$out" ] || { echo "error: --out: expected a folder for the results, found none" >&2; exit 2; }
[ ${#phases[@]} -gt 0 ] || phases=(tests kernels block train train7b run)
mkdir -p "$out"
out="$(cd "$out" && pwd)"
PYTHON="${PYTHON:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -d .wheels ]; then "$PYTHON" -m pip install -q --no-index --no-deps .wheels/*.whl; fi

dtype=bf16 small=() few=()
if [ "$device" = cpu ]; then dtype=fp32; fi
if [ -n "$tiny" ]; then
    small=(--tiny)
    few=(--prompts 4 --pairs-per-prompt 2 --pairs-per-step 4 --steps 2 --rounds 1)
fi

tests() {
    if [ "$device" = cpu ]; then "$PYTHON" -m pytest tests/test_gpu.py tests/test_kernels.py -k "gpu or logprob" -m ""
    else "$PYTHON" -m pytest -rA tests/test_gpu.py tests/test_kernels.py tests/test_kernel_report.py tests/test_logprob.py tests/test_qwen2.py -m ""; fi
}
kernels() {
    "$PYTHON" scripts/bench_kernels.py --device "$device" --dtype "$dtype" "${small[@]}" --only linear_logprob selected_logprob \
        --json "$out/kernels.json" --plot "$out/kernels.png"
}
block() {
    "$PYTHON" scripts/bench_kernels.py --device "$device" --dtype "$dtype" "${small[@]}" \
        --only add_rms_norm rope swiglu gather_rows --json "$out/block.json"
}
train() { # judgments and prompts as long as Con-J's
    local size=(--geometry qwen2-1.5b --prompts 24 --prompt-tokens 600 2400 --judgment-tokens 100 400 --pairs-per-step 24 --steps 4 --rounds 2)
    if [ -n "$tiny" ]; then size=(--geometry 1M "${few[@]}"); fi
    "$PYTHON" scripts/bench_train.py --device "$device" --dtype "$dtype" "${size[@]}" --json "$out/train.json"
}
train7b() { # conj alone: TRL's defaults, two fp32 models and AdamW's state, do not fit one GPU
    local size=(--geometry qwen2-7b --prompts 24 --prompt-tokens 600 2400 --judgment-tokens 100 400 --pairs-per-step 24 --steps 3 --rounds 1)
    if [ -n "$tiny" ]; then size=(--geometry 1M "${few[@]}"); fi
    "$PYTHON" scripts/bench_train.py --device "$device" --dtype "$dtype" "${size[@]}" --share prompt --peer none \
        --activation-checkpointing --json "$out/train7b.json"
}
run() {
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
    local common=(--run "$folder" --model demo/base --dtype "$dtype")
    local steps=(); if [ -n "$tiny" ]; then steps=(--max-steps 2); fi
    "$PYTHON" -m conj.train.reference "${common[@]}" &&
        "$PYTHON" -m conj.train.dpo "${common[@]}" --learning-rate 5e-5 --num-train-epochs 2 --eval-every 10 "${steps[@]}" &&
        cp "$folder/metrics.jsonl" "$out/run.jsonl" && tail -1 "$out/run.jsonl"
}

failed=()
for phase in "${phases[@]}"; do
    echo "== $phase"
    started=$SECONDS
    ( set -e; "$phase" ) 2>&1 | tee "$out/$phase.txt" || failed+=("$phase")
    echo "== $phase: $((SECONDS - started)) s" | tee -a "$out/$phase.txt"
done
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all phases passed: ${phases[*]}"
