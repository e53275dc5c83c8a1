#!/usr/bin/env bash
# Long-context data from a folder of texts and images, a few steps on it, and an evaluation:
#
#   bash examples/synthetic/run.sh
#
#   --steps N     training steps (default 20: shows the path, does not learn the tasks)
#   --count N     training samples of each of the 13 kinds (default 16)
#   --work DIR    folder to work in (default examples/synthetic/work)
#
# Running it again continues where it stopped. No GPU, no root.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="$root/examples/synthetic/work" steps=20 count=16

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case "$1" in
        --steps | --count | --work)
            if [ $# -lt 2 ]; then echo "run.sh: $1 needs a value" >&2; exit 2; fi
            case "$1" in
                --steps) steps="$2" ;;
                --count) count="$2" ;;
                --work) work="$(realpath -m "$2")" ;;
            esac
            shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run.sh: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
for value in "$steps" "$count"; do
    if ! [[ "$value" =~ ^[1-9][0-9]*$ ]]; then
        echo "run.sh: '$value' must be a whole number of at least 1" >&2
        exit 2
    fi
done

cd "$root"
# shellcheck source=../../tools/venv.sh
source tools/venv.sh
ensure_venv "$root"
export OMP_NUM_THREADS=1
mkdir -p "$work"
say() { echo "[synthetic +${SECONDS} s] $*" >&2; }
v2pe() { "$VENV_PYTHON" -m megatron_v2pe "$@"; }
in="$work/inputs" run="$work/run_${count}_$steps"
trained="$run/checkpoints/step_$(printf %08d "$steps")"

say "1/5 inputs: texts, images and short visual questions from what is installed anyway"
[ -e "$in/vqa.jsonl" ] || "$VENV_PYTHON" examples/synthetic/make_inputs.py "$in"

say "2/5 checkpoint: the quickstart's tiny InternVL2 with random weights"
[ -d "$work/hf" ] || "$VENV_PYTHON" examples/quickstart/make_checkpoint.py "$work/hf" --tokens-per-tile 4
[ -e "$work/imported/checkpoint.json" ] || v2pe import-hf "$work/hf" "$work/imported"

# One image for every 60 tokens of text, because the documents are short; leave --text-per-image out for real lengths.
sources=(--texts "$in/texts" --images "$in/images" --vqa "$in/vqa.jsonl" --vqa-images "$in/images"
    --tokenizer "$work/imported" --tokens 512 --text-per-image 60)
say "3/5 synthesize: training and evaluation samples of every kind, 512 tokens each"
train_meta="$(v2pe synthesize all "${sources[@]}" --split train --count "$count" --out "$work/train_$count")"
eval_meta="$(v2pe synthesize all "${sources[@]}" --split eval --count 2 --out "$work/eval")"

say "4/5 train: $steps steps"
[ -e "$trained/checkpoint.json" ] ||
    v2pe train examples/synthetic/train.yaml model.checkpoint="$work/imported" data.meta="$train_meta" \
        runtime.run_dir="$run" optim.steps="$steps" optim.warmup_steps=$((steps > 5 ? 5 : steps - 1))

say "5/5 evaluate"
v2pe evaluate "$trained" --data "$eval_meta" --stride default,1 --out "$run/report" --max-new-tokens 32
say "done; data is in $work/train_$count and $work/eval, tables and pictures in $run/report"
