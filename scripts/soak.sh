#!/usr/bin/env bash
# The whole pipeline on the demo's data, small, killed (SIGKILL, all of its processes) after a random number of seconds and started again
# until it is complete; then every artefact is compared with that of an undisturbed run. Round after round, until the
# minutes are over; a round that has begun is then finished without kills (3 minutes at most on two cores).
#
#   scripts/soak.sh --minutes 60 --run-dir /tmp/soak
#
# Options: --minutes N, --run-dir DIR (emptied; undisturbed/, one folder a round, kept if it differs, and a log of each),
# --nproc-per-node N (processes of stages 5 and 6, default 2), --device cpu|cuda (theirs, default cpu), --longest N (seconds until a kill, default 90), --seed N.
# Prints a row of a table a round. Exit 1: an artefact differs. Exit 2: a stage failed by itself; its log says why.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes="" run="" nproc=2 device=cpu longest=90 seed=0
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --minutes) minutes="${2:-}" ;;
        --run-dir) run="${2:-}" ;;
        --nproc-per-node) nproc="${2:-}" ;;
        --device) device="${2:-}" ;;
        --longest) longest="${2:-}" ;;
        --seed) seed="${2:-}" ;;
        *) echo "error: $1: no such option; see $0 --help" >&2; exit 2 ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
for number in "$minutes" "$nproc" "$longest" "$seed"; do
    [[ "$number" =~ ^[0-9]+$ ]] || { echo "error: expected a whole number, found '$number'; see $0 --help" >&2; exit 2; }
done
[ -n "$run" ] || { echo "error: --run-dir: expected a folder for the runs, found none" >&2; exit 2; }
[[ "$device" =~ ^(cpu|cuda)$ ]] || { echo "error: --device: expected cpu or cuda, found $device" >&2; exit 2; }
export PYTHONPATH="$PWD"
RANDOM="$seed"

pipeline() { # pipeline NAME SECONDS: runs it in $run/NAME, kills it after SECONDS; the exit code is 137 if it was killed
    python scripts/kill_test.py once --seconds "$2" --log "$run/$1.log" -- scripts/run_conj.sh \
        --run-dir "$run/$1" --model demo/base --data demo/train.jsonl --test-data demo/test.jsonl --nproc-per-node "$nproc" \
        --preprocess "--limit 48" --repeated "--max-new-tokens 64" --hinted "--max-new-tokens 64" \
        --reference "--device $device --dtype float32 --save-every 1" --evaluate "--max-new-tokens 64 --limit 24 --num-resamples 100" \
        --dpo "--device $device --dtype float32 --learning-rate 5e-5 --num-train-epochs 4 --pairs-per-step 6 --save-every 2"
}
[ ! -e "$run" ] || [ -e "$run/undisturbed.log" ] || { echo "error: $run: exists and is no soak's; give another --run-dir" >&2; exit 2; }
rm -rf "$run"
mkdir -p "$run"
end=$((SECONDS + 60 * minutes)) started=$SECONDS round=0 failed=0
pipeline undisturbed 100000 || { echo "error: the undisturbed run failed; see $run/undisturbed.log" >&2; exit 2; }
echo "undisturbed: $((SECONDS - started)) s"
printf '| round | kills | killed in | seconds | artefacts |\n|---|---|---|---|---|\n'
while [ $SECONDS -lt $end ]; do
    round=$((round + 1)) began=$SECONDS kills=0 where="" code=137
    while [ $code = 137 ]; do
        code=0
        seconds=$((1 + RANDOM % longest))
        pipeline "round-$round" $((SECONDS < end ? seconds : 100000)) || code=$?
        if [ $code = 137 ]; then
            kills=$((kills + 1))
            where="$where $(grep -oP '^== \K[a-z]+(?= )' "$run/round-$round.log" | tail -n 1)"
        elif [ $code != 0 ]; then
            echo "error: round $round failed by itself; see $run/round-$round.log" >&2
            exit 2
        fi
    done
    result="$(python scripts/kill_test.py compare "$run/round-$round" "$run/undisturbed")" || failed=1
    places="$(tr ' ' '\n' <<<"$where" | sed '/^$/d' | sort | uniq -c | awk '{printf "%s%s %s", sep, $2, $1; sep = ", "}')"
    echo "| $round | $kills | $places | $((SECONDS - began)) | ${result//$'\n'/; } |"
    [ "$result" != equal ] || rm -rf "$run/round-$round"
done
exit $failed
