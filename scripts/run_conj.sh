#!/usr/bin/env bash
# Con-J from preference pairs to an evaluated judge: stages 1 to 7 in order. What is already complete is skipped, and a
# run that was killed goes on where it stopped, so the same line can be given again at any time.
#
#   scripts/run_conj.sh --run-dir runs/mine --model models/Qwen2-7B-Instruct --data Skywork/Skywork-Reward-Preference-80K-v0.1 \
#       --test-data HuggingFaceH4/ultrafeedback_binarized:test_prefs --nproc-per-node 8 --dpo "--learning-rate 5e-7"
#
# Options: --run-dir DIR, --model PATH, --data PATH… (training preferences), --test-data PATH… (benchmarks), --seed N,
# --device auto|cpu|cuda (default auto: a GPU if there is one; of the sampling stages, what vLLM is built for),
# --nproc-per-node N (processes of stages 5 and 6, default 1), and further options of a stage as one quoted string:
# --preprocess, --repeated, --hinted, --pairs, --reference, --dpo, --evaluate.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

run="" model="" seed=2021 nproc=1 device=auto
data=() test_data=()
declare -A extra=([preprocess]="" [repeated]="" [hinted]="" [pairs]="" [reference]="" [dpo]="" [evaluate]="")
while [ $# -gt 0 ]; do
    option="$1"; shift
    case "$option" in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --data) while [ $# -gt 0 ] && [[ "$1" != --* ]]; do data+=("$1"); shift; done; continue ;;
        --test-data) while [ $# -gt 0 ] && [[ "$1" != --* ]]; do test_data+=("$1"); shift; done; continue ;;
    esac
    [ $# -gt 0 ] || fail "$option: expected a value, found none"
    case "$option" in
        --run-dir) run="$1" ;;
        --model) model="$1" ;;
        --seed) seed="$1" ;;
        --device) device="$1" ;;
        --nproc-per-node) nproc="$1" ;;
        --preprocess | --repeated | --hinted | --pairs | --reference | --dpo | --evaluate) extra[${option#--}]="$1" ;;
        *) fail "$option: no such option; see $0 --help" ;;
    esac
    shift
done
[[ "$device" =~ ^(auto|cpu|cuda)$ ]] || fail "--device: expected auto, cpu or cuda, found $device"
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node: expected a number from 1 up, found $nproc"
[ -n "$run" ] || fail "--run-dir: expected a run folder, found none"
[ -n "$model" ] || fail "--model: expected a base model folder, found none"
[ ${#data[@]} -gt 0 ] || fail "--data: expected a preference data set, found none"
[ ${#test_data[@]} -gt 0 ] || fail "--test-data: expected a benchmark, found none"

# On a CPU, threads that spin while they wait lose a factor of ten as soon as another process wants a core.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

stage() { # stage NAME COMMAND…: says what runs, splits the stage's further options into words
    echo "== $*" | cut -c1-150
    local name="$1"; shift
    # shellcheck disable=SC2086
    "$@" ${extra[$name]}
}
train() { # one process, or torchrun (whose parser wants --run-dir for --run-dir)
    if [ "$nproc" = 1 ]; then python -m "$@"; else torchrun --standalone --nproc_per_node "$nproc" -m "$@"; fi
}

stage preprocess python -m conj.data.preprocess --run-dir "$run" --seed "$seed" --data "${data[@]}"
stage repeated python -m conj.sample.repeated --run-dir "$run" --seed "$seed" --model "$model" --device "$device"
stage hinted python -m conj.sample.hinted --run-dir "$run" --seed "$seed" --model "$model" --device "$device"
stage pairs python -m conj.data.pairs --run-dir "$run" --seed "$seed"
stage reference train conj.train.reference --run-dir "$run" --model "$model" --device "$device"
stage dpo train conj.train.dpo --run-dir "$run" --seed "$seed" --model "$model" --device "$device"
stage evaluate python -m conj.sample.evaluation.evaluate --run-dir "$run" --seed "$seed" --model "$model" --device "$device" \
    --data "${test_data[@]}"
