# shellcheck shell=bash
# Sourced by run.sh of the quickstart and of the ablation: argument checks, and training and asking one model.
#
# A work folder is WORK/seed_S/{hf,data,imported} and WORK/seed_S/MODEL/{checkpoints,report}. Each function skips what
# is finished, so that a script which calls them in order continues after an interruption.

QUICKSTART=examples/quickstart
STRIDES=default,8,1
RANKS=2

say() { echo "[$EXAMPLE +$((SECONDS - STARTED)) s] $*" >&2; }
refuse() { echo "run.sh: $*" >&2; exit 2; }

check_whole() { # OPTION VALUE
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || refuse "$1 is '$2', but must be a whole number of at least 1"
}

check_seeds() { # OPTION VALUE
    [[ "$2" =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "$1 is '$2', but must be whole numbers with commas between"
}

check_ranks() { # OPTION VALUE
    [[ "$2" =~ ^[12]$ ]] || refuse "$1 is '$2', but must be 1 or 2"
}

check_share() { # OPTION VALUE
    [[ "$2" =~ ^(0?\.[0-9]*[1-9][0-9]*|1|1\.0)$ ]] || refuse "$1 is '$2', but must lie above 0 and be at most 1"
}

set_up() { # ROOT: the environment, and shorthands for one process and for the ranks
    cd "$1" || exit
    # shellcheck source=../../tools/venv.sh
    source tools/venv.sh
    ensure_venv "$1"
    STARTED=$SECONDS
    export OMP_NUM_THREADS=1
}
v2pe() { "$VENV_PYTHON" -m megatron_v2pe "$@"; }
ranks() { "$VENV_PYTHON" tools/torchrun.py --standalone --nproc-per-node "$RANKS" -m megatron_v2pe "$@"; }

claim_work() { # WORK FRESH EVAL_SHARE: only a folder that these scripts made is written to or removed
    local work="$1" mark="$1/.quickstart" settings="eval_share $3"
    if [ -e "$work" ] && [ ! -e "$mark" ] && [ -n "$(ls -A "$work")" ]; then
        refuse "$work was not made by this script; remove it yourself or choose another --work"
    fi
    if [ "$2" = yes ] && [ -e "$work" ]; then
        say "removing $work"
        rm -rf "$work"
    fi
    if [ -e "$mark" ] && [ "$(cat "$mark")" != "$settings" ]; then
        refuse "$work was made with '$(cat "$mark")', not '$settings'; give the same --eval-share, another --work, or --fresh"
    fi
    mkdir -p "$work"
    echo "$settings" >"$mark"
}

make_inputs() { # BASE SEED EVAL_SHARE: random weights, documents
    [ -d "$1/hf" ] || "$VENV_PYTHON" "$QUICKSTART/make_checkpoint.py" "$1/hf" --seed "$2"
    [ -e "$1/data/train_meta.json" ] || "$VENV_PYTHON" "$QUICKSTART/make_data.py" "$1/data" \
        --checkpoint "$1/hf" --seed "$2" --eval-share "$3"
}

import_weights() { # BASE
    [ -e "$1/imported/checkpoint.json" ] || v2pe import-hf "$1/hf" "$1/imported"
}

step_folder() { # RUN STEPS -> folder of the last checkpoint on stdout
    echo "$1/checkpoints/step_$(printf %08d "$2")"
}

train_model() { # BASE RUN SEED STEPS [overrides of train.yaml]
    local base="$1" run="$2" seed="$3" steps="$4"
    shift 4
    [ ! -e "$(step_folder "$run" "$steps")/checkpoint.json" ] || return 0
    ranks train "$QUICKSTART/train.yaml" "$@" \
        model.checkpoint="$base/imported" data.meta="$base/data/train_meta.json" runtime.run_dir="$run" \
        runtime.seed="$seed" parallel.cp="$RANKS" optim.steps="$steps" optim.warmup_steps=$((steps > 30 ? 30 : steps - 1))
}

ask_model() { # BASE RUN STEPS
    ranks evaluate "$(step_folder "$2" "$3")" --data "$1/data/eval.jsonl" --stride "$STRIDES" \
        --out "$2/report" --metrics "$2/metrics.jsonl" --max-new-tokens 4
}
