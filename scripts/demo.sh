#!/usr/bin/env bash
# The whole of Con-J on the shipped tiny judge, in a few minutes on two CPU cores: `make demo`.
# The options are the demo's scale, not other code: a 1 M-parameter judge wants a larger learning rate than 7 B.
# Takes the run folder, by default runs/demo, and further options of run_conj.sh, as in: scripts/demo.sh /tmp/demo --device cpu
set -euo pipefail
cd "$(dirname "$0")/.."

run="${1:-runs/demo}"
scripts/run_conj.sh --run-dir "$run" --model demo/base --data demo/train.jsonl --test-data demo/test.jsonl \
    --repeated "--max-new-tokens 64" \
    --hinted "--max-new-tokens 64" \
    --reference "--dtype float32" \
    --dpo "--dtype float32 --learning-rate 5e-5 --num-train-epochs 2 --eval-every 10" \
    --evaluate "--max-new-tokens 64" "${@:2}"
echo "open $run/report.html"
