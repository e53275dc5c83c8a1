#!/usr/bin/env bash
# Set up .venv and run the checks:   bash tests/run.sh [pytest args]
#
# Without arguments: ruff, shellcheck, mypy, import contracts, the documentation site, then the whole test suite on two workers.
# At most three failed tests are run once more, alone: one that passes then is reported as unstable, never in silence.
# With arguments: pytest with just those, for instance  bash tests/run.sh tests/unit -k stride
# Property tests draw the same examples in every run; others:  bash tests/run.sh tests/property --hypothesis-profile default
# With  -m gpu  or  -m nullgpu  first: only those tests are collected, on a Python that has what they need ($PYTHON, .venv,
# python3), and nothing is installed, so that a GPU machine needs no network.
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
# One thread per process: several ranks share the cores, and more threads only make them wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

device_python() { # the first Python that can run the tests as it is; prints its path
    local candidate needed="import torch, megatron.core, omegaconf, safetensors, pytest, pytest_timeout, hypothesis"
    for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3; do
        if [ -n "$candidate" ] && "$candidate" -c "$needed" >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "[run] no Python here can import: ${needed#import }" >&2
    echo "[run] install them for one, or run  bash tools/setup.sh  on a machine with a network, or set PYTHON" >&2
    return 1
}

if [ "${1:-}" = -m ] && { [ "${2:-}" = gpu ] || [ "${2:-}" = nullgpu ]; }; then
    python="$(device_python)" || exit 1
    echo "[run] the tests marked $2 with $python, nothing is installed" >&2
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest "tests/$2" "$@"
fi
# shellcheck source=tools/venv.sh
source tools/venv.sh
ensure_venv "$root" || exit 1
VENV_PYTHON="$VENV_PYTHON" bash tests/te/install.sh || echo "[run] the tests marked te will fail" >&2

failed=()

check() { # NAME COMMAND...
    local name="$1" started=$SECONDS
    shift
    echo "[run] $name: $*" >&2
    if "$@"; then
        echo "[run] $name: ok, $((SECONDS - started)) s" >&2
    else
        echo "[run] $name: FAILED" >&2
        failed+=("$name")
    fi
}

shell_check() { # every shell script, and the job scripts that submit.py renders
    local scripts=()
    mapfile -t scripts < <(find .ci examples launch tests tools -name '*.sh' -o -path .ci/run -o -name '*.sbatch' ! -name job.sbatch)
    "$root/.venv/bin/shellcheck" --external-sources --source-path SCRIPTDIR:. "${scripts[@]}"
}

suite() { # the whole suite; a few failures once more, without the ranks of another worker on the same cores
    local failed_tests=.pytest_cache/v/cache/lastfailed names
    "$VENV_PYTHON" -m pytest --cache-clear -n 2 --dist worksteal
    local rc=$?
    [ "$rc" -eq 1 ] || return "$rc" # 1: tests failed; any other status is an error of the run itself
    names="$("$VENV_PYTHON" -c 'import json, sys; print("\n".join(json.load(open(sys.argv[1]))))' "$failed_tests")" || return 1
    [ "$(wc -l <<<"$names")" -le 3 ] || return 1
    echo "[run] once more, alone: ${names//$'\n'/, }" >&2
    "$VENV_PYTHON" -m pytest --last-failed --last-failed-no-failures none || return 1
    echo "[run] UNSTABLE, failed beside other tests and passed alone; look for the reason: ${names//$'\n'/, }" >&2
}

if [ $# -gt 0 ]; then
    exec "$VENV_PYTHON" -m pytest "$@"
fi
check "lint" "$VENV_PYTHON" -m ruff check .
check "format" "$VENV_PYTHON" -m ruff format --check .
check "shell" shell_check
check "types" "$VENV_PYTHON" -m mypy
check "imports" "$root/.venv/bin/lint-imports"
check "docs" env NO_MKDOCS_2_WARNING=1 "$root/.venv/bin/mkdocs" build --quiet --strict
check "tests" suite
if [ ${#failed[@]} -gt 0 ]; then
    echo "[run] failed: ${failed[*]}" >&2
    exit 1
fi
echo "[run] all checks passed in $SECONDS s" >&2
