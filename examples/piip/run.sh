#!/usr/bin/env bash
# A pyramid (PIIP) against plain vision towers of about the same FLOPs, where resolution matters, over seeds:
#     bash examples/piip/run.sh
#
#   --steps N       training steps of each model (default 500); fewer is a smoke test, it does not learn the task
#   --seeds A,B,..  seeds of weights, pictures and data order (default 0,1,2)
#   --models M,..   of plain, deep, pixels, piip and llava (default: all five)
#   --pictures N    training pictures of a seed (default 8000)
#   --work DIR      folder to work in (default examples/piip/work)
#
# Finished parts are skipped and a training run that was ended continues from its last checkpoint, so running it again after an
# interruption continues. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here=examples/piip quick=examples/quickstart
work="$here/work" steps=500 seeds=0,1,2 models=plain,deep,pixels,piip,llava pictures=8000

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

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
if ! [[ "$models" =~ ^(plain|deep|pixels|piip|llava)(,(plain|deep|pixels|piip|llava))*$ ]]; then
    echo "run.sh: --models is '$models', but must be of plain, deep, pixels, piip and llava, with commas between" >&2
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

recipe_of() { if [ "$1" = llava ]; then echo readout_llava.yaml; else echo pyramid.yaml; fi; }

prepare() { # seed: data, folders of its models
    local base="$work/seed_$1" model
    mkdir -p "$base/imported"
    [ -d "$base/tokenizer" ] || "$VENV_PYTHON" "$quick/make_checkpoint.py" "$base/tokenizer"
    [ -e "$base/models/pyramid.yaml" ] ||
        "$VENV_PYTHON" "$here/make_models.py" "$base/models" --quickstart "$base/tokenizer" --seed "$1"
    for model in piip llava; do
        [ -d "$base/models/$model" ] || v2pe add-piip "$base/models/plain" "$base/models/$(recipe_of $model)" \
            "$base/models/$model" --seed "$1"
    done
    [ -e "$base/data/train_meta.json" ] ||
        "$VENV_PYTHON" "$here/make_data.py" "$base/data" --seed "$1" --train "$pictures"
}

one() { # seed, model: train and evaluate; a TERM ends what runs, and a training run saves first
    local base="$work/seed_$1" model="$2" child=""
    local run="$base/$model" warmup=$((steps > 40 ? 40 : steps - 1))
    local trained
    trained="$run/checkpoints/step_$(printf %08d "$steps")"
    trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; wait; exit 143' TERM
    child_v2pe() { v2pe "$@" & child=$!; wait "$child"; }
    [ -e "$base/imported/$model/checkpoint.json" ] ||
        child_v2pe import-hf "$base/models/$model" "$base/imported/$model" || return
    [ -e "$trained/checkpoint.json" ] || child_v2pe train "$here/train.yaml" \
        model.checkpoint="$base/imported/$model" data.meta="$base/data/train_meta.json" runtime.run_dir="$run" \
        runtime.seed="$1" optim.steps="$steps" optim.warmup_steps="$warmup" || return
    [ -e "$run/report/scores.json" ] || child_v2pe evaluate "$trained" --data "$base/data/eval.jsonl" \
        --out "$run/report" --max-new-tokens 4
}

# Two models at a time, a core each. Whatever ends this script ends them too.
running=0 done_now=0 failed=""
stop() { local job; for job in $(jobs -p); do kill -TERM "$job" 2>/dev/null || true; done; wait; }
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wait_for_one() {
    wait -n || failed=1
    running=$((running - 1)) done_now=$((done_now + 1))
    [ -z "$failed" ] || { echo "run.sh: a model failed; the last lines of each log:" >&2; tail -n 5 "$work"/seed_*/*.log >&2; exit 1; }
    # What runs counts as half done.
    local left=$((${#todo[@]} - done_now)) halves=$((2 * done_now + running))
    [ "$left" -eq 0 ] ||
        say "$left of ${#todo[@]} models left, about $(((SECONDS - began) * (2 * ${#todo[@]} - halves) / halves / 60 + 1)) min"
}

todo=()
for seed in ${seeds//,/ }; do
    say "seed $seed: pictures and models"
    prepare "$seed"
    for model in ${models//,/ }; do
        [ -e "$work/seed_$seed/$model/report/scores.json" ] || todo+=("$seed $model")
    done
done
began=$SECONDS
for job in ${todo[@]+"${todo[@]}"}; do
    read -r seed model <<<"$job"
    [ "$running" -lt 2 ] || wait_for_one
    say "seed $seed: $model: $steps steps; log in $work/seed_$seed/$model.log"
    one "$seed" "$model" >"$work/seed_$seed/$model.log" 2>&1 </dev/null &
    running=$((running + 1))
done
while [ "$running" -gt 0 ]; do wait_for_one; done

"$VENV_PYTHON" "$here/figure.py" "$work"
say "done; table and picture are in $work"
