#!/usr/bin/env bash
# The paper's figure 5 at laptop size: models trained with random, fixed and default visual steps, each asked with all
# steps, over several seeds:   bash examples/ablation/run.sh
#
#   --seeds A,B,..  seeds of weights, documents, data order and strides (default 0,1,2,3,4)
#   --models M,..   of random, default and fixed_N, N/64 being the step (default random,fixed_1,fixed_8,default)
#   --steps N       training steps of each model (default 500); fewer is a smoke test, it does not learn the task
#   --eval-share S  share of the evaluation questions, 0..1 (default 1)
#   --ranks N       1 or 2 processes (default 2)
#   --work DIR      folder to work in (default examples/ablation/work); the quickstart's is continued
#
# The task and its parts are the quickstart's. Finished parts are skipped, so running it again after an interruption
# continues. A model takes about as long as the quickstart; all of them take hours. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
EXAMPLE=ablation
# shellcheck source=../quickstart/parts.sh
source "$root/examples/quickstart/parts.sh"
work=examples/ablation/work seeds=0,1,2,3,4 models=random,fixed_1,fixed_8,default steps=500 eval_share=1

usage() { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --seeds | --models | --steps | --eval-share | --ranks | --work)
            [ $# -ge 2 ] || refuse "$1 needs a value"
            case "$1" in
                --seeds) seeds="$2" ;;
                --models) models="$2" ;;
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
model='(random|default|fixed_([1-9]|[1-5][0-9]|6[0-4]))'
[[ "$models" =~ ^$model(,$model)*$ ]] ||
    refuse "--models is '$models', but must be of random, default and fixed_N (N of 1 to 64), with commas between"
set_up "$root"
claim_work "$work" no "$eval_share"

position() { # MODEL -> overrides of train.yaml on stdout
    case "$1" in
        random) echo position.mode=v2pe_random ;;
        default) echo position.mode=default ;;
        fixed_*) echo "position.mode=v2pe_fixed position.stride=${1#fixed_}" ;;
    esac
}

names=()
for model in ${models//,/ }; do names+=("${model}_$steps"); done
for seed in ${seeds//,/ }; do
    base="$work/seed_$seed"
    mkdir -p "$base"
    make_inputs "$base" "$seed" "$eval_share"
    import_weights "$base"
    for model in ${models//,/ }; do
        run="$base/${model}_$steps"
        say "seed $seed: $model: train $steps steps"
        # shellcheck disable=SC2046  # two overrides where a stride is given
        train_model "$base" "$run" "$seed" "$steps" $(position "$model")
        say "seed $seed: $model: evaluate at 1x to 16x the trained length, visual steps of 64/64 (default), 8/64 and 1/64"
        ask_model "$base" "$run" "$steps"
    done
done

PYTHONPATH="$QUICKSTART${PYTHONPATH:+:$PYTHONPATH}" "$VENV_PYTHON" examples/ablation/figure.py "$work" --models "${names[@]}"
say "done; table and picture are in $work"
