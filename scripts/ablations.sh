#!/usr/bin/env bash
# The paper's bias experiments side by side: from one run whose stages 1 to 3 are done, each ablation's own run folder
# (links to those stages' files), stages 4 to 6, an evaluation, and one report of them all. What is already complete is
# skipped, so the same line can be given again after a kill.
#
#   scripts/ablations.sh --run-dir runs/mine --out runs/mine-ablations --model models/Qwen2-7B-Instruct \
#       --test-data HuggingFaceH4/ultrafeedback_binarized:test_prefs --dpo "--learning-rate 5e-7"
#
#   full           nothing left out: what the others compare with
#   longer         only prompts whose better answer is the longer one      shorter        … the shorter one
#   verdict_only   no reasons: bare verdicts
#   repeated_only  pairs of sampled judgments alone                        hinted_only    pairs of hinted ones alone
#
# Options: --run-dir DIR (the finished run), --out DIR (folder of the ablations), --model PATH, --test-data PATH… (benchmarks),
# --ablations NAME… (default: all six), --seed N, --nproc-per-node N (processes of stages 5 and 6, default 1), and further
# options of a stage as one quoted string: --pairs, --reference, --dpo, --evaluate.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

run="" out="" model="" seed=2021 nproc=1
test_data=() ablations=()
declare -A extra=([pairs]="" [reference]="" [dpo]="" [evaluate]="")
declare -A options=(
    [full]=""
    [longer]="--chosen-length longer"
    [shorter]="--chosen-length shorter"
    [verdict_only]="--no-rationale"
    [repeated_only]="--pair-types repeated repeated_vs_unparsed"
    [hinted_only]="--pair-types hinted hinted_vs_unparsed"
)
while [ $# -gt 0 ]; do
    option="$1"; shift
    case "$option" in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --test-data) while [ $# -gt 0 ] && [[ "$1" != --* ]]; do test_data+=("$1"); shift; done; continue ;;
        --ablations) while [ $# -gt 0 ] && [[ "$1" != --* ]]; do ablations+=("$1"); shift; done; continue ;;
    esac
    [ $# -gt 0 ] || fail "$option: expected a value, found none"
    case "$option" in
        --run-dir) run="$1" ;;
        --out) out="$1" ;;
        --model) model="$1" ;;
        --seed) seed="$1" ;;
        --nproc-per-node) nproc="$1" ;;
        --pairs | --reference | --dpo | --evaluate) extra[${option#--}]="$1" ;;
        *) fail "$option: no such option; see $0 --help" ;;
    esac
    shift
done
[ ${#ablations[@]} -gt 0 ] || ablations=(full longer shorter verdict_only repeated_only hinted_only)
for name in "${ablations[@]}"; do
    [ -n "${options[$name]+there}" ] || fail "--ablations: no $name; expected some of ${!options[*]}"
done
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node: expected a number from 1 up, found $nproc"
[ -n "$out" ] || fail "--out: expected a folder for the ablations, found none"
[ -n "$model" ] || fail "--model: expected a base model folder, found none"
[ ${#test_data[@]} -gt 0 ] || fail "--test-data: expected a benchmark, found none"
stages=(prompts.jsonl repeated.jsonl hinted.jsonl)
for file in "${stages[@]}"; do
    [ -f "$run/$file.manifest.json" ] || fail "$run/$file: no such finished file; run stages 1 to 3 first (--run-dir)"
done

# On a CPU, threads that spin while they wait lose a factor of ten as soon as another process wants a core.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

train() { # one process, or torchrun (whose parser wants --run-dir for --run-dir)
    if [ "$nproc" = 1 ]; then python -m "$@"; else torchrun --standalone --nproc_per_node "$nproc" -m "$@"; fi
}
take() { # take FROM TO FILE…: files with their manifests, as links where the file system can
    local from="$1" to="$2" file; shift 2
    for file in "$@"; do
        for file in "$file" "$file.manifest.json"; do
            [ -e "$to/$file" ] || ln "$from/$file" "$to/$file" 2> /dev/null || cp -p "$from/$file" "$to/$file"
        done
    done
}

judgments=() first=""
for name in "${ablations[@]}"; do
    folder="$out/$name"
    echo "== $name"
    mkdir -p "$folder"
    take "$run" "$folder" "${stages[@]}"
    # The base judge is the same in all of them.
    [ -z "$first" ] || take "$first" "$folder" judgments_base.jsonl
    # shellcheck disable=SC2086
    {
        python -m conj.data.pairs --run-dir "$folder" --seed "$seed" ${options[$name]} ${extra[pairs]}
        train conj.train.reference --run-dir "$folder" --model "$model" ${extra[reference]}
        train conj.train.dpo --run-dir "$folder" --seed "$seed" --model "$model" ${extra[dpo]}
        python -m conj.sample.evaluation.evaluate --run-dir "$folder" --seed "$seed" --model "$model" \
            --data "${test_data[@]}" ${extra[evaluate]}
    }
    first="${first:-$folder}"
    judgments+=("$name=$folder/judgments_trained.jsonl")
done
selection=() keep=no # of the evaluation's options those that choose rows: the table is of the same
for word in ${extra[evaluate]}; do
    case "$word" in --limit | --subsets) keep=yes ;; --*) keep=no ;; esac
    [ $keep = no ] || selection+=("$word")
done
echo "== all"
python -m conj.sample.evaluation.evaluate --run-dir "$out" --seed "$seed" \
    --judgments "base=$first/judgments_base.jsonl" "${judgments[@]}" --data "${test_data[@]}" "${selection[@]}"
echo "open $out/report.html"
