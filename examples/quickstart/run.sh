#!/usr/bin/env bash
# The project's main job at laptop size, from nothing to pictures:   bash examples/quickstart/run.sh
#
#   --fresh         start over: remove what an earlier run left in the work folder
#   --steps N       training steps (default 400); fewer is a smoke test, it does not learn the task
#   --eval-share S  share of the evaluation questions, 0..1 (default 1)
#   --work DIR      folder to work in (default examples/quickstart/work)
#
# Finished parts are skipped, so running it again after an interruption continues. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here=examples/quickstart
work="$here/work" steps=400 eval_share=1 fresh=no

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) fresh=yes; shift ;;
        --steps | --eval-share | --work)
            if [ $# -lt 2 ]; then echo "run.sh: $1 needs a value" >&2; exit 2; fi
            case "$1" in
                --steps) steps="$2" ;;
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
if ! [[ "$eval_share" =~ ^(0?\.[0-9]+|1|1\.0)$ ]]; then
    echo "run.sh: --eval-share is '$eval_share', but must lie above 0 and be at most 1" >&2
    exit 2
fi

cd "$root"
# shellcheck source=../../tools/venv.sh
source tools/venv.sh
ensure_venv "$root"
started=$SECONDS
say() { echo "[quickstart +$((SECONDS - started)) s] $*" >&2; }
v2pe() { "$VENV_PYTHON" -m megatron_v2pe "$@"; }
ranks() { "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_v2pe "$@"; }

# Only a folder that this script made is written to or removed.
if [ -e "$work" ] && [ ! -e "$work/.quickstart" ] && [ -n "$(ls -A "$work")" ]; then
    echo "run.sh: $work was not made by this script; remove it yourself or choose another --work" >&2
    exit 2
fi
if [ "$fresh" = yes ] && [ -e "$work" ]; then
    say "removing $work"
    rm -rf "$work"
fi
mkdir -p "$work"
if [ -e "$work/.quickstart" ] && [ "$(cat "$work/.quickstart")" != "eval_share $eval_share" ]; then
    echo "run.sh: $work was made with '$(cat "$work/.quickstart")', not 'eval_share $eval_share';" \
        "give the same --eval-share, another --work, or --fresh" >&2
    exit 2
fi
echo "eval_share $eval_share" >"$work/.quickstart"

run="$work/run_$steps"
trained="$run/checkpoints/step_$(printf %08d "$steps")"
export OMP_NUM_THREADS=1

say "1/7 checkpoint: a tiny InternVL2 with random weights"
[ -d "$work/hf" ] || "$VENV_PYTHON" "$here/make_checkpoint.py" "$work/hf"

say "2/7 data: documents with one marked digit"
[ -e "$work/data/train_meta.json" ] ||
    "$VENV_PYTHON" "$here/make_data.py" "$work/data" --checkpoint "$work/hf" --eval-share "$eval_share"

say "3/7 import-hf"
[ -e "$work/imported/checkpoint.json" ] || v2pe import-hf "$work/hf" "$work/imported"

say "4/7 train: $steps steps on 2 ranks, context parallel"
if [ ! -e "$trained/checkpoint.json" ]; then
    ranks train "$here/train.yaml" \
        model.checkpoint="$work/imported" data.meta="$work/data/train_meta.json" runtime.run_dir="$run" \
        optim.steps="$steps" optim.warmup_steps=$((steps > 60 ? 60 : steps - 1))
fi

say "5/7 export-hf"
[ -e "$run/exported/config.json" ] || v2pe export-hf "$trained" "$run/exported"

say "6/7 verify: exported weights against the trained checkpoint, bit for bit"
v2pe verify "$run/exported" "$trained"

say "7/7 evaluate: 1x to 8x the trained length, visual positions in steps of 4/4 (default), 2/4 and 1/4"
ranks evaluate "$trained" --data "$work/data/eval.jsonl" --strides default,2,1 \
    --out "$run/report" --metrics "$run/metrics.jsonl" --max-new-tokens 4

say "done; pictures and tables are in $run/report"
echo "Exported checkpoint: $run/exported"
