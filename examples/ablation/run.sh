#!/usr/bin/env bash
# The paper's figure 5 at laptop size: models trained with random, fixed and default visual steps, each asked with all
# steps, over several seeds:   bash examples/ablation/run.sh
#
#   --steps N       training steps of each model (default 400); fewer is a smoke test, it does not learn the task
#   --seeds A,B,..  seeds of weights, data order and strides (default 0,1,2,3,4)
#   --models M,..   of random, fixed_1, fixed_2 and default (default: all four)
#   --eval-share S  share of the evaluation questions, 0..1 (default 1)
#   --work DIR      folder to work in (default examples/ablation/work)
#
# The task and its files are the quickstart's. Finished parts are skipped, so running it again after an interruption
# continues. A model takes about as long as the quickstart; all of them take hours. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here=examples/ablation quick=examples/quickstart
work="$here/work" steps=400 seeds=0,1,2,3,4 models=random,fixed_1,fixed_2,default eval_share=1

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --steps | --seeds | --models | --eval-share | --work)
            if [ $# -lt 2 ]; then echo "run.sh: $1 needs a value" >&2; exit 2; fi
            case "$1" in
                --steps) steps="$2" ;;
                --seeds) seeds="$2" ;;
                --models) models="$2" ;;
                --eval-share) eval_share="$2" ;;
                --work) work="$(realpath -m "$2")" ;;
            esac
            shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
if ! [[ "$steps" =~ ^[1-9][0-9]*$ ]]; then
    echo "run.sh: --steps is '$steps', but must be a whole number of at least 1" >&2
    exit 2
fi
if ! [[ "$seeds" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    echo "run.sh: --seeds is '$seeds', but must be whole numbers with commas between" >&2
    exit 2
fi
if ! [[ "$models" =~ ^(random|fixed_1|fixed_2|default)(,(random|fixed_1|fixed_2|default))*$ ]]; then
    echo "run.sh: --models is '$models', but must be of random, fixed_1, fixed_2, default, with commas between" >&2
    exit 2
fi

cd "$root"
# shellcheck source=../../tools/venv.sh
source tools/venv.sh
ensure_venv "$root"
started=$SECONDS
say() { echo "[ablation +$((SECONDS - started)) s] $*" >&2; }
v2pe() { "$VENV_PYTHON" -m megatron_v2pe "$@"; }
ranks() { "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_v2pe "$@"; }
export OMP_NUM_THREADS=1

settings="steps $steps eval_share $eval_share"
if [ -e "$work" ] && [ ! -e "$work/.ablation" ] && [ -n "$(ls -A "$work")" ]; then
    echo "run.sh: $work was not made by this script; remove it yourself or choose another --work" >&2
    exit 2
fi
if [ -e "$work/.ablation" ] && [ "$(cat "$work/.ablation")" != "$settings" ]; then
    echo "run.sh: $work was made with '$(cat "$work/.ablation")', not '$settings'; give the same, or another --work" >&2
    exit 2
fi
mkdir -p "$work"
echo "$settings" >"$work/.ablation"

position() { # of a model, as overrides
    case "$1" in
        random) echo position.mode=v2pe_random ;;
        fixed_*) echo "position.mode=v2pe_fixed position.stride=${1#fixed_}" ;;
        default) echo position.mode=default ;;
    esac
}

for seed in ${seeds//,/ }; do
    base="$work/seed_$seed"
    mkdir -p "$base"
    [ -d "$base/hf" ] || "$VENV_PYTHON" "$quick/make_checkpoint.py" "$base/hf" --seed "$seed"
    [ -e "$base/data/train_meta.json" ] || "$VENV_PYTHON" "$quick/make_data.py" "$base/data" \
        --checkpoint "$base/hf" --seed "$seed" --eval-share "$eval_share"
    [ -e "$base/imported/checkpoint.json" ] || v2pe import-hf "$base/hf" "$base/imported"
    for model in ${models//,/ }; do
        run="$base/$model"
        trained="$run/checkpoints/step_$(printf %08d "$steps")"
        if [ ! -e "$trained/checkpoint.json" ]; then
            say "seed $seed: $model: train $steps steps"
            # shellcheck disable=SC2046  # two words where a stride is given
            ranks train "$quick/train.yaml" $(position "$model") \
                model.checkpoint="$base/imported" data.meta="$base/data/train_meta.json" runtime.run_dir="$run" \
                runtime.seed="$seed" optim.steps="$steps" optim.warmup_steps=$((steps > 60 ? 60 : steps - 1))
        fi
        say "seed $seed: $model: evaluate at 1x to 8x the trained length with steps of 4/4, 2/4 and 1/4"
        ranks evaluate "$trained" --data "$base/data/eval.jsonl" --stride default,2,1 \
            --out "$run/report" --max-new-tokens 4
    done
done

"$VENV_PYTHON" "$here/figure.py" "$work"
say "done; table and picture are in $work"
