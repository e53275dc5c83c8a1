#!/usr/bin/env bash
# The second environment: megatron-core 0.19.x beside the one of tests/run.sh, which has 0.16.1 on Python 3.10 and 3.11.
#
#   bash tests/run_newest.sh                 distributed, checkpoints, numerics, one end-to-end run, and a checkpoint
#                                            of either version resumed by the other
#   bash tests/run_newest.sh [pytest args]   just those
#
# PYTHON (default python3) makes .venv-newest. megatron-core 0.19 asks for Python 3.12; on an older one it is installed
# without its dependencies and without that check, which runs the same code: nothing in it needs 3.12 but its metadata.
# V2PE_TORCH_CONSTRAINTS names another constraints file than constraints/newest-cpu.txt.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
constraints="${V2PE_TORCH_CONSTRAINTS:-$root/constraints/newest-cpu.txt}"
python="$root/.venv-newest/bin/python"
say() { echo "[newest] $*" >&2; }

stamp="$(cat pyproject.toml "$constraints" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$root/.venv-newest/stamp" 2>/dev/null)" != "$stamp" ]; then
    base="${PYTHON:-python3}"
    say "making .venv-newest with $("$base" --version 2>&1), versions from $constraints"
    "$base" -m venv --clear "$root/.venv-newest"
    if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        "$python" -m pip install -q -c "$constraints" -e "${root}[test]"
    else
        say "Python before 3.12: megatron-core is installed without its check of the Python version"
        older="$root/.venv-newest/constraints.txt"
        grep -v '^megatron-core' "$constraints" >"$older"
        "$python" -m pip install -q -c "$older" -e "${root}[test]" 'triton>=3'
        "$python" -m pip install -q --no-deps --ignore-requires-python "$(grep '^megatron-core' "$constraints")"
    fi
    echo "$stamp" >"$root/.venv-newest/stamp"
fi
say "$("$python" -W ignore -c 'import sys, torch, megatron.core as m; print("Python", sys.version.split()[0], "torch", torch.__version__, "megatron-core", m.__version__)' 2>/dev/null)"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# For tests/e2e/test_other_mcore.py: the interpreter of the first environment.
export V2PE_OTHER_PYTHON="${V2PE_OTHER_PYTHON:-$root/.venv/bin/python}"
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
exec "$python" -m pytest -n 2 --dist worksteal tests/unit/checkpoint tests/unit/assembly tests/unit/models tests/unit/train \
    tests/distributed tests/numerics tests/e2e/test_train.py tests/e2e/test_train_experts.py tests/e2e/test_other_mcore.py
