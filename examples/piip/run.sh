#!/usr/bin/env bash
# A pyramid (PIIP) against plain vision towers of about the same FLOPs, where resolution matters, over seeds:
#     bash examples/piip/run.sh
#
#   --steps N       training steps of each model (default 500); fewer is a smoke test, it does not learn the task
#   --seeds A,B,..  seeds of weights, pictures and data order (default 0,1,2)
#   --models M,..   of plain, deep, pixels and piip (default: all four)
#   --pictures N    training pictures of a seed (default 8000)
#   --work DIR      folder to work in (default examples/piip/work)
#
# Finished parts are skipped, so running it again after an interruption continues. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here=examples/piip quick=examples/quickstart
work="$here/work" steps=500 seeds=0,1,2 models=plain,deep,pixels,piip pictures=8000

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --steps | --seeds | --models | --pictures | --work)
            if [ $# -lt 2 ]; then echo "run.sh: $1 needs a value" >&2; exit 2; fi
            case "$1" in
                --steps) steps="$2" ;;
                --seeds) seeds="$2" ;;
                --models) models="$2" ;;
                --pictures) pictures="$2" ;;
                --work) work="$(realpath -m "$2")" ;;
            esac
            shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
if ! [[ "$steps" =~ ^[1-9][0-9]*$ && "$pictures" =~ ^[1-9][0-9]*$ ]]; then
    echo "run.sh: --steps is '$steps' and --pictures '$pictures', but both must be whole numbers of at least 1" >&2
    exit 2
fi
if ! [[ "$seeds" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    echo "run.sh: --seeds is '$seeds', but must be whole numbers with commas between" >&2
    exit 2
fi
if ! [[ "$models" =~ ^(plain|deep|pixels|piip)(,(plain|deep|pixels|piip))*$ ]]; then
    echo "run.sh: --models is '$models', but must be of plain, deep, pixels and piip, with commas between" >&2
    exit 2
fi

cd "$root"
# shellcheck source=../../tools/venv.sh
source tools/venv.sh
ensure_venv "$root"
started=$SECONDS
say() { echo "[piip +$((SECONDS - started)) s] $*" >&2; }
v2pe() { "$VENV_PYTHON" -m megatron_v2pe "$@"; }
export OMP_NUM_THREADS=1

settings="steps $steps pictures $pictures"
if [ -e "$work" ] && [ ! -e "$work/.piip" ] && [ -n "$(ls -A "$work")" ]; then
    echo "run.sh: $work was not made by this script; remove it yourself or choose another --work" >&2
    exit 2
fi
if [ -e "$work/.piip" ] && [ "$(cat "$work/.piip")" != "$settings" ]; then
    echo "run.sh: $work was made with '$(cat "$work/.piip")', not '$settings'; give the same, or another --work" >&2
    exit 2
fi
mkdir -p "$work"
echo "$settings" >"$work/.piip"

one() { # seed, model: train and evaluate
    local base="$work/seed_$1" model="$2"
    local run="$base/$model" warmup=$((steps > 40 ? 40 : steps - 1))
    local trained
    trained="$run/checkpoints/step_$(printf %08d "$steps")"
    [ -e "$base/imported/$model/checkpoint.json" ] || v2pe import-hf "$base/models/$model" "$base/imported/$model"
    [ -e "$trained/checkpoint.json" ] || v2pe train "$here/train.yaml" \
        model.checkpoint="$base/imported/$model" data.meta="$base/data/train_meta.json" runtime.run_dir="$run" \
        runtime.seed="$1" optim.steps="$steps" optim.warmup_steps="$warmup" checkpoint.save_every="$steps"
    [ -e "$run/report/scores.json" ] || v2pe evaluate "$trained" --data "$base/data/eval.jsonl" \
        --out "$run/report" --max-new-tokens 4
}

for seed in ${seeds//,/ }; do
    base="$work/seed_$seed"
    mkdir -p "$base/imported"
    [ -d "$base/tokenizer" ] || "$VENV_PYTHON" "$quick/make_checkpoint.py" "$base/tokenizer"
    [ -e "$base/models/pyramid.yaml" ] ||
        "$VENV_PYTHON" "$here/make_models.py" "$base/models" --quickstart "$base/tokenizer" --seed "$seed"
    [ -d "$base/models/piip" ] || v2pe add-piip "$base/models/plain" "$base/models/pyramid.yaml" \
        "$base/models/piip" --seed "$seed"
    [ -e "$base/data/train_meta.json" ] ||
        "$VENV_PYTHON" "$here/make_data.py" "$base/data" --seed "$seed" --train "$pictures"
    # Two models at a time, a core each.
    running=()
    for model in ${models//,/ }; do
        say "seed $seed: $model: $steps steps"
        one "$seed" "$model" >"$base/$model.log" 2>&1 &
        running+=($!)
        if [ ${#running[@]} -eq 2 ]; then
            wait "${running[0]}" || { tail -n 5 "$base"/*.log >&2; exit 1; }
            running=("${running[@]:1}")
        fi
    done
    for process in "${running[@]}"; do
        wait "$process" || { tail -n 5 "$base"/*.log >&2; exit 1; }
    done
done

"$VENV_PYTHON" "$here/figure.py" "$work"
say "done; table and picture are in $work"
