#!/usr/bin/env bash
# The project's main job at laptop size, from nothing to pictures:   bash examples/quickstart/run.sh
#
#   --seeds A,B,..  seeds of weights, documents, data order and strides (default 0); several are trained one after
#                   the other, and a table and a picture show mean and range
#   --steps N       training steps (default 500); fewer is a smoke test, it does not learn the task
#   --eval-share S  share of the evaluation questions, 0..1 (default 1)
#   --ranks N       1 or 2 processes (default 2)
#   --work DIR      folder to work in (default examples/quickstart/work)
#   --fresh         start over: remove what an earlier run left in the work folder
#
# Finished parts are skipped, so running it again after an interruption continues. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
EXAMPLE=quickstart
# shellcheck source=parts.sh
source "$root/examples/quickstart/parts.sh"
work="$QUICKSTART/work" seeds=0 steps=500 eval_share=1 fresh=no

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) fresh=yes; shift ;;
        --seeds | --steps | --eval-share | --ranks | --work)
            [ $# -ge 2 ] || refuse "$1 needs a value"
            case "$1" in
                --seeds) seeds="$2" ;;
                --steps) steps="$2" ;;
                --eval-share) eval_share="$2" ;;
                --ranks) RANKS="$2" ;;
                --work) work="$(realpath -m "$2")" ;;
            esac
            shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; refuse "unknown option '$1'" ;;
    esac
done
check_seeds --seeds "$seeds"
check_whole --steps "$steps"
check_share --eval-share "$eval_share"
check_ranks --ranks "$RANKS"
set_up "$root"
claim_work "$work" "$fresh" "$eval_share"

for seed in ${seeds//,/ }; do
    base="$work/seed_$seed" run="$work/seed_$seed/random_$steps"
    trained="$(step_folder "$run" "$steps")"
    mkdir -p "$base"

    say "1/6 seed $seed: a tiny InternVL2 with random weights, and documents with one marked digit"
    make_inputs "$base" "$seed" "$eval_share"

    say "2/6 import-hf"
    import_weights "$base"

    say "3/6 train: $steps steps on $RANKS ranks, context parallel"
    train_model "$base" "$run" "$seed" "$steps"

    say "4/6 export-hf"
    [ -e "$run/exported/config.json" ] || v2pe export-hf "$trained" "$run/exported"

    say "5/6 verify: exported weights against the trained checkpoint, bit for bit"
    v2pe verify "$run/exported" "$trained"

    say "6/6 evaluate: 1x to 16x the trained length, visual steps of 64/64 (default), 8/64 and 1/64"
    ask_model "$base" "$run" "$steps"
done

say "mean and range over seeds"
"$VENV_PYTHON" "$QUICKSTART/over_seeds.py" "$work" --model "random_$steps"
say "done; tables and pictures are in $work and in $run/report"
echo "Exported checkpoint: $run/exported"
