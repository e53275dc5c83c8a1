#!/usr/bin/env bash
# The second environment: megatron-core 0.19.x beside the one of tests/run.sh, which has 0.16.1 on Python 3.10 and 3.11.
#
#   bash tests/run_newest.sh                 distributed, checkpoints, numerics, one end-to-end run, and a checkpoint
#                                            of either version resumed by the other (some 15 minutes on two cores)
#   bash tests/run_newest.sh [pytest args]   just those
#
# .venv-newest is made anew when PYTHON, pyproject.toml or the constraints change.
#
#   PYTHON                   interpreter to start from, default python3. megatron-core 0.19 asks for Python 3.12; on 3.10 and
#                            3.11 it is installed without its dependencies and without that check, which runs the same
#                            code: nothing in it needs 3.12 but its metadata.
#   V2PE_TORCH_CONSTRAINTS   versions, default constraints/newest-cpu.txt, which asks for the CPU build of torch. Where no index
#                            has one for your Python:  V2PE_TORCH_CONSTRAINTS=constraints/newest-any.txt  (3 GB of CUDA
#                            libraries come along on Linux; nothing here uses them).
#   V2PE_OTHER_PYTHON        interpreter of the first environment, default .venv/bin/python; "none" leaves out the
#                            comparison with it. It needs the same torch, or bits may differ for another reason.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# shellcheck source=tools/venv.sh
source tools/venv.sh
constraints="${V2PE_TORCH_CONSTRAINTS:-$root/constraints/newest-cpu.txt}"
base="${PYTHON:-python3}"
python="$root/.venv-newest/bin/python"
say() { echo "[newest] $*" >&2; }

install() { # PIP ARGUMENTS
    "$python" -m pip install -q "$@" && return
    _venv_explain_pip "$constraints"
    say "For Python 3.12 and newer:  V2PE_TORCH_CONSTRAINTS=constraints/newest-any.txt bash tests/run_newest.sh"
    exit 1
}

make_environment() {
    say "making .venv-newest with $("$base" --version 2>&1), versions from $constraints"
    "$base" -m venv --clear "$root/.venv-newest"
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        install -c "$constraints" -e "${root}[test]"
    else
        say "Python before 3.12: megatron-core is installed without its check of the Python version"
        local older="$root/.venv-newest/constraints.txt"
        grep -v '^megatron-core' "$constraints" >"$older"
        install -c "$older" -e "${root}[test]" 'triton>=3'
        install --no-deps --ignore-requires-python "$(grep '^megatron-core' "$constraints")"
    fi
    echo "$stamp" >"$root/.venv-newest/stamp"
}

versions() { # INTERPRETER -> versions of torch and megatron-core
    "$1" -W ignore -c 'import torch, megatron.core as m; print(torch.__version__, m.__version__)' 2>/dev/null
}

first_environment() { # IS WHOLE RUN -> interpreter on stdout, nothing where it is not compared with
    local other="${V2PE_OTHER_PYTHON:-$root/.venv/bin/python}" here there
    [ "$other" = none ] && return
    here="$(versions "$python")"
    if ! there="$(versions "$other")"; then
        say "no first environment at $other: bash tests/run.sh makes it, V2PE_OTHER_PYTHON=none leaves out the comparison"
        [ "$1" = no ] && return
        return 1
    fi
    if [ "${here% *}" != "${there% *}" ]; then
        say "NOT compared: the environments have torch ${here% *} and ${there% *}; tests/e2e/test_other_mcore.py is skipped"
        return
    fi
    echo "$other"
}

_venv_check_python "$base" || exit 1
if [ ! -r "$constraints" ]; then
    say "constraints file '$constraints' cannot be read (V2PE_TORCH_CONSTRAINTS names a file)"
    exit 1
fi
stamp="$({ "$base" --version && cat pyproject.toml "$constraints"; } | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$root/.venv-newest/stamp" 2>/dev/null)" != "$stamp" ]; then
    make_environment
fi
say "$("$python" --version), torch and megatron-core $(versions "$python")"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
whole=$([ $# -eq 0 ] && echo yes || echo no)
# For tests/e2e/test_other_mcore.py, which is skipped where it is empty.
V2PE_OTHER_PYTHON="$(first_environment "$whole")" || exit 1
export V2PE_OTHER_PYTHON
if [ "$whole" = no ]; then
    exec "$python" -m pytest "$@"
fi
exec "$python" -m pytest -n 2 --dist worksteal tests/unit/checkpoint tests/unit/assembly tests/unit/models tests/unit/train \
    tests/distributed tests/numerics tests/e2e/test_train.py tests/e2e/test_train_experts.py tests/e2e/test_other_mcore.py
