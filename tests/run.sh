#!/usr/bin/env bash
# Set up .venv and run the checks:   bash tests/run.sh [pytest args]
#
# Without arguments: ruff, shellcheck, mypy, import contracts, the documentation site, then the whole test suite on two workers.
# With arguments: pytest with just those, for instance  bash tests/run.sh tests/unit -k stride
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 1
# shellcheck source=tools/venv.sh
source tools/venv.sh
ensure_venv "$root" || exit 1
VENV_PYTHON="$VENV_PYTHON" bash tests/te/install.sh || echo "[run] the tests marked te will fail" >&2

# One thread per process: several ranks share the cores, and more threads only make them wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
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

if [ $# -gt 0 ]; then
    exec "$VENV_PYTHON" -m pytest "$@"
fi
check "lint" "$VENV_PYTHON" -m ruff check .
check "format" "$VENV_PYTHON" -m ruff format --check .
check "shell" shell_check
check "types" "$VENV_PYTHON" -m mypy
check "imports" "$root/.venv/bin/lint-imports"
check "docs" env NO_MKDOCS_2_WARNING=1 "$root/.venv/bin/mkdocs" build --quiet --strict
check "tests" "$VENV_PYTHON" -m pytest -n 2 --dist worksteal
if [ ${#failed[@]} -gt 0 ]; then
    echo "[run] failed: ${failed[*]}" >&2
    exit 1
fi
echo "[run] all checks passed in $SECONDS s" >&2
